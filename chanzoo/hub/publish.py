"""Send a package to the Hub as one commit, and believe that it is there only when the Hub says so."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import weights
from ..errors import ChanzooError, HubError, UsageError, WeightsRejectedError
from ..store import FILE_NAME, hub_trouble
from ..weights import Weight, load_rows, save_rows
from .package import OURS, Package

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Published", "check_login", "check_repo_id", "is_checkout", "publish", "record"]

_NOTHING = "No file there was changed."
_AGAIN = "Run the same command again."


@dataclass(frozen=True)
class Published:
    """Where a package is.

    Attributes:
        repo_id: ``ORG/REPO``.
        revision: The commit, 40 hexadecimal digits; empty after a dry run.
        sha256: Of ``model.safetensors``, as the Hub gives it.
        changed: Whether a commit was made; none is where the repository holds the same files already.
    """

    repo_id: str
    revision: str
    sha256: str
    changed: bool


def publish(
    package: Package, repo_id: str, *, private: bool = False, token: str | None = None, dry_run: bool = False
) -> Published:
    """Put a package into a repository, which is made if there is none.

    The files become visible by one commit, all or none of them. Files of an earlier publish that the
    package has not got are removed in the same commit; files of others stay. A process may die at any
    moment: the next call completes.

    Args:
        package: Checked, see ``chanzoo.hub.gate``.
        repo_id: ``ORG/REPO``.
        private: Make a private repository; an existing one must be private.
        token: Of the account, the one of the Hub's own login by default.
        dry_run: Stop before the network.

    Raises:
        UsageError: A name that the Hub does not take, nobody is logged in, or the card is not accepted.
        HubError: The Hub cannot be reached, refuses, or changed meanwhile.
        WeightsRejectedError: What the Hub holds afterwards is not what was sent.
    """
    check_repo_id(repo_id)
    if dry_run:
        return Published(repo_id, "", package.sha256, False)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=check_login(repo_id, token), library_name="chanzoo")
    stage = "before"
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.model_info(repo_id)
        if private and not info.private:
            raise UsageError(
                f"{repo_id} exists and is public.\n"
                f"  {_NOTHING}   Make it private on the Hub, or leave out --private"
            )
        head = info.sha or ""
        present = _listing(api, repo_id, head)
        if not _differences(package, present):
            return Published(repo_id, head, package.sha256, False)
        operations: list[Any] = [CommitOperationAdd(path, data) for path, data in package.files.items()]
        operations += [CommitOperationDelete(path) for path in OURS if path in present.keys() - package.files]
        stage = "commit"
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=f"chanzoo publish {package.name}",
            parent_commit=head or None,
        )
        stage = "after"
        present = _listing(api, repo_id, commit.oid)
    except ChanzooError:
        raise
    except Exception as error:  # the client raises its own errors, its HTTP library's, and those of files
        raise _explain(error, repo_id, stage) from error
    if wrong := _differences(package, present):
        raise WeightsRejectedError(
            f"{repo_id} does not hold what was sent: {', '.join(wrong)}\n"
            f"  expected  sha256 {package.sha256} of {FILE_NAME}\n"
            f"  found     {present.get(FILE_NAME, 'no such file')} in commit {commit.oid}\n"
            f"  Do not use that commit.   {_AGAIN}",
            path=repo_id,
            expected=package.sha256,
            found=present.get(FILE_NAME, ""),
        )
    return Published(repo_id, commit.oid, package.sha256, True)


def check_login(repo_id: str, token: str | None = None) -> str:
    """The token of the Hub's own login, for publishing to a repository. It is not kept anywhere.

    Raises:
        UsageError: Nobody is logged in.
        HubError: This process is offline.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise HubError(
            f"cannot publish to {repo_id}: HF_HUB_OFFLINE is set.\n  {_NOTHING}   Unset it: HF_HUB_OFFLINE=0"
        )
    token = token or get_token()
    if not token:
        raise UsageError(
            f"cannot publish to {repo_id}: nobody is logged in to the Hub.\n"
            f"  {_NOTHING}   Log in: hf auth login"
        )
    return token


def check_repo_id(repo_id: str) -> None:
    """Refuse a name of a repository that is not ``ORG/REPO``, or that the Hub does not take.

    Raises:
        UsageError: Likewise.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        reason = "" if repo_id.count("/") == 1 else "expected ORG/REPO"
    except HFValidationError as error:
        reason = str(error).splitlines()[0]
    if reason:
        raise UsageError(f'"{repo_id}" cannot name a repository: {reason.rstrip(".")}.\n  Nothing was sent.')


def is_checkout() -> bool:
    """Whether the table lies in a checkout, where it may be written, or in an installed package."""
    return (weights.TABLE.parent.parent / "pyproject.toml").is_file()


def record(row: Weight, published: Published) -> bool:
    """Write the repository and the revision of a row into the table of a checkout.

    Returns:
        Whether the table says something else now.
    """
    rows = load_rows(weights.TABLE)
    new = replace(rows[row.name], hub_repo=published.repo_id, revision=published.revision)
    if not is_checkout() or new == rows[row.name]:
        return False
    save_rows({**rows, row.name: new}, weights.TABLE)
    return True


def _listing(api: HfApi, repo_id: str, revision: str) -> dict[str, str]:
    """The files of a revision: sha256 of large files, git's own hash of the others."""
    from huggingface_hub import RepoFile

    if not revision:
        return {}
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {e.path: e.lfs.sha256 if e.lfs else e.blob_id for e in entries if isinstance(e, RepoFile)}


def _differences(package: Package, present: dict[str, str]) -> list[str]:
    """Files of ours that a listing lacks, holds otherwise, or should not hold."""
    wrong = []
    for path in OURS:
        data = package.files.get(path)
        found = present.get(path)
        if data is None:
            same = found is None
        else:
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            same = found in (hashlib.sha256(data).hexdigest(), blob)
        if not same:
            wrong.append(path)
    return wrong


def _explain(error: Exception, repo_id: str, stage: str) -> ChanzooError:
    """What an error of the client means, and what has happened to the repository."""
    chain = [error]  # the client wraps what goes wrong with a large file
    while isinstance(cause := chain[-1].__cause__, Exception):
        chain.append(cause)
    status, path = next((known for known in map(_answer, chain) if any(known)), (0, ""))
    first, *rest = str(error).splitlines() or [type(error).__name__]
    start = f"cannot publish to {repo_id}"
    if "Invalid metadata" in first:
        reasons = "\n".join(f"  {line}" for line in rest)
        return UsageError(
            f"{start}: the Hub does not accept the metadata of the card.\n{reasons}\n"
            f"  {_NOTHING}   A licence is named as on the Hub: --license apache-2.0"
        )
    if status == 412:
        return HubError(f"{start}: somebody else has changed it meanwhile.\n  {_NOTHING}   {_AGAIN}")
    advice = _AGAIN
    if status == 401:
        why, advice = "the Hub does not know this token (status 401)", "Log in: hf auth login"
    elif status == 403:
        why = "this account may not write there (status 403)"
        advice = "Log in as another: hf auth login"
    elif lost := [e for e in chain if "TransportError" in {kind.__name__ for kind in type(e).__mro__}]:
        why = f"the Hub cannot be reached ({str(lost[0]).rstrip('.')})"  # an error of the HTTP library
    else:
        why = hub_trouble(error)
    if stage == "after":
        what = "The commit was made, but could not be compared with what was sent."
    elif stage == "before" or 400 <= status < 500 or (path and "/commit/" not in path):
        what = _NOTHING
    else:
        what = "Whether the commit was made is not known; another run finds out."
    return HubError(f"{start}: {why}.\n  {what}   {advice}")


def _answer(error: Exception) -> tuple[int, str]:
    """Status and path of the request that failed, as far as they are known."""
    response: Any = getattr(error, "response", None)
    with contextlib.suppress(RuntimeError):  # the HTTP library knows of no request
        request: Any = getattr(error if response is None else response, "request", None)
        return int(getattr(response, "status_code", 0)), "" if request is None else str(request.url)
    return 0, ""
