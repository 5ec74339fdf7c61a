"""``chanzoo ls``: our networks and their weights."""

from __future__ import annotations

import argparse
import difflib
import fnmatch
from typing import Any

from ..errors import UsageError
from .common import add_format, emit, human_count, percent, say, where

HELP = "list our networks and their weights"
EXAMPLES = """\
  chanzoo ls                      everything, one line per weight
  chanzoo ls "ce_*" --pretrained  only what has weights
  chanzoo ls --cost               with the size and cost of networks that have no weights
  chanzoo ls --format json        for programs
"""
_HEADERS = ("name", "data", "top-1", "params", "MACs", "file")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("glob", nargs="?", default="*", metavar="GLOB", help="names to list (default: all)")
    parser.add_argument(
        "--pretrained", action="store_true", help="only networks with weights, one line per weight"
    )
    parser.add_argument(
        "--cost", action="store_true", help="work out size and cost where no weight row has them"
    )
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """List the networks."""
    from .. import list_models
    from ..weights import weights_of

    entries = []
    for arch in list_models():
        rows = weights_of(arch)
        for row in rows:
            entries.append(
                {
                    "name": row.name,
                    "arch": arch,
                    "tag": row.tag,
                    "dataset": row.dataset,
                    "top1": row.metrics.get("top1"),
                    "params": row.params,
                    "macs": row.macs,
                    "where": where(row),
                }
            )
        if not rows:
            blank = dict.fromkeys(("tag", "dataset", "top1", "params", "macs"))
            entries.append({"name": arch, "arch": arch, **blank, "where": "none"})
    chosen = [
        e for e in entries if fnmatch.fnmatch(e["name"], args.glob) or fnmatch.fnmatch(e["arch"], args.glob)
    ]
    if not chosen:
        near = difflib.get_close_matches(args.glob.strip("*"), {e["arch"] for e in entries}, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f'no network of ours is called "{args.glob}".{hint}   See all: chanzoo ls')
    if args.pretrained:
        chosen = [e for e in chosen if e["tag"]]
        if not chosen:
            say("chanzoo: none of these has weights yet.")
    if args.cost:
        for entry in chosen:
            if not entry["tag"]:
                entry.update(_cost(entry["arch"]))
    table = [
        (
            e["name"],
            e["dataset"] or "",
            percent(e["top1"]),
            human_count(e["params"]),
            human_count(e["macs"]),
            e["where"],
        )
        for e in chosen
    ]
    if chosen or args.format == "json":
        emit(chosen, args.format == "json", _HEADERS, table)
    return 0


def _cost(arch: str) -> dict[str, int]:
    """Parameters and multiply-adds, without memory or computation."""
    import timm
    import torch

    from ..measure import count_macs, count_params

    with torch.device("meta"):
        model = timm.create_model(arch)
    cfg: Any = model.pretrained_cfg
    return {"params": count_params(model), "macs": count_macs(model, cfg["input_size"])}
