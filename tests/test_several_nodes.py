"""Two nodes train together; one is killed, the other goes on alone, and again with two when it is back."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import small_runs
import two_nodes
from small_runs import FSDP
from two_nodes import ROOT, Node

from hf_dropkey.training.checkpoints import checkpoints_in, step_of
from hf_dropkey.training.record import recorded


SECONDS = 240.0
SCRIPT = str(ROOT / "scripts" / "train_image_classification.py")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    reason = two_nodes.why_not(tmp_path)
    if reason is not None:
        pytest.skip(reason)
    with two_nodes.two_nodes(tmp_path) as both:
        yield both


def wait_for(what: str, ready: Callable[[], bool], nodes: tuple[Node, Node]) -> None:
    end = time.monotonic() + SECONDS
    while not ready():
        if time.monotonic() > end or all(node.launchers[-1].poll() is not None for node in nodes if node.launchers):
            logs = "\n".join(f"{node.name}:\n{node.log.read_text()[-3000:]}" for node in nodes if node.log.exists())
            pytest.fail(f"no {what}\n{logs}")
        time.sleep(0.2)


def saved_by(folder: Path, processes: int, after: int) -> list[int]:
    """The steps of the whole checkpoints that so many processes wrote after a step."""
    steps = []
    for checkpoint in checkpoints_in(folder):
        step = step_of(checkpoint) or 0
        if step <= after:
            continue
        try:
            written_by = recorded(checkpoint, "settings").get("world_size")
        except (ValueError, OSError):
            # it is being written, or being deleted
            continue
        if written_by == processes:
            steps.append(step)
    return sorted(steps)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "processes"), [("ddp", 1), ("fsdp", 2)])
def test_a_job_outlives_a_node(tmp_path: Path, nodes: tuple[Node, Node], engine: str, processes: int) -> None:
    first, second = nodes
    output, recipe = tmp_path / "run", tmp_path / "recipe.json"
    settings = {"max_steps": 600, "save_steps": 15, "save_total_limit": 3, "disable_tqdm": True, "logging_steps": 15}
    recipe.write_text(json.dumps({**small_runs.RECIPE, **settings, "dataloader_num_workers": 0}))
    command = (SCRIPT, str(recipe), "--output_dir", str(output), "--resume_from_checkpoint", "auto")
    environment = FSDP if engine == "fsdp" else {}

    def launch(node: Node) -> None:
        node.launch(first, *command, processes=processes, environment=environment)

    def wait_for_step(what: str, world: int, after: int) -> int:
        wait_for(what, lambda: bool(saved_by(output, world, after)), nodes)
        return saved_by(output, world, after)[-1]

    launch(first)
    launch(second)
    step = wait_for_step("checkpoint of two nodes", 2 * processes, 0)
    second.kill()
    step = wait_for_step("checkpoint of the node that is left", processes, step)
    launch(second)
    step = wait_for_step("checkpoint of two nodes again", 2 * processes, step)
    wait_for("end", lambda: all(node.launchers[-1].poll() is not None for node in nodes), nodes)
    assert [node.launchers[-1].returncode for node in nodes] == [0, 0]
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 600 and step <= 600
    logged = [entry["step"] for entry in state["log_history"] if "loss" in entry]
    assert logged == sorted(set(logged)) and logged[-1] == 600, "a step was counted twice or lost"
    assert json.loads((output / "eval_results.json").read_text())["eval_accuracy"] > 0.2
    log = first.log.read_text()
    assert f"world_size {2 * processes} there and {processes} here" in log
    assert f"world_size {processes} there and {2 * processes} here" in log
