"""Tables and figures say what the rows say, seed by seed."""

from typing import Any

import pytest

from hf_dropkey.intervals import Interval, difference, interval
from hf_dropkey.lab.evidence import (
    at_equal_ratios,
    by_corruption,
    by_ratio,
    by_regulariser,
    by_start,
    difference_figure,
    in_short,
    in_words,
    occlusion_figure,
    ratio_figure,
    report,
    size_figure,
    summary,
    verdict,
)
from hf_dropkey.lab.judgement import judged
from hf_dropkey.lab.robustness import UNDER
from hf_dropkey.lab.rows import COLUMNS, choose


def row(metric: str, value: float, seed: int, **changes: Any) -> dict[str, str]:
    usual = dict.fromkeys(COLUMNS, "none") | {"task": "digits", "train_images": "all", "images": "40", "ratio": "0"}
    given = {"split": "validation", **changes, "metric": metric, "value": value, "seed": seed}
    return usual | {name: str(found) for name, found in given.items()}


def cell(level: float, **changes: Any) -> list[dict[str, str]]:
    """Rows of a cell of three seeds: the same differences between seeds in each cell."""
    metrics = {"accuracy": level, "nll": 2 - level, "ece": 0.1, "accuracy_gap": 0.2}
    metrics |= {f"accuracy_at_occlusion_{fraction}": level - fraction for fraction in (0.25, 0.5, 0.75)}
    noise = (0.0, 0.02, -0.01)
    return [row(name, value + noise[seed], seed, **changes) for name, value in metrics.items() for seed in range(3)]


DROPKEY = {"regulariser": "dropkey", "schedule": "decreasing", "pattern": "score"}


@pytest.fixture
def rows() -> list[dict[str, str]]:
    found = []
    for split in ("validation", "test"):
        found += cell(0.80, regulariser="none", split=split)
        found += cell(0.82, **DROPKEY, ratio="0.1", split=split)
        found += cell(0.75, regulariser="attention dropout", ratio="0.1", split=split)
        found += cell(0.70, **DROPKEY, ratio="0.1", alignment="monte-carlo", split=split)
    found += cell(0.78, **DROPKEY, ratio="0.3")
    found += cell(0.85, **{**DROPKEY, "pattern": "key"}, ratio="0.3")
    found += cell(0.81, **{**DROPKEY, "schedule": "constant"}, ratio="0.1")
    # a run that belongs to no grid
    found += cell(0.1, regulariser="none", split="evaluation", experiment="quickstart", task="other")
    return found


def corrupted(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same rows and, for those of the test, accuracies under the corruptions."""
    found = list(rows)
    for place, kind in enumerate(UNDER):
        for one in choose(rows, split="test", metric="accuracy", alignment="none"):
            found.append({**one, "metric": UNDER[kind], "value": f"{float(one['value']) - 0.1 * place:.6g}"})
    return found


def lines(table: str) -> dict[str, list[str]]:
    cells = [[part.strip() for part in line.strip("|").split("|")] for line in table.splitlines() if "---" not in line]
    return {line[0]: line[1:] for line in cells}


def test_corruptions_have_a_table_where_they_were_measured(rows: list[dict[str, str]]) -> None:
    assert "contrast" not in report(rows)
    found = corrupted(rows)
    assert "### Noise, blur, contrast, JPEG: test images, means over five strengths" in report(found)
    table = lines(by_corruption(found, "digits"))
    assert list(table)[1:] == ["none", "attention dropout 0.1", "DropKey 0.1"]
    for place in range(4):
        accuracy = interval([value - 0.1 * place for value in (0.82, 0.84, 0.81)])
        assert table["DropKey 0.1"][1 + place] == f"{accuracy.mean:.3f} ± {accuracy.half:.3f}"
        assert table["DropKey 0.1"][5 + place].startswith("+0.020 ± 0.000")


def test_the_regularisers_are_compared_at_their_chosen_ratio(rows: list[dict[str, str]]) -> None:
    table = lines(by_regulariser(rows, "digits"))
    assert list(table)[1:] == ["none", "attention dropout 0.1", "DropKey 0.1"]
    accuracy = interval([0.82, 0.84, 0.81])
    assert table["DropKey 0.1"][:2] == ["3", f"{accuracy.mean:.3f} ± {accuracy.half:.3f}"]
    # the noise is the same in all cells, so differences have none
    assert table["DropKey 0.1"][5:8] == ["+0.020 ± 0.000, better", "-0.020 ± 0.000, better", "+0.000 ± 0.000"]
    assert table["attention dropout 0.1"][5] == "-0.050 ± 0.000, worse"
    assert table["none"][5:] == ["", "", ""]


def test_a_difference_inside_its_interval_is_neither_better_nor_worse() -> None:
    assert judged(Interval(0.02, -0.01, 0.05, 5), "accuracy").word == ""
    assert judged(Interval(0.02, 0.01, 0.03, 5), "accuracy").word == "better"
    assert judged(Interval(0.02, 0.01, 0.03, 5), "nll").word == "worse"
    assert judged(difference({"0": 1.0}, {"0": 0.5}), "accuracy").word == ""
    with pytest.raises(ValueError, match="neither larger nor smaller values of accuracy_gap are better"):
        judged(Interval(0.02, 0.01, 0.03, 5), "accuracy_gap")


def test_a_judgement_is_formatted_last() -> None:
    found = judged(Interval(0.02, 0.01, 0.03, 5), "accuracy")
    assert (found.mean, found.half, found.n) == pytest.approx((0.02, 0.01, 5))
    assert (found.numbers, str(found)) == ("+0.020 ± 0.010", "+0.020 ± 0.010, better")
    assert str(judged(Interval(0.02, -0.01, 0.05, 5), "accuracy")) == "+0.020 ± 0.030"
    assert str(judged(difference({"0": 1.0}, {"0": 0.5}), "accuracy")) == "+0.500 (one seed)"
    assert str(judged(difference({"0": 1.0}, {"0": 1.0001}), "accuracy")) == "+0.000 (one seed)"


def test_every_ratio_has_its_place(rows: list[dict[str, str]]) -> None:
    table = lines(by_ratio(rows, "digits", "accuracy"))
    assert table["accuracy"] == ["ratio 0.1", "ratio 0.3"]
    assert table["DropKey"][1].startswith("0.783 ±") and table["attention dropout"][1] == ""


def test_patterns_and_schedules_are_compared_at_equal_ratios(rows: list[dict[str, str]]) -> None:
    by_pattern = at_equal_ratios(rows, "digits", "pattern")
    assert by_pattern.startswith("Ratio 0.3:") and "Ratio 0.1:" not in by_pattern
    assert lines(by_pattern)["key"][4] == "+0.070 ± 0.000, better"
    by_schedule = at_equal_ratios(rows, "digits", "schedule")
    assert "Ratio 0.1:" in by_schedule and "Ratio 0.3:" not in by_schedule


def test_words_and_summary_follow_the_rows(rows: list[dict[str, str]]) -> None:
    assert verdict(rows, "digits").startswith("DropKey: accuracy +0.020 ± 0.000, better; NLL -0.020 ± 0.000, better.")
    table = summary(rows)
    assert "| digits | none | 3 |" in table and "|  | DropKey 0.1 | 3 |" in table and "other" not in table
    assert in_words(rows).endswith(
        "by more than the interval on digits (better accuracy +0.020 ± 0.000, better NLL -0.020 ± 0.000)."
    )
    same = [found for found in rows if found["regulariser"] != "dropkey" or found["split"] == "validation"]
    same += cell(0.80, **DROPKEY, ratio="0.1", split="test")
    assert in_words(same).endswith("by more than the interval on none of these.")


def test_the_report_flags_rows_of_several_commits(rows: list[dict[str, str]]) -> None:
    text = report(rows)
    assert "- one commit, one device" in text and "### Alignments: test images" in text and "## other" not in text
    rows[0]["git_sha"] = "abc-changed"
    assert "- mixed git_sha: abc-changed, none" in report(rows)


def test_figures_show_the_rows(rows: list[dict[str, str]]) -> None:
    (ratios,) = ratio_figure(rows, "accuracy").axes
    drawn = {str(line.get_label()): line for line in ratios.lines}
    assert list(drawn["DropKey (3 seeds)"].get_xdata()) == [0.1, 0.3]
    assert list(drawn["DropKey (3 seeds)"].get_ydata()) == pytest.approx([0.82 + 0.01 / 3, 0.78 + 0.01 / 3])
    assert drawn["none (3 seeds)"].get_ydata()[0] == pytest.approx(0.80 + 0.01 / 3)
    (occluded,) = occlusion_figure(rows).axes
    curve = next(line for line in occluded.lines if "DropKey" in str(line.get_label()))
    assert list(curve.get_xdata()) == [0, 25, 50, 75] and occluded.get_xlabel() == "patches hidden, %"
    assert list(curve.get_ydata()) == pytest.approx([0.82 + 0.01 / 3 - fraction for fraction in (0, 0.25, 0.5, 0.75)])
    (variants,) = difference_figure(rows, "accuracy", "0.1").axes
    points = {bar.get_label(): float(bar.lines[0].get_xdata()[0]) for bar in variants.containers}
    assert points == pytest.approx(
        {
            "DropKey (decreasing, score)": 0.02,
            "schedule constant": 0.01,
            "Monte-Carlo inference": -0.1,
            "attention dropout": -0.05,
        }
    )


def test_data_sizes_are_compared_with_their_own_baseline(rows: list[dict[str, str]]) -> None:
    few = {"split": "test", "train_images": "7"}
    rows += cell(0.40, regulariser="none", **few) + cell(0.45, **DROPKEY, ratio="0.3", **few)
    rows += cell(0.30, regulariser="attention dropout", ratio="0.3", **few)
    (axis,) = size_figure(rows, "accuracy").axes
    points = {bar.get_label(): float(bar.lines[0].get_xdata()[0]) for bar in axis.containers}
    assert axis.get_title() == "digits, few: 7"
    assert points == pytest.approx(
        {
            "DropKey, few images": 0.05,
            "DropKey, all images": 0.02,
            "attention dropout, few images": -0.10,
            "attention dropout, all images": -0.05,
        }
    )


def test_a_pretrained_model_is_compared_with_itself_and_comes_first(rows: list[dict[str, str]]) -> None:
    found: list[dict[str, str]] = []
    for split in ("validation", "test"):
        few = {"model": "dinov2-small", "train_images": "60", "split": split, "task": "flowers12"}
        found += cell(0.90, **few, regulariser="none")
        found += cell(0.93, **few, **DROPKEY, ratio="0.1")
        found += cell(0.88, **few, **{**DROPKEY, "schedule": "constant"}, ratio="0.3")
        lora = {**few, "model": "dinov2-small-lora"}
        found += cell(0.50, **lora, regulariser="none") + cell(0.50, **lora, **DROPKEY, ratio="0.3")
    read = by_start(rows + found)
    text = in_short(read)
    table = lines(text.split("\n\n")[0])
    assert list(table)[1] == "DINOv2-small, 60 images of flowers12" and "digits" not in table
    shown = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("|")][2:]
    assert shown == ["none", "DropKey 0.1", "DropKey, constant 0.3", "none", "DropKey 0.3"]
    assert "+0.030 ± 0.000, better" in text and "-0.020 ± 0.000, worse" in text
    assert text.endswith("It does not on DINOv2-small, LoRA, 60 images of flowers12.") and "digits (" in text
    assert report(read).index("DINOv2-small, 60 images") < report(read).index("| digits |")
    assert "In no fine-tuning" not in text
    worse = [
        {**one, "value": "0.1"} if one["regulariser"] == "dropkey" and one["metric"] == "accuracy" else one
        for one in found
    ]
    assert "\n\nFine-tuning a pretrained model, DropKey is" not in in_short(by_start(rows + found))
    assert "In no fine-tuning of a pretrained model here is DropKey better" in in_short(
        by_start(
            rows
            + [
                {**one, "value": "9"} if one["regulariser"] == "dropkey" and one["metric"] == "nll" else one
                for one in worse
            ]
        )
    )
    # rows that were read once are left as they are
    assert by_start(read) == read
    assert in_short(by_start(rows)) == in_words(rows)
