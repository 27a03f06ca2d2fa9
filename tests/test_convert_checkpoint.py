"""Official checkpoints become folders that load anywhere, with nothing lost, and anything else is refused clearly."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architecture_parity import REPOSITORY, Fixture, assert_near, load_script
from safetensors.torch import save_file
from transformers import AutoImageProcessor

from hf_dropkey.models.configuration_dropkey_ceit import DropKeyCeitConfig
from hf_dropkey.models.configuration_dropkey_t2t_vit import DropKeyT2TViTConfig
from hf_dropkey.models.configuration_dropkey_volo import DropKeyVoloConfig
from hf_dropkey.models.modeling_dropkey_ceit import DropKeyCeitForImageClassification
from hf_dropkey.models.modeling_dropkey_t2t_vit import DropKeyT2TViTForImageClassification
from hf_dropkey.models.modeling_dropkey_volo import DropKeyVoloForImageClassification


CONVERT = load_script("convert_checkpoint")
CLASSES: dict[str, Any] = {
    "t2t_vit": DropKeyT2TViTForImageClassification,
    "volo": DropKeyVoloForImageClassification,
    "ceit": DropKeyCeitForImageClassification,
}
T2T = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2, "token_size": 32}
VOLO = {
    "depths": [1, 1, 1, 1],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "outlook_hidden_size": 32,
    "num_outlook_heads": 2,
    "stem_size": 16,
    "mlp_ratio": 2,
}
CEIT = {"hidden_size": 48, "num_hidden_layers": 3, "mlp_ratio": 2, "stem_size": 16}
IMAGES = {"image_size": 64, "num_labels": 10}
FIXTURES: dict[str, tuple[str, Any]] = {
    "t2t_transformer": ("t2t_vit", DropKeyT2TViTConfig(**T2T, **IMAGES, token_stage="transformer")),
    "t2t_performer": ("t2t_vit", DropKeyT2TViTConfig(**T2T, **IMAGES)),
    "volo_tiny": ("volo", DropKeyVoloConfig(**VOLO, **IMAGES)),
    "ceit_tiny": ("ceit", DropKeyCeitConfig(**CEIT, **IMAGES)),
}

LOAD_ALL_BY_REMOTE_CODE = """
import sys
sys.modules["hf_dropkey"] = None  # importing the package now fails
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
for folder in sys.argv[1:]:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    expected = torch.load(folder + ".pt", weights_only=True)
    assert torch.equal(model(expected["pixels"]).logits, expected["logits"]), folder
    assert AutoImageProcessor.from_pretrained(folder).crop_size["height"] == 64
"""


def official_weights(family: str, size: str, **kwargs: Any) -> dict[str, torch.Tensor]:
    """A random checkpoint of a published size with official names, all values on the meta device."""
    about = CONVERT.FAMILIES[family]
    with torch.device("meta"):
        model = about.model_class(about.config_class.from_size(size, **kwargs))
    ours = model.state_dict()
    return {official: ours[about.rename(official)] for official in official_names(family, ours)}


def official_names(family: str, ours: dict[str, torch.Tensor]) -> list[str]:
    """The official names of all tensors of a model, undoing the table of the script by hand."""
    plain = {
        ".layernorm_before.": ".norm1.", ".layernorm_after.": ".norm2.", ".attention.score_proj.": ".attn.attn.",
        ".attention.o_proj.": ".attn.proj.", ".attention.qkv.": ".attn.qkv.", ".attention.q_proj.": ".attn.q.",
        ".attention.kv_proj.": ".attn.kv.", ".attention.v_proj.": ".attn.v.", "token_classifier.": "aux_head.",
        "classifier.": "head.", "embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
        "volo.embeddings.stem.": "patch_embed.conv.", "volo.embeddings.projection.": "patch_embed.proj.",
        "volo.outlook_layers.": "network.0.", "volo.downsample.": "network.1.proj.", "volo.stages.0.": "network.2.",
        "volo.stages.1.": "network.3.", "volo.stages.2.": "network.4.", "volo.class_layers.": "post_network.",
        "ceit.embeddings.convolution.": "i2t.backbone.conv.", "ceit.embeddings.normalization.": "i2t.backbone.bn.",
        "ceit.embeddings.projection.": "i2t.proj.", "layer_position_embeddings": "pos_layer_embed",
        "ceit.class_layer.mlp.": "lca.feedforward.", "ceit.class_layer.": "lca.",
        "t2t_vit.embeddings.projection.": "tokens_to_token.project.", "layers.": "blocks.", "layernorm.": "norm.",
    }  # fmt: skip
    stage = {".attention.directions": ".w", ".attention.kqv.": ".kqv.", ".attention.o_proj.": ".proj."}
    names = []
    for name in ours:
        for number in (0, 1):
            prefix = f"t2t_vit.embeddings.token_stages.{number}."
            if name.startswith(prefix):
                name = f"tokens_to_token.attention{number + 1}." + name.removeprefix(prefix)
                if any(".kqv." in other for other in ours):
                    for new, old in (stage | {".mlp.fc1.": ".mlp.0.", ".mlp.fc2.": ".mlp.2."}).items():
                        name = name.replace(new, old)
        for new, old in plain.items():
            name = name.replace(new, old)
        name = name.removeprefix(f"{family}.")
        if family == "ceit" and name.startswith("blocks."):
            name = name.replace(".mlp.", ".leff.")
        names.append(name)
    return names


def arguments(tmp_path: Path, family: str, checkpoint: Path, **kwargs: Any) -> Any:
    return CONVERT.ConversionArguments(family=family, checkpoint=checkpoint, out=tmp_path / "out", **kwargs)


def save_fixture(name: str, folder: Path, wrap: str = "plain") -> tuple[str, Any, Fixture, Path]:
    """A fixture's weights as a checkpoint file of the given kind, and its configuration in a folder `config`."""
    fixture = Fixture(name)
    family, config = FIXTURES[name]
    config.save_pretrained(folder / "config")
    weights = fixture.below("weights/")
    path = folder / ("weights.safetensors" if wrap == "safetensors" else "weights.pth.tar")
    if wrap == "safetensors":
        save_file(weights, path)
    elif wrap == "ema":
        parallel = {f"module.{key}": value for key, value in weights.items()}
        stale = {key: torch.zeros_like(value) for key, value in parallel.items()}
        extras = {"epoch": 3, "arch": "some_model", "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}}
        torch.save({"state_dict": stale, "state_dict_ema": parallel, **extras}, path)
    else:
        torch.save(weights, path)
    return family, config, fixture, path


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["plain", "ema", "safetensors"])
@pytest.mark.parametrize("name", FIXTURES)
def test_converted_folders_have_the_official_logits(tmp_path: Path, name: str, wrap: str) -> None:
    family, _, fixture, path = save_fixture(name, tmp_path, wrap)
    report = CONVERT.convert(arguments(tmp_path, family, path, config=tmp_path / "config"))
    model, loading = CLASSES[family].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_near(model.eval()(fixture.pixels(torch.float32)).logits, fixture.tensors["f32/logits"], 2e-5)
    for official in fixture.below("weights/"):
        assert f"\n{official} " in f"\n{report}", f"{official} is not in the report"
    assert f"{len(fixture.below('weights/'))} tensors" in report
    assert ("from state_dict_ema" in report) == (wrap == "ema")


@pytest.mark.usefixtures("auto_image_processor")
def test_converted_folders_load_by_remote_code_in_a_fresh_process(tmp_path: Path) -> None:
    folders = []
    for name in ("t2t_performer", "volo_tiny", "ceit_tiny"):
        family, _, fixture, path = save_fixture(name, tmp_path)
        folder = tmp_path / f"converted_{name}"
        settings = CONVERT.ConversionArguments(family, path, folder, config=tmp_path / "config")
        CONVERT.convert(settings)
        pixels = fixture.pixels(torch.float32)
        logits = CLASSES[family].from_pretrained(folder).eval()(pixels).logits.detach()
        torch.save({"pixels": pixels, "logits": logits}, f"{folder}.pt")
        folders.append(str(folder))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    environment.pop("HF_MODULES_CACHE", None)
    command = [sys.executable, "-c", LOAD_ALL_BY_REMOTE_CODE, *folders]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_command_line_converts_and_explains(tmp_path: Path) -> None:
    family, _, _, path = save_fixture("volo_tiny", tmp_path)
    command = [sys.executable, str(REPOSITORY / "scripts" / "convert_checkpoint.py"), "--family", family]
    command += ["--checkpoint", str(path), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    refused = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert refused.returncode == 1
    assert "The nearest match by shapes is\n--family volo" in refused.stderr
    assert "Traceback" not in refused.stderr
    command += ["--config", str(tmp_path / "config")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Written to" in done.stdout


@pytest.mark.usefixtures("auto_image_processor")
def test_image_size_resizes_positions_and_processor(tmp_path: Path) -> None:
    family, _, _, path = save_fixture("ceit_tiny", tmp_path)
    report = CONVERT.convert(arguments(tmp_path, family, path, config=tmp_path / "config", image_size=96))
    model = CLASSES[family].from_pretrained(tmp_path / "out")
    assert model.config.image_size == 96
    assert model.ceit.embeddings.position_embeddings.shape == (1, 37, 48)
    assert "resized to images of 96 pixels" in report
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").crop_size["height"] == 96


# --- sizes -----------------------------------------------------------------------------------------------------------

AMBIGUOUS = ("t2t_vit_14", "t2t_vit_14_resnext")
SIZES = [(family, size) for family, about in CONVERT.FAMILIES.items() for size in about.config_class.published_sizes]


@pytest.mark.parametrize(("family", "size"), SIZES)
def test_sizes_are_found_by_shapes(tmp_path: Path, family: str, size: str) -> None:
    weights = official_weights(family, size, num_labels=21, image_size=384)
    match = CONVERT.find_size(arguments(tmp_path, family, tmp_path, size=size), weights)
    assert (match.size, match.config.num_labels, match.config.image_size) == (size, 21, 384)
    if size in AMBIGUOUS:
        with pytest.raises(CONVERT.ConversionError, match="fit t2t_vit_14 and t2t_vit_14_resnext alike.*Pass --size"):
            CONVERT.find_size(arguments(tmp_path, family, tmp_path), weights)
    else:
        assert CONVERT.find_size(arguments(tmp_path, family, tmp_path), weights).size == size


def test_the_wrong_family_names_the_right_one(tmp_path: Path) -> None:
    weights = official_weights("volo", "volo_d2")
    with pytest.raises(CONVERT.ConversionError, match=r"nearest match.*\n--family volo --size volo_d2: 330 of 330"):
        CONVERT.find_size(arguments(tmp_path, "t2t_vit", tmp_path), weights)


def test_the_wrong_size_names_the_right_one(tmp_path: Path) -> None:
    weights = official_weights("ceit", "ceit_small")
    with pytest.raises(CONVERT.ConversionError, match=r"does not fit ceit_tiny(.|\n)*--size ceit_small: 375 of 375"):
        CONVERT.find_size(arguments(tmp_path, "ceit", tmp_path, size="ceit_tiny"), weights)


def test_unknown_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown size 'volo_d9'.*volo_d1, volo_d2"):
        CONVERT.find_size(arguments(tmp_path, "volo", tmp_path, size="volo_d9"), {})


def test_missing_extra_and_reshaped_tensors_are_listed(tmp_path: Path) -> None:
    weights = official_weights("ceit", "ceit_tiny")
    del weights["blocks.3.attn.proj.bias"]
    weights["surprise"] = torch.zeros(1)
    weights["norm.weight"] = torch.zeros(7)
    with pytest.raises(CONVERT.ConversionError) as caught:
        CONVERT.find_size(arguments(tmp_path, "ceit", tmp_path), weights)
    message = str(caught.value)
    assert "--family ceit --size ceit_tiny: 373 of 375 tensors agree" in message
    assert "1 missing: ceit.layers.3.attention.o_proj.bias" in message
    assert "1 not in the model: surprise" in message
    assert "1 of another shape: ceit.layernorm.weight (7,) instead of (192,)" in message


def test_a_config_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    family, config, fixture, _ = save_fixture("ceit_tiny", tmp_path)
    DropKeyCeitConfig.from_dict({**config.to_dict(), "num_hidden_layers": 4}).save_pretrained(tmp_path / "config")
    with pytest.raises(CONVERT.ConversionError, match=r"does not fit .*config:\n(.|\n)*missing: ceit.layers.3"):
        CONVERT.find_size(arguments(tmp_path, family, tmp_path, config=tmp_path / "config"), fixture.below("weights/"))


# --- reading ---------------------------------------------------------------------------------------------------------


class Harmful:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("harm",)


def test_checkpoints_that_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"weight": torch.zeros(1)}, "hook": Harmful()}, tmp_path / "bad.pth")
    with pytest.raises(CONVERT.ConversionError, match="could run code"):
        CONVERT.read_checkpoint(tmp_path / "bad.pth")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.zeros(1)], {"model": {"weight": [0.0]}}])
def test_files_without_weights_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "empty.pth")
    with pytest.raises(CONVERT.ConversionError, match="holds no weights.*state_dict_ema"):
        CONVERT.read_checkpoint(tmp_path / "empty.pth")


def test_missing_files_and_full_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*nowhere.pth does not exist"):
        CONVERT.read_checkpoint(tmp_path / "nowhere.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        CONVERT.convert(arguments(tmp_path, "volo", tmp_path / "nowhere.pth"))


# --- the source's logits ---------------------------------------------------------------------------------------------


def timm_stub(logits: torch.Tensor) -> SimpleNamespace:
    """A timm whose model has given logits, because the real one does not install everywhere."""

    class Model(torch.nn.Module):
        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
            assert strict
            assert "post_network.1.norm2.bias" in state_dict

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return logits

    return SimpleNamespace(create_model=lambda name, **kwargs: Model())


def volo_d1_match() -> tuple[Any, Any]:
    """What conversion of a VOLO-D1 sees just before it compares logits, with a small model in its place."""
    config = FIXTURES["volo_tiny"][1]
    torch.manual_seed(0)
    return CONVERT.Match("volo", "volo_d1", config, [], [], [], 1), CLASSES["volo"](config).eval()


@pytest.mark.parametrize(("shift", "agrees"), [(0.0, True), (0.1, False), (float("nan"), False)])
def test_logits_are_compared_with_timm(monkeypatch: pytest.MonkeyPatch, shift: float, agrees: bool) -> None:
    match, model = volo_d1_match()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setitem(sys.modules, "timm", timm_stub(model(pixels).logits.detach() + shift))
    weights = {"post_network.1.norm2.bias": torch.zeros(1)}
    if agrees:
        assert "agree with timm's" in CONVERT.check_logits(model, match, weights)
    else:
        with pytest.raises(CONVERT.ConversionError, match="differ from timm's"):
            CONVERT.check_logits(model, match, weights)


def test_a_missing_timm_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    match, model = volo_d1_match()
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "not compared with the source: timm cannot be imported" in CONVERT.check_logits(model, match, {})
