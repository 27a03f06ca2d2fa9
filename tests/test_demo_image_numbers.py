"""The numbers of image processors are followed as the processors are, or the processor is refused."""

from typing import Any

import numpy as np
import pytest
from small_demos import noise
from transformers import BitImageProcessorPil, ConvNextImageProcessorPil, ViTImageProcessorPil

from hf_dropkey.demo.image_numbers import image_numbers


def test_the_settings_are_those_of_the_processor() -> None:
    found = image_numbers(BitImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 12}), 3)
    assert found.settings() == {
        "channels": 3,
        "height": 16,
        "width": 12,
        "resize": {"size": {"shortest_edge": 20}, "resampling": "bicubic"},
        "crop": {"height": 16, "width": 12},
        "rescale_factor": 1 / 255,
        "normalize": {
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
        },
    }


@pytest.mark.parametrize(("height", "width"), [(16, 12), (30, 31), (9, 40)])
def test_a_crop_is_that_of_the_processor(height: int, width: int) -> None:
    processor: Any = BitImageProcessorPil(size={"shortest_edge": 21}, crop_size={"height": height, "width": width})
    found = image_numbers(processor, 3)
    for size in ((50, 22), (22, 50), (21, 21)):
        expected = processor([noise(*size)], return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(found.follow(noise(*size)), expected, atol=1e-6)


class Inverted(ViTImageProcessorPil):
    """Does something that its settings do not say."""

    def rescale(self, image: Any, scale: float, *arguments: Any, **more: Any) -> Any:
        return 1 - super().rescale(image, scale, *arguments, **more)


@pytest.mark.parametrize(
    ("processor", "problem"),
    [
        (ViTImageProcessorPil(size={"shortest_edge": 20}), "makes images of several sizes"),
        (ViTImageProcessorPil(size={"shortest_edge": 20, "longest_edge": 40}), "resizes to {'longest_edge': 40"),
        (ViTImageProcessorPil(do_resize=False), "makes images of several sizes"),
        (Inverted(size={"height": 12, "width": 12}), "makes values that differ by"),
        # crops a fraction of what it resizes to
        (ConvNextImageProcessorPil(size={"shortest_edge": 24}), "makes images of several sizes"),
    ],
    ids=["shortest edge", "two edges", "any size", "inverted", "fraction"],
)
def test_what_the_page_does_not_do_is_refused(processor: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=f"{problem}.*Serve the page with hf-dropkey demo, which uses the processor"):
        image_numbers(processor, 3)
