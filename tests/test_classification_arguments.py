"""Recipes and arguments of a training job are read as they were meant, and contradictions are errors."""

import json
from pathlib import Path

import pytest

from hf_dropkey.classification.arguments import AugmentationArguments, ClassificationDropKeyArguments, ModelArguments
from hf_dropkey.training.arguments import RampArguments, parse_arguments


RECIPES = Path(__file__).resolve().parents[1] / "hf_dropkey" / "recipes"
GROUPS = (ModelArguments, ClassificationDropKeyArguments)


def test_the_rest_of_the_command_wins_over_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    fields = {
        "about": "for readers",
        "model_family": "volo",
        "dropkey_ratio": 0.2,
        "config_overrides": {"depths": [1, 2]},
    }
    recipe.write_text(json.dumps(fields))
    model, dropkey = parse_arguments(GROUPS, [str(recipe), "--dropkey_ratio", "0.3"])
    assert (model.model_family, model.config_overrides) == ("volo", {"depths": [1, 2]})
    assert dropkey.given() == {"dropkey_ratio": 0.3, "dropkey_patch": False}


def test_overrides_are_json_on_the_command_line() -> None:
    model, _ = parse_arguments(GROUPS, ["--config_overrides", '{"mix_token": true, "depths": [1, 2]}'])
    assert model.config_overrides == {"mix_token": True, "depths": [1, 2]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("depths=1", r"--config_overrides depths=1 is not JSON \(.*; write for example"),
        ("[1]", "is not a JSON object"),
    ],
)
def test_other_overrides_are_errors(overrides: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelArguments(config_overrides=overrides)


def test_an_unknown_field_of_a_recipe_is_an_error(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"dropkey_rate": 0.1}))
    with pytest.raises(ValueError, match=r"recipe\.json has fields that are not arguments: \['dropkey_rate'\]"):
        parse_arguments(GROUPS, [str(recipe)])


@pytest.mark.parametrize("shape", [{"model_family": "volo"}, {"model_size": "tiny"}, {"patch_size": 8}])
def test_a_pretrained_model_has_its_shape(shape: dict) -> None:
    with pytest.raises(ValueError, match=f"fixes the shape of the model; leave out .*{next(iter(shape))}"):
        ModelArguments(model_name_or_path="there", **shape)


def test_digits_turn_and_photographs_are_cropped_unless_configured_otherwise() -> None:
    digits = AugmentationArguments(rotation_degrees=1.0).augmentation((8, 8), digits=True)
    assert (digits.rotation_degrees, digits.shift_fraction, digits.crop_scale) == (1.0, 0.05, 1.0)
    photos = AugmentationArguments(crop_scale=0.5).augmentation((8, 8), digits=False)
    assert (photos.rotation_degrees, photos.flip_probability, photos.crop_scale) == (0.0, 0.5, 0.5)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("digits_*.json")), ids=lambda recipe: recipe.stem)
def test_recipes_say_what_to_expect(recipe: Path) -> None:
    about = json.loads(recipe.read_text())["about"]
    assert f"recipe:{recipe.stem}" in about
    assert "accuracy" in about and "CPU" in about


def test_ratios_change_over_the_steps_as_configured() -> None:
    assert RampArguments().callbacks() == []
    (callback,) = RampArguments(dropkey_warmup=0.2, dropkey_alignment=0.1).callbacks()
    assert [callback.factor(step, 100) for step in (0, 10, 20, 89, 90, 99)] == [0.0, 0.5, 1.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="`alignment` is a fraction of the training"):
        RampArguments(dropkey_alignment=1.5).callbacks()
