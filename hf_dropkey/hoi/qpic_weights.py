"""Weights of the official QPIC, by its names, as weights and configuration of ours.

Names from github.com/hitachi-rd-cv/qpic, commit 257f314.
"""

import re
from typing import Any

import torch
from transformers import ResNetConfig

from ..models.configuration_dropkey_hoi import DropKeyHoiConfig
from .names import COCO_OBJECTS, HICO_VERBS, MISSING_OBJECT, VCOCO_VERBS


BODY = "backbone.0.body."
NAMES: tuple[tuple[str, str], ...] = (
    (r"^transformer\.decoder\.norm\.", "model.decoder.layernorm."),
    (r"^transformer\.", "model."),
    (r"\.multihead_attn\.", ".encoder_attn."),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"(\.encoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(\.encoder\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
    (r"(\.decoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(\.decoder\.layers\.\d+)\.norm2\.", r"\1.encoder_attn_layer_norm."),
    (r"(\.decoder\.layers\.\d+)\.norm3\.", r"\1.final_layer_norm."),
    (r"^query_embed\.weight$", "model.query_position_embeddings.weight"),
    (r"^input_proj\.", "model.input_projection."),
    (r"^obj_class_embed\.", "class_labels_classifier."),
    (r"^verb_class_embed\.", "verb_classifier."),
    (r"^sub_bbox_embed\.", "person_bbox_predictor."),
    (r"^obj_bbox_embed\.", "object_bbox_predictor."),
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
HICO_SHAPE, VCOCO_SHAPE = (80, 117), (81, 29)


def rename(name: str) -> str:
    """Our name of an official tensor that is one of ours too."""
    found = re.fullmatch(re.escape(BODY) + r"(conv1|bn1)\.(\w+)", name)
    if found:
        return f"model.backbone.model.embedder.embedder.{_part(found[1])}.{found[2]}"
    found = re.fullmatch(re.escape(BODY) + r"layer(\d)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.([01]))\.(\w+)", name)
    if found:
        stage, layer, kind, number, shortcut, tensor = found.groups()
        inner = f"layer.{int(number) - 1}" if kind else "shortcut"
        part = _part(kind or ("conv", "bn")[int(shortcut)])
        return f"model.backbone.model.encoder.stages.{int(stage) - 1}.layers.{layer}.{inner}.{part}.{tensor}"
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _part(official: str) -> str:
    return "convolution" if official.startswith("conv") else "normalization"


def convert_tensors(weights: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """For each official tensor ours that are made of it: one, or the thirds of a joint projection."""
    converted: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in weights.items():
        found = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name)
        if found is None:
            converted[name] = {rename(name): value}
            continue
        converted[name] = {
            rename(f"{found[1]}.{projection}.{found[2]}"): third.clone()
            for projection, third in zip(PROJECTIONS, value.chunk(3), strict=True)
        }
    return converted


def convert_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All weights by our names."""
    return {name: value for parts in convert_tensors(weights).values() for name, value in parts.items()}


def read_config(weights: dict[str, torch.Tensor], num_attention_heads: int = 8, **settings: Any) -> DropKeyHoiConfig:
    """The configuration that the shapes of official weights tell.

    Args:
        weights: By official names.
        num_attention_heads: The shapes do not tell it; all published models have 8.
        settings: Fields that replace what the shapes tell, such as `verbs` of another data set.

    Raises:
        ValueError: A tensor is missing without which the size is unknown.
    """
    needed = ("obj_class_embed.weight", "verb_class_embed.weight", "query_embed.weight", BODY + "conv1.weight")
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ValueError(f"The checkpoint lacks {missing}, so it is none of QPIC.")
    objects, verbs = len(weights["obj_class_embed.weight"]) - 1, len(weights["verb_class_embed.weight"])
    names: dict[str, Any] = {"id2label": {number: f"LABEL_{number}" for number in range(objects)}}
    names["verbs"] = [f"VERB_{number}" for number in range(verbs)]
    if (objects, verbs) in (HICO_SHAPE, VCOCO_SHAPE):
        missing_object = (objects, verbs) == VCOCO_SHAPE
        labels = [*COCO_OBJECTS.values(), *([MISSING_OBJECT] if missing_object else [])]
        names = {
            "id2label": dict(enumerate(labels)),
            "verbs": list(VCOCO_VERBS if missing_object else HICO_VERBS),
            "missing_object": missing_object,
        }
    queries, width = weights["query_embed.weight"].shape
    depth = {side: _count(weights, rf"transformer\.{side}\.layers\.(\d+)\.") for side in ("encoder", "decoder")}
    read = {
        "backbone_config": _read_backbone(weights),
        "d_model": width,
        "num_queries": queries,
        "encoder_layers": depth["encoder"],
        "decoder_layers": depth["decoder"],
        "encoder_attention_heads": num_attention_heads,
        "decoder_attention_heads": num_attention_heads,
        "encoder_ffn_dim": len(weights["transformer.encoder.layers.0.linear1.weight"]),
        "decoder_ffn_dim": len(weights["transformer.decoder.layers.0.linear1.weight"]),
        **names,
    }
    return DropKeyHoiConfig(**{**read, **settings})


def _count(weights: dict[str, torch.Tensor], pattern: str) -> int:
    """One more than the largest number that the group of `pattern` finds at the start of a name."""
    return 1 + max((int(found[1]) for name in weights if (found := re.match(pattern, name))), default=-1)


def _read_backbone(weights: dict[str, torch.Tensor]) -> ResNetConfig:
    """The ResNet that the shapes tell."""
    body = re.escape(BODY)
    stages = [f"{BODY}layer{number}" for number in range(1, _count(weights, rf"{body}layer(\d)\."))]
    last = "conv3" if f"{stages[0]}.0.conv3.weight" in weights else "conv2"
    return ResNetConfig(
        layer_type="bottleneck" if last == "conv3" else "basic",
        embedding_size=len(weights[BODY + "conv1.weight"]),
        hidden_sizes=[len(weights[f"{stage}.0.{last}.weight"]) for stage in stages],
        depths=[_count(weights, re.escape(stage) + r"\.(\d+)\.") for stage in stages],
        downsample_in_first_stage=False,
        out_features=[f"stage{len(stages)}"],  # type: ignore[call-arg]  # a field of backbones that the class inherits
    )
