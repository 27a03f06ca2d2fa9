"""Trains a ViT, T2T-ViT, VOLO or CeiT with DropKey to classify images, and saves a folder that anyone can load.

From a recipe, with anything after it taking precedence:
    python scripts/train_image_classification.py recipe:digits_vit --output_dir runs/digits --seed 1
From scratch on your own folders of images, one sub-folder per class:
    python scripts/train_image_classification.py --do_train --do_eval --output_dir runs/mine \
        --train_dir images/train --validation_dir images/validation --model_size small --dropkey_ratio 0.1
The same with another architecture, here with VOLO's mixing of tokens:
        ... --model_family volo --model_size volo_d1 --config_overrides '{"mix_token": true}'
From a pretrained ViT, on a data set of the hub:
    python scripts/train_image_classification.py --do_train --do_eval --output_dir runs/beans \
        --dataset_name beans --model_name_or_path google/vit-base-patch16-224-in21k --dropkey_ratio 0.1
Without a data argument it trains on the built-in handwritten digits. --help lists everything.

With --resume_from_checkpoint auto the same command starts a run and, after whatever stopped it, goes on from the last
whole checkpoint. On several devices or nodes, with a configuration of scripts/accelerate/ or with torchrun:
    accelerate launch --config_file scripts/accelerate/several_gpus.yaml scripts/train_image_classification.py ...

Tokens for the hub come from `hf auth login` or the environment variable HF_TOKEN, never from an argument: arguments
are saved in training_args.bin, in clear.
"""

from hf_dropkey.cli import script


if __name__ == "__main__":
    script("train", "classification")
