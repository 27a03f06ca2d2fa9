"""Arguments that every training job has, and the reader of recipes and command lines."""

import inspect
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser, PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments

from ..fast_masks import enable_fast_masks
from ..patching import DropKeyReport, apply_dropkey
from ..patching.apply import DropKeySettings
from ..recipes import NOTES, is_recipe, recipe_file
from .callbacks import DropKeyScheduleCallback


logger = logging.getLogger(__name__)

# twenty points in a curve of the loss, however short the run is; `Trainer` logs every 500 steps
LOGGING_STEPS = 0.05
# of a model that remembers none
DEFAULT_RATIO = 0.1
# arguments of `apply_dropkey` in its errors
OWN_NAMES = re.compile(r"`(ratio|final_ratio|schedule|pattern|window)`")


@dataclass
class DropKeyArguments:
    """DropKey. What is not given is as the model's configuration remembers it, else as `apply_dropkey` has it."""

    _argument_group_name = "DropKey"

    dropkey_ratio: float | None = field(
        default=None,
        metadata={
            "help": f"Largest drop ratio of a layer, in [0, 1); 0 trains without. Default: {DEFAULT_RATIO} for a model "
            "whose configuration has none."
        },
    )
    dropkey_final_ratio: float | None = field(
        default=None, metadata={"help": "The other end of the schedule, from 0 to the ratio. Default: 0."}
    )
    dropkey_schedule: str | None = field(
        default=None,
        metadata={"help": "Over the depth of each stack of layers: decreasing (default), constant or increasing."},
    )
    dropkey_pattern: str | None = field(
        default=None, metadata={"help": "Dropped together: score (default, the paper's), key, token, block or cross."}
    )
    dropkey_window: int | None = field(default=None, metadata={"help": "Patches of a block's side or a cross's arm."})
    dropkey_with_attention_dropout: bool | None = field(
        default=None, metadata={"help": "Allows plain dropout on attention weights beside DropKey."}
    )

    dropkey_include: list[str] | None = field(
        default=None,
        metadata={
            "help": "Shell patterns of the attentions that drop keys, of models that are patched. Default: all."
        },
    )
    dropkey_exclude: list[str] | None = field(
        default=None, metadata={"help": "Shell patterns of attentions to leave out. Default: none."}
    )

    def given(self) -> dict[str, Any]:
        """The arguments that were given."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def given_to_native(self, what: str) -> dict[str, Any]:
        """The arguments that were given, for a model with DropKey of its own; `what` says which.

        Raises:
            ValueError: There are shell patterns, which such a model does not have.
        """
        for name in ("dropkey_include", "dropkey_exclude"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"--{name} is for models that apply_dropkey patches, and {what} has DropKey of its own; leave it out"
                )
        return self.given()

    def settings_for(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The arguments of `apply_dropkey` for a model of this configuration.

        Raises:
            ValueError: A setting is not allowed.
        """
        known = inspect.signature(apply_dropkey).parameters
        given = {name.removeprefix("dropkey_"): value for name, value in self.given().items()}
        if "ratio" not in given and getattr(config, "dropkey_ratio", None) is None:
            given["ratio"] = DEFAULT_RATIO
        given = {name: value for name, value in given.items() if name in known}
        try:
            DropKeySettings.resolve(config, **given)
        except ValueError as error:
            raise ValueError(OWN_NAMES.sub(r"--dropkey_\1", str(error))) from error
        return given

    def apply(self, model: PreTrainedModel) -> DropKeyReport:
        """Patches a model of Transformers, as `apply_dropkey`, and logs the report.

        Raises:
            ValueError: A setting is not allowed, or reaches nothing.
        """
        report = apply_dropkey(model, **self.settings_for(model.config))
        logger.info("%s", report)
        return report


@dataclass
class RampArguments:
    """How DropKey changes over the steps of a training."""

    _argument_group_name = "DropKey over time"

    dropkey_warmup: float = field(
        default=0.0,
        metadata={"help": "Fraction of the steps, the first ones, over which the ratios grow from 0, [0, 1)."},
    )
    dropkey_alignment: float = field(
        default=0.0,
        metadata={
            "help": "Fraction of the steps, the last ones, without DropKey: the paper's alignment fine-tune, [0, 1)."
        },
    )

    def callbacks(self) -> list[TrainerCallback]:
        """What a `Trainer` needs for it: nothing if the ratios stay as they are.

        Raises:
            ValueError: A share is outside [0, 1), or both leave no step in between.
        """
        if not (self.dropkey_warmup or self.dropkey_alignment):
            return []
        return [DropKeyScheduleCallback(warmup=self.dropkey_warmup, alignment=self.dropkey_alignment)]


@dataclass
class BoxAugmentationArguments:
    """How training images with boxes vary."""

    _argument_group_name = "Augmentation"

    flip_probability: float = field(default=0.5, metadata={"help": "Probability of a mirror image, [0, 1]."})
    crop_scale: float = field(
        default=1.0, metadata={"help": "Smallest fraction of the area that a random crop keeps, (0, 1]; 1: no crops."}
    )
    color_jitter: float = field(
        default=0.0, metadata={"help": "Largest change of brightness, contrast and saturation, [0, 1]."}
    )


@dataclass
class RunArguments:
    """What happens to an output folder that is not empty, and when training goes wrong."""

    _argument_group_name = "Run"

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the run in --output_dir: its checkpoints are deleted."}
    )
    on_nonfinite_loss: Literal["stop", "skip"] = field(
        default="stop",
        metadata={"help": "When the loss is NaN or infinite: stop, or skip that step; ten in a row stop the run."},
    )
    report: bool = field(
        default=True, metadata={"help": "Write report.html, one page about the run, into --output_dir."}
    )

    masks_by_sample: bool = field(
        default=False,
        metadata={
            "help": "Lets masks depend on the rows of the data set instead of their places in a batch: the same ones for "
            "any number of processes, batch size, gradient accumulation and resume."
        },
    )
    fast_masks: bool = field(
        default=False,
        metadata={"help": "On a CPU, draws masks by compiled C++, the same bits; without a compiler, as ever."},
    )

    def start_fast_masks(self) -> None:
        """Compiles, or loads what was compiled; a machine that cannot is told so, since only the speed differs."""
        if not self.fast_masks:
            return
        try:
            enable_fast_masks()
        except RuntimeError as error:
            logger.warning("--fast_masks: %s", error)


def parse_arguments(groups: Any, command: Sequence[str]) -> tuple[Any, ...]:
    """One object for each argument group, from a JSON recipe in the first place, if any, and the rest of the command.

    A recipe's field `about` is for its readers: the command, the machine, the time it took and what came out; `task`
    is for `hf-dropkey train`.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: The recipe is not a JSON object, or has a field that is not an argument or of another type; or an argument
            is unknown, or its value of another type.
    """
    parser = OneLineParser(groups)
    rest = list(command)
    recipe = read_recipe(recipe_file(rest.pop(0)), groups) if rest and is_recipe(rest[0]) else {}
    parser.set_defaults(**recipe)
    given = {*recipe, *(word.partition("=")[0].lstrip("-").replace("-", "_") for word in rest)}
    *made, unknown = parser.parse_args_into_dataclasses(rest, look_for_args_file=False, return_remaining_strings=True)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise ValueError(f"{_unknown(unknown, known)}; --help lists the arguments")
    for group in made:
        if isinstance(group, TrainingArguments) and not {"logging_steps", "logging_strategy"} & given:
            # after its checks, in which it would also become the default of --eval_steps
            group.logging_steps = LOGGING_STEPS
    return tuple(made)


def given_arguments(groups: Any, command: Sequence[str]) -> dict[str, Any]:
    """The arguments that a command with its recipe sets otherwise than by default, by name, as JSON values.

    Raises:
        FileNotFoundError, ValueError: As `parse_arguments`.
    """
    parser = OneLineParser(groups)
    rest = list(command)
    # as parsed: argparse reads defaults that are strings as it reads words
    defaults = vars(parser.parse_args([]))
    if rest and is_recipe(rest[0]):
        parser.set_defaults(**read_recipe(recipe_file(rest.pop(0)), groups))
    found = vars(parser.parse_args(rest))
    return {name: getattr(value, "value", value) for name, value in found.items() if value != defaults[name]}


class OneLineParser(HfArgumentParser):
    """A parser that raises what is wrong with a command line, instead of printing every argument there is."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError with the message."""
        raise ValueError(f"{message}. --help lists the arguments")


def _unknown(words: Sequence[str], known: Sequence[str]) -> str:
    """What of a command line is not an argument, with the nearest names there are."""
    options = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not options:
        first = "a recipe comes first" if is_recipe(words[0]) else "values stand behind the name of their argument"
        return f"unknown words: {' '.join(words)}; {first}"
    nearest = {word: get_close_matches(word, known, 1) for word in options}
    told = [f"{word} (did you mean {near[0]}?)" if near else word for word, near in nearest.items()]
    return f"unknown arguments: {', '.join(told)}"


def read_recipe(file: Path, groups: Any) -> dict[str, Any]:
    """The fields of a recipe for some argument groups, each of the type of its argument.

    Raises:
        FileNotFoundError, ValueError: As `parse_arguments`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no recipe {file}; check the path, or pass the arguments themselves")
    try:
        # editors on Windows begin a file with a byte order mark
        recipe = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the recipe {file} cannot be read as JSON ({error}); correct it") from error
    if not isinstance(recipe, dict):
        raise ValueError(
            f"the recipe {file} holds a {type(recipe).__name__}; write an object of arguments and values, such as "
            '{"learning_rate": 0.001}'
        )
    for note in NOTES:
        recipe.pop(note, None)
    hints = {entry.name: hint for group in groups for entry, hint in _hints(group) if entry.init}
    unknown = sorted(set(recipe) - set(hints))
    if unknown:
        raise ValueError(f"the recipe {file} has fields that are not arguments: {unknown}; see --help")
    for name, value in recipe.items():
        if not fits(value, hints[name]):
            raise ValueError(
                f"the recipe {file} has {name}: {_shortened(value)}, which must be {_shown(hints[name])}; correct it"
            )
    return recipe


def _hints(group: Any) -> list[tuple[Field, Any]]:
    hints = get_type_hints(group)
    return [(entry, hints[entry.name]) for entry in fields(group)]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that JSON holds is one of a type, as arguments are annotated with them."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in _without_names(parts))
    if origin is Literal:
        # 1 is True to Python
        return value in parts and type(value) in {type(part) for part in parts}
    if origin is list:
        return isinstance(value, list) and all(fits(part, parts[0]) for part in value)
    kind = origin or hint
    if not isinstance(kind, type) or kind is object:
        return True
    if issubclass(kind, Enum):
        return value in [member.value for member in kind]
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _without_names(parts: Sequence[Any]) -> list[Any]:
    """Types of a union; without str where an enumeration lists which strings."""
    listed = any(isinstance(part, type) and issubclass(part, Enum) for part in parts)
    return [part for part in parts if not (listed and part is str)]


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _shown(hint: Any) -> str:
    """A type as its readers know it."""
    parts = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_shown(part) for part in _without_names(parts))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, parts))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(repr(member.value) for member in hint)
    return {NoneType: "null", bool: "true or false", int: "a whole number", float: "a number", str: "a string"}.get(
        hint, "a list" if get_origin(hint) is list or hint is list else "an object" if hint is dict else str(hint)
    )
