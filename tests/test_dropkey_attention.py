"""`dropkey_attention` for any module: every backend, against the oracle; where nothing is dropped, PyTorch's attention."""

from typing import Any

import pytest
import torch
from attention_inputs import tensors
from torch import nn

from hf_dropkey import default_backend, dropkey_attention
from hf_dropkey.models.counter_hash import draw_seed
from hf_dropkey.models.patterns import PATTERNS
from hf_dropkey.reference import reference_attention, reference_mask


pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class PlainAttention(nn.Module):
    """The example of the docstring, in a module that knows nothing of Transformers."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(dropkey_attention(query, key, value, 0.1, training=self.training).transpose(1, 2).flatten(2))


def oracle(qkv: list[torch.Tensor], pattern: str, mask: torch.Tensor | None = None) -> torch.Tensor:
    torch.manual_seed(1)
    seed = draw_seed(torch.device("cpu")).tolist()
    shape = (*qkv[0].shape[:3], qkv[1].shape[2])
    real = mask if pattern == "token" else None
    return reference_attention(*qkv, reference_mask(seed, shape, 0.4, pattern=pattern, window=2, real=real), mask)


@pytest.mark.parametrize("backend", ["eager", "sdpa", None])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("padded", [False, True])
def test_outputs_and_gradients_are_those_of_the_oracle(backend: str | None, pattern: str, padded: bool) -> None:
    qkv = tensors(2, 2, 10, 4)
    mask = torch.arange(10) < torch.tensor([[10], [6]]) if padded else None
    torch.manual_seed(1)
    output = dropkey_attention(*qkv, 0.4, pattern=pattern, window=2, attention_mask=mask, backend=backend)
    reference = oracle(qkv, pattern, mask)
    torch.testing.assert_close(output, reference, rtol=0, atol=1e-12)
    upstream = torch.randn_like(output)
    for one, other in zip(
        torch.autograd.grad(output, qkv, upstream), torch.autograd.grad(reference, qkv, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_flex_attention_is_one_of_the_backends(pattern: str) -> None:
    qkv = [tensor.detach().float() for tensor in tensors(2, 2, 10, 16)]
    torch.manual_seed(1)
    output = dropkey_attention(*qkv, 0.4, pattern=pattern, window=2, backend="flex_attention")
    torch.testing.assert_close(output.double(), oracle([t.double() for t in qkv], pattern), rtol=0, atol=2e-4)


@pytest.mark.parametrize("pattern", ["score", "key", "token"])
def test_the_fused_kernel_is_one_of_the_backends(pattern: str) -> None:
    pytest.importorskip("triton", reason="the fused kernel needs Triton, which is not installed")
    qkv = [tensor.detach().to(DEVICE, torch.float32) for tensor in tensors(2, 2, 10, 16)]
    results = []
    for backend in ("sdpa", "dropkey_triton"):
        torch.manual_seed(1)
        results.append(dropkey_attention(*qkv, 0.4, pattern=pattern, backend=backend))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"ratio": 0.0}, {"ratio": 0.5, "training": False}])
@pytest.mark.parametrize("backend", [None, "eager", "sdpa", "flex_attention", "dropkey_triton"])
def test_without_a_drop_it_is_pytorchs_attention_bit_for_bit(settings: dict[str, Any], backend: str | None) -> None:
    qkv = tensors(2, 2, 10, 4)
    mask = (torch.arange(10) < torch.tensor([[10], [6]]))[:, None, None]
    for given in (None, mask):
        found = dropkey_attention(*qkv, **settings, attention_mask=given, scaling=0.3, backend=backend)
        plain = nn.functional.scaled_dot_product_attention(*qkv, attn_mask=given, scale=0.3)
        assert torch.equal(found, plain)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_query_that_may_see_no_key_gets_zero_dropped_or_not(training: bool, dtype: torch.dtype) -> None:
    qkv = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors(2, 2, 10, 4)]
    padding = torch.arange(10) < torch.tensor([[10], [0]])
    lowest = torch.zeros(2, 1, 1, 10, dtype=dtype).masked_fill(~padding[:, None, None], torch.finfo(dtype).min)
    for mask in (padding, lowest, lowest.masked_fill(lowest < 0, -torch.inf)):
        output = dropkey_attention(*qkv, 0.4, attention_mask=mask, training=training)
        assert not output[1].any() and output[0].any()
        for gradient in torch.autograd.grad(output.square().sum(), qkv):
            assert torch.isfinite(gradient).all() and not gradient[1].any()


@pytest.mark.parametrize(("matrix_units", "expected"), [(False, ["sdpa", "eager"]), (True, ["sdpa", "sdpa"])])
def test_the_default_backend_is_that_of_the_models(
    matrix_units: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_dropkey.models import attention

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_units)
    chosen = []
    for name in attention.DROPKEY_BACKENDS:
        original = attention.DROPKEY_BACKENDS[name]

        def record(*inputs: Any, name: str = name, original: Any = original, **settings: Any) -> Any:
            chosen.append(name)
            return original(*inputs, **settings)

        monkeypatch.setitem(attention.DROPKEY_BACKENDS, name, record)
    for dtype in (torch.float32, torch.bfloat16):
        dropkey_attention(*[tensor.detach().to(dtype) for tensor in tensors(1, 1, 4, 4)], 0.1)
    assert chosen == expected == [default_backend("cpu", dtype) for dtype in (torch.float32, torch.bfloat16)]


def test_three_lines_give_any_module_the_real_thing() -> None:
    torch.manual_seed(0)
    module, tokens = PlainAttention(16, 4), torch.randn(2, 20, 16)
    torch.manual_seed(1)
    first = module(tokens)
    torch.manual_seed(1)
    assert torch.equal(module(tokens), first) and not torch.equal(module(tokens), first)
    first.sum().backward()
    module.eval()
    assert torch.equal(module(tokens), module(tokens))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ratio": 1.5}, ValueError, r"`ratio` must lie in \[0, 1\), got 1.5"),
        ({"ratio": None}, TypeError, "`ratio` must be a number"),
        ({"pattern": "column"}, ValueError, "Unknown `pattern` 'column'"),
        ({"backend": "flash_attention_2"}, ValueError, "Unknown `backend` 'flash_attention_2'.*'eager', 'sdpa'"),
        ({"key": torch.zeros(1, 1, 5, 8)}, ValueError, r"got \(1, 2, 4, 8\), \(1, 1, 5, 8\).*Repeat keys"),
        ({"query": torch.zeros(2, 4, 8)}, ValueError, r"Expected query \[B, H, N, D\]"),
        ({"attention_mask": torch.ones(1, 4, 5)}, ValueError, "2 or 4 dimensions"),
        ({"key": torch.zeros(1, 2, 0, 8), "value": torch.zeros(1, 2, 0, 8)}, ValueError, "at least one score"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {
        "query": torch.zeros(1, 2, 4, 8), "key": torch.zeros(1, 2, 5, 8), "value": torch.zeros(1, 2, 5, 8), "ratio": 0.1,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        dropkey_attention(**given | changes)
