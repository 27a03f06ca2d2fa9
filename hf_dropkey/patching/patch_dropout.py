"""Patch dropout beside DropKey on Transformers' vision models: `apply_patch_dropout`, `remove_patch_dropout`.

In training each image keeps a random subset of its patches, drawn after position embeddings were added; class, distillation
and register tokens always stay. Liu et al., PatchDropout: Economizing Vision Transformers Using Patch Dropout, WACV 2023
(arXiv:2208.07220). It regularises and saves time, since all layers see fewer tokens. A hook behind the embeddings does it, so
the tokens behind them have to be a plain sequence: nothing else in the model may know the places of the grid.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .apply import dropkey_modules
from .hooked import HookedRegulariser
from .modes import check_owner
from .report import table
from .sites import TIMM, transformers_model


logger = logging.get_logger("transformers.dropkey")

# what a configuration remembers
FIELD = "dropkey_patch_dropout_rate"
PATCH_DROPOUT = HookedRegulariser("apply_patch_dropout", FIELD, "_dropkey_patch_dropout", 0.5, "patch")
# embeddings that return one sequence `[B, tokens, C]`, patches last, behind which nothing depends on the grid
PLAIN = frozenset(
    {
        "AltCLIPVisionEmbeddings",
        "BlipVisionEmbeddings",
        "CLIPVisionEmbeddings",
        "ChineseCLIPVisionEmbeddings",
        "DeiTEmbeddings",
        "Dinov2Embeddings",
        "Dinov2WithRegistersEmbeddings",
        "IJepaEmbeddings",
        "MetaClip2VisionEmbeddings",
        "PixioEmbeddings",
        "SiglipVisionEmbeddings",
        "ViTEmbeddings",
        "ViTMSNEmbeddings",
    }
)
# their parameters that are tokens in front of the patches
PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
# embeddings of patches that are not among the above
OTHER_EMBEDDINGS = re.compile(r"(?<!Patch)(Embeddings|WithEmbeddings|PatchEmbed)$")
# heads and wrappers that put tokens back into the grid
GRID_HEADS = re.compile(r"Backbone|MaskedImageModeling|SemanticSegmentation|DepthEstimation|Detection|PreTraining")
# patterns whose masks are shapes on the grid
GRID_PATTERNS = ("block", "cross")
IMAGE_TOKENS = ("image_token_id", "image_token_index")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Unfold)
# what class names of a model's parts say of it
REASONS = (
    (
        re.compile(TIMM),
        "a model of timm has patch dropout of its own; load it with model_args={'patch_drop_rate': 0.5}",
    ),
    (re.compile(r"MAE"), "it hides random patches of every image by itself"),
    (re.compile(r"Rope|Rotary", re.IGNORECASE), "its rotary positions are computed for all patches of the grid"),
    (re.compile(r"Swin|Window|Hiera"), "its attention is in windows of the grid"),
    (re.compile(r"RelativePosition"), "its attention has a bias between places of the grid"),
    (re.compile(r"Siglip2"), "its images have patches and padding of several sizes, and a mask that fits them"),
    (re.compile(r"Perceiver"), "its latents read the image through one cross-attention"),
    (
        re.compile(r"Yolos"),
        "its positions are added again in later layers, or detection tokens stand behind its patches",
    ),
    (re.compile(r"T2T|Volo|Ceit"), "it convolves or unfolds tokens on the grid of patches"),
)


@dataclass(frozen=True)
class ThinnedTokens:
    """The tokens behind one embeddings module, of which training sees a part.

    Attributes:
        name: Dotted name of the embeddings.
        patches: Number of patches of an image at the configured size.
        kept: Number of them that stay in training.
        prefix: Number of other tokens, which always stay.
    """

    name: str
    patches: int
    kept: int
    prefix: int


@dataclass(frozen=True)
class WholeTokens:
    """Embeddings whose patches are never dropped, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class PatchDropoutReport:
    """The tokens of a model that are thinned in training, and those that are not with the reason.

    Attributes:
        model: Class name of the model.
        rate: The fraction of the patches that is left out, [0, 1).
        tokens: What is thinned.
        unreached: The others, with the reason.
        replaced: Whether the rate of an earlier call was replaced.
    """

    model: str
    rate: float
    tokens: tuple[ThinnedTokens, ...]
    unreached: tuple[WholeTokens, ...]
    replaced: bool = False

    def __str__(self) -> str:
        lines = [f"patch dropout on {self.model}: a fraction {self.rate:.4g} of the patches is left out in training"]
        if self.replaced:
            lines[0] += " (replaces the rate of an earlier call)"
        rows: list[tuple[str, ...]] = [
            (one.name, str(one.patches), str(one.kept), str(one.prefix)) for one in self.tokens
        ]
        lines += table(("embeddings", "patches", "kept", "other tokens"), rows)
        if self.unreached:
            lines += ["not reached:", *(f"  {one.name}: {one.reason}" for one in self.unreached)]
        return "\n".join(lines)


def kept_patches(patches: int, rate: float) -> int:
    """How many of so many patches stay: the nearest whole number, one at least."""
    return max(1, round(patches * (1 - rate)))


def patch_dropout(tokens: torch.Tensor, rate: float, prefix: int) -> torch.Tensor:
    """Keeps random patches of each sample, in their order, and all tokens in front of them.

    Args:
        tokens: `[B, prefix + N, C]`.
        rate: The fraction of the N patches to leave out, [0, 1).
        prefix: Number of tokens in front of the patches.

    Returns:
        `[B, prefix + kept_patches(N, rate), C]`; another subset for each sample, from torch's global generator.
    """
    samples, patches = tokens.shape[0], tokens.shape[1] - prefix
    draws = torch.rand(samples, patches, device=tokens.device)
    # in order, so that a token has the neighbours that it had
    chosen = draws.argsort(dim=1)[:, : kept_patches(patches, rate)].sort(dim=1).values + prefix
    always = torch.arange(prefix, device=tokens.device).expand(samples, -1)
    places = torch.cat((always, chosen), dim=1)
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))


class _Thin:
    """A hook behind the embeddings."""

    def __init__(self, rate: float, prefix: int) -> None:
        self.rate, self.prefix = rate, prefix

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        """The tokens that stay; None, all of them, in eval mode."""
        if not module.training or not self.rate:
            return None
        return patch_dropout(output, self.rate, self.prefix)


def apply_patch_dropout(model: nn.Module, rate: float | None = None, *, verbose: bool = False) -> PatchDropoutReport:
    """Adds patch dropout to a Transformers vision model, in place: training sees a random part of each image's patches.

    It is independent of `apply_dropkey` and `apply_drop_path`: in any order, each with its own undo; DropKey then masks scores
    of the tokens that stay. Subsets come from torch's global generator. The configuration remembers the rate, so
    `apply_patch_dropout(model)` after `from_pretrained` applies it again; the checkpoint stays that of a plain model. A second
    call replaces the first.

    Args:
        model: A Transformers model, or a module that wraps one.
        rate: The fraction of the patches to leave out, [0, 1); default: what the configuration remembers.
        verbose: Print the report too.

    Returns:
        What is thinned, and what is not with the reason.

    Raises:
        TypeError: No Transformers model.
        ValueError: The rate is out of range or not known; the model has no plain sequence of patches, or needs all of them; or
            its DropKey masks are shapes on the grid of patches. The model is then unchanged.
    """
    root: Any = transformers_model(model)
    check_owner(root)
    rate = PATCH_DROPOUT.rate_for(model, root, rate)
    _check_pattern(root)
    found, unreached = _find(root)
    if not found:
        seen = "; ".join(f"{one.name}: {one.reason}" for one in unreached) or "no embeddings of patches"
        raise ValueError(f"Patch dropout is not possible in {type(root).__name__}. Seen: {seen}.")
    handles, replaced = PATCH_DROPOUT.start(root, rate)
    tokens = []
    for name, prefix in found:
        embeddings: Any = root.get_submodule(name)
        handles.append(embeddings.register_forward_hook(_Thin(rate, prefix)))
        patches = _patches(embeddings)
        tokens.append(ThinnedTokens(name, patches, kept_patches(patches, rate), prefix))
    report = PatchDropoutReport(type(root).__name__, float(rate), tuple(tokens), tuple(unreached), replaced)
    logger.info("%s", report)
    if verbose:
        print(report)
    return report


def remove_patch_dropout(model: nn.Module) -> None:
    """Undoes `apply_patch_dropout`: modules and configuration are as before the first call.

    Raises:
        ValueError: There is nothing to undo.
    """
    PATCH_DROPOUT.remove(model)


def _check_pattern(root: PreTrainedModel) -> None:
    """Raises ValueError if DropKey's masks need the grid of patches."""
    for name, module in dropkey_modules(root):
        pattern = getattr(module, "dropkey_pattern", None)
        if pattern in GRID_PATTERNS and module.dropkey_ratio:
            raise ValueError(
                f"DropKey's pattern {pattern!r} at {name} masks shapes on the whole grid of patches, of which patch dropout leaves "
                "a part. Choose the pattern 'score', 'key' or 'token', or leave out apply_patch_dropout."
            )


def _find(root: PreTrainedModel) -> tuple[list[tuple[str, int]], list[WholeTokens]]:
    """Names and prefixes of the embeddings whose tokens can be thinned, and the others with the reason."""
    names = [name for name, module in root.named_modules() if _is_plain(module)]
    reason = _grid_reason(root, names)
    if names and reason is None:
        return [(name, _prefix(root.get_submodule(name))) for name in names], []
    if names:
        return [], [WholeTokens(name, str(reason)) for name in names]
    return [], list(_refused(root))


def _is_plain(module: nn.Module) -> bool:
    # a class of a released model's code extends one of Transformers'
    return any(cls.__name__ in PLAIN for cls in type(module).__mro__)


def _grid_reason(root: PreTrainedModel, embeddings: list[str]) -> str | None:
    """What in a model needs all patches behind its embeddings; None for nothing."""
    for name, module in root.named_modules():
        kind = type(module).__name__
        if isinstance(module, PreTrainedModel):
            if GRID_HEADS.search(kind):
                return f"{kind} puts the tokens back into the grid of patches"
            placed = next((field for field in IMAGE_TOKENS if getattr(module.config, field, None) is not None), None)
            if placed:
                return f"{kind} needs a patch for each image token of its text (`{placed}` of its configuration)"
        inside = any(name == one or name.startswith(f"{one}.") for one in embeddings)
        if isinstance(module, CONVOLUTIONS) and not inside:
            return f"{name}, a {kind}, may need the grid of patches"
    return None


def _refused(root: PreTrainedModel) -> Iterator[WholeTokens]:
    """Why a model without known embeddings has no patch dropout."""
    for pattern, reason in REASONS:
        kinds = [(name, type(module).__name__) for name, module in root.named_modules()]
        found = next(((name, kind) for name, kind in kinds if pattern.search(kind)), None)
        if found is not None:
            yield WholeTokens(found[0] or found[1], reason)
            return
    for name, module in root.named_modules():
        if OTHER_EMBEDDINGS.search(type(module).__name__):
            yield WholeTokens(
                name,
                f"{type(module).__name__} is not among the embeddings whose tokens are known to be a plain sequence of patches "
                f"({', '.join(sorted(PLAIN))})",
            )
            return


def _prefix(embeddings: nn.Module) -> int:
    """Number of tokens that embeddings put in front of the patches."""
    found: list[Any] = [getattr(embeddings, name, None) for name in PREFIX_TOKENS]
    return sum(1 if token.ndim == 1 else token.shape[-2] for token in found if isinstance(token, torch.Tensor))


def _patches(embeddings: Any) -> int:
    """Number of patches of an image at the configured size."""
    own = getattr(embeddings, "num_patches", None)
    return int(embeddings.patch_embeddings.num_patches if own is None else own)
