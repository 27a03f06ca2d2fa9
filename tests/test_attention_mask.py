"""Attention masks of every form on every backend: queries that may see no key, dtypes, transforms, and refusals."""

import math
from typing import Any

import pytest
import torch
from attention_inputs import site, tensors
from torch import nn

from hf_dropkey.models import cpu_attention
from hf_dropkey.models.attention import dropkey_attention_forward
from hf_dropkey.models.attention_mask import (
    additive,
    additive_mask,
    blind_rows,
    keep_tokens,
    real_keys,
    settings_of,
)
from hf_dropkey.models.counter_hash import draw_seed
from hf_dropkey.models.patterns import PATTERNS, padding_of
from hf_dropkey.reference import reference_attention, reference_mask


IMAGES, HEADS, LENGTH = 3, 2, 12
SEED = torch.tensor([1, 2], dtype=torch.int32)
# image 1 sees nothing, image 2 sees a few keys
LENGTHS = torch.tensor([LENGTH, 0, 5])
FORMS = ("bool [B, M]", "int [B, M]", "bool 4-D", "-inf", "finfo.min", "float16 minimum", "with biases", "by query")
pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")


def mask_of(form: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """One mask in many forms; "by query" hides keys from some queries of all images, and all keys from one."""
    keep = torch.arange(LENGTH) < LENGTHS[:, None]
    four = keep[:, None, None]
    if form == "by query":
        seen = four & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        seen[0, :, 4] = False
        return seen
    forms = {
        "bool [B, M]": keep,
        "int [B, M]": keep.long(),
        "bool 4-D": four,
        "-inf": torch.zeros(four.shape, dtype=dtype).masked_fill(~four, -math.inf),
        "finfo.min": torch.zeros(four.shape, dtype=dtype).masked_fill(~four, torch.finfo(dtype).min),
        "float16 minimum": torch.zeros(four.shape, dtype=torch.float16).masked_fill(~four, -65504.0),
        "with biases": torch.linspace(-2, 2, LENGTH, dtype=dtype).expand(four.shape).masked_fill(~four, -3e4),
    }
    return forms[form]


def attend(
    qkv: list[torch.Tensor], mask: torch.Tensor, backend: str, pattern: str, **settings: Any
) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(1)
    output, weights = dropkey_attention_forward(
        site(settings.pop("ratio", 0.4), pattern), *qkv, mask, implementation=backend, scaling=0.5, **settings
    )
    return output.transpose(1, 2), weights


def expected(qkv: list[torch.Tensor], mask: torch.Tensor, pattern: str, ratio: float = 0.4) -> torch.Tensor:
    """The oracle's answer, all of it drawn and masked by its own code."""
    torch.manual_seed(1)
    seed = draw_seed(torch.device("cpu")).tolist()
    keep = (torch.arange(LENGTH) < LENGTHS[:, None]) if pattern == "token" else None
    dropped = reference_mask(seed, (IMAGES, HEADS, LENGTH, LENGTH), ratio, pattern=pattern, window=2, real=keep)
    return reference_attention(*qkv, dropped, mask, scaling=0.5)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("form", FORMS)
def test_a_query_that_may_see_no_key_gives_zero_in_both_passes(backend: str, pattern: str, form: str) -> None:
    if pattern == "token" and form == "by query":
        pytest.skip("the pattern 'token' takes padding only")
    qkv, mask = tensors(IMAGES, HEADS, LENGTH, 4), mask_of(form)
    output, weights = attend(qkv, mask, backend, pattern)
    reference = expected(qkv, mask, pattern)
    blind = blind_rows(real_keys(mask)).expand_as(output)
    assert blind.any() and not blind.all()
    assert not output[blind].any() and (weights is None or not weights[~torch.isfinite(weights)].numel())
    torch.testing.assert_close(output, reference, rtol=0, atol=1e-12)
    upstream = torch.randn_like(output)
    found, wanted = torch.autograd.grad(output, qkv, upstream), torch.autograd.grad(reference, qkv, upstream)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["bool 4-D", "-inf", "finfo.min"])
def test_blind_queries_give_zero_in_low_precision(backend: str, form: str, dtype: torch.dtype) -> None:
    qkv = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors(IMAGES, HEADS, LENGTH, 8)]
    output, _ = attend(qkv, mask_of(form, dtype), backend, "score")
    assert not output[1].any() and output[0].any()
    for gradient in torch.autograd.grad(output.square().sum(), qkv):
        assert torch.isfinite(gradient).all() and not gradient[1].any() and gradient[0].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_flex_attention_gives_zero_too(pattern: str, form: str) -> None:
    if pattern == "token" and form == "by query":
        pytest.skip("the pattern 'token' takes padding only")
    qkv = [tensor.detach().float() for tensor in tensors(IMAGES, HEADS, LENGTH, 16)]
    mask = mask_of(form, torch.float32)
    with torch.no_grad():
        output, _ = attend(qkv, mask, "flex_attention", pattern)
    reference = expected([tensor.double() for tensor in qkv], mask, pattern)
    torch.testing.assert_close(output.double(), reference, rtol=0, atol=2e-4)
    assert not output[blind_rows(real_keys(mask)).expand_as(output)].any()


@pytest.mark.parametrize("form", ["bool [B, M]", "bool 4-D", "int [B, M]"])
@pytest.mark.parametrize("pattern", ["score", "key", "token"])
def test_the_fused_kernel_gives_zero_too(pattern: str, form: str) -> None:
    pytest.importorskip("triton", reason="the fused kernel needs Triton, which is not installed")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    qkv = [tensor.detach().to(device, torch.float32).requires_grad_() for tensor in tensors(IMAGES, HEADS, LENGTH, 16)]
    output, _ = attend(qkv, mask_of(form).to(device), "dropkey_triton", pattern)
    assert not output[1].any() and output[0].any()
    for gradient in torch.autograd.grad(output.square().sum(), qkv):
        assert not gradient[1].any() and gradient[0].any()


@pytest.mark.parametrize("form", ["-inf", "bool 4-D", "finfo.min"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_loss_that_leaves_a_blind_image_out_has_finite_weight_gradients(backend: str, form: str) -> None:
    projection = nn.Linear(8, 24).double()
    tokens = torch.randn(IMAGES, LENGTH, 8, dtype=torch.float64)
    qkv = projection(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind()
    output, _ = attend(list(qkv), mask_of(form), backend, "score")
    output[0].square().sum().backward()
    assert projection.weight.grad is not None and torch.isfinite(projection.weight.grad).all()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_pytorchs_other_kernels_are_not_trusted_with_blind_rows(dropout: float) -> None:
    """Values of another width, or dropout, take PyTorch's own choice of a kernel."""
    query, key, _ = tensors(IMAGES, HEADS, LENGTH, 4)
    value = torch.randn(IMAGES, HEADS, LENGTH, 6, dtype=torch.float64, requires_grad=True)
    output, _ = attend([query, key, value], mask_of("-inf"), "sdpa", "score", dropout=dropout)
    assert not output[1].any() and torch.isfinite(output).all()
    for gradient in torch.autograd.grad(output.square().sum(), (query, key, value)):
        assert torch.isfinite(gradient).all() and not gradient[1].any()


# --- forms and dtypes of masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_float_mask_of_two_dimensions(backend: str, pattern: str) -> None:
    qkv, bias = tensors(IMAGES, HEADS, LENGTH, 4), torch.randn(LENGTH, LENGTH, dtype=torch.float64)
    bias[:, -2:] = -1e9
    output, _ = attend(qkv, bias, backend, pattern)
    dropped = reference_drops(pattern, (torch.arange(LENGTH) < LENGTH - 2).expand(IMAGES, -1))
    torch.testing.assert_close(output, reference_attention(*qkv, dropped, bias, scaling=0.5), rtol=0, atol=1e-12)


def reference_drops(pattern: str, keep: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    seed = draw_seed(torch.device("cpu")).tolist()
    real = keep if pattern == "token" else None
    return reference_mask(seed, (IMAGES, HEADS, LENGTH, LENGTH), 0.4, pattern=pattern, window=2, real=real)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("pattern", ["score", "token"])
@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_any_float_dtype_in_models_of_another(
    backend: str, pattern: str, mask_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """An exact mask (0 and the dtype's minimum) gives what the bool one gives."""
    qkv = [tensor.detach().to(dtype) for tensor in tensors(IMAGES, HEADS, LENGTH, 16)]
    with torch.no_grad():
        found, _ = attend(qkv, mask_of("finfo.min", mask_dtype), backend, pattern)
        wanted, _ = attend(qkv, mask_of("bool 4-D"), backend, pattern)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_learned_biases_get_their_gradient_beside_a_drop(backend: str) -> None:
    qkv = tensors(IMAGES, HEADS, LENGTH, 4)
    bias = torch.randn(1, HEADS, LENGTH, LENGTH, dtype=torch.float64, requires_grad=True)
    output, _ = attend(qkv, bias, backend, "score")
    reference = expected(qkv, bias, "score")
    upstream = torch.randn_like(output)
    torch.testing.assert_close(
        torch.autograd.grad(output, bias, upstream)[0], torch.autograd.grad(reference, bias, upstream)[0]
    )


def test_additive_keeps_biases_and_hides_padding() -> None:
    assert additive(torch.tensor([[1, 0]])).tolist() == [[[[0.0, -math.inf]]]]
    assert additive(torch.tensor([[[[0.5, -1e4]]]])).tolist() == [[[[0.5, -math.inf]]]]


def test_what_the_pattern_token_leaves_of_an_image_without_real_keys() -> None:
    key = torch.randn(2, 1, 6, 4)
    left = keep_tokens(SEED, key, key, torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]), 0.5)
    assert left.blind is not None and left.blind.flatten().tolist() == [False, True]
    assert left.attention_mask is not None and left.attention_mask.sum(-1).tolist() == [3, 1]
    assert keep_tokens(SEED, key, key, None, 0.5).blind is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_a_mask_in_parts_is_the_mask_in_one(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one image, of some heads and queries, drawn one after the other into the same memory."""
    query, key, _ = tensors(IMAGES, HEADS, LENGTH, 8, dtype=dtype)
    mask, settings = mask_of(form, torch.float32), settings_of(site(0.6), None)
    whole = additive_mask(SEED, query, key, mask, settings).expand(IMAGES, HEADS, LENGTH, LENGTH)
    for size in (1, 4 * LENGTH * 5, 4 * LENGTH * LENGTH, 4 * HEADS * LENGTH * LENGTH):
        monkeypatch.setattr(cpu_attention, "CHUNK_BYTES", size)
        state = cpu_attention._state_of_rows(SEED, query, key, mask, settings)
        assert state is not None
        chunks = cpu_attention.chunks_of(query, key)
        assert len(chunks) > 1
        memory = cpu_attention.mask_memory(chunks, query, key)
        for chunk, part in cpu_attention.additive_mask_chunks(SEED, state, chunks, memory, query, key, mask, settings):
            assert part.dtype == dtype and torch.equal(part, whole[chunk])


# --- autocast and transforms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float16),
    ],
)
def test_autocast_gives_its_own_dtype_as_pytorchs_attention_does(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> None:
    exact = tensors(IMAGES, HEADS, LENGTH, 8, dtype=torch.float32)
    qkv = [tensor.detach().to(dtype).requires_grad_() for tensor, dtype in zip(exact, dtypes, strict=True)]
    mask = mask_of("bool 4-D")
    with torch.autocast("cpu", torch.bfloat16):
        plain = nn.functional.scaled_dot_product_attention(*qkv)
        found, _ = attend(qkv, mask, backend, "score")
    assert found.dtype == plain.dtype == torch.bfloat16
    wanted, _ = attend(exact, mask, "sdpa", "score")
    torch.testing.assert_close(found.float(), wanted, rtol=3e-2, atol=3e-2)
    for gradient, tensor in zip(torch.autograd.grad(found.float().sum(), qkv), qkv, strict=True):
        assert gradient.dtype == tensor.dtype and torch.isfinite(gradient).all()


def test_mixed_dtypes_without_autocast_are_refused_as_by_pytorch() -> None:
    query, key, value = tensors(IMAGES, HEADS, LENGTH, 8, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="same dtype"):
        attend([query, key.bfloat16(), value], None, "sdpa", "score")


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("pattern", ["score", "key", "block"])
@pytest.mark.parametrize("masked", [False, True])
def test_functional_gradients_and_vmap(backend: str, pattern: str, masked: bool) -> None:
    """`torch.func.grad`, and gradients of each sample by `vmap` of it, as PyTorch's own attention takes them."""
    qkv = [tensor.detach() for tensor in tensors(IMAGES, HEADS, LENGTH, 4)]
    mask = mask_of("bool 4-D") if masked else None

    def loss(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = mask) -> torch.Tensor:
        return (
            dropkey_attention_forward(
                site(0.4, pattern), query, key, value, mask, implementation=backend, scaling=0.5
            )[0]
            .square()
            .sum()
        )

    torch.manual_seed(1)
    found = torch.func.grad(loss, argnums=(0, 1, 2))(*qkv)
    leaves = [tensor.clone().requires_grad_() for tensor in qkv]
    torch.manual_seed(1)
    for one, other in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)

    def sample_loss(*one: torch.Tensor) -> torch.Tensor:
        return loss(*(tensor[None] for tensor in one), mask=None)

    torch.manual_seed(1)
    each = torch.func.vmap(torch.func.grad(sample_loss), randomness="different")(*qkv)
    assert each.shape == qkv[0].shape and torch.isfinite(each).all()
    torch.manual_seed(1)
    shared = torch.func.vmap(torch.func.grad(sample_loss), randomness="same")(*qkv)
    torch.manual_seed(1)
    torch.testing.assert_close(shared[2], torch.func.grad(sample_loss)(*(tensor[2] for tensor in qkv)))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_masks_that_differ_by_query_are_refused_on_the_host_and_checked_once() -> None:
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    assert padding_of(real_keys(mask), "test", mask).shape == (2, 4)
    assert mask._dropkey_checked == mask._version
    # the note holds for the mask as it was: written to, it is read again
    mask[0, 0, 0, 1] = False
    with pytest.raises(ValueError, match="The test leaves a key out for all queries.*differs by query or head"):
        padding_of(real_keys(mask), "test", mask)


def test_a_mask_of_inference_mode_is_checked_each_time() -> None:
    with torch.inference_mode():
        mask = torch.ones(2, 1, 4, 4, dtype=torch.bool)
        assert padding_of(real_keys(mask), "test", mask).all()
        mask[0, 0, 0, 1] = False
        with pytest.raises(ValueError, match="differs by query"):
            padding_of(real_keys(mask), "test", mask)
