"""From folders to a page: which task a model is of, and what the demo cannot show."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..saved import check_model_folder, is_adapter, load_config, saved_class
from .answers import Classifier
from .drawers import DRAWERS
from .drawing_page import drawing_page
from .examples import drawing_examples, find_examples
from .page import page
from .views import Views


MOST_MODELS = 2
# by the end of the class's name, the first that fits
KINDS = {
    "ForImageClassification": "classification",
    "HoiForObjectDetection": "hoi",
    "ForObjectDetection": "detection",
    "ForBodyMesh": "mesh",
}


def open_page(folders: Sequence[Path], images: Path | None) -> Any:
    """The page of one model, or of two classifiers.

    Raises:
        FileNotFoundError: A folder lacks files.
        ValueError: A model is not one that the demo shows, or two do not go together.
    """
    if not 1 <= len(folders) <= MOST_MODELS:
        raise ValueError(f"{len(folders)} models were given; give one, or two image classifiers to compare")
    kinds = [kind_of(folder) for folder in folders]
    names = distinct_names(folders)
    title = f"{' and '.join(names)} · hf_dropkey"
    if set(kinds) != {"classification"}:
        if len(folders) > 1:
            raise ValueError(
                f"two models are compared where both are image classifiers; these are {' and '.join(kinds)}"
            )
        drawer = DRAWERS[kinds[0]](folders[0])
        return drawing_page(drawer, drawing_examples(drawer, folders[0], images), folders[0], title)
    models = [Classifier(folder, name=name) for folder, name in zip(folders, names, strict=True)]
    return page(Views(models, folders, find_examples(folders, images)), title)


def kind_of(folder: Path) -> str:
    """The task of a model: "classification", "detection", "hoi" or "mesh".

    Raises:
        FileNotFoundError: The folder lacks files.
        ValueError: The demo does not show such models.
    """
    check_model_folder(folder)
    if not is_adapter(folder) and not (folder / "preprocessor_config.json").is_file():
        config = load_config(folder)
        raise ValueError(
            f"{folder} holds a model of type {config.model_type!r} without preprocessor_config.json, which says how it takes "
            "images; the demo shows models of images: add the file with the image processor's save_pretrained, or give "
            "another folder"
        )
    if is_adapter(folder):
        return "classification"
    name = saved_class(load_config(folder), folder).__name__
    for ending, kind in KINDS.items():
        if name.endswith(ending):
            return kind
    raise ValueError(
        f"{folder} holds a {name}; the demo shows image classifiers, detectors, human-object interaction and body mesh "
        "models; give the folder of one"
    )


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Names of folders, with the folder above where they would be alike."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        return [f"{folder.resolve().parent.name}/{folder.resolve().name}" for folder in folders]
    return names
