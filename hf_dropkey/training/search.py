"""A search over the settings of DropKey: what is searched, the study in its SQLite file, and one trial after the other.

Optuna chooses and prunes; it comes with the extra `search`. A trial is a training job of its own, as `hf-dropkey train`
runs it. `Trainer.hyperparameter_search` is not used, because

- it changes arguments of `Trainer`, and the settings of DropKey belong to the model;
- one `Trainer` would run all trials, with the callbacks, which count steps and losses, of the first;
- a killed trial is lost: its study calls it running for ever, and another start makes so many new trials;
- its sampler begins anew with each start. Here the draws of a trial depend on the seed and the number of the trial, so
  that an interrupted search tries what an uninterrupted one would have tried.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..extras import needed
from ..models.dropkey import PATTERNS, SCHEDULES


if TYPE_CHECKING:
    import optuna


logger = logging.getLogger(__name__)

DATABASE = "search.db"
STUDY = "dropkey"
SETTINGS = "settings"
# of the result of a trial, beside its settings
REASON = "reason"
# settings to begin with, if the ranges hold them: none, which all others are compared with, and the defaults
FIRST: tuple[dict[str, Any], ...] = (
    {"ratio": 0.0},
    {"ratio": 0.1, "schedule": "decreasing", "final_fraction": 0.0, "pattern": "score"},
)
# trials that are trained to the end before others are compared with their median
UNPRUNED_TRIALS = 4
# of the steps of a trial, before which it is not stopped
UNPRUNED_FRACTION = 0.25
# after so many failures, and no success, the search has no point
MOST_FAILURES = 3


@dataclass
class SearchArguments:
    """What is searched, and for how long. These settings of DropKey are not taken from recipe or command."""

    _argument_group_name = "Search"

    trials: int = field(
        default=30, metadata={"help": "Trials in all; with a larger number a finished search goes on."}
    )
    search_ratio: list[float] = field(
        default_factory=lambda: [0.0, 0.5],
        metadata={"help": "Smallest and largest drop ratio, in [0, 1). With 0 the first trial is without DropKey."},
    )
    search_schedules: list[str] = field(
        default_factory=lambda: list(SCHEDULES),
        metadata={"help": f"Schedules to choose from. Default: all, {', '.join(SCHEDULES)}."},
    )
    search_final_fractions: list[float] = field(
        default_factory=lambda: [0.0, 0.25, 0.5],
        metadata={"help": "Final ratios to choose from, as fractions of the ratio, [0, 1]."},
    )
    search_patterns: list[str] = field(
        default_factory=lambda: ["score", "key", "token"],
        metadata={"help": f"Patterns to choose from, among {', '.join(PATTERNS)}. Default: score key token."},
    )
    prune: bool = field(
        default=True,
        metadata={
            "help": "Stop a trial whose evaluation is worse than the median of earlier trials at the same step."
        },
    )
    keep_trials: bool = field(
        default=False, metadata={"help": "Keep model and page of each trial, in the folder trials of --output_dir."}
    )

    def __post_init__(self) -> None:
        """Raises ValueError for a value that is not allowed."""
        if self.trials < 1:
            raise ValueError(f"--trials {self.trials} is below 1; choose for example 30")
        ratios = " ".join(map(str, self.search_ratio))
        if len(self.search_ratio) != 2 or not 0 <= self.search_ratio[0] < self.search_ratio[1] < 1:
            raise ValueError(
                f"--search_ratio {ratios} must be the smallest and the largest ratio, in [0, 1); write for example "
                "--search_ratio 0 0.5"
            )
        for name, allowed in (("schedules", SCHEDULES), ("patterns", PATTERNS)):
            chosen = getattr(self, f"search_{name}")
            strange = [value for value in chosen if value not in allowed]
            if strange or not chosen:
                raise ValueError(
                    f"--search_{name} {' '.join(strange) or 'without a value'} is not known; choose from "
                    f"{', '.join(allowed)}"
                )
        strange_fractions = [one for one in self.search_final_fractions if not 0 <= one <= 1]
        if strange_fractions or not self.search_final_fractions:
            raise ValueError(
                f"--search_final_fractions {' '.join(map(str, strange_fractions))} must lie in [0, 1]; write for example "
                "--search_final_fractions 0 0.5"
            )

    def space(self) -> dict[str, Any]:
        """What is searched, as JSON values."""
        return {name: value for name, value in asdict(self).items() if name.startswith("search_")}

    def suggest(self, trial: "optuna.Trial") -> dict[str, Any]:
        """The settings of a trial, as the arguments `dropkey_...` of a training job.

        Without DropKey nothing else is chosen, and with a constant schedule no final ratio.
        """
        ratio = round(trial.suggest_float("ratio", *self.search_ratio), 3)
        if ratio == 0:
            return {"dropkey_ratio": 0.0, "dropkey_final_ratio": 0.0}
        schedule = trial.suggest_categorical("schedule", self.search_schedules)
        fraction = 0.0
        if schedule != "constant":
            fraction = trial.suggest_categorical("final_fraction", self.search_final_fractions)
        return {
            "dropkey_ratio": ratio,
            "dropkey_final_ratio": round(ratio * fraction, 3),
            "dropkey_schedule": schedule,
            "dropkey_pattern": trial.suggest_categorical("pattern", self.search_patterns),
        }

    def first(self) -> Iterator[dict[str, Any]]:
        """The settings to begin with."""
        low, high = self.search_ratio
        for settings in FIRST:
            held = (
                settings.get("schedule", self.search_schedules[0]) in self.search_schedules
                and settings.get("pattern", self.search_patterns[0]) in self.search_patterns
                and settings.get("final_fraction", self.search_final_fractions[0]) in self.search_final_fractions
            )
            if low <= settings["ratio"] <= high and held:
                yield settings


class TrialFailedError(ValueError):
    """A trial has no result, for a reason that its settings may have; the search goes on with others."""


@dataclass(frozen=True)
class Search:
    """A search in a folder.

    Attributes:
        folder: Where its file is.
        arguments: What is searched.
        settings: What else determines the results, by name; another start must have the same.
        metric: The name of what is compared.
        larger_is_better: Which way.
        seed: Of the choices.
    """

    folder: Path
    arguments: SearchArguments
    settings: Mapping[str, str]
    metric: str
    larger_is_better: bool
    seed: int

    def open(self) -> "optuna.Study":
        """The study in the folder, which is made at the first start.

        Raises:
            ValueError: The folder holds a search with other settings.
            ImportError: Optuna is missing.
        """
        with needed("search"):
            import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        pruner: Any = optuna.pruners.NopPruner()
        if self.arguments.prune:
            pruner = optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED_TRIALS, n_warmup_steps=0)
        study = optuna.create_study(
            storage=f"sqlite:///{(self.folder / DATABASE).resolve()}",
            study_name=STUDY,
            direction="maximize" if self.larger_is_better else "minimize",
            pruner=pruner,
            load_if_exists=True,
        )
        here = {**self.settings, **{name: str(value) for name, value in self.arguments.space().items()}}
        here |= {"prune": str(self.arguments.prune), "metric": self.metric}
        there = study.user_attrs.get(SETTINGS)
        if there is None:
            for settings in self.arguments.first():
                study.enqueue_trial(settings, skip_if_exists=True)
            # last, so that a search which was killed before this line begins again
            study.set_user_attr(SETTINGS, here)
        elif there != here:
            changed = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
            told = ", ".join(f"{name} {there.get(name)} there and {here.get(name)} here" for name in changed)
            raise ValueError(
                f"{self.folder} holds a search with other settings: {told}. Choose another --output_dir, or pass "
                "--overwrite_output_dir, which deletes that search"
            )
        return study

    def run(self, train: "Callable[[optuna.Trial, dict[str, Any]], float]") -> "optuna.Study":
        """Runs trials until there are as many as are asked for; goes on with one that was interrupted.

        Args:
            train: From a trial and its settings to what is compared. It may raise `optuna.TrialPruned` and
                `TrialFailedError`; anything else ends the search, and the next start repeats the trial.

        Raises:
            TrialFailedError: The first trials have all failed.
        """
        with needed("search"):
            import optuna

        study, running, waiting = self.open(), optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.WAITING
        while True:
            trials = study.get_trials(deepcopy=False)
            begun = [one for one in trials if one.state == running]
            if not begun and sum(one.state != waiting for one in trials) >= self.arguments.trials:
                return study
            number = begun[0].number if begun else next((t.number for t in trials if t.state == waiting), len(trials))
            # far apart, so that no trial of another seed draws the same
            study.sampler = optuna.samplers.TPESampler(seed=(self.seed * 1_000_003 + number) % 2**32)
            # one that was interrupted has its settings in the file
            trial = optuna.Trial(study, begun[0]._trial_id) if begun else study.ask()
            self._try(study, trial, train)

    def _try(self, study: "optuna.Study", trial: "optuna.Trial", train: Callable[..., float]) -> None:
        import optuna

        settings = self.arguments.suggest(trial)
        told = " ".join(f"{name.removeprefix('dropkey_')} {value}" for name, value in settings.items())
        logger.info("trial %d: %s", trial.number, told)
        try:
            value = train(trial, settings)
        except optuna.TrialPruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            logger.info("trial %d: stopped early, worse than the median of those before", trial.number)
        except TrialFailedError as error:
            trial.set_user_attr(REASON, str(error))
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            logger.warning("trial %d has failed: %s", trial.number, error)
            states = [one.state for one in study.get_trials(deepcopy=False)]
            if states.count(optuna.trial.TrialState.FAIL) >= MOST_FAILURES and not any(
                state in (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED) for state in states
            ):
                raise
        else:
            study.tell(trial, value)
            logger.info("trial %d: %s %.4f", trial.number, self.metric, value)


class PruneCallback(TrainerCallback):
    """Reports the evaluations of a training to its trial, and stops one that is worse than the median of others."""

    def __init__(self, trial: "optuna.Trial", metric: str) -> None:
        """`metric` is the name of what is compared, without `eval_`."""
        self.trial = trial
        self.metric = metric

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises `optuna.TrialPruned` for a trial that is not worth its time; never after the last step."""
        import optuna

        step = state.global_step
        value = kwargs["metrics"].get(f"eval_{self.metric}")
        if value is None or step >= state.max_steps or not math.isfinite(value):
            return
        # a resumed training may come to the same step again
        if step not in self.trial.study.get_trials(deepcopy=False)[self.trial.number].intermediate_values:
            self.trial.report(value, step)
        if step >= UNPRUNED_FRACTION * state.max_steps and self.trial.should_prune():
            raise optuna.TrialPruned


def larger_is_better(metric: str, known: Mapping[str, bool | None]) -> bool:
    """Which way a metric is better, by the table of metrics.

    Raises:
        ValueError: The table does not say.
    """
    found = known.get(metric)
    if found is None:
        raise ValueError(
            f"--metric_for_best_model {metric} is not a metric to choose by; choose from "
            f"{', '.join(name for name, way in known.items() if way is not None)}"
        )
    return found


def trial_words(settings: Mapping[str, Any]) -> list[str]:
    """The settings of a trial as words of a command."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def fixed_words(words: Sequence[str]) -> list[str]:
    """The words of a command that set what a search chooses."""
    chosen = ("dropkey_ratio", "dropkey_final_ratio", "dropkey_schedule", "dropkey_pattern")
    return [word for word in words if word.split("=")[0].lstrip("-").replace("-", "_") in chosen]
