"""Spaces are pushed in one commit, to a server that speaks the Hub's API."""

import json
from typing import Any

import pytest
from hub_server import HubServer
from small_demos import save_classifier


PUSHES = """
import json, sys
from hf_dropkey.cli import main
from pathlib import Path

codes = {}
codes["dry run"] = main(["push", "saved", "tester/seen", "--space", "--dry_run"])
codes["push"] = main(["push", "saved", "tester/seen", "--space"])
codes["again"] = main(["push", "saved", "tester/seen", "--space"])
codes["written"] = main(["demo", "saved", "--space_folder", "space"])
codes["folder"] = main(["push", "space", "tester/folder", "--space", "--private", "--message", "Mine"])
Path("space/examples/12.png").unlink()
codes["fewer"] = main(["push", "space", "tester/folder", "--space"])
Path("space/app.py").write_text("import os")
codes["changed app"] = main(["push", "space", "tester/other", "--space"])
codes["no space"] = main(["push", "space/examples", "tester/other", "--space"])
codes["images without"] = main(["push", "saved", "tester/other", "--images", "pictures"])
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def pushed(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pushes")
    save_classifier(folder / "saved")
    done = hub.run(PUSHES, folder)
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) | {"printed": lines, "errors": done.stderr}


def test_a_space_is_pushed_in_one_commit(hub: HubServer, pushed: dict[str, Any]) -> None:
    assert pushed["dry run"] == pushed["push"] == pushed["again"] == pushed["written"] == 0
    assert "nothing was sent" in pushed["printed"]
    files = hub.files("spaces/tester/seen")
    assert {"app.py", "requirements.txt", "README.md", "examples/01.png", "model/config.json"} <= set(files)
    assert hub.messages("spaces/tester/seen") == ["initial commit", "Upload Space"]
    assert any("nothing new, no commit made" in line for line in pushed["printed"])
    assert "tester/seen" not in hub.repositories


def test_a_folder_is_pushed_and_its_deleted_files_go(hub: HubServer, pushed: dict[str, Any]) -> None:
    assert pushed["folder"] == pushed["fewer"] == 0
    repository = hub.repositories["spaces/tester/folder"]
    assert repository.private and hub.messages("spaces/tester/folder") == ["initial commit", "Mine", "Upload Space"]
    before, after = (set(commit.files) for commit in repository.branches["main"][1:])
    assert before - after == {"examples/12.png"} and ".gitattributes" in after


def test_what_was_changed_or_is_no_space_is_not_sent(hub: HubServer, pushed: dict[str, Any]) -> None:
    assert pushed["changed app"] == pushed["no space"] == pushed["images without"] == 2
    assert "app.py is not that of hf_dropkey" in pushed["errors"] and "Nothing was sent" in pushed["errors"]
    assert "is not the folder of a Space" in pushed["errors"]
    assert "--images and --package are of a Space; pass --space" in pushed["errors"]
    assert "spaces/tester/other" not in hub.repositories and "tester/other" not in hub.repositories
