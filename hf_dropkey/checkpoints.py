"""Whether a folder holds a whole model, a checkpoint to resume from, or another run, found out before training.

`Trainer` takes the newest `checkpoint-*` folder as it is, and a run that was killed while saving leaves half of one.
May import Transformers and safetensors; no model.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_imports
from transformers.trainer_utils import get_last_checkpoint


WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TRAINER_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
# what saving adds, or what a class and a release write differently, without another model behind it
CONFIG_FIELDS_APART = ("architectures", "auto_map", "dtype", "transformers_version", "_name_or_path")


def check_model_folder(folder: Path) -> None:
    """Raises FileNotFoundError naming what a saved model lacks, ValueError naming weights that are cut off."""
    report_missing(folder, missing_model_files(folder))
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"the weights {file} are damaged ({error}); use another checkpoint") from error


def check_resumable(folder: Path) -> None:
    """As `check_model_folder`, also for the trainer's own state."""
    missing = [] if not folder.is_dir() else [name for name in TRAINER_FILES if not (folder / name).is_file()]
    # one file, or one for each process
    if folder.is_dir() and not list(folder.glob("rng_state*.pth")):
        missing.append("rng_state.pth")
    report_missing(folder, missing_model_files(folder) + missing)
    check_model_folder(folder)


def missing_model_files(folder: Path) -> list[str]:
    """Names of files that the model in `folder` needs and does not have: configuration, weights, its own code."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the folder of a saved model or a checkpoint")
    if not (folder / "config.json").is_file():
        return ["config.json"]
    missing = []
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing += sorted(shard for shard in shards if not (folder / shard).is_file())
    elif not any((folder / name).is_file() for name in WEIGHTS):
        missing.append(WEIGHTS[0])
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map", {})
    # "repo--module.Class" is code of another repository
    modules = {name.split(".")[0] for name in auto_map.values() if "--" not in name}
    return missing + [f"{module}.py" for module in missing_modules(folder, modules)]


def missing_modules(folder: Path, modules: Iterable[str]) -> list[str]:
    """Which of `modules` in `folder`, and of all that they import from there, have no file."""
    found: set[str] = set()
    waiting = set(modules)
    while waiting:
        module = waiting.pop()
        found.add(module)
        if (folder / f"{module}.py").is_file():
            waiting |= set(get_relative_imports(folder / f"{module}.py")) - found
    return sorted(module for module in found if not (folder / f"{module}.py").is_file())


def report_missing(folder: Path, missing: list[str]) -> None:
    """Raises FileNotFoundError if anything is missing."""
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}; complete it, or use another one (a run that was stopped while it "
            "saved leaves such a folder, the checkpoint before it is whole)"
        )


def prepare_output_folder(output_dir: Path, *, resume: str | None, overwrite: bool) -> Path | None:
    """The checkpoint to resume from, None for a new run; makes sure that a new run has its folder to itself.

    `resume` is None, a checkpoint folder, or "true" for the last checkpoint in `output_dir`. With `overwrite` the
    checkpoints of another run are deleted, and only these, because a later resume would pick them up.

    Raises:
        FileExistsError: The folder holds something, and neither resuming nor overwriting was asked for.
        FileNotFoundError: There is no checkpoint, or it lacks files.
        ValueError: Resuming and overwriting were asked for at once, or the checkpoint's weights are damaged.
    """
    if resume is not None and resume.lower() != "false":
        if overwrite:
            raise ValueError(
                f"--overwrite_output_dir would delete what --resume_from_checkpoint {resume} needs; keep one"
            )
        checkpoint = last_checkpoint(output_dir) if resume.lower() == "true" else Path(resume)
        check_resumable(checkpoint)
        return checkpoint
    if output_dir.is_dir() and any(output_dir.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{output_dir} is not empty, it may hold another run; choose another --output_dir, continue that run "
                "with --resume_from_checkpoint true, or replace it with --overwrite_output_dir"
            )
        for old in output_dir.glob("checkpoint-*"):
            shutil.rmtree(old)
    return None


def last_checkpoint(output_dir: Path) -> Path:
    """The checkpoint of the highest step in a run's folder, whole or not.

    Raises:
        FileNotFoundError: There is none.
    """
    last = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
    if last is None:
        raise FileNotFoundError(f"{output_dir} has no checkpoint-* folder to resume from; start a new run there")
    return Path(last)


def check_same_model(config: PreTrainedConfig, checkpoint: Path) -> None:
    """Raises ValueError if `checkpoint` was written by a run with another model configuration.

    `Trainer` loads what fits and only warns about the rest.
    """
    saved, current = type(config).from_pretrained(checkpoint).to_dict(), config.to_dict()
    differing = [
        f"{name} {saved[name]!r} there and {current[name]!r} here"
        for name in sorted(saved.keys() & current.keys() - set(CONFIG_FIELDS_APART))
        if saved[name] != current[name]
    ]
    if differing:
        raise ValueError(
            f"{checkpoint} is of a run with another model: {'; '.join(differing)}. Resume with the settings of that "
            "run, or start a new run from its weights with --model_name_or_path"
        )
