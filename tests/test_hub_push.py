"""Pushes of saved folders and models, against a server that speaks the Hub's API.

One process does all pushes and prints what it saw; the tests look at that and at what the server holds.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from small_runs import SHAPE
from transformers.dynamic_module_utils import get_relative_import_files

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.classification.families import FAMILIES
from hf_dropkey.hub.push import check_target, hand_written, push_folder
from hf_dropkey.hub.push_plan import files_to_push, plan_push


MODELING = DropKeyViTConfig().modeling_file()
CODE = {Path(file).name for file in (MODELING, *get_relative_import_files(MODELING))}
# in two parts, as no file of this project may name a folder of a machine
HOME = "/" + "home/me"
HAND_WRITTEN = """---
license: cc-by-4.0
my_key: my value
tags:
- mine
---

# My model

I wrote this.

<!-- hf_dropkey:usage begin -->
out of date
<!-- hf_dropkey:usage end -->

And this below.
"""
PUSHES = """
import json, sys, torch, urllib.request
from pathlib import Path
from huggingface_hub import HfApi
from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.hub import push as hub
from hf_dropkey import push_folder

shape, readme = json.loads(sys.argv[1]), sys.argv[2]
api, seen = HfApi(), {}

def step(name, *arguments, **keywords):
    try:
        done = push_folder(*arguments, **keywords)
        seen[name] = {"changed": done.changed, "commit": done.commit, "files": done.files, "left_out": done.left_out}
    except Exception as error:
        seen[name] = {"error": type(error).__name__, "message": str(error)}

def fail(method, path, status):
    failure = {"method": method, "path": path, "status": status, "times": 1}
    urllib.request.urlopen(api.endpoint + "/-/fail", json.dumps(failure).encode()).close()

def change():
    with torch.no_grad():
        model.classifier.bias.add_(1)
    model.save_pretrained("m")

model = DropKeyViTForImageClassification(DropKeyViTConfig(**shape))
model.save_pretrained("m")
for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "train.py",
             "checkpoint-4/model.safetensors", "runs/events.json", ".secret/a.txt"):
    file = Path("m", name)
    file.parent.mkdir(exist_ok=True)
    file.write_text("not for the hub")
step("create", "m", "one")
step("again", "m", "tester/one")
api.upload_file(repo_id="tester/one", path_in_repo="README.md", path_or_fileobj=readme.encode())
step("edited", "m", "tester/one")
step("edited again", "m", "tester/one")
seen["before failure"] = api.model_info("tester/one").sha
change()
fail("PUT", "/lfs/", 507)
step("failed upload", "m", "tester/one")
seen["after failure"] = api.model_info("tester/one").sha
step("retry", "m", "tester/one")
change()
fail("POST", "/commit/", 500)
step("failed commit", "m", "tester/one")
look = hub.remote_readme
def look_and_be_overtaken(*arguments):
    found = look(*arguments)
    api.upload_file(repo_id="tester/one", path_in_repo="README.md", path_or_fileobj=readme.encode() + b"Overtaken.")
    return found
hub.remote_readme = look_and_be_overtaken
step("raced", "m", "tester/one")
hub.remote_readme = look
step("after the race", "m", "tester/one")
change()
step("branch", "m", "tester/one", revision="trial")
step("private", "m", "tester/hidden", private=True)
step("private, but there", "m", "tester/one", private=True)
step("wrong token", "m", "tester/one", token="hf_wrong")
step("no token", "m", "tester/one", token=False)
step("other owner", "m", "somebody/one")
model.save_pretrained("shards", max_shard_size="5KB")
step("shards", "shards", "tester/one", copy_under="copy")
Path("m", "README.md").write_text("# Mine\\n\\nLocal words.\\n\\nMore of them.\\n")
step("conflict", "m", "tester/one", revision="trial")
step("replaced", "m", "tester/one", revision="trial", replace_readme=True)
model.push_to_hub("tester/direct")
api.upload_file(repo_id="tester/direct", path_in_repo="README.md", path_or_fileobj=readme.encode())
change()
model.push_to_hub("tester/direct")
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def seen(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each push returned or raised."""
    folder = tmp_path_factory.mktemp("pushes")
    done = hub.run(PUSHES, folder, json.dumps({**SHAPE, "num_labels": 3}), HAND_WRITTEN)
    return json.loads(done.stdout.splitlines()[-1]) | {"errors": done.stderr, "folder": str(folder)}


def test_a_first_push_makes_the_repository_in_one_commit(hub, seen):
    assert seen["create"]["changed"]
    first = hub.repositories["tester/one"].at(seen["create"]["commit"])
    assert set(first.files) == CODE | {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert first.message == "Upload model" and not hub.repositories["tester/one"].private
    saved = Path(seen["folder"], "m", "dropkey.py").read_bytes()
    assert first.files["dropkey.py"].content == saved


def test_what_does_not_belong_stays_at_home(hub, seen):
    left = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "train.py"}
    left |= {"checkpoint-4/model.safetensors", "runs/events.json", ".secret/a.txt"}
    assert set(seen["create"]["left_out"]) == left
    contents = [
        file.content for repo in hub.repositories.values() for c in repo.commits.values() for file in c.files.values()
    ]
    assert contents and not any(b"not for the hub" in content or TOKEN.encode() in content for content in contents)
    assert b"not for the hub" not in b"".join(hub.objects.values())


def test_a_push_without_changes_makes_no_commit(seen):
    assert not seen["again"]["changed"] and seen["again"]["commit"] == seen["create"]["commit"]
    assert seen["edited"]["changed"] and not seen["edited again"]["changed"]


def test_a_card_keeps_hand_written_text(hub, seen):
    card = hub.repositories["tester/one"].at(seen["edited"]["commit"]).files["README.md"].content.decode()
    data = ModelCard(card).data
    assert (data.license, data["my_key"], data.library_name) == ("cc-by-4.0", "my value", "transformers")
    assert data.tags[0] == "mine" and "dropkey" in data.tags
    assert hand_written(card) == hand_written(HAND_WRITTEN)
    assert "out of date" not in card and 'from_pretrained("tester/one", revision="COMMIT"' in card
    assert card.index("I wrote this.") < card.index("hf_dropkey:usage begin") < card.index("And this below.")


def test_a_failure_in_the_middle_leaves_what_was_there(hub, seen):
    error = seen["failed upload"]
    assert error["error"] == "ConnectionError" and "m was not pushed" in error["message"]
    assert "507" in error["message"] and "the repository has all of it or nothing" in error["message"]
    assert seen["before failure"] == seen["after failure"] == seen["edited"]["commit"]
    assert seen["retry"]["changed"]
    repository = hub.repositories["tester/one"]
    weights = [repository.at(seen[name]["commit"]).files["model.safetensors"].oid for name in ("edited", "retry")]
    assert weights[0] != weights[1]


def test_a_failed_commit_and_a_race_are_reported(hub, seen):
    assert seen["failed commit"]["error"] == "ConnectionError" and "answered 500" in seen["failed commit"]["message"]
    assert "tester/one was changed at the same time, and that change is kept" in seen["raced"]["message"]
    after = hub.repositories["tester/one"].at(seen["after the race"]["commit"])
    assert "Overtaken." in after.files["README.md"].content.decode()


def test_a_branch_is_made(hub, seen):
    repository = hub.repositories["tester/one"]
    assert seen["branch"]["commit"] in [commit.sha for commit in repository.branches["trial"]]
    assert seen["branch"]["commit"] not in [commit.sha for commit in repository.branches["main"]]


def test_private_means_private(hub, seen):
    assert hub.repositories["tester/hidden"].private and "model.safetensors" in hub.files("tester/hidden")
    assert seen["private, but there"]["error"] == "ValueError"
    assert "tester/one already exists and is public" in seen["private, but there"]["message"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong token", "the Hub does not accept the token for tester/one"),
        ("no token", "there is no token for the Hub; log in with `hf auth login`"),
        ("other owner", "the token may not write to somebody/one"),
    ],
)
def test_tokens_that_do_not_suffice_are_reported(seen, name, message):
    assert seen[name]["error"] == "PermissionError" and message in seen[name]["message"]
    assert "hf_wrong" not in seen[name]["message"]


def test_weights_under_old_names_go(hub, seen):
    """The loader would take a single file that an earlier push left before the shards of this one."""
    files = hub.repositories["tester/one"].at(seen["shards"]["commit"]).files
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    shards = [name for name in files if name.startswith("model-")]
    assert len(shards) > 1 and all(files[f"copy/{name}"] == files[name] for name in shards)
    uploads = [request for request in hub.requests if request.startswith("PUT /lfs/")]
    # the failed one came twice
    assert len(uploads) == len(set(uploads)) + 1


def test_two_cards_with_words_of_their_own(hub, seen):
    repository = hub.repositories["tester/one"]
    kept = repository.at(seen["conflict"]["commit"]).files["README.md"].content.decode()
    assert "I wrote this." in kept and "Local words." not in kept
    assert "m/README.md has hand-written text that the card of tester/one does not have" in seen["errors"]
    replaced = repository.at(seen["replaced"]["commit"]).files["README.md"].content.decode()
    assert "Local words." in replaced and "I wrote this." not in replaced


def test_a_models_own_push_carries_code_and_keeps_the_card(hub, seen):
    assert set(hub.files("tester/direct")) >= CODE | {"config.json", "model.safetensors"}
    assert json.loads(hub.files("tester/direct")["config.json"])["auto_map"] == DropKeyViTConfig.family_auto_map
    card = hub.files("tester/direct")["README.md"].decode()
    assert hand_written(card) == hand_written(HAND_WRITTEN) and "license: cc-by-4.0" in card


@pytest.mark.slow
def test_what_was_pushed_loads_by_name_in_a_fresh_process_and_offline(hub, seen, tmp_path):
    code = """
    import sys, torch
    from transformers import AutoModelForImageClassification
    model = AutoModelForImageClassification.from_pretrained("tester/one", revision=sys.argv[1], trust_remote_code=True)
    assert "hf_dropkey" not in sys.modules and sys.argv[1] in type(model).__module__
    print(model(torch.linspace(-1, 1, 192).view(1, 3, 8, 8)).logits.tolist())
    """
    commit = seen["retry"]["commit"]
    online = hub.run(code, tmp_path, commit, package=False)
    before = len(hub.requests)
    offline = hub.run(code, tmp_path, commit, package=False, HF_HUB_OFFLINE="1")
    assert online.stdout == offline.stdout and online.stdout.startswith("[[")
    assert len(hub.requests) == before
    other = hub.run(code, tmp_path, seen["edited"]["commit"], package=False)
    assert other.stdout != online.stdout


PUSH_FAMILIES = """
from hf_dropkey.classification.families import FAMILIES, SMALLEST
from hf_dropkey import push_folder
for name, family in FAMILIES.items():
    config = family.config_class(**family.sizes[SMALLEST], **family.digits_shape, num_labels=3)
    family.model_class(config).save_pretrained(name)
    push_folder(name, f"tester/{name}")
"""
LOAD_FAMILIES = """
import sys, torch
from transformers import AutoModelForImageClassification
for name in sys.argv[1:]:
    model = AutoModelForImageClassification.from_pretrained(f"tester/{name}", trust_remote_code=True)
    side = model.config.image_size
    print(name, model(torch.zeros(1, 3, side, side)).logits.shape[1], type(model).__module__.split(".")[0])
"""


@pytest.mark.slow
def test_every_family_is_pushed_and_loads_by_name(hub, tmp_path):
    hub.run(PUSH_FAMILIES, tmp_path)
    loaded = hub.run(LOAD_FAMILIES, tmp_path, *FAMILIES, package=False)
    assert loaded.stdout.splitlines() == [f"{name} 3 transformers_modules" for name in FAMILIES]


# --- before anything is sent -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    DropKeyViTForImageClassification(DropKeyViTConfig(**SHAPE)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture(autouse=True)
def some_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.mark.parametrize("name", ["a/b/c", "two--dashes", "spa ce", "me/x.git", ""])
def test_names_that_are_none(saved, name):
    with pytest.raises(ValueError, match=r"[Rr]epo[_ ]id"):
        push_folder(saved, name)


def test_a_commit_is_no_branch():
    with pytest.raises(ValueError, match="is a commit, which cannot be pushed to; give a branch"):
        check_target("me/x", revision="0" * 40)


def test_a_missing_token_is_reported(saved, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(saved / "none"))
    with pytest.raises(PermissionError, match="there is no token for the Hub.*HF_TOKEN"):
        push_folder(saved, "me/x")


def test_offline_is_reported(saved):
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set; unset it"):
        push_folder(saved, "me/x")


def test_folders_that_are_no_model(saved, tmp_path):
    with pytest.raises(NotADirectoryError, match=r"config\.json is a file; give the folder it lies in"):
        push_folder(saved / "config.json", "me/x")
    with pytest.raises(FileNotFoundError, match="gone is not a folder"):
        push_folder(tmp_path / "gone", "me/x")
    (saved / "dropkey.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"saved lacks dropkey\.py"):
        push_folder(saved, "me/x")


def test_pickled_weights_are_refused(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match="weights as a pickle, which runs code when it is read"):
        push_folder(saved, "me/x")


@pytest.mark.parametrize("name", ["NOTICE", "README.md", "all_results.json", "dropkey.py"])
def test_a_token_in_a_file_stops_the_push(saved, name):
    with (saved / name).open("a") as file:
        # JSON goes through as it lies there, so that the scan is what stops it
        file.write(f"\n# {TOKEN}\n")
    with pytest.raises(
        ValueError, match=rf"{name} \(.*a token of the Hub.*\) holds something that looks like a secret"
    ):
        push_folder(saved, "me/x")


def test_the_token_in_use_stops_the_push_whatever_its_form(saved, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "my-word")
    (saved / "NOTICE").write_text("the token is my-word")
    with pytest.raises(ValueError, match=r"NOTICE \(the token in use\) holds"):
        push_folder(saved, "me/x")


def test_code_of_an_image_processor_goes_along(saved):
    for name in ("my_processor.py", "my_part.py", "other.py"):
        (saved / name).write_text("from .my_part import x\n" if name == "my_processor.py" else "")
    (saved / "preprocessor_config.json").write_text('{"auto_map": {"AutoImageProcessor": ["my_processor.P", null]}}')
    pushed, left_out = files_to_push(saved)
    assert {"my_processor.py", "my_part.py"} <= set(pushed) and left_out == ["other.py"]


def test_adapters_are_pushed_without_code(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors", "training_args.bin"):
        (tmp_path / name).write_text("{}")
    assert files_to_push(tmp_path) == (["adapter_config.json", "adapter_model.safetensors"], ["training_args.bin"])
    with pytest.raises(ValueError, match="are damaged"):
        push_folder(tmp_path, "me/x")


def test_only_what_belongs_to_a_model_goes(saved):
    for name in (
        "wandb/run-1/files/wandb-summary.json",
        "wandb/run-1/files/output.txt",
        "mlruns/0/meta.json",
        "train_0001.png",
        "images/cat.jpg",
        "images/cat.txt",
        "train.csv",
        "notes.md",
        "notes.txt",
        "last-checkpoint/config.json",
        "curve.png",
        "figures/curve two.png",
    ):
        (saved / name).parent.mkdir(parents=True, exist_ok=True)
        (saved / name).write_text("x")
    shutil.copyfile(saved / "model.safetensors", saved / "other.safetensors")
    (saved / "README.md").write_text(
        "# Me\n\n![curve](./curve.png) and <img src='figures/curve%20two.png'> [x](../x.png)\n"
    )
    (saved / "eval_results.json").write_text("{}")
    plan = plan_push(saved)
    assert {file.name for file in plan.files} == CODE | {
        "README.md", "config.json", "model.safetensors", "eval_results.json", "curve.png", "figures/curve two.png"
    }  # fmt: skip
    listed = str(plan)
    assert (
        "train_0001.png (1 bytes)" in listed
        and "wandb/ (2 bytes): 2 files" in listed
        and "model.safetensors (" in listed
    )
    more = plan_push(saved, include=["images/*.jpg", "*.py", "wandb/*"])
    assert {file.name for file in more.files} - {file.name for file in plan.files} == {"images/cat.jpg"}


def test_paths_of_this_machine_are_cut(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "_name_or_path": f"{HOME}/secret project/run"}))
    state = {
        "best_model_checkpoint": "/data/me/run/checkpoint-4",
        "log": ["saw ~/me/x.png, then C:\\Users\\me\\y.txt"],
    }
    (saved / "trainer_state.json").write_text(json.dumps(state))
    (saved / "run_facts.json").write_text(
        json.dumps({"command": f"python train.py --train_dir {HOME}/data/cats --lr 1/2"})
    )
    (saved / "README.md").write_text(f"# Me\n\nTrained in {HOME}/runs/x.\n")
    plan = {file.name: file for file in plan_push(saved).files}
    assert json.loads(plan["config.json"].content) == {**config, "_name_or_path": "run"}
    assert json.loads(plan["trainer_state.json"].content) == {
        "best_model_checkpoint": "checkpoint-4", "log": ["saw x.png, then y.txt"]
    }  # fmt: skip
    assert json.loads(plan["run_facts.json"].content) == {"command": "python train.py --train_dir cats --lr 1/2"}
    assert plan["run_facts.json"].note == "paths of this machine cut"
    assert plan["README.md"].note == f"names a folder of this machine, {HOME}/runs/x."
    # and the file itself is left as it is
    assert HOME in (saved / "config.json").read_text()


@pytest.mark.parametrize("name", ["NOTICE", "config.json", "README.md"])
def test_links_that_leave_the_folder_are_refused(saved, tmp_path, name):
    content = (saved / name).read_bytes() if (saved / name).exists() else b"private"
    (tmp_path / "elsewhere").write_bytes(content)
    (saved / name).unlink(missing_ok=True)
    (saved / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{name} is a link to .*elsewhere, outside the folder, so it is not sent"):
        push_folder(saved, "me/x")


def test_links_within_and_links_that_stay(saved, tmp_path):
    (saved / "kept.txt").write_text("Apache")
    (saved / "LICENSE").symlink_to("kept.txt")
    (saved / "data").symlink_to(tmp_path)
    (saved / "gone.png").symlink_to(tmp_path / "gone")
    plan = plan_push(saved)
    assert "LICENSE" in {file.name for file in plan.files}
    assert {file.name for file in plan.stays} == {"kept.txt", "data", "gone.png"}


def test_foreign_code_that_a_configuration_names_is_reported(saved):
    (saved / "preprocessor_config.json").write_text('{"auto_map": {"AutoImageProcessor": {"pil": "evil/x--m.P"}}}')
    assert "preprocessor_config.json (60 bytes): runs code of another repository, evil/x--m.P" in str(plan_push(saved))


@pytest.mark.parametrize("value", [{"pil": "evil/x--m.P"}, ["evil/x--m.P", None], [{"pil": "modeling_dropkey_vit.X"}]])
def test_references_in_lists_and_objects_are_no_error_of_ours(saved, value):
    config = json.loads((saved / "config.json").read_text())
    config["auto_map"]["AutoImageProcessor"] = value
    (saved / "config.json").write_text(json.dumps(config))
    assert {file.name for file in plan_push(saved).files} >= CODE
