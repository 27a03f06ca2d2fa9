"""Masks by compiled C++: the bits of the plain code on a million rows, on and off, and what a machine without a compiler says."""

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_inputs import site, tensors

import hf_dropkey
from hf_dropkey import disable_fast_masks, enable_fast_masks, fast_masks, fast_masks_enabled
from hf_dropkey.models import counter_hash
from hf_dropkey.models.attention import dropkey_attention_forward
from hf_dropkey.models.counter_hash import RowState, drop_bias_of_rows, row_keys, row_state
from hf_dropkey.models.patterns import PATTERNS, dropped_scores
from hf_dropkey.training.arguments import RunArguments


ROOT = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


@pytest.fixture
def fast() -> Iterator[None]:
    """Fast masks, off again afterwards; skipped where they cannot be built."""
    try:
        enable_fast_masks()
    except RuntimeError as error:
        pytest.skip(str(error))
    yield
    disable_fast_masks()


def plain(state: RowState, keys: int, ratio: float, dtype: torch.dtype) -> torch.Tensor:
    enabled, counter_hash.FAST_ROWS = counter_hash.FAST_ROWS, None
    try:
        return drop_bias_of_rows(state, keys, ratio, dtype)
    finally:
        counter_hash.FAST_ROWS = enabled


# each case has rows enough for a million of all cases together
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "keys", "ratio"),
    [(200_000, 9, 0.3), (60_000, 197, 0.1), (30_000, 256, 0.003), (20_000, 63, 0.999), (20_000, 321, 0.5),
     (3_500, 1025, 0.77)],
)  # fmt: skip
def test_a_million_rows_have_the_bits_of_the_plain_code(
    fast: None, rows: int, keys: int, ratio: float, dtype: torch.dtype
) -> None:
    words = torch.randint(-(2**31), 2**31, (2, 1, 1, rows, 1), dtype=torch.int32)
    state = row_state(words[0], words[1], keys, ratio)
    found = drop_bias_of_rows(state, keys, ratio, dtype)
    integers = counter_hash.BITS[dtype][0]
    assert found.dtype == dtype
    assert torch.equal(found.view(integers), plain(state, keys, ratio, dtype).view(integers))


@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("by_image", [False, True])
def test_rows_have_the_pairs_of_the_plain_code(fast: None, by_image: bool, images: int) -> None:
    # every other row of memory, as a part of a batch has it
    seeds = torch.randint(-(2**31), 2**31, (2 * images, 2), dtype=torch.int32)[::2]
    given = (seeds if by_image else seeds[0], images, 3, 70_000)
    found = row_keys(*given)
    disable_fast_masks()
    for one, other in zip(found, row_keys(*given), strict=True):
        assert one.shape == other.shape == (images, 3, 70_000, 1) and torch.equal(one, other)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_drops_the_same(fast: None, pattern: str) -> None:
    seed = torch.tensor([5, -6], dtype=torch.int32)
    given: Any = {"pattern": pattern, "window": 2, "grid": (6, 6)}
    found = dropped_scores(seed, (3, 2, 37, 37), 0.3, **given)
    disable_fast_masks()
    assert torch.equal(found, dropped_scores(seed, (3, 2, 37, 37), 0.3, **given))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_attention_is_the_same_to_the_bit(
    fast: None, backend: str, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_dropkey.models.cpu_attention.CHUNK_BYTES", 4 * 2 * 70 * 40)
    qkv = tensors(3, 2, 70, 8, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)

    def run() -> list[torch.Tensor]:
        torch.manual_seed(3)
        output, _ = dropkey_attention_forward(site(0.2), *qkv, None, implementation=backend, scaling=0.5)
        return [output, *torch.autograd.grad(output.sum(), qkv)]

    try:
        found = run()
        disable_fast_masks()
        wanted = run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("first", [True, False])
def test_they_may_change_between_the_passes(fast: None, first: bool) -> None:
    qkv = tensors(2, 2, 70, 8, dtype=torch.float32)

    def run(switch: bool) -> tuple[torch.Tensor, ...]:
        (enable_fast_masks if first else disable_fast_masks)()
        torch.manual_seed(3)
        output, _ = dropkey_attention_forward(site(0.2), *qkv, None, implementation="sdpa", scaling=0.5)
        if switch:
            (disable_fast_masks if first else enable_fast_masks)()
        found: tuple[torch.Tensor, ...] = torch.autograd.grad(output.sum(), qkv)
        return found

    for one, other in zip(run(switch=True), run(switch=False), strict=True):
        assert torch.equal(one, other)


def test_they_are_off_by_default_and_belong_to_the_installed_package(fast: None) -> None:
    assert fast_masks_enabled()
    # what a checkpoint's code has is a copy of the folder of models, which starts without
    copy = runpy.run_path(str(Path(counter_hash.__file__)), run_name="a_checkpoints_copy")
    assert copy["FAST_ROWS"] is None
    disable_fast_masks()
    off: Any = counter_hash.FAST_ROWS
    assert off is None and not fast_masks_enabled()
    inside = "\n".join(path.read_text() for path in Path(counter_hash.__file__).parent.glob("*.py"))
    assert "FAST_ROWS =" not in inside.replace("| None = None", "") and "fast_masks" not in inside.replace(
        "`enable_fast_masks`", ""
    )


def test_memory_of_another_size_is_refused(fast: None) -> None:
    assert counter_hash.FAST_ROWS is not None
    state = row_state(*row_keys(torch.tensor([1, 2], dtype=torch.int32), 1, 1, 4), 9, 0.3)
    for shape in ((3, 9), (5, 9)):
        with pytest.raises(ValueError, match="Masks of 4 rows do not fit"):
            counter_hash.FAST_ROWS(state, 0.3, torch.empty(*shape, dtype=torch.int32), -8388608)
    with pytest.raises(ValueError, match="do not fit"):
        counter_hash.FAST_ROWS(state, 0.3, torch.empty(9, 4, dtype=torch.int32).T, -8388608)


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    fast_masks._checked.cache_clear()
    try:
        monkeypatch.setenv("CXX", "no_such_compiler")
        with pytest.raises(RuntimeError, match=r"there is no 'no_such_compiler'.*apt install g\+\+.*the same bits"):
            enable_fast_masks()
        assert not fast_masks_enabled()
        # a training goes on, since only its speed differs
        RunArguments(fast_masks=True).start_fast_masks()
        assert "--fast_masks: Fast masks need a C++ compiler" in caplog.text
        monkeypatch.delenv("CXX")
        monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: False)
        with pytest.raises(RuntimeError, match="pip install ninja"):
            enable_fast_masks()
    finally:
        fast_masks._checked.cache_clear()


def test_a_build_that_fails_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = tmp_path / "fast_masks.cpp"
    wrong.write_text("no C++")
    monkeypatch.setattr(fast_masks, "SOURCE", wrong)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    fast_masks._checked.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"(?s)could not be built by .*the same bits"):
            enable_fast_masks()
    finally:
        fast_masks._checked.cache_clear()


def test_wrong_bits_are_noticed(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    disable_fast_masks()
    right = fast_masks._loaded()
    zeros = right._replace(rows=lambda state, ratio, out, infinity: out.zero_())
    swapped = right._replace(keys=lambda *given: right.keys(*given)[::-1])
    for wrong, what in ((zeros, "in torch.float32"), (swapped, "in the pairs of rows")):
        monkeypatch.setattr(fast_masks, "_loaded", lambda wrong=wrong: wrong)
        fast_masks._checked.cache_clear()
        with pytest.raises(RuntimeError, match=f"draw other bits than they should here .{what}"):
            enable_fast_masks()
        assert not fast_masks_enabled()
    fast_masks._checked.cache_clear()


def test_nothing_is_compiled_or_imported_before_it_is_wanted() -> None:
    source = (
        "import sys, hf_dropkey; assert 'hf_dropkey.fast_masks' not in sys.modules; "
        "assert not hf_dropkey.fast_masks_enabled(); assert 'torch.utils.cpp_extension' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", source], check=True, timeout=120, cwd=ROOT)
    assert {"enable_fast_masks", "disable_fast_masks", "fast_masks_enabled"} <= set(hf_dropkey.__all__)
