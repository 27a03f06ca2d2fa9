"""The arguments of a job for body meshes: model, body, data, augmentation."""

from dataclasses import dataclass, field
from typing import Literal

from ..images.sources import EVALUATION_SPLITS, hub_or_data_name


FIGURE = "predictions.png"


@dataclass
class MeshModelArguments:
    """Which model: a trained one, or one from scratch."""

    _argument_group_name = "Model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Body-mesh model of this package to start from: a folder or a hub id."}
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    system: Literal["metro", "graphormer"] | None = field(
        default=None, metadata={"help": "From scratch, as the next ones: METRO (default) or MeshGraphormer."}
    )
    model_size: Literal["nano", "published"] | None = field(
        default=None,
        metadata={
            "help": "nano: 64 pixels, a small ResNet, trains on a CPU. published (default): the sizes of the papers, "
            "224 pixels."
        },
    )
    backbone: str | None = field(
        default=None,
        metadata={
            "help": "Pretrained backbone of any AutoBackbone, a folder or a hub id, such as microsoft/resnet-50. Default: "
            "a new one, a ResNet-50 or nano's small ResNet."
        },
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the crops in pixels. Default: 224, nano 64."}
    )
    mesh_levels: list[int] | None = field(
        default=None,
        metadata={
            "help": "Vertices of the coarse mesh, which are tokens, and of the middle one. Default: 431 1723 or, if the "
            "body has fewer, a sixteenth and a quarter of it; nano 48 240.",
            "nargs": 2,
        },
    )
    masked_ratio: float | None = field(
        default=None, metadata={"help": "Masked tokens in training, at most this fraction, [0, 1]. Default: 0.3."}
    )
    hidden_dropout_prob: float | None = field(
        default=None, metadata={"help": "Dropout on embeddings and layer outputs, [0, 1). Default: 0.1."}
    )
    attention_probs_dropout_prob: float | None = field(
        default=None, metadata={"help": "Dropout on attention weights, for comparison, [0, 1). Default: 0."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention backend, such as eager, which is the fastest for nano on a CPU, or sdpa. All drop the same "
            "scores. Default: the best there is for large models."
        },
    )

    def __post_init__(self) -> None:
        """Raises ValueError where what is given concerns no model from scratch."""
        scratch = {
            name: getattr(self, name) for name in ("system", "model_size", "backbone", "image_size", "mesh_levels")
        }
        given = {name: value for name, value in scratch.items() if value is not None}
        if self.model_name_or_path and given:
            raise ValueError(
                f"--model_name_or_path {self.model_name_or_path} fixes the shape of the model; leave out "
                f"{', '.join('--' + name for name in given)}"
            )


@dataclass
class MeshBodyArguments:
    """Which body the meshes are of."""

    _argument_group_name = "Body"

    body: str = field(
        default="procedural",
        metadata={
            "help": "procedural (built in), anny or anny:TOPOLOGY (pip install 'hf_dropkey[body]'), or module:function, a "
            "function of yours that returns a body. It must be the body of the model and of the data."
        },
    )


@dataclass
class MeshDataArguments:
    """Where the images and their persons are: generated, or rows of a data set."""

    _argument_group_name = "Data"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A data set of the hub or in a folder (parquet, or images with metadata.jsonl), one row a person, with "
            "`image`, `box` and `vertices`, `pose` and `shape`, `joints_3d` or `joints_2d`. Default: generated people."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    train_split_name: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split_name: str | None = field(
        default=None, metadata={"help": f"Split to evaluate on. Default: the first of {', '.join(EVALUATION_SPLITS)}."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many rows, the first ones. Generated people: 3000."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on this many rows, the first ones. Generated people: 300."}
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave out and count rows that cannot be used, instead of stopping."}
    )
    generated_seed: int = field(
        default=0,
        metadata={"help": "Generated people of another seed are others. Held-out ones are of no seed's training."},
    )
    backgrounds: str | None = field(
        default=None, metadata={"help": "Folder of photographs to draw generated people on. Default: coloured shapes."}
    )

    def __post_init__(self) -> None:
        """Raises ValueError where what is given concerns no generated people, or is too small."""
        if self.dataset_name is not None and self.backgrounds is not None:
            raise ValueError(
                f"--backgrounds is for generated people; leave it out with --dataset_name {self.dataset_name}"
            )
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} is below 1")
        if self.generated_seed < 0:
            raise ValueError(f"--generated_seed {self.generated_seed} is below 0")

    @property
    def name(self) -> str:
        """What cards and messages call the data."""
        return hub_or_data_name(self.dataset_name or "generated people")


@dataclass
class MeshAugmentationArguments:
    """How training images vary; the defaults are METRO's."""

    _argument_group_name = "Augmentation"

    flip_probability: float = field(default=0.5, metadata={"help": "Probability of a mirror image, [0, 1]."})
    rotation_probability: float = field(default=0.4, metadata={"help": "Probability of a rotation, [0, 1]."})
    rotation_std: float = field(
        default=30.0, metadata={"help": "Standard deviation of its angle in degrees, cut at twice that, [0, 90]."}
    )
    scale_std: float = field(default=0.25, metadata={"help": "Spread of the size of crops, cut at once that, [0, 1)."})
    color_noise: float = field(default=0.4, metadata={"help": "Largest change of a colour channel's factor, [0, 1]."})


@dataclass
class MeshRunArguments:
    """What is drawn."""

    _argument_group_name = "Meshes"

    draw_images: int = field(
        default=6, metadata={"help": f"Evaluation images drawn in {FIGURE} with their meshes; 0: no figure."}
    )

    def __post_init__(self) -> None:
        """Raises ValueError for numbers outside their range."""
        if self.draw_images < 0:
            raise ValueError(f"--draw_images {self.draw_images} is below 0")
