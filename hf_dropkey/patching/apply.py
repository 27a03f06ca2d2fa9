"""DropKey on any Transformers model by one call, and back: `apply_dropkey`, `remove_dropkey`, and temporary changes.

Settings live as plain attributes on the attention modules (`dropkey_ratio`, `dropkey_pattern`, `dropkey_window`) and,
to be remembered in checkpoints, as flat fields of the model's configuration. `dispatch.py` says how a module comes to
drop keys; models of this package do so by themselves, and only their settings change here.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import Enum
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..models.attention import DROPKEY_BACKENDS
from ..models.dropkey import (
    PATTERNS,
    SCHEDULES,
    check_choice,
    check_ratio,
    hold_ratio_data,
    layer_ratios,
    release_ratio_data,
)
from ..models.sample_masks import number_layers
from .adapters import adapter_settings
from .dispatch import (
    WINDOWED_PATTERNS,
    DropKeyConfigView,
    SeenPixels,
    has_windows,
    leave_sample_ids,
    take_sample_ids,
    takes_pixels,
)
from .legacy_names import convert_legacy_names
from .modes import check_owner, check_threads, held_mode, owned
from .report import DropKeyReport, RegularisedAttention
from .sites import AttentionSite, UnreachedAttention, find_attention, idle_reason, transformers_model


# below Transformers' own logger, whose verbosity users set
logger = logging.get_logger("transformers.dropkey")

MODULE_STATE = (
    "config",
    "dropkey_ratio",
    "dropkey_pattern",
    "dropkey_window",
    "dropkey_configured",
    "dropkey_owner_config",
    "dropkey_base_ratio",
    "dropkey_pixels",
    "dropkey_layer",
    "dropkey_windowed",
)


@dataclass(frozen=True, kw_only=True)
class DropKeySettings:
    """The arguments of `apply_dropkey` that a configuration remembers, each as the field `dropkey_<name>`."""

    ratio: float
    final_ratio: float = 0.0
    schedule: str = "decreasing"
    pattern: str = "score"
    window: int = 3
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    cross_attention: bool = False
    with_attention_dropout: bool = False

    def __post_init__(self) -> None:
        # under the names of the arguments: `apply_dropkey` takes no others
        check_ratio(self.ratio, "ratio")
        check_ratio(self.final_ratio, "final_ratio")
        check_choice(self.schedule, SCHEDULES, "schedule")
        check_choice(self.pattern, PATTERNS, "pattern")
        layer_ratios(1, self.ratio, self.final_ratio, self.schedule)
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"`window` must be a whole number of patches, at least 1, got {self.window!r}.")

    @classmethod
    def resolve(
        cls, config: PreTrainedConfig, adapter: Mapping[str, Any] = MappingProxyType({}), **given: Any
    ) -> "DropKeySettings":
        """What is given, else what the configuration remembers, else an adapter (`adapter_settings`), else the default."""
        chosen: dict[str, Any] = {}
        for name in SETTING_NAMES:
            value = given.get(name)
            value = getattr(config, f"dropkey_{name}", None) if value is None else value
            value = adapter.get(f"dropkey_{name}") if value is None else value
            if value is not None:
                chosen[name] = _patterns(value) if name in ("include", "exclude") else value
        if "ratio" not in chosen:
            raise ValueError(
                "No drop ratio: pass for example apply_dropkey(model, ratio=0.1). Without `ratio` the settings are read "
                "from the model's configuration, and this one holds none from an earlier call."
            )
        return cls(**chosen)

    def remember(self, config: PreTrainedConfig) -> None:
        """Writes the settings to a configuration, in types that JSON knows."""
        for name in SETTING_NAMES:
            value = getattr(self, name)
            setattr(config, f"dropkey_{name}", list(value) if isinstance(value, tuple) else value)


SETTING_NAMES = tuple(field.name for field in fields(DropKeySettings))
# not `_attn_implementation`, whose setter also changes sub-configurations
BACKEND_FIELD = "_attn_implementation_internal"
CONFIG_STATE = (*(f"dropkey_{name}" for name in SETTING_NAMES), BACKEND_FIELD)
UNDO = "_dropkey_undo"


def _patterns(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


class _Absent(Enum):
    """Stands for an attribute that an object does not have."""

    ABSENT = "absent"


@dataclass(frozen=True)
class _Snapshot:
    """Attributes of attention modules and configurations, to be put back."""

    states: list[tuple[Any, dict[str, Any]]]

    @classmethod
    def take(cls, root: PreTrainedModel) -> "_Snapshot":
        sites, _ = find_attention(root)
        configs = {id(config): config for site in sites for config in site.configs} | {id(root.config): root.config}
        states: list[tuple[Any, dict[str, Any]]] = [(site.module, _read(site.module, MODULE_STATE)) for site in sites]
        return cls(states + [(config, _read(config, CONFIG_STATE)) for config in configs.values()])

    def restore(self, applied: dict[int, str]) -> None:
        """Puts the attributes back; the backend of a configuration only if it is still the one `applied` by its id."""
        for owner, state in self.states:
            for name, value in state.items():
                if name == BACKEND_FIELD and applied.get(id(owner)) != owner._attn_implementation:
                    continue
                if value is not _Absent.ABSENT:
                    setattr(owner, name, value)
                elif name in vars(owner):
                    delattr(owner, name)
            if "dropkey_ratio" not in vars(owner):
                release_ratio_data(owner)


def _read(owner: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: vars(owner).get(name, _Absent.ABSENT) for name in names}


@dataclass
class _Undo:
    """What `remove_dropkey` needs: the state before the first call, the backends requested, the hooks."""

    before: _Snapshot
    backends: list[tuple[PreTrainedConfig, str]]
    hook: RemovableHandle
    pixels: SeenPixels = field(default_factory=SeenPixels)
    pixel_hooks: list[RemovableHandle] = field(default_factory=list)
    sample_hooks: list[RemovableHandle] = field(default_factory=list)

    def applied(self) -> dict[int, str]:
        return {id(config): backend for config, backend in self.backends}


def apply_dropkey(
    model: nn.Module,
    ratio: float | None = None,
    *,
    final_ratio: float | None = None,
    schedule: str | None = None,
    pattern: str | None = None,
    window: int | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    cross_attention: bool | None = None,
    with_attention_dropout: bool | None = None,
    backend: str | None = None,
    verbose: bool = False,
) -> DropKeyReport:
    """Makes the attention of a Transformers model drop keys in training, in place.

    What is not given is taken from the model's configuration, where an earlier call, perhaps before the model was saved,
    left its settings; then from an adapter of PEFT that remembers some; then from the defaults. So `apply_dropkey(model)`
    after `from_pretrained` re-applies them. A second call replaces the first. `model.save_pretrained` goes on to write a
    plain Transformers checkpoint.

    The schedule runs over the attentions that drop keys, in order of execution, separately in each stack of layers
    (encoder, decoder, vision tower, text tower). DETR's first decoder self-attention, which attends to a constant,
    and attentions with a single key take no part.

    Args:
        model: A Transformers model, or a module that wraps one (PEFT, `torch.compile`, DDP).
        ratio: Largest drop ratio, [0, 1).
        final_ratio: Ratio at the other end of each ramp, [0, ratio]; default 0.
        schedule: "decreasing" (default), "constant" or "increasing".
        pattern: "score" (default), "key", "token", "block" or "cross".
        window: Side of a block or arm of a cross, in patches; default 3.
        include: Shell patterns (`*`, `?`, `[...]`) of whole module names to regularise, as the report shows them.
        exclude: Shell patterns of module names to leave out.
        cross_attention: Drop keys in cross-attention too; default False.
        with_attention_dropout: Allow dropout on attention weights beside DropKey, which is meant to replace it.
        backend: Attention implementation to move the model to; default the one it has.
        verbose: Print the report too (on the first process only). It is logged at INFO, so Transformers' verbosity
            (`transformers.logging.set_verbosity_info()`) shows it.

    Returns:
        Every attention of the model: those that drop keys and those that do not, with the reason.

    Raises:
        TypeError: No Transformers model.
        RuntimeError: Another thread is in a `dropkey` block of the model.
        ValueError: Nothing was reached, a pattern matches nothing, a setting is out of range, or the backend cannot
            leave out single scores. The model is then unchanged.
    """
    root: Any = transformers_model(model)
    check_owner(root)
    settings = DropKeySettings.resolve(
        root.config,
        # what is given makes two adapters that disagree a matter of no concern
        adapter_settings(model) if ratio is None else {},
        ratio=ratio,
        final_ratio=final_ratio,
        schedule=schedule,
        pattern=pattern,
        window=window,
        include=include,
        exclude=exclude,
        cross_attention=cross_attention,
        with_attention_dropout=with_attention_dropout,
    )
    chosen, unreached = _select(root, settings)
    _check_backends(chosen, settings, backend)
    _check_attention_dropout(chosen, settings)
    undo: _Undo | None = vars(root).get(UNDO)
    replaced = undo is not None
    if undo is None:
        undo = _Undo(_Snapshot.take(root), [], root.register_load_state_dict_pre_hook(convert_legacy_names))
        root._dropkey_undo = undo
    else:
        undo.before.restore({})
    if backend is not None:
        _move(root, chosen, backend)
    report = DropKeyReport(
        type(root).__name__,
        settings.pattern,
        tuple(_install(chosen, settings, undo.pixels, root.config)),
        tuple(unreached),
        replaced,
    )
    _leave_out(root, chosen, settings)
    _watch_pixels(root, undo)
    number_layers(root)
    _watch_samples(root, undo)
    settings.remember(root.config)
    if int(os.environ.get("RANK", 0)) == 0:
        logger.info("%s", report)
        if verbose:
            print(report)
    return report


def _select(root: PreTrainedModel, settings: DropKeySettings) -> tuple[list[AttentionSite], list[UnreachedAttention]]:
    """The sites that the settings ask for, and all other attentions with the reason."""
    sites, unreached = find_attention(root)
    names = [site.name for site in sites]
    for pattern in (*settings.include, *settings.exclude):
        if names and not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"The pattern {pattern!r} matches no attention that can drop keys in {type(root).__name__}. Patterns "
                f"match whole names, for example '*{names[0].rpartition('.')[2]}'. Names: {', '.join(names)}."
            )
    chosen = []
    started: set[str] = set()
    for site in sites:
        reason = idle_reason(site, site.stack not in started) or _left_out(site, settings)
        started.add(site.stack)
        if reason is None:
            chosen.append(site)
        else:
            unreached.append(UnreachedAttention(site.name, reason))
    if not chosen:
        seen = "; ".join(f"{attention.name}: {attention.reason}" for attention in unreached) or "no attention at all"
        raise ValueError(f"DropKey reaches no attention of {type(root).__name__}. Seen: {seen}.")
    return chosen, unreached


def _left_out(site: AttentionSite, settings: DropKeySettings) -> str | None:
    if site.kind == "cross" and not settings.cross_attention:
        return "cross-attention; pass cross_attention=True"
    if not any(fnmatchcase(site.name, pattern) for pattern in settings.include):
        return f"not in include={list(settings.include)}"
    if any(fnmatchcase(site.name, pattern) for pattern in settings.exclude):
        return f"in exclude={list(settings.exclude)}"
    return None


def _backend(site: AttentionSite) -> str:
    return site.configs[0]._attn_implementation or "eager"


def _check_backends(chosen: list[AttentionSite], settings: DropKeySettings, backend: str | None) -> None:
    # the pattern "token" leaves whole keys out, which every backend can
    every = settings.pattern == "token"
    if backend is not None:
        if not every:
            check_choice(backend, tuple(DROPKEY_BACKENDS), "backend")
        for owner in {id(site.owner): site.owner for site in chosen}.values():
            # raises where Transformers knows that the model does not support it
            owner.get_correct_attn_implementation(backend)
        return
    for site in chosen:
        if settings.ratio > 0 and not every and _backend(site) not in DROPKEY_BACKENDS:
            raise ValueError(
                f"{site.name} runs on attn_implementation={_backend(site)!r}, which cannot leave out single attention "
                f"scores. Pass backend= one of {', '.join(map(repr, DROPKEY_BACKENDS))}, or pattern='token'."
            )


def _check_attention_dropout(chosen: list[AttentionSite], settings: DropKeySettings) -> None:
    for site in chosen:
        config = site.configs[0]
        for name in ("attention_probs_dropout_prob", "attention_dropout"):
            dropout = getattr(config, name, 0.0)
            # 0.0 where a model has no such number (some keep a module or None under the name)
            if not isinstance(dropout, (int, float)) or dropout == 0 or settings.ratio == 0:
                continue
            if not settings.with_attention_dropout:
                raise ValueError(
                    f"The configuration of {site.name} has `{name}` {dropout}, and DropKey replaces dropout on attention "
                    f"weights. Load the model with {name}=0.0, or pass with_attention_dropout=True if you mean both."
                )


def _move(root: PreTrainedModel, chosen: list[AttentionSite], backend: str) -> None:
    """Moves the chosen sites, and the masks made for them, to a backend.

    `set_attn_implementation` would move all sub-models, and raises where one is convolutional.
    """
    configs = {id(config): config for site in chosen for config in site.configs}
    for config in configs.values():
        setattr(config, BACKEND_FIELD, backend)
    undo: _Undo = vars(root)[UNDO]
    undo.backends = [entry for entry in undo.backends if id(entry[0]) not in configs]
    undo.backends += [(config, backend) for config in configs.values()]


def _install(
    chosen: list[AttentionSite], settings: DropKeySettings, pixels: SeenPixels, config: PreTrainedConfig
) -> Iterator[RegularisedAttention]:
    """Sets the chosen modules up, stack by stack in order of execution; `config` is what remembers the settings."""
    stacks: dict[str, list[AttentionSite]] = {}
    for site in chosen:
        stacks.setdefault(site.stack, []).append(site)
    for sites in stacks.values():
        ratios = layer_ratios(len(sites), settings.ratio, settings.final_ratio, settings.schedule)
        for depth, (site, ratio) in enumerate(zip(sites, ratios, strict=True)):
            module: Any = site.module
            # a schedule over steps starts from the new ratio
            vars(module).pop("dropkey_base_ratio", None)
            module.dropkey_ratio = ratio
            module.dropkey_pattern = settings.pattern
            module.dropkey_window = settings.window
            module.dropkey_configured, module.dropkey_owner_config = settings.ratio, config
            if not site.native and not isinstance(module.config, DropKeyConfigView):
                module.config = DropKeyConfigView(module.config, module)
            if not site.native:
                hold_ratio_data(module)
                module.dropkey_pixels = pixels
                module.dropkey_windowed = has_windows(module)
            yield RegularisedAttention(site.name, depth, site.kind, site.side, ratio, _backend(site))


def _leave_out(root: PreTrainedModel, chosen: list[AttentionSite], settings: DropKeySettings) -> None:
    """Gives the attentions of this package that are not chosen the ratio 0; they have one from their configuration."""
    taken = {id(site.module) for site in chosen}
    for site in find_attention(root)[0]:
        module: Any = site.module
        if site.native and id(module) not in taken:
            module.dropkey_ratio = 0.0
            module.dropkey_configured, module.dropkey_owner_config = settings.ratio, root.config


def _watch_pixels(root: PreTrainedModel, undo: _Undo) -> None:
    """Reads the size of images off the model's calls while a pattern of its stock attentions needs the patch grid."""
    wanted = any(
        "dropkey_pixels" in vars(module) and module.dropkey_pattern in WINDOWED_PATTERNS
        for _, module in dropkey_modules(root)
    )
    if wanted and not undo.pixel_hooks:
        undo.pixel_hooks = [
            part.register_forward_pre_hook(undo.pixels, with_kwargs=True)
            for part in root.modules()
            if isinstance(part, PreTrainedModel) and takes_pixels(part)
        ]
    elif not wanted:
        while undo.pixel_hooks:
            undo.pixel_hooks.pop().remove()


def _watch_samples(root: PreTrainedModel, undo: _Undo) -> None:
    """Lets a stock model take `sample_ids` among its arguments, as models of this package do."""
    # once; a model of this package takes them out before its hooks see them
    undo.sample_hooks = undo.sample_hooks or [
        root.register_forward_pre_hook(take_sample_ids, with_kwargs=True),
        root.register_forward_hook(leave_sample_ids, always_call=True),
    ]


def remove_dropkey(model: nn.Module) -> None:
    """Undoes `apply_dropkey`: modules, configuration and backend are as before the first call.

    Raises:
        RuntimeError: Another thread is in a `dropkey` block of the model.
        ValueError: There is nothing to undo.
    """
    root = transformers_model(model)
    check_owner(root)
    undo: _Undo | None = vars(root).pop(UNDO, None)
    if undo is None:
        raise ValueError(
            f"apply_dropkey was not called on this {type(root).__name__}, so there is nothing to remove. A model of this "
            "package becomes a plain one through export_plain."
        )
    undo.before.restore(undo.applied())
    for hook in (undo.hook, *undo.pixel_hooks, *undo.sample_hooks):
        hook.remove()


@contextmanager
def dropkey(model: nn.Module, ratio: float | None = None, **settings: Any) -> Iterator[DropKeyReport]:
    """`apply_dropkey` for the length of a `with` block; afterwards the model is as before, with DropKey or without.

    Settings belong to the model, for all threads, so only one thread at a time may be in such a block of a model.

    Raises:
        RuntimeError: Another thread is.
    """
    root = transformers_model(model)
    with owned(root):
        undo: _Undo | None = vars(root).get(UNDO)
        before = _Snapshot.take(root)
        backends = list(undo.backends) if undo is not None else []
        report = apply_dropkey(model, ratio, **settings)
        try:
            yield report
        finally:
            inner: _Undo | None = vars(root).get(UNDO)
            if undo is None and inner is not None:
                remove_dropkey(root)
            elif undo is not None:
                before.restore(undo.applied())
                undo.backends = backends
                _watch_pixels(root, undo)


def dropkey_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and attention modules with a drop ratio, of any patched model or model of this package."""
    for name, module in model.named_modules():
        if "dropkey_ratio" in vars(module):
            yield name, module


def warn_if_forgotten(model: nn.Module) -> bool:
    """Warns, and returns True, if a model's configuration has DropKey settings that none of its attentions follows."""
    ratio = forgotten_ratio(model)
    if ratio is None:
        return False
    logger.warning(
        "The configuration of %s, or its adapter, has dropkey_ratio %s, but no attention drops keys: call "
        "apply_dropkey(model) to train with it, or set model.config.dropkey_ratio = 0.",
        type(transformers_model(model)).__name__,
        ratio,
    )
    return True


def forgotten_ratio(model: nn.Module) -> float | None:
    """The drop ratio that a model's configuration remembers while none of its attentions drops keys; else None.

    A patched stock model is in this state after `from_pretrained`: `apply_dropkey(model)` applies the settings again.
    """
    try:
        config = transformers_model(model).config
    except (TypeError, ValueError):
        # no Transformers model, or several side by side, of which none speaks for all
        return None
    ratio = getattr(config, "dropkey_ratio", None)
    if ratio is None:
        ratio = adapter_settings(model).get("dropkey_ratio")
    if not ratio or any(module.dropkey_ratio > 0 for _, module in dropkey_modules(model)):
        return None
    return float(ratio)


@contextmanager
def dropkey_disabled(model: nn.Module) -> Iterator[None]:
    """No attention of the model drops keys in this `with` block, in training mode neither; other threads are not concerned.

    Raises:
        ValueError: The model is a `DataParallel` on several devices.
    """
    check_threads(model)
    with held_mode([module for _, module in dropkey_modules(model)], "never"):
        yield


@contextmanager
def dropkey_active(model: nn.Module) -> Iterator[None]:
    """The attentions of the model drop keys in this `with` block whether or not they are in training mode.

    For Monte-Carlo inference: in eval mode everything else (dropout, stochastic depth, batch norm) stays as it is. Other
    threads that use the model are not concerned.

    Raises:
        ValueError: The model has no ratio above 0, or is a `DataParallel` on several devices.
    """
    check_threads(model)
    modules = [module for _, module in dropkey_modules(model)]
    if not any(module.dropkey_ratio > 0 for module in modules):
        raise ValueError(
            f"{type(model).__name__} drops no keys: it has no DropKey, or all ratios are 0. Call apply_dropkey(model, "
            "ratio=...) first."
        )
    with held_mode(modules, "always"):
        yield
