"""The default path on a GPU: its mask is drawn again in the backward pass, and never kept.

Without a GPU the same code runs PyTorch's CPU operator, and PyTorch's operators for a GPU give shapes on "meta".
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attention_inputs import saved_sizes, site, tensors
from torch._inductor import config as inductor_config


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hf_dropkey.models import attention, efficient_attention
from hf_dropkey.models.attention import dropkey_attention_forward
from hf_dropkey.models.attention_mask import Settings
from hf_dropkey.models.efficient_attention import aligned_mask, can_redraw_efficiently
from hf_dropkey.models.triton_kernels import INTERPRETED
from hf_dropkey.models.triton_mask import drawn_mask


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Makes `sdpa` redraw as it does on a GPU, or keep its mask as it does where nothing else is possible."""
    monkeypatch.setattr(attention, "can_redraw", lambda *_: False)

    def choose(redraws: bool) -> None:
        monkeypatch.setattr(efficient_attention, "_device_serves", lambda *_: redraws)

    choose(True)
    return choose


def mask_of(form: str, images: int, heads: int, queries: int, keys: int) -> torch.Tensor | None:
    padding = torch.arange(keys) < torch.tensor([[keys // 2]] * (images - 1) + [[0]])
    causal = torch.ones(queries, keys, dtype=torch.bool).tril()[None, None]
    bias = torch.linspace(-1, 1, heads * queries * keys).view(1, heads, queries, keys)
    forms = {"none": None, "padding": padding[:, None, None], "causal": causal, "bias": bias}
    return forms[form] if form != "blind" else causal & (torch.arange(queries) != 2)[:, None]


def run(ratio: float, pattern: str, mask: torch.Tensor | None, qkv: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradients of one call."""
    torch.manual_seed(1)
    output = dropkey_attention_forward(
        site(ratio, pattern), *qkv, mask, implementation="sdpa", scaling=0.5, grid=(4, 5)
    )[0]
    return [output, *torch.autograd.grad(output.square().sum(), qkv)]


@pytest.mark.parametrize("form", ["none", "padding", "causal", "bias", "blind"])
@pytest.mark.parametrize("pattern", ["score", "key", "block", "cross"])
def test_equals_the_path_that_keeps_its_mask(pattern: str, form: str, like_a_gpu: Callable[[bool], None]) -> None:
    qkv, mask = tensors(2, 2, 21, 8, dtype=torch.float32), mask_of(form, 2, 2, 21, 21)
    redrawn = run(0.4, pattern, mask, qkv)
    like_a_gpu(False)
    for one, other in zip(redrawn, run(0.4, pattern, mask, qkv), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize(("pattern", "form"), [("score", "none"), ("score", "padding"), ("key", "padding")])
def test_the_kernel_that_draws_masks_serves_both_passes(
    pattern: str, form: str, like_a_gpu: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv, mask = tensors(2, 2, 21, 8, dtype=torch.float32), mask_of(form, 2, 2, 21, 21)
    expected, drawn = run(0.4, pattern, mask, qkv), []

    def counted(*arguments: Any) -> torch.Tensor:
        drawn.append(drawn_mask(*arguments))
        return drawn[-1]

    monkeypatch.setattr(efficient_attention, "can_draw", lambda *_: True)
    monkeypatch.setattr(efficient_attention, "drawn_mask", counted)
    for one, other in zip(run(0.4, pattern, mask, qkv), expected, strict=True):
        assert torch.equal(one, other)
    assert len(drawn) == 2


@pytest.mark.parametrize("keys", [5, 8, 21])
@pytest.mark.parametrize("pattern", ["score", "key", "block"])
def test_rows_of_the_mask_are_aligned(keys: int, pattern: str) -> None:
    query, key = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, keys, 8)
    seed = torch.tensor([1, 2], dtype=torch.int32)
    mask = aligned_mask(seed, query, key, None, Settings(0.3, pattern, 2, (2, 2)))
    assert mask.shape == (2, 3, 4, keys) and mask.stride(3) == 1
    # PyTorch copies a mask with another stride
    assert all(stride % 8 == 0 for stride in mask.stride()[:3])


@pytest.mark.parametrize("form", ["none", "padding"])
def test_only_the_seed_is_saved_beside_what_plain_attention_saves(
    form: str, like_a_gpu: Callable[[bool], None]
) -> None:
    qkv, mask = tensors(2, 2, 197, 8, dtype=torch.float32), mask_of(form, 2, 2, 197, 197)
    plain = saved_sizes(lambda: torch.nn.functional.scaled_dot_product_attention(*qkv))
    call = partial(dropkey_attention_forward, site(0.3), *qkv, mask, implementation="sdpa", scaling=0.5)
    found = saved_sizes(lambda: call()[0])
    # with padding also which keys are hidden, and the output before the rule for queries that see none
    assert max(found) == max(plain) and (mask is not None or sum(found) == sum(plain) + 8)
    like_a_gpu(False)
    # the test can tell
    assert max(saved_sizes(lambda: call()[0])) >= 4 * 2 * 2 * 197 * 197


@pytest.mark.parametrize("compiler", ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("pattern", "form"), [("score", "none"), ("score", "padding"), ("block", "none")])
@inductor_config.patch(fallback_random=True)
def test_compiled_code_keeps_no_mask_either(
    compiler: str, pattern: str, form: str, like_a_gpu: Callable[[bool], None]
) -> None:
    torch._dynamo.reset()
    qkv, mask = tensors(1, 1, 197, 8, dtype=torch.float32), mask_of(form, 2, 1, 197, 197)
    mask = None if mask is None else mask[:1]
    module = site(0.3, pattern)

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        return dropkey_attention_forward(module, *inputs, mask, implementation="sdpa", scaling=0.5)[0]

    results = []
    for function in (call, torch.compile(call, backend=compiler, fullgraph=True)):
        torch.manual_seed(1)
        # of [1, 1, 197, 8] in float32
        assert max(saved_sizes(partial(function, *qkv))) <= 197 * 8 * 4 < 197 * 197
        results.append([tensor.grad for tensor in qkv])
        for tensor in qkv:
            tensor.grad = None
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_operators_for_a_gpu_take_what_they_get(dtype: torch.dtype, like_a_gpu: Callable[[bool], None]) -> None:
    """By shapes alone: those of PyTorch's operators on "meta"."""
    qkv = [tensor.detach().to("meta").requires_grad_() for tensor in tensors(2, 3, 197, 64, dtype=dtype)]
    call = partial(dropkey_attention_forward, site(0.3), *qkv, None, implementation="sdpa", scaling=0.5)
    used = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            used.append((func.overloadpacket.__name__, args))
            return func(*args, **(kwargs or {}))

    with Watch():
        sizes = saved_sizes(lambda: call()[0])
    operators = {name: args for name, args in used if "efficient_attention" in name}
    forward, backward = operators.values()
    assert list(operators) == [
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_efficient_attention_backward",
    ]
    for bias in (forward[3], backward[4]):
        assert bias.shape == (2, 3, 197, 197) and bias.dtype == dtype and bias.stride() == (118200, 39400, 200, 1)
    assert all(tensor.grad.shape == tensor.shape and tensor.grad.dtype == dtype for tensor in qkv)
    # query, key, value, output; the normaliser of each row (rows in multiples of 32); the seed; two numbers for dropout
    assert max(sizes) == 2 * 3 * 197 * 64 * dtype.itemsize and sum(sizes) <= 4 * max(sizes) + 2 * 3 * 224 * 4 + 3 * 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("form", ["none", "padding", "causal", "blind"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_gpu_gives_what_it_gives_with_a_kept_mask(
    dtype: torch.dtype, form: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    qkv = [tensor.detach().cuda().requires_grad_() for tensor in tensors(2, 2, 197, 64, dtype=dtype)]
    mask = mask_of(form, 2, 2, 197, 197)
    mask = None if mask is None else mask.cuda()
    module = site(0.3)

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        return dropkey_attention_forward(module, *inputs, mask, implementation="sdpa", scaling=0.125)[0]

    results = []
    for redraws in (True, False):
        if not redraws:
            monkeypatch.setattr(efficient_attention, "_device_serves", lambda *_: False)
        function = torch.compile(call, fullgraph=True) if compiled and redraws else call
        with inductor_config.patch(fallback_random=True):
            torch.manual_seed(1)
            sizes = saved_sizes(partial(function, *qkv))
        assert (max(sizes) < 2 * 2 * 197 * 197 * dtype.itemsize) == redraws
        results.append([tensor.grad for tensor in qkv])
        for tensor in qkv:
            tensor.grad = None
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


def test_compilers_take_what_the_device_serves_for_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    efficient_attention._has_bfloat16.cache_clear()

    def chooses(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if efficient_attention._device_serves(torch.device("cuda"), torch.bfloat16) else x - 1

    # a question to the driver would break the graph
    found = torch.compile(chooses, backend="eager", fullgraph=True)(torch.zeros(1))
    efficient_attention._has_bfloat16.cache_clear()
    assert found.item() == 1


def test_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.zeros(1, 1, 4, 16)
    assert not can_redraw_efficiently(plain, plain, plain, None, 0.0), "there is no GPU"
    served = [(torch.device("cuda"), torch.float16), (torch.device("cuda"), torch.bfloat16)]
    for capability, expected in (((8, 0), [True, True]), ((7, 5), [True, False])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        efficient_attention._has_bfloat16.cache_clear()
        assert [efficient_attention._device_serves(*case) for case in served] == expected
    efficient_attention._has_bfloat16.cache_clear()
    assert not efficient_attention._device_serves(torch.device("cuda"), torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert not efficient_attention._device_serves(*served[0]), "the user has chosen another kernel"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not efficient_attention._device_serves(*served[0])

    monkeypatch.setattr(efficient_attention, "_device_serves", lambda *_: True)
    narrow, half, bias = plain[..., :12], plain.half(), torch.zeros(1, 1, 4, 4, requires_grad=True)
    assert can_redraw_efficiently(plain, plain, plain, None, 0.0)
    for case in (
        (narrow, narrow, plain, None, 0.0),
        (plain, plain, narrow, None, 0.0),
        (plain, plain, half, None, 0.0),
        (plain, plain, plain, bias, 0.0),
        (plain, plain, plain, None, 0.1),
    ):
        assert not can_redraw_efficiently(*case)
    answers = []

    def asks(query: torch.Tensor) -> torch.Tensor:
        answers.append(can_redraw_efficiently(query, query, query, None, 0.0))
        return query.sum()

    torch.func.grad(asks)(plain)
    assert answers == [False], "a transform has no rule for the function"
