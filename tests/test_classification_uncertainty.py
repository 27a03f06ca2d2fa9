"""The uncertainty that ranks other images is that of Monte-Carlo inference on evaluation images, and is kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_demos import RATIO, save_classifier
from small_runs import RECIPE
from transformers import AutoImageProcessor

from hf_dropkey import apply_dropkey, load_classifier, monte_carlo_predict
from hf_dropkey.classification.arguments import DataArguments
from hf_dropkey.classification.data import load_image_data
from hf_dropkey.classification.transform import ImageTransform, collate_images
from hf_dropkey.classification.uncertainty import MeasuredUncertainty, measure_uncertainty
from hf_dropkey.cli import main
from hf_dropkey.hub.push_plan import plan_push


pytestmark = pytest.mark.usefixtures("auto_image_processor")


@pytest.mark.parametrize("stock", [False, True], ids=["native", "stock"])
def test_it_is_measured_on_evaluation_images(tmp_path: Path, stock: bool) -> None:
    folder = save_classifier(tmp_path, stock=stock)
    model, processor = load_classifier(folder), AutoImageProcessor.from_pretrained(folder)
    data = load_image_data(DataArguments(max_eval_samples=12), training=False)
    images = [row["image"].convert("RGB") for row in data.evaluation]
    data.evaluation.set_transform(ImageTransform(processor, label_ids=data.label_ids, num_channels=3))
    measured = measure_uncertainty(model, data, collate_images, batch_size=12)
    assert (measured.split, measured.samples, measured.ratio) == ("test", 20, RATIO)
    # a stock model is as before: its settings are in its configuration alone
    if stock:
        apply_dropkey(model)
    expected = monte_carlo_predict(model, processor(images, return_tensors="pt"), samples=20, seed=0)
    found = torch.tensor(measured.mutual_information_nats)
    assert torch.allclose(found, expected.mutual_information.sort().values, atol=1e-6)
    model.config.dropkey_ratio = 0
    apply_dropkey(model, 0.0)
    with pytest.raises(ValueError, match="--uncertainty cannot be measured .*: no attention of it drops keys"):
        measure_uncertainty(model, data, collate_images, batch_size=12)
    apply_dropkey(model, 0.1)
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="its problem_type is multi_label_classification"):
        measure_uncertainty(model, data, collate_images, batch_size=12)


def test_a_rank_counts_what_is_less_uncertain(tmp_path: Path) -> None:
    measured = MeasuredUncertainty("test", 20, 0.1, "score", (0.1, 0.2, 0.2, 0.4))
    assert [measured.rank(value) for value in (0.05, 0.2, 0.3, 0.5)] == [0, 0.25, 0.75, 1]
    measured.save(tmp_path)
    assert MeasuredUncertainty.load(tmp_path) == measured
    assert MeasuredUncertainty.load(tmp_path / "none") is None


@pytest.mark.parametrize(
    "content",
    [
        '{"split": "test"}',
        "[]",
        '{"split": "a", "pattern": "b", "samples": 2, "ratio": 0, "mutual_information_nats": []}',
    ],
)
def test_a_damaged_file_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "uncertainty_results.json").write_text(content)
    with pytest.raises(ValueError, match="uncertainty_results.json"):
        MeasuredUncertainty.load(tmp_path)


def test_evaluate_writes_it_beside_the_model_where_it_is_asked_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_classifier(tmp_path / "saved", digits=True)
    words = ["--model_name_or_path", str(folder), "--dataset_name", "digits", "--max_eval_samples", "30", "--use_cpu"]
    assert main(["evaluate", *words]) == 0
    assert MeasuredUncertainty.load(folder) is None and "uncertain" not in capsys.readouterr().out
    assert main(["evaluate", *words, "--uncertainty"]) == 0
    assert "uncertainty_results.json: how uncertain the model is" in capsys.readouterr().out
    measured = MeasuredUncertainty.load(folder)
    assert measured is not None and len(measured.mutual_information_nats) == 30


def test_evaluate_refuses_it_before_it_measures_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_classifier(tmp_path / "plain", digits=True, dropkey=False)
    words = ["--dataset_name", "digits", "--max_eval_samples", "30", "--use_cpu", "--uncertainty"]
    assert main(["evaluate", "--model_name_or_path", str(folder), *words]) == 2
    assert "no attention of it drops keys" in capsys.readouterr().err
    assert not (folder / "evaluation.json").exists()
    assert main(["evaluate", "--model_name_or_path", "owner/name", *words]) == 2
    assert "owner/name is not a folder; save the model into one" in capsys.readouterr().err


def trained(folder: Path, **changes: Any) -> int:
    settings = {**RECIPE, "output_dir": folder, "max_steps": 2, "max_eval_samples": 20, "save_steps": 2, **changes}
    return main(["train", *(f"--{name}={value}" for name, value in settings.items())])


def test_a_training_run_leaves_it_where_it_is_asked_to(tmp_path: Path) -> None:
    assert trained(tmp_path / "run") == 0
    assert MeasuredUncertainty.load(tmp_path / "run") is None
    # the same run, which was complete, with a measurement more and without a page
    assert trained(tmp_path / "run", uncertainty=True, report=False, resume_from_checkpoint="auto") == 0
    measured = MeasuredUncertainty.load(tmp_path / "run")
    assert measured is not None and measured.ratio == RECIPE["dropkey_ratio"]
    assert len(measured.mutual_information_nats) == 20
    plan = plan_push(tmp_path / "run")
    assert "uncertainty_results.json" in {file.name for file in plan.files}


def test_a_recipe_may_ask_for_it_and_its_ratio_be_0(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert trained(tmp_path / "run", uncertainty=True, dropkey_ratio=0) == 0
    assert "--uncertainty: nothing was measured: no attention of it drops keys" in caplog.text
    assert MeasuredUncertainty.load(tmp_path / "run") is None


def test_training_without_an_evaluation_cannot_measure_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trained(tmp_path / "run", uncertainty=True, do_eval=False) == 2
    assert "nothing is evaluated; add --do_eval" in capsys.readouterr().err
