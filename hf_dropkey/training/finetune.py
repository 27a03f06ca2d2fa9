"""Which layers of a pretrained model are trained, and how fast: freezing, layer-wise learning-rate decay, the head's rate.

Layer-wise decay is that of BEiT (Bao et al., ICLR 2022) and ELECTRA: each layer learns by a factor slower than the next.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..patching.sites import find_attention, transformers_model


# what PEFT, DDP and torch.compile put into the names of parameters
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|base_model\.model\.)+|(?<=\.)(modules_to_save\.\w+|base_layer)\.")


@dataclass
class FineTuningArguments:
    """Which layers are trained and how fast; by default all, at --learning_rate."""

    _argument_group_name = "Fine-tuning"

    freeze_layers: int = field(
        default=0, metadata={"help": "Leave the embeddings and this many first layers as they are. Default: 0, none."}
    )
    layer_decay: float = field(
        default=1.0,
        metadata={
            "help": "Factor of each layer's learning rate to that of the next, (0, 1], such as 0.75; the head has the "
            "full rate, the embeddings the lowest."
        },
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the classifier and of other new weights. Default: the model's."},
    )

    def __post_init__(self) -> None:
        """Raises ValueError for a value outside its range."""
        if self.freeze_layers < 0:
            raise ValueError(
                f"--freeze_layers {self.freeze_layers} is below 0; give a number of layers, or leave it out"
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer_decay {self.layer_decay} is outside (0, 1]; choose for example 0.75")
        if self.head_learning_rate is not None and not self.head_learning_rate > 0:
            raise ValueError(
                f"--head_learning_rate {self.head_learning_rate} is not above 0; choose for example 0.001"
            )

    def check(self, *, source: str | None, lora: bool) -> None:
        """Raises ValueError if layers would be frozen that are random, or with adapters, which freeze all by themselves."""
        if self.freeze_layers and source is None:
            raise ValueError(
                f"--freeze_layers {self.freeze_layers} would leave random weights as they are; start from a pretrained "
                "model with --model_name_or_path, or leave it out"
            )
        if self.freeze_layers and lora:
            raise ValueError(
                f"--freeze_layers {self.freeze_layers} with --lora_r, which trains no layer but the adapters; leave it out, "
                "and choose where adapters are with --lora_target_modules"
            )


def layers_of(model: nn.Module) -> list[str]:
    """Names of the blocks of a model in order of execution: the innermost numbered modules that hold its attentions."""
    sites, _ = find_attention(transformers_model(model))
    layers: dict[str, None] = {}
    for site in sites:
        parts = site.name.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        layers[".".join(parts[: numbers[-1] + 1] if numbers else parts[:-1])] = None
    return list(layers)


def depths(model: nn.Module, head: Collection[str]) -> tuple[dict[str, int], int]:
    """The depth of each parameter, by its name, and the number of layers.

    0 are the embeddings and all else that is registered before the first layer, 1 is the first layer, and the number of
    layers plus 1 what follows the last one and the modules in `head`. What lies between two layers counts to the first.

    Args:
        model: Any model whose attentions DropKey finds, also in a `PeftModel`.
        head: Names of modules.
    """
    layers = layers_of(model)
    found: dict[str, int] = {}
    last = 0
    for name, _ in model.named_parameters():
        own = plain_name(name)
        depth = next((number for number, layer in enumerate(layers, 1) if own.startswith(f"{layer}.")), None)
        last = last if depth is None else depth
        top = is_in(own, head) or (depth is None and last == len(layers))
        found[name] = len(layers) + 1 if top else last if depth is None else depth
    return found, len(layers)


def plain_name(name: str) -> str:
    """A parameter's name in the model itself, without what wrappers put into it."""
    return WRAPPERS.sub("", name)


def is_in(name: str, modules: Collection[str]) -> bool:
    """Whether a name is of one of some modules, or inside of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def freeze(model: nn.Module, layers: int, head: Collection[str]) -> None:
    """Freezes the embeddings and the first layers of a model; with all layers frozen, what follows them is trained.

    Raises:
        ValueError: The model has fewer layers.
    """
    if not layers:
        return
    found, there = depths(model, head)
    if layers > there:
        raise ValueError(
            f"--freeze_layers {layers} is more than the {there} layers of {type(model).__name__}; choose 0 to {there}"
        )
    for name, parameter in model.named_parameters():
        if found[name] <= layers:
            parameter.requires_grad_(False)


def learning_rates(
    model: nn.Module, arguments: FineTuningArguments, head: Collection[str], learning_rate: float
) -> dict[str, float]:
    """The factor on the learning rate of each parameter, by its name in the model itself; empty if all are 1."""
    if arguments.layer_decay == 1 and arguments.head_learning_rate is None:
        return {}
    found, layers = depths(model, head)
    rates = {}
    for name, depth in found.items():
        own = plain_name(name)
        rates[own] = arguments.layer_decay ** (layers + 1 - depth)
        if is_in(own, head) and arguments.head_learning_rate is not None:
            rates[own] = arguments.head_learning_rate / learning_rate
    return rates


def split_groups(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Splits the groups of an optimizer that has taken no step, so that each parameter has its own learning rate.

    Raises:
        ValueError: A group has no learning rate that could be scaled, as Adafactor's by default.
    """
    if not rates:
        return
    factors = {id(part): rates.get(plain_name(name), 1.0) for name, part in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        if not isinstance(group.get("lr"), float | int):
            raise ValueError(
                f"{type(optimizer).__name__} sets its learning rate itself; leave out --layer_decay and "
                "--head_learning_rate, or choose --optim adamw_torch"
            )
        own = {id(part): factors.get(id(part), 1.0) for part in group["params"]}
        # that of the model itself first: it is the one that is logged
        for factor in sorted(set(own.values()), key=lambda factor: abs(math.log(factor))):
            parts = [part for part in group["params"] if own[id(part)] == factor]
            groups.append({**group, "params": parts, "lr": group["lr"] * factor})
    optimizer.param_groups[:] = groups
