"""The pipeline "body-mesh": a photograph and person boxes to bodies in the photograph. Travels with checkpoints."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Pipeline


try:
    from PIL import Image
    from transformers.image_utils import load_image
except ImportError as error:
    raise ImportError("The pipeline 'body-mesh' reads images with Pillow. Run `pip install pillow`.") from error


# the crop's side as a multiple of the box's longer side
BOX_MARGIN = 1.2
# boxes beyond the image
OUTSIDE_COLOR = (0, 0, 0)

Square = tuple[float, float, float]


def check_box(box: Sequence[float], size: tuple[int, int]) -> None:
    """Raises ValueError unless `box` (x, y, width, height in pixels) has an area and touches an image of `size`."""
    values = [float(value) for value in box]
    if len(values) != 4 or not all(math.isfinite(value) for value in values):
        raise ValueError(f"A box is [x, y, width, height] in pixels, four finite numbers, got {list(box)}.")
    x, y, width, height = values
    if width <= 0 or height <= 0:
        raise ValueError(
            f"The box {values} has no area. Boxes are [x, y, width, height]; corners (x1, y1, x2, y2) become "
            "[x1, y1, x2 - x1, y2 - y1]."
        )
    if x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0:
        raise ValueError(f"The box {values} lies outside the image of {size[0]} x {size[1]} pixels.")


def square_of(box: Sequence[float], margin: float = BOX_MARGIN) -> Square:
    """Left edge, top edge and side of the square around the middle of a box, `margin` times its longer side."""
    x, y, width, height = (float(value) for value in box)
    side = margin * max(width, height)
    return x + (width - side) / 2, y + (height - side) / 2, side


def crop_square(image: "Image.Image", square: Square, size: int) -> "Image.Image":
    """The square of an image at `size` x `size` pixels; what lies outside is black."""
    left, top, side = square
    fill = OUTSIDE_COLOR if image.mode == "RGB" else 0
    shrink = max(1, int(side / size))
    if shrink > 1:
        # bilinear sampling of a much larger square would skip pixels
        box = (math.floor(left), math.floor(top), math.ceil(left + side), math.ceil(top + side))
        cut = image.crop(box).reduce(shrink)
        left, top, side = (left - box[0]) / shrink, (top - box[1]) / shrink, side / shrink
        image = cut
    step = side / size
    return image.transform(
        (size, size),
        Image.Transform.AFFINE,
        (step, 0.0, left, 0.0, step, top),
        resample=Image.Resampling.BILINEAR,
        fillcolor=fill,
    )


def image_camera(camera: Sequence[float], square: Square) -> tuple[float, float, float]:
    """The camera of a crop in pixels of the whole image.

    Args:
        camera: (s, tx, ty) of the crop: drawn at `s * (xy + t)`, -1 to 1.
        square: Left edge, top edge and side of the crop.

    Returns:
        (scale, x, y): a point is drawn at pixel `scale * xy + (x, y)`.
    """
    scale, tx, ty = (float(value) for value in camera)
    left, top, side = square
    half = side / 2
    return half * scale, left + half * (1 + scale * tx), top + half * (1 + scale * ty)


class BodyMeshPipeline(Pipeline):
    """Bodies of the persons in an image.

        bodies = pipeline("body-mesh", model=folder, trust_remote_code=True)
        found = bodies("people.jpg", boxes=[[40, 20, 80, 200]])

    `boxes` are (x, y, width, height) in pixels, one for each person, from a user or a detector. Without boxes the whole
    image is taken for one person. An empty list gives an empty result.

    Each result has, on the CPU:
        box: The box it is of.
        vertices: `[V, 3]` metres around the pelvis: x right, y down, z away from the camera.
        joints: `[J, 3]`, regressed from the mesh.
        joints_2d: `[J, 2]` pixels of the whole image.
        camera: (scale, x, y): a point is drawn at pixel `scale * xy + (x, y)` of the whole image.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def _sanitize_parameters(  # type: ignore[override]  # each pipeline has its own parameters
        self, boxes: Sequence[Sequence[float]] | None = None, timeout: float | None = None
    ) -> tuple[dict, dict, dict]:
        preprocess: dict[str, Any] = {}
        if boxes is not None:
            preprocess["boxes"] = boxes
        if timeout is not None:
            preprocess["timeout"] = timeout
        return preprocess, {}, {}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # the names are this task's
        """Bodies of one image, or a list of such lists for a list of images.

        Args:
            inputs: A path, a URL, a PIL image, or a list of those.
            kwargs: `boxes` of one image, `timeout` in seconds for a URL.

        Raises:
            ValueError: A box has no area or lies outside the image, or `boxes` come with several images.
        """
        if kwargs.get("boxes") is not None and isinstance(inputs, list):
            raise ValueError(
                f"`boxes` belong to one image, but {len(inputs)} images were given. Call the pipeline for each image."
            )
        return super().__call__(inputs, **kwargs)

    def preprocess(  # type: ignore[override]  # as above
        self, image: Any, boxes: Sequence[Sequence[float]] | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """Cuts the persons out."""
        picture = load_image(image, timeout=timeout)
        picture = picture.convert("L" if self.model.config.num_channels == 1 else "RGB")
        found = [[0.0, 0.0, *map(float, picture.size)]] if boxes is None else [list(map(float, box)) for box in boxes]
        for box in found:
            check_box(box, picture.size)
        # a whole image is its own crop
        squares = [square_of(box, 1.0 if boxes is None else BOX_MARGIN) for box in found]
        side = self.model.config.image_size
        crops = [crop_square(picture, square, side) for square in squares]
        pixels = self.image_processor(crops, return_tensors="pt")["pixel_values"] if crops else None
        return {"pixel_values": pixels, "boxes": found, "squares": squares}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]  # as above
        pixels = model_inputs.pop("pixel_values")
        if pixels is None:
            return model_inputs
        outputs = self.model(pixel_values=pixels)
        return {name: outputs[name].float() for name in ("vertices", "mesh_joints", "camera")} | model_inputs

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:  # type: ignore[override]  # as above
        """One result for each person."""
        results = []
        for index, (box, square) in enumerate(zip(model_outputs["boxes"], model_outputs["squares"], strict=True)):
            joints = model_outputs["mesh_joints"][index]
            scale, x, y = image_camera(model_outputs["camera"][index].tolist(), square)
            results.append(
                {
                    "box": box,
                    "vertices": model_outputs["vertices"][index],
                    "joints": joints,
                    "joints_2d": scale * joints[:, :2] + torch.tensor([x, y]),
                    "camera": (scale, x, y),
                }
            )
        return results


__all__ = ["BodyMeshPipeline"]
