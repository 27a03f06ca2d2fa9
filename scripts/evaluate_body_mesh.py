"""Measures a trained body-mesh model: MPVPE, MPJPE, PA-MPJPE and PA-MPVPE in millimetres, beside the mean body's.

    python scripts/evaluate_body_mesh.py --model_name_or_path runs/people --output_dir runs/people-evaluation
On your own rows, with your own body:
    python scripts/evaluate_body_mesh.py --model_name_or_path runs/mine --output_dir runs/mine-evaluation \
        --dataset_name folder --eval_split_name test --body my_bodies:make
--help lists everything. PVE-T, the error of the shape in rest pose, needs a model that outputs the parameters of a
parametric body: METRO and MeshGraphormer output free vertices.
"""

from hf_dropkey.cli import script


if __name__ == "__main__":
    script("evaluate", "mesh")
