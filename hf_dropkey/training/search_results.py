"""What a search has found: its table, a figure, and the best settings as a recipe."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import needed
from ..plots import LINE_COLORS, MARKERS
from .search import REASON, SearchArguments


with needed("plots"):
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


if TYPE_CHECKING:
    import optuna


TABLE, FIGURE, BEST = "trials.csv", "search.png", "best.json"


@dataclass(frozen=True)
class TrialRow:
    """One trial.

    Attributes:
        trial: Its number, from 0.
        state: "complete", "pruned", "failed" or "running".
        value: What is compared: at the end, or of the last evaluation of a pruned trial; None if there is none.
        ratio: The largest drop ratio.
        final_ratio: The other end.
        schedule: Over depth; "" without DropKey.
        pattern: Of the masks; "" without DropKey.
        step: The step of the last evaluation during training; None if there was none.
        seconds: From the first start to the end, with interruptions.
        note: Why it has failed.
    """

    trial: int
    state: str
    value: float | None
    ratio: float
    final_ratio: float
    schedule: str
    pattern: str
    step: int | None
    seconds: float | None
    note: str


STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}


def rows_of(study: "optuna.Study") -> list[TrialRow]:
    """The trials of a study in their order, without those that have not begun."""
    return [_row(trial) for trial in study.trials if trial.state.name in STATES and "ratio" in trial.params]


def _row(trial: "optuna.trial.FrozenTrial") -> TrialRow:
    ratio = round(trial.params["ratio"], 3)
    fraction = trial.params.get("final_fraction", 1.0 if trial.params.get("schedule") == "constant" else 0.0)
    step = trial.last_step
    value = trial.intermediate_values[step] if trial.value is None and step is not None else trial.value
    return TrialRow(
        trial.number,
        STATES[trial.state.name],
        value,
        ratio,
        round(ratio * fraction, 3),
        trial.params.get("schedule", ""),
        trial.params.get("pattern", ""),
        step,
        None if trial.duration is None else round(trial.duration.total_seconds(), 1),
        str(trial.user_attrs.get(REASON, "")),
    )


def ranked(rows: Sequence[TrialRow], *, larger_is_better: bool) -> list[TrialRow]:
    """The complete trials from the best on, of equal ones the first; then the others."""

    def place(row: TrialRow) -> tuple[bool, float]:
        value = row.value if row.value is not None else 0.0
        return row.state != "complete", -value if larger_is_better else value

    return sorted(rows, key=place)


def table(rows: Sequence[TrialRow], metric: str) -> str:
    """The trials as text, in the order of `rows`."""
    head = ("trial", "state", metric, "ratio", "final", "schedule", "pattern", "seconds")
    lines = [
        (
            str(row.trial),
            row.state,
            "" if row.value is None else f"{row.value:.4f}",
            f"{row.ratio:g}",
            f"{row.final_ratio:g}" if row.ratio else "",
            row.schedule,
            row.pattern,
            "" if row.seconds is None else f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    widths = [max(len(cell) for cell in column) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *lines)
    )


def save_table(rows: Sequence[TrialRow], file: Path) -> None:
    """Writes the trials as CSV, in their order."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, [entry.name for entry in fields(TrialRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def figure(rows: Sequence[TrialRow], *, metric: str, larger_is_better: bool) -> Figure:
    """The value of each trial against its drop ratio; a colour for each pattern, a marker for each schedule.

    Trials that were stopped early are hollow, at their last value. A dotted line is the trial without DropKey, a ring
    the best trial.

    Raises:
        ValueError: No trial has a value.
    """
    values = {row.trial: row.value for row in rows if row.value is not None}
    drawn = [row for row in rows if row.trial in values]
    if not drawn:
        raise ValueError("no trial has a value to draw; run more of them with --trials")
    patterns = list(dict.fromkeys(row.pattern for row in drawn if row.pattern))
    schedules = list(dict.fromkeys(row.schedule for row in drawn if row.schedule))
    made = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = made.subplots()
    for row in drawn:
        color = LINE_COLORS[patterns.index(row.pattern) % len(LINE_COLORS)] if row.pattern else "#000000"
        marker = MARKERS[schedules.index(row.schedule) % len(MARKERS)] if row.schedule else "x"
        whole = row.state == "complete"
        style: dict[str, Any] = {"markerfacecolor": color if whole else "none", "markeredgecolor": color}
        axis.plot(row.ratio, values[row.trial], ls="", marker=marker, ms=7, alpha=0.85 if whole else 0.5, **style)
    plain = next((row for row in drawn if row.ratio == 0 and row.state == "complete"), None)
    if plain is not None:
        axis.axhline(values[plain.trial], color="#4D4D4D", ls=":", lw=1)
    best = ranked(drawn, larger_is_better=larger_is_better)[0]
    if best.state == "complete":
        axis.plot(
            best.ratio, values[best.trial], ls="", marker="o", ms=15, markerfacecolor="none", markeredgecolor="#000000"
        )
    axis.set(xlabel="drop ratio (the largest of any layer)", ylabel=metric)
    axis.grid(visible=True, alpha=0.3)
    keys = [
        Line2D([], [], ls="", marker="o", color=LINE_COLORS[place % len(LINE_COLORS)], label=f'pattern "{name}"')
        for place, name in enumerate(patterns)
    ]
    keys += [
        Line2D([], [], ls="", marker=MARKERS[place % len(MARKERS)], color="#4D4D4D", label=name)
        for place, name in enumerate(schedules)
    ]
    keys += [Line2D([], [], ls="", marker="x", color="#000000", label="without DropKey")] if plain else []
    keys += [Line2D([], [], ls="", marker="o", color="#4D4D4D", markerfacecolor="none", label="stopped early")]
    made.legend(handles=keys, loc="outside right upper", fontsize=8)
    return made


def recipe(base: Mapping[str, Any], best: TrialRow, *, about: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the best trial as a recipe.

    Args:
        base: The arguments of the search's command that belong to training, by name.
        best: The trial.
        about: What to expect.
        changes: Arguments that the recipe has in place of those in `base`.
    """
    chosen: dict[str, Any] = {"dropkey_ratio": best.ratio, "dropkey_final_ratio": best.final_ratio}
    if best.schedule:
        # with a constant schedule there is no other end
        chosen |= {"dropkey_schedule": best.schedule, "dropkey_pattern": best.pattern}
        if best.schedule == "constant":
            chosen["dropkey_final_ratio"] = 0.0
    own = {entry.name for entry in fields(SearchArguments)}
    kept = {name: value for name, value in base.items() if name not in own}
    return {"task": "classification", "about": about, **kept, **chosen, **changes}


def save_recipe(content: Mapping[str, Any], file: Path) -> None:
    """Writes a recipe, so that a reader finds it whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")
    part.replace(file)
