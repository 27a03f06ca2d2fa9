"""`HubTrainer` follows every `hub_strategy` against a server that speaks the Hub's API; one process does all runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from hub_server import ROOT, TOKEN, HubServer, serving
from huggingface_hub import ModelCard
from small_runs import SHAPE
from transformers import Trainer, TrainingArguments

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.hub.cards import RunFacts, hand_written
from hf_dropkey.hub.trainer import HubTrainer


NEEDED = {"config.json", "model.safetensors", "modeling_dropkey_vit.py", "dropkey.py", "README.md"}
RUNS = """
import json, sys, torch, urllib.request
from pathlib import Path
from huggingface_hub import HfApi
from transformers import TrainingArguments
from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey import HubTrainer

shape, token, seen, api = json.loads(sys.argv[1]), sys.argv[2], {}, HfApi()
data = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 3} for i in range(8)]

def trainer(name, **settings):
    torch.manual_seed(0)
    settings = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, **settings}
    arguments = TrainingArguments(
        output_dir=f"out/{name}", push_to_hub=True, hub_token=token, per_device_train_batch_size=2, report_to="none",
        use_cpu=True, disable_tqdm=True, hub_always_push=True, **settings,
    )
    model = DropKeyViTForImageClassification(DropKeyViTConfig(**shape))
    return HubTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=data,
                      compute_metrics=lambda found: {"accuracy": 0.5})

for strategy in ("every_save", "end", "checkpoint", "all_checkpoints"):
    # the checkpoint of step 2 is deleted while it is on its way
    run = trainer(strategy, hub_strategy=strategy, save_total_limit=1)
    run.train()
    run.save_metrics("eval", run.evaluate())
    done = run.push_to_hub(dataset="noise", dataset_split="test", license="mit", command="python train.py")
    seen[strategy] = {"commit": done.oid, "names": sorted(path.name for path in Path("out", strategy).iterdir())}

def fail(method, path, times):
    failure = {"method": method, "path": path, "status": 507, "times": times}
    urllib.request.urlopen(api.endpoint + "/-/fail", json.dumps(failure).encode()).close()

run = trainer("unlucky")
fail("POST", "/commit/", 2)
run.train()
run._finish_current_push()
seen["after failures"] = len(api.list_repo_files("tester/unlucky"))
fail("POST", "/commit/", 1)
try:
    run.push_to_hub()
except ConnectionError as error:
    seen["last failed"] = str(error)
seen["future"] = run.push_to_hub(blocking=False).result().oid

run = trainer("branch", hub_strategy="end", hub_revision="trial", hub_private_repo=True, hub_model_id="tester/other")
run.train()
# as a user calls it, which pushes
run.save_model()
try:
    trainer("x", hub_model_id="some--name")
except ValueError as error:
    seen["name"] = str(error)
try:
    trainer("x", hub_model_id="somebody/x")
except PermissionError as error:
    seen["owner"] = str(error)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    done = hub.run(RUNS, folder, json.dumps({**SHAPE, "num_labels": 3}), TOKEN)
    return json.loads(done.stdout.splitlines()[-1]) | {"errors": done.stderr, "folder": folder}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "titles", "copies"),
    [
        ("every_save", ["step 2", "step 4"], set()),
        ("end", [], set()),
        ("checkpoint", ["step 2", "step 4"], {"last-checkpoint"}),
        ("all_checkpoints", ["step 2", "step 4"], {"checkpoint-2", "checkpoint-4"}),
    ],
)
def test_every_push_of_every_strategy_is_whole(hub, seen, strategy, titles, copies):
    commits = hub.repositories[f"tester/{strategy}"].branches["main"][1:]
    in_training = [f"Training in progress, {title}" for title in titles]
    assert [commit.message for commit in commits] == [*in_training, "End of training"]
    assert all(set(commit.files) >= NEEDED for commit in commits)
    assert commits[-1].sha == seen[strategy]["commit"]
    assert {name.split("/")[0] for name in commits[-1].files if "/" in name} == copies
    for copy in copies:
        names = {name.removeprefix(f"{copy}/") for name in commits[-1].files if name.startswith(f"{copy}/")}
        assert names >= NEEDED - {"README.md"} | {"trainer_state.json"}
    if titles:
        first, second = (commit.files["model.safetensors"].oid for commit in commits[:2])
        assert first != second
        card = commits[1].files["README.md"].content.decode()
        assert "| learning_rate | 5e-05 |" in card and "| steps | 4 |" in card and "| accuracy | 0.5 |" in card


@pytest.mark.slow
def test_nothing_that_must_stay_at_home_is_ever_sent(hub, seen):
    """The run's own folders hold it, so this could fail."""
    at_home = list(Path(seen["folder"], "out").glob("*/training_args.bin"))
    assert len(at_home) >= 5 and all(TOKEN.encode() in file.read_bytes() for file in at_home)
    assert list(Path(seen["folder"], "out").glob("*/checkpoint-4/optimizer.pt"))
    commits = [commit for repository in hub.repositories.values() for commit in repository.commits.values()]
    names = {name for commit in commits for name in commit.files}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    contents = [file.content for commit in commits for file in commit.files.values()] + list(hub.objects.values())
    assert not any(TOKEN.encode() in content for content in contents)


@pytest.mark.slow
def test_nothing_is_left_lying_about(seen):
    for strategy in ("every_save", "checkpoint", "all_checkpoints"):
        assert not [name for name in seen[strategy]["names"] if name.startswith("_push-")]
        assert "checkpoint-2" not in seen[strategy]["names"]


@pytest.mark.slow
def test_the_last_card_has_the_results_of_the_run(hub, seen):
    card = ModelCard(hub.files("tester/end")["README.md"].decode())
    (result,) = [found for found in card.data.eval_results if found.metric_type == "accuracy"]
    assert (result.metric_value, result.dataset_name, result.dataset_split) == (0.5, "noise", "test")
    assert card.data.license == "mit" and card.data.pipeline_tag == "image-classification"
    assert "python train.py" in card.text and "| max_steps | 4 |" in card.text


@pytest.mark.slow
def test_failed_pushes_do_not_stop_training_but_the_last_one_tells(hub, seen):
    assert seen["after failures"] == 1
    assert "the push of step 2 failed; training continues" in seen["errors"]
    assert "was not pushed: the Hub answered 507" in seen["last failed"]
    assert set(hub.files("tester/unlucky", seen["future"])) >= NEEDED
    assert hub.messages("tester/unlucky") == ["initial commit", "End of training"]


@pytest.mark.slow
def test_branch_private_name_and_owner(hub, seen):
    assert hub.repositories["tester/other"].private
    assert hub.messages("tester/other", "trial") == ["initial commit", "Model save"]
    assert hub.messages("tester/other") == ["initial commit"]
    assert "Cannot have -- or .." in seen["name"]
    assert "the token may not write to somebody/x" in seen["owner"]


@pytest.mark.slow
def test_the_training_script_pushes_and_says_first_what_is_wrong(tmp_path):
    code = """
    import runpy, sys
    command = sys.argv[1:]
    for extra in (["--hub_strategy", "sometimes"], ["--hub_model_id", "a--b"], []):
        sys.argv = ["train_image_classification.py", *command, *extra]
        try:
            runpy.run_path(SCRIPT, run_name="__main__")
        except (SystemExit, ValueError) as error:
            print(type(error).__name__, error)
    """.replace("SCRIPT", repr(str(ROOT / "scripts" / "train_image_classification.py")))
    command = "--do_train --do_eval --use_cpu --push_to_hub --output_dir digits --max_steps 2 --save_steps 1"
    command += " --max_train_samples 16 --max_eval_samples 8 --report_to none --disable_tqdm True --hub_always_push"
    with serving() as hub:
        done = hub.run(code, tmp_path, *command.split(), HF_DATASETS_CACHE=str(tmp_path / "cache"))
        titles = hub.messages("tester/digits")
        commits = hub.repositories["tester/digits"].branches["main"][1:]
    # a mistake of the command line is an error of the job
    assert "ValueError argument --hub_strategy" in done.stdout and "'sometimes'" in done.stdout
    assert "HFValidationError Cannot have -- or .." in done.stdout
    assert titles[1:] == [
        "Training in progress, step 1",
        "Training in progress, step 2",
        "Model save",
        "End of training",
    ]
    wanted = NEEDED | {"preprocessor_config.json"}
    assert all(set(commit.files) >= wanted and "training_args.bin" not in commit.files for commit in commits)
    card = ModelCard(commits[-1].files["README.md"].content.decode())
    assert {"accuracy", "ece"} <= {result.metric_type for result in card.data.eval_results}
    assert (
        "trained from scratch on the digits dataset" in card.text and "--output_dir digits --max_steps 2" in card.text
    )


# --- without a server ------------------------------------------------------------------------------------------------


def offline_trainer(folder: Path, **settings: Any) -> HubTrainer:
    model = DropKeyViTForImageClassification(DropKeyViTConfig(**SHAPE))
    return HubTrainer(model=model, args=TrainingArguments(str(folder), use_cpu=True, report_to="none", **settings))


def test_an_unknown_strategy_is_reported(tmp_path):
    with pytest.raises(ValueError, match="sometimes is not a valid HubStrategy.*every_save"):
        TrainingArguments(str(tmp_path), hub_strategy="sometimes")


def test_a_missing_token_is_reported_before_training(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PermissionError, match="there is no token for the Hub"):
        offline_trainer(tmp_path, push_to_hub=True)


def test_a_card_is_written_and_written_again(tmp_path):
    trainer = offline_trainer(tmp_path, learning_rate=0.25)
    trainer.save_model()
    trainer.create_model_card(dataset="digits", finetuned_from="google/vit-base-patch16-224", tags="small")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "google/vit-base-patch16-224" and "small" in card.data.tags
    (tmp_path / "README.md").write_text(f"{card}\nMine.\n")
    trainer.create_model_card(license="mit")
    again = ModelCard.load(tmp_path / "README.md")
    assert hand_written(str(again)).endswith("Mine.") and again.data.license == "mit"
    facts = RunFacts.load(tmp_path)
    assert (facts.dataset, facts.license, facts.hyperparameters["learning_rate"]) == ("digits", "mit", 0.25)


def test_remains_of_a_killed_push_are_removed(tmp_path, monkeypatch):
    (tmp_path / "_push-old").mkdir()
    trainer = offline_trainer(tmp_path)
    monkeypatch.setattr("hf_dropkey.hub.trainer.prepare_repository", lambda name, **settings: f"me/{name}")
    trainer.init_hf_repo()
    assert not (tmp_path / "_push-old").exists() and trainer.hub_model_id == f"me/{tmp_path.name}"


def test_what_is_replaced_is_what_trainer_calls():
    """`Trainer` must go on calling the methods that `HubTrainer` replaces, or stock pushes come back."""
    code = Trainer._save_checkpoint.__code__.co_names + Trainer.save_model.__code__.co_names
    assert {"_push_from_checkpoint", "push_to_hub"} <= set(code)
    senders = [
        name
        for name, value in vars(Trainer).items()
        if "upload_folder" in getattr(getattr(value, "__code__", None), "co_names", ())
    ]
    assert set(senders) == {"_push_from_checkpoint", "push_to_hub"} and set(senders) <= set(vars(HubTrainer))
