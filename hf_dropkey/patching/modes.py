"""Whether attention modules drop keys, decided per thread: the value of `dropkey_mode` while some thread has set one.

Threads share a model, and with it the attributes of its modules. So `held_mode` puts an object there that compares as
another string in each thread: code that travels with checkpoints, also that of earlier releases, compares the attribute
with strings.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn


# id of a `ThreadMode` -> its mode in this context; tasks of asyncio and `asyncio.to_thread` keep theirs
MODES: ContextVar[Mapping[int, str]] = ContextVar("hf_dropkey_modes", default=MappingProxyType({}))
# where `torch.autograd` (2.13) keeps the caller's context for the threads that run a backward pass on a device
AUTOGRAD_CONTEXT = "context"


class ThreadMode(threading.local):
    """The `dropkey_mode` of one module: "always" or "never" where this thread has set it, else what it was before."""

    def __init__(self, otherwise: str) -> None:
        # runs again in each thread, whose attributes these are
        self.otherwise = otherwise
        # for compiled models, whose guards can read attributes of a thread and no context variables
        self.mode = otherwise

    def __eq__(self, word: object) -> bool:
        return self.mode == word if torch.compiler.is_compiling() else self.now() == word

    # as that of any mutable object with an equality of its own
    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy of a model, or a pickled one, is in nobody's `with` block
        return str, (self.otherwise,)

    def now(self) -> str:
        """The mode in this thread."""
        found = MODES.get().get(id(self))
        if found is None and torch._C._is_key_in_tls(AUTOGRAD_CONTEXT):
            # a layer that is computed again in the backward pass, on a thread of the device
            found = torch._C._get_obj_in_tls(AUTOGRAD_CONTEXT).get(MODES, {}).get(id(self))
        return self.otherwise if found is None else found


@dataclass
class _Hold:
    """The mode that is put on a module, how many `with` blocks need it, and whether the module had one before."""

    mode: ThreadMode
    had_one: bool
    blocks: int = 0


# held by what seeds torch's generators for its own length: the process has them once
GENERATORS = threading.RLock()
_LOCK = threading.Lock()
_HOLDS: WeakKeyDictionary[nn.Module, _Hold] = WeakKeyDictionary()


@contextmanager
def held_mode(modules: Sequence[nn.Module], word: str) -> Iterator[None]:
    """Sets the mode of attention modules for this thread, in this `with` block; other threads keep theirs."""
    modes = _hold(modules)
    before = MODES.get()
    words = [mode.mode for mode in modes]
    for mode in modes:
        mode.mode = word
    MODES.set(MappingProxyType({**before, **{id(mode): word for mode in modes}}))
    try:
        yield
    finally:
        for mode, earlier in zip(modes, words, strict=True):
            mode.mode = earlier
        after = {key: value for key, value in MODES.get().items() if key not in {id(mode) for mode in modes}}
        after |= {id(mode): before[id(mode)] for mode in modes if id(mode) in before}
        MODES.set(MappingProxyType(after))
        _release(modules)


def _hold(modules: Sequence[nn.Module]) -> list[ThreadMode]:
    with _LOCK:
        for module in modules:
            if module not in _HOLDS:
                before = vars(module).get("dropkey_mode")
                _HOLDS[module] = _Hold(ThreadMode(before or "training"), before is not None)
                module.dropkey_mode = _HOLDS[module].mode  # type: ignore[assignment]  # no tensor and no module
            _HOLDS[module].blocks += 1
        return [_HOLDS[module].mode for module in modules]


def _release(modules: Sequence[nn.Module]) -> None:
    with _LOCK:
        for module in modules:
            hold = _HOLDS[module]
            hold.blocks -= 1
            if hold.blocks:
                continue
            del _HOLDS[module]
            vars(module).pop("dropkey_mode", None)
            if hold.had_one:
                module.dropkey_mode = hold.mode.otherwise  # type: ignore[assignment]  # as above


# the model of each open `dropkey` block -> the thread that opened it, and how many it has opened
_OWNERS: WeakKeyDictionary[nn.Module, tuple[int, int]] = WeakKeyDictionary()


def check_owner(root: nn.Module) -> None:
    """Raises RuntimeError if another thread has changed the settings of a model for the length of a `with` block.

    They are attributes of the model, so that the end of the block would undo what this thread changes.
    """
    owner = _OWNERS.get(root)
    if owner is not None and owner[0] != threading.get_ident():
        raise RuntimeError(
            f"Another thread is in a `with dropkey(...)` block of this {type(root).__name__}, whose end puts all settings "
            "back. Change them in one thread at a time, or give each thread a model: copy.deepcopy(model)."
        )


@contextmanager
def owned(root: nn.Module) -> Iterator[None]:
    """Keeps the settings of a model to this thread.

    Raises:
        RuntimeError: Another thread has them.
    """
    with _LOCK:
        check_owner(root)
        _OWNERS[root] = threading.get_ident(), _OWNERS.get(root, (0, 0))[1] + 1
    try:
        yield
    finally:
        with _LOCK:
            thread, blocks = _OWNERS.pop(root)
            if blocks > 1:
                _OWNERS[root] = thread, blocks - 1


def check_threads(model: nn.Module) -> None:
    """Raises ValueError for `DataParallel` on several devices, whose threads would not see the mode of this one."""
    for module in model.modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ValueError(
                "`DataParallel` runs its copies in threads of their own, where this `with` block does not count. Use the "
                "model on one device (`.module`), or DistributedDataParallel."
            )
