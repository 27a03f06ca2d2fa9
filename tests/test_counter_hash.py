"""The decision for each score as a function: its definition, its sizes, and its statistics."""

import math

import pytest
import torch
from scipy import stats

from hf_dropkey.models import counter_hash
from hf_dropkey.models.counter_hash import (
    draw_seed,
    draws_in_place,
    drop_bias_by_byte,
    drop_bias_of_rows,
    dropped_by_byte,
    row_keys,
    row_state,
    threshold_tensor,
)
from hf_dropkey.models.dropkey import ratio_tensor
from hf_dropkey.models.patterns import PATTERNS, drop_bias, dropped_scores
from hf_dropkey.reference import score_is_dropped


def seed_of(number: int) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(number)
        return draw_seed(torch.device("cpu"))


# --- the function itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [1, 5, 64, 65, 197, 257, 577, 2049, 2500])
@pytest.mark.parametrize("ratio", [0.0, 0.003, 0.1, 0.499, 0.5, 0.501, 0.9, 0.998])
def test_tensor_code_equals_the_integer_definition(keys: int, ratio: float) -> None:
    seed = seed_of(keys)
    dropped = dropped_scores(seed, (2, 2, 3, keys), ratio)
    words = (int(seed[0]), int(seed[1]))
    for image, head, query in [(0, 0, 0), (0, 1, 2), (1, 0, 1), (1, 1, 2)]:
        expected = [score_is_dropped(words, image, head, query, key, ratio) for key in range(keys)]
        assert dropped[image, head, query].tolist() == expected
    bias = drop_bias(seed, (2, 2, 3, keys), ratio, "score")
    assert torch.equal(bias == float("-inf"), dropped) and bool((bias[~dropped] == 0).all())


def test_definition_is_frozen() -> None:
    """Published runs can only be repeated while these decisions stay; a change of the function must be deliberate."""
    dropped = [score_is_dropped((1, 2), 3, 4, 5, key, 0.25) for key in range(40)]
    assert "".join("01"[d] for d in dropped) == FROZEN


FROZEN = "0010001101000110001000010011000000100001"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_mask_does_not_depend_on_sizes_around_it(pattern: str) -> None:
    """The same (image, head, query, key) gives the same decision in a smaller batch, with fewer heads or queries."""
    seed = seed_of(0)
    whole = dropped_scores(seed, (4, 6, 50, 50), 0.3, pattern=pattern, window=2).expand(4, 6, 50, 50)
    part = dropped_scores(seed, (2, 3, 20, 50), 0.3, pattern=pattern, window=2).expand(2, 3, 20, 50)
    assert torch.equal(whole[:2, :3, :20], part)
    if pattern in ("score", "key"):
        fewer_keys = dropped_scores(seed, (2, 3, 20, 33), 0.3, pattern=pattern).expand(2, 3, 20, 33)
        assert torch.equal(part[..., :33], fewer_keys)


def test_different_seeds_give_different_masks() -> None:
    masks = [dropped_scores(torch.tensor(pair, dtype=torch.int32), (1, 1, 64, 64), 0.5) for pair in SEED_PAIRS]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert 0.45 < (one == other).float().mean() < 0.55


SEED_PAIRS = [(0, 0), (1, 0), (0, 1), (1, 1), (-1, 0), (-(2**31), 0), (2**31 - 1, 2**31 - 1)]


def test_seed_comes_from_the_global_generator() -> None:
    torch.manual_seed(3)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, draw_seed(torch.device("cpu")))
    assert not torch.equal(first, second)
    assert first.dtype == torch.int32 and first.shape == (2,)


@pytest.mark.parametrize("keys", [5, 64, 197, 2049])
@pytest.mark.parametrize("ratio", [0.003, 0.3, 0.5, 0.9])
def test_every_way_to_a_mask_gives_the_same(keys: int, ratio: float) -> None:
    """A ratio as a number or as data; in place, or by plain operations as in a transform of `torch.func`."""
    rows = row_keys(seed_of(2), 2, 2, 3)
    data = ratio_tensor("score", ratio, 3)
    assert data is not None
    expected = dropped_by_byte(*rows, keys, ratio)
    seen = []

    def inside(x: torch.Tensor) -> torch.Tensor:
        seen.append(draws_in_place(x.device))
        found = dropped_by_byte(*rows, keys, ratio), drop_bias_by_byte(*rows, keys, ratio) == -torch.inf
        assert torch.equal(found[0], expected) and torch.equal(found[1], expected)
        return x

    torch.func.vmap(inside)(torch.zeros(2))
    assert seen == [False] and draws_in_place(torch.device("cpu"))
    assert torch.equal(dropped_by_byte(*rows, keys, data), expected)
    assert torch.equal(drop_bias_by_byte(*rows, keys, data), torch.where(expected, -torch.inf, 0.0))
    assert torch.equal(threshold_tensor(data, torch.device("cpu")), threshold_tensor(ratio, torch.device("cpu")))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("chunk", [1, 7 * 64, 2**18])
def test_a_mask_does_not_depend_on_the_size_of_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on where it is written, or on what was there; of buffers of a wrong size torch would only warn."""
    rows = row_keys(seed_of(3), 2, 3, 5)
    expected = drop_bias_by_byte(*rows, 70, 0.3)
    monkeypatch.setattr(counter_hash, "CHUNK_WORDS", chunk)
    assert torch.equal(drop_bias_by_byte(*rows, 70, 0.3), expected)
    memory = torch.randint(256, (4 * 40 * 70,), dtype=torch.uint8)
    found = drop_bias_of_rows(row_state(*rows, 70, 0.3), 70, 0.3, torch.float32, memory)
    assert torch.equal(found, expected) and found.data_ptr() == memory.data_ptr()


def test_compiled_mask_is_bit_equal() -> None:
    compiled = torch.compile(dropped_scores, fullgraph=True, backend="aot_eager")
    seed = seed_of(1)
    assert torch.equal(compiled(seed, (2, 3, 70, 70), 0.1), dropped_scores(seed, (2, 3, 70, 70), 0.1))


# --- statistics -------------------------------------------------------------------------------------------------------

SHAPE = (4, 6, 197, 197)
DRAWS = math.prod(SHAPE)


@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.1, 0.25, 0.3, 0.5, 0.75, 0.9])
def test_drop_fraction_within_three_sigma(ratio: float) -> None:
    """At least 10^7 draws per ratio. The dither of 64-key blocks widens sigma by the variance it adds, under 2.4 %."""
    masks = [dropped_scores(seed_of(100 + layer), SHAPE, ratio) for layer in range(11)]
    fraction = torch.stack([mask.double().mean() for mask in masks]).mean().item()
    part = 256 * ratio - math.floor(256 * ratio)
    variance = ratio * (1 - ratio) + 63 * part * (1 - part) / 256**2
    assert abs(fraction - ratio) < 3 * math.sqrt(variance / (11 * DRAWS))


def centred(ratio: float, layers: int, seeds: list[torch.Tensor]) -> list[torch.Tensor]:
    return [dropped_scores(seed, SHAPE, ratio).float() - ratio for seed in seeds[:layers]]


def seeds_of(kind: str, count: int) -> list[torch.Tensor]:
    """Random seeds, and the adversarial ones: consecutive integers, and single-bit differences."""
    if kind == "random":
        return [seed_of(1000 + number) for number in range(count)]
    if kind == "consecutive":
        return [torch.tensor([12345 + number, 0], dtype=torch.int32) for number in range(count)]
    return [torch.tensor([7 ^ (1 << number), 1], dtype=torch.int32) for number in range(count)]


@pytest.mark.parametrize("kind", ["random", "consecutive", "single bit"])
@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_draws_are_independent(kind: str, ratio: float) -> None:
    """Correlations along every axis and between layers and steps, on 1.1 10^7 draws; a fair source fails 1 in 10^5."""
    layers = 12
    masks = centred(ratio, layers, seeds_of(kind, layers))
    variance = ratio * (1 - ratio)
    pairs = {
        "images": [(mask[1:], mask[:-1]) for mask in masks],
        "heads": [(mask[:, 1:], mask[:, :-1]) for mask in masks],
        "queries": [(mask[:, :, 1:], mask[:, :, :-1]) for mask in masks],
        "neighbour keys": [(mask[..., 1:], mask[..., :-1]) for mask in masks],
        "keys of one word": [(mask[..., 64:], mask[..., :-64]) for mask in masks],
        "query and key swapped": [(mask, mask.transpose(2, 3).roll(1, -1)) for mask in masks],
        "consecutive layers": list(zip(masks[1:], masks[:-1], strict=True)),
        "far layers": [(masks[-1], mask) for mask in masks[:3]],
    }
    for name, members in pairs.items():
        count = sum(a.numel() for a, _ in members)
        total = sum((a * b).sum().double().item() for a, b in members)
        z = total / (variance * math.sqrt(count))
        assert abs(z) < 5, f"{name}: z = {z:.1f} over {count} pairs"


@pytest.mark.parametrize("kind", ["random", "consecutive"])
def test_drops_per_axis_and_patterns_follow_chi_square(kind: str) -> None:
    """Drops per key, query, head and image, per row, and all 256 patterns of 8 neighbours, on 1.1 10^7 draws."""
    ratio, layers = 0.25, 12  # a multiple of 1/256: no dither, so the laws are exactly binomial
    stack = torch.stack([dropped_scores(seed, SHAPE, ratio) for seed in seeds_of(kind, layers)])
    variance = ratio * (1 - ratio)
    for axis, name in [(4, "key"), (3, "query"), (2, "head"), (1, "image"), (0, "layer")]:
        axes = [other for other in range(5) if other != axis]
        count = stack.numel() / stack.shape[axis]
        chi = ((stack.sum(axes).double() - count * ratio) ** 2 / (count * variance)).sum().item()
        assert 1e-6 < stats.chi2.sf(chi, stack.shape[axis]) < 1 - 1e-6, name
    per_row = torch.bincount(stack.sum(-1).flatten(), minlength=198).double().numpy()
    expected = stats.binom.pmf(range(198), 197, ratio) * per_row.sum()
    common = expected > 20
    chi = ((per_row[common] - expected[common]) ** 2 / expected[common]).sum()
    assert 1e-6 < stats.chi2.sf(chi, common.sum() - 1) < 1 - 1e-6
    bits = stack[..., :192].unflatten(-1, (24, 8)).long() @ (2 ** torch.arange(8))
    found = torch.bincount(bits.flatten(), minlength=256).double().numpy()
    ones = torch.tensor([n.bit_count() for n in range(256)]).numpy()
    expected = ratio**ones * (1 - ratio) ** (8 - ones) * found.sum()
    chi = ((found - expected) ** 2 / expected).sum()
    assert 1e-6 < stats.chi2.sf(chi, 255) < 1 - 1e-6


def test_the_battery_has_teeth() -> None:
    """One 32-bit multiplication of a flat counter, a plausible shortcut, fails the neighbour test by far."""
    counter = torch.arange(DRAWS, dtype=torch.int64).view(SHAPE)
    weak = ((counter * 0x9E3779B9) & 0xFFFFFFFF) < 0.1 * 2**32
    mask = weak.float() - 0.1
    z = (mask[..., 1:] * mask[..., :-1]).sum().item() / (0.09 * math.sqrt(DRAWS))
    assert abs(z) > 50
