"""Trains DETR, Conditional DETR, YOLOS or RT-DETR with DropKey to find objects, and saves a plain Transformers folder.

From a pretrained model, on your own images with annotations in COCO's format:
    python scripts/train_object_detection.py --do_train --do_eval --output_dir runs/mine \
        --train_images images/train --train_annotations train.json \
        --validation_images images/val --validation_annotations val.json \
        --model_name_or_path PekingU/rtdetr_r18vd --ignore_mismatched_sizes --dropkey_ratio 0.1
On a data set of the hub whose rows list their boxes in `objects`:
    python scripts/train_object_detection.py --do_train --do_eval --output_dir runs/cppe5 --dataset_name cppe-5 \
        --model_name_or_path hustvl/yolos-tiny --ignore_mismatched_sizes
A small model from scratch, from a recipe, with anything after it taking precedence:
    python scripts/train_object_detection.py recipe:detection_overfit --output_dir runs/few \
        --train_images ... --train_annotations ... --validation_images ... --validation_annotations ...
--help lists everything. It needs the extras: pip install 'hf_dropkey[coco,plots,train]'.

Besides the model, its image processor and COCO's metrics it saves `predictions.png`: validation images with the boxes
that were annotated and those that the model found. The checkpoint loads without this package; apply_dropkey(model)
puts the same DropKey on it again.

Tokens for the hub come from `hf auth login` or the environment variable HF_TOKEN, never from an argument: arguments
are saved in training_args.bin, which --push_to_hub publishes.
"""

from hf_dropkey.cli import script


if __name__ == "__main__":
    script("train", "detection")
