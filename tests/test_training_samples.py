"""Masks by sample in whole trainings: the same losses for one process or two, and for any split of a batch."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import small_runs
import torch
from torch.utils.data import DataLoader, IterableDataset

from hf_dropkey.models.sample_masks import any_block
from hf_dropkey.training.samples import IdCollator, NumberedRows, masks_of


TRAINER, LOOP = "train_image_classification.py", "train_image_classification_accelerate.py"
# 96 images, six steps an epoch; nothing is random but order, augmentation (by row) and DropKey
RECIPE = {
    **small_runs.RECIPE,
    "hidden_dropout_prob": 0.0,
    "dropkey_ratio": 0.5,
    "do_eval": False,
    "check_images": False,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "logging_steps": 1,
    "save_steps": 4,
    "disable_tqdm": True,
    "masks_by_sample": True,
}
# rounding, after twelve steps
ROUNDING = 5e-6


def run(script: str, folder: Path, name: str, *, count: int = 1, **changes: Any) -> list[float]:
    """The losses of a run that ended well."""
    recipe, log = folder / f"{name}.json", folder / f"{name}.log"
    recipe.write_text(json.dumps({**RECIPE, **changes}))
    arguments = (script, str(recipe), "--output_dir", str(folder / name))
    if count == 1:
        forked.finish(forked.start(*arguments, log=log), log=log)
    else:
        forked.run_together(*arguments, log=log, count=count)
    history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    whole = run(TRAINER, tmp_path, "whole", max_steps=4)
    two = run(TRAINER, tmp_path, "two", count=2, per_device_train_batch_size=8, max_steps=4)
    assert len(whole) == 4 and two == pytest.approx(whole, abs=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("script", [TRAINER, LOOP])
def test_one_process_two_processes_and_small_batches_have_one_loss_curve(script: str, tmp_path: Path) -> None:
    whole = run(script, tmp_path, "whole")
    assert len(whole) == 12
    two = run(script, tmp_path, "two", count=2, per_device_train_batch_size=8)
    assert two == pytest.approx(whole, abs=ROUNDING)
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    assert run(script, tmp_path, "parts", **parts) == pytest.approx(whole, abs=ROUNDING)
    # going on from the middle of an epoch, with another number of processes
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", tmp_path / "resumed" / "checkpoint-8")
    more = {"count": 2, "per_device_train_batch_size": 8, "resume_from_checkpoint": "auto"}
    assert run(script, tmp_path, "resumed", **more) == pytest.approx(whole, abs=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("script", [TRAINER, LOOP])
def test_masks_by_place_have_another_one(script: str, tmp_path: Path) -> None:
    """Without this, equal losses might come from masks that do not matter."""
    whole = run(script, tmp_path, "whole", masks_by_sample=False, num_train_epochs=1)
    parts = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    other = run(script, tmp_path, "parts", masks_by_sample=False, **parts)
    by_sample = run(script, tmp_path, "sample", num_train_epochs=1)
    for one, two in ((whole, other), (whole, by_sample)):
        assert max(abs(a - b) for a, b in zip(one, two, strict=True)) > 20 * ROUNDING


class Squares:
    def __len__(self) -> int:
        return 5

    def __getitem__(self, number: int) -> dict[str, int]:
        return {"square": number**2}


class FastSquares(Squares):
    def __getitems__(self, numbers: list[int]) -> list[dict[str, int]]:
        return [self[number] for number in numbers]


@pytest.mark.parametrize("rows", [Squares(), FastSquares()])
def test_rows_keep_their_numbers_on_the_way_to_a_batch(rows: Any) -> None:
    def squares(rows: list[dict[str, int]]) -> dict[str, Any]:
        assert all(row.keys() == {"square"} for row in rows)
        return {"squares": [row["square"] for row in rows]}

    numbered: Any = NumberedRows(rows)
    batches = list(DataLoader(numbered, 2, sampler=[4, 0, 3], collate_fn=IdCollator(squares)))
    assert [batch["squares"] for batch in batches] == [[16, 0], [9]]
    assert [batch["sample_ids"].tolist() for batch in batches] == [[4, 0], [3]]
    assert IdCollator(squares)([{"square": 1}]) == {"squares": [1]}


def test_the_ids_leave_the_batch_for_a_block() -> None:
    batch = {"x": 1, "sample_ids": torch.tensor([3, 4])}
    with masks_of(batch, epoch=1, seed=2):
        assert any_block()
    assert batch == {"x": 1}
    with masks_of(batch, epoch=1, seed=2):
        assert not any_block()


def test_a_stream_is_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, int]]:
            yield {}

    with pytest.raises(TypeError, match="masks_by_sample needs a data set with row numbers, got the stream Stream"):
        NumberedRows(Stream())
