"""The documents keep their word: README's Python runs, its commands exist, docstring examples hold."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import chanzoo
from chanzoo.weights import WEIGHTS

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / ".ci" / "run"
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Importing the entry point would run it.
MODULES = [
    m.name for m in pkgutil.walk_packages(chanzoo.__path__, "chanzoo.") if not m.name.endswith("__main__")
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(text: str) -> set[str]:
    """What follows ``chanzoo`` on a command line."""
    return set(re.findall(r"(?:^|&& |-m |`)chanzoo ([a-z]+)\b", text, re.MULTILINE))


def test_every_python_block_imports_us_first() -> None:
    assert blocks("python")
    assert all(block.startswith("import chanzoo\n") for block in blocks("python"))


def test_the_python_blocks_run(tmp_path: Path) -> None:
    chosen = [b for b in blocks("python") if WEIGHTS or "pretrained=True" not in b]  # no row, no weights
    script = tmp_path / "readme.py"
    script.write_text("\n".join(chosen))
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_the_named_commands_exist() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "chanzoo", "--help"], capture_output=True, text=True, check=True
    )
    listed = re.findall(r"^    ([a-z]+) ", done.stdout, re.MULTILINE)
    assert re.findall(r"^\| `chanzoo ([a-z]+)`", README, re.MULTILINE) == listed, "the table of commands"
    assert commands(README) == set(listed), "a command that does not exist"
    assert commands((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")) <= set(listed)


@pytest.mark.skipif(not CI.is_file(), reason="the source distribution has no CI script")
def test_ci_finds_the_test_command() -> None:
    script = CI.read_text(encoding="utf-8")
    begin, end = "<!-- test-command:begin -->", "<!-- test-command:end -->"
    assert begin in script and end in script
    block = README.partition(begin)[2].partition(end)[0]
    assert block == '\n```sh\npython -m pip install -e ".[dev]" && python -m pytest\n```\n'


def test_the_command_finder() -> None:
    lines = ["pip install -e . && chanzoo classify x", "python -m chanzoo run y", "see `chanzoo recipe ls`"]
    assert commands("\n".join([*lines, "import chanzoo"])) == {"classify", "run", "recipe"}


def test_the_first_version_of_the_changelog_is_ours() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == chanzoo.__version__


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_linked_files_exist(name: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("name", ["chanzoo", *MODULES])
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch, "chanzoo": chanzoo})
    assert result.failed == 0


@pytest.mark.parametrize("name", ["chanzoo", *MODULES])
def test_what_is_public_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    missing = [n for n in getattr(module, "__all__", []) if not documented(module, n)]
    assert module.__doc__ and missing == []


def documented(module: ModuleType, name: str) -> bool:
    """Whether a public class or function has a docstring of its own; values need none."""
    value = getattr(module, name)
    return bool(value.__doc__) or not (inspect.isclass(value) or inspect.isfunction(value))
