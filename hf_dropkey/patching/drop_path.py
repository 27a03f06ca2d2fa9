"""Drop path beside DropKey on any Transformers model: `apply_drop_path`, `remove_drop_path`.

In training each residual branch of a layer, its attention and its MLP, is left out for random samples, and the branches
that stay are scaled so that their mean is the same. Huang et al., Deep Networks with Stochastic Depth, ECCV 2016; with
the linear schedule of their section 4. Hooks on the last module of each branch do it (`residuals.py` finds it).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..models.dropkey import layer_ratios
from .hooked import HookedRegulariser
from .modes import check_owner
from .report import table
from .residuals import Residuals, ancestors, residuals_of
from .sites import find_attention, stack_of, transformers_model


logger = logging.get_logger("transformers.dropkey")

# what a configuration remembers
FIELD = "dropkey_drop_path_rate"
# a model's own rate of the same
OWN_FIELD = "drop_path_rate"
DROP_PATH = HookedRegulariser("apply_drop_path", FIELD, "_dropkey_drop_path", 0.1, "branch")


@dataclass(frozen=True)
class DroppedBranch:
    """One residual branch that is dropped.

    Attributes:
        name: Dotted name of its last module.
        depth: Index of its layer in its stack of layers, from 0.
        rate: Probability of leaving it out, [0, 1).
    """

    name: str
    depth: int
    rate: float


@dataclass(frozen=True)
class UnreachedBranch:
    """A layer, or a branch of one, that is never dropped, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class DropPathReport:
    """Every residual branch of a model: those that are dropped, and those that are not with the reason.

    Attributes:
        model: Class name of the model.
        branches: The branches that are dropped, in order of execution.
        unreached: The others, with the reason.
        replaced: Whether the rate of an earlier call was replaced.
    """

    model: str
    branches: tuple[DroppedBranch, ...]
    unreached: tuple[UnreachedBranch, ...]
    replaced: bool = False

    def __str__(self) -> str:
        lines = [f"drop path on {self.model}: {len(self.branches)} residual branches are dropped"]
        if self.replaced:
            lines[0] += " (replaces the rate of an earlier call)"
        rows: list[tuple[str, ...]] = [(one.name, str(one.depth), f"{one.rate:.4g}") for one in self.branches]
        lines += table(("branch", "depth", "rate"), rows)
        if self.unreached:
            lines += ["not reached:", *(f"  {one.name}: {one.reason}" for one in self.unreached)]
        return "\n".join(lines)


def drop_path(values: torch.Tensor, rate: float, samples: int) -> torch.Tensor:
    """Zeroes the rows of random samples with probability `rate`, and scales the others by `1 / (1 - rate)`.

    Args:
        values: `[B * k, ...]`, the k rows of a sample, such as its windows, side by side.
        rate: [0, 1).
        samples: B.

    Raises:
        ValueError: The rows are not of so many samples.
    """
    if len(values) % samples:
        raise ValueError(
            f"a residual branch has {len(values)} rows for {samples} samples, so that none belongs to one sample; leave "
            "this model without apply_drop_path"
        )
    kept = (torch.rand(samples, device=values.device) >= rate).to(values.dtype) / (1 - rate)
    rows = kept.repeat_interleave(len(values) // samples)
    return values * rows.view(-1, *[1] * (values.ndim - 1))


class _Samples:
    """A hook before a layer's forward: counts the samples of its input."""

    def __init__(self) -> None:
        self.count = 1

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Takes the first tensor there is."""
        self.count = len(next(one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)))


class _Drop:
    """A hook behind the last module of a branch."""

    def __init__(self, rate: float, samples: _Samples) -> None:
        self.rate, self.samples = rate, samples

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The output with samples dropped; None, as it is, in eval mode."""
        if not module.training or not self.rate:
            return None
        if isinstance(output, torch.Tensor):
            return drop_path(output, self.rate, self.samples.count)
        if isinstance(output, tuple) and isinstance(output[0], torch.Tensor):
            return (drop_path(output[0], self.rate, self.samples.count), *output[1:])
        raise TypeError(
            f"{type(module).__name__} returns {type(output).__name__}, not a tensor or a tuple that begins with one, so that "
            "drop path cannot act on it; leave this model without apply_drop_path"
        )


def apply_drop_path(model: nn.Module, rate: float | None = None, *, verbose: bool = False) -> DropPathReport:
    """Adds drop path to a Transformers model, in place: residual branches are left out for random samples in training.

    The rate grows linearly over the layers of each stack, from 0 in the first to `rate` in the last. It is independent of
    `apply_dropkey`: in any order, each with its own undo. Masks come from torch's global generator. The configuration
    remembers the rate, so `apply_drop_path(model)` after `from_pretrained` applies it again; the checkpoint stays that of a
    plain model. A second call replaces the first.

    Args:
        model: A Transformers model, or a module that wraps one.
        rate: The largest probability of leaving a branch out, [0, 1); default: what the configuration remembers.
        verbose: Print the report too.

    Returns:
        Every residual branch: those that are dropped and those that are not, with the reason.

    Raises:
        TypeError: No Transformers model.
        ValueError: No branch was reached, the rate is out of range or not known, or the model drops paths by itself. The
            model is then unchanged.
    """
    root: Any = transformers_model(model)
    check_owner(root)
    rate = DROP_PATH.rate_for(model, root, rate)
    if rate:
        _check_own(root)
    found, unreached = _find(root)
    branches = tuple(_rated(found, rate))
    if not branches:
        seen = "; ".join(f"{one.name}: {one.reason}" for one in unreached) or "no layers with attention"
        raise ValueError(f"Drop path reaches no residual branch of {type(root).__name__}. Seen: {seen}.")
    handles, replaced = DROP_PATH.start(root, rate)
    layers = {layer: _Samples() for layer, _, _ in found}
    rates = {branch.name: branch.rate for branch in branches}
    for layer, samples in layers.items():
        handles.append(root.get_submodule(layer).register_forward_pre_hook(samples, with_kwargs=True))
    for layer, _, names in found:
        for name in names:
            hook = _Drop(rates[name], layers[layer])
            handles.append(root.get_submodule(name).register_forward_hook(hook))
    report = DropPathReport(type(root).__name__, branches, tuple(unreached), replaced)
    logger.info("%s", report)
    if verbose:
        print(report)
    return report


def remove_drop_path(model: nn.Module) -> None:
    """Undoes `apply_drop_path`: modules and configuration are as before the first call.

    Raises:
        ValueError: There is nothing to undo.
    """
    DROP_PATH.remove(model)


def _check_own(root: PreTrainedModel) -> None:
    """Raises ValueError if the model has a rate of its own, whose branches would be dropped twice."""
    for part in root.modules():
        own = getattr(part.config, OWN_FIELD, 0) if isinstance(part, PreTrainedModel) else 0
        if isinstance(own, int | float) and own > 0:
            raise ValueError(
                f"The configuration of {type(part).__name__} has `{OWN_FIELD}` {own}, drop path of its own. Load the model "
                f"with {OWN_FIELD}=0.0, or leave out apply_drop_path."
            )


Found = list[tuple[str, str, tuple[str, ...]]]


def _find(root: PreTrainedModel) -> tuple[Found, list[UnreachedBranch]]:
    """Name, stack and branches of each layer, in order of registration, and what was not reached."""
    sites, closed = find_attention(root)
    order = {name: place for place, (name, _) in enumerate(root.named_modules())}
    found: Found = []
    unreached: dict[str, str] = {}
    seen: set[str] = set()
    # a layer has residual branches whether or not its attention can drop keys
    for attention in sorted([*(one.name for one in sites), *(one.name for one in closed)], key=order.__getitem__):
        layer, residuals = _layer_of(root, attention)
        if residuals is None:
            kind = type(root.get_submodule(layer)).__name__
            unreached[layer] = (
                f"the code of {kind} adds no output of a module to a residual, as far as it can be read"
                if layer != attention
                else "it is in no list of layers"
            )
        elif layer not in seen:
            seen.add(layer)
            found.append((layer, stack_of(attention), tuple(f"{layer}.{name}" for name in residuals.branches)))
            unreached |= {f"{layer}.{name}": why for name, why in residuals.unreached.items()}
    return found, [UnreachedBranch(name, why) for name, why in unreached.items()]


def _layer_of(root: PreTrainedModel, attention: str) -> tuple[str, Residuals | None]:
    """The innermost module of a list around an attention that has residual branches; else the innermost, and None."""
    for name in ancestors(attention):
        residuals = residuals_of(root.get_submodule(name))
        if residuals.branches:
            return name, residuals
    return next(ancestors(attention), attention), None


def _rated(found: Found, rate: float) -> Iterator[DroppedBranch]:
    stacks: dict[str, list[tuple[str, ...]]] = {}
    for _, stack, names in found:
        stacks.setdefault(stack, []).append(names)
    for layers in stacks.values():
        for depth, (names, own) in enumerate(
            zip(layers, layer_ratios(len(layers), rate, 0.0, "increasing"), strict=True)
        ):
            yield from (DroppedBranch(name, depth, own) for name in names)
