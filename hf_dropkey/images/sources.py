"""What the data of every image task has in common: names of splits and classes, data sets by name, fingerprints."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
from datasets.data_files import get_data_patterns

from .checks import name_some


EVALUATION_SPLITS = ("validation", "valid", "test")
CHOICE_SEED = 0
BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
DIGEST_LENGTH = 16


def load_named(name: str, config: str | None) -> datasets.DatasetDict:
    """A data set of the hub or in a folder, also where the folder's name looks like a glob pattern.

    Raises:
        ValueError: A configuration is asked for of such a folder.
    """
    if not (Path(name).is_dir() and glob.has_magic(name)):
        return datasets.load_dataset(name, config)
    if config is not None:
        raise ValueError(f"--dataset_config_name {config} of a folder with brackets in its name ({name}); rename it")
    base = glob.escape(os.path.abspath(name))
    patterns = get_data_patterns(base)
    files = {str(split): [f"{base}/{pattern}" for pattern in found] for split, found in patterns.items()}
    endings = {Path(file).suffix.lower() for file in glob.glob(f"{base}/**", recursive=True)}
    images = endings & datasets.packaged_modules.imagefolder.imagefolder.ImageFolder.EXTENSIONS
    kinds = sorted({BUILDERS[ending] for ending in endings & BUILDERS.keys()})
    if len(kinds) != 1 and not images:
        raise ValueError(
            f"{name} holds files of {kinds or 'no known kind'}; use files of one among {sorted(BUILDERS)}"
        )
    return datasets.load_dataset("imagefolder" if images else kinds[0], data_files=files)


def check_known(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises ValueError if the data has class names that a model does not know, or that stand for several classes."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"the data has {len(unknown)} classes that the model does not know: {name_some(unknown)}; "
            f"the model knows {name_some(known)}. Use data with the model's classes"
        )
    twice = [name for name in names if known.count(name) > 1]
    if twice:
        numbers = [number for number, name in enumerate(known) if name == twice[0]]
        raise ValueError(
            f"the model has the classes {numbers} under one name, {twice[0]!r}, so that the data's cannot be told apart; "
            "repair id2label in its config.json"
        )


def near_names(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ only in spaces or capitals."""
    seen: dict[str, str] = {}
    pairs = []
    for name in names:
        plain = "".join(name.split()).casefold()
        if plain in seen:
            pairs.append((seen[plain], name))
        seen.setdefault(plain, name)
    return pairs
