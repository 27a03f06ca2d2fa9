"""Mixup and CutMix: images and targets are mixed alike, as a function of seed, epoch and rows; the loss follows."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_dropkey.images.mixing import Mixing, MixingCollator, mixed_loss, paste_box


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Images that are their own class number everywhere, so that their mean says what they were mixed of."""
    labels = torch.arange(4)
    return labels[:, None, None, None].float().expand(4, 3, 20, 20).clone(), nn.functional.one_hot(labels, 4).float()


@pytest.mark.parametrize(
    "settings", [{"mixup_alpha": 0.4}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 1.0, "cutmix_alpha": 1.0}]
)
def test_targets_are_mixed_as_the_images_are(settings: dict[str, float]) -> None:
    images, targets = batch()
    weights = set()
    for seed in range(30):
        mixed, mixed_targets = Mixing(**settings)(images, targets, np.random.default_rng(seed))
        assert torch.allclose(mixed_targets.sum(dim=1), torch.ones(4))
        found = mixed.mean(dim=(1, 2, 3))
        assert torch.allclose(found, mixed_targets @ torch.arange(4).float(), atol=1e-5)
        weights.add(round(float(mixed_targets[0, 0]), 4))
    assert len(weights) > 15


def test_each_method_is_chosen_half_of_the_time_and_batches_as_often_as_asked() -> None:
    images, targets = batch()
    mixing = Mixing(1.0, 1.0, probability=0.5)
    kinds = []
    for seed in range(400):
        mixed, _ = mixing(images, targets, np.random.default_rng(seed))
        values = mixed[0].unique()
        kinds.append("none" if torch.equal(mixed, images) else "cut" if set(values.tolist()) <= {0.0, 3.0} else "mix")
    assert 160 < kinds.count("none") < 250 and abs(kinds.count("cut") - kinds.count("mix")) < 50


def test_a_box_has_the_area_that_the_targets_say() -> None:
    images, _ = batch()
    pasted, kept = paste_box(images, 0.75, np.random.default_rng(0))
    assert float((pasted[0] == 0).float().mean()) == pytest.approx(kept)
    with_itself = paste_box(images, 1.0, np.random.default_rng(0))
    assert torch.equal(with_itself[0], images) and with_itself[1] == 1


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mixup_alpha": -1.0}, "--mixup -1.0 is below 0; choose for example 0.2"),
        ({"cutmix_alpha": float("nan")}, "--cutmix nan is below 0"),
        ({"probability": 1.5}, r"--mixing_probability 1.5 is outside \[0, 1\]"),
    ],
)
def test_values_outside_their_range_are_errors(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Mixing(**settings)


def test_a_batch_is_a_function_of_seed_epoch_and_rows() -> None:
    transform = SimpleNamespace(epoch=torch.tensor(0))

    def collate(rows: Any) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }

    rows = [{"pixel_values": torch.full((3, 8, 8), float(n)), "labels": n, "row": n} for n in range(4)]
    collator = MixingCollator(collate, Mixing(1.0), classes=5, transform=transform, seed=1)
    first, again = collator(rows), collator(rows)
    assert torch.equal(first["pixel_values"], again["pixel_values"]) and first["labels"].shape == (4, 5)
    transform.epoch.fill_(1)
    assert not torch.equal(collator(rows)["labels"], first["labels"])
    transform.epoch.fill_(0)
    assert not torch.equal(collator(rows[::-1])["labels"].flip(0), first["labels"])
    # rows to evaluate on have no number
    plain = collator([{name: value for name, value in row.items() if name != "row"} for row in rows])
    assert plain["labels"].tolist() == [0, 1, 2, 3] and torch.equal(plain["pixel_values"][1], rows[1]["pixel_values"])


def test_the_loss_is_the_mean_over_all_accumulated_images() -> None:
    logits, labels = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 4, 0])
    targets = nn.functional.one_hot(labels, 5).float()
    whole = nn.functional.cross_entropy(logits, labels)
    assert torch.allclose(mixed_loss({"logits": logits}, labels), whole)
    assert torch.allclose(mixed_loss(SimpleNamespace(logits=logits), targets), whole)
    parts = [
        mixed_loss({"logits": logits[part]}, targets[part], num_items_in_batch=30) for part in (slice(2), slice(2, 6))
    ]
    assert torch.allclose(sum(parts), whole)
    smoothed = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.allclose(mixed_loss({"logits": logits}, targets, label_smoothing=0.1), smoothed)
    assert torch.allclose(mixed_loss({"logits": logits}, targets, 30, label_smoothing=0.1), smoothed)
