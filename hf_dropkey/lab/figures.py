"""Figures of results: curves with bands over seeds, and differences with intervals.

The arguments are intervals, computed by `intervals.interval`. Colours are those of `plots`.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..extras import needed
from ..intervals import Interval, interval
from ..plots import LINE_COLORS, LINE_STYLES, MARKERS


with needed("plots"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Curve = Mapping[float, Interval]
ONE_SEED = "one seed, no interval"
# characters that fit over a panel
PANEL_TITLE = 30
# more would be too small to read on a page
PANELS_IN_A_ROW = 4


def curves(
    panels: Mapping[str, Mapping[str, Curve]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    levels: Mapping[str, Mapping[str, Interval]] | None = None,
) -> Figure:
    """Lines with a band for the 95 % interval over seeds, a panel for each task; a name has one style in all panels.

    A curve of a single seed has no band, and its legend says so; with mixed numbers of seeds the band has no height
    there.

    Args:
        panels: For each panel, for each name, the intervals by place on the x axis.
        xlabel, ylabel: Quantities with units.
        title: Metric and data.
        levels: For each panel, by name, an interval that does not depend on x: a horizontal line with its band.

    Raises:
        ValueError: No panels, or a panel without curves and levels.
    """
    levels = levels or {}
    empty = [name for name in panels if not panels[name] and not levels.get(name)]
    if not panels or empty:
        raise ValueError(f"nothing to draw{f' in {empty}' if empty else ''}; run the experiments first")
    named = list(dict.fromkeys(name for panel in (*levels.values(), *panels.values()) for name in panel))
    figure, axes = _panels(len(panels), 3.7, 3.2, 0.8)
    for axis, (place, drawn) in zip(axes, panels.items(), strict=True):
        everywhere = {x for curve in drawn.values() for x in curve}
        for name, level in levels.get(place, {}).items():
            look = _look(named.index(name))
            axis.axhline(level.mean, label=_label(name, [level]), **{**look, "marker": ""})
            axis.axhspan(level.low, level.high, color=look["color"], alpha=0.13, lw=0)
        for name, curve in drawn.items():
            look = _look(named.index(name))
            places = sorted(curve)
            found = [curve[x] for x in places]
            axis.plot(places, [one.mean for one in found], label=_label(name, found), ms=5, **look)
            spread = [one.high - one.mean if one.n > 1 else 0.0 for one in found]
            if len(everywhere) == 1 and any(spread):
                # a band has no width there
                axis.errorbar(places, [found[0].mean], yerr=spread, color=look["color"], capsize=3)
                axis.set_xticks(places)
            # with one seed the band has no height
            elif any(spread):
                axis.fill_between(
                    places,
                    [one.low for one in found],
                    [one.high for one in found],
                    color=look["color"],
                    alpha=0.2,
                    lw=0,
                )
        axis.set(title=textwrap.fill(place, PANEL_TITLE), xlabel=xlabel, ylabel=ylabel)
        axis.grid(visible=True, alpha=0.3)
    _finish(figure, title)
    return figure


def differences(panels: Mapping[str, Mapping[str, Interval]], *, xlabel: str, title: str) -> Figure:
    """Differences to a baseline as points with their 95 % intervals, one line each, and a line at no difference.

    A filled point differs from 0 by more than its interval; the others are hollow. One seed has no interval, which its
    name says.

    Args:
        panels: For each panel, the differences by name; the names of the first panel, in its order, come first.
        xlabel: The difference, with its unit.
        title: Metric and data.

    Raises:
        ValueError: No differences.
    """
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    if not names:
        raise ValueError("no differences to draw; run the experiments first")
    figure, axes = _panels(len(panels), 3.4, 0.34 * len(names) + 0.8, 2.2, sharey=True)
    single = {name for panel in panels.values() for name, found in panel.items() if found.n == 1}
    for number, (axis, (place, found)) in enumerate(zip(axes, panels.items(), strict=True)):
        color = LINE_COLORS[number % len(LINE_COLORS)]
        axis.axvline(0, color="black", lw=1)
        for row, name in enumerate(names):
            if name not in found:
                continue
            one = found[name]
            sure = one.n > 1 and (one.low > 0 or one.high < 0)
            error = None if one.n == 1 else [[one.mean - one.low], [one.high - one.mean]]
            axis.errorbar(
                one.mean, row, xerr=error, fmt="o", color=color, mfc=color if sure else "white", capsize=3, label=name
            )
        axis.set(title=textwrap.fill(place, PANEL_TITLE), xlabel=xlabel)
        axis.grid(visible=True, axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), [f"{name} (no bar: one seed)" if name in single else name for name in names])
    axes[0].invert_yaxis()
    _write_title(figure, title)
    return figure


def training_curves(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], *, metric: str = "loss", title: str
) -> Figure:
    """A logged value over the steps of training, for several runs of each kind: mean and band over the runs.

    Args:
        runs: For each name, the `log_history` of each run's `trainer_state.json`.
        metric: The logged quantity, such as "loss" or "eval_accuracy".
        title: Metric and data.

    Raises:
        ValueError: A run has not logged the metric, or runs of one name logged it at different steps.
    """
    panel: dict[str, Curve] = {}
    for name, histories in runs.items():
        logged = [{int(entry["step"]): entry[metric] for entry in run if metric in entry} for run in histories]
        if not logged or not all(logged):
            raise ValueError(f"a run of {name!r} logged no {metric!r}; log it in training, or draw another metric")
        if any(run.keys() != logged[0].keys() for run in logged):
            raise ValueError(f"the runs of {name!r} logged {metric!r} at different steps; draw runs of one recipe")
        panel[name] = {step: interval([run[step] for run in logged]) for step in logged[0]}
    words = {"loss": "training loss (nats)"}
    return curves({"": panel}, xlabel="optimiser step", ylabel=words.get(metric, metric), title=title)


def _panels(
    count: int, width: float, height: float, left: float, *, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of panels in rows, and their axes; sizes in inches, of a panel and of what stands left of each row."""
    columns = min(count, PANELS_IN_A_ROW)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns + left, height * rows + 0.8), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _look(number: int) -> dict[str, Any]:
    """Colour, line and marker of a name; they differ in grey too."""
    return {
        "color": LINE_COLORS[number % len(LINE_COLORS)],
        "ls": LINE_STYLES[number % len(LINE_STYLES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def _label(name: str, found: Sequence[Interval]) -> str:
    seeds = np.unique([one.n for one in found])
    if len(seeds) == 1 and seeds[0] == 1:
        return f"{name} ({ONE_SEED})"
    span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"{name} ({span} seeds)"


def _finish(figure: Figure, title: str) -> None:
    """One legend for all panels, below them, and the title."""
    shown: dict[str, object] = {}
    for axis in figure.axes:
        assert isinstance(axis, Axes)
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    handles: Any = list(shown.values())
    columns = max(1, int(figure.get_figwidth() // 2.4))
    figure.legend(handles, list(shown), loc="outside lower center", ncols=min(columns, len(shown)), fontsize=8)
    _write_title(figure, title)


def _write_title(figure: Figure, title: str) -> None:
    """The title, in lines that fit the figure's width."""
    figure.suptitle(textwrap.fill(title, int(13 * figure.get_figwidth())), fontsize=10)
