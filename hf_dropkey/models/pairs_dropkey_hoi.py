"""From raw outputs of human-object interaction detection to pairs: as arrays for scores, as dictionaries for people.

This file travels with checkpoints: it imports torch only.
"""

from typing import Any, NamedTuple, TypedDict

import torch


class Pair(TypedDict):
    """A person, an object and the verbs between them. Boxes are (left, top, right, bottom) in pixels."""

    person_box: list[float]
    object_box: list[float] | None
    object: str | None
    object_score: float
    verbs: dict[str, float]


class PairArrays(NamedTuple):
    """All queries of one image, in QPIC's terms.

    Attributes:
        person_boxes: (left, top, right, bottom) in pixels `[Q, 4]`.
        object_boxes: The same of the objects.
        object_labels: Best object class, "no pair" left aside `[Q]`.
        object_scores: Its probability `[Q]`.
        verb_scores: Probability of each verb times that of the object class `[Q, V]`.
    """

    person_boxes: torch.Tensor
    object_boxes: torch.Tensor
    object_labels: torch.Tensor
    object_scores: torch.Tensor
    verb_scores: torch.Tensor


@torch.no_grad()
def pair_arrays(outputs: Any, target_sizes: Any) -> list[PairArrays]:
    """Boxes in pixels and scores of all queries of each image (QPIC's post-processing).

    Args:
        outputs: Has `logits`, `verb_logits`, `person_boxes` and `object_boxes`.
        target_sizes: Height and width in pixels of each image `[B, 2]`.

    Raises:
        ValueError: The number of images differs.
    """
    precise = torch.promote_types(outputs.logits.dtype, torch.float32)
    sizes = torch.as_tensor(target_sizes, device=outputs.logits.device).to(precise)
    if sizes.ndim != 2 or tuple(sizes.shape) != (len(outputs.logits), 2):
        raise ValueError(
            f"`target_sizes` must hold height and width of each of {len(outputs.logits)} images, got the shape "
            f"{tuple(sizes.shape)}."
        )
    scale = sizes.flip(1).repeat(1, 2)[:, None]
    boxes = []
    for part in (outputs.person_boxes, outputs.object_boxes):
        centre, size = part.to(precise)[..., :2], part.to(precise)[..., 2:]
        boxes.append(torch.cat((centre - size / 2, centre + size / 2), dim=-1) * scale)
    scores, labels = outputs.logits.to(precise).softmax(-1)[..., :-1].max(-1)
    verbs = outputs.verb_logits.to(precise).sigmoid() * scores[..., None]
    return [PairArrays(*parts) for parts in zip(*boxes, labels, scores, verbs, strict=True)]


def find_pairs(
    outputs: Any,
    target_sizes: Any,
    *,
    objects: list[str],
    verbs: list[str],
    missing_label: int | None = None,
    threshold: float = 0.1,
    top_k: int | None = 100,
    nms: float | None = None,
) -> list[list[Pair]]:
    """Readable pairs of each image; see `DropKeyHoiForObjectDetection.post_process`.

    Args:
        outputs: As of `pair_arrays`.
        target_sizes: As of `pair_arrays`.
        objects: Names of the object classes.
        verbs: Names of the verbs.
        missing_label: The object class that means no object.
        threshold, top_k, nms: As of `post_process`.
    """
    for name, value in (("threshold", threshold), ("nms", nms)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be in [0, 1], got {value!r}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, or None for all pairs, got {top_k!r}.")
    return [
        _readable(arrays, objects, verbs, missing_label, threshold, top_k, nms)
        for arrays in pair_arrays(outputs, target_sizes)
    ]


def _readable(
    arrays: PairArrays,
    objects: list[str],
    verbs: list[str],
    missing_label: int | None,
    threshold: float,
    top_k: int | None,
    nms: float | None,
) -> list[Pair]:
    """The pairs of one image."""
    best = arrays.verb_scores.max(-1).values
    order = best.argsort(descending=True, stable=True)
    order = order[best[order] >= threshold]
    if nms is not None:
        order = order[_distinct(PairArrays(*(part[order] for part in arrays)), missing_label, nms)]
    found: list[Pair] = []
    for query in order[:top_k].tolist():
        scores = arrays.verb_scores[query]
        ranked = scores.argsort(descending=True, stable=True)
        label = int(arrays.object_labels[query])
        missing = label == missing_label
        found.append(
            {
                "person_box": arrays.person_boxes[query].tolist(),
                "object_box": None if missing else arrays.object_boxes[query].tolist(),
                "object": None if missing else objects[label],
                "object_score": arrays.object_scores[query].item(),
                "verbs": {verbs[verb]: scores[verb].item() for verb in ranked if scores[verb] >= threshold},
            }
        )
    return found


def _distinct(arrays: PairArrays, missing_label: int | None, nms: float) -> list[int]:
    """The pairs, given best first, that no better kept pair of the same object class overlaps in both boxes."""
    overlap = box_iou(arrays.person_boxes, arrays.person_boxes)
    things = box_iou(arrays.object_boxes, arrays.object_boxes)
    # a missing object has no box to differ by
    missing = arrays.object_labels == (-1 if missing_label is None else missing_label)
    overlap = torch.minimum(overlap, torch.where(missing[:, None] & missing, torch.ones_like(things), things))
    same = arrays.object_labels[:, None] == arrays.object_labels
    repeats = ((overlap > nms) & same).tolist()
    kept: list[int] = []
    for pair, row in enumerate(repeats):
        if not any(row[better] for better in kept):
            kept.append(pair)
    return kept


def box_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """IoU `[N, M]` of boxes (left, top, right, bottom) `[N, 4]` and `[M, 4]`; 0 where both are empty."""
    inner = torch.minimum(first[:, None, 2:], second[:, 2:]) - torch.maximum(first[:, None, :2], second[:, :2])
    shared = inner.clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1] - shared
    return torch.where(union > 0, shared / union.clamp(min=torch.finfo(union.dtype).tiny), torch.zeros_like(union))
