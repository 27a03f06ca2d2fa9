"""Configuration of DropKeyViT. This file travels with checkpoints."""

# isort: off
from .compatibility import check_transformers as check_transformers  # first: the next imports fail on old releases
# isort: on

import inspect
from pathlib import Path
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig

from .configuration_dropkey import DropKeyConfigMixin
from .configuration_dropkey_backbone import DropKeyBackboneConfigMixin
from .configuration_dropkey_sizes import check_heads, height_and_width
from .configuration_dropkey_values import check_patches, check_values
from .patterns import check_window


@strict
class DropKeyViTConfig(DropKeyBackboneConfigMixin, DropKeyConfigMixin, ViTConfig):
    """Configuration of a Vision Transformer trained with DropKey.

    All fields of `ViTConfig`, plus the DropKey fields of `DropKeyConfigMixin`. With the same weights, a model in eval
    mode, or with `dropkey_ratio=0`, computes exactly what the plain ViT computes.

    Example:

        config = DropKeyViTConfig(dropkey_ratio=0.3, dropkey_schedule="decreasing")
        model = DropKeyViTForImageClassification(config)

    Raises:
        huggingface_hub.errors.StrictDataclassError: A field has a wrong type or value.
    """

    model_type = "dropkey_vit"

    family_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_dropkey_vit.DropKeyViTConfig",
        "AutoBackbone": "modeling_dropkey_vit.DropKeyViTBackbone",
        "AutoModel": "modeling_dropkey_vit.DropKeyViTModel",
        "AutoModelForImageClassification": "modeling_dropkey_vit.DropKeyViTForImageClassification",
        "AutoModelForMaskedImageModeling": "modeling_dropkey_vit.DropKeyViTForMaskedImageModeling",
    }

    plain_model_types: ClassVar[tuple[str, ...]] = ("vit",)

    @property
    def patch_sides(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return height_and_width(self.patch_size)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patch rows and columns of an image of the configured size."""
        return self.grid_of(*height_and_width(self.image_size))

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Patch rows and columns of an image of `height` x `width` pixels."""
        rows, columns = self.patch_sides
        return height // rows, width // columns

    def check_image_sides(self, height: int, width: int) -> None:
        """Nothing to check: ViT takes any sides, and leaves pixels that fill no patch out."""

    def validate_values(self) -> None:
        """Raises ValueError where a field has a value that no model can be made or trained with."""
        check_values(self)
        check_heads(self.hidden_size, self.num_attention_heads, ("hidden_size", "num_attention_heads"))
        check_patches(self.image_size, self.patch_size)

    def validate_dropkey(self) -> None:
        """As `DropKeyConfigMixin.validate_dropkey`; windows must fit the patch grid."""
        super().validate_dropkey()
        if self.dropkey_pattern in ("block", "cross"):
            # a grid needs them, and checks run in the order of their names
            check_patches(self.image_size, self.patch_size)
            check_window(self.dropkey_window, self.patch_grid)

    def modeling_file(self) -> Path:
        """The source file of the models of this family."""
        # also read by the loader of checkpoint code, which so fetches the models with a configuration
        from .modeling_dropkey_vit import DropKeyViTModel

        return Path(inspect.getfile(DropKeyViTModel))


__all__ = ["DropKeyViTConfig"]
