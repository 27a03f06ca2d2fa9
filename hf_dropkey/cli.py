"""The console command `hf-dropkey`: training, checking, exporting and publishing saved models without writing Python.

Every sub-command is one call of the package, imported when it is needed.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from huggingface_hub.errors import HFValidationError, StrictDataclassError

from .version import __version__


# the tasks of `hf-dropkey train`: module and class of each job
TASKS = {
    "classification": ("classification.job", "ClassificationJob"),
    "detection": ("detection.job", "DetectionJob"),
    "hoi": ("hoi.job", "HoiJob"),
    "mesh": ("mesh.job", "MeshJob"),
}


def main(command: Sequence[str] | None = None) -> int:
    """Runs one sub-command; returns 0, 1 if a checkpoint is not to be trusted, 2 after an error."""
    words = list(sys.argv[1:] if command is None else command)
    # behind `train` it is an argument of `Trainer`
    debug = words[:1] == ["--debug"]
    # the job reads its own arguments, recipes among them, and has its own --help
    arguments, rest = _parser().parse_known_args(words)
    if rest and arguments.command != "train":
        _parser().error(f"unknown arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        code: int = arguments.run(arguments)
        return code
    except (OSError, ValueError, HFValidationError, ImportError, StrictDataclassError) as error:
        if debug:
            raise
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", []))
        # the error of a configuration field has two lines
        message = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else error
        print(f"hf-dropkey {arguments.command}: {message}{notes}", file=sys.stderr)
        return 2


def train(arguments: argparse.Namespace) -> int:
    """Runs a training job."""
    module, name = TASKS[arguments.task]
    getattr(import_module(f".{module}", __package__), name).main(arguments.rest)
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Prints whether a checkpoint can be trusted."""
    from .hub.release_check import check_release

    report = check_release(arguments.target, revision=arguments.revision, digest=arguments.digest)
    print(report)
    return 0 if report.trusted else 1


def export(arguments: argparse.Namespace) -> int:
    """Writes a plain Transformers checkpoint, or a graph."""
    from .export import export_graph, export_plain
    from .saved import check_model_folder

    check_model_folder(arguments.folder)
    if arguments.format != "safetensors":
        graph = export_graph(
            arguments.folder,
            arguments.out,
            file_format=arguments.format,
            image_size=arguments.image_size,
            int8=arguments.int8,
            overwrite=arguments.overwrite,
        )
        print(f"{arguments.out}: {graph}")
        return 0
    if arguments.int8 or arguments.image_size:
        raise ValueError("--int8 and --image_size belong to --format onnx or pt2; a plain checkpoint has neither")
    model = export_plain(arguments.folder, arguments.out, overwrite=arguments.overwrite)
    print(f"{arguments.out}: {type(model).__name__}, a plain Transformers checkpoint")
    return 0


def push(arguments: argparse.Namespace) -> int:
    """Uploads a folder."""
    from .hub.push import push_folder
    from .hub.push_plan import plan_push

    if arguments.dry_run:
        print(plan_push(arguments.folder, include=arguments.include))
        print("nothing was sent")
        return 0
    done = push_folder(
        arguments.folder,
        arguments.repo_id,
        revision=arguments.revision,
        private=arguments.private or None,
        commit_message=arguments.message,
        replace_readme=arguments.replace_readme,
        include=arguments.include,
        announce=print,
    )
    print(f"{done.url}" if done.changed else f"{done.url}: nothing new, no commit made")
    print(f'load it with revision="{done.commit}"')
    return 0


def card(arguments: argparse.Namespace) -> int:
    """Writes or renews a model card."""
    from .hub.cards import RunFacts, write_card

    names = ("dataset", "dataset_id", "dataset_split", "base_model", "license", "command_line")
    facts = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if "command_line" in facts:
        facts["command"] = facts.pop("command_line")
    new = replace(RunFacts.load(arguments.folder), **facts) if facts else None
    print(write_card(arguments.folder, repo_id=arguments.repo_id, revision=arguments.revision, facts=new))
    return 0


def info(arguments: argparse.Namespace) -> int:
    """Prints where DropKey acts in a saved model."""
    from .inspection.saved import inspect_folder

    print(inspect_folder(arguments.folder))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-dropkey", description="DropKey models of Transformers: saved folders.")
    parser.add_argument("--version", action="version", version=f"hf-dropkey {__version__}")
    parser.add_argument("--debug", action="store_true", help="show where an error was raised")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    training = commands.add_parser(
        "train",
        help="train a model: from a recipe or arguments (--help lists them)",
        # --help is the job's, and so are recipes
        add_help=False,
        # no argument of the job may count as a short form of --task
        allow_abbrev=False,
    )
    training.add_argument("--task", choices=sorted(TASKS), default="classification", help="default: classification")
    training.set_defaults(run=train)

    checking = commands.add_parser("check", help="can a folder or a repository be trusted? (exit code 0 or 1)")
    checking.add_argument("target", help="folder, or owner/name on the Hub")
    checking.add_argument("--revision", help="branch, tag or commit; default: the newest commit")
    checking.add_argument(
        "--digest", help="digest of a folder that an earlier check printed; the folder must not have changed"
    )
    checking.set_defaults(run=check)

    exporting = commands.add_parser(
        "export", help="write a plain Transformers checkpoint (no DropKey, no code), or a graph for other runtimes"
    )
    exporting.add_argument("folder", type=Path, help="saved model")
    exporting.add_argument("out", type=Path, help="folder to write; new or empty")
    exporting.add_argument(
        "--overwrite", action="store_true", help="replace the saved model in out; all files there are deleted"
    )
    exporting.add_argument(
        "--format",
        choices=("safetensors", "onnx", "pt2"),
        default="safetensors",
        help="a plain checkpoint, or a graph with a free batch size; default: safetensors",
    )
    exporting.add_argument("--int8", action="store_true", help="an ONNX graph with weights in 8 bits, too")
    exporting.add_argument(
        "--image_size", type=int, help="side in pixels of the images of a graph; default: the processor's"
    )
    exporting.set_defaults(run=export)

    pushing = commands.add_parser("push", help="upload a saved model with its code and card, in one commit")
    pushing.add_argument("folder", type=Path, help="saved model")
    pushing.add_argument("repo_id", help="owner/name; created if it does not exist")
    pushing.add_argument("--revision", help="branch, created if it does not exist; default: main")
    pushing.add_argument("--private", action="store_true", help="make a private repository")
    pushing.add_argument("--message", default="Upload model", help="title of the commit")
    pushing.add_argument(
        "--replace-readme", action="store_true", help="publish the folder's card in place of the repository's"
    )
    pushing.add_argument(
        "--include", nargs="+", default=(), metavar="PATTERN", help='more files, such as "figures/*.png"'
    )
    pushing.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="only list the files that would be sent and those that would stay",
    )
    pushing.set_defaults(run=push)

    writing = commands.add_parser("card", help="write or renew README.md from the results files of a run")
    writing.add_argument("folder", type=Path, help="saved model")
    writing.add_argument("--repo-id", help="where it is on the Hub, for the usage")
    writing.add_argument("--revision", help="commit or tag that the usage pins")
    writing.add_argument("--dataset", help="name of the data")
    writing.add_argument("--dataset-id", help="its id on the Hub")
    writing.add_argument("--dataset-split", help="split used for evaluation")
    writing.add_argument("--base-model", help="model that training started from")
    writing.add_argument("--license", help="licence of the weights, such as apache-2.0")
    writing.add_argument("--command", dest="command_line", help="command that trained the model")
    writing.set_defaults(run=card)

    showing = commands.add_parser("info", help="where DropKey acts: schedule, attentions with their ratios, backend")
    showing.add_argument("folder", type=Path, help="saved model")
    showing.set_defaults(run=info)
    return parser


if __name__ == "__main__":
    sys.exit(main())
