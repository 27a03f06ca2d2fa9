"""Whole jobs by command of SegFormer, BEiT and Mask2Former: training, a resume to the bit, evaluation, prediction."""

import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_segmenters import CLASSES, KINDS, small_pretrained

from hf_dropkey.cli import main


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("auto_image_processor")]


def png(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(content, "PNG")
    return content.getvalue()


def data(folder: Path) -> list[str]:
    """Squares of two classes on a ground, as images and masks in parquet files; the words that name them."""
    generator = np.random.default_rng(0)
    for name, count in (("train", 6), ("test", 4)):
        cells: dict[str, list[bytes]] = {"image": [], "label": []}
        for _ in range(count):
            mask = np.zeros((48, 60), int)
            for number in (1, 2):
                top, left = generator.integers(0, (30, 40))
                mask[top : top + 18, left : left + 18] = number
            mask[0, :5] = 255
            cells["label"].append(png(mask))
            cells["image"].append(png(np.array([[60, 60, 60], [200, 0, 0], [0, 0, 200]])[mask % 253]))
        datasets.Dataset.from_dict(cells).to_parquet(folder / f"{name}.parquet")
    (folder / "names.json").write_text(json.dumps(CLASSES))
    files = ["--validation_file", str(folder / "test.parquet"), "--class_names", str(folder / "names.json")]
    return [*files, "--use_cpu", "--report_to", "none", "--per_device_eval_batch_size", "2", "--disable_tqdm", "true"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_from_training_to_prediction(kind: str, tmp_path: Path) -> None:
    source, given = small_pretrained(kind, tmp_path / "source"), data(tmp_path)
    words = ["--model_name_or_path", str(source), "--train_file", str(tmp_path / "train.parquet"), *given]
    words += ["--do_train", "--do_eval", "--max_steps", "4", "--save_steps", "2", "--per_device_train_batch_size", "2"]
    words += ["--dropkey_ratio", "0.3", "--learning_rate", "0.001", "--draw_images", "1", "--draw_samples", "2"]

    def train(folder: Path, *more: str) -> None:
        assert main(["train", "--task", "segmentation", *words, "--output_dir", str(folder), *more]) == 0

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(whole)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, whole))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    train(resumed, "--resume_from_checkpoint", "auto")
    again = load_file(resumed / "model.safetensors")
    assert again.keys() == after.keys() and all(torch.equal(again[name], after[name]) for name in after)

    results = json.loads((whole / "eval_results.json").read_text())
    assert 0 <= results["eval_mean_iou"] <= results["eval_pixel_accuracy"] <= 1
    assert [line.split()[0] for line in (whole / "per_class.txt").read_text().splitlines()[1:4]] == list(CLASSES)
    assert (whole / "predictions.png").is_file() and (whole / "report.html").is_file()
    config = json.loads((whole / "config.json").read_text())
    assert config["dropkey_ratio"] == 0.3 and "auto_map" not in config

    evaluation = ["--task", "segmentation", "--model_name_or_path", str(whole), *given]
    assert main(["evaluate", *evaluation, "--output_dir", str(tmp_path / "scores"), "--draw_images", "0"]) == 0
    scores = json.loads((tmp_path / "scores" / "eval_results.json").read_text())
    for name in ("eval_mean_iou", "eval_pixel_accuracy"):
        assert scores[name] == pytest.approx(results[name], abs=1e-9)

    Image.fromarray(np.full((40, 52, 3), 60, np.uint8)).save(tmp_path / "photo.png")
    prediction = ["--model", str(whole), "--images", str(tmp_path / "photo.png"), "--out", str(tmp_path / "found")]
    assert main(["predict", "--task", "segmentation", *prediction, "--samples", "2"]) == 0
    mask = np.asarray(Image.open(tmp_path / "found" / "photo_mask.png"))
    assert mask.shape == (40, 52) and set(np.unique(mask)) <= {0, 1, 2}
    assert json.loads((tmp_path / "found" / "segmentation.json").read_text())
