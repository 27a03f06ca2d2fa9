"""Trains QPIC with DropKey to find people, objects and the verbs between them, and saves a Transformers folder.

On generated scenes, without any download, or from a recipe with anything after it taking precedence:
    python scripts/train_hoi.py --do_train --do_eval --output_dir runs/scenes --dataset scenes
    python scripts/train_hoi.py recipe:hoi_scenes --output_dir runs/scenes
On your own images with annotations in HOIA's form, from a DETR trained on COCO:
    python scripts/train_hoi.py --do_train --do_eval --output_dir runs/mine --verb_base 0 --names_file names.json \
        --train_images images --train_annotations train.json \
        --validation_images images --validation_annotations test.json --detr facebook/detr-resnet-50 --show_data
--help lists everything; docs/hoi.md says what the numbers mean. On a busy machine set OMP_NUM_THREADS=1.

Besides the model and its image processor it saves the scores, `per_class.txt` and `predictions.png`. The folder loads
without this package: pipeline("human-object-interaction", model=folder, trust_remote_code=True).

Tokens for the hub come from `hf auth login` or the environment variable HF_TOKEN, never from an argument: arguments
are saved in training_args.bin, which --push_to_hub publishes.
"""

from hf_dropkey.cli import script


if __name__ == "__main__":
    script("train", "hoi")
