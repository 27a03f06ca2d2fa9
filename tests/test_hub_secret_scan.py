"""Secrets are found however they are written, and words that only look like them are not."""

import base64
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hub_server import TOKEN
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file
from small_runs import SHAPE

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.hub import secret_scan
from hf_dropkey.hub.push_plan import plan_push
from hf_dropkey.hub.secret_scan import secrets_in_texts


def each(form: str) -> str:
    """Every letter of the token in a form."""
    return "".join(form % ord(letter) for letter in TOKEN)


def png(*, compressed: bool = False, behind: bool = False) -> bytes:
    """An image with the token in a text."""
    made, text = io.BytesIO(), PngImagePlugin.PngInfo()
    text.add_text("Comment", f"made with {TOKEN} " * 20, zip=compressed)
    Image.new("RGB", (4, 4)).save(made, "PNG", pnginfo=text)
    content = made.getvalue()
    if behind:
        start = content.index(b"zTXt" if compressed else b"tEXt") - 4
        size = int.from_bytes(content[start : start + 4], "big") + 12
        end = content.index(b"IEND") - 4
        content = content[:start] + content[start + size : end] + content[start : start + size] + content[end:]
    return content


def jpeg() -> bytes:
    made, exif = io.BytesIO(), Image.Exif()
    exif[0x010E] = f"made with {TOKEN}"
    Image.new("RGB", (4, 4)).save(made, "JPEG", exif=exif)
    return made.getvalue()


def metadata(folder: Path) -> None:
    tensors = {"x": np.zeros(3, np.float32)}
    save_file(tensors, folder / "model-00002-of-00002.safetensors", metadata={"note": each("\\u%04x")})


WAYS: dict[str, tuple[str, str | bytes]] = {
    "plain": ("run_facts.json", json.dumps({"command": f"x --hub_token {TOKEN}"})),
    "after a line end": ("run_facts.json", json.dumps({"command": f"a\n{TOKEN}"})),
    "after a tab": ("run_facts.json", json.dumps({"command": f"a\t{TOKEN}"})),
    "as a key": ("run_facts.json", json.dumps({TOKEN: "x"})),
    "after a variable": ("README.md", f"TOKEN_{TOKEN}"),
    "after letters": ("README.md", f"abc{TOKEN}"),
    "in an address": ("README.md", f"https://x.example/?a%3D{TOKEN}"),
    "all in per cent": ("README.md", each("%%%02x")),
    "in per cent twice": ("README.md", each("%%25%02X")),
    "in JSON escapes": ("eval_results.json", '{"x": "' + each("\\u%04X") + '"}'),
    "in Python escapes": ("dropkey.py", "x = '" + each("\\x%02x") + "'\n"),
    "in HTML": ("README.md", each("&#%d;")),
    "in HTML digits": ("README.md", each("&#x%x;")),
    "in base64": ("README.md", base64.b64encode(f"login: {TOKEN}".encode()).decode()),
    "in base64 of addresses": ("README.md", base64.urlsafe_b64encode(f"?>?{TOKEN}".encode()).decode()),
    "in a note": ("NOTICE", TOKEN),
    "in a licence": ("LICENSE", TOKEN),
    "in another licence": ("LICENSE.txt", TOKEN),
    "in git's file": (".gitattributes", f"# {TOKEN}"),
    "in a vocabulary": ("spiece.model", b"\x0a\x05" + TOKEN.encode() + b"\xff"),
    "in merges": ("merges.txt", TOKEN),
    "in a template": ("chat_template.jinja", "{# " + TOKEN + " #}"),
    "in UTF-16": ("NOTICE", TOKEN.encode("utf-16")),
    "in UTF-16 without a mark": ("NOTICE", TOKEN.encode("utf-16-be")),
    "in UTF-16 after a byte": ("NOTICE", b"x" + TOKEN.encode("utf-16-le")),
    "in UTF-32": ("NOTICE", TOKEN.encode("utf-32")),
    "in UTF-8 with a mark": ("NOTICE", b"\xef\xbb\xbf" + TOKEN.encode()),
    "between zeros": ("NOTICE", b"\0".join(bytes([byte]) for byte in TOKEN.encode())),
    "in an image": ("shown.png", png()),
    "compressed in an image": ("shown.png", png(compressed=True)),
    "behind the pixels": ("shown.png", png(compressed=True, behind=True)),
    "in EXIF": ("shown.jpg", jpeg()),
    "behind an image": ("shown.png", png()[:200] + TOKEN.encode()),
    "in a drawing": ("shown.svg", f"<svg><!-- {TOKEN} --></svg>"),
    "in a table": ("shown.csv", f"a,{TOKEN}"),
}
# made up, each in the form of its maker
OTHERS = {
    "AWS": "AKIA" + "Q7RZ2MNB4KXW5TLD",
    "AWS secret": 'aws_secret_access_key = "' + "wJa1rXUtnFEMI/K7MDENG+bPxRfiCYzzKq8Lm4Nv" + '"',
    "Google": "AIza" + "SyB3xK9mQ2wE7rT5yU1iO4pA6sD8fG0hJ2k",
    "Azure": "DefaultEndpointsProtocol=https;AccountKey=" + "Ab1+" * 21 + "Zz==",
    "GitHub": "ghp_" + "aB3dE6gH9j" * 4,
    "GitHub, fine": "github_pat_" + "11ABCDEFG0aB3dE6gH9jKl_" + "aB3dE6gH9j" * 5,
    "GitLab": "glpat-" + "aB3dE6gH9jKlMnOp1234",
    "W&B": "wandb login 0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c",
    "W&B in JSON": '{"WANDB_API_KEY": "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c"}',
    "netrc": "machine api.wandb.ai\n  login user\n  password 0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c",
    "Slack": "xoxb-" + "123456789012-abcdefABCDEF",
    "OpenAI": "sk-proj-" + "aB3dE6gH9j" * 5,
    "PEM": "-----BEGIN RSA PRIVATE KEY-----",
    "PEM, new": "-----BEGIN PRIVATE KEY-----",
    "PGP": "-----BEGIN PGP PRIVATE KEY BLOCK-----",
    "SSH": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "address": "postgres://me:pa55w0rd@db.internal:5432/x",
    "git address": "https://me:pa55w0rd@git.internal/x.git",
    "JWT": "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    "PyPI": "pypi-" + "AgEIcHlwaS5vcmcCJ" + "aB3dE6gH9j" * 5,
}
HARMLESS = (
    "hf_dropkey_vit_for_image_classification_with_a_long_name",
    "hf_" + "x" * 34,
    "HF_TOKEN=hf_...",
    "https://huggingface.co/a/b@main",
    "git@github.com:a/b.git",
    "https://user@host.example/x",
    "commit b60f8af74b3936c90d76d52fa7e2f4632748bc9a",
    "ssh://host:22/x",
    "wandb was not used, commit b60f8af74b3936c90d76d52fa7e2f4632748bc9a of the repository was",
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("template") / "saved"
    DropKeyViTForImageClassification(DropKeyViTConfig(**SHAPE)).save_pretrained(saved)
    return saved


@pytest.fixture
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # the token in use is another one, so that each form is found by itself
    monkeypatch.setenv("HF_TOKEN", "another-word")
    copy = tmp_path / "saved"
    copy.mkdir()
    for file in template.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "README.md").write_text("# Me\n\n[a](shown.png) [b](shown.jpg) [c](shown.svg) [d](shown.csv)\n")
    return copy


def refused(folder: Path, kind: str) -> None:
    with pytest.raises(ValueError, match="looks like a secret") as caught:
        plan_push(folder)
    assert kind in str(caught.value) and TOKEN not in str(caught.value) and "Nothing was sent" in str(caught.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_token_is_found_however_it_is_held(folder, way):
    name, content = WAYS[way]
    with (folder / name).open("ab") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    refused(folder, "a token of the Hub")


@pytest.mark.parametrize("change", [metadata])
def test_metadata_of_safetensors_is_looked_at(folder: Path, change: Callable[[Path], None]) -> None:
    change(folder)
    refused(folder, "a token of the Hub")


def test_a_name_is_looked_at(folder):
    (folder / f"{TOKEN}_results.json").write_text("{}")
    with pytest.raises(ValueError, match="a token of the Hub"):
        plan_push(folder)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_secrets_are_found_without_any_library(kind, monkeypatch):
    monkeypatch.setattr(secret_scan, "_detectors", tuple)
    assert secrets_in_texts([f"a line\nbefore {OTHERS[kind]} and after"]), kind


@pytest.mark.parametrize("text", HARMLESS)
def test_words_that_only_look_like_secrets_pass(text):
    assert secrets_in_texts([text]) == []


def test_detect_secrets_adds_its_own_where_it_is_installed():
    pytest.importorskip("detect_secrets")
    found = secrets_in_texts(["SK" + "0f1e2d3c4b5a69788796a5b4c3d2e1f0"])
    assert found == ["Twilio API Key (detect-secrets)"]


def test_without_detect_secrets_the_own_patterns_are_used(monkeypatch):
    secret_scan._detectors.cache_clear()
    monkeypatch.setitem(sys.modules, "detect_secrets.core.plugins.util", None)
    assert secrets_in_texts([TOKEN]) == ["a token of the Hub"]
    secret_scan._detectors.cache_clear()


def test_what_saving_and_training_write_holds_none(folder):
    assert plan_push(folder).files
