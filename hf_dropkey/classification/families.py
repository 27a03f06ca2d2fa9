"""The families of image classifiers in this package: their classes, their sizes by name, and how images reach them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import ViTImageProcessorPil
from transformers.image_utils import PILImageResampling
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..models.configuration_dropkey_ceit import DropKeyCeitConfig
from ..models.configuration_dropkey_t2t_vit import DropKeyT2TViTConfig
from ..models.configuration_dropkey_vit import DropKeyViTConfig
from ..models.configuration_dropkey_volo import DropKeyVoloConfig
from ..models.modeling_dropkey_ceit import DropKeyCeitForImageClassification
from ..models.modeling_dropkey_t2t_vit import DropKeyT2TViTForImageClassification
from ..models.modeling_dropkey_vit import DropKeyViTForImageClassification
from ..models.modeling_dropkey_volo import DropKeyVoloForImageClassification


# of every family, for images of a few pixels
SMALLEST = "nano"
# tiny, small and base are those of Touvron et al., DeiT, ICML 2021, table 1
VIT_SIZES = {
    SMALLEST: {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128},
    "tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        config_class: The configuration class.
        model_class: The classifier class.
        sizes: Size name to configuration fields, from the smallest on.
        usual_size: The size to start with on photographs.
        photo_shape: Image size, and patch size where there is a choice, for photographs.
        digits_shape: The same for the built-in digits, which are enlarged to it.
        crop_ratio: From size name and image size to the fraction of the resized image's side that evaluation keeps;
            above 1, the image is padded. None: the whole image, squeezed into a square.
        model_types: The configurations that training can start from.
    """

    config_class: Any
    model_class: Any
    sizes: dict[str, dict[str, Any]]
    usual_size: str
    photo_shape: dict[str, int]
    digits_shape: dict[str, int]
    crop_ratio: Callable[[str, int], float] | None
    model_types: tuple[str, ...]


def volo_crop_ratio(size: str, image_size: int) -> float:
    """The crop that VOLO's published accuracies were measured with."""
    if image_size <= 224:
        return 0.96
    return 1.15 if size in ("volo_d4", "volo_d5") else 1.0


FAMILIES = {
    "vit": Family(
        DropKeyViTConfig,
        DropKeyViTForImageClassification,
        VIT_SIZES,
        usual_size="tiny",
        photo_shape={"image_size": 224, "patch_size": 16},
        digits_shape={"image_size": 12, "patch_size": 2},
        crop_ratio=None,
        model_types=("vit", "dropkey_vit"),
    ),
    "t2t_vit": Family(
        DropKeyT2TViTConfig,
        DropKeyT2TViTForImageClassification,
        {
            SMALLEST: {
                "hidden_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "mlp_ratio": 2.0,
                "token_size": 16,
            },
            **DropKeyT2TViTConfig.published_sizes,
        },
        usual_size="t2t_vit_14",
        photo_shape={"image_size": 224},
        digits_shape={"image_size": 64},
        crop_ratio=lambda size, image_size: 0.9,
        model_types=("dropkey_t2t_vit",),
    ),
    "volo": Family(
        DropKeyVoloConfig,
        DropKeyVoloForImageClassification,
        {
            SMALLEST: {
                "depths": [2, 3],
                "hidden_size": 64,
                "num_attention_heads": 4,
                "outlook_hidden_size": 32,
                "num_outlook_heads": 2,
                "num_class_layers": 1,
                "stem_size": 16,
                "mlp_ratio": 2.0,
            },
            **DropKeyVoloConfig.published_sizes,
        },
        usual_size="volo_d1",
        photo_shape={"image_size": 224},
        digits_shape={"image_size": 64},
        crop_ratio=volo_crop_ratio,
        model_types=("dropkey_volo",),
    ),
    "ceit": Family(
        DropKeyCeitConfig,
        DropKeyCeitForImageClassification,
        {
            SMALLEST: {
                "hidden_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "mlp_ratio": 2.0,
                "stem_size": 16,
            },
            **DropKeyCeitConfig.published_sizes,
        },
        usual_size="ceit_tiny",
        photo_shape={"image_size": 224},
        digits_shape={"image_size": 64},
        # 256 to 224 pixels
        crop_ratio=lambda size, image_size: 0.875,
        model_types=("dropkey_ceit",),
    ),
}


def family_of(model_type: Any) -> str | None:
    """The family that can start from a configuration of this `model_type`; None if no family can."""
    return next((name for name, family in FAMILIES.items() if model_type in family.model_types), None)


def image_processor(family: str, size: str, image_size: int, *, num_channels: int = 3) -> ViTImageProcessorPil:
    """The family's evaluation transform.

    ViT takes the whole image, in a square. The others resize the shorter side, crop the centre, and normalise as they
    do on ImageNet. Grey images are normalised with mean and standard deviation 0.5.
    """
    square = {"height": image_size, "width": image_size}
    color = num_channels == 3
    grey = [0.5] * num_channels
    ratio = FAMILIES[family].crop_ratio
    if ratio is None:
        return ViTImageProcessorPil(size=square, image_mean=grey, image_std=grey, do_convert_rgb=color)
    return ViTImageProcessorPil(
        do_convert_rgb=color,
        size={"shortest_edge": int(image_size / ratio(size, image_size))},
        resample=PILImageResampling.BICUBIC,
        do_center_crop=True,
        crop_size=square,
        image_mean=IMAGENET_DEFAULT_MEAN if color else grey,
        image_std=IMAGENET_DEFAULT_STD if color else grey,
    )
