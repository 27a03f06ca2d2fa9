"""Searches files that are about to be published for secrets: tokens, keys and passwords, plain or encoded.

The patterns here are always used, those of detect-secrets where it is installed (`pip install "hf_dropkey[push]"`). A
file is searched as bytes, as UTF-8 and UTF-16 text, and with escapes undone: of JSON and Python, of URLs, of HTML, and
base64. Texts inside images and the metadata of safetensors are searched as well; the numbers of tensors only as bytes.
"""

import base64
import binascii
import html
import importlib
import json
import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from PIL import Image, UnidentifiedImageError

from .contents import TEXT_LIMIT, Entry


# no word boundary in front: "TOKEN_hf_...", "\\nhf_..." and "%3Dhf_..." are tokens all the same
PATTERNS = {
    "a token of the Hub": r"(?:hf|api_org)_(?:[a-z]+_)?[A-Za-z0-9]{20,}",
    "a key of AWS": r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}|aws_secret_access_key[\"'\s:=]{1,6}[A-Za-z0-9/+]{40}",
    "a key of Google": r"AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,}|GOCSPX-[A-Za-z0-9_-]{20,}",
    "a key of Azure": r"AccountKey=[A-Za-z0-9+/]{60,}|SharedAccessSignature=|[?&]sig=[A-Za-z0-9%]{40,}",
    "a token of GitHub": r"gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{40,}",
    "a token of GitLab": r"gl(?:pat|dt|rt|cbt)-[A-Za-z0-9_-]{20,}",
    "a key of Weights & Biases": r"(?i:wandb)[A-Za-z_\"'\s:=./\\\[\]{}-]{0,40}\b[0-9a-f]{40}\b|wandb_v1_[A-Za-z0-9_]{30,}",
    "a key of OpenAI or Anthropic": r"sk-(?:[a-z]+[0-9]*-)*[A-Za-z0-9_-]{32,}",
    "a token of Slack": r"xox[abeoprs]-[A-Za-z0-9-]{10,}|hooks\.slack\.com/services/T[A-Za-z0-9/]{20,}",
    "a token of a registry": r"pypi-[A-Za-z0-9_-]{50,}|npm_[A-Za-z0-9]{36}|dckr_pat_[A-Za-z0-9_-]{20,}",
    "a key of Comet, Neptune or Kaggle": r"(?i:comet|neptune|kaggle)[A-Za-z_\"'\s:=-]{0,20}(?:key|token)[\"'\s:=]{1,6}[A-Za-z0-9+/=_-]{25,}",
    "a private key": r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----",
    "a signed token (JWT)": r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "an address with a password": r"[a-z][a-z0-9+.-]{1,20}://[^\s/:@\"'<>{}$]{0,100}:[^\s/:@\"'<>{}$]{3,200}@[^\s/\"'<>]{3,}",
}
COMPILED = {kind: re.compile(pattern) for kind, pattern in PATTERNS.items()}
# a long run of one character, or such a word, stands for a secret to fill in
PLACEHOLDER = re.compile(r"_?(.)\1{11,}|(?i:your|example|placeholder|xxxx)")
BASE64 = re.compile(r"[A-Za-z0-9+/_-]{24,4096}={0,2}")
# two blocks of one file overlap, so that a secret on their boundary is whole in one of them
BLOCK, OVERLAP = 2**24, 2**12
# those of detect-secrets that are quick on large files and guess nothing
DETECTORS = (
    "ArtifactoryDetector",
    "AWSKeyDetector",
    "AzureStorageKeyDetector",
    "BasicAuthDetector",
    "DiscordBotTokenDetector",
    "GitHubTokenDetector",
    "GitLabTokenDetector",
    "JwtTokenDetector",
    "MailchimpDetector",
    "OpenAIDetector",
    "PrivateKeyDetector",
    "PypiTokenDetector",
    "SendGridDetector",
    "SlackDetector",
    "SquareOAuthDetector",
    "StripeDetector",
    "TelegramBotTokenDetector",
    "TwilioKeyDetector",
)


def secrets_in(entry: Entry, own: str | None = None) -> list[str]:
    """Kinds of secrets in a file, its name included, in words for an error; empty if none was found.

    Args:
        entry: The file.
        own: The token in use, which is a secret in any form.
    """
    return secrets_in_texts([entry.name, *texts_of(entry)], own)


def secrets_in_texts(texts: Any, own: str | None = None) -> list[str]:
    """As `secrets_in`, of texts that are already read."""
    found: dict[str, None] = {}
    for text in texts:
        for form in forms(text):
            found |= dict.fromkeys(_matches(form, own))
    return list(found)


def _matches(text: str, own: str | None) -> Iterator[str]:
    if own and own in text:
        yield "the token in use"
    for kind, pattern in COMPILED.items():
        if any(not PLACEHOLDER.search(one.group()) for one in pattern.finditer(text)):
            yield kind
    yield from _detected(text)


def forms(text: str) -> Iterator[str]:
    """A text as it is, and with the escapes of JSON, Python, URLs, HTML and base64 undone."""
    seen = {text}
    yield text
    waiting = [text]
    # encodings are nested three deep at most, as in a URL in JSON in a URL
    for _ in range(3):
        waiting = [made for one in waiting for made in _unescaped(one) if made not in seen and not seen.add(made)]  # type: ignore[func-returns-value]
        yield from waiting


def _unescaped(text: str) -> Iterator[str]:
    if "\\" in text:
        yield re.sub(
            r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|N?([\\/\"'abfnrtv0]))",
            lambda found: _character(found[1] or found[2] or found[3]) if not found[4] else _escaped(found[4]),
            text,
        )
    if "%" in text:
        yield unquote(text)
    if "&" in text:
        yield html.unescape(text)
    decoded = [made for found in BASE64.finditer(text) if (made := _from_base64(found.group()))]
    if decoded:
        yield "\n".join(decoded)
    if "\0" in text:
        yield text.replace("\0", "")


def _escaped(letter: str) -> str:
    """The character of a backslash and a letter; white space for those without a visible one."""
    return letter if letter in "\\/\"'" else "\n"


def _character(digits: str) -> str:
    number = int(digits, 16)
    return chr(number) if number < 0x110000 and not 0xD800 <= number < 0xE000 else " "


def _from_base64(text: str) -> str | None:
    """The text that base64 holds, None if it does not hold text."""
    whole = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        content = base64.b64decode(whole + "=" * (-len(whole) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
    # words that are not base64 decode to bytes outside of readable text
    return content.decode("ascii") if all(9 <= byte < 127 for byte in content) else None


def texts_of(entry: Entry) -> Iterator[str]:
    """Everything in a file that may be text."""
    kind = PurePosixPath(entry.name).suffix.lower()
    if kind == ".safetensors":
        yield from _metadata(entry.path)
    if kind in (".png", ".jpg", ".jpeg"):
        yield from _image_texts(entry.path)
    with entry.path.open("rb") as opened:
        before = b""
        while block := opened.read(BLOCK):
            content = before + block
            # runs of text between zeros and other bytes
            if kind in (".safetensors", ".onnx", ".png", ".jpg", ".jpeg", ".model") or entry.size > TEXT_LIMIT:
                yield from _readable(content)
            else:
                yield from decoded(content)
            before = content[-OVERLAP:]


def decoded(content: bytes) -> Iterator[str]:
    """Bytes as text, in the usual encodings of text files."""
    yield content.decode("utf-8", "replace")
    if b"\0" in content or content.startswith((b"\xff\xfe", b"\xfe\xff")):
        for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
            for start in (0, 1):
                yield content[start:].decode(encoding, "replace")


def _readable(content: bytes) -> Iterator[str]:
    """Runs of printable characters, of one byte or of two."""
    runs = re.findall(rb"[\t\n\r -~]{12,}", content)
    wide = re.findall(rb"(?:[\t\n\r -~]\0){12,}", content)
    yield "\n".join([run.decode("ascii") for run in runs] + [run.decode("utf-16-le") for run in wide])


def _metadata(path: Path) -> Iterator[str]:
    with path.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        content = opened.read(min(size, TEXT_LIMIT))
    try:
        metadata = json.loads(content).get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError):
        # its contents are searched as bytes
        return
    yield json.dumps(metadata, ensure_ascii=False)


def _image_texts(path: Path) -> Iterator[str]:
    """Comments, texts and EXIF of an image, which may be compressed in the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                # texts after the pixels are known once those are read
                image.load()
                found = [*image.info.items(), *getattr(image, "text", {}).items(), *image.getexif().items()]
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        # its contents are searched as bytes
        return
    for name, value in found:
        parts = value if isinstance(value, list | tuple) else (value,)
        for part in (name, *parts):
            yield from decoded(part) if isinstance(part, bytes) else [str(part)]


@cache
def _detectors() -> tuple[tuple[str, Any], ...]:
    """The detectors of detect-secrets, each with the name of its secrets; none where it is not installed."""
    try:
        plugins: Any = importlib.import_module("detect_secrets.core.plugins.util")
    except ImportError:
        return ()
    found = plugins.get_mapping_from_secret_type_to_class()
    return tuple((kind, cls()) for kind, cls in found.items() if cls.__name__ in DETECTORS)


def _detected(text: str) -> Iterator[str]:
    """What the patterns of detect-secrets find in a text; its guesses by entropy and by keyword are not used."""
    for kind, detector in _detectors():
        if any(not PLACEHOLDER.search(secret) for secret in detector.analyze_string(text)):
            yield f"{kind} (detect-secrets)"
