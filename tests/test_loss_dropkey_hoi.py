"""Matching and losses of human-object interaction detection: single terms, images without pairs, several processes."""

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hoi_models import tiny_inputs, tiny_labels, tiny_model

from hf_dropkey.models import loss_dropkey_hoi
from hf_dropkey.models.loss_dropkey_hoi import (
    HoiPredictions,
    HoiTargets,
    generalised_iou,
    hoi_loss,
    match,
    matching_cost,
    verb_loss,
)


REPOSITORY = Path(__file__).resolve().parents[1]


def predictions(*, scale: float = 1.0) -> HoiPredictions:
    torch.manual_seed(0)
    logits, verbs = torch.randn(2, 6, 4) * scale, torch.randn(2, 6, 2) * scale
    boxes = torch.rand(2, 2, 6, 4) * 0.4 + 0.2
    return HoiPredictions(*(part.requires_grad_() for part in (logits, verbs, *boxes)))


def config(**settings: Any) -> Any:
    return tiny_model(**settings).config


def test_generalised_iou() -> None:
    whole, half = torch.tensor([0.5, 0.5, 1.0, 1.0]), torch.tensor([0.25, 0.5, 0.5, 1.0])
    assert generalised_iou(whole, half).item() == pytest.approx(0.5)
    left, right = torch.tensor([0.1, 0.5, 0.2, 0.2]), torch.tensor([0.9, 0.5, 0.2, 0.2])
    # the hull is 1 x 0.2, and 0.6 x 0.2 of it belong to neither
    assert generalised_iou(left, right).item() == pytest.approx(-0.6)
    assert generalised_iou(torch.zeros(4), torch.zeros(4)).isfinite()


def test_a_missing_object_costs_no_distance() -> None:
    found = HoiPredictions(*(part[0].detach() for part in predictions()))
    label = {name: value[:1].clone() for name, value in tiny_labels()[0].items()}
    label["object_boxes"].zero_()
    only_boxes = config(class_cost=0, verb_cost=0, giou_cost=0)
    cost = matching_cost(found, HoiTargets.of(label, found), only_boxes)
    expected = 2.5 * (found.person_boxes - label["person_boxes"]).abs().sum(-1)
    torch.testing.assert_close(cost[:, 0], expected)


def test_the_matching_is_the_cheapest() -> None:
    found, settings = predictions(), config()
    targets = [HoiTargets.of(label, found) for label in tiny_labels()]
    (matching,) = match([found], targets, settings)
    cost = matching_cost(HoiPredictions(*(part[0] for part in found)), targets[0], settings)
    best = min(
        (cost[first, 0] + cost[second, 1]).item() for first in range(6) for second in range(6) if first != second
    )
    queries, pairs = matching[0]
    assert cost[queries, pairs].sum().item() == pytest.approx(best)
    assert queries.tolist() == sorted(queries.tolist())
    assert [len(part) for part in matching[1]] == [0, 0]


def test_images_without_pairs_teach_no_pair() -> None:
    found, empty = predictions(), tiny_labels()[1]
    loss, losses = hoi_loss([found], [empty, empty], config())
    loss.backward()
    for name in ("person_bbox", "object_bbox", "person_giou", "object_giou"):
        assert losses[f"loss_{name}"] == 0
    assert losses["loss_object"] > 0
    assert losses["loss_verb"] > 0
    # every head keeps a gradient, or a process without pairs would wait for the others for ever
    assert all(part.grad is not None for part in found)
    assert (found.logits.grad[..., -1] < 0).all()


def test_focal_loss_does_not_overflow() -> None:
    logits = torch.tensor([[[-200.0, 200.0]]], requires_grad=True)
    loss = verb_loss(logits, torch.tensor([[[1.0, 0.0]]]), "focal", torch.tensor(1.0), 1)
    loss.backward()
    assert loss.item() == pytest.approx(400)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    # against the formula where it does not overflow
    logits, verbs = torch.tensor([[[0.3, -0.7]]]), torch.tensor([[[1.0, 0.0]]])
    probabilities = [1 / (1 + math.exp(-value)) for value in (0.3, -0.7)]
    expected = -math.log(probabilities[0]) * (1 - probabilities[0]) ** 2
    expected -= math.log(1 - probabilities[1]) * probabilities[1] ** 2
    assert verb_loss(logits, verbs, "focal", torch.tensor(1.0), 1).item() == pytest.approx(expected)
    mean = -(math.log(probabilities[0]) + math.log(1 - probabilities[1])) / 2
    assert verb_loss(logits, verbs, "bce", torch.tensor(1.0), 1).item() == pytest.approx(mean)


def test_a_diverged_model_gets_a_loss_that_says_so() -> None:
    found = predictions()._replace(logits=torch.full((2, 6, 4), float("nan")))
    loss, _ = hoi_loss([found], tiny_labels(), config())
    assert loss.isnan()


def test_layers_have_losses_of_their_own() -> None:
    first, last = predictions(), predictions(scale=3.0)
    settings = config()
    total, losses = hoi_loss([first, last], tiny_labels(), settings)
    alone, single = hoi_loss([last], tiny_labels(), settings)
    before, _ = hoi_loss([first], tiny_labels(), settings)
    assert total.item() == pytest.approx((alone + before).item())
    assert losses["loss_verb"] == single["loss_verb"]
    assert "loss_verb_0" in losses
    outputs = tiny_model(auxiliary_loss=False).eval()(**tiny_inputs())
    assert list(outputs.loss_dict) == [name for name in losses if not name.endswith("_0")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verb_labels": torch.ones(2, 3)}, r"verb_labels must have the shape \(2, 2\), got \(2, 3\)"),
        ({"person_boxes": torch.ones(1, 4)}, r"person_boxes must have the shape \(2, 4\), got \(1, 4\)"),
        ({"object_boxes": None}, r"lack \['object_boxes'\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    label = {name: value for name, value in {**tiny_labels()[0], **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        hoi_loss([predictions()], [label, tiny_labels()[1]], config())


def test_more_pairs_than_queries_are_refused() -> None:
    label = {name: value.repeat(4, *[1] * (value.ndim - 1)) for name, value in tiny_labels()[0].items()}
    with pytest.raises(ValueError, match="8 pairs, but the model has 6 queries"):
        hoi_loss([predictions()], [label, label], config())
    with pytest.raises(ValueError, match="labels of 1 images, but 2 images"):
        hoi_loss([predictions()], [label], config())


def test_without_scipy_training_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_dropkey_hoi, "linear_sum_assignment", None)
    model, inputs = tiny_model(), tiny_inputs()
    with pytest.raises(ImportError, match="pip install"):
        model(**inputs)
    inputs.pop("labels")
    assert model(**inputs).loss is None


PROCESS = """
import sys
sys.path.insert(0, "tests/support")
import torch
from hoi_models import tiny_inputs, tiny_model
rank, file = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
model = tiny_model(dropkey_ratio=0.0, dropout=0.0).train()
parallel = torch.nn.parallel.DistributedDataParallel(model)
inputs = tiny_inputs()
empty = sys.argv[3] == "empty"
labels = [inputs["labels"][1]] if empty else inputs["labels"][rank : rank + 1]
outputs = parallel(inputs["pixel_values"][rank : rank + 1], inputs["pixel_mask"][rank : rank + 1], labels=labels)
outputs.loss.backward()
norm = torch.stack([value.grad.norm() for value in model.parameters()]).norm()
torch.distributed.all_reduce(outputs.loss.detach())
print(rank, repr(outputs.loss.item() / 2), repr(norm.item()))
# a process that ends while the other still talks to it would end with an error
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairs on one process", "empty"])
def test_two_processes_have_the_loss_of_one(tmp_path: Path, kind: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), str(rank), str(tmp_path / "meeting"), kind],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=240) for process in processes]
    assert all(process.returncode == 0 for process in processes), printed
    model, inputs = tiny_model(dropkey_ratio=0.0, dropout=0.0).train(), tiny_inputs()
    if kind == "empty":
        inputs["labels"] = [inputs["labels"][1]] * 2
    loss = model(**inputs).loss
    loss.backward()
    norm = torch.stack([value.grad.norm() for value in model.parameters()]).norm()
    for rank, (output, _) in enumerate(printed):
        found = output.split()
        assert found[0] == str(rank)
        assert float(found[1]) == pytest.approx(loss.item(), rel=1e-5)
        assert float(found[2]) == pytest.approx(norm.item(), rel=1e-4)
