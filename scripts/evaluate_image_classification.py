"""Evaluates a saved folder or a hub id on any data that scripts/train_image_classification.py trains on.

    python scripts/evaluate_image_classification.py --model_name_or_path runs/digits
    python scripts/evaluate_image_classification.py --model_name_or_path runs/mine --validation_dir images/validation

Without a data argument it evaluates on the test images of the built-in digits. Prints a table and writes it as JSON.
"""

import json
import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
)

from hf_dropkey.classification.arguments import DataArguments
from hf_dropkey.classification.data import load_image_data
from hf_dropkey.classification.metrics import classification_metrics
from hf_dropkey.classification.transform import ImageTransform, collate_images
from hf_dropkey.images.classes import check_id2label, class_names
from hf_dropkey.saved import check_model_source


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
    output_file: str | None = field(
        default=None,
        metadata={"help": "JSON file to write. Default: evaluation.json in the model's folder, or here for a hub id."},
    )


def main() -> None:
    """Runs the job."""
    groups: Any = (EvaluationArguments, DataArguments)
    parser = HfArgumentParser(groups)
    arguments, data_args = parser.parse_args_into_dataclasses(look_for_args_file=False)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel("WARN")

    folder = Path(arguments.model_name_or_path)
    check_model_source(arguments.model_name_or_path)
    source = {"revision": arguments.revision, "trust_remote_code": arguments.trust_remote_code}
    found, _ = PreTrainedConfig.get_config_dict(arguments.model_name_or_path, revision=arguments.revision)
    check_id2label(found, arguments.model_name_or_path)
    processor = AutoImageProcessor.from_pretrained(arguments.model_name_or_path, **source)
    model = AutoModelForImageClassification.from_pretrained(
        arguments.model_name_or_path, attn_implementation=arguments.attn_implementation, **source
    )
    data = load_image_data(data_args, training=False).with_label_names(
        class_names(model.config, arguments.model_name_or_path)
    )
    # configurations that do not say are of models for colour images
    channels = getattr(model.config, "num_channels", 3)
    data.evaluation.set_transform(ImageTransform(processor, label_ids=data.label_ids, num_channels=channels))

    with tempfile.TemporaryDirectory() as nowhere:
        trainer = Trainer(
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
            compute_metrics=classification_metrics,
        )
        measured = trainer.evaluate(data.evaluation)

    metrics = {name.removeprefix("eval_"): value for name, value in measured.items()}
    result: dict[str, Any] = {
        "model": folder.resolve().name if folder.is_dir() else arguments.model_name_or_path,
        "data": data_args.name,
        "split": data.evaluation_split,
        "images": len(data.evaluation),
        "parameters": model.num_parameters(),
        **{name: metrics[name] for name in ("accuracy", "top5_accuracy", "nll", "ece") if name in metrics},
        "images_per_second": metrics["samples_per_second"],
    }
    for name, value in result.items():
        print(f"{name:>18}  {f'{value:.4f}' if isinstance(value, float) else value}")
    file = Path(arguments.output_file or (folder if folder.is_dir() else Path()) / "evaluation.json")
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
