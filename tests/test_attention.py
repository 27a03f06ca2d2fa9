"""Every backend against the reference attention: outputs and gradients, masks, patterns, and mistakes of public copies."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_inputs import site, tensors
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_dropkey import DropKeyViTConfig, DropKeyViTModel, default_backend
from hf_dropkey.models import attention, cpu_attention, modeling_dropkey
from hf_dropkey.models.attention import default_device, dropkey_attention_forward
from hf_dropkey.models.attention_mask import real_keys
from hf_dropkey.models.counter_hash import draw_seed
from hf_dropkey.models.dropkey import dropkey_is_active
from hf_dropkey.models.patterns import PATTERNS, dropped_scores, protect_rows
from hf_dropkey.reference import reference_attention


BACKENDS = ["eager", "sdpa"]


def run(
    module: Any, qkv: list[torch.Tensor], mask: torch.Tensor | None, backend: str, seed: int = 1, **kwargs: Any
) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(seed)
    scaling = qkv[0].shape[-1] ** -0.5
    return dropkey_attention_forward(module, *qkv, mask, implementation=backend, scaling=scaling, **kwargs)


def expected_drop(
    module: nn.Module, shape: tuple[int, int, int, int], mask: torch.Tensor | None, seed: int = 1
) -> torch.Tensor:
    torch.manual_seed(seed)
    return dropped_scores(
        draw_seed(torch.device("cpu")),
        shape,
        module.dropkey_ratio,
        pattern=module.dropkey_pattern,
        window=module.dropkey_window,
        real=real_keys(mask),
    )


def padding_masks(images: int, heads: int, keys: int) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(2)
    keep = torch.ones(images, keys, dtype=torch.bool)
    keep[1, keys // 2 :] = False
    four = keep[:, None, None, :]
    bias = torch.randn(1, heads, 1, keys, dtype=torch.float64)
    return {
        "none": None,
        "bool 4-D": four,
        "float 4-D": torch.zeros(four.shape, dtype=torch.float64).masked_fill(~four, torch.finfo(torch.float32).min),
        "float bias": bias,
        "bool 2-D": keep,
        "int 2-D": keep.long(),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("mask_name", ["none", "bool 4-D", "float 4-D", "float bias", "bool 2-D", "int 2-D"])
def test_outputs_and_gradients_equal_the_reference(backend: str, pattern: str, mask_name: str) -> None:
    module, qkv = site(0.4, pattern), tensors(2, 3, 17, 8)
    mask = padding_masks(2, 3, 17)[mask_name]
    if pattern == "token" and mask_name == "float bias":
        mask = mask[:, :1]
    output, _ = run(module, qkv, mask, backend)
    upstream = torch.randn_like(output)
    gradients = torch.autograd.grad(output, qkv, upstream)
    dropped = expected_drop(module, (2, 3, 17, 17), mask)
    reference = reference_attention(*qkv, dropped, mask).transpose(1, 2)
    torch.testing.assert_close(output, reference, rtol=0, atol=1e-12)
    for one, other in zip(gradients, torch.autograd.grad(reference, qkv, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("images", "heads", "queries", "keys"), [(1, 1, 1, 5), (2, 2, 3, 70), (1, 2, 65, 300)])
def test_queries_and_keys_of_different_lengths(backend: str, images: int, heads: int, queries: int, keys: int) -> None:
    module, qkv = site(0.5), tensors(images, heads, queries, 4, keys=keys)
    output, _ = run(module, qkv, None, backend)
    dropped = expected_drop(module, (images, heads, queries, keys), None)
    torch.testing.assert_close(output, reference_attention(*qkv, dropped).transpose(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [5, 50, 197])
def test_backends_drop_the_same_scores(pattern: str, size: int) -> None:
    """Read out of each backend with the identity as values: a score is dropped where its weight is exactly 0."""
    module = site(0.3, pattern)
    query, key, _ = tensors(2, 2, size, 4, dtype=torch.float32)
    value = torch.eye(size).expand(2, 2, size, size)
    weights = [run(module, [query, key, value], None, backend)[0].transpose(1, 2) for backend in BACKENDS]
    dropped = protect_rows(expected_drop(module, (2, 2, size, size), None)).expand(2, 2, size, size)
    for weight in weights:
        assert torch.equal(weight == 0, dropped)
        torch.testing.assert_close(weight.sum(-1), torch.ones(2, 2, size))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_within_twice_the_plain_error(backend: str, dtype: torch.dtype) -> None:
    """The error against float64 is bounded by the error of plain eager attention in the same dtype, times 2."""
    module, exact = site(0.3), tensors(2, 4, 65, 16)
    low = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
    exact = [tensor.detach().double().requires_grad_() for tensor in low]
    upstream = torch.randn(2, 65, 4, 16, dtype=torch.float64).to(dtype).double()

    def errors(outputs: list[torch.Tensor], references: list[torch.Tensor]) -> list[float]:
        pairs = zip(outputs, references, strict=True)
        return [((one.double() - other).norm() / other.norm()).item() for one, other in pairs]

    def eager_dropkey(qkv: list[torch.Tensor]) -> list[torch.Tensor]:
        output = run(module, qkv, None, backend)[0]
        return [output, *torch.autograd.grad(output, qkv, upstream.to(output.dtype))]

    def plain(qkv: list[torch.Tensor]) -> list[torch.Tensor]:
        weights = (qkv[0] @ qkv[1].mT * 0.25).softmax(-1, dtype=torch.promote_types(qkv[0].dtype, torch.float32))
        output = (weights.to(qkv[0].dtype) @ qkv[2]).transpose(1, 2)
        return [output, *torch.autograd.grad(output, qkv, upstream.to(output.dtype))]

    dropkey_errors, plain_errors = errors(eager_dropkey(low), eager_dropkey(exact)), errors(plain(low), plain(exact))
    for one, other in zip(dropkey_errors, plain_errors, strict=True):
        assert one < 2 * other, (dropkey_errors, plain_errors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_that_would_lose_every_key_keep_their_real_ones(backend: str, dtype: torch.dtype, padded: bool) -> None:
    """Few keys at a high ratio: 40 % of the rows would be empty. No NaN, no attention to padding, in any dtype."""
    module, qkv = site(0.9), tensors(8, 4, 9, 8, dtype=dtype, keys=9)
    mask = (torch.arange(9) < 4).expand(8, 9) if padded else None
    value = qkv[2].detach().clone()
    if padded:
        value[:, :, 4:] = 100
    output, _ = run(module, [*qkv[:2], value], mask, backend)
    dropped = expected_drop(module, (8, 4, 9, 9), mask)
    assert (dropped[..., :4] if padded else dropped).all(-1).any(), "the test needs rows at risk"
    reference = reference_attention(*(t.double() for t in qkv[:2]), value.double(), dropped, mask).transpose(1, 2)
    gradients = torch.autograd.grad(output.sum(), qkv[:2])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(output.double(), reference, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("mask_name", ["bool 4-D", "float 4-D", "bool 2-D", "bool with queries"])
def test_nan_in_padding_reaches_neither_outputs_nor_gradients(backend: str, pattern: str, mask_name: str) -> None:
    module, qkv = site(0.4, pattern), tensors(2, 3, 17, 8)
    masks = padding_masks(2, 3, 17)
    mask = masks.get(mask_name, masks["bool 4-D"].expand(-1, -1, 17, -1))
    hidden = ~masks["bool 2-D"][:, None, :, None]
    # no loss looks at a padded query
    upstream = torch.randn(2, 17, 3, 8, dtype=torch.float64).masked_fill(hidden.transpose(1, 2), 0.0)
    found = []
    for inputs in (qkv, [tensor.detach().masked_fill(hidden, math.nan).requires_grad_() for tensor in qkv]):
        output, _ = run(module, inputs, mask, backend)
        found.append([output.masked_fill(hidden.transpose(1, 2), 0.0), *torch.autograd.grad(output, inputs, upstream)])
    for clean, poisoned in zip(*found, strict=True):
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_dropped_score_is_exactly_zero(backend: str) -> None:
    """With one query, a key that is dropped gets no gradient at all, and a kept one does."""
    module, qkv = site(0.5), tensors(1, 1, 1, 8, keys=40)
    output, _ = run(module, qkv, None, backend)
    key_gradient = torch.autograd.grad(output.square().sum(), qkv[1])[0]
    dropped = expected_drop(module, (1, 1, 1, 40), None)[0, 0, 0]
    assert torch.equal(key_gradient[0, 0].abs().sum(-1) == 0, dropped)


@pytest.mark.parametrize("pattern", ["score", "key", "token"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fused_kernel_is_one_more_backend(pattern: str, padded: bool) -> None:
    """By its name, in training and in eval, with the scores that sdpa drops."""
    pytest.importorskip("triton", reason="the fused kernel needs Triton, which is not installed")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, qkv = site(0.4, pattern), [t.detach().to(device, torch.float32) for t in tensors(2, 2, 17, 16)]
    mask = None
    if padded:
        mask = (torch.arange(17, device=device) < torch.tensor([[17], [5]], device=device))[:, None, None]
    outputs = [run(module, qkv, mask, backend)[0] for backend in ("sdpa", "dropkey_triton")]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def test_what_the_fused_kernel_cannot_do_is_refused() -> None:
    qkv = tensors(1, 1, 4, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"'dropkey_triton' takes neither dropout .*requested 0.1"):
        run(site(0.1), qkv, None, "dropkey_triton", dropout=0.1)
    with pytest.raises(ValueError, match="nor additive masks"):
        run(site(0.1), qkv, torch.zeros(1, 1, 4, 4), "dropkey_triton")
    with pytest.raises(ValueError, match="expected padding, got a mask of shape"):
        run(site(0.1), qkv, torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(), "dropkey_triton")


def test_dropout_on_weights_can_be_added_when_asked_for() -> None:
    module, qkv = site(0.3), tensors(2, 4, 50, 8)
    _, weights = run(module, qkv, None, "eager", dropout=0.5)
    _, without = run(module, qkv, None, "eager")
    assert (without == 0).double().mean() < 0.35 and (weights == 0).double().mean() > 0.55


def test_activity_follows_training_and_ratio() -> None:
    assert dropkey_is_active(site(0.1))
    assert not dropkey_is_active(site(0.1).eval())
    assert not dropkey_is_active(site(0.0))
    always, never = site(0.1).eval(), site(0.1)
    always.dropkey_mode, never.dropkey_mode = "always", "never"
    assert dropkey_is_active(always)
    assert not dropkey_is_active(never)


@pytest.mark.parametrize(
    "backend", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "paged|eager"]
)
def test_backends_that_cannot_drop_scores_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=r"cannot leave out single attention scores.*'eager', .*'sdpa'"):
        run(site(0.1), tensors(1, 1, 4, 4), None, backend)


def test_masks_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 or 4 dimensions"):
        run(site(0.1), tensors(1, 1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool), "eager")


# --- the mistakes of public copies, each impossible here --------------------------------------------------------------


def eager_weights(
    module: nn.Module, mask: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    qkv = tensors(4, 4, 60, 8, dtype=dtype)
    return run(module, qkv, mask, "eager")[1]


def test_mistake_penalty_of_minus_1e_minus_12_drops_nothing() -> None:
    assert 0.29 < (eager_weights(site(0.3)) == 0).float().mean() < 0.31


def test_mistake_mask_after_the_softmax() -> None:
    """Rows still sum to 1, which a mask on the weights, rescaled by 1 / (1 - ratio) or not, does not give."""
    sums = eager_weights(site(0.5)).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_mistake_one_mask_for_the_batch_or_for_heads_or_queries() -> None:
    zero = (eager_weights(site(0.5)) == 0).float()
    for axis in range(3):
        first, second = zero.select(axis, 0), zero.select(axis, 1)
        assert 0.4 < (first == second).float().mean() < 0.6


def test_mistake_channels_or_whole_tokens_dropped() -> None:
    """Keys are dropped per query: none is gone for all queries of a head, as a dropped token or channel would be."""
    zero = eager_weights(site(0.5)) == 0
    assert zero.any(2).all() and not zero.all(2).any()


def test_mistake_scores_set_to_zero() -> None:
    """nn.Dropout on the scores leaves a dropped key the weight exp(0); here its weight is exactly 0."""
    weights = eager_weights(site(0.3))
    dropped = expected_drop(site(0.3), (4, 4, 60, 60), None)
    assert (weights[dropped] == 0).all() and (weights[~dropped] > 0).all()


def test_mistake_overflow_in_half_precision() -> None:
    weights = eager_weights(site(0.9), dtype=torch.float16)
    assert torch.isfinite(weights).all()


def test_mistake_padding_at_minus_1e9_beside_drop_at_minus_1e12() -> None:
    """An empty row must fall back to its real keys, not to the padding that is merely less negative."""
    mask = torch.zeros(4, 1, 1, 60).masked_fill(torch.arange(60) >= 3, -1e9)
    weights = eager_weights(site(0.9), mask)
    assert not weights[..., 3:].any()
    torch.testing.assert_close(weights[..., :3].sum(-1), torch.ones(4, 4, 60))


def test_mistake_tokens_taken_for_the_head_width() -> None:
    """The scale is the module's D ** -0.5 whatever N is."""
    module, qkv = site(1e-9), tensors(1, 1, 33, 16)
    output = run(module, qkv, None, "eager")[0].transpose(1, 2)
    torch.testing.assert_close(output, nn.functional.scaled_dot_product_attention(*qkv), rtol=0, atol=1e-12)


def test_mistake_ratio_that_means_another_thing_per_backend() -> None:
    module = site(0.25)
    query, key, _ = tensors(4, 4, 100, 8, dtype=torch.float32)
    value = torch.eye(100).expand(4, 4, 100, 100)
    for backend in BACKENDS:
        zero = run(module, [query, key, value], None, backend)[0] == 0
        assert abs(zero.double().mean() - 0.25) < 3 * math.sqrt(0.1875 / zero.numel())


def test_functions_hold_no_state() -> None:
    """A package copy and a checkpoint's copy share a process: nothing may be kept outside the module."""
    plain: Any = SimpleNamespace(dropkey_ratio=0.3, dropkey_pattern="score", dropkey_window=2)
    qkv = tensors(1, 2, 9, 4)
    first, second = run(plain, qkv, None, "sdpa")[0], run(site(0.3), qkv, None, "sdpa")[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("transposed", [0, 1, 2])
def test_inputs_of_any_layout_give_what_dense_ones_give(transposed: int) -> None:
    """A last dimension that is not dense, as of a transposed view, is read right, in both passes."""
    dense = tensors(2, 3, 70, 8, dtype=torch.float32)
    given = list(dense)
    given[transposed] = dense[transposed].mT.contiguous().mT
    assert given[transposed].stride(-1) != 1
    expected, found = run(site(0.3), dense, None, "sdpa")[0], run(site(0.3), given, None, "sdpa")[0]
    assert torch.equal(found, expected)
    upstream = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, dense, upstream), torch.autograd.grad(expected, dense, upstream), strict=True
    ):
        assert torch.equal(one, other)


def test_mixed_dtypes_under_autocast_are_left_to_pytorch() -> None:
    query, key, value = tensors(2, 3, 70, 8, dtype=torch.float32)
    expected = run(site(0.3), [query, key, value], None, "sdpa")[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = run(site(0.3), [query, key, value.bfloat16()], None, "sdpa")[0]
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def test_a_default_device_is_not_that_of_the_masks() -> None:
    expected = run(site(0.3), tensors(2, 3, 70, 8), None, "sdpa")[0]
    qkv = tensors(2, 3, 70, 8)
    with torch.device("meta"):
        assert torch.equal(run(site(0.3), qkv, None, "sdpa")[0], expected)


def test_checkpointing_takes_another_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = tensors(2, 1, 30, 8)
    plain = torch.autograd.grad(run(site(0.3), qkv, None, "sdpa")[0].sum(), qkv)
    threads = [1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(cpu_attention, "CHUNK_BYTES", 1)
    assert len(cpu_attention.chunks_of(*qkv[:2])) == 60
    threads[0] = 2
    assert len(cpu_attention.chunks_of(*qkv[:2])) == 30
    output = checkpoint(lambda *given: run(site(0.3), list(given), None, "sdpa")[0], *qkv, use_reentrant=False)
    threads[0] = 1
    for one, other in zip(torch.autograd.grad(output.sum(), qkv), plain, strict=True):
        torch.testing.assert_close(one, other)


def test_layers_draw_into_the_same_memory_until_their_backward_pass() -> None:
    large, small = tensors(2, 2, 70, 8), tensors(2, 2, 30, 8)
    held = cpu_attention._LAST_MASK
    first = run(site(0.3), large, None, "sdpa")[0]
    memory = held.memory()
    assert memory is not None and memory.numel() == 4 * 2 * 2 * 70 * 70
    second = run(site(0.3), small, None, "sdpa")[0]
    assert held.memory() is memory
    del memory
    expected = torch.autograd.grad(first.sum(), large, retain_graph=True)
    assert held.memory() is not None, "the second layer holds it"
    torch.autograd.grad(second.sum(), small)
    assert held.memory() is None
    # the graph may be used again
    for one, other in zip(torch.autograd.grad(first.sum(), large), expected, strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        run(site(0.3), large, None, "sdpa")
    assert held.memory() is None


def test_memory_of_masks_is_of_one_thread_and_outlives_inference_mode() -> None:
    qkv = tensors(2, 2, 70, 8)
    padding = torch.ones(2, 70, dtype=torch.bool)
    padding[0, 60:] = False

    def gradients(inference: bool = False) -> list[torch.Tensor]:
        torch.manual_seed(3)
        if inference:
            with torch.inference_mode():
                run(site(0.3), [tensor.detach() for tensor in qkv], padding, "sdpa")
            torch.manual_seed(3)
        output = run(site(0.3), qkv, padding, "sdpa")[0]
        if inference:
            # draws into the memory that the graph holds, and may not leave it to inference mode
            with torch.inference_mode():
                run(site(0.3), [tensor.detach() for tensor in qkv], padding, "sdpa")
        return [output, *torch.autograd.grad(output.sum(), qkv)]

    expected = gradients()
    for one, other in zip(gradients(inference=True), expected, strict=True):
        assert torch.equal(one, other)
    torch.manual_seed(3)
    output = run(site(0.3), qkv, padding, "sdpa")[0]
    with ThreadPoolExecutor(1) as pool:
        memory = pool.submit(lambda: (cpu_attention._LAST_MASK.memory(), torch.autograd.grad(output.sum(), qkv)))
        elsewhere, found = memory.result()
    assert elsewhere is None
    for one, other in zip(found, expected[1:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", attention.DROPKEY_BACKENDS)
@pytest.mark.parametrize(("images", "queries", "keys"), [(0, 4, 4), (1, 0, 4), (1, 4, 0)])
def test_attention_without_scores_is_refused(backend: str, images: int, queries: int, keys: int) -> None:
    query, key = torch.randn(images, 2, queries, 8), torch.randn(images, 2, keys, 8)
    with pytest.raises(ValueError, match="at least one score, got query"):
        run(site(0.3), [query, key, key], None, backend)


@pytest.mark.parametrize(
    ("rows", "threads", "parts"),
    [
        # of five images with three heads and 19 queries: two images, one image, 7 and 7 and 5 queries of one image
        (2 * 3 * 19, 3, 3),
        (3 * 19, 3, 5),
        (3 * 8, 3, 5 * 3),
        # a head for each thread: two images, and a tenth of their queries
        (3 * 4, 4, 3 * 10),
        # two heads of one image and the third, at once and in parts of 9 and 9 and 1 queries
        (2 * 19, 1, 5 * 2),
        (19, 2, 5 * 2 * 3),
        # a query of a head
        (1, 1, 5 * 3 * 19),
        (5 * 3 * 19, 1, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_batch_in_parts_gives_what_it_gives_at_once(
    rows: int, threads: int, parts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, qkv = site(0.01), tensors(5, 3, 19, 8, dtype=dtype, keys=23)
    whole, _ = run(module, qkv, None, "sdpa")
    upstream = torch.randn_like(whole)
    gradients = torch.autograd.grad(whole, qkv, upstream)
    monkeypatch.setattr(cpu_attention, "CHUNK_BYTES", 4 * 23 * rows)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    cut = cpu_attention.chunks_of(*qkv[:2])
    assert len(cut) == parts
    taken = torch.zeros(5, 3, 19)
    for part in cut:
        taken[part] += 1
    assert bool((taken == 1).all())
    result, _ = run(module, qkv, None, "sdpa")
    # fewer queries are multiplied by another kernel, and their shares of the gradients are added in another order
    exact = all(part[2] == slice(0, 19) for part in cut)
    tolerance = 0.0 if exact else 1e-2 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(result, whole, rtol=tolerance, atol=tolerance)
    for one, other in zip(torch.autograd.grad(result, qkv, upstream), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("device", "dtype", "matrix_units", "expected"),
    [
        ("cpu", torch.float32, False, "sdpa"),
        ("cpu", torch.bfloat16, False, "eager"),
        ("cpu", torch.float16, False, "eager"),
        ("cpu", torch.bfloat16, True, "sdpa"),
        ("cuda", torch.bfloat16, False, "sdpa"),
    ],
)
def test_default_backend(
    device: str, dtype: torch.dtype, matrix_units: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_units)
    assert default_backend(device, dtype) == expected


@pytest.mark.parametrize("matrix_units", [False, True])
def test_a_model_takes_the_default_backend_and_says_so(matrix_units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_units)
    lines: list[str] = []
    monkeypatch.setattr(modeling_dropkey.logger, "info_once", lines.append)
    config = DropKeyViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    expected = default_backend(default_device().type, torch.bfloat16)
    model = DropKeyViTModel._from_config(config, dtype=torch.bfloat16)
    assert model.config._attn_implementation == expected
    assert len(lines) == 1 and repr(expected) in lines[0] and "bfloat16" in lines[0]
    asked = DropKeyViTModel._from_config(copy.deepcopy(config), dtype=torch.bfloat16, attn_implementation="sdpa")
    assert asked.config._attn_implementation == "sdpa" and len(lines) == 1
