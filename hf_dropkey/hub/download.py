"""A saved model by folder or by id of the Hub: `model_files`."""

from pathlib import Path, PurePosixPath

from huggingface_hub.errors import LocalEntryNotFoundError

from ..saved import PROCESSOR_FILES
from .push import api, check_name, clear_errors


# nothing among these runs when it is read
CONFIGURATION = ("config.json", "generation_config.json", *PROCESSOR_FILES)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def model_files(target: str | Path, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a saved model, downloaded if `target` is an id of the Hub; code and pickles are not.

    Args:
        target: A folder, or "owner/name".
        revision: Branch, tag or commit on the Hub; default: "main".
        weights: Whether weights are needed beside the configuration.

    Raises:
        FileNotFoundError: There is no such folder or repository.
        NotADirectoryError: It is a file.
        ValueError: The name or the revision is not allowed.
        ConnectionError: The Hub cannot be reached.
    """
    folder = Path(target)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{target} is a folder, which has no revisions; leave out --revision")
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{target} is a file; give the folder it lies in")
    # pathlib drops a leading "./", which no repository's name has
    if len(PurePosixPath(str(target)).parts) != 2 or str(target).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{target} is not a folder, nor owner/name of a repository on the Hub; check the name")
    check_name(str(target))
    patterns = [*CONFIGURATION, *(WEIGHTS if weights else ())]
    try:
        with clear_errors(str(target), f"{target} was not read"):
            return Path(api.snapshot_download(str(target), revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{target} was not read: there is no such folder, it is not in the cache of the Hub, and the Hub cannot be "
            "reached; check the name, the network and HF_HUB_OFFLINE"
        ) from error
