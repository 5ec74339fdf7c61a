"""Folders that commands write: refused before any work if they could not be written in the end."""

from __future__ import annotations

from pathlib import Path

import pytest

COMMANDS = (
    ("prune", "cifar_resnet20", "--method", "l1", "--macs", "0.5x"),
    ("condense", "condensenet_cifar50"),
    ("inspect", "condensenet_cifar50", "--reuse"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_an_output_that_cannot_be_written(cli, tmp_path: Path, command: tuple[str, ...]) -> None:
    file, full = tmp_path / "file", tmp_path / "full"
    file.write_text("mine")
    full.mkdir()
    (full / "letter.txt").write_text("mine")
    for place, words in (
        (file / "deep", f'"{file}": Not a directory.\n  expected  a place where folders can be made'),
        (file, "is a file; name a folder."),
        (full, "is not empty.\n  Nothing was "),
    ):
        done = cli(*command, "--weights", "none", "-o", place)
        assert done.code == 2 and words in done.err, done.err
    done = cli(*command, "--weights", "none", "-o", full, "--overwrite")
    assert done.code == 2 and "holds what is not ours to replace: letter.txt" in done.err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full", "letter.txt"]
