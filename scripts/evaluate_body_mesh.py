"""Measures a trained body-mesh model: MPVPE, MPJPE, PA-MPJPE and PA-MPVPE in millimetres, beside the mean body's.

    python scripts/evaluate_body_mesh.py --model_name_or_path runs/people --output_dir runs/people-evaluation
On your own rows, with your own body:
    python scripts/evaluate_body_mesh.py --model_name_or_path runs/mine --output_dir runs/mine-evaluation \
        --dataset_name folder --eval_split_name test --body my_bodies:make
--help lists everything. PVE-T, the error of the shape in rest pose, needs a model that outputs the parameters of a
parametric body: METRO and MeshGraphormer output free vertices.
"""

import sys

from hf_dropkey.mesh.job import MeshJob
from hf_dropkey.training.job import started_command


if __name__ == "__main__":
    MeshJob.parse(["--do_eval", "--report_to", "none", *sys.argv[1:]]).execute(started_command())
