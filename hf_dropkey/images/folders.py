"""Image folders with one sub-folder per class: their files, and errors for contents that look like a mistake.

The folder is walked here rather than by a library, which silently ignores or invents classes: names are taken as they
are (brackets, leading underscores), links are followed, every ending that Pillow reads is used, and the endings of
unused files are logged.
"""

import itertools
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from PIL import Image

from .checks import name_some


logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_WORDS = {word for words in SPLIT_NAMES.values() for word in words}
# Pillow knows these files and reads no pixels from them
WITHOUT_READER = ("BUFR", "GRIB", "HDF5", "MPEG")
# beside hidden folders, those of zip files of macOS
NO_CLASSES = ("__MACOSX",)
OTHER_DATA = (
    ".parquet",
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".arrow",
    ".zip",
    ".tar",
    ".gz",
    ".tgz",
    ".zst",
    ".xz",
    ".py",
)


@dataclass
class ClassFolders:
    """The contents of a folder with one sub-folder per class.

    Attributes:
        folder: The folder.
        images: Paths of the image files of each class, in the order of their names.
        left_out: Number of files that are not used, by ending.
        loose: Image files beside the class folders.
        deeper: Image files further down than in a class folder, of each class.
        endings: Number of files that are not used of each class, by ending.
    """

    folder: Path
    images: dict[str, list[str]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    loose: list[str] = field(default_factory=list)
    deeper: dict[str, list[str]] = field(default_factory=dict)
    endings: dict[str, Counter[str]] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, str]]:
        """Path and class of every image, in the order of the paths."""
        prefix = len(os.path.abspath(self.folder)) + 1
        rows = [(file, name) for name, files in self.images.items() for file in files]
        return sorted(rows, key=lambda row: row[0][prefix:])


def image_endings() -> set[str]:
    """The endings of files that Pillow reads, in lower case, with those of registered plugins."""
    known = Image.registered_extensions()
    return {ending for ending, kind in known.items() if kind in Image.OPEN and kind not in WITHOUT_READER}


def is_hidden(name: str) -> bool:
    """Whether a file or folder was made by the system, such as .DS_Store, .ipynb_checkpoints and __MACOSX."""
    return name.startswith(".") or name in NO_CLASSES


def ending_of(name: str) -> str:
    """The ending of a file name for a message."""
    return Path(name).suffix.lower() or "without ending"


def read_class_folders(folder: Path) -> ClassFolders:
    """Walks a folder; links are followed, also to folders."""
    found = ClassFolders(folder)
    endings = image_endings()
    root = os.path.abspath(folder)
    for name in sorted(os.listdir(root)):
        check_name(name, root)
        path = os.path.join(root, name)
        if os.path.isdir(path):
            if not is_hidden(name):
                read_class(found, name, path, endings)
        elif not is_hidden(name):
            if ending_of(name) in endings:
                found.loose.append(path)
            else:
                found.left_out[ending_of(name)] += 1
    return found


def read_class(found: ClassFolders, name: str, folder: str, endings: set[str]) -> None:
    """Adds the files of a class folder."""
    found.images[name], found.deeper[name], found.endings[name] = [], [], Counter()
    for path in visible_files(folder):
        ending = ending_of(path)
        if ending not in endings:
            found.endings[name][ending] += 1
            found.left_out[ending] += 1
        elif os.path.dirname(path) == folder:
            found.images[name].append(path)
        else:
            found.deeper[name].append(path)


def images_among(paths: Sequence[str]) -> list[Path]:
    """The image files among paths, folders looked into (not deeper), in order.

    Raises:
        FileNotFoundError: A path is not there, or there is no image.
    """
    endings = image_endings()
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"there is no image file or folder {path}; check --images")
        inside = sorted(one for one in path.iterdir() if not is_hidden(one.name)) if path.is_dir() else [path]
        files += [one for one in inside if path.is_file() or (one.is_file() and one.suffix.lower() in endings)]
    if not files:
        raise FileNotFoundError(f"there is no image in {', '.join(map(str, paths))}; check --images")
    return files


def output_names(files: Sequence[Path]) -> list[str]:
    """A name for what is written about each file: its own without ending; further files of that name get a number."""
    own, taken, names = {file.stem for file in files}, set[str](), []
    for file in files:
        numbered = (f"{file.stem}_{number}" for number in itertools.count(2))
        name = file.stem if file.stem not in taken else next(one for one in numbered if one not in own | taken)
        taken.add(name)
        names.append(name)
    return names


def make_output_folder(folder: Path, option: str) -> None:
    """Makes a folder for results; `option` is the argument that names it.

    Raises:
        NotADirectoryError: It, or a folder above it, is a file.
        PermissionError: It cannot be written to.
    """
    check_writable(folder, option)
    folder.mkdir(parents=True, exist_ok=True)


def check_writable(folder: Path, option: str) -> None:
    """Raises NotADirectoryError or PermissionError if files cannot be written to a folder, or it cannot be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{option} {folder} cannot be a folder: {there} is a file; choose another one")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise PermissionError(
            f"nothing can be written to {option} {folder} ({error.strerror}); make {there} writable, or choose "
            "another folder"
        ) from error


def check_output_file(file: Path, option: str) -> None:
    """Raises IsADirectoryError, NotADirectoryError or PermissionError if a file of results cannot be written; makes its folder."""
    if file.is_dir():
        raise IsADirectoryError(f"{option} {file} is a folder; name a file in it")
    make_output_folder(file.parent, option)


def stop(error: OSError) -> None:
    """Raises an error that a walk would ignore, such as that of a folder without read permission."""
    raise error


def check_name(name: str, folder: str) -> None:
    """Raises ValueError for a name that is not text, which tables of paths cannot hold."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the name {name!a} in {folder} is not valid UTF-8; rename the file or folder") from error


def visible_files(folder: str) -> Iterator[str]:
    """All files below a folder that are not hidden, in order; a loop of links ends where it closes."""
    seen = {os.path.realpath(folder)}
    for path, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        for name in (*folders, *files):
            check_name(name, path)
        real = {name: os.path.realpath(os.path.join(path, name)) for name in sorted(folders) if not is_hidden(name)}
        folders[:] = [name for name in real if real[name] not in seen]
        seen.update(real.values())
        yield from (os.path.join(path, name) for name in sorted(files) if not is_hidden(name))


def check_class_folders(found: ClassFolders, option: str) -> None:
    """Raises ValueError for contents that look like a mistake: loose files, deeper levels, no class, an empty class.

    `option` is the argument that names the folder.
    """
    folder, names = found.folder, list(found.images)
    deeper = {name: files for name, files in found.deeper.items() if files}
    splits = [name for name in names if name.lower() in SPLIT_WORDS]
    if splits and (any(name in deeper for name in splits) or len(splits) == len(names)):
        raise ValueError(
            f"{option} {folder} holds the folders {name_some(map(repr, splits))}, which look like splits rather than "
            f"classes; name each split's own folder, such as --train_dir {folder / splits[0]}, and "
            "--validation_dir for the images to evaluate on"
        )
    if found.loose:
        files = name_some(os.path.basename(file) for file in found.loose)
        beside = f"beside its {len(names)} class folders" if names else "and no class folders"
        raise ValueError(
            f"{option} {folder} has {len(found.loose)} image files {beside}: {files}; give each class a sub-folder of "
            "its own and move them there, or name them and their classes in a table (--train_file, --validation_file)"
        )
    if not names:
        left = ending_counts(found.left_out)
        raise ValueError(
            f"{option} {folder} has no folders of images{f', only files ({left})' if left else ''}; give each class a "
            "sub-folder of its own"
        )
    if deeper:
        first = os.path.relpath(next(iter(deeper.values()))[0], folder)
        raise ValueError(
            f"{option} {folder}: {sum(map(len, deeper.values()))} images lie in folders inside the class folders "
            f"{name_some(map(repr, deeper))}, such as {first}; classes are the first level, "
            "so move images up into the folder of their class, or name them in a table (--train_file)"
        )
    empty = [name for name in names if not found.images[name]]
    if empty:
        held = (f"{name!r} ({ending_counts(found.endings[name]) or 'nothing'})" for name in empty)
        raise ValueError(
            f"{option} {folder}: {len(empty)} class folders hold no image that Pillow reads: {name_some(held)}; add "
            "images, convert them (to .jpg or .png), or remove the folders"
        )


def ending_counts(endings: Mapping[str, int]) -> str:
    """Counts of files by ending, for a message."""
    return ", ".join(f"{ending} {count}" for ending, count in sorted(endings.items()))


def check_separate(train: Path, other: Path, option: str) -> None:
    """Raises ValueError if one folder of images is inside the other; warns if both are the same."""
    one, two = train.resolve(), other.resolve()
    if one == two:
        logger.warning(
            "%s %s is also the training folder, so that its metrics do not measure accuracy on new images",
            option,
            other,
        )
    elif one in two.parents or two in one.parents:
        raise ValueError(
            f"--train_dir {train} and {option} {other}: one folder lies in the other, so that the same images would be "
            "used for training and evaluation; name two separate folders"
        )


def check_classes_of_splits(train: ClassFolders, other: ClassFolders, option: str) -> None:
    """Raises ValueError if a class has images to evaluate on but none to train on."""
    names = list(train.images)
    only = [name for name in other.images if name not in names]
    if only:
        near = {name: get_close_matches(name, names, n=1) for name in only}
        shown = (f"{name!r}" + (f" (there is {near[name][0]!r} to train on)" if near[name] else "") for name in only)
        raise ValueError(
            f"{option} {other.folder} has {len(only)} classes without images to train on: {name_some(shown)}; give them "
            f"the names of the training classes, {name_some(map(repr, names))}, or remove them"
        )


def log_left_out(found: ClassFolders, split: str) -> None:
    """Logs the files of a folder that are not used, by ending."""
    if found.left_out:
        logger.warning(
            "%d files in the %s folder %s are left out, because Pillow reads no images with their ending: %s",
            found.left_out.total(),
            split,
            found.folder,
            ending_counts(found.left_out),
        )


def local_class_folders(folder: Path) -> dict[str, Path] | None:
    """The folder of each split of an image folder with one sub-folder per class; None for data of another form.

    Splits are folders with names such as train, val or test-2; without any, everything is `train`.
    """
    if not folder.is_dir():
        return None
    endings, files = image_endings(), list(visible_files(str(folder)))
    # tables, archives and configurations are left to the library for data sets
    if not any(ending_of(file) in endings for file in files) or any(ending_of(file) in OTHER_DATA for file in files):
        return None
    card = folder / "README.md"
    if card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace"):
        return None
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    splits = {name: split_of(name) for name in names}
    if names and all(splits.values()):
        by_split = {str(split): folder / name for name, split in splits.items()}
        return by_split if len(by_split) == len(names) else None
    inside = (os.path.relpath(file, folder).split(os.sep)[1:-1] for file in files)
    return None if any(split_of(part) for parts in inside for part in parts) else {"train": folder}


def split_of(name: str) -> str | None:
    """The split that the name of a folder stands for, as in the library for data sets; None if it is another name."""
    words = re.split(r"[-._ 0-9]+", name)
    return next((split for split, known in SPLIT_NAMES.items() if any(word in known for word in words)), None)
