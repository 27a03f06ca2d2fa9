"""Every command of the README and the pages runs, in their order, in one folder, on small data and a tiny "Hub" model.

A command runs as it is written, with cheap settings behind it. What cannot run here is listed with its reason, so that a
new command is run unless somebody says why not.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hub_server import serving
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessorPil


ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("training", "segmentation", "hoi", "mesh", "hub", "demo")),
]
PROGRAMS = ("hf-dropkey", "python", "bash", "pip", "accelerate", "torchrun", "export")
# the start of a command, or the whole one with "$" behind it: why it is not run here
LEFT_OUT = {
    "pip install": "installs; tests/test_installation.py",
    "bash scripts/": "CI runs it",
    "accelerate launch": "tests/test_launch_configurations.py",
    "torchrun --nnodes": "tests/test_several_nodes.py",
    "python scripts/run_experiments.py": "hours; tests/test_run_experiments.py",
    "python scripts/report_results.py": "writes into the repository; tests/test_readme_numbers.py",
    "python scripts/convert_checkpoint.py": "needs official weights; tests/test_convert_checkpoint.py",
    "python tests/": "CI runs it",
    "hf-dropkey train --task hoi --do_train": "needs facebook/detr-resnet-50; tests/test_hoi_job.py",
    "hf-dropkey train --task mesh --do_train": "needs one's own body; tests/test_mesh_job.py",
    "hf-dropkey predict --task mesh --model_name_or_path runs/people --images photos": "needs PekingU/rtdetr_r18vd",
    "hf-dropkey train --task segmentation": "needs nvidia/mit-b0; tests/test_segmentation_model.py",
    "hf-dropkey demo runs/mine --static_page": "needs npm; tests/test_demo_static_page_browser.py",
    "python -m http.server": "serves until it is interrupted; tests/test_demo_static_page_browser.py",
    "hf-dropkey check my-page": "needs the page; tests/test_hub_static_folder.py",
    "hf-dropkey push my-page": "needs the page; tests/test_hub_static_folder.py",
    "hf-dropkey demo runs/mine$": "serves until it is interrupted; tests/test_demo_browser.py",
    "hf-dropkey demo runs/mine runs/other": "serves until it is interrupted; tests/test_demo_browser.py",
    "hf-dropkey demo runs/mine --images": "serves until it is interrupted; tests/test_demo_browser.py",
    "hf-dropkey check ./their-folder": "needs a digest of one's own; tests/test_hub_release_check.py",
}
BRIEF = "--max_steps 2 --use_cpu --report_to none --max_eval_samples 8"
SMALL_BOXES = "--image_size 64 --num_queries 5"
# the start of a command: cheap settings behind it
CHEAP = {
    "hf-dropkey train --task detection": f"{BRIEF} {SMALL_BOXES} --draw_images 1",
    "hf-dropkey train recipe:hoi": "--max_steps 2 --use_cpu --train_scenes 16 --validation_scenes 8 --draw_images 1",
    "hf-dropkey train recipe:segmentation": "--max_steps 2 --use_cpu --train_scenes 16 --validation_scenes 8 --draw_images 1",
    "hf-dropkey train recipe:digits": f"{BRIEF} --max_train_samples 64",
    "hf-dropkey train recipe:finetune_small": f"{BRIEF} --model_name_or_path hub/dinov2-small",
    "hf-dropkey train": f"{BRIEF} --per_device_train_batch_size 2",
    "hf-dropkey evaluate --task segmentation": "--use_cpu --validation_scenes 8 --report_to none --draw_images 0",
    "hf-dropkey evaluate --task detection": "--use_cpu --report_to none --draw_images 0",
    "hf-dropkey evaluate --task hoi": "--use_cpu --validation_scenes 8 --report_to none",
    "hf-dropkey evaluate": "--use_cpu",
    "hf-dropkey search": "--trials 1 --max_steps 2 --use_cpu --report_to none --max_eval_samples 8 --max_train_samples 64",
    "hf-dropkey look": "--use_cpu --samples 2 --passes 2 --images_shown 1 --figures maps drops",
}
# names that stand for the reader's own
NAMES = {
    "facebook/dinov2-small": "hub/dinov2-small",
    "you/my-model": "tester/my-model",
    "you/my-demo": "tester/my-demo",
}


def commands(page: str) -> Iterator[str]:
    """The commands in the blocks of a page that name no language, without prompts and comments."""
    fence = None
    for line in re.sub(r"\\\n\s*", "", page).splitlines():
        if line.startswith("```"):
            fence = line if fence is None else None
        # other blocks are output, or Python
        elif fence == "```" and line.split(" ")[0] in PROGRAMS:
            yield shlex.join(shlex.split(line, comments=True))


def documented() -> list[str]:
    return [command for page in PAGES for command in commands(page.read_text(encoding="utf-8"))]


def started(command: str, table: dict[str, str]) -> str | None:
    """The entry of a table whose key a command starts with, the longest key first."""
    keys = sorted((key for key in table if f"{command}$".startswith(key)), key=len, reverse=True)
    return table[keys[0]] if keys else None


def photograph(file: Path, side: int = 64) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(len(file.name))
    Image.fromarray(draws.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file)


def prepare(folder: Path) -> None:
    """What the pages call the reader's own: images, boxes, a photograph, a model of the Hub."""
    for split in ("train", "validation"):
        for label in ("cat", "dog"):
            for number in range(4):
                photograph(folder / "images" / split / label / f"{label}{number}.png")
    photograph(folder / "images" / "new" / "a.png")
    photograph(folder / "photo.jpg")
    photograph(folder / "street.jpg", 256)
    for split in ("train", "val"):
        photograph(folder / split / "images" / "1.png")
        boxes = {
            "images": [{"id": 1, "file_name": "1.png", "width": 64, "height": 64}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 20, 30], "area": 600, "iscrowd": 0}
            ],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (folder / split / "instances.json").write_text(json.dumps(boxes))
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder / "hub" / "dinov2-small")
    ViTImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder / "hub" / "dinov2-small")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / "model_cards").symlink_to(ROOT / "model_cards")


def words_of(command: str) -> list[str]:
    """A command as it is run: cheap, with the programs of this environment."""
    for name, own in NAMES.items():
        command = command.replace(name, own)
    words = [*shlex.split(command), *(started(command, CHEAP) or "").split()]
    program = {"hf-dropkey": ["-m", "hf_dropkey"], "python": []}[words[0]]
    return [sys.executable, *program, *words[1:]]


def test_a_command_is_found_as_it_is_written() -> None:
    page = "text `hf-dropkey no`\n```\nhf-dropkey a \\\n    --b c  # why\nprint(1)\n```\n```python\npython no\n```\n"
    assert list(commands(page)) == ["hf-dropkey a --b c"]
    assert len(documented()) > 25 and any(command.startswith("hf-dropkey report") for command in documented())
    assert started("a b", {"a$": "no", "a b$": "yes"}) == "yes" and started("a b c", {"a b$": "no"}) is None
    assert started("hf-dropkey train --task detection --x", CHEAP) == CHEAP["hf-dropkey train --task detection"]


def test_what_is_left_out_is_documented() -> None:
    gone = [start for start in LEFT_OUT if not any(f"{command}$".startswith(start) for command in documented())]
    assert set(gone) <= {"python tests/", "hf-dropkey train --task mesh --do_train"}, gone


@pytest.mark.slow
@pytest.mark.usefixtures("auto_image_processor")
def test_every_command_runs_in_sequence(tmp_path: Path) -> None:
    prepare(tmp_path)
    ran = []
    with serving() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        for command in documented():
            if started(command, LEFT_OUT) is not None:
                continue
            if "--format onnx" in command and find_spec("onnxruntime") is None:
                print(f"not run, needs the extra [onnx]: {command}")
                continue
            if command.startswith("export "):
                name, value = command.removeprefix("export ").split("=")
                environment[name] = value
                continue
            done = subprocess.run(
                words_of(command), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
            )
            # a traceback in the output of another task's command says which command it was
            assert done.returncode == 0, f"$ {command}\n{done.stdout[-1500:]}\n{done.stderr[-2500:]}"
            ran.append(command)
        assert "tester/my-model" in hub.repositories
    assert len(ran) > 15
    assert (tmp_path / "runs" / "mine" / "report.html").is_file() and (tmp_path / "runs" / "curves.png").is_file()
    assert (tmp_path / "runs" / "boxes" / "report.html").is_file()
