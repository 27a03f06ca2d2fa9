"""Tiny random models of the architectures that people fine-tune, saved as from the Hub, and runs that train them."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf

from hf_dropkey.classification.job import ClassificationJob


SIDE = 32
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
VIT: dict[str, Any] = {**SMALL, "image_size": SIDE, "patch_size": 8}
SWIN: dict[str, Any] = {
    "image_size": SIDE,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 2],
}
SIGLIP = hf.SiglipVisionConfig(**VIT)
CLIP: dict[str, Any] = {"vision_config": VIT, "text_config": {**SMALL, "vocab_size": 99, "eos_token_id": 98}}
# what people have: a class and a configuration. bare models get a new classifier
MODELS: dict[str, tuple[Any, Any]] = {
    "vit": (hf.ViTForImageClassification, hf.ViTConfig(**VIT)),
    "deit": (hf.DeiTModel, hf.DeiTConfig(**VIT)),
    "beit": (
        hf.BeitForImageClassification,
        hf.BeitConfig(**VIT, use_relative_position_bias=True),
    ),
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config(**VIT)),
    "dinov2 with registers": (hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig(**VIT)),
    "dinov3": (hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**VIT, num_register_tokens=2)),
    "siglip": (hf.SiglipForImageClassification, hf.SiglipConfig(vision_config=SIGLIP.to_dict())),
    "siglip vision": (hf.SiglipVisionModel, SIGLIP),
    "swin": (hf.SwinForImageClassification, hf.SwinConfig(**SWIN)),
    "vit msn": (hf.ViTMSNModel, hf.ViTMSNConfig(**VIT)),
    "clip": (hf.CLIPForImageClassification, hf.CLIPConfig(**CLIP)),
    "clip vision": (hf.CLIPVisionModel, hf.CLIPVisionConfig(**VIT)),
}


def saved(name: str, folder: Path, side: int = SIDE) -> Path:
    """A folder of a tiny random model with an image processor, as from the Hub."""
    model_class, config = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config)
    for key, value in model.named_parameters():
        if "position" in key:
            torch.nn.init.normal_(value, std=0.02)
    model.save_pretrained(folder)
    processor = hf.ViTImageProcessorPil(size={"height": side, "width": side})
    processor.save_pretrained(folder)
    return folder


def words_of(source: Path, output: Path, *words: str) -> list[str]:
    """The arguments of a run of two steps on a few digits, with a checkpoint after each."""
    usual = ["--do_train", "--do_eval", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"]
    usual += ["--max_train_samples", "16", "--max_eval_samples", "16", "--per_device_train_batch_size", "8"]
    usual += ["--use_cpu", "--report_to", "none", "--disable_tqdm", "True"]
    usual += ["--dropkey_patch", "--ignore_mismatched_sizes"]
    if not any(word == "--dropkey_ratio" for word in words):
        usual += ["--dropkey_ratio", "0.5", "--dropkey_schedule", "constant"]
    return ["--model_name_or_path", str(source), "--output_dir", str(output), *usual, *words]


def job(source: Path, output: Path, *words: str) -> ClassificationJob:
    """That run."""
    return ClassificationJob.parse(words_of(source, output, *words))
