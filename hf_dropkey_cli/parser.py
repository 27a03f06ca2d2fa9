"""Commands and their arguments, read without importing the package."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from .files import light, version


# commands whose arguments are groups of the package, with the tasks of each
PROGRAMS = {
    "train": ("classification", "detection", "hoi", "mesh", "segmentation"),
    "evaluate": ("classification", "detection", "hoi", "mesh", "segmentation"),
    "predict": ("classification", "hoi", "mesh", "segmentation"),
    "look": ("classification",),
    "search": ("classification",),
}
# those that take a recipe before their arguments
WITH_RECIPE = ("train", "search")
ABOUT = {
    "train": "train a model, from a recipe or arguments",
    "evaluate": "measure a saved model on data",
    "predict": "use a saved model on images",
    "look": "draw the attention of a saved model, and what DropKey does to it",
    "search": "find the drop ratio, schedule and pattern for your data, by many trainings",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with the message and where the arguments are listed."""
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists what there is\n")


@dataclass(frozen=True)
class ProgramWords:
    """One of `PROGRAMS` as a command line names it: its task, its own arguments, and which help is asked for."""

    verb: str
    task: str
    rest: tuple[str, ...]
    help: Literal["short", "all"] | None


def program_words(verb: str, words: Sequence[str]) -> ProgramWords:
    """Splits what stands behind one of `PROGRAMS`. Exits with one line if there is no such task."""
    # no argument of the program may count as a short form of --task
    parser = Parser(prog=f"hf-dropkey {verb}", add_help=False, allow_abbrev=False)
    parser.add_argument("--task", choices=PROGRAMS[verb])
    parser.add_argument("--help", "-h", action="store_const", const="short")
    parser.add_argument("--help_all", "--help-all", action="store_const", const="all", dest="help")
    found, rest = parser.parse_known_args(list(words))
    recipes = light("recipes/__init__.py")
    named = recipes.task_of(rest[0]) if verb in WITH_RECIPE and rest and recipes.is_recipe(rest[0]) else None
    if found.task is not None and named not in (None, found.task):
        parser.error(f"{rest[0]} is a recipe of --task {named}, not of --task {found.task}")
    if named is not None and named not in PROGRAMS[verb]:
        parser.error(f"{rest[0]} is a recipe of --task {named}; {verb} has {', '.join(PROGRAMS[verb])}")
    return ProgramWords(verb, found.task or named or "classification", tuple(rest), found.help)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Reads any other command. Exits after --help and --version, and with one line after a mistake."""
    return _parser().parse_args([_underscored(word) for word in words])


def _underscored(word: str) -> str:
    """An option with underscores for dashes; both are accepted, as in the programs."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") and len(name) > 2 else word


def _parser() -> Parser:
    parser = Parser(
        prog="hf-dropkey",
        description="DropKey for the vision transformers of Transformers: train, use, inspect and share models.",
        epilog="`hf-dropkey COMMAND --help` lists the arguments of a command. Behind `hf-dropkey --debug` a mistake "
        "shows its traceback.",
    )
    parser.add_argument("--version", action="version", version=f"hf-dropkey {version()}")
    parser.add_argument("--debug", action="store_true", help="show where an error was raised")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for verb, about in ABOUT.items():
        tasks = f" (--task {', '.join(PROGRAMS[verb])})" if len(PROGRAMS[verb]) > 1 else ""
        commands.add_parser(verb, help=about + tasks, add_help=False)
    for add in (_recipes, _report, _info, _check, _card, _push, _export, _demo):
        add(commands)
    return parser


def _command(commands: "argparse._SubParsersAction[Parser]", name: str, about: str) -> Parser:
    parser: Parser = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _recipes(commands: "argparse._SubParsersAction[Parser]") -> None:
    _command(commands, "recipes", "list the recipes for `hf-dropkey train recipe:NAME`")


def _report(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = _command(commands, "report", "write report.html, one page about a training run, into its folder")
    parser.add_argument("folder", type=Path, help="output folder of a training run")


def _info(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = _command(commands, "info", "where DropKey acts: schedule, attentions with their ratios, backend")
    parser.add_argument("target", help="saved model: a folder, or owner/name on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub; default: main")


def _check(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = _command(
        commands, "check", "can a folder or a repository be trusted? exit code 0, 1 (problems), 2 (unreadable)"
    )
    parser.add_argument("target", help="folder, or owner/name on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit; default: the newest commit")
    parser.add_argument(
        "--digest", help="digest of a folder that an earlier check printed; the folder must not have changed"
    )


def _card(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = _command(commands, "card", "write or renew README.md from the results files of a run")
    parser.add_argument("folder", type=Path, help="saved model")
    parser.add_argument("--repo_id", help="where it is on the Hub, for the usage")
    parser.add_argument("--revision", help="commit or tag that the usage pins")
    parser.add_argument("--dataset", help="name of the data")
    parser.add_argument("--dataset_id", help="its id on the Hub")
    parser.add_argument("--dataset_split", help="split used for evaluation")
    parser.add_argument("--base_model", help="model that training started from")
    parser.add_argument("--license", help="licence of the weights, such as apache-2.0")
    parser.add_argument("--command", dest="command_line", help="command that trained the model")


def _push(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = _command(commands, "push", "upload a saved model with its code and card, in one commit")
    parser.add_argument("folder", type=Path, help="saved model")
    parser.add_argument("repo_id", help="owner/name; created if it does not exist")
    parser.add_argument("--revision", help="branch, created if it does not exist; default: main")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--message", help="title of the commit; default: Upload model")
    parser.add_argument(
        "--replace_readme", action="store_true", help="publish the folder's card in place of the repository's"
    )
    parser.add_argument(
        "--include", nargs="+", default=(), metavar="PATTERN", help='more files, such as "figures/*.png"'
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="only list the files that would be sent and those that would stay"
    )
    _space(parser)


def _space(parser: Parser) -> None:
    parser.add_argument(
        "--space",
        action="store_true",
        help="upload a Space that shows the model, or a folder of `demo --space_folder`",
    )
    parser.add_argument("--images", type=Path, help="folder of example images of a Space, which become public")
    _package(parser)


def _export(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = _command(commands, "export", "write a plain Transformers checkpoint (no DropKey, no code), or a graph")
    parser.add_argument("target", help="saved model: a folder, or owner/name on the Hub")
    parser.add_argument("out", type=Path, help="folder to write; new or empty")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub; default: main")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the saved model in out; all files there are deleted"
    )
    parser.add_argument(
        "--format",
        choices=("safetensors", "onnx", "pt2"),
        default="safetensors",
        help="a plain checkpoint, or a graph with a free batch size; default: safetensors",
    )
    parser.add_argument("--int8", action="store_true", help="an ONNX graph with weights in 8 bits, too")
    parser.add_argument(
        "--monte_carlo", action="store_true", help="a second graph that drops keys, by its input `seed`"
    )
    parser.add_argument(
        "--image_size", type=int, help="side in pixels of the images of a graph; default: the processor's"
    )


def _demo(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = _command(commands, "demo", "try a saved model in the browser, on a page that this machine serves")
    parser.add_argument("targets", nargs="+", metavar="target", help="saved model; a second classifier is compared")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on, 0 for any free one; default: 7860")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    parser.add_argument(
        "--images", type=Path, help="folder of example images; default: digits, or scikit-learn's photographs"
    )
    parser.add_argument(
        "--space_folder", type=Path, metavar="OUT", help="write the folder of a Space with this page; serve nothing"
    )
    parser.add_argument(
        "--static_page",
        type=Path,
        metavar="OUT",
        help="write a page that computes in the browser alone, for any web server or a static Space; serve nothing",
    )
    parser.add_argument(
        "--onnxruntime_web",
        type=Path,
        metavar="FILE",
        help="archive of `npm pack`, or folder, with what runs the graph of such a page; default: npm fetches it",
    )
    _package(parser)


def _package(parser: Parser) -> None:
    parser.add_argument(
        "--package", help="what a Space installs: hf_dropkey[demo]==VERSION, or git+https://HOST/OWNER/NAME@COMMIT"
    )
