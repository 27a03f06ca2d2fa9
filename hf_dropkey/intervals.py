"""Means over seeds with their confidence intervals, and differences between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .extras import needed


with needed("train"):
    from scipy import stats


LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds with its 95 % confidence interval by Student's t; one seed has none.

    Attributes:
        mean: The mean.
        low, high: The ends of the interval; both are the mean if there is one seed.
        n: Number of seeds.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half the width of the interval, in the unit of the mean."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}" if self.n > 1 else f"{self.mean:.3f} (one seed, no interval)"


def interval(values: Sequence[float]) -> Interval:
    """Mean and interval of the values of several seeds.

    Raises:
        ValueError: No values, or one is not finite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) == 0 or not np.isfinite(numbers).all():
        raise ValueError(f"an interval needs finite values of at least one seed, got {list(values)}")
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return Interval(mean, mean, mean, 1)
    error = float(numbers.std(ddof=1)) / len(numbers) ** 0.5
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(numbers) - 1)) * error
    return Interval(mean, mean - half, mean + half, len(numbers))


def difference(values: Mapping[str, float], baseline: Mapping[str, float]) -> Interval:
    """The mean difference to a baseline over the seeds that both have; a seed fixes weights and order of images.

    Raises:
        ValueError: They have no seed in common.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        raise ValueError(
            f"no seed in common: {sorted(values)} and {sorted(baseline)}; differences are taken seed by seed"
        )
    return interval([values[seed] - baseline[seed] for seed in seeds])
