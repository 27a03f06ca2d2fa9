"""Trains METRO or MeshGraphormer with DropKey to find the mesh of a person's body, and saves a folder that loads anywhere.

On generated people, which need no data and no licence, in minutes on a CPU:
    python scripts/train_body_mesh.py recipe:mesh_generated --output_dir runs/people
On your own rows (parquet, images with metadata.jsonl, or a data set of the hub), with your own body:
    python scripts/train_body_mesh.py --do_train --do_eval --output_dir runs/mine --dataset_name folder \
        --body my_bodies:make --backbone microsoft/resnet-50 --dropkey_ratio 0.1
--help lists everything; docs/mesh.md has the format of rows and of bodies.

Besides the model, its image processor and the errors in millimetres (MPVPE, MPJPE, PA-MPJPE, PA-MPVPE, each beside the
mean body's) it saves `predictions.png`: held-out persons with the meshes that the model found.

Tokens for the hub come from `hf auth login` or the environment variable HF_TOKEN, never from an argument: arguments
are saved in training_args.bin, which --push_to_hub publishes.
"""

from hf_dropkey.cli import script


if __name__ == "__main__":
    script("train", "mesh")
