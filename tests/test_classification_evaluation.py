"""`hf-dropkey evaluate --robustness` measures every kind and strength, the same each time, and shows it on the run's page."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import RECIPE
from transformers import ViTImageProcessorPil

from hf_dropkey.classification.evaluation import EvaluationArguments, load, measure, robustness
from hf_dropkey.classification.job import ClassificationJob
from hf_dropkey.classification.transform import CorruptedTransform, ImageTransform
from hf_dropkey.cli import main
from hf_dropkey.images.corruptions import CORRUPTIONS, STRENGTHS, corrupt
from hf_dropkey.pages.run import write_report


pytestmark = pytest.mark.usefixtures("auto_image_processor")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    # long enough to tell some digits, without what slows learning
    recipe = {
        **RECIPE,
        "max_steps": 120,
        "per_device_train_batch_size": 32,
        "save_strategy": "no",
        "dropkey_ratio": 0.0,
    }
    recipe |= {"max_train_samples": 600, "max_eval_samples": 60, "disable_tqdm": True, "hidden_dropout_prob": 0.0}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    ClassificationJob.main([str(folder / "recipe.json"), "--output_dir", str(folder / "run")])
    return folder / "run"


def test_the_page_of_a_run_shows_what_evaluate_has_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = run / "report.html"
    assert "Robustness" not in page.read_text(encoding="utf-8")
    words = ["evaluate", "--model_name_or_path", str(run), "--use_cpu", "--max_eval_samples", "60"]
    assert main([*words, "--robustness"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((run / "evaluation.json").read_text())
    assert set(found["robustness"]) == set(CORRUPTIONS) and found["brier"] > 0
    assert all(len(values) == len(STRENGTHS) for values in found["robustness"].values())
    # the strongest noise leaves less than there was
    assert found["robustness"]["noise"][-1] < found["accuracy"]
    assert f"and to {page}" in printed and "noise" in printed
    text = page.read_text(encoding="utf-8")
    mean = np.mean(list(found["robustness"].values()))
    assert f"Accuracy {found['accuracy']:.4f} as they are, {mean:.4f} on average" in text
    assert f"{found['robustness']['jpeg'][2]:.4f}" in text
    # again, in batches of another size: the same numbers
    assert main([*words, "--robustness", "--per_device_eval_batch_size", "7"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["robustness"] == found["robustness"]
    assert main(words) == 0
    assert "robustness" not in json.loads((run / "evaluation.json").read_text())


def test_damaged_numbers_are_named(run: Path) -> None:
    (run / "evaluation.json").write_text(json.dumps({"accuracy": 0.5, "robustness": {"noise": "high"}}))
    with pytest.raises(ValueError, match=r"evaluation.json is damaged .* hf-dropkey evaluate --robustness"):
        write_report(run)
    (run / "evaluation.json").unlink()


def test_each_setting_is_measured_on_its_own_images(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = ClassificationJob.parse([str(run.parent / "recipe.json"), "--output_dir", str(run)])
    job.check()
    data = job.load()
    arguments = EvaluationArguments(str(run), use_cpu=True)
    model, processor = load(arguments)
    clean = measure(model, processor, data, arguments)["accuracy"]
    # of images that stay as they are, the accuracy stays
    monkeypatch.setattr("hf_dropkey.classification.transform.corrupt", lambda image, *args, **kwargs: image)
    found = robustness(model, processor, data, arguments)
    assert {value for values in found.values() for value in values} == {clean}


def test_images_are_made_worse_at_the_size_of_the_model() -> None:
    draws = np.random.default_rng(0)
    image = Image.fromarray(draws.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    settings: dict[str, Any] = {"label_ids": {0: 0}, "num_channels": 3}
    batch = {"image": [image], "label": [0], "row": [5]}
    found = CorruptedTransform("noise", 3, processor, **settings)(batch)["pixel_values"]
    resized = image.resize((16, 16), Image.Resampling.BILINEAR)
    expected = processor([corrupt(resized, "noise", 3, row=5)], do_resize=False, return_tensors="pt")["pixel_values"]
    assert torch.allclose(torch.as_tensor(found), expected, atol=2.1 * 2 / 255)
    plain = ImageTransform(processor, **settings)(batch)["pixel_values"]
    assert (torch.as_tensor(found) - torch.as_tensor(plain)).std() > 0.2
