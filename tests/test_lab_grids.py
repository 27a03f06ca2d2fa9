"""A grid trains the runs that its cells name, measures each once, chooses on held-out images and looks at the test once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from small_grids import GRID, ORIGIN, RECIPE

from hf_dropkey.classification.arguments import DataArguments
from hf_dropkey.classification.sources import png_bytes
from hf_dropkey.cli import main
from hf_dropkey.lab.grids import (
    BEGUN,
    DONE,
    Cell,
    Grid,
    chosen_cells,
    data_to_test,
    job_of,
    measure,
    missing_cells,
    new_rows,
    train_cell,
)
from hf_dropkey.lab.robustness import UNDER
from hf_dropkey.lab.rows import COLUMNS, choose, read_rows
from hf_dropkey.lab.timing import append_rows


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def make_grid(tmp_path: Path) -> Any:
    """Writes recipe and grid, with changes, and loads the grid."""

    def make(**changes: Any) -> Grid:
        (tmp_path / "recipe.json").write_text(json.dumps(RECIPE | changes.pop("recipe_fields", {})))
        (tmp_path / "small.json").write_text(json.dumps(GRID | changes))
        return Grid.load(tmp_path / "small.json")

    return make


def rows_of(grid: Grid, cells: list[Cell], folder: Path, **changes: Any) -> list[dict[str, str]]:
    given = {"split": "validation", "root": folder, "data": {}, **changes}
    rows = measure(grid, cells, folder / "runs" / cells[0].name, **given)
    return [{name: {**row, **ORIGIN}[name] for name in COLUMNS} for row in rows]


def drawn_rows(grid: Grid, nll: dict[float, float], split: str = "validation") -> list[dict[str, str]]:
    """Rows of every cell, as if it had been measured."""
    usual = {"epochs": "1", "split": split, "images": "40", "metric": "nll", "unit": "nats", **ORIGIN}
    rows = [{**cell.columns(grid), **usual, "value": str(nll[cell.ratio] + 0.01 * cell.seed)} for cell in grid.cells]
    return [{name: row[name] for name in COLUMNS} for row in rows]


def test_a_grid_is_the_product_of_its_cells_in_the_order_of_seeds(make_grid: Any) -> None:
    grid = make_grid()
    assert (grid.name, grid.task, len(grid.cells)) == ("small", "digits", 2 * (1 + 4))
    assert grid.cells[0] == Cell(model="tiny", regulariser="none", seed=0)
    dropkey = Cell(model="tiny", regulariser="dropkey", ratio=0.5, schedule="decreasing", pattern="score", seed=1)
    assert dropkey in grid.cells and replace(dropkey, alignment="monte-carlo") in grid.cells
    groups = grid.groups(grid.cells)
    assert [cells[0].seed for cells in groups] == [0, 0, 0, 1, 1, 1]
    assert [len(cells) for cells in groups] == [1, 2, 2, 1, 2, 2], "Monte-Carlo inference trains nothing"
    # the defaults of DropKey are the same in a list
    listed = make_grid(cells=[{"regulariser": ["attention dropout", "dropkey"], "ratio": 0.5}])
    assert replace(dropkey, seed=0) in listed.cells and len(listed.cells) == 2 * 2
    # listed twice, trained once
    assert make_grid(cells=[*GRID["cells"], {"regulariser": ["none"]}]).cells == grid.cells


def test_a_cell_says_what_the_train_script_is_an_error() -> None:
    dropkey = Cell(
        model="vit", regulariser="dropkey", ratio=0.3, schedule="constant", pattern="key", alignment="fine-tune"
    )
    assert " ".join(dropkey.arguments()) == (
        "--seed 0 --dropkey_ratio 0.3 --dropkey_schedule constant --dropkey_pattern key --dropkey_alignment 0.1"
    )
    dropout = Cell(model="vit", regulariser="attention dropout", ratio=0.2, train_images=50, seed=3)
    assert " ".join(dropout.arguments()) == (
        "--seed 3 --dropkey_ratio 0.0 --attention_probs_dropout_prob 0.2 --max_train_samples 50"
    )
    names = {cell.name for cell in (dropkey, dropout, replace(dropkey, seed=1), replace(dropkey, alignment="none"))}
    assert len(names) == 4 and all(name.replace("_", "").replace("-", "").replace(".", "").isalnum() for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cells": [{"regulariser": "dropout"}]},
            "unknown cell: regulariser 'dropout'.*'attention dropout', 'dropkey'",
        ),
        ({"cells": [{"regulariser": "none", "ratio": 0.1}]}, "ratio 0.1 with regulariser 'none'; it is 0 for 'none'"),
        ({"cells": [{"regulariser": "dropkey", "ratio": 1.0}]}, r"ratio 1.0 .* in \(0, 1\) for the others"),
        ({"cells": [{"regulariser": "dropkey", "ratio": 0.1, "pattern": "row"}]}, "pattern 'row'.*'score', 'key'"),
        ({"cells": [{"regulariser": "none", "schedule": "constant"}]}, "schedule 'constant' with regulariser 'none'"),
        ({"cells": [{"regulariser": "none", "train_images": 0}]}, "train_images 0; pass a number from 1 on, or 'all'"),
        (
            {"cells": [{"regulariser": "none", "colour": 1}]},
            r"fields \['colour'\] in .*; allowed are alignment, model",
        ),
        ({"cells": [{"regulariser": "none", "model": "huge"}]}, r"models \['huge'\]; the grid has tiny"),
        ({"cells": [{"ratio": 0.1}]}, "names no regulariser; allowed are none, attention dropout, dropkey"),
        (
            {"cells": [{"regulariser": "dropkey", "ratio": "0.1"}]},
            "ratio '0.1'; pass a number from 0 on, without quotes",
        ),
        ({"cells": [{"regulariser": "dropkey", "ratio": 0.12345678}]}, "ratio 0.12345678; rows hold six digits"),
        ({"cells": [{"regulariser": "dropkey", "ratio": []}]}, "no value of ratio in"),
        ({"seeds": [0, "1"]}, "seed '1'; pass a number"),
        ({"seeds": 3}, r"has the seeds 3; pass a list, such as \[0, 1, 2\]"),
        ({"cells": []}, "lists no cell"),
        ({"select_by": "f1"}, "selects by 'f1'; every cell has accuracy, nll, ece"),
        ({"task": None, "more": 1}, "unknown fields more"),
        ({"corruptions": "noise"}, "has the corruptions 'noise'; pass true or false"),
    ],
)
def test_an_unknown_cell_is_an_error(make_grid: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_grid(**changes)


def test_a_grid_without_a_field_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text(json.dumps({name: GRID[name] for name in GRID if name != "seeds"}))
    with pytest.raises(
        ValueError, match=r"half.json lacks seeds; a grid has about, cells, corruptions, held_out_images"
    ):
        Grid.load(tmp_path / "half.json")


def test_cells_are_trained_once_and_measured_on_either_split(make_grid: Any, tmp_path: Path) -> None:
    grid = make_grid()
    none, (plain, averaged) = (grid.groups(grid.cells)[number] for number in (0, 1))
    rows = rows_of(grid, none, tmp_path) + rows_of(grid, [plain, averaged], tmp_path)
    append_rows(tmp_path / "rows.csv", rows)
    assert read_rows(tmp_path / "rows.csv") == rows
    of_none = {row["metric"]: float(row["value"]) for row in choose(rows, regulariser="none")}
    assert of_none["accuracy_gap"] == pytest.approx(of_none["train_accuracy"] - of_none["accuracy"], abs=1e-5)
    assert {"nll", "ece", "train_nll", "accuracy_at_occlusion_0.25", "accuracy_at_occlusion_0.75"} <= of_none.keys()
    assert {row["images"] for row in rows} == {"40"} and {row["epochs"] for row in rows} == {"1"}
    # the same weights, used in two ways
    plainly, masked = (
        {row["metric"]: row["value"] for row in choose(rows, regulariser="dropkey", alignment=alignment)}
        for alignment in ("none", "monte-carlo")
    )
    assert masked.keys() == {"accuracy", "top5_accuracy", "nll", "ece"} and plainly["nll"] != masked["nll"]
    left = missing_cells(grid, rows, "validation")
    assert plain not in left and averaged not in left and len(left) == len(grid.cells) - 3

    weights = tmp_path / "runs" / plain.name / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = rows_of(grid, [plain], tmp_path)
    assert weights.stat().st_mtime_ns == before
    assert again == choose(rows, regulariser="dropkey", alignment="none")
    tested = rows_of(grid, [plain], tmp_path, split="test")
    assert {row["split"] for row in tested} == {"test"} and weights.stat().st_mtime_ns == before
    # other images, but the same training images
    values = [{row["metric"]: row["value"] for row in found} for found in (again, tested)]
    assert values[0]["nll"] != values[1]["nll"] and values[0]["train_nll"] == values[1]["train_nll"]


def test_a_grid_may_measure_few_held_out_images_in_16_bits_and_tests_all(make_grid: Any, tmp_path: Path) -> None:
    grid = make_grid(held_out_images=12, recipe_fields={"bf16": True})
    few, all_of_them = (rows_of(grid, [grid.cells[0]], tmp_path, split=split) for split in ("validation", "test"))
    assert {row["images"] for row in few} == {"12"} and {row["images"] for row in all_of_them} == {"40"}
    with pytest.raises(ValueError, match="has held_out_images 0; pass a whole number from 1 on"):
        make_grid(held_out_images=0)


def test_corruptions_are_measured_of_the_usual_cells_and_may_be_added_later(make_grid: Any, tmp_path: Path) -> None:
    cells = [
        {"regulariser": "none"},
        {"regulariser": "dropkey", "ratio": 0.5, "alignment": ["none", "monte-carlo"]},
        {"regulariser": "dropkey", "ratio": 0.5, "pattern": "key"},
        {"regulariser": "none", "train_images": 32},
    ]
    grid = make_grid(seeds=[0], cells=cells)
    usual = [cell for cell in grid.cells if cell.is_usual]
    assert [cell.regulariser for cell in usual] == ["none", "dropkey"]
    before = [row for cells in grid.groups(grid.cells) for row in rows_of(grid, cells, tmp_path, split="test")]
    assert not missing_cells(grid, before, "test") and not any("under" in row["metric"] for row in before)
    asks = replace(grid, corruptions=True)
    assert (
        missing_cells(asks, before, "validation") == list(grid.cells) and missing_cells(asks, before, "test") == usual
    )
    found = [row for cell in usual for row in rows_of(asks, [cell], tmp_path, split="test")]
    new = new_rows(before, found)
    assert len(new) == 2 * 4 and {row["metric"] for row in new} == set(UNDER.values())
    assert not missing_cells(asks, [*before, *new], "test") and new_rows([*before, *new], found) == []
    assert not any("under" in row["metric"] for row in rows_of(asks, usual[:1], tmp_path))
    other = [{**row, "value": "0.125"} if row["metric"] == "accuracy" else row for row in before]
    with pytest.raises(ValueError, match=r"the accuracy was 0.125 .* and is .* now, so that these are other weights"):
        new_rows(other, found)
    # the mean over the strengths of what `hf-dropkey evaluate --robustness` measures
    folder = tmp_path / "runs" / usual[0].name
    words = [
        "--model_name_or_path",
        str(folder),
        "--dataset_name",
        "digits",
        "--max_eval_samples",
        "40",
        "--robustness",
    ]
    assert main(["evaluate", *words, "--use_cpu", "--output_file", str(tmp_path / "evaluation.json")]) == 0
    measured = json.loads((tmp_path / "evaluation.json").read_text())["robustness"]
    values = {row["metric"]: float(row["value"]) for row in choose(new, regulariser="none")}
    for kind, metric in UNDER.items():
        assert values[metric] == pytest.approx(sum(measured[kind]) / 5, abs=1e-5)


def test_held_out_test_and_training_images_are_different_ones(make_grid: Any, tmp_path: Path) -> None:
    grid = make_grid(recipe_fields={"max_train_samples": None, "max_eval_samples": None})
    job = job_of(grid, grid.cells[0], tmp_path / "run", root=tmp_path, data={})
    from hf_dropkey.classification.data import load_image_data

    held_out = load_image_data(job.data, training=True)
    test = load_image_data(replace(job.data, hold_out_validation=False), training=False)
    assert held_out.train is not None
    rows, kept = set(held_out.train["row"]), set(held_out.evaluation["row"])
    assert not rows & kept and len(rows | kept) == 1438 and held_out.evaluation_split == "0.15 of train"
    assert test.evaluation_split == "test" and len(test.evaluation) == 359


def test_patches_that_do_not_fill_the_images_are_an_error_before_training(make_grid: Any, tmp_path: Path) -> None:
    grid = make_grid(occlusion_patch=3)
    with pytest.raises(ValueError, match="hides patches of 3 pixels, which do not fill images of 8 x 8"):
        job_of(grid, grid.cells[0], tmp_path / "run", root=tmp_path, data={})


def test_held_out_images_never_stand_in_for_the_test(make_grid: Any, tmp_path: Path) -> None:
    images = [{"bytes": png_bytes(Image.new("RGB", (8, 8), (40 * label, 0, 0))), "path": None} for label in range(4)]
    Dataset.from_dict({"image": images * 8, "label": list(range(4)) * 8}).to_parquet(tmp_path / "train.parquet")
    # plain numbers as labels, and the first class has no test image
    Dataset.from_dict({"image": images[1:], "label": [1, 2, 3]}).to_parquet(tmp_path / "test.parquet")
    data = DataArguments(train_file=str(tmp_path / "train.parquet"), hold_out_validation=True)
    with pytest.raises(ValueError, match="the data has no split for the test, only 'train'"):
        data_to_test(data)
    whole = replace(data, validation_file=str(tmp_path / "test.parquet"))
    found = data_to_test(whole).with_label_names(["0", "1", "2", "3"])
    assert [found.label_ids[label] for label in found.evaluation["label"]] == [1, 2, 3]


def test_weights_of_another_recipe_are_not_taken_for_these(make_grid: Any, tmp_path: Path) -> None:
    grid = make_grid()
    cell = grid.cells[0]
    folder = tmp_path / "run"
    train_cell(job_of(grid, cell, folder, root=tmp_path, data={}), folder)
    # a setting that an older release did not record does not differ
    facts = json.loads((folder / DONE).read_text())
    older = {name: value for name, value in facts["told"].items() if name != "adam_beta1"}
    (folder / DONE).write_text(json.dumps(facts | {"told": older}))
    assert train_cell(job_of(grid, cell, folder, root=tmp_path, data={}), folder)[1]["epochs"] == facts["epochs"]
    changed = make_grid(recipe_fields={"learning_rate": 0.02})
    with pytest.raises(ValueError, match=r"a run with other settings \(learning_rate\); delete it"):
        train_cell(job_of(changed, cell, folder, root=tmp_path, data={}), folder)
    # nor the start of a run that was stopped
    (folder / DONE).rename(folder / BEGUN)
    with pytest.raises(ValueError, match=r"a run with other settings \(learning_rate\); delete it"):
        train_cell(job_of(changed, cell, folder, root=tmp_path, data={}), folder)


def test_an_interrupted_cell_goes_on_from_its_checkpoint(make_grid: Any, tmp_path: Path) -> None:
    grid = make_grid(recipe_fields={"save_strategy": "steps", "save_steps": 2})
    cell, folder = grid.groups(grid.cells)[1][0], tmp_path / "run"
    train_cell(job_of(grid, cell, folder, root=tmp_path, data={}), folder)
    whole = load_file(folder / "model.safetensors")
    # as a run that was killed after its first checkpoint leaves it
    facts = json.loads((folder / DONE).read_text())
    (folder / DONE).unlink()
    (folder / BEGUN).write_text(json.dumps(facts | {"git_sha": "abc"}))
    (folder / "model.safetensors").unlink()
    (folder / "checkpoint-4" / "trainer_state.json").unlink()
    train_cell(job_of(grid, cell, folder, root=tmp_path, data={}), folder)
    assert (folder / "aside-checkpoint-4").is_dir()
    resumed = load_file(folder / "model.safetensors")
    # the time of the last part would be none of the whole
    resumed_facts = json.loads((folder / DONE).read_text())
    assert "train_seconds" not in resumed_facts and not (folder / BEGUN).exists()
    assert resumed_facts["git_sha"].startswith("abc then ")
    # an older release did not record the settings of these checkpoints
    (folder / DONE).rename(tmp_path / DONE)
    with pytest.raises(ValueError, match="holds the start of a run whose settings are not known; delete it"):
        train_cell(job_of(grid, cell, folder, root=tmp_path, data={}), folder)
    # a third part by the commit of the second is named once
    (tmp_path / DONE).rename(folder / BEGUN)
    train_cell(job_of(grid, cell, folder, root=tmp_path, data={}), folder)
    assert json.loads((folder / DONE).read_text())["git_sha"] == resumed_facts["git_sha"]
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    # one that saved none starts again
    (folder / DONE).unlink()
    for checkpoint in folder.glob("*checkpoint*"):
        (checkpoint / "trainer_state.json").unlink(missing_ok=True)
    train_cell(job_of(grid, cell, folder, root=tmp_path, data={}), folder)
    assert (folder / DONE).is_file()


def test_ratios_are_chosen_by_the_held_out_images(make_grid: Any) -> None:
    grid = make_grid()
    chosen = chosen_cells(grid, drawn_rows(grid, {0.0: 3.0, 0.1: 2.0, 0.5: 1.0}))
    assert {(cell.regulariser, cell.ratio) for cell in chosen} == {("none", 0.0), ("dropkey", 0.5)}
    assert len(chosen) == 2 * 3
    # a larger accuracy is better
    larger = replace(grid, select_by="accuracy")
    rows = [{**row, "metric": "accuracy"} for row in drawn_rows(grid, {0.0: 3.0, 0.1: 2.0, 0.5: 1.0})]
    assert {cell.ratio for cell in chosen_cells(larger, rows)} == {0.0, 0.1}


def test_an_unfinished_grid_chooses_nothing(make_grid: Any) -> None:
    grid = make_grid()
    rows = drawn_rows(grid, {0.0: 3.0, 0.1: 2.0, 0.5: 1.0})
    with pytest.raises(
        ValueError, match="1 of 10 cells are not finished, such as tiny_dropkey_0.5_.*without --test first"
    ):
        chosen_cells(grid, rows[:-1])


def test_a_second_choice_after_a_look_at_the_test_is_refused(make_grid: Any) -> None:
    grid = make_grid()
    held_out = drawn_rows(grid, {0.0: 3.0, 0.1: 2.0, 0.5: 1.0})
    looked = [row for row in drawn_rows(grid, {0.0: 3.0, 0.1: 2.0, 0.5: 1.0}, "test") if row["ratio"] in ("0", "0.1")]
    with pytest.raises(ValueError, match="test images were used with cells that are not chosen now.*another name"):
        chosen_cells(grid, held_out + looked)


@pytest.mark.parametrize("file", sorted((ROOT / "scripts" / "grids").glob("*.json")), ids=lambda file: file.stem)
def test_the_grids_of_the_project_are_whole(file: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    grid = Grid.load(file)
    assert len({cell.seed for cell in grid.cells}) >= 5 and grid.about
    start = json.loads((ROOT / grid.recipe).read_text(encoding="utf-8")).get("model_name_or_path")
    if start is not None:
        request.getfixturevalue("auto_image_processor")
        if not (ROOT / start).is_dir():
            pytest.skip(f"needs the pretrained model in {start}; {grid.about}")
    for kind in {cell.kind(): cell for cell in grid.cells}.values():
        job = job_of(grid, kind.trained, tmp_path, root=ROOT, data={})
        assert job.config.image_size % grid.occlusion_patch == 0 and job.data.hold_out_validation
