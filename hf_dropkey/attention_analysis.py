"""What a model's attention does, in numbers: its weights, their entropy and distance, where it looks, what DropKey drops.

The weights are those of the model's own attention, recorded on `eager` while an ordinary forward pass runs; backend,
modes and random generators are put back. An attention that cannot be read is listed with the reason, never left out.

Tokens in front of the patches (class, distillation, registers) take part as follows. Entropy counts them, as queries
and as keys. Distance is between patches only: their weights on each other are scaled to a sum of one per query first.
Maps show the weights on patches as they are. Rollout multiplies whole matrices, and is then read as a map.

May import torch, Transformers and this package; nothing of training, and no Matplotlib.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .inference import entropy
from .patching import BACKEND_FIELD, dropkey_active, dropkey_disabled, dropkey_modules
from .sites import AttentionSite, UnreachedAttention, find_attention, transformers_model


# Swin hides keys by adding -100, which leaves them 1e-44
VISIBLE = 1e-30


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
        weights: `[B, H, N, M]`, each row a distribution over keys. N is M, or 1 where only the class token asks.
        layout: What the M keys are.
    """

    name: str
    weights: torch.Tensor
    layout: TokenLayout

    @property
    def is_square(self) -> bool:
        """Whether every token asks, as in self-attention; else the class token alone does."""
        return self.weights.shape[2] == self.weights.shape[3]


@dataclass(frozen=True)
class AttentionRecord:
    """The attention of one forward pass.

    Attributes:
        layers: In order of execution.
        skipped: The attentions that are not among them, each with the reason.
    """

    layers: tuple[LayerAttention, ...]
    skipped: tuple[UnreachedAttention, ...]

    @property
    def on_last_grid(self) -> tuple[LayerAttention, ...]:
        """The layers on the patch grid of the last one, which can be multiplied into a rollout."""
        return tuple(layer for layer in self.layers if layer.layout.grid == self.layers[-1].layout.grid)


@dataclass(frozen=True)
class LayerDrop:
    """What one attention is told to drop, and what it dropped.

    Attributes:
        name: Dotted name of the module.
        ratio: The drop ratio it is given, [0, 1).
        fractions: For each pass, the share of weights between real tokens that were exactly 0; empty if not measured.
        scores: Number of weights behind each fraction.
        reason: Why there is no measurement, None if there is one.
    """

    name: str
    ratio: float
    fractions: tuple[float, ...] = ()
    scores: int = 0
    reason: str | None = None


# --- recording --------------------------------------------------------------------------------------------------------


def record_attention(
    model: nn.Module, inputs: Mapping[str, Any], *, dropkey: bool = False, seed: int = 0
) -> AttentionRecord:
    """The attention weights of one batch, in eval mode, without gradients.

    Args:
        model: Any Transformers image model, with DropKey or without.
        inputs: Keyword arguments of one batch with `pixel_values` `[B, C, height, width]`, on the model's device.
        dropkey: Drop keys, as in training; else plain attention.
        seed: Of the keys dropped.

    Raises:
        ValueError: The images or the weights are not finite, no attention can be read, or there is no DropKey to drop keys.
    """
    root = transformers_model(model)
    images, size = _checked_images(inputs)
    mode = dropkey_active(root) if dropkey else dropkey_disabled(root)
    with _observed(root, seed), mode, _recorder(root) as recorded:
        root(**inputs)
    sites, unreached = find_attention(root)
    layers, skipped = [], list(unreached)
    for site in sites:
        calls = recorded.get(site.name, [])
        if not calls:
            skipped.append(UnreachedAttention(site.name, f"{type(site.module).__name__} computes no attention weights"))
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
        raise ValueError(f"{type(root).__name__} has no attention over the tokens of an image to read. Seen: {seen}.")
    return AttentionRecord(tuple(layers), tuple(skipped))


def _checked_images(inputs: Mapping[str, Any]) -> tuple[int, tuple[int, int]]:
    """The number of images, and their height and width."""
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4 or len(pixels) == 0:
        shape = tuple(pixels.shape) if isinstance(pixels, torch.Tensor) else pixels
        raise ValueError(
            f"`pixel_values` must be images [batch, channels, height, width], at least one, got {shape}. Make it with the "
            "model's image processor."
        )
    if not pixels.isfinite().all():
        bad = [number for number, image in enumerate(pixels) if not image.isfinite().all()]
        raise ValueError(f"`pixel_values` of the images {bad} are not finite. Repair or leave out these images.")
    return len(pixels), (pixels.shape[-2], pixels.shape[-1])


def _layout_or_reason(
    site: AttentionSite, weights: torch.Tensor, images: int, size: tuple[int, int]
) -> TokenLayout | str:
    """What the keys of a site are, or why they are not the tokens of an image."""
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
    """The patches among `keys` tokens: by the configuration's patch size, else a coarser or finer grid without others."""
    config: Any = getattr(site.module, "config", site.owner.config)
    grid = None
    if callable(getattr(config, "grid_of", None)):
        grid = config.grid_of(*size)
    elif getattr(config, "patch_size", None):
        patch = config.patch_size
        rows, columns = (patch, patch) if isinstance(patch, int) else (patch[-2], patch[-1])
        grid = size[0] // rows, size[1] // columns
    if grid is not None:
        # a class token, a distillation token and the registers
        most = 2 + (getattr(config, "num_register_tokens", 0) or 0)
        prefix = keys - grid[0] * grid[1]
        if 0 <= prefix <= most:
            return TokenLayout(grid, prefix)
    if site.side == "decoder":
        # object queries, which may be a square number too
        return None
    # a pyramid's stages: square cells of a whole number of pixels
    rows = math.isqrt(keys * size[0] // size[1])
    columns = keys // max(rows, 1)
    fills = rows * columns == keys and rows * size[1] == columns * size[0] and size[0] % max(rows, 1) == 0
    return TokenLayout((rows, columns), 0) if fills else None


@contextmanager
def _observed(root: PreTrainedModel, seed: int) -> Iterator[None]:
    """Eval mode on `eager`, seeded and without gradients; everything is put back."""
    sites, _ = find_attention(root)
    configs = {id(config): config for site in sites for config in _configs(site)}.values()
    backends = [(config, getattr(config, BACKEND_FIELD)) for config in configs]
    modes = [(module, module.training) for module in root.modules()]
    device = next(root.parameters()).device
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if not devices else device.type), torch.no_grad():
        torch.manual_seed(seed)
        try:
            root.eval()
            for config, _ in backends:
                setattr(config, BACKEND_FIELD, "eager")
            yield
        finally:
            for config, backend in backends:
                setattr(config, BACKEND_FIELD, backend)
            for module, training in modes:
                module.training = training


def _configs(site: AttentionSite) -> tuple[Any, Any]:
    """The configurations that name a site's backend: its own, and that of the model which makes its masks."""
    own = getattr(site.module, "config", site.owner.config)
    return getattr(own, "dropkey_config", own), site.owner.config


@contextmanager
def _recorder(root: PreTrainedModel) -> Iterator[dict[str, list[torch.Tensor]]]:
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
            # not all of them hand their weights on
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


# --- entropy and distance ---------------------------------------------------------------------------------------------


def attention_entropy(layer: LayerAttention) -> torch.Tensor:
    """Entropy of the attention over all keys in nats, the mean over all queries, `[B, H]`, in [0, ln M]."""
    return entropy(layer.weights.double()).mean(-1)


def attention_distance(layer: LayerAttention) -> torch.Tensor:
    """Mean distance from a patch to the patches it attends to, in patches, `[B, H]`.

    As Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, figure 7: Euclidean distances on the patch grid,
    weighted by attention and averaged over the patches that ask. Attention to the tokens in front of the patches is left
    out, and the rest scaled to one; a patch that attends to no patch at all does not count.

    Returns:
        NaN where no patch asks, or none attends to a patch.
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


def even_entropy(layout: TokenLayout) -> float:
    """The entropy of attention that is the same on every key, in nats."""
    return math.log(layout.prefix + layout.patches)


def even_distance(layout: TokenLayout) -> float:
    """The distance of attention that is the same on every patch, in patches."""
    return float(_distances(layout.grid).mean())


# --- where the model looks --------------------------------------------------------------------------------------------


def attention_map(layer: LayerAttention, source: str = "class") -> torch.Tensor:
    """Attention on each patch, `[B, H, rows, columns]`.

    Args:
        layer: Of `record_attention`.
        source: Who attends: "class", the class token, or "mean", all patches, on average.

    Raises:
        ValueError: The layer lacks the source.
    """
    return _read_map(layer.weights, layer.layout, source, layer.name)


def _read_map(matrix: torch.Tensor, layout: TokenLayout, source: str, name: str) -> torch.Tensor:
    if source not in ("class", "mean"):
        raise ValueError(f"Unknown `source` {source!r}. Known values: 'class', 'mean'.")
    if source == "class" and layout.prefix == 0:
        raise ValueError(
            f"{name} has no class token: its {layout.patches} tokens are all patches. Pass source='mean' for the "
            "attention that all patches pay on average."
        )
    if source == "mean" and matrix.shape[-2] == 1:
        raise ValueError(f"In {name} the class token alone attends. Pass source='class'.")
    rows = matrix[..., 0, :] if source == "class" else matrix[..., layout.prefix :, :].mean(-2)
    return rows[..., layout.prefix :].unflatten(-1, layout.grid)


def attention_rollout(layers: Sequence[LayerAttention]) -> torch.Tensor:
    """How much of each input token reaches each output token, `[B, T, T]`, every row a distribution.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020: the product over layers of the mean over
    heads, each averaged with the identity for the skip connection. Where a class token joins late or alone asks (VOLO),
    the tokens that a layer does not update pass through it unchanged.

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


# --- what DropKey drops -----------------------------------------------------------------------------------------------


def drop_schedule(model: nn.Module) -> list[LayerDrop]:
    """The ratio that each attention with DropKey is given now, in order of execution, without a measurement.

    Raises:
        ValueError: The model has no DropKey.
    """
    root = transformers_model(model)
    given = [LayerDrop(name, float(module.dropkey_ratio)) for name, module in dropkey_modules(root)]
    if not given:
        raise ValueError(f"{type(root).__name__} has no DropKey. Call apply_dropkey(model, ratio=...) first.")
    return given


def measured_drops(
    model: nn.Module, inputs: Mapping[str, Any], *, passes: int = 8, seed: int = 0
) -> list[LayerDrop]:
    """`drop_schedule` with the share of weights that each attention really drops in training mode.

    A first pass without DropKey tells which weights are real: padding and keys outside a window have none. Then only the
    attentions with DropKey are in training mode, so that nothing else is random and no running statistics move. Dropout
    on attention weights, which zeroes weights too, is off.

    Args:
        model: With DropKey, patched or of this package, in float32 or bfloat16.
        inputs: As in `record_attention`.
        passes: Number of passes, at least 2, each with other keys.
        seed: Of the keys dropped.

    Raises:
        ValueError: No DropKey, fewer than 2 passes, images that are not finite, or a dtype that rounds small weights to 0.
    """
    schedule = drop_schedule(model)
    root: Any = transformers_model(model)
    _checked_images(inputs)
    if passes < 2:
        raise ValueError(f"`passes` must be at least 2, to show how much fractions vary, got {passes}.")
    if root.dtype == torch.float16:
        raise ValueError("float16 rounds small attention weights to 0, as if they were dropped. Pass model.float().")
    zeros: dict[str, list[float]] = {layer.name: [] for layer in schedule}
    with _observed(root, seed):
        with dropkey_disabled(root), _recorder(root) as recorded:
            root(**inputs)
        real = {name: [weights > VISIBLE for weights in calls] for name, calls in recorded.items()}
        counts = {name: sum(int(part.sum()) for part in parts) for name, parts in real.items()}
        for _ in range(passes):
            with _only_attention_trains(root), _recorder(root) as recorded:
                root(**inputs)
            for name in zeros.keys() & recorded.keys():
                gone = sum(int((was & (now == 0)).sum()) for was, now in zip(real[name], recorded[name], strict=True))
                zeros[name].append(gone / counts[name])
    return [
        LayerDrop(layer.name, layer.ratio, tuple(zeros[layer.name]), counts[layer.name])
        if zeros[layer.name]
        else LayerDrop(layer.name, layer.ratio, reason="it computes no attention weights")
        for layer in schedule
    ]


@contextmanager
def _only_attention_trains(root: PreTrainedModel) -> Iterator[None]:
    """Training mode for the attentions with DropKey, without dropout on their weights; everything else stays."""
    dropout = []
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


# --- uncertainty ------------------------------------------------------------------------------------------------------


def accuracy_when_kept(uncertainty: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Accuracy on the most certain images, for every threshold that tells images apart.

    Args:
        uncertainty: `[B]`, such as `MonteCarloPrediction.mutual_information`.
        right: bool `[B]`, whether each prediction was right.

    Returns:
        The fractions of images kept, (0, 1], ascending, and the accuracy on each. Images of equal uncertainty are kept
        or rejected together.

    Raises:
        ValueError: No images, different lengths, or an uncertainty that is NaN.
    """
    if len(uncertainty) == 0 or uncertainty.shape != right.shape or uncertainty.ndim != 1:
        raise ValueError(
            f"`uncertainty` and `right` must be of one length, at least 1, got {tuple(uncertainty.shape)} and "
            f"{tuple(right.shape)}."
        )
    if uncertainty.isnan().any():
        raise ValueError(f"{int(uncertainty.isnan().sum())} of {len(uncertainty)} uncertainties are NaN; leave them out.")
    ordered, order = uncertainty.sort(stable=True)
    kept = torch.arange(1, len(order) + 1, dtype=torch.float64)
    accuracy = right[order].double().cumsum(0) / kept
    last_of_equals = torch.cat((ordered[1:] != ordered[:-1], torch.tensor([True])))
    return (kept / len(order))[last_of_equals], accuracy[last_of_equals]
