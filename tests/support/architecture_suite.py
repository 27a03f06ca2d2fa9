"""What holds for every architecture of this package, as one class of tests that each family's test file inherits.

Imports torch, pytest, transformers, the package, and its neighbour `architecture_parity`.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from architecture_parity import (
    Fixture,
    assert_gradient_norms,
    assert_near,
    forced_drops,
    load_official,
    load_script,
    recorded_outputs,
)
from safetensors.torch import load_file
from torch import nn
from transformers.utils import output_capturing


BACKENDS = ["eager", "sdpa"]

LOAD_BY_REMOTE_CODE = """
import sys
sys.modules["hf_dropkey"] = None  # importing the package now fails
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
folder, expected = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
expected = torch.load(expected, weights_only=True)
assert torch.equal(model(expected["pixels"]).logits, expected["logits"])
base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert torch.equal(base(expected["pixels"]).pooler_output, expected["pooled"])
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.dropkey_ratio == 0.3
model.train()
assert not torch.equal(model(expected["pixels"]).logits, model(expected["pixels"]).logits)
"""


class ArchitectureSuite:
    """Tests of one family; a subclass fills in the attributes."""

    family: ClassVar[str]
    config_class: ClassVar[Any]
    model_class: ClassVar[Any]
    classifier_class: ClassVar[Any]
    # a configuration small enough for every test, of images of 48 pixels and 5 classes
    tiny: ClassVar[dict[str, Any]]
    # by fixture name: settings, stages (official -> our module names), sites in order of execution (the same), and
    # which sites drop in each of the official outputs
    fixtures: ClassVar[dict[str, dict[str, Any]]]
    # size name -> total and trainable values, state dict entries
    sizes: ClassVar[dict[str, tuple[int, int, int]]]
    # what can be dropped together
    patterns: ClassVar[tuple[str, ...]]
    # settings, and the attentions that drop then, in order of execution
    enabled_sites: ClassVar[list[tuple[dict[str, Any], list[str]]]]
    hidden_shapes: ClassVar[list[tuple[int, ...]]]
    attention_shapes: ClassVar[list[tuple[int, ...]]]

    # --- builders

    def build(self, **kwargs: Any) -> Any:
        """The tiny classifier in eval mode, the same weights every time."""
        torch.manual_seed(0)
        settings = {**self.tiny, "dropkey_ratio": 0.3, **kwargs}
        return self.classifier_class(self.config_class(**settings)).eval()

    def pixels(self, batch: int = 3, height: int = 48, width: int = 48) -> torch.Tensor:
        """Random images."""
        return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(5))

    def labels(self) -> torch.Tensor:
        """Their classes."""
        return torch.arange(3)

    def sites(self, model: nn.Module) -> dict[str, Any]:
        """Every attention that can drop keys, by name, in order of definition."""
        return {name: module for name, module in model.named_modules() if hasattr(module, "dropkey_ratio")}

    def official(self, name: str, dtype: torch.dtype = torch.float64, **kwargs: Any) -> tuple[Any, Fixture]:
        """The classifier with a fixture's weights, and the fixture."""
        fixture = Fixture(name)
        config = self.config_class(**self.fixtures[name]["config"], image_size=64, num_labels=10, **kwargs)
        return load_official(self.classifier_class(config), fixture, self.family, dtype), fixture

    # --- the official models' numbers

    def test_stages_and_logits_in_float64(self, fixture_name: str, backend: str) -> None:
        model, fixture = self.official(fixture_name, attn_implementation=backend)
        stages = self.fixtures[fixture_name]["stages"]
        expected = fixture.below("f64/inter/")
        assert set(stages) == set(expected), "the table of stages does not cover the fixture"
        found = recorded_outputs(model, list(stages.values()), fixture.pixels())
        for official, ours in stages.items():
            assert_near(found[ours], self.as_ours(official, expected[official]), 1e-10)
        assert_near(found["logits"], fixture.tensors["f64/logits"], 1e-10)

    def as_ours(self, stage: str, expected: torch.Tensor) -> torch.Tensor:
        """An official stage's output in the layout of ours."""
        return expected

    def as_mask(self, site: str, mask: torch.Tensor) -> torch.Tensor:
        """An official drop mask as `[B, H, N, M]`."""
        return mask

    def test_logits_in_float32(self, fixture_name: str, backend: str) -> None:
        model, fixture = self.official(fixture_name, torch.float32, attn_implementation=backend)
        assert_near(model(fixture.pixels(torch.float32)).logits, fixture.tensors["f32/logits"], 2e-5)

    def test_given_drops(self, fixture_name: str, backend: str) -> None:
        model, fixture = self.official(fixture_name, attn_implementation=backend)
        about = self.fixtures[fixture_name]
        masks = fixture.below("drop/mask/")
        assert set(about["sites"]) == set(masks), "the table of sites does not cover the fixture"
        assert {f"drop/{name}" for name in about["drops"]} == set(fixture.below("f64/")) & {
            f"drop/{name}" for name in fixture.below("f64/drop/")
        }
        plain = model(fixture.pixels()).logits
        for output, dropping in about["drops"].items():
            chosen = {ours: self.as_mask(site, masks[site]) for site, ours in about["sites"].items() if dropping(site)}
            with forced_drops(model, chosen), torch.no_grad():
                logits = model(fixture.pixels()).logits
            assert_near(logits, fixture.tensors[f"f64/drop/{output}"], 1e-10)
            assert (logits - plain).abs().max() > 1e-4, "the drops changed nothing"

    def test_gradient_norms(self, fixture_name: str) -> None:
        model, fixture = self.official(fixture_name)
        assert_gradient_norms(model, fixture, self.family)

    def test_official_names_map_one_to_one(self, fixture_name: str) -> None:
        fixture = Fixture(fixture_name)
        rename = load_script("convert_checkpoint").FAMILIES[self.family].rename
        official = list(fixture.about["state_dict"])
        assert len({rename(name) for name in official}) == len(official)
        config = self.config_class(**self.fixtures[fixture_name]["config"], image_size=64, num_labels=10)
        assert {rename(name) for name in official} == set(self.classifier_class(config).state_dict())

    def test_published_sizes_have_the_published_parameters(self, size: str) -> None:
        total, trainable, entries = self.sizes[size]
        with torch.device("meta"):
            model = self.classifier_class(self.config_class.from_size(size, num_labels=1000))
        state = model.state_dict()
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        counted = sum(value.numel() for name, value in state.items() if not name.endswith(statistics))
        assert (counted, len(state)) == (total, entries)
        assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == trainable

    # --- what DropKey does

    def test_eval_and_ratio_zero_are_bit_identical_to_the_plain_model(self, backend: str) -> None:
        dropping, plain = (self.build(dropkey_ratio=ratio, attn_implementation=backend) for ratio in (0.3, 0.0))
        assert torch.equal(dropping(self.pixels()).logits, plain(self.pixels()).logits)
        losses = []
        for model in (plain.train(), self.build(attn_implementation=backend).train()):
            for module in self.sites(model).values():
                module.dropkey_ratio = 0.0
            torch.manual_seed(1)
            losses.append(model(self.pixels(), labels=self.labels()).loss)
        assert torch.equal(*losses)

    def test_backends_agree_in_training(self, pattern: str) -> None:
        gradients = []
        for backend in BACKENDS:
            model = self.build(attn_implementation=backend, **self.pattern_settings(pattern)).double().train()
            torch.manual_seed(1)
            model(self.pixels().double(), labels=self.labels()).loss.backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        for name, gradient in gradients[0].items():
            if gradient is not None:
                torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-6, atol=1e-9)

    def pattern_settings(self, pattern: str) -> dict[str, Any]:
        """The settings that a pattern needs on images of 48 pixels, which have 3 x 3 patches."""
        return {"dropkey_pattern": pattern, "dropkey_window": 2}

    def test_training_drops_at_the_given_ratio(self) -> None:
        model = self.build(attn_implementation="eager", dropkey_schedule="constant").train()
        for weights in model(self.pixels(32), output_attentions=True).attentions:
            found = (weights == 0).double()
            # a row of few keys that would lose all drops none
            expected = 0.3 - 0.3 ** weights.shape[-1]
            assert abs(found.mean().item() - expected) < 5 * (0.21 / found.numel()) ** 0.5 + 1e-3

    def test_schedule_runs_over_the_enabled_sites(self, enabled: dict[str, Any], sites: list[str]) -> None:
        model = self.build(dropkey_ratio=0.4, dropkey_final_ratio=0.1, **enabled)
        found = {name: module.dropkey_ratio for name, module in self.sites(model).items()}
        ramp = {name: 0.4 - 0.3 * index / (len(sites) - 1) for index, name in enumerate(sites)}
        assert {name: pytest.approx(ramp.get(name, 0.0)) for name in found} == found
        assert set(sites) <= set(found)

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_activation_checkpointing_gives_bit_equal_gradients(self, backend: str, use_reentrant: bool) -> None:
        results = []
        for checkpointing in (False, True):
            model = self.build(hidden_dropout_prob=0.1, drop_path_rate=0.2, attn_implementation=backend).train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            torch.manual_seed(7)
            model(self.pixels(), labels=self.labels()).loss.backward()
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            results.append({**gradients, **dict(model.named_buffers())})
        for name, value in results[0].items():
            other = results[1][name]
            assert value is other is None or torch.equal(value, other), name

    def test_flash_attention_is_refused_in_training_only(self) -> None:
        model = self.build().train()
        model.config._attn_implementation_internal = "flash_attention_2"
        with pytest.raises(ValueError, match="'flash_attention_2' cannot leave out single attention scores"):
            model(self.pixels())

    # --- features of Transformers

    def test_learns_a_batch(self) -> None:
        model = self.build(dropkey_ratio=0.1).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(20):
            loss = model(self.pixels(), labels=self.labels()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2

    @pytest.mark.slow
    def test_compiles_without_graph_breaks(self) -> None:
        torch._dynamo.reset()
        model = self.build(problem_type="single_label_classification").train()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for seed in (1, 2):
            losses = []
            for one in (model, compiled):
                torch.manual_seed(seed)
                losses.append(one(self.pixels(), labels=self.labels()).loss)
            torch.testing.assert_close(*losses)
        losses[1].backward()

    @pytest.mark.slow
    def test_exports_in_eval(self) -> None:
        model = self.build()
        program = torch.export.export(model, (self.pixels(),), strict=False)
        torch.testing.assert_close(program.module()(self.pixels()).logits, model(self.pixels()).logits)

    def test_half_precision_trains(self, backend: str) -> None:
        model = self.build(dropkey_ratio=0.9, attn_implementation=backend).to(torch.bfloat16).train()
        model(self.pixels().bfloat16(), labels=self.labels()).loss.backward()
        for parameter in model.parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all()

    def test_records_hidden_states_and_attentions(self) -> None:
        model = self.build(attn_implementation="eager").train()
        output = model(self.pixels(), output_hidden_states=True, output_attentions=True)
        assert [tuple(state.shape) for state in output.hidden_states] == self.hidden_shapes
        assert [tuple(weights.shape) for weights in output.attentions] == self.attention_shapes
        for weights in output.attentions:
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        # releases that can choose layers count from the end as Python does
        if hasattr(output_capturing, "selected_hidden_states"):
            last = model(self.pixels(), output_hidden_states=-1).hidden_states
            assert [state is not None for state in last] == [False] * (len(self.hidden_shapes) - 1) + [True]
        as_tuple = model.eval()(self.pixels(), return_dict=False)
        assert torch.equal(as_tuple[0], model(self.pixels()).logits)

    def test_losses_heed_the_number_of_items(self) -> None:
        model = self.build()
        targets = {
            "single_label_classification": self.labels(),
            "multi_label_classification": torch.rand(3, 5),
            "regression": torch.rand(3, 5),
        }
        for problem_type, labels in targets.items():
            model.config.problem_type = problem_type
            mean = model(self.pixels(), labels=labels).loss
            count = torch.tensor(2 * labels.numel())
            torch.testing.assert_close(model(self.pixels(), labels=labels, num_items_in_batch=count).loss, mean / 2)

    def test_subclasses_with_any_name_have_the_classification_loss(self) -> None:
        subclass = type("Mine", (self.classifier_class,), {})
        model = subclass(self.config_class(**self.tiny)).eval()
        assert model(self.pixels(), labels=self.labels()).loss.ndim == 0

    def test_whole_layers_stay_on_one_device(self) -> None:
        names = {type(module).__name__ for module in self.build().modules()}
        assert set(self.model_class._no_split_modules) <= names

    # --- checkpoints

    def test_saved_models_load_whole(self, tmp_path: Path) -> None:
        model = self.build()
        with torch.no_grad():
            # nothing may be recomputed while loading, fixed tables included
            for value in model.state_dict().values():
                if value.is_floating_point():
                    value.add_(torch.rand_like(value) * 0.1)
        model.save_pretrained(tmp_path)
        again, report = self.classifier_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for name, value in model.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name
        assert torch.equal(model(self.pixels()).logits, again.eval()(self.pixels()).logits)
        base = self.model_class.from_pretrained(tmp_path).eval()
        assert torch.equal(base(self.pixels()).pooler_output, model.base_model(self.pixels()).pooler_output)
        # what `Trainer` does to resume and to load its best checkpoint
        other = self.classifier_class(self.config_class(**self.tiny)).eval()
        other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
        assert torch.equal(model(self.pixels()).logits, other(self.pixels()).logits)

    def test_models_load_in_half_precision(self, tmp_path: Path) -> None:
        model = self.build()
        model.save_pretrained(tmp_path)
        half = self.classifier_class.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        logits = half(self.pixels()).logits
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits.float(), model(self.pixels()).logits, atol=0.05, rtol=0.05)

    def test_a_partial_checkpoint_leaves_fresh_weights_finite(self, tmp_path: Path) -> None:
        self.build().base_model.save_pretrained(tmp_path)
        model, report = self.classifier_class.from_pretrained(tmp_path, output_loading_info=True)
        assert report["missing_keys"]
        assert all("classifier" in name for name in report["missing_keys"])
        assert all(torch.isfinite(value.float()).all() for value in model.state_dict().values())

    @pytest.mark.slow
    def test_loads_by_remote_code_in_a_fresh_process(self, tmp_path: Path) -> None:
        model = self.build()
        model.save_pretrained(tmp_path / "model")
        auto_map = json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
        assert set(auto_map) == {"AutoBackbone", "AutoConfig", "AutoModel", "AutoModelForImageClassification"}
        expected = {
            "pixels": self.pixels(),
            "logits": model(self.pixels()).logits.detach(),
            "pooled": model.base_model(self.pixels()).pooler_output.detach(),
        }
        torch.save(expected, tmp_path / "expected.pt")
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        environment.pop("HF_MODULES_CACHE", None)
        done = subprocess.run(
            [sys.executable, "-c", LOAD_BY_REMOTE_CODE, str(tmp_path / "model"), str(tmp_path / "expected.pt")],
            capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def test_deep_copies_are_equal(self) -> None:
        model = self.build()
        assert torch.equal(copy.deepcopy(model)(self.pixels()).logits, model(self.pixels()).logits)

    # --- image sizes and bad input

    def test_other_image_sizes(self) -> None:
        model = self.build()
        images = self.pixels(2, 64, 64)
        with pytest.raises(
            ValueError, match=r"64 x 64 pixels do not match the model's 48 x 48.*resize_image_size\(64"
        ):
            model(images)
        resized = model(images, interpolate_pos_encoding=True).logits
        same = model(self.pixels(), interpolate_pos_encoding=True).logits
        assert torch.equal(same, model(self.pixels()).logits)
        assert model(self.pixels(2, 32, 64), interpolate_pos_encoding=True).logits.shape == (2, 5)
        model.resize_image_size(64)
        assert model.config.image_size == 64
        assert torch.equal(model(images).logits, resized)
        fresh = self.build(image_size=64)
        assert {name: value.shape for name, value in fresh.state_dict().items()} == {
            name: value.shape for name, value in model.state_dict().items()
        }

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((1, 3, 50, 48), r"An image height of 50 pixels is not a multiple of 16.*nearest sizes are 48 and 64"),
            ((1, 3, 48, 8), r"An image width of 8 pixels.*nearest sizes are 16\b"),
            ((1, 1, 48, 48), r"must have the shape \[batch, 3, 48, 48\], got \(1, 1, 48, 48\)"),
            ((3, 48, 48), r"got \(3, 48, 48\)"),
        ],
    )
    def test_images_it_cannot_take_are_refused(self, shape: tuple[int, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.build()(torch.zeros(shape), interpolate_pos_encoding=True)

    def test_missing_images_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"got None"):
            self.build()()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"image_size": 230}, r"of 230 pixels is not a multiple of 16.*224 and 240"),
            ({"image_size": 0}, r"of 0 pixels.*nearest sizes are 16\b"),
            ({"hidden_size": 33}, r"must be a positive multiple"),
            ({"dropkey_ratio": 1.0}, r"\[0, 1\), got 1.0"),
            ({"dropkey_pattern": "column"}, "'score', 'key', 'token', 'block', 'cross'"),
            ({"attention_probs_dropout_prob": 0.1}, "DropKey replaces dropout on attention weights"),
        ],
    )
    def test_settings_that_make_no_sense_are_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(Exception, match=message) as caught:
            self.config_class(**{**self.tiny, "dropkey_ratio": 0.3, **settings})
        assert "StrictDataclass" in type(caught.value).__name__

    def test_unknown_sizes_are_refused_with_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match="Unknown size 'huge'") as caught:
            self.config_class.from_size("huge")
        assert all(name in str(caught.value) for name in self.sizes)
        assert set(self.config_class.published_sizes) == set(self.sizes)


def pytest_parameters(metafunc: Any, extra: dict[str, list[Any]] | None = None) -> None:
    """Gives the suite's tests their cases: a test file calls this from its own `pytest_generate_tests`."""
    suite = metafunc.cls
    if suite is None or not issubclass(suite, ArchitectureSuite):
        return
    cases: dict[str, Callable[[], list[Any]]] = {
        "fixture_name": lambda: list(suite.fixtures),
        "backend": lambda: BACKENDS,
        "size": lambda: list(suite.sizes),
        "pattern": lambda: list(suite.patterns),
    }
    for name, values in cases.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values())
    if "enabled" in metafunc.fixturenames:
        metafunc.parametrize(("enabled", "sites"), suite.enabled_sites)
