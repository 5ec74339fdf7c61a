"""``chanzoo pull``: weights ahead of use, verified."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .common import add_format, emit, human_bytes, say

if TYPE_CHECKING:
    from ..weights import Weight

HELP = "fetch weights from the Hugging Face Hub and verify them"
EXAMPLES = """\
  chanzoo pull ce_resnet50.tin          one weight
  chanzoo pull "ce_*" "cifar_*"         by pattern, several at once
  chanzoo pull all --format json        everything, for programs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help="a weight, an architecture, a pattern, or all"
    )
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="cache of the Hub's client (default: its own, see chanzoo doctor)"
    )
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Pull; the exit code is the worst of the errors'."""
    from ..hub.pull import pull, select

    rows = select(args.names)
    results = {}
    try:
        with bars(len(rows)) as bar:
            for result in pull(rows, args.cache_dir, bar):
                results[result.name] = result
    except KeyboardInterrupt:
        say(f"chanzoo: interrupted; nothing was left half written.   Resume: chanzoo pull {rows[0].name}")
        sys.stdout.flush()
        os._exit(130)  # downloads run in threads that Python would wait for
    done = [results[row.name] for row in rows]
    size = {row.name: row.file_bytes for row in rows}
    data = [
        {"name": r.name, "source": r.source, "path": str(r.path or ""), "error": str(r.error or "")}
        for r in done
    ]
    states = {"here": "was here", "hub": "pulled", "": "FAILED"}
    table = [(r.name, states[r.source], human_bytes(size[r.name]), str(r.path or "")) for r in done]
    emit(data, args.format == "json", ("name", "state", "size", "file"), table)
    for r in done:
        if r.error:
            say(f"chanzoo: {r.error}")
    return max((r.error.exit_code for r in done if r.error), default=0)


@contextlib.contextmanager
def bars(count: int) -> Iterator[Callable[[Weight], Any] | None]:
    """One bar per download on standard error, as classes for the Hub's client; silent ones elsewhere."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    if not sys.stderr.isatty():
        yield lambda row: Silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def make(row: Weight) -> Any:
            task = progress.add_task(row.name, total=row.file_bytes)

            class Bar(Silent):
                def update(self, n: float | None = 1) -> bool | None:
                    progress.advance(task, n or 0)
                    return super().update(n)

            return Bar

        yield make
