"""Figures of results show the means and intervals of their arguments, and say where there is no interval."""

import io
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_dropkey.intervals import Interval, interval
from hf_dropkey.lab.figures import curves, differences, training_curves


def drawn(figure: Figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("L"))


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def example(**changes: Any) -> Figure:
    arguments: dict[str, Any] = {
        "panels": {
            "digits": {
                "DropKey": {0.1: interval([0.8, 0.9]), 0.5: interval([0.6, 0.8])},
                "attention dropout": {0.1: interval([0.7])},
            },
            "flowers": {"DropKey": {0.3: interval([0.5, 0.5, 0.8])}},
        },
        "levels": {"digits": {"none": Interval(0.75, 0.7, 0.8, 5)}},
        **changes,
    }
    return curves(**arguments, xlabel="drop ratio", ylabel="accuracy", title="Held-out accuracy")


def test_curves_show_means_bands_and_levels() -> None:
    figure = example()
    digits, _flowers = figure.axes
    lines = {str(line.get_label()): line for line in digits.lines}
    assert list(lines) == ["none (5 seeds)", "DropKey (2 seeds)", "attention dropout (one seed, no interval)"]
    assert list(lines["DropKey (2 seeds)"].get_xdata()) == [0.1, 0.5]
    assert list(lines["DropKey (2 seeds)"].get_ydata()) == pytest.approx([0.85, 0.7])
    # a band for DropKey alone: the other curve has one seed
    (band,) = digits.collections
    ends = interval([0.8, 0.9])
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(max(ends.high, interval([0.6, 0.8]).high))
    (level,) = digits.patches
    assert level.get_y() == pytest.approx(0.7) and level.get_height() == pytest.approx(0.1)
    assert (digits.get_title(), digits.get_xlabel(), digits.get_ylabel()) == ("digits", "drop ratio", "accuracy")
    assert "DropKey (3 seeds)" in legend(figure) and figure.get_suptitle() == "Held-out accuracy"
    same = [next(line for line in axis.lines if str(line.get_label()).startswith("DropKey")) for axis in figure.axes]
    assert same[0].get_color() == same[1].get_color() and same[0].get_marker() == same[1].get_marker()
    assert drawn(figure).std() > 0


def test_a_panel_of_one_place_has_a_bar_instead_of_a_band() -> None:
    flowers = example().axes[1]
    (bar,) = flowers.containers
    found = interval([0.5, 0.5, 0.8])
    assert bar.lines[2][0].get_segments()[0][:, 1] == pytest.approx([found.low, found.high])
    assert list(flowers.get_xticks()) == [0.3]


def test_many_panels_go_into_rows() -> None:
    panels = {f"task {number}": {"DropKey": {0.1: interval([0.5, 0.6])}} for number in range(6)}
    for figure in (
        example(panels=panels, levels={}),
        differences({name: {"DropKey": Interval(0.0, -0.1, 0.1, 5)} for name in panels}, xlabel="points", title="x"),
    ):
        assert [axis.get_title() for axis in figure.axes] == list(panels)
        assert [axis.get_subplotspec().rowspan.start for axis in figure.axes] == [0, 0, 0, 0, 1, 1]


def test_names_differ_in_more_than_colour() -> None:
    panel = {f"kind {number}": {0.1: interval([0.5]), 0.2: interval([0.5])} for number in range(6)}
    figure = example(panels={"digits": panel}, levels={})
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines]
    assert len(set(looks)) == len({look[2] for look in looks}) == 6


@pytest.mark.parametrize("panels", [{}, {"digits": {}}])
def test_nothing_to_draw_is_an_error(panels: dict) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        example(panels=panels, levels={})
    with pytest.raises(ValueError, match="no differences to draw"):
        differences(panels, xlabel="points", title="x")


def test_differences_are_points_with_their_intervals() -> None:
    found = {
        "DropKey 0.1": Interval(0.02, 0.01, 0.03, 5),
        "DropKey 0.5": Interval(-0.01, -0.03, 0.01, 5),
        "lucky": interval([0.5]),
    }
    figure = differences(
        {"digits": found, "flowers": {"DropKey 0.5": found["DropKey 0.5"]}}, xlabel="minus none", title="Gains"
    )
    digits, flowers = figure.axes
    assert [text.get_text() for text in digits.get_yticklabels()] == [
        "DropKey 0.1",
        "DropKey 0.5",
        "lucky (no bar: one seed)",
    ]
    points = {bar.get_label(): bar for bar in digits.containers}
    assert points["DropKey 0.1"].lines[0].get_xdata() == pytest.approx([0.02])
    segment = points["DropKey 0.1"].lines[2][0].get_segments()[0]
    assert segment[:, 0] == pytest.approx([0.01, 0.03])
    assert not points["lucky"].lines[2]
    # sure ones are filled, the others hollow
    assert [points[name].lines[0].get_markerfacecolor() == "white" for name in found] == [False, True, True]
    assert len(flowers.containers) == 1 and flowers.get_xlabel() == "minus none"
    assert digits.get_ylim()[0] > digits.get_ylim()[1]
    assert drawn(figure).std() > 0


def history(scale: float) -> list[dict[str, float]]:
    return [{"step": 10, "loss": 2.0 * scale}, {"step": 20, "loss": scale}, {"step": 20, "eval_accuracy": 0.5}]


def test_training_curves_are_means_over_runs() -> None:
    figure = training_curves({"DropKey": [history(1.0), history(2.0)], "none": [history(1.0)]}, title="Losses")
    lines = {str(line.get_label()): line for line in figure.axes[0].lines}
    assert list(lines["DropKey (2 seeds)"].get_xdata()) == [10, 20]
    assert list(lines["DropKey (2 seeds)"].get_ydata()) == pytest.approx([3.0, 1.5])
    assert "none (one seed, no interval)" in lines and len(figure.axes[0].collections) == 1
    assert figure.axes[0].get_ylabel() == "training loss (nats)"
    other = training_curves({"none": [history(1.0)]}, metric="eval_accuracy", title="x")
    assert other.axes[0].get_ylabel() == "eval_accuracy"


def test_runs_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(ValueError, match="a run of 'none' logged no 'eval_nll'"):
        training_curves({"none": [history(1.0)]}, metric="eval_nll", title="x")
    with pytest.raises(ValueError, match="at different steps"):
        training_curves({"none": [history(1.0), history(1.0)[1:]]}, title="x")
