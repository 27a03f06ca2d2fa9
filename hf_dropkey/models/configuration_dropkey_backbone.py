"""What the configurations of DropKey backbones share: the stages whose feature maps they give.

This file travels with checkpoints: it imports transformers only.
"""

from collections.abc import Sequence
from typing import Any

from transformers.backbone_utils import BackboneConfigMixin


class DropKeyBackboneConfigMixin(BackboneConfigMixin):
    """The stages of a family by name, and the requested ones; goes before the other bases of a configuration.

    `out_features` (names) or `out_indices` (numbers) choose the stages, as in every backbone of Transformers; without them a
    backbone gives the last stage. Only a request is saved, so that a classifier may still change its depth.
    """

    # set by requests alone; None is the last stage
    _out_features: Any = None
    _out_indices: Any = None

    def __post_init__(
        self, out_features: list[str] | None = None, out_indices: Sequence[int] | None = None, **kwargs: Any
    ) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]  # the configuration class this is mixed into has it
        if out_features is not None or out_indices is not None:
            self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    @property
    def stage_depths(self) -> list[int]:
        """Number of layers of each stage after the stem."""
        count: int = self.num_hidden_layers  # type: ignore[attr-defined]  # as above
        return [1] * count

    @property
    def stage_names(self) -> list[str]:
        """The stem, which is the input of the first layer, and the stages, which for most families are the layers."""
        return ["stem", *(f"stage{index}" for index in range(1, len(self.stage_depths) + 1))]

    @property
    def out_features(self) -> list[str]:
        """Names of the stages whose maps a backbone gives."""
        return [self.stage_names[-1]] if self._out_features is None else self._out_features

    @out_features.setter
    def out_features(self, out_features: list[str] | None) -> None:
        self.set_output_features_output_indices(out_features=out_features, out_indices=None)

    @property
    def out_indices(self) -> list[int]:
        """Numbers of these stages, from 0, which is the stem."""
        return [len(self.stage_names) - 1] if self._out_indices is None else self._out_indices

    @out_indices.setter
    def out_indices(self, out_indices: Sequence[int] | None) -> None:
        indices = None if out_indices is None else list(out_indices)
        self.set_output_features_output_indices(out_features=None, out_indices=indices)

    def set_output_features_output_indices(
        self, out_features: list[str] | None, out_indices: Sequence[int] | None
    ) -> None:
        """As in Transformers; without a request there is none, so that a changed depth has another last stage."""
        if out_features is None and out_indices is None:
            self._out_features = self._out_indices = None
        else:
            super().set_output_features_output_indices(out_features, out_indices)  # type: ignore[arg-type]  # any sequence

    def verify_out_features_out_indices(self) -> None:
        """As in Transformers, with an error that names the stages, also for numbers below the first one.

        Raises:
            ValueError: A requested stage does not exist, or the requests contradict each other.
        """
        names = self.stage_names
        unknown = [name for name in self._out_features or [] if name not in names]
        beyond = [index for index in self._out_indices or [] if not -len(names) <= index < len(names)]
        if unknown or beyond:
            raise ValueError(
                f"{type(self).__name__} has no stage {', '.join(repr(stage) for stage in (*unknown, *beyond))}. With this "
                f"depth the stages are {', '.join(names)} (0 to {len(names) - 1}). Choose out_features or out_indices "
                "among them."
            )
        super().verify_out_features_out_indices()

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers; stages that nobody requested are not written."""
        found = super().to_dict()
        return {
            name: value
            for name, value in found.items()
            if value is not None or name not in ("out_features", "out_indices")
        }


__all__ = ["DropKeyBackboneConfigMixin"]
