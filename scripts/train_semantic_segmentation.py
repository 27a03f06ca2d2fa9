"""Trains a model for semantic segmentation with DropKey: SegFormer, BEiT, Mask2Former, or UperNet on a DropKey backbone.

From a pretrained model, on your own images, each with a PNG of its name whose values are class numbers:
    python scripts/train_semantic_segmentation.py --do_train --do_eval --output_dir runs/mine \
        --train_images images/train --train_masks masks/train --validation_images images/val \
        --validation_masks masks/val --class_names classes.json --ignore_index 255 \
        --model_name_or_path nvidia/mit-b0 --ignore_mismatched_sizes --dropkey_ratio 0.1
UperNet with a new decoder on a classifier of this package:
    python scripts/train_semantic_segmentation.py ... --backbone_name_or_path runs/flowers
On generated scenes, no download, from a recipe, with anything after it taking precedence:
    python scripts/train_semantic_segmentation.py recipe:segmentation_scenes --output_dir runs/scenes
--help lists everything. It needs the extras: pip install 'hf_dropkey[plots,train]'.

Besides the model, its image processor, mean IoU and pixel accuracy it saves `per_class.txt` and `predictions.png`:
validation images with their masks, the predictions, and the uncertainty of each pixel over random masks.

Tokens for the hub come from `hf auth login` or the environment variable HF_TOKEN, never from an argument: arguments
are saved in training_args.bin, which --push_to_hub publishes.
"""

from hf_dropkey.cli import script


if __name__ == "__main__":
    script("train", "segmentation")
