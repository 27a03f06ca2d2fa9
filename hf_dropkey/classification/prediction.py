"""Classifies image files with a saved folder or a hub id, without any need for this package.

It imports Transformers only, as anyone would who was handed the folder: `scripts/predict_images.py` runs this file by
its path, so that the package is not loaded. With --attention_file it also saves the attention of the class token in
the last layer, the mean over heads, for a Vision Transformer.
"""

import json
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser, PreTrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file


@dataclass
class PredictionArguments:
    """What to classify, and with what."""

    _argument_group_name = "Prediction"

    model_name_or_path: str = field(metadata={"help": "Folder of a saved model, or a hub id."})
    images: list[str] = field(metadata={"help": "Image files, or folders of them."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the model."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the predictions."})
    attention_file: str | None = field(
        default=None, metadata={"help": "npz file for `attention` [B, rows, columns] and `probabilities` [B, C]."}
    )
    batch_size: int = field(default=32, metadata={"help": "Images in a batch."})


ARGUMENTS = (PredictionArguments,)


def image_files(names: list[str]) -> list[str]:
    """The files among names, and the images in folders by name.

    Raises:
        ValueError: There is no image.
    """
    # some kinds, such as PDF, are only written
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found: list[str] = []
    for name in names:
        inside = sorted(Path(name).iterdir()) if Path(name).is_dir() else []
        images = [str(file) for file in inside if file.suffix.lower() in endings and not file.name.startswith(".")]
        if Path(name).is_dir() and not images:
            raise ValueError(f"--images {name} is a folder without image files; give image files, or a folder of them")
        found += images or [name]
    return found


def check_output(option: str, name: str | None) -> None:
    """Raises OSError, before any image is classified, if a file of results cannot be written."""
    if name is not None and (Path(name).is_dir() or not Path(name).absolute().parent.is_dir()):
        what = "is a folder" if Path(name).is_dir() else "lies in a folder that is not there"
        raise OSError(f"--{option} {name} {what}; name a file in a folder that is there")


def open_image(name: str) -> Image.Image:
    """An image file in RGB, turned as it says; tells what becomes of transparent pixels.

    Raises:
        ValueError: It cannot be read, or has more than 8 bits per channel, which a conversion would clip.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(name))
        shown = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise ValueError(f"--images {name} cannot be read as an image ({error}); give image files") from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"--images {name} has more than 8 bits per channel (mode {image.mode}); convert it to 8 bits")
    if np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        print(f"{name} has transparent pixels; the model sees the colour that the file stores there", file=sys.stderr)
    return shown


def class_names(config: dict[str, Any], source: str) -> list[str]:
    """The class names of a config.json, none where it has none; two classes of one name get their number too.

    Raises:
        ValueError: Its `id2label` does not give the numbers 0, 1, 2 and so on a name each.
    """
    ids = config.get("id2label")
    if ids is None:
        return []
    if not isinstance(ids, dict) or sorted(ids, key=str) != sorted(map(str, range(len(ids)))):
        raise ValueError(
            f"config.json of {source} has the id2label {str(ids)[:200]}; it must give the numbers 0, 1, 2 and so on a "
            'name each, such as {"0": "cat", "1": "dog"}; repair the file'
        )
    names = [str(ids[str(number)]) for number in range(len(ids))]
    return [f"{name} (class {number})" if names.count(name) > 1 else name for number, name in enumerate(names)]


def class_token_attention(attention: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Attention `[B, rows, columns]` of the class token, averaged over heads, from weights `[B, H, N, N]`.

    Raises:
        ValueError: The keys are not a class token and the patches of the grid.
    """
    if attention.shape[-1] != 1 + grid[0] * grid[1]:
        raise ValueError(
            f"--attention_file: the last attention has {attention.shape[-1]} keys, not a class token and the {grid[0]} "
            f"x {grid[1]} patches; `hf-dropkey look` draws the attention of such models"
        )
    return attention.mean(dim=1)[:, 0, 1:].unflatten(-1, grid).float()


def load(arguments: PredictionArguments) -> tuple[Any, list[str], Any]:
    """The model, its class names and its image processor; an adapter needs this package, and comes on its base model.

    Raises:
        ImportError: It is an adapter, and the package is not installed.
        ValueError, OSError: There is no such model, or it is damaged.
    """
    name = arguments.model_name_or_path
    source: dict[str, Any] = {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}
    # only plain attention gives its weights
    attention = {} if arguments.attention_file is None else {"attn_implementation": "eager"}
    processor = AutoImageProcessor.from_pretrained(name, **source)
    if find_adapter_config_file(name, revision=arguments.revision) is not None:
        # by name, because this file also runs outside of the package
        model = import_module("hf_dropkey.classification.adapters").load_classifier(name, **source, **attention)
        found = {"id2label": {str(number): label for number, label in model.config.id2label.items()}}
        return model, class_names(found, name), processor
    config, _ = PreTrainedConfig.get_config_dict(name, revision=arguments.revision)
    names = class_names(config, name)
    return whole_classifier(name, config, {**source, **attention}), names, processor


def whole_classifier(name: str, config: dict[str, Any], options: dict[str, Any]) -> Any:
    """An image classifier with all its weights, in eval mode.

    Raises:
        ValueError: It is a model of another task, or has no trained classifier, whose weights would be random.
    """
    kind = ", ".join(config.get("architectures") or [str(config.get("model_type"))])
    try:
        model, report = AutoModelForImageClassification.from_pretrained(name, output_loading_info=True, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(f"{name} holds a {kind}, not an image classifier; give one, or name its --task") from error
    if report["missing_keys"]:
        lost = sorted(report["missing_keys"])
        raise ValueError(
            f"{name} holds a {kind} without {len(lost)} weights of an image classifier, such as {lost[0]}, so that it would "
            f"guess; train one from it first: hf-dropkey train --model_name_or_path {name}"
        )
    return model.eval()


def predict(arguments: PredictionArguments) -> list[dict[str, Any]]:
    """Classifies, prints and writes; returns the class and the probability of each image.

    Raises:
        ValueError: An image cannot be read, or the model cannot do what is requested.
    """
    files = image_files(arguments.images)
    for option in ("output_file", "attention_file"):
        check_output(option, getattr(arguments, option))
    model, names, processor = load(arguments)
    print(f"{type(model).__module__}.{type(model).__name__}, package loaded: {'hf_dropkey' in sys.modules}")
    probabilities, maps = forward(model, processor, files, arguments)
    predictions = []
    for name, row in zip(files, probabilities, strict=True):
        best = int(row.argmax())
        # a configuration without names has Transformers' own
        label = names[best] if names else model.config.id2label[best]
        predictions.append({"image": name, "label": label, "probability": row[best].item()})
        print(f"{label:>20} {row[best].item():7.1%}  {name}")
    if arguments.output_file:
        Path(arguments.output_file).write_text(json.dumps(predictions, indent=2) + "\n", encoding="utf-8")
    if arguments.attention_file:
        np.savez(arguments.attention_file, attention=maps.numpy(), probabilities=probabilities.numpy())
    return predictions


def forward(
    model: Any, processor: Any, files: list[str], arguments: PredictionArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities `[B, C]` of all images; and, if requested, attention of the class token `[B, rows, columns]`."""
    probabilities, maps = [], []
    for start in range(0, len(files), arguments.batch_size):
        images = [open_image(name) for name in files[start : start + arguments.batch_size]]
        batch = processor(images, return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**batch, output_attentions=arguments.attention_file is not None)
        probabilities.append(outputs.logits.float().softmax(dim=-1))
        if arguments.attention_file is not None:
            patch = model.config.patch_size
            grid = (batch["pixel_values"].shape[-2] // patch, batch["pixel_values"].shape[-1] // patch)
            maps.append(class_token_attention(outputs.attentions[-1], grid))
    return torch.cat(probabilities), torch.cat(maps) if maps else torch.empty(0)


if __name__ == "__main__":
    group: Any = PredictionArguments
    (given,) = HfArgumentParser(group).parse_args_into_dataclasses(look_for_args_file=False)
    try:
        predict(given)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"predict_images: {error}")
