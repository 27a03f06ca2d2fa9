"""Configuration of a linear classifier on the features of any vision model. This file travels with checkpoints."""

# isort: off
from .compatibility import check_transformers as check_transformers  # first: the next imports fail on old releases
# isort: on

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


POOLINGS = ("pooler", "class", "mean")


@strict
class DropKeyFeaturesConfig(PreTrainedConfig):
    """Configuration of a classifier for vision models of Transformers that have none, such as DINOv3 or CLIP's.

    DropKey acts where `apply_dropkey` puts it in the vision model.

    Args:
        features_config (`dict` or `PreTrainedConfig`):
            Configuration of the vision model, which `AutoModel` builds.
        pooling (`str`, defaults to `"pooler"`):
            What the classifier reads: the model's `pooler_output`, the first token (`"class"`), or the mean of all tokens
            (`"mean"`).
    """

    model_type = "dropkey_features"
    sub_configs = {"features_config": AutoConfig}

    features_config: dict | PreTrainedConfig | None = None
    pooling: str = "pooler"

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.features_config, dict):
            found = dict(self.features_config)
            self.features_config = AutoConfig.for_model(found.pop("model_type"), **found)
        super().__post_init__(**kwargs)

    def validate_pooling(self) -> None:
        """Raises ValueError for an unknown pooling."""
        if self.pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be one of {', '.join(POOLINGS)}, got {self.pooling!r}.")

    @property
    def image_size(self) -> Any:
        """Side, or height and width, of the images that the vision model was made for, in pixels."""
        return getattr(self.features_config, "image_size", None)

    @property
    def patch_size(self) -> Any:
        """Side of a patch in pixels."""
        return getattr(self.features_config, "patch_size", None)

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return int(getattr(self.features_config, "num_channels", 3))

    @property
    def width(self) -> int:
        """Width of the features.

        Raises:
            ValueError: The vision model's configuration does not say.
        """
        own: Any = self.features_config
        found = getattr(own, "hidden_size", None) or next(iter(reversed(getattr(own, "hidden_sizes", [None]))))
        if not isinstance(found, int):
            raise ValueError(
                f"{type(own).__name__} has neither `hidden_size` nor `hidden_sizes`; choose another model."
            )
        return found
