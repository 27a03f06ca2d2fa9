"""Where DropKey acts in a saved model, without reading its weights: `inspect_folder`."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..patching.apply import SETTING_NAMES, apply_dropkey
from ..patching.report import DropKeyReport, RegularisedAttention
from ..patching.sites import UnreachedAttention, find_attention, idle_reason
from ..saved import load_config, one_error, saved_class


SHOWN = ("schedule", "ratio", "final_ratio", "pattern")


def inspect_folder(folder: Path) -> str:
    """The settings in a saved configuration, and each attention of the model with its ratio and backend.

    Raises:
        FileNotFoundError: The folder has no configuration.
        ValueError: The class of the saved model is not known.
    """
    model = empty_model(folder)
    config = model.config
    settings = {name: getattr(config, f"dropkey_{name}", None) for name in SETTING_NAMES if name in SHOWN}
    if settings["ratio"] is None:
        sites, _ = find_attention(model)
        return (
            f"{type(model).__name__}: no DropKey settings; apply_dropkey(model, ratio=...) can reach "
            f"{len(sites)} attentions"
        )
    lines = [f"{name:<12}  {settings[name]}" for name in SHOWN]
    return "\n".join([*lines, str(attention_report(model))])


def attention_report(model: PreTrainedModel) -> DropKeyReport:
    """Every attention of a model with the ratio that its configuration implies."""
    sites, unreached = find_attention(model)
    if not any(site.native for site in sites):
        return apply_dropkey(model, verbose=False)
    config: Any = model.config
    chosen, others = [], list(unreached)
    started: dict[str, int] = {}
    for site in sites:
        module: Any = site.module
        depth = started.get(site.stack, 0)
        reason = idle_reason(site, depth == 0)
        if reason is None and site.kind == "cross" and not getattr(config, "dropkey_cross_attention", True):
            reason = "switched off by the configuration's dropkey_cross_attention=False"
        started[site.stack] = depth + 1
        if reason is None:
            backend = config._attn_implementation
            chosen.append(
                RegularisedAttention(site.name, depth, site.kind, site.side, float(module.dropkey_ratio), backend)
            )
        else:
            others.append(UnreachedAttention(site.name, reason))
    return DropKeyReport(type(model).__name__, config.dropkey_pattern, tuple(chosen), tuple(others))


def empty_model(folder: Path) -> PreTrainedModel:
    """A model of the class that a folder was saved as, without weights; runs no code of the folder.

    Raises:
        FileNotFoundError: The folder has no configuration.
        ValueError: Neither this package nor Transformers has the class.
    """
    config = load_config(folder)
    cls: Any = saved_class(config, folder)
    with one_error(f"{folder / 'config.json'} makes no {cls.__name__}"), torch.device("meta"):
        model: PreTrainedModel = cls._from_config(config)
    return model
