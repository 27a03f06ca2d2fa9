"""Monte-Carlo inference: the prediction of a classifier averaged over random masks, and how much it varies.

The paper's first alignment: DropKey acts in training only, which shifts the distribution that the model
sees in inference; averaging over masks removes the shift, and the spread says how sure the model is.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .models.sample_masks import fixed_seed, number_layers
from .patching.apply import dropkey_active, dropkey_modules
from .patching.modes import GENERATORS


_EVAL_LOCK = threading.Lock()
# modules that were in training mode, with the number of `eval_mode` blocks that hold them in eval mode
_HELD_IN_EVAL: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class MonteCarloPrediction:
    """A classifier's prediction over random masks. Entropies are in nats.

    Attributes:
        probabilities: Mean class probabilities, the shape of the logits.
        entropy: Entropy of the mean, total uncertainty; the shape of the logits without the class dimension.
        mutual_information: Entropy of the mean minus mean entropy: the part of the uncertainty that is disagreement
            between masks, in [0, entropy]; shape as `entropy`.
        std: Standard deviation of each class's probability over the masks; the shape of the logits.
        samples: Number of masks.
    """

    probabilities: torch.Tensor
    entropy: torch.Tensor
    mutual_information: torch.Tensor
    std: torch.Tensor
    samples: int


def monte_carlo_predict(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    samples: int = 20,
    seed: int | None = None,
    samples_per_pass: int = 1,
    class_dim: int = -1,
) -> MonteCarloPrediction:
    """The mean prediction of a classifier over `samples` random masks, without gradients.

    The model runs in eval mode with DropKey active, whatever mode it is in, and is left as it was. Threads may predict
    with one model at once; those that give a seed run one after the other, because they seed torch's generators, which
    the process has once. A model that another thread trains is better copied: eval mode is an attribute of the model.

    Args:
        model: Any model with DropKey, patched or of this package, whose output has single-label `logits`.
        inputs: Keyword arguments of one batch, on the model's device; `labels` are ignored.
        samples: Number of masks, at least 2.
        seed: Makes the result repeatable and leaves the caller's random generators unchanged. Without it the masks
            come from the global generator.
        samples_per_pass: Masks in one forward pass, which runs on that many copies of the batch: faster for small
            batches. Each copy draws its own masks, so for a seed the number changes which masks are drawn.
        class_dim: The dimension of the logits that holds the classes; 1 for semantic segmentation.

    Raises:
        ValueError: Fewer than 2 samples, a model without DropKey or with all ratios 0, or logits of several
            independent labels.
    """
    if samples < 2 or samples_per_pass < 1:
        raise ValueError(
            f"`samples` must be at least 2 and `samples_per_pass` at least 1, got {samples} and {samples_per_pass}."
        )
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem in ("multi_label_classification", "regression"):
        raise ValueError(
            f"Monte-Carlo prediction is defined for one label of several classes, not for problem_type={problem!r}."
        )
    tensors = {name: value for name, value in inputs.items() if name != "labels"}
    moments = MonteCarloMoments(class_dim)
    with _repeatable(seed, _device_of(model)), eval_mode(model), dropkey_active(model), torch.no_grad():
        while moments.samples < samples:
            copies = min(samples_per_pass, samples - moments.samples)
            logits = model(**{name: _repeated(value, copies) for name, value in tensors.items()}).logits
            for part in logits.chunk(copies):
                moments.add(part)
    return moments.prediction()


@contextmanager
def dropkey_seed(model: nn.Module, seed: int | torch.Tensor) -> Iterator[None]:
    """Within this block the model drops the same keys in every call: those of `seed`, and of no random generator.

    A graph of `export_graph(..., monte_carlo=True)` drops them too, for the same seed. Use it in training mode or within
    `dropkey_active`; in eval mode alone nothing is dropped. Other threads are not concerned.

    Args:
        model: A model with DropKey that is not compiled.
        seed: An integer of 64 bits, or its low and high 32 bits as int32 `[2]`.

    Example:

        with dropkey_active(model), dropkey_seed(model, 1):
            logits = model(images).logits

    Raises:
        TypeError: The seed is neither.
        ValueError: The model has no DropKey.
    """
    modules = [module for _, module in dropkey_modules(model)]
    if not modules:
        raise ValueError(f"{type(model).__name__} has no DropKey. Call apply_dropkey(model, ratio=...) first.")
    if not all(hasattr(module, "dropkey_layer") for module in modules):
        number_layers(model)
    with fixed_seed(seed):
        yield


class MonteCarloMoments:
    """Sums of probabilities, their squares and entropies; in float64, since variances are small differences."""

    def __init__(self, class_dim: int):
        self.class_dim = class_dim
        self.samples = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0
        self.entropies: Any = 0.0

    def add(self, logits: torch.Tensor) -> None:
        if logits.shape[self.class_dim] < 2:
            raise ValueError(
                f"The logits of shape {tuple(logits.shape)} have {logits.shape[self.class_dim]} class in dimension "
                f"{self.class_dim}; a prediction needs two. Set `class_dim`."
            )
        probabilities = logits.double().softmax(self.class_dim)
        self.samples += 1
        # Welford's update
        change = probabilities - self.mean
        self.mean = self.mean + change / self.samples
        self.squares = self.squares + change * (probabilities - self.mean)
        self.entropies = self.entropies + entropy(probabilities, self.class_dim)

    def prediction(self) -> MonteCarloPrediction:
        total = entropy(self.mean, self.class_dim)
        # zero up to rounding where all masks agree
        information = (total - self.entropies / self.samples).clamp(min=0)
        std = (self.squares / (self.samples - 1)).sqrt()
        return MonteCarloPrediction(
            probabilities=self.mean.float(),
            entropy=total.float(),
            mutual_information=information.float(),
            std=std.float(),
            samples=self.samples,
        )


def entropy(probabilities: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Shannon entropy in nats over one dimension."""
    return torch.special.entr(probabilities).sum(dim)


def _repeated(value: Any, copies: int) -> Any:
    return value.repeat(copies, *[1] * (value.ndim - 1)) if isinstance(value, torch.Tensor) and value.ndim else value


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _repeatable(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seeds the generators inside the block and restores them after it; without a seed, does nothing."""
    if seed is None:
        yield
        return
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with GENERATORS, torch.random.fork_rng(devices=devices, device_type=kind):
        torch.manual_seed(seed)
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts every module in eval mode, and back in training mode those that were, when the last thread has left."""
    with _EVAL_LOCK:
        held = [module for module in model.modules() if module.training or module in _HELD_IN_EVAL]
        for module in held:
            _HELD_IN_EVAL[module] = _HELD_IN_EVAL.get(module, 0) + 1
        model.eval()
    try:
        yield
    finally:
        with _EVAL_LOCK:
            for module in held:
                _HELD_IN_EVAL[module] -= 1
                if not _HELD_IN_EVAL[module]:
                    del _HELD_IN_EVAL[module]
                    module.training = True
