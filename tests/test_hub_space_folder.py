"""The folder of a Space holds what it needs, pinned, and a check sees what was changed."""

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from small_demos import RATIO, noise, save_classifier
from small_pages import client_of

from hf_dropkey import __version__
from hf_dropkey.cli import main
from hf_dropkey.demo.server import free_port
from hf_dropkey.demo.space import space_of
from hf_dropkey.hub.release_check import check_release
from hf_dropkey.hub.space_folder import APP_TEXT, pinned_requirement


ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789" * 4


@pytest.fixture
def space(tmp_path: Path) -> Path:
    space_of(save_classifier(tmp_path / "saved"), tmp_path / "space")
    return tmp_path / "space"


def test_a_space_starts_the_demo_in_three_lines(space: Path) -> None:
    assert (space / "app.py").read_text() == APP_TEXT and len(APP_TEXT.splitlines()) == 3
    assert (space / "requirements.txt").read_text() == f"{pinned_requirement()}\n"
    card = (space / "README.md").read_text()
    assert card.startswith("---\ntitle: saved") and "sdk: gradio" in card and "CC BY" in card
    assert len(list((space / "examples").glob("*.png"))) == 12
    saved, sent = ((folder / "model.safetensors").read_bytes() for folder in (space.parent / "saved", space / "model"))
    assert saved == sent


def test_check_understands_a_space(space: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(space)]) == 0
    printed = capsys.readouterr().out
    assert "trusted: " in printed and "app.py starts the demo" in printed
    report = check_release(space)
    assert report.is_space and "model/modeling_dropkey_vit.py" in report.identical
    assert check_release(space, digest=report.digest).trusted


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("app.py", "import os\n", "app.py is not that of hf_dropkey"),
        ("requirements.txt", "hf_dropkey[demo]\n", "not one line that pins"),
        ("requirements.txt", f"hf_dropkey[demo]=={__version__}\nother\n", "not one line that pins"),
        (
            "requirements.txt",
            f"hf_dropkey[demo] @ git+https://host/a/b@{COMMIT}\n",
            "a repository that this check has not seen",
        ),
        ("README.md", "# no settings\n", "README.md has sdk None"),
        ("README.md", "---\nsdk: docker\n---\n", "README.md has sdk 'docker'"),
        ("more.py", "import os\n", "more.py is of a kind that no model needs"),
        ("examples/01.png", "#!/bin/sh\n", "examples/01.png is a script"),
        ("model/modeling_dropkey_vit.py", "import os\n", "model: modeling_dropkey_vit.py"),
        ("model/training_args.bin", "x", "model: training_args.bin"),
    ],
)
def test_what_was_changed_is_a_problem(space: Path, name: str, content: str, problem: str) -> None:
    (space / name).write_text(content)
    report = check_release(space)
    assert not report.trusted and any(problem in one for one in report.problems), report.problems


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (f"git+https://host/me/dropkey@{COMMIT}", f"hf_dropkey[demo] @ git+https://host/me/dropkey@{COMMIT}"),
        ("hf_dropkey[demo]==1.2.3", "hf_dropkey[demo]==1.2.3"),
    ],
)
def test_the_package_is_pinned(given: str, line: str) -> None:
    assert pinned_requirement(given) == line


@pytest.mark.parametrize(
    "given",
    ["hf_dropkey[demo]", "git+https://host/me/dropkey@main", "git+https://host/me/dropkey", "hf_dropkey[demo]>=1"],
)
def test_what_is_not_pinned_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="--package .* is not pinned; give "):
        pinned_requirement(given)


def test_nothing_is_written_over(space: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(space.parent / "saved"), "--space_folder", str(space)]) == 2
    assert "is not an empty folder; choose a new one" in capsys.readouterr().err


def test_ones_own_pictures_are_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    noise().save(tmp_path / "mine" / "a.jpg")
    space_of(save_classifier(tmp_path / "saved"), tmp_path / "space", images=tmp_path / "mine")
    assert "chosen by whoever uploaded" in (tmp_path / "space" / "README.md").read_text()
    assert [file.name for file in (tmp_path / "space" / "examples").iterdir()] == ["01.png"]


@pytest.mark.slow
def test_the_app_of_a_space_serves_the_model(space: Path) -> None:
    pytest.importorskip("gradio", reason="needs gradio, which the extra 'demo' installs")
    port = free_port("127.0.0.1", 0)
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    with (space.parent / "app.log").open("w") as log:
        app = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 180
        while True:
            assert app.poll() is None and time.monotonic() < deadline, (space.parent / "app.log").read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as page:
                    assert page.status == 200
                break
            except OSError:
                time.sleep(0.5)
        numbers = client_of(f"http://127.0.0.1:{port}/").predict(RATIO, "score", 0, api_name="/settings")[3]
        assert numbers["label"] in ("cat", "dog", "<b>bird</b>")
    finally:
        app.terminate()
        app.wait(30)
