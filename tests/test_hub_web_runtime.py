"""onnxruntime-web is taken from an archive or a folder, or npm fetches it, and is the pinned release or refused."""

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from hf_dropkey.hub import web_runtime
from hf_dropkey.hub.web_runtime import FILES, VERSION, runtime_files


CONTENT = {name: f"content of {name}".encode() for name in FILES}


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small contents in place of 14 MB."""
    known = {name: (target, hashlib.sha256(CONTENT[name]).hexdigest()) for name, (target, _) in FILES.items()}
    monkeypatch.setattr(web_runtime, "FILES", known)


def archive(file: Path, content: dict[str, bytes] = CONTENT) -> Path:
    with tarfile.open(file, "w:gz") as opened:
        for name, one in content.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(one)
            opened.addfile(member, io.BytesIO(one))
    return file


def npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")


@pytest.mark.usefixtures("pinned")
def test_an_archive_and_a_folder_give_the_same(tmp_path: Path) -> None:
    expected = {FILES[name][0]: content for name, content in CONTENT.items()}
    assert runtime_files(archive(tmp_path / "a.tgz")) == expected
    for name, content in CONTENT.items():
        (tmp_path / "node" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "node" / name).write_bytes(content)
    assert runtime_files(tmp_path / "node") == expected


@pytest.mark.usefixtures("pinned")
def test_npm_fetches_the_pinned_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = archive(tmp_path / "made.tgz")
    # the archive lands where npm is told to write it
    script = f'echo "$@" > {tmp_path}/words; for last; do :; done; cp {made} "$last/onnxruntime-web-{VERSION}.tgz"'
    npm(tmp_path / "bin", script, monkeypatch)
    assert runtime_files() == {FILES[name][0]: content for name, content in CONTENT.items()}
    words = (tmp_path / "words").read_text()
    assert words.startswith(f"pack onnxruntime-web@{VERSION} --ignore-scripts")


def test_npm_that_fails_is_said_with_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm(tmp_path / "bin", "echo no network >&2; exit 1", monkeypatch)
    with pytest.raises(
        OSError, match=r"\(no network\)\. On a machine with npm run `npm pack onnxruntime-web@.*--onnx"
    ):
        runtime_files()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"npm, which fetches it, is not installed\. On a machine with npm"):
        runtime_files()


def test_what_is_not_the_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not there"):
        runtime_files(tmp_path / "none.tgz")
    with pytest.raises(FileNotFoundError, match="has no dist/ort"):
        runtime_files(tmp_path)
    with pytest.raises(ValueError, match=f"is not that of onnxruntime-web {VERSION}: its SHA-256 is"):
        runtime_files(archive(tmp_path / "other.tgz"))
    with pytest.raises(ValueError, match="is not the archive of onnxruntime-web that npm writes"):
        runtime_files(archive(tmp_path / "lacks.tgz", {"dist/other": b""}))
    (tmp_path / "text.tgz").write_text("text")
    with pytest.raises(ValueError, match="is not the archive of onnxruntime-web that npm writes"):
        runtime_files(tmp_path / "text.tgz")
