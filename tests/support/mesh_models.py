"""Body-mesh models, bodies and batches small enough for every test. Imports torch and the package."""

from typing import Any

import torch

from hf_dropkey.models.configuration_dropkey_mesh import DropKeyMeshConfig
from hf_dropkey.models.modeling_dropkey_mesh import DropKeyMeshForBodyMesh


def backbone(*widths: int) -> dict[str, Any]:
    return {
        "model_type": "resnet",
        "embedding_size": 4,
        "hidden_sizes": list(widths),
        "depths": [1] * len(widths),
        "layer_type": "basic",
        "out_features": [f"stage{index + 1}" for index in range(len(widths))],
    }


def tiny_config(system: str = "metro", **kwargs: Any) -> DropKeyMeshConfig:
    fields: dict[str, Any] = {
        "backbone_config": backbone(8, 12),
        "image_size": 32,
        "feature_grid": [4, 4],
        "num_vertices": [10, 20, 40],
        "num_faces": 30,
        "hidden_sizes": [16, 12, 8],
        "stage_output_sizes": [12, 8],
        "intermediate_sizes": [16, 16, 16],
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "camera_hidden_size": 6,
        "dropkey_ratio": 0.3,
    }
    if system == "graphormer":
        fields |= {"token_source": "pooled", "use_grid_tokens": True, "graph_stages": [2]}
    return DropKeyMeshConfig(**{**fields, **kwargs})


def random_body(config: DropKeyMeshConfig) -> dict[str, Any]:
    coarse, middle, full = config.num_vertices

    def rows(*shape: int) -> torch.Tensor:
        drawn = torch.rand(*shape)
        return drawn / drawn.sum(1, keepdim=True)

    return {
        "template": torch.randn(full, 3),
        "faces": torch.randint(full, (config.num_faces, 3)),
        "joint_regressor": rows(config.num_regressor_rows, full),
        "downsampling": (rows(middle, full), rows(coarse, middle)),
        "upsampling": (rows(middle, coarse), rows(full, middle)),
        "adjacency": rows(coarse, coarse),
    }


def tiny_model(system: str = "metro", **kwargs: Any) -> DropKeyMeshForBodyMesh:
    torch.manual_seed(0)
    config = tiny_config(system, **kwargs)
    model = DropKeyMeshForBodyMesh(config).eval()
    model.set_body(**random_body(config))
    return model


def tiny_batch(config: DropKeyMeshConfig, count: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    full, joints = config.num_vertices[2], config.num_joints
    return {
        "pixel_values": torch.randn(count, 3, 32, 32),
        "joints_3d": torch.cat((torch.randn(count, joints, 3), torch.ones(count, joints, 1)), -1),
        "joints_2d": torch.cat((torch.rand(count, joints, 2), torch.ones(count, joints, 1)), -1),
        "vertices": torch.randn(count, full, 3),
        "has_joints_3d": torch.ones(count),
        "has_vertices": torch.ones(count),
    }
