"""A checkpoint is trusted only if its code is this package's, its weights are safetensors, and nothing else can run."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hostile_checkpoints as hostile
import pytest
from hub_server import ROOT, File, HubServer, Repository, serving
from small_runs import SHAPE

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.cli import main
from hf_dropkey.hub import released_code
from hf_dropkey.hub.cards import write_card
from hf_dropkey.hub.release_check import check_release


class Evil:
    """Would write a file if its pickle were opened."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path("opened").touch, ()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    DropKeyViTForImageClassification(DropKeyViTConfig(**SHAPE)).save_pretrained("saved")
    write_card(Path("saved"))
    return Path("saved")


def change_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_what_save_pretrained_writes_is_trusted(folder):
    report = check_release(folder)
    assert report.trusted and report.problems == () and report.diffs == {}
    assert set(report.identical) == {path.name for path in folder.glob("*.py")} and len(report.identical) >= 10
    assert "trusted: " in str(report) and "nothing else can run" in str(report)


def test_changed_code_is_shown(folder):
    with (folder / "dropkey.py").open("a") as file:
        file.write("import os\n\x1b[8mos.system('hidden')\n")
    report = check_release(folder)
    assert not report.trusted and "dropkey.py" not in report.identical
    assert "problem: dropkey.py differs from hf_dropkey" in str(report)
    assert "+import os" in str(report) and "--- hf_dropkey/models/dropkey.py" in str(report)
    # nothing can hide from a terminal
    assert "\\x1b[8mos.system('hidden')" in str(report) and "\x1b" not in str(report)


def test_one_other_line_end_is_a_difference(folder):
    file = folder / "compatibility.py"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n", 1))
    assert "only line ends differ" in check_release(folder).diffs["compatibility.py"]


def test_code_that_is_not_ours_is_shown(folder):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("print('hello')\n")
    report = check_release(folder)
    assert report.problems == ("custom_generate/generate.py is not code of hf_dropkey",)
    assert "+print('hello')" in report.diffs["custom_generate/generate.py"]


@pytest.mark.parametrize(
    "name", ["training_args.bin", "optimizer.pt", "x.pkl", "a.so", "b.pyc", "c.zip", "run.sh", "unknown"]
)
def test_other_kinds_of_file_are_reported_and_never_opened(folder, name):
    (folder / name).write_bytes(pickle.dumps(Evil()))
    (problem,) = check_release(folder).problems
    assert problem.startswith(f"{name} is of a kind that no model needs")
    assert not Path("opened").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", pickle.dumps(Evil()), "is a pickle, whatever its name says"),
        ("tokenizer.model", b"PK\x03\x04", "is an archive"),
        ("image.png", b"\x7fELF\x02", "is a program"),
        ("LICENSE", b"#!/bin/sh\n", "is a script"),
        ("README.md", b"\xff\xfe\x00", "is not text"),
        ("more.json", b"{", "is not JSON"),
    ],
)
def test_disguises_are_reported(folder, name, content, message):
    (folder / name).write_bytes(content)
    assert [problem for problem in check_release(folder).problems if problem.startswith(name) and message in problem]


def test_executables_and_links_are_reported(folder):
    (folder / "notes.txt").touch(mode=0o755)
    Path("elsewhere.txt").touch()
    (folder / "link.txt").symlink_to(Path("elsewhere.txt").resolve())
    Path("code").mkdir()
    (folder / "custom_generate").symlink_to(Path("code").resolve())
    problems = " ".join(check_release(folder).problems)
    assert "custom_generate is a link to" in problems
    assert "notes.txt is marked as executable" in problems and "link.txt is a link to" in problems


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"auto_map": {"AutoModel": "somebody/code--modeling.Model"}},
            "auto_map.AutoModel is code of another repository",
        ),
        ({"custom_pipelines": {"x": {"impl": "x.Pipeline"}}}, "there is no x.py of hf_dropkey beside"),
        ({"attn_implementation": "somebody/kernel"}, "which may be a kernel to download; allowed are eager"),
        ({"auto_map": {"AutoModel": ["no", "text"]}}, "is \"text\", not 'module.Class'"),
        ({"auto_map": {"AutoModel": "gone.Model"}}, "there is no gone.py of hf_dropkey beside"),
    ],
)
def test_a_configuration_that_fetches_code_is_reported(folder, fields, message):
    change_config(folder, **fields)
    assert message in " ".join(check_release(folder).problems)


def test_code_named_by_the_image_processor_is_reported(folder):
    (folder / "preprocessor_config.json").write_text('{"auto_map": {"AutoImageProcessor": "a/b--c.D"}}')
    assert check_release(folder).problems == (
        'preprocessor_config.json: auto_map.AutoImageProcessor is code of another repository, "a/b--c.D"',
    )


def test_damaged_missing_and_pickled_weights_are_reported(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    assert "is damaged" in " ".join(check_release(folder).problems)
    weights.unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in " ".join(check_release(folder).problems)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    problems = " ".join(check_release(folder).problems)
    assert "there are no weights in safetensors" in problems and "pytorch_model.bin is of a kind" in problems
    assert not Path("opened").exists()


def test_targets_that_do_not_exist_are_reported(folder):
    with pytest.raises(NotADirectoryError, match=r"config\.json is a file"):
        check_release(folder / "config.json")
    with pytest.raises(FileNotFoundError, match="is neither a folder nor the name of a repository"):
        check_release("a/b/c")
    with pytest.raises(ConnectionError, match="me/x was not checked: HF_HUB_OFFLINE is set"):
        check_release("me/x")


# --- whose code it is, and where it lies --------------------------------------------------------------------------------


def released_files(version: str) -> dict[str, bytes]:
    """The code of a release, from git."""
    commit = json.loads(released_code.RELEASES.read_text())[version]["commit"]
    shown = ["git", "-C", str(ROOT), "show"]
    if subprocess.run([*shown[:3], "cat-file", "-e", commit], capture_output=True, timeout=60).returncode:
        pytest.skip(f"this clone has no history down to {commit}")
    names = json.loads(released_code.RELEASES.read_text())[version]["files"]
    return {
        name: subprocess.run(
            [*shown, f"{commit}:hf_dropkey/models/{name}"], capture_output=True, check=True, timeout=60
        ).stdout
        for name in names
    }


def test_a_checkpoint_of_an_older_release_stays_trusted_and_the_version_is_named(folder):
    files = released_files("0.1.0")
    for file in folder.glob("*.py"):
        # later versions have more files
        file.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    # that release had no backbones to name
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]["AutoBackbone"]
    (folder / "config.json").write_text(json.dumps(config))
    report = check_release(folder)
    assert report.trusted and "hf_dropkey 0.1.0" in str(report), report.problems


def test_files_of_two_versions_side_by_side_are_reported(folder, monkeypatch):
    known = released_code.known_code()
    other = dict.fromkeys(next(iter(known.values())), "0" * 64)
    other["dropkey.py"] = hashlib.sha256(b"# older").hexdigest()
    monkeypatch.setattr(released_code, "known_code", lambda: known | {"0.0.1": other})
    (folder / "dropkey.py").write_bytes(b"# older")
    assert "are of several versions of hf_dropkey" in " ".join(check_release(folder).problems)


def test_the_hashes_of_releases_are_those_of_git():
    released_files("0.1.0")
    made = subprocess.run(
        [sys.executable, "-c", "import write_released_code; print(write_released_code.content(), end='')"],
        cwd=ROOT / "scripts",
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert made.stdout == released_code.RELEASES.read_text()


def test_the_cache_of_huggingface_hub_is_a_folder_like_another(folder, tmp_path):
    snapshot = tmp_path / "models--me--x" / "snapshots" / ("a" * 40)
    blobs = tmp_path / "models--me--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, blobs / f"{number:040}")
        (blobs / f"{number:040}").chmod(0o755)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:040}"))
    assert check_release(snapshot).problems == ()
    (tmp_path / "models--me--y" / "blobs").mkdir(parents=True)
    foreign = tmp_path / "models--me--y" / "blobs" / "x"
    foreign.write_text("x")
    (snapshot / "notes.txt").symlink_to(foreign)
    assert [problem[:20] for problem in check_release(snapshot).problems] == ["notes.txt is a link "]


def test_a_run_folder_is_called_one_and_is_not_to_be_deleted(folder):
    shutil.copytree(folder, folder / "checkpoint-4")
    for name in (
        "training_args.bin",
        "checkpoint-4/optimizer.pt",
        "checkpoint-4/rng_state.pth",
        "runs/x/events.out.tfevents.1",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "trainer_state.json").write_text(
        '{"best_model_checkpoint": "/data/me/run/checkpoint-4", "global_step": 4}'
    )
    (problem,) = check_release(folder).problems
    assert "checkpoint-4/optimizer.pt and 3 more belong to a training run" in problem and "delete" not in problem
    # what the page about the run and its lock leave
    names = ("report_data.json", "predictions.csv", "report.html", "mistakes/01.png", ".run/0.lock", ".run/complete")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('{"drops": [{"name": "vit.layers.0.attention"}], "file": "mistakes/01.png"}')
    (problem,) = check_release(folder).problems
    assert "and 9 more belong to a training run" in problem
    (folder / "x.pkl").write_bytes(b"x")
    assert "x.pkl is of a kind" in " ".join(check_release(folder).problems)


def test_a_digest_shows_that_a_folder_has_changed(folder, capsys):
    assert main(["check", str(folder)]) == 0
    digest = capsys.readouterr().out.split("digest: ")[1].split()[0]
    shutil.copytree(folder, "elsewhere")
    assert main(["check", "elsewhere", "--digest", digest]) == 0
    Path("elsewhere", "README.md").write_text("# Other\n")
    assert main(["check", "elsewhere", "--digest", digest]) == 1
    assert f"not {digest}: the folder has changed since" in capsys.readouterr().out
    assert main(["check", "elsewhere", "--digest", "abc"]) == 2


def test_weights_of_hidden_sizes_beyond_the_file_are_never_built(folder):
    """Within every bound on single numbers the model would have some 10^14 elements."""
    change_config(folder, hidden_size=60000, intermediate_size=60000, num_attention_heads=2)
    assert "larger than the weights" in " ".join(check_release(folder).problems)


# --- attacks by kind -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("template") / "saved"
    DropKeyViTForImageClassification(DropKeyViTConfig(**SHAPE)).save_pretrained(saved)
    return saved


@pytest.fixture
def copy(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(template, tmp_path / "saved"))


@pytest.mark.parametrize("name", hostile.JSON_ATTACKS)
def test_json_that_a_loader_could_follow_is_never_trusted(copy, name):
    hostile.apply_json(copy, *hostile.JSON_ATTACKS[name])
    report = check_release(copy)
    assert report.problems and "trusted: " not in str(report)


@pytest.mark.parametrize("name", hostile.FOLDER_ATTACKS)
def test_folders_with_other_files_are_never_trusted(copy, name):
    hostile.FOLDER_ATTACKS[name](copy)
    report = check_release(copy)
    assert report.problems and "trusted: " not in str(report)
    assert not Path("opened").exists() and not (copy / "opened").exists()


@pytest.mark.parametrize("name", hostile.UNREADABLE)
def test_what_cannot_be_read_is_one_line_and_exit_code_2(copy, name, capsys):
    hostile.UNREADABLE[name](copy)
    assert main(["check", str(copy)]) == 2
    printed = capsys.readouterr()
    assert (
        printed.out == "" and len([line for line in printed.err.splitlines() if not line.startswith("Loading")]) == 1
    )


@pytest.mark.parametrize("name", hostile.HARMLESS)
def test_what_is_harmless_stays_trusted(copy, name):
    hostile.HARMLESS[name](copy)
    assert check_release(copy).problems == ()


def put(hub: HubServer, repo: str, folder: Path, **more: bytes) -> str:
    """Puts a folder on the server as it is; returns the commit."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir()} | more
    files = {name: File(content, name.endswith(".safetensors")) for name, content in contents.items()}
    repository = hub.repositories.setdefault(repo, Repository(private=False))
    return repository.add("main", "made", files).sha


@pytest.mark.slow
def test_a_repository_is_checked_without_fetching_what_can_run(folder):
    code = """
    from hf_dropkey.cli import main
    codes = [main(["check", "me/x"]), main(["check", "me/x", "--revision", REVISION]), main(["check", "me/none"])]
    print(*codes)
    """
    with serving() as hub:
        good = put(hub, "me/x", folder)
        put(hub, "me/x", folder, **{"optimizer.pt": b"x"})
        done = hub.run(code.replace("REVISION", repr(good)), Path.cwd())
    assert done.stdout.splitlines()[-1] == "1 0 2"
    assert f'load it with revision="{good}", trust_remote_code=True' in done.stdout
    assert "problem: optimizer.pt is of a kind that no model needs" in done.stdout
    assert "there is no repository me/none" in done.stderr
    assert not [request for request in hub.requests if "optimizer.pt" in request]


def test_a_folder_of_runs_is_told_in_one_sentence(tmp_path: Path) -> None:
    for name in ("a", "a/checkpoint-4", "b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "training_args.bin").touch()
    with pytest.raises(
        FileNotFoundError, match=r"holds no model but folders with one: a, b; check one of these, such as .*/a$"
    ):
        check_release(tmp_path)
