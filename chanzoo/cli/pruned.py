"""What ``chanzoo prune`` leaves behind: a report, the network under a name, tables and pictures."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import human_bytes, human_count, percent
from .inspect import write_csv

if TYPE_CHECKING:
    from torch import nn

    from ..compress import Pruned, RankTable
    from ..measure.accuracy import Accuracy

__all__ = ["make_report", "saved_source", "table", "write"]

_PANELS = 9  # layers in the picture of stability


def make_report(
    args: argparse.Namespace, model: nn.Module, pruned: Pruned, accuracy: dict[str, Accuracy], layers: int
) -> dict[str, Any]:
    """All figures, for programs."""
    from ..hub.saved import input_size_of
    from ..macs import count_macs, count_params
    from ..measure.latency import measure_latency

    size = input_size_of(model)
    networks = {"full": model, "pruned": pruned.model}
    seconds = measure_latency(networks, size)
    targets = {"macs", "params", "latency", "rates", "compress_rate"}
    target = next(f"--{n.replace('_', '-')} {v}" for n in sorted(targets) if (v := getattr(args, n)))
    return {
        "model": args.name,
        "weights": str(args.checkpoint) if args.checkpoint else args.weights or "pretrained",
        "method": args.method,
        "target": target,
        "align": args.align,
        "min_width": args.min_width,
        "round_to": args.round_to,
        "keep_head": not args.prune_head,
        "seed": args.seed,
        "data": args.data,
        "images": pruned.ranks.images if pruned.ranks else 0,
        "recalibrated_layers": layers,
        "input_size": list(size),
        "macs": {name: count_macs(net, size) for name, net in networks.items()},
        "params": {name: count_params(net) for name, net in networks.items()},
        "bytes": {
            name: sum(t.numel() * t.element_size() for t in net.state_dict().values())
            for name, net in networks.items()
        },
        "latency_ms": {name: round(1000 * value, 4) for name, value in seconds.items()},
        "top1": {name: result.top1 for name, result in accuracy.items()},
        "groups": [
            {
                "name": group.root,
                "channels": group.channels,
                "kept": len(pruned.kept.get(group.root, range(group.channels))),
                "whole_because": group.reason,
            }
            for group in pruned.groups
        ],
        "finetune": finetune_command(args),
        "output": str(args.output),
    }


def finetune_command(args: argparse.Namespace) -> str:
    """The command of timm's train script that trains the narrow network further."""
    options = [
        *("--model", f"local-dir:{args.output}", "--pretrained", "--data-dir", args.data or "DATA"),
        *("--opt", "sgd", "--momentum", "0.9", "--weight-decay", "5e-4", "--lr", "0.02", "-b", "128"),
        *("--sched", "cosine", "--sched-on-updates", "--warmup-epochs", "0", "--min-lr", "0"),
        *("--epochs", "20", "--smoothing", "0", "--seed", str(args.seed), "--device", args.device),
    ]
    return 'python -P "$TIMM_REPO/train.py" --device-modules chanzoo ' + shlex.join(options)


def saved_source(args: argparse.Namespace, model: nn.Module, pruned: Pruned, report: dict[str, Any]) -> Any:
    """The narrow network under a name that builds it from its widths alone."""
    from ..hub.folders import DATA_KEYS, Source, cfg_of
    from ..hub.saved import named_network

    named = named_network(pruned.model, *base_of(args, model))
    cfg = cfg_of(model)
    keys = ("label_names", "label_descriptions", "license", "paper_ids")
    about = {
        "base_model": "" if Path(args.name).exists() else args.name.removeprefix("hf-hub:").partition("@")[0],
        "method": args.method,
        "command": f"chanzoo prune {args.name} --method {args.method} {report['target']}",
    }
    return (
        Source(
            model=named,
            state=named.state_dict(),
            cfg={key: cfg[key] for key in keys if cfg.get(key)},
            data={key: cfg[key] for key in DATA_KEYS if cfg.get(key) is not None},
        ),
        {"chanzoo": {key: value for key, value in about.items() if value}},
    )


def base_of(args: argparse.Namespace, model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Architecture of the full network, and the arguments that it was built with."""
    from ..hub.folders import CONFIG, cfg_of
    from ..weights import WEIGHTS, weights_of

    folder = Path(args.name.removeprefix("local-dir:"))
    arch, found = str(cfg_of(model).get("architecture")), dict(getattr(model, "_model_args", None) or {})
    if (folder / CONFIG).is_file():
        found = json.loads((folder / CONFIG).read_bytes()).get("model_args", {})
    elif not args.name.startswith("hf-hub:"):
        rows = [WEIGHTS[args.name]] if args.name in WEIGHTS else weights_of(args.name)
        found = dict(rows[0].model_args) if rows and args.weights != "none" else {}
    return arch, {**found, "num_classes": getattr(model, "num_classes", 1000)}


def write(
    folder: Path,
    args: argparse.Namespace,
    source: Any,
    report: dict[str, Any],
    pruned: Pruned,
    history: list[RankTable],
) -> None:
    """All files."""
    from ..hub.saved import network_files

    for path, content in network_files(*source).items():
        (folder / path).write_bytes(content)
    _write_json(folder / "report.json", report)
    widths = [(g["name"], g["channels"], g["kept"], g["whole_because"]) for g in report["groups"]]
    write_csv(folder / "widths.csv", ("group", "channels", "kept", "whole_because"), widths)
    (folder / "finetune.txt").write_text(report["finetune"] + "\n", encoding="utf-8")
    if pruned.ranks:
        pruned.ranks.to_csv(folder / "ranks.csv")
    if not args.no_plots:
        draw(folder, widths, pruned.ranks, history)


def draw(folder: Path, widths: list[Any], ranks: RankTable | None, history: list[RankTable]) -> None:
    """The pictures, and the table that one of them shows."""
    from ..measure.plots import plot_rank_histograms, plot_rank_stability, plot_widths

    plot_widths([row[:3] for row in widths], folder / "widths.png")
    if not ranks:
        return
    names = [site.name for site in ranks.sites]
    plot_rank_histograms(
        {name: (ranks.mean(name).tolist(), ranks.max_ranks[name]) for name in names},
        folder / "rank_histograms.png",
    )
    if len(history) > 1:
        rows = [
            (name, table.images, index, f"{mean:.6f}")
            for name in names
            for table in history
            for index, mean in enumerate(table.mean(name).tolist())
        ]
        write_csv(folder / "rank_stability.csv", ("site", "images", "filter", "mean"), rows)
        shown = names[:: max(1, len(names) // _PANELS)][:_PANELS]
        series = {name: [(t.images, t.mean(name).tolist()) for t in history] for name in shown}
        plot_rank_stability(series, folder / "rank_stability.png")


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The figures for people."""
    rows = []
    shows: dict[str, Callable[[Any], str]] = {
        "macs": human_count,
        "params": human_count,
        "bytes": human_bytes,
        "latency_ms": lambda value: f"{value:.2f}",
    }
    for key, show in shows.items():
        full, small = report[key]["full"], report[key]["pruned"]
        rows.append((key, show(full), show(small), f"{small / full:.3f}"))
    top1 = report["top1"]
    for stage in ("sliced", "recalibrated"):
        if stage in top1:
            rows.append((f"top-1, {stage}", percent(top1["full"]), percent(top1[stage]), ""))
    kept = sum(group["kept"] for group in report["groups"])
    channels = sum(group["channels"] for group in report["groups"])
    rows.append(("channels", str(channels), str(kept), f"{kept / channels:.3f}"))
    return rows
