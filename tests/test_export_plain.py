"""Plain checkpoints from models with DropKey: same numbers, nothing of this package left in them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from stock_architectures import ARCHITECTURES, VIT, build, loss_of, pixels
from torch import nn

from hf_dropkey import (
    DropKeyViTConfig,
    DropKeyViTForImageClassification,
    DropKeyViTForMaskedImageModeling,
    DropKeyViTModel,
)
from hf_dropkey.export import export_plain
from hf_dropkey.patching.apply import apply_dropkey, dropkey_modules


CLASSES = {
    "base": (DropKeyViTModel, hf.ViTModel),
    "classifier": (DropKeyViTForImageClassification, hf.ViTForImageClassification),
    "masked": (DropKeyViTForMaskedImageModeling, hf.ViTForMaskedImageModeling),
}

PIPELINE = """
import sys
sys.modules["hf_dropkey"] = None  # importing the package now fails
import torch
from PIL import Image
from transformers import pipeline
folder, image, expected = sys.argv[1:]
found = pipeline("image-classification", folder, top_k=3)(Image.open(image))
scores = {entry["label"]: entry["score"] for entry in found}
for label, score in torch.load(expected, weights_only=True).items():
    assert abs(scores[label] - score) < 1e-5, (scores, label, score)
"""


def dropkey_vit(cls: type = DropKeyViTForImageClassification, **settings: Any) -> Any:
    torch.manual_seed(0)
    labels = {"id2label": {0: "cat", 1: "dog", 2: "emu"}, "label2id": {"cat": 0, "dog": 1, "emu": 2}}
    config = DropKeyViTConfig(**VIT, encoder_stride=8, dropkey_ratio=0.3, **labels)
    return cls(config, **settings).eval()


def assert_plain(folder: Path) -> dict[str, Any]:
    text = (folder / "config.json").read_text()
    assert "dropkey" not in text.lower() and "auto_map" not in text and "attn_implementation" not in text
    assert not list(folder.glob("*.py"))
    return json.loads(text)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_dropkey_vit_becomes_a_vit(kind: str, tmp_path: Path) -> None:
    cls, plain_class = CLASSES[kind]
    model = dropkey_vit(cls)
    plain = export_plain(model, tmp_path)
    assert type(plain) is plain_class and not plain.training and type(plain.config) is hf.ViTConfig
    config = assert_plain(tmp_path)
    assert config["model_type"] == "vit" and config["architectures"] == [plain_class.__name__]
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "emu"}
    loaded, info = plain_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = loss_of(model, pixels(), 0)
    assert torch.equal(loss_of(plain, pixels(), 0), expected)
    assert torch.equal(loss_of(loaded.eval(), pixels(), 0), expected)


def test_optional_parts_are_kept_or_left_out(tmp_path: Path) -> None:
    for number, parts in enumerate([{"add_pooling_layer": False}, {"use_mask_token": True}]):
        model = dropkey_vit(DropKeyViTModel, **parts)
        plain = export_plain(model, tmp_path / str(number))
        assert plain.state_dict().keys() == model.state_dict().keys()


def test_the_plain_model_has_its_own_weights_and_the_others_type(tmp_path: Path) -> None:
    model = dropkey_vit().to(torch.bfloat16)
    plain = export_plain(model, tmp_path)
    assert plain.dtype == torch.bfloat16
    nn.init.zeros_(plain.classifier.weight)
    assert model.classifier.weight.abs().sum() > 0


@pytest.mark.parametrize("name", ["vit", "detr", "clip", "swin"])
def test_a_patched_model_is_exported_and_stays_patched(name: str, tmp_path: Path) -> None:
    model, inputs = build(name).eval(), ARCHITECTURES[name].inputs()
    expected = loss_of(model, inputs, 0)
    apply_dropkey(model, 0.3, verbose=False)
    plain = export_plain(model, tmp_path)
    assert_plain(tmp_path)
    assert not list(dropkey_modules(plain)) and list(dropkey_modules(model))
    assert torch.equal(loss_of(plain, inputs, 0), expected)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loss_of(loaded, inputs, 0), expected)


@pytest.mark.slow
def test_a_folder_of_a_dropkey_vit_runs_in_a_pipeline(tmp_path: Path) -> None:
    model = dropkey_vit()
    nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path / "dropkey")
    processor = hf.ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "dropkey")
    export_plain(tmp_path / "dropkey", tmp_path / "plain")
    assert_plain(tmp_path / "plain")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    scores = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    expected = {model.config.id2label[label]: scores[label].item() for label in range(3)}
    torch.save(expected, tmp_path / "expected.pt")
    arguments = [str(tmp_path / name) for name in ("plain", "image.png", "expected.pt")]
    subprocess.run([sys.executable, "-c", PIPELINE, *arguments], check=True, timeout=300)


def test_a_folder_of_a_patched_model(tmp_path: Path) -> None:
    model = build("vit").eval()
    apply_dropkey(model, 0.3, verbose=False)
    model.save_pretrained(tmp_path / "patched")
    plain = export_plain(str(tmp_path / "patched"), tmp_path / "plain")
    assert_plain(tmp_path / "plain")
    assert torch.equal(loss_of(plain, pixels(), 0), loss_of(model, pixels(), 0))


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    class Own(hf.PreTrainedModel):
        config_class = hf.ViTConfig

        def __init__(self, config: hf.ViTConfig):
            super().__init__(config)
            self.linear = nn.Linear(2, 2)
            self.post_init()

    with pytest.raises(ValueError, match="extends no model of Transformers"):
        export_plain(Own(hf.ViTConfig(**VIT)), tmp_path)
    dropkey_vit().save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match="overwritten by its own export"):
        export_plain(tmp_path / "folder", tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    (tmp_path / "folder" / "config.json").write_text(json.dumps({**config, "architectures": ["Unheard"]}))
    with pytest.raises(ValueError, match="saved as Unheard"):
        export_plain(tmp_path / "folder", tmp_path / "out")
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(dropkey_vit(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="carries an adapter; merge it first"):
        export_plain(adapted, tmp_path / "out")


def test_another_model_is_not_written_over_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    export_plain(dropkey_vit(), tmp_path / "there")
    (tmp_path / "there" / "README.md").write_text("the other's card")
    (tmp_path / "there" / "eval_results.json").write_text("{}")
    (tmp_path / "there" / "runs").mkdir()
    before = (tmp_path / "there" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="is not empty; give another folder, or pass --overwrite"):
        export_plain(build("deit"), tmp_path / "there")
    assert (tmp_path / "there" / "model.safetensors").read_bytes() == before
    export_plain(build("deit"), tmp_path / "there", overwrite=True)
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "there" / "config.json").read_text())["model_type"] == "deit"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_overwriting_never_takes_anything_but_a_saved_model(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="holds no saved model, so it is not overwritten"):
        export_plain(dropkey_vit(), tmp_path / "letters", overwrite=True)
    with pytest.raises(NotADirectoryError, match="is a file"):
        export_plain(dropkey_vit(), tmp_path / "letters" / "mine.txt", overwrite=True)
    dropkey_vit().save_pretrained(tmp_path / "run")
    dropkey_vit().save_pretrained(tmp_path / "run" / "checkpoint-1")
    for source, target in (("run/checkpoint-1", "run"), ("run", "run/checkpoint-1"), ("run", "run/plain")):
        with pytest.raises(ValueError, match="lies in the other; give a separate folder"):
            export_plain(tmp_path / source, tmp_path / target, overwrite=True)


def test_a_failed_export_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_plain(dropkey_vit(), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(self: Any, folder: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(hf.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        export_plain(dropkey_vit(), tmp_path / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
