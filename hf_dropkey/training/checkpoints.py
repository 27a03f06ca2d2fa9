"""Whether a folder holds a whole model, a checkpoint to resume from, or another run, found out before training.

`Trainer` takes the newest `checkpoint-*` folder as it is, and a run that was killed while saving leaves half of one.
Here a checkpoint counts when it is whole. What is not is moved out of the way of the run, and of what was moved only the
newest folder is kept, because each is as large as a checkpoint.
"""

import logging
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..images.folders import check_writable
from ..patching.adapters import ADAPTER_CONFIG, BASE_CONFIG
from ..saved import (
    check_model_folder,
    config_file,
    is_adapter,
    missing_model_files,
    missing_weights,
    read_json,
    report_missing,
)
from .lock import FOLDER
from .record import STATE, check_progress, checksums, recorded


logger = logging.getLogger(__name__)

# what each is called by Trainer, by accelerate, and where processes share (FSDP) or DeepSpeed keeps it
STATE_FILES = (
    (STATE,),
    ("optimizer.pt", "optimizer.bin", "optimizer_0", "latest"),
    ("scheduler.pt", "scheduler.bin", "latest"),
)
RANDOM_STATES = ("rng_state*.pth", "random_states_*.pkl")
# each is a zip archive, whose end says where its parts are
ARCHIVES = ("optimizer.*", "scheduler.*", "scaler.*", *RANDOM_STATES)
ASIDE = "aside-"
# what saving adds, or what a class and a release write differently, without another model behind it
CONFIG_FIELDS_APART = ("architectures", "auto_map", "dtype", "transformers_version", "_name_or_path")

# of an adapter, what a run that goes on must have in common with the one that it continues
ADAPTER_FIELDS = ("base_model_name_or_path", "lora_alpha", "lora_dropout", "modules_to_save", "r", "target_modules")


def check_resumable(folder: Path) -> None:
    """As `check_model_folder`, also for the trainer's own state, whose files are read as archives and never unpickled."""
    missing = [] if not folder.is_dir() else missing_state_files(folder)
    sharded = folder.is_dir() and any(folder.glob("pytorch_model_fsdp_*"))
    report_missing(folder, ([] if sharded else missing_model_files(folder)) + missing)
    check_state(folder)
    if not sharded:
        check_model_folder(folder)
        check_weights(folder)
    for file in sorted(found for pattern in ARCHIVES for found in folder.glob(pattern)):
        damage = archive_damage(file)
        if damage:
            raise ValueError(f"{file} is damaged ({damage}); use another checkpoint")


def check_state(folder: Path) -> None:
    """Raises ValueError unless the trainer's state is of the step in the folder's name, within the run's own length."""
    state = read_json(folder / STATE)
    step, most = state.get("global_step"), state.get("max_steps", 0)
    if not isinstance(step, int) or not isinstance(most, int):
        raise ValueError(f"{folder / STATE} is damaged (global_step {step!r} of max_steps {most!r})")
    named = step_of(folder)
    # a run without a length of its own has max_steps 0 or below
    if (named is not None and step != named) or step < 0 or 0 < most < step:
        raise ValueError(
            f"{folder / STATE} is damaged: global_step is {step}, in a folder called {folder.name}, of a run of {most} "
            "steps; use another checkpoint"
        )
    check_progress(folder)


def check_weights(folder: Path) -> None:
    """Raises ValueError if the weights of a checkpoint are not those that were saved, or are not all that the model has.

    Checkpoints keep a checksum of their weights; of one that has none the names of the weights are compared.
    """
    saved = recorded(folder, "weights")
    if saved:
        found = checksums(folder)
        wrong = sorted(name for name in saved.keys() | found.keys() if saved.get(name) != found.get(name))
        if wrong:
            raise ValueError(
                f"the weights {folder / wrong[0]} are damaged (their checksum is not that of what was saved); use another "
                "checkpoint"
            )
        return
    missing = missing_weights(folder)
    if missing:
        raise ValueError(
            f"the weights in {folder} lack {len(missing)} of the model's, such as {missing[0]}; use another checkpoint"
        )


def missing_state_files(folder: Path) -> list[str]:
    """Names of files of a trainer's state that `folder` does not have."""
    missing = [names[0] for names in STATE_FILES if not any((folder / name).exists() for name in names)]
    # the folder of a sharded state gets this file when all processes have written their parts
    shards = [part for pattern in ("pytorch_model_fsdp_*", "optimizer_*") for part in folder.glob(pattern)]
    missing += [f"{part.name}/.metadata" for part in shards if part.is_dir() and not (part / ".metadata").is_file()]
    # one file, or one for each process
    random_states = [found for pattern in RANDOM_STATES for found in folder.glob(pattern)]
    processes = 1
    if STATE not in missing:
        processes = recorded(folder, "settings").get("world_size", 1)
        if not isinstance(processes, int):
            raise ValueError(f"{folder / STATE} is damaged (world_size {processes!r}); use another checkpoint")
    if len(random_states) < processes:
        missing.append(
            "rng_state.pth" if processes == 1 else f"{processes - len(random_states)} of {processes} rng_state"
        )
    return missing


def archive_damage(file: Path) -> str | None:
    """What is wrong with a file that torch saved; None if it reads whole. Nothing in it is unpickled."""
    if file.is_dir():
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            part = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        return str(error)
    return part and f"{part} has another checksum"


def prepare_output_folder(output_dir: Path, *, resume: str | None, overwrite: bool) -> Path | None:
    """The checkpoint to resume from, None for a new run; makes sure that a new run has its folder to itself.

    `resume` is None, a checkpoint folder, "true" for the last whole checkpoint in `output_dir`, or "auto", which is
    "true" if there is one and else a new run: the same command starts a run and goes on with it. Checkpoints of later
    steps, torn ones among them, get out of the way, because the run will write these steps again: the newest is kept
    under another name (`aside-checkpoint-12`), the others are deleted. With `overwrite` the checkpoints of another run are deleted, and only these, because a later resume
    would pick them up.

    Raises:
        FileExistsError: The folder holds something, and neither resuming nor overwriting was requested.
        FileNotFoundError: There is no whole checkpoint, or the requested one lacks files.
        NotADirectoryError, PermissionError: The folder cannot be made or written to.
        ValueError: Resuming and overwriting were requested at once, or the requested checkpoint is damaged.
    """
    check_writable(output_dir, "--output_dir")
    wanted = "false" if resume is None else resume.lower()
    if wanted != "false" and overwrite:
        raise ValueError(f"--overwrite_output_dir would delete what --resume_from_checkpoint {resume} needs; keep one")
    if wanted not in ("false", "true", "auto"):
        check_resumable(Path(str(resume)))
        set_aside_later(output_dir, Path(str(resume)))
        return Path(str(resume))
    if wanted != "false":
        last, torn = last_whole(output_dir)
        if last is not None:
            set_aside_later(output_dir, last)
            return last
        if wanted == "true":
            found = "; ".join(torn.values()) or "no checkpoint-* folder"
            raise FileNotFoundError(
                f"{output_dir} has no whole checkpoint to resume from: {found}. Start a new run, in an empty folder or "
                "with --resume_from_checkpoint auto"
            )
        if torn or not config_file(output_dir).is_file():
            set_aside_later(output_dir, None)
            return None
    if output_dir.is_dir() and any(path.name != FOLDER for path in output_dir.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{output_dir} is not empty, it may hold another run; choose another --output_dir, continue that run "
                "with --resume_from_checkpoint true, or replace it with --overwrite_output_dir"
            )
        for old in output_dir.glob("checkpoint-*"):
            shutil.rmtree(old)
    return None


def step_of(checkpoint: Path) -> int | None:
    """The step in the name of a checkpoint folder; None if it has another name."""
    found = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", checkpoint.name)
    return int(found[1]) if found else None


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run in the order of their steps, whole or not."""
    folders = [folder for folder in output_dir.glob("checkpoint-*") if folder.is_dir() and step_of(folder) is not None]
    return sorted(folders, key=lambda folder: step_of(folder) or 0)


def last_whole(output_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The last whole checkpoint in a run's folder, and of the later ones what is wrong with them.

    Earlier ones are not looked at, because a checksum reads all weights.
    """
    torn: dict[Path, str] = {}
    for folder in reversed(checkpoints_in(output_dir)):
        wrong = damage(folder)
        if wrong is None:
            return folder, torn
        torn[folder] = wrong
    return None, dict(reversed(torn.items()))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if a run can go on from it."""
    try:
        check_resumable(folder)
    # files missing, cut off or unreadable, or half a JSON file
    except (OSError, ValueError) as error:
        return str(error)
    return None


def set_aside_later(output_dir: Path, checkpoint: Path | None) -> None:
    """Gets the checkpoints in a run's folder after the one to resume from, or all, out of the way of the run.

    A run that went on would write into them, and one that is killed there leaves a folder of both runs. The newest whole
    one, or the newest, is left under another name, and what an earlier start left so is deleted.
    """
    start = -1 if checkpoint is None else step_of(checkpoint)
    if start is None or (checkpoint and checkpoint.resolve().parent != output_dir.resolve()):
        # of another folder, so that all here are of another run
        start = -1
    later = [folder for folder in checkpoints_in(output_dir) if (step_of(folder) or 0) > start]
    if not later:
        return
    wrong = {folder: damage(folder) for folder in later}
    kept = max(later, key=lambda folder: (wrong[folder] is None, step_of(folder) or 0))
    for old in output_dir.glob(f"{ASIDE}*"):
        logger.warning("%s is deleted: only the newest checkpoint that is in the way is kept.", old)
        shutil.rmtree(old)
    for folder in later:
        why = f"is not whole ({wrong[folder]})" if wrong[folder] else "is of a later step"
        if folder == kept:
            place = folder.with_name(f"{ASIDE}{folder.name}")
            folder.rename(place)
            logger.warning("%s %s. It is left to you as %s.", folder, why, place.name)
        else:
            logger.warning("%s %s. It is deleted, as %s is newer.", folder, why, kept.name)
            shutil.rmtree(folder)


def check_same_model(config: PreTrainedConfig, checkpoint: Path, adapter: Any = None) -> None:
    """Raises ValueError if `checkpoint` was written by a run with another model configuration, or another adapter.

    `Trainer` loads what fits and only warns about the rest.

    Args:
        config: Of the model.
        checkpoint: The folder.
        adapter: The configuration of its adapter, of PEFT; None for a model that is trained whole.
    """
    differing = [] if adapter is None and not is_adapter(checkpoint) else adapter_differences(adapter, checkpoint)
    file = config_file(checkpoint)
    kind = read_json(file).get("model_type")
    if kind != config.model_type:
        raise ValueError(
            f"{checkpoint} is of a run with another model: model_type {kind!r} there and {config.model_type!r} here. "
            "Resume with the settings of that run, or choose another --output_dir"
        )
    saved, current = type(config).from_pretrained(file).to_dict(), config.to_dict()
    differing += [
        f"{name} {saved[name]!r} there and {current[name]!r} here"
        for name in sorted(saved.keys() & current.keys() - set(CONFIG_FIELDS_APART))
        if saved[name] != current[name]
    ]
    if differing:
        raise ValueError(
            f"{checkpoint} is of a run with another model: {'; '.join(differing)}. A run that went on would be neither "
            "of the two: resume with the settings of that run, or start a new run from its weights, in another "
            "--output_dir, with --model_name_or_path"
        )


def adapter_differences(adapter: Any, checkpoint: Path) -> list[str]:
    """What differs between an adapter's configuration and that of a checkpoint, a phrase each.

    Raises:
        ValueError: Only one of the two has an adapter, or the checkpoint lacks the configuration of its base model.
    """
    if adapter is None or not is_adapter(checkpoint):
        there, here = ("adapters", "all weights") if adapter is None else ("all weights", "adapters")
        raise ValueError(
            f"{checkpoint} is of a run that trained {there}, and this one trains {here}; "
            f"{'pass its --lora_r' if adapter is None else 'leave out --lora_r'}, or choose another --output_dir"
        )
    report_missing(checkpoint, [] if (checkpoint / BASE_CONFIG).is_file() else [BASE_CONFIG])
    saved = read_json(checkpoint / ADAPTER_CONFIG)
    current = {name: getattr(adapter, name) for name in ADAPTER_FIELDS}
    lists = (list, tuple, set)
    pairs = [
        (name, *(sorted(value) if isinstance(value, lists) else value for value in (saved.get(name), current[name])))
        for name in ADAPTER_FIELDS
    ]
    return [f"{name} {there!r} there and {here!r} here" for name, there, here in pairs if there != here]


def check_same_settings(settings: Mapping[str, Any], checkpoint: Path) -> None:
    """Raises ValueError if a checkpoint's run had other settings than these, by argument; what it did not record counts as equal."""
    kept = recorded(checkpoint, "settings").get("fixed")
    saved = kept if isinstance(kept, dict) else {}
    differing = [
        f"--{name} {saved[name]} there and {settings[name]} here"
        for name in sorted(settings.keys() & saved.keys())
        if saved[name] != settings[name]
    ]
    if differing:
        raise ValueError(
            f"{checkpoint} is of a run with other settings: {'; '.join(differing)}. Resume with those of that run, or start "
            "a new one in another --output_dir"
        )
