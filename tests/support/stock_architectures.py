"""Tiny, random models of stock Transformers, and what DropKey measurably does in each. Run it to print the table.

    python tests/support/stock_architectures.py

Imports torch, transformers and the package.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn

from hf_dropkey.models.counter_hash import RatioTensor
from hf_dropkey.patching.apply import apply_dropkey, dropkey_disabled, dropkey_modules, remove_dropkey
from hf_dropkey.patching.report import DropKeyReport


RATIO = 0.3

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """How to build a tiny model and its inputs, and which attentions DropKey must reach.

    Attributes:
        title: Name in the table.
        build: Makes the model, attention dropout off.
        inputs: Makes a training batch: padded where the architecture knows padding, with labels where it needs them.
        sites: Number of attentions reached, cross-attention included.
        unreached: Reasons that the report must give, each with the number of attentions.
    """

    title: str
    build: Callable[[], Any]
    inputs: Callable[[], Inputs]
    sites: int
    unreached: dict[str, int]


@dataclass(frozen=True)
class Row:
    """What was measured of one architecture.

    Attributes:
        title: Name in the table.
        sites: Attentions reached, by kind.
        unreached: Attentions not reached.
        ratio: The ratio requested.
        measured: Fraction of scores dropped over all sites.
        worst: Largest deviation of one site's fraction from its ratio, in standard deviations.
    """

    title: str
    sites: str
    unreached: int
    ratio: float
    measured: float
    worst: float


def pixels(side: int = 32, batch: int = 2, **more: Any) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)), **more}


def padded_pixels(side: int = 64) -> Inputs:
    mask = torch.ones(2, side, side, dtype=torch.long)
    mask[1, :, side // 2 :] = 0
    return pixels(side, pixel_mask=mask)


def with_boxes(inputs: Inputs) -> Inputs:
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.3, 0.4, 0.2, 0.2]])
    labels = [
        {"class_labels": torch.tensor([0, 1]), "boxes": boxes},
        {"class_labels": torch.tensor([1]), "boxes": boxes[:1]},
    ]
    return {**inputs, "labels": labels}


ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
VIT: dict[str, Any] = {**ENCODER, "image_size": 32, "patch_size": 8}
TEXT: dict[str, Any] = {**ENCODER, "vocab_size": 99, "max_position_embeddings": 32}
DETR: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 12,
    "num_labels": 3,
}


def resnet(stages: int = 1) -> hf.ResNetConfig:
    """A backbone that ends at stride 4 or, with three stages, gives strides 4, 8, 16."""
    names = [f"stage{number}" for number in range(1, stages + 1)]
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16, 24][:stages], "depths": [1] * stages}
    return hf.ResNetConfig(**sizes, layer_type="basic", out_features=names)


def real_time_detr(config_class: type, model_class: type, **more: Any) -> Any:
    """RT-DETR or D-FINE on a tiny backbone of its own kind, with denoising queries in training."""
    stages = ["stage2", "stage3", "stage4"]
    config = config_class(
        backbone_config=hf.RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 1, 1],
            out_features=stages,
            layer_type="basic",
        ),
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 24, 32],
        d_model=32,
        decoder_in_channels=[32, 32, 32],
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=12,
        num_denoising=6,
        num_labels=3,
        **more,
    )
    return model_class(config)


def clip() -> Any:
    towers: dict[str, Any] = {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": VIT}
    return hf.CLIPModel(hf.CLIPConfig(**towers, projection_dim=16))


def tokens(batch: int = 2, length: int = 10) -> Inputs:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, 7:] = 0
    ids = torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(2))
    ids[:, 6] = 2
    return {"input_ids": ids, "attention_mask": mask}


def naflex() -> Inputs:
    """Two images of 4 x 4 and 3 x 4 patches for SigLIP2, the second padded."""
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 12:] = 0
    patches = torch.randn(2, 16, 3 * 8 * 8, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[4, 4], [3, 4]])}


def video(frames: int = 4) -> Inputs:
    return {"pixel_values": torch.randn(2, frames, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


ARCHITECTURES = {
    "vit": Architecture("ViT", lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)), pixels, 3, {}),
    "deit": Architecture("DeiT", lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**VIT)), pixels, 3, {}),
    "beit": Architecture(
        "BEiT",
        lambda: hf.BeitForImageClassification(hf.BeitConfig(**VIT, use_relative_position_bias=True)),
        pixels,
        3,
        {},
    ),
    "dinov2": Architecture("DINOv2", lambda: hf.Dinov2Model(hf.Dinov2Config(**VIT)), pixels, 3, {}),
    "dinov2_with_registers": Architecture(
        "DINOv2 with registers",
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**VIT)),
        pixels,
        3,
        {},
    ),
    "dinov3_vit": Architecture(
        "DINOv3 ViT", lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VIT, num_register_tokens=2)), pixels, 3, {}
    ),
    "vit_mae": Architecture(
        "ViTMAE",
        lambda: hf.ViTMAEForPreTraining(
            hf.ViTMAEConfig(
                **VIT,
                decoder_hidden_size=32,
                decoder_num_attention_heads=4,
                decoder_num_hidden_layers=2,
                decoder_intermediate_size=64,
                mask_ratio=0.5,
            )
        ),
        # which patches are hidden, which is random otherwise
        lambda: pixels(noise=torch.rand(2, 16, generator=torch.Generator().manual_seed(3))),
        5,
        {},
    ),
    "siglip": Architecture(
        "SigLIP vision",
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VIT)),
        pixels,
        3,
        {"torch.nn.MultiheadAttention": 1},
    ),
    "siglip2": Architecture(
        "SigLIP2 vision",
        lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**ENCODER, patch_size=8, num_patches=16)),
        naflex,
        3,
        {"torch.nn.MultiheadAttention": 1},
    ),
    "clip_vision": Architecture("CLIP vision", lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VIT)), pixels, 3, {}),
    "clip": Architecture("CLIP, both towers", clip, lambda: {**tokens(), **pixels()}, 6, {}),
    "yolos": Architecture(
        "YOLOS",
        lambda: hf.YolosForObjectDetection(
            hf.YolosConfig(**{**VIT, "image_size": [32, 32]}, num_detection_tokens=6, num_labels=3)
        ),
        lambda: with_boxes(pixels()),
        3,
        {},
    ),
    "swin": Architecture(
        "Swin",
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=32,
                patch_size=2,
                embed_dim=16,
                depths=[2, 2],
                num_heads=[2, 4],
                window_size=4,
                drop_path_rate=0.0,
            )
        ),
        pixels,
        4,
        {},
    ),
    "segformer": Architecture(
        "SegFormer",
        lambda: hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(
                depths=[1, 1, 1, 1],
                sr_ratios=[4, 2, 1, 1],
                hidden_sizes=[8, 16, 24, 32],
                num_attention_heads=[1, 2, 2, 4],
                decoder_hidden_size=16,
                drop_path_rate=0.0,
            )
        ),
        lambda: pixels(64),
        4,
        {},
    ),
    "detr": Architecture(
        "DETR",
        lambda: hf.DetrForObjectDetection(hf.DetrConfig(**DETR, backbone_config=resnet())),
        lambda: with_boxes(padded_pixels()),
        5,
        {"queries start at zero": 1},
    ),
    "conditional_detr": Architecture(
        "Conditional DETR",
        lambda: hf.ConditionalDetrForObjectDetection(hf.ConditionalDetrConfig(**DETR, backbone_config=resnet())),
        lambda: with_boxes(padded_pixels()),
        5,
        {"queries start at zero": 1},
    ),
    "rt_detr": Architecture(
        "RT-DETR",
        lambda: real_time_detr(hf.RTDetrConfig, hf.RTDetrForObjectDetection),
        lambda: with_boxes(pixels(128)),
        3,
        {"deformable": 2},
    ),
    "d_fine": Architecture(
        "D-FINE",
        lambda: real_time_detr(hf.DFineConfig, hf.DFineForObjectDetection),
        lambda: with_boxes(pixels(128)),
        3,
        {"deformable": 2},
    ),
    "deformable_detr": Architecture(
        "Deformable DETR",
        lambda: hf.DeformableDetrForObjectDetection(
            hf.DeformableDetrConfig(**DETR, backbone_config=resnet(3), num_feature_levels=3)
        ),
        lambda: with_boxes(padded_pixels()),
        2,
        {"deformable": 4},
    ),
    "videomae": Architecture(
        "VideoMAE",
        lambda: hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**VIT, num_frames=4)),
        video,
        3,
        {},
    ),
    "vivit": Architecture(
        "ViViT",
        lambda: hf.VivitForVideoClassification(
            hf.VivitConfig(**ENCODER, image_size=32, num_frames=4, tubelet_size=[2, 8, 8])
        ),
        video,
        3,
        {},
    ),
    "bert": Architecture(
        "BERT",
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, attention_probs_dropout_prob=0.0)),
        lambda: {**tokens(), "labels": torch.tensor([0, 1])},
        3,
        {},
    ),
}

# they compute their own softmax, so `apply_dropkey` must say so
REFUSED: dict[str, Callable[[], Any]] = {
    "Swinv2": lambda: hf.Swinv2Model(
        hf.Swinv2Config(image_size=32, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4)
    ),
    "LeViT": lambda: hf.LevitModel(
        hf.LevitConfig(hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8])
    ),
    "CvT": lambda: hf.CvtModel(hf.CvtConfig(embed_dim=[8, 16, 24], num_heads=[1, 2, 3], depth=[1, 2, 3])),
    "PVT": lambda: hf.PvtModel(
        hf.PvtConfig(
            image_size=32, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 2, 4]
        )
    ),
    "TimeSformer": lambda: hf.TimesformerModel(hf.TimesformerConfig(**VIT, num_frames=2)),
}


def build(name: str) -> Any:
    """The tiny model of an architecture, with weights large enough that attention is not uniform."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # those that start large enough would make weights underflow, which count as dropped
            if parameter.ndim >= 2 and parameter.std() < 0.05 and "backbone" not in parameter_name:
                parameter.mul_(3)
    return model


def tiny_vit(**settings: Any) -> hf.ViTForImageClassification:
    """A classifier of 5 classes whose attention is not uniform."""
    torch.manual_seed(0)
    model = hf.ViTForImageClassification(hf.ViTConfig(**{**VIT, "num_labels": 5, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
    return model


def llama(**settings: Any) -> hf.LlamaModel:
    """A causal model with grouped queries, in training mode."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(**TEXT, num_key_value_heads=2, pad_token_id=0, **settings)
    return hf.LlamaModel(config).train()


def quiet(model: nn.Module, *args: Any, **settings: Any) -> DropKeyReport:
    """`apply_dropkey` that prints nothing."""
    return apply_dropkey(model, *args, **settings, verbose=False)


def ratios(model: nn.Module) -> list[float]:
    """The drop ratios of a model, in order."""
    return [module.dropkey_ratio for _, module in dropkey_modules(model)]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything plain that a model's modules and configuration hold, and their ratios as data in plain numbers."""
    state = {
        name: {
            key: (value.thresholds.tolist(), value.longest_at_risk) if isinstance(value, RatioTensor) else value
            for key, value in vars(module).items()
            if not key.startswith("_") or key == "_dropkey_undo"
        }
        for name, module in model.named_modules()
    }
    return {"modules": state, "config": dict(vars(model.config)), "hooks": dict(model._load_state_dict_pre_hooks)}


def loss_of(model: Any, inputs: Inputs, seed: int) -> torch.Tensor:
    """The loss for one seed, or a scalar of all outputs where there are no labels."""
    torch.manual_seed(seed)
    output = model(**inputs)
    return output.loss if getattr(output, "loss", None) is not None else sum_of(output)


def sum_of(output: Any) -> torch.Tensor:
    """A scalar that depends on every floating point output."""
    tensors = [value for value in output.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return torch.stack([tensor.float().square().mean() for tensor in tensors]).sum()


@contextmanager
def recorded_weights(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The attention weights of the modules with a drop ratio, by name, of the last forward on `eager`."""
    weights: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: weights.update({name: output[1].detach()})

    hooks = [module.register_forward_hook(keep(name)) for name, module in dropkey_modules(model)]
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class SiteCount:
    """Scores counted at one site over several forwards.

    Attributes:
        scores: Scores that masks leave visible.
        dropped: Of these, how many were dropped.
        expected: How many drops to expect, and `variance` of that number.
        hidden: Scores that masks hide, and `on_hidden`, how many of these got attention.
    """

    scores: int = 0
    dropped: int = 0
    expected: float = 0.0
    variance: float = 0.0
    hidden: int = 0
    on_hidden: int = 0

    @property
    def deviation(self) -> float:
        """Dropped minus expected, in standard deviations."""
        return abs(self.dropped - self.expected) / max(self.variance**0.5, 1e-9)


def count_drops(model: Any, inputs: Inputs, forwards: int) -> dict[str, SiteCount]:
    """Counts zero attention weights at each site, apart from those that masks zero anyway.

    A row whose K visible keys are all drawn drops none, so a score is dropped with probability r - r^K.
    """
    counts = {name: SiteCount() for name, _ in dropkey_modules(model)}
    ratios = {name: module.dropkey_ratio for name, module in dropkey_modules(model)}
    with torch.no_grad(), recorded_weights(model) as weights:
        for seed in range(forwards):
            torch.manual_seed(seed)
            with dropkey_disabled(model):
                model(**inputs)
            # Swin hides keys by -100, which leaves them 1e-44
            visible = {name: weight > 1e-30 for name, weight in weights.items()}
            torch.manual_seed(seed)
            model(**inputs)
            for name, weight in weights.items():
                _count(counts[name], weight, visible[name], ratios[name])
    return counts


def _count(count: SiteCount, weight: torch.Tensor, visible: torch.Tensor, ratio: float) -> None:
    keys = visible.sum(-1, keepdim=True).double()
    probability = (ratio - ratio**keys).expand_as(visible)[visible]
    count.scores += int(visible.sum())
    count.dropped += int((visible & (weight == 0)).sum())
    count.hidden += int((~visible).sum())
    count.on_hidden += int((~visible & (weight > 1e-30)).sum())
    count.expected += float(probability.sum())
    count.variance += float((probability * (1 - probability)).sum())


def measure(name: str, forwards: int = 8) -> tuple[Row, dict[str, SiteCount], DropKeyReport]:
    """The row of one architecture in the table."""
    architecture = ARCHITECTURES[name]
    model = build(name).train()
    report = apply_dropkey(model, RATIO, schedule="constant", cross_attention=True, backend="eager", verbose=False)
    counts = count_drops(model, architecture.inputs(), forwards)
    kinds = [f"{site.side} {site.kind}" for site in report.sites]
    row = Row(
        title=architecture.title,
        sites=", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)),
        unreached=len(report.unreached),
        ratio=RATIO,
        measured=sum(count.dropped for count in counts.values()) / sum(count.scores for count in counts.values()),
        worst=max(count.deviation for count in counts.values()),
    )
    remove_dropkey(model)
    return row, counts, report


def markdown_table(rows: list[Row]) -> str:
    """The table of `model_cards/architectures.md`."""
    lines = [
        "| architecture | attentions that drop keys | not reached | ratio | measured | worst site, in standard deviations |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.title} | {row.sites} | {row.unreached} | {row.ratio} | {row.measured:.4f} | {row.worst:.1f} |"
        )
    lines.append(f"\nRefused with the reason, because they compute their own softmax: {', '.join(REFUSED)}.")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table([measure(name)[0] for name in ARCHITECTURES]))
