"""A value that no model can be made or trained with is refused when the configuration is made, by name."""

import math
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from small_runs import SHAPE
from transformers import ViTConfig

from hf_dropkey import DropKeyCeitConfig, DropKeyT2TViTConfig, DropKeyViTConfig, DropKeyVoloConfig


FAMILIES = [DropKeyViTConfig, DropKeyT2TViTConfig, DropKeyVoloConfig, DropKeyCeitConfig]
OTHERS = FAMILIES[1:]


@pytest.mark.parametrize("value", [1.0, -0.1, math.nan, math.inf])
@pytest.mark.parametrize("family", FAMILIES)
def test_ratios_lie_below_one(family: Any, value: float) -> None:
    names = ["hidden_dropout_prob", "attention_probs_dropout_prob"]
    names += ["drop_path_rate"] if family in OTHERS else []
    names += ["performer_dropout_prob"] if family is DropKeyT2TViTConfig else []
    for name in names:
        with pytest.raises(StrictDataclassError, match=rf"`{name}` must lie in \[0, 1\)"):
            family(**{name: value, "dropkey_ratio": 0.0})


@pytest.mark.parametrize(
    ("family", "fields", "told"),
    [
        (DropKeyViTConfig, {"num_attention_heads": 0}, "`num_attention_heads` must be at least 1, got 0"),
        (DropKeyViTConfig, {"num_attention_heads": 7}, r"multiple of `num_attention_heads` \(7\)"),
        (DropKeyViTConfig, {"hidden_size": -16}, "`hidden_size` must be at least 1"),
        (DropKeyViTConfig, {"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1"),
        (DropKeyViTConfig, {"intermediate_size": 0}, "`intermediate_size` must be at least 1"),
        (DropKeyViTConfig, {"num_channels": 0}, "`num_channels` must be at least 1"),
        (DropKeyViTConfig, {"patch_size": 0}, "`patch_size` must be a number of pixels.* each at least 1, got 0"),
        (DropKeyViTConfig, {"patch_size": [16, 0]}, "`patch_size` must be a number of pixels"),
        (DropKeyViTConfig, {"patch_size": 0, "dropkey_pattern": "block"}, "`patch_size` must be a number of pixels"),
        (DropKeyViTConfig, {"image_size": [224, 224, 3]}, "`image_size` must be a number of pixels"),
        (DropKeyViTConfig, {"image_size": 8}, r"`patch_size` \(16\) is larger than `image_size` \(8\)"),
        (DropKeyViTConfig, {"hidden_act": "gleu"}, "`hidden_act` 'gleu' is not an activation"),
        (DropKeyViTConfig, {"pooler_act": "tan"}, "`pooler_act` 'tan' is not an activation"),
        (DropKeyViTConfig, {"layer_norm_eps": 0.0}, "`layer_norm_eps` must be a number above 0"),
        (DropKeyViTConfig, {"initializer_range": math.nan}, "`initializer_range` must be a number of at least 0"),
        *((family, {"num_attention_heads": 0}, "`num_attention_heads`") for family in OTHERS),
        *((family, {"mlp_ratio": math.nan}, "`mlp_ratio` must be a number above 0") for family in OTHERS),
        *((family, {"stem_size": 0}, "`stem_size` must be at least 1") for family in (OTHERS[1], OTHERS[2])),
        *((family, {"hidden_act": ""}, "`hidden_act` '' is not an activation") for family in OTHERS),
        (DropKeyVoloConfig, {"num_outlook_heads": 0}, "`num_outlook_heads`"),
    ],
)
def test_fields_are_checked_when_the_configuration_is_made(family: Any, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(StrictDataclassError, match=told):
        family(**fields)


def test_usual_values_pass() -> None:
    for family in FAMILIES:
        family().validate()
    for fields in (SHAPE, {"image_size": [32, 48], "patch_size": [8, 16]}, {"hidden_dropout_prob": 0}):
        DropKeyViTConfig(**fields).validate()
    # whatever stock ViT takes by default
    DropKeyViTConfig(**ViTConfig().to_diff_dict()).validate()


def test_a_saved_value_that_cannot_be_is_told_when_it_is_read(tmp_path: Any) -> None:
    DropKeyViTConfig(**SHAPE).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"num_attention_heads": 2', '"num_attention_heads": 0'))
    with pytest.raises(StrictDataclassError, match="`num_attention_heads` must be at least 1, got 0"):
        DropKeyViTConfig.from_pretrained(tmp_path)
