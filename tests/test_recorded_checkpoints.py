"""Folders that release 0.1.0 saved still load, by this package and by their own code, with its logits and its masks."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

import hf_dropkey


RECORDED = Path(__file__).parent / "recorded"
CLASSES = {
    "vit": "DropKeyViTForImageClassification",
    "t2t_vit": "DropKeyT2TViTForImageClassification",
    "volo": "DropKeyVoloForImageClassification",
    "ceit": "DropKeyCeitForImageClassification",
}
# run with folders, in one process for all (its start takes longer than the rest), where importing the package fails
BY_THEIR_OWN_CODE = """
import sys
sys.modules["hf_dropkey"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
pixels = torch.linspace(-1, 1, 2 * 3 * 48 * 48, dtype=torch.float64).view(2, 3, 48, 48)
for folder in sys.argv[1:]:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    found = {"eval": model(pixels.float()).logits.double()}
    model.double().train()
    for pattern in load_file(folder + "/expected.safetensors").keys() - {"eval"}:
        for module in model.modules():
            if hasattr(module, "dropkey_ratio"):
                module.dropkey_pattern, module.dropkey_window = pattern, 1
        torch.manual_seed(3)
        found[pattern] = model(pixels).logits
    save_file({name: logits.detach() for name, logits in found.items()}, folder + "/found.safetensors")
"""


def pixels() -> torch.Tensor:
    """The images of `recorded/record.py`."""
    return torch.linspace(-1, 1, 2 * 3 * 48 * 48, dtype=torch.float64).view(2, 3, 48, 48)


@pytest.fixture(params=CLASSES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def unpack(family: str, into: Path) -> Path:
    """The folder as it was saved, and `expected.safetensors`."""
    with tarfile.open(RECORDED / f"dropkey_{family}.tar.xz") as archive:
        archive.extractall(into / family, filter="data")
    return into / family


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    return unpack(family, tmp_path)


@pytest.fixture(scope="module")
def by_their_own_code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each family, with `found.safetensors`: what its own code computed."""
    place = tmp_path_factory.mktemp("recorded")
    folders = {family: unpack(family, place) for family in CLASSES}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BY_THEIR_OWN_CODE, *map(str, folders.values())],
        capture_output=True,
        text=True,
        env=environment,
        cwd=place,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folders


def set_pattern(model: torch.nn.Module, pattern: str) -> None:
    for module in model.modules():
        if hasattr(module, "dropkey_ratio"):
            changed: Any = module
            changed.dropkey_pattern, changed.dropkey_window = pattern, 1


def test_the_package_loads_them(family: str, folder: Path) -> None:
    """Eval logits in float32, and in train mode the logits that one other decision in any mask would change."""
    expected = load_file(folder / "expected.safetensors")
    model, report = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert type(model) is getattr(hf_dropkey, CLASSES[family])
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(pixels().float()).logits.double(), expected.pop("eval"), rtol=0, atol=1e-6
        )
        assert {"score", "key", "token"} <= set(expected)
        model.double().train()
        for pattern, logits in expected.items():
            set_pattern(model, pattern)
            for backend in ("eager", "sdpa"):
                model.set_attn_implementation(backend)
                torch.manual_seed(3)
                torch.testing.assert_close(
                    model(pixels()).logits, logits, rtol=0, atol=1e-9, msg=f"{pattern} {backend}"
                )


def test_their_own_code_loads_them(family: str, by_their_own_code: dict[str, Path]) -> None:
    place = by_their_own_code[family]
    found, expected = load_file(place / "found.safetensors"), load_file(place / "expected.safetensors")
    assert set(found) == set(expected)
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, rtol=0, atol=1e-6 if name == "eval" else 1e-9, msg=name)


def test_the_code_in_them_may_be_replaced(family: str, folder: Path, tmp_path: Path) -> None:
    """Loaded by the package and saved again, a folder carries today's code, and gives the same logits by it."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    model.save_pretrained(tmp_path / "again")
    expected = load_file(folder / "expected.safetensors")["eval"]
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(again(pixels().float()).logits.double(), expected, rtol=0, atol=1e-6)


def test_a_changed_decision_shows_in_the_logits(folder: Path) -> None:
    """The teeth of the comparison above: another seed moves every recorded logit by far more than is allowed."""
    expected = load_file(folder / "expected.safetensors")
    model = AutoModelForImageClassification.from_pretrained(folder).double().train()
    for pattern in expected.keys() - {"eval"}:
        set_pattern(model, pattern)
        torch.manual_seed(4)
        assert (model(pixels()).logits - expected[pattern]).abs().max() > 1e-4
