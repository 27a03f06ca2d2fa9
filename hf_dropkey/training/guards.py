"""What goes wrong in the middle of a run: a loss that is not finite, a save that fails, devices that are not there.

Each guard is a plain function or class for one's own loop; `GuardedTrainer` has them all.
"""

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from ..extras import needed
from .checkpoints import last_whole


with needed("train"):
    from accelerate import Accelerator, DistributedType


logger = logging.getLogger(__name__)

SKIPS_IN_A_ROW = 10
# from the moment that a process lets go of its connections to the signal of its death
SECONDS_TO_DIE = 2.0


class LossGuard:
    """Decides about a step whose loss is NaN or infinite: to stop, or to skip it.

    Attributes:
        skipping: Whether the present step is one to skip.
        skipped: How many steps were skipped, in all and without a good one in between.
    """

    def __init__(self, policy: str = "stop") -> None:
        """Raises ValueError if the policy is neither "stop" nor "skip"."""
        if policy not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite_loss={policy!r}; choose stop or skip")
        self.policy = policy
        self.skipping = False
        self.skipped = 0
        self.in_a_row = 0

    def look_at(self, losses: Sequence[float], *, step: int) -> None:
        """Looks at the losses of one batch on all processes, each of which has to ask, because all skip or none.

        Raises:
            FloatingPointError: A loss is not finite, and the policy is to stop or too many steps were skipped.
        """
        bad = [f"{loss} on process {process}" for process, loss in enumerate(losses) if not math.isfinite(loss)]
        if not bad:
            return
        message = f"the loss of step {step} is {', '.join(bad)}"
        advice = "lower --learning_rate, lengthen --warmup_steps, or train in float32"
        if self.policy == "stop":
            raise FloatingPointError(f"{message}: {advice}, or leave out such steps with --on_nonfinite_loss skip")
        if self.in_a_row == SKIPS_IN_A_ROW:
            raise FloatingPointError(f"{message}, after {SKIPS_IN_A_ROW} skipped steps in a row: {advice}")
        if not self.skipping:
            logger.warning("%s. The step is skipped, %d so far.", message, self.skipped + 1)
        self.skipping = True

    def end_step(self) -> bool:
        """Whether to leave the weights as they are; call it when the gradients of a step are complete."""
        skip, self.skipping = self.skipping, False
        self.skipped += skip
        self.in_a_row = self.in_a_row + 1 if skip else 0
        return skip


@contextlib.contextmanager
def note_where_to_resume(output_dir: Path) -> Iterator[None]:
    """Adds to whatever stops the training how to go on; the traceback ends with it.

    The signal of a data loader's worker that dies raises RuntimeError wherever the main thread is, also here.
    """
    try:
        yield
    except BaseException as error:
        try:
            if isinstance(error, (ConnectionError, EOFError)):
                # what a dying worker held breaks before the signal comes, which names the worker
                time.sleep(SECONDS_TO_DIE)
            note = where_to_resume(output_dir, error)
        except RuntimeError as death:
            death.add_note(where_to_resume(output_dir, death))
            raise
        error.add_note(note)
        raise


def where_to_resume(output_dir: Path, error: BaseException) -> str:
    """How to go on after a run that an error, or the user, stopped."""
    whole = last_whole(output_dir)[0]
    if whole is None:
        return f"There is no whole checkpoint in {output_dir}, the next start begins anew."
    repair = "" if isinstance(error, KeyboardInterrupt) else "repair what the error names and "
    return (
        f"The last whole checkpoint is {whole}. To go on from there, {repair}start the same command with "
        "--resume_from_checkpoint auto."
    )


@contextlib.contextmanager
def named_save(folder: Path) -> Iterator[None]:
    """Names the folder and the space left when something cannot be saved.

    Raises:
        OSError: What was saved inside could not be written.
    """
    try:
        yield
    # safetensors, torch and Python each raise their own
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and raised_in(error) != torch.serialization.__file__:
            # a worker that died, a device that failed: they raise in the middle of a save too
            raise
        free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free
        raise OSError(
            f"{folder} could not be written ({str(error).splitlines()[0]}); its disk has {free / 2**20:.0f} MiB left, "
            "quotas aside. Make room, for example with --save_total_limit 2"
        ) from error


def raised_in(error: BaseException) -> str:
    """The source file whose line raised an error, or called the compiled code that did."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place.tb_frame.f_code.co_filename if place is not None else ""


def check_devices(environment: Mapping[str, str], command: Sequence[str]) -> None:
    """Raises ValueError if a launcher started processes for devices that are not there; call it first of all.

    Without it, processes share a device, or train on the CPU in silence.

    Args:
        environment: As `os.environ`, with what `accelerate launch` or `torchrun` set.
        command: The arguments of the script, of which `--use_cpu` matters.
    """
    flag = next((number for number, word in enumerate(command) if word.split("=")[0] == "--use_cpu"), None)
    if flag is not None and not " ".join(command[flag : flag + 2]).lower().endswith("false"):
        return
    if environment.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
        return
    there = torch.accelerator.device_count()
    processes = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    named = environment.get("CUDA_VISIBLE_DEVICES", "").strip()
    # torchrun alone does not say which devices it means
    for_devices = there > 0 or any(name.startswith("ACCELERATE_") for name in environment)
    advice = "start fewer processes (--num_processes), name other devices (--gpu_ids), or train on the CPU (--use_cpu)"
    if processes > max(there, 1) and for_devices:
        raise ValueError(
            f"{processes} processes were started here for one device each, and there are {there}; {advice}"
        )
    if named not in ("", "-1") and there == 0:
        raise ValueError(f"CUDA_VISIBLE_DEVICES={named} names devices, and there are none; {advice}")


def check_engine(accelerator: Accelerator, environment: Mapping[str, str]) -> None:
    """Raises ValueError if sharding was requested and accelerate (1.15) does something else, as it does on a CPU."""
    for name, engine in (
        ("ACCELERATE_USE_FSDP", DistributedType.FSDP),
        ("ACCELERATE_USE_DEEPSPEED", DistributedType.DEEPSPEED),
    ):
        if environment.get(name, "false").lower() == "true" and accelerator.distributed_type != engine:
            raise ValueError(
                f"{engine.value} was requested, and on {accelerator.num_processes} processes on "
                f"{accelerator.device.type} accelerate would train with {accelerator.distributed_type.value} instead; "
                "start at least two processes on devices that it shards over, or choose another configuration"
            )
