"""FlexAttention: the same scores dropped as elsewhere, padding honoured, nothing compiled twice. Backward needs a GPU."""

import pytest
import torch
from attention_inputs import site, tensors
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.models.attention_mask import real_keys
from hf_dropkey.models.counter_hash import draw_seed
from hf_dropkey.models.flex_attention import flex_dropkey_forward, score_mod_of
from hf_dropkey.models.patterns import dropped_scores, protect_rows
from hf_dropkey.reference import reference_attention


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")


def forward(module: torch.nn.Module, qkv: list[torch.Tensor], mask: object = None) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return flex_dropkey_forward(module, *qkv, mask, qkv[0].shape[-1] ** -0.5)[0].transpose(1, 2)


def expected(module: torch.nn.Module, shape: tuple[int, int, int, int], real: torch.Tensor | None) -> torch.Tensor:
    torch.manual_seed(1)
    dropped = dropped_scores(
        draw_seed(DEVICE), shape, module.dropkey_ratio, pattern=module.dropkey_pattern, window=module.dropkey_window
    )
    return protect_rows(dropped, real).expand(shape)


def float_tensors(*sizes: int, keys: int | None = None) -> list[torch.Tensor]:
    return [tensor.detach().to(DEVICE) for tensor in tensors(*sizes, dtype=torch.float32, keys=keys)]


@pytest.mark.parametrize("pattern", ["score", "key", "block", "cross"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (17, 17), (63, 65), (197, 197)])
def test_drops_the_same_scores_as_the_other_backends(pattern: str, queries: int, keys: int) -> None:
    module = site(0.4, pattern)
    query, key, _ = float_tensors(2, 3, queries, 16, keys=keys)
    weights = forward(module, [query, key, torch.eye(keys, device=DEVICE).expand(2, 3, keys, keys)])
    assert torch.equal(weights == 0, expected(module, (2, 3, queries, keys), None))


@pytest.mark.parametrize("form", ["block mask", "bool 4-D", "padding 2-D", "float bias"])
@pytest.mark.parametrize("ratio", [0.3, 0.95])
def test_masks_are_honoured_and_rows_keep_a_real_key(form: str, ratio: float) -> None:
    module, qkv = site(ratio), float_tensors(2, 3, 17, 16)
    keep = torch.arange(17, device=DEVICE) < torch.tensor([[17], [4]], device=DEVICE)
    mask: object = keep if form == "padding 2-D" else keep[:, None, None]
    reference_mask = keep
    if form == "block mask":
        mask = create_block_mask(lambda b, h, q, k: keep[b, k], 2, None, 17, 17, device=DEVICE.type)
    elif form == "float bias":
        mask = reference_mask = torch.randn(2, 3, 17, 17, device=DEVICE)
    dropped = expected(module, (2, 3, 17, 17), real_keys(reference_mask))
    doubles = [tensor.double() for tensor in qkv]
    reference = reference_attention(*doubles, dropped, reference_mask)
    torch.testing.assert_close(forward(module, qkv, mask).double(), reference, rtol=0, atol=2e-4)


@pytest.mark.parametrize("form", ["block mask", "bool 4-D", "padding 2-D", "float 4-D"])
def test_token_pattern_leaves_out_real_keys_and_never_shows_padding(form: str) -> None:
    module, qkv = site(0.4, "token"), float_tensors(2, 3, 17, 16)
    keep = torch.arange(17, device=DEVICE) < torch.tensor([[17], [6]], device=DEVICE)
    masks: dict[str, object] = {
        "block mask": create_block_mask(lambda b, h, q, k: keep[b, k], 2, None, 17, 17, device=DEVICE.type),
        "bool 4-D": keep[:, None, None],
        "padding 2-D": keep,
        "float 4-D": torch.zeros(2, 1, 1, 17, device=DEVICE).masked_fill(~keep[:, None, None], float("-inf")),
    }
    torch.manual_seed(1)
    dropped = dropped_scores(draw_seed(DEVICE), (2, 3, 17, 17), 0.4, pattern="token", real=keep[:, None, None])
    reference = reference_attention(*[tensor.double() for tensor in qkv], dropped, keep)
    torch.testing.assert_close(forward(module, qkv, masks[form]).double(), reference, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_token_pattern_is_plain_attention_over_what_is_left() -> None:
    torch.manual_seed(0)
    config = DropKeyViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        dropkey_ratio=0.4, dropkey_pattern="token",
    )  # fmt: skip
    model = DropKeyViTForImageClassification(config).train()
    outputs = []
    for backend in ("sdpa", "flex_attention"):
        model.set_attn_implementation(backend)
        torch.manual_seed(2)
        with torch.no_grad():
            outputs.append(model(torch.ones(2, 3, 32, 32)).logits)
    torch.testing.assert_close(*outputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is about CPUs")
def test_training_on_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="no backward there.*set_attn_implementation\\('sdpa'\\)"):
        flex_dropkey_forward(site(0.1), *tensors(1, 1, 4, 16), None, 0.25)


def test_dropout_on_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"requested 0.1"):
        flex_dropkey_forward(site(0.1), *float_tensors(1, 1, 4, 16), None, 0.25, dropout=0.1)


@pytest.mark.slow
def test_compiled_once_for_all_layers_and_steps() -> None:
    """Ratio and seed are data: a new step and another layer's ratio reuse the compiled kernel, bit-exact."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(flex_attention, backend=counter)
    query, key, _ = float_tensors(2, 2, 50, 16)
    value = torch.eye(50, device=DEVICE).expand(2, 2, 50, 50).contiguous()
    for step, ratio in enumerate([0.3, 0.2, 0.1, 0.3]):
        torch.manual_seed(step)
        seed = draw_seed(DEVICE)
        score_mod = score_mod_of(seed, (2, 2, 50, 50), ratio, "score", 2, None, None)
        with torch.no_grad():
            weights = compiled(query, key, value, score_mod=score_mod)
        assert torch.equal(weights == 0, dropped_scores(seed, (2, 2, 50, 50), ratio))
    assert counter.frame_count == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has no backward on a CPU")
@pytest.mark.parametrize("pattern", ["score", "key", "block", "cross"])
def test_gradients_equal_the_reference(pattern: str) -> None:
    module = site(0.3, pattern)
    qkv = [tensor.requires_grad_() for tensor in float_tensors(2, 3, 65, 16)]
    torch.manual_seed(1)
    output = flex_dropkey_forward(module, *qkv, None, 0.25)[0].transpose(1, 2)
    upstream = torch.randn_like(output)
    doubles = [tensor.detach().double().requires_grad_() for tensor in qkv]
    reference = reference_attention(*doubles, expected(module, (2, 3, 65, 65), None))
    torch.testing.assert_close(output.double(), reference, rtol=0, atol=1e-2)
    pairs = zip(
        torch.autograd.grad(output, qkv, upstream),
        torch.autograd.grad(reference, doubles, upstream.double()),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-2)
