"""V-COCO's official role AP, scenario 1 and 2, on plain arrays, and the reader of its files.

Written from a description of github.com/s-gupta/v-coco (`vsrl_eval.py`), which fails on current NumPy. Boxes are (left,
top, right, bottom) in pixels; those of COCO end at left + width - 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .metrics import SMALLEST_IOU, FoundPairs
from .names import VCOCO_VERBS


SCENARIOS = (1, 2)
# papers leave this role out, whose images are too few
LEFT_OUT = ("point_instr",)
PERSON_CATEGORY = 1


@dataclass(frozen=True)
class Action:
    """An action and the roles of its objects; some actions have none."""

    name: str
    roles: tuple[str, ...]


@dataclass(frozen=True)
class ActionTruth:
    """The persons of one image.

    Attributes:
        boxes: `[n, 4]`.
        labels: 1 where a person does an action, 0 where not, -1 in all of a person's row who is not annotated `[n, A]`.
        role_boxes: Box of the object in each role, NaN where there is none `[n, A, R, 4]`.
    """

    boxes: NDArray[np.floating]
    labels: NDArray[np.integer]
    role_boxes: NDArray[np.floating]


@dataclass(frozen=True)
class ActionPredictions:
    """Persons that a model found in one image, one row for each pair.

    Attributes:
        boxes: `[m, 4]`.
        scores: Of each action and role, NaN where nothing is predicted `[m, A, R]`.
        role_boxes: Box of the object, NaN or all zeros where the role is thought missing `[m, A, R, 4]`.
    """

    boxes: NDArray[np.floating]
    scores: NDArray[np.floating]
    role_boxes: NDArray[np.floating]


def vcoco_role_ap(
    predictions: Sequence[ActionPredictions],
    truths: Sequence[ActionTruth],
    actions: Sequence[Action],
    *,
    scenario: int,
) -> dict[str, float]:
    """Average precision of each role, named `<action>_<role>`; NaN where no person does the action.

    A prediction belongs to the annotated person that overlaps it most, and is skipped where that person's actions are
    not annotated, or where there is no person. It is right if this person is overlapped by half, does the action, was
    not found before, and the role fits. Where no object is annotated, scenario 1 wants none predicted, and scenario 2
    accepts anything.

    Args:
        predictions: Of each image.
        truths: Of the same images, in the same order.
        actions: In the order of the arrays.
        scenario: 1 or 2.

    Raises:
        ValueError: The scenario is another, or there are not as many predictions as images.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"V-COCO has the scenarios 1 and 2, got {scenario!r}.")
    if len(predictions) != len(truths):
        raise ValueError(f"There are predictions of {len(predictions)} images and annotations of {len(truths)}.")
    scores: dict[str, float] = {}
    for number, action in enumerate(actions):
        positives = sum(int((truth.labels[:, number] == 1).sum()) for truth in truths)
        for place, role in enumerate(action.roles):
            rows = [
                row
                for found, truth in zip(predictions, truths, strict=True)
                for row in role_hits(found, truth, number, place, scenario)
            ]
            scores[f"{action.name}_{role}"] = envelope_ap(rows, positives)
    return scores


def role_hits(
    found: ActionPredictions, truth: ActionTruth, action: int, role: int, scenario: int
) -> list[tuple[float, bool]]:
    """Score of each prediction of one image and role that counts, and whether it is right, best first."""
    chosen = np.flatnonzero(~np.isnan(found.scores[:, action, role]))
    order = chosen[np.argsort(-found.scores[chosen, action, role], kind="stable")]
    if not len(truth.boxes):
        return []
    persons = vcoco_overlaps(found.boxes, truth.boxes)
    unannotated = (truth.labels == -1).any(axis=1)
    covered = np.zeros(len(truth.boxes), dtype=bool)
    rows = []
    for row in order:
        person = int(persons[row].argmax())
        if unannotated[person]:
            continue
        wanted, given = truth.role_boxes[person, action, role], found.role_boxes[row, action, role]
        if np.isnan(wanted).all():
            fits = scenario == 2 or bool(np.isnan(given).all() or (given == 0).all())
        else:
            fits = not np.isnan(given).any() and vcoco_overlaps(given[None], wanted[None])[0, 0] >= SMALLEST_IOU
        right = bool(truth.labels[person, action] == 1 and persons[row, person] >= SMALLEST_IOU and fits)
        rows.append((float(found.scores[row, action, role]), right and not covered[person]))
        covered[person] |= right
    return rows


def vcoco_overlaps(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.floating]:
    """IoU `[N, M]` whose edges count as a pixel, also in the overlap of boxes that only touch."""
    upper = np.maximum(first[:, None, :2], second[:, :2])
    lower = np.minimum(first[:, None, 2:], second[:, 2:])
    shared = np.maximum(lower - upper + 1, 0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2] + 1).prod(-1) for boxes in (first, second)]
    return np.asarray(shared / (areas[0][:, None] + areas[1] - shared))


def envelope_ap(rows: Sequence[tuple[float, bool]], positives: int) -> float:
    """Area under the precision that no larger recall exceeds; NaN without positives."""
    if not positives:
        return float("nan")
    order = np.argsort(-np.array([score for score, _ in rows]), kind="stable")
    right = np.cumsum(np.array([hit for _, hit in rows], dtype=np.float64)[order])
    recall = np.concatenate([[0.0], right / positives, [1.0]])
    precision = np.concatenate([[0.0], right / np.arange(1, len(rows) + 1), [0.0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(np.diff(recall))
    return float(((recall[steps + 1] - recall[steps]) * precision[steps + 1]).sum())


def vcoco_scores(
    predictions: Sequence[ActionPredictions],
    truths: Sequence[ActionTruth],
    actions: Sequence[Action],
    *,
    leave_out: Sequence[str] = LEFT_OUT,
) -> dict[str, float]:
    """`AP_role_scenario_1` and `AP_role_scenario_2`, means over roles, and the AP of each role in both.

    Args:
        predictions, truths, actions: As of `vcoco_role_ap`.
        leave_out: Roles that the means leave out, as papers do.
    """
    scores: dict[str, float] = {}
    for scenario in SCENARIOS:
        roles = vcoco_role_ap(predictions, truths, actions, scenario=scenario)
        counted = [value for name, value in roles.items() if name not in leave_out and not np.isnan(value)]
        if counted:
            scores[f"AP_role_scenario_{scenario}"] = float(np.mean(counted))
        scores |= {f"AP_{name}_scenario_{scenario}": ap for name, ap in roles.items() if not np.isnan(ap)}
    return scores


# --- V-COCO's files ----------------------------------------------------------------------------------------------------


def read_actions(verbs: Sequence[Mapping[str, Any]]) -> list[Action]:
    """The actions of V-COCO's document, each with its roles but that of the person."""
    return [Action(verb["action_name"], tuple(verb["role_name"][1:])) for verb in verbs]


def read_truths(
    verbs: Sequence[Mapping[str, Any]], coco: Mapping[str, Any], image_ids: Sequence[int]
) -> list[ActionTruth]:
    """The persons of each image, from V-COCO's document and the COCO instances that it refers to.

    Args:
        verbs: V-COCO's: `action_name`, `role_name`, and the arrays `image_id`, `ann_id`, `label` and `role_object_id`.
        coco: COCO's instances, `annotations` at least.
        image_ids: The images to score, in the order of the result.
    """
    boxes = {one["id"]: corner_box(one["bbox"]) for one in coco["annotations"]}
    persons: dict[int, list[int]] = {image: [] for image in image_ids}
    for one in coco["annotations"]:
        if one["image_id"] in persons and one["category_id"] == PERSON_CATEGORY:
            persons[one["image_id"]].append(one["id"])
    place = {person: row for people in persons.values() for row, person in enumerate(people)}
    roles = max(len(action.roles) for action in read_actions(verbs))
    truths = {
        image: ActionTruth(
            np.array([boxes[person] for person in people], dtype=np.float64).reshape(-1, 4),
            np.full((len(people), len(verbs)), -1),
            np.full((len(people), len(verbs), roles, 4), np.nan),
        )
        for image, people in persons.items()
    }
    for number, verb in enumerate(verbs):
        # persons of all images, role after role, the person's own first
        objects = np.array(verb["role_object_id"]).reshape(len(verb["role_name"]), -1)[1:].T
        for image, person, label, things in zip(verb["image_id"], verb["ann_id"], verb["label"], objects, strict=True):
            if image in truths and person in place:
                truths[image].labels[place[person], number] = label
                for role, thing in enumerate(things):
                    if thing > 0:
                        truths[image].role_boxes[place[person], number, role] = boxes[int(thing)]
    return [truths[image] for image in image_ids]


def corner_box(box: Sequence[float]) -> list[float]:
    """(left, top, right, bottom) of COCO's (left, top, width, height), as V-COCO counts pixels."""
    left, top, width, height = box
    return [left, top, left + max(0.0, width - 1), top + max(0.0, height - 1)]


def read_predictions(
    detections: Sequence[Mapping[str, Any]], actions: Sequence[Action], image_ids: Sequence[int]
) -> list[ActionPredictions]:
    """Predictions as V-COCO's toolkit takes them: dictionaries with `image_id`, `person_box`, `<action>_<role>`.

    A role is a box and a score; None or NaN in the box means that the role is missing.
    """
    by_image: dict[int, list[Mapping[str, Any]]] = {image: [] for image in image_ids}
    for one in detections:
        if one["image_id"] in by_image:
            by_image[one["image_id"]].append(one)
    roles = max(len(action.roles) for action in actions)
    predictions = []
    for found in by_image.values():
        scores = np.full((len(found), len(actions), roles), np.nan)
        boxes = np.full((len(found), len(actions), roles, 4), np.nan)
        for row, one in enumerate(found):
            for number, action in enumerate(actions):
                for place, role in enumerate(action.roles):
                    values = one.get(f"{action.name}_{role}")
                    if values is not None:
                        *box, score = (np.nan if value is None else value for value in values)
                        boxes[row, number, place], scores[row, number, place] = box, score
        persons = np.array([one["person_box"] for one in found], dtype=np.float64).reshape(-1, 4)
        predictions.append(ActionPredictions(persons, scores, boxes))
    return predictions


def vcoco_actions(verbs: Sequence[str] = VCOCO_VERBS) -> list[Action]:
    """The actions behind verb names such as "cut_instr" and "cut_obj", in order of first mention."""
    roles: dict[str, list[str]] = {}
    for verb in verbs:
        action, role = split_role(verb)
        roles.setdefault(action, []).extend([role] if role else [])
    return [Action(name, tuple(found)) for name, found in roles.items()]


def split_role(verb: str) -> tuple[str, str | None]:
    """Action and role of a verb name: ("cut", "instr") of "cut_instr", ("walk", None) of "walk"."""
    action, _, role = verb.rpartition("_")
    return (action, role) if role in ("obj", "instr") else (verb, None)


def action_predictions(
    found: FoundPairs,
    *,
    missing_label: int | None,
    verbs: Sequence[str] = VCOCO_VERBS,
    allowed: NDArray[np.floating] | None = None,
) -> ActionPredictions:
    """A model's pairs as V-COCO's scores take them.

    Args:
        found: The pairs of one image.
        missing_label: The object class that means no object.
        verbs: Names of the verbs, `<action>_<role>` or `<action>`.
        allowed: 1 where an object class can have a verb, else 0 `[V, O]`, with or without a column for the missing
            object, which may have every verb.
    """
    actions = vcoco_actions(verbs)
    roles = max(len(action.roles) for action in actions)
    count = len(found.person_boxes)
    labels = np.asarray(found.object_labels)
    scores = np.asarray(found.verb_scores, dtype=np.float64)
    if allowed is not None:
        wide = np.concatenate([allowed, np.ones((len(allowed), 1))], axis=1)
        scores = scores * wide[:, labels].T
    boxes = np.array(found.object_boxes, dtype=np.float64)
    if missing_label is not None:
        boxes[labels == missing_label] = np.nan
    made = np.full((count, len(actions), roles), np.nan)
    role_boxes = np.full((count, len(actions), roles, 4), np.nan)
    numbers = {action.name: number for number, action in enumerate(actions)}
    for column, verb in enumerate(verbs):
        name, role = split_role(verb)
        if role is not None:
            place = actions[numbers[name]].roles.index(role)
            made[:, numbers[name], place] = scores[:, column]
            role_boxes[:, numbers[name], place] = boxes
    return ActionPredictions(np.asarray(found.person_boxes, dtype=np.float64), made, role_boxes)
