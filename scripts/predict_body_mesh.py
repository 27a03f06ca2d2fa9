"""Finds the bodies of persons in photographs: draws them over the image and from the side, and writes OBJ files.

One person that fills the image, or boxes, or a detector:
    python scripts/predict_body_mesh.py --model_name_or_path runs/people --images person.jpg
    python scripts/predict_body_mesh.py --model_name_or_path runs/people --images street.jpg --box 40 20 80 200
    python scripts/predict_body_mesh.py --model_name_or_path runs/people --images photos --detector PekingU/rtdetr_r18vd
"""

import logging
import sys
from typing import Any, cast

from transformers import HfArgumentParser

from hf_dropkey.mesh.prediction import PredictionArguments, predict


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    try:
        (given,) = HfArgumentParser(cast(Any, PredictionArguments)).parse_args_into_dataclasses()
        print(predict(given))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(str(error))
