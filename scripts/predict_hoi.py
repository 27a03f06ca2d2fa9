"""Finds people, objects and the verbs between them in images, draws them, and writes them as JSON.

python scripts/predict_hoi.py --model runs/scenes --images photo.jpg folder_of_images --out runs/pairs --threshold 0.3
"""

import sys
from typing import Any, cast

from transformers import HfArgumentParser

from hf_dropkey.hoi.predict import PredictionArguments, predict


def main() -> None:
    """Reads the command line."""
    try:
        (arguments,) = HfArgumentParser(cast(Any, PredictionArguments)).parse_args_into_dataclasses()
        predict(arguments)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
