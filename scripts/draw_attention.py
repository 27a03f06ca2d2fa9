"""Draws the attention of a saved model, and writes the numbers behind the figures; the same as `hf-dropkey look`.

    python scripts/draw_attention.py --model_name_or_path runs/digits --output_dir runs/digits_attention
    python scripts/draw_attention.py --model_name_or_path my-dinov2 --dropkey_ratio 0.1 --output_dir runs/seen \
        --images a.png b.png

Without images and without a data argument it uses the built-in digits. --help lists everything.
"""

from hf_dropkey.cli import script


if __name__ == "__main__":
    script("look", "classification")
