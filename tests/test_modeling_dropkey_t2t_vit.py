"""DropKeyT2TViT beside the official model: the same numbers with and without drops, and Transformers' features."""

import math
from typing import Any

import pytest
import torch
from architecture_suite import ArchitectureSuite, pytest_parameters

from hf_dropkey.models.configuration_dropkey_t2t_vit import DropKeyT2TViTConfig
from hf_dropkey.models.counter_hash import draw_seed
from hf_dropkey.models.modeling_dropkey_t2t_vit import (
    DropKeyT2TViTForImageClassification,
    DropKeyT2TViTModel,
    sinusoid_positions,
)
from hf_dropkey.models.patterns import PATTERNS, dropped_scores, protect_rows


STAGES = {
    "tokens_to_token.attention1": "t2t_vit.embeddings.token_stages.0",
    "tokens_to_token.attention2": "t2t_vit.embeddings.token_stages.1",
    "tokens_to_token": "t2t_vit.embeddings.projection",
    "blocks.0": "t2t_vit.layers.0",
    "blocks.1": "t2t_vit.layers.1",
    "blocks.2": "t2t_vit.layers.2",
    "norm": "t2t_vit.layernorm",
}
TOKEN_SITES = {
    "tokens_to_token.attention1": "t2t_vit.embeddings.token_stages.0.attention",
    "tokens_to_token.attention2": "t2t_vit.embeddings.token_stages.1.attention",
}
LAYER_SITES = {f"blocks.{index}.attn": f"t2t_vit.layers.{index}.attention" for index in range(3)}
OFFICIAL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2, "token_size": 32}


def in_layers(site: str) -> bool:
    """Whether an official attention site is in a transformer layer."""
    return site.startswith("blocks.")


def everywhere(site: str) -> bool:
    """True of every site."""
    return True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pytest_parameters(metafunc)


class TestT2TViT(ArchitectureSuite):
    """The suite, and what only T2T-ViT has."""

    family = "t2t_vit"
    config_class = DropKeyT2TViTConfig
    model_class = DropKeyT2TViTModel
    classifier_class = DropKeyT2TViTForImageClassification
    patterns = PATTERNS
    tiny = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "mlp_ratio": 2,
        "token_size": 8,
        "token_stage": "transformer",
        "dropkey_token_stage": True,
        "image_size": 48,
        "num_labels": 5,
    }
    fixtures = {
        "t2t_transformer": {
            "config": {**OFFICIAL, "token_stage": "transformer"},
            "stages": STAGES,
            "sites": {**TOKEN_SITES, **LAYER_SITES},
            "drops": {"logits_all": everywhere, "logits_blocks_only": in_layers},
        },
        "t2t_performer": {
            "config": {**OFFICIAL, "token_stage": "performer"},
            "stages": STAGES,
            "sites": {**TOKEN_SITES, **LAYER_SITES},
            "drops": {"logits_all_with_performer": everywhere, "logits_all": in_layers},
        },
    }
    sizes = {
        "t2t_vit_7": (4_310_222, 4_255_694, 111),
        "t2t_vit_10": (5_889_230, 5_834_702, 144),
        "t2t_vit_12": (6_941_902, 6_887_374, 166),
        "t2t_vit_14": (21_545_550, 21_465_806, 188),
        "t2t_vit_19": (39_177_422, 39_085_070, 243),
        "t2t_vit_24": (64_105_934, 64_000_974, 298),
        "t2t_vit_t_14": (21_541_070, 21_465_422, 184),
        "t2t_vit_t_19": (39_172_942, 39_084_686, 239),
        "t2t_vit_t_24": (64_101_454, 64_000_590, 294),
        "t2t_vit_14_resnext": (21_545_550, 21_465_806, 188),
        "t2t_vit_14_wide": (25_156_302, 25_000_910, 78),
    }
    hidden_shapes = [(3, 10, 32)] * 3
    attention_shapes = [(3, 4, 10, 10)] * 2
    enabled_sites = [
        ({"dropkey_token_stage": False}, [f"t2t_vit.layers.{index}.attention" for index in range(2)]),
        (
            {"dropkey_token_stage": True},
            [f"t2t_vit.embeddings.token_stages.{index}.attention" for index in range(2)]
            + [f"t2t_vit.layers.{index}.attention" for index in range(2)],
        ),
    ]

    def as_mask(self, site: str, mask: torch.Tensor) -> torch.Tensor:
        # a performer's mask is one row of scores per image
        return mask[:, None, None] if mask.ndim == 2 else mask

    def performer(self, **kwargs: Any) -> Any:
        """The tiny classifier with performer token stages and no dropout."""
        return self.build(token_stage="performer", performer_dropout_prob=0.0, **kwargs)

    @pytest.mark.parametrize("dropkey_pattern", PATTERNS)
    def test_performer_without_a_key_is_the_performer_of_the_other_keys(self, dropkey_pattern: str) -> None:
        """Leaving a key out of both sums is the same as never having had it."""
        model = self.performer(
            dropkey_schedule="constant", dropkey_ratio=0.5, **self.pattern_settings(dropkey_pattern)
        )
        stage = model.t2t_vit.embeddings.token_stages[0].attention.double()
        tokens = torch.randn(2, 144, 147, dtype=torch.float64)
        stage.train()
        torch.manual_seed(3)
        found = stage(tokens, (12, 12))
        key, query, value = stage.kqv(tokens).chunk(3, dim=-1)
        key, query = stage.features(key), stage.features(query)
        weights = query @ key.transpose(1, 2)
        # one row of scores per image
        torch.manual_seed(3)
        drawn = dropped_scores(
            draw_seed(tokens.device), (2, 1, 1, 144), 0.5, pattern=dropkey_pattern, window=2, grid=(12, 12)
        )
        dropped = protect_rows(drawn)[:, 0, 0]
        assert 0.2 < dropped.double().mean() < 0.8
        for image in range(2):
            kept = ~dropped[image]
            row = weights[image][:, kept]
            expected = row @ value[image, kept] / (row.sum(-1, keepdim=True) + 1e-8)
            torch.testing.assert_close(found[image], value[image] + stage.o_proj(expected))

    def test_performer_drops_only_on_request(self) -> None:
        quiet, dropping = self.performer(dropkey_token_stage=False), self.performer(dropkey_token_stage=True)
        for model, changes in ((quiet, False), (dropping, True)):
            stages = model.t2t_vit.embeddings.train()
            outputs = [stages(self.pixels()) for _ in range(2)]
            assert torch.equal(*outputs) != changes

    def test_performer_never_loses_all_keys(self) -> None:
        model = self.performer(dropkey_ratio=0.99, dropkey_schedule="constant", image_size=16).train()
        # at 16 pixels the second stage has 4 keys: nearly all images would lose all of them
        assert torch.isfinite(model(self.pixels(64, 16, 16)).logits).all()
        stage = model.t2t_vit.embeddings.token_stages[1].attention
        tokens = torch.randn(64, 4, 72)
        _, _, value = stage.kqv(tokens).chunk(3, dim=-1)
        without_keys = value + stage.o_proj(torch.zeros_like(value))
        difference = (stage(tokens, (2, 2)) - without_keys).flatten(1).norm(dim=1)
        assert (difference > 1e-4).all()

    def test_performer_is_exact_under_autocast(self) -> None:
        model = self.performer()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(self.pixels()).logits
        assert low.dtype == torch.bfloat16
        assert torch.isfinite(low).all()
        features = model.t2t_vit.embeddings.token_stages[0].attention.features
        assert features(torch.randn(1, 4, 8)).dtype == torch.float32

    def test_performer_directions_are_orthogonal_rows_of_length_root_m(self) -> None:
        directions = self.performer().t2t_vit.embeddings.token_stages[0].attention.directions
        assert not directions.requires_grad
        torch.testing.assert_close(directions @ directions.T, len(directions) * torch.eye(len(directions)))

    def test_performer_directions_stay_fixed_when_everything_is_unfrozen(self) -> None:
        model = self.performer().train().requires_grad_(True)
        model(self.pixels(), labels=self.labels()).loss.backward()
        missing = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        assert missing == {f"t2t_vit.embeddings.token_stages.{index}.attention.directions" for index in range(2)}

    def test_published_dropout_of_the_performer_is_on_in_training(self) -> None:
        model = self.build(token_stage="performer", dropkey_ratio=0.0).train()
        assert not torch.equal(model(self.pixels()).logits, model(self.pixels()).logits)
        quiet = self.performer(dropkey_ratio=0.0).train()
        assert torch.equal(quiet(self.pixels()).logits, quiet(self.pixels()).logits)

    def test_positions_are_sinusoids_of_the_token_index(self) -> None:
        table = self.build().t2t_vit.embeddings.position_embeddings
        assert torch.equal(table, sinusoid_positions(10, 32))
        for token, column in ((0, 0), (0, 1), (3, 4), (9, 31)):
            angle = token / 10000 ** (2 * (column // 2) / 32)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert table[0, token, column].item() == pytest.approx(expected, abs=1e-6)

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointed_performer_gives_bit_equal_gradients(self, use_reentrant: bool) -> None:
        gradients = []
        for checkpointing in (False, True):
            model = self.build(token_stage="performer").train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            torch.manual_seed(7)
            model(self.pixels(), labels=self.labels()).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        for one, other in zip(*gradients, strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"token_stage": "convolution"}, "'performer', 'transformer'"),
            ({"token_size": 7}, "even and positive, got 7"),
            ({"dropkey_pattern": "block", "dropkey_window": 4}, "between 1 and 3.*3 x 3 patch grid, got 4"),
        ],
    )
    def test_t2t_settings_that_make_no_sense_are_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(Exception, match=message) as caught:
            self.config_class(**{**self.tiny, **settings})
        assert "StrictDataclass" in type(caught.value).__name__
