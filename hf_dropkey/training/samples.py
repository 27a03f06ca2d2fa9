"""Masks by sample in a training: data sets and collators that pass row numbers on, and blocks around steps.

With them a mask is a function of the seed of the run, the epoch, the row of the data set and the layer
(`models/sample_masks.py`), so that the number of processes, the size of batches and resumes change no mask.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from ..models.sample_masks import sample_ids


# of a row, and of a batch
ID, IDS = "sample_id", "sample_ids"


class NumberedRows(Dataset):
    """A data set whose rows know their number, under `sample_id`.

    Raises:
        TypeError: The data set is a stream, whose rows have none.
    """

    def __init__(self, rows: Any) -> None:
        """`rows` is any data set with a length."""
        if isinstance(rows, IterableDataset) or not hasattr(rows, "__len__"):
            raise TypeError(
                f"--masks_by_sample needs a data set with row numbers, got the stream {type(rows).__name__}. Leave the "
                "argument out, or load the data set without streaming."
            )
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.rows[number], ID: number}

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows at once, as data loaders take them where the data set reads them faster so."""
        if not hasattr(self.rows, "__getitems__"):
            return [self[number] for number in numbers]
        rows = self.rows.__getitems__(list(numbers))
        return [{**row, ID: number} for row, number in zip(rows, numbers, strict=True)]


class IdCollator:
    """A collator that adds the numbers of `NumberedRows` to a batch, as `sample_ids` `[B]`; other rows pass as they are."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        """`collate` makes a batch of rows without numbers."""
        self.collate = collate

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch."""
        numbers = [row[ID] for row in rows if ID in row]
        batch: dict[str, Any] = self.collate([{k: v for k, v in row.items() if k != ID} for row in rows])
        return {**batch, IDS: torch.tensor(numbers)} if numbers else batch


def masks_of(batch: dict[str, Any], *, epoch: int, seed: int) -> AbstractContextManager[None]:
    """The block for a step on a batch, from which the ids are taken; no block if it has none."""
    ids = batch.pop(IDS, None)
    return nullcontext() if ids is None else sample_ids(ids, epoch=epoch, seed=seed)
