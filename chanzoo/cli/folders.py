"""Folders that commands read and write: with everything or not at all, and never over somebody's files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from ..errors import UsageError

__all__ = ["check_output", "folder_of", "is_folder", "write_whole"]


def check_output(folder: Path, ours: Collection[str], overwrite: bool, source: str = "") -> None:
    """Refuse a folder that cannot or may not be written, before any work.

    Args:
        folder: To be written.
        ours: Names of the files that may be replaced.
        overwrite: Whether to replace them.
        source: What the command reads, as it was named.

    Raises:
        UsageError: It holds something that may not be replaced, is a file or the source, or cannot be made.
    """
    _check_writable(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f'"{folder}" is a file; name a folder.')
    if is_folder(source) and folder.resolve() == folder_of(source).resolve():
        raise UsageError(f'"{folder}" is the network itself: name another folder.')
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not overwrite:
        raise UsageError(f'"{folder}" is not empty.\n  Nothing was written.   Replace it: --overwrite')
    if others := sorted(names.difference(ours)):
        raise UsageError(f'"{folder}" holds what is not ours to replace: {", ".join(others[:5])}')


def _check_writable(folder: Path) -> None:
    """Refuse a folder that could not be written in the end: its parent is missing, a file, or another's.

    Raises:
        UsageError: Likewise.
    """
    parent = folder.resolve().parent
    try:
        while not parent.exists():
            parent = parent.parent
        trial = parent / f".{folder.resolve().name}.partial-{os.getpid()}"
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        raise UsageError(
            f'cannot make the folder "{folder}": "{parent}": {error.strerror}.\n'
            "  expected  a place where folders can be made\n"
            "  Nothing was written."
        ) from error


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder so that it is there with everything or not at all."""
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        write(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def folder_of(name: str) -> Path:
    """Where a network is that was named by its folder."""
    return Path(name.removeprefix("local-dir:"))


def is_folder(name: str) -> bool:
    """Whether a network was named by its folder."""
    return (folder_of(name) / "config.json").is_file()
