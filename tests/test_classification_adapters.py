"""LoRA beside DropKey from the command line: adapters are trained, resumed to the bit, saved, loaded, merged, described."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from stock_models import SIDE, job, saved, words_of
from transformers import AutoModelForImageClassification

from hf_dropkey import apply_dropkey, export_plain, load_classifier
from hf_dropkey.classification import evaluation, look, prediction
from hf_dropkey.classification.job import ClassificationJob
from hf_dropkey.hub.cards import write_card
from hf_dropkey.hub.push_plan import plan_push
from hf_dropkey.hub.release_check import check_release
from hf_dropkey.inspection.analysis import drop_schedule
from hf_dropkey.inspection.saved import inspect_folder
from hf_dropkey.patching.apply import forgotten_ratio


peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("auto_image_processor")

LORA = ("--lora_r", "4", "--lora_dropout", "0.1", "--learning_rate", "0.01")


def train(source: Path, run: Path, *words: str) -> Path:
    job(source, run, *LORA, *words).execute(["python", "train.py"])
    return run


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters on a DINOv2 that has no classifier of its own; its model is in `source` beside it."""
    folder = tmp_path_factory.mktemp("lora")
    return train(saved("dinov2", folder / "source"), folder / "run")


def test_the_folder_of_a_run_is_an_adapter_that_remembers_dropkey(adapter: Path) -> None:
    names = {file.name for file in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "base_config.json", "README.md"} <= names
    assert {"preprocessor_config.json", "trainer_state.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["auto_mapping"]["dropkey"]["dropkey_ratio"] == 0.5
    # the second pair in releases of Transformers before their attentions had common names
    assert sorted(settings["target_modules"]) in (["q_proj", "v_proj"], ["query", "value"])
    assert settings["modules_to_save"] == ["classifier"]
    weights = load_file(adapter / "adapter_model.safetensors")
    # two matrices at two layers of each of three attentions, and a classifier
    assert sum(".lora_" in name for name in weights) == 12 and len(weights) == 14
    assert weights["base_model.model.classifier.weight"].shape == (10, 64)


def test_peft_and_apply_dropkey_find_the_settings(adapter: Path) -> None:
    base = load_classifier(adapter).get_base_model()
    plain = hf.Dinov2ForImageClassification(hf.Dinov2Config.from_pretrained(adapter.parent / "source", num_labels=10))
    fresh = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["fc1"]))
    assert forgotten_ratio(fresh) is None
    # as PEFT reads it, on a model whose own configuration knows nothing
    for name in [name for name in vars(base.config) if name.startswith("dropkey_")]:
        delattr(base.config, name)
    loaded = peft.PeftModel.from_pretrained(base, str(adapter), adapter_name="again")
    assert forgotten_ratio(loaded) == 0.5
    report = apply_dropkey(loaded)
    assert [site.ratio for site in report.sites] == [0.5] * 3 and forgotten_ratio(loaded) is None
    assert {drop.ratio for drop in drop_schedule(base)} == {0.5}


@pytest.mark.parametrize("name", ["vit", "siglip", "swin", "clip vision", "beit"])
def test_adapters_of_other_models_are_loaded_as_they_were_trained(name: str, tmp_path: Path) -> None:
    run = train(saved(name, tmp_path / "source"), tmp_path / "run", "--image_size", "32")
    measured = json.loads((run / "eval_results.json").read_text())
    model = load_classifier(run)
    training = job(tmp_path / "source", tmp_path / "other")
    training.check()
    data = training.load()
    training.trainer(training.make_model(data), data)
    rows = [data.evaluation[place] for place in range(len(data.evaluation))]
    with torch.no_grad():
        loss = model(
            pixel_values=torch.stack([row["pixel_values"] for row in rows]),
            labels=torch.tensor([row["labels"] for row in rows]),
        ).loss
    assert abs(float(loss) - measured["eval_loss"]) < 1e-4


def test_a_native_vit_and_other_image_sizes_take_adapters_too(tmp_path: Path) -> None:
    words = words_of(saved("vit", tmp_path / "source"), tmp_path / "run", *LORA, "--image_size", "48")
    ClassificationJob.parse([word for word in words if word != "--dropkey_patch"]).execute(["python", "train.py"])
    model = load_classifier(tmp_path / "run")
    assert type(model.get_base_model()).__name__ == "DropKeyViTForImageClassification"
    with torch.no_grad():
        assert model(pixel_values=torch.randn(1, 3, 48, 48)).logits.shape == (1, 10)
    assert {drop.ratio for drop in drop_schedule(model.get_base_model())} == {0.5}


def test_a_run_with_adapters_resumes_to_the_same_bits(adapter: Path, tmp_path: Path) -> None:
    source = adapter.parent / "source"
    shutil.copytree(adapter / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    train(source, tmp_path / "run", "--resume_from_checkpoint", "true")
    whole, resumed = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "run"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--lora_r", "8"), "another model: lora_alpha 4 there and 8 here; r 4 there and 8 here"),
        (("--lora_target_modules", "fc1"), r"target_modules \['.*', '.*'\] there and \['fc1'\] here"),
        (("--dropkey_ratio", "0.1", "--dropkey_schedule", "constant"), "dropkey_ratio 0.5 there and 0.1 here"),
    ],
)
def test_another_adapter_does_not_go_on(adapter: Path, tmp_path: Path, words: tuple[str, ...], match: str) -> None:
    shutil.copytree(adapter / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    with pytest.raises(ValueError, match=match):
        train(adapter.parent / "source", tmp_path / "run", *words, "--resume_from_checkpoint", "true")


def test_whole_training_does_not_go_on_from_adapters(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    with pytest.raises(ValueError, match="trained adapters, and this one trains all weights; pass its --lora_r"):
        job(adapter.parent / "source", tmp_path / "run", "--resume_from_checkpoint", "true").execute(["train"])
    with pytest.raises(ValueError, match="is an adapter of .*source, not a whole model; .*--merge_adapter"):
        job(adapter, tmp_path / "more").execute(["train"])


def test_a_merged_adapter_is_a_plain_model(adapter: Path, tmp_path: Path) -> None:
    run = train(adapter.parent / "source", tmp_path / "run", "--merge_adapter")
    assert (run / "config.json").is_file() and not (run / "adapter_config.json").exists()
    assert (run / "checkpoint-2" / "adapter_model.safetensors").is_file()
    plain, adapted = AutoModelForImageClassification.from_pretrained(run).eval(), load_classifier(adapter)
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(plain(pixel_values=images).logits, adapted(pixel_values=images).logits)
    assert {site.ratio for site in apply_dropkey(plain).sites} == {0.5}
    results = [json.loads((folder / "eval_results.json").read_text())["eval_nll"] for folder in (run, adapter)]
    assert abs(results[0] - results[1]) < 1e-5


def test_cards_reports_and_pushes_understand_adapters(adapter: Path, tmp_path: Path) -> None:
    card = (adapter / "README.md").read_text()
    assert "A LORA adapter of rank 4 for `Dinov2ForImageClassification`" in card
    assert "library_name: peft" in card and "load_classifier(" in card and "More Information Needed" not in card
    assert "0.5" in inspect_folder(adapter) and "dinov2.encoder.layer.2.attention" in inspect_folder(adapter)
    folder = shutil.copytree(adapter, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))
    sent = {file.name for file in plan_push(folder).files}
    assert {"adapter_config.json", "adapter_model.safetensors", "base_config.json", "README.md"} <= sent
    assert "training_args.bin" not in sent
    (folder / "README.md").unlink()
    assert "adapter of rank 4" in write_card(folder).read_text()


def test_a_check_names_the_base_model_that_it_has_not_seen(adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))
    report = check_release(folder)
    assert not report.trusted
    (line,) = [problem for problem in report.problems if "this is an adapter of" in problem]
    assert "source, which is loaded with it and was not checked: check that too" in line
    assert not any("base_config.json" in problem or "not a saved model" in problem for problem in report.problems)
    (folder / "adapter_model.safetensors").unlink()
    assert any("adapter_model.safetensors is not there" in problem for problem in check_release(folder).problems)


def test_an_adapter_is_exported_once_it_is_merged(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is an adapter of .*source and has no whole weights; .* load_classifier"):
        export_plain(adapter, tmp_path / "out")
    plain = export_plain(load_classifier(adapter).merge_and_unload(), tmp_path / "out")
    assert type(plain) is hf.Dinov2ForImageClassification and not hasattr(plain.config, "dropkey_ratio")


def test_an_adapter_that_lacks_something_is_an_error_that_says_so(adapter: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(adapter, tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-*")))

    folder = broken("weights")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks adapter_model\.safetensors"):
        load_classifier(folder)
    folder = broken("base")
    (folder / "base_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no base_config\.json with its classes"):
        load_classifier(folder)
    folder = broken("moved")
    settings: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/not/there/now"}))
    with pytest.raises(FileNotFoundError, match="is for the model /not/there/now, which is not there"):
        load_classifier(folder)
    assert load_classifier(folder, base=adapter.parent / "source").active_adapter == "default"
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="has base_model_name_or_path None; write there"):
        load_classifier(folder)


def test_an_adapter_is_evaluated_and_predicts_from_the_command_line(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / "a.png")
    words = ["--model_name_or_path", str(adapter)]
    out = ["--output_file", str(tmp_path / "out.json")]
    evaluation.main([*words, "--use_cpu", "--max_eval_samples", "16", *out])
    trained = json.loads((adapter / "eval_results.json").read_text())
    assert json.loads((tmp_path / "out.json").read_text())["nll"] == pytest.approx(trained["eval_nll"], abs=1e-4)
    prediction.predict(prediction.PredictionArguments(str(adapter), [str(tmp_path / "a.png")], output_file=out[1]))
    (found,) = json.loads((tmp_path / "out.json").read_text())
    assert found["label"] in map(str, range(10)) and "PeftModel" in capsys.readouterr().out
    page = (adapter / "report.html").read_text()
    assert "Measured on" in page


def test_the_attention_of_an_adapter_is_drawn(adapter: Path, tmp_path: Path) -> None:
    words = ["--model_name_or_path", str(adapter), "--output_dir", str(tmp_path / "seen"), "--use_cpu"]
    look.main([*words, "--max_eval_samples", "12", "--samples", "3", "--passes", "4", "--images_shown", "1"])
    summary = json.loads((tmp_path / "seen" / "summary.json").read_text())
    assert summary["model"] == "run" and summary["class"] == "Dinov2ForImageClassification"
    assert summary["missing"] == {}
    figures = {"statistics.png", "attention_maps.png", "attention_heads.png", "drops.png", "uncertainty.png"}
    assert set(summary["files"]) == figures | {"numbers.csv", "images.csv"}
    with (tmp_path / "seen" / "numbers.csv").open(newline="") as opened:
        numbers = list(csv.DictReader(opened))
    configured = [float(row["value"]) for row in numbers if row["metric"] == "drop ratio configured"]
    assert configured == [0.5] * 3
    measured = [float(row["value"]) for row in numbers if row["metric"] == "fraction dropped"]
    assert measured == pytest.approx(configured, abs=0.05)
    with (tmp_path / "seen" / "images.csv").open(newline="") as opened:
        predicted = [row["predicted"] for row in csv.DictReader(opened)]
    assert len(predicted) == 12 and set(predicted) <= set(map(str, range(10)))


def test_the_weights_of_the_adapter_act_in_what_is_drawn(adapter: Path, tmp_path: Path) -> None:
    arguments = look.LookArguments(model_name_or_path=str(adapter), output_dir=str(tmp_path), use_cpu=True)
    drawn, loaded, images = look.load_model(arguments), load_classifier(adapter), torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        found, expected = drawn(pixel_values=images).logits, loaded(pixel_values=images).logits
        torch.testing.assert_close(found, expected)
        with loaded.disable_adapter():
            assert not torch.equal(loaded(pixel_values=images).logits, expected)
