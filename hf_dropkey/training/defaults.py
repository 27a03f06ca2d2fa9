"""Defaults by kind of start: from random weights, from a pretrained model, or with adapters beside one.

The defaults of `Trainer`, 3 epochs at a rate of 5e-5, suit neither of these on the small data that most people have. A
command without a recipe gets those below for whatever it does not say. A recipe is complete as it stands: what it leaves
out is as `Trainer` has it, so that its recorded results stay those of its command.
"""

from collections.abc import Mapping, Sequence
from typing import Literal


Start = Literal["scratch", "pretrained", "lora"]
STARTS: Mapping[Start, str] = {
    "scratch": "a start from random weights",
    "pretrained": "a start from a pretrained model",
    "lora": "adapters on a pretrained model",
}
EVERYWHERE = {"per_device_train_batch_size": "32", "lr_scheduler_type": "cosine", "warmup_steps": "0.1"}
RATES: Mapping[Start, Mapping[str, str]] = {
    "scratch": {"num_train_epochs": "60", "learning_rate": "1e-3", "weight_decay": "0.05"},
    "pretrained": {
        "num_train_epochs": "20",
        "learning_rate": "5e-5",
        "head_learning_rate": "1e-3",
        "weight_decay": "0.05",
    },
    "lora": {"num_train_epochs": "20", "learning_rate": "2e-3", "head_learning_rate": "5e-3", "weight_decay": "0.0"},
}
# each group is set if the command says nothing of its arguments, nor of those that it would contradict
LOGGING = ({"logging_strategy": "epoch"}, ("logging_steps", "logging_strategy"))
BEST = (
    {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": "2",
        "load_best_model_at_end": "True",
        "metric_for_best_model": "accuracy",
    },
    (
        "eval_strategy",
        "eval_steps",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
    ),
)


def start_of(command: Sequence[str]) -> Start:
    """The kind of start that a command asks for."""
    if says(command, "lora_r"):
        return "lora"
    return "pretrained" if says(command, "model_name_or_path") else "scratch"


def says(command: Sequence[str], name: str) -> bool:
    """Whether a command has an argument, also in a form that the parser would complete."""
    for word in command:
        flag = word.split("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and flag and (flag == name or (len(flag) > 3 and name.startswith(flag))):
            return True
    return False


def wants(command: Sequence[str], name: str) -> bool:
    """Whether a command sets a flag: `--do_eval`, `--do_eval True` or `--do_eval=true`."""
    for place, word in enumerate(command):
        flag, _, value = word.partition("=")
        if flag.replace("-", "_") == f"__{name}":
            following = command[place + 1] if place + 1 < len(command) else ""
            return (value or following).lower() not in ("false", "no", "f", "n", "0")
    return False


def default_words(command: Sequence[str], *, without: Sequence[str] = ()) -> list[str]:
    """The arguments to add to a command without a recipe that trains; none to others.

    Args:
        command: The words after the program's name.
        without: Arguments that the program does not have.
    """
    if not command or not command[0].startswith("-") or not wants(command, "do_train"):
        return []
    chosen = {**EVERYWHERE, **RATES[start_of(command)]}
    if says(command, "max_steps"):
        del chosen["num_train_epochs"]
    if says(command, "learning_rate"):
        # the head has the rate that was chosen, too
        chosen.pop("head_learning_rate", None)
    chosen = {name: value for name, value in chosen.items() if not says(command, name)}
    for group, contradicted in (LOGGING, BEST) if wants(command, "do_eval") else (LOGGING,):
        if not any(says(command, name) for name in contradicted):
            chosen |= group
    return [word for name, value in chosen.items() if name not in without for word in (f"--{name}", value)]
