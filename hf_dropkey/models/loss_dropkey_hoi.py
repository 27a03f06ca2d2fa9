"""Matching and losses of human-object interaction detection as in QPIC (Tamura et al., CVPR 2021).

Formulas from github.com/hitachi-rd-cv/qpic, commit 257f314 (`models/matcher.py`, `models/hoi.py`), in our own words.
Boxes are (centre x, centre y, width, height) as fractions of the image unless a name says corners. Every normaliser is
counted over all processes, so that the mean of their losses is the loss of one process with all their images.

This file travels with checkpoints: it imports torch only, and SciPy where there is one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn


try:
    from scipy.optimize import linear_sum_assignment
except ImportError:
    linear_sum_assignment = None


# added to counts by the official code, so that nothing is divided by zero
SMALL_COUNT = 1e-4
# below any area of two boxes that a model finds
SMALL_AREA = 1e-12
# in place of a cost that is not a number, so that a diverged model gets a loss that says so, not an error of SciPy
WORST_COST = 1e6


class HoiPredictions(NamedTuple):
    """Predictions of one decoder layer for a batch.

    Attributes:
        logits: Object logits `[B, Q, O + 1]`; the last class is "no pair".
        verb_logits: `[B, Q, V]`.
        person_boxes: `[B, Q, 4]`.
        object_boxes: `[B, Q, 4]`.
    """

    logits: torch.Tensor
    verb_logits: torch.Tensor
    person_boxes: torch.Tensor
    object_boxes: torch.Tensor


class HoiTargets(NamedTuple):
    """The pairs of one image.

    Attributes:
        class_labels: Object classes `[n]`.
        verb_labels: 1.0 for each verb of a pair, else 0.0 `[n, V]`.
        person_boxes: `[n, 4]`.
        object_boxes: `[n, 4]`; all zeros where the person acts on no object.
    """

    class_labels: torch.Tensor
    verb_labels: torch.Tensor
    person_boxes: torch.Tensor
    object_boxes: torch.Tensor

    @classmethod
    def of(cls, labels: dict[str, Any], like: HoiPredictions) -> "HoiTargets":
        """The targets in a label dictionary, in the dtype and on the device of predictions.

        Raises:
            ValueError: A key is missing, or shapes do not fit the predictions.
        """
        missing = [name for name in cls._fields if name not in labels]
        if missing:
            raise ValueError(f"The labels of an image lack {missing}; they need {list(cls._fields)}.")
        device, dtype = like.person_boxes.device, like.person_boxes.dtype
        classes = labels["class_labels"].to(device)
        targets = cls(classes, *(labels[name].to(device=device, dtype=dtype) for name in cls._fields[1:]))
        expected = {"class_labels": (), "verb_labels": (like.verb_logits.shape[-1],)}
        for name, tensor in targets._asdict().items():
            shape = (len(classes), *expected.get(name, (4,)))
            if tuple(tensor.shape) != shape:
                raise ValueError(f"The labels' {name} must have the shape {shape}, got {tuple(tensor.shape)}.")
        if len(classes) > like.logits.shape[-2]:
            raise ValueError(
                f"An image has {len(classes)} pairs, but the model has {like.logits.shape[-2]} queries, each of which "
                "finds one pair. Leave pairs out, or give the model more queries (`num_queries`)."
            )
        return targets


# --- boxes -------------------------------------------------------------------------------------------------------------


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """(centre x, centre y, width, height) `[..., 4]` to (left, top, right, bottom)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((centre - size / 2, centre + size / 2), dim=-1)


def generalised_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Generalised IoU (Rezatofighi et al., 2019) of boxes `[..., 4]` that broadcast, in [-1, 1]."""
    first, second = corners(first), corners(second)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (first, second)]
    inner = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    outer = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    shared = inner.clamp(min=0).prod(-1)
    union = areas[0] + areas[1] - shared
    hull = outer.clamp(min=0).prod(-1)
    return shared / union.clamp(min=SMALL_AREA) - (hull - union) / hull.clamp(min=SMALL_AREA)


# --- matching ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def matching_cost(predictions: HoiPredictions, targets: HoiTargets, config: Any) -> torch.Tensor:
    """Cost of giving each query each pair of one image.

    Args:
        predictions: Those for one image, with shapes `[..., Q, *]`.
        targets: The pairs of the image.
        config: Has `class_cost`, `verb_cost`, `bbox_cost`, `giou_cost`.

    Returns:
        `[..., Q, n]`.
    """
    found = predictions.verb_logits.sigmoid()
    wanted = targets.verb_labels
    verbs = (found @ wanted.T) / (wanted.sum(1) + SMALL_COUNT)
    absent = ((1 - found) @ (1 - wanted).T) / ((1 - wanted).sum(1) + SMALL_COUNT)
    classes = predictions.logits.softmax(-1)[..., targets.class_labels]
    person, thing = predictions.person_boxes[..., :, None, :], predictions.object_boxes[..., :, None, :]
    exists = (targets.object_boxes != 0).any(1)
    person_distance = (person - targets.person_boxes).abs().sum(-1)
    object_distance = (thing - targets.object_boxes).abs().sum(-1) * exists
    person_giou = generalised_iou(person, targets.person_boxes)
    # for a missing object the official code adds the person's term to that of a box of zeros
    object_giou = generalised_iou(thing, targets.object_boxes) + person_giou * ~exists
    return (
        -config.class_cost * classes
        - config.verb_cost * (verbs + absent) / 2
        + config.bbox_cost * torch.maximum(person_distance, object_distance)
        - config.giou_cost * torch.minimum(person_giou, object_giou)
    )


Matching = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def match(layers: Sequence[HoiPredictions], targets: list[HoiTargets], config: Any) -> list[list[Matching]]:
    """The cheapest assignment of queries to pairs, for each layer and image (Hungarian algorithm).

    Returns:
        For each layer and image the query and pair numbers, sorted by query, on the CPU.

    Raises:
        ImportError: SciPy is not installed.
    """
    if linear_sum_assignment is None:
        raise ImportError(
            "Training human-object interaction detection needs SciPy for the matching, which is not installed: run "
            "`pip install 'hf_dropkey[train]'`, or `pip install scipy`. Inference works without it."
        )
    matchings: list[list[Matching]] = [[] for _ in layers]
    for image, target in enumerate(targets):
        # all layers at once, so that an image costs one copy to the CPU
        stacked = HoiPredictions(
            *(torch.stack([part[image] for part in parts]) for parts in zip(*layers, strict=True))
        )
        costs = torch.nan_to_num(matching_cost(stacked, target, config), WORST_COST, WORST_COST, -WORST_COST)
        for layer, cost in enumerate(costs.cpu().double().numpy()):
            queries, pairs = linear_sum_assignment(cost)
            matchings[layer].append((torch.as_tensor(queries), torch.as_tensor(pairs)))
    return matchings


# --- losses ------------------------------------------------------------------------------------------------------------


class _Processes:
    """Counts over all processes, each the mean over processes so that gradients may be averaged afterwards."""

    def __init__(self) -> None:
        spread = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.number = torch.distributed.get_world_size() if spread else 1

    def mean(self, counts: torch.Tensor) -> torch.Tensor:
        """The mean of each process's `counts`. All processes must call this equally often."""
        if self.number == 1:
            return counts
        counts = counts.clone()
        torch.distributed.all_reduce(counts)
        return counts / self.number


class _Matched(NamedTuple):
    """A layer's queries that are matched, and what they should have found, over the whole batch."""

    images: torch.Tensor
    queries: torch.Tensor
    targets: HoiTargets

    @classmethod
    def gather(cls, matching: list[Matching], targets: list[HoiTargets]) -> "_Matched":
        device = targets[0].person_boxes.device
        images = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(matching)])
        queries = torch.cat([queries for queries, _ in matching])
        parts = [
            HoiTargets(*(part[pairs.to(device)] for part in target))
            for target, (_, pairs) in zip(targets, matching, strict=True)
        ]
        return cls(
            images.to(device), queries.to(device), HoiTargets(*(torch.cat(part) for part in zip(*parts, strict=True)))
        )


def layer_losses(
    predictions: HoiPredictions, matching: list[Matching], targets: list[HoiTargets], config: Any
) -> dict[str, torch.Tensor]:
    """The six losses of one decoder layer, unweighted.

    Returns:
        `loss_object`, `loss_verb`, `loss_person_bbox`, `loss_object_bbox`, `loss_person_giou`, `loss_object_giou`;
        scalars that keep a graph to all heads also where there is no pair.
    """
    matched = _Matched.gather(matching, targets)
    wanted = matched.targets
    place = matched.images, matched.queries
    classes = torch.full(predictions.logits.shape[:2], config.num_labels, device=predictions.logits.device)
    classes[place] = wanted.class_labels
    weights = torch.ones(config.num_labels + 1, device=predictions.logits.device)
    # float32 as in the official code
    weights[-1] = config.eos_coefficient
    weights = weights.to(predictions.logits.dtype)
    verbs = torch.zeros_like(predictions.verb_logits)
    verbs[place] = wanted.verb_labels
    exists = (wanted.object_boxes != 0).any(1)
    counts = torch.stack(
        (exists.new_tensor(len(exists), dtype=weights.dtype), exists.sum(), verbs.sum(), weights[classes].sum())
    )
    processes = _Processes()
    pairs, objects, positives, class_weight = processes.mean(counts)
    pairs, objects = pairs.clamp(min=1 / processes.number), objects + SMALL_COUNT / processes.number

    class_losses = nn.functional.cross_entropy(predictions.logits.mT, classes, weights, reduction="sum")
    person, thing = predictions.person_boxes[place], predictions.object_boxes[place]
    return {
        "loss_object": class_losses / class_weight,
        "loss_verb": verb_loss(predictions.verb_logits, verbs, config.verb_loss, positives, processes.number),
        "loss_person_bbox": (person - wanted.person_boxes).abs().sum() / pairs,
        "loss_object_bbox": ((thing - wanted.object_boxes).abs() * exists[:, None]).sum() / objects,
        "loss_person_giou": (1 - generalised_iou(person, wanted.person_boxes)).sum() / pairs,
        "loss_object_giou": ((1 - generalised_iou(thing, wanted.object_boxes)) * exists).sum() / objects,
    }


def verb_loss(
    logits: torch.Tensor, verbs: torch.Tensor, kind: str, positives: torch.Tensor, processes: int
) -> torch.Tensor:
    """The loss on verbs over all queries; unmatched queries have none.

    Args:
        logits: `[B, Q, V]`.
        verbs: 1.0 for the verbs of a query, else 0.0 `[B, Q, V]`.
        kind: "focal" (Lin et al., 2017, in CornerNet's form) or "bce".
        positives: Number of ones in `verbs`, mean over processes.
        processes: Their number.
    """
    yes, no = nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)
    if kind == "bce":
        return -(verbs * yes + (1 - verbs) * no).mean()
    found = logits.sigmoid()
    total = -(verbs * yes * (1 - found) ** 2 + (1 - verbs) * no * found**2).sum()
    # without any verb the sum is not divided, which for the mean over processes means to multiply it
    return total / torch.where(positives > 0, positives, 1 / processes)


def hoi_loss(
    layers: Sequence[HoiPredictions], labels: list[dict[str, torch.Tensor]], config: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of all losses of all layers, each matched by itself.

    Args:
        layers: Predictions of the decoder layers, the last layer last.
        labels: One dictionary an image, with the keys of `HoiTargets`.
        config: A `DropKeyHoiConfig`.

    Returns:
        The loss, and the unweighted losses by name, those of earlier layers with `_0`, `_1`, ...

    Raises:
        ImportError: SciPy is not installed.
        ValueError: The labels do not fit the predictions.
    """
    if len(labels) != len(layers[-1].logits):
        raise ValueError(f"There are labels of {len(labels)} images, but {len(layers[-1].logits)} images.")
    # half precision would round boxes to a few pixels
    precise = torch.promote_types(layers[-1].logits.dtype, torch.float32)
    layers = [HoiPredictions(*(part.to(precise) for part in layer)) for layer in layers]
    targets = [HoiTargets.of(label, layers[-1]._replace(logits=layers[-1].logits)) for label in labels]
    weights = {
        "loss_object": config.class_loss_coefficient,
        "loss_verb": config.verb_loss_coefficient,
        "loss_person_bbox": config.bbox_loss_coefficient,
        "loss_object_bbox": config.bbox_loss_coefficient,
        "loss_person_giou": config.giou_loss_coefficient,
        "loss_object_giou": config.giou_loss_coefficient,
    }
    losses: dict[str, torch.Tensor] = {}
    total = torch.zeros((), dtype=precise, device=layers[-1].logits.device)
    matchings = match(layers, targets, config)
    for number, (layer, matching) in enumerate(zip(layers, matchings, strict=True)):
        suffix = "" if number == len(layers) - 1 else f"_{number}"
        for name, loss in layer_losses(layer, matching, targets, config).items():
            losses[name + suffix] = loss
            total = total + weights[name] * loss
    return total, losses


__all__ = ["HoiPredictions", "HoiTargets", "hoi_loss", "match"]
