"""The attention weights of a model, recorded while it runs.

The weights are those of the model's own attention on `eager`; backend, modes and random generators are restored. An
attention that cannot be read is listed with the reason.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..inference import eval_mode
from ..patching.apply import BACKEND_FIELD, dropkey_active, dropkey_disabled
from ..patching.dispatch import leading_tokens
from ..patching.modes import GENERATORS
from ..patching.sites import AttentionSite, UnreachedAttention, find_attention, transformers_model


class UnreadableAttentionError(ValueError):
    """A model has no readable attention over the tokens of an image; the message gives the reason for each."""


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of one attention.

    Attributes:
        grid: Rows and columns of its patches.
        prefix: Tokens in front of the patches, the first of which is the class token; 0 for none.
    """

    grid: tuple[int, int]
    prefix: int

    @property
    def patches(self) -> int:
        """Number of patches."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class LayerAttention:
    """The weights of one attention over the tokens of whole images.

    Attributes:
        name: Dotted name of the module.
        weights: `[B, H, N, M]`, each row a distribution over keys. N = M, or 1 in class attention.
        layout: The tokens that the M keys belong to.
    """

    name: str
    weights: torch.Tensor
    layout: TokenLayout

    @property
    def is_square(self) -> bool:
        """Whether every token is a query, as in self-attention; else only the class token is (class attention)."""
        return self.weights.shape[2] == self.weights.shape[3]


@dataclass(frozen=True)
class AttentionRecord:
    """The attention of one forward pass.

    Attributes:
        layers: In order of execution.
        skipped: The attentions that were not recorded, each with the reason.
    """

    layers: tuple[LayerAttention, ...]
    skipped: tuple[UnreachedAttention, ...]

    @property
    def on_last_grid(self) -> tuple[LayerAttention, ...]:
        """The layers on the patch grid of the last one, which can be multiplied into a rollout."""
        return tuple(layer for layer in self.layers if layer.layout.grid == self.layers[-1].layout.grid)


def record_attention(
    model: nn.Module, inputs: Mapping[str, Any], *, dropkey: bool = False, seed: int = 0
) -> AttentionRecord:
    """The attention weights of one batch, in eval mode, without gradients.

    Args:
        model: Any Transformers image model, with DropKey or without.
        inputs: Keyword arguments of one batch with `pixel_values` `[B, C, height, width]`, on the model's device.
        dropkey: Drop keys, as in training; else plain attention.
        seed: Seed of the masks.

    Raises:
        UnreadableAttentionError: No attention can be read.
        ValueError: The images or the weights are not finite, or `dropkey` is set and the model has no DropKey.
    """
    root = transformers_model(model)
    images, size = checked_images(inputs)
    mode = dropkey_active(root) if dropkey else dropkey_disabled(root)
    with observed(root, seed), mode, recorder(root) as recorded:
        root(**inputs)
    sites, unreached = find_attention(root)
    layers, skipped = [], list(unreached)
    for site in sites:
        calls = recorded.get(site.name, [])
        if not calls:
            skipped.append(
                UnreachedAttention(site.name, f"{type(site.module).__name__} computes no attention weights")
            )
        for number, weights in enumerate(calls):
            name = site.name if len(calls) == 1 else f"{site.name} (call {number + 1})"
            found = _layout_or_reason(site, weights, images, size)
            if isinstance(found, str):
                skipped.append(UnreachedAttention(name, found))
                continue
            if not weights.isfinite().all():
                raise ValueError(
                    f"The attention weights of {name} are not finite. Check the model's weights, or run it in float32."
                )
            layers.append(LayerAttention(name, weights.float(), found))
    if not layers:
        seen = "; ".join(f"{attention.name}: {attention.reason}" for attention in skipped) or "no attention at all"
        raise UnreadableAttentionError(
            f"{type(root).__name__} has no readable attention over the tokens of an image. Found: {seen}. "
            "`measured_drops` and `monte_carlo_predict` do not need one."
        )
    return AttentionRecord(tuple(layers), tuple(skipped))


def checked_images(inputs: Mapping[str, Any]) -> tuple[int, tuple[int, int]]:
    """The number of images, and their height and width."""
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4 or len(pixels) == 0:
        shape = tuple(pixels.shape) if isinstance(pixels, torch.Tensor) else pixels
        raise ValueError(
            f"`pixel_values` must be at least one image, [batch, channels, height, width], got {shape}. Make it with "
            "the model's image processor."
        )
    if not pixels.isfinite().all():
        bad = [number for number, image in enumerate(pixels) if not image.isfinite().all()]
        raise ValueError(f"`pixel_values` of the images {bad} are not finite. Repair or remove these images.")
    return len(pixels), (pixels.shape[-2], pixels.shape[-1])


def _layout_or_reason(
    site: AttentionSite, weights: torch.Tensor, images: int, size: tuple[int, int]
) -> TokenLayout | str:
    """The tokens that the keys of a site belong to, or why they are not the tokens of an image."""
    batch, _, queries, keys = weights.shape
    if batch != images:
        return f"attends within {batch / images:g} windows of {keys} positions each, not over the image"
    layout = _layout(site, keys, size)
    if layout is None:
        return f"its {keys} keys are not the patches of an image of {size[0]} x {size[1]} pixels"
    if queries not in (keys, 1) or (queries == 1 and layout.prefix == 0):
        return f"not square: {queries} queries and {keys} keys"
    return layout


def _layout(site: AttentionSite, keys: int, size: tuple[int, int]) -> TokenLayout | None:
    """The patches among `keys` tokens: by the configured patch size, else a pyramid's grid without other tokens."""
    config: Any = getattr(site.module, "config", site.owner.config)
    grid = None
    if callable(getattr(config, "grid_of", None)):
        grid = config.grid_of(*size)
    elif getattr(config, "patch_size", None):
        patch = config.patch_size
        rows, columns = (patch, patch) if isinstance(patch, int) else (patch[-2], patch[-1])
        grid = size[0] // rows, size[1] // columns
    if grid is not None:
        prefix = leading_tokens(config, keys, grid)
        if prefix is not None:
            return TokenLayout(grid, prefix)
    if site.side == "decoder":
        # the number of object queries may be a square as well
        return None
    # a pyramid's stages: square cells of a whole number of pixels
    rows = math.isqrt(keys * size[0] // size[1])
    columns = keys // max(rows, 1)
    fills = rows * columns == keys and rows * size[1] == columns * size[0] and size[0] % max(rows, 1) == 0
    return TokenLayout((rows, columns), 0) if fills else None


@contextmanager
def observed(root: PreTrainedModel, seed: int) -> Iterator[None]:
    """Eval mode on `eager`, seeded and without gradients; restores all of it."""
    sites, _ = find_attention(root)
    configs = {id(config): config for site in sites for config in site.configs}.values()
    device = next(root.parameters()).device
    devices = [] if device.type == "cpu" else [device]
    # one thread after the other, or each would put back what the other one has set
    with (
        GENERATORS,
        torch.random.fork_rng(devices, device_type="cuda" if not devices else device.type),
        torch.no_grad(),
        eval_mode(root),
    ):
        backends = [(config, getattr(config, BACKEND_FIELD)) for config in configs]
        torch.manual_seed(seed)
        try:
            for config, _ in backends:
                setattr(config, BACKEND_FIELD, "eager")
            yield
        finally:
            for config, backend in backends:
                setattr(config, BACKEND_FIELD, backend)


@contextmanager
def recorder(root: PreTrainedModel) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collects the weights of each attention, by name, one tensor for each call."""
    recorded: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, torch.Tensor) and weights.ndim == 4:
            recorded.setdefault(name, []).append(weights.detach())

    def watched(name: str, attend: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = attend(*args, **kwargs)
        keep(name, output)
        return output

    hooks, wrapped = [], []
    for site in find_attention(root)[0]:
        module: Any = site.module
        if site.native and hasattr(module, "attend"):
            # not all of them return their weights
            module.attend = partial(watched, site.name, module.attend)
            wrapped.append(module)
        else:
            hooks.append(module.register_forward_hook(lambda _, __, output, name=site.name: keep(name, output)))
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()
        for module in wrapped:
            del module.attend
