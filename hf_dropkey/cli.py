"""What each command of `hf-dropkey` does. Every command is one call of the package, imported when it is needed.

`hf_dropkey_cli`, beside the package, reads command lines and answers what needs no package.
"""

import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, get_type_hints

from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers import TrainingArguments

from hf_dropkey_cli import main as main
from hf_dropkey_cli.parser import ProgramWords, program_words
from hf_dropkey_cli.short_help import short_help


# module and name of each program: a training job, or a function that takes its arguments as words
PROGRAMS = {
    ("train", "classification"): ("classification.job", "ClassificationJob"),
    ("train", "detection"): ("detection.job", "DetectionJob"),
    ("train", "hoi"): ("hoi.job", "HoiJob"),
    ("train", "mesh"): ("mesh.job", "MeshJob"),
    ("train", "segmentation"): ("segmentation.job", "SegmentationJob"),
    ("evaluate", "classification"): ("classification.evaluation", "main"),
    ("evaluate", "detection"): ("detection.job", "DetectionEvaluation"),
    ("evaluate", "hoi"): ("hoi.job", "HoiEvaluation"),
    ("evaluate", "mesh"): ("mesh.job", "MeshEvaluation"),
    ("evaluate", "segmentation"): ("segmentation.job", "SegmentationEvaluation"),
    ("predict", "classification"): ("classification.prediction", "predict"),
    ("predict", "hoi"): ("hoi.predict", "predict"),
    ("predict", "mesh"): ("mesh.prediction", "predict"),
    ("predict", "segmentation"): ("segmentation.prediction", "predict"),
    ("look", "classification"): ("classification.look", "main"),
    ("search", "classification"): ("classification.search", "main"),
}
# arguments of `Trainer` that most runs need, for the short help; the texts are ours, because Transformers' change
TRAINER_ARGUMENTS = {
    "output_dir": "Folder of the run: model, card, report.html, checkpoints.",
    "do_train": "Train.",
    "do_eval": "Evaluate at the end.",
    "num_train_epochs": "Passes over the training data.",
    "max_steps": "Steps, instead of epochs.",
    "learning_rate": "Largest learning rate.",
    "per_device_train_batch_size": "Training examples at a time on each device.",
    "per_device_eval_batch_size": "Evaluated examples at a time on each device.",
    "gradient_accumulation_steps": "Batches in a step.",
    "weight_decay": "Weight decay of AdamW.",
    "warmup_steps": "Steps of rising learning rate; below 1: a fraction of all steps.",
    "lr_scheduler_type": "How the learning rate falls, such as cosine.",
    "eval_strategy": "When to evaluate in training: no, steps or epoch.",
    "save_strategy": "When to save a checkpoint: no, steps, epoch or best.",
    "load_best_model_at_end": "Keep the weights of the best evaluation.",
    "logging_steps": "Steps between lines of the log.",
    "resume_from_checkpoint": "auto: start, or go on from the last whole checkpoint.",
    "seed": "Seed of the weights, the masks and the order of the data.",
    "use_cpu": "Leave accelerators alone.",
    "bf16": "Mixed precision in bfloat16.",
    "dataloader_num_workers": "Processes that read data.",
    "report_to": "Trackers of experiments, such as none or tensorboard.",
    "push_to_hub": "Upload the result.",
    "hub_model_id": "Where to, owner/name.",
}
# what a user can cause and mend; anything else is a fault of this package and shows its traceback
# FloatingPointError: a loss that is not finite
MISTAKES = (OSError, ValueError, HFValidationError, ImportError, StrictDataclassError, FloatingPointError)


def argument_groups(verb: str, task: str) -> list[Any]:
    """The groups of arguments of a program, as dataclasses."""
    module, name = PROGRAMS[verb, task]
    found = import_module(f".{module}", __package__)
    job = getattr(found, name)
    if isinstance(job, type):
        hints = get_type_hints(job)
        made: Any = job
        return [hints[entry.name] for entry in fields(made)]
    return list(found.ARGUMENTS)


def program(verb: str, task: str) -> Callable[[Sequence[str]], Any]:
    """What runs a program on its arguments as words."""
    module, name = PROGRAMS[verb, task]
    found = getattr(import_module(f".{module}", __package__), name)
    if isinstance(found, type):
        run: Callable[[Sequence[str]], Any] = found.main  # type: ignore[attr-defined]  # a job
        return run
    if name == "main":
        main_function: Callable[[Sequence[str]], Any] = found
        return main_function
    return lambda words: found(*_parsed(verb, task, words))


def _parsed(verb: str, task: str, words: Sequence[str]) -> tuple[Any, ...]:
    from .training.arguments import parse_arguments

    return parse_arguments(argument_groups(verb, task), words)


def help_texts() -> dict[str, dict[str, Any]]:
    """What `hf_dropkey_cli/arguments.json` holds: groups and arguments of every program, for the short help."""
    found: dict[str, dict[str, Any]] = {}
    for verb, task in PROGRAMS:
        groups = argument_groups(verb, task)
        trainer = TrainingArguments in groups
        shown = [_group_texts(group) for group in groups if group is not TrainingArguments]
        if trainer:
            used = list(map(list, TRAINER_ARGUMENTS.items()))
            shown.append({"title": "Training", "about": "arguments of Trainer that most runs need", "arguments": used})
        found.setdefault(verb, {})[task] = {"groups": shown, "trainer": trainer}
    return found


def _group_texts(group: Any) -> dict[str, Any]:
    title = getattr(group, "_argument_group_name", None) or group.__name__.removesuffix("Arguments")
    about = " ".join((group.__doc__ or "").split("\n\n")[0].split()).rstrip(".")
    arguments = [[entry.name, entry.metadata.get("help", "")] for entry in fields(group) if entry.init]
    return {"title": title, "about": about, "arguments": arguments}


def run_program(words: ProgramWords, *, debug: bool = False) -> int:
    """Runs a program; returns 0, or 2 after a mistake, which is one line."""

    def call() -> int:
        rest = ["--help"] if words.help == "all" else list(words.rest)
        program(words.verb, words.task)(rest)
        return 0

    return _reported(call, words.verb, debug=debug)


def run(arguments: Namespace, *, debug: bool = False) -> int:
    """Runs any other command; returns its exit code, 2 after a mistake, which is one line."""
    return _reported(lambda: COMMANDS[arguments.command](arguments), arguments.command, debug=debug)


def _reported(call: Callable[[], int], command: str, *, debug: bool) -> int:
    try:
        return call()
    except BrokenPipeError:
        raise
    except MISTAKES as error:
        if debug:
            raise
        print(f"hf-dropkey {command}: {told(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        if debug:
            raise
        print(f"hf-dropkey {command}: interrupted{notes(error)}", file=sys.stderr)
        return 130


def told(error: BaseException) -> str:
    """The message of a mistake, with its notes."""
    # the error of a configuration field has two lines
    message = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else error
    return f"{message}{notes(error)}"


def notes(error: BaseException) -> str:
    """The notes of an error, such as how to resume, one a line."""
    return "".join(f"\n{note}" for note in getattr(error, "__notes__", []))


def script(verb: str, task: str) -> None:
    """Runs a program as a file of `scripts/`: the arguments of this process, the short --help, mistakes in one line."""
    words = sys.argv[1:]
    if words[:1] == ["--debug"]:
        del words[0]
    else:
        sys.excepthook = _one_line
    found = program_words(verb, words)
    if found.task not in (task, "classification"):
        raise ValueError(f"this script is for --task {task}; run hf-dropkey {verb} --task {found.task}")
    if found.help == "short":
        print(short_help(verb, task))
        return
    program(verb, task)(["--help"] if found.help == "all" else found.rest)


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Shows an error that ends the process: a mistake by its message, anything else by its traceback."""
    if issubclass(kind, MISTAKES):
        print(f"{sys.argv[0]}: {told(error)}", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print(f"{sys.argv[0]}: interrupted{notes(error)}", file=sys.stderr)
    else:
        traceback.print_exception(kind, error, trace)


def report(arguments: Namespace) -> int:
    """Writes the page about a run."""
    from .pages.run import write_report

    print(write_report(arguments.folder))
    return 0


def check(arguments: Namespace) -> int:
    """Prints whether a checkpoint can be trusted."""
    from .hub.release_check import check_release

    found = check_release(arguments.target, revision=arguments.revision, digest=arguments.digest)
    print(found)
    return 0 if found.trusted else 1


def export(arguments: Namespace) -> int:
    """Writes a plain Transformers checkpoint, or a graph."""
    from .export import export_graph, export_plain
    from .hub.download import model_files
    from .saved import check_model_folder

    plain = arguments.format == "safetensors"
    if plain and (arguments.int8 or arguments.image_size or arguments.monte_carlo):
        raise ValueError(
            "--int8, --monte_carlo and --image_size belong to --format onnx or pt2, not to a plain checkpoint"
        )
    folder = model_files(arguments.target, revision=arguments.revision)
    check_model_folder(folder)
    if not plain:
        graph = export_graph(
            folder,
            arguments.out,
            file_format=arguments.format,
            image_size=arguments.image_size,
            int8=arguments.int8,
            monte_carlo=arguments.monte_carlo,
            overwrite=arguments.overwrite,
        )
        print(f"{arguments.out}: {graph}")
        return 0
    model = export_plain(folder, arguments.out, overwrite=arguments.overwrite)
    print(f"{arguments.out}: {type(model).__name__}, a plain Transformers checkpoint")
    return 0


def push(arguments: Namespace) -> int:
    """Uploads a folder."""
    from .hub.push import check_name, push_folder
    from .hub.push_plan import plan_push

    if arguments.space:
        return _push_space(arguments)
    if arguments.images or arguments.package:
        raise ValueError("--images and --package are of a Space; pass --space, or leave them out")
    if arguments.dry_run:
        check_name(arguments.repo_id, revision=arguments.revision)
        print(plan_push(arguments.folder, include=arguments.include))
        print("nothing was sent")
        return 0
    done = push_folder(
        arguments.folder,
        arguments.repo_id,
        revision=arguments.revision,
        private=arguments.private or None,
        commit_message=arguments.message or "Upload model",
        replace_readme=arguments.replace_readme,
        include=arguments.include,
        announce=print,
    )
    print(f"{done.url}" if done.changed else f"{done.url}: nothing new, no commit made")
    print(f'load it with revision="{done.commit}"')
    return 0


def _push_space(arguments: Namespace) -> int:
    """Uploads the folder of a Space, made of a model if it is one."""
    from .hub.push import check_name
    from .hub.push_space import plan_space, push_space

    if arguments.include or arguments.replace_readme:
        raise ValueError("--include and --replace_readme are of models; a Space is sent whole, so leave them out")
    check_name(arguments.repo_id, revision=arguments.revision)
    with TemporaryDirectory() as made:
        folder = arguments.folder
        if (folder / "config.json").is_file():
            from .demo.space import space_of

            folder = Path(made, folder.resolve().name)
            space_of(arguments.folder, folder, images=arguments.images, package=arguments.package)
        elif arguments.images or arguments.package:
            raise ValueError(
                f"--images and --package are written by `demo --space_folder`; leave them out for {folder}"
            )
        if arguments.dry_run:
            print(plan_space(folder))
            print("nothing was sent")
            return 0
        done = push_space(
            folder,
            arguments.repo_id,
            revision=arguments.revision,
            private=arguments.private or None,
            commit_message=arguments.message or "Upload Space",
            announce=print,
        )
    print(done.url if done.changed else f"{done.url}: nothing new, no commit made")
    return 0


def card(arguments: Namespace) -> int:
    """Writes or renews a model card."""
    from .hub.cards import RunFacts, write_card

    names = ("dataset", "dataset_id", "dataset_split", "base_model", "license", "command_line")
    facts = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if "command_line" in facts:
        facts["command"] = facts.pop("command_line")
    new = replace(RunFacts.load(arguments.folder), **facts) if facts else None
    print(write_card(arguments.folder, repo_id=arguments.repo_id, revision=arguments.revision, facts=new))
    return 0


def info(arguments: Namespace) -> int:
    """Prints where DropKey acts in a saved model."""
    from .hub.download import model_files
    from .inspection.saved import inspect_folder

    print(inspect_folder(model_files(arguments.target, revision=arguments.revision, weights=False)))
    return 0


def demo(arguments: Namespace) -> int:
    """Serves the page of a model until it is interrupted."""
    from .demo.server import demo as serve

    if arguments.space_folder is not None:
        if arguments.static_page is not None or arguments.onnxruntime_web is not None:
            raise ValueError("--static_page and --space_folder are two kinds of folder; give one of them")
        return _space_folder(arguments)
    if arguments.package:
        raise ValueError("--package is of a Space; pass --space_folder, or leave it out")
    if arguments.static_page is not None:
        return _static_page(arguments)
    if arguments.onnxruntime_web is not None:
        raise ValueError("--onnxruntime_web is of a page in the browser; pass --static_page, or leave it out")
    serve(arguments.targets, port=arguments.port, host=arguments.host, images=arguments.images)
    return 0


def _only_model(arguments: Namespace, option: str) -> Path:
    """The folder of the one model that a written page shows."""
    from .hub.download import model_files

    if len(arguments.targets) > 1:
        raise ValueError(f"{option} shows one model, got {len(arguments.targets)}; give one")
    return model_files(arguments.targets[0])


def _space_folder(arguments: Namespace) -> int:
    """Writes the folder of a Space."""
    from .demo.space import space_of

    model = _only_model(arguments, "--space_folder")
    written = space_of(model, arguments.space_folder, images=arguments.images, package=arguments.package)
    print(f"{arguments.space_folder}: {len(written)} files; hf-dropkey push --space uploads it")
    return 0


def _static_page(arguments: Namespace) -> int:
    """Writes a page that computes in the browser alone."""
    from .demo.static_page import static_page_of

    written = static_page_of(
        _only_model(arguments, "--static_page"),
        arguments.static_page,
        images=arguments.images,
        runtime=arguments.onnxruntime_web,
    )
    megabytes = sum(written.values()) / 1e6
    print(
        f"{arguments.static_page}: {len(written)} files, {megabytes:.0f} MB, for any web server, such as python -m "
        f"http.server --bind 127.0.0.1 --directory {arguments.static_page}; hf-dropkey push --space uploads it"
    )
    return 0


COMMANDS: dict[str, Callable[[Namespace], int]] = {
    "report": report,
    "check": check,
    "export": export,
    "push": push,
    "card": card,
    "info": info,
    "demo": demo,
}
