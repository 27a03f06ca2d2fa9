"""Masks by sample: a mask that depends on which image it is for, not on the image's place in a batch.

By default a call of attention draws one seed, and the mask of an image depends on its place in the batch. Within
`sample_ids` each image has a seed of its own, a pure function of

    (seed of the run, epoch, id of the sample, number of the layer, number of the window if there are windows)

by one step of `counter_hash` for each after the first, the id as its low and then its high 32 bits. The image then counts
as image 0 of that seed, on every backend. No generator is read, so neither the number of processes, nor the size of the
batch, nor gradient accumulation, nor a resume changes which scores of an image are dropped.

The ids are kept where autograd's own threads find them too, and where every copy of this file in the process does: a
checkpoint's and the installed one.

This file travels with checkpoints: it imports torch and its neighbours only.
"""

import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .counter_hash import draw_seed, step
from .operators import register_operator


KEY = "hf_dropkey_samples"
WORD = 0xFFFFFFFF
# whether any thread is in a block: compiled code guards on it. Shared by all copies of this file
_OPEN: Any = vars(torch.ops.hf_dropkey).setdefault("sample_masks_open", SimpleNamespace(any=False, blocks=0))
_LOCK = threading.Lock()


@contextmanager
def sample_ids(ids: torch.Tensor | Sequence[int], *, epoch: int = 0, seed: int = 0) -> Iterator[None]:
    """Within this block, masks depend on the ids of the samples, not on their places in the batch.

    Put forward and backward pass into the block: activation checkpointing computes attention again in the backward pass.
    The block counts for its own thread, and for the backward passes that start in it.

    Args:
        ids: Integers `[B]`, one for each image of the batch, such as row numbers of the data set. An image that is in a
            batch twice may have one id for both.
        epoch: Number of the pass over the data, the same on all processes, so that each pass has new masks.
        seed: Seed of the run, the same on all processes.

    Example:

        with hf_dropkey.sample_ids(batch.pop("sample_ids"), epoch=epoch, seed=42):
            model(**batch).loss.backward()

    Raises:
        TypeError: The ids, the epoch or the seed are not integers.
        ValueError: The ids have another number of dimensions.
    """
    enter_block(ids, epoch=epoch, seed=seed)
    try:
        yield
    finally:
        leave_block()


@contextmanager
def fixed_seed(seed: torch.Tensor | int) -> Iterator[None]:
    """Within this block the masks of a layer are those of `seed`, the same in every call, by places in the batch.

    A graph that is traced within it takes the seed as an input, where the seed is one. See `sample_ids` for threads.

    Args:
        seed: An integer, whose low and high 32 bits are the words; or the words, int32 `[2]`.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int32 or tuple(seed.shape) != (2,):
            raise TypeError(f"A seed must be int32 [2] or an integer, got {seed.dtype} {list(seed.shape)}.")
        words = seed
    else:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"A seed must be an integer or int32 [2], got {seed!r}.")
        words = seed_words(seed)
    _enter(words, of="")
    try:
        yield
    finally:
        leave_block()


# compiled code calls them as they are; this decorator, unlike `torch.compiler.disable`, loads the compiler late
@torch._disable_dynamo  # type: ignore[attr-defined]  # private, and in every release of the range
def enter_block(ids: torch.Tensor | Sequence[int], *, epoch: int = 0, seed: int = 0, of: str = "") -> None:
    """The beginning of `sample_ids`; `of` names who opens it."""
    _enter(_pairs_of(_checked(ids), epoch, seed), of=of)


def _enter(pairs: torch.Tensor, *, of: str) -> None:
    """Opens a block: `pairs` are int32 `[B, 2]` of samples, or `[2]` of a fixed seed."""
    # plain types, because another copy of this file may read them
    block = {"pairs": {pairs.device: pairs}, "block": uuid.uuid4().hex, "of": of, "outer": _current()}
    torch._C._stash_obj_in_tls(KEY, block)
    _count(1)


@torch._disable_dynamo  # type: ignore[attr-defined]  # private, and in every release of the range
def leave_block(of: str = "") -> None:
    """The end of the innermost block, if it is that of `of`."""
    block = _current()
    if block is not None and block["of"] == of:
        torch._C._stash_obj_in_tls(KEY, block["outer"])
        _count(-1)


def any_block() -> bool:
    """Whether any thread is in a block."""
    found: bool = _OPEN.any
    return found


def _count(change: int) -> None:
    with _LOCK:
        _OPEN.blocks += change
        _OPEN.any = _OPEN.blocks > 0


def _checked(ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
    found = torch.as_tensor(ids)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"Ids of samples must be integers, got {found.dtype}. Pass row numbers of the data set.")
    if found.ndim != 1:
        raise ValueError(f"Ids of samples must be [B], one for each image, got shape {tuple(found.shape)}.")
    return found.long()


def _pairs_of(ids: torch.Tensor, epoch: int, seed: int) -> torch.Tensor:
    """The seeds of samples before the layer, int32 `[B, 2]`."""
    for name, value in (("epoch", epoch), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{name}` must be an integer, got {value!r}.")

    k1, k2 = seed_words(seed).to(ids.device)[:, None]
    for index in (seed_words(epoch)[:1].to(ids.device), _int32(ids), _int32(ids >> 32)):
        k1, k2 = step(k1, k2, index)
    return torch.stack((k1, k2), -1)


def seed_words(seed: int) -> torch.Tensor:
    """The low and the high 32 bits of a seed, int32 `[2]`."""
    return _int32(torch.tensor([seed & WORD, (seed >> 32) & WORD], device="cpu"))


def _int32(words: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of int64 numbers, read as signed."""
    low = words & WORD
    return (low - ((low >> 31) << 32)).to(torch.int32)


def _current() -> dict[str, Any] | None:
    found: Any = torch._C._get_obj_in_tls(KEY) if torch._C._is_key_in_tls(KEY) else None
    return found


# --- the seeds of an attention ----------------------------------------------------------------------------------------


def number_layers(model: nn.Module) -> int:
    """Numbers the attentions of a model, in the order of its modules; masks by sample depend on it.

    Models of this package and patched ones are numbered. Call it for a model of your own with `DropKey` modules.

    Returns:
        How many there are.
    """
    modules: list[Any] = [module for module in model.modules() if "dropkey_ratio" in vars(module)]
    for number, module in enumerate(modules):
        # a tensor, because compiled code takes an integer for a constant and makes a graph for each; not on the default
        # device, which is "meta" while a checkpoint is read
        module.dropkey_layer = torch.tensor(number, dtype=torch.int32, device="cpu")
    return len(modules)


def layer_number(layer: int | None) -> torch.Tensor | None:
    """The `dropkey_layer` of a function's argument `layer`."""
    return None if layer is None else torch.tensor(layer, dtype=torch.int32, device="cpu")


def seed_for(module: Any, images: int, device: torch.device) -> torch.Tensor:
    """What `row_keys` takes for a call of an attention: a seed, int32 `[2]`, or within `sample_ids` `[B, 2]`.

    It is drawn, or within `fixed_seed` that of the layer.

    Args:
        module: The attention module; its `dropkey_layer` counts within `sample_ids` (`number_layers`). An attention over
            windows has a true `dropkey_windowed`: its batch is the windows of the first image, then those of the next.
        images: `B`.
        device: Where the seed is needed.

    Raises:
        ValueError: Within `sample_ids`, the layer has no number, or there are not as many ids as images.
        RuntimeError: The backward pass of a checkpointed layer is in another block, or in none.
    """
    if torch.compiler.is_compiling() and not _traced_in_block():
        if not _OPEN.any:
            return draw_seed(device)
        windowed = bool(getattr(module, "dropkey_windowed", False))
        seeds: torch.Tensor = _seeds_in_block(_layer_of(module), torch.empty(0, device=device), images, windowed)
        return seeds
    samples = _current()
    if not torch.compiler.is_compiling():
        _check_recomputed(module, samples)
    if samples is None:
        return draw_seed(device)
    return _seeds(samples, _layer_of(module), images, device, bool(getattr(module, "dropkey_windowed", False)))


def _traced_in_block() -> bool:
    """Whether `torch.export` runs this code as it is, for a graph whose seed is that of the block."""
    # torch 2.6 has no such function
    exporting = getattr(torch.compiler, "is_exporting", lambda: False)
    return exporting() and _OPEN.any and not torch.compiler.is_dynamo_compiling()


def _layer_of(module: Any) -> torch.Tensor:
    layer: torch.Tensor | None = getattr(module, "dropkey_layer", None)
    if layer is None:
        raise ValueError(
            f"{type(module).__name__} has no number among the layers, which masks by sample depend on. Call "
            "hf_dropkey.number_layers(model) once, on every process, or pass layer= to the function."
        )
    return layer


def _check_recomputed(module: Any, samples: dict[str, Any] | None) -> None:
    """Notes the block that an attention ran in, and raises RuntimeError if a backward pass repeats it in another."""
    block = None if samples is None else samples["block"]
    if torch._C._current_graph_task_id() == -1:
        if block is not None or "dropkey_block" in vars(module):
            module.dropkey_block = block
    elif block != vars(module).get("dropkey_block"):
        raise RuntimeError(
            f"{type(module).__name__} is computed again in the backward pass (activation checkpointing), but not within "
            "the `sample_ids` block of its forward pass, so it would drop other scores. Put both passes into the block."
        )


def _seeds(
    samples: dict[str, Any], layer: torch.Tensor, images: int, device: torch.device, windowed: bool
) -> torch.Tensor:
    """The seed of each image of a call, int32 `[B, 2]`; or, of a fixed seed, that of the layer, int32 `[2]`."""
    pairs: torch.Tensor | None = samples["pairs"].get(device)
    if pairs is None:
        pairs = samples["pairs"][device] = next(iter(samples["pairs"].values())).to(device)
    if pairs.ndim == 1:
        return torch.stack(step(pairs[0], pairs[1], layer.to(device)))
    windows, left = divmod(images, max(1, len(pairs)))
    if left or (windows != 1 and not windowed):
        raise ValueError(
            f"An attention has a batch of {images}, and `sample_ids` got {len(pairs)} ids. Pass one for each image that "
            "the model gets, in its order; a batch that is given twice needs its ids twice (torch.cat((ids, ids))). "
            "Models that make another batch of the images inside cannot have masks by sample."
        )
    k1, k2 = step(pairs[:, 0], pairs[:, 1], layer.to(device))
    if windowed:
        window = torch.arange(windows, dtype=torch.int32, device=device)
        k1, k2 = (words.flatten() for words in step(k1[:, None], k2[:, None], window))
    return torch.stack((k1, k2), -1)


def _seeds_of_block(layer: torch.Tensor, like: torch.Tensor, images: int, windowed: bool) -> torch.Tensor:
    samples = _current()
    if samples is None:
        raise RuntimeError(
            "Another thread is in a `sample_ids` block while this one runs compiled code outside of one. Open a block here "
            "too, or run them one after the other."
        )
    if next(iter(samples["pairs"].values())).ndim == 1:
        raise RuntimeError("Compiled code takes no fixed seed. Run the model that was not compiled within the block.")
    return _seeds(samples, layer, images, like.device, windowed)


# what compiled code calls: it reads this thread's block each time it runs
_seeds_in_block = register_operator(
    "sample_seeds",
    [__file__],
    "(Tensor layer, Tensor like, int images, bool windowed) -> Tensor",
    _seeds_of_block,
    lambda layer, like, images, windowed: like.new_empty((images, 2), dtype=torch.int32),
)


# --- ids among the arguments of a model -------------------------------------------------------------------------------


def check_argument(model: nn.Module) -> None:
    """Raises ValueError where `model(..., sample_ids=ids)` would not reach the backward pass."""
    if model.training and any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        raise ValueError(
            "Under gradient checkpointing the backward pass needs the ids too: leave the argument `sample_ids` out, and "
            "put both passes into `with hf_dropkey.sample_ids(ids):`."
        )
