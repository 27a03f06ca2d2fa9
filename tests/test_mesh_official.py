"""Official weights of METRO and MeshGraphormer become folders that load, with a body of the user's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architecture_parity import Fixture, assert_near, load_script
from mesh_models import backbone
from safetensors.torch import save_file

from hf_dropkey.mesh.official import (
    OfficialError,
    backbone_weights,
    convert_official,
    read_fields,
    rename_resnet,
)
from hf_dropkey.models.configuration_dropkey_mesh import DropKeyMeshConfig
from hf_dropkey.models.modeling_dropkey_mesh import DropKeyMeshForBodyMesh


SYSTEMS = ("metro", "graphormer")


def body_file(fixture: Fixture, folder: Path, **changes: Any) -> Path:
    given = {name: value.numpy() for name, value in fixture.below("input/").items()}
    arrays = {
        "template": given["template_vertices"],
        "faces": np.zeros((4, 3), np.int64),
        "joint_regressor": given["joint_regressor_h36m17"],
        "downsample_mid": given["downsample0"],
        "downsample_coarse": given["downsample1"],
    }
    if "adjacency_row_normalised" in given:
        arrays["adjacency"] = given["adjacency_row_normalised"]
    arrays |= changes
    file = folder / "body.npz"
    np.savez(file, **{name: value for name, value in arrays.items() if value is not None})
    return file


def tiny_size(fixture: Fixture) -> DropKeyMeshConfig:
    """The size of a fixture, with a CNN whose maps have the fixture's widths."""
    given = fixture.below("input/")
    if "feature_map" in given:
        widths, grid = [given["feature_map"].shape[1]], given["feature_map"].shape[-1]
    else:
        widths, grid = [given["grid_feature"].shape[1], given["global_feature"].shape[1]], 7
    return DropKeyMeshConfig(
        **read_fields(fixture.below("weights/")),
        backbone_config=backbone(*widths),
        feature_grid=[grid, grid],
        num_attention_heads=fixture.about["config"]["num_attention_heads"],
        num_faces=4,
        dropkey_ratio=0.0,
    )


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_converted_checkpoint_computes_what_the_official_one_does(system: str, tmp_path: Path) -> None:
    fixture, script = Fixture(f"{system}_body_tiny"), load_script("convert_checkpoint")
    save_file(fixture.below("weights/"), tmp_path / "official.safetensors")
    tiny_size(fixture).save_pretrained(tmp_path / "size")
    report = script.convert(
        script.ConversionArguments(
            family=system,
            checkpoint=tmp_path / "official.safetensors",
            out=tmp_path / "out",
            config=tmp_path / "size",
            body_file=body_file(fixture, tmp_path),
        )
    )
    dead = sum(value.numel() for name, value in fixture.below("weights/").items() if "bert.embeddings" in name
               or "bert.pooler" in name or "skip_conv" in name)  # fmt: skip
    assert f"{dead:,} values" in report and "non-commercial use only" in report
    model = DropKeyMeshForBodyMesh.from_pretrained(tmp_path / "out").double()
    given = fixture.below("input/")
    maps: tuple[torch.Tensor, ...] = (
        (given["feature_map"].double(),)
        if system == "metro"
        else (
            given["grid_feature"].double(),
            given["global_feature"].double()[:, :, None, None].expand(-1, -1, 7, 7),
        )
    )
    with torch.no_grad():
        assert_near(model(feature_maps=maps).vertices, fixture.tensors["f64/vertices_full"], 1e-12)
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    fixture, script = Fixture("metro_body_tiny"), load_script("convert_checkpoint")
    weights, config = fixture.below("weights/"), tiny_size(fixture)
    save_file(weights, tmp_path / "official.safetensors")
    given: dict[str, Any] = {"checkpoint": tmp_path / "official.safetensors", "out": tmp_path / "out"}
    with pytest.raises(ValueError, match="needs --body_file.*after registration"):
        script.convert(script.ConversionArguments(family="metro", **given))
    body = body_file(fixture, tmp_path)
    with pytest.raises(ValueError, match="one of --family metro, not of graphormer"):
        script.convert(script.ConversionArguments(family="graphormer", body_file=body, **given))
    with pytest.raises(ValueError, match="--size means nothing"):
        script.convert(script.ConversionArguments(family="metro", body_file=body, size="x", **given))
    with pytest.raises(OfficialError, match="neither METRO nor MeshGraphormer"):
        convert_official({"head.weight": torch.zeros(1)}, body)
    with pytest.raises(OfficialError, match="does not fit: 0 tensors missing .* 1 not in the model"):
        convert_official({**weights, "extra": torch.zeros(1)}, body, config=config)
    with pytest.raises(OfficialError, match="lacks the arrays faces"):
        convert_official(weights, body_file(fixture, tmp_path, faces=None), config=config)
    with pytest.raises(OfficialError, match="template of 79 vertices, the checkpoint predicts 80"):
        convert_official(weights, body_file(fixture, tmp_path, template=np.zeros((79, 3))), config=config)
    pickled = np.empty(1, dtype=object)
    with pytest.raises(OfficialError, match="without running code"):
        convert_official(weights, body_file(fixture, tmp_path, template=pickled), config=config)


def test_an_hrnet_is_refused_by_name_or_left_out(tmp_path: Path) -> None:
    fixture = Fixture("metro_body_tiny")
    weights, body = fixture.below("weights/"), body_file(fixture, tmp_path)
    hrnet = {
        "backbone.conv1.weight": torch.zeros(2, 3, 3, 3),
        "backbone.stage2.0.branches.0.0.conv1.weight": torch.zeros(2, 2, 3, 3),
        "backbone.incre_modules.0.0.conv1.weight": torch.zeros(2, 2, 1, 1),
    }
    given = {**weights, **hrnet}
    with pytest.raises(OfficialError, match="HRNet-W64.*no backbone of Transformers.*--new_backbone True"):
        convert_official(given, body, config=tiny_size(fixture))
    model, report = convert_official(given, body, config=tiny_size(fixture), new_backbone=True)
    # the CNN is named as left out, with what to do next, and the transformer is the official one
    assert "an HRNet-W64: 3 tensors" in report and "left out" in report and "--config" in report
    maps = (fixture.below("input/")["feature_map"].double(),)
    with torch.no_grad():
        assert_near(model.double()(feature_maps=maps).vertices, fixture.tensors["f64/vertices_full"], 1e-12)


def test_names_of_torchvisions_resnet() -> None:
    names = {
        "backbone.conv1.weight": "mesh.backbone.embedder.embedder.convolution.weight",
        "backbone.bn1.running_mean": "mesh.backbone.embedder.embedder.normalization.running_mean",
        "backbone.layer2.3.conv3.weight": "mesh.backbone.encoder.stages.1.layers.3.layer.2.convolution.weight",
        "backbone.layer4.0.downsample.1.bias": "mesh.backbone.encoder.stages.3.layers.0.shortcut.normalization.bias",
    }
    with torch.device("meta"):
        ours = DropKeyMeshForBodyMesh(DropKeyMeshConfig()).state_dict()
    for official, expected in names.items():
        assert rename_resnet(official) == expected and expected in ours
    with pytest.raises(OfficialError, match="HRNet-W64.*--new_backbone"):
        backbone_weights({"backbone.stage2.0.branches.0.0.conv1.weight": torch.zeros(1)})
    with pytest.raises(OfficialError, match="is not a ResNet of torchvision"):
        backbone_weights({"backbone.blocks.0.weight": torch.zeros(1)})
    assert not backbone_weights({"backbone.fc.weight": torch.zeros(1)})
