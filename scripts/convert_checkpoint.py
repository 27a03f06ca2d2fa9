"""Converts an official checkpoint of T2T-ViT, VOLO, CeiT, QPIC, METRO or MeshGraphormer into a saved folder.

    python scripts/convert_checkpoint.py --family volo --checkpoint d1_224_84.2.pth.tar --out outputs/volo_d1
    python scripts/convert_checkpoint.py --family metro --checkpoint metro.bin --body_file smpl.npz --out outputs/metro
    python scripts/convert_checkpoint.py --family qpic --checkpoint qpic_resnet50_hico.pth --out outputs/qpic_hico

The size, the image size and the number of classes are read off the shapes. Every tensor is reported, none may be left
over or missing, and the logits are compared with those of timm's VOLO where timm can be imported.
"""

import argparse
import copy
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from transformers import DetrImageProcessorPil, HfArgumentParser

from hf_dropkey.classification.families import image_processor
from hf_dropkey.hoi.qpic_weights import convert_tensors, read_config
from hf_dropkey.mesh.model import image_processor as mesh_image_processor
from hf_dropkey.mesh.official import LICENCE, convert_official
from hf_dropkey.models.configuration_dropkey_ceit import DropKeyCeitConfig
from hf_dropkey.models.configuration_dropkey_hoi import DropKeyHoiConfig
from hf_dropkey.models.configuration_dropkey_mesh import DropKeyMeshConfig
from hf_dropkey.models.configuration_dropkey_sizes import PATCH_SIZE
from hf_dropkey.models.configuration_dropkey_t2t_vit import DropKeyT2TViTConfig
from hf_dropkey.models.configuration_dropkey_volo import DropKeyVoloConfig
from hf_dropkey.models.modeling_dropkey_ceit import DropKeyCeitForImageClassification
from hf_dropkey.models.modeling_dropkey_hoi import DropKeyHoiForObjectDetection
from hf_dropkey.models.modeling_dropkey_t2t_vit import DropKeyT2TViTForImageClassification
from hf_dropkey.models.modeling_dropkey_volo import DropKeyVoloForImageClassification


QPIC = "qpic"
# shortest and longest side of the images that QPIC was published with
QPIC_SIZE = {"shortest_edge": 800, "longest_edge": 1333}
# what training scripts call their weights, the averaged ones first, which the published accuracies are from
ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")
# the largest difference that two implementations may show in float32, relative to the largest logit
LOGIT_TOLERANCE = 1e-4

Shapes = dict[str, tuple[int, ...]]
Replacement = str | Callable[[re.Match], str]

LAYER_NAMES: tuple[tuple[str, Replacement], ...] = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.attn\.", ".attention.score_proj."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.(v|q|kv)\.", r".attention.\1_proj."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"^head\.", "classifier."),
)


@dataclass(frozen=True)
class Family:
    """One architecture: its classes, and how official names become ours.

    Attributes:
        config_class: The configuration class.
        model_class: The classifier class.
        names: Regular expressions and replacements, applied in this order before `LAYER_NAMES`.
    """

    config_class: Any
    model_class: Any
    names: tuple[tuple[str, Replacement], ...]

    def rename(self, name: str) -> str:
        """Our name of an official tensor."""
        for pattern, replacement in (*self.names, *LAYER_NAMES):
            name = re.sub(pattern, replacement, name)
        return name


FAMILIES = {
    "t2t_vit": Family(
        DropKeyT2TViTConfig,
        DropKeyT2TViTForImageClassification,
        (
            (r"^tokens_to_token\.attention([12])\.", lambda found: f"token_stages.{int(found[1]) - 1}."),
            (r"^token_stages\.(\d)\.w$", r"token_stages.\1.attention.directions"),
            (r"^token_stages\.(\d)\.kqv\.", r"token_stages.\1.attention.kqv."),
            (r"^token_stages\.(\d)\.proj\.", r"token_stages.\1.attention.o_proj."),
            (r"^token_stages\.(\d)\.mlp\.0\.", r"token_stages.\1.mlp.fc1."),
            (r"^token_stages\.(\d)\.mlp\.2\.", r"token_stages.\1.mlp.fc2."),
            (r"^token_stages\.", "t2t_vit.embeddings.token_stages."),
            (r"^tokens_to_token\.project\.", "t2t_vit.embeddings.projection."),
            (r"^cls_token$", "t2t_vit.embeddings.cls_token"),
            (r"^pos_embed$", "t2t_vit.embeddings.position_embeddings"),
            (r"^blocks\.", "t2t_vit.layers."),
            (r"^norm\.", "t2t_vit.layernorm."),
        ),
    ),
    "volo": Family(
        DropKeyVoloConfig,
        DropKeyVoloForImageClassification,
        (
            (r"^patch_embed\.conv\.", "volo.embeddings.stem."),
            (r"^patch_embed\.proj\.", "volo.embeddings.projection."),
            (r"^cls_token$", "volo.embeddings.cls_token"),
            (r"^pos_embed$", "volo.embeddings.position_embeddings"),
            (r"^network\.0\.", "volo.outlook_layers."),
            (r"^network\.1\.proj\.", "volo.downsample."),
            (r"^network\.(\d+)\.", lambda found: f"volo.stages.{int(found[1]) - 2}."),
            (r"^post_network\.", "volo.class_layers."),
            (r"^norm\.", "volo.layernorm."),
            (r"^aux_head\.", "token_classifier."),
        ),
    ),
    "ceit": Family(
        DropKeyCeitConfig,
        DropKeyCeitForImageClassification,
        (
            (r"^i2t\.backbone\.conv\.", "ceit.embeddings.convolution."),
            (r"^i2t\.backbone\.bn\.", "ceit.embeddings.normalization."),
            (r"^i2t\.proj\.", "ceit.embeddings.projection."),
            (r"^cls_token$", "ceit.embeddings.cls_token"),
            (r"^pos_embed$", "ceit.embeddings.position_embeddings"),
            (r"^pos_layer_embed$", "ceit.layer_position_embeddings"),
            (r"^blocks\.", "ceit.layers."),
            (r"^lca\.", "ceit.class_layer."),
            (r"^norm\.", "ceit.layernorm."),
            (r"\.(leff|feedforward)\.", ".mlp."),
        ),
    ),
}


# human bodies: one family of models for both, whose names `hf_dropkey.mesh.official` has
MESH_FAMILIES = ("metro", "graphormer")


@dataclass
class ConversionArguments:
    """The checkpoint, its architecture, the output."""

    family: str = field(metadata={"help": "The architecture.", "choices": [*FAMILIES, QPIC, *MESH_FAMILIES]})
    checkpoint: Path = field(metadata={"help": "The official checkpoint, a torch file or safetensors."})
    out: Path = field(metadata={"help": "The folder to write, new or empty."})
    size: str | None = field(
        default=None, metadata={"help": "The published size, such as volo_d1, where the shapes leave a choice."}
    )
    config: Path | None = field(
        default=None, metadata={"help": "A folder with the config.json of a size that was not published."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Resizes the position embeddings to images of this many pixels."}
    )
    body_file: Path | None = field(
        default=None,
        metadata={
            "help": "METRO and MeshGraphormer: an npz file of yours with template, faces, joint_regressor, downsample_mid, "
            "downsample_coarse and, for MeshGraphormer, adjacency. SMPL's are bound by its licence."
        },
    )
    new_backbone: bool = field(
        default=False,
        metadata={"help": "METRO and MeshGraphormer: leave the checkpoint's CNN out, take a new ResNet-50."},
    )


class ConversionError(ValueError):
    """The checkpoint does not fit the requested model."""


# --- reading ---------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The weights of a checkpoint by their official names, and where in the file they were.

    Raises:
        FileNotFoundError: The file does not exist.
        ConversionError: The file holds other objects than weights, or none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The checkpoint {path} does not exist. Pass --checkpoint with a file.")
    if path.suffix == ".safetensors":
        content: Any = load_file(path)
    else:
        try:
            # training scripts keep their arguments beside the weights
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ConversionError(
                f"{path} is not a torch checkpoint, or holds objects that could run code when they are read. Save its "
                f"weights alone, with torch.save(weights, ...), where you trust it. The error of torch: {error}"
            ) from error
    entry = next((name for name in ENTRIES if isinstance(content, dict) and isinstance(content.get(name), dict)), "")
    weights = content[entry] if entry else content
    if not isinstance(weights, dict) or not weights or not all(torch.is_tensor(value) for value in weights.values()):
        raise ConversionError(
            f"{path} holds no weights, neither directly nor in one of {', '.join(ENTRIES)}. Pass a checkpoint with weights."
        )
    # the name under which data-parallel training wraps a model
    return {name.removeprefix("module."): value for name, value in weights.items()}, entry or "the file itself"


def read_settings(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """The number of classes and the image size, from the shapes of a checkpoint."""
    settings = {}
    if "head.weight" in weights:
        settings["num_labels"] = len(weights["head.weight"])
    if "pos_embed" in weights:
        table = weights["pos_embed"]
        # a grid in VOLO, a class token and a flattened square elsewhere
        side = table.shape[1] if table.ndim == 4 else round((table.shape[1] - 1) ** 0.5)
        settings["image_size"] = max(1, side) * PATCH_SIZE
    return settings


# --- which size it is ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """How the tensors of a checkpoint, by our names, compare with those of a model."""

    family: str
    size: str
    config: Any
    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]
    total: int

    @property
    def agreeing(self) -> int:
        """Number of tensors with the right name and shape."""
        return self.total - len(self.missing) - len(self.reshaped)

    @property
    def exact(self) -> bool:
        """Whether all tensors agree and none is left over."""
        return not (self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        lines = [f"--family {self.family} --size {self.size}: {self.agreeing} of {self.total} tensors agree"]
        for title, names in (
            ("missing", self.missing), ("not in the model", self.unexpected), ("of another shape", self.reshaped)
        ):  # fmt: skip
            if names:
                shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                lines.append(f"  {len(names)} {title}: {shown}")
        return "\n".join(lines)


def model_shapes(family: str, config: Any) -> Shapes:
    """The names and shapes of all tensors of the model of `config`."""
    with torch.device("meta"):
        model = FAMILIES[family].model_class(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@cache
def published_model(family: str, size: str, **settings: int) -> tuple[Any, Shapes]:
    """The configuration of a published size with `settings`, and its model's shapes."""
    config = FAMILIES[family].config_class.from_size(size, **settings)
    return config, model_shapes(family, config)


def compare(family: str, size: str, config: Any, wanted: Shapes, weights: dict[str, torch.Tensor]) -> Match:
    """Compares the checkpoint's names and shapes with those of a model."""
    found: Shapes = {FAMILIES[family].rename(name): tuple(value.shape) for name, value in weights.items()}
    reshaped = [
        f"{name} {found[name]} instead of {shape}" for name, shape in wanted.items() if found.get(name, shape) != shape
    ]
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    return Match(family, size, config, missing, unexpected, reshaped, len(wanted))


def candidates(families: list[str], weights: dict[str, torch.Tensor]) -> list[Match]:
    """The checkpoint compared with every published size of `families`, most agreeing tensors first."""
    settings = read_settings(weights)
    matches = [
        compare(family, size, *published_model(family, size, **settings), weights)
        for family in families
        for size in FAMILIES[family].config_class.published_sizes
    ]
    return sorted(matches, key=lambda match: (not match.exact, -match.agreeing, len(match.unexpected)))


def find_size(arguments: ConversionArguments, weights: dict[str, torch.Tensor]) -> Match:
    """The one size whose model takes every tensor of the checkpoint.

    Raises:
        ConversionError: No size fits, or several, or another than the requested one.
    """
    if arguments.config is not None:
        config = FAMILIES[arguments.family].config_class.from_pretrained(arguments.config)
        wanted = model_shapes(arguments.family, config)
        match = compare(arguments.family, arguments.size or "custom", config, wanted, weights)
        if not match.exact:
            raise ConversionError(f"The checkpoint does not fit {arguments.config}:\n{match}")
        return match
    if arguments.size is not None:
        # raises for an unknown name, and lists the known ones
        FAMILIES[arguments.family].config_class.from_size(arguments.size)
    matches = candidates([arguments.family], weights)
    exact = [match for match in matches if match.exact]
    chosen = [match for match in exact if arguments.size in (None, match.size)]
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        names = " and ".join(match.size for match in chosen)
        raise ConversionError(f"The shapes fit {names} alike, which differ in their heads only. Pass --size.")
    nearest = exact[0] if exact else candidates(list(FAMILIES), weights)[0]
    requested = arguments.size or "any published size"
    raise ConversionError(
        f"The checkpoint does not fit {requested} of the family {arguments.family}. The nearest match by shapes is\n"
        f"{nearest}\nFor a size that was not published, pass --config with a folder that holds its config.json."
    )


# --- writing ---------------------------------------------------------------------------------------------------------


def report(match: Match, weights: dict[str, torch.Tensor]) -> str:
    """One line for every tensor: its official name, our name and its shape."""
    width = max(map(len, weights))
    lines = [
        f"{name:<{width}}  ->  {FAMILIES[match.family].rename(name)}  {tuple(value.shape)}"
        for name, value in weights.items()
    ]
    values = sum(value.numel() for value in weights.values())
    return "\n".join([*lines, f"{len(lines)} tensors, {values:,} values, all placed"])


def source_logits(match: Match, weights: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor | str:
    """The logits of the original implementation, or why they cannot be computed."""
    if match.family != "volo" or match.size == "custom":
        return "no importable implementation of this model is known"
    try:
        import timm  # type: ignore[import-not-found]  # optional, ships no types
    except (ImportError, RuntimeError) as error:
        # torchvision, which timm imports, fails with a RuntimeError beside another build of torch
        return f"timm cannot be imported ({error})"
    config = match.config
    source = timm.create_model(f"{match.size}_224", num_classes=config.num_labels, img_size=config.image_size)
    source.load_state_dict(weights, strict=True)
    return source.eval()(pixels)


@torch.no_grad()
def check_logits(model: Any, match: Match, weights: dict[str, torch.Tensor]) -> str:
    """Compares the converted model's logits with the source's; returns a sentence about it.

    Raises:
        ConversionError: They differ.
    """
    side = match.config.image_size
    pixels = torch.randn(2, match.config.num_channels, side, side, generator=torch.Generator().manual_seed(0))
    expected = source_logits(match, weights, pixels)
    if isinstance(expected, str):
        return f"Logits not compared with the source: {expected}."
    difference = ((model(pixels).logits - expected).abs().max() / expected.abs().max()).item()
    if not difference <= LOGIT_TOLERANCE:
        raise ConversionError(
            f"The logits differ from timm's by {difference:.2g} of the largest one, more than {LOGIT_TOLERANCE:g}. "
            "Nothing was written. Please report the checkpoint and both versions."
        )
    return f"Logits agree with timm's to {difference:.2g} of the largest one."


def convert_qpic(arguments: ConversionArguments, weights: dict[str, torch.Tensor], entry: str) -> str:
    """Converts the weights of a QPIC and returns the report.

    Raises:
        ConversionError: Tensors are missing or left over, or an argument means nothing for this family.
    """
    for name in ("size", "image_size"):
        if getattr(arguments, name) is not None:
            raise ConversionError(f"--{name} means nothing for QPIC, which takes images of any size; leave it out.")
    try:
        config = (
            DropKeyHoiConfig.from_pretrained(arguments.config)
            if arguments.config is not None
            else read_config(weights)
        )
        model = DropKeyHoiForObjectDetection(config).eval()
        parts = convert_tensors(weights)
    except (ValueError, KeyError) as error:
        raise ConversionError(f"The checkpoint is none of QPIC: {error}") from error
    found = {name: value for own in parts.values() for name, value in own.items()}
    wanted = model.state_dict()
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    reshaped = [name for name, value in found.items() if name in wanted and value.shape != wanted[name].shape]
    if missing or unexpected or reshaped:
        lines = [f"{len(names)} {title}: {', '.join(names[:8])}" for title, names in (
            ("missing", missing), ("not in the model", unexpected), ("of another shape", reshaped)
        ) if names]  # fmt: skip
        raise ConversionError("The checkpoint does not fit QPIC:\n" + "\n".join(lines))
    model.load_state_dict(found, strict=True)
    width = max(map(len, weights))
    lines = [f"{name:<{width}}  ->  {', '.join(parts[name])}  {tuple(value.shape)}" for name, value in weights.items()]
    values = sum(value.numel() for value in weights.values())
    model.save_pretrained(arguments.out)
    DetrImageProcessorPil(size=QPIC_SIZE).save_pretrained(arguments.out)
    lines.append(f"{len(weights)} tensors, {values:,} values, all placed; weights from {entry}.")
    lines.append(f"{config.num_labels} object classes, {config.num_verbs} verbs, {config.num_queries} queries.")
    return "\n".join([*lines, f"Written to {arguments.out}."])


def convert(arguments: ConversionArguments) -> str:
    """Converts one checkpoint and returns the report.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        FileExistsError: The folder to write is not empty.
        ConversionError: The checkpoint does not fit the requested model.
    """
    if arguments.out.exists() and any(arguments.out.iterdir()):
        raise FileExistsError(f"{arguments.out} is not empty. Choose a new folder for the converted model.")
    weights, entry = read_checkpoint(arguments.checkpoint)
    if arguments.family == QPIC:
        return convert_qpic(arguments, weights, entry)
    if arguments.family in MESH_FAMILIES:
        return convert_mesh(arguments, weights, entry)
    match = find_size(arguments, weights)
    family = FAMILIES[match.family]
    model = family.model_class(copy.deepcopy(match.config)).eval()
    model.load_state_dict({family.rename(name): value for name, value in weights.items()}, strict=True)
    lines = [report(match, weights), f"Weights from {entry}; {match.size} for {match.config.image_size} pixels."]
    lines.append(check_logits(model, match, weights))
    if arguments.image_size is not None and arguments.image_size != match.config.image_size:
        model.resize_image_size(arguments.image_size)
        lines.append(f"Position embeddings resized to images of {arguments.image_size} pixels.")
    model.save_pretrained(arguments.out)
    image_processor(match.family, match.size, model.config.image_size).save_pretrained(arguments.out)
    return "\n".join([*lines, f"Written to {arguments.out}."])


def convert_mesh(arguments: ConversionArguments, weights: dict[str, torch.Tensor], entry: str) -> str:
    """As `convert`, for METRO and MeshGraphormer.

    Raises:
        ConversionError, OfficialError: The checkpoint or the body is not what was requested.
    """
    if arguments.body_file is None:
        raise ConversionError(
            f"--family {arguments.family} needs --body_file: template, regressor and down-sampling are not in the "
            f"checkpoint. {LICENCE}"
        )
    unused = [name for name in ("size", "image_size") if getattr(arguments, name) is not None]
    if unused:
        raise ConversionError(f"--{unused[0]} means nothing for {arguments.family}; its shapes say all of it.")
    found = "graphormer" if any("graph_conv" in name for name in weights) else "metro"
    if found != arguments.family:
        raise ConversionError(f"The checkpoint is one of --family {found}, not of {arguments.family}.")
    config = None if arguments.config is None else DropKeyMeshConfig.from_pretrained(arguments.config)
    model, about = convert_official(weights, arguments.body_file, config=config, new_backbone=arguments.new_backbone)
    model.save_pretrained(arguments.out)
    mesh_image_processor(model.config).save_pretrained(arguments.out)
    return f"{about}\nWeights from {entry}. Written to {arguments.out}."


def main() -> None:
    """Reads the command line and prints the report."""
    (arguments,) = HfArgumentParser(cast(Any, ConversionArguments)).parse_args_into_dataclasses()
    try:
        print(convert(arguments))
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
