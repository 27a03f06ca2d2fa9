"""What drop path and patch dropout share: hooks that can be undone, and a rate that the model's configuration remembers."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import logging

from ..models.dropkey import check_ratio
from .adapters import adapter_settings
from .modes import check_owner
from .sites import transformers_model


logger = logging.get_logger("transformers.dropkey")


@dataclass
class _Undo:
    """The hooks, and what the configuration remembered before the first call; None for nothing."""

    handles: list[RemovableHandle]
    before: Any


@dataclass(frozen=True)
class HookedRegulariser:
    """One kind of regulariser that hooks do.

    Attributes:
        function: Name of the public function that applies it.
        field: What a configuration remembers the rate as.
        undo: The attribute of a model that holds its hooks.
        example: A usual rate, for messages.
        dropped: What it drops, in the singular.
    """

    function: str
    field: str
    undo: str
    example: float
    dropped: str

    def rate_for(self, model: nn.Module, root: PreTrainedModel, rate: float | None) -> float:
        """The rate of a call; where it names none, the one that is remembered.

        Raises:
            ValueError: There is none, or it is out of range.
        """
        rate = self._remembered(model, root) if rate is None else rate
        if rate is None:
            raise ValueError(
                f"No rate: pass for example {self.function}(model, {self.example}). Without `rate` it is read from the "
                "model's configuration, and this one holds none from an earlier call."
            )
        try:
            check_ratio(rate, "rate")
        except ValueError as error:
            # its advice is about DropKey
            raise ValueError(
                f"`rate` must lie in [0, 1), got {rate!r}. 0 leaves nothing out; pass for example "
                f"{self.function}(model, {self.example})."
            ) from error
        return rate

    def start(self, root: PreTrainedModel, rate: float) -> tuple[list[RemovableHandle], bool]:
        """Makes room for new hooks, and lets the configuration remember the rate.

        Returns:
            The list that the handles of the hooks go to, and whether those of an earlier call were removed.
        """
        undo: _Undo | None = vars(root).get(self.undo)
        replaced = undo is not None
        if undo is None:
            undo = _Undo([], vars(root.config).get(self.field))
            setattr(root, self.undo, undo)
        _remove_hooks(undo)
        setattr(root.config, self.field, float(rate))
        return undo.handles, replaced

    def remove(self, model: nn.Module) -> None:
        """Undoes all calls: modules and configuration are as before the first one.

        Raises:
            ValueError: There is nothing to undo.
        """
        root = transformers_model(model)
        check_owner(root)
        undo: _Undo | None = vars(root).pop(self.undo, None)
        if undo is None:
            raise ValueError(
                f"{self.function} was not called on this {type(root).__name__}, so there is nothing to remove."
            )
        _remove_hooks(undo)
        if undo.before is None:
            vars(root.config).pop(self.field, None)
        else:
            setattr(root.config, self.field, undo.before)

    def forgotten(self, model: nn.Module) -> float | None:
        """The rate that a model's configuration remembers while no hook follows it; else None."""
        try:
            root = transformers_model(model)
        except (TypeError, ValueError):
            # no Transformers model, or several side by side, of which none speaks for all
            return None
        rate = self._remembered(model, root)
        return rate if rate and self.undo not in vars(root) else None

    def warn_if_forgotten(self, model: nn.Module) -> bool:
        """Warns, and returns True, if a model's configuration has a rate that no hook follows."""
        rate = self.forgotten(model)
        if rate is not None:
            logger.warning(
                "The configuration of %s, or its adapter, has %s %s, but no %s is dropped: call %s(model) to train with it, "
                "or set model.config.%s = 0.",
                type(transformers_model(model)).__name__,
                self.field,
                rate,
                self.dropped,
                self.function,
                self.field,
            )
        return rate is not None

    def _remembered(self, model: nn.Module, root: PreTrainedModel) -> float | None:
        """The rate in a model's configuration, or in that of its adapters."""
        rate = getattr(root.config, self.field, None)
        return adapter_settings(model).get(self.field) if rate is None else rate


def _remove_hooks(undo: _Undo) -> None:
    while undo.handles:
        undo.handles.pop().remove()
