"""The segmentation job from arguments to a page, a resume to the bit, evaluation and prediction of what it saved."""

import contextlib
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fresh_process
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation

from hf_dropkey import cli
from hf_dropkey.hub.push_plan import files_to_push
from hf_dropkey.segmentation.figures import Segmented, segmentations
from hf_dropkey.segmentation.job import SegmentationEvaluation, SegmentationJob, check_batches
from hf_dropkey.segmentation.prediction import PredictionArguments, predict
from hf_dropkey.segmentation.scenes import make_scene
from hf_dropkey.training.record import data_changes


pytestmark = pytest.mark.usefixtures("auto_image_processor")


SMALL = shlex.split(
    "--dataset scenes --train_scenes 8 --validation_scenes 5 --scene_size 32 --backbone vit --image_size 32 "
    "--hidden_size 16 --num_attention_heads 2 --num_hidden_layers 3 --decoder_size 8 --dropkey_ratio 0.3 "
    "--use_cpu --report_to none --disable_tqdm true --learning_rate 0.001 --per_device_train_batch_size 4 "
    "--per_device_eval_batch_size 3 --draw_samples 3 --draw_images 2"
)


def trained(folder: Path, *words: str) -> None:
    command = [*SMALL, "--do_train", "--do_eval", "--output_dir", str(folder), *words]
    SegmentationJob.parse(command).execute(["hf-dropkey", "train", "--task", "segmentation", *command])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "scenes"
    trained(folder, "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1")
    return folder


def test_what_a_run_leaves(run: Path) -> None:
    results = json.loads((run / "all_results.json").read_text())
    assert 0 <= results["eval_mean_iou"] <= results["eval_pixel_accuracy"] <= 1
    lines = (run / "per_class.txt").read_text().splitlines()
    assert lines[0] == "IoU of each class" and [line.split()[0] for line in lines[1:]][:2] == ["ground", "disc"]
    assert Image.open(run / "predictions.png").width > 300
    page = (run / "report.html").read_text()
    assert "mean IoU" in page and "backbone.layers.0.attention" in page
    card = (run / "README.md").read_text()
    assert "image-segmentation" in card and "mean intersection over union" in card and "scenes" in card
    config = json.loads((run / "config.json").read_text())
    assert config["dropkey_ratio"] == config["backbone_config"]["dropkey_ratio"] == 0.3
    assert config["id2label"]["4"] == "ring"


def test_the_folder_loads_without_the_package(run: Path, tmp_path: Path) -> None:
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    model = AutoModelForSemanticSegmentation.from_pretrained(run).eval()
    torch.save((pixels, model(pixels).logits.detach()), tmp_path / "expected.pt")
    fresh_process.fresh(
        """
        import sys, torch
        from transformers import AutoModelForSemanticSegmentation
        pixels, expected = torch.load(sys.argv[2])
        model = AutoModelForSemanticSegmentation.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
        torch.testing.assert_close(model(pixels).logits, expected, rtol=0, atol=1e-5)
        """,
        run,
        tmp_path / "expected.pt",
        cache=tmp_path / "cache",
    )


def test_a_push_sends_model_code_and_card_and_no_pictures(run: Path) -> None:
    sent = {Path(name).name for name in files_to_push(run)[0]}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= sent
    assert {"configuration_dropkey_host.py", "modeling_dropkey_vit.py"} <= sent
    assert not {"training_args.bin", "predictions.png", "report.html"} & sent


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(run: Path, tmp_path: Path) -> None:
    trained(tmp_path / "two", "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1")
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        assert (tmp_path / "two" / "checkpoint-4" / name).is_file()
    # as if the process had been killed after step 2
    for gone in ("checkpoint-4", "model.safetensors"):
        path = tmp_path / "two" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(tmp_path / "two" / ".run")
    resume = ["--resume_from_checkpoint", "auto"]
    trained(tmp_path / "two", "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", *resume)
    one, two = load_file(run / "model.safetensors"), load_file(tmp_path / "two" / "model.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_resume_on_other_data_is_told(tmp_path: Path) -> None:
    def prints(*words: str) -> dict[str, Any]:
        job = SegmentationJob.parse([*SMALL, "--do_train", "--output_dir", str(tmp_path), *words])
        job.check()
        return dict(job.fingerprint(job.load()))

    before = prints()
    assert before["train"]["rows"] == 8 and data_changes(before, prints()) == []
    assert "6 images instead of 8" in data_changes(before, prints("--max_train_samples", "6"))[0]
    assert any("other labels" in line for line in data_changes(before, prints("--scene_size", "40")))


def test_an_evaluation_gives_the_numbers_of_the_run(run: Path, tmp_path: Path) -> None:
    words = ["--dataset", "scenes", "--validation_scenes", "5", "--scene_size", "32", "--model_name_or_path", str(run)]
    words += ["--output_dir", str(tmp_path / "e"), "--use_cpu", "--report_to", "none", "--draw_images", "0"]
    SegmentationEvaluation.main(words)
    found = json.loads((tmp_path / "e" / "eval_results.json").read_text())
    expected = json.loads((run / "eval_results.json").read_text())
    for name in ("eval_mean_iou", "eval_pixel_accuracy"):
        assert found[name] == pytest.approx(expected[name], abs=1e-9)
    with pytest.raises(ValueError, match="give the model to measure"):
        SegmentationEvaluation.parse([*SMALL, "--output_dir", str(tmp_path)])


def test_training_goes_on_from_a_saved_model_with_another_ratio(run: Path, tmp_path: Path) -> None:
    words = ["--dataset", "scenes", "--train_scenes", "4", "--scene_size", "32", "--model_name_or_path", str(run)]
    words += [
        "--output_dir",
        str(tmp_path / "m"),
        "--use_cpu",
        "--report_to",
        "none",
        "--max_steps",
        "1",
        "--do_train",
    ]
    SegmentationJob.main([*words, "--dropkey_ratio", "0.15", "--report", "False"])
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dropkey_ratio"] == config["backbone_config"]["dropkey_ratio"] == 0.15
    assert (tmp_path / "m" / "modeling_dropkey_vit.py").is_file()


def test_predictions_are_written_as_masks_and_pictures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    make_scene("validation", 0, 48)[0].resize((60, 40)).save(images / "a.png")
    found = predict(PredictionArguments(str(run), [str(images)], tmp_path / "out", samples=3))
    mask = Image.open(tmp_path / "out" / "a_mask.png")
    assert mask.size == (60, 40) and mask.mode == "P"
    values = np.asarray(mask)
    (one,) = found.values()
    names = json.loads((run / "config.json").read_text())["id2label"]
    for name, fraction in one["fractions"].items():
        number = next(int(key) for key, value in names.items() if value == name)
        assert fraction == pytest.approx((values == number).mean())
    assert sum(one["fractions"].values()) == pytest.approx(1) and one["mean_entropy"] > 0
    assert (tmp_path / "out" / "a_segments.png").is_file() and "drawn in" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "segmentation.json").read_text()) == found
    with pytest.raises(FileNotFoundError, match="there is no image file or folder"):
        predict(PredictionArguments(str(run), [str(tmp_path / "gone")], tmp_path / "out"))
    with pytest.raises(NotADirectoryError, match="--out .*a.png cannot be a folder"):
        predict(PredictionArguments(str(run), [str(images)], images / "a.png"))
    with pytest.raises(ValueError, match="--samples 1 is neither 0"):
        PredictionArguments(str(run), ["x"], tmp_path, samples=1)


def test_images_of_one_name_get_files_of_their_own(run: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make_scene("validation", 0, 48)[0].save(tmp_path / name / "a.png")
    folders = [str(tmp_path / "one"), str(tmp_path / "two")]
    predict(PredictionArguments(str(run), folders, tmp_path / "out", samples=0))
    assert {file.name for file in (tmp_path / "out").glob("*_mask.png")} == {"a_mask.png", "a_2_mask.png"}


def test_the_commands_know_the_task() -> None:
    for verb in ("train", "evaluate", "predict"):
        assert (verb, "segmentation") in cli.PROGRAMS and cli.argument_groups(verb, "segmentation")


def test_a_figure_needs_an_image_and_draws_what_there_is() -> None:
    with pytest.raises(ValueError, match="no images to draw"):
        segmentations([], ["a", "b"], title="x", ignore_index=255)
    image, mask = make_scene("train", 0, 32)
    names = ["ground", "disc", "square", "triangle", "ring"]
    with_all = Segmented(image, mask.astype(np.int64), mask.astype(np.int64), np.zeros((32, 32)))
    assert len(segmentations([with_all], names, title="x", ignore_index=255).axes) == 5
    plain = Segmented(image, None, mask.astype(np.int64), None)
    assert len(segmentations([plain, plain], names, title="x", ignore_index=255).axes) == 4


@pytest.mark.parametrize(
    ("images", "more", "told"),
    [
        (9, (), "the last batch of 9 images in batches of 4 has one image"),
        (8, ("--per_device_train_batch_size", "1"), "each batch has one image"),
        (8, (), None),
        (9, ("--dataloader_drop_last",), None),
        (9, ("--max_steps", "2"), None),
    ],
)
def test_a_batch_of_one_image_is_refused(images: int, more: tuple[str, ...], told: str | None) -> None:
    job = SegmentationJob.parse([*SMALL, "--output_dir", "run", *more])
    model: Any = SimpleNamespace(config=SimpleNamespace(model_type="upernet"))
    with contextlib.nullcontext() if told is None else pytest.raises(ValueError, match=told):
        check_batches(model, images, job.training)
