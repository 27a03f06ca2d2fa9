"""Scores of human-object interaction detection on plain arrays: HICO-DET's protocol, and V-COCO's as QPIC has it.

Boxes are (left, top, right, bottom) in pixels. Areas count the pixel at the right and bottom edge, as the protocols'
official code does. Written from github.com/hitachi-rd-cv/qpic, commit 257f314 (`datasets/hico_eval.py`,
`datasets/vcoco_eval.py`), in our own words; V-COCO's official scenarios are in `vcoco.py`.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .names import VCOCO_ROLE_VERBS


Boxes = NDArray[np.floating]
# both boxes of a pair must overlap an annotated pair's at least so much
SMALLEST_IOU = 0.5
# (pair, verb) predictions of one image that count, the best ones
LARGEST_NUMBER = 100
# HICO-DET calls an (object, verb) class with fewer annotations to train on rare
RARE_BELOW = 10
NO_OBJECT = -1


@dataclass(frozen=True)
class FoundPairs:
    """What a model found in one image; every array has a row for each pair.

    Attributes:
        person_boxes: `[Q, 4]`.
        object_boxes: `[Q, 4]`.
        object_labels: Object classes `[Q]`.
        verb_scores: `[Q, V]`, each including the score of the object class.
    """

    person_boxes: Boxes
    object_boxes: Boxes
    object_labels: NDArray[np.integer]
    verb_scores: NDArray[np.floating]

    def ranked(self, allowed: NDArray[np.floating] | None) -> tuple[NDArray[np.intp], NDArray[np.intp], Any]:
        """Pair, verb and score of the best (pair, verb) predictions, best first; ties in order of pair, then verb.

        Args:
            allowed: 1 where an object class can have a verb, else 0 `[V, O]`; None: everything is allowed.
        """
        scores = np.asarray(self.verb_scores)
        if allowed is not None:
            scores = scores * allowed[:, self.object_labels].T
        best = np.argsort(-scores, axis=None, kind="stable")[:LARGEST_NUMBER]
        pairs, verbs = np.unravel_index(best, scores.shape)
        return pairs, verbs, scores[pairs, verbs]


@dataclass(frozen=True)
class TruePairs:
    """What is annotated in one image.

    Attributes:
        boxes: `[n, 4]`.
        labels: Class of each box `[n]`.
        pairs: Person's box, object's box (-1: none) and verb of each interaction `[m, 3]`.
    """

    boxes: Boxes
    labels: NDArray[np.integer]
    pairs: NDArray[np.integer]

    def objects(self) -> set[int]:
        """The classes of the objects that somebody acts on."""
        return {int(self.labels[thing]) for thing in np.asarray(self.pairs).reshape(-1, 3)[:, 1] if thing >= 0}


def overlaps(first: Boxes, second: Boxes) -> Boxes:
    """IoU `[N, M]` of boxes `[N, 4]` and `[M, 4]` whose edges count as a pixel; 0 where they only touch."""
    first, second = (np.asarray(boxes, dtype=np.float64).reshape(-1, 4) for boxes in (first, second))
    upper = np.maximum(first[:, None, :2], second[:, :2])
    lower = np.minimum(first[:, None, 2:], second[:, 2:])
    shared = (lower - upper + 1).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2] + 1).prod(-1) for boxes in (first, second)]
    together = areas[0][:, None] + areas[1] - shared
    touching = (lower <= upper).any(-1) | (together <= 0)
    return np.where(touching, 0.0, shared / np.where(touching, 1.0, together))


def eleven_point_ap(hits: Sequence[bool], scores: Sequence[float], positives: int) -> tuple[float, float]:
    """Average precision at eleven recalls (Pascal VOC 2007), and the largest recall.

    Args:
        hits: Whether each prediction is right.
        scores: Its score; ties stay in the order given.
        positives: Number of annotated interactions, above 0.
    """
    if not len(hits):
        return 0.0, 0.0
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    right = np.cumsum(np.asarray(hits, dtype=np.float64)[order])
    recall, precision = right / positives, right / np.arange(1, len(order) + 1)
    # the official thresholds, rounding included: 0.30000000000000004
    levels = np.arange(0.0, 1.1, 0.1)
    return float(sum(precision[recall >= level].max(initial=0.0) / 11 for level in levels)), float(recall.max())


def match_image(
    found: FoundPairs, truth: TruePairs, person_label: int, allowed: NDArray[np.floating] | None
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.floating], NDArray[np.bool_]]:
    """The ranked predictions of one image and which are right: object classes, verbs, scores, hits.

    A prediction takes the annotated interaction of its verb and classes that overlaps it best in the worse of both
    boxes; one that is taken already makes it wrong.
    """
    pairs, verbs, scores = found.ranked(allowed)
    # the official code finds the first of equal annotations, so that the others are never hit
    annotated = np.unique(np.asarray(truth.pairs).reshape(-1, 3), axis=0).astype(np.int64)
    boxes = np.asarray(truth.boxes).reshape(-1, 4)
    labels = np.asarray(truth.labels)
    persons = overlaps(found.person_boxes, boxes) * (labels == person_label)
    things = overlaps(found.object_boxes, boxes) * (np.asarray(found.object_labels)[:, None] == labels)
    # the last column is for interactions without an object, for which the person alone counts
    things = np.concatenate([things, np.ones((len(things), 1))], axis=1)
    fit = np.minimum(persons[:, annotated[:, 0]], things[:, annotated[:, 1]])
    taken = np.zeros(len(annotated), dtype=bool)
    hits = np.zeros(len(pairs), dtype=bool)
    for place, (pair, verb) in enumerate(zip(pairs, verbs, strict=True)):
        worth = np.where(annotated[:, 2] == verb, fit[pair], 0.0)
        if len(worth) and worth.max() >= SMALLEST_IOU:
            best = int(worth.argmax())
            hits[place] = not taken[best]
            taken[best] = True
    return np.asarray(found.object_labels)[pairs], verbs, scores, hits


# --- HICO-DET ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassScore:
    """Scores of one (object, verb) class.

    Attributes:
        object: The object class.
        verb: The verb.
        positives: Annotated interactions in the images that were evaluated.
        ap: Average precision, [0, 1].
        known_object_ap: The same among images with the object only.
        recall: The largest recall, [0, 1].
        rare: Whether the class is rare in the training data; None: not known.
    """

    object: int
    verb: int
    positives: int
    ap: float
    known_object_ap: float
    recall: float
    rare: bool | None


@dataclass(frozen=True)
class HicoScores:
    """Scores by HICO-DET's protocol, class by class."""

    classes: list[ClassScore]

    def metrics(self) -> dict[str, float]:
        """The means that papers report, in [0, 1]; a group without classes has none."""
        groups = {
            "": self.classes,
            "_rare": [one for one in self.classes if one.rare is True],
            "_non_rare": [one for one in self.classes if one.rare is False],
        }
        means = {}
        for name, group in groups.items():
            if group:
                means[f"mAP{name}"] = float(np.mean([one.ap for one in group]))
                means[f"mAP_known_object{name}"] = float(np.mean([one.known_object_ap for one in group]))
        if self.classes:
            means["mean_max_recall"] = float(np.mean([one.recall for one in self.classes]))
        return means

    def table(self, objects: Sequence[str], verbs: Sequence[str]) -> str:
        """A line for each class, the most frequent first, with the names of classes."""
        width = max([len(objects[one.object]) + len(verbs[one.verb]) + 1 for one in self.classes] + [5])
        lines = [f"{'class':<{width}} number     AP  known  recall"]
        for one in sorted(self.classes, key=lambda one: -one.positives):
            name = f"{verbs[one.verb]} {objects[one.object]}"
            numbers = f"{one.positives:>6} {one.ap:>6.3f} {one.known_object_ap:>6.3f} {one.recall:>7.3f}"
            lines.append(f"{name:<{width}} {numbers}{' rare' if one.rare else ''}")
        return "\n".join(lines)


def hico_scores(
    predictions: Sequence[FoundPairs],
    truths: Sequence[TruePairs],
    *,
    person_label: int = 0,
    allowed: NDArray[np.floating] | None = None,
    rare: Collection[tuple[int, int]] | None = None,
    images_with_object: Mapping[int, Collection[int]] | None = None,
    count_images_without_boxes: bool = False,
) -> HicoScores:
    """Average precision of each (object, verb) class as HICO-DET has it: default and known object, all, rare, non-rare.

    Args:
        predictions: What a model found in each image.
        truths: What is annotated there, in the same order.
        person_label: The class of persons among the labels of boxes.
        allowed: 1 where an object class can have a verb, else 0 `[V, O]` (HICO-DET's `corre`); None: no limit.
        rare: The (object, verb) classes that are rare in the training data (`rare_classes`); None: not known.
        images_with_object: For each object class the places of the images that have it, for the known-object setting.
            Official are the images with any positive image-level label of the object, more than have boxes. Default:
            the images with an annotated interaction with it, which leaves out a few more false predictions.
        count_images_without_boxes: Count the predictions of images without any box as wrong, as the official MATLAB
            code does; QPIC's Python, whose numbers papers of its line report, does not.

    Returns:
        The scores of the classes that are annotated; predictions of other classes count nowhere, as in both codes.

    Raises:
        ValueError: There are not as many predictions as images.
    """
    if len(predictions) != len(truths):
        raise ValueError(f"There are predictions of {len(predictions)} images and annotations of {len(truths)}.")
    positives = annotated_classes(truths)
    if images_with_object is None:
        found_in = [truth.objects() for truth in truths]
        images_with_object = {
            thing: {image for image, things in enumerate(found_in) if thing in things} for thing, _ in positives
        }
    collected: dict[tuple[int, int], list[tuple[float, bool, int]]] = {name: [] for name in positives}
    for image, (found, truth) in enumerate(zip(predictions, truths, strict=True)):
        if len(truth.boxes) or count_images_without_boxes:
            for thing, verb, score, hit in zip(*match_image(found, truth, person_label, allowed), strict=True):
                if (int(thing), int(verb)) in collected:
                    collected[int(thing), int(verb)].append((float(score), bool(hit), image))
    classes = []
    for (thing, verb), rows in sorted(collected.items()):
        known = [row for row in rows if row[2] in images_with_object.get(thing, ())]
        number = positives[thing, verb]
        ap, recall = eleven_point_ap([row[1] for row in rows], [row[0] for row in rows], number)
        known_ap, _ = eleven_point_ap([row[1] for row in known], [row[0] for row in known], number)
        is_rare = None if rare is None else (thing, verb) in rare
        classes.append(ClassScore(thing, verb, number, ap, known_ap, recall, is_rare))
    return HicoScores(classes)


def annotated_classes(truths: Iterable[TruePairs]) -> Counter[tuple[int, int]]:
    """How often each (object, verb) class is annotated; interactions without an object are of no class."""
    return Counter(
        (int(truth.labels[thing]), int(verb))
        for truth in truths
        for _, thing, verb in np.asarray(truth.pairs).reshape(-1, 3)
        if thing >= 0
    )


def rare_classes(training: Iterable[TruePairs], known: Iterable[tuple[int, int]] = ()) -> set[tuple[int, int]]:
    """The (object, verb) classes with fewer than 10 annotated interactions in the training data.

    Args:
        training: The annotations to train on.
        known: Classes that are rare if the training data lacks them.
    """
    counts = annotated_classes(training)
    return {name for name in {*counts, *known} if counts[name] < RARE_BELOW}


# --- V-COCO as QPIC approximates it ------------------------------------------------------------------------------------


def qpic_vcoco_scores(
    predictions: Sequence[FoundPairs],
    truths: Sequence[TruePairs],
    verbs: Sequence[str],
    *,
    person_label: int = 0,
    allowed: NDArray[np.floating] | None = None,
    role_verbs: Sequence[str] = VCOCO_ROLE_VERBS,
) -> dict[str, float]:
    """QPIC's own approximation of V-COCO's role AP: neither scenario 1 nor scenario 2 (see `vcoco.py`).

    Args:
        predictions, truths, person_label, allowed: As of `hico_scores`; the object class behind the last column of
            `allowed` is the missing object, which may have every verb.
        verbs: Name of each verb.
        role_verbs: The verbs of `mAP_thesis`; those that the data lacks count as 0.

    Returns:
        `AP_<verb>` of each annotated verb, their mean `mAP_all`, and `mAP_thesis`, the mean over `role_verbs`.

    Raises:
        ValueError: There are not as many predictions as images, or no interaction is annotated.
    """
    if len(predictions) != len(truths):
        raise ValueError(f"There are predictions of {len(predictions)} images and annotations of {len(truths)}.")
    if allowed is not None:
        allowed = np.concatenate([allowed, np.ones((len(allowed), 1))], axis=1)
    positives = Counter(int(verb) for truth in truths for verb in np.asarray(truth.pairs).reshape(-1, 3)[:, 2])
    if not positives:
        raise ValueError("No interaction is annotated in these images; there is nothing to score.")
    collected: dict[int, list[tuple[float, bool]]] = {verb: [] for verb in positives}
    for found, truth in zip(predictions, truths, strict=True):
        for _, verb, score, hit in zip(*match_image(found, truth, person_label, allowed), strict=True):
            if int(verb) in collected:
                collected[int(verb)].append((float(score), bool(hit)))
    ap = {
        verbs[verb]: eleven_point_ap([row[1] for row in rows], [row[0] for row in rows], positives[verb])[0]
        for verb, rows in sorted(collected.items())
    }
    return {
        **{f"AP_{name}": value for name, value in ap.items()},
        "mAP_all": float(np.mean(list(ap.values()))),
        "mAP_thesis": sum(ap.get(name, 0.0) for name in role_verbs) / len(role_verbs),
    }
