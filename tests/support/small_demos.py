"""Saved models for the demo: untrained, of the digits' size, native and stock; and pictures to send."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification, apply_dropkey
from hf_dropkey.hub.cards import RunFacts


SIDE, PATCH, LAYERS, HEADS = 12, 2, 3, 2
SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 16,
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_labels": 3,
    "id2label": {0: "cat", 1: "dog", 2: "<b>bird</b>"},
    "label2id": {"cat": 0, "dog": 1, "<b>bird</b>": 2},
}
RATIO = 0.4


def save_classifier(
    folder: Path, *, stock: bool = False, seed: int = 0, dropkey: bool = True, digits: bool = False
) -> Path:
    """Saves a classifier whose predictions depend on image and mask; `stock` one of Transformers that was patched.

    With `digits` its classes are those of the digits.
    """
    torch.manual_seed(seed)
    names = {number: str(number) for number in range(10)}
    classes = {"num_labels": 10, "id2label": names, "label2id": {name: number for number, name in names.items()}}
    shape = SHAPE | (classes if digits else {})
    ratio = RATIO if dropkey else 0.0
    model: PreTrainedModel
    if stock:
        model = ViTForImageClassification(ViTConfig(**shape))
        if dropkey:
            apply_dropkey(model, RATIO)
    else:
        model = DropKeyViTForImageClassification(DropKeyViTConfig(**shape, dropkey_ratio=ratio))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # untrained ones hardly see the image
            if weight.ndim > 1:
                weight.mul_(25 if "classifier" in name else 8)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    RunFacts(dataset="digits", command="hf-dropkey train recipe:digits_vit").save(folder)
    return folder


def noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """A picture of coloured noise."""
    made = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(made)


def bad_files(folder: Path) -> dict[str, Path]:
    """Files that cannot be used, each with a word of the sentence that says why."""
    folder.mkdir(parents=True, exist_ok=True)
    noise().save(folder / "whole.png")
    content = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    noise(2, 2).save(folder / "tiny.png")
    noise(200, 5).save(folder / "line.png")
    # of one colour, so that the file is small
    Image.new("L", (12000, 9000)).save(folder / "huge.png")
    Image.new("1", (30000, 30000)).save(folder / "bomb.png")
    Image.new("I;16", (20, 20)).save(folder / "deep.png")
    words = {
        "cut.png": "cannot be read as an image",
        "text.png": "not an image file",
        "empty.png": "empty file",
        "tiny.png": "2 x 2 pixels, too few",
        "line.png": "a line rather than a picture",
        "huge.png": "at most 50 million",
        "bomb.png": "million",
        "deep.png": "8 bits",
    }
    return {word: folder / name for name, word in words.items()}
