"""The arguments of a segmentation job: model, DropKey, data, what is drawn."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..images.sources import EVALUATION_SPLITS, data_name, hub_or_data_name
from ..training.arguments import DropKeyArguments


BackboneType = Literal["vit", "t2t_vit", "volo", "ceit"]
BACKBONE_TYPES: tuple[str, ...] = get_args(BackboneType)
# families whose patches have one size
FIXED_PATCH, FIXED_PATCH_TYPES = 16, ("t2t_vit", "volo", "ceit")
DEFAULT_SHAPE = {
    "image_size": 64,
    "hidden_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "patch_size": 8,
    "decoder_size": 64,
}
IGNORE_INDEX = 255
# what the run draws its predictions into, and writes the scores of each class into
FIGURE, CLASS_TABLE = "predictions.png", "per_class.txt"


@dataclass
class SegmentationModelArguments:
    """Which model: a pretrained one, or UperNet from scratch on a DropKey backbone."""

    _argument_group_name = "Model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "SegFormer, BEiT, UperNet, Mask2Former or another model for semantic segmentation to start from: a "
            "folder or a hub id."
        },
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Train new class scores if the model does not know the data's classes; with --do_train."},
    )
    backbone: BackboneType | None = field(
        default=None, metadata={"help": "UperNet from scratch on this family, with new weights."}
    )
    backbone_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "UperNet from scratch on the weights of a DropKeyViT, T2T-ViT, VOLO or CeiT checkpoint, such as a "
            "classifier of this package or a plain ViT: a folder or a hub id."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels of the squares that images are stretched to. Default: as the model's image processor "
            "has it, 64 from scratch."
        },
    )
    hidden_size: int | None = field(default=None, metadata={"help": "From scratch, as the next ones. Default: 96."})
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Layers of the backbone, at least 3. Default: 6."}
    )
    num_attention_heads: int | None = field(default=None, metadata={"help": "Number of heads. Default: 3."})
    patch_size: int | None = field(default=None, metadata={"help": "Side in pixels, vit only. Default: 8."})
    decoder_size: int | None = field(
        default=None, metadata={"help": "Channels of UperNet's decoder, also on pretrained backbones. Default: 64."}
    )

    def __post_init__(self) -> None:
        """Raises ValueError unless there is one source of the model, and what is given concerns it."""
        sources = {
            name: getattr(self, name)
            for name in ("model_name_or_path", "backbone", "backbone_name_or_path")
            if getattr(self, name)
        }
        if len(sources) != 1:
            shown = ", ".join(f"--{name} {value}" for name, value in sources.items()) or "none of them"
            raise ValueError(
                f"{shown}: give one of --model_name_or_path to start from a model, --backbone "
                f"{'|'.join(BACKBONE_TYPES)} from scratch, or --backbone_name_or_path for a new decoder on a backbone"
            )
        if self.backbone not in (None, *BACKBONE_TYPES):
            raise ValueError(f"--backbone {self.backbone} is not one of {', '.join(BACKBONE_TYPES)}")
        shape = self.shape()
        fixed = set(shape) - ({"decoder_size"} if self.backbone_name_or_path else set())
        if self.backbone is None and fixed:
            raise ValueError(
                f"{next(iter(sources.values()))} fixes the shape of the model; leave out "
                f"{', '.join(f'--{name} {shape[name]}' for name in sorted(fixed))}"
            )
        for name, value in {**shape, "image_size": self.image_size}.items():
            if value is not None and value < (3 if name == "num_hidden_layers" else 1):
                raise ValueError(f"--{name} {value} is below {3 if name == 'num_hidden_layers' else 1}")
        if self.patch_size and self.backbone in FIXED_PATCH_TYPES:
            raise ValueError(
                f"--patch_size {self.patch_size}: the patches of {self.backbone} are {FIXED_PATCH} pixels; leave it out, or "
                "choose --backbone vit"
            )
        if self.backbone is not None:
            self._check_patches()

    def _check_patches(self) -> None:
        size = self.image_size or DEFAULT_SHAPE["image_size"]
        patch = FIXED_PATCH if self.backbone in FIXED_PATCH_TYPES else self.patch_size or DEFAULT_SHAPE["patch_size"]
        if size % patch:
            below = size // patch * patch
            near = [str(side) for side in (below, below + patch) if side]
            raise ValueError(
                f"--image_size {size} is not a multiple of the patches' {patch} pixels; choose {' or '.join(near)}"
            )

    def shape(self) -> dict[str, Any]:
        """The arguments that were given of those that make a model from scratch."""
        names = (name for name in DEFAULT_SHAPE if name != "image_size")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class SegmentationDropKeyArguments(DropKeyArguments):
    """DropKey. What is not given is as the model's configuration remembers it, else as `apply_dropkey` has it."""


@dataclass
class SegmentationDataArguments:
    """Where the images and their masks are."""

    _argument_group_name = "Data"

    dataset: Literal["scenes"] | None = field(
        default=None, metadata={"help": "Instead of folders: scenes generated with their masks, no download."}
    )
    train_images: str | None = field(default=None, metadata={"help": "Folder of the images to train on."})
    train_masks: str | None = field(
        default=None,
        metadata={
            "help": "Folder of their masks: for each image a PNG of its name and size, whose values are class numbers."
        },
    )
    validation_images: str | None = field(default=None, metadata={"help": "Folder of the images to evaluate on."})
    validation_masks: str | None = field(default=None, metadata={"help": "Folder of their masks."})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Instead of folders: a data set of the hub or in a folder, with the columns `image` and `label` (or "
            "`pixel_values`, `annotation`), and an id2label.json."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    train_split_name: str = field(default="train", metadata={"help": "Split of the data set to train on."})
    eval_split_name: str | None = field(
        default=None, metadata={"help": f"Split to evaluate on. Default: the first of {', '.join(EVALUATION_SPLITS)}."}
    )
    train_file: str | None = field(
        default=None,
        metadata={"help": "Instead of folders: a parquet file with such columns, or a glob pattern for several."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same, for evaluation."})
    image_column_name: str | None = field(default=None, metadata={"help": "Default: found by its usual name."})
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the masks. Default: found by its usual name."}
    )
    class_names: str | None = field(
        default=None,
        metadata={
            "help": 'JSON file of the class names in the order of their numbers: ["road", "car", ...]. Default: id2label.json '
            "of --dataset_name."
        },
    )
    do_reduce_labels: bool = field(
        default=False,
        metadata={
            "help": "Masks number the classes from 1, and 0 is a pixel without one, as in ADE20K: subtract 1, 0 becomes "
            "--ignore_index."
        },
    )
    ignore_index: int = field(
        default=IGNORE_INDEX, metadata={"help": "Value of pixels that are neither trained on nor scored, 0 to 255."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random choice of this many."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on a random choice of this many."})
    check_images: bool = field(
        default=True,
        metadata={"help": "Read every image and mask once before training; else a bad one stops the run."},
    )
    skip_bad_images: bool = field(
        default=False,
        metadata={"help": "Leave out images that cannot be used, or whose mask cannot, instead of stopping."},
    )
    train_scenes: int = field(default=1000, metadata={"help": "Generated scenes to train on."})
    validation_scenes: int = field(default=200, metadata={"help": "Generated scenes to evaluate on."})
    scene_size: int = field(default=64, metadata={"help": "Side of a generated scene in pixels."})

    def __post_init__(self) -> None:
        """Raises ValueError for two sources at once, half a source, and numbers outside their range."""
        folders = {
            "train": (self.train_images, self.train_masks),
            "validation": (self.validation_images, self.validation_masks),
        }
        for split, (images, masks) in folders.items():
            if bool(images) != bool(masks):
                missing = f"--{split}_{'masks' if images else 'images'}"
                raise ValueError(f"{missing} is missing beside {images or masks}; give both")
        self._check_sources()
        if not (self.dataset or self.dataset_name or self.class_names):
            raise ValueError(
                "--class_names is missing: a JSON file with the names of the classes in the order of their numbers, such "
                'as ["background", "cat"]'
            )
        if not 0 <= self.ignore_index <= 255:
            raise ValueError(f"--ignore_index {self.ignore_index} is outside 0 to 255, the values of a mask")
        for name in ("max_train_samples", "max_eval_samples", "train_scenes", "validation_scenes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} is below 1")
        if self.scene_size < 32:
            raise ValueError(f"--scene_size {self.scene_size} is below 32, too small for its shapes")

    def _check_sources(self) -> None:
        """Raises ValueError unless there is one source of data."""
        folders, files = self.train_images or self.validation_images, self.train_file or self.validation_file
        named = {
            "dataset": self.dataset,
            "dataset_name": self.dataset_name,
            "train_images" if self.train_images else "validation_images": folders,
            "train_file" if self.train_file else "validation_file": files,
        }
        given = [f"--{name} {value}" for name, value in named.items() if value]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are several sources of data; keep one")
        if not given:
            raise ValueError(
                "there is no data; give --train_images and --train_masks (and --validation_images, --validation_masks), "
                "--dataset_name, --train_file, or --dataset scenes"
            )
        if self.dataset and (self.class_names or self.do_reduce_labels):
            what = "--class_names" if self.class_names else "--do_reduce_labels"
            raise ValueError(f"{what} is for data of your own, and --dataset {self.dataset} is complete; leave it out")

    @property
    def has_rows(self) -> bool:
        """Whether the data are rows with images, not folders and not generated."""
        return bool(self.dataset_name or self.train_file or self.validation_file)

    @property
    def evaluation_path(self) -> str | None:
        """The folder or the files of the images to evaluate on; None for a data set with splits."""
        return self.validation_images or self.validation_file

    @property
    def name(self) -> str:
        """What to call the data where others read it: of a local path only the last part."""
        if self.dataset:
            return self.dataset
        path = self.train_images or self.train_file or self.evaluation_path
        return data_name(path) if path else hub_or_data_name(str(self.dataset_name))


@dataclass
class SegmentationRunArguments:
    """What is drawn at the end."""

    _argument_group_name = "Segmentation"

    draw_images: int = field(
        default=6,
        metadata={"help": f"Validation images drawn in {FIGURE} with mask, prediction and uncertainty; 0: no figure."},
    )
    draw_samples: int = field(
        default=20, metadata={"help": "Random masks of DropKey for the drawn uncertainty, at least 2."}
    )

    def __post_init__(self) -> None:
        """Raises ValueError for numbers outside their range."""
        if self.draw_images < 0:
            raise ValueError(f"--draw_images {self.draw_images} is below 0")
        if self.draw_samples < 2:
            raise ValueError(f"--draw_samples {self.draw_samples} is below 2")
