"""The kernel folder: our code to the byte, what Transformers does with it, and stock models that train with DropKey.

Transformers 5.23 takes the `kernels` library from 0.18.2 on, which is not on the registry; its newest release there is
0.17.2. So most tests give Transformers the folder's module where it would ask the library, and one test runs 0.17.2 with
Transformers' comparison of versions passed over.
"""

import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from attention_inputs import tensors
from packaging.version import Version
from transformers import modeling_flash_attention_utils
from transformers.integrations import hub_kernels
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_dropkey import models
from hf_dropkey.hub.kernel_folder import build_files, build_kernel, is_kernel_folder, needed_modules
from hf_dropkey.hub.release_check import check_release
from hf_dropkey.models import hub_kernel
from hf_dropkey.models.attention import dropkey_attention


ROOT = Path(__file__).resolve().parents[1]
REPO = "owner/dropkey-attention"
KERNELS = "0.17.2"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_dropkey"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("kernel")
    build_kernel(made, REPO)
    return made


# --- the folder -------------------------------------------------------------------------------------------------------


def test_the_code_is_the_packages_to_the_byte(folder: Path) -> None:
    home = Path(str(models.__file__)).parent
    for variant in ("torch-cpu", "torch-cuda"):
        files = {file.name for file in (folder / "build" / variant).iterdir()}
        assert files == {"__init__.py", "metadata.json", *(f"{module}.py" for module in needed_modules())}
        for module in needed_modules():
            assert (folder / "build" / variant / f"{module}.py").read_bytes() == (home / f"{module}.py").read_bytes()
    assert {"hub_kernel", "attention", "triton_kernels", "counter_hash"} <= set(needed_modules())
    assert not any(module.startswith(("modeling", "configuration")) for module in needed_modules())


def test_metadata_has_a_digest_of_each_file_and_an_id_of_its_own(folder: Path) -> None:
    identities = set()
    for variant in (folder / "build").iterdir():
        about = json.loads((variant / "metadata.json").read_text())
        found = {
            file.name: base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
            for file in variant.iterdir()
            if file.name != "metadata.json"
        }
        assert about["digest"] == {"algorithm": "sha256", "files": found}
        assert about["id"].isidentifier() and variant.name == f"torch-{about['backend']['type']}"
        identities.add(about["id"])
    assert len(identities) == 2


def test_the_card_says_what_the_ratio_means(folder: Path) -> None:
    card = " ".join((folder / "README.md").read_text().split())
    assert "**The model's own ratio of attention dropout now means DropKey.**" in card
    assert f'attn_implementation="{REPO}"' in card and "It has not run on a GPU." in card


@pytest.mark.parametrize("name", ["dropkey", "a/b/c", "owner/flash-dropkey", "owner/"])
def test_names_that_do_not_work_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose for example 'owner/dropkey-attention'"):
        build_kernel(tmp_path / "new", name)
    assert not (tmp_path / "new").exists()


def test_the_script_writes_once(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "build_kernel.py"), str(tmp_path / "out"), "--repo_id", REPO]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert first.returncode == 0 and "files in" in first.stdout, first.stderr
    names = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert names == {*build_files(), "README.md"}
    second = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert second.returncode == 1 and "is not empty; choose a new folder" in second.stderr


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_trusts_the_folder_and_names_what_differs(tmp_path: Path) -> None:
    build_kernel(tmp_path / "kernel", REPO)
    report = check_release(tmp_path / "kernel")
    assert report.trusted, str(report)
    assert "kernel" in str(report) and report.digest is not None and not is_kernel_folder(["config.json"])
    home = tmp_path / "kernel" / "build" / "torch-cpu"
    with (home / "attention.py").open("a") as file:
        file.write("import os\n")
    (home / "more.py").write_text("")
    (home / "patterns.py").unlink()
    (tmp_path / "kernel" / "setup.py").write_text("")
    problems = check_release(tmp_path / "kernel").problems
    assert len(problems) == 4
    for words in (
        "torch-cpu/attention.py differs",
        "more.py is not a file of",
        "patterns.py is not there",
        "setup.py",
    ):
        assert any(words in problem for problem in problems), (words, problems)


# --- the entry --------------------------------------------------------------------------------------------------------


def site(training: bool, **more: Any) -> Any:
    return SimpleNamespace(training=training, is_causal=False, **more)


@pytest.mark.parametrize(("training", "dropout"), [(False, 0.0), (False, 0.3), (True, 0.0)])
def test_without_a_drop_it_is_sdpa_to_the_bit(training: bool, dropout: float) -> None:
    qkv, bias = tensors(2, 4, 9, 8, dtype=torch.float32), torch.randn(1, 4, 9, 9)
    for more in ({}, {"attention_mask": torch.rand(2, 1, 9, 9) < 0.7}, {"position_bias": bias}, {"is_causal": True}):
        arguments: dict[str, Any] = {"attention_mask": None, "scaling": 0.3, **more}
        found, weights = hub_kernel.flash_attn_forward(site(training), *qkv, dropout=dropout, **arguments)
        assert weights is None and torch.equal(found, sdpa_attention_forward(site(False), *qkv, **arguments)[0])


def test_with_a_drop_it_is_dropkey() -> None:
    qkv = tensors(2, 4, 9, 8, dtype=torch.float32)
    bias, mask = torch.randn(1, 4, 9, 9), (torch.rand(2, 1, 9, 9) < 0.7) | torch.eye(9, dtype=torch.bool)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    both = torch.where(mask, bias, float("-inf"))
    cases: list[tuple[dict[str, Any], Any]] = [
        ({}, None),
        ({"attention_mask": mask}, mask),
        ({"is_causal": True}, causal),
        ({"position_bias": bias}, bias),
        ({"position_bias": bias, "attention_mask": mask}, both),
    ]
    for arguments, expected in cases:
        torch.manual_seed(3)
        found, _ = hub_kernel.flash_attn_forward(site(True), *qkv, dropout=0.4, scaling=0.3, **arguments)
        torch.manual_seed(3)
        want = dropkey_attention(*qkv, 0.4, attention_mask=expected, scaling=0.3)
        assert torch.equal(found, want.transpose(1, 2))


def test_queries_that_share_keys() -> None:
    query, key, value = tensors(2, 4, 9, 8, dtype=torch.float32)
    torch.manual_seed(3)
    found, _ = hub_kernel.flash_attn_forward(
        site(True, num_key_value_groups=2), query, key[:, :2], value[:, :2], dropout=0.4
    )
    torch.manual_seed(3)
    repeated = (part[:, :2].repeat_interleave(2, 1) for part in (key, value))
    assert torch.equal(found, dropkey_attention(query, *repeated, 0.4).transpose(1, 2))


def test_what_dropkey_does_not_know_is_refused() -> None:
    qkv = tensors(1, 1, 4, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="does not work with softcap"):
        hub_kernel.flash_attn_forward(site(True), *qkv, dropout=0.1, softcap=30.0)


# --- stock models -----------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
TEXT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 8,
}  # fmt: skip
PROBS = {"attention_probs_dropout_prob": 0.4}
TOWERS: dict[str, Any] = {
    "vision_config": {**SIZES, "attention_dropout": 0.4}, "text_config": {**TEXT, "attention_dropout": 0.4}
}  # fmt: skip
# configuration, model, number of attention calls
STOCK: dict[str, tuple[Callable[[], Any], str, int]] = {
    "ViT": (lambda: hf.ViTConfig(**SIZES, **PROBS), "ViTModel", 2),
    "DeiT": (lambda: hf.DeiTConfig(**SIZES, **PROBS), "DeiTModel", 2),
    "DINOv2": (lambda: hf.Dinov2Config(**SIZES, **PROBS), "Dinov2Model", 2),
    "SigLIP": (lambda: hf.SiglipVisionConfig(**SIZES, attention_dropout=0.4), "SiglipVisionModel", 2),
    "CLIP": (lambda: hf.CLIPConfig(**TOWERS), "CLIPModel", 4),
    "BEiT": (lambda: hf.BeitConfig(**SIZES, **PROBS, use_relative_position_bias=True), "BeitModel", 2),
    "Swin": (lambda: hf.SwinConfig(**SWIN, **PROBS), "SwinModel", 2),
    "YOLOS": (lambda: hf.YolosConfig(**{**SIZES, "image_size": [32, 32]}, **PROBS), "YolosModel", 2),
}


def load_module(folder: Path) -> ModuleType:
    """The kernel's module as the `kernels` library imports it."""
    home = folder / "build" / "torch-cpu"
    name = json.loads((home / "metadata.json").read_text())["id"]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, home / "__init__.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def calls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Lets Transformers load the kernel; the ratios with which it then drops keys."""
    module, found = load_module(folder), []
    entry = sys.modules[f"{module.__name__}.hub_kernel"]
    plain = entry.dropkey_attention_forward

    def counted(site: Any, *arguments: Any, **settings: Any) -> Any:
        found.append(site.dropkey_ratio)
        return plain(site, *arguments, **settings)

    monkeypatch.setattr(entry, "dropkey_attention_forward", counted)
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *_: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *_, **__: module)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    return found


@pytest.mark.skipif(
    Version(hf.__version__) < Version("5.23"),
    reason="Transformers 5.13 takes whole kernels for their functions only (an UnboundLocalError of its own)",
)
@pytest.mark.parametrize("name", STOCK)
def test_a_stock_model_trains_with_dropkey_and_evaluates_as_ever(name: str, calls: list[float]) -> None:
    make, model_name, sites = STOCK[name]
    torch.manual_seed(0)
    model = getattr(hf, model_name)._from_config(make(), attn_implementation=REPO)
    plain = getattr(hf, model_name)._from_config(make(), attn_implementation="sdpa")
    plain.load_state_dict(model.state_dict())
    inputs: dict[str, Any] = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name == "CLIP":
        inputs["input_ids"] = torch.randint(3, 49, (2, 8))
        inputs["attention_mask"] = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])

    def output(one: Any) -> torch.Tensor:
        found = one(**inputs)
        return found.logits_per_image if name == "CLIP" else found.last_hidden_state

    with torch.no_grad():
        assert torch.equal(output(model.eval()), output(plain.eval()))
    assert not calls, "nothing is dropped in eval mode"
    model.train()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(output(model))
    assert calls == [0.4] * 3 * sites
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    results[0].square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 10 and all(gradient.isfinite().all() for gradient in gradients)


# --- the library ------------------------------------------------------------------------------------------------------

LIBRARY = """
import sys
from pathlib import Path
import torch
import transformers.utils.import_utils as imports
# Transformers asks for a newer release than there is
imports.is_kernels_available = lambda *_, **__: True
import kernels
from kernels._rust import Digest, DigestAlgorithm, Metadata

folder = Path(sys.argv[1])
home = folder / "build" / "torch-cpu"
Metadata.read_from_file(home / "metadata.json").digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, home))
assert kernels.get_local_kernel(folder).supports_flash_attn
# LOCAL_KERNELS says where the repository lies
module = kernels.get_kernel(sys.argv[2], version=1)
from transformers import AutoModel, ViTConfig
config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32,
                   patch_size=8, attention_probs_dropout_prob=0.3)
model = AutoModel.from_config(config, attn_implementation=sys.argv[2]).train()
images = torch.randn(2, 3, 32, 32)
one, other = (model(pixel_values=images).last_hidden_state for _ in range(2))
assert not torch.equal(one, other)
one.sum().backward()
print("trained by", module.__name__, kernels.__version__)
"""


@pytest.mark.slow
def test_the_library_loads_the_folder(folder: Path) -> None:
    """`kernels` of the registry, from a folder of its own: its requirements beside torch and Transformers are not used."""
    home = CACHE / "kernels" / KERNELS
    if not (home / "kernels").is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(home)]
        done = subprocess.run(
            [*install, f"kernels=={KERNELS}", "tomlkit"], capture_output=True, text=True, timeout=300
        )
        if done.returncode != 0:
            pytest.skip(f"kernels {KERNELS} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    environment = {**os.environ, "PYTHONPATH": str(home), "LOCAL_KERNELS": f"{REPO}={folder}"}
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY, str(folder), REPO],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{KERNELS}" in done.stdout and "trained by _dropkey_attention_cpu_" in done.stdout
