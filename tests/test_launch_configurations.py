"""The launch configurations are what accelerate reads, and say what starts when its devices are not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import (
    ClusterConfig,
    load_config_from_file,
)

from hf_dropkey.classification.families import FAMILIES


ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "scripts" / "accelerate"
# machines, processes, engine
EXPECTED = {
    "one_gpu": (1, 1, "NO"),
    "several_gpus": (1, 4, "MULTI_GPU"),
    "several_nodes": (2, 8, "MULTI_GPU"),
    "fsdp2": (1, 4, "FSDP"),
    "deepspeed_zero2": (1, 4, "DEEPSPEED"),
    "deepspeed_zero3": (1, 4, "DEEPSPEED"),
}


def test_every_configuration_is_looked_at() -> None:
    assert {file.stem for file in FOLDER.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_configuration(name: str) -> None:
    file = FOLDER / f"{name}.yaml"
    found = load_config_from_file(str(file))
    assert isinstance(found, ClusterConfig)
    assert (found.num_machines, found.num_processes, found.distributed_type.value) == EXPECTED[name]
    assert not found.use_cpu and found.mixed_precision == "bf16"
    # the command in the file's own comment
    assert f"accelerate launch --config_file scripts/accelerate/{name}.yaml" in file.read_text()


def test_shards_are_layers_of_our_models_and_stages_are_what_the_names_say() -> None:
    fsdp = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    layer = fsdp["fsdp_transformer_layer_cls_to_wrap"]
    assert layer in FAMILIES["vit"].model_class._no_split_modules and fsdp["fsdp_version"] == 2
    for stage in (2, 3):
        assert (
            load_config_from_file(str(FOLDER / f"deepspeed_zero{stage}.yaml")).deepspeed_config["zero_stage"] == stage
        )


def test_a_key_that_accelerate_does_not_know_is_an_error(tmp_path: Path) -> None:
    """Without this, the tests above would say nothing of a word misspelt."""
    text = (FOLDER / "several_gpus.yaml").read_text().replace("num_processes", "num_proceses")
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ValueError, match="num_proceses"):
        load_config_from_file(str(tmp_path / "wrong.yaml"))


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.device_count() > 0, reason="needs a machine without accelerators")
@pytest.mark.parametrize("script", ["train_image_classification.py", "train_image_classification_accelerate.py"])
def test_a_configuration_for_devices_that_are_not_there_is_told_before_work_starts(
    tmp_path: Path, script: str
) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "several_gpus.yaml")]
    command += ["--num_processes", "2", str(ROOT / "scripts" / script), "--do_train", "--output_dir", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode != 0
    assert "2 processes were started here for one device each, and there are 0" in done.stderr
    assert not (tmp_path / "run").exists()
