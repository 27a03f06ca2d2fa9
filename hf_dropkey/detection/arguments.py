"""The arguments of a detection job: model, DropKey, data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..images.sources import EVALUATION_SPLITS, data_name, hub_or_data_name
from ..training.arguments import DropKeyArguments


ModelType = Literal["detr", "conditional_detr", "yolos", "rt_detr"]
MODEL_TYPES: tuple[str, ...] = get_args(ModelType)
# they take a mask of the padding; the others see a padded image as it is
MASKED_TYPES = ("detr", "conditional_detr")
DEFAULT_SHAPE = {
    "image_size": 320,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "num_queries": 50,
    "patch_size": 16,
}
# what the run draws its predictions into
FIGURE = "predictions.png"


@dataclass
class DetectionModelArguments:
    """Which model: a pretrained one, or a small one from scratch."""

    _argument_group_name = "Model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Any detection model of Transformers to start from: a folder or a hub id."},
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Train new class scores if the model does not know the data's classes; with --do_train."},
    )
    model_type: ModelType | None = field(default=None, metadata={"help": "Family of a model from scratch."})
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Pixels of the longest side (DETR, Conditional DETR), or of a square that images are stretched to "
            "(YOLOS, RT-DETR). Default: 320 from scratch, else as the model's image processor has it."
        },
    )
    hidden_size: int | None = field(default=None, metadata={"help": "From scratch, as the next ones. Default: 128."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Number of heads. Default: 4."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of the MLPs. Default: 256."})
    encoder_layers: int | None = field(
        default=None, metadata={"help": "Encoder layers; all layers of YOLOS. Default: 3, RT-DETR 1."}
    )
    decoder_layers: int | None = field(default=None, metadata={"help": "Decoder layers. Default: 3."})
    num_queries: int | None = field(
        default=None, metadata={"help": "Largest number of objects in an image. Default: 50."}
    )
    patch_size: int | None = field(default=None, metadata={"help": "Side in pixels, YOLOS only. Default: 16."})
    backbone_stride: Literal[16, 32] | None = field(
        default=None, metadata={"help": "Pixels between two keys, DETR and Conditional DETR only. Default: 32."}
    )
    dropout: float | None = field(
        default=None, metadata={"help": "Dropout outside attention, [0, 1). Default: 0.1, YOLOS and RT-DETR 0."}
    )
    auxiliary_loss: bool | None = field(
        default=None,
        metadata={
            "help": "A loss on every decoder layer. Default: off, RT-DETR on. DETR and Conditional DETR of Transformers "
            "compute differently with it than the original models, so it is for models from scratch only."
        },
    )

    def __post_init__(self) -> None:
        """Raises ValueError unless there is one source of the model, and what is given concerns it."""
        if bool(self.model_name_or_path) == bool(self.model_type):
            raise ValueError(
                f"model_name_or_path={self.model_name_or_path!r} and model_type={self.model_type!r}: give one of them, "
                f"--model_name_or_path to start from a model or --model_type {'|'.join(MODEL_TYPES)} from scratch"
            )
        if self.model_type not in (None, *MODEL_TYPES):
            raise ValueError(f"model_type={self.model_type!r} is not one of {list(MODEL_TYPES)}")
        shape = {name: value for name, value in self.shape().items() if value is not None}
        if self.model_name_or_path and shape:
            raise ValueError(
                f"--model_name_or_path {self.model_name_or_path} fixes the shape of the model; leave out {shape}"
            )
        for name, value in {**shape, "image_size": self.image_size}.items():
            if name not in ("dropout", "auxiliary_loss") and value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is outside [0, 1)")
        unused = {"patch_size": ("yolos",), "backbone_stride": MASKED_TYPES}
        unused["decoder_layers"] = tuple(name for name in MODEL_TYPES if name != "yolos")
        for name, types in unused.items():
            if name in shape and self.model_type not in types:
                raise ValueError(f"{name}={shape[name]} means nothing for {self.model_type}, only for {list(types)}")

    def shape(self) -> dict[str, Any]:
        """The arguments that make a model from scratch."""
        names = (*DEFAULT_SHAPE, "backbone_stride", "dropout", "auxiliary_loss")
        return {name: getattr(self, name) for name in names if name != "image_size"}


@dataclass
class DetectionDropKeyArguments(DropKeyArguments):
    """DropKey. What is not given is as the model's configuration remembers it, else as `apply_dropkey` has it."""

    dropkey_cross_attention: bool | None = field(
        default=None, metadata={"help": "Drop keys where queries attend to the image too."}
    )
    dropkey_backend: str | None = field(
        default=None, metadata={"help": "Attention backend of the layers that drop keys. Default: the model's own."}
    )


@dataclass
class DetectionDataArguments:
    """Where the images and their boxes are."""

    _argument_group_name = "Data"

    train_images: str | None = field(default=None, metadata={"help": "Folder of the images to train on."})
    train_annotations: str | None = field(
        default=None, metadata={"help": "Their annotations, a JSON file in COCO's format."}
    )
    validation_images: str | None = field(default=None, metadata={"help": "Folder of the images to evaluate on."})
    validation_annotations: str | None = field(default=None, metadata={"help": "Their annotations."})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Instead of files: a data set of the hub or in a folder, with the columns `image` and `objects`, "
            "the latter with `bbox` ([x, y, width, height] in pixels) and `category`."
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
        default=False, metadata={"help": "Leave out boxes that cannot be used, instead of stopping."}
    )

    def __post_init__(self) -> None:
        """Raises ValueError for two sources at once, half a source, and numbers below 1."""
        files = {
            "train": (self.train_images, self.train_annotations),
            "validation": (self.validation_images, self.validation_annotations),
        }
        for split, (images, annotations) in files.items():
            if bool(images) != bool(annotations):
                missing = f"--{split}_{'annotations' if images else 'images'}"
                raise ValueError(f"{missing} is missing beside {images or annotations}; give both")
        if self.dataset_name and any(images for images, _ in files.values()):
            raise ValueError(f"several data sources at once (dataset_name={self.dataset_name!r} and files); keep one")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1; leave it out for no limit")

    @property
    def name(self) -> str:
        """What to call the data where others read it: of a local path only the last part."""
        path = self.train_annotations or self.validation_annotations
        if path:
            return data_name(Path(path).with_suffix(""))
        return hub_or_data_name(self.dataset_name or "")


@dataclass
class DetectionRunArguments:
    """How the model is trained and what is drawn."""

    _argument_group_name = "Detection"

    backbone_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the backbone. Default: --learning_rate. DETR: a tenth of it."},
    )
    draw_images: int = field(
        default=8, metadata={"help": f"Validation images drawn in {FIGURE} with their boxes; 0: no figure."}
    )
    draw_threshold: float = field(default=0.5, metadata={"help": "Smallest score of a drawn box, [0, 1]."})
    coco_package: Literal["auto", "pycocotools", "faster-coco-eval"] = field(
        default="auto",
        metadata={
            "help": "Which package counts detections; their numbers are the same. Default: faster-coco-eval if it is "
            "installed, else pycocotools."
        },
    )

    def __post_init__(self) -> None:
        """Raises ValueError for numbers outside their range."""
        if self.draw_images < 0:
            raise ValueError(f"draw_images={self.draw_images} is below 0")
        if not 0 <= self.draw_threshold <= 1:
            raise ValueError(f"draw_threshold={self.draw_threshold} is outside [0, 1]")
