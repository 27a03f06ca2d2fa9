"""Requests of stages in the configurations: names and numbers, errors, and what is saved."""

import json
from pathlib import Path
from typing import Any

import pytest

from hf_dropkey import DropKeyCeitConfig, DropKeyT2TViTConfig, DropKeyViTConfig, DropKeyVoloConfig


CONFIGS: list[Any] = [DropKeyViTConfig, DropKeyT2TViTConfig, DropKeyVoloConfig, DropKeyCeitConfig]
families = pytest.mark.parametrize("config_class", CONFIGS)


@families
def test_without_a_request_the_last_stage_is_given_and_nothing_saved(config_class: Any, tmp_path: Path) -> None:
    config = config_class()
    assert config.out_features == [config.stage_names[-1]] and config.out_indices == [len(config.stage_names) - 1]
    config.save_pretrained(tmp_path)
    assert not {"out_features", "out_indices", "stage_names"} & set(json.loads((tmp_path / "config.json").read_text()))


def test_a_classifier_may_change_its_depth() -> None:
    config = DropKeyViTConfig()
    config.num_hidden_layers = 3
    assert config.out_features == ["stage3"]


@families
def test_requests_come_back(config_class: Any, tmp_path: Path) -> None:
    for request in ({"out_features": ["stem", "stage2"]}, {"out_indices": [0, 2]}, {"out_indices": (0, 2)}):
        config = config_class(**request)
        assert config.out_features == ["stem", "stage2"] and config.out_indices == [0, 2]
        config.save_pretrained(tmp_path)
        again = config_class.from_pretrained(tmp_path)
        assert again.out_features == ["stem", "stage2"] and again.out_indices == [0, 2]
        assert again.to_dict() == config.to_dict()
        other = config_class.from_pretrained(tmp_path, out_features=["stage1"])
        assert other.out_features == ["stage1"] and other.out_indices == [1]
    config.out_features = None
    assert config.out_features == [config.stage_names[-1]]


def test_volo_has_a_stage_for_each_group_of_layers() -> None:
    assert DropKeyVoloConfig().stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert DropKeyVoloConfig(depths=[2, 3]).stage_depths == [2, 3]


@families
@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ({"out_features": ["stage1", "stage99"]}, r"has no stage 'stage99'.*the stages are stem, stage1,"),
        ({"out_indices": [0, 99]}, r"has no stage 99.*0 to \d+"),
        ({"out_indices": [-99]}, r"has no stage -99"),
        ({"out_features": ["stage2", "stage1"]}, "same order"),
        ({"out_features": ["stage1"], "out_indices": [0]}, "same stages"),
    ],
)
def test_stages_that_do_not_exist(config_class: Any, request_: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config_class(**request_)
