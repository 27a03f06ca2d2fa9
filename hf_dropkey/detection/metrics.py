"""Average precision of detections as COCO computes it, from the outputs of a detection model on.

`pycocotools` does the counting, which comes with the extra `coco`, or `faster-coco-eval`, which gives the same numbers
in less time. Results say which one did.
"""

import contextlib
import io
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import BaseImageProcessor, EvalPrediction

from ..extras import needed
from .data import DetectionSplit


# in the order of pycocotools' COCOeval.stats; AP is the mean over IoU thresholds 0.50, 0.55, ..., 0.95
COCO_METRICS = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR_1",
    "AR_10",
    "AR_100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
# below every score, so that each image has the same number of detections
NO_THRESHOLD = -1.0


CocoPackage = Literal["pycocotools", "faster-coco-eval"]
# the module with `COCO`, the one with the evaluation, and the name of it; the first that is installed is used
COCO_PACKAGES: dict[CocoPackage, tuple[str, str, str]] = {
    "faster-coco-eval": ("faster_coco_eval", "faster_coco_eval", "COCOeval_faster"),
    "pycocotools": ("pycocotools.coco", "pycocotools.cocoeval", "COCOeval"),
}


def coco_package(choice: str = "auto") -> CocoPackage:
    """The package that counts: the one that is chosen, or of "auto" the first that is installed.

    Raises:
        ImportError: It is missing, or both are, or scipy is, with which Transformers' losses match.
        ValueError: The choice is not known.
    """
    with needed("coco"):
        import scipy  # noqa: F401
    if choice == "auto":
        found = [name for name, (module, *_) in COCO_PACKAGES.items() if _installed(module.partition(".")[0])]
        if found:
            return found[0]
        choice = "pycocotools"
    if choice == "faster-coco-eval":
        if not _installed("faster_coco_eval"):
            raise ImportError(
                "faster-coco-eval is not installed; run pip install faster-coco-eval, or leave out --coco_package",
                name="faster_coco_eval",
            )
        return "faster-coco-eval"
    if choice != "pycocotools":
        raise ValueError(f"--coco_package {choice} is not known; choose from auto, {', '.join(COCO_PACKAGES)}")
    with needed("coco"):
        import pycocotools  # noqa: F401
    return "pycocotools"


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    # of a module that was hidden
    except ValueError:
        return False


def package_version(package: CocoPackage) -> str:
    """Name and version of a package, for the results."""
    return f"{package} {version(package)}"


def coco_metrics(
    truth: dict[str, Any], detections: Sequence[dict[str, Any]], *, package: str = "auto"
) -> dict[str, float]:
    """The twelve numbers of COCO's detection challenge, each in [0, 1], or -1 where no object of that size is annotated.

    AP: average precision over ten IoU thresholds, areas and categories; AP50, AP75: at one threshold; small: area below
    32 x 32 pixels, large: above 96 x 96; AR_n: recall with n detections per image and category, of the sizes: with 100.
    https://cocodataset.org/#detection-eval

    Args:
        truth: COCO's document: `images`, `annotations`, `categories`.
        detections: COCO's results: `image_id`, `category_id`, `bbox` ([x, y, width, height] in pixels) and `score`.
        package: Who counts: "pycocotools", "faster-coco-eval", or "auto" for the first of these that is installed, in
            the order of `COCO_PACKAGES`. Their numbers are the same.

    Raises:
        ImportError: The package is missing.
        ValueError: A detection is of an image that is not in `truth`.
    """
    documents, counts, kind = COCO_PACKAGES[coco_package(package)]
    coco_class, evaluation_class = import_module(documents).COCO, getattr(import_module(counts), kind)
    images = {image["id"] for image in truth["images"]}
    strange = sorted({found["image_id"] for found in detections} - images)
    if strange:
        raise ValueError(f"detections of images that are not in the ground truth: {strange[:20]}")
    # it prints its progress and a table
    with contextlib.redirect_stdout(io.StringIO()):
        expected, found = coco_class(), coco_class()
        expected.dataset = {**truth, "annotations": numbered(truth["annotations"])}
        # what pycocotools' loadRes does, which fails for an empty list
        areas = [{**one, "area": one["bbox"][2] * one["bbox"][3], "iscrowd": 0} for one in detections]
        found.dataset = {**truth, "annotations": numbered(areas)}
        expected.createIndex()
        found.createIndex()
        evaluation = evaluation_class(expected, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # the faster one has further numbers behind the twelve
    return dict(zip(COCO_METRICS, map(float, evaluation.stats[: len(COCO_METRICS)]), strict=True))


def numbered(annotations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The annotations with ids from 1 on: pycocotools takes a match with id 0 for none."""
    return [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)]


def post_process(processor: BaseImageProcessor, outputs: Any, frames: torch.Tensor) -> torch.Tensor:
    """The detections of a batch, as the model's image processor reads them off its outputs, without a threshold.

    Args:
        processor: Of the model's family.
        outputs: The model's `logits` `[B, Q, C]` and `pred_boxes` `[B, Q, 4]`.
        frames: Height and width, in pixels, of what the boxes are shares of, `[B, 2]`.

    Returns:
        `[B, K, 6]`: score, class number, x1, y1, x2, y2 in pixels.
    """
    family: Any = processor
    found = family.post_process_object_detection(outputs, threshold=NO_THRESHOLD, target_sizes=frames)
    rows = [torch.cat([one["scores"][:, None], one["labels"][:, None], one["boxes"]], dim=1) for one in found]
    return torch.stack(rows).float()


def coco_results(
    detections: NDArray[np.floating], image: dict[str, Any], category_ids: Sequence[int | None]
) -> list[dict[str, Any]]:
    """COCO's results for one image from its detections `[K, 6]` as `post_process` has them, cut at the image's borders.

    A class without a category (`None`) is left out: nothing annotated could tell whether it is right.
    """
    results = []
    limits = np.array([image["width"], image["height"]] * 2)
    for score, number, *box in detections.tolist():
        category = category_ids[int(number)]
        if category is not None:
            left, upper, right, lower = np.clip(box, 0, limits).tolist()
            corner_and_size = [left, upper, right - left, lower - upper]
            results.append({"image_id": image["id"], "category_id": category, "bbox": corner_and_size, "score": score})
    return results


class CocoMetrics:
    """`compute_metrics` for `detection.DetectionTrainer`: COCO's twelve numbers on the images that were evaluated."""

    def __init__(self, split: DetectionSplit, category_ids: Sequence[int | None], *, package: str = "auto") -> None:
        """`category_ids` has the category id of each class of the model; `package` is as in `coco_metrics`."""
        self.split = split
        self.package = package
        self.category_ids = list(category_ids)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics of detections `[N, K, 6]`; the labels `[N]` are rows of the split."""
        detections: Any = prediction.predictions
        rows: Any = prediction.label_ids
        images = [self.split.images[row] for row in rows.tolist()]
        results = [
            result
            for image, found in zip(images, detections, strict=True)
            for result in coco_results(found, image, self.category_ids)
        ]
        truth = {
            "images": images,
            "annotations": [annotation for image in images for annotation in self.split.boxes[image["id"]]],
            "categories": self.split.categories,
        }
        return coco_metrics(truth, results, package=self.package)
