"""Stops with one clear sentence where a checkpoint's code meets a Transformers release that it cannot run on.

Configuration files import this first, because their next imports fail obscurely on old releases. This file travels
with checkpoints: it imports nothing but transformers' version.
"""

import transformers


# 5.9 rebuilt ViT; before 5.13 custom classes could not register how their checkpoints convert
MINIMUM_TRANSFORMERS, NEXT_TRANSFORMERS = (5, 13), (6, 0)


def check_transformers(version: str) -> None:
    """Raises ImportError unless `version` of Transformers can run this code."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if not MINIMUM_TRANSFORMERS <= (major, minor) < NEXT_TRANSFORMERS:
        raise ImportError(
            f"DropKey models need transformers>=5.13,<6, but {version} is installed: "
            "run `pip install 'transformers>=5.13,<6'`."
        )


check_transformers(transformers.__version__)
