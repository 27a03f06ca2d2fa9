"""`pipeline("human-object-interaction", model=...)`: from images to pairs. This file travels with checkpoints.

It imports torch and transformers only.
"""

from typing import Any

import torch
from transformers import Pipeline
from transformers.image_utils import load_image


class HoiPipeline(Pipeline):
    """Finds pairs of a person and an object, and the verbs between them, in images.

    Images are paths, URLs or PIL images, one or a list. Options of a call or of the pipeline: `threshold`, `top_k` and
    `nms`, as of `DropKeyHoiForObjectDetection.post_process`, which also says what comes out; and `timeout`, seconds to
    wait for an image of a URL.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not callable(getattr(self.model, "post_process", None)):
            raise ValueError(
                f"{type(self.model).__name__} finds no pairs of persons and objects. Load a model of type dropkey_hoi."
            )
        if self.image_processor is None:
            raise ValueError(
                "The model comes without an image processor (preprocessor_config.json); pass image_processor=, for "
                "example a DetrImageProcessor of the size the model was trained at."
            )

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        allowed = {"timeout": 0, "threshold": 1, "top_k": 1, "nms": 1}
        unknown = sorted(set(kwargs) - set(allowed))
        if unknown:
            raise TypeError(f"HoiPipeline does not take {unknown}; it takes {list(allowed)}.")
        before = {name: value for name, value in kwargs.items() if allowed[name] == 0}
        after = {name: value for name, value in kwargs.items() if allowed[name] == 1}
        return before, {}, after

    def preprocess(self, input_: Any, timeout: float | None = None) -> dict[str, Any]:
        """One image as the model takes it, and its size."""
        image = load_image(input_, timeout=timeout).convert("RGB")
        inputs = self.image_processor(images=[image], return_tensors="pt").to(self.dtype)
        inputs["target_size"] = torch.tensor([[image.height, image.width]])
        return inputs

    def _forward(self, input_tensors: dict[str, Any], **parameters: Any) -> dict[str, Any]:
        target_size = input_tensors.pop("target_size")
        outputs = self.model(**input_tensors)
        names = ("logits", "verb_logits", "person_boxes", "object_boxes")
        kept = type(outputs)(**{name: outputs[name] for name in names})
        kept["target_size"] = target_size
        return kept

    def postprocess(self, model_outputs: Any, **parameters: Any) -> list[dict[str, Any]]:
        """The pairs of one image, the best first."""
        return self.model.post_process(model_outputs, model_outputs["target_size"], **parameters)[0]


__all__ = ["HoiPipeline"]
