"""Uploads the folder of a Space in one commit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete

from .contents import entries
from .push import PushResult, api, check_target, clear_errors
from .push_plan import PlannedFile, PushPlan, check_no_secrets
from .release_check import check_release
from .static_folder import INDEX, known_files


# of the Hub; it must say which files are large
KEPT = (".gitattributes",)


def plan_space(folder: Path, *, token: str | bool | None = None) -> PushPlan:
    """The files of a Space that a push would send: all of them, after the check of `check_release`.

    Raises:
        FileNotFoundError, ValueError: It is not the folder of a Space, holds a secret, or something is wrong with it.
    """
    report = check_release(folder)
    if not report.is_space and not report.is_static:
        raise ValueError(
            f"{folder} is not the folder of a Space; hf-dropkey demo MODEL --space_folder {folder} writes one, and "
            "--static_page one that computes in the browser"
        )
    # a repository of the package is the sender's to trust
    wrong = [problem for problem in report.problems if "this check has not seen" not in problem]
    if wrong:
        raise ValueError(f"{folder} was not pushed: {'; '.join(wrong)}. Nothing was sent")
    found = entries(folder)
    # of a public package, to the byte: words in it that look like a secret are none
    public = known_files({entry.name: entry for entry in found}) if report.is_static else set()
    check_no_secrets(folder, [entry for entry in found if entry.name not in public], token)
    return PushPlan(folder, tuple(PlannedFile(entry.name, entry.size) for entry in found), ())


def push_space(
    folder: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload Space",
    announce: Callable[[PushPlan], None] | None = None,
) -> PushResult:
    """Uploads the folder of a Space in one commit, which also deletes what the repository has beside it.

    Args:
        folder: Of `write_space`, or a page that computes in the browser.
        repo_id: "owner/name", created if it is not there.
        revision: Branch, created if it is not there.
        private: Whether a new repository is private.
        token: As for `push_folder`.
        commit_message: Title of the commit.
        announce: Called with the plan before the first byte is sent.

    Raises:
        FileNotFoundError, ValueError, PermissionError, ConnectionError: As `push_folder` and `plan_space`.
    """
    check_target(repo_id, revision=revision, token=token)
    plan = plan_space(folder, token=token)
    if announce is not None:
        announce(plan)
    space: dict[str, Any] = {"repo_type": "space", "token": token}
    sdk = "static" if INDEX in {file.name for file in plan.files} else "gradio"
    with clear_errors(repo_id, f"{folder} was not pushed"):
        repo_id = api.create_repo(repo_id, private=private, space_sdk=sdk, exist_ok=True, **space).repo_id
        if revision not in (None, "main"):
            api.create_branch(repo_id, branch=str(revision), exist_ok=True, **space)
        there = api.space_info(repo_id, revision=revision, token=token)
        if private and not there.private:
            raise ValueError(
                f"{repo_id} already exists and is public; make it private in its settings, or leave out --private"
            )
        names = {file.name for file in plan.files}
        old = [one.rfilename for one in there.siblings or [] if one.rfilename not in (*names, *KEPT)]
        operations: list[Any] = [CommitOperationDelete(name) for name in old]
        operations += [CommitOperationAdd(name, folder / name) for name in sorted(names)]
        done: CommitInfo = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            revision=revision,
            parent_commit=there.sha,
            **space,
        )
    return PushResult(repo_id, done, done.oid != there.sha, tuple(sorted(names)), ())
