"""Trains a small model, saves it, loads it without this package and draws its predictions: two minutes on two cores.

    python scripts/quickstart.py [folder]

Trains DropKeyViT and the same model without dropout, with the same seed, on the built-in handwritten digits; loads
the saved folder in a fresh process that does not import this package; prints a table of both; and draws the
predictions with the attention of the class token. One seed of a small task: the better one here is not evidence.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hf_dropkey.classification.arguments import DataArguments
from hf_dropkey.classification.data import ImageData, load_image_data
from hf_dropkey.plots import predictions_with_attention
from hf_dropkey.recipes import recipe_file


SCRIPTS = Path(__file__).resolve().parent
RECIPE = recipe_file("recipe:digits_vit")
RUNS = {"DropKey": {}, "no dropout": {"dropkey_ratio": 0.0}}
IMAGES_SHOWN = 16
ROWS = (
    ("accuracy", "eval_accuracy", ".4f"),
    ("top-5 accuracy", "eval_top5_accuracy", ".4f"),
    ("calibration error", "eval_ece", ".4f"),
    ("neg. log-likelihood", "eval_nll", ".4f"),
    ("training time, s", "train_runtime", ".1f"),
    ("images/s in training", "train_samples_per_second", ".0f"),
    ("parameters", "parameters", ",d"),
)

NEXT_STEPS = """
Next steps
  one page about the run          {model}/report.html
  what DropKey does inside        {command} look --model_name_or_path {model} --output_dir runs/look
  your own images, from a pretrained model of the Hub, one sub-folder of images per class:
      {command} train --do_train --do_eval --output_dir runs/mine --model_name_or_path facebook/dinov2-small \\
          --train_dir images/train --validation_dir images/validation --dropkey_ratio 0.1
  recipes, and all commands       {command} recipes; {command} --help"""


def run_script(name: str, *arguments: str) -> None:
    """Runs one of the scripts in a process of its own, with its output here."""
    print(f"\n$ python scripts/{name} {' '.join(arguments[:6])}{' ...' if len(arguments) > 6 else ''}", flush=True)
    # the model is so small that more threads would slow it down
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run([sys.executable, str(SCRIPTS / name), *arguments], check=True, env=environment)


def train(folder: Path, changes: dict[str, float]) -> dict[str, float]:
    """Trains the recipe with `changes` into `folder`, saves the recipe beside it; returns the metrics of the run."""
    recipe = {**json.loads(RECIPE.read_text(encoding="utf-8")), **changes, "output_dir": str(folder)}
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    run_script("train_image_classification.py", str(file), "--overwrite_output_dir")
    metrics: dict[str, float] = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    return metrics


def save_test_images(data: ImageData, folder: Path) -> list[str]:
    """Writes equally spaced images of the test split as files; returns their names."""
    folder.mkdir(exist_ok=True)
    files = []
    for row in np.linspace(0, len(data.evaluation) - 1, IMAGES_SHOWN).astype(int):
        example = data.evaluation[int(row)]
        files.append(str(folder / f"{row:03d}_is_{data.label_names[data.label_ids[example['label']]]}.png"))
        example["image"].save(files[-1])
    return files


def draw(files: Sequence[str], arrays: Path, label_names: list[str], figure_file: Path) -> None:
    """Draws the predictions for image files named as `save_test_images` names them."""
    saved = np.load(arrays)
    labels = [label_names.index(Path(file).stem.rsplit("_", 1)[1]) for file in files]
    figure = predictions_with_attention(
        [Image.open(file) for file in files],
        saved["attention"],
        saved["probabilities"],
        labels,
        label_names,
        title="DropKeyViT on handwritten digits of the test split, and the attention of its class token (last layer)",
    )
    figure.savefig(figure_file, dpi=130)


def table(results: dict[str, dict[str, float]]) -> str:
    """One column for each run, one line for each metric."""
    lines = [" " * 22 + "".join(f"{name:>14}" for name in results)]
    for title, key, form in ROWS:
        lines.append(f"{title:<22}" + "".join(f"{result[key]:>14{form}}" for result in results.values()))
    return "\n".join(lines)


def main() -> None:
    """Runs the job."""
    start = time.monotonic()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
    folder.mkdir(parents=True, exist_ok=True)
    folders = {name: folder / name.lower().replace(" ", "_") for name in RUNS}
    results = {name: train(folders[name], changes) for name, changes in RUNS.items()}

    data = load_image_data(DataArguments(), training=False)
    files = save_test_images(data, folder / "test_images")
    arrays = folder / "predictions.npz"
    model = ("--model_name_or_path", str(folders["DropKey"]), "--trust_remote_code", "True")
    run_script("predict_images.py", *model, "--attention_file", str(arrays), "--images", *files)
    draw(files, arrays, data.label_names, folder / "predictions.png")

    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nHandwritten digits, {len(data.evaluation)} test images, the same seed:\n")
    print(table(results))
    print("\nOne seed of a small task: the better one here is not evidence.")
    print(f"\nsaved model  {folders['DropKey']}\npredictions  {folder / 'predictions.png'}")
    print(f"numbers      {folder / 'results.json'}\ntook         {time.monotonic() - start:.0f} s")
    print(NEXT_STEPS.format(model=folders["DropKey"], command=Path(sys.executable).with_name("hf-dropkey")))


if __name__ == "__main__":
    main()
