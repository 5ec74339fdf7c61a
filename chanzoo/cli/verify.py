"""``chanzoo verify``: whether the weight files on this machine are the published ones."""

from __future__ import annotations

import argparse

from .common import add_format, emit, say

HELP = "verify the weight files on this machine, and set tampered ones aside"
EXAMPLES = """\
  chanzoo verify                        every weight, wherever it lies
  chanzoo verify ce_cifar_resnet20.c10j one weight
  chanzoo verify all --format json      for programs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "names", nargs="*", default=["all"], metavar="NAME", help="a weight, a pattern, or all (default)"
    )
    parser.add_argument("--cache-dir", metavar="DIR", help="cache of the Hub's client (default: its own)")
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Verify; 3 if a file is not the published one."""
    from ..hub.pull import select, verify

    rows = select(args.names)
    checked = list(verify(rows, args.cache_dir))
    absent = [row.name for row in rows if row.name not in {item.name for item in checked}]
    data = [
        {"name": c.name, "path": str(c.path), "ok": not c.error, "error": str(c.error or "")} for c in checked
    ]
    data += [{"name": name, "path": "", "ok": None, "error": ""} for name in absent]
    table = [(c.name, "BAD" if c.error else "ok", str(c.path)) for c in checked]
    table += [(name, "absent", "") for name in absent]
    emit(data, args.format == "json", ("name", "state", "file"), table)
    bad = [c.error for c in checked if c.error]
    for error in bad:
        say(f"chanzoo: {error}")
    return max((error.exit_code for error in bad), default=0)
