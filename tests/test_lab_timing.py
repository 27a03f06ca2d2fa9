"""What the benchmarks rest on: order of runs, ratios within a round, allocations, rows."""

import csv
from pathlib import Path

import pytest
import torch

from hf_dropkey.lab.timing import append_rows, interleaved_times, origin, peak_memory, ratios, spread


CPU = torch.device("cpu")


def test_every_round_runs_all_jobs_each_time_from_another_one_on() -> None:
    calls: list[str] = []
    jobs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleaved_times(jobs, 3, device=CPU, repeats=2, warmup=0)
    assert "".join(calls) == "aabbcc" + "bbccaa" + "ccaabb"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert min(min(values) for values in times.values()) > 0


def test_warm_up_rounds_are_not_counted() -> None:
    calls: list[str] = []
    times = interleaved_times({"a": lambda: calls.append("a")}, 2, device=CPU, warmup=3)
    assert len(calls) == 5 and len(times["a"]) == 2


def test_ratios_are_taken_within_a_round() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_spread() -> None:
    assert spread([5.0]) == (5.0, 5.0, 5.0, 1)
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0, 5)


def test_peak_memory_counts_what_is_held_at_once() -> None:
    kibi = 256  # floats

    def job() -> None:
        first = torch.empty(64 * kibi)
        del first
        held = [torch.empty(32 * kibi) for _ in range(3)]
        del held

    assert 96 * 1024 <= peak_memory(job, CPU) < 98 * 1024


def test_memory_of_other_devices_is_refused() -> None:
    with pytest.raises(ValueError, match="'meta'"):
        peak_memory(lambda: None, torch.device("meta"))


def test_rows_are_appended_under_one_header(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.csv"
    append_rows(file, [])
    assert not file.exists()
    append_rows(file, [{"a": 1, "b": "x, y"}])
    append_rows(file, [{"a": 2, "b": "z"}])
    with file.open(newline="") as rows:
        assert list(csv.DictReader(rows)) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": "z"}]
    with pytest.raises(ValueError, match="columns"):
        append_rows(file, [{"a": 3}])


def test_origin_says_commit_versions_and_threads() -> None:
    found = origin(CPU, "some command")
    assert found["command"] == "some command" and found["device"] == "cpu"
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["git_sha"]
