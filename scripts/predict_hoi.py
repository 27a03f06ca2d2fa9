"""Finds people, objects and the verbs between them in images, draws them, and writes them as JSON.

python scripts/predict_hoi.py --model runs/scenes --images photo.jpg folder_of_images --out runs/pairs --threshold 0.3
"""

from hf_dropkey.cli import script


if __name__ == "__main__":
    script("predict", "hoi")
