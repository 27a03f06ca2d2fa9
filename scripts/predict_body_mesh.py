"""Finds the bodies of persons in photographs: draws them over the image and from the side, and writes OBJ files.

One person that fills the image, or boxes, or a detector:
    python scripts/predict_body_mesh.py --model_name_or_path runs/people --images person.jpg
    python scripts/predict_body_mesh.py --model_name_or_path runs/people --images street.jpg --box 40 20 80 200
    python scripts/predict_body_mesh.py --model_name_or_path runs/people --images photos --detector PekingU/rtdetr_r18vd
"""

from hf_dropkey.cli import script


if __name__ == "__main__":
    script("predict", "mesh")
