"""Classifies image files with a saved folder or a hub id, as `hf-dropkey predict`, but without loading this package.

    python scripts/predict_images.py --model_name_or_path runs/digits --trust_remote_code True --images a.png b.png

It runs a file of the package by its path, which imports Transformers only, as anyone would who was handed the folder.
--help lists everything.
"""

import runpy
from pathlib import Path


if __name__ == "__main__":
    package = Path(__file__).resolve().parents[1] / "hf_dropkey"
    runpy.run_path(str(package / "classification" / "prediction.py"), run_name="__main__")
