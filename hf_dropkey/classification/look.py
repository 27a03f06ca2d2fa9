"""Draws the attention of a saved model, and writes the numbers behind the figures: `hf-dropkey look`.

For any model of this package and any Transformers model, and for adapters on one; DropKey settings in the configuration of
a stock model are restored. Without images and without a data argument it uses the built-in digits.

    statistics    entropy and mean distance of attention by layer and head, with DropKey and without
    maps          attention maps and rollout over images, and the heads of the last layer
    drops         the configured drop ratio of each attention, and the measured fraction that it drops in training
    uncertainty   images sorted by Monte-Carlo uncertainty, and accuracy against the fraction of images kept

Writes PNG files, numbers.csv (one number per row), images.csv (one image per row) and summary.json, which lists what
could not be drawn or read, with the reason.
"""

import csv
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from ..images.checks import image_problem
from ..images.folders import make_output_folder
from ..inference import monte_carlo_predict
from ..inspection.analysis import (
    accuracy_when_kept,
    attention_distance,
    attention_entropy,
    attention_map,
    measured_drops,
    rollout_map,
    uniform_distance,
    uniform_entropy,
)
from ..inspection.figures import drop_fractions, entropy_and_distance, maps_over_images, uncertain_images
from ..inspection.recording import AttentionRecord, UnreadableAttentionError, record_attention
from ..models.attention import default_device
from ..patching import apply_dropkey
from ..patching.apply import dropkey_modules
from ..saved import check_model_source
from ..training.arguments import parse_arguments
from ..version import __version__
from .adapters import adapter_folder, load_classifier
from .arguments import DataArguments
from .data import load_image_data
from .pictures import Pictures, ShownImages


logger = logging.getLogger(__name__)

FIGURES = ("statistics", "maps", "drops", "uncertainty")
MAPS_SHOWN, HEADS_SHOWN = 5, 8
DPI = 130


@dataclass
class LookArguments:
    """The model, the images, the output."""

    _argument_group_name = "Figures"

    model_name_or_path: str = field(metadata={"help": "Folder of a saved model or adapter, or an id on the Hub."})
    output_dir: str = field(metadata={"help": "Folder for figures and numbers."})
    images: list[str] | None = field(default=None, metadata={"help": "Image files, instead of a data source."})
    figures: list[str] | None = field(
        default=None, metadata={"help": f"Of {', '.join(FIGURES)}. Default: all that the model allows."}
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the model."})
    dropkey_ratio: float | None = field(
        default=None, metadata={"help": "Apply DropKey with this ratio. Default: as in the model's configuration."}
    )
    images_shown: int = field(default=6, metadata={"help": "Images in the figures of maps."})
    statistics_images: int = field(default=64, metadata={"help": "Images for the statistics and the drops."})
    passes: int = field(default=8, metadata={"help": "Training passes for the drops."})
    samples: int = field(default=20, metadata={"help": "Masks for the uncertainty."})
    batch_size: int = field(default=32, metadata={"help": "Images in a batch."})
    seed: int = field(default=0, metadata={"help": "Seed of the masks."})
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU only."})

    def __post_init__(self) -> None:
        """Raises ValueError for unknown figures and numbers outside their range."""
        unknown = sorted(set(self.figures or ()) - set(FIGURES))
        if unknown:
            raise ValueError(f"--figures {' '.join(unknown)} is unknown; choose from {', '.join(FIGURES)}")
        for name, least in (
            ("images_shown", 1),
            ("statistics_images", 1),
            ("batch_size", 1),
            ("passes", 2),
            ("samples", 2),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} is below {least}; choose a larger number")


ARGUMENTS = (LookArguments, DataArguments)


class Notebook:
    """Collects the output: rows of numbers and images, files, and what is missing with the reason."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.numbers: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []
        self.files: list[str] = []
        self.missing: dict[str, str] = {}

    def number(self, metric: str, value: float, unit: str, n: int, **where: Any) -> None:
        """One number with its unit; `n` is what it is the mean of."""
        place = {name: where.get(name, "") for name in ("layer", "attention", "head", "dropkey")}
        self.numbers.append({"metric": metric, **place, "value": value, "unit": unit, "n": n})

    def figure(self, figure: Any, name: str) -> None:
        """Saves a figure."""
        figure.savefig(self.folder / f"{name}.png", dpi=DPI)
        self.files.append(f"{name}.png")

    def write(self, about: dict[str, Any]) -> None:
        """Writes the numbers and the summary, and prints what is missing."""
        for name, rows in (("numbers.csv", self.numbers), ("images.csv", self.images)):
            if rows:
                with (self.folder / name).open("w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)
                self.files.append(name)
        summary = {**about, "files": self.files, "missing": self.missing}
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        for what, reason in self.missing.items():
            print(f"missing: {what}: {reason}")
        print(f"written to {self.folder}: {', '.join([*self.files, 'summary.json'])}")


def load_model(arguments: LookArguments) -> Any:
    """The model in float32 and eval mode, with DropKey as in the arguments, else as in its configuration."""
    check_model_source(arguments.model_name_or_path, adapters=True)
    source: dict[str, Any] = {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}
    if adapter_folder(arguments.model_name_or_path, arguments.revision) is None:
        config = AutoConfig.from_pretrained(arguments.model_name_or_path, **source)
        classifies = any("ForImageClassification" in name for name in config.architectures or ())
        auto: Any = AutoModelForImageClassification if classifies else AutoModel
        model = auto.from_pretrained(arguments.model_name_or_path, dtype=torch.float32, **source)
    else:
        # the base model, in which the adapter's layers act
        model = load_classifier(arguments.model_name_or_path, **source).float().get_base_model()
    if arguments.dropkey_ratio is not None:
        apply_dropkey(model, arguments.dropkey_ratio, verbose=True)
    elif getattr(model.config, "dropkey_ratio", None) is not None and not any(dropkey_modules(model)):
        apply_dropkey(model, verbose=True)
    return model.to("cpu" if arguments.use_cpu else default_device()).eval()


def load_pictures(arguments: LookArguments, data: DataArguments, model: Any, notebook: Notebook) -> Pictures:
    """The image files or the data set, with classes where the data and the model have the same names."""
    processor = AutoImageProcessor.from_pretrained(
        arguments.model_name_or_path, revision=arguments.revision, trust_remote_code=arguments.trust_remote_code
    )
    # configurations without this field are of models for colour images
    channels = getattr(model.config, "num_channels", 3)
    if arguments.images is not None:
        if data.dataset_name or not data.is_digits:
            raise ValueError(f"--images and the data source {data.name!r} exclude each other; pass one of them")
        problems = [image_problem({"path": file, "bytes": None}, row) for row, file in enumerate(arguments.images)]
        if not arguments.images or any(problems):
            raise ValueError(f"--images {'; '.join(filter(None, problems)) or 'names no file'}; pass image files")
        notebook.missing["true classes"] = "image files have none; use a data source, such as --validation_dir"
        rows = [{"image": Image.open(file)} for file in arguments.images]
        return Pictures(rows, [Path(file).name for file in arguments.images], None, processor, channels)
    found = load_image_data(data, training=False)
    names = set(model.config.id2label.values()) if classifier(model) else set()
    classes = None
    if set(found.label_names) <= names:
        classes = [found.label_names[found.label_ids[label]] for label in found.evaluation["label"]]
    else:
        notebook.missing["true classes"] = (
            f"the model does not have the classes of {data.name}, such as {found.label_names[0]}"
        )
    numbers = [f"row {row}" for row in found.evaluation["row"]]
    pictures = Pictures(found.evaluation, numbers, classes, processor, channels)
    pictures.split = found.evaluation_split
    return pictures


def classifier(model: Any) -> bool:
    """Whether a model is an image classifier."""
    return "ForImageClassification" in type(model).__name__


def draw_statistics(arguments: LookArguments, model: Any, pictures: Pictures, notebook: Notebook) -> None:
    """Entropy and distance of each head, also with DropKey if the model has it."""
    numbers = pictures.spread(arguments.statistics_images)
    conditions = {"plain attention": False} | ({"with DropKey": True} if drops_keys(model) else {})
    if len(conditions) == 1:
        notebook.missing["statistics with DropKey"] = NO_DROPKEY
    entropies, distances = {}, {}
    for name, dropkey in conditions.items():
        records = [
            record_attention(model, batch, dropkey=dropkey, seed=arguments.seed + start)
            for start, batch in enumerate(pictures.batches(numbers, arguments.batch_size, model.device))
        ]
        note_skipped(records[0], notebook)
        entropies[name], distances[name] = (
            mean_over_images(records, of) for of in (attention_entropy, attention_distance)
        )
        for depth, layer in enumerate(records[0].layers):
            for metric, unit, values in (("entropy", "nats", entropies), ("distance", "patches", distances)):
                for head, value in enumerate(values[name][depth]):
                    # class attention has no distance
                    if not np.isnan(value):
                        place = {"layer": depth + 1, "attention": layer.name, "head": head + 1, "dropkey": dropkey}
                        notebook.number(f"attention {metric}", float(value), unit, len(numbers), **place)
    layouts = [layer.layout for layer in records[0].layers]
    figure = entropy_and_distance(
        short_names([layer.name for layer in records[0].layers]),
        entropies,
        distances,
        uniform_entropies=[uniform_entropy(layout) for layout in layouts],
        uniform_distances=[uniform_distance(layout) for layout in layouts],
        title=f"{model_name(arguments)}: entropy and distance of attention, mean over {len(numbers)} images",
    )
    notebook.figure(figure, "statistics")


def mean_over_images(records: Sequence[AttentionRecord], of: Callable[..., torch.Tensor]) -> list[np.ndarray]:
    """For each layer the mean of `of(layer)` `[B, H]` over the images of all batches, `[H]`."""
    layers = zip(*(record.layers for record in records), strict=True)
    return [torch.cat([of(layer) for layer in same]).nanmean(0).cpu().numpy() for same in layers]


def note_skipped(record: AttentionRecord, notebook: Notebook) -> None:
    """Lists the attentions that a record lacks."""
    notebook.missing.update({f"attention {attention.name}": attention.reason for attention in record.skipped})


def draw_maps(arguments: LookArguments, model: Any, pictures: Pictures, notebook: Notebook) -> None:
    """Maps of some layers and the rollout, then those of the last layer's heads."""
    numbers = pictures.spread(arguments.images_shown)
    batches = pictures.batches(numbers, arguments.batch_size, model.device)
    records = [record_attention(model, batch) for batch in batches]
    note_skipped(records[0], notebook)
    source = "class" if records[0].layers[-1].layout.prefix else "mean"
    attends = {"class": "class token", "mean": "average patch"}[source]
    if source == "mean":
        notebook.missing["maps of a class token"] = (
            "the model has none; the maps are the mean over the queries of all patches"
        )
    chosen = []
    for depth, layer in enumerate(records[0].layers):
        if source == "mean" or layer.layout.prefix:
            chosen.append(depth)
        else:
            notebook.missing[f"map of {layer.name}"] = "the class token is not a query there"
    chosen = [chosen[place] for place in np.linspace(0, len(chosen) - 1, min(MAPS_SHOWN, len(chosen))).astype(int)]
    grid = records[0].layers[-1].layout.grid
    names = short_names([layer.name for layer in records[0].layers])
    maps = {}
    for depth in chosen:
        layers = [record.layers[depth] for record in records]
        maps[names[depth]] = stacked(attention_map(layer, source).mean(1) for layer in layers)
    maps["rollout"] = stacked(rollout_map(record.on_last_grid, source) for record in records)
    heads = stacked(attention_map(record.layers[-1], source) for record in records)
    shown = np.linspace(0, heads.shape[1] - 1, min(HEADS_SHOWN, heads.shape[1])).astype(int)
    images = [pictures.seen(number) for number in numbers]
    name, patches = model_name(arguments), f"{grid[0]} x {grid[1]} patches"
    joined = f"{len(records[0].on_last_grid)} of {len(records[0].layers)} layers"
    title = f"{name}: attention of the {attends} on {patches}, mean of heads; and rollout through {joined}"
    notebook.figure(maps_over_images(images, maps, title=title, attends=attends), "attention_maps")
    by_head = {f"head {head + 1}": heads[:, head] for head in shown}
    title = f"{name}: {len(shown)} of {heads.shape[1]} heads of {names[-1]}, attention of the {attends} on {patches}"
    notebook.figure(maps_over_images(images, by_head, title=title, attends=attends), "attention_heads")


def stacked(parts: Iterable[torch.Tensor]) -> np.ndarray:
    """The maps of several batches as one array."""
    return torch.cat(list(parts)).cpu().numpy()


def draw_drops(arguments: LookArguments, model: Any, pictures: Pictures, notebook: Notebook) -> None:
    """The configured ratios and the measured fractions."""
    numbers = pictures.spread(min(arguments.statistics_images, arguments.batch_size))
    batch = next(pictures.batches(numbers, len(numbers), model.device))
    layers = measured_drops(model, batch, passes=arguments.passes, seed=arguments.seed)
    for depth, layer in enumerate(layers):
        where = {"layer": depth + 1, "attention": layer.name, "dropkey": True}
        notebook.number("drop ratio configured", layer.ratio, "fraction", 1, **where)
        if layer.reason is not None:
            notebook.missing[f"measured drops of {layer.name}"] = layer.reason
            continue
        notebook.number("fraction dropped", float(np.mean(layer.fractions)), "fraction", len(layer.fractions), **where)
        spread = float(np.std(layer.fractions, ddof=1))
        notebook.number(
            "fraction dropped, standard deviation over passes", spread, "fraction", len(layer.fractions), **where
        )
    pattern = next(module.dropkey_pattern for _, module in dropkey_modules(model))
    note = " (the ratio is of patches; a class token is never dropped)" if pattern in ("block", "cross") else ""
    title = f"fraction dropped, pattern {pattern}{note}, on {len(numbers)} images in training mode"
    figure = drop_fractions(
        short_names([layer.name for layer in layers]),
        [layer.ratio for layer in layers],
        [layer.fractions for layer in layers],
        title=f"{model_name(arguments)}: {title}",
    )
    notebook.figure(figure, "drops")


def short_names(names: Sequence[str]) -> list[str]:
    """Dotted names without the parts at either end that are the same in all; a number keeps the part before it."""
    parts = [name.split(".") for name in names]
    while all(len(part) > 2 and part[0] == parts[0][0] and not part[1].isdigit() for part in parts):
        parts = [part[1:] for part in parts]
    while all(len(part) > 2 and part[-1] == parts[0][-1] for part in parts):
        parts = [part[:-1] for part in parts]
    return [".".join(part) for part in parts]


def draw_uncertainty(arguments: LookArguments, model: Any, pictures: Pictures, notebook: Notebook) -> None:
    """Every image with its Monte-Carlo prediction, the most uncertain first."""
    batches = pictures.batches(range(len(pictures)), arguments.batch_size, model.device)
    found = [
        monte_carlo_predict(model, batch, samples=arguments.samples, seed=arguments.seed + start)
        for start, batch in enumerate(batches)
    ]
    probabilities, information, entropies = (
        torch.cat([getattr(part, name) for part in found]).cpu()
        for name in ("probabilities", "mutual_information", "entropy")
    )
    confidence, best = probabilities.max(-1)
    predicted = [model.config.id2label[int(number)] for number in best]
    kept = None
    right = None
    if pictures.classes is not None:
        right = torch.tensor([guess == truth for guess, truth in zip(predicted, pictures.classes, strict=True)])
        fractions, accuracies = accuracy_when_kept(information, right)
        kept = fractions.numpy(), accuracies.numpy()
    for number in information.argsort(descending=True, stable=True).tolist():
        truth: dict[str, Any] = {}
        if pictures.classes is not None and right is not None:
            # accuracy on this image and all that are at most as uncertain
            certain = information <= information[number]
            truth = {
                "class": pictures.classes[number],
                "right": bool(right[number]),
                "fraction_kept": float(certain.float().mean()),
                "accuracy_kept": float(right[certain].float().mean()),
            }
        numbers = {"mutual_information_nats": float(information[number]), "entropy_nats": float(entropies[number])}
        prediction = {"predicted": predicted[number], "confidence": float(confidence[number])}
        notebook.images.append({"image": pictures.names[number], **numbers, **prediction, **truth})
    figure = uncertain_images(
        ShownImages(pictures),
        information.numpy(),
        confidence.numpy(),
        predicted,
        pictures.classes,
        kept=kept,
        title=f"{model_name(arguments)}: mutual information of prediction and DropKey mask, {arguments.samples} masks",
    )
    notebook.figure(figure, "uncertainty")


NO_DROPKEY = "the model drops no keys; pass --dropkey_ratio, for example 0.1"
DRAW = {"statistics": draw_statistics, "maps": draw_maps, "drops": draw_drops, "uncertainty": draw_uncertainty}


def drops_keys(model: Any) -> bool:
    """Whether any attention has a ratio above 0."""
    return any(module.dropkey_ratio > 0 for _, module in dropkey_modules(model))


def model_name(arguments: LookArguments) -> str:
    """The name of the model without local paths."""
    folder = Path(arguments.model_name_or_path)
    return folder.resolve().name if folder.is_dir() else arguments.model_name_or_path


def why_not(figure: str, model: Any) -> str | None:
    """Why a figure cannot be drawn of the model, None if it can."""
    if figure in ("drops", "uncertainty") and not drops_keys(model):
        return NO_DROPKEY
    if figure == "uncertainty" and not classifier(model):
        return f"{type(model).__name__} is not an image classifier; pass one"
    return None


def main(command: Sequence[str]) -> None:
    """Draws and writes what the arguments say."""
    arguments, data = parse_arguments(ARGUMENTS, command)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel("WARN")
    notebook = Notebook(Path(arguments.output_dir))
    model = load_model(arguments)
    pictures = load_pictures(arguments, data, model, notebook)
    make_output_folder(notebook.folder, "--output_dir")
    for name in arguments.figures or FIGURES:
        reason = why_not(name, model)
        if reason is None:
            try:
                DRAW[name](arguments, model, pictures, notebook)
                continue
            except UnreadableAttentionError as error:
                reason = str(error)
        # a figure named by the user is drawn, or is an error
        if arguments.figures:
            raise ValueError(f"--figures {name}: {reason}")
        notebook.missing[f"figure {name}"] = reason
    notebook.write(
        {
            "model": model_name(arguments),
            "class": type(model).__name__,
            "images": len(pictures),
            "data": "files" if arguments.images is not None else data.name,
            "split": pictures.split,
            "seed": arguments.seed,
            "samples": arguments.samples,
            "passes": arguments.passes,
            "versions": {
                "hf_dropkey": __version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
            },
        }
    )
