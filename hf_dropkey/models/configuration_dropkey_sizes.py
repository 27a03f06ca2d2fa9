"""What the configurations of T2T-ViT, VOLO and CeiT share: published sizes by name, and the rule for image sizes.

This file travels with checkpoints: it imports the standard library and its neighbours only.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

from .configuration_dropkey_values import check_values
from .patterns import check_window


# all three families turn squares of 16 x 16 pixels into one token
PATCH_SIZE = 16


def height_and_width(size: int | Iterable[int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or two."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def nearest_sizes(size: int) -> list[int]:
    """The allowed image sides around `size` pixels, smaller first: one if `size` is allowed itself."""
    below = max(PATCH_SIZE, size // PATCH_SIZE * PATCH_SIZE)
    return [below] if size <= below else [below, below + PATCH_SIZE]


def check_image_side(size: int, what: str) -> None:
    """Raises ValueError, naming the nearest allowed sizes, unless `size` pixels are a whole number of patches."""
    if nearest_sizes(size) != [size]:
        raise ValueError(
            f"{what} of {size} pixels is not a multiple of {PATCH_SIZE}, which the strides of this model demand. "
            f"The nearest sizes are {' and '.join(map(str, nearest_sizes(size)))}."
        )


def check_heads(hidden_size: int, heads: int, names: tuple[str, str]) -> None:
    """Raises ValueError unless `heads` divides `hidden_size`; `names` are the two configuration fields."""
    if hidden_size < 1 or heads < 1 or hidden_size % heads:
        raise ValueError(
            f"`{names[0]}` ({hidden_size}) must be a positive multiple of `{names[1]}` ({heads}). "
            f"Change one of them, for example {names[0]}={max(1, hidden_size // max(heads, 1)) * max(heads, 1)}."
        )


class PublishedSizesMixin:
    """Configurations of published sizes by name, and square images in patches of 16 pixels."""

    # size name -> the fields in which it differs from the defaults
    published_sizes: ClassVar[dict[str, dict[str, Any]]] = {}

    image_size: int
    dropkey_pattern: str
    dropkey_window: int

    @classmethod
    def from_size(cls, name: str, **kwargs: Any) -> Any:
        """The configuration of the published size `name`; `kwargs` are further fields and win over the size's own.

        Raises:
            ValueError: No published size has this name; the message lists all that exist.
        """
        if name not in cls.published_sizes:
            raise ValueError(
                f"Unknown size {name!r} for {cls.__name__}. Known sizes: {', '.join(cls.published_sizes)}."
            )
        return cls(**{**cls.published_sizes[name], **kwargs})

    @property
    def patch_sides(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return PATCH_SIZE, PATCH_SIZE

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patch rows and columns of an image of the configured size."""
        return self.grid_of(self.image_size, self.image_size)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Patch rows and columns of an image of `height` x `width` pixels."""
        return height // PATCH_SIZE, width // PATCH_SIZE

    def validate_values(self) -> None:
        """Raises ValueError where a field has a value that no model can be made or trained with."""
        check_values(self)

    def validate_image_size(self) -> None:
        """Raises ValueError unless the image size is a whole number of patches."""
        check_image_side(self.image_size, "`image_size`")

    def check_image_sides(self, height: int, width: int) -> None:
        """Raises ValueError unless both sides of an image, in pixels, are whole numbers of patches."""
        for side, what in ((height, "An image height"), (width, "An image width")):
            check_image_side(side, what)

    def check_pattern_grid(self, grid: tuple[int, int]) -> None:
        """Raises ValueError where a block or cross of the configured window does not fit `grid` (rows, columns)."""
        if self.dropkey_pattern in ("block", "cross"):
            check_window(self.dropkey_window, grid)
