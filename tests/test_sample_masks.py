"""Masks by sample: the same scores of an image are dropped wherever it stands in whichever batch, on every backend."""

import copy
import pickle
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_inputs import site, tensors
from dropping_models import nano, native, patched
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import SwinConfig, SwinForImageClassification

from hf_dropkey import (
    DropKey,
    apply_dropkey,
    drop_keys,
    dropkey_attention,
    number_layers,
    remove_dropkey,
    sample_ids,
)
from hf_dropkey.models.attention import DROPKEY_BACKENDS, dropkey_attention_forward
from hf_dropkey.models.counter_hash import draw_seed
from hf_dropkey.models.patterns import PATTERNS, dropped_scores
from hf_dropkey.models.sample_masks import seed_for
from hf_dropkey.models.triton_attention import triton_is_available
from hf_dropkey.reference import reference_attention, reference_mask, sample_seed


IDS = [7, 2**40 + 5, 0, -3]
WHERE = {"epoch": 3, "seed": 2**33 + 42}
SHAPE = (4, 2, 9, 9)
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")


def numbered(number: int = 5, **settings: Any) -> Any:
    module = site(**settings)
    number_layers(nn.ModuleList([*(site() for _ in range(number)), module]))
    return module


def attend(module: Any, qkv: list[torch.Tensor], backend: str, mask: torch.Tensor | None = None) -> torch.Tensor:
    output, _ = dropkey_attention_forward(module, *qkv, mask, implementation=backend, scaling=0.5, grid=(3, 3))
    return output.transpose(1, 2)


def oracle(pattern: str, ratio: float = 0.4, layer: int = 5, ids: list[int] = IDS, **where: Any) -> torch.Tensor:
    seeds = [sample_seed(number, layer=layer, **(where or WHERE)) for number in ids]
    return reference_mask(seeds, (len(ids), *SHAPE[1:]), ratio, pattern=pattern, window=2, grid=(3, 3))


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_the_seed_of_a_sample_is_the_oracles() -> None:
    with sample_ids(torch.tensor(IDS), **WHERE):
        seeds = seed_for(numbered(), 4, CPU)
    assert [[word & 0xFFFFFFFF for word in pair] for pair in seeds.tolist()] == [
        list(sample_seed(number, layer=5, **WHERE)) for number in IDS
    ]


@pytest.mark.parametrize("change", [{"epoch": 4}, {"seed": 42}, {"layer": 6}, {"ids": [8, 5, 2**32, 3]}])
def test_another_epoch_run_layer_or_sample_has_another_seed(change: dict[str, Any]) -> None:
    def seeds(layer: int = 5, ids: list[int] = IDS, **where: int) -> list[list[int]]:
        with sample_ids(ids, **{**WHERE, **where}):
            found: list[list[int]] = seed_for(numbered(layer), 4, CPU).tolist()
        return found

    one, other = seeds(), seeds(**change)
    assert not {tuple(pair) for pair in one} & {tuple(pair) for pair in other}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_mask_of_a_sample_is_that_of_a_batch_of_one(pattern: str) -> None:
    seeds = torch.randint(-(2**31), 2**31, (4, 2), dtype=torch.int32)
    given: Any = {"pattern": pattern, "window": 2, "grid": (3, 3)}
    found = dropped_scores(seeds, SHAPE, 0.4, **given)
    for image, seed in enumerate(seeds):
        assert torch.equal(found[image : image + 1], dropped_scores(seed, (1, *SHAPE[1:]), 0.4, **given))
    assert torch.equal(found.expand(SHAPE), reference_mask(seeds.tolist(), SHAPE, 0.4, **given))


def test_nothing_is_drawn_within_a_block_and_as_ever_outside() -> None:
    torch.manual_seed(1)
    wanted, state = draw_seed(CPU), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(seed_for(site(), 4, CPU), wanted)
    with sample_ids(IDS):
        seed_for(numbered(), 4, CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_blocks_nest_and_belong_to_their_thread() -> None:
    module, found = numbered(), {}

    def elsewhere() -> None:
        found["outside"] = seed_for(site(), 4, CPU)
        with sample_ids([1, 2]):
            found["inside"] = seed_for(copy.deepcopy(module), 2, CPU)

    with sample_ids(IDS):
        outer = seed_for(module, 4, CPU)
        with sample_ids([1, 2]):
            inner = seed_for(module, 2, CPU)
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join(60)
        assert torch.equal(seed_for(module, 4, CPU), outer)
    assert found["outside"].shape == (2,)
    assert torch.equal(found["inside"], inner)
    assert seed_for(site(), 4, CPU).shape == (2,)


def test_a_block_ends_after_an_error() -> None:
    with pytest.raises(KeyError), sample_ids(IDS):
        raise KeyError
    assert seed_for(site(), 4, CPU).shape == (2,)


@pytest.mark.parametrize(
    ("ids", "more", "error", "message"),
    [
        ([0.5], {}, TypeError, "must be integers"),
        ([True], {}, TypeError, "must be integers"),
        ([[1, 2]], {}, ValueError, r"\(1, 2\)"),
        ([1], {"epoch": 0.5}, TypeError, "`epoch` must be an integer, got 0.5"),
        ([1], {"seed": True}, TypeError, "`seed` must be an integer"),
    ],
)
def test_wrong_ids_are_refused(ids: Any, more: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), sample_ids(ids, **more):
        pass


def test_a_layer_without_a_number_and_another_count_of_images_are_refused() -> None:
    with sample_ids(IDS), pytest.raises(ValueError, match="number_layers"):
        seed_for(site(), 4, CPU)
    with sample_ids(IDS), pytest.raises(ValueError, match=r"batch of 8, and `sample_ids` got 4 ids.*twice"):
        seed_for(numbered(), 8, CPU)
    with sample_ids(IDS), pytest.raises(ValueError, match="batch of 2"):
        seed_for(numbered(), 2, CPU)


def test_windows_are_those_of_the_first_image_then_those_of_the_next() -> None:
    module = numbered()
    module.dropkey_windowed = True
    with sample_ids(IDS, **WHERE):
        seeds = seed_for(module, 12, CPU)
        with pytest.raises(ValueError, match="batch of 6"):
            seed_for(module, 6, CPU)
    wanted = [sample_seed(number, layer=5, window=window, **WHERE) for number in IDS for window in range(3)]
    assert [tuple(word & 0xFFFFFFFF for word in pair) for pair in seeds.tolist()] == wanted


# --- backends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", DROPKEY_BACKENDS)
def test_every_backend_drops_the_oracles_scores_wherever_an_image_stands(backend: str, pattern: str) -> None:
    if backend == "dropkey_triton" and (pattern in ("block", "cross") or not triton_is_available(CPU)):
        pytest.skip("the fused kernel runs in the interpreter, with the patterns 'score', 'key' and 'token'")
    gradients = backend != "flex_attention"
    qkv = tensors(4, 2, 9, 8, dtype=torch.float32)
    module = numbered(ratio=0.4, pattern=pattern)
    upstream = torch.randn(4, 2, 9, 8)

    def run(rows: list[int]) -> list[torch.Tensor]:
        parts = [tensor[rows].detach().requires_grad_(gradients) for tensor in qkv]
        with sample_ids(torch.tensor([IDS[row] for row in rows]), **WHERE):
            output = attend(module, parts, backend)
            return [output, *(torch.autograd.grad(output, parts, upstream[rows]) if gradients else [])]

    whole = run([0, 1, 2, 3])
    exact = [tensor.detach().double().requires_grad_() for tensor in qkv]
    wanted = reference_attention(*exact, oracle(pattern), scaling=0.5)
    grads = torch.autograd.grad(wanted, exact, upstream.double())
    for found, expected in zip(whole, [wanted, *grads], strict=False):
        # FlexAttention lowers a dropped score by 1024, and rounds the scores of a row that lost all keys
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6 if gradients else 1e-4)
    for rows in ([3, 1], [2], [0, 2, 2]):
        for found, expected in zip(run(rows), whole, strict=True):
            torch.testing.assert_close(found, expected[rows], rtol=0, atol=3e-6)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_padding_and_chunks_of_a_batch_go_with_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_dropkey.models.cpu_attention.CHUNK_BYTES", 4 * 2 * 9 * 4)
    qkv = tensors(4, 2, 9, 8)
    keep = torch.arange(9) < torch.tensor([9, 5, 1, 7])[:, None]
    for mask in (None, keep):
        with sample_ids(IDS, **WHERE):
            output = attend(numbered(ratio=0.4), qkv, backend, mask)
        wanted = reference_attention(*qkv, oracle("score"), mask, scaling=0.5)
        torch.testing.assert_close(output, wanted, rtol=0, atol=1e-12)


def test_the_functions_take_the_number_of_their_layer() -> None:
    qkv = tensors(4, 2, 9, 8)
    scores = torch.zeros(SHAPE)
    with sample_ids(IDS, **WHERE):
        output = dropkey_attention(*qkv, 0.4, layer=5)
        dropped = drop_keys(scores, 0.4, layer=5)
        with pytest.raises(ValueError, match="layer="):
            drop_keys(scores, 0.4)
        module = DropKey(0.4)
        number_layers(nn.ModuleList([*(DropKey() for _ in range(5)), module]))
        assert torch.equal(module(scores), dropped)
    mask = oracle("score")
    torch.testing.assert_close(output, reference_attention(*qkv, mask))
    assert torch.equal(dropped < 0, mask & ~mask.all(-1, keepdim=True))


# --- models -----------------------------------------------------------------------------------------------------------


def swin() -> Any:
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, drop_path_rate=0.0,
        hidden_dropout_prob=0.0,
    )  # fmt: skip
    model = SwinForImageClassification(config)
    apply_dropkey(model, 0.4)
    return model


def quiet(family: str) -> Any:
    model = nano(family).train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif type(part).__name__ == "DropPath":
            part.ratio = 0.0
        elif isinstance(part, nn.BatchNorm2d):
            # it knows the other images of its batch
            part.eval()
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "vit": lambda: native().train(),
    "vit patched": lambda: patched().train(),
    "vit patched, token": lambda: patched("token").train(),
    "swin patched": lambda: swin().train(),
    "t2t": lambda: quiet("t2t_vit"),
    "volo": lambda: quiet("volo"),
    "ceit": lambda: quiet("ceit"),
}


def images_for(model: Any, count: int = 4) -> torch.Tensor:
    side = model.config.image_size
    side = side if isinstance(side, int) else side[0]
    return torch.randn(count, model.config.num_channels, side, side, generator=torch.Generator().manual_seed(1))


def logits_of(model: Any, images: torch.Tensor, **more: Any) -> torch.Tensor:
    found: torch.Tensor = model(pixel_values=images, **more).logits
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_model_drops_the_same_in_every_batch(name: str) -> None:
    model = MODELS[name]()
    if hasattr(model.config, "mix_token"):
        model.config.mix_token = False
    images = images_for(model)
    ids = torch.tensor(IDS)
    with sample_ids(ids, **WHERE):
        whole = logits_of(model, images)
    with sample_ids(ids, **WHERE):
        torch.testing.assert_close(logits_of(model, images), whole, rtol=0, atol=0)
    for rows in ([2, 3], [1, 0]):
        with sample_ids(ids[rows], **WHERE):
            torch.testing.assert_close(logits_of(model, images[rows]), whole[rows], rtol=0, atol=2e-5)
    with sample_ids(ids, epoch=4, seed=1):
        assert not torch.allclose(logits_of(model, images), whole, atol=1e-4)
    # as an argument of the model
    with sample_ids(ids):
        wanted = logits_of(model, images)
    torch.testing.assert_close(logits_of(model, images, sample_ids=ids), wanted, rtol=0, atol=0)
    # and afterwards the masks are drawn again
    assert not torch.allclose(logits_of(model, images), wanted, atol=1e-4)


def test_the_layers_of_a_model_are_numbered_once() -> None:
    model = native()
    numbers = [int(part.dropkey_layer) for part in model.modules() if hasattr(part, "dropkey_layer")]
    assert numbers == list(range(model.config.num_hidden_layers))
    assert number_layers(model) == len(numbers)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [int(part.dropkey_layer) for part in other.modules() if hasattr(part, "dropkey_layer")] == numbers


def test_a_patched_model_is_plain_again_afterwards() -> None:
    model = swin()
    remove_dropkey(model)
    assert not any("dropkey_layer" in vars(part) or "dropkey_windowed" in vars(part) for part in model.modules())
    assert not model._forward_pre_hooks and not model._forward_hooks
    copy.deepcopy(swin())


def test_an_argument_ends_with_its_call_also_after_an_error() -> None:
    for model in (native(), patched()):
        with pytest.raises(ValueError, match="batch of 4"):
            logits_of(model.train(), images_for(model), sample_ids=[1, 2])
        assert seed_for(site(), 4, CPU).shape == (2,)


# --- activation checkpointing -----------------------------------------------------------------------------------------


def gradients(model: Any) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [native, patched])
def test_checkpointed_layers_drop_the_same_in_both_passes(make: Callable[[], Any], reentrant: bool) -> None:
    model = make().train()
    images = images_for(model)
    with sample_ids(IDS):
        logits_of(model, images).square().sum().backward()
    plain = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with sample_ids(IDS):
        logits_of(model, images.requires_grad_()).square().sum().backward()
    torch.testing.assert_close(gradients(model), plain)
    with sample_ids(IDS):
        loss = logits_of(model, images).square().sum()
    with pytest.raises(RuntimeError, match="Put both passes into the block"):
        loss.backward()
    with sample_ids(IDS):
        loss = logits_of(model, images).square().sum()
    with sample_ids(IDS), pytest.raises(RuntimeError, match="Put both passes into the block"):
        loss.backward()
    with pytest.raises(ValueError, match="Under gradient checkpointing the backward pass needs the ids too"):
        logits_of(model, images, sample_ids=IDS)
    # and without ids it works as ever
    logits_of(model, images).square().sum().backward()


def test_a_checkpoint_in_one_s_own_loop() -> None:
    qkv = tensors(4, 2, 9, 8)
    module = numbered(ratio=0.4)
    with sample_ids(IDS, **WHERE):
        output: Any = checkpoint(attend, module, qkv, "sdpa", use_reentrant=False)
        found = torch.autograd.grad(output.sum(), qkv)
    wanted = reference_attention(*qkv, oracle("score"), scaling=0.5)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.sum(), qkv))


# --- compiled code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("pattern", ["score", "block"])
def test_compiled_code_reads_the_ids_of_each_call(backend: str, pattern: str) -> None:
    torch._dynamo.reset()
    qkv = tensors(4, 2, 9, 8, dtype=torch.float32)
    modules = [numbered(number, ratio=0.4, pattern=pattern) for number in (5, 6)]
    graphs = []

    def count(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    compiled = torch.compile(attend, backend=count, fullgraph=True)
    for module in modules:
        for epoch in (1, 2):
            with sample_ids(IDS, epoch=epoch):
                output = compiled(module, qkv, backend)
            with sample_ids(IDS, epoch=epoch):
                torch.testing.assert_close(output, attend(module, qkv, backend))
            output.sum().backward()
    assert len(graphs) == 1
    # outside of a block compiled code draws its seeds
    compiled(modules[0], qkv, backend)
    assert len(graphs) == 2


@pytest.mark.slow
def test_a_compiled_model_takes_ids_from_a_block_and_as_an_argument() -> None:
    torch._dynamo.reset()
    for model in (native(), patched()):
        images = images_for(model.train())
        compiled = torch.compile(model, backend="aot_eager")
        with sample_ids(IDS):
            wanted = logits_of(model, images)
            torch.testing.assert_close(logits_of(compiled, images), wanted, rtol=0, atol=1e-5)
        found = logits_of(compiled, images, sample_ids=torch.tensor(IDS))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_without_ids_is_one_graph() -> None:
    torch._dynamo.reset()
    for model in (native(), patched()):
        images = images_for(model.train())
        logits_of(torch.compile(model, backend="aot_eager", fullgraph=True), images).sum().backward()


def test_compiled_code_of_a_thread_without_ids_does_not_take_anothers() -> None:
    torch._dynamo.reset()
    qkv = tensors(4, 2, 9, 8)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    module, found = numbered(), SimpleNamespace(error=None)

    def elsewhere() -> None:
        try:
            compiled(module, qkv, "sdpa")
        except RuntimeError as error:
            found.error = error

    with sample_ids(IDS):
        compiled(module, qkv, "sdpa")
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(60)
    assert "Another thread is in a `sample_ids` block" in str(found.error)
