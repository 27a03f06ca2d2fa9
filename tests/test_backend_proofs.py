"""The table of proofs for `default_backend`: what rows prove, what the default does with it, and that it is committed."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_dropkey import DropKeyViTConfig, default_backend, dropkey_attention
from hf_dropkey.lab import backend_proofs as lab
from hf_dropkey.lab.backend_proofs import TABLE, proofs_of, with_proofs
from hf_dropkey.models import attention, modeling_dropkey
from hf_dropkey.models.attention import default_backend_of
from hf_dropkey.models.backend_proofs import PROOFS, Proof


ROOT = Path(__file__).resolve().parents[1]
NAME = "NVIDIA H100 80GB HBM3"
PROOF = Proof(NAME, (9, 0), "bfloat16", 64, (197, 1025), 0.71, 0.7, 0.72)
FUSED, SDPA = "dropkey_triton", "sdpa"


def row(tokens: int, third: float, **more: str) -> dict[str, str]:
    fields = {"workload": "attention", "backend": FUSED, "regulariser": "dropkey", "metric": lab.METRIC, "n": "15"}
    fields |= {
        "device": NAME,
        "capability": "9.0",
        "dtype": "bfloat16",
        "head_width": "64",
        "batch": "8",
        "heads": "6",
    }
    quartiles = {"value": f"{third - 0.01}", "first_quartile": f"{third - 0.02}", "third_quartile": f"{third}"}
    return {**fields, **quartiles, "tokens": str(tokens), **more}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stubbed GPU of the name in the table, which holds one proof; its facts can be changed."""
    facts: dict[str, Any] = {"name": NAME, "capability": (9, 0), "triton": True}
    monkeypatch.setattr(attention, "PROOFS", (PROOF,))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: facts["name"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: facts["capability"])
    monkeypatch.setattr(attention, "triton_is_available", lambda device: facts["triton"])
    return facts


def test_the_default_takes_the_fused_kernel_where_it_is_proved(gpu: dict[str, Any]) -> None:
    def chosen(dtype: torch.dtype = torch.bfloat16, device: str = "cuda", **sizes: int) -> str:
        return default_backend(device, dtype, **{"tokens": 577, "head_width": 64, **sizes})

    assert chosen() == chosen(tokens=197) == chosen(tokens=1025) == FUSED
    assert chosen(tokens=196) == chosen(tokens=1026) == chosen(head_width=32) == chosen(torch.float16) == SDPA
    # sizes that are not known are not proved
    assert default_backend("cuda", torch.bfloat16) == SDPA
    assert default_backend("cuda", torch.bfloat16, tokens=577) == SDPA
    assert chosen(torch.float32, "cpu") == chosen(device="xpu") == SDPA
    for name, other in (("name", "NVIDIA A100-SXM4-80GB"), ("capability", (8, 0)), ("triton", False)):
        before, gpu[name] = gpu[name], other
        assert chosen() == SDPA, name
        gpu[name] = before
    assert chosen() == FUSED


def test_an_empty_table_asks_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a GPU was asked")

    monkeypatch.setattr(attention, "PROOFS", ())
    monkeypatch.setattr(torch.cuda, "get_device_name", fail)
    assert default_backend("cuda", torch.bfloat16, tokens=197, head_width=64) == SDPA


def test_calls_that_the_fused_kernel_refuses_go_elsewhere(
    gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_gpu(device: str, dtype: torch.dtype, **sizes: int) -> str:
        return default_backend("cuda", dtype, **sizes)

    monkeypatch.setattr(attention, "default_backend", on_gpu)
    query = torch.zeros(2, 3, 200, 64, dtype=torch.bfloat16)
    padding = torch.ones(2, 200, dtype=torch.bool)

    def chosen(mask: torch.Tensor | None = None, pattern: str = "score", value: torch.Tensor = query) -> str:
        return default_backend_of(query, query, value, mask, pattern)

    assert chosen() == chosen(pattern="key") == chosen(padding) == chosen(padding[:, None, None]) == FUSED
    assert {chosen(pattern=name) for name in ("token", "block", "cross")} == {SDPA}
    # by query, additive, another width, another dtype
    assert chosen(torch.ones(1, 1, 200, 200, dtype=torch.bool)) == chosen(torch.zeros(2, 1, 1, 200)) == SDPA
    assert chosen(value=query[..., :32]) == chosen(value=query.float()) == SDPA
    seen = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        seen.append(chosen())
        return x

    torch.func.vmap(ask)(torch.zeros(1))
    assert seen == [SDPA]


def test_the_attention_function_takes_what_the_default_says(
    gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def default(device: str, dtype: torch.dtype, **sizes: int) -> str:
        asked.append(sizes)
        return "eager"

    monkeypatch.setattr(attention, "default_backend", default)
    query = torch.randn(1, 2, 9, 4)
    dropkey_attention(query, query, query, 0.3)
    dropkey_attention(query, query, query, 0.3, pattern="block")
    assert asked == [{"tokens": 9, "head_width": 4}, {}]


def test_models_know_their_sizes() -> None:
    def sizes(**settings: Any) -> dict[str, int]:
        shape = {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "image_size": 48,
            "patch_size": 16,
            "intermediate_size": 64,
        }
        return modeling_dropkey._fused_sizes(DropKeyViTConfig(**{**shape, **settings}))

    assert sizes() == sizes(dropkey_ratio=0.1, dropkey_pattern="key") == {"tokens": 10, "head_width": 16}
    assert sizes(dropkey_ratio=0.1, dropkey_pattern="block", dropkey_window=1) == {}
    assert sizes(attention_probs_dropout_prob=0.1, dropkey_ratio=0.0) == {}


def test_what_rows_prove() -> None:
    won = [row(197, 0.9), row(197, 0.95, batch="128"), row(1025, 0.8)]
    proof = Proof(NAME, (9, 0), "bfloat16", 64, (197, 1025), 0.94, 0.93, 0.95)
    (found,) = proofs_of(won)
    assert found._replace(ratio=0.94, first_quartile=0.93) == proof
    # a loss in between ends a range, a draw is a loss, and the last row of a shape counts
    assert [one.tokens for one in proofs_of([*won, row(577, 1.0)])] == [(197, 197), (1025, 1025)]
    assert [one.tokens for one in proofs_of([*won, row(577, 1.2), row(577, 0.7)])] == [(197, 1025)]
    assert proofs_of([row(197, 0.9), row(197, 1.1, batch="1")]) == []
    assert len(proofs_of([*won, row(197, 0.9, dtype="float16"), row(197, 0.9, device="NVIDIA L4")])) == 3
    for name, other in (
        ("n", "5"),
        ("capability", ""),
        ("metric", "GPU time over flash/none"),
        ("metric", "time over sdpa/dropkey"),
        ("backend", "flex_attention"),
        ("regulariser", "dropkey key"),
        ("workload", "vit_small step"),
    ):
        assert proofs_of([row(197, 0.9, **{name: other})]) == [], name
    without = row(197, 0.9)
    del without["capability"]
    assert proofs_of([without]) == []


def test_the_table_is_python_that_the_formatter_keeps(tmp_path: Path) -> None:
    odd = PROOF._replace(device="a name, 1\\2")
    file = tmp_path / "backend_proofs.py"
    for proofs in ([], [PROOF, odd]):
        source = with_proofs(TABLE.read_text(), proofs)
        names: dict[str, Any] = {"__name__": "table"}
        exec(compile(source, "table", "exec"), names)
        assert [tuple(proof) for proof in names["PROOFS"]] == [tuple(proof) for proof in proofs]
        assert with_proofs(source, proofs) == source
        file.write_text(source)
        ruff = shutil.which("ruff") or str(Path(sys.executable).with_name("ruff"))
        if not Path(ruff).is_file():
            pytest.skip("ruff is not installed")
        checked = [ruff, "format", "--check", "--line-length", "119", str(file)]
        subprocess.run(checked, check=True, capture_output=True, timeout=60)
    with pytest.raises(ValueError, match="no line that starts with"):
        with_proofs("", [])


def test_the_committed_table_is_what_the_committed_rows_give() -> None:
    rows = lab.committed_rows(ROOT / "model_cards")
    assert rows, "the rows of the CPU are there"
    assert list(PROOFS) == proofs_of(rows), "run python scripts/write_backend_proofs.py"
    assert TABLE.read_text() == with_proofs(TABLE.read_text(), proofs_of(rows))


def test_the_benchmark_compares_the_fused_kernel_with_the_default() -> None:
    script = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "benchmark_attention.py")))
    times = {"GPU time": {"flash/none": [1.0] * 3, script.DEFAULT: [4.0, 2.0, 4.0], script.FUSED: [1.0, 1.0, 2.0]}}
    found = {metric: value for metric, value, unit in script.readings(times, script.FUSED, "flash/none")}
    assert set(found) == {"GPU time", "GPU time over flash/none", lab.METRIC}
    # the median of the ratios, not the ratio of the medians
    assert found[lab.METRIC].median == 0.5 and found[lab.METRIC].first == 0.375
    assert lab.METRIC not in {metric for metric, *_ in script.readings(times, script.DEFAULT, "flash/none")}
    # where the default path is the baseline there is one row of it
    assert [metric for metric, *_ in script.readings(times, script.FUSED, script.DEFAULT)] == ["GPU time", lab.METRIC]
