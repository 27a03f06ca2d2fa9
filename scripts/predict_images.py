"""Classifies image files with a saved folder or a hub id, without any need for this package.

    python scripts/predict_images.py --model_name_or_path runs/digits --trust_remote_code True --images a.png b.png

It imports Transformers only, as anyone would who was handed the folder. With --attention_file it also saves the
attention of the class token in the last layer, the mean over heads, for a Vision Transformer.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser


@dataclass
class PredictionArguments:
    """What to classify, and with what."""

    model_name_or_path: str = field(metadata={"help": "Folder of a saved model, or a hub id."})
    images: list[str] = field(metadata={"help": "Image files."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the model."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the predictions."})
    attention_file: str | None = field(
        default=None, metadata={"help": "npz file for `attention` [B, rows, columns] and `probabilities` [B, C]."}
    )


def class_token_attention(attention: torch.Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Attention `[B, rows, columns]` of the class token, averaged over heads, from weights `[B, H, N, N]`."""
    return attention.mean(dim=1)[:, 0, 1:].unflatten(-1, grid).float().numpy()


def main() -> None:
    """Runs the job."""
    group: Any = PredictionArguments
    (arguments,) = HfArgumentParser(group).parse_args_into_dataclasses(look_for_args_file=False)
    source = {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}
    # only plain attention gives its weights
    attention = {} if arguments.attention_file is None else {"attn_implementation": "eager"}
    processor = AutoImageProcessor.from_pretrained(arguments.model_name_or_path, **source)
    model = AutoModelForImageClassification.from_pretrained(arguments.model_name_or_path, **source, **attention)
    images = [Image.open(name).convert("RGB") for name in arguments.images]
    batch = processor(images, return_tensors="pt")
    with torch.inference_mode():
        outputs = model.eval()(**batch, output_attentions=arguments.attention_file is not None)
    probabilities = outputs.logits.softmax(dim=-1)
    print(f"{type(model).__module__}.{type(model).__name__}, package loaded: {'hf_dropkey' in sys.modules}")
    predictions = []
    for name, row in zip(arguments.images, probabilities, strict=True):
        best = int(row.argmax())
        predictions.append({"image": name, "label": model.config.id2label[best], "probability": row[best].item()})
        print(f"{predictions[-1]['label']:>20} {row[best].item():7.1%}  {name}")
    if arguments.output_file:
        Path(arguments.output_file).write_text(json.dumps(predictions, indent=2) + "\n", encoding="utf-8")
    if arguments.attention_file:
        patch = model.config.patch_size
        grid = (batch["pixel_values"].shape[-2] // patch, batch["pixel_values"].shape[-1] // patch)
        maps = class_token_attention(outputs.attentions[-1], grid)
        np.savez(arguments.attention_file, attention=maps, probabilities=probabilities.numpy())


if __name__ == "__main__":
    main()
