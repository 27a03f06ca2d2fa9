"""The arguments of a job for human-object interaction detection: model, DropKey, data, run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..images.sources import EVALUATION_SPLITS, data_name, hub_or_data_name
from ..training.arguments import DropKeyArguments


DEFAULT_SHAPE = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "num_queries": 16,
    "backbone_stride": 16,
    "dropout": 0.1,
}
DEFAULT_IMAGE_SIZE = 160
# what a run draws into
PREDICTIONS, GROUND_TRUTH = "predictions.png", "ground_truth.png"
CLASS_TABLE = "per_class.txt"


@dataclass
class HoiModelArguments:
    """Which model: a pretrained one, one started from a DETR trained on COCO, or a small one from scratch."""

    _argument_group_name = "Model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "DropKeyHoi model to start from or to evaluate: a folder or a hub id."}
    )
    detr: str | None = field(
        default=None,
        metadata={
            "help": "DETR of Transformers to start from, such as facebook/detr-resnet-50: both box heads are copies of "
            "its own, object classes are taken over by name, verbs start new."
        },
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Start with new object and verb scores if the model does not know the data's names."},
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": f"Pixels of the longest side. Default: {DEFAULT_IMAGE_SIZE} from scratch (scenes: their own size), "
            "else as the model's image processor has it."
        },
    )
    hidden_size: int | None = field(default=None, metadata={"help": "From scratch, as the next ones. Default: 128."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Number of heads. Default: 4."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of the MLPs. Default: 256."})
    encoder_layers: int | None = field(default=None, metadata={"help": "Encoder layers. Default: 2."})
    decoder_layers: int | None = field(default=None, metadata={"help": "Decoder layers. Default: 3."})
    num_queries: int | None = field(
        default=None, metadata={"help": "Largest number of pairs in an image. Default: 16."}
    )
    backbone_stride: Literal[16, 32] | None = field(
        default=None, metadata={"help": "Pixels between two keys. Default: 16."}
    )
    dropout: float | None = field(default=None, metadata={"help": "Dropout outside attention, [0, 1). Default: 0.1."})
    attention_dropout: float | None = field(
        default=None,
        metadata={"help": "Dropout on attention weights, [0, 1), for comparison with DropKey. Default: the model's."},
    )
    verb_loss: Literal["focal", "bce"] | None = field(
        default=None, metadata={"help": "Loss on verbs. Default: focal, or as the model has it."}
    )

    def __post_init__(self) -> None:
        """Raises ValueError for two sources of the model, arguments that do not concern it, and numbers out of range."""
        if self.model_name_or_path and self.detr:
            raise ValueError(
                f"--model_name_or_path {self.model_name_or_path} and --detr {self.detr} both name a start; give one"
            )
        shape = {name: getattr(self, name) for name in DEFAULT_SHAPE if getattr(self, name) is not None}
        source = self.model_name_or_path or self.detr
        fixed = [name for name in shape if name != "dropout"]
        if source and fixed:
            raise ValueError(f"{source} fixes the shape of the model; leave out {fixed}")
        for name, value in {**shape, "image_size": self.image_size}.items():
            if name != "dropout" and value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1")
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name}={value} is outside [0, 1)")

    def shape(self) -> dict[str, Any]:
        """The arguments that make a model from scratch, with defaults."""
        given = {name: getattr(self, name) for name in DEFAULT_SHAPE}
        return {name: DEFAULT_SHAPE[name] if value is None else value for name, value in given.items()}


@dataclass
class HoiDropKeyArguments(DropKeyArguments):
    """DropKey. What is not given is as the model's configuration has it."""

    dropkey_encoder: bool | None = field(default=None, metadata={"help": "In the encoder. Default: yes."})
    dropkey_decoder: bool | None = field(
        default=None, metadata={"help": "In the decoder's self-attention. Default: yes."}
    )
    dropkey_cross_attention: bool | None = field(
        default=None, metadata={"help": "Where queries attend to the image. Default: no."}
    )

    def __post_init__(self) -> None:
        """Raises ValueError for shell patterns, which are for models that are patched."""
        for name in ("dropkey_include", "dropkey_exclude"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is for models that are patched; choose with --dropkey_encoder, --dropkey_decoder and "
                    "--dropkey_cross_attention"
                )


@dataclass
class HoiDataArguments:
    """Where the images and their interactions are."""

    _argument_group_name = "Data"

    dataset: Literal["scenes"] | None = field(
        default=None, metadata={"help": "Built-in data: generated scenes of stick people and objects, no download."}
    )
    train_scenes: int = field(default=2000, metadata={"help": "Number of scenes to train on."})
    validation_scenes: int = field(default=300, metadata={"help": "Number of other scenes to evaluate on."})
    scene_size: int = field(default=96, metadata={"help": "Side of a scene in pixels."})
    train_images: str | None = field(default=None, metadata={"help": "Folder of the images to train on."})
    train_annotations: str | None = field(
        default=None, metadata={"help": "Their annotations: JSON in HOIA's form (HICO-DET, V-COCO) or F. Zhang's."}
    )
    validation_images: str | None = field(default=None, metadata={"help": "Folder of the images to evaluate on."})
    validation_annotations: str | None = field(default=None, metadata={"help": "Their annotations."})
    verb_base: Literal[0, 1] | None = field(
        default=None, metadata={"help": "Number of the first verb in HOIA's form: 1 in HICO-DET, 0 in V-COCO."}
    )
    names_file: str | None = field(
        default=None,
        metadata={
            "help": 'Names for files in HOIA\'s form: JSON {"verbs": [...], "objects": {"1": "person", ...}}. Default: '
            "those of COCO, and of HICO-DET or V-COCO."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Instead of files: a data set of the hub or in a folder, with the columns `image`, `objects` "
            "(`bbox` [x, y, width, height], `category`) and `interactions` (`person`, `object`, `verb`)."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    train_split_name: str = field(default="train", metadata={"help": "Split of the hub data set to train on."})
    eval_split_name: str | None = field(
        default=None, metadata={"help": f"Split to evaluate on. Default: the first of {', '.join(EVALUATION_SPLITS)}."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random choice of this many."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on a random choice of this many."})
    check_images: bool = field(
        default=True, metadata={"help": "Read every image once before anything else; else a bad one stops the run."}
    )
    skip_bad_images: bool = field(
        default=False, metadata={"help": "Leave out images that are missing or cannot be read, instead of stopping."}
    )
    skip_bad_annotations: bool = field(
        default=False,
        metadata={"help": "Leave out boxes and interactions that cannot be used, instead of stopping."},
    )

    def __post_init__(self) -> None:
        """Raises ValueError for several sources at once, half a source, and numbers below 1."""
        files = {
            "train": (self.train_images, self.train_annotations),
            "validation": (self.validation_images, self.validation_annotations),
        }
        for split, (images, annotations) in files.items():
            if bool(images) != bool(annotations):
                missing = f"--{split}_{'annotations' if images else 'images'}"
                raise ValueError(f"{missing} is missing beside {images or annotations}; give both")
        sources = {"--dataset": self.dataset, "--dataset_name": self.dataset_name}
        sources["files"] = next((images for images, _ in files.values() if images), None)
        given = {name: source for name, source in sources.items() if source}
        if len(given) > 1:
            raise ValueError(f"several data sources at once ({given}); keep one")
        for name in ("max_train_samples", "max_eval_samples", "train_scenes", "validation_scenes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1")
        if self.scene_size < 32:
            raise ValueError(f"scene_size={self.scene_size} is below 32 pixels, too few to see a stick person")

    @property
    def name(self) -> str:
        """What to call the data where others read it: of a local path only the last part."""
        path = self.train_annotations or self.validation_annotations
        if path:
            return data_name(Path(path).with_suffix(""))
        if self.dataset:
            return f"generated {self.dataset}"
        return hub_or_data_name(self.dataset_name or "")


@dataclass
class HoiScoreArguments:
    """How predictions are scored."""

    _argument_group_name = "Scores"

    allowed_pairs: str | None = field(
        default=None,
        metadata={
            "help": "A corre_*.npy file: a row for each verb and a column for each object class of the model, 1 where "
            "the two go together; other predictions score 0."
        },
    )
    count_images_without_boxes: bool = field(
        default=False,
        metadata={"help": "Predictions on images without any box count as wrong, as in HICO-DET's MATLAB code."},
    )
    qpic_vcoco: bool = field(
        default=False, metadata={"help": "Also QPIC's approximation of V-COCO's AP (neither scenario 1 nor 2)."}
    )
    vcoco_file: str | None = field(
        default=None,
        metadata={"help": "V-COCO's own annotations (vcoco_test.json), for its scenario 1 and 2; needs --coco_file."},
    )
    coco_file: str | None = field(
        default=None, metadata={"help": "The COCO instances (2014) that V-COCO's annotations refer to."}
    )

    def __post_init__(self) -> None:
        """Raises ValueError for one V-COCO file without the other."""
        if bool(self.vcoco_file) != bool(self.coco_file):
            raise ValueError("V-COCO's scenarios need --vcoco_file and --coco_file; give both")


@dataclass
class HoiRunArguments:
    """How the model is trained and what is drawn."""

    _argument_group_name = "Interactions"

    backbone_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the backbone. Default: --learning_rate. QPIC: a tenth of it."},
    )
    show_data: bool = field(
        default=False, metadata={"help": f"Draw eight training images with their annotations into {GROUND_TRUTH}."}
    )
    draw_images: int = field(
        default=8, metadata={"help": f"Validation images drawn in {PREDICTIONS} with their pairs; 0: no figure."}
    )
    draw_threshold: float = field(default=0.3, metadata={"help": "Smallest score of a drawn verb, [0, 1]."})

    def __post_init__(self) -> None:
        """Raises ValueError for numbers outside their range."""
        if self.draw_images < 0:
            raise ValueError(f"draw_images={self.draw_images} is below 0")
        if not 0 <= self.draw_threshold <= 1:
            raise ValueError(f"draw_threshold={self.draw_threshold} is outside [0, 1]")
