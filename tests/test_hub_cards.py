"""Cards hold what the files of a run say, keep hand-written text, and read back as the Hub reads them."""

import inspect
import json
from pathlib import Path

import pytest
from hub_server import metadata_errors, serving
from huggingface_hub import ModelCard, RepoCard

from hf_dropkey import DropKeyViTConfig
from hf_dropkey.hub.cards import RunFacts, hand_written, measured, model_card, shown_command, write_card


RESULTS = {"epoch": 2.0, "eval_accuracy": 0.875, "eval_ece": 0.03, "eval_loss": 0.5, "eval_runtime": 1.5}
STATE = {
    "epoch": 2.0,
    "global_step": 12,
    "log_history": [{"step": 6, "eval_accuracy": 0.25}, {"step": 12, "loss": 1.0}, {"step": 12, "eval_accuracy": 0.5}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run leaves, but for the weights, which no card looks at."""
    path = tmp_path / "my-model"
    config = DropKeyViTConfig(dropkey_ratio=0.3, id2label={0: "cat", 1: "dog"}, image_size=32, patch_size=8)
    config.architectures = ["DropKeyViTForImageClassification"]
    config.save_pretrained(path)
    (path / "preprocessor_config.json").write_text("{}")
    (path / "eval_results.json").write_text(json.dumps(RESULTS))
    (path / "all_results.json").write_text(json.dumps({**RESULTS, "train_loss": 0.9, "parameters": 1234}))
    (path / "trainer_state.json").write_text(json.dumps(STATE))
    RunFacts(
        dataset="Cats",
        dataset_id="somebody/cats",
        dataset_split="test",
        base_model="google/vit-base-patch16-224",
        license="apache-2.0",
        command="python train.py --seed 1",
        hyperparameters={"learning_rate": 0.002},
    ).save(path)
    return path


def test_the_metadata_reads_back(folder):
    card = ModelCard(str(model_card(folder, repo_id="me/my-model")))
    data = card.data
    assert (data.license, data.base_model, data.datasets) == (
        "apache-2.0",
        "google/vit-base-patch16-224",
        ["somebody/cats"],
    )
    assert (data.library_name, data.pipeline_tag, data.metrics) == (
        "transformers",
        "image-classification",
        ["accuracy"],
    )
    assert data.tags == ["dropkey", "dropkey_vit", "image-classification"] and data.model_name == "my-model"
    found = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == {"accuracy": 0.875, "ece": 0.03}
    one = found["accuracy"]
    assert (one.task_type, one.dataset_type, one.dataset_name, one.dataset_split) == (
        "image-classification",
        "somebody/cats",
        "Cats",
        "test",
    )
    assert str(card) == str(ModelCard(str(card))) and metadata_errors(str(card)) == []


def test_the_text_says_how_to_use_it_and_what_was_measured(folder):
    text = model_card(folder, repo_id="me/my-model", revision="0123abc").text
    assert '.from_pretrained("me/my-model", revision="0123abc", trust_remote_code=True)' in text
    assert "import hf_dropkey\nfrom transformers import AutoModelForImageClassification" in text
    assert 'pipeline("image-classification", model="me/my-model", revision="0123abc", trust_remote_code=True)' in text
    for row in ("| largest drop ratio of a layer | 0.3 |", "| accuracy | 0.875 |", "| learning_rate | 0.002 |"):
        assert row in text
    assert "| steps | 12 |" in text and "| parameters | 1234 |" in text and "python train.py --seed 1" in text
    assert "2 classes: cat, dog" in text and "Images of 32 x 32 pixels" in text
    assert "a fine-tuned version of [google/vit-base-patch16-224](https:" in text and "on the Cats dataset" in text
    assert "@inproceedings{li2023dropkey" in text


def test_numbers_come_from_files_or_not_at_all(folder):
    assert measured(folder) == {"accuracy": 0.875, "ece": 0.03, "loss": 0.5}
    (folder / "eval_results.json").unlink()
    assert measured(folder)["accuracy"] == 0.875
    (folder / "all_results.json").unlink()
    # of the saved step, not of an earlier one
    assert measured(folder) == {"accuracy": 0.5}
    (folder / "trainer_state.json").write_text(json.dumps({**STATE, "global_step": 14}))
    assert measured(folder) == {}
    card = model_card(folder)
    assert "Nothing was measured on these weights." in card.text and "model-index" not in str(card)
    (folder / "trainer_state.json").unlink()
    (folder / "run_facts.json").unlink()
    card = model_card(folder)
    assert "No file of the run records how it was trained." in card.text
    assert card.data.license is None and card.data.base_model is None and card.data.datasets is None


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_hand_written_text_survives_twice(folder, line_end):
    write_card(folder, repo_id="me/my-model")
    made = (folder / "README.md").read_bytes().decode()
    edited = made.replace("# my-model\n", "# A better title\n\nMy words.\n").replace(
        "<!-- hf_dropkey:limits begin", "Words in between.\n\n<!-- hf_dropkey:limits begin"
    )
    edited = edited.replace("| accuracy | 0.875 |", "| accuracy | 1.0 |")
    edited = edited.replace("---\n", "---\nmy_key:\n- 1\nlanguage: de\n", 1) + "\nLast words.\n"
    edited = edited.replace("\n", line_end)
    (folder / "README.md").write_bytes(edited.encode())
    RunFacts(tags=["new"]).save(folder)
    for _ in range(2):
        write_card(folder, repo_id="me/my-model")
        card = (folder / "README.md").read_bytes().decode()
        assert hand_written(card) == hand_written(edited)
        assert (line_end == "\r\n") == ("\r\n" in card) and card.count("\n") == card.count(line_end)
        data = ModelCard(card).data
        # the licence and the origin are no longer among the facts, and stay
        assert (data["my_key"], data.language, data.license) == ([1], "de", "apache-2.0")
        assert data.base_model == "google/vit-base-patch16-224" and data.tags[-1] == "new"
        assert "| accuracy | 0.875 |" in card and "| accuracy | 1.0 |" not in card
        before, made = made, card
    assert before == made


def test_results_on_other_data_stay(folder):
    write_card(folder)
    card = ModelCard.load(folder / "README.md")
    other = json.loads(json.dumps(card.data.to_dict()["model-index"]))
    other[0]["results"][0]["dataset"] = {"name": "Dogs", "type": "somebody/dogs"}
    text = f"---\n{json.dumps({'model-index': other})}\n---\n# x\n"
    merged = model_card(folder, existing=text).data
    assert {result.dataset_name for result in merged.eval_results} == {"Cats", "Dogs"}
    assert len(merged.eval_results) == 4


def test_a_plain_checkpoint_needs_no_trust(folder):
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if name != "auto_map"} | {"model_type": "vit"}
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["ViTForImageClassification"]}))
    card = model_card(folder, repo_id="me/x")
    assert "trust_remote_code" not in card.text and "apply_dropkey(model)" in card.text
    # the Hub's widget runs it, on images of the Hub's documentation
    titles = [one["example_title"] for one in card.data.to_dict()["widget"]]
    assert titles == ["Tiger", "Teapot"] and card.data.to_dict()["base_model_relation"] == "finetune"
    assert metadata_errors(str(card)) == []
    detector = json.loads((folder / "config.json").read_text()) | {"architectures": ["DetrForObjectDetection"]}
    (folder / "config.json").write_text(json.dumps(detector))
    widget = model_card(folder, repo_id="me/x").data.to_dict()["widget"]
    assert [one["src"].rpartition("/")[2] for one in widget] == ["savanna.jpg", "football-match.jpg"]
    # one's own images stay
    (folder / "README.md").write_text("---\nwidget:\n- src: mine.png\n---\n")
    assert model_card(folder, repo_id="me/x").data.to_dict()["widget"] == [{"src": "mine.png"}]


def test_a_checkpoint_with_code_has_no_widget(folder):
    # the Hub runs no code of a repository for it
    data = model_card(folder, repo_id="me/x").data.to_dict()
    assert "widget" not in data and data["base_model_relation"] == "finetune"
    RunFacts(dataset="Cats").save(folder)
    assert "base_model_relation" not in model_card(folder, repo_id="me/x").data.to_dict()


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("---\n- a list\n---\n", "cannot be read"),
        ("---\na: [1\n---\n", "cannot be read"),
        ("---\nmodel-index:\n- name: x\n---\n", "cannot be read"),
        ("# x\n<!-- hf_dropkey:usage begin -->\n", "section 'usage' has lost one of its two markers"),
        ("# x\n<!-- hf_dropkey:usage end -->\n", "section 'usage' has lost one of its two markers"),
    ],
)
def test_a_card_that_cannot_be_understood_is_not_touched(folder, card, message):
    (folder / "README.md").write_text(card)
    with pytest.raises(ValueError, match=message):
        write_card(folder)
    assert (folder / "README.md").read_text() == card


def test_where_training_started_is_said_only_if_it_is_known(folder):
    for facts, said in [
        (RunFacts(from_scratch=True, dataset="Cats"), ", trained from scratch on the Cats dataset, with DropKey"),
        (RunFacts(dataset="Cats"), ", trained on the Cats dataset, with DropKey"),
        (RunFacts(base_model="mine"), ", a fine-tuned version of `mine`, with DropKey"),
        (RunFacts(), "`DropKeyViTForImageClassification`, with DropKey"),
    ]:
        facts.save(folder)
        card = model_card(folder)
        assert said in card.text and card.data.base_model is None


def test_a_run_without_dropkey_does_not_claim_it(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"dropkey_ratio": 0}))
    assert ", without DropKey (ratio 0)." in model_card(folder).text
    file.write_text(json.dumps({name: value for name, value in config.items() if not name.startswith("dropkey_")}))
    text = model_card(folder).text
    assert "random keys are taken out" not in text and "The configuration holds no DropKey settings." in text


def test_a_command_shows_no_paths_of_a_machine(tmp_path):
    words = ["train.py", "--a", str(tmp_path / "x y"), f"--b={tmp_path}/z", "--c=1", "relative/path"]
    assert shown_command(words) == "train.py --a 'x y' --b=z --c=1 relative/path"


def test_bad_files_are_reported(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone has no config.json"):
        write_card(tmp_path / "gone")
    (folder / "run_facts.json").write_text('{"licence": "mit"}')
    with pytest.raises(ValueError, match=r"unknown fields \['licence'\]; allowed are .*license"):
        write_card(folder)
    (folder / "run_facts.json").write_text("{")
    with pytest.raises(ValueError, match=r"run_facts\.json is not JSON"):
        write_card(folder)


@pytest.mark.skipif(
    "https://huggingface.co/api" in inspect.getsource(RepoCard.validate),
    reason="this release of huggingface_hub asks huggingface.co, whatever HF_ENDPOINT says",
)
def test_the_hubs_own_validation_takes_the_card(folder, tmp_path):
    write_card(folder, repo_id="me/my-model")
    code = """
import sys
from huggingface_hub import ModelCard, RepoCard
card = ModelCard.load(sys.argv[1])
card.validate()
card.data.pipeline_tag = ["not", "a", "string"]
try:
    card.validate()
except ValueError as error:
    print(error)
"""
    with serving() as hub:
        done = hub.run(code, tmp_path, str(folder / "README.md"), package=False)
    assert "pipeline_tag" in done.stdout and "must be a string" in done.stdout
    assert hub.requests == ["POST /api/validate-yaml"] * 2


def test_what_was_measured_on_is_named_where_it_is_other_data(tmp_path):
    config = DropKeyViTConfig()
    config.architectures = ["DropKeyViTForImageClassification"]
    config.save_pretrained(tmp_path)
    (tmp_path / "eval_results.json").write_text('{"eval_map": 0.25}')
    RunFacts(dataset="instances_train", evaluation_dataset="instances_val").save(tmp_path)
    card = ModelCard(str(model_card(tmp_path)))
    assert "trained on the instances_train dataset" in card.text and "measured on instances_val:" in card.text
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_type) == ("instances_val", "instances_val")


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({}, "Images of 32 x 32 pixels."),
        ({"size": {"height": 48, "width": 64}}, "Images of 48 x 64 pixels."),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 96, "width": 96}},
            "of 96 x 96",
        ),
        (
            {"size": {"shortest_edge": 800, "longest_edge": 1333}},
            "shorter side has 800 pixels, the longer at most 1333.",
        ),
        ({"size": {"height": 48, "width": 48}, "do_resize": False}, "Images of 32 x 32 pixels."),
        ({"size": 40}, "Images of 40 x 40 pixels."),
    ],
)
def test_the_image_size_is_the_processors(folder, processor, message):
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    assert message in model_card(folder).text


def test_a_local_path_of_the_base_model_is_cut(folder):
    RunFacts(base_model="/data/me/runs/base").save(folder)
    assert "a fine-tuned version of `base`" in model_card(folder).text
