"""Threads, tasks and the backward pass share a model and not each other's `with` blocks."""

import asyncio
import contextvars
import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from dropping_models import native, patched
from stock_architectures import loss_of, pixels, quiet, tiny_vit
from torch import nn

from hf_dropkey.inference import eval_mode, monte_carlo_predict
from hf_dropkey.inspection.recording import record_attention
from hf_dropkey.models.dropkey import dropkey_is_active
from hf_dropkey.patching.apply import (
    apply_dropkey,
    dropkey,
    dropkey_active,
    dropkey_disabled,
    dropkey_modules,
    remove_dropkey,
)
from hf_dropkey.patching.modes import AUTOGRAD_CONTEXT, ThreadMode


KINDS: dict[str, Callable[[], Any]] = {"native": native, "patched": patched}


def in_thread(call: Callable[[], Any]) -> Any:
    """What a call returns, or raises, on another thread."""
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(call)
        return job.exception(timeout=60) or job.result()


@contextmanager
def open_in_a_thread(block: Any) -> Iterator[None]:
    """A `with` block that another thread is in, until the end of this one."""
    inside, leave = threading.Event(), threading.Event()

    def run() -> None:
        with block:
            inside.set()
            leave.wait(timeout=60)

    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(timeout=60)
    try:
        yield
    finally:
        leave.set()
        thread.join(timeout=60)


def active(model: nn.Module) -> set[bool]:
    return {bool(dropkey_is_active(module)) for _, module in dropkey_modules(model) if module.dropkey_ratio > 0}


def clean(model: nn.Module) -> bool:
    return not [module for module in model.modules() if "dropkey_mode" in vars(module)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_thread_has_a_mode_of_its_own(kind: str) -> None:
    model = KINDS[kind]().train()
    with dropkey_disabled(model):
        assert active(model) == {False}
        # a training in another thread goes on dropping keys
        assert in_thread(lambda: active(model)) == {True}
        model.eval()
        with open_in_a_thread(dropkey_active(model)):
            assert active(model) == {False}
            assert in_thread(lambda: active(model)) == {False}
            with dropkey_active(model):
                assert active(model) == {True}
            assert active(model) == {False}
    assert clean(model) and active(model) == {False}


@pytest.mark.parametrize("first", [0, 1])
def test_threads_leave_in_any_order(first: int) -> None:
    model = patched().eval()
    blocks = [open_in_a_thread(dropkey_active(model)), open_in_a_thread(dropkey_disabled(model))]
    for block in blocks:
        block.__enter__()
    for block in (blocks[first], blocks[1 - first]):
        assert not clean(model) and active(model) == {False}
        block.__exit__(None, None, None)
    assert clean(model) and active(model) == {False}


def test_many_threads_predict_with_one_model() -> None:
    model = patched().train()
    model.vit.embeddings.eval()
    modes = [module.training for module in model.modules()]
    expected = {seed: monte_carlo_predict(model, pixels(), samples=4, seed=seed).probabilities for seed in range(2)}
    state = torch.random.get_rng_state()
    found: dict[int, torch.Tensor] = {}
    plain: list[torch.Tensor] = []

    def predict(seed: int) -> None:
        for _ in range(3):
            found[seed] = monte_carlo_predict(model, pixels(), samples=4, seed=seed).probabilities

    def without() -> None:
        with dropkey_disabled(model), torch.no_grad():
            plain.extend(model(**pixels()).logits for _ in range(20))

    def record() -> None:
        record_attention(model, pixels(), dropkey=True)

    threads = [threading.Thread(target=predict, args=(seed,)) for seed in range(2)]
    threads += [threading.Thread(target=call) for call in (without, record)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert clean(model) and [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(found[seed], expected[seed]) for seed in expected)
    # attention is on another backend while the recording thread has the model
    for one in plain:
        torch.testing.assert_close(one, plain[0])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_eval_mode_ends_with_the_last_thread() -> None:
    model = tiny_vit().train()
    with eval_mode(model):
        with open_in_a_thread(eval_mode(model)):
            pass
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())
    block = open_in_a_thread(eval_mode(model))
    with eval_mode(model):
        block.__enter__()
    assert not any(module.training for module in model.modules())
    block.__exit__(None, None, None)
    assert all(module.training for module in model.modules())
    # what was in eval mode may be trained meanwhile
    model.eval()
    with eval_mode(model):
        model.train()
    assert model.training


def test_tasks_have_modes_of_their_own_and_hand_them_to_their_threads() -> None:
    model = patched().eval()
    seen = []

    async def one(block: Any, expected: bool) -> None:
        with block(model):
            await asyncio.sleep(0.01)
            seen.append(active(model) == {expected})
            seen.append(await asyncio.to_thread(active, model) == {expected})
            await asyncio.sleep(0.01)

    async def both() -> None:
        await asyncio.gather(one(dropkey_active, True), one(dropkey_disabled, False), one(dropkey_active, True))

    asyncio.run(both())
    assert seen == [True] * 6 and clean(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_heeds_the_mode_of_each_thread(kind: str) -> None:
    torch._dynamo.reset()
    model = KINDS[kind]().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def same() -> bool:
        with torch.no_grad():
            return torch.equal(loss_of(compiled, pixels(), 0), loss_of(compiled, pixels(), 1))

    assert same()
    with dropkey_active(compiled):
        assert not same()
        assert in_thread(same) is True
        assert not same()
        with dropkey_disabled(compiled):
            assert same()
    assert same()


def test_a_layer_computed_again_on_a_thread_of_the_device_has_the_mode_of_the_caller() -> None:
    model = patched().train()

    def backward(context: contextvars.Context) -> set[bool]:
        # as autograd does on the threads of a device
        torch._C._stash_obj_in_tls(AUTOGRAD_CONTEXT, context)
        try:
            return active(model)
        finally:
            torch._C._remove_obj_from_tls(AUTOGRAD_CONTEXT)

    outside = contextvars.copy_context()
    with dropkey_disabled(model):
        inside = contextvars.copy_context()
        assert in_thread(lambda: backward(inside)) == {False}
        assert in_thread(lambda: backward(outside)) == {True}
        assert in_thread(lambda: active(model)) == {True}


def test_torch_hands_the_callers_context_to_the_backward_pass() -> None:
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, inputs: torch.Tensor) -> torch.Tensor:
            return inputs.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            seen.append(torch._C._get_obj_in_tls(AUTOGRAD_CONTEXT))
            return gradient

    word: contextvars.ContextVar[str] = contextvars.ContextVar("word")
    word.set("here")
    Look.apply(torch.ones(1, requires_grad=True)).backward()
    assert seen[0][word] == "here"


def test_a_mode_set_by_hand_is_put_back_and_copies_are_in_no_block() -> None:
    model = patched().eval()
    for _, module in dropkey_modules(model):
        module.dropkey_mode = "always"
    with dropkey_disabled(model):
        assert active(model) == {False} and in_thread(lambda: active(model)) == {True}
        copied = copy.deepcopy(model)
    assert active(copied) == active(model) == {True}
    assert {type(module.dropkey_mode) for one in (model, copied) for _, module in dropkey_modules(one)} == {str}


def test_a_mode_compares_as_a_string_does() -> None:
    mode = ThreadMode("never")
    assert mode == "never" and mode != "always" and mode != 3


def test_settings_are_changed_by_one_thread_at_a_time() -> None:
    model = tiny_vit()
    with dropkey(model, 0.3, verbose=False), dropkey(model, 0.4, verbose=False):
        calls = (
            lambda: apply_dropkey(model, 0.1, verbose=False),
            lambda: remove_dropkey(model),
            lambda: dropkey(model, 0.2).__enter__(),
        )
        for call in calls:
            error = in_thread(call)
            assert isinstance(error, RuntimeError) and "copy.deepcopy(model)" in str(error)
        assert next(module for _, module in dropkey_modules(model)).dropkey_ratio == 0.4
    assert not list(dropkey_modules(model))
    other = open_in_a_thread(dropkey(model, 0.2, verbose=False))
    with other, pytest.raises(RuntimeError, match="Another thread is in"):
        quiet(model, 0.3)
    quiet(model, 0.3)


def test_threads_of_data_parallel_are_told() -> None:
    model = patched()
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = [0, 1]
    for block in (dropkey_active, dropkey_disabled):
        with pytest.raises(ValueError, match="DataParallel"), block(wrapped):
            pass
    wrapped.device_ids = [0]
    with dropkey_disabled(wrapped):
        pass
