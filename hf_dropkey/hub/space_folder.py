"""The folder of a Space that shows a model (`hf-dropkey demo`): what it holds, and whether it still does.

    app.py              three lines
    requirements.txt    this package, pinned
    README.md           the settings of the Space
    examples/           pictures
    model/              the model, as a push would send it

The model lies inside, so that one commit holds what is shown.
"""

import json
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

# huggingface_hub and Transformers require it
import yaml  # type: ignore[import-untyped]

from ..version import __version__
from .cards import README, RunFacts
from .push_plan import plan_push


APP, REQUIREMENTS, MODEL, EXAMPLES = "app.py", "requirements.txt", "model", "examples"
APP_TEXT = """from hf_dropkey.demo.server import run_space

run_space()
"""
# what pyproject.toml allows and constraints.txt pins
GRADIO, PYTHON = "6.31.0", "3.12"
SETTINGS = {"sdk": "gradio", "sdk_version": GRADIO, "python_version": PYTHON, "app_file": APP}
PACKAGE = "hf_dropkey[demo]"
# a release, or a commit of a repository
PINNED = re.compile(r"hf[_-]dropkey\[demo\] ?(==[0-9][0-9a-z.+]*|@ git\+https://[^\s@]+@[0-9a-f]{40})")
CARD = """# {title}

What a vision transformer sees, and how sure it is: attention rollout, the keys that DropKey drops in each layer, and
predictions over random masks. The model lies in `model/`; `app.py` is `hf-dropkey demo` of
[hf_dropkey](https://arxiv.org/abs/2208.02646), pinned in `requirements.txt`.

{examples}
"""


def pinned_requirement(package: str | None = None) -> str:
    """The line of requirements.txt that installs this package.

    Args:
        package: A line of one's own; default: the commit that this package was installed from, if it was from git, else
            its release.

    Raises:
        ValueError: It is not pinned to a release or a commit.
    """
    if package is None:
        package = f"{PACKAGE} @ {_installed_from()}" if _installed_from() else f"{PACKAGE}=={__version__}"
    elif package.startswith("git+"):
        package = f"{PACKAGE} @ {package}"
    if not PINNED.fullmatch(package):
        raise ValueError(
            f"--package {package} is not pinned; give {PACKAGE}==VERSION, or git+https://HOST/OWNER/NAME@COMMIT with the "
            "40 digits of the commit"
        )
    return package


def _installed_from() -> str | None:
    """Repository and commit that this package was installed from, as pip notes them (PEP 610)."""
    try:
        noted = distribution("hf_dropkey").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    found = json.loads(noted) if noted else {}
    commit = found.get("vcs_info", {}).get("commit_id")
    return f"git+{found['url']}@{commit}" if commit and str(found.get("url", "")).startswith("https://") else None


def write_space(
    model: Path, out: Path, examples: Mapping[str, bytes], *, title: str, origin: str, package: str | None = None
) -> list[Path]:
    """Writes the folder of a Space.

    Args:
        model: A saved model.
        out: New or empty.
        examples: PNG files by name.
        title: Of the page.
        origin: Where the examples are from, with their licence, one sentence.
        package: As for `pinned_requirement`.

    Returns:
        The files.

    Raises:
        FileExistsError: `out` has files.
        FileNotFoundError, ValueError: As `plan_push`; or the package is not pinned.
    """
    check_new(out)
    requirement = pinned_requirement(package)
    plan = plan_push(model)
    settings = {"title": title, "emoji": "🔑", "colorFrom": "blue", "colorTo": "yellow", **SETTINGS, "pinned": False}
    licence = RunFacts.load(model).license
    settings |= {"tags": ["dropkey"]} | ({"license": licence} if licence else {})
    front = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    contents: dict[str, bytes] = {
        APP: APP_TEXT.encode(),
        REQUIREMENTS: f"{requirement}\n".encode(),
        README: f"---\n{front}---\n\n{CARD.format(title=title, examples=origin)}".encode(),
        **{f"{EXAMPLES}/{name}": content for name, content in examples.items()},
    }
    written = []
    for file in plan.files:
        contents[f"{MODEL}/{file.name}"] = (model / file.name).read_bytes() if file.content is None else file.content
    for name, content in contents.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        written.append(path)
    return written


def check_new(out: Path) -> None:
    """Raises FileExistsError for a folder that has files."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder; choose a new one")


def is_space_folder(names: list[str]) -> bool:
    """Whether these are the files of a Space, not of a model."""
    return APP in names and "config.json" not in names and f"{MODEL}/config.json" in names


def space_problems(contents: Mapping[str, bytes]) -> Iterator[str]:
    """What is wrong with the files of a Space beside its model and its examples, one sentence each.

    Args:
        contents: The small files at the top, by name.
    """
    if contents.get(APP) != APP_TEXT.encode():
        yield f"{APP} is not that of hf_dropkey {__version__}, and it is the code that a Space runs"
    requirements = contents.get(REQUIREMENTS)
    lines = requirements.decode("utf-8", "replace").split("\n") if requirements is not None else []
    if len(lines) != 2 or lines[1] or not PINNED.fullmatch(lines[0]):
        yield (
            f"{REQUIREMENTS} is not one line that pins {PACKAGE} to a release or a commit, so it installs what nobody "
            "has checked"
        )
    elif "@" in lines[0]:
        # a release is one of the registry's; a repository is whoever owns it
        yield from _other_repository(lines[0])
    found = front_matter(contents.get(README, b"").decode("utf-8", "replace"))
    for name, expected in SETTINGS.items():
        if found.get(name) != expected:
            yield f"{README} has {name} {found.get(name)!r}, where the Space of hf_dropkey {__version__} has {expected!r}"


def _other_repository(line: str) -> Iterator[str]:
    here = _installed_from()
    if here is None or line != f"{PACKAGE} @ {here}":
        yield (
            f"{REQUIREMENTS} installs {line.partition('@ ')[2]}, a repository that this check has not seen; compare it "
            "with the one that you trust"
        )


def front_matter(text: str) -> dict[str, object]:
    """The settings at the top of a README.md; empty without."""
    found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        settings = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return settings if isinstance(settings, dict) else {}
