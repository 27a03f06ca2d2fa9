"""apply_dropkey and its undoing: settings, instances, contexts, what is saved and loaded, and bad input."""

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import transformers as hf
from stock_architectures import (
    ARCHITECTURES,
    VIT,
    build,
    loss_of,
    pixels,
    quiet,
    ratios,
    state_of,
    tiny_vit,
)

from hf_dropkey import DropKeyViTConfig, DropKeyViTForImageClassification
from hf_dropkey.patching.apply import (
    SETTING_NAMES,
    apply_dropkey,
    dropkey,
    dropkey_active,
    dropkey_disabled,
    dropkey_modules,
    forgotten_ratio,
    remove_dropkey,
    warn_if_forgotten,
)
from hf_dropkey.patching.dispatch import DropKeyConfigView


# --- settings ---------------------------------------------------------------------------------------------------------


def test_include_and_exclude_choose_by_whole_names() -> None:
    model = tiny_vit()
    report = quiet(model, 0.3, include=["vit.layers.0.*", "*.2.attention"])
    assert [(site.name, site.depth) for site in report.sites] == [
        ("vit.layers.0.attention", 0),
        ("vit.layers.2.attention", 1),
    ]
    assert [attention.name for attention in report.unreached] == ["vit.layers.1.attention"]
    report = quiet(model, 0.3, include="*", exclude="*.0.*")
    assert [site.name for site in report.sites] == ["vit.layers.1.attention", "vit.layers.2.attention"]
    assert len(ratios(model)) == 2, "the second call replaces the first"


@pytest.mark.parametrize("patterns", [{"include": "layers.0"}, {"exclude": "*.decoder.*"}])
def test_a_pattern_that_matches_nothing_is_an_error(patterns: dict[str, str]) -> None:
    model = tiny_vit()
    state = state_of(model)
    with pytest.raises(ValueError, match=r"matches no attention.*vit\.layers\.0\.attention"):
        quiet(model, 0.3, **patterns)
    assert state_of(model) == state


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"reaches no attention.*in exclude"):
        quiet(tiny_vit(), 0.3, exclude="*")
    with pytest.raises(ValueError, match=r"reaches no attention.*queries start at zero"):
        quiet(build("detr"), 0.3, include="model.decoder.layers.0.self_attn")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ratio": 1.0}, ValueError, "`ratio` must lie in"),
        ({"ratio": -0.1}, ValueError, "must lie in"),
        ({"ratio": float("nan")}, ValueError, "must lie in"),
        ({"ratio": "0.3"}, TypeError, "Pass for example ratio=0.1"),
        ({"ratio": 0.1, "final_ratio": 1.0}, ValueError, "`final_ratio` must lie in"),
        ({"ratio": 0.1, "final_ratio": 0.2}, ValueError, "must not exceed"),
        ({"ratio": 0.1, "schedule": "cosine"}, ValueError, "Unknown `schedule` 'cosine'.*'decreasing'"),
        ({"ratio": 0.1, "pattern": "column"}, ValueError, "Unknown `pattern` 'column'.*'score'"),
        ({"ratio": 0.1, "window": 0}, ValueError, "`window` must be .*at least 1"),
        ({"ratio": 0.1, "backend": "flash_attention_2"}, ValueError, "'eager'"),
        ({}, ValueError, "No drop ratio"),
    ],
)
def test_bad_settings_change_nothing(settings: dict[str, Any], error: type, message: str) -> None:
    model = tiny_vit()
    state = state_of(model)
    with pytest.raises(error, match=message):
        quiet(model, **settings)
    assert state_of(model) == state


def test_defaults_are_those_of_the_docstring() -> None:
    model = tiny_vit()
    report = quiet(model, 0.3)
    assert [site.ratio for site in report.sites] == pytest.approx([0.3, 0.15, 0.0])
    remembered = {name: getattr(model.config, f"dropkey_{name}") for name in SETTING_NAMES}
    assert remembered == {
        "ratio": 0.3,
        "final_ratio": 0.0,
        "schedule": "decreasing",
        "pattern": "score",
        "window": 3,
        "include": ["*"],
        "exclude": [],
        "cross_attention": False,
        "with_attention_dropout": False,
    }
    assert quiet(model, 0.3, window=1).sites and model.config.dropkey_window == 1


def test_an_unknown_backend_is_named_before_transformers_is_asked() -> None:
    with pytest.raises(ValueError, match=r"Unknown `backend` 'flash_attention_2'"):
        quiet(tiny_vit(), 0.3, backend="flash_attention_2")
    assert quiet(tiny_vit(), 0.3, backend="eager", pattern="token").sites[0].backend == "eager"


def test_settings_that_no_attention_follows_are_noticed() -> None:
    model = tiny_vit()
    assert forgotten_ratio(model) is None and not warn_if_forgotten(model)
    quiet(model, 0.3)
    assert forgotten_ratio(model) is None and not warn_if_forgotten(model)
    remove_dropkey(model)
    model.config.dropkey_ratio = 0.3
    assert forgotten_ratio(model) == 0.3 and warn_if_forgotten(model)
    model.config.dropkey_ratio = 0
    assert forgotten_ratio(model) is None
    assert forgotten_ratio(torch.nn.Linear(2, 2)) is None


def test_attention_dropout_beside_dropkey_must_be_asked_for() -> None:
    model = tiny_vit(attention_probs_dropout_prob=0.1)
    with pytest.raises(ValueError, match="`attention_probs_dropout_prob` 0.1"):
        quiet(model, 0.3)
    quiet(model, 0.3, with_attention_dropout=True)
    assert model.config.dropkey_with_attention_dropout


def test_ratio_zero_is_plain_attention_and_says_so() -> None:
    model = tiny_vit().train()
    plain = loss_of(model, pixels(), 0)
    report = quiet(model, 0)
    assert "nothing is dropped" in str(report)
    assert torch.equal(loss_of(model, pixels(), 0), plain)


def test_the_report_is_printed_as_a_table(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("siglip")
    report = apply_dropkey(model, 0.3, verbose=True)
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    assert "encoder.layers.0.self_attn" in printed and "encoder self" in printed and "sdpa" in printed
    assert "head: torch.nn.MultiheadAttention" in printed
    assert "replaces" not in printed
    apply_dropkey(model, 0.2, verbose=True)
    assert "replaces the settings of an earlier call" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    apply_dropkey(model, 0.2, verbose=True)
    assert capsys.readouterr().out == ""


def test_the_report_is_logged_at_the_verbosity_of_transformers(capsys: pytest.CaptureFixture) -> None:
    usual, logger, shown = transformers.logging.get_verbosity(), logging.getLogger("transformers.dropkey"), []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        transformers.logging.set_verbosity_info()
        report = apply_dropkey(build("siglip"), 0.3)
        transformers.logging.set_verbosity_warning()
        apply_dropkey(build("siglip"), 0.3)
    finally:
        logger.removeHandler(handler)
        transformers.logging.set_verbosity(usual)
    assert shown == [str(report)] and capsys.readouterr().out == ""


# --- per instance -----------------------------------------------------------------------------------------------------


def test_models_that_share_a_configuration_do_not_touch_each_other() -> None:
    config = hf.ViTConfig(**VIT)
    patched, plain = hf.ViTForImageClassification(config).train(), hf.ViTForImageClassification(config).train()
    before = loss_of(plain, pixels(), 0)
    quiet(patched, 0.5)
    assert torch.equal(loss_of(plain, pixels(), 0), before)
    assert not list(dropkey_modules(plain))
    assert not torch.equal(loss_of(patched, pixels(), 0), loss_of(patched, pixels(), 1))


def test_one_tower_of_two() -> None:
    model = build("clip").train()
    report = quiet(model, 0.5, include="vision_model.*")
    assert {site.name.split(".")[0] for site in report.sites} == {"vision_model"}
    inputs = ARCHITECTURES["clip"].inputs()
    torch.manual_seed(0)
    first = model(**inputs)
    torch.manual_seed(1)
    second = model(**inputs)
    assert torch.equal(first.text_embeds, second.text_embeds)
    assert not torch.equal(first.image_embeds, second.image_embeds)


def test_a_copy_is_its_own_model() -> None:
    model = tiny_vit().train()
    quiet(model, 0.5)
    copied = copy.deepcopy(model)
    expected = loss_of(model, pixels(), 0)
    remove_dropkey(model)
    assert torch.equal(loss_of(copied, pixels(), 0), expected)
    remove_dropkey(copied)
    assert torch.equal(loss_of(copied, pixels(), 0), loss_of(model, pixels(), 1))
    assert not list(dropkey_modules(copied))


def test_a_context_puts_everything_back() -> None:
    model = tiny_vit()
    state = state_of(model)
    with dropkey(model, 0.3, backend="eager", verbose=False) as report:
        assert [site.backend for site in report.sites] == ["eager"] * 3
        assert model.config._attn_implementation == "eager"
    assert state_of(model) == state
    quiet(model, 0.2, final_ratio=0.1, backend="eager")
    with dropkey(model, 0.3, backend="sdpa", verbose=False):
        assert model.config._attn_implementation == "sdpa"
    inside = state_of(model)
    assert model.config._attn_implementation == "eager"

    def fail() -> None:
        with dropkey(model, 0.6, backend="sdpa", verbose=False):
            assert ratios(model) == pytest.approx([0.6, 0.35, 0.1])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert state_of(model) == inside
    remove_dropkey(model)
    assert state_of(model) == state


def test_disabled_and_active_overrule_the_mode() -> None:
    model = tiny_vit().train()
    quiet(model, 0.5)
    with dropkey_disabled(model):
        assert torch.equal(loss_of(model, pixels(), 0), loss_of(model, pixels(), 1))
    assert not torch.equal(loss_of(model, pixels(), 0), loss_of(model, pixels(), 1))
    model.eval()
    assert torch.equal(loss_of(model, pixels(), 0), loss_of(model, pixels(), 1))
    with dropkey_active(model):
        assert not torch.equal(loss_of(model, pixels(), 0), loss_of(model, pixels(), 1))
        with dropkey_disabled(model):
            assert torch.equal(loss_of(model, pixels(), 0), loss_of(model, pixels(), 1))
    assert torch.equal(loss_of(model, pixels(), 0), loss_of(model, pixels(), 1))
    with pytest.raises(ValueError, match="drops no keys"), dropkey_active(tiny_vit()):
        pass


# --- models of this package -------------------------------------------------------------------------------------------


def test_a_dropkey_vit_takes_other_settings_and_gives_them_back() -> None:
    model = DropKeyViTForImageClassification(DropKeyViTConfig(**VIT, dropkey_ratio=0.3))
    before = ratios(model)
    config = model.config.to_dict()
    report = quiet(model, 0.4, schedule="increasing", pattern="key", exclude="*.1.*")
    assert [site.ratio for site in report.sites] == [0.0, 0.4]
    # what is left out drops nothing, whatever its own configuration had for it
    assert ratios(model) == [0.0, 0.0, 0.4]
    assert model.config.dropkey_schedule == "increasing"
    assert all(type(module).__name__ == "DropKeyViTAttention" for _, module in dropkey_modules(model))
    model.train()
    assert not torch.equal(loss_of(model, pixels(), 0), loss_of(model, pixels(), 1))
    model.eval()
    with dropkey_active(model):
        assert not torch.equal(loss_of(model, pixels(), 0), loss_of(model, pixels(), 1))
    remove_dropkey(model)
    assert ratios(model) == before
    assert model.config.to_dict() == config


def test_only_stock_attentions_get_what_ours_have_by_themselves() -> None:
    """A view of their configuration, the ratio as data, and the size of the images."""
    stock, ours = tiny_vit(), DropKeyViTForImageClassification(DropKeyViTConfig(**VIT, dropkey_ratio=0.3))
    for model, changed in ((stock, True), (ours, False)):
        quiet(model, 0.2)
        for _, module in dropkey_modules(model):
            assert isinstance(module.config, DropKeyConfigView) == changed
            assert ("dropkey_pixels" in vars(module)) == (hasattr(type(module), "dropkey_plain_class")) == changed
            assert "dropkey_ratio_tensor" in vars(module)


def test_active_in_eval_does_not_switch_attention_dropout_on() -> None:
    config = DropKeyViTConfig(
        **VIT, dropkey_ratio=1e-9, attention_probs_dropout_prob=0.5, dropkey_with_attention_dropout=True
    )
    model = DropKeyViTForImageClassification(config).eval()
    with dropkey_active(model):
        assert torch.equal(loss_of(model, pixels(), 0), loss_of(model, pixels(), 1))


def test_a_backend_asked_for_is_taken_and_given_back() -> None:
    model = tiny_vit().train()
    quiet(model, 0.3, backend="eager")
    assert len(model(**pixels(), output_attentions=True).attentions) == 3
    remove_dropkey(model)
    assert model.config._attn_implementation == "sdpa"
    quiet(model, 0.3, backend="eager")
    model.set_attn_implementation("sdpa")
    model.set_attn_implementation("eager")
    quiet(model, 0.2)
    assert model.config._attn_implementation == "eager"


def test_a_backend_the_architecture_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="'flex_attention'|does not support"):
        quiet(build("swin"), 0.3, backend="flex_attention")


def test_a_model_on_the_meta_device_is_patched_before_it_has_weights() -> None:
    with torch.device("meta"):
        model = tiny_vit()
    quiet(model, 0.5)
    model.to_empty(device="cpu")
    model.load_state_dict(tiny_vit().state_dict())
    assert not torch.equal(loss_of(model.train(), pixels(), 0), loss_of(model, pixels(), 1))


# --- saving and loading -----------------------------------------------------------------------------------------------


LOAD_PLAIN = """
import json, sys
sys.modules["hf_dropkey"] = None  # importing the package now fails
import torch
from transformers import AutoModelForImageClassification
folder = sys.argv[1]
model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
expected = torch.load(folder + "/expected.pt", weights_only=True)
assert torch.equal(model.eval()(expected["pixels"]).logits, expected["logits"])
"""


def test_a_patched_model_saves_a_plain_checkpoint_that_remembers(tmp_path: Path) -> None:
    model = tiny_vit()
    quiet(model, 0.4, final_ratio=0.1, include="vit.*", exclude="*.1.*", pattern="key", window=2, backend="eager")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "vit" and config["architectures"] == ["ViTForImageClassification"]
    assert not [name for name in config if "auto_map" in name or "attn_implementation" in name]

    loaded = hf.ViTForImageClassification.from_pretrained(tmp_path)
    assert not list(dropkey_modules(loaded))
    quiet(loaded)
    assert ratios(loaded) == pytest.approx([0.4, 0.1])
    assert all(module.dropkey_pattern == "key" and module.dropkey_window == 2 for _, module in dropkey_modules(loaded))
    loaded = hf.ViTForImageClassification.from_pretrained(tmp_path, dropkey_ratio=0.2)
    quiet(loaded)
    assert ratios(loaded) == pytest.approx([0.2, 0.1])


@pytest.mark.slow
def test_a_patched_models_checkpoint_opens_without_this_package(tmp_path: Path) -> None:
    model = tiny_vit()
    quiet(model, 0.4)
    model.save_pretrained(tmp_path)
    model.set_attn_implementation("sdpa")
    expected = {"pixels": pixels()["pixel_values"], "logits": model.eval()(**pixels()).logits.detach()}
    torch.save(expected, tmp_path / "expected.pt")
    subprocess.run([sys.executable, "-c", LOAD_PLAIN, str(tmp_path)], check=True, timeout=300)


# --- adapters and processes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_before_and_after(order: str) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_dropout=0.0)
    model: Any = tiny_vit()
    if order == "before":
        quiet(model, 0.5)
    model = peft.get_peft_model(model, lora)
    if order == "after":
        report = quiet(model, 0.5)
        assert report.sites[0].name == "vit.layers.0.attention"
    model.train()
    loss = loss_of(model, pixels(), 0)
    assert not torch.equal(loss_of(model, pixels(), 1), loss)
    loss.backward()
    adapters = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert adapters and all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in adapters.values())
    model.eval()
    plain = loss_of(model, pixels(), 0)
    merged = model.merge_and_unload()
    remove_dropkey(merged)
    torch.testing.assert_close(loss_of(merged, pixels(), 0), plain)


DDP = """
import sys, torch, torch.distributed as dist
import transformers as hf
from torch.nn.parallel import DistributedDataParallel
from hf_dropkey.training.callbacks import seed_process
from hf_dropkey.patching import apply_dropkey, dropkey_modules
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
config = hf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8)
model = hf.ViTForImageClassification(config).train()
apply_dropkey(model, 0.5, verbose=False)
model = DistributedDataParallel(model)
assert len(list(dropkey_modules(model))) == 2
apply_dropkey(model, 0.4, verbose=False)
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
def everyone(value):
    parts = [torch.zeros_like(value) for _ in range(2)]
    dist.all_gather(parts, value.detach())
    return parts
torch.manual_seed(0)
same = everyone(model(images).logits)
assert torch.equal(*same), "seeded alike, the processes drop the same keys"
seed_process(0, rank)
output = model(images).logits
assert not torch.equal(*everyone(output)), "seeded per process, they drop others"
seed_process(0, rank)
assert torch.equal(model(images).logits, output)
output.square().sum().backward()
gradient = model.module.vit.layers[0].attention.q_proj.weight.grad
assert torch.equal(*everyone(gradient)) and gradient.abs().sum() > 0
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DDP]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
