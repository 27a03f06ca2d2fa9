"""What the values of a configuration's fields must be, beyond their types, for a model to be made and trained.

Transformers checks types only, so that a value that cannot be fails when the model is built, in the first step, or never.
This file travels with checkpoints: it imports transformers only.
"""

import math
from collections.abc import Sequence
from typing import Any

from transformers.activations import ACT2FN


# fields by what they hold; a configuration has some of them
RATIOS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "performer_dropout_prob",
    "drop_path_rate",
)
COUNTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "num_channels",
    "encoder_stride",
    "pooler_output_size",
    "stem_size",
    "outlook_hidden_size",
    "num_outlook_heads",
)
POSITIVE = ("mlp_ratio", "layer_norm_eps")
ACTIVATIONS = ("hidden_act", "pooler_act")


def check_values(config: Any) -> None:
    """Raises ValueError naming the field, its value and what is allowed."""
    for name in RATIOS:
        value = getattr(config, name, 0)
        if not 0 <= value < 1:
            raise ValueError(f"`{name}` must lie in [0, 1), got {value!r}.")
    for name in COUNTS:
        value = getattr(config, name, 1)
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value!r}.")
    for name in POSITIVE:
        value = getattr(config, name, 1)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"`{name}` must be a number above 0, got {value!r}.")
    spread = config.initializer_range
    if not (spread >= 0 and math.isfinite(spread)):
        raise ValueError(f"`initializer_range` must be a number of at least 0, got {spread!r}.")
    for name in ACTIVATIONS:
        value = getattr(config, name, "gelu")
        if value not in ACT2FN:
            raise ValueError(
                f"`{name}` {value!r} is not an activation of Transformers. Choose for example 'gelu' or 'relu'."
            )


def check_patches(image_size: int | Sequence[int], patch_size: int | Sequence[int]) -> None:
    """Raises ValueError unless both are one number of pixels or two, at least 1, and a patch fits into the image."""
    image, patch = _pair(image_size, "image_size"), _pair(patch_size, "patch_size")
    if patch[0] > image[0] or patch[1] > image[1]:
        raise ValueError(
            f"`patch_size` ({patch_size!r}) is larger than `image_size` ({image_size!r}), so that an image has no patch. "
            "Choose smaller patches."
        )


def _pair(size: int | Sequence[int], name: str) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"`{name}` must be a number of pixels, or height and width, each at least 1, got {size!r}.")
    return pair[0], pair[1]
