"""The start of the console command `hf-dropkey`: help, version and mistakes without the seconds that torch takes to load.

Beside the package, because whatever lies inside of it is imported after `hf_dropkey/__init__.py`, which registers the
models with Transformers. It needs the standard library only; `hf_dropkey.cli` does what a command says.
"""

import os
import sys
from collections.abc import Sequence

from .files import light
from .parser import PROGRAMS, parse, program_words
from .short_help import short_help


def main(command: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 1 if a checkpoint is not to be trusted, 2 after an error."""
    try:
        code = _run(list(sys.argv[1:] if command is None else command))
        sys.stdout.flush()
    except BrokenPipeError:
        # whoever read the output, such as `head`, has enough; nothing more may be written when the process ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _run(words: list[str]) -> int:
    # behind the command it may be an argument of `Trainer`
    debug = words[:1] == ["--debug"]
    words = words[1:] if debug else words
    if words and words[0] in PROGRAMS:
        program = program_words(words[0], words[1:])
        if program.help == "short":
            print(short_help(program.verb, program.task))
            return 0
        from hf_dropkey.cli import run_program

        return run_program(program, debug=debug)
    arguments = parse(words)
    if arguments.command == "recipes":
        print(light("recipes/__init__.py").listing())
        return 0
    from hf_dropkey.cli import run

    return run(arguments, debug=debug or arguments.debug)
