"""Finds the attention modules of a Transformers model that can drop keys, by their code, and why others cannot."""

import dis
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel


Kind = Literal["self", "cross"]
Side = Literal["encoder", "decoder"]

# their first decoder layer attends to a constant: the queries start at zero, so all values are equal
CONSTANT_START = frozenset({"DetrSelfAttention", "ConditionalDetrDecoderSelfAttention", "MaskFormerDetrSelfAttention"})
CROSS_NAME = re.compile(r"cross_?att|enc(oder)?_?att|encdec_?att", re.IGNORECASE)
CROSS_INPUTS = frozenset({"key_value_states", "encoder_hidden_states", "context"})
ATTENTION_NAME = re.compile(r"attention|attn", re.IGNORECASE)
# flags of this package's configurations, and the part of a name (a regular expression) that they switch on and off
SWITCHES = {
    "dropkey_token_stage": r"token_stages",
    "dropkey_outlook": r"outlook_layers",
    "dropkey_class_attention": r"class_layer",
    "dropkey_encoder": r"\bencoder\.layers",
    "dropkey_decoder": r"\bdecoder\.layers\..*\bself_attn",
}
# wraps models of the library timm
TIMM = "TimmWrapper"
TIMM_REASON = (
    "a model of timm inside Transformers, whose attention does not go through Transformers' attention interface; use the "
    "Transformers class of the architecture, such as ViTModel"
)
SOFTMAX_NAMES = frozenset({"softmax", "Softmax", "scaled_dot_product_attention", "multi_head_attention_forward"})


@dataclass(frozen=True)
class AttentionSite:
    """An attention module that can drop keys.

    Attributes:
        name: Dotted name within the Transformers model.
        module: The attention module.
        owner: The innermost Transformers model that contains it, which makes its attention masks.
        stack: Dotted name of the stack of layers it belongs to.
        kind: "self" or "cross".
        side: "encoder" or "decoder".
        native: The module calls DropKey itself (models of this package).
    """

    name: str
    module: nn.Module
    owner: PreTrainedModel
    stack: str
    kind: Kind
    side: Side
    native: bool

    @property
    def configs(self) -> tuple[Any, Any]:
        """The configurations that name the site's backend: its own, and that of the model which makes its masks."""
        own = getattr(self.module, "config", self.owner.config)
        return getattr(own, "dropkey_config", own), self.owner.config


@dataclass(frozen=True)
class UnreachedAttention:
    """An attention that does not drop keys, and why."""

    name: str
    reason: str


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The Transformers model itself, without wrappers such as PEFT's, `torch.compile`'s or DDP's.

    Raises:
        TypeError: The module contains no Transformers model.
        ValueError: It contains several.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a Transformers model, got {type(model).__name__}. Load one with from_pretrained.")
    found = list(_outermost_models(model, ""))
    if not found:
        raise TypeError(
            f"{type(model).__name__} is not a Transformers model and contains none, so it has no attention interface to "
            "drop keys in. Pass a `PreTrainedModel`, or a module that wraps one."
        )
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} contains several Transformers models ({', '.join(name for name, _ in found)}). Call "
            "the function for each of them."
        )
    return found[0][1]


def _outermost_models(module: nn.Module, name: str) -> Iterator[tuple[str, PreTrainedModel]]:
    if isinstance(module, PreTrainedModel):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _outermost_models(child, f"{name}.{child_name}".lstrip("."))


def find_attention(root: PreTrainedModel) -> tuple[list[AttentionSite], list[UnreachedAttention]]:
    """All attention modules of `root`, in order of registration, which is that of execution in Transformers."""
    sites: list[AttentionSite] = []
    unreached: list[UnreachedAttention] = []
    _visit(root, "", root, "", sites, unreached)
    return sites, unreached


def _visit(
    module: nn.Module,
    name: str,
    owner: PreTrainedModel,
    owner_name: str,
    sites: list[AttentionSite],
    unreached: list[UnreachedAttention],
) -> None:
    if isinstance(module, PreTrainedModel):
        owner, owner_name = module, name
    native = is_native(module)
    reason = None if native else refusal(module)
    if native or reason is None:
        # in models of this package one schedule covers all parts
        stack = owner_name if native else stack_of(name)
        side = side_of(stack, is_causal(module))
        sites.append(AttentionSite(name, module, owner, stack, kind_of(name, module), side, native))
    elif dispatch_code(module) is not None or is_closed_attention(module):
        reason = TIMM_REASON if type(owner).__name__.startswith(TIMM) else reason
        unreached.append(UnreachedAttention(name, reason))
    else:
        for child_name, child in module.named_children():
            _visit(child, f"{name}.{child_name}".lstrip("."), owner, owner_name, sites, unreached)


def is_native(module: nn.Module) -> bool:
    """Whether a module calls DropKey itself, as in the models of this package."""
    # a stock module that `apply_dropkey` has changed is marked by its configuration
    return "dropkey_ratio" in vars(module) and not hasattr(vars(module).get("config"), "dropkey_backend")


def dispatch_code(module: nn.Module) -> CodeType | None:
    """The code of `forward` if it looks its attention function up in Transformers' interface, else None."""
    for cls in type(module).__mro__:
        forward = vars(cls).get("forward")
        if not inspect.isfunction(forward):
            continue
        code = inspect.unwrap(forward).__code__
        if "get_interface" in code.co_names:
            return code
        if "super" not in code.co_names:
            return None
    return None


def refusal(module: nn.Module) -> str | None:
    """The reason why DropKey cannot act in an attention module, None if it can."""
    code = dispatch_code(module)
    if code is None:
        if any(isinstance(part, nn.MultiheadAttention) for part in module.modules()):
            return "torch.nn.MultiheadAttention, which does not use Transformers' attention interface"
        if "Deformable" in type(module).__name__:
            return "deformable attention: it samples points and has no keys to drop"
        return f"{type(module).__name__} computes its own softmax, not through Transformers' attention interface"
    if not hasattr(module, "config"):
        return f"{type(module).__name__} has no configuration of its own that names its attention function"
    uses = sum(step.argval == "_attn_implementation" for step in dis.get_instructions(code))
    if uses != 1:
        return f"{type(module).__name__} computes differently for different names of its attention function"
    if getattr(module, "sinks", None) is not None:
        return "attention sinks: its rows do not sum to one over the keys"
    return None


def is_closed_attention(module: nn.Module) -> bool:
    """Whether a module is attention with its own softmax, and contains no attention that DropKey can reach."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if isinstance(module, PreTrainedModel) or not ATTENTION_NAME.search(type(module).__name__):
        return False
    parts = list(module.modules())
    reachable = any(is_native(part) or dispatch_code(part) is not None for part in parts)
    return not reachable and any(isinstance(part, nn.MultiheadAttention) or _names_softmax(part) for part in parts)


def _names_softmax(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return isinstance(module, nn.Softmax) or (code is not None and bool(SOFTMAX_NAMES & set(code.co_names)))


def stack_of(name: str) -> str:
    """The part of a dotted name before its first number, which is the list of layers; without a number, the parent."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0]] if numbers else parts[:-1])


def is_causal(module: nn.Module) -> bool:
    """Whether a module says that its queries see no later keys; a language model's configuration may not say it."""
    said = getattr(getattr(module, "config", None), "is_decoder", False)
    return bool(said) or getattr(module, "is_causal", False) is True


def side_of(stack: str, is_decoder: bool) -> Side:
    """Whether a stack is an encoder or a decoder, by the last part of its name that says so, else by `is_decoder`."""
    for part in reversed(stack.split(".")):
        if "decoder" in part:
            return "decoder"
        if "encoder" in part:
            return "encoder"
    return "decoder" if is_decoder else "encoder"


def kind_of(name: str, module: nn.Module) -> Kind:
    """Self- or cross-attention, by the names of the module and by the required arguments of its forward."""
    if any(CROSS_NAME.search(word) for word in (*name.split(".")[-2:], type(module).__name__)):
        return "cross"
    parameters = inspect.signature(type(module).forward).parameters.values()
    needs = {parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty}
    return "cross" if needs & CROSS_INPUTS else "self"


def idle_reason(site: AttentionSite, first_of_stack: bool) -> str | None:
    """Why a site never drops keys, whatever the settings: it would change nothing there, or the site is disabled."""
    names = {cls.__name__ for cls in type(site.module).__mro__}
    if first_of_stack and site.side == "decoder" and site.kind == "self" and names & CONSTANT_START:
        return "the first decoder layer's queries start at zero, so all values are equal and dropping changes nothing"
    if site.side == "decoder" and site.kind == "self" and getattr(site.owner.config, "num_queries", None) == 1:
        return "it has a single key"
    for flag, part in SWITCHES.items():
        if site.native and re.search(part, site.name) and getattr(site.owner.config, flag, True) is False:
            return f"disabled by the configuration's {flag}=False"
    return None
