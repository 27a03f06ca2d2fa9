"""Models of Transformers around a DropKey backbone: trained, saved, loaded in a process without the package.

Fresh processes run with an empty modules cache and without the repository on their path.
"""

import copy
import json
import pickle
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import fresh_process
import pytest
import torch
from hub_server import serving
from transformers import (
    AutoModelForObjectDetection,
    ConvNextConfig,
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_dropkey import DropKeyViTBackbone, DropKeyViTConfig, DropKeyVoloConfig, carry_backbone_code
from hf_dropkey.hub.release_check import check_release


VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32}
VOLO = {"depths": [1, 1, 1], "hidden_size": 32, "num_attention_heads": 4, "outlook_hidden_size": 16, "image_size": 32}
PREAMBLE = """
import sys, torch
from transformers import (
    AutoBackbone, AutoConfig, AutoModelForObjectDetection, AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
)
folder = sys.argv[1]
images = torch.linspace(-1, 1, 2 * 3 * 48 * 40).view(2, 3, 48, 40)
"""
fresh = partial(fresh_process.fresh, preamble=PREAMBLE)


def vit(**more: Any) -> DropKeyViTConfig:
    return DropKeyViTConfig(**VIT, patch_size=8, dropkey_ratio=0.3, **more)


def volo(**more: Any) -> DropKeyVoloConfig:
    return DropKeyVoloConfig(**VOLO, num_outlook_heads=2, stem_size=8, dropkey_ratio=0.3, **more)


def detr() -> DetrForObjectDetection:
    sizes = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = DetrConfig(backbone_config=vit(), d_model=32, num_queries=5, num_labels=3, **sizes, **heads)
    return DetrForObjectDetection(config)


def mask2former() -> Mask2FormerForUniversalSegmentation:
    config = Mask2FormerConfig(
        backbone_config=volo(out_indices=[0, 1, 2, 3]),
        feature_strides=[8, 8, 16, 16],
        common_stride=8,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        num_labels=3,
        train_num_points=64,
    )
    return Mask2FormerForUniversalSegmentation(config)


def upernet() -> UperNetForSemanticSegmentation:
    config = UperNetConfig(
        backbone_config=vit(out_indices=[1, 2, 3, 4]), hidden_size=16, num_labels=3, use_auxiliary_head=False
    )
    return UperNetForSemanticSegmentation(config)


def batch_of(name: str) -> dict[str, Any]:
    masks = torch.zeros(2, 48, 40)
    masks[0, :20], masks[1, :, 10:30] = 1, 1
    if name == "detr":
        boxes = torch.tensor([[0.5, 0.5, 0.4, 0.3]])
        return {"labels": [{"class_labels": torch.tensor([1]), "boxes": boxes} for _ in range(2)]}
    if name == "mask2former":
        return {
            "mask_labels": [mask[None] for mask in masks],
            "class_labels": [torch.tensor([1]), torch.tensor([2])],
        }
    return {"labels": masks.long()}


def images() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 48 * 40).view(2, 3, 48, 40)


MODELS: dict[str, Any] = {"detr": detr, "mask2former": mask2former, "upernet": upernet}
LOADING = {
    "detr": ("AutoModelForObjectDetection", "logits"),
    "mask2former": ("AutoModelForUniversalSegmentation", "class_queries_logits"),
    "upernet": ("AutoModelForSemanticSegmentation", "logits"),
}


@pytest.mark.parametrize("name", MODELS)
def test_trained_saved_and_loaded_without_the_package(name: str, tmp_path: Path) -> None:
    """Some steps change the backbone and lower the loss; a fresh process computes the same, saves, and loads again."""
    torch.manual_seed(0)
    model = carry_backbone_code(MODELS[name]())
    start = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = model.train()(pixel_values=images(), **batch_of(name)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < sum(losses[:3])
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, start[key])]
    assert any("attention.qkv" in key or "q_proj" in key for key in changed)

    model.eval().save_pretrained(tmp_path / "made")
    auto, output = LOADING[name]
    torch.save(model(images())[output].detach(), tmp_path / "expected.pt")
    fresh(
        f"""
        expected = torch.load(sys.argv[2])
        for place in (folder, sys.argv[3]):
            model = {auto}.from_pretrained(place, trust_remote_code=True).eval()
            config = model.config.backbone_config
            assert type(config).__module__.startswith("transformers_modules"), type(config)
            assert config.dropkey_ratio == 0.3
            torch.testing.assert_close(model(images)[{output!r}], expected, rtol=0, atol=1e-5)
            model.save_pretrained(sys.argv[3])
        """,
        tmp_path / "made",
        tmp_path / "expected.pt",
        tmp_path / "again",
        cache=tmp_path / "cache",
    )
    # with the package no code of the folder runs, and nothing asks for trust
    same = type(model).from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(same(images())[output], torch.load(tmp_path / "expected.pt"), rtol=0, atol=1e-5)
    assert type(same.config.backbone_config) in (DropKeyViTConfig, DropKeyVoloConfig)


def test_without_the_code_a_process_without_the_package_cannot_load(tmp_path: Path) -> None:
    """What `carry_backbone_code` is for."""
    detr().save_pretrained(tmp_path / "made")
    assert not list((tmp_path / "made").glob("*.py"))
    printed = fresh(
        """
        try:
            AutoModelForObjectDetection.from_pretrained(folder, trust_remote_code=True)
        except KeyError as error:
            print(error)
        """,
        tmp_path / "made",
        cache=tmp_path / "cache",
    )
    assert "dropkey_vit" in printed


def test_package_and_carried_code_share_a_process(tmp_path: Path) -> None:
    """The package's classes win once imported; a model made before goes on working."""
    carry_backbone_code(detr()).save_pretrained(tmp_path / "made")
    fresh(
        """
        remote = AutoModelForObjectDetection.from_pretrained(folder, trust_remote_code=True).eval()
        import hf_dropkey
        for trust in (None, True):
            installed = AutoModelForObjectDetection.from_pretrained(folder, trust_remote_code=trust).eval()
            assert type(installed.config.backbone_config) is hf_dropkey.DropKeyViTConfig
            assert torch.equal(remote(images).logits, installed(images).logits)
        assert type(remote.config.backbone_config) is not hf_dropkey.DropKeyViTConfig
        remote.save_pretrained(sys.argv[2])
        assert torch.equal(AutoModelForObjectDetection.from_pretrained(sys.argv[2]).eval()(images).logits, installed(images).logits)
        """,
        tmp_path / "made",
        tmp_path / "again",
        cache=tmp_path / "cache",
        package=True,
    )


def test_the_configuration_copies_pickles_and_saves_like_any_other(tmp_path: Path) -> None:
    model = carry_backbone_code(detr())
    assert carry_backbone_code(model) is model
    config = model.config
    assert isinstance(config, DetrConfig) and type(config).__name__ == "DetrConfig"
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(other) is type(config) and other.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    assert "auto_map" not in vars(config)
    # onto its own files
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == {"AutoConfig": "configuration_dropkey_host.DropKeyHostConfig"}
    assert saved["backbone_config"]["auto_map"] == DropKeyViTConfig.family_auto_map
    assert type(AutoModelForObjectDetection.from_config(config)) is DetrForObjectDetection


def test_a_model_without_a_dropkey_backbone_is_refused() -> None:
    other = DetrConfig(backbone_config=ConvNextConfig(out_features=["stage4"]))
    with pytest.raises(ValueError, match="DetrConfig has no DropKey backbone.*as backbone_config"):
        carry_backbone_code(other)
    with pytest.raises(ValueError, match="Linear has no DropKey backbone"):
        carry_backbone_code(torch.nn.Linear(2, 2))


def test_code_of_another_repository_is_not_run(tmp_path: Path) -> None:
    carry_backbone_code(detr()).save_pretrained(tmp_path / "made")
    file = tmp_path / "made" / "config.json"
    fields = json.loads(file.read_text())
    fields["backbone_config"]["auto_map"]["AutoConfig"] = "someone/else--module.Class"
    file.write_text(json.dumps(fields))
    printed = fresh(
        """
        try:
            AutoConfig.from_pretrained(folder, trust_remote_code=True)
        except ValueError as error:
            print(error)
        """,
        tmp_path / "made",
        cache=tmp_path / "cache",
    )
    assert "from another repository (someone/else--module.Class)" in printed


def test_the_release_check_trusts_what_carries_its_code(tmp_path: Path) -> None:
    for name, model in MODELS.items():
        carry_backbone_code(model()).save_pretrained(tmp_path / name)
        report = check_release(str(tmp_path / name))
        assert report.trusted, str(report)


@pytest.mark.slow
def test_auto_backbone_loads_from_the_hub_and_from_a_folder(tmp_path: Path) -> None:
    """`AutoBackbone.from_pretrained` of Transformers takes repositories only; a folder goes through its configuration."""
    torch.manual_seed(0)
    backbone = DropKeyViTBackbone(vit(out_features=["stage2", "stage4"])).eval()
    backbone.save_pretrained(tmp_path / "made")
    torch.save([one.detach() for one in backbone(images()).feature_maps], tmp_path / "expected.pt")
    checks = """
        expected = torch.load(sys.argv[2])
        assert all(map(torch.equal, backbone.eval()(images).feature_maps, expected))
        assert type(backbone).__module__.startswith("transformers_modules")
        from transformers import DetrConfig, DetrForObjectDetection
        model = DetrForObjectDetection(DetrConfig(backbone_config=backbone.config, d_model=32))
        model.model.backbone.model.load_state_dict(backbone.state_dict())
        assert model.eval()(images).logits.isfinite().all()
        """
    fresh(
        f"""
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        backbone_class = type(AutoBackbone.from_config(config, trust_remote_code=True))
        backbone = backbone_class.from_pretrained(folder, config=config)
        {checks}
        """,
        tmp_path / "made",
        tmp_path / "expected.pt",
        cache=tmp_path / "cache",
    )
    with serving() as hub:
        push = "import sys; from hf_dropkey import DropKeyViTBackbone as B; B.from_pretrained(sys.argv[1]).push_to_hub('tester/b')"
        hub.run(push, tmp_path, str(tmp_path / "made"))
        code = (
            PREAMBLE
            + "backbone = AutoBackbone.from_pretrained('tester/b', trust_remote_code=True)"
            + textwrap.dedent(checks)
        )
        hub.run(code, tmp_path, "", str(tmp_path / "expected.pt"), package=False)
