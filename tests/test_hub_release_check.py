"""A checkpoint is trusted only if its code is this package's, its weights are safetensors, and nothing else can run."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import File, HubServer, Repository, serving
from small_runs import SHAPE

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
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
    assert report.problems == ("custom_generate/generate.py is no code of hf_dropkey",)
    assert "+print('hello')" in report.diffs["custom_generate/generate.py"]


@pytest.mark.parametrize(
    "name", ["training_args.bin", "optimizer.pt", "x.pkl", "a.so", "b.pyc", "c.zip", "run.sh", "unknown"]
)
def test_other_kinds_of_file_are_told_and_never_opened(folder, name):
    (folder / name).write_bytes(pickle.dumps(Evil()))
    (problem,) = check_release(folder).problems
    assert problem.startswith(f"{name} is of a kind that no model needs")
    assert not Path("opened").exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("notes.txt", pickle.dumps(Evil()), "is a pickle, whatever its name says"),
        ("tokenizer.model", b"PK\x03\x04", "is an archive"),
        ("image.png", b"\x7fELF\x02", "is a program"),
        ("LICENSE", b"#!/bin/sh\n", "is a script"),
        ("README.md", b"\xff\xfe\x00", "is no text"),
        ("more.json", b"{", "is no JSON"),
    ],
)
def test_disguises_are_told(folder, name, content, told):
    (folder / name).write_bytes(content)
    assert [problem for problem in check_release(folder).problems if problem.startswith(name) and told in problem]


def test_executables_and_links_are_told(folder):
    (folder / "notes.txt").touch(mode=0o755)
    Path("elsewhere.txt").touch()
    (folder / "link.txt").symlink_to(Path("elsewhere.txt").resolve())
    Path("code").mkdir()
    (folder / "custom_generate").symlink_to(Path("code").resolve())
    problems = " ".join(check_release(folder).problems)
    assert "custom_generate is of a kind that no model needs" in problems
    assert "notes.txt is marked as executable" in problems and "link.txt is a link to" in problems


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"auto_map": {"AutoModel": "somebody/code--modeling.Model"}}, "AutoModel is code of another repository"),
        ({"custom_pipelines": {"x": {"impl": "x.Pipeline"}}}, "pipelines with code of their own"),
        ({"attn_implementation": "somebody/kernel"}, "is a kernel to download, somebody/kernel"),
        ({"auto_map": {"AutoModel": ["no", "text"]}}, "has a form that no model has"),
        ({"auto_map": {"AutoModel": "gone.Model"}}, "lacks gone.py"),
    ],
)
def test_a_configuration_that_fetches_code_is_told(folder, fields, told):
    change_config(folder, **fields)
    assert told in " ".join(check_release(folder).problems)


def test_code_named_by_the_image_processor_is_told(folder):
    (folder / "preprocessor_config.json").write_text('{"auto_map": {"AutoImageProcessor": "a/b--c.D"}}')
    assert check_release(folder).problems == (
        "preprocessor_config.json: AutoImageProcessor is code of another repository, a/b--c.D",
    )


def test_damaged_missing_and_pickled_weights_are_told(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    assert "are damaged" in " ".join(check_release(folder).problems)
    weights.unlink()
    assert "lacks model.safetensors" in " ".join(check_release(folder).problems)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    problems = " ".join(check_release(folder).problems)
    assert "there are no weights in safetensors" in problems and "pytorch_model.bin is of a kind" in problems
    assert not Path("opened").exists()


def test_targets_that_are_none_are_told(folder):
    with pytest.raises(NotADirectoryError, match=r"config\.json is a file"):
        check_release(folder / "config.json")
    with pytest.raises(FileNotFoundError, match="no folder, and no name of a repository"):
        check_release("a/b/c")
    with pytest.raises(ConnectionError, match="me/x was not checked: HF_HUB_OFFLINE is set"):
        check_release("me/x")


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
