"""Pushes a saved folder to the Hub: the files that belong there and a merged card, in one commit.

`HfApi.upload_folder` and `Trainer` upload every file in a folder, also `training_args.bin` with its token, and the
first in several commits. Here only the files that `plan_push` lists are uploaded, and no pickle is among them.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, logging, validate_repo_id  # type: ignore[attr-defined]  # not in its list of names

from ..saved import config_file
from .cards import README, hand_written, model_card, read_readme
from .push_plan import PushPlan, plan_push
from .push_plan import check_no_secrets as check_no_secrets
from .push_plan import check_pushable as check_pushable
from .push_plan import code_of as code_of
from .push_plan import files_to_push as files_to_push


# httpx's or httpx2's, whichever the installed release of huggingface_hub uses
HTTPError: Any = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
logger = logging.get_logger(__name__)
api = HfApi(library_name="hf_dropkey")

# weights that the next push replaces under other names; the loader would take the old ones
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Attributes:
        repo_id: "owner/name".
        info: The commit that holds everything.
        changed: Whether anything was new; if not, no commit was made.
        files: Paths in the repository, the card included.
        left_out: Paths in the folder that do not belong on the Hub.
    """

    repo_id: str
    info: CommitInfo
    changed: bool
    files: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def commit(self) -> str:
        """Hash of the commit, to pin."""
        return str(self.info.oid)

    @property
    def url(self) -> str:
        """Page of the commit."""
        return str(self.info.commit_url)


def push_folder(
    folder: Path | str,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload model",
    copy_under: str | None = None,
    replace_readme: bool = False,
    include: Sequence[str] = (),
    announce: Callable[[PushPlan], None] | None = None,
) -> PushResult:
    """Uploads a saved model, with its code and its card, in one commit; without changes, no commit is made.

    Everything is checked before anything is sent. The card in the repository keeps its hand-written parts; a card in
    the folder is used if the repository has none.

    Args:
        folder: A model or an adapter, as `save_pretrained`, `Trainer` or `write_card` leave it.
        repo_id: "owner/name", or "name" for one's own. Created if it is not there.
        revision: Branch, created if it is not there; default "main".
        private: Whether a new repository is private; default: as in the owner's settings.
        token: Default: the token of `hf auth login` or of the environment variable HF_TOKEN.
        commit_message: Title of the commit.
        copy_under: Folder of the repository for a second copy in the same commit, which costs no second upload.
        replace_readme: Take the card in the folder, not the one in the repository.
        include: Patterns of more files to send, as for `plan_push`.
        announce: Called with the plan, before the first byte is sent.

    Raises:
        FileNotFoundError: The folder, or a file that the model needs, is not there.
        NotADirectoryError: The folder is a file.
        ValueError: Weights are damaged or pickles, a file holds a secret, a link leaves the folder, the name or the
            revision is not allowed, or the repository is public and `private` was requested.
        PermissionError: No token, or one that may not write there.
        ConnectionError: The upload failed. The repository has all of the push or nothing; another push completes it.
    """
    folder = Path(folder)
    check_target(repo_id, revision=revision, token=token)
    plan = plan_push(folder, include=include, token=token)
    if announce is not None:
        announce(plan)
    files = {file.name: folder / file.name if file.content is None else file.content for file in plan.files}
    repo_id = prepare_repository(repo_id, revision=revision, private=private, token=token)
    with clear_errors(repo_id, f"{folder} was not pushed"):
        # a commit of someone else between this line and ours makes ours fail, so that their edit is not lost
        there = api.model_info(repo_id, revision=revision, token=token)
        parent = str(there.sha)
        readme = remote_readme(repo_id, parent, token)
        contents: dict[str, Path | bytes] = dict(files)
        if config_file(folder).is_file():
            contents[README] = merged_readme(folder, repo_id, readme, replace=replace_readme)
        elif readme is not None and not replace_readme:
            # an adapter of PEFT's own, with PEFT's card
            contents.pop(README, None)
        additions = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
        stale = [CommitOperationDelete(name) for name in stale_weights(there, contents)]
        if copy_under is not None:
            # the copies then find their content already there
            api.preupload_lfs_files(repo_id, additions, token=token, revision=revision, free_memory=False)
            additions += [CommitOperationAdd(f"{copy_under}/{name}", content) for name, content in files.items()]
        done = api.create_commit(
            repo_id,
            [*stale, *additions],
            commit_message=commit_message,
            token=token,
            revision=revision,
            parent_commit=parent,
        )
    paths = tuple(addition.path_in_repo for addition in additions)
    return PushResult(repo_id, done, done.oid != parent, paths, tuple(file.name for file in plan.stays))


def merged_readme(folder: Path, repo_id: str, there: str | None, *, replace: bool) -> bytes:
    """The card to push: the repository's or the folder's, with its sections and metadata made anew."""
    own = read_readme(folder)
    if own is not None and there is not None and not replace:
        mine, theirs = hand_written(own), hand_written(there)
        # the only hand-written text of a new card is its title
        if mine not in theirs and len(mine.splitlines()) > 1:
            logger.warning(
                f"{folder / README} has hand-written text that the card of {repo_id} does not have; the repository's card "
                "is kept. To publish the folder's card instead, pass replace_readme=True (--replace_readme)"
            )
    base = own if there is None or (replace and own is not None) else there
    return str(model_card(folder, repo_id=repo_id, existing=base or "")).encode()


# --- the repository --------------------------------------------------------------------------------------------------


def check_name(repo_id: str, *, revision: str | None = None) -> None:
    """Raises ValueError for a name that no repository can have, and for a commit in place of a branch."""
    validate_repo_id(repo_id)
    if revision is not None and COMMIT.fullmatch(revision):
        raise ValueError(f"revision={revision} is a commit, which cannot be pushed to; give a branch, or leave it out")


def check_target(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> None:
    """Checks the target of a push as far as possible without the network.

    Raises:
        ValueError: The name or the revision is not allowed.
        PermissionError: No token is set.
    """
    check_name(repo_id, revision=revision)
    if "authorization" not in {name.lower() for name in build_hf_headers(token=token)}:
        raise PermissionError(
            "there is no token for the Hub; log in with `hf auth login` or set the environment variable HF_TOKEN, with a "
            "token that may write, from https://huggingface.co/settings/tokens"
        )


def prepare_repository(
    repo_id: str, *, revision: str | None = None, private: bool | None = None, token: str | bool | None = None
) -> str:
    """Creates the repository and the branch if they are not there; returns "owner/name".

    Raises:
        ValueError, PermissionError, ConnectionError: As `push_folder`.
    """
    check_target(repo_id, revision=revision, token=token)
    with clear_errors(repo_id, "nothing was sent"):
        repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if private and not api.model_info(repo_id, token=token).private:
            raise ValueError(
                f"{repo_id} already exists and is public; make it private in its settings, or leave out --private "
                "(private=True)"
            )
        if revision not in (None, "main") and not str(revision).startswith("refs/"):
            api.create_branch(repo_id, branch=str(revision), token=token, exist_ok=True)
    return repo_id


def remote_readme(repo_id: str, revision: str, token: str | bool | None) -> str | None:
    """The card in a repository at a commit, None if it has none."""
    try:
        return (
            Path(api.hf_hub_download(repo_id, README, revision=revision, token=token)).read_bytes().decode("utf-8-sig")
        )
    except EntryNotFoundError:
        return None


def stale_weights(there: Any, contents: dict[str, Path | bytes]) -> list[str]:
    """Weights in a repository that a push replaces under other names, as when their number of shards changes."""
    if not any(fnmatchcase(name, pattern) for name in contents for pattern in WEIGHTS):
        return []
    names = [sibling.rfilename for sibling in there.siblings or []]
    return [name for name in names if name not in contents and any(fnmatchcase(name, one) for one in WEIGHTS)]


@contextmanager
def clear_errors(repo_id: str, consequence: str) -> Iterator[None]:
    """Turns the errors of a Hub client into one sentence that says what to do.

    Raises:
        FileNotFoundError: The repository does not exist.
        PermissionError: The Hub does not accept the token.
        ValueError: The branch or commit does not exist.
        ConnectionError: Any other error of the network or the Hub.
    """
    again = "A push is one commit: the repository has all of it or nothing. Push again; what arrived is not sent twice"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConnectionError(f"{consequence}: HF_HUB_OFFLINE is set; unset it to reach the Hub") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{consequence}: there is no repository {repo_id} on {api.endpoint}, or it is private and the token may not "
            "read it"
        ) from error
    except HfHubHTTPError as error:
        status, said = error.response.status_code, _said(error)
        if status == 401:
            raise PermissionError(
                f"{consequence}: the Hub does not accept the token for {repo_id} (401, {said}); log in again with "
                "`hf auth login`, or set HF_TOKEN to a token from https://huggingface.co/settings/tokens"
            ) from error
        if status == 403:
            raise PermissionError(
                f"{consequence}: the token may not write to {repo_id} (403, {said}); use a token that may, or another owner"
            ) from error
        if status == 412:
            raise ConnectionError(
                f"{consequence}: {repo_id} was changed at the same time, and that change is kept. Push again"
            ) from error
        if isinstance(error, RevisionNotFoundError):
            raise ValueError(f"{consequence}: {repo_id} has no such branch or commit; check --revision") from error
        raise ConnectionError(f"{consequence}: the Hub answered {status} ({said}). {again}") from error
    except HTTPError as error:
        raise ConnectionError(f"{consequence}: the Hub cannot be reached ({error}). {again}") from error
    except RuntimeError as error:
        # one file of several; the reason stands in its cause
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise ConnectionError(f"{consequence}: {reason} {again}") from error


def _said(error: HfHubHTTPError) -> str:
    """The server's own words, in one line."""
    return (error.server_message or error.response.headers.get("X-Error-Message") or "no reason given").strip()
