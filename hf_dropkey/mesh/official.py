"""Names and sizes in official checkpoints of METRO and MeshGraphormer, and what they become here."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.configuration_dropkey_mesh import DropKeyMeshConfig
from ..models.modeling_dropkey_mesh import DropKeyMeshForBodyMesh


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


# --- conversion ------------------------------------------------------------------------------------------------------

# arrays of a body file (npz) and of `DropKeyMeshForBodyMesh.set_body`
BODY_ARRAYS = ("template", "faces", "joint_regressor", "downsample_mid", "downsample_coarse")
LICENCE = (
    "The template, regressor and down-sampling of SMPL come from its owners, after registration, for non-commercial use "
    "only; their licence reaches networks trained with them, and so the converted model. METRO's and MeshGraphormer's "
    "code is MIT, their weights are not."
)
RESNET_NAMES = (
    (r"^backbone\.conv1\.", "mesh.backbone.embedder.embedder.convolution."),
    (r"^backbone\.bn1\.", "mesh.backbone.embedder.embedder.normalization."),
    (r"^backbone\.layer(\d)\.(\d+)\.conv(\d)\.", lambda f: _resnet(f, f"layer.{int(f[3]) - 1}.convolution.")),
    (r"^backbone\.layer(\d)\.(\d+)\.bn(\d)\.", lambda f: _resnet(f, f"layer.{int(f[3]) - 1}.normalization.")),
    (r"^backbone\.layer(\d)\.(\d+)\.downsample\.0\.", lambda f: _resnet(f, "shortcut.convolution.")),
    (r"^backbone\.layer(\d)\.(\d+)\.downsample\.1\.", lambda f: _resnet(f, "shortcut.normalization.")),
)


class OfficialError(ValueError):
    """The checkpoint or the body is not what was requested."""


def _resnet(found: re.Match, rest: str) -> str:
    """A layer of Transformers' ResNet by the numbers of torchvision's."""
    return f"mesh.backbone.encoder.stages.{int(found[1]) - 1}.layers.{found[2]}.{rest}"


def rename_resnet(name: str) -> str:
    """Our name of a tensor of torchvision's ResNet."""
    for pattern, replacement in RESNET_NAMES:
        changed = re.sub(pattern, replacement, name)
        if changed != name:
            return changed
    return name


def split_backbone(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of the transformer, and those of the CNN."""
    rest = {name: value for name, value in weights.items() if not name.startswith("backbone.")}
    return rest, {name: value for name, value in weights.items() if name.startswith("backbone.")}


def is_hrnet(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether the weights of a CNN, by official names, are an HRNet's."""
    return any(".stage2." in name or ".incre_modules." in name for name in weights)


def about_backbone(cnn: Mapping[str, torch.Tensor], placed: Mapping[str, torch.Tensor], config: Any) -> str:
    """One line on what became of a checkpoint's CNN, and what stands in its place."""
    if placed:
        return f"CNN: {len(placed)} tensors of a ResNet."
    new = f"a new {config.model_type} takes its place and must be trained; for another give --config"
    if not cnn:
        return f"CNN: the checkpoint has none, {new}."
    kind = "an HRNet-W64" if is_hrnet(cnn) else "the checkpoint's own"
    values = sum(value.numel() for value in cnn.values())
    return f"CNN: {kind}: {len(cnn)} tensors, {values:,} values, such as {next(iter(cnn))}, left out; {new}."


def backbone_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a ResNet-50 by our names; none for a checkpoint without a CNN.

    Raises:
        OfficialError: The CNN is an HRNet, or no ResNet.
    """
    if is_hrnet(weights):
        raise OfficialError(
            "The CNN of this checkpoint is an HRNet-W64, whose 2048-channel map no backbone of Transformers returns without "
            "timm. Pass --new_backbone True to convert the transformer alone, with a new ResNet-50 to train, or with a "
            "backbone of yours: --config with a folder whose config.json has it as backbone_config (any AutoBackbone)."
        )
    # the classifier on ImageNet's classes takes part in nothing
    named = {rename_resnet(name): value for name, value in weights.items() if not name.startswith("backbone.fc.")}
    unknown = [name for name in named if not name.startswith("mesh.")]
    if unknown:
        raise OfficialError(
            f"The CNN of this checkpoint is not a ResNet of torchvision: {', '.join(unknown[:4])}, ... Pass --new_backbone "
            "True to convert the transformer alone."
        )
    return named


def read_body(file: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `set_body` from an npz file of the user's, without any pickle.

    Raises:
        OfficialError: Arrays are missing, or of a body with another number of vertices than the checkpoint's.
    """
    wanted = [*BODY_ARRAYS, *(["adjacency"] if fields["graph_stages"] else [])]
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(arrays[name]) for name in wanted if name in arrays}
    except ValueError as error:
        raise OfficialError(
            f"{file} cannot be read without running code from it: {error}. Save plain arrays with numpy.savez."
        ) from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise OfficialError(f"{file} lacks the arrays {', '.join(missing)}; it needs {', '.join(wanted)}. {LICENCE}")
    if len(found["template"]) != fields["num_vertices"][-1]:
        raise OfficialError(
            f"{file} has a template of {len(found['template'])} vertices, the checkpoint predicts "
            f"{fields['num_vertices'][-1]}."
        )
    down = (found.pop("downsample_mid").float(), found.pop("downsample_coarse").float())
    faces = found.pop("faces").long()
    return {**{name: value.float() for name, value in found.items()}, "faces": faces, "downsampling": down}


def official_report(weights: Mapping[str, torch.Tensor], dead: Mapping[str, torch.Tensor], backbone: str) -> str:
    """One line for every tensor that takes part, the dead ones by name and size, and what became of the CNN."""
    width = max(map(len, weights))
    lines = [f"{name:<{width}}  ->  {rename(name)}  {tuple(value.shape)}" for name, value in weights.items()]
    dropped = sum(value.numel() for value in dead.values())
    lines.append(f"{len(lines)} tensors, {sum(value.numel() for value in weights.values()):,} values, all placed")
    lines += [
        f"{name:<{width}}  takes part in nothing, left out  {tuple(value.shape)}" for name, value in dead.items()
    ]
    return "\n".join([*lines, f"{len(dead)} dead tensors, {dropped:,} values", backbone, LICENCE])


def convert_official(
    weights: Mapping[str, torch.Tensor],
    body_file: Path,
    *,
    config: DropKeyMeshConfig | None = None,
    new_backbone: bool = False,
) -> tuple[DropKeyMeshForBodyMesh, str]:
    """The model of an official checkpoint with a body of the user's, and the report.

    Args:
        weights: By official names.
        body_file: An npz file with `BODY_ARRAYS`, and `adjacency` for MeshGraphormer.
        config: Of a size that was not published; None reads it off the shapes, with four heads and a ResNet-50.
        new_backbone: Leave the checkpoint's CNN out.

    Raises:
        OfficialError: Weights or body are not what they should be.
    """
    rest, cnn = split_backbone(weights)
    try:
        fields = read_fields(rest)
    except KeyError as error:
        raise OfficialError(
            f"The checkpoint has no tensor {error}, so it is neither METRO nor MeshGraphormer."
        ) from error
    living, dead = split_dead(rest)
    body = read_body(body_file, fields)
    positions = rest["conv_learn_tokens.weight"].shape[1] if "conv_learn_tokens.weight" in rest else 49
    side = round(positions**0.5)
    made = config or DropKeyMeshConfig(
        **fields, feature_grid=[side, side], image_size=32 * side, num_faces=len(body["faces"]), dropkey_ratio=0.0
    )
    model = DropKeyMeshForBodyMesh(made).eval()
    placed = {} if new_backbone else backbone_weights(cnn)
    own = {name: value for name, value in model.state_dict().items() if ".backbone." in name or ".body." in name}
    result = model.load_state_dict({**own, **placed, **living}, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise OfficialError(
            f"The checkpoint does not fit: {len(result.missing_keys)} tensors missing ({result.missing_keys[:4]}), "
            f"{len(result.unexpected_keys)} not in the model ({result.unexpected_keys[:4]}). For another size pass "
            "--config with a folder that holds its config.json."
        )
    model.set_body(**body)
    about = about_backbone(cnn, placed, made.backbone_config)
    return model, official_report({name: rest[name] for name in rest if not is_dead(name)}, dead, about)
