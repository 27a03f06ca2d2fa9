"""The figures of attention hold the numbers that they were given, with names, units and a legend, and refuse bad ones."""

import io
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_dropkey.inspection.figures import (
    DROPKEY_COLOR,
    PLAIN_COLOR,
    _nats,
    drop_fractions,
    entropy_and_distance,
    maps_over_images,
    uncertain_images,
)


def pictures(count: int, side: int = 8) -> list[Image.Image]:
    draws = np.random.default_rng(0)
    return [Image.fromarray(draws.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def saved(figure: Figure) -> None:
    """Drawing it raises nothing and leaves something."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("L")).std() > 0


def heights(line: Any) -> list[float]:
    return [float(value) for value in line.get_ydata()]


def legend(figure: Figure) -> list[str]:
    holders = [figure, *figure.subfigs, *figure.axes]
    found = [box for holder in holders for box in [*getattr(holder, "legends", []), getattr(holder, "legend_", None)]]
    return [text.get_text() for box in found if box is not None for text in box.get_texts()]


# --- statistics -------------------------------------------------------------------------------------------------------

ENTROPIES = {
    "plain attention": [np.array([1.0, 2.0]), np.array([2.0, 4.0])],
    "with DropKey": [np.array([0.5, 1.5]), np.array([1.0, 3.0])],
}
DISTANCES = {name: [layers[0] * 2, np.full(2, np.nan)] for name, layers in ENTROPIES.items()}


def statistics(**changes: Any) -> Figure:
    arguments: dict[str, Any] = {
        "names": ["layers.0", "layers.1"],
        "entropies": ENTROPIES,
        "distances": DISTANCES,
        "uniform_entropies": [4.5, 4.5],
        "uniform_distances": [3.0, 3.0],
        **changes,
    }
    return entropy_and_distance(**arguments, title="some model")


def test_statistics_show_every_head_and_the_mean() -> None:
    figure = statistics()
    entropy, distance = figure.axes
    assert entropy.get_ylabel().endswith("nats") and distance.get_ylabel().endswith("in patches")
    assert figure.get_suptitle() == "some model"
    lines = {str(line.get_label()): line for line in entropy.lines}
    assert list(lines["plain attention, mean of heads"].get_ydata()) == [1.5, 3.0]
    assert list(lines["with DropKey, mean of heads"].get_ydata()) == [1.0, 2.0]
    assert list(lines["uniform attention"].get_ydata()) == [4.5, 4.5]
    colors = [lines[f"{name}, mean of heads"].get_color() for name in ENTROPIES]
    assert colors == [PLAIN_COLOR, DROPKEY_COLOR]
    heads = sorted(
        height for line in entropy.lines if str(line.get_label()).startswith("_") for height in heights(line)
    )
    assert heads == [0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 3.0, 4.0]
    assert set(legend(figure)) == set(lines) - {label for label in lines if label.startswith("_")}
    assert [label.get_text() for label in entropy.get_xticklabels()] == ["layers.0", "layers.1"]
    # a layer without distances is a gap
    means = next(line for line in distance.lines if line.get_label() == "with DropKey, mean of heads").get_ydata()
    assert means[0] == 2.0 and np.isnan(means[1])
    saved(figure)


def test_statistics_without_dropkey_show_one_condition() -> None:
    one = {"plain attention": ENTROPIES["plain attention"]}
    figure = statistics(entropies=one, distances=one)
    assert legend(figure) == ["uniform attention", "plain attention, mean of heads"]


@pytest.mark.parametrize(
    "changes",
    [
        {"names": ["layers.0"]},
        {"uniform_entropies": [1.0]},
        {"distances": {"plain attention": DISTANCES["plain attention"]}},
        {
            "names": [],
            "entropies": {"a": []},
            "distances": {"a": []},
            "uniform_entropies": [],
            "uniform_distances": [],
        },
    ],
)
def test_statistics_of_different_lengths_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one entry per layer, and at least one layer"):
        statistics(**changes)


# --- maps -------------------------------------------------------------------------------------------------------------


def test_maps_have_one_scale_with_uniform_attention_in_its_middle() -> None:
    maps = {"layers.0": np.ones((2, 3, 4)), "rollout": np.ones((2, 3, 4))}
    maps["rollout"][1] *= 2
    maps["rollout"][1, 0] = [16, 0, 2, 2]
    figure = maps_over_images(pictures(2), maps, title="some model", attends="class token")
    panels = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in panels] == ["image", "layers.0", "rollout", "", "", ""]
    uniform, peaked = panels[1].images[-1], panels[5].images[-1]
    # uniform attention leaves the image as it is
    assert np.allclose(uniform.get_array(), 0, atol=1e-6) and uniform.get_cmap()(0.5)[3] < 0.02
    most = 16 / maps["rollout"][1].mean()
    # each tile has its own scale: its largest ratio has all of the colour, a patch without attention is the darkest
    assert peaked.get_array()[0, 0] == pytest.approx(1) and peaked.get_array()[0, 1] == pytest.approx(-1)
    assert [text.get_text() for text in panels[5].texts] == [f"{most:.3g}x"]
    assert [text.get_text() for text in panels[1].texts] == ["1x"]
    assert uniform.get_clim() == peaked.get_clim() == (-1, 1)
    # the map lies on the whole image
    assert list(uniform.get_extent()) == list(panels[1].images[0].get_extent()) == [0, 8, 8, 0]
    assert np.array_equal(panels[0].images[0].get_array(), np.asarray(pictures(2)[0]))
    (bar,) = [axis for axis in figure.axes if "class token" in axis.get_ylabel()]
    assert "each tile on its own logarithmic scale" in bar.get_ylabel()
    assert [label.get_text() for label in bar.get_yticklabels()] == ["least", "uniform", "most"]
    saved(figure)


def test_the_image_under_a_map_keeps_its_colors() -> None:
    image = Image.new("RGB", (4, 4), (200, 40, 90))
    figure = maps_over_images([image], {"layer": np.ones((1, 2, 2))}, title="t", attends="class token")
    assert np.array_equal(figure.axes[1].images[0].get_array()[0, 0], (200, 40, 90))
    file = io.BytesIO()
    figure.savefig(file, format="png")
    colors = Image.open(io.BytesIO(file.getvalue())).convert("RGB").getcolors(1 << 24) or []
    # the image and the map of uniform attention over it look the same
    large = [color for count, color in colors if count > 4000 and color != (255, 255, 255)]
    assert large and all(np.abs(np.subtract(color, (200, 40, 90))).max() <= 1 for color in large)


@pytest.mark.parametrize(
    ("count", "maps", "message"),
    [
        (0, {"a": np.ones((0, 2, 2))}, "0 images"),
        (1, {}, "at least one"),
        (2, {"a": np.ones((1, 2, 2))}, "one map per image"),
        (1, {"a": np.zeros((1, 2, 2))}, "an image without attention"),
        (1, {"a": np.full((1, 2, 2), np.nan)}, "not finite"),
    ],
)
def test_bad_maps_are_refused(count: int, maps: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        maps_over_images(pictures(count), maps, title="t", attends="class token")


def test_a_small_number_of_nats_has_digits() -> None:
    assert [_nats(value) for value in (1.234, 0.0123, 0.00045, 0.00001)] == [
        "1.23 nats",
        "0.012 nats",
        "0.00045 nats",
        "< 0.0001 nats",
    ]


# --- drops ------------------------------------------------------------------------------------------------------------


def test_drops_show_configured_and_measured_fractions() -> None:
    figure = drop_fractions(["a.0", "a.1", "b"], [0.3, 0.1, 0.2], [[0.28, 0.34], [0.1, 0.1], []], title="some model")
    upper, lower = figure.axes
    assert "fraction of attention weights" in upper.get_ylabel() and lower.get_ylabel() == "measured minus configured"
    assert "in order of execution" in lower.get_xlabel()
    lines = {str(line.get_label()): line for line in upper.lines}
    assert list(lines["configured"].get_ydata()) == [0.3, 0.1, 0.2]
    assert list(lines["not measured"].get_xdata()) == [3]
    means, _, (bars,) = upper.containers[0].lines
    assert list(means.get_ydata()) == pytest.approx([0.31, 0.1])
    # Student's t for one degree of freedom
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(12.71 * np.std([0.28, 0.34], ddof=1) / 2**0.5, rel=1e-3)
    assert list(lower.containers[0].lines[0].get_ydata()) == pytest.approx([0.01, 0])
    assert "measured: mean and 95 % interval of 2 passes" in legend(figure)
    assert [label.get_text() for label in lower.get_xticklabels()] == ["a.0", "a.1", "b"]
    saved(figure)


def test_drops_without_a_measurement_say_so() -> None:
    assert legend(drop_fractions(["a"], [0.2], [[]], title="t")) == ["configured", "not measured"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], []), "at least one"),
        ((["a"], [0.1, 0.2], [[0.1]]), "one of each per attention"),
        ((["a"], [0.1], [[0.1, float("nan")]]), "is NaN"),
    ],
)
def test_bad_drops_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drop_fractions(*arguments, title="t")


# --- uncertainty ------------------------------------------------------------------------------------------------------


def uncertain(count: int = 4, **changes: Any) -> Figure:
    arguments: dict[str, Any] = {
        "images": pictures(count),
        "uncertainty": np.array([0.1, 0.3, 0.0, 0.2])[:count],
        "confidence": np.array([0.9, 0.5, 0.99, 0.6])[:count],
        "predicted": ["cat", "dog", "cat", "emu"][:count],
        "truth": ["cat", "cat", "cat", "emu"][:count],
        **changes,
    }
    return uncertain_images(**arguments, title="some model")


def test_images_come_from_the_most_uncertain_on_and_say_right_or_wrong() -> None:
    kept = np.array([0.5, 0.75, 1.0]), np.array([1.0, 1.0, 0.75])
    figure = uncertain(kept=kept)
    titles = [axis.get_title() for axis in figure.axes if axis.images]
    assert titles == [
        "0.30 nats\ndog (50%)\nwrong, is cat",
        "0.20 nats\nemu (60%)\nright",
        "0.10 nats\ncat (90%)\nright",
        "< 0.0001 nats\ncat (99%)\nright",
    ]
    shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert np.array_equal(shown[0], np.asarray(pictures(4)[1]))
    (panel,) = [axis for axis in figure.axes if axis.lines]
    assert panel.get_xlabel() == "fraction of images kept" and panel.get_ylabel() == "accuracy on the images kept"
    lines = {str(line.get_label()): line for line in panel.lines}
    curve = lines["most uncertain rejected first"]
    assert np.array_equal(curve.get_xdata(), kept[0]) and np.array_equal(curve.get_ydata(), kept[1])
    assert list(lines["rejected at random: 75.0%"].get_ydata()) == [0.75, 0.75]
    best = lines["best possible: wrong ones first"]
    assert np.allclose(best.get_ydata(), np.minimum(1, 0.75 / np.asarray(best.get_xdata())))
    assert set(legend(figure)) == set(lines)
    saved(figure)


def test_of_many_images_both_ends_are_shown_and_the_reader_is_an_error() -> None:
    figure = uncertain(most=2)
    titles = [axis.get_title() for axis in figure.axes if axis.images]
    assert [title.split()[0] for title in titles] == ["0.30", "<"]
    assert figure.get_supxlabel() == "2 of 4 images: the 1 most uncertain, then the 1 most certain"
    # an odd number keeps its half, rounded down
    assert len([axis for axis in uncertain(most=3).axes if axis.images]) == 2


def test_long_names_do_not_run_into_each_other() -> None:
    names = ["greater spotted woodpecker", "dog", "cat", "emu"]
    titles = [axis.get_title() for axis in uncertain(predicted=names, truth=names[::-1]).axes if axis.images]
    assert titles[2] == "0.10 nats\ngreater spott… (90%)\nwrong, is emu"
    assert titles[1] == "0.20 nats\nemu (60%)\nwrong, is greater spo…"


def test_without_true_classes_nothing_is_called_right() -> None:
    titles = [axis.get_title() for axis in uncertain(truth=None).axes if axis.images]
    assert titles[0] == "0.30 nats\ndog (50%)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "at least one image"),
        ({"predicted": ["cat"]}, "one of each per image"),
        ({"truth": ["cat"]}, "one of each per image"),
        ({"uncertainty": np.array([0.1, np.nan, 0.0, 0.2])}, "is NaN"),
        ({"kept": (np.array([1.0]), np.array([]))}, "one per fraction"),
        ({"most": 1}, "at least 2"),
    ],
)
def test_bad_uncertainties_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uncertain(**changes)


def test_a_long_title_is_broken_into_lines() -> None:
    figure = drop_fractions(["a"], [0.2], [[]], title="word " * 40)
    assert figure.get_suptitle().count("\n") >= 2
