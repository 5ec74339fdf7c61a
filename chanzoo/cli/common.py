"""What the commands share: output for people and programs, progress, and finding and building a network."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ChanzooError, HubError, NoWeightsError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from ..weights import Weight

__all__ = [
    "add_format",
    "add_model_options",
    "build_model",
    "check_file",
    "check_name",
    "emit",
    "human_bytes",
    "human_count",
    "natural",
    "percent",
    "positive",
    "progress_bar",
    "say",
    "where",
]


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add ``--format``."""
    parser.add_argument(
        "--format",
        choices=("table", "json"),
        default="table",
        help="for people or for programs (default: table)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`build_model` reads."""
    parser.add_argument(
        "--weights",
        choices=("pretrained", "none"),
        help="none: random ones, seed 0 (default: pretrained, unless there is a --checkpoint)",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="load weights from a file of a training run"
    )
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of the checkpoint")
    parser.add_argument("--num-classes", type=positive, metavar="N", help="outputs, if not the network's own")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")


def positive(text: str) -> int:
    """A whole number from 1 on; for ``type=`` of argparse."""
    with contextlib.suppress(ValueError):
        if (number := int(text)) > 0:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")


def natural(text: str) -> int:
    """A whole number from 0 on; for ``type=`` of argparse."""
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= 0:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")


def say(text: str) -> None:
    """Words for the person at the terminal."""
    print(text, file=sys.stderr)


def emit(data: Any, as_json: bool, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a result on standard output.

    Args:
        data: For programs.
        as_json: Whether a program reads it.
        headers: Of the table's columns; all empty for a list of keys and values.
        rows: Of the table.
    """
    if as_json:
        print(json.dumps(_finite(data), indent=2, ensure_ascii=False))
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(*headers, box=None, show_header=any(headers), header_style="bold", pad_edge=False)
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        Console().print(table)
    else:
        lines = [headers, *rows] if any(headers) else rows
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _finite(value: Any) -> Any:
    """The same data with null for numbers that JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def human_count(number: int | None) -> str:
    """A count with a unit: 269.7 k, 4.09 G; empty for None."""
    if number is None:
        return ""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.4g} {name}"
    return str(number)


def human_bytes(number: int) -> str:
    """Bytes with a unit, in powers of 1000."""
    return f"{human_count(number)}B" if number >= 1000 else f"{number} B"


def percent(fraction: float | None) -> str:
    """A fraction as text; empty for None."""
    return "" if fraction is None else f"{100 * fraction:.2f} %"


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error, as a function of (done, total); None where nobody watches."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def where(row: Weight) -> str:
    """Where the file of a weight is: embedded, local, hub or none."""
    from ..store import embedded_path, find_local

    path = find_local(row)
    if path is None:
        return "hub" if row.revision else "none"
    return "embedded" if path == embedded_path(row.name) else "local"


def check_file(path: Path | None, what: str) -> None:
    """Refuse a file that is not there.

    Raises:
        UsageError: It is missing or a folder.
    """
    if path is not None and not path.is_file():
        raise UsageError(f'no {what} "{path}".' + (" It is a folder." if path.is_dir() else ""))


def check_name(name: str) -> None:
    """Refuse a name that ``timm.create_model`` does not know.

    Raises:
        UsageError: No such architecture or tag; names the nearest.
    """
    import timm

    if name.startswith(("hf-hub:", "local-dir:")) or Path(name, "config.json").is_file():
        return
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch.lower(), timm.list_models(), n=1)
        if not near:
            raise UsageError(f'no model "{name}".   See all: chanzoo ls')
        raise UsageError(f'no model "{name}". Did you mean {near[0]}?   See all: {_listing(near[0])}')
    if not tag:
        return
    have = [n for n in timm.list_models(f"{arch}.*", include_tags=True) if n.startswith(f"{arch}.")]
    if name not in have:
        near = difflib.get_close_matches(name, have, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f'no weights "{name}".{hint}\n  {arch} has: {", ".join(have) or "none"}')


def _listing(name: str) -> str:
    """Command that lists the relatives of a model."""
    from .. import list_models

    if list_models(name):
        return f'chanzoo ls "{name.partition("_")[0]}_*"'
    return f"python -c \"import timm; print(timm.list_models('{name[:4]}*'))\""


def build_model(name: str, args: argparse.Namespace) -> nn.Module:
    """Build a network in evaluation mode with the weights that the options ask for, on the CPU.

    Raises:
        UsageError: A name or file that does not exist, or a device that this machine has not got.
        NoWeightsError: There are no such weights.
        WeightsRejectedError: The file is not the published one.
        HubError: The weights are not here and the Hub cannot be reached.
    """
    if Path(name, "config.json").is_file():
        name = f"local-dir:{name}"
    check_name(name)
    check_file(args.checkpoint, "checkpoint")
    if args.checkpoint and args.weights:
        raise UsageError("--checkpoint and --weights exclude each other.")
    check_device(args.device)
    import timm
    import torch

    from ..models import check_folder

    if name.startswith("local-dir:"):
        check_folder(name.removeprefix("local-dir:"))
    torch.manual_seed(0)
    pretrained = not args.checkpoint and args.weights != "none"
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=args.num_classes)
    except ChanzooError:
        raise
    except Exception as error:
        raise _explain(name, error) from error
    if args.checkpoint:
        load_checkpoint(model, name, args.checkpoint, args.ema)
    return model.eval()


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or this machine has not got.

    Raises:
        UsageError: Likewise.
    """
    import torch

    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f'no device "{device}" here: {str(error).splitlines()[0]}') from error
    if found.type == "meta":
        raise UsageError(
            f'no device "{device}" here: nothing can be computed on it.\n  expected  cpu, cuda, cuda:1 or mps'
        )


def load_checkpoint(model: nn.Module, name: str, path: Path, ema: bool) -> None:
    """Load a file of a training run, tensors only.

    Raises:
        UsageError: It cannot be read, or belongs to another network.
    """
    from timm.models import load_checkpoint as load

    try:
        load(model, str(path), use_ema=ema)
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        shown = "\n".join(f"  {line.strip()}"[:200] for line in lines[:4])
        raise UsageError(f'"{path}" is no checkpoint of {name}:\n{shown}\n  Nothing was done.') from error


def _explain(name: str, error: Exception) -> Exception:
    """What timm's and the Hub client's errors mean to a user; an unexpected one stays what it is."""
    from urllib.error import URLError

    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError | HfHubHTTPError | URLError | ConnectionError):
        return HubError(
            f"cannot get the weights of {name}: the Hub cannot be reached or has not got them.\n"
            "  No network was built.   Go online, or pass --checkpoint FILE or --weights none"
        )
    if isinstance(error, RuntimeError) and "No pretrained weights exist" in str(error):
        return NoWeightsError(
            f'no pretrained weights exist for "{name}".\n'
            "  No network was built.   Pass --checkpoint FILE, or --weights none for random ones"
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return UsageError(f'cannot build "{name}": a file is missing: {error}')
    return error
