"""Evaluates a saved folder or a hub id on any data that image classification trains on."""

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, PreTrainedModel, Trainer, TrainingArguments

from ..images.classes import class_names
from ..images.corruptions import CORRUPTIONS, STRENGTHS
from ..images.folders import check_output_file
from ..pages.observed import EVALUATION, ROBUSTNESS
from ..pages.run import REPORT, write_report
from ..saved import check_attention
from ..training.arguments import parse_arguments
from .adapters import load_classifier
from .arguments import DataArguments
from .data import ImageData, load_image_data
from .metrics import evaluation_metrics
from .transform import CorruptedTransform, ImageTransform, collate_images
from .uncertainty import FILE as UNCERTAINTY
from .uncertainty import HELP as UNCERTAINTY_HELP
from .uncertainty import measure_uncertainty, unmeasurable


@dataclass
class EvaluationArguments:
    """Which model, and how."""

    _argument_group_name = "Evaluation"

    model_name_or_path: str = field(metadata={"help": "Folder of a saved model, or a hub id."})
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the model."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention backend, such as sdpa."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images at a time on each device."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read images."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave accelerators alone."})
    robustness: bool = field(
        default=False,
        metadata={
            "help": "Also measure the accuracy on images with noise, blur, less contrast and JPEG, each at five strengths: "
            "twenty evaluations more."
        },
    )
    uncertainty: bool = field(default=False, metadata={"help": UNCERTAINTY_HELP})
    output_file: str | None = field(
        default=None,
        metadata={"help": "JSON file to write. Default: evaluation.json in the model's folder, or here for a hub id."},
    )


ARGUMENTS = (EvaluationArguments, DataArguments)


def main(command: Sequence[str]) -> None:
    """Evaluates as the arguments say; prints a table and writes it as JSON."""
    arguments, data_arguments = parse_arguments(ARGUMENTS, command)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel("WARN")
    folder = Path(arguments.model_name_or_path)
    if arguments.output_file:
        check_output_file(Path(arguments.output_file), "--output_file")
    if arguments.uncertainty and not folder.is_dir():
        raise ValueError(
            f"--uncertainty writes {UNCERTAINTY} beside the model, and {folder} is not a folder; save the model into one, or "
            "leave --uncertainty out"
        )
    model, processor = load(arguments)
    reason = unmeasurable(model) if arguments.uncertainty else None
    if reason is not None:
        raise ValueError(f"--uncertainty cannot be measured for {folder}: {reason}; leave it out")
    data = load_image_data(data_arguments, training=False).with_label_names(
        class_names(model.config, arguments.model_name_or_path)
    )
    measured = measure(model, processor, data, arguments)
    result: dict[str, Any] = {
        "model": folder.resolve().name if folder.is_dir() else arguments.model_name_or_path,
        "data": data_arguments.name,
        "split": data.evaluation_split,
        "images": len(data.evaluation),
        "parameters": model.num_parameters(),
        **{name: measured[name] for name in ("accuracy", "top5_accuracy", "nll", "ece", "brier") if name in measured},
        "images_per_second": measured["samples_per_second"],
    }
    for name, value in result.items():
        print(f"{name:>18}  {f'{value:.4f}' if isinstance(value, float) else value}")
    if arguments.robustness:
        result[ROBUSTNESS] = robustness(model, processor, data, arguments)
        for name, values in result[ROBUSTNESS].items():
            print(f"{name:>18}  {'  '.join(f'{value:.4f}' for value in values)}")
    file = Path(arguments.output_file or (folder if folder.is_dir() else Path()) / EVALUATION)
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {file}")
    if arguments.uncertainty:
        size = arguments.per_device_eval_batch_size
        measure_uncertainty(model, data, collate_images, batch_size=size).save(folder)
        print(f"written to {folder / UNCERTAINTY}: how uncertain the model is, for `hf-dropkey demo`")
    if arguments.robustness and file == folder / EVALUATION and (folder / REPORT).is_file():
        print(f"and to {write_report(folder)}")


def load(arguments: EvaluationArguments) -> tuple[PreTrainedModel, Any]:
    """The model, or an adapter on its base model, and its image processor.

    Raises:
        ValueError, OSError: There is no such model, or its folder is damaged.
    """
    name = arguments.model_name_or_path
    check_attention(arguments.attn_implementation)
    source: dict[str, Any] = {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}
    model = load_classifier(name, attn_implementation=arguments.attn_implementation, **source)
    processor = AutoImageProcessor.from_pretrained(name, **source)
    return model, processor


def measure(
    model: PreTrainedModel, processor: Any, data: ImageData, arguments: EvaluationArguments
) -> dict[str, float]:
    """The metrics of a model on the evaluation images, by name."""
    data.evaluation.set_transform(ImageTransform(processor, **_takes(model, data)))
    with _trainer(model, arguments) as trainer:
        measured = trainer.evaluate(data.evaluation)
    return {name.removeprefix("eval_"): value for name, value in measured.items()}


def robustness(
    model: PreTrainedModel, processor: Any, data: ImageData, arguments: EvaluationArguments
) -> dict[str, list[float]]:
    """The accuracy on images made worse (`images/corruptions.py`), for each kind a number for each strength."""
    found: dict[str, list[float]] = {kind: [] for kind in CORRUPTIONS}
    with _trainer(model, arguments) as trainer:
        for kind, values in found.items():
            for strength in STRENGTHS:
                data.evaluation.set_transform(CorruptedTransform(kind, strength, processor, **_takes(model, data)))
                values.append(trainer.evaluate(data.evaluation)["eval_accuracy"])
    return found


def _takes(model: PreTrainedModel, data: ImageData) -> dict[str, Any]:
    # configurations that do not say are of models for colour images
    return {"label_ids": data.label_ids, "num_channels": getattr(model.config, "num_channels", 3)}


@contextmanager
def _trainer(model: PreTrainedModel, arguments: EvaluationArguments) -> Iterator[Trainer]:
    """A `Trainer` that evaluates, and leaves nothing behind."""
    with tempfile.TemporaryDirectory() as nowhere:
        yield Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=nowhere,
                per_device_eval_batch_size=arguments.per_device_eval_batch_size,
                dataloader_num_workers=arguments.dataloader_num_workers,
                use_cpu=arguments.use_cpu,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.accelerator.is_available(),
                report_to="none",
            ),
            data_collator=collate_images,
            compute_metrics=evaluation_metrics,
        )
