"""Evaluates a saved folder or a hub id on any data that scripts/train_image_classification.py trains on.

    python scripts/evaluate_image_classification.py --model_name_or_path runs/digits
    python scripts/evaluate_image_classification.py --model_name_or_path runs/mine --validation_dir images/validation

Without a data argument it evaluates on the test images of the built-in digits. Prints a table and writes it as JSON.
"""

from hf_dropkey.cli import script


if __name__ == "__main__":
    script("evaluate", "classification")
