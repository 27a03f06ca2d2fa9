"""DropKeyHoi beside the official QPIC: the same numbers with and without drops; and Transformers' features."""

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_parity import Fixture, assert_near, forced_drops
from hoi_models import TINY, tiny_config, tiny_inputs, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForObjectDetection, DetrConfig, DetrModel, ResNetConfig

from hf_dropkey.hoi.qpic_weights import convert_tensors, convert_weights, read_config
from hf_dropkey.models.attention import DROPKEY_BACKENDS
from hf_dropkey.models.configuration_dropkey_hoi import DropKeyHoiConfig
from hf_dropkey.models.loss_dropkey_hoi import HoiPredictions, HoiTargets, match
from hf_dropkey.models.modeling_dropkey_hoi import DropKeyHoiForObjectDetection, DropKeyHoiModel
from hf_dropkey.models.pairs_dropkey_hoi import pair_arrays


# the bound; float64 on both sides, but for the position embedding, which is float32 in the official code
BOUND = 1e-7
OUTPUTS = {
    "pred_obj_logits": "logits",
    "pred_verb_logits": "verb_logits",
    "pred_sub_boxes": "person_boxes",
    "pred_obj_boxes": "object_boxes",
}
LOSSES = {
    "loss_obj_ce": "loss_object",
    "loss_verb_ce": "loss_verb",
    "loss_sub_bbox": "loss_person_bbox",
    "loss_obj_bbox": "loss_object_bbox",
    "loss_sub_giou": "loss_person_giou",
    "loss_obj_giou": "loss_object_giou",
}
# --- parity with the official model --------------------------------------------------------------------------------


@cache
def fixture() -> Fixture:
    return Fixture("qpic_tiny")


def official_model(**settings: Any) -> DropKeyHoiForObjectDetection:
    """The fixture's model in float64 and eval mode."""
    about = fixture().about["config"]
    weights = fixture().below("weights/")
    config = read_config(
        weights,
        about["nheads"],
        missing_object=about["missing_object_class"],
        dropkey_cross_attention=True,
        **settings,
    )
    model = DropKeyHoiForObjectDetection(config)
    model.load_state_dict(convert_weights(weights), strict=True)
    return model.double().eval()


def official_inputs() -> dict[str, Any]:
    labels = []
    for image in range(3):
        given = fixture().below(f"input/targets.{image}.")
        names = {"obj_labels": "class_labels", "verb_labels": "verb_labels"}
        names |= {"sub_boxes": "person_boxes", "obj_boxes": "object_boxes"}
        labels.append({ours: given[name] for name, ours in names.items()})
    mask = ~fixture().tensors["input/padding_mask"]
    return {"pixel_values": fixture().pixels(), "pixel_mask": mask.long(), "labels": labels}


def ours(site: str) -> str:
    """Our name of an attention of the official model."""
    return site.replace("transformer.", "model.").replace("multihead_attn", "encoder_attn")


def test_every_official_tensor_is_placed() -> None:
    weights = fixture().below("weights/")
    model = official_model()
    placed = [name for parts in convert_tensors(weights).values() for name in parts]
    assert sorted(placed) == sorted(model.state_dict())
    assert sum(value.numel() for value in model.parameters()) == fixture().about["params_total"]


def test_forward_of_all_layers() -> None:
    with torch.no_grad():
        outputs = official_model()(**official_inputs())
    for official, name in OUTPUTS.items():
        assert_near(outputs[name], fixture().tensors[f"f64/{official}"], BOUND)
        for layer, earlier in enumerate(outputs.auxiliary_outputs):
            assert_near(earlier[name], fixture().tensors[f"f64/aux.{layer}.{official}"], BOUND)
    assert len(outputs.auxiliary_outputs) == 2


def test_states_of_encoder_and_decoder() -> None:
    model = official_model()
    with torch.no_grad():
        outputs = model(**official_inputs(), output_hidden_states=True)
    inter = fixture().below("f64/inter/")
    for layer in range(2):
        expected = inter[f"transformer.encoder.layers.{layer}"].transpose(0, 1)
        assert_near(outputs.encoder_hidden_states[layer + 1], expected, BOUND)
    # the last hidden state of Transformers is the normalised one
    for layer in range(2):
        expected = inter[f"transformer.decoder.layers.{layer}"].transpose(0, 1)
        assert_near(outputs.decoder_hidden_states[layer + 1], expected, BOUND)
    assert torch.equal(outputs.intermediate_hidden_states[-1], outputs.last_hidden_state)


def test_matchings_are_equal() -> None:
    model, inputs = official_model(), official_inputs()
    with torch.no_grad():
        outputs = model(**inputs)
    layers = [HoiPredictions(**earlier) for earlier in outputs.auxiliary_outputs]
    layers.append(HoiPredictions(*(outputs[name] for name in HoiPredictions._fields)))
    found = match(layers, [HoiTargets.of(label, layers[-1]) for label in inputs["labels"]], model.config)
    for layer, name in enumerate(("aux.0", "aux.1", "last")):
        for image in range(3):
            for part, kind in zip(found[layer][image], ("query", "target"), strict=True):
                assert torch.equal(part, fixture().tensors[f"match/{name}.{image}.{kind}"])


@pytest.mark.parametrize("verb_loss", ["focal", "bce"])
def test_every_loss(verb_loss: str) -> None:
    with torch.no_grad():
        outputs = official_model(verb_loss=verb_loss)(**official_inputs())
    expected = fixture().about["losses_f64"][verb_loss]
    compared = 0
    for official, value in expected.items():
        found = re.fullmatch(r"(loss_\w+?)(_\d)?", official)
        if found:
            name = LOSSES[found[1]] + (found[2] or "")
            assert abs(outputs.loss_dict[name].item() - value) <= BOUND, name
            compared += 1
    assert compared == len(outputs.loss_dict) == 18
    assert abs(outputs.loss.item() - expected["weighted_total"]) <= BOUND * 10


def test_all_gradient_norms() -> None:
    model = official_model()
    model(**official_inputs()).loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    compared = set()
    for official, expected in fixture().about["grad_l2_f64_focal_weighted_total"].items():
        parts = convert_tensors({official: fixture().tensors[f"weights/{official}"]})[official]
        if expected is None:
            assert not gradients.keys() & parts.keys(), official
            continue
        found = torch.stack([gradients[name].norm() for name in parts]).norm().item()
        assert abs(found - expected) <= BOUND * max(1.0, expected), f"{official}: {found} instead of {expected}"
        compared |= parts.keys()
    assert compared == gradients.keys()


@pytest.mark.parametrize(("entry", "part"), [("drop", "transformer"), ("drop_encoder_only", "transformer.encoder")])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_forced_drops(entry: str, part: str, backend: str) -> None:
    model, inputs = official_model(), official_inputs()
    model.set_attn_implementation(backend)
    sites = [site for site in fixture().about["attention_sites"] if site.startswith(part)]
    masks = {ours(site): fixture().tensors[f"drop/mask/{site}"] for site in sites}
    with torch.no_grad(), forced_drops(model, masks):
        outputs = model(inputs["pixel_values"], inputs["pixel_mask"])
    for official, name in OUTPUTS.items():
        assert_near(outputs[name], fixture().tensors[f"f64/{entry}/{official}"], BOUND)


def test_post_processing() -> None:
    model, inputs = official_model(), official_inputs()
    with torch.no_grad():
        outputs = model(inputs["pixel_values"], inputs["pixel_mask"])
    for image, arrays in enumerate(pair_arrays(outputs, fixture().tensors["input/target_sizes"])):
        expected = fixture().below(f"post/{image}.")
        count = len(arrays.person_boxes)
        # a box is some hundred pixels wide
        assert_near(arrays.person_boxes, expected["boxes"][:count], BOUND * 100)
        assert_near(arrays.object_boxes, expected["boxes"][count:], BOUND * 100)
        assert torch.equal(arrays.object_labels, expected["labels"][count:])
        assert_near(arrays.verb_scores, expected["verb_scores"], BOUND)


def test_float32_is_as_near_as_the_official_model_is_to_itself() -> None:
    model = official_model().float()
    inputs = official_inputs()
    with torch.no_grad():
        outputs = model(inputs["pixel_values"].float(), inputs["pixel_mask"])
    for official, name in OUTPUTS.items():
        assert_near(outputs[name], fixture().tensors[f"f32/{official}"], 2e-5)


@pytest.mark.parametrize(
    ("depths", "objects", "verbs", "expected"),
    [([3, 4, 6, 3], 80, 117, 41_684_622), ([3, 4, 6, 3], 81, 29, 41_662_263), ([3, 4, 23, 3], 80, 117, 60_624_526)],
)
def test_published_sizes(depths: list[int], objects: int, verbs: int, expected: int) -> None:
    output: dict[str, Any] = {"out_features": ["stage4"]}
    config = DropKeyHoiConfig(
        backbone_config=ResNetConfig(depths=depths, **output),
        id2label={number: str(number) for number in range(objects)},
        verbs=[str(number) for number in range(verbs)],
    )
    with torch.device("meta"):
        model = DropKeyHoiForObjectDetection(config)
    # hoi.md counts what DETR trains and the frozen first stages, not the statistics of batch norms
    assert sum(value.numel() for value in model.parameters()) == expected


# --- DETR inside ---------------------------------------------------------------------------------------------------


def test_the_model_is_transformers_detr() -> None:
    model = tiny_model().model.eval()
    settings = {name: value for name, value in TINY.items() if name not in ("verbs", "id2label")}
    stock = DetrModel(DetrConfig(backbone_config=copy.deepcopy(model.config.backbone_config), **settings)).eval()
    stock.load_state_dict(model.state_dict(), strict=True)
    inputs = {name: value for name, value in tiny_inputs().items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(stock(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_ratio_zero_in_training_is_the_plain_model() -> None:
    plain, dropping = tiny_model(dropkey_ratio=0.0, dropout=0.0), tiny_model(dropkey_ratio=0.4, dropout=0.0)
    dropping.load_state_dict(plain.state_dict())
    inputs = tiny_inputs()
    for module in dropping.modules():
        if hasattr(module, "dropkey_ratio"):
            module.dropkey_ratio = 0.0
    with torch.no_grad():
        assert torch.equal(plain.train()(**inputs).loss, dropping.train()(**inputs).loss)


@pytest.mark.parametrize(
    ("settings", "dropping"),
    [
        ({}, {"encoder.0": 0.3, "encoder.1": 0.1, "self.1": 0.3, "self.2": 0.1}),
        ({"dropkey_encoder": False}, {"self.1": 0.3, "self.2": 0.1}),
        ({"dropkey_decoder": False}, {"encoder.0": 0.3, "encoder.1": 0.1}),
        (
            {"dropkey_cross_attention": True, "dropkey_encoder": False},
            {"cross.0": 0.3, "self.1": 0.25, "cross.1": 0.2, "self.2": 0.15, "cross.2": 0.1},
        ),
        (
            {"dropkey_cross_attention": True, "dropkey_encoder": False, "dropkey_decoder": False},
            {"cross.0": 0.3, "cross.1": 0.2, "cross.2": 0.1},
        ),
        ({"num_queries": 1}, {"encoder.0": 0.3, "encoder.1": 0.1}),
    ],
)
def test_schedule_of_each_stack(settings: dict[str, Any], dropping: dict[str, float]) -> None:
    model = tiny_model(dropkey_ratio=0.3, dropkey_final_ratio=0.1, **settings).model
    found = {f"encoder.{index}": layer.self_attn.dropkey_ratio for index, layer in enumerate(model.encoder.layers)}
    for index, layer in enumerate(model.decoder.layers):
        found[f"self.{index}"] = layer.self_attn.dropkey_ratio
        found[f"cross.{index}"] = layer.encoder_attn.dropkey_ratio
    assert {name: ratio for name, ratio in found.items() if ratio} == pytest.approx(dropping)


@pytest.mark.parametrize("cross", [False, True])
def test_the_schedule_is_that_of_apply_dropkey(cross: bool) -> None:
    from hf_dropkey import apply_dropkey

    model = tiny_model(dropkey_ratio=0.3, dropkey_final_ratio=0.1, dropkey_cross_attention=cross)
    settings = {name: value for name, value in TINY.items() if name not in ("verbs", "id2label")}
    stock = DetrModel(DetrConfig(backbone_config=copy.deepcopy(model.config.backbone_config), **settings))
    report = apply_dropkey(stock, 0.3, final_ratio=0.1, cross_attention=cross, verbose=False)
    for site in report.sites:
        assert model.model.get_submodule(site.name).dropkey_ratio == pytest.approx(site.ratio), site.name


def test_every_site_acts_in_training() -> None:
    inputs = tiny_inputs()
    model = tiny_model(dropkey_cross_attention=True, dropkey_schedule="constant", dropout=0.0).double().train()
    sites = [name for name, module in model.named_modules() if getattr(module, "dropkey_ratio", 0) > 0]
    assert len(sites) == 7
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.no_grad():
        plain = model.eval()(**inputs).loss
        for name in sites:
            model.get_submodule(name).train()
            model.get_submodule(name).dropkey_ratio = 0.5
            assert (model(**inputs).loss - plain).abs() > 1e-9, name
            model.eval()


# --- features of Transformers --------------------------------------------------------------------------------------


def loss_and_gradients(model: DropKeyHoiForObjectDetection, inputs: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    torch.manual_seed(2)
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return loss.item(), gradients


@pytest.mark.parametrize("backend", sorted(DROPKEY_BACKENDS))
def test_backends_drop_the_same_scores(backend: str) -> None:
    inputs = tiny_inputs()
    settings = {"dropkey_ratio": 0.4, "dropkey_cross_attention": True, "dropkey_schedule": "constant", "dropout": 0.0}
    reference = tiny_model(**settings).train()
    reference.set_attn_implementation("eager")
    model = tiny_model(**settings).train()
    model.load_state_dict(reference.state_dict())
    model.set_attn_implementation(backend)
    expected, expected_gradients = loss_and_gradients(reference, inputs)
    if backend == "flex_attention":
        # PyTorch's FlexAttention has no backward pass on a CPU
        torch.manual_seed(2)
        with torch.no_grad():
            assert model(**inputs).loss.item() == pytest.approx(expected, rel=1e-5)
        return
    loss, gradients = loss_and_gradients(model, inputs)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pattern", ["score", "key", "token"])
def test_patterns(pattern: str) -> None:
    model = tiny_model(dropkey_pattern=pattern, dropkey_ratio=0.4, dropkey_cross_attention=True).train()
    loss, gradients = loss_and_gradients(model, tiny_inputs())
    assert torch.isfinite(torch.tensor(loss))
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    inputs = tiny_inputs()
    model = tiny_model(dropkey_ratio=0.4, dropkey_cross_attention=True).train()
    expected, expected_gradients = loss_and_gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss, gradients = loss_and_gradients(model, inputs)
    assert loss == expected
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        # sums of gradients are taken in another order
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6)


def test_bfloat16() -> None:
    model = tiny_model(dropkey_cross_attention=True).to(torch.bfloat16).train()
    outputs = model(**tiny_inputs())
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert outputs.logits.dtype == torch.bfloat16
    # 8 bits would place a box to a few pixels only
    assert outputs.person_boxes.dtype == torch.float32
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)


def test_autocast() -> None:
    model = tiny_model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**tiny_inputs())
    outputs.loss.backward()
    assert outputs.loss.isfinite()


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_forward(training: bool) -> None:
    model = tiny_model(dropout=0.0, dropkey_ratio=0.4, encoder_layers=1, decoder_layers=2).train(training)
    inputs = tiny_inputs()
    inputs.pop("labels")
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.manual_seed(3)
        expected = model(**inputs)
        torch.manual_seed(3)
        found = compiled(**inputs)
    for name in OUTPUTS.values():
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_outputs_that_transformers_offers() -> None:
    model = tiny_model().eval()
    model.set_attn_implementation("eager")
    inputs = tiny_inputs()
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True, output_hidden_states=True)
        as_tuple = model(**inputs, return_dict=False)
    keys = 4 * 5
    assert [tuple(weights.shape) for weights in outputs.encoder_attentions] == [(2, 4, keys, keys)] * 2
    assert [tuple(weights.shape) for weights in outputs.decoder_attentions] == [(2, 4, 6, 6)] * 3
    assert [tuple(weights.shape) for weights in outputs.cross_attentions] == [(2, 4, 6, keys)] * 3
    assert len(outputs.encoder_hidden_states) == 3
    assert len(outputs.decoder_hidden_states) == 4
    assert torch.equal(as_tuple[0], outputs.loss)


def test_a_saved_model_loads_by_the_auto_classes(tmp_path: Path) -> None:
    import hf_dropkey  # noqa: F401  # registers

    model = tiny_model(missing_object=True).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert type(loaded) is DropKeyHoiForObjectDetection
    assert type(AutoModel.from_pretrained(tmp_path)) is DropKeyHoiModel
    assert AutoConfig.from_pretrained(tmp_path).verbs == ["hold", "kick"]
    assert AutoConfig.from_pretrained(tmp_path).missing_label == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_saved_names_are_those_of_the_modules(tmp_path: Path) -> None:
    # Trainer resumes with a bare load_state_dict, which converts no names
    from safetensors.torch import load_file

    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_a_saved_folder_names_all_its_classes(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == DropKeyHoiConfig.family_auto_map
    assert config["custom_pipelines"]["human-object-interaction"]["impl"] == "pipeline_dropkey_hoi.HoiPipeline"
    for name in ("modeling", "configuration", "loss", "pairs", "pipeline"):
        assert (tmp_path / f"{name}_dropkey_hoi.py").is_file()


def test_first_values_are_those_of_the_original() -> None:
    model = tiny_model(num_queries=100)
    assert model.model.query_position_embeddings.weight.std().item() == pytest.approx(1, abs=0.1)
    assert model.verb_classifier.bias.sigmoid().tolist() == pytest.approx([0.01] * 2)
    # torch's own in the heads, Xavier's in the transformer: uniform up to a bound, so the standard deviation is known
    head, attention = model.person_bbox_predictor.layers[0], model.model.decoder.layers[0].self_attn.q_proj
    assert head.weight.std().item() == pytest.approx((1 / 32 / 3) ** 0.5, rel=0.1)
    assert attention.weight.std().item() == pytest.approx((6 / 64 / 3) ** 0.5, rel=0.1)
    assert not attention.bias.any()


def test_only_the_first_stage_of_a_resnet_is_frozen() -> None:
    output: dict[str, Any] = {"out_features": ["stage4"]}
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, layer_type="basic", **output)
    model = tiny_model(backbone_config=backbone)
    for name, value in model.named_parameters():
        assert value.requires_grad != any(part in name for part in (".embedder.", ".stages.0.")), name
    assert all(value.requires_grad for value in tiny_model().parameters())


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verbs": []}, "name at least one verb"),
        ({"verbs": ["hold", "hold"]}, "more than once"),
        ({"verb_loss": "hinge"}, "hinge"),
        ({"bbox_cost": -1}, "at least 0, got -1"),
        ({"dropkey_pattern": "block"}, "'score', 'key' or 'token'"),
        ({"attention_dropout": 0.1}, "DropKey replaces dropout"),
        ({"dropkey_encoder": False, "dropkey_decoder": False}, "nothing drops keys"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        tiny_config(**settings)
    assert "StrictDataclass" in type(caught.value).__name__


def test_settings_assigned_later_are_checked_too() -> None:
    config = tiny_config()
    config.dropkey_encoder = config.dropkey_decoder = False
    with pytest.raises(ValueError, match="nothing drops keys"):
        DropKeyHoiForObjectDetection(config)


def test_images_of_a_wrong_shape_are_refused() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    with pytest.raises(ValueError, match=r"\[batch, 3, height, width\]"):
        model(inputs["pixel_values"][0])
    with pytest.raises(ValueError, match="`pixel_mask` must have the shape"):
        model(inputs["pixel_values"], inputs["pixel_mask"][:, :5])
