"""The fused kernels against the definition of the mask, and against the reference attention in float64.

Where there is no GPU, Triton's interpreter runs the kernels. Triton chooses it when it is first imported, so
TRITON_INTERPRET=1 must be set before that: below for this file alone, in conftest.py for the whole suite.
"""

import importlib.util
import os
import shutil
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton", reason="the fused kernels need Triton, which is not installed")

from hf_dropkey.models import triton_attention
from hf_dropkey.models.attention_mask import real_keys
from hf_dropkey.models.counter_hash import threshold_tensor
from hf_dropkey.models.dropkey import ratio_tensor
from hf_dropkey.models.patterns import dropped_scores, protect_rows
from hf_dropkey.models.triton_attention import MAXIMUM_WIDTH, triton_dropkey_attention, triton_is_available
from hf_dropkey.reference import reference_attention


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEEDS = [(123456789, -987654321), (0, 0), (-1, 2**31 - 1)]
HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32
# how far above the rounding error of eager attention in the same dtype a fused kernel may be, and what the sums in
# float32 that both make may err by chance in one of them alone
FACTOR, FLOOR = 2.0, 4e-6


@pytest.fixture(autouse=True)
def kernels_can_run() -> None:
    if not triton_is_available(DEVICE):
        pytest.fail("Triton was imported before TRITON_INTERPRET=1 was set: set it in tests/conftest.py.")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Fills every `torch.empty` with NaN, so that a result a kernel forgot to write cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make_seed(words: tuple[int, int] = SEEDS[0]) -> torch.Tensor:
    return torch.tensor(words, dtype=torch.int32, device=DEVICE)


def make_inputs(
    shape: tuple[int, int, int, int], width: int, dtype: torch.dtype, value_width: int | None = None
) -> list[torch.Tensor]:
    """Random query, key, value and output gradient, as a model makes them: [B, N, H, D] in memory."""
    images, heads, queries, keys = shape
    generator = torch.Generator().manual_seed(sum(shape) + width)
    value_width = value_width or width
    sizes = [(queries, width), (keys, width), (keys, value_width), (queries, value_width)]
    return [
        torch.randn(images, length, heads, size, generator=generator).to(DEVICE, dtype).transpose(1, 2)
        for length, size in sizes
    ]


def make_padding(images: int, keys: int) -> torch.Tensor:
    """A prefix in the first image, scattered keys in the others, none at all in the last of several."""
    padding = torch.rand(images, keys, generator=torch.Generator().manual_seed(keys)) < 0.7
    padding[0] = torch.arange(keys) < max(1, keys // 2)
    if images > 1:
        padding[-1] = False
    return padding.to(DEVICE)


def protected_drop(
    shape: tuple[int, int, int, int], ratio: float, pattern: str, padding: torch.Tensor | None, seed: torch.Tensor
) -> torch.Tensor:
    real = real_keys(padding)
    return protect_rows(dropped_scores(seed, shape, ratio, pattern=pattern, real=real), real).expand(shape)


def eager_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropped: torch.Tensor, padding: torch.Tensor | None
) -> torch.Tensor:
    """The plain attention whose rounding error is the yardstick: matrix products in its dtype, softmax in float32."""
    scores = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5
    gone = dropped if padding is None else dropped | ~padding[:, None, None, :]
    weights = scores.float().masked_fill(gone, float("-inf")).softmax(-1).nan_to_num(0.0)
    return weights.to(query.dtype) @ value


def output_and_gradients(function: Any, inputs: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The output for the first three inputs and their gradients for the fourth, all in float64."""
    query, key, value = (tensor.detach().to(dtype).requires_grad_() for tensor in inputs[:3])
    output = function(query, key, value)
    output.backward(inputs[3].to(dtype))
    return [output.detach().double(), query.grad.double(), key.grad.double(), value.grad.double()]


def check_against_reference(
    inputs: list[torch.Tensor],
    ratio: float,
    *,
    pattern: str = "score",
    padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compares output, dq, dk and dv; returns the mask.

    A row without a real key has no eager result to be measured by, and is zero in the reference.
    """
    seed = make_seed()
    query, key = inputs[:2]
    dtype = query.dtype
    dropped = protected_drop((*query.shape[:3], key.shape[2]), ratio, pattern, padding, seed)
    exact = output_and_gradients(lambda *qkv: reference_attention(*qkv, dropped, padding), inputs, torch.float64)
    eager = output_and_gradients(lambda *qkv: eager_attention(*qkv, dropped, padding), inputs, dtype)
    fused = output_and_gradients(
        lambda *qkv: triton_dropkey_attention(*qkv, seed, ratio, pattern=pattern, padding=padding), inputs, dtype
    )
    for name, want, yardstick, got in zip(("output", "dq", "dk", "dv"), exact, eager, fused, strict=True):
        allowed = FACTOR * (yardstick - want).abs().max() + FLOOR
        error = (got - want).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
    return dropped


# --- the mask ---------------------------------------------------------------------------------------------------------


def read_mask(
    shape: tuple[int, int, int, int],
    ratio: float,
    dtype: torch.dtype,
    pattern: str = "score",
    padding: torch.Tensor | None = None,
    words: tuple[int, int] = SEEDS[0],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which keys each kernel attends to, bool [B, H, N, M]: forward, dk/dv and dq.

    With queries of zero all attended keys weigh the same, and identity matrices as values, output gradients and keys
    show them one by one. The gradients are in float32, where none of them rounds to zero.
    """
    images, heads, queries, keys = shape
    seed = make_seed(words)

    def zeros(*size: int, dtype: torch.dtype = SINGLE) -> torch.Tensor:
        return torch.zeros(images, heads, *size, dtype=dtype, device=DEVICE)

    def identity(size: int, start: int, dtype: torch.dtype = SINGLE) -> torch.Tensor:
        piece = torch.eye(size, dtype=dtype, device=DEVICE)[:, start : start + MAXIMUM_WIDTH]
        return piece.expand(images, heads, *piece.shape)

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return triton_dropkey_attention(query, key, value, seed, ratio, pattern=pattern, padding=padding)

    forward, key_value, query_side = [], [], []
    random = torch.rand(images, heads, keys, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for start in range(0, keys, MAXIMUM_WIDTH):
        small = zeros(queries, 16, dtype=dtype), zeros(keys, 16, dtype=dtype)
        forward.append(attention(*small, identity(keys, start, dtype)) > 0)
        basis = identity(keys, start)
        query = zeros(queries, basis.shape[-1]).requires_grad_()
        attention(query, basis, random).backward(torch.ones_like(random[:, :, :1]).expand(-1, -1, queries, -1))
        query_side.append(query.grad != 0)
    for start in range(0, queries, MAXIMUM_WIDTH):
        value = zeros(keys, len(range(queries)[start : start + MAXIMUM_WIDTH])).requires_grad_()
        attention(zeros(queries, 16), zeros(keys, 16), value).backward(identity(queries, start))
        key_value.append(value.grad.transpose(2, 3) > 0)
    return torch.cat(forward, -1), torch.cat(key_value, -2), torch.cat(query_side, -1)


def check_mask(
    shape: tuple[int, int, int, int],
    ratio: float,
    dtype: torch.dtype,
    pattern: str,
    padded: bool,
    words: tuple[int, int],
) -> None:
    padding = make_padding(shape[0], shape[3]) if padded else None
    kept = ~protected_drop(shape, ratio, pattern, padding, make_seed(words))
    if padding is not None:
        kept &= padding[:, None, None, :]
    forward, key_value, query_side = read_mask(shape, ratio, dtype, pattern, padding, words)
    assert torch.equal(forward, kept)
    assert torch.equal(key_value, kept)
    # the softmax of a single key has no gradient to read
    readable = kept.sum(-1, keepdim=True) > 1
    assert torch.equal(query_side & readable, kept & readable)


@pytest.mark.parametrize(
    ("shape", "ratio", "dtype", "pattern", "padded"),
    [
        ((2, 3, 5, 9), 0.5, HALF, "score", False),
        ((2, 2, 9, 5), 0.8, HALF, "score", True),
        ((1, 2, 17, 63), 0.1, SINGLE, "score", False),
        ((2, 1, 33, 197), 0.1, HALF, "score", False),
        ((1, 2, 17, 197), 0.3, SINGLE, "score", True),
        ((1, 2, 5, 256), 0.3, HALF, "score", False),
        ((1, 1, 3, 577), 0.05, HALF, "score", False),
        ((2, 1, 3, 301), 0.99, HALF, "score", True),
        ((2, 3, 33, 70), 0.3, HALF, "key", False),
        ((2, 1, 3, 330), 0.3, SINGLE, "key", True),
        ((1, 1, 20, 1), 0.9, HALF, "score", False),
        ((1, 2, 3, 65), 0.0, HALF, "score", False),
        pytest.param((2, 2, 197, 197), 0.1, HALF, "score", True, marks=pytest.mark.slow),
        pytest.param((1, 2, 33, 785), 0.2, SINGLE, "score", False, marks=pytest.mark.slow),
        pytest.param((1, 1, 9, 1025), 0.3, HALF, "score", False, marks=pytest.mark.slow),
    ],
)
def test_every_kernel_drops_the_scores_of_the_definition(
    shape: tuple[int, int, int, int], ratio: float, dtype: torch.dtype, pattern: str, padded: bool
) -> None:
    check_mask(shape, ratio, dtype, pattern, padded, SEEDS[0])


@pytest.mark.parametrize("words", SEEDS[1:])
def test_every_seed_means_the_same_to_kernels_and_definition(words: tuple[int, int]) -> None:
    check_mask((2, 2, 9, 70), 0.3, HALF, "score", False, words)


def test_another_seed_and_another_ratio_change_the_mask() -> None:
    first = read_mask((1, 1, 5, 40), 0.3, HALF)[0]
    assert not torch.equal(first, read_mask((1, 1, 5, 40), 0.3, HALF, words=SEEDS[1])[0])
    assert not torch.equal(first, read_mask((1, 1, 5, 40), 0.4, HALF)[0])


# --- outputs and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, SINGLE], ids=["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("shape", "width", "value_width", "ratio", "padded"),
    [
        ((1, 1, 1, 1), 64, 64, 0.5, False),
        ((2, 2, 9, 63), 24, 24, 0.3, False),
        ((1, 2, 65, 197), 64, 64, 0.1, False),
        ((2, 1, 63, 230), 40, 16, 0.3, True),
        ((1, 1, 30, 321), 80, 96, 0.2, False),
        ((2, 1, 9, 300), 128, 128, 0.5, True),
        ((1, 1, 70, 9), 17, 72, 0.1, True),
    ],
)
def test_output_and_gradients_equal_the_reference(
    shape: tuple[int, int, int, int], width: int, value_width: int, ratio: float, padded: bool, dtype: torch.dtype
) -> None:
    padding = make_padding(shape[0], shape[3]) if padded else None
    check_against_reference(make_inputs(shape, width, dtype, value_width), ratio, padding=padding)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "width"),
    [
        ((2, 3, 197, 197), 64),
        ((1, 2, 577, 577), 64),
        ((1, 1, 130, 785), 32),
        ((1, 1, 1025, 130), 64),
        ((1, 1, 9, 4097), 64),
        ((1, 1, 1025, 1025), 16),
    ],
)
def test_rows_of_real_models_equal_the_reference(shape: tuple[int, int, int, int], width: int) -> None:
    check_against_reference(make_inputs(shape, width, HALF), 0.2)


@pytest.mark.parametrize(
    ("shape", "width", "ratio", "padded"),
    [
        ((2, 2, 33, 70), 16, 0.3, False),
        ((2, 2, 9, 5), 16, 0.8, True),
        ((2, 1, 70, 197), 80, 0.1, True),
        ((1, 2, 130, 96), 16, 0.1, False),
        # either threshold half of the time
        ((1, 1, 3, 2113), 16, (64 + 0.5) / 256, False),
    ],
)
def test_backward_pass_hands_on_a_bit_for_each_score_and_frees_it(
    shape: tuple[int, int, int, int], width: int, ratio: float, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, heads, queries, keys = shape
    handed: list[weakref.ref[torch.Tensor]] = []
    gone: list[torch.Tensor] = []
    launch, memory = triton_attention._launch, triton_attention._for_each_row

    def remembering(*arguments: Any) -> torch.Tensor:
        tensor: torch.Tensor = memory(*arguments)
        handed.append(weakref.ref(tensor))
        return tensor

    def looking(name: str, arguments: dict[str, Any], **one_pass: Any) -> None:
        if name == "key_value":
            # uninitialised rows and keys past the end are none of a score
            bits = arguments["p_bits"][:, :, :, :queries, None] >> torch.arange(64, device=DEVICE) & 1
            gone.append(bits.bool().transpose(2, 3).flatten(3)[..., :keys])
            assert arguments["p_bits"].shape == (images, heads, -(-keys // 64), -(-queries // 128) * 128)
        launch(name, arguments, **one_pass)

    monkeypatch.setattr(triton_attention, "_launch", looking)
    monkeypatch.setattr(triton_attention, "_for_each_row", remembering)
    padding = make_padding(images, keys) if padded else None
    dropped = check_against_reference(make_inputs(shape, width, SINGLE), ratio, padding=padding)
    hidden = torch.zeros_like(dropped) if padding is None else ~padding[:, None, None, :]
    assert len(gone) == 1 and torch.equal(gone[0], dropped | hidden)
    assert len(handed) == 2 and all(tensor() is None for tensor in handed)


def test_key_pattern_drops_the_same_keys_for_all_queries() -> None:
    dropped = check_against_reference(make_inputs((2, 2, 33, 70), 32, SINGLE), 0.3, pattern="key")
    assert torch.equal(dropped, dropped[:, :, :1].expand_as(dropped))


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("keys", "ratio"), [(5, 0.8), (300, 0.99)])
def test_row_that_would_lose_all_its_keys_drops_none(
    keys: int, ratio: float, padded: bool, dtype: torch.dtype
) -> None:
    shape = (2, 2, 40, keys)
    padding = make_padding(2, keys) if padded else None
    dropped = dropped_scores(make_seed(), shape, ratio)
    gone = dropped if padding is None else (dropped | ~padding[:, None, None, :])[:1]
    # the case is there: some rows lose every key, others in the same tile do not
    assert 0 < gone.all(-1).sum() < gone.all(-1).numel()
    check_against_reference(make_inputs(shape, 32, dtype), ratio, padding=padding)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_dropped_score_far_above_the_kept_ones_leaves_no_trace(dtype: torch.dtype) -> None:
    # exp of the difference underflows, so a normaliser that saw the dropped score would find nothing left
    inputs = make_inputs((1, 1, 16, 70), 16, dtype)
    dropped = protected_drop((1, 1, 16, 70), 0.3, "key", None, make_seed())[0, 0, 0]
    key = torch.zeros_like(inputs[1])
    key[:, :, dropped] = 60.0
    inputs[0] = torch.full_like(inputs[0], 1.0)
    inputs[1] = key + 0.1 * inputs[1]
    check_against_reference(inputs, 0.3, pattern="key")


def test_ratio_zero_is_plain_attention() -> None:
    query, key, value, _ = make_inputs((1, 2, 33, 70), 32, SINGLE)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert torch.allclose(triton_dropkey_attention(query, key, value, make_seed(), 0.0), plain, atol=1e-5)


def test_scaling() -> None:
    query, key, value, _ = make_inputs((1, 1, 9, 30), 32, SINGLE)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.7)
    assert torch.allclose(triton_dropkey_attention(query, key, value, make_seed(), 0.0, scaling=0.7), plain, atol=1e-5)


def test_gradient_is_the_slope_of_the_output() -> None:
    inputs = make_inputs((1, 2, 7, 12), 16, SINGLE)
    directions = [torch.randn_like(tensor) for tensor in inputs[:3]]

    def loss(step: float) -> float:
        moved = [tensor + step * direction for tensor, direction in zip(inputs, directions, strict=False)]
        return (triton_dropkey_attention(*moved, make_seed(), 0.3) * inputs[3]).double().sum().item()

    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
    (triton_dropkey_attention(*leaves, make_seed(), 0.3) * inputs[3]).sum().backward()
    slope = sum((leaf.grad * direction).sum().item() for leaf, direction in zip(leaves, directions, strict=True))
    assert slope == pytest.approx((loss(1e-2) - loss(-1e-2)) / 2e-2, rel=1e-2)


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("length", [40, 130])
def test_nan_in_padding_reaches_neither_outputs_nor_gradients(length: int, dtype: torch.dtype) -> None:
    inputs = make_inputs((2, 2, length, length), 24, dtype)
    padding = make_padding(2, length)
    padding[1, :3] = True
    hidden = ~padding[:, None, :, None]
    # no loss looks at a padded query
    inputs[3] = inputs[3].masked_fill(hidden, 0.0)
    poisoned = [tensor.masked_fill(hidden, float("nan")) for tensor in inputs[:3]]

    def attention(*qkv: torch.Tensor) -> torch.Tensor:
        return triton_dropkey_attention(*qkv, make_seed(), 0.3, padding=padding)

    clean = output_and_gradients(attention, inputs, dtype)
    result = output_and_gradients(attention, [*poisoned, inputs[3]], dtype)
    real = ~hidden.expand_as(result[0])
    assert torch.equal(result[0][real], clean[0][real])
    for got, want in zip(result[1:], clean[1:], strict=True):
        assert torch.equal(got, want)
        assert (got[~real] == 0).all()


def test_nan_gradient_of_a_real_row_is_not_hidden() -> None:
    inputs = make_inputs((1, 1, 9, 9), 16, SINGLE)
    inputs[3][0, 0, 2] = 0.0
    inputs[3][0, 0, 2, 1] = float("nan")
    padding = make_padding(1, 9)
    results = output_and_gradients(
        lambda *qkv: triton_dropkey_attention(*qkv, make_seed(), 0.1, padding=padding), inputs, SINGLE
    )
    assert results[1][0, 0, 2].isnan().all()
    assert results[3].isnan().any()


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_row_without_a_real_key_gives_zero(dtype: torch.dtype) -> None:
    inputs = make_inputs((2, 1, 20, 70), 32, dtype)
    padding = torch.ones(2, 70, dtype=torch.bool, device=DEVICE)
    padding[1] = False
    results = output_and_gradients(
        lambda *qkv: triton_dropkey_attention(*qkv, make_seed(), 0.3, padding=padding), inputs, dtype
    )
    for result in results:
        assert (result[0] != 0).any()
        assert (result[1] == 0).all()


# --- memory layout ----------------------------------------------------------------------------------------------------


def layouts(inputs: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """The same numbers with other strides."""
    query, key, value = inputs[:3]
    fused = torch.stack([query, key, value], 3).transpose(1, 2).contiguous()
    return {
        "contiguous": [tensor.contiguous() for tensor in (query, key, value)],
        "slices of one projection": [part.transpose(1, 2) for part in fused.unbind(3)],
        "columns apart": [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in (query, key, value)],
        "queries first": [t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for t in (query, key, value)],
    }


@pytest.mark.parametrize("name", list(layouts(make_inputs((1, 1, 1, 1), 1, SINGLE))))
def test_strides_do_not_change_a_bit(name: str) -> None:
    inputs = make_inputs((2, 2, 33, 33), 24, SINGLE)

    def attention(*qkv: torch.Tensor) -> torch.Tensor:
        return triton_dropkey_attention(*qkv, make_seed(), 0.3)

    expected = output_and_gradients(attention, inputs, SINGLE)
    leaves = [tensor.detach().requires_grad_() for tensor in layouts(inputs)[name]]
    assert name == "contiguous" or any(not leaf.is_contiguous() for leaf in leaves)
    output = attention(*leaves)
    output.backward(inputs[3].transpose(2, 3).contiguous().transpose(2, 3))
    for got, want in zip([output, *(leaf.grad for leaf in leaves)], expected, strict=True):
        assert torch.equal(got.double(), want)


def test_expanded_inputs_and_gradients() -> None:
    query, key, value, _ = make_inputs((1, 1, 9, 20), 16, SINGLE)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    expanded = [leaf.expand(2, 3, -1, -1) for leaf in leaves]
    # the gradient of a sum is itself an expanded tensor
    triton_dropkey_attention(*expanded, make_seed(), 0.3).sum().backward()
    copies = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    output = triton_dropkey_attention(*(leaf.repeat(2, 3, 1, 1) for leaf in copies), make_seed(), 0.3)
    output.backward(torch.ones_like(output))
    for leaf, other in zip(leaves, copies, strict=True):
        assert torch.equal(leaf.grad, other.grad)


def test_strided_seed_and_padding() -> None:
    query, key, value, _ = make_inputs((2, 1, 9, 20), 16, SINGLE)
    padding = make_padding(2, 20)
    expected = triton_dropkey_attention(query, key, value, make_seed(), 0.3, padding=padding)
    seed = make_seed().repeat_interleave(2)[::2]
    assert not seed.is_contiguous()
    padding = padding.t().contiguous().t()
    assert torch.equal(triton_dropkey_attention(query, key, value, seed, 0.3, padding=padding), expected)


def test_output_is_laid_out_for_the_projection_behind_it() -> None:
    query, key, value, _ = make_inputs((2, 3, 5, 9), 16, SINGLE)
    output = triton_dropkey_attention(query.contiguous(), key, value, make_seed(), 0.1)
    assert output.transpose(1, 2).is_contiguous()


# --- as part of training ----------------------------------------------------------------------------------------------


def test_backward_is_deterministic() -> None:
    inputs = make_inputs((1, 2, 150, 150), 32, HALF)

    def run() -> list[torch.Tensor]:
        return output_and_gradients(lambda *qkv: triton_dropkey_attention(*qkv, make_seed(), 0.3), inputs, HALF)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_nothing_of_the_size_of_the_mask_is_saved() -> None:
    inputs = make_inputs((1, 1, 150, 150), 16, SINGLE)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    sizes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        triton_dropkey_attention(*leaves, make_seed(), 0.3)
    # query, key, value, output, seed, thresholds, normaliser, flag
    assert sorted(sizes) == sorted([150 * 16] * 4 + [2, 3, 150, 150])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_bits(use_reentrant: bool) -> None:
    from hf_dropkey.models.counter_hash import draw_seed

    inputs = make_inputs((1, 2, 20, 20), 16, SINGLE)

    def layer(*qkv: torch.Tensor) -> torch.Tensor:
        return triton_dropkey_attention(*qkv, draw_seed(DEVICE), 0.3)

    def run(function: Any) -> list[torch.Tensor]:
        torch.manual_seed(5)
        return output_and_gradients(function, inputs, SINGLE)

    plain = run(layer)
    recomputed = run(lambda *qkv: checkpoint(layer, *qkv, use_reentrant=use_reentrant))
    for first, second in zip(plain, recomputed, strict=True):
        assert torch.equal(first, second)


def test_eager_mode_and_the_operator_give_the_same_bits() -> None:
    """Eager mode goes round the operator, which costs the host twice as much."""
    inputs, limits = make_inputs((1, 2, 20, 33), 16, SINGLE), threshold_tensor(0.3, DEVICE)
    eager = output_and_gradients(lambda *qkv: triton_dropkey_attention(*qkv, make_seed(), 0.3), inputs, SINGLE)
    operator = output_and_gradients(
        lambda *qkv: triton_attention._attention(*qkv, make_seed(), limits, None, 16**-0.5, False)[0], inputs, SINGLE
    )
    for got, want in zip(operator, eager, strict=True):
        assert torch.equal(got, want)


def test_thresholds_are_made_once_for_each_ratio() -> None:
    first = triton_attention.limits_of(0.3, DEVICE)
    assert first is triton_attention.limits_of(0.3, DEVICE) and first is not triton_attention.limits_of(0.4, DEVICE)
    with torch.inference_mode():
        made = triton_attention.limits_of(0.123, DEVICE)
    assert not made.is_inference(), "an inference tensor could not be saved for a backward pass"


def test_compiles_into_one_graph_for_all_seeds_and_ratios() -> None:
    inputs = make_inputs((1, 2, 20, 33), 16, SINGLE)
    padding = make_padding(1, 33)
    compilations = []

    def backend(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
        compilations.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    def attention(
        seed: torch.Tensor, ratio: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        return triton_dropkey_attention(query * 2, key, value, seed, ratio, padding=padding) * 2

    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    results = []
    for words, ratio in zip(SEEDS, (0.3, 0.1, 0.25), strict=True):
        seed = make_seed(words)
        expected = output_and_gradients(partial(attention, seed, ratio), inputs, SINGLE)
        data = ratio_tensor("score", ratio, 3)
        results.append(output_and_gradients(partial(compiled, seed, data), inputs, SINGLE))
        for got, want in zip(results[-1], expected, strict=True):
            assert torch.equal(got, want)
    assert not torch.equal(results[0][0], results[1][0])
    assert len(compilations) == 1


def test_operators_are_declared_correctly() -> None:
    query, key, value, _ = make_inputs((1, 2, 3, 5), 16, SINGLE, 24)
    padding, limits = make_padding(1, 5), threshold_tensor(0.3, DEVICE)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    torch.library.opcheck(triton_attention._attention, (*leaves, make_seed(), limits, padding, 0.25, False))
    output = triton_attention._attention(query, key, value, make_seed(), limits, padding, 0.25, False)
    torch.library.opcheck(
        triton_attention._attention_backward,
        (torch.ones_like(output[0]), query, key, value, make_seed(), limits, padding, *output, 0.25, False),
    )


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pattern": "token"}, ValueError, "'score', 'key', got 'token'.*leave the keys out beforehand"),
        ({"pattern": "block"}, ValueError, "got 'block'.*use the backend 'sdpa'"),
        ({"pattern": "cross"}, ValueError, "got 'cross'"),
        ({"pattern": "scores"}, ValueError, "Unknown `dropkey_pattern` 'scores'"),
        ({"ratio": 1.0}, ValueError, r"must lie in \[0, 1\), got 1.0"),
        ({"ratio": "0.1"}, TypeError, "must be a number"),
        ({"scaling": 0.0}, ValueError, "`scaling` must be above 0, got 0.0"),
        ({"scaling": float("nan")}, ValueError, "`scaling` must be above 0"),
        ({"dtype": torch.float64}, TypeError, "torch.float64.*Convert them"),
        ({"key": torch.zeros(1, 2, 7, 16, dtype=HALF)}, TypeError, "torch.float32, torch.float16"),
        ({"width": 144}, ValueError, "up to 128, got 144"),
        ({"shape": (1, 2, 0, 7)}, ValueError, r"at least one of everything, got query \(1, 2, 0, 16\)"),
        ({"shape": (1, 2, 5, 0)}, ValueError, "at least one of everything"),
        ({"key": torch.zeros(1, 1, 7, 16)}, ValueError, r"got \(1, 2, 5, 16\), \(1, 1, 7, 16\).*Repeat"),
        ({"key": torch.zeros(2, 7, 16)}, ValueError, "Expected query"),
        ({"value": torch.zeros(1, 2, 6, 16)}, ValueError, "Expected query"),
        ({"seed": torch.zeros(3, dtype=torch.int32)}, ValueError, r"int32 of shape \(2,\) or .*, got.*\(3,\)"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "got torch.int64"),
        ({"seed": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "`seed` is on 'meta'"),
        ({"padding": torch.ones(1, 6, dtype=torch.bool)}, ValueError, r"bool of shape \(1, 7\).*got.*\(1, 6\)"),
        ({"padding": torch.ones(1, 7)}, ValueError, "got torch.float32"),
        ({"padding": torch.ones(1, 1, 1, 7, dtype=torch.bool)}, ValueError, "`padding` must be bool"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    changes = dict(changes)
    dtype, width = changes.pop("dtype", SINGLE), changes.pop("width", 16)
    shape = changes.pop("shape", (1, 2, 5, 7))
    query, key, value, _ = make_inputs(shape, width, dtype)
    arguments = {"query": query, "key": key, "value": value, "seed": make_seed(), "ratio": 0.1} | changes
    with pytest.raises(error, match=message):
        triton_dropkey_attention(**arguments)


def test_wrong_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, _ = (tensor.cpu() for tensor in make_inputs((1, 1, 3, 3), 16, SINGLE))
    monkeypatch.setattr(triton_attention, "INTERPRETED", False)
    assert not triton_is_available(torch.device("cpu"))
    with pytest.raises(ValueError, match="needs a GPU, got tensors on 'cpu'.*TRITON_INTERPRET=1"):
        triton_dropkey_attention(query, key, value, make_seed().cpu(), 0.1)


# --- copies of the module ---------------------------------------------------------------------------------------------


def load_copy(name: str, path: Path = Path(str(triton_attention.__file__))) -> ModuleType:
    """A second copy of the module, as the code of a checkpoint is next to an installed package."""
    spec = importlib.util.spec_from_file_location(f"hf_dropkey.models.{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_copies_of_the_module_work_side_by_side(tmp_path: Path) -> None:
    inputs = make_inputs((1, 1, 9, 20), 16, SINGLE)
    for neighbour in ("triton_kernels.py", "triton_launches.py"):
        shutil.copy(Path(str(triton_attention.__file__)).with_name(neighbour), tmp_path)
    other_release = tmp_path / "triton_attention.py"
    other_release.write_text(Path(str(triton_attention.__file__)).read_text() + "\n# another release\n")
    same, other = load_copy("checkpoint"), load_copy("checkpoint_of_another_release", other_release)
    assert same._attention is triton_attention._attention
    assert other._attention is not triton_attention._attention
    results = []
    for module in (other, same, triton_attention):
        attention = partial(module.triton_dropkey_attention, seed=make_seed(), ratio=0.3)
        results.append(output_and_gradients(attention, inputs, SINGLE))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want)


def test_module_imports_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    # the device code that the copy imports is one without Triton too
    kernels = load_copy("triton_kernels", Path(str(triton_attention.__file__)).with_name("triton_kernels.py"))
    assert not kernels.INTERPRETED
    monkeypatch.setitem(sys.modules, "hf_dropkey.models.triton_kernels", kernels)
    module = load_copy("without_triton")
    assert not module.triton_is_available()
    query, key, value, _ = make_inputs((1, 1, 3, 3), 16, SINGLE)
    with pytest.raises(ImportError, match="needs Triton: run `pip install triton`"):
        module.triton_dropkey_attention(query, key, value, make_seed(), 0.1)
