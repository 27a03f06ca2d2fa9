"""Runs a grid of experiments: every cell that has no rows yet, several in parallel, one row for each number.

    python scripts/run_experiments.py scripts/grids/digits.json
    python scripts/run_experiments.py scripts/grids/digits.json --test

The first command trains all cells and measures them on a held-out part of the training images. The second one chooses
the ratio of each kind of cell by these numbers, and measures the chosen cells on the test images, once; with `corruptions`
in the grid also on test images with noise, blur, less contrast and JPEG, which may be added to a grid later. Both skip
finished cells: after an interruption the same command continues. Weights stay in --output_dir; a cell whose folder is
gone is trained again. Rows go to a CSV file that tables, figures and cards are made from; losing cells stay in it.
"""

import contextlib
import io
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock, Timeout
from transformers import HfArgumentParser

from hf_dropkey.hub.cards import shown_command
from hf_dropkey.lab.grids import Cell, Grid, chosen_cells, job_of, measure, missing_cells, new_rows
from hf_dropkey.lab.rows import COLUMNS, choose, read_rows, warnings
from hf_dropkey.lab.timing import append_rows, check_columns, commit, origin


ROOT = Path(__file__).resolve().parents[1]


# for a worker that was told to
SECONDS_TO_END = 10.0


@dataclass
class GridArguments:
    """The grid, the output, the workers."""

    grid: Path = field(metadata={"help": "JSON file with the grid; the first argument."})
    test: bool = field(default=False, metadata={"help": "Choose the ratios, and use the test images, once."})
    results: Path = field(
        default=ROOT / "model_cards" / "results.csv", metadata={"help": "CSV file that rows are appended to."}
    )
    output_dir: Path = field(default=Path("runs/experiments"), metadata={"help": "Folder for the weights."})
    workers: int = field(default=1, metadata={"help": "Cells in parallel, each in a process with one thread."})
    seeds: int | None = field(default=None, metadata={"help": "Number of seeds, the first of the grid. Default: all."})
    train_file: str | None = field(default=None, metadata={"help": "Training data that replaces that of the recipe."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Test images that replace those of the recipe."}
    )

    def data(self) -> dict[str, str]:
        """The arguments that replace those of the recipe."""
        files = {"train_file": self.train_file, "validation_file": self.validation_file}
        return {name: value for name, value in files.items() if value}


def start_worker() -> None:
    """Silences a process and sets one thread: the models are so small that more would slow them down."""
    # caches the commit of the code that is loaded here
    commit()
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.INFO)


def end_with_parent() -> None:
    """Ends this process when its parent has ended, however it ended, since no one would record its results."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def only_run(lock: Path) -> Iterator[None]:
    """Locks the rows or the folder of a grid against other runs, which would repeat its unfinished cells.

    Raises:
        SystemExit: Another run holds the lock.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        # the system releases it when this process ends, however it ends
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise SystemExit(
            f"another run of this grid holds {lock}; wait for it, or pass another --results and another --output_dir"
        ) from None


def run_group(grid: Grid, cells: list[Cell], folder: Path, **arguments: Any) -> tuple[list[dict[str, str]], float]:
    """The rows of cells that share weights, and the seconds they took; suppresses the output of the libraries."""
    start = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        rows = measure(grid, cells, folder, root=ROOT, **arguments)
    return rows, time.monotonic() - start


def show(done: int, total: int, rows: list[dict[str, str]], seconds: float, elapsed: float) -> None:
    """Prints a line of progress."""
    row = next(row for row in rows if row["metric"] == "accuracy")
    cell = " ".join(row[name] for name in ("model", "regulariser", "ratio", "schedule", "pattern", "train_images"))
    left = elapsed / done * (total - done) / 60
    print(
        f"[{done}/{total}] {cell} seed {row['seed']}: accuracy {float(row['value']):.3f}, {seconds:.0f} s; about "
        f"{left:.0f} min left",
        flush=True,
    )


def main() -> int:
    """Runs the job; returns 1 if a cell failed."""
    group: Any = GridArguments
    command = sys.argv[1:]
    if command and not command[0].startswith("--"):
        command.insert(0, "--grid")
    (arguments,) = HfArgumentParser(group).parse_args_into_dataclasses(command, look_for_args_file=False)
    transformers.logging.set_verbosity_error()
    grid = Grid.load(arguments.grid)
    with only_run(arguments.results.with_name(f".{arguments.results.name}.{grid.name}.lock")):
        return run(grid, arguments)


def run(grid: Grid, arguments: GridArguments) -> int:
    """Runs the missing cells of a grid."""
    rows: list[dict[str, str]] = read_rows(arguments.results) if arguments.results.exists() else []
    cells = chosen_cells(grid, rows) if arguments.test else list(grid.cells)
    split = "test" if arguments.test else "validation"
    missing = set(missing_cells(grid, rows, split))
    if arguments.seeds is not None:
        kept = sorted({cell.seed for cell in cells})[: arguments.seeds]
        cells = [cell for cell in cells if cell.seed in kept]
    groups = grid.groups([cell for cell in cells if cell in missing])
    print(f"{grid.name}, {split}: {len(cells)} cells, {len(cells) - sum(map(len, groups))} of them done", flush=True)
    if not groups:
        return 0
    if arguments.results.exists():
        check_columns(arguments.results, COLUMNS)
    folder = arguments.output_dir / grid.name
    # a mistake in the grid or recipe is an error before hours are spent
    for first in {cell[0].kind(): cell[0] for cell in groups}.values():
        job_of(grid, first.trained, folder / first.name, root=ROOT, data=arguments.data())

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = origin(device, shown_command(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]))
    source["threads"] = 1

    def at(row: dict[str, str]) -> str:
        # weights that an earlier commit trained are marked
        trained, measured = row["git_sha"], str(source["git_sha"])
        return measured if trained == measured else f"{trained} measured at {measured}"

    start, failed = time.monotonic(), 0
    job = partial(run_group, grid, split=split, data=arguments.data())
    # a fresh interpreter: a fork of this one would inherit the locks of torch's threads
    pool_of_workers = partial(ProcessPoolExecutor, arguments.workers, multiprocessing.get_context("spawn"))
    with only_run(folder / ".lock"), pool_of_workers(start_worker) as pool:
        running: dict[Future[Any], list[Cell]] = {
            pool.submit(job, cells, folder / cells[0].name): cells for cells in groups
        }
        try:
            for number, future in enumerate(as_completed(running), start=1):
                try:
                    found, seconds = future.result()
                    found_new = new_rows(rows, found)
                except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
                    failed += 1
                    print(f"FAILED {running[future][0].name}: {type(error).__name__}: {error}", flush=True)
                    continue
                ordered = [
                    {name: {**row, **source, "git_sha": at(row)}[name] for name in COLUMNS} for row in found_new
                ]
                append_rows(arguments.results, ordered)
                show(number, len(groups), found, seconds, time.monotonic() - start)
        except BaseException:
            # the results of the workers would not be recorded
            pool.shutdown(wait=False, cancel_futures=True)
            children = multiprocessing.active_children()
            for process in children:
                process.terminate()
            for process in children:
                process.join(SECONDS_TO_END)
                # one that has just started, or waits for another, may not heed the first signal
                process.kill()
            raise
    for note in warnings(choose(read_rows(arguments.results), experiment=grid.name)):
        print(f"note: {note}")
    if failed:
        print(f"{failed} of {len(groups)} trainings failed; the same command tries them again")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
