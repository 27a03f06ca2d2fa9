"""Import paths of version 0.1: until version 0.3 each hands on what its module held, with a DeprecationWarning."""

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any


# the module of version 0.1: where its names are now
MOVED = {
    "attention_analysis": ("inspection.analysis",),
    "attention_plots": ("inspection.figures",),
    "attention_recording": ("inspection.recording",),
    "benchmark": ("lab.timing",),
    "callbacks": ("training.callbacks",),
    "cards": ("hub.cards",),
    "checkpoints": (
        "training.checkpoints",
        "saved",
    ),
    "classification": (
        "classification.model",
        "classification.transform",
    ),
    "classification_arguments": (
        "classification.arguments",
        "training.arguments",
    ),
    "classification_trainer": ("classification.job",),
    "data": (
        "classification.data",
        "images.sources",
        "classification.arguments",
    ),
    "detection": (
        "detection.model",
        "detection.arguments",
        "detection.job",
        "training.detr",
    ),
    "detection_data": (
        "detection.data",
        "detection.arguments",
        "images.annotated",
    ),
    "detection_metrics": ("detection.metrics",),
    "detection_transform": (
        "detection.transform",
        "images.boxes",
    ),
    "dispatch": ("patching.dispatch",),
    "evidence": ("lab.evidence",),
    "evidence_cards": ("lab.cards",),
    "experiments": ("lab.grids",),
    "families": ("classification.families",),
    "faults": (
        "training.guards",
        "training.trainer",
    ),
    "hub": ("hub.push",),
    "hub_trainer": ("hub.trainer",),
    "image_checks": ("images.checks",),
    "image_transform": (
        "images.augmentation",
        "classification.transform",
    ),
    "inspection": ("inspection.saved",),
    "legacy_names": ("patching.legacy_names",),
    "metrics": ("classification.metrics",),
    "patching": ("patching.apply",),
    "plots": ("detection.figures",),
    "release_check": ("hub.release_check",),
    "report": ("patching.report",),
    "result_plots": ("lab.figures",),
    "results": (
        "lab.rows",
        "intervals",
        "lab.robustness",
    ),
    "robustness": ("lab.robustness",),
    "sites": ("patching.sites",),
}
# packages now, whose own `__getattr__` forwards; and a module that lost only some of its names
IN_PLACE = ("classification", "detection", "hub", "inspection", "patching", "plots")


def forward(old: str, name: str) -> Any:
    """`hf_dropkey.<old>.<name>` of version 0.1, from where it is now, with a DeprecationWarning.

    Raises:
        AttributeError: There is no such name any more.
    """
    if not name.startswith("__"):
        for module in (f"hf_dropkey.{place}" for place in MOVED[old]):
            if name in vars(import_module(module)):
                warnings.warn(
                    f"hf_dropkey.{old}.{name} is now {module}.{name}; the old path goes with version 0.3",
                    DeprecationWarning,
                    stacklevel=3,
                )
                return getattr(import_module(module), name)
    raise AttributeError(f"module 'hf_dropkey.{old}' has no attribute {name!r}")


class MovedModule(ModuleType):
    """Stands for a module of version 0.1 in `sys.modules`."""

    def __getattr__(self, name: str) -> Any:
        """As `forward`."""
        return forward(self.__name__.partition(".")[2], name)


def install() -> None:
    """Makes the modules of version 0.1 importable; loads nothing."""
    for old in MOVED.keys() - set(IN_PLACE):
        sys.modules.setdefault(f"hf_dropkey.{old}", MovedModule(f"hf_dropkey.{old}", f"Moved to {MOVED[old]}."))
