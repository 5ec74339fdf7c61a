"""``chanzoo autoload``: have chanzoo imported with timm, in every Python of this environment."""

from __future__ import annotations

import argparse
import os
import sysconfig
from pathlib import Path

from .common import emit, say

HELP = "import chanzoo whenever timm is imported, in this environment"
EXAMPLES = """\
  chanzoo autoload status
  chanzoo autoload enable     from now on timm's own scripts, and processes that they start, know our networks
  chanzoo autoload disable    takes it back

Enabling writes three small files into the site-packages folder of this environment. Python runs them at
start-up; they wait for timm and import chanzoo after it. Off for one process: CHANZOO_AUTOLOAD=0.
"""
MODULE = "_chanzoo_autoload"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("action", choices=("enable", "disable", "status"), help="what to do")
    parser.add_argument(
        "--format", choices=("table", "json"), default="table", help="of status (default: table)"
    )


def run(args: argparse.Namespace) -> int:
    """Write, remove, or look for the files."""
    if args.action == "enable":
        enable()
        say(f"chanzoo: autoload is enabled in {folder()}.   Undo: chanzoo autoload disable")
    elif args.action == "disable":
        removed = disable()
        say(f"chanzoo: autoload is disabled; {removed} files were removed from {folder()}.")
    else:
        data = status()
        rows = [("autoload", data["state"]), ("folder", data["folder"])]
        if data["switched_off"]:
            rows.append(("here", "switched off by CHANZOO_AUTOLOAD=0"))
        emit(data, args.format == "json", ("", ""), [(key, str(value)) for key, value in rows])
    return 0


def folder() -> Path:
    """Where this environment keeps its packages."""
    return Path(sysconfig.get_path("purelib"))


def files() -> dict[str, str]:
    """Names and contents, the one that makes Python start the hook last.

    ``.start`` is what Python 3.15 reads (PEP 829); older ones read the import line of ``.pth``.
    """
    source = (Path(__file__).parent.parent / "autoload.py").read_text(encoding="utf-8")
    return {
        f"{MODULE}.py": source,
        f"{MODULE}.start": f"{MODULE}:install\n",
        f"{MODULE}.pth": f"import {MODULE}; {MODULE}.install()\n",
    }


def enable() -> None:
    """Write every file, whole."""
    for name, text in files().items():
        partial = folder() / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder() / name)


def disable() -> int:
    """Remove the files; returns how many there were."""
    found = [path for name in reversed(files()) if (path := folder() / name).is_file()]
    for path in found:
        path.unlink()
    return len(found)


def status() -> dict[str, str | bool]:
    """What there is: ``enabled``, ``disabled``, ``incomplete``, or ``outdated`` (of another chanzoo)."""
    wanted = files()
    there = [name for name in wanted if (folder() / name).is_file()]
    if not there:
        state = "disabled"
    elif len(there) < len(wanted):
        state = "incomplete"
    else:
        same = all((folder() / name).read_text(encoding="utf-8") == text for name, text in wanted.items())
        state = "enabled" if same else "outdated"
    off = os.environ.get("CHANZOO_AUTOLOAD") == "0"
    return {"state": state, "switched_off": off, "folder": str(folder())}
