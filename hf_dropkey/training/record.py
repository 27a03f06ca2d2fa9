"""What a run keeps of itself in each checkpoint: settings, data, averages, times and a checksum of the weights.

A run that goes on from there compares the settings and the data with its own, checks the weights, and takes up averages
and times, so that its log is that of a run that was never stopped.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..images.sources import changed_data
from ..saved import read_json


logger = logging.getLogger(__name__)

# written last, so that a folder with it was written to the end
STATE = "trainer_state.json"
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

# split -> rows, and hashes of labels, names and sizes: the fingerprint of the data of a run, as JSON values
Fingerprint = Mapping[str, Mapping[str, Any]]


class RunRecord(TrainerCallback, ExportableState):
    """Keeps in each checkpoint what `tell_changes`, `check_weights` and a resumed run need.

    Attributes:
        folder: The checkpoint that is being written; its weights are in it by the time the state is.
        progress: Sums of losses and seconds since step 0, which a resumed run takes up.
        resumed: The steps at which the run was resumed.
    """

    def __init__(self, settings: Mapping[str, Any], data: Fingerprint | None = None) -> None:
        """`settings` are those of `run_settings`, `data` is the fingerprint of the images and labels."""
        self.settings = dict(settings)
        self.data = {split: dict(parts) for split, parts in (data or {}).items()}
        self.folder: Path | None = None
        self.progress: dict[str, Any] = {}
        self.resumed: list[int] = []

    def state(self) -> dict[str, Any]:
        """What `Trainer` writes to `trainer_state.json`."""
        weights = {} if self.folder is None else checksums(self.folder)
        return {
            "args": {"settings": self.settings, "data": self.data},
            "attributes": {"progress": self.progress, "resumed": self.resumed, "weights": weights},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes room in the state of a checkpoint that was written without this callback."""
        callbacks: Any = state.stateful_callbacks
        callbacks["RunRecord"] = self.state()


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of weights in a folder, which unlike torch's archives hold no checksum of their own."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as content:
            found[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return found


def run_settings(training: TrainingArguments) -> dict[str, Any]:
    """The settings of a run that a resumed one should not change without a word."""
    return {name: getattr(training, name) for name in (*BATCH, *CHANGES)}


def earlier_resumes(checkpoint: Path) -> list[int]:
    """The steps at which a checkpoint's run had been resumed."""
    found = _recorded(checkpoint, "resumed")
    return list(found) if isinstance(found, list) else []


def recorded(checkpoint: Path, part: str) -> dict[str, Any]:
    """A part of what a checkpoint keeps of its run: "settings", "data", "progress", "weights"; empty if it does not."""
    found = _recorded(checkpoint, part)
    return dict(found) if isinstance(found, dict) else {}


def _recorded(checkpoint: Path, part: str) -> Any:
    found: Any = read_json(checkpoint / STATE)
    for name in ("stateful_callbacks", "RunRecord", "args" if part in ("settings", "data") else "attributes", part):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def loss_of_process(losses: Sequence[float], index: int, processes: int) -> float:
    """A process's own of the sums of losses in a checkpoint; the mean where another number of processes wrote it."""
    return losses[index] if len(losses) == processes else sum(losses) / len(losses)


def check_progress(checkpoint: Path) -> None:
    """Raises ValueError if the sums of losses that a checkpoint keeps cannot be gone on with."""
    progress = recorded(checkpoint, "progress")
    losses = progress.get("losses", [0.0])
    numbers = [progress.get(name, 0) for name in ("logged_losses", "logged_step", "seconds")]
    listed = isinstance(losses, list) and len(losses) > 0
    if not listed or not all(isinstance(number, int | float) for number in [*losses, *numbers]):
        raise ValueError(f"{checkpoint / STATE} is damaged (progress {progress!r}); use another checkpoint")


def tell_changes(checkpoint: Path, settings: Mapping[str, Any], data: Fingerprint | None = None) -> list[str]:
    """What differs between a checkpoint's run and this one, and what each difference means; logged as warnings too."""
    saved, lines = recorded(checkpoint, "settings"), []
    if not saved:
        lines.append("it does not say how many processes and which batch size wrote it, so they cannot be compared")
    there, here = ({name: found.get(name, settings[name]) for name in BATCH} for found in (saved, settings))
    if there != here:
        lines.append(_other_batch(there, here, step=read_json(checkpoint / STATE)["global_step"]))
    lines += [
        f"{name} {saved[name]!r} there and {settings[name]!r} here: {meaning}"
        for name, meaning in CHANGES.items()
        if name in saved and saved[name] != settings[name]
    ]
    if data:
        lines += data_changes(recorded(checkpoint, "data"), data)
    for change in lines:
        logger.warning("resuming %s: %s.", checkpoint, change)
    return lines


def _other_batch(there: Mapping[str, int], here: Mapping[str, int], *, step: int) -> str:
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
        meaning += "; the random states of the processes do not fit, so that DropKey draws other masks unless --masks_by_sample is set"
    return f"{', '.join(changes)}: {meaning}"


def data_changes(there: Fingerprint, here: Fingerprint) -> list[str]:
    """What differs between the data that a checkpoint was trained on and the data of this run, a sentence for a split."""
    if not there:
        return ["it does not say which data it was trained on, so that other data cannot be noticed"]
    lines = []
    for split in sorted(there.keys() | here.keys()):
        before, now = there.get(split), here.get(split)
        if before is None or now is None:
            lines.append(f"there is {'no' if now is None else 'a'} split {split!r} here, unlike there")
            continue
        changes = changed_data(before, now)
        if changes:
            lines.append(
                f"the data of {split!r} is not what the checkpoint saw ({'; '.join(changes)}): the run goes on with the "
                "data as it is here. Start a new one in another --output_dir if its results are to be of this data alone"
            )
    return lines
