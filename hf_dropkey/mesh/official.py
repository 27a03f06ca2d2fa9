"""Names and sizes in official checkpoints of METRO and MeshGraphormer, and what they become here."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch


# in the files, but in no computation: BERT's word embeddings and poolers, and MeshGraphormer's `skip_conv`
DEAD = re.compile(r"\.bert\.embeddings\.|\.bert\.pooler\.|\.graph_conv\.skip_conv\.")
NAMES = (
    (r"^trans_encoder\.(\d+)\.bert\.encoder\.layer\.", r"mesh.stages.\1.layers."),
    (r"^trans_encoder\.(\d+)\.bert\.img_embedding\.", r"mesh.stages.\1.embedding."),
    (r"^trans_encoder\.(\d+)\.bert\.position_embeddings\.", r"mesh.stages.\1.position_embeddings."),
    (r"^trans_encoder\.(\d+)\.cls_head\.", r"mesh.stages.\1.head."),
    (r"^trans_encoder\.(\d+)\.residual\.", r"mesh.stages.\1.residual."),
    (r"^upsampling2\.", "upsampling.1."),
    (r"^upsampling\.", "upsampling.0."),
    (r"^conv_learn_tokens\.", "mesh.embeddings.token_projection."),
    (r"^grid_feat_dim\.", "mesh.embeddings.grid_projection."),
    (r"^cam_param_fc\.", "camera.vertex."),
    (r"^cam_param_fc2\.", "camera.hidden."),
    (r"^cam_param_fc3\.", "camera.output."),
)


def is_dead(name: str) -> bool:
    """Whether an official tensor takes part in no computation."""
    return DEAD.search(name) is not None


def rename(name: str) -> str:
    """Our name of an official tensor; a name that is in no table stays."""
    for pattern, replacement in NAMES:
        changed = re.sub(pattern, replacement, name)
        if changed != name:
            return changed
    return name


def split_dead(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Official weights by our names, and those that are dead by their own names."""
    living = {rename(name): value for name, value in weights.items() if not is_dead(name)}
    return living, {name: value for name, value in weights.items() if is_dead(name)}


def _count(pattern: str, names: Iterable[str]) -> int:
    """One more than the largest number that `pattern` finds in the names."""
    return 1 + max((int(found[1]) for name in names if (found := re.search(pattern, name))), default=-1)


def read_fields(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The configuration fields that the shapes of an official checkpoint tell.

    Raises:
        KeyError: A tensor is missing without which it is none of these systems.
    """
    stages = _count(r"^trans_encoder\.(\d+)\.", weights)
    layers = _count(r"^trans_encoder\.0\.bert\.encoder\.layer\.(\d+)\.", weights)
    first = "trans_encoder.{}.bert.encoder.layer.0."
    coarse, middle = weights["upsampling.weight"].shape[1], weights["upsampling.weight"].shape[0]
    fields: dict[str, Any] = {
        "num_vertices": [coarse, middle, weights["upsampling2.weight"].shape[0]],
        "hidden_sizes": [len(weights[f"trans_encoder.{i}.bert.img_embedding.weight"]) for i in range(stages)],
        "stage_output_sizes": [len(weights[f"trans_encoder.{i}.cls_head.weight"]) for i in range(stages - 1)],
        "intermediate_sizes": [len(weights[first.format(i) + "intermediate.dense.weight"]) for i in range(stages)],
        "num_hidden_layers": layers,
        "max_position_embeddings": len(weights["trans_encoder.0.bert.position_embeddings.weight"]),
        "camera_hidden_size": len(weights["cam_param_fc2.weight"]),
        "graph_stages": [i for i in range(stages) if f"{first.format(i)}graph_conv.lin1.W" in weights],
        "use_grid_tokens": "grid_feat_dim.weight" in weights,
        "token_source": "positions" if "conv_learn_tokens.weight" in weights else "pooled",
    }
    return fields
