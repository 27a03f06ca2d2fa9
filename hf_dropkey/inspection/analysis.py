"""Measures of a model's attention: entropy and distance, maps and rollout, and the fraction that DropKey drops.

Tokens in front of the patches (class, distillation, registers) take part as follows. Entropy counts them, as queries
and as keys. Distance is between patches only: their weights on each other are scaled to a sum of one per query first.
Maps show the weights on patches as they are. Rollout multiplies whole matrices, and is then read as a map.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..inference import entropy
from ..patching.apply import dropkey_disabled, dropkey_modules
from ..patching.sites import transformers_model
from .recording import LayerAttention, TokenLayout, checked_images, observed, recorder


# Swin masks keys by adding -100, which leaves them a weight of 1e-44
VISIBLE = 1e-30


@dataclass(frozen=True)
class LayerDrop:
    """The configured drop ratio of one attention, and the fraction that it dropped.

    Attributes:
        name: Dotted name of the module.
        ratio: The configured drop ratio, [0, 1). The patterns "block" and "cross" drop this fraction of the patches,
            and so a little less of all tokens.
        fractions: For each pass, the fraction of weights between real tokens that were exactly 0; empty if not
            measured.
        scores: Number of weights behind each fraction.
        reason: Why it was not measured, None if it was.
    """

    name: str
    ratio: float
    fractions: tuple[float, ...] = ()
    scores: int = 0
    reason: str | None = None


# --- entropy and distance ---------------------------------------------------------------------------------------------


def attention_entropy(layer: LayerAttention) -> torch.Tensor:
    """Entropy of the attention over all keys in nats, the mean over all queries, `[B, H]`, in [0, ln M]."""
    return entropy(layer.weights.double()).mean(-1)


def attention_distance(layer: LayerAttention) -> torch.Tensor:
    """Mean distance from a patch to the patches it attends to, in patches, `[B, H]`.

    As Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, figure 7: Euclidean distances on the patch grid,
    weighted by attention and averaged over the queries that are patches. Attention to the tokens in front of the
    patches is removed, and the rest scaled to one; a patch that attends to no patch at all does not count.

    Returns:
        NaN where no query is a patch, or none attends to a patch.
    """
    prefix = layer.layout.prefix
    distances = _distances(layer.layout.grid).to(layer.weights.device)
    if not layer.is_square:
        return torch.full(layer.weights.shape[:2], math.nan, dtype=torch.float64, device=distances.device)
    between = layer.weights[:, :, prefix:, prefix:].double()
    return ((between * distances).sum(-1) / between.sum(-1)).nanmean(-1)


def _distances(grid: tuple[int, int]) -> torch.Tensor:
    """Euclidean distances between patches, float64 `[rows * columns, rows * columns]`."""
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in grid)
    places = torch.cartesian_prod(rows, columns).view(-1, 2)
    return (places[:, None] - places[None]).square().sum(-1).sqrt()


def uniform_entropy(layout: TokenLayout) -> float:
    """The entropy of uniform attention over all keys, in nats."""
    return math.log(layout.prefix + layout.patches)


def uniform_distance(layout: TokenLayout) -> float:
    """The mean distance of uniform attention over all patches, in patches."""
    return float(_distances(layout.grid).mean())


# --- maps and rollout -------------------------------------------------------------------------------------------------


def attention_map(layer: LayerAttention, source: str = "class") -> torch.Tensor:
    """Attention on each patch, `[B, H, rows, columns]`.

    Args:
        layer: Of `record_attention`.
        source: The query: "class", the class token, or "mean", the mean over all patches.

    Raises:
        ValueError: The layer has no such query.
    """
    return _read_map(layer.weights, layer.layout, source, layer.name)


def _read_map(matrix: torch.Tensor, layout: TokenLayout, source: str, name: str) -> torch.Tensor:
    if source not in ("class", "mean"):
        raise ValueError(f"Unknown `source` {source!r}. Known values: 'class', 'mean'.")
    if source == "class" and layout.prefix == 0:
        raise ValueError(
            f"{name} has no class token: its {layout.patches} tokens are all patches. Pass source='mean' for the "
            "mean over the queries of all patches."
        )
    if source == "mean" and matrix.shape[-2] == 1:
        raise ValueError(f"In {name} the class token is the only query. Pass source='class'.")
    rows = matrix[..., 0, :] if source == "class" else matrix[..., layout.prefix :, :].mean(-2)
    return rows[..., layout.prefix :].unflatten(-1, layout.grid)


def attention_rollout(layers: Sequence[LayerAttention]) -> torch.Tensor:
    """How much of each input token reaches each output token, `[B, T, T]`, every row a distribution.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020: the product over layers of the mean over
    heads, each averaged with the identity for the skip connection. Where a class token joins late or is the only query
    (VOLO), the tokens that a layer does not update pass through it unchanged.

    Args:
        layers: In order of execution, all on one patch grid, such as `AttentionRecord.on_last_grid`.

    Raises:
        ValueError: There are no layers, or they are on several grids.
    """
    grids = {layer.layout.grid for layer in layers}
    if len(grids) != 1:
        raise ValueError(
            f"A rollout needs layers on one patch grid, got {sorted(grids) or 'no layers'}. Choose them, for example "
            "record.on_last_grid."
        )
    tokens = max(layer.weights.shape[3] for layer in layers)
    total = torch.eye(tokens, dtype=torch.float64, device=layers[0].weights.device)
    for layer in layers:
        heads = layer.weights.double().mean(1)
        step = torch.eye(tokens, dtype=torch.float64, device=heads.device).repeat(len(heads), 1, 1)
        # tokens that join later stand in front
        late = tokens - layer.weights.shape[3]
        updated = slice(late, late + heads.shape[1])
        step[:, updated, late:] = (step[:, updated, late:] + heads) / 2
        total = step / step.sum(-1, keepdim=True) @ total
    return total


def rollout_map(layers: Sequence[LayerAttention], source: str = "class") -> torch.Tensor:
    """`attention_rollout` as a map `[B, rows, columns]`; `source` as in `attention_map`."""
    rollout = attention_rollout(layers)
    layout = TokenLayout(layers[0].layout.grid, rollout.shape[-1] - layers[0].layout.patches)
    return _read_map(rollout, layout, source, "The rollout")


# --- measured drops ---------------------------------------------------------------------------------------------------


def drop_schedule(model: nn.Module) -> list[LayerDrop]:
    """The current drop ratio of each attention with DropKey, in order of execution, without a measurement.

    Raises:
        ValueError: The model has no DropKey.
    """
    root = transformers_model(model)
    schedule = [LayerDrop(name, float(module.dropkey_ratio)) for name, module in dropkey_modules(root)]
    if not schedule:
        raise ValueError(f"{type(root).__name__} has no DropKey. Call apply_dropkey(model, ratio=...) first.")
    return schedule


def measured_drops(model: nn.Module, inputs: Mapping[str, Any], *, passes: int = 8, seed: int = 0) -> list[LayerDrop]:
    """`drop_schedule` with the measured fraction of weights that each attention drops in training mode.

    A first pass without DropKey finds the weights that are real: padding and keys outside a window have none. Then
    only the attentions with DropKey are in training mode, so that nothing else is random and no running statistics
    change. Dropout on attention weights, which zeroes weights too, is disabled.

    Args:
        model: With DropKey, patched or of this package, in float32 or bfloat16.
        inputs: As in `record_attention`.
        passes: Number of passes, at least 2, each with its own masks.
        seed: Seed of the masks.

    Raises:
        ValueError: No DropKey, fewer than 2 passes, images that are not finite, or a dtype that rounds small weights
            to 0.
    """
    schedule = drop_schedule(model)
    root: Any = transformers_model(model)
    checked_images(inputs)
    if passes < 2:
        raise ValueError(f"`passes` must be at least 2, because fractions vary between passes, got {passes}.")
    if root.dtype == torch.float16:
        raise ValueError("float16 rounds small attention weights to 0, as if they were dropped. Pass model.float().")
    zeros: dict[str, list[float]] = {layer.name: [] for layer in schedule}
    with observed(root, seed):
        with dropkey_disabled(root), recorder(root) as recorded:
            root(**inputs)
        real = {name: [weights > VISIBLE for weights in calls] for name, calls in recorded.items()}
        counts = {name: sum(int(part.sum()) for part in parts) for name, parts in real.items()}
        blind = [name for name, count in counts.items() if count == 0]
        if blind:
            raise ValueError(
                f"The attention weights of {', '.join(blind)} are all 0 or NaN. Check the model's weights."
            )
        for _ in range(passes):
            with _only_attention_trains(root), recorder(root) as recorded:
                root(**inputs)
            # some attention is recorded in training mode alone, so there is nothing to compare it with
            for name in zeros.keys() & recorded.keys() & real.keys():
                gone = sum(int((was & (now == 0)).sum()) for was, now in zip(real[name], recorded[name], strict=True))
                zeros[name].append(gone / counts[name])
    return [
        LayerDrop(layer.name, layer.ratio, tuple(zeros[layer.name]), counts[layer.name])
        if zeros[layer.name]
        else LayerDrop(layer.name, layer.ratio, reason="it computes no attention weights in both modes")
        for layer in schedule
    ]


@contextmanager
def _only_attention_trains(root: PreTrainedModel) -> Iterator[None]:
    """Training mode for the attentions with DropKey, without dropout on their weights; everything else stays."""
    dropout = []
    # sizes of earlier training images say nothing about these
    seen = {
        id(vars(module).get("dropkey_pixels")): vars(module).get("dropkey_pixels")
        for _, module in dropkey_modules(root)
    }
    trained = [(pixels, pixels.trained) for pixels in seen.values() if pixels is not None]
    for pixels, _ in trained:
        pixels.trained = None
    for _, module in dropkey_modules(root):
        module.training = True
        dropout += [
            (module, name, value)
            for name, value in vars(module).items()
            if "dropout" in name and isinstance(value, float)
        ]
    try:
        for module, name, _ in dropout:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in dropout:
            setattr(module, name, value)
        for _, module in dropkey_modules(root):
            module.training = False
        for pixels, size in trained:
            pixels.trained = size


# --- uncertainty ------------------------------------------------------------------------------------------------------


def accuracy_when_kept(uncertainty: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Accuracy on the most certain images, for every threshold that separates images.

    Args:
        uncertainty: `[B]`, such as `MonteCarloPrediction.mutual_information`.
        right: bool `[B]`, whether each prediction was right.

    Returns:
        The fractions of images kept, (0, 1], ascending, and the accuracy on the images of each. Images of equal
        uncertainty are kept or rejected together.

    Raises:
        ValueError: No images, different lengths, or an uncertainty that is NaN.
    """
    if len(uncertainty) == 0 or uncertainty.shape != right.shape or uncertainty.ndim != 1:
        raise ValueError(
            f"`uncertainty` and `right` must be of one length, at least 1, got {tuple(uncertainty.shape)} and "
            f"{tuple(right.shape)}."
        )
    if uncertainty.isnan().any():
        raise ValueError(f"{int(uncertainty.isnan().sum())} of {len(uncertainty)} uncertainties are NaN. Remove them.")
    ordered, order = uncertainty.sort(stable=True)
    kept = torch.arange(1, len(order) + 1, dtype=torch.float64, device=order.device)
    accuracy = right[order].double().cumsum(0) / kept
    last_of_equals = torch.ones_like(order, dtype=torch.bool)
    last_of_equals[:-1] = ordered[1:] != ordered[:-1]
    return (kept / len(order))[last_of_equals], accuracy[last_of_equals]
