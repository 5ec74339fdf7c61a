"""Pull weights ahead of use, several at once, and verify what is on this machine."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import weights
from ..errors import ChanzooError, UsageError
from ..store import cached_path, candidates, fetch, file_sha256, find_local, locate, rejected, set_aside
from ..weights import Weight

__all__ = ["Checked", "Pulled", "pull", "select", "verify"]

PARALLEL = 8


@dataclass(frozen=True)
class Pulled:
    """A weight that was asked for.

    Attributes:
        name: ``arch.tag``.
        path: Its verified file; None after an error.
        source: ``here`` (it was on this machine), ``hub``, or empty after an error.
        error: Why there is none.
    """

    name: str
    path: Path | None
    source: str
    error: ChanzooError | None = None


@dataclass(frozen=True)
class Checked:
    """A file of a weight.

    Attributes:
        name: ``arch.tag``.
        path: The file; where it was, if it was set aside.
        error: None if it is the published one.
    """

    name: str
    path: Path
    error: ChanzooError | None = None


def select(names: Sequence[str]) -> list[Weight]:
    """Rows by name, architecture or glob, in the order asked for, each once; ``all`` for every one.

    Raises:
        UsageError: One fits nothing; names the nearest.
    """
    rows: dict[str, Weight] = {}
    for name in names:
        pattern = "*" if name == "all" else name
        found = [
            row
            for row in weights.WEIGHTS.values()
            if fnmatch.fnmatchcase(row.name, pattern) or fnmatch.fnmatchcase(row.arch, pattern)
        ]
        if not found:
            near = difflib.get_close_matches(name, weights.WEIGHTS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UsageError(f'no weights "{name}".{hint}   See all: chanzoo ls --pretrained')
        rows |= {row.name: row for row in found}
    return list(rows.values())


def pull(
    rows: Sequence[Weight],
    cache_dir: str | Path | None = None,
    bar: Callable[[Weight], Any] | None = None,
) -> Iterator[Pulled]:
    """Bring weights onto this machine, several at a time; what is here already is verified.

    Args:
        rows: See :func:`select`.
        cache_dir: Of the Hub's client, its own by default.
        bar: Makes the progress bar class of a download.

    Yields:
        One result per row, in the order in which they end; an error of one stops no other.
    """

    def one(row: Weight) -> Pulled:
        try:
            here = find_local(row)
            if here is None and row.revision and cached_path(row, cache_dir).is_file():
                here = cached_path(row, cache_dir)
                if check(row, here).error:  # it was set aside: fetch it again
                    here = None
            elif here is not None and (error := check(row, here, move=False).error):
                raise error
            if here is not None:
                return Pulled(row.name, here, "here")
            if not row.revision:
                locate(row)  # says where its weights are
            return Pulled(row.name, fetch(row, cache_dir, bar and bar(row)), "hub")
        except ChanzooError as error:
            return Pulled(row.name, None, "", error)

    workers = ThreadPoolExecutor(min(PARALLEL, len(rows) or 1))
    try:
        yield from (done.result() for done in as_completed([workers.submit(one, row) for row in rows]))
    finally:
        workers.shutdown(wait=False, cancel_futures=True)


def verify(rows: Sequence[Weight], cache_dir: str | Path | None = None) -> Iterator[Checked]:
    """Compare every file of the rows on this machine with its row; one that differs is set aside.

    Yields:
        One result per file; a row without a file on this machine has none.
    """
    for row in rows:
        paths = candidates(row)
        if row.revision:
            paths.append(cached_path(row, cache_dir))
        yield from (check(row, path) for path in paths if path.is_file())


def check(row: Weight, path: Path, move: bool = True) -> Checked:
    """Compare one file with its row; with ``move``, one that differs is renamed to ``….rejected``."""
    try:
        found = file_sha256(path)
    except OSError as error:
        return Checked(row.name, path, rejected(row, path, f"unreadable: {error.strerror or error}"))
    if found == row.sha256:
        return Checked(row.name, path)
    found = f"sha256 {found}, {path.stat().st_size:,} bytes"
    try:
        aside = set_aside(path) if move else None
    except OSError:  # a folder that this user may not write to
        aside = None
    return Checked(row.name, path, rejected(row, path, found, aside))
