"""Where the bytes of a weight come from, and the check that they are the published ones.

Sources in order: an explicit file, the embedded store (``weights/`` of a checkout, ``embedded/`` inside
an installed wheel), the folder named by ``$CHANZOO_WEIGHTS``, the Hub at the row's pinned revision. The
sha256 of the row is compared before anything looks inside the bytes, whatever the source, and the
tensors are read from the very bytes that were compared. A download is compared before it enters the
Hub's cache, and again whenever it is used.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import HubError, NoWeightsError, WeightsRejectedError
from .weights import WEIGHTS, Weight, weights_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "cached_path",
    "candidates",
    "embedded_path",
    "fetch",
    "file_sha256",
    "find_local",
    "has_weights",
    "hub_trouble",
    "load_tensors",
    "locate",
    "parse_tensors",
    "rejected",
    "row_for",
    "set_aside",
    "widen",
]

FILE_NAME = "model.safetensors"
EMBEDDED_LIMIT_BYTES = 8_000_000
_PACKAGE = Path(__file__).parent
_CHECKOUT = _PACKAGE.parent / "weights"


def embedded_path(name: str) -> Path:
    """Where ``arch.tag`` lies in the embedded store, whether or not it is there."""
    if (_PACKAGE.parent / "pyproject.toml").is_file() and _CHECKOUT.is_dir():
        return _CHECKOUT / name / FILE_NAME
    return _PACKAGE / "embedded" / name / FILE_NAME


def candidates(row: Weight) -> list[Path]:
    """Where the file of a row may lie outside the Hub's cache, in the order in which it is looked for."""
    paths = [embedded_path(row.name)]
    if folder := os.environ.get("CHANZOO_WEIGHTS"):
        paths += [Path(folder, f"{row.name}.safetensors"), Path(folder, row.name, FILE_NAME)]
    return paths


def find_local(row: Weight) -> Path | None:
    """The file of a row in the embedded store or in ``$CHANZOO_WEIGHTS``; None if neither has it."""
    return next((path for path in candidates(row) if path.is_file()), None)


def has_weights(row: Weight) -> bool:
    """Whether the weights of a row can be had: on this machine, or published."""
    return bool(row.revision) or find_local(row) is not None


def row_for(arch: str, tag: str | None) -> Weight:
    """The row of an architecture and tag.

    Raises:
        NoWeightsError: There is none; names what exists.
    """
    if tag and (row := WEIGHTS.get(f"{arch}.{tag}")):
        return row
    rows = weights_of(arch)
    if not tag and rows:
        return rows[0]
    asked = f"{arch}.{tag}" if tag else arch
    if rows:
        have = f"{arch} has: " + ", ".join(row.name for row in rows)
    elif WEIGHTS:
        have = "weights exist for: " + ", ".join(sorted({row.arch for row in WEIGHTS.values()}))
    else:
        have = "no weights exist yet"
    raise NoWeightsError(
        f'no pretrained weights exist for "{asked}".\n'
        f"  {have}\n"
        f"  No network was built.   See all: chanzoo ls   Random weights: pretrained=False"
    )


def locate(row: Weight, cache_dir: str | Path | None = None) -> Path:
    """Path of a row's file, fetched from the Hub if need be.

    Raises:
        NoWeightsError: Not on this machine and not published.
        HubError: The Hub cannot be reached, or this process is offline.
        WeightsRejectedError: The Hub's file is not the published one.
    """
    if path := find_local(row):
        return path
    if not row.revision:
        raise NoWeightsError(
            f"the file of {row.name} is not on this machine, and it is not published on the Hub.\n"
            f"  tried  {embedded_path(row.name)}\n"
            f"  tried  $CHANZOO_WEIGHTS = {os.environ.get('CHANZOO_WEIGHTS') or '(not set)'}\n"
            f"  No network was built.   Put {row.name}.safetensors into a folder and name it: "
            "CHANZOO_WEIGHTS=FOLDER"
        )
    return fetch(row, cache_dir)


def cached_path(row: Weight, cache_dir: str | Path | None = None) -> Path:
    """Where the Hub's client keeps the published file of a row, whether or not it is there."""
    return _cache_folder(row, cache_dir) / "snapshots" / row.revision / FILE_NAME


def _cache_folder(row: Weight, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{row.hub_repo.replace('/', '--')}"


def fetch(row: Weight, cache_dir: str | Path | None = None, tqdm_class: Any = None) -> Path:
    """Path of a published row's file in the Hub's cache; downloaded and verified before it gets there.

    One process downloads, others wait for it. A process may die at any moment: what it leaves is never
    taken for the file, and the next call starts over.

    Args:
        row: With a repository and a revision.
        cache_dir: Of the Hub's client, its own by default.
        tqdm_class: Progress bar that the client advances.

    Raises:
        HubError: The file cannot be had.
        WeightsRejectedError: What came is not the published file; it was set aside.
    """
    final = cached_path(row, cache_dir)
    if final.is_file():
        return final
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.utils import WeakFileLock

    folder = _cache_folder(row, cache_dir)
    staging = folder / "unverified"
    locks = folder.parent / ".locks" / folder.name
    blob = folder / "blobs" / row.sha256  # the client's own name for it
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set and it is not in the cache")
        final.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(exist_ok=True)
        locks.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(locks / f"{row.sha256}.fetch.lock"):
            if final.is_file():  # by the process we waited for
                return final
            if not (blob.is_file() and file_sha256(blob) == row.sha256):
                shutil.rmtree(staging, ignore_errors=True)
                staged = Path(
                    hf_hub_download(
                        row.hub_repo,
                        FILE_NAME,
                        revision=row.revision,
                        local_dir=staging,
                        tqdm_class=tqdm_class,
                    )
                )
                found = file_sha256(staged)
                if found != row.sha256:
                    size = staged.stat().st_size
                    raise rejected(row, final, f"sha256 {found}, {size:,} bytes", set_aside(staged, final))
                staged.replace(blob)
            _link(blob, final)
            shutil.rmtree(staging, ignore_errors=True)
        return final
    except WeightsRejectedError:
        raise
    except Exception as error:  # the client raises its own errors, its HTTP library's, and those of files
        raise HubError(
            f"cannot get the weights of {row.name}: {hub_trouble(error)}.\n"
            f"  tried  this machine, then {row.hub_repo} at {row.revision[:7]}\n"
            f"  No network was built.   Try again: chanzoo pull {row.name}   Or put {row.name}.safetensors "
            "into a folder and name it: CHANZOO_WEIGHTS=FOLDER"
        ) from error


def _link(blob: Path, final: Path) -> None:
    """Put a blob in its place as the client does: by a link, or by moving it where there are no links."""
    link = final.with_name(f".{final.name}.link")  # one name, under the lock: a dead process leaves no other
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(os.path.relpath(blob, final.parent))
    except OSError:
        blob.replace(final)
    else:
        link.replace(final)


def hub_trouble(error: BaseException) -> str:
    """What an error of the Hub's client or of the file system means, in a few words."""
    from huggingface_hub import errors

    chain: list[BaseException] = [error]  # the client hides the cause of a failed look-up behind its cache
    while cause := chain[-1].__cause__:
        chain.append(cause)
    answers = [e.response for e in chain if isinstance(e, errors.HfHubHTTPError)]
    status = answers[0].status_code if answers else 0
    for kind, text in (
        (errors.GatedRepoError, "its repository is gated, and this account has no access"),
        (errors.RepositoryNotFoundError, "its repository does not exist, or is private (hf auth login)"),
        (errors.RevisionNotFoundError, "its repository has no such revision"),
        (errors.RemoteEntryNotFoundError, "its repository has no such file"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set and it is not in the cache"),
    ):
        if any(isinstance(e, kind) for e in chain):
            return text
    if status == 429:
        return "the Hub is asked too often (status 429); wait a few minutes"
    if status in (401, 403):
        return f"the Hub does not permit it (status {status}; hf auth login)"
    if status:
        return f"the Hub answered with status {status}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"there is no room for it on the disk ({error.strerror})"
    if any(isinstance(e, errors.LocalEntryNotFoundError) for e in chain):
        last = str(chain[-1]).splitlines()[0].rstrip(".") if len(chain) > 1 and str(chain[-1]) else ""
        return "the Hub cannot be reached" + (f" ({last})" if last else "")
    first = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
    if any(kind.__name__ == "TransportError" for kind in type(error).__mro__):  # of the HTTP library
        return f"the Hub cannot be reached ({first})"
    return first


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def set_aside(path: Path, final: Path | None = None) -> Path:
    """Rename a file that is not what it should be, so that nothing takes it for the published one.

    Args:
        path: The file; of a link, what it points to is moved and the link removed.
        final: Whose name it takes, with ``.rejected`` behind; its own by default.
    """
    real = path.resolve()
    aside = (final or path).with_name((final or path).name + ".rejected")
    real.replace(aside)
    if path.is_symlink():
        path.unlink()
    return aside


def load_tensors(row: Weight, path: Path) -> dict[str, Tensor]:
    """Read the file of a row after checking that it is the published one.

    16-bit floats come back as 32-bit ones, so that adapting them to a network rounds nothing.

    Raises:
        WeightsRejectedError: The file is unreadable, has another size or another sha256. In the Hub's
            cache it is set aside, for the next call to fetch it again.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise rejected(row, path, f"unreadable: {error.strerror or error}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != row.sha256:
        aside = set_aside(path) if path.parts[-3:-1] == ("snapshots", row.revision) else None
        raise rejected(row, path, f"sha256 {digest}, {len(data):,} bytes", aside)
    return widen(parse_tensors(data, path))


def widen(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with 16-bit floats as 32-bit ones."""
    return {
        key: value.float() if value.is_floating_point() and value.itemsize == 2 else value
        for key, value in tensors.items()
    }


def parse_tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file held in memory.

    Raises:
        WeightsRejectedError: The bytes are not safetensors (a pickle is never opened).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise WeightsRejectedError(
            f"{path} is not a safetensors file: {error}\n"
            "  No tensor was loaded and no network was built; other formats are never opened.",
            path=str(path),
            expected="a safetensors file",
            found=str(error),
        ) from error


def rejected(row: Weight, path: Path, found: str, aside: Path | None = None) -> WeightsRejectedError:
    """The error for a file that is not the published one of a row; ``aside`` says where it went."""
    expected = f"sha256 {row.sha256}, {row.file_bytes:,} bytes"
    if aside is None:
        after = (
            "It was not opened, and no network was built.   Restore it, or remove it to use another source."
        )
    else:
        after = (
            f"It was not opened, no network was built, and it is now {aside.name}.   "
            f"Fetch it again: chanzoo pull {row.name}"
        )
    return WeightsRejectedError(
        f"{path} is not the published file of {row.name}\n"
        f"  expected  {expected}\n"
        f"  found     {found}\n"
        f"  {after}",
        path=str(path),
        expected=expected,
        found=found,
    )
