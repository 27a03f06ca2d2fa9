"""What the data of every image task has in common: names of splits and classes, data sets by name, fingerprints."""

import glob
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..extras import needed
from .checks import name_some
from .folders import image_endings


with needed("train"):
    import datasets
    from datasets.data_files import get_data_patterns


EVALUATION_SPLITS = ("validation", "valid", "test")
SPLIT_NAMES = {"train", "training", "val", "eval", "evaluation", *EVALUATION_SPLITS}
CHOICE_SEED = 0
BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
DIGEST_LENGTH = 16
# for each hash of a fingerprint, the words for a change of it
FINGERPRINT_PARTS = {
    "names": "other file names, or in another order",
    "labels": "other labels",
    "sizes": "files of other sizes, so other images",
}


def load_named(name: str, config: str | None) -> datasets.DatasetDict:
    """A data set of the Hub or in a folder, whose name may look like a glob pattern.

    Raises:
        FileNotFoundError: It is a path, which no id of the Hub is, and no folder lies there.
        ValueError: A configuration is requested of such a folder.
    """
    if not Path(name).is_dir() and (Path(name).is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(
            f"--dataset_name {name} is {'a file' if Path(name).is_file() else 'not there'}; give a folder, or the id of a "
            "data set on the Hub such as owner/name"
        )
    if not (Path(name).is_dir() and glob.has_magic(name)):
        found = datasets.load_dataset(name, config)
        return load_as_text(found, name, name=config) if is_csv(found) else found
    if config is not None:
        raise ValueError(
            f"--dataset_config_name {config} cannot be used with a folder with brackets in its name, {name}; rename it"
        )
    base = glob.escape(os.path.abspath(name))
    patterns = get_data_patterns(base)
    files = {str(split): [f"{base}/{pattern}" for pattern in found] for split, found in patterns.items()}
    endings = {Path(file).suffix.lower() for file in glob.glob(f"{base}/**", recursive=True)}
    images = endings & image_endings()
    kinds = sorted({BUILDERS[ending] for ending in endings & BUILDERS.keys()})
    if len(kinds) != 1 and not images:
        raise ValueError(
            f"{name} holds files of {kinds or 'no known kind'}; use files of one kind among {sorted(BUILDERS)}"
        )
    builder = "imagefolder" if images else kinds[0]
    found = datasets.load_dataset(builder, data_files=files)
    return load_as_text(found, builder, data_files=files) if is_csv(found) else found


def split_names(splits: Mapping[str, Any], train: str, evaluation: str | None) -> dict[str, str]:
    """The names of the splits to train on ("train") and to evaluate on ("validation"), where there is one.

    Args:
        splits: A data set's.
        train: The split to train on.
        evaluation: The split to evaluate on; None: the first of `EVALUATION_SPLITS` that there is.

    Raises:
        ValueError: A named split is not there, or one serves both ends.
    """
    for option, name in (("--train_split_name", train), ("--eval_split_name", evaluation)):
        if name is not None and name not in splits:
            raise ValueError(f"no split {name!r} among {list(splits)}; choose with {option}")
    chosen = evaluation or next((name for name in EVALUATION_SPLITS if name in splits), None)
    if train == chosen:
        raise ValueError(f"split {train!r} is for training and evaluation; choose another --eval_split_name")
    return {"train": train} | ({} if chosen is None else {"validation": chosen})


def is_csv(splits: datasets.DatasetDict) -> bool:
    """Whether a data set was read from CSV files."""
    return any(split.info.builder_name == "csv" for split in splits.values())


def load_as_text(splits: datasets.DatasetDict, *source: str, **more: Any) -> datasets.DatasetDict:
    """Loads a data set of CSV files again, with every cell as text."""
    columns = next(iter(splits.values())).column_names
    features = datasets.Features({column: datasets.Value("string") for column in columns})
    return datasets.load_dataset(*source, **more, features=features, keep_default_na=False)


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
            f"the model has the classes {numbers} under one name, {twice[0]!r}, so that these cannot be distinguished; repair "
            "id2label in its config.json"
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


def data_fingerprint(rows: Iterable[tuple[str, str, int]]) -> dict[str, Any]:
    """A fingerprint of a list of labelled images without their pixels, for the record of a run.

    Args:
        rows: Name, label and size in bytes of each image, in order.

    Returns:
        `rows`, their number, and the start of a SHA-256 of all `names`, `labels` and `sizes`, as JSON holds them.
    """
    count, parts = 0, {part: hashlib.sha256() for part in FINGERPRINT_PARTS}
    for row in rows:
        count += 1
        for digest, value in zip(parts.values(), row, strict=True):
            text = str(value).encode("utf-8", "surrogatepass")
            # with its length, so that different lists never give the same bytes
            digest.update(len(text).to_bytes(8, "little") + text)
    return {"rows": count, **{part: digest.hexdigest()[:DIGEST_LENGTH] for part, digest in parts.items()}}


def changed_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two fingerprints, in words. Parts that one of them lacks are not compared."""
    words = []
    if before.get("rows", now.get("rows")) != now.get("rows", before.get("rows")):
        words.append(f"{now['rows']} images instead of {before['rows']}")
    words += [
        change
        for part, change in FINGERPRINT_PARTS.items()
        if part in before and part in now and before[part] != now[part]
    ]
    return words


def data_name(path: str | Path) -> str:
    """What others read of a local file or folder of data: its last part, so that no local path is published.

    A part that only names a split ("train", "val") comes with the folder it is in, unless that is somebody's home.
    """
    here = Path(path).resolve()
    if here.stem.lower() not in SPLIT_NAMES or here.parent in (Path.home(), Path(here.anchor)):
        return here.name
    return f"{here.parent.name}/{here.name}"


def hub_or_data_name(name: str) -> str:
    """The id of a data set on the Hub as it is, of a local folder its `data_name`."""
    return data_name(name) if is_local(name) else name


def is_local(name: str) -> bool:
    """Whether a data set is a folder here, not one of the Hub; "" is none."""
    return bool(name) and Path(name).is_dir()


def image_name(path: str | None, row: int) -> str:
    """The name of an image without local paths: its file with its folder, else its row number."""
    return f"row {row}" if not path else "/".join(Path(path).parts[-2:])


def image_bytes(cell: Mapping[str, Any] | None) -> int:
    """Size in bytes of an undecoded image; -1 where its file is missing."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        return -1
    if cell["bytes"] is not None:
        return len(cell["bytes"])
    return os.path.getsize(cell["path"]) if os.path.isfile(cell["path"]) else -1
