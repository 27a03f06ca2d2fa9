"""Scores a saved model on images with annotated interactions: HICO-DET's protocol, and V-COCO's if requested.

    python scripts/evaluate_hoi.py --model_name_or_path runs/scenes --dataset scenes --output_dir runs/scenes_scores
    python scripts/evaluate_hoi.py --model_name_or_path runs/mine --output_dir runs/mine_scores --verb_base 0 \
        --validation_images images --validation_annotations test.json --qpic_vcoco

Classes and verbs of model and data are compared by name. It writes the scores as JSON, `per_class.txt` and
`predictions.png`. V-COCO's scenarios need its own files: --vcoco_file and --coco_file. --help lists everything.
"""

from hf_dropkey.cli import script


if __name__ == "__main__":
    script("evaluate", "hoi")
