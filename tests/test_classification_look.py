"""The job draws the attention of any saved model, writes the numbers, and lists what it could not do."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from stock_architectures import ENCODER, quiet

from hf_dropkey.classification import look
from hf_dropkey.classification.families import FAMILIES, image_processor
from hf_dropkey.classification.pictures import Pictures


pytestmark = pytest.mark.usefixtures("auto_image_processor")
DIGITS = {"id2label": {n: str(n) for n in range(10)}, "label2id": {str(n): n for n in range(10)}}
FEW = ("--max_eval_samples", "12", "--check_images", "False", "--samples", "3", "--passes", "2", "--images_shown", "1")
FIGURES = {"statistics.png", "attention_maps.png", "attention_heads.png", "drops.png", "uncertainty.png"}


def save(model: Any, folder: Path, side: int) -> str:
    model.save_pretrained(folder)
    image_processor("vit", "tiny", side).save_pretrained(folder)
    return str(folder)


def native(folder: Path, family: str = "vit", **settings: Any) -> str:
    """A saved model of the package, untrained, for digits."""
    torch.manual_seed(0)
    about = FAMILIES[family]
    side = about.digits_shape["image_size"]
    shape = {**about.sizes["nano"], **about.digits_shape, **DIGITS, "dropkey_ratio": 0.4, **settings}
    return save(about.model_class(about.config_class(**shape)), folder, side)


def stock(folder: Path, ratio: float | None) -> str:
    """A saved DINOv2, which remembers DropKey if there is a ratio."""
    torch.manual_seed(0)
    model = hf.Dinov2ForImageClassification(hf.Dinov2Config(**ENCODER, image_size=28, patch_size=7, **DIGITS))
    if ratio is not None:
        quiet(model, ratio)
    return save(model, folder, 28)


def draw(model: str, output: Path, *arguments: str) -> dict[str, Any]:
    """Runs the job; returns its summary."""
    look.main(["--model_name_or_path", model, "--output_dir", str(output), "--use_cpu", *arguments])
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_a_model_of_the_package_is_drawn_whole(tmp_path: Path) -> None:
    summary = draw(native(tmp_path / "model"), tmp_path / "seen", *FEW)
    assert summary["missing"] == {} and summary["images"] == 12 and summary["data"] == "digits"
    assert set(summary["files"]) == FIGURES | {"numbers.csv", "images.csv"}
    for name in FIGURES:
        assert np.asarray(Image.open(tmp_path / "seen" / name).convert("L")).std() > 0
    numbers = rows(tmp_path / "seen" / "numbers.csv")
    heads = {(row["metric"], row["layer"], row["head"], row["dropkey"]) for row in numbers if row["head"]}
    metrics = ("attention entropy", "attention distance")
    assert heads == {
        (metric, str(layer), str(head), dropkey)
        for metric in metrics
        for layer in range(1, 5)
        for head in range(1, 5)
        for dropkey in ("True", "False")
    }
    assert {(row["metric"], row["unit"]) for row in numbers} >= {(metrics[0], "nats"), (metrics[1], "patches")}
    configured = [float(row["value"]) for row in numbers if row["metric"] == "drop ratio configured"]
    measured = [float(row["value"]) for row in numbers if row["metric"] == "fraction dropped"]
    assert configured == pytest.approx([0.4, 0.8 / 3, 0.4 / 3, 0])
    assert measured == pytest.approx(configured, abs=0.02)
    images = rows(tmp_path / "seen" / "images.csv")
    information = [float(row["mutual_information_nats"]) for row in images]
    assert len(images) == 12 and information == sorted(information, reverse=True)
    right = [row["predicted"] == row["class"] for row in images]
    assert [row["right"] for row in images] == [str(one) for one in right]
    assert float(images[0]["accuracy_kept"]) == pytest.approx(sum(right) / 12)
    assert float(images[0]["fraction_kept"]) == 1


def test_a_stock_model_gets_the_dropkey_back_that_it_remembers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = draw(stock(tmp_path / "model", 0.3), tmp_path / "seen", *FEW, "--figures", "drops")
    assert summary["class"] == "Dinov2ForImageClassification" and summary["files"] == ["drops.png", "numbers.csv"]
    configured = [
        float(row["value"])
        for row in rows(tmp_path / "seen" / "numbers.csv")
        if row["metric"] == "drop ratio configured"
    ]
    assert configured == pytest.approx([0.3, 0.15, 0])
    assert "3 attentions drop keys" in capsys.readouterr().out


def test_without_dropkey_the_rest_is_drawn_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = stock(tmp_path / "model", None)
    summary = draw(model, tmp_path / "seen", *FEW)
    assert set(summary["files"]) == {"statistics.png", "attention_maps.png", "attention_heads.png", "numbers.csv"}
    assert set(summary["missing"]) == {"statistics with DropKey", "figure drops", "figure uncertainty"}
    assert "missing: figure drops: the model drops no keys; pass --dropkey_ratio" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--figures drops: the model drops no keys; pass --dropkey_ratio"):
        draw(model, tmp_path / "seen", *FEW, "--figures", "drops")


@pytest.mark.parametrize("family", ["volo", "t2t_vit", "ceit"])
def test_the_other_families_are_drawn_and_their_other_attentions_listed(tmp_path: Path, family: str) -> None:
    arguments = ("--figures", "maps", "statistics") if family == "volo" else ("--figures", "drops", "statistics")
    summary = draw(native(tmp_path / "model", family), tmp_path / "seen", *FEW, *arguments)
    assert {"statistics.png", "numbers.csv"} < set(summary["files"])
    listed = " ".join(f"{what}: {reason}" for what, reason in summary["missing"].items())
    reasons = {
        "volo": (
            "volo.outlook_layers.1.attention: attends within 16 windows",
            "map of volo.stages.0.0.attention: the class token is not a query",
        ),
        "t2t_vit": ("DropKeyT2TViTPerformer computes no attention weights",),
        "ceit": ("ceit.class_layer.attention: not square: 1 queries and 4 keys",),
    }
    assert all(words in listed for words in reasons[family])


def test_image_files_are_drawn_without_classes(tmp_path: Path) -> None:
    files = []
    for number, size in enumerate([(30, 20), (12, 12), (9, 40)]):
        files.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)).save(files[-1])
    model = native(tmp_path / "model")
    summary = draw(model, tmp_path / "seen", "--samples", "3", "--figures", "uncertainty", "--images", *files)
    assert summary["files"] == ["uncertainty.png", "images.csv"] and summary["data"] == "files"
    assert summary["missing"] == {"true classes": "image files have none; use a data source, such as --validation_dir"}
    found = rows(tmp_path / "seen" / "images.csv")
    assert {row["image"] for row in found} == {"0.png", "1.png", "2.png"} and "right" not in found[0]
    assert all(str(tmp_path) not in file.read_text() for file in (tmp_path / "seen").glob("*.[cj]s*"))


def test_a_model_without_class_token_or_classes_shows_the_average_patch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**ENCODER, image_size=16, patch_size=4))
    summary = draw(save(model, tmp_path / "model", 16), tmp_path / "seen", *FEW, "--dropkey_ratio", "0.2")
    assert set(summary["files"]) == FIGURES - {"uncertainty.png"} | {"numbers.csv"}
    missing = summary["missing"]
    assert "the mean over the queries of all patches" in missing["maps of a class token"]
    assert "torch.nn.MultiheadAttention" in missing["attention head"]
    assert "is not an image classifier" in missing["figure uncertainty"] and "such as 0" in missing["true classes"]


def test_windows_leave_the_drops(tmp_path: Path) -> None:
    config = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[2], num_heads=[2], window_size=4)
    model = save(hf.SwinModel(config), tmp_path / "model", 32)
    summary = draw(model, tmp_path / "seen", *FEW, "--dropkey_ratio", "0.2")
    assert summary["files"] == ["drops.png", "numbers.csv"]
    assert "attends within 4 windows" in summary["missing"]["figure maps"]
    with pytest.raises(ValueError, match="--figures maps: SwinModel has no readable attention over the tokens"):
        draw(model, tmp_path / "seen", *FEW, "--figures", "maps")


def test_images_are_shown_as_the_model_sees_them_in_their_own_colors(tmp_path: Path) -> None:
    colors = Image.new("RGB", (40, 20), (200, 100, 50))
    for family, side in (("vit", 8), ("volo", 64)):
        processor = image_processor(family, "nano", side)
        shown = Pictures([{"image": colors}], ["a"], None, processor, 3).seen(0)
        assert shown.size == (side, side)
        assert np.abs(np.asarray(shown, dtype=int) - [200, 100, 50]).max() <= 1
    grey = image_processor("vit", "nano", 8, num_channels=1)
    shown = Pictures([{"image": colors}], ["a"], None, grey, 1).seen(0)
    assert shown.mode == "L" and abs(int(np.asarray(shown)[0, 0]) - int(np.asarray(colors.convert("L"))[0, 0])) <= 1


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return native(tmp_path_factory.mktemp("drawn") / "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--figures", "map"], r"--figures map is unknown; choose from statistics, maps, drops, uncertainty"),
        (["--samples", "1"], "--samples 1 is below 2"),
        (["--images", "nowhere.png"], "nowhere.png .*pass image files"),
        (["--images", "a.png", "--dataset_name", "digits"], "exclude each other; pass one of them"),
    ],
)
def test_bad_arguments_are_errors(tmp_path: Path, digits_model: str, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(digits_model, tmp_path / "seen", *arguments)
    assert not (tmp_path / "seen").exists()


def test_a_folder_that_is_no_model_is_an_error(tmp_path: Path, digits_model: str) -> None:
    shutil.copytree(digits_model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        draw(str(tmp_path / "model"), tmp_path / "seen")
