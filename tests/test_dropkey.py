"""The schedule, the patterns, the rule for rows, the operation on scores, and the reference."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import nn

from hf_dropkey import DropKey, drop_keys, dropkey_active, dropkey_disabled, reference
from hf_dropkey.models import dropkey
from hf_dropkey.models.attention_mask import real_keys
from hf_dropkey.models.counter_hash import byte_thresholds, draw_seed
from hf_dropkey.models.dropkey import layer_ratios, ratio_tensor
from hf_dropkey.models.patterns import (
    PATTERNS,
    dropped_scores,
    kept_tokens,
    patch_grid,
    protect_rows,
    rows_can_empty,
    shape_bound,
    token_order,
)
from hf_dropkey.reference import reference_attention, reference_mask, score_is_dropped


def seed_of(number: int) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(number)
        return draw_seed(torch.device("cpu"))


# --- patterns ---------------------------------------------------------------------------------------------------------


def test_key_pattern_drops_the_same_keys_for_all_queries() -> None:
    dropped = dropped_scores(seed_of(5), (64, 12, 197, 197), 0.3, pattern="key")
    assert dropped.shape == (64, 12, 1, 197)
    sigma = math.sqrt(0.21 / dropped.numel())
    assert abs(dropped.double().mean() - 0.3) < 3 * sigma
    assert not torch.equal(dropped[0, 0], dropped[0, 1]) and not torch.equal(dropped[0, 0], dropped[1, 0])


@pytest.mark.parametrize(("keys", "ratio"), [(197, 0.3), (197, 0.01), (5, 0.5), (3, 0.9), (1, 0.9), (10, 0.0)])
def test_token_pattern_drops_an_exact_count(keys: int, ratio: float) -> None:
    dropped = dropped_scores(seed_of(6), (32, 4, 7, keys), ratio, pattern="token")
    assert dropped.shape == (32, 1, 1, keys)
    assert (dropped.sum(-1) == min(round(ratio * keys), keys - 1)).all()
    if 1 < dropped.sum(-1)[0] < keys - 1:
        assert len({tuple(row.flatten().tolist()) for row in dropped}) >= 8


def test_token_pattern_counts_real_keys_only() -> None:
    real = torch.arange(20)[None, None, None] < torch.tensor([20, 12, 1])[:, None, None, None]
    order, kept = token_order(seed_of(7), 3, 20, 0.5, real)
    assert kept.sum(-1).tolist() == [10, 6, 1] and kept_tokens(20, 0.5) == 10
    assert all(real[image, 0, 0, order[image][kept[image]]].all() for image in range(3))
    dropped = dropped_scores(seed_of(7), (3, 2, 20, 20), 0.5, pattern="token", real=real)
    assert (real & ~dropped).sum(-1).flatten().tolist() == [10, 6, 1]


def test_token_pattern_is_uniform_over_keys() -> None:
    dropped = dropped_scores(seed_of(8), (20000, 1, 1, 20), 0.25, pattern="token")
    count = dropped.sum(0).flatten().double()
    chi = ((count - 5000) ** 2 / (20000 * 0.25 * 0.75)).sum().item() * 19 / 20
    assert 1e-6 < stats.chi2.sf(chi, 19) < 1 - 1e-6


def test_token_pattern_refuses_masks_that_differ_by_query() -> None:
    with pytest.raises(
        ValueError, match=r"'token'.*: expected padding, got a mask of shape \(1, 1, 4, 4\) that differs"
    ):
        dropped_scores(seed_of(0), (1, 1, 4, 4), 0.5, pattern="token", real=torch.ones(1, 1, 4, 4).tril().bool())
    padding = (torch.arange(4) < 2).expand(1, 1, 4, 4)
    dropped = dropped_scores(seed_of(0), (1, 1, 4, 4), 0.5, pattern="token", real=padding)
    assert (padding & ~dropped).sum(-1).tolist() == [[[1] * 4]]


@pytest.mark.parametrize("pattern", ["block", "cross"])
@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_shapes_drop_the_requested_fraction_of_patches(pattern: str, window: int, ratio: float) -> None:
    """Also at corners and borders, where a plain DropBlock drops less; the spread is taken over independent rows."""
    rows, columns = 7, 9
    dropped = dropped_scores(
        seed_of(9), (16, 6, 197, 1 + rows * columns), ratio, pattern=pattern, window=window, grid=(rows, columns)
    )
    assert not dropped[..., 0].any(), "the class token belongs to no block or cross"
    patches = dropped[..., 1:].unflatten(-1, (rows, columns)).double().flatten(0, 2)
    for part in (patches, patches[:, 0, 0], patches[:, :, -1], patches[:, 3:5, 3:5]):
        per_row = part.flatten(1).mean(1) if part.ndim > 1 else part
        assert abs(per_row.mean() - ratio) < 4 * per_row.std() / math.sqrt(len(per_row))


@pytest.mark.parametrize(("pattern", "cells", "side"), [("block", 9, 3), ("cross", 13, 7)])
def test_blocks_and_crosses_have_their_shape(pattern: str, cells: int, side: int) -> None:
    """At a tiny rate, nearly every row with as many drops as a shape has cells holds one whole shape."""
    dropped = dropped_scores(seed_of(10), (8, 8, 1000, 121), 0.0005, pattern=pattern, window=3, grid=(11, 11))
    grids = dropped.view(-1, 11, 11)
    full = grids[grids.sum((1, 2)) == cells]
    assert len(full) > 20
    whole = 0
    for grid in full:
        rows, columns = (position.unique() for position in grid.nonzero().unbind(1))
        compact = len(rows) == len(columns) == side and rows[-1] - rows[0] == columns[-1] - columns[0] == side - 1
        centred = compact and bool(grid[rows[side // 2], columns].all() and grid[rows, columns[side // 2]].all())
        whole += centred
    assert whole > 0.8 * len(full)


def test_patch_grid() -> None:
    assert patch_grid(197, None) == (14, 14)
    assert patch_grid(65, (8, 8)) == (8, 8)
    with pytest.raises(ValueError, match="9 x 9 patches does not fit into 65 keys"):
        patch_grid(65, (9, 9))


# --- rows and masks ---------------------------------------------------------------------------------------------------


def test_a_row_never_loses_all_its_real_keys() -> None:
    dropped = torch.tensor([[True, True, True], [True, False, True]])[None, None]
    assert protect_rows(dropped).tolist() == [[[[False] * 3, [True, False, True]]]]
    real = torch.tensor([True, False, True])[None, None, None]
    assert not protect_rows(dropped, real).any(), "the only kept key of the second row is padding"


@pytest.mark.parametrize("pattern", ["score", "key"])
def test_protection_leaves_other_rows_alone(pattern: str) -> None:
    dropped = dropped_scores(seed_of(11), (50, 4, 9, 5), 0.8, pattern=pattern)
    protected = protect_rows(dropped)
    full = dropped.all(-1)
    assert 0.2 < full.float().mean() < 0.45
    assert not protected.all(-1).any() and not protected[full].any()
    assert torch.equal(protected[~full], dropped[~full])


def test_real_keys_of_every_mask_form() -> None:
    keep = torch.tensor([[True, True, False], [True, False, False]])
    four = keep[:, None, None, :]
    additive = torch.zeros(2, 1, 1, 3).masked_fill(~four, torch.finfo(torch.float16).min)
    for mask in (keep, keep.long(), four, additive, additive.masked_fill(~four, -math.inf)):
        assert torch.equal(real_keys(mask).expand(2, 1, 1, 3), four)
    assert real_keys(None) is None
    bias = torch.tensor([[-100.0, 2.0], [0.0, -1e4]])
    assert real_keys(bias).tolist() == [[[[True, True], [True, False]]]]
    with pytest.raises(ValueError, match=r"2 or 4 dimensions, got shape \(1, 2, 3\)"):
        real_keys(torch.ones(1, 2, 3))


# --- the operation on scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("padded", [False, True])
def test_drop_keys_drops_what_the_oracle_drops(pattern: str, padded: bool) -> None:
    scores = torch.randn(2, 3, 10, 10)
    keep = torch.arange(10) < torch.tensor([[10], [4 if padded else 10]])
    scores = scores.masked_fill(~keep[:, None, None], -torch.inf)
    torch.manual_seed(3)
    found = drop_keys(scores, 0.5, pattern=pattern, window=2)
    torch.manual_seed(3)
    seed = draw_seed(torch.device("cpu")).tolist()
    dropped = reference_mask(seed, (2, 3, 10, 10), 0.5, pattern=pattern, window=2, real=keep)
    eye = torch.eye(10, dtype=torch.float64).expand(2, 3, 10, 10)
    query, key = torch.zeros(2, 3, 10, 1, dtype=torch.float64), torch.zeros(2, 3, 10, 1, dtype=torch.float64)
    kept = reference_attention(query, key, eye, dropped, keep) > 0
    assert torch.equal(found > -torch.inf, kept) and torch.equal(found[kept], scores[kept])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_drop_keys_of_any_dtype_leaves_no_row_empty(dtype: torch.dtype) -> None:
    scores = torch.randn(64, 4, 5, 3).to(dtype).requires_grad_()
    weights = drop_keys(scores, 0.9).softmax(-1)
    assert weights.dtype == dtype and torch.isfinite(weights).all() and (weights == 0).any()
    gradient = torch.autograd.grad((weights * torch.randn_like(weights)).sum(), scores)[0]
    assert torch.isfinite(gradient).all() and not gradient[weights == 0].any()


def test_drop_keys_of_one_head_is_that_of_the_first_of_many() -> None:
    scores = torch.randn(4, 7, 9)
    results = []
    for given in (scores, scores[:, None]):
        torch.manual_seed(0)
        results.append(drop_keys(given, 0.3).view(4, 7, 9))
    assert torch.equal(*results)


@pytest.mark.parametrize(("ratio", "training"), [(0.0, True), (0.5, False), (0.5, True)])
def test_drop_keys_does_nothing_where_nothing_is_to_drop(ratio: float, training: bool) -> None:
    scores = torch.randn(2, 2, 8, 8)
    assert (drop_keys(scores, ratio, training) is scores) == (ratio == 0 or not training)
    empty = torch.randn(0, 2, 8, 8)
    assert drop_keys(empty, 0.5).shape == empty.shape


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ratio": 1.0}, ValueError, r"`ratio` must lie in \[0, 1\), got 1.0"),
        ({"ratio": "half"}, TypeError, "`ratio` must be a number"),
        ({"pattern": "keys"}, ValueError, "Unknown `pattern` 'keys'"),
        ({"scores": torch.zeros(3, 3)}, ValueError, r"\[B, H, N, M\] or \[B, N, M\], got shape \(3, 3\)"),
        ({"scores": torch.zeros(1, 1, 3, 3, dtype=torch.long)}, TypeError, "must be floats, got torch.int64"),
        ({"pattern": "block", "window": 9}, ValueError, "`dropkey_window` must lie between 1 and 2"),
    ],
)
def test_drop_keys_names_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        drop_keys(**{"scores": torch.zeros(1, 1, 4, 4), "ratio": 0.1, **arguments})


def test_the_module_is_the_function_with_settings_that_may_change() -> None:
    module, scores = DropKey(0.4, "key"), torch.randn(2, 2, 9, 9)
    torch.manual_seed(0)
    found = module(scores)
    torch.manual_seed(0)
    assert torch.equal(found, drop_keys(scores, 0.4, pattern="key"))
    assert repr(module) == "DropKey(ratio=0.4, pattern='key', window=3)"
    assert not module.state_dict() and not list(module.buffers())
    module.dropkey_ratio = 0.0
    assert module(scores) is scores
    assert module.eval()(scores) is scores
    for bad in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"`dropkey_ratio` must lie in \[0, 1\)"):
            module.dropkey_ratio = bad
    assert module.dropkey_ratio == 0.0
    with pytest.raises(ValueError, match="Unknown `pattern`"):
        DropKey(0.1, "tokens")


def test_defaults() -> None:
    """Of the function and the module: in training, single scores, windows of 3; the module's ratio is 0.1."""
    assert repr(DropKey()) == "DropKey(ratio=0.1, pattern='score', window=3)"
    module, scores = DropKey(0.4, "block"), torch.randn(2, 2, 9, 26)
    torch.manual_seed(0)
    expected = drop_keys(scores, 0.4, True, pattern="block", window=3, grid=(5, 5))
    torch.manual_seed(0)
    assert torch.equal(module(scores), expected) and bool((expected == -torch.inf).any())
    torch.manual_seed(0)
    assert torch.equal(drop_keys(scores, 0.4, pattern="block"), expected)
    torch.manual_seed(0)
    single = drop_keys(scores, 0.4)
    torch.manual_seed(0)
    assert torch.equal(single, drop_keys(scores, 0.4, pattern="score"))


@pytest.mark.parametrize("grid", [(5, 7), (7, 5)])
def test_the_module_takes_the_grid_of_a_call(grid: tuple[int, int]) -> None:
    scores = torch.randn(2, 2, 9, 36)
    torch.manual_seed(0)
    found = DropKey(0.4, "cross", 2)(scores, grid)
    torch.manual_seed(0)
    assert torch.equal(found, drop_keys(scores, 0.4, pattern="cross", window=2, grid=grid))


@pytest.mark.parametrize("hidden", [-1e4, -65504.0, -math.inf])
def test_a_score_at_the_threshold_of_padding_is_hidden_and_one_above_is_not(hidden: float) -> None:
    """A row whose real keys are all drawn drops none; so one real key beside hidden ones is always kept."""
    scores = torch.full((64, 2, 4, 3), hidden)
    scores[..., 1] = -9999.0
    assert not (drop_keys(scores, 0.9)[..., 1] == -math.inf).any()
    # with a second real key, both are dropped at times
    scores[..., 0] = -9999.0
    dropped = drop_keys(scores, 0.5) == -math.inf
    assert dropped[..., 0].any() and dropped[..., 1].any() and not dropped[..., :2].all(-1).any()


def test_tokens_are_counted_over_the_keys_that_any_query_sees() -> None:
    scores = torch.zeros(8, 2, 5, 12)
    scores[..., 8:] = -math.inf
    dropped = drop_keys(scores, 0.5, pattern="token")[..., :8] == -math.inf
    assert (dropped.sum(-1) == 4).all() and (dropped == dropped[:, :1, :1]).all()


def test_data_of_a_ratio_is_made_where_the_module_knows_its_settings() -> None:
    """`dropkey_ratio_tensor`: None for 0; thresholds and the bound of shapes for the rest; longer rows never empty."""
    module = DropKey(0.25, "score")
    assert module.dropkey_ratio_tensor.thresholds.tolist() == [*byte_thresholds(0.25), 0]
    assert module.dropkey_ratio_tensor.longest_at_risk == 128
    module.dropkey_ratio = 0.9
    assert module.dropkey_ratio_tensor.longest_at_risk > 128
    assert rows_can_empty("score", 128, 0.9) and not rows_can_empty(
        "score", module.dropkey_ratio_tensor.longest_at_risk, 0.9
    )
    module.dropkey_pattern = "block"
    assert module.dropkey_ratio_tensor.thresholds[3] == shape_bound(0.9, "block", 3) != 0
    before = module.dropkey_ratio_tensor.thresholds[3].clone()
    module.dropkey_window = 2
    assert module.dropkey_ratio_tensor.thresholds[3] == shape_bound(0.9, "block", 2) != before
    module.dropkey_ratio = 0
    assert module.dropkey_ratio_tensor is None


@pytest.mark.parametrize("pattern", ["score", "token"])
def test_the_compiled_module_drops_what_it_drops(pattern: str) -> None:
    """Compiled, it reads its ratio from data ("token": from the number), which may be None or change."""
    module, scores = DropKey(0.4, pattern), torch.randn(2, 2, 9, 26)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for ratio in (0.4, 0.0, 0.2):
        module.dropkey_ratio = ratio
        results = []
        for run in (module, compiled):
            torch.manual_seed(0)
            results.append(run(scores))
        assert torch.equal(*results) and bool((results[0] == -torch.inf).any()) == (ratio > 0)
    module.eval()
    assert torch.equal(compiled(scores), scores)


def test_the_module_belongs_to_the_packages_contexts() -> None:
    """In a plain model, as the layers of this package do."""
    model, scores = nn.Sequential(DropKey(0.5)), torch.zeros(1, 2, 30, 30)
    with dropkey_disabled(model):
        assert model(scores) is scores
    model.eval()
    with dropkey_active(model):
        assert (model(scores) == -torch.inf).any()


def test_copies_of_the_module_keep_their_settings() -> None:
    module = DropKey(0.3, "cross", 2)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (other.dropkey_ratio, other.dropkey_pattern, other.dropkey_window) == (0.3, "cross", 2)
        other.dropkey_ratio = 0.1
        assert module.dropkey_ratio == 0.3
        assert not torch.equal(other.dropkey_ratio_tensor.thresholds, module.dropkey_ratio_tensor.thresholds)


def test_ratios_as_data_compare_by_value() -> None:
    """Settings of modules are compared, to put them back."""
    first, second, other = ratio_tensor("score", 0.3, 3), ratio_tensor("score", 0.3, 3), ratio_tensor("score", 0.2, 3)
    assert first == second and first != other and first != 0.3 and ratio_tensor("score", 0.0, 3) is None


# --- the oracle -------------------------------------------------------------------------------------------------------


def test_reference_without_drop_is_attention() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(reference_attention(query, key, value), expected, rtol=0, atol=1e-14)


def test_reference_equals_the_renormalisation_identity() -> None:
    """softmax over kept scores == keep * softmax / sum(keep * softmax), forward and backward (HiddenKey, ACL 2024)."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    dropped = protect_rows(dropped_scores(seed_of(12), (2, 2, 6, 6), 0.4))
    kept = (query @ key.mT * 0.5).softmax(-1) * ~dropped
    identity = kept / kept.sum(-1, keepdim=True) @ value
    output = reference_attention(query, key, value, dropped)
    torch.testing.assert_close(output, identity, rtol=0, atol=1e-13)
    upstream = torch.randn_like(output)
    gradients = torch.autograd.grad(output, (query, key, value), upstream)
    for one, other in zip(gradients, torch.autograd.grad(identity, (query, key, value), upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_reference_never_attends_padding() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    padding = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    poisoned = value.clone()
    poisoned[0, :, 3:] = poisoned[1, :, 1:] = math.nan
    everything = torch.ones(2, 2, 6, 6, dtype=torch.bool)
    output = reference_attention(query, key, poisoned, everything, padding)
    torch.testing.assert_close(output[1], value[1, :, :1].expand(2, 6, 4))
    short = reference_attention(query[:1], key[:1, :, :3], value[:1, :, :3])
    torch.testing.assert_close(output[:1], short)
    nothing = reference_attention(query, key, value, None, torch.zeros(2, 6, dtype=torch.long))
    assert not nothing.any()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("ratio", [0.004, 0.1, 0.5, 0.93])
def test_masks_equal_the_definition(pattern: str, ratio: float) -> None:
    """The whole of each pattern against plain integers, class tokens and oblong grids included."""
    seed = seed_of(13)
    shape, grid = (2, 2, 3, 68), (5, 13)
    found = dropped_scores(seed, shape, ratio, pattern=pattern, window=2, grid=grid).expand(shape)
    assert torch.equal(found, reference_mask(seed.tolist(), shape, ratio, pattern=pattern, window=2, grid=grid))


def test_the_oracle_borrows_nothing_from_what_it_judges() -> None:
    source = Path(reference.__file__).read_text()
    imported = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imported == [
        "import math",
        "from collections.abc import Sequence",
        "from typing import Any",
        "import torch",
    ]
    assert not list(Path(dropkey.__file__).parent.glob("reference*")), "the oracle travels with no checkpoint"
    assert score_is_dropped((1, 2), 3, 4, 5, 2, 0.25) and not score_is_dropped((1, 2), 3, 4, 5, 3, 0.25)


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_schedules() -> None:
    assert layer_ratios(4, 0.3) == pytest.approx([0.3, 0.2, 0.1, 0.0])
    assert layer_ratios(4, 0.3, 0.15, "increasing") == pytest.approx([0.15, 0.2, 0.25, 0.3])
    assert layer_ratios(3, 0.3, 0.1, "constant") == [0.3, 0.3, 0.3]
    assert layer_ratios(1, 0.3) == [0.3]
    assert layer_ratios(7, 0.4, 0.1)[::6] == [0.4, 0.1]
    assert all(isinstance(ratio, float) for ratio in layer_ratios(5, 0))


@pytest.mark.parametrize("ratio", [1, 1.5, -0.1, math.nan, math.inf])
def test_ratios_outside_the_range_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got"):
        layer_ratios(3, ratio)


@pytest.mark.parametrize("ratio", ["0.1", None, True])
def test_ratios_that_are_no_numbers_are_refused(ratio: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a number in \[0, 1\)"):
        layer_ratios(3, ratio)


def test_other_bad_input() -> None:
    with pytest.raises(ValueError, match="'decreasing', 'constant', 'increasing'"):
        layer_ratios(3, 0.1, schedule="cosine")
    with pytest.raises(ValueError, match="must not exceed"):
        layer_ratios(3, 0.1, 0.2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        layer_ratios(0, 0.1)
    with pytest.raises(ValueError, match="'score', 'key', 'token', 'block', 'cross'"):
        dropped_scores(seed_of(0), (1, 1, 4, 4), 0.1, pattern="column")
    with pytest.raises(ValueError, match="between 1 and 3.*3 x 4 patch grid, got 4"):
        dropped_scores(seed_of(0), (1, 1, 4, 13), 0.1, pattern="block", window=4, grid=(3, 4))
