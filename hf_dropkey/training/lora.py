"""LoRA beside DropKey: small matrices are trained beside the weights of a pretrained model, which stay as they are.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; through PEFT, under its own names.
"""

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..extras import needed
from ..images.checks import name_some
from ..patching.sites import find_attention
from .finetune import is_in


logger = logging.getLogger(__name__)

# queries and values, as in the paper, by the names that models of Transformers give them
USUAL_TARGETS = re.compile(r"q|v|q_proj|v_proj|query|value|qkv|q_lin|v_lin|in_proj")
ALL_LINEAR = "all-linear"


@dataclass
class LoraArguments:
    """LoRA instead of training all weights; without --lora_r all are trained. Needs the extra peft."""

    _argument_group_name = "LoRA"

    lora_r: int | None = field(
        default=None, metadata={"help": "Rank of the adapters, such as 8. Default: none, all weights are trained."}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Scale of the adapters times the rank. Default: --lora_r, a scale of 1."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' input, [0, 1)."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Ends of the names of the linear layers that get adapters, or all-linear. Default: the queries and "
            "values of the attentions, such as q_proj v_proj."
        },
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "Save a plain model with the adapters merged into its weights."}
    )

    def __post_init__(self) -> None:
        """Raises ValueError for a value outside its range, or for settings of LoRA without --lora_r."""
        if self.lora_r is None:
            without = {
                "lora_alpha": self.lora_alpha,
                "lora_dropout": self.lora_dropout,
                "lora_target_modules": self.lora_target_modules,
                "merge_adapter": self.merge_adapter,
            }
            lost = [f"--{name}" for name, value in without.items() if value]
            if lost:
                raise ValueError(f"{', '.join(lost)} without --lora_r trains no adapter; pass for example --lora_r 8")
            return
        if self.lora_r < 1:
            raise ValueError(f"--lora_r {self.lora_r} is below 1; choose for example 8, or leave it out")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"--lora_alpha {self.lora_alpha} is not above 0; leave it out for --lora_r")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout {self.lora_dropout} is outside [0, 1); choose for example 0.1")

    def check(self, *, source: str | None, trains: bool) -> None:
        """Checks what needs no model.

        Raises:
            ImportError: PEFT is not installed.
            ValueError: There is no pretrained model, or no training.
        """
        if self.lora_r is None:
            return
        if source is None:
            raise ValueError(
                f"--lora_r {self.lora_r} adapts a pretrained model, and this one starts from random weights; pass "
                "--model_name_or_path, or leave out --lora_r"
            )
        if not trains:
            raise ValueError(
                f"--lora_r {self.lora_r} makes new adapters, and without --do_train they would be evaluated untrained; "
                "pass --do_train, or evaluate a trained adapter with scripts/evaluate_image_classification.py"
            )
        with needed("peft"):
            import peft  # noqa: F401  # only whether it is there


def add_lora(
    model: PreTrainedModel, arguments: LoraArguments, *, source: str, revision: str, trained: Sequence[str]
) -> Any:
    """The model with adapters, a `PeftModel`: these and the modules in `trained` are all that is trained.

    Args:
        model: With DropKey, if it is to have it.
        arguments: With a rank.
        source: Where its weights came from, for whoever loads the adapter; a folder is made absolute.
        revision: Branch, tag or commit of a model on the Hub.
        trained: Names of modules that are trained and saved whole, such as a new classifier.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: A target matches no linear layer.
    """
    with needed("peft"):
        from peft import LoraConfig, get_peft_model
    targets = lora_targets(model, arguments.lora_target_modules, leave=trained)
    kinds = sorted({name.rpartition(".")[2] for name in targets})
    # short names where they say the same
    exact = set(lora_targets(model, kinds)) == set(targets)
    config = LoraConfig(
        r=int(arguments.lora_r or 0),
        lora_alpha=arguments.lora_alpha or arguments.lora_r,  # type: ignore[arg-type]  # takes numbers of any kind
        lora_dropout=arguments.lora_dropout,
        target_modules=kinds if exact else targets,
        modules_to_save=list(trained),
    )
    adapted = get_peft_model(model, config)
    # PEFT writes the model's own idea of where it came from, which a new classifier on a vision model does not have
    config.base_model_name_or_path = str(Path(source).resolve()) if Path(source).is_dir() else source
    config.revision = None if revision == "main" else revision
    learned = sum(part.numel() for part in adapted.parameters() if part.requires_grad)
    logger.info(
        "LoRA of rank %d on %d layers (%s), with %s trained whole: %d of %d parameters are trained",
        config.r,
        len(targets),
        ", ".join(kinds),
        ", ".join(trained) or "nothing",
        learned,
        sum(part.numel() for part in adapted.parameters()),
    )
    return adapted


def lora_targets(model: PreTrainedModel, requested: Sequence[str] | None, *, leave: Collection[str] = ()) -> list[str]:
    """Whole names of the linear layers that get adapters; those inside the modules `leave` get none.

    Raises:
        ValueError: A requested name matches no linear layer.
    """
    layers = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not is_in(name, leave)
    ]
    kinds = sorted({name.rpartition(".")[2] for name in layers})
    if requested == [ALL_LINEAR]:
        return layers
    if requested:
        ends = {end: [name for name in layers if name == end or name.endswith(f".{end}")] for end in requested}
        nothing = [end for end, found in ends.items() if not found]
        if nothing:
            raise ValueError(
                f"--lora_target_modules {' '.join(nothing)} matches no linear layer of {type(model).__name__}; its "
                f"layers end in {name_some(kinds)}, and {ALL_LINEAR} is all of them"
            )
        return [name for name in layers if any(name in found for found in ends.values())]
    sites, _ = find_attention(model)
    inside = [name for name in layers if any(name.startswith(f"{site.name}.") for site in sites)]
    usual = [name for name in inside if USUAL_TARGETS.fullmatch(name.rpartition(".")[2])]
    found = usual or inside
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention with linear layers of a usual name; name those that get adapters "
            f"with --lora_target_modules: its layers end in {name_some(kinds)}"
        )
    return found


def merged(model: Any) -> PreTrainedModel:
    """A plain model with the adapters of a `PeftModel` merged into its weights."""
    plain: PreTrainedModel = model.merge_and_unload()
    return plain
