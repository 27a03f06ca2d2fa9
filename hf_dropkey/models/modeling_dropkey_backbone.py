"""What the DropKey backbones share: feature maps of the requested stages. This file travels with checkpoints."""

from itertools import accumulate
from typing import Any, Unpack

import torch
from torch import nn
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import TransformersKwargs, can_return_tuple


class DropKeyBackboneMixin(BackboneMixin):
    """Feature maps of a family's base model; goes before that model in the bases.

    Tokens behind the class token become maps `[B, C, rows, columns]`, normalised by the model's last norm where it has one
    of their width. Images of any size are taken: position embeddings are resized, and zeros at the right and at the
    bottom fill the last patches.
    """

    config: Any

    def __init__(self, config: Any, **kwargs: Any):
        super().__init__(config, **kwargs)
        self.num_features: list[int] = self.stage_widths()

    def stage_widths(self) -> list[int]:
        """Channels of each stage, the stem first."""
        return [self.config.hidden_size] * len(self.config.stage_names)

    def stage_scales(self) -> list[int]:
        """Rows of each stage for one row of patches, the stem first."""
        return [1] * len(self.config.stage_names)

    def stage_norm(self) -> nn.Module | None:
        """The norm of maps that are `hidden_size` wide."""
        model: Any = self
        return model.layernorm

    @property
    def out_features(self) -> list[str]:
        """Names of the stages whose maps come out."""
        names: list[str] = self.config.out_features
        return names

    @out_features.setter
    def out_features(self, out_features: list[str] | None) -> None:
        self.config.out_features = out_features

    @property
    def out_indices(self) -> list[int]:
        """Numbers of the stages whose maps come out."""
        indices: list[int] = self.config.out_indices
        return indices

    @out_indices.setter
    def out_indices(self, out_indices: tuple[int, ...] | list[int] | None) -> None:
        self.config.out_indices = out_indices

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """Feature maps of images.

        Args:
            pixel_values: `[B, C, height, width]`, of any size.
            kwargs: `output_attentions`, `output_hidden_states`, `return_dict`.

        Returns:
            The maps of the requested stages, in their order, `[B, channels, rows, columns]` each, and what was requested.

        Raises:
            ValueError: `pixel_values` is missing or has not four axes.
        """
        padded = self._padded(pixel_values)
        # the base model's, past the placeholder of Transformers' mixin
        encode: Any = super(BackboneMixin, self).forward  # type: ignore[misc]  # as said
        outputs = encode(padded, **{**kwargs, "return_dict": True, "interpolate_pos_encoding": True})
        ends = [0, *accumulate(self.config.stage_depths)]
        grid = self.config.grid_of(*padded.shape[2:])
        maps: Any = tuple(
            self._map(outputs.hidden_states[end], width, (grid[0] * scale, grid[1] * scale))
            for name, end, width, scale in zip(
                self.config.stage_names, ends, self.num_features, self.stage_scales(), strict=True
            )
            if name in self.out_features
        )
        return BackboneOutput(feature_maps=maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    def _padded(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The images, with zeros up to a whole number of patches; what is no batch of images is left to the base model."""
        if pixel_values is None or pixel_values.ndim != 4:
            return pixel_values
        missing = [-side % patch for side, patch in zip(pixel_values.shape[2:], self.config.patch_sides, strict=True)]
        return nn.functional.pad(pixel_values, (0, missing[1], 0, missing[0])) if any(missing) else pixel_values

    def _map(self, tokens: torch.Tensor, width: int, grid: tuple[int, int]) -> torch.Tensor:
        """The tokens of a stage as a map `[B, C, rows, columns]`, without a class token in front."""
        patches = tokens[:, -grid[0] * grid[1] :]
        norm = self.stage_norm()
        if norm is not None and width == self.config.hidden_size:
            patches = norm(patches)
        return patches.transpose(1, 2).unflatten(2, grid)


__all__ = ["DropKeyBackboneMixin"]
