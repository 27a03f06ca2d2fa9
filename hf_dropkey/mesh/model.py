"""From arguments to a body, a checked configuration, a model with that body, and an image processor."""

import importlib
from typing import Any

import numpy as np
import torch
from transformers import AutoBackbone, AutoConfig, BaseImageProcessor, ViTImageProcessorPil
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..models.configuration_dropkey_mesh import DropKeyMeshConfig
from ..models.modeling_dropkey_mesh import DropKeyMeshForBodyMesh
from ..saved import check_attention, check_model_source
from ..training.arguments import DropKeyArguments
from .anny_body import anny_body
from .arguments import MeshModelArguments
from .bodies import Body, procedural_body
from .topology import Topology, make_topology


PUBLISHED_LEVELS = (431, 1723)
# trains in two minutes on one thread
NANO: dict[str, Any] = {
    # batch norm learns in a third of the steps that a ConvNeXt of this size needs
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 24,
        "hidden_sizes": [24, 48, 96],
        "depths": [1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage3"],
    },
    "image_size": 64,
    "hidden_sizes": [96, 48, 24],
    "stage_output_sizes": [64, 32],
    "intermediate_sizes": [192, 96, 48],
    "num_hidden_layers": 2,
    "camera_hidden_size": 32,
}
NANO_LEVELS = (48, 240)


def make_body(name: str) -> Body:
    """The body that `--body` names.

    Raises:
        ValueError, ImportError: There is no such body, or what makes it is not installed.
    """
    if name == "procedural":
        return procedural_body()
    if name == "anny" or name.startswith("anny:"):
        return anny_body(*filter(None, [name.partition(":")[2]]))
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(
            f"--body {name} is not a body. Choose procedural, anny, anny:TOPOLOGY, or module:function of yours."
        )
    try:
        body = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--body {name} cannot be made: {error}. Is the module on PYTHONPATH?") from error
    for attribute in ("faces", "template", "joint_regressor", "sample"):
        if not hasattr(body, attribute):
            raise ValueError(
                f"--body {name} returned {type(body).__name__}, which has no `{attribute}`; see "
                "hf_dropkey.mesh.bodies.Body, and LayerBody for an SMPL layer."
            )
    made: Body = body
    return made


def feature_grid(backbone: Any, image_size: int, num_channels: int) -> list[int]:
    """Rows and columns of a backbone's last feature map."""
    with torch.no_grad():
        shape = backbone.eval()(torch.zeros(1, num_channels, image_size, image_size)).feature_maps[-1].shape
    return list(shape[-2:])


def make_config(
    model: MeshModelArguments, dropkey: DropKeyArguments, body: Body
) -> tuple[DropKeyMeshConfig, Topology | None]:
    """The configuration, and the body's meshes for a model from scratch.

    Raises:
        ValueError: A value is not allowed, or the model is of another family.
    """
    check_attention(model.attn_implementation)
    given = dropkey.given_to_native("a body-mesh model")
    for name in ("masked_ratio", "hidden_dropout_prob", "attention_probs_dropout_prob"):
        if getattr(model, name) is not None:
            given[name] = getattr(model, name)
    if model.model_name_or_path:
        return trained_config(model, given), None
    nano = model.model_size == "nano"
    levels = model.mesh_levels or (NANO_LEVELS if nano else published_levels(len(body.template)))
    topology = make_topology(body, levels)
    settings: dict[str, Any] = dict(NANO) if nano else {}
    if model.system == "graphormer":
        settings |= {"token_source": "pooled", "use_grid_tokens": True, "graph_stages": [2]}
        if nano:
            settings["backbone_config"] = {**settings["backbone_config"], "out_features": ["stage2", "stage3"]}
        else:
            settings |= {"hidden_sizes": [1024, 256, 64], "intermediate_sizes": [2048, 512, 128]}
    if model.image_size is not None:
        settings["image_size"] = model.image_size
    if model.backbone is not None:
        settings["backbone_config"] = backbone_config(model)
    settings |= {"num_vertices": topology.num_vertices, "num_faces": len(topology.faces)}
    # the grid is what the backbone makes of an image, known once it is built
    config = DropKeyMeshConfig(**settings, **given, max_position_embeddings=100_000)
    channels, side = config.num_channels, config.image_size
    config.feature_grid = feature_grid(AutoBackbone.from_config(config.backbone_config), side, channels)
    config.max_position_embeddings = config.num_tokens
    config.validate()
    return config, topology


def published_levels(vertices: int) -> tuple[int, int]:
    """Vertices of the coarse and the middle mesh: METRO's, or fewer for a body with fewer."""
    if vertices >= 2 * PUBLISHED_LEVELS[1]:
        return PUBLISHED_LEVELS
    return max(1, vertices // 16), max(1, vertices // 4)


def backbone_config(model: MeshModelArguments) -> Any:
    """The configuration of a pretrained backbone, with the feature maps that the system takes."""
    config = AutoConfig.from_pretrained(str(model.backbone))
    names = list(getattr(config, "stage_names", []))
    if not names:
        raise ValueError(
            f"--backbone {model.backbone} ({config.model_type}) is not a backbone that AutoBackbone knows."
        )
    config.out_features = names[-2:] if model.system == "graphormer" else names[-1:]
    return config


def trained_config(model: MeshModelArguments, given: dict[str, Any]) -> DropKeyMeshConfig:
    """The configuration of a trained model, with what was given.

    Raises:
        ValueError: It is of another family.
    """
    source = str(model.model_name_or_path)
    check_model_source(source)
    found, _ = DropKeyMeshConfig.get_config_dict(source, revision=model.revision)
    if found.get("model_type") != DropKeyMeshConfig.model_type:
        raise ValueError(
            f"{source} has model_type {found.get('model_type')!r}; training starts from {DropKeyMeshConfig.model_type!r}. "
            "scripts/convert_checkpoint.py converts official weights of METRO and MeshGraphormer."
        )
    config = DropKeyMeshConfig.from_pretrained(source, revision=model.revision, **given)
    config.validate()
    return config


def make_model(
    config: DropKeyMeshConfig, topology: Topology | None, model: MeshModelArguments, body: Body
) -> DropKeyMeshForBodyMesh:
    """The model with its body: new, or a trained one whose body must be the given one.

    Raises:
        ValueError: The trained model is of another body.
    """
    if topology is None:
        trained = DropKeyMeshForBodyMesh.from_pretrained(
            model.model_name_or_path,
            config=config,
            revision=model.revision,
            attn_implementation=model.attn_implementation,
        )
        check_same_body(trained, body)
        return trained
    made = DropKeyMeshForBodyMesh._from_config(config, attn_implementation=model.attn_implementation)
    made.set_body(**topology.tensors())
    if model.backbone is not None:
        backbone: Any = config.backbone_config
        weights = AutoBackbone.from_pretrained(model.backbone, out_features=backbone.out_features)
        made.mesh.backbone.load_state_dict(weights.state_dict())
    return made


def check_same_body(model: DropKeyMeshForBodyMesh, body: Body) -> None:
    """Raises ValueError where a checkpoint predicts another topology, or another person's proportions, than a body's."""
    own = model.mesh.body
    faces, template = own.faces.cpu().numpy(), own.template.float().cpu().numpy()
    if faces.shape != np.shape(body.faces) or not np.array_equal(faces, body.faces):
        raise ValueError(
            f"The checkpoint predicts a mesh of {len(template)} vertices and {len(faces)} triangles, the body has "
            f"{len(body.template)} and {len(body.faces)}, or connects them otherwise. Name the checkpoint's body with "
            "--body."
        )
    apart = np.abs(template - body.template).max()
    if apart > 1e-3:
        raise ValueError(
            f"The checkpoint's template differs from the body's by up to {1000 * apart:.0f} mm. Name the checkpoint's body "
            "with --body."
        )


def image_processor(config: DropKeyMeshConfig) -> BaseImageProcessor:
    """The evaluation transform of a crop: resize and normalise as on ImageNet."""
    color = config.num_channels == 3
    return ViTImageProcessorPil(
        size={"height": config.image_size, "width": config.image_size},
        image_mean=IMAGENET_DEFAULT_MEAN if color else [0.5],
        image_std=IMAGENET_DEFAULT_STD if color else [0.5],
        do_convert_rgb=color,
    )
