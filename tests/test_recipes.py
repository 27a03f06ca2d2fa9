"""The recipes of the package are found by name and by path, and each says its task."""

import json
from pathlib import Path

import pytest

from hf_dropkey import recipes
from hf_dropkey.cli import PROGRAMS


def test_a_name_and_a_path_are_recipes(tmp_path: Path) -> None:
    assert recipes.recipe_file("recipe:digits_vit") == recipes.FOLDER / "digits_vit.json"
    own = tmp_path / "own.json"
    assert recipes.is_recipe(str(own)) and recipes.recipe_file(str(own)) == own
    assert not recipes.is_recipe("--seed")


def test_paths_of_committed_commands_still_lead_to_the_recipe(tmp_path: Path) -> None:
    assert recipes.recipe_file("scripts/recipes/digits_vit.json") == recipes.FOLDER / "digits_vit.json"
    with pytest.raises(FileNotFoundError, match="there is no recipe 'gone'; there are detection_overfit, "):
        recipes.recipe_file("scripts/recipes/gone.json")
    (tmp_path / "scripts" / "recipes").mkdir(parents=True)
    file = tmp_path / "scripts" / "recipes" / "digits_vit.json"
    file.write_text("{}")
    assert recipes.recipe_file(str(file)) == file


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(FileNotFoundError, match="there is no recipe 'digits'; there are .*digits_vit.* JSON file"):
        recipes.recipe_file("recipe:digits")


@pytest.mark.parametrize("name", recipes.names())
def test_each_recipe_has_a_task_and_says_what_to_expect(name: str) -> None:
    found = json.loads((recipes.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert ("train", found["task"]) in PROGRAMS and f"recipe:{name}" in found["about"]
    assert recipes.task_of(f"recipe:{name}") == found["task"] and found["about"].split(":")[0] in recipes.listing(
        10**6
    )


def test_a_file_that_is_no_recipe_names_no_task(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1")
    assert recipes.task_of(str(tmp_path / "a.json")) is None and recipes.task_of("gone.json") is None
