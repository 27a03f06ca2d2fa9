"""Whether a difference over the seeds is better or worse by more than its interval, as a value."""

from dataclasses import dataclass
from typing import Literal

from ..hub.metric_names import METRICS
from ..intervals import Interval


@dataclass(frozen=True)
class Judgement:
    """A difference over the seeds, and whether it is better or worse.

    Attributes:
        mean: The mean difference.
        half: Half of its 95 % interval; 0 with one seed, which has no interval.
        n: Number of seeds.
        word: "better" or "worse" where the interval excludes 0, else "".
    """

    mean: float
    half: float
    n: int
    word: Literal["better", "worse", ""]

    @property
    def numbers(self) -> str:
        """The mean with its interval, without the word."""
        # no "-0.000"
        mean = round(self.mean, 3) + 0.0
        return f"{mean:+.3f} ± {self.half:.3f}" if self.n > 1 else f"{mean:+.3f} (one seed)"

    def __str__(self) -> str:
        return f"{self.numbers}, {self.word}" if self.word else self.numbers


def judged(found: Interval, metric: str) -> Judgement:
    """Whether a difference in a metric is better or worse by more than its interval.

    Raises:
        ValueError: Neither larger nor smaller values of the metric are better.
    """
    larger_is_better = METRICS[metric].larger_is_better
    if larger_is_better is None:
        raise ValueError(f"neither larger nor smaller values of {metric} are better; judge another metric")
    word: Literal["better", "worse", ""] = ""
    if found.n > 1 and (found.low > 0 or found.high < 0):
        word = "better" if (found.mean > 0) == larger_is_better else "worse"
    return Judgement(found.mean, found.half, found.n, word)
