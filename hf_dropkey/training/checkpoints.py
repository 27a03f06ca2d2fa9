"""Whether a folder holds a whole model, a checkpoint to resume from, or another run, found out before training.

`Trainer` takes the newest `checkpoint-*` folder as it is, and a run that was killed while saving leaves half of one.
Here a checkpoint counts when it is whole, and what is not is moved out of the way of the run, never deleted. May import
Transformers and safetensors; no model.
"""

import logging
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..saved import check_model_folder, missing_model_files, read_json, report_missing


logger = logging.getLogger(__name__)

# written last, so that a folder with it was written to the end
STATE = "trainer_state.json"
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
# settings of a run that a resumed one may change: what that means
CHANGES = {
    "seed": "the images of an epoch come in another order, so that in this one some come twice and some not at all",
    "data_seed": "the images of an epoch come in another order, so that in this one some come twice and some not at all",
    "learning_rate": "the optimizer's state in the checkpoint has the old value, which stays in force",
    "weight_decay": "the optimizer's state in the checkpoint has the old value, which stays in force",
    "num_train_epochs": "the schedule of the learning rate has another length, so that the rate may jump here",
    "max_steps": "the schedule of the learning rate has another length, so that the rate may jump here",
}
BATCH = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps")
# what saving adds, or what a class and a release write differently, without another model behind it
CONFIG_FIELDS_APART = ("architectures", "auto_map", "dtype", "transformers_version", "_name_or_path")


def check_resumable(folder: Path) -> None:
    """As `check_model_folder`, also for the trainer's own state, whose files are read as archives and never unpickled."""
    missing = [] if not folder.is_dir() else missing_state_files(folder)
    sharded = folder.is_dir() and any(folder.glob("pytorch_model_fsdp_*"))
    report_missing(folder, ([] if sharded else missing_model_files(folder)) + missing)
    if not sharded:
        check_model_folder(folder)
    for file in sorted(found for pattern in ARCHIVES for found in folder.glob(pattern)):
        damage = archive_damage(file)
        if damage:
            raise ValueError(f"{file} is damaged ({damage}); use another checkpoint")


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
        processes = recorded_settings(folder).get("world_size", 1)
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
    steps, torn ones among them, are kept under another name (`aside-checkpoint-12`), because the run will write these
    steps again. With `overwrite` the checkpoints of another run are deleted, and only these, because a later resume
    would pick them up.

    Raises:
        FileExistsError: The folder holds something, and neither resuming nor overwriting was asked for.
        FileNotFoundError: There is no whole checkpoint, or the one asked for lacks files.
        NotADirectoryError, PermissionError: The folder cannot be made or written to.
        ValueError: Resuming and overwriting were asked for at once, or the checkpoint asked for is damaged.
    """
    check_writable(output_dir)
    wanted = "false" if resume is None else resume.lower()
    if wanted != "false" and overwrite:
        raise ValueError(f"--overwrite_output_dir would delete what --resume_from_checkpoint {resume} needs; keep one")
    if wanted not in ("false", "true", "auto"):
        check_resumable(Path(str(resume)))
        set_aside_later(output_dir, Path(str(resume)))
        return Path(str(resume))
    if wanted != "false":
        whole, torn = sort_by_wholeness(output_dir)
        if whole:
            set_aside_later(output_dir, whole[-1])
            return whole[-1]
        if wanted == "true":
            found = "; ".join(torn.values()) or "no checkpoint-* folder"
            raise FileNotFoundError(
                f"{output_dir} has no whole checkpoint to resume from: {found}. Start a new run, in an empty folder or "
                "with --resume_from_checkpoint auto"
            )
        if torn or not (output_dir / "config.json").is_file():
            set_aside_later(output_dir, None)
            return None
    if output_dir.is_dir() and any(output_dir.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{output_dir} is not empty, it may hold another run; choose another --output_dir, continue that run "
                "with --resume_from_checkpoint true, or replace it with --overwrite_output_dir"
            )
        for old in output_dir.glob("checkpoint-*"):
            shutil.rmtree(old)
    return None


def check_writable(output_dir: Path) -> None:
    """Raises NotADirectoryError or PermissionError if files cannot be written to the folder, or it cannot be made."""
    there = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(
            f"--output_dir {output_dir} cannot be a folder: {there} is a file; choose another one"
        )
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise PermissionError(
            f"nothing can be written to --output_dir {output_dir} ({error.strerror}); make {there} writable, or choose "
            "another folder"
        ) from error


def step_of(checkpoint: Path) -> int | None:
    """The step in the name of a checkpoint folder; None if it has another name."""
    found = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", checkpoint.name)
    return int(found[1]) if found else None


def sort_by_wholeness(output_dir: Path) -> tuple[list[Path], dict[Path, str]]:
    """The whole checkpoints in a run's folder in the order of their steps, and of the others what is wrong with them."""
    whole, torn = [], {}
    folders = [folder for folder in output_dir.glob("checkpoint-*") if folder.is_dir() and step_of(folder) is not None]
    for folder in sorted(folders, key=lambda folder: step_of(folder) or 0):
        try:
            check_resumable(folder)
            whole.append(folder)
        # files missing, cut off, or half a JSON file
        except (FileNotFoundError, ValueError) as error:
            torn[folder] = str(error)
    return whole, torn


def set_aside_later(output_dir: Path, checkpoint: Path | None) -> None:
    """Renames the checkpoints in a run's folder after the one to resume from, or all, so that nothing is mixed or lost.

    A run that went on would write into them, and one that is killed there leaves a folder of both runs.
    """
    start = -1 if checkpoint is None else step_of(checkpoint)
    if start is None or (checkpoint and checkpoint.resolve().parent != output_dir.resolve()):
        # of another folder, so that all here are of another run
        start = -1
    _, torn = sort_by_wholeness(output_dir)
    for folder in sorted(output_dir.glob("checkpoint-*")):
        if (step_of(folder) or 0) > start and folder.is_dir():
            place = folder.with_name(f"{ASIDE}{folder.name}")
            number = 1
            while place.exists():
                number += 1
                place = folder.with_name(f"{ASIDE}{folder.name}-{number}")
            folder.rename(place)
            why = f"is not whole ({torn[folder]})" if folder in torn else "is of a later step"
            logger.warning("%s %s. It is left to you as %s.", folder, why, place.name)


class RunRecord(TrainerCallback, ExportableState):
    """Keeps in each checkpoint what `tell_changes` compares: processes, batch, seeds, length and learning rate."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """`settings` are those of `run_settings`."""
        self.settings = dict(settings)

    def state(self) -> dict[str, Any]:
        """What `Trainer` writes to `trainer_state.json`."""
        return {"args": {"settings": self.settings}, "attributes": {}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes room in the state of a checkpoint that was written without this callback."""
        callbacks: Any = state.stateful_callbacks
        callbacks["RunRecord"] = self.state()


def run_settings(training: TrainingArguments) -> dict[str, Any]:
    """The settings of a run that a resumed one should not change without a word."""
    return {name: getattr(training, name) for name in (*BATCH, *CHANGES)}


def recorded_settings(checkpoint: Path) -> dict[str, Any]:
    """The settings that a checkpoint was written with; empty if it does not say."""
    found = read_json(checkpoint / STATE).get("stateful_callbacks", {}).get("RunRecord", {})
    return dict(found.get("args", {}).get("settings", {}))


def tell_changes(checkpoint: Path, settings: Mapping[str, Any]) -> list[str]:
    """What differs between a checkpoint's run and this one, and what each difference means; logged as warnings too."""
    saved, told = recorded_settings(checkpoint), []
    if not saved:
        told.append("it does not say how many processes and which batch size wrote it, so they cannot be compared")
    there, here = ({name: found.get(name, settings[name]) for name in BATCH} for found in (saved, settings))
    if there != here:
        step = read_json(checkpoint / STATE)["global_step"]
        batch = [
            values["world_size"] * values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
            for values in (there, here)
        ]
        changes = [f"{name} {there[name]} there and {here[name]} here" for name in BATCH if there[name] != here[name]]
        if batch[0] == batch[1]:
            meaning = f"{batch[0]} images a step as before, so that the place in the data and the learning rate stay"
        else:
            meaning = (
                f"{batch[1]} images a step, {batch[0]} before: step {step} came after {step * batch[0]} images and now "
                f"counts as {step * batch[1]}, and the learning rate goes on by steps"
            )
        if there["world_size"] != here["world_size"]:
            meaning += "; the random states of the processes do not fit, so that DropKey draws other masks"
        told.append(f"{', '.join(changes)}: {meaning}")
    told += [
        f"{name} {saved[name]!r} there and {settings[name]!r} here: {meaning}"
        for name, meaning in CHANGES.items()
        if name in saved and saved[name] != settings[name]
    ]
    for change in told:
        logger.warning("resuming %s: %s.", checkpoint, change)
    return told


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
            f"{checkpoint} is of a run with another model: {'; '.join(differing)}. A run that went on would be neither "
            "of the two: resume with the settings of that run, or start a new run from its weights, in another "
            "--output_dir, with --model_name_or_path"
        )
