"""DropKeyMesh beside the official METRO and MeshGraphormer: the same numbers, and Transformers' features."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_parity import Fixture, assert_near, forced_drops
from mesh_models import backbone, random_body, tiny_batch, tiny_config, tiny_model
from torch import nn

from hf_dropkey.mesh.official import is_dead, read_fields, rename, split_dead
from hf_dropkey.models.configuration_dropkey_mesh import DropKeyMeshConfig
from hf_dropkey.models.modeling_dropkey_mesh import (
    DropKeyMeshForBodyMesh,
    DropKeyMeshModel,
    DropKeyMeshSelfAttention,
    draw_kept_tokens,
)


# what no rounding of float64 exceeds here; the largest value is about 10
EXACT = 1e-12
SYSTEMS = ("metro", "graphormer")
OUTPUTS = {
    "camera": "camera",
    "joints14": "joints",
    "vertices_sub2": "coarse_vertices",
    "vertices_sub": "mid_vertices",
    "vertices_full": "vertices",
}
# the official 24 joints that the 14 are
JOINTS_OF_24 = [*range(13), 18]


def official(system: str) -> tuple[DropKeyMeshForBodyMesh, Fixture, dict[str, Any]]:
    """The model with the fixture's weights in float64, the fixture, and the model's input."""
    fixture = Fixture(f"{system}_body_tiny")
    weights, inputs = fixture.below("weights/"), {k: v.double() for k, v in fixture.below("input/").items()}
    if system == "metro":
        maps: tuple[torch.Tensor, ...] = (inputs["feature_map"],)
    else:
        # the pooled vector is the mean of this map
        maps = (inputs["grid_feature"], inputs["global_feature"][:, :, None, None].expand(-1, -1, 7, 7))
    config = DropKeyMeshConfig(
        **read_fields(weights),
        backbone_config=backbone(*(one.shape[1] for one in maps)),
        feature_grid=list(maps[-1].shape[-2:]),
        num_attention_heads=fixture.about["config"]["num_attention_heads"],
        num_faces=4,
    )
    model = DropKeyMeshForBodyMesh(config)
    living, _ = split_dead(weights)
    own = {name: value for name, value in model.state_dict().items() if ".backbone." in name or ".body." in name}
    model.load_state_dict({**own, **living}, strict=True)
    model = model.double().eval()
    model.set_body(
        template=inputs["template_vertices"],
        faces=torch.zeros(4, 3, dtype=torch.long),
        joint_regressor=inputs["joint_regressor_h36m17"],
        downsampling=(inputs["downsample0"], inputs["downsample1"]),
        adjacency=inputs.get("adjacency_row_normalised"),
    )
    return model, fixture, {"feature_maps": maps}


def assert_outputs(found: Any, fixture: Fixture, prefix: str) -> None:
    for theirs, ours in OUTPUTS.items():
        assert_near(found[ours], fixture.tensors[f"{prefix}/{theirs}"], EXACT)


def targets(fixture: Fixture) -> dict[str, torch.Tensor]:
    given = {name: value.double() for name, value in fixture.below("input/").items()}
    return {
        "joints_3d": given["gt_joints24_3d"][:, JOINTS_OF_24],
        "joints_2d": given["gt_joints24_2d"][:, JOINTS_OF_24],
        "vertices": given["gt_vertices"],
        "has_joints_3d": given["has_3d_joints"],
        "has_vertices": given["has_smpl"],
    }


# --- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_outputs_are_those_of_the_official_model(system: str) -> None:
    model, fixture, inputs = official(system)
    with torch.no_grad():
        assert_outputs(model(**inputs), fixture, "f64")


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_stage_is_that_of_the_official_model(system: str) -> None:
    model, fixture, inputs = official(system)
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _i, output, name=name: found.update({name: output}))
    with torch.no_grad():
        model(**inputs)
    stages = fixture.below("f64/inter/")
    assert len(stages) >= 10
    for name, expected in stages.items():
        # a stage as a whole has no further name
        ours = rename(name + ".").rstrip(".")
        ours = ours.replace("trans_encoder.", "mesh.stages.")
        assert_near(found[ours], expected, EXACT)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_forced_drops_are_those_of_the_official_model(system: str, implementation: str) -> None:
    model, fixture, inputs = official(system)
    model.set_attn_implementation(implementation)
    masks = {rename(site + "."): mask for site, mask in fixture.below("drop/mask/").items()}
    masks = {name.rstrip("."): mask for name, mask in masks.items()}
    assert len(masks) == 6
    with forced_drops(model, masks), torch.no_grad():
        found = model(**inputs)
    assert_outputs(found, fixture, "f64/drop")


def test_masked_vertices_are_those_of_the_official_model() -> None:
    model, fixture, inputs = official("metro")
    given = fixture.below("input/")
    keep = torch.cat((given["keep_mask_joints"], given["keep_mask_vertices"]), dim=1)
    for mask in (keep, keep.squeeze(-1)):
        with torch.no_grad():
            found = model(**inputs, token_keep_mask=mask)
        assert_outputs(found, fixture, "f64/masked_vertex_modeling")


def test_losses_and_gradients_are_those_of_the_official_model() -> None:
    model, fixture, inputs = official("metro")
    output = model(**inputs, **targets(fixture))
    expected = fixture.about["losses_f64"]
    parts = {
        "joints_3d": "joints3d",
        "mesh_joints_3d": "joints3d_from_mesh",
        "vertices_coarse": "vertices_sub2",
        "vertices_mid": "vertices_sub",
        "vertices_full": "vertices_full",
    }
    for ours, theirs in parts.items():
        assert abs(output.loss_dict[ours].item() - expected[theirs]) <= EXACT
    both = output.loss_dict["joints_2d"] + output.loss_dict["mesh_joints_2d"]
    assert abs(both.item() / expected["joints2d_sum_of_two"] - 1) <= EXACT
    assert abs(output.loss.item() / expected["total"] - 1) <= EXACT
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = 0
    largest = max(norm for norm in fixture.about["grad_l2_f64"].values() if norm)
    for name, norm in fixture.about["grad_l2_f64"].items():
        assert (norm is None) == is_dead(name)
        if norm is not None:
            # a key's bias moves all scores of a row alike, so its gradient is rounding
            assert abs(gradients[rename(name)].norm().item() - norm) <= EXACT * max(norm, largest), name
            compared += 1
    assert compared == sum(1 for name in gradients if ".backbone." not in name)


def test_gradients_are_those_of_the_official_graphormer() -> None:
    model, fixture, inputs = official("graphormer")
    model(**inputs).vertices.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = fixture.about["grad_l2_f64_of_mean_sq_vertices_full"]
    for name, norm in norms.items():
        # the camera takes no part in this loss
        if norm is not None:
            assert abs(gradients[rename(name)].norm().item() - norm) <= EXACT * max(1.0, norm), name


def test_a_batch_of_one_is_a_part_of_a_batch() -> None:
    model, _, inputs = official("metro")
    with torch.no_grad():
        whole, one = model(**inputs), model(feature_maps=(inputs["feature_maps"][0][:1],))
    for name in OUTPUTS.values():
        assert one[name].shape == whole[name][:1].shape
        assert_near(one[name], whole[name][:1], EXACT)


def test_losses_of_a_batch_are_the_means_of_its_samples() -> None:
    model, fixture, inputs = official("metro")
    given = targets(fixture)
    ones = [
        model(feature_maps=(inputs["feature_maps"][0][i : i + 1],), **{k: v[i : i + 1] for k, v in given.items()})
        for i in range(3)
    ]
    whole = model(**inputs, **given).loss_dict
    for name, flags in (("joints_3d", "has_joints_3d"), ("vertices_full", "has_vertices"), ("joints_2d", None)):
        chosen = [one.loss_dict[name] for i, one in enumerate(ones) if flags is None or given[flags][i]]
        assert_near(whole[name], torch.stack(chosen).mean(), 1e-12 * max(1.0, whole[name].item()))


@pytest.mark.parametrize("missing", ["has_joints_3d", "has_vertices"])
def test_without_any_sample_a_loss_is_zero_and_has_a_gradient(missing: str) -> None:
    model = tiny_model()
    batch = tiny_batch(model.config)
    batch[missing] = torch.zeros(3)
    # what a sample does not have may hold anything
    batch["joints_3d" if missing == "has_joints_3d" else "vertices"].fill_(float("nan"))
    output = model(**batch)
    zero = {name for name, loss in output.loss_dict.items() if loss == 0}
    expected = {
        "has_joints_3d": {"joints_3d", "mesh_joints_3d"},
        "has_vertices": {"vertices_coarse", "vertices_mid", "vertices_full"},
    }
    assert zero == expected[missing]
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_the_official_size() -> None:
    weights = DropKeyMeshConfig()
    with torch.device("meta"):
        model = DropKeyMeshForBodyMesh(weights)
    counted = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith("mesh.stages."))
    # 102,256,646 with the dead ones, which are 44,833,408; each system has 12 attentions
    assert counted == 102_256_646 - 44_833_408
    attentions = [module for module in model.modules() if isinstance(module, DropKeyMeshSelfAttention)]
    assert len(attentions) == 12
    assert model.config.num_tokens == 445
    with torch.device("meta"):
        graphormer = DropKeyMeshForBodyMesh(DropKeyMeshConfig.graphormer())
    assert graphormer.config.num_tokens == 494
    assert sum(1 for module in graphormer.modules() if type(module).__name__ == "DropKeyMeshGraphBlock") == 4


# --- DropKey ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_ratio_zero_and_eval_are_the_plain_model(system: str, implementation: str) -> None:
    plain, dropping = tiny_model(system, dropkey_ratio=0.0), tiny_model(system)
    dropping.load_state_dict(plain.state_dict())
    batch = tiny_batch(plain.config)
    for model in (plain, dropping):
        model.set_attn_implementation(implementation)
    assert torch.equal(plain(**batch).vertices, dropping(**batch).vertices)
    for model in (plain, dropping):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    keep = torch.ones(3, 24)
    outputs = [model(**batch, token_keep_mask=keep).vertices for model in (plain, plain, dropping)]
    # batch norm uses the batch itself in training
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("pattern", ["score", "key", "token"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_backends_drop_the_same_scores(system: str, pattern: str) -> None:
    model = tiny_model(system, dropkey_pattern=pattern, hidden_dropout_prob=0.0, masked_ratio=0.0).train()
    batch, found = tiny_batch(model.config), {}
    for implementation in ("eager", "sdpa", "dropkey_triton"):
        # the interpreter of the fused kernel takes ten seconds
        if implementation == "dropkey_triton" and (system, pattern) != ("metro", "score"):
            continue
        other = copy.deepcopy(model)
        other.set_attn_implementation(implementation)
        torch.manual_seed(3)
        try:
            output = other(**batch)
        except (RuntimeError, ValueError, ImportError) as error:
            if implementation != "dropkey_triton":
                raise
            pytest.skip(f"the fused kernel does not run here: {error}")
        output.loss.backward()
        found[implementation] = (output.vertices, other.mesh.stages[0].layers[0].attention.self.query.weight.grad)
    for values in found.values():
        for one, expected in zip(values, found["eager"], strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_flex_attention_in_eval_and_training() -> None:
    model = tiny_model(hidden_dropout_prob=0.0, masked_ratio=0.0)
    batch = tiny_batch(model.config)
    expected = model(**batch).vertices
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).vertices, expected, rtol=1e-4, atol=1e-5)
        model.train()
        torch.manual_seed(3)
        dropped = model(**batch).vertices
        model.set_attn_implementation("eager")
        torch.manual_seed(3)
        torch.testing.assert_close(model(**batch).vertices, dropped, rtol=1e-4, atol=1e-5)


def test_ratios_fall_over_all_attentions() -> None:
    model = tiny_model()
    ratios = [module.dropkey_ratio for module in model.modules() if isinstance(module, DropKeyMeshSelfAttention)]
    assert len(ratios) == 6 and ratios[0] == 0.3 and ratios[-1] == 0.0
    assert all(before > after for before, after in itertools.pairwise(ratios))


@pytest.mark.parametrize("pattern", ["block", "cross"])
def test_patterns_of_patch_grids_are_refused(pattern: str) -> None:
    with pytest.raises(Exception, match="lie on no patch grid"):
        tiny_config(dropkey_pattern=pattern)
    tiny_config(dropkey_pattern=pattern, dropkey_ratio=0.0)


def test_masks_are_drawn_as_the_paper_says() -> None:
    torch.manual_seed(0)
    kept = draw_kept_tokens(4000, (14, 431), 0.3, torch.device("cpu")).squeeze(-1)
    assert kept.shape == (4000, 445) and set(kept.unique().tolist()) == {0.0, 1.0}
    joints, vertices = 14 - kept[:, :14].sum(1), 431 - kept[:, 14:].sum(1)
    assert joints.max() == 4 and vertices.max() == 129 and vertices.min() == 0
    # int(u * 129.3) is uniform on 0..129, but for the last
    assert abs(vertices.float().mean().item() - 64.2) < 3 * 37.5 / 4000**0.5
    assert abs(torch.corrcoef(torch.stack((joints, vertices)))[0, 1].item()) < 3 / 4000**0.5
    # every token alike
    assert (kept[:, 14:].mean(0) - kept[:, 14:].mean()).abs().max() < 5 * 0.5 / 4000**0.5


def test_masking_acts_in_training_only() -> None:
    model = tiny_model(dropkey_ratio=0.0, hidden_dropout_prob=0.0, masked_ratio=1.0)
    batch = tiny_batch(model.config)
    assert torch.equal(model(**batch).vertices, model(**batch).vertices)
    model.train()
    assert not torch.equal(model(**batch).vertices, model(**batch).vertices)


# --- Transformers' features ------------------------------------------------------------------------------------------


def test_training_starts_at_the_template() -> None:
    torch.manual_seed(0)
    model = tiny_model()
    output = model(tiny_batch(model.config)["pixel_values"])
    reference = model.mesh.body.reference_tokens()
    found = torch.cat((output.joints, output.coarse_vertices), 1)
    assert (found - reference).abs().max() < 0.1 * reference.abs().max()
    assert (output.camera[:, 0] - 0.9).abs().max() < 0.3


@pytest.mark.parametrize("system", SYSTEMS)
def test_saved_and_loaded_it_is_the_same(system: str, tmp_path: Path) -> None:
    model = tiny_model(system)
    model.save_pretrained(tmp_path)
    again, report = DropKeyMeshForBodyMesh.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for field in ("num_vertices", "joint_rows", "graph_stages", "feature_grid", "dropkey_ratio"):
        assert getattr(again.config, field) == getattr(model.config, field)
    batch = tiny_batch(model.config)
    assert torch.equal(again(**batch).vertices, model(**batch).vertices)
    base = DropKeyMeshModel.from_pretrained(tmp_path)
    assert torch.equal(base(batch["pixel_values"]).last_hidden_state[:, :14], model(**batch).joints)
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["custom_pipelines"]["body-mesh"]["impl"] == "pipeline_dropkey_mesh.BodyMeshPipeline"
    assert about["auto_map"]["AutoModel"] == "modeling_dropkey_mesh.DropKeyMeshForBodyMesh"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("system", SYSTEMS)
def test_checkpointing_gives_the_same_gradients(system: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(system).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        model(**tiny_batch(model.config)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("system", SYSTEMS)
def test_exported_it_is_the_same(system: str) -> None:
    model = tiny_model(system)
    pixels = tiny_batch(model.config)["pixel_values"]
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(model, (), {"pixel_values": pixels}, dynamic_shapes=shapes)
    for images in (pixels, pixels[:2], torch.cat((pixels, pixels))):
        expected, found = model(images), exported.module()(pixel_values=images)
        torch.testing.assert_close(found.vertices, expected.vertices)
        torch.testing.assert_close(found.camera, expected.camera)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_outputs_that_are_asked_for(implementation: str) -> None:
    model = tiny_model("graphormer")
    model.set_attn_implementation(implementation)
    pixels = tiny_batch(model.config)["pixel_values"]
    output = model(pixels, output_hidden_states=True, output_attentions=implementation == "eager")
    tokens = 14 + 10 + 16
    assert [tuple(state.shape) for state in output.hidden_states][-1] == (3, tokens, 8)
    if implementation == "eager":
        assert [tuple(weights.shape) for weights in output.attentions] == [(3, 2, tokens, tokens)] * 6
    plain = model(pixels, return_dict=False)
    assert torch.equal(plain[0], output.vertices)


def test_other_backbones() -> None:
    convnext = {
        "model_type": "convnext",
        "num_stages": 3,
        "hidden_sizes": [8, 12, 16],
        "depths": [1, 1, 1],
        "patch_size": 4,
        "out_features": ["stage3"],
    }
    model = tiny_model(backbone_config=convnext, feature_grid=[2, 2])
    assert model(torch.randn(1, 3, 32, 32)).vertices.shape == (1, 40, 3)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_vertices": [20, 10, 40]}, "coarse mesh to the full"),
        ({"intermediate_sizes": [16]}, "`intermediate_sizes` must have 3 values"),
        ({"hidden_sizes": [16, 12, 9]}, "multiple of `num_attention_heads`"),
        ({"graph_stages": [3]}, r"`graph_stages` must lie in \[0, 3\)"),
        ({"joint_rows": [0, 17]}, r"`joint_rows` must lie in \[0, 17\)"),
        ({"pelvis_row": 17}, "`pelvis_row` must lie"),
        ({"token_source": "mean"}, "positions, pooled"),
        ({"masked_ratio": 1.5}, "`masked_ratio` must lie"),
        ({"max_position_embeddings": 20}, "at least the 24 tokens"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"feature_grid": [4, 0]}, "`feature_grid` must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        tiny_config(**fields)


def test_inputs_that_make_no_sense_are_refused() -> None:
    model = tiny_model()
    batch = tiny_batch(model.config)
    with pytest.raises(ValueError, match="`pixel_values` must have the shape"):
        model(torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match="`pixel_values` must have the shape"):
        model()
    with pytest.raises(ValueError, match="`feature_grid`"):
        tiny_model(feature_grid=[2, 2])(batch["pixel_values"])
    with pytest.raises(ValueError, match="has_vertices is missing"):
        model(**{name: value for name, value in batch.items() if name != "has_vertices"})
    with pytest.raises(ValueError, match="vertices must have the shape .*topology"):
        model(**{**batch, "vertices": torch.zeros(3, 41, 3)})
    with pytest.raises(ValueError, match="joints_3d must have the shape"):
        model(**{**batch, "joints_3d": torch.zeros(3, 14, 3)})


def test_a_body_that_does_not_fit_is_refused() -> None:
    model = tiny_model("graphormer")
    body = random_body(model.config)
    for name, wrong in (("template", torch.zeros(41, 3)), ("faces", torch.zeros(3, 3)), ("adjacency", torch.eye(9))):
        with pytest.raises(ValueError, match=f"body's {name} has the shape"):
            model.set_body(**{**body, name: wrong})
    with pytest.raises(ValueError, match="need the body's `adjacency`"):
        model.set_body(**{**body, "adjacency": None})
    with pytest.raises(ValueError, match="last-but-one feature map"):
        tiny_model("graphormer", backbone_config={**backbone(8, 12), "out_features": ["stage2"]})
