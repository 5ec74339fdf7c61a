"""The frame of the command line: help, exit codes, and that a user's mistake never shows a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import chanzoo
from chanzoo.cli import main as frame
from chanzoo.errors import UsageError


def test_help_and_version(python) -> None:
    done = python("-m", "chanzoo", "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("usage: chanzoo")
    for name in ("ls", "info", "classify", "eval", "inspect", "recipe", "doctor", "run", "autoload"):
        assert f"\n    {name} " in done.out
    for code in ("0    done", "1    failed", "2    wrong usage", "3    verif", "4    the Hug", "130  interr"):
        assert f"  {code}" in done.out


@pytest.mark.parametrize("name", frame.COMMANDS)
def test_every_command_has_examples(cli, name: str) -> None:
    done = cli(name, "--help")
    assert done.code == 0
    examples = done.out.partition("\nexamples:\n")[2]
    assert f"  chanzoo {name}" in examples


def test_version(cli) -> None:
    assert cli("--version") == (0, f"chanzoo {chanzoo.__version__}\n", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["clasify"], 'no command "clasify". Did you mean classify?   See all: chanzoo --help'),
        (["zzz"], 'no command "zzz".   See all: chanzoo --help'),
        (["ls", "--nope"], "unrecognized arguments: --nope\n  See: chanzoo --help"),
        (["eval", "resnet18"], "the following arguments are required: DATA_DIR\n  See: chanzoo eval --help"),
        (["classify", "x", "--top", "0"], "argument --top: '0' is not a whole number of 1 or more\n"),
        ([], "the following arguments are required: COMMAND\n  See: chanzoo --help"),
    ],
)
def test_wrong_usage(cli, args: list[str], message: str) -> None:
    done = cli(*args)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"chanzoo: {message}")


def test_a_mistake_shows_no_traceback_and_debug_does(python) -> None:
    done = python("-m", "chanzoo", "info", "ce_resnet5O")
    assert (done.code, done.out) == (2, "")
    expected = 'no model "ce_resnet5O". Did you mean ce_resnet50?   See all: chanzoo ls "ce_*"'
    assert done.err == f"chanzoo: {expected}\n"
    done = python("-m", "chanzoo", "info", "ce_resnet5O", "--debug")
    assert done.code == 1
    assert done.err.startswith("Traceback") and "UsageError" in done.err


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(args: object) -> int:
        raise error

    stub = SimpleNamespace(HELP="x", EXAMPLES="", add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(frame.COMMANDS, "ls", stub)


def test_interrupted(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert cli("ls") == (130, "", "chanzoo: interrupted; nothing was left half written.\n")


def test_an_error_of_the_system_is_a_message(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, PermissionError(13, "Permission denied", "/out"))
    assert cli("ls") == (1, "", "chanzoo: [Errno 13] Permission denied: '/out'\n")


def test_a_defect_of_ours_is_not_hidden(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli("ls")


def test_of_several_processes_one_speaks(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, UsageError("no"))
    monkeypatch.setenv("RANK", "1")
    assert cli("ls") == (2, "", "")


def test_debug_raises(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, UsageError("no"))
    with pytest.raises(UsageError):
        cli("ls", "--debug")


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    root = str(Path(chanzoo.__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-m", "chanzoo", "ls"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    with process.stderr as err:
        assert err.read() == b""
    assert process.wait() == 1
