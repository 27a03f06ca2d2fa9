"""What the jobs for interactions, body meshes and segmentation share: two processes, a push to the Hub, a resume on other data."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import ROOT, serving
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hf_dropkey.hoi.job import HoiJob
from hf_dropkey.mesh.bodies import procedural_body
from hf_dropkey.mesh.data import GeneratedPeople, MeshData
from hf_dropkey.mesh.job import MeshJob
from hf_dropkey.training.record import data_changes


RUN = "--do_train --do_eval --use_cpu --report_to none --disable_tqdm true --save_steps 1 --learning_rate 0.001"
SMALL: dict[str, str] = {
    "train_hoi": "--dataset scenes --train_scenes 8 --validation_scenes 5 --scene_size 32 --hidden_size 16 "
    "--num_attention_heads 2 --intermediate_size 16 --encoder_layers 1 --decoder_layers 2 --num_queries 4 "
    "--dropout 0 --draw_images 0",
    "train_body_mesh": "--model_size nano --image_size 32 --mesh_levels 12 60 --max_train_samples 8 --max_eval_samples 5 "
    "--hidden_dropout_prob 0 --masked_ratio 0 --draw_images 0 --max_grad_norm 1000",
    "train_semantic_segmentation": "--dataset scenes --train_scenes 8 --validation_scenes 5 --scene_size 32 --backbone vit "
    "--image_size 32 --hidden_size 16 --num_attention_heads 2 --num_hidden_layers 3 --decoder_size 8 --draw_images 0 "
    "--flip_probability 0",
}
# the code of each that nothing but its folder brings
CODE = {
    "train_hoi": "pipeline_dropkey_hoi.py",
    "train_body_mesh": "pipeline_dropkey_mesh.py",
    "train_semantic_segmentation": "configuration_dropkey_host.py",
}
MEASURED = {"train_hoi": "mAP", "train_body_mesh": "mpvpe", "train_semantic_segmentation": "mean_iou"}


def launched(script: str, folder: Path, *words: str, processes: int) -> None:
    """Runs a script under torchrun, on CPUs: `accelerate launch --cpu` starts several processes by MPI only."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(ROOT / "scripts" / f"{script}.py"), *RUN.split(), *SMALL[script].split(), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


# not segmentation and meshes: the batch norms of UperNet and of the small ResNet see the images of their own process, so that
# their gradients are others
@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_hoi"])
def test_two_processes_train_what_one_does(tmp_path: Path, script: str) -> None:
    # all images in every step, since two processes do not divide an epoch as one does
    batches = {"one": (1, "8"), "two": (2, "4")}
    for name, (processes, batch) in batches.items():
        more = ["--per_device_train_batch_size", batch, "--per_device_eval_batch_size", "3", "--max_steps", "2"]
        # plain gradients: Adam makes as much of a gradient that is rounding as of any other
        more += ["--optim", "sgd", "--learning_rate", "0.01", "--max_grad_norm", "1", "--dropkey_ratio", "0"]
        launched(script, tmp_path, *more, "--output_dir", name, processes=processes)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in batches)
    assert one.keys() == two.keys()
    # every loss is counted over all processes
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-4, atol=3e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    state = json.loads((tmp_path / "two" / "checkpoint-2" / "trainer_state.json").read_text())
    assert '"world_size": 2' in json.dumps(state)
    scores = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in batches]
    assert scores[1][f"eval_{MEASURED[script]}"] == pytest.approx(scores[0][f"eval_{MEASURED[script]}"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_a_run_is_pushed_with_its_code_and_card(tmp_path: Path, script: str) -> None:
    code = "import runpy, sys; sys.argv[0] = FILE; runpy.run_path(FILE, run_name='__main__')"
    file = str(ROOT / "scripts" / f"{script}.py")
    words = [*RUN.split(), *SMALL[script].split(), "--push_to_hub", "--output_dir", "mine", "--max_steps", "1"]
    with serving() as hub:
        hub.run(code.replace("FILE", repr(file)), tmp_path, *words, "--per_device_eval_batch_size", "3")
        files = hub.files("tester/mine")
    wanted = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", CODE[script]}
    assert wanted <= set(files) and "training_args.bin" not in files
    card = ModelCard(files["README.md"].decode())
    assert MEASURED[script] in {result.metric_type for result in card.data.eval_results}


# --- other data ----------------------------------------------------------------------------------------------------------


def scene_prints(tmp_path: Path, *words: str) -> dict[str, Any]:
    job = HoiJob.parse([*RUN.split(), *SMALL["train_hoi"].split(), "--output_dir", str(tmp_path), *words])
    job.check()
    return dict(job.fingerprint(job.load()))


def test_a_resume_of_interactions_on_other_data_is_told(tmp_path: Path) -> None:
    before = scene_prints(tmp_path)
    assert before["train"]["rows"] == 8 and data_changes(before, scene_prints(tmp_path)) == []
    (fewer,) = data_changes(before, scene_prints(tmp_path, "--max_train_samples", "6"))
    assert "6 images instead of 8" in fewer
    assert any("other labels" in line for line in data_changes(before, scene_prints(tmp_path, "--scene_size", "40")))


def test_a_resume_of_meshes_on_other_people_is_told(tmp_path: Path) -> None:
    body = procedural_body()
    before = MeshData(GeneratedPeople(body, 4, 0, 32), None).fingerprint()
    assert before == MeshData(GeneratedPeople(body, 4, 0, 32), None).fingerprint()
    for others, told in (
        (GeneratedPeople(body, 3, 0, 32), "3 images instead of 4"),
        (GeneratedPeople(body, 4, 1, 32), "other file names"),
        (GeneratedPeople(body, 4, 0, 48), "other sizes"),
    ):
        assert told in " ".join(data_changes(before, MeshData(others, None).fingerprint()))
    job = MeshJob.parse([*RUN.split(), *SMALL["train_body_mesh"].split(), "--output_dir", str(tmp_path)])
    job.check()
    assert set(job.fingerprint(job.load())) == {"train", "evaluation"}
