"""The short `--help` of commands whose arguments are groups of the package, from `arguments.json`.

The file holds what the package's argument groups say, so that help comes without loading them, which takes seconds.
`scripts/write_help.py` writes it, and a test fails while it is not current.
"""

import json
import shutil
import textwrap
from pathlib import Path

from .parser import ABOUT, PROGRAMS, WITH_RECIPE


FILE = Path(__file__).with_name("arguments.json")
NAME_WIDTH = 34


def short_help(verb: str, task: str) -> str:
    """The project's own arguments, by group, and those of `Trainer` that most runs need."""
    found = json.loads(FILE.read_text(encoding="utf-8"))[verb][task]
    width = min(110, max(70, shutil.get_terminal_size().columns))
    choice = f" [--task {'|'.join(PROGRAMS[verb])}]" if len(PROGRAMS[verb]) > 1 else ""
    recipe = " [RECIPE]" if verb in WITH_RECIPE else ""
    lines = [f"usage: hf-dropkey {verb}{choice}{recipe} [--argument value ...]", ""]
    lines += _filled(f"{ABOUT[verb][0].upper()}{ABOUT[verb][1:]} (task: {task}).", width)
    if recipe:
        lines += _filled(
            "RECIPE: a JSON file, or recipe:NAME (`hf-dropkey recipes` lists them); what follows it wins.", width
        )
    for group in found["groups"]:
        head = f"{group['title']}: {group['about'].split('. ')[0]}" if group["about"] else group["title"]
        lines += ["", *_filled(head, width)]
        lines += [line for name, about in group["arguments"] for line in _argument(name, about, width)]
    lines += ["", *_filled(_last(found["trainer"]), width)]
    return "\n".join(lines)


def _last(trainer: bool) -> str:
    others = " and all other arguments of Transformers' Trainer" if trainer else ""
    return f"--help_all has the whole text of each, types and defaults{others}."


def _argument(name: str, about: str, width: int) -> list[str]:
    indent = " " * NAME_WIDTH
    head = f"  --{name}".ljust(NAME_WIDTH)
    # a name that fills its column stands on a line of its own
    first = [] if head.endswith(" ") else [head]
    # the rest is in --help_all
    sentence = about.split(". ")[0].rstrip(".")
    return [*first, (indent if first else head) + textwrap.shorten(sentence, width - NAME_WIDTH, placeholder=" ...")]


def _filled(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width)
