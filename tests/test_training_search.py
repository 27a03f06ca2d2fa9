"""A search tries what its seed says, stops what is not worth its time, and goes on after an interruption."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_dropkey.training.search import (
    MOST_FAILURES,
    PruneCallback,
    Search,
    SearchArguments,
    TrialFailedError,
    larger_is_better,
)
from hf_dropkey.training.search_results import figure, ranked, recipe, rows_of, save_table, table


optuna = pytest.importorskip("optuna", reason="needs the extra [search]")


def score(settings: dict[str, Any]) -> float:
    """Best at a ratio of 0.2, with keys dropped for all queries."""
    bonus = 0.05 if settings.get("dropkey_pattern") == "key" else 0.0
    return 0.9 - (settings["dropkey_ratio"] - 0.2) ** 2 + bonus


def search(folder: Path, trials: int = 12, **changes: Any) -> Search:
    folder.mkdir(exist_ok=True)
    arguments = SearchArguments(trials=trials, **changes)
    return Search(folder, arguments, {"learning_rate": "0.1"}, "accuracy", larger_is_better=True, seed=3)


def settings_of(study: Any) -> list[tuple[Any, ...]]:
    return [(row.ratio, row.final_ratio, row.schedule, row.pattern, row.value) for row in rows_of(study)]


def test_a_search_begins_without_dropkey_and_with_the_defaults_and_finds_better(tmp_path: Path) -> None:
    study = search(tmp_path, 40).run(lambda trial, settings: score(settings))
    rows = rows_of(study)
    assert settings_of(study)[:2] == [
        (0.0, 0.0, "", "", score({"dropkey_ratio": 0.0})),
        (0.1, 0, "decreasing", "score", 0.89),
    ]
    best = ranked(rows, larger_is_better=True)[0]
    assert best.pattern == "key" and abs(best.ratio - 0.2) < 0.1
    assert len(rows) == 40 and all(0 <= row.final_ratio <= row.ratio <= 0.5 for row in rows)
    assert {row.schedule for row in rows} == {"", "decreasing", "constant", "increasing"}
    assert all(row.final_ratio == row.ratio for row in rows if row.schedule == "constant")


def test_an_interrupted_search_tries_what_an_uninterrupted_one_tries(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole").run(lambda trial, settings: score(settings))
    calls: list[int] = []

    def interrupted(trial: Any, settings: dict[str, Any]) -> float:
        calls.append(trial.number)
        if len(calls) in (1, 5, 11):
            raise KeyboardInterrupt
        return score(settings)

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / "parts").run(interrupted)
    parts = search(tmp_path / "parts").run(interrupted)
    assert settings_of(parts) == settings_of(whole)
    # each interrupted trial was begun again, and no other
    assert sorted(calls) == sorted([*range(12), 0, 3, 8])
    assert len(parts.trials) == 12
    # nothing is left to do; with more trials it goes on
    search(tmp_path / "parts").run(lambda trial, settings: pytest.fail("it was complete"))
    assert len(search(tmp_path / "parts", 14).run(interrupted).trials) == 14


def test_another_seed_tries_other_settings(tmp_path: Path) -> None:
    one, two = (search(tmp_path / name, 6) for name in ("one", "two"))
    object.__setattr__(two, "seed", 4)
    first, second = (settings_of(one_search.run(lambda trial, settings: score(settings))) for one_search in (one, two))
    assert first[:2] == second[:2] and not set(first[2:]) & set(second[2:])


def test_a_search_with_other_settings_is_refused(tmp_path: Path) -> None:
    search(tmp_path, 2).run(lambda trial, settings: score(settings))
    with pytest.raises(ValueError, match=r"search_patterns .*there and \['key'\] here.*--overwrite_output_dir"):
        search(tmp_path, 3, search_patterns=["key"]).run(lambda trial, settings: 0.0)


def test_what_fails_is_kept_with_its_reason_and_the_search_goes_on(tmp_path: Path) -> None:
    def train(trial: Any, settings: dict[str, Any]) -> float:
        if trial.number == 1:
            raise TrialFailedError("the loss is nan")
        if trial.number == 2:
            raise optuna.TrialPruned
        return score(settings)

    rows = rows_of(search(tmp_path, 5).run(train))
    assert [row.state for row in rows] == ["complete", "failed", "pruned", "complete", "complete"]
    assert rows[1].note == "the loss is nan" and rows[1].value is None
    assert ranked(rows, larger_is_better=False)[0].value == min(row.value for row in rows if row.value is not None)


def test_a_search_in_which_everything_fails_ends_with_the_reason(tmp_path: Path) -> None:
    calls = []

    def train(trial: Any, settings: dict[str, Any]) -> float:
        calls.append(trial.number)
        raise TrialFailedError("no grid of patches")

    with pytest.raises(TrialFailedError, match="no grid of patches"):
        search(tmp_path, 9).run(train)
    assert len(calls) == MOST_FAILURES


def evaluate(callback: PruneCallback, step: int, value: float) -> None:
    arguments, state = TrainingArguments(report_to="none", use_cpu=True), TrainerState(global_step=step, max_steps=100)
    callback.on_evaluate(arguments, state, TrainerControl(), metrics={"eval_accuracy": value})


def test_a_trial_below_the_median_is_stopped(tmp_path: Path) -> None:
    reached: dict[int, int] = {}

    def train(trial: Any, settings: dict[str, Any]) -> float:
        callback = PruneCallback(trial, "accuracy")
        good = trial.number < 5
        for step in (10, 30, 60, 100):
            reached[trial.number] = step
            evaluate(callback, step, step / 200 if good else step / 400)
            # a resumed training evaluates a step once more; the first value counts
            evaluate(callback, step, math.nan)
        return 0.5 if good else 0.25

    rows = rows_of(search(tmp_path / "pruned", 7).run(train))
    # not in the first quarter of the steps, nor by trials that are too few
    assert reached == {**dict.fromkeys(range(5), 100), 5: 30, 6: 30}
    assert [row.state for row in rows] == ["complete"] * 5 + ["pruned"] * 2
    assert rows[5].value == 30 / 400 and rows[5].step == 30 and rows[4].step == 60
    search(tmp_path / "all", 7, prune=False).run(train)
    assert reached == dict.fromkeys(range(7), 100)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trials": 0}, "--trials 0 is below 1"),
        ({"search_ratio": [0.5, 0.1]}, "--search_ratio 0.5 0.1 must be the smallest and the largest"),
        ({"search_ratio": [0.1]}, "--search_ratio 0.1 must be"),
        ({"search_ratio": [0.1, 1.0]}, "in [0, 1)"),
        ({"search_patterns": ["blok"]}, "--search_patterns blok is not known; choose from score"),
        ({"search_schedules": []}, "--search_schedules without a value"),
        ({"search_final_fractions": [0.5, 2.0]}, "--search_final_fractions 2.0 must lie in [0, 1]"),
    ],
)
def test_arguments_that_are_not_allowed(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # the text below
        SearchArguments(**changes)
    assert told in str(raised.value)


def test_which_way_a_metric_is_better() -> None:
    known = {"accuracy": True, "nll": False, "gap": None}
    assert larger_is_better("accuracy", known) and not larger_is_better("nll", known)
    with pytest.raises(
        ValueError, match="--metric_for_best_model gap is not a metric to choose by; .* accuracy, nll$"
    ):
        larger_is_better("gap", known)


def test_the_results_are_a_table_a_figure_and_a_recipe(tmp_path: Path) -> None:
    def train(trial: Any, settings: dict[str, Any]) -> float:
        if trial.number == 4:
            trial.report(0.3, 10)
            raise optuna.TrialPruned
        return score(settings)

    rows = rows_of(search(tmp_path, 6).run(train))
    save_table(rows, tmp_path / "trials.csv")
    with (tmp_path / "trials.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["state"] for row in found] == ["complete"] * 4 + ["pruned", "complete"]
    assert [float(row["value"]) for row in found] == pytest.approx([row.value for row in rows])
    order = ranked(rows, larger_is_better=True)
    lines = table(order, "accuracy").splitlines()
    assert lines[0].split()[:4] == ["trial", "state", "accuracy", "ratio"]
    assert lines[1].split()[0] == str(order[0].trial) and lines[-1].split()[1] == "pruned"
    drawn = figure(rows, metric="accuracy", larger_is_better=True)
    points = [line for line in drawn.axes[0].lines if line.get_linestyle() == "None"]
    places = {(float(np.ravel(line.get_xdata())[0]), float(np.ravel(line.get_ydata())[0])) for line in points}
    assert places == {(row.ratio, row.value) for row in rows}
    made = recipe({"seed": 3, "trials": 6}, order[0], about="so", changes={"output_dir": "out"})
    assert made == {
        "task": "classification",
        "about": "so",
        "seed": 3,
        "dropkey_ratio": order[0].ratio,
        "dropkey_final_ratio": 0.0 if order[0].schedule == "constant" else order[0].final_ratio,
        "dropkey_schedule": order[0].schedule,
        "dropkey_pattern": order[0].pattern,
        "output_dir": "out",
    }


def test_a_figure_needs_a_value() -> None:
    nothing: Any = [SimpleNamespace(trial=0, value=None)]
    with pytest.raises(ValueError, match="no trial has a value to draw"):
        figure(nothing, metric="accuracy", larger_is_better=True)
