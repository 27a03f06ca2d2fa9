"""Tests that the package works on its core alone, and that what needs more says how to get it."""

import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest

from hf_dropkey.extras import needed


ROOT = Path(__file__).resolve().parents[1]
# hides every package that the core does not require, also from those who only look whether it is there
CORE_ALONE = """
import importlib.machinery, re, sys
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

def required(name, extras, found):
    if (name, extras) not in found:
        found.add((name, extras))
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:
            return found
        for line in map(Requirement, lines):
            if line.marker is None or any(line.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                required(canonicalize_name(line.name), frozenset(line.extras), found)
    return found

found = set()
for line in map(Requirement, DEPENDENCIES):
    required(canonicalize_name(line.name), frozenset(line.extras), found)
core = {name for name, _ in found} | {"hf-dropkey"}
installed = packages_distributions()
hidden = {module for module, names in installed.items() if not core & set(map(canonicalize_name, names))}
assert {"peft", "pycocotools", "pytest"} <= hidden, hidden
assert not hidden & {"torch", "transformers", "yaml"}, hidden
find = importlib.machinery.PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else find(name, path, target)

importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""
OWN_LOOP = """
import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
import hf_dropkey
from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification, apply_dropkey, monte_carlo_predict
from hf_dropkey.cli import main

shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32,
             patch_size=8, num_labels=3)
images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
ours = DropKeyViTForImageClassification(DropKeyViTConfig(**shape, dropkey_ratio=0.3))
stock = ViTForImageClassification(ViTConfig(**shape))
apply_dropkey(stock, ratio=0.3)
for model, folder in ((ours, "ours"), (stock, "stock")):
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    model.save_pretrained(folder)
    again = AutoModelForImageClassification.from_pretrained(folder)
    assert type(again) is type(model)
    assert torch.equal(again.eval()(images).logits, model.eval()(images).logits)
    sampled = monte_carlo_predict(model, {"pixel_values": images}, samples=4, seed=0)
    assert (sampled.mutual_information > 0).all()
    assert main(["check", folder]) == 0
    assert main(["info", folder]) == 0
    assert main(["export", folder, f"{folder}-plain"]) == 0
    plain = ViTForImageClassification.from_pretrained(f"{folder}-plain")
    assert torch.equal(plain.eval()(images).logits, model(images).logits)
"""
# every module and script is there on the core alone, or says which extra it needs
EVERY_MODULE = """
import pkgutil, runpy
from importlib import import_module
from pathlib import Path
import hf_dropkey

def attempt(name, action):
    try:
        action(name)
        print("core", name)
    except ImportError as error:
        extra = re.search(r"run pip install 'hf_dropkey\\[(\\w+)\\]'$", str(error))
        print(extra[1] if extra else f"unnamed: {error!r}", name)

for module in pkgutil.walk_packages(hf_dropkey.__path__, "hf_dropkey."):
    attempt(module.name, import_module)
for script in sorted(Path(sys.argv[1]).glob("*.py")):
    attempt(script.name, lambda name: runpy.run_path(str(script), run_name="imported"))
"""


def run_on_the_core(code: str, folder: Path, *arguments: str | Path, extras: Sequence[str] = ()) -> list[str]:
    """The lines that a fresh process prints in which nothing can be imported but what core and extras require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = project["dependencies"] + [
        line for name in extras for line in project["optional-dependencies"][name]
    ]
    command = [sys.executable, "-c", f"DEPENDENCIES = {dependencies}\n{CORE_ALONE}{code}", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_training_saving_inference_and_the_command_line_work_on_the_core(tmp_path: Path) -> None:
    lines = run_on_the_core(OWN_LOOP, tmp_path)
    assert sum("trusted" in line for line in lines) == 2


def extras_needed(folder: Path, extras: Sequence[str] = ()) -> dict[str, str]:
    """The extra that each module and script names where only `extras` are installed; "core" if it needs no other."""
    lines = run_on_the_core(EVERY_MODULE, folder, ROOT / "scripts", extras=extras)
    return {name: extra for extra, name in (line.rsplit(" ", 1) for line in lines)}


def test_whatever_needs_more_than_the_core_names_its_extra(tmp_path: Path) -> None:
    needs = extras_needed(tmp_path)
    assert set(needs.values()) == {"core", "plots", "train"}, needs
    core = {name.removeprefix("hf_dropkey.") for name, extra in needs.items() if extra == "core"}
    assert {"cli", "export", "inference", "hub.release_check", "inspection.saved", "training.callbacks"} <= core
    assert needs["hf_dropkey.hub.trainer"] == "train" and needs["hf_dropkey.plots"] == "plots"
    assert needs["train_image_classification_accelerate.py"] == "train"


@pytest.mark.slow
def test_training_and_figures_need_two_extras(tmp_path: Path) -> None:
    assert set(extras_needed(tmp_path, ["train", "plots"]).values()) == {"core"}


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with (
        pytest.raises(
            ImportError, match=r"optuna is not installed.* run pip install 'hf_dropkey\[search\]'"
        ) as raised,
        needed("search"),
    ):
        import_module("optuna")
    assert raised.value.name == "optuna"


def test_other_errors_of_an_import_pass() -> None:
    with pytest.raises(ValueError, match="broken"), needed("search"):
        raise ValueError("broken")
