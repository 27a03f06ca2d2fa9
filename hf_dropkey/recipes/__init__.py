"""The recipes that ship with the package: JSON files of arguments beside this one, for `hf-dropkey train recipe:NAME`.

They lie in the package, so that a wheel has them; a link in `scripts/` to them would not survive a checkout on Windows
or an archive. This module needs the standard library only.
"""

import json
import textwrap
from pathlib import Path


FOLDER = Path(__file__).resolve().parent
PREFIX = "recipe:"
# fields of a recipe that are no arguments: what to expect, and of which task it is
NOTES = ("about", "task")
# where recipes lay before they were part of the package; committed commands name them so
FORMER = ("scripts", "recipes")


def names() -> list[str]:
    """The names of all recipes."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def is_recipe(word: str) -> bool:
    """Whether a word of a command line stands for a recipe."""
    return word.startswith(PREFIX) or word.endswith(".json")


def recipe_file(word: str) -> Path:
    """The file of a recipe, named `recipe:NAME` or by its path.

    Raises:
        FileNotFoundError: There is no such recipe.
    """
    if word.startswith(PREFIX):
        name = word.removeprefix(PREFIX)
    else:
        file = Path(word)
        if file.is_file() or file.parts[-3:-1] != FORMER:
            return file
        name = file.stem
    if name not in names():
        raise FileNotFoundError(f"there is no recipe {name!r}; there are {', '.join(names())}, or give a JSON file")
    return FOLDER / f"{name}.json"


def task_of(word: str) -> str | None:
    """The task that a recipe names; None if it names none, or cannot be read, which its reader reports."""
    try:
        found = json.loads(recipe_file(word).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    task = found.get("task") if isinstance(found, dict) else None
    return task if isinstance(task, str) else None


def listing(width: int = 100) -> str:
    """Each recipe with its task and what to expect of it."""
    lines = []
    for name in names():
        found = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        lines.append(f"{PREFIX}{name}  ({found['task']})")
        lines += textwrap.wrap(found["about"], width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)
