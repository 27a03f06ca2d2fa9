"""Which number each class of the data has in a model: one rule for classification and detection.

Names that a pretrained model knows keep the model's numbers, because its class scores are in that order. Other names
need new class scores, which must be requested and trained.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import nn

from .checks import name_some


class ClassifiedData(Protocol):
    """Data with class names, as `ImageData` and `DetectionData` are."""

    @property
    def label_names(self) -> list[str]:
        """Class names, in the order of their numbers."""

    @property
    def train(self) -> Any:
        """The training data; None if only evaluation was requested."""

    def with_label_names(self, names: Sequence[str]) -> Self:
        """The same data with the numbers of a model whose classes are `names`; ValueError if it does not know some."""


Data = TypeVar("Data", bound=ClassifiedData)


def check_id2label(found: Mapping[str, Any], source: str) -> None:
    """Raises ValueError if `id2label` of a config.json is not an object of class numbers and names.

    Transformers' own error for a swapped one names neither the file nor the field.
    """
    ids = found.get("id2label")
    if ids is None:
        return
    strange = [key for key in ids if not str(key).isdecimal()] if isinstance(ids, Mapping) else [ids]
    if strange:
        raise ValueError(
            f"config.json of {source} has id2label with {name_some(map(repr, strange))} in place of class numbers; it "
            'must give each number its name, such as {"0": "cat", "1": "dog"}; repair it'
        )


def class_names(config: Any, source: str) -> list[str]:
    """The class names of a configuration, in the order of their numbers.

    Raises:
        ValueError: The numbers are not 0, 1, 2 and so on.
    """
    ids = {int(number): str(name) for number, name in config.id2label.items()}
    if sorted(ids) != list(range(len(ids))):
        shown = name_some(f"{number} {name!r}" for number, name in sorted(ids.items()))
        raise ValueError(
            f"config.json of {source} numbers its {len(ids)} classes {shown} in id2label; the numbers must be 0 to "
            f"{len(ids) - 1}, the places of the model's scores; repair the file"
        )
    return [ids[number] for number in range(len(ids))]


def fit_classes(data: Data, config: Any, *, source: str | None, has_head: bool, new_head: bool) -> Data:
    """The data with a model's class numbers, and the configuration with the classes of the data where those are new.

    Args:
        data: With its own class numbers.
        config: Of the model; changed where the class scores will be new.
        source: Where pretrained weights come from; None for a model from scratch.
        has_head: They have class scores.
        new_head: New scores were requested (--ignore_mismatched_sizes).

    Raises:
        ValueError: The model does not know the classes and new scores were not requested, or they would be evaluated
            without training; or the model's own class numbers cannot be used.
    """
    trains = data.train is not None
    if source is not None and not trains and (new_head or not has_head):
        why = "--ignore_mismatched_sizes starts new class scores" if new_head else f"{source} has no class scores"
        raise ValueError(
            f"{why}, and without --do_train random ones would be evaluated; "
            f"{'leave it out' if new_head else 'train them with --do_train'}, or evaluate a model that knows the classes"
        )
    if source is not None and has_head:
        same = new_head and sorted(map(str, config.id2label.values())) == sorted(data.label_names)
        if same or not new_head:
            names = class_names(config, source)
            try:
                return data.with_label_names(names)
            except ValueError as error:
                advice = (
                    "train new class scores with --ignore_mismatched_sizes" if trains else "train one on this data"
                )
                raise ValueError(f"{source}: {error}, {advice}, or choose another model") from error
    config.id2label = dict(enumerate(data.label_names))
    config.label2id = {name: number for number, name in enumerate(data.label_names)}
    return data


@torch.no_grad()
def renew_class_scores(
    model: nn.Module, config: Any, found: Mapping[str, Any], make: Callable[[Any], nn.Module]
) -> list[str]:
    """Gives the class scores of a pretrained model new weights where it was made for as many classes of other names.

    Transformers does so where the numbers of classes differ; where they agree, it would keep the scores of the other
    classes.

    Args:
        model: With pretrained weights; changed.
        config: Its configuration, with the new classes.
        found: The config.json that the weights came with.
        make: Makes a new model from a configuration.

    Returns:
        The names of the parameters that are new.
    """
    ids = {int(number): str(name) for number, name in dict(found.get("id2label") or {}).items()}
    before = [ids[number] for number in sorted(ids)]
    now = [str(config.id2label[number]) for number in range(config.num_labels)]
    if before == now or (before and len(before) != len(now)):
        return []
    # parameters whose shape depends on the number of classes
    larger = copy.deepcopy(config)
    larger.num_labels = config.num_labels + 1
    with torch.device("meta"):
        shapes, others = (
            {name: part.shape for name, part in make(one).named_parameters()} for one in (config, larger)
        )
    names = [name for name, shape in shapes.items() if others[name] != shape]
    fresh = dict(make(config).named_parameters())
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.copy_(fresh[name])
    return names
