"""Configuration of DropKeyHoi, QPIC with DropKey. This file travels with checkpoints."""

# isort: off
from .compatibility import check_transformers as check_transformers  # first: the next imports fail on old releases
# isort: on

from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import as_validated_field, strict
from transformers import DetrConfig

from .configuration_dropkey import DropKeyConfigMixin
from .dropkey import check_choice


VERB_LOSSES = ("focal", "bce")
HOI_TASK = "human-object-interaction"


@as_validated_field
def weight_field(value: float) -> None:
    """A configuration field that holds the weight of a cost or loss, at least 0."""
    if value < 0:
        raise ValueError(f"the weight of a cost or loss must be at least 0, got {value!r}")


@as_validated_field
def verb_loss_field(value: str) -> None:
    """A configuration field that names the loss on verbs."""
    check_choice(value, VERB_LOSSES, "verb_loss")


@strict
class DropKeyHoiConfig(DropKeyConfigMixin, DetrConfig):
    """Configuration of QPIC (Tamura et al., CVPR 2021), human-object interaction detection on DETR, with DropKey.

    All fields of `DetrConfig`, the DropKey fields of `DropKeyConfigMixin`, and those below. `id2label` are the object
    classes. The defaults of costs and loss weights are those of QPIC's published models.

    DropKey's schedule runs over the attentions that drop keys in order of execution, separately in the encoder and in
    the decoder, as `apply_dropkey` has it. The first decoder self-attention attends to a constant and never drops.

    Args:
        verbs (`list[str]`, *optional*):
            Names of the verbs, in the order of the verb logits. Default: two verbs without a meaning.
        missing_object (`bool`, defaults to `False`):
            Whether the last object class means that the person acts on no object, as in V-COCO.
        person_label (`int`, defaults to 0):
            The object class of the persons who act, for scores that compare it. Data whose classes have no person
            may use any number.
        class_cost (`float`, defaults to 1):
            Weight of the object class in the matching.
        verb_cost (`float`, defaults to 1):
            Weight of the verbs in the matching.
        bbox_cost (`float`, defaults to 2.5):
            Weight of the larger L1 distance of the two boxes in the matching.
        giou_cost (`float`, defaults to 1):
            Weight of the worse generalised IoU of the two boxes in the matching.
        class_loss_coefficient, verb_loss_coefficient (`float`, defaults to 1):
            Weights of the losses on object classes and verbs.
        bbox_loss_coefficient, giou_loss_coefficient (`float`, default to 2.5 and 1):
            Weights of the losses on the boxes, of persons and objects each.
        verb_loss (`str`, defaults to `"focal"`):
            `"focal"` or `"bce"`.
        auxiliary_loss (`bool`, defaults to `True`):
            A loss on every decoder layer. The decoder is of our own and computes the same with and without.
        dropkey_encoder (`bool`, defaults to `True`):
            DropKey in the encoder's self-attention.
        dropkey_decoder (`bool`, defaults to `True`):
            DropKey in the decoder's self-attention.
        dropkey_cross_attention (`bool`, defaults to `False`):
            DropKey where the decoder attends to the image.

    Example:

        config = DropKeyHoiConfig(id2label={0: "ball", 1: "chair"}, verbs=["hold", "sit_on"], dropkey_ratio=0.1)
        model = DropKeyHoiForObjectDetection(config)

    Raises:
        huggingface_hub.errors.StrictDataclassError: A field has a wrong type or value.
    """

    model_type = "dropkey_hoi"

    verbs: list[str] | tuple[str, ...] | None = None
    missing_object: bool = False
    person_label: int = 0
    class_cost: float | int = weight_field(default=1)
    verb_cost: float | int = weight_field(default=1)
    bbox_cost: float | int = weight_field(default=2.5)
    giou_cost: float | int = weight_field(default=1)
    class_loss_coefficient: float | int = weight_field(default=1)
    verb_loss_coefficient: float | int = weight_field(default=1)
    bbox_loss_coefficient: float | int = weight_field(default=2.5)
    giou_loss_coefficient: float | int = weight_field(default=1)
    verb_loss: str = verb_loss_field(default="focal")
    auxiliary_loss: bool = True
    dropkey_encoder: bool = True
    dropkey_decoder: bool = True
    dropkey_cross_attention: bool = False

    family_auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_dropkey_hoi.DropKeyHoiConfig",
        "AutoModel": "modeling_dropkey_hoi.DropKeyHoiModel",
        "AutoModelForObjectDetection": "modeling_dropkey_hoi.DropKeyHoiForObjectDetection",
    }
    family_pipelines: ClassVar[dict[str, dict[str, Any]]] = {
        HOI_TASK: {
            "impl": "pipeline_dropkey_hoi.HoiPipeline",
            "pt": ["AutoModelForObjectDetection"],
            "type": "image",
        }
    }

    def __post_init__(self, **kwargs: Any) -> None:
        self.verbs = ["VERB_0", "VERB_1"] if self.verbs is None else list(self.verbs)
        super().__post_init__(**kwargs)

    @property
    def num_verbs(self) -> int:
        """The number of verbs."""
        return len(self.verbs or ())

    @property
    def missing_label(self) -> int | None:
        """The object class that means no object, None where there is none."""
        return len(self.object_names()) - 1 if self.missing_object else None

    def object_names(self) -> list[str]:
        """Names of the object classes, by number."""
        names: Any = self.id2label
        return [names[label] for label in range(len(names))]

    def validate_verbs(self) -> None:
        """Raises ValueError unless there are verbs, each once."""
        verbs = list(self.verbs or ())
        if not verbs:
            raise ValueError("`verbs` is empty; name at least one verb.")
        repeated = sorted({verb for verb in verbs if verbs.count(verb) > 1})
        if repeated:
            raise ValueError(f"`verbs` names {repeated} more than once; give every verb one name.")

    def validate_dropkey(self) -> None:
        """As `DropKeyConfigMixin.validate_dropkey`; images differ in size, so no pattern may need a fixed grid."""
        super().validate_dropkey()
        if self.dropkey_pattern in ("block", "cross"):
            raise ValueError(
                f"`dropkey_pattern` {self.dropkey_pattern!r} needs keys on a grid, but queries lie on none, and the "
                "grid of the image changes with its size. Choose 'score', 'key' or 'token'."
            )
        if self.attention_dropout > 0 and self.dropkey_ratio > 0 and not self.dropkey_with_attention_dropout:
            raise ValueError(
                f"`attention_dropout` ({self.attention_dropout}) and `dropkey_ratio` ({self.dropkey_ratio}) are both "
                "above 0, but DropKey replaces dropout on attention weights. Set one of them to 0, or pass "
                "dropkey_with_attention_dropout=True if you mean both."
            )
        if self.dropkey_ratio > 0 and not (
            self.dropkey_encoder or self.dropkey_decoder or self.dropkey_cross_attention
        ):
            raise ValueError(
                f"`dropkey_ratio` is {self.dropkey_ratio}, but `dropkey_encoder`, `dropkey_decoder` and "
                "`dropkey_cross_attention` are all False, so that nothing drops keys. Set one of them, or the ratio to "
                "0."
            )

    def modeling_file(self) -> Path:
        """The source file of the models of this family."""
        # also read by the loader of checkpoint code, which so fetches the models with a configuration
        from .modeling_dropkey_hoi import DropKeyHoiModel

        return DropKeyHoiModel.source_file()

    def pipeline_class(self) -> type:
        """The pipeline of the family."""
        # as above: Transformers looks for pipelines by task, no model imports them
        from .pipeline_dropkey_hoi import HoiPipeline

        return HoiPipeline


__all__ = ["DropKeyHoiConfig"]
