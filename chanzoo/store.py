"""Where the bytes of a weight come from, and the check that they are the published ones.

Sources in order: an explicit file, the embedded store (``weights/`` of a checkout, ``embedded/`` inside
an installed wheel), the folder named by ``$CHANZOO_WEIGHTS``, the Hub at the row's pinned revision. The
sha256 of the row is compared before anything looks inside the bytes, whatever the source, and the
tensors are read from the very bytes that were compared.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import HubError, NoWeightsError, WeightsRejectedError
from .weights import WEIGHTS, Weight, weights_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["embedded_path", "find_local", "has_weights", "load_tensors", "locate", "parse_tensors", "row_for"]

FILE_NAME = "model.safetensors"
EMBEDDED_LIMIT_BYTES = 8_000_000
_PACKAGE = Path(__file__).parent
_CHECKOUT = _PACKAGE.parent / "weights"


def embedded_path(name: str) -> Path:
    """Where ``arch.tag`` lies in the embedded store, whether or not it is there."""
    if (_PACKAGE.parent / "pyproject.toml").is_file() and _CHECKOUT.is_dir():
        return _CHECKOUT / name / FILE_NAME
    return _PACKAGE / "embedded" / name / FILE_NAME


def find_local(row: Weight) -> Path | None:
    """The file of a row in the embedded store or in ``$CHANZOO_WEIGHTS``; None if neither has it."""
    candidates = [embedded_path(row.name)]
    if folder := os.environ.get("CHANZOO_WEIGHTS"):
        candidates += [Path(folder, f"{row.name}.safetensors"), Path(folder, row.name, FILE_NAME)]
    return next((path for path in candidates if path.is_file()), None)


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
    """Path of a row's file, fetched from the Hub if need be; not yet verified.

    Raises:
        NoWeightsError: Not on this machine and not published.
        HubError: The Hub cannot be reached, or this process is offline.
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
    return _download(row, cache_dir)


def _download(row: Weight, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    ways = (
        f"  tried  this machine, then {row.hub_repo} at {row.revision[:7]}\n"
        f"  No network was built.   Go online, or put {row.name}.safetensors into a folder and name it: "
        "CHANZOO_WEIGHTS=FOLDER"
    )
    try:
        return Path(hf_hub_download(row.hub_repo, FILE_NAME, revision=row.revision, cache_dir=cache_dir))
    except LocalEntryNotFoundError as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
        why = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else "the Hub cannot be reached"
        raise HubError(f"cannot get the weights of {row.name}: {why}.\n{ways}") from error
    except (HfHubHTTPError, OSError) as error:
        raise HubError(f"cannot get the weights of {row.name}: {error}\n{ways}") from error


def load_tensors(row: Weight, path: Path) -> dict[str, Tensor]:
    """Read the file of a row after checking that it is the published one.

    16-bit floats come back as 32-bit ones, so that adapting them to a network rounds nothing.

    Raises:
        WeightsRejectedError: The file is unreadable, has another size or another sha256.
    """
    expected = f"sha256 {row.sha256}, {row.file_bytes:,} bytes"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _rejected(row.name, path, expected, f"unreadable: {error.strerror or error}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != row.sha256:
        raise _rejected(row.name, path, expected, f"sha256 {digest}, {len(data):,} bytes")
    tensors = parse_tensors(data, path)
    return {key: value.float() if value.itemsize == 2 else value for key, value in tensors.items()}


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


def _rejected(name: str, path: Path, expected: str, found: str) -> WeightsRejectedError:
    return WeightsRejectedError(
        f"{path} is not the published file of {name}\n"
        f"  expected  {expected}\n"
        f"  found     {found}\n"
        "  It was not opened, and no network was built.   Restore it, or remove it to use another source.",
        path=str(path),
        expected=expected,
        found=found,
    )
