"""Generated scenes are a function of seed and row, and their masks fit their images."""

import numpy as np

from hf_dropkey.segmentation.scenes import SCENE_CLASSES, drawn_scene, make_scene


def test_a_scene_is_a_function_of_its_row() -> None:
    assert drawn_scene("train", 3, 64) == drawn_scene("train", 3, 64)
    drawn_scene.cache_clear()
    image, mask = make_scene("train", 3, 64)
    again, other = make_scene("train", 3, 64)
    assert np.array_equal(image, again) and np.array_equal(mask, other)
    assert drawn_scene("train", 3, 64) != drawn_scene("validation", 3, 64) != drawn_scene("validation", 4, 64)


def test_every_class_occurs_and_masks_have_the_size_of_images() -> None:
    seen = set()
    for row in range(40):
        image, mask = make_scene("train", row, 48)
        assert image.size == (48, 48) and mask.shape == (48, 48)
        seen |= set(np.unique(mask).tolist())
    assert seen == set(range(len(SCENE_CLASSES)))


def test_masks_lie_on_their_shapes() -> None:
    """The same scene at two sizes has the same classes in the same places, up to the borders."""
    for row in range(8):
        small, large = make_scene("train", row, 64)[1], make_scene("train", row, 128)[1]
        assert (small == large[::2, ::2]).mean() > 0.93
