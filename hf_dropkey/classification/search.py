"""The command `search`: which drop ratio, schedule, final ratio and pattern suit some data, by many trainings.

Each trial is a training of `hf-dropkey train` with the settings that the search chooses, compared on rows that are not
the test images. `training/search.py` has the search itself.
"""

import gc
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch

from ..extras import needed
from ..hub.metric_names import METRICS
from ..saved import read_json
from ..training.arguments import OneLineParser, given_arguments, parse_arguments
from ..training.lock import COMPLETE, FOLDER, locked_output
from ..training.search import (
    DATABASE,
    PruneCallback,
    Search,
    SearchArguments,
    TrialFailedError,
    fixed_words,
    larger_is_better,
    trial_words,
)
from ..training.search_results import (
    BEST,
    FIGURE,
    TABLE,
    TrialRow,
    figure,
    ranked,
    recipe,
    rows_of,
    save_recipe,
    save_table,
    table,
)
from ..training.trainer import GuardedTrainer
from .arguments import DataArguments
from .data import ImageData, choose_splits, load_image_data
from .job import ClassificationJob
from .model import fit_classes
from .sources import load_splits


if TYPE_CHECKING:
    import optuna


logger = logging.getLogger(__name__)

TRIALS = "trials"
RESULTS = "eval_results.json"
# metrics of a classifier that trials can be compared by
COMPARED = ("accuracy", "top5_accuracy", "nll", "ece", "loss")
# a search trains and evaluates; what a command says otherwise has no meaning
ALWAYS = ("--do_train", "True", "--do_eval", "True")
# of each trial: what is made for readers is made for the best settings, when they are trained
EACH_TRIAL = ("--resume_from_checkpoint", "auto", "--overwrite_output_dir", "False")

ARGUMENTS = (SearchArguments, *(get_type_hints(ClassificationJob)[entry.name] for entry in fields(ClassificationJob)))


class TrialJob(ClassificationJob):
    """A trial: a training on images that all trials share, which may be stopped.

    Attributes:
        images: The checked images.
        pruning: Reports evaluations, and stops the training.
    """

    images: ImageData
    pruning: PruneCallback

    def load(self) -> ImageData:
        """The shared images; the configuration gets their classes."""
        return fit_classes(self.images, self.config, self.model)

    def make_trainer(self, model: Any, data: ImageData) -> GuardedTrainer:
        """As `ClassificationJob.make_trainer`, with the callback that stops the trial."""
        trainer = super().make_trainer(model, data)
        trainer.add_callback(self.pruning)
        return trainer


def main(command: Sequence[str]) -> None:
    """Searches as the arguments say; prints the trials from the best on."""
    if "--help" in command:
        parse_arguments(ARGUMENTS, ["--help"])
    arguments, words = split_words(command)
    ClassificationSearch(arguments, words).execute()


def split_words(command: Sequence[str]) -> tuple[SearchArguments, list[str]]:
    """The arguments of the search itself, and the words of the training, which trains and evaluates.

    Raises:
        ValueError: An argument is not allowed, or fixes what is searched.
    """
    group: Any = SearchArguments
    parser = OneLineParser([group], allow_abbrev=False)
    # a recipe comes first, and is not a value of an argument before it
    first = list(command[:1]) if command and not command[0].startswith("-") else []
    made: Any = parser.parse_args_into_dataclasses(
        list(command[len(first) :]), look_for_args_file=False, return_remaining_strings=True
    )
    arguments, words = made
    fixed = fixed_words(words)
    if fixed:
        name = fixed[0].split("=")[0].replace("-", "_").removeprefix("__dropkey_")
        plural = {"ratio": "ratio", "final_ratio": "final_fractions", "schedule": "schedules", "pattern": "patterns"}
        raise ValueError(
            f"{fixed[0]} is what the search chooses; leave it out, or bound the search with --search_{plural[name]}"
        )
    words = [*first, *words, *ALWAYS]
    return arguments, [*words, *ClassificationJob.defaults(words)]


class ClassificationSearch:
    """A search for a command."""

    def __init__(self, arguments: SearchArguments, words: Sequence[str]) -> None:
        """`words` are those of the training.

        Raises:
            ValueError: An argument is not allowed.
        """
        self.arguments, self.words = arguments, list(words)
        self.job = ClassificationJob.parse([*words, "--dropkey_ratio", str(arguments.search_ratio[1])])
        training = self.job.training
        # `Trainer` names the loss where it keeps the best weights and nothing is said
        self.metric = (training.metric_for_best_model or "accuracy").removeprefix("eval_")
        ways = {name: METRICS[name].larger_is_better for name in COMPARED}
        self.larger = larger_is_better(self.metric, ways)
        # `Trainer` takes every metric but the loss for one that should be large
        self.words += ["--greater_is_better", str(self.larger)]

    @property
    def folder(self) -> Path:
        """Where the search and its results are."""
        return self.job.output

    def check(self) -> None:
        """Makes every check that needs no images read.

        Raises:
            ValueError, OSError: As `TrainingJob.begin`; or nothing can be compared.
        """
        with needed("search"):
            import optuna  # noqa: F401
        training = self.job.training
        if training.world_size > 1:
            raise ValueError(
                f"a search runs on one process, and this is one of {training.world_size}; start hf-dropkey search without "
                "a launcher"
            )
        if training.push_to_hub:
            raise ValueError(
                f"--push_to_hub would upload every trial; leave it out, and train {self.folder / BEST} with it"
            )
        if self.arguments.prune and training.eval_strategy == "no":
            raise ValueError(
                "a trial is stopped early by its evaluations during training, and there are none; pass --eval_strategy "
                "epoch, or --prune False"
            )
        self.job.begin()
        self.held_out = check_held_out(self.job.data)
        self.settings()

    def settings(self) -> dict[str, str]:
        """What determines the results, beside what is searched."""
        chosen = ("dropkey_ratio", "dropkey_final_ratio", "dropkey_schedule", "dropkey_pattern")
        return {name: value for name, value in self.job.settings().items() if name not in chosen}

    def execute(self) -> None:
        """Runs what is left of the search, and writes what it has found."""
        self.check()
        with locked_output(self.job.training):
            self.prepare_folder()
            search = Search(
                self.folder, self.arguments, self.settings(), self.metric, self.larger, self.job.training.seed
            )
            search.open()
            self.images = load_image_data(self.job.data, training=True)
            study = search.run(self.train)
            self.finish(rows_of(study))

    def prepare_folder(self) -> None:
        """Makes sure that the folder holds this search or nothing; deletes what finished trials have left.

        Raises:
            FileExistsError: It holds something else.
        """
        trials, made = self.folder / TRIALS, [self.folder / name for name in (DATABASE, TABLE, FIGURE, BEST)]
        if self.job.run.overwrite_output_dir:
            shutil.rmtree(trials, ignore_errors=True)
            for file in made:
                file.unlink(missing_ok=True)
        elif not made[0].is_file() and any(path.name != FOLDER for path in self.folder.iterdir()):
            raise FileExistsError(
                f"{self.folder} is not empty, and holds no search ({DATABASE}); choose another --output_dir"
            )

    def train(self, trial: "optuna.Trial", settings: dict[str, Any]) -> float:
        """Trains one trial, or the rest of it; the value of what is compared, at the end.

        Raises:
            optuna.TrialPruned: It was stopped.
            TrialFailedError: Its training went wrong.
        """
        import optuna

        output = self.folder / TRIALS / f"{trial.number:04d}"
        if output.is_dir() and not any(output.glob("checkpoint-*")) and not (output / FOLDER / COMPLETE).is_file():
            # killed before its first checkpoint
            shutil.rmtree(output)
        page = ["--report", str(self.arguments.keep_trials), "--uncertainty", "False"]
        words = [*self.words, *trial_words(settings), *EACH_TRIAL, *page, "--output_dir", str(output)]
        job = TrialJob.parse(words)
        job.images, job.pruning = self.images, PruneCallback(trial, self.metric)
        try:
            with _quiet():
                job.execute(["hf-dropkey", "train", *words])
            value = read_json(output / RESULTS).get(f"eval_{self.metric}")
        except (ValueError, FloatingPointError) as error:
            self.forget(output)
            raise TrialFailedError(str(error).splitlines()[0]) from error
        except optuna.TrialPruned:
            self.forget(output)
            raise
        if not isinstance(value, int | float):
            raise ValueError(
                f"the evaluation has no {self.metric}; name one of its metrics with --metric_for_best_model: "
                f"{', '.join(name.removeprefix('eval_') for name in read_json(output / RESULTS))}"
            )
        self.forget(output)
        return float(value)

    def forget(self, output: Path) -> None:
        """Deletes the folder of a trial, whose result is in the study, and its model."""
        # model, optimizer and callbacks refer to each other
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.memory.empty_cache()
        if not self.arguments.keep_trials:
            shutil.rmtree(output, ignore_errors=True)

    def finish(self, rows: Sequence[TrialRow]) -> None:
        """Writes the table, the figure and the recipe of the best trial, and prints them.

        Raises:
            ValueError: No trial was trained to the end.
        """
        found = ranked(rows, larger_is_better=self.larger)
        save_table(rows, self.folder / TABLE)
        print(table(found, self.metric))
        best = found[0]
        if best.state != "complete" or best.value is None:
            raise ValueError("no trial was trained to the end; run more of them with a larger --trials")
        label = METRICS[self.metric].label if self.metric in METRICS else self.metric
        drawn = figure(rows, metric=f"{label} on {self.held_out}", larger_is_better=self.larger)
        drawn.savefig(self.folder / FIGURE, dpi=150)
        groups = ARGUMENTS[1:]
        base = given_arguments(groups, self.words)
        changes = {"output_dir": str(self.folder / "best")}
        for name in ("hold_out_validation", "overwrite_output_dir"):
            # the recipe trains on all rows, and what was held out for the choice is evaluated on no more
            base.pop(name, None)
        save_recipe(recipe(base, best, about=self.about(rows, best), changes=changes), self.folder / BEST)
        print(f"written: {TABLE}, {FIGURE}, {BEST} in {self.folder}; next: hf-dropkey train {self.folder / BEST}")

    def about(self, rows: Sequence[TrialRow], best: TrialRow) -> str:
        """What the recipe says of itself."""
        plain = next((row for row in rows if row.ratio == 0 and row.state == "complete"), None)
        without = f", {plain.value:.4f} without DropKey" if plain is not None and plain is not best else ""
        stopped = sum(row.state == "pruned" for row in rows)
        return (
            f"the best of {len(rows)} trials of hf-dropkey search ({stopped} stopped early), one seed each: {self.metric} "
            f"{best.value:.4f} on {self.held_out} ({len(self.images.evaluation)} images){without}. The best of many is a "
            "little too good on the images that chose it"
        )


def check_held_out(arguments: DataArguments) -> str:
    """What trials are compared on, in words.

    Raises:
        ValueError: These are test images.
    """
    *_, split = choose_splits(load_splits(arguments), arguments, training=True)
    named = arguments.evaluation_name
    if not arguments.hold_out_validation and any("test" in name.lower() for name in (split, named or "")):
        raise ValueError(
            f"the trials would be compared on the test images ({named or f'split {split!r}'}), so that nothing is left to "
            "measure the chosen settings on; pass --hold_out_validation, which keeps rows of the training data for the "
            "choice, or name a validation split with --eval_split_name or --validation_dir"
        )
    return split if named is None else named


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what a training job says about each start; warnings stay."""
    own = logging.getLogger("hf_dropkey")
    before = own.level
    own.setLevel(logging.WARNING)
    try:
        yield
    finally:
        own.setLevel(before)
