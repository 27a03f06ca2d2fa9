"""The figures say what they should, in words and not by colour alone."""

import io
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from hf_dropkey.plots import RIGHT_COLOR, WRONG_COLOR, attention_costs, method_overview, predictions_with_attention


def figure_of(count: int = 3, **changes: Any) -> Figure:
    draws = np.random.default_rng(0)
    arguments = {
        "images": [Image.fromarray(draws.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(count)],
        "attention": draws.random((count, 4, 4)),
        "probabilities": np.tile([0.7, 0.2, 0.1], (count, 1)),
        "labels": [0, 1, 0][:count],
        "label_names": ["cat", "dog", "emu"],
        **changes,
    }
    return predictions_with_attention(**arguments, title="What it sees")


def words(figure: Figure) -> list[str]:
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


def test_a_wrong_prediction_is_marked_in_words():
    figure = figure_of()
    assert words(figure) == ["cat (70%)\nright", "cat (70%)\nwrong, is dog", "cat (70%)\nright"]
    assert figure.get_suptitle() == "What it sees"
    assert any("class token" in axis.get_ylabel() for axis in figure.axes)


def test_attention_maps_share_a_scale_on_which_one_is_even():
    attention = np.ones((2, 4, 4))
    attention[1] *= 3
    attention[1, 0, 0] = 45
    figure = figure_of(2, attention=attention)
    maps = [axis.images[0] for axis in figure.axes if axis.images and axis.images[0].get_cmap().name == "cividis"]
    assert np.allclose(maps[0].get_array(), 1)
    assert maps[1].get_array().max() == pytest.approx(16 * 45 / (45 + 15 * 3))
    assert maps[0].get_clim() == maps[1].get_clim()
    assert maps[0].get_clim() == pytest.approx((0, 8))


def test_every_image_is_drawn_over_several_rows_and_saved():
    figure = figure_of(3, columns=2)
    assert len(words(figure)) == 3
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("L")).std() > 0


def test_the_two_colors_differ_in_grey_and_read_on_white():
    red, green, blue = 0.2126, 0.7152, 0.0722
    grey = [np.dot([red, green, blue], to_rgb(color)) for color in (RIGHT_COLOR, WRONG_COLOR)]
    assert max(grey) < 0.55
    assert to_rgb(RIGHT_COLOR)[2] > 0.5 > to_rgb(WRONG_COLOR)[2]


@pytest.mark.parametrize("changes", [{"labels": [0]}, {"attention": np.ones((2, 4, 4))}, {"images": []}])
def test_lists_of_different_lengths_are_an_error(changes):
    with pytest.raises(ValueError, match="pass one of each per image"):
        figure_of(3, **changes)


def test_the_overview_shows_each_pattern_and_schedule() -> None:
    patterns = {"score": np.eye(6, dtype=bool), "key": np.zeros((6, 6), dtype=bool)}
    schedules = {"decreasing": [0.3, 0.0], "constant": [0.3, 0.3], "increasing": [0.0, 0.3]}
    figure = method_overview(patterns, schedules)
    assert [axis.get_title() for axis in figure.axes[:2]] == ['"score": 17% dropped', '"key": 0% dropped']
    assert np.array_equal(figure.axes[0].images[0].get_array(), patterns["score"])
    lines = {str(line.get_label()): list(line.get_ydata()) for line in figure.axes[2].lines}
    assert lines == schedules
    assert figure.axes[2].get_xlabel() == "layer"


def cost_rows(**changes: str) -> list[dict[str, str]]:
    return [
        {
            "device": "cpu",
            "dtype": "float32",
            "backend": backend,
            "regulariser": "dropkey",
            "tokens": str(tokens),
            "batch": "2",
            "heads": "3",
            "metric": metric,
            "value": str(tokens * scale),
            "first_quartile": str(tokens * scale / 2),
            "third_quartile": str(tokens * scale * 2),
            **changes,
        }
        for backend, scale in (("eager", 3), ("sdpa", 2))
        for tokens in (100, 10)
        for metric in ("time", "peak memory", "time over sdpa/none")
    ]


def test_attention_costs_show_the_measured_points() -> None:
    figure = attention_costs(cost_rows(), title="How long")
    time, memory = figure.axes
    assert "ms, for one head" in time.get_ylabel() and "MiB, for one head" in memory.get_ylabel()
    for axis in (time, memory):
        assert axis.get_xscale() == axis.get_yscale() == "log"
        lines = {line.get_label(): line for line in axis.lines}
        assert list(lines) == ["eager, dropkey", "sdpa, dropkey"]
        assert list(lines["eager, dropkey"].get_xdata()) == [10, 100]
        # two images with three heads
        assert list(lines["eager, dropkey"].get_ydata()) == pytest.approx([30 / 6, 300 / 6])
    eager, fused = time.lines
    assert eager.get_color() == fused.get_color() and eager.get_marker() != fused.get_marker()
    assert [label.get_text() for label in time.get_xticklabels()] == ["10", "100"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["eager, dropkey", "sdpa, dropkey"]


def test_attention_costs_of_two_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        attention_costs(cost_rows() + cost_rows(dtype="bfloat16"), title="")
    with pytest.raises(ValueError, match="peak memory"):
        attention_costs([row for row in cost_rows() if row["metric"] == "time"], title="")
    with pytest.raises(ValueError, match="no row has one of the metrics time, peak memory"):
        attention_costs([row for row in cost_rows() if row["metric"] == "time over sdpa/none"], title="")
