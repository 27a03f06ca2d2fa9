"""The mask-only kernel draws, bit for bit, the additive mask that PyTorch's operations draw.

Where there is no GPU, Triton's interpreter runs it (see test_triton_attention.py).
"""

import os
from typing import Any

import pytest
import torch
from attention_inputs import site, tensors


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton", reason="the kernel needs Triton, which is not installed")

from hf_dropkey.models import attention
from hf_dropkey.models.attention_mask import Settings, additive_mask
from hf_dropkey.models.triton_mask import can_draw, drawn_mask


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEED = torch.tensor((123456789, -987654321), dtype=torch.int32, device=DEVICE)


def padding_of(form: str, images: int, keys: int) -> torch.Tensor | None:
    """A prefix in the first image, nothing in the last."""
    keep = torch.arange(keys, device=DEVICE) < torch.tensor(
        [[max(1, keys // 2)]] * (images - 1) + [[0]], device=DEVICE
    )
    forms = {"none": None, "bool": keep, "int": keep.long(), "4-D": keep[:, None, None], "one for all": keep[:1]}
    return forms[form]


@pytest.mark.parametrize(
    ("shape", "ratio", "pattern", "form"),
    [
        ((2, 3, 5, 9), 0.5, "score", "none"),
        ((2, 2, 17, 5), 0.9, "score", "none"),
        ((1, 2, 33, 197), 0.1, "score", "none"),
        ((2, 1, 3, 577), 0.3, "score", "bool"),
        ((2, 2, 18, 64), 0.8, "score", "4-D"),
        ((2, 1, 4, 70), 0.5, "score", "int"),
        ((2, 2, 4, 70), 0.95, "score", "one for all"),
        ((2, 3, 9, 130), 0.3, "key", "none"),
        ((2, 3, 9, 6), 0.9, "key", "bool"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_additive_mask(
    shape: tuple[int, int, int, int], ratio: float, pattern: str, form: str, dtype: torch.dtype
) -> None:
    images, heads, queries, keys = shape
    query = torch.zeros(images, heads, queries, 8, dtype=dtype, device=DEVICE)
    key = torch.zeros(images, heads, keys, 8, dtype=dtype, device=DEVICE)
    mask = padding_of(form, images, keys)
    found = drawn_mask(SEED, query, keys, mask, ratio, pattern)
    expected = additive_mask(SEED, query, key, mask, Settings(ratio, pattern, 3, None))
    assert found.dtype == dtype and torch.equal(found.expand(shape), expected.expand(shape))
    # PyTorch copies a mask whose rows lie at another stride
    assert found.stride(2) % 8 == 0 and found.stride(3) == 1
    assert 0 < (found == 0).sum() < found.numel()


def test_what_the_kernel_serves() -> None:
    query = torch.zeros(1, 1, 4, 8)
    assert not can_draw(query, None, "score"), "on a CPU the masks are drawn in place"

    class OnGpu:
        is_cuda, device = True, torch.device("cuda")

    fake: Any = OnGpu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_dropkey.models.triton_mask.triton_is_available", lambda device: True)
        assert can_draw(fake, None, "score") and can_draw(fake, torch.ones(1, 4, dtype=torch.bool), "key")
        assert can_draw(fake, torch.ones(1, 1, 1, 4, dtype=torch.bool), "score")
        for mask, pattern in (
            (torch.ones(1, 1, 4, 4, dtype=torch.bool), "score"),
            (torch.zeros(1, 1, 1, 4), "score"),
            (None, "block"),
            (None, "token"),
        ):
            assert not can_draw(fake, mask, pattern)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_with_the_drawn_mask_is_the_same(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the path that a GPU takes: PyTorch's attention with a mask."""
    qkv = [tensor.detach().to(DEVICE, torch.float32).requires_grad_() for tensor in tensors(2, 2, 21, 8)]
    mask = padding_of("bool", 2, 21) if padded else None
    monkeypatch.setattr(attention, "can_redraw", lambda *_: False)
    results = []
    for drawn in (False, True):
        monkeypatch.setattr(attention, "can_draw", lambda *_, drawn=drawn: drawn)
        torch.manual_seed(1)
        output = attention.dropkey_attention_forward(site(0.4), *qkv, mask, implementation="sdpa", scaling=0.5)[0]
        results.append([output, *torch.autograd.grad(output.square().sum(), qkv)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
