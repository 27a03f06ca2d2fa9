"""The costs of DropKey, from the rows of the benchmarks: tables for docs/speed.md and lines for the README.

A cell is the median over the rounds, with quartiles in brackets, of the ratio to plain fused attention in the same
round. Rows are appended, so the last measurement of a cell counts.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

from .rows import Row
from .tables import markdown


TIME, MEMORY, STRUCTURE = "time over sdpa/none", "peak memory over sdpa/none", "time over plain/none"
# head of a column: backends of which the fastest counts, regulariser, drop ratio
COLUMNS = {
    "plain `eager`": (("eager",), "none", "0.0"),
    "attention dropout, best of both": (("eager", "sdpa"), "attention dropout", "0.1"),
    "paper's listing": (("eager",), "paper listing", "0.1"),
    "DropKey `eager`": (("eager",), "dropkey", "0.1"),
    "DropKey `sdpa`": (("sdpa",), "dropkey", "0.1"),
    "DropKey `sdpa`, fast masks": (("sdpa fast masks",), "dropkey", "0.1"),
    "DropKey `sdpa`, compiled": (("sdpa compiled",), "dropkey", "0.1"),
    'DropKey "token"': (("sdpa",), "dropkey token", "0.3"),
}
MODELS = {"vit_small": "ViT-S/16", "vit_base": "ViT-B/16", "t2t_vit_14": "T2T-ViT-14", "volo_d1": "VOLO-d1"}
# rows that agree in these are measurements of one workload on one machine
WORKLOAD = ("device", "threads", "workload", "dtype", "batch", "heads", "tokens", "head_width")
Workload = tuple[str, ...]


def read_benchmarks(file: Path) -> list[Row]:
    """The rows of a benchmark file."""
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def label(workload: Workload) -> str:
    """A workload in words: "attention, 16 x 6 heads, 197 tokens, float32", "step of ViT-S/16, 8 images, float32"."""
    _, _, name, dtype, batch, heads, tokens, _ = workload
    if name == "attention":
        return f"attention, {batch} x {heads} heads, {int(tokens):,} tokens, {dtype}"
    model, _, job = name.partition(" ")
    return f"{job} of {MODELS.get(model, model)}, {batch} images, {dtype}"


def cell(row: Row) -> str:
    """The median, and where it was measured more than once its quartiles."""
    median, first, third = (float(row[name]) for name in ("value", "first_quartile", "third_quartile"))
    digits = 0 if median >= 10 else 2
    quartiles = f" [{first:.{digits}f}-{third:.{digits}f}]" if int(row["n"]) > 1 else ""
    return f"{median:.{digits}f}{quartiles}"


def measured(rows: Sequence[Row], workload: Workload, metric: str, column: str) -> Row | None:
    """The last row of a cell, of the backend that is fastest or smallest; None where nothing was measured."""
    backends, regulariser, ratio = COLUMNS[column]
    found = {
        row["backend"]: row
        for row in rows
        if tuple(row[name] for name in WORKLOAD) == workload
        and (row["metric"], row["regulariser"], row["drop_ratio"]) == (metric, regulariser, ratio)
        and row["backend"] in backends
    }
    return min(found.values(), key=lambda row: float(row["value"]), default=None)


def workloads(rows: Sequence[Row], metric: str) -> list[Workload]:
    """Workloads with a DropKey row of a metric: attention by length, then models; the fullest machine first."""
    found = {
        tuple(row[name] for name in WORKLOAD)
        for row in rows
        if row["metric"] == metric and row["regulariser"] == "dropkey"
    }
    sizes: dict[tuple[str, ...], int] = {}
    for workload in found:
        sizes[workload[:2]] = sizes.get(workload[:2], 0) + 1
    return sorted(found, key=lambda one: (-sizes[one[:2]], one[:2], one[2] != "attention", one[3], *_size(one), one))


def _size(workload: Workload) -> tuple[int, int]:
    return int(workload[6]), int(workload[5])


def line(rows: Sequence[Row], workload: Workload, metric: str) -> list[str]:
    """The cells of a workload; empty where nothing was measured."""
    found = (measured(rows, workload, metric, column) for column in COLUMNS)
    return [cell(row) if row else "" for row in found]


def cost_tables(rows: Sequence[Row]) -> str:
    """A table for each device and number of threads, and one of the structures of the families."""
    parts = []
    timed, with_memory = workloads(rows, TIME), set(workloads(rows, MEMORY))
    for device, threads in dict.fromkeys(workload[:2] for workload in timed):
        lines = []
        for workload in timed:
            if workload[:2] == (device, threads):
                lines.append([label(workload), *line(rows, workload, TIME)])
                if workload in with_memory:
                    lines.append(["the same, peak memory", *line(rows, workload, MEMORY)])
        versions = sorted({row["torch"] for row in rows if (row["device"], row["threads"]) == (device, threads)})
        title = f"Device {device}, {threads} {'thread' if threads == '1' else 'threads'}, torch {', '.join(versions)}:"
        parts += [title, markdown(["forward and backward", *COLUMNS], lines)]
    parts += ["The families against their structure in plain PyTorch, without dropout:", structure_table(rows)]
    return "\n\n".join(parts)


def structure_table(rows: Sequence[Row]) -> str:
    """The time of the families with `sdpa` over that of the same layers in plain PyTorch, without and with DropKey."""
    found: dict[Workload, dict[str, str]] = {}
    for row in rows:
        if row["metric"] == STRUCTURE and row["backend"] == "sdpa":
            found.setdefault(tuple(row[name] for name in WORKLOAD), {})[row["regulariser"]] = cell(row)
    lines = [
        [label(workload), cells.get("none", ""), cells.get("dropkey", "")]
        for workload, cells in sorted(found.items(), key=lambda one: one[0][2])
    ]
    return markdown(["", "ratio 0", "DropKey 0.1"], lines)


def cost_lines(rows: Sequence[Row]) -> str:
    """The part of the README: training steps, attention alone, and its memory where the sequence is longest."""
    timed = workloads(rows, TIME)
    timed = [place for place in timed if place[:2] == timed[0][:2] and place[3] == "float32"]
    attention = [place for place in timed if place[2] == "attention"]
    longest = [place for place in workloads(rows, MEMORY) if place in attention][-1]
    shown = [(place, TIME, label(place)) for place in timed if place[2].startswith("vit_")]
    shown += [
        (attention[0], TIME, label(attention[0])),
        (longest, MEMORY, f"peak memory of {label(longest)}"),
    ]
    columns = {"DropKey": "DropKey `sdpa`", "attention dropout": "attention dropout, best of both"}
    columns['pattern "token"'] = 'DropKey "token"'
    lines = []
    for place, metric, name in shown:
        found = {title: measured(rows, place, metric, column) for title, column in columns.items()}
        lines.append(f"- {name}: {', '.join(f'{title} {cell(row)}' for title, row in found.items() if row)}")
    return "\n".join(lines)
