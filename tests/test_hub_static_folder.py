"""The folder of a page that computes in the browser: a check sees what was changed, and it is pushed as a static Space."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from small_demos import noise

from hf_dropkey.cli import main
from hf_dropkey.hub import static_folder
from hf_dropkey.hub.release_check import check_release
from hf_dropkey.hub.static_folder import GRAPH, PAGE_FILES, page_contents, static_card
from hf_dropkey.hub.web_runtime import SHA256


RUNTIME = {name: f"content of {name}".encode() for name in SHA256}
PUSHES = """
import hashlib, json
from hf_dropkey.cli import main
from hf_dropkey.hub import static_folder

static_folder.SHA256 = {name: hashlib.sha256(f"content of {name}".encode()).hexdigest() for name in static_folder.SHA256}
print(json.dumps([main(["push", "page", "tester/page", "--space"]), main(["push", "page", "tester/page", "--space"])]))
"""


def write(folder: Path) -> Path:
    """A page's folder with small contents in place of the graph and what runs it."""
    graph = b"graph"
    settings: dict[str, Any] = {"graph": {"file": GRAPH, "sha256": hashlib.sha256(graph).hexdigest()}}
    settings |= {"examples": [{"file": "examples/01.png", "name": "a"}]}
    contents: dict[str, bytes] = {**page_contents(), **RUNTIME, GRAPH: graph, "ort/LICENSE": b"MIT License\n"}
    contents |= {
        "settings.json": json.dumps(settings).encode(),
        "README.md": static_card("mine", "Made here.", "mit").encode(),
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "examples").mkdir()
    noise().save(folder / "examples" / "01.png")
    return folder


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    known = {name: hashlib.sha256(content).hexdigest() for name, content in RUNTIME.items()}
    monkeypatch.setattr(static_folder, "SHA256", known)
    return write(tmp_path / "page")


def test_check_understands_a_page(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "trusted: the page is that of hf_dropkey" in printed and "which model the graph was made of" in printed
    report = check_release(page)
    assert report.is_static and not report.is_space
    assert check_release(page, digest=report.digest).trusted
    assert "sdk: static" in (page / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        *((name, "fetch('https://host')", f"{name} is not that of hf_dropkey") for name in PAGE_FILES),
        *((name, "other", f"{name} is not that of onnxruntime-web") for name in SHA256),
        (GRAPH, "other", f"{GRAPH} is not the graph that settings.json was written with"),
        ("settings.json", "{}", "settings.json is not that of a page"),
        ("settings.json", "no", "settings.json is not that of a page"),
        ("README.md", "# no settings\n", "README.md has sdk None"),
        ("README.md", "---\nsdk: gradio\n---\n", "README.md has sdk 'gradio'"),
        ("more.js", "x", "more.js is of a kind that no model needs"),
        ("app.py", "import os\n", "app.py is of a kind that no model needs"),
        ("examples/01.png", "#!/bin/sh\n", "examples/01.png is a script"),
    ],
)
def test_what_was_changed_is_a_problem(
    page: Path, name: str, content: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (page / name).write_text(content)
    assert main(["check", str(page)]) == 1
    printed = capsys.readouterr().out
    assert problem in printed and "so do not open it" in printed


@pytest.mark.parametrize("name", [GRAPH, "style.css", "examples/01.png", *SHA256])
def test_what_is_missing_is_a_problem(page: Path, name: str) -> None:
    (page / name).unlink()
    assert any(name in problem for problem in check_release(page).problems)


def test_an_example_of_another_place_is_a_problem(page: Path) -> None:
    settings: dict[str, Any] = json.loads((page / "settings.json").read_text())
    settings["examples"][0]["file"] = "https://host/a.png"
    (page / "settings.json").write_text(json.dumps(settings))
    assert any("is not one of the examples" in problem for problem in check_release(page).problems)


def test_a_page_is_pushed_as_a_static_space(hub: HubServer, tmp_path: Path) -> None:
    write(tmp_path / "page")
    done = hub.run(PUSHES, tmp_path)
    assert done.stdout.splitlines()[-1] == "[0, 0]", done.stderr
    assert "nothing new, no commit made" in done.stdout
    files = hub.files("spaces/tester/page")
    assert {*PAGE_FILES, *SHA256, GRAPH, "settings.json", "examples/01.png", "ort/LICENSE"} <= set(files)
    assert hub.repositories["spaces/tester/page"].sdk == "static"
