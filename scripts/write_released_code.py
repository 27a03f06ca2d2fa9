"""Writes hf_dropkey/hub/released_code.json: the SHA-256 of the code of every released version, read from git.

A release adds a line to RELEASES: its version and its commit. Then run, in a clone with full history:

    python scripts/write_released_code.py
"""

import argparse
import hashlib
import json
import subprocess
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "hf_dropkey" / "hub" / "released_code.json"
FOLDER = "hf_dropkey/models"
# version: the commit it was released from
RELEASES = {"0.1.0": "b60f8af74b3936c90d76d52fa7e2f4632748bc9a"}


def git(*words: str) -> bytes:
    """What a git command prints."""
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True).stdout


def release(commit: str) -> dict[str, str]:
    """SHA-256 of each Python file that travels with checkpoints, at a commit."""
    names = git("ls-tree", "--name-only", commit, f"{FOLDER}/").decode().split()
    return {
        Path(name).name: hashlib.sha256(git("show", f"{commit}:{name}")).hexdigest()
        for name in sorted(names)
        if name.endswith(".py")
    }


def content() -> str:
    """The whole file."""
    made = {version: {"commit": commit, "files": release(commit)} for version, commit in RELEASES.items()}
    return json.dumps(made, indent=2) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    OUT.write_text(content(), encoding="utf-8")
    print(OUT)
