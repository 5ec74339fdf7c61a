"""What ``chanzoo prune`` leaves behind: a report, the network under a name, tables and pictures."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .common import human_bytes, human_count, percent, progress_bar
from .folders import folder_of, is_folder
from .inspect import write_csv
from .prune import add_arguments
from .targets import is_share

if TYPE_CHECKING:
    from torch import nn

    from ..compress import Pruned, RankTable
    from ..measure.accuracy import Accuracy
    from .prune import Images

__all__ = ["base_of", "make_report", "measure", "missed", "saved_source", "table", "write"]

_UNTOLD = ("name", "command", "debug", "overwrite", "format")  # options that change nothing in the network
_PANELS = 9  # layers in the picture of stability


def measure(
    args: argparse.Namespace, model: nn.Module, small: nn.Module, data: Images | None
) -> tuple[dict[str, Accuracy], dict[str, int]]:
    """Accuracy at each step; in between the norms of the narrow network are measured anew."""
    from ..compress import recalibrate_norms
    from ..measure.accuracy import evaluate

    accuracy: dict[str, Accuracy] = {}
    recalibrated = {"recalibrated_images": 0, "recalibrated_layers": 0}
    if not data:
        return accuracy, recalibrated

    def judge(name: str, network: nn.Module) -> None:
        with progress_bar(f"accuracy, {name}") as bar:
            options: Any = {"batch_size": args.batch_size, "workers": args.workers}
            accuracy[name] = evaluate(
                network, args.data, split=args.val_split, device=args.device, progress=bar, **options
            )

    judge("full", model)
    judge("sliced", small)
    if args.recalibrate:
        with progress_bar("norms") as bar:

            def progress(done: int, total: int) -> None:
                recalibrated["recalibrated_images"] = done
                if bar:
                    bar(done, total)

            layers = recalibrate_norms(
                small, data.batches(args.recalibrate), args.recalibrate, progress=progress
            )
        recalibrated["recalibrated_layers"] = layers
        judge("recalibrated", small)
    return accuracy, recalibrated


def make_report(
    args: argparse.Namespace,
    model: nn.Module,
    pruned: Pruned,
    target: dict[str, Any],
    accuracy: dict[str, Accuracy],
    recalibrated: dict[str, int],
) -> dict[str, Any]:
    """All figures, for programs."""
    from ..macs import count_macs, count_params, input_size_of
    from ..measure.images import data_config
    from ..measure.latency import measure_latency

    size = input_size_of(model)
    networks = {"full": model, "pruned": pruned.model}
    seconds = measure_latency(networks, size)
    reached = True  # counts are exact
    if args.latency is not None:
        found = seconds["pruned"] / (seconds["full"] if is_share(args.latency) else 1)
        reached = found <= target["budget"].target
    targets = ("compress_rate", "latency", "macs", "params", "rates")
    asked = next(f"--{n.replace('_', '-')} {v}" for n in targets if (v := getattr(args, n)) is not None)
    return {
        "model": args.name,
        "weights": str(args.checkpoint) if args.checkpoint else args.weights or "pretrained",
        "method": args.method,
        "target": asked,
        "reached": reached,
        "align": args.align,
        "min_width": args.min_width,
        "round_to": args.round_to,
        "keep_head": not args.prune_head,
        "seed": args.seed,
        "data": args.data,
        "split": args.split,
        "val_split": args.val_split,
        "batch_size": args.batch_size,
        "crop_pct": args.crop_pct or data_config(model)["crop_pct"],
        "device": args.device,
        "images": pruned.ranks.images if pruned.ranks else 0,
        **recalibrated,
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
        *("--train-split", args.split, "--val-split", args.val_split),
        *("--opt", "sgd", "--momentum", "0.9", "--weight-decay", "5e-4", "--lr", "0.02", "-b", "128"),
        *("--sched", "cosine", "--sched-on-updates", "--warmup-epochs", "0", "--min-lr", "0"),
        *("--epochs", "20", "--smoothing", "0", "--seed", str(args.seed), "--device", args.device),
    ]
    return 'python -P "$TIMM_REPO/train.py" --device-modules chanzoo ' + shlex.join(options)


def missed(args: argparse.Namespace, report: dict[str, Any]) -> str:
    """That the narrow network takes longer than was asked for, and what then."""
    full, small = report["latency_ms"]["full"], report["latency_ms"]["pruned"]
    found = f"{small / full:.3f}x of the full network's time" if is_share(args.latency) else f"{small:.3g} ms"
    return (
        f"--latency {args.latency} was not reached: measured again, the narrow network takes {found}.\n"
        "  It was written as it is.   Ask for less, or measure while nothing else runs on this machine"
    )


def command_of(args: argparse.Namespace) -> str:
    """The command line, without what is a place on this machine."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["chanzoo", "prune", "FOLDER" if is_folder(args.name) else args.name]
    places = {"data": "DATA", "output": "OUT", "checkpoint": "CHECKPOINT"}
    if args.rates is not None and Path(args.rates).is_file():
        places["rates"] = "RATES.json"
    for key, value in vars(args).items():
        if key not in _UNTOLD and value != parser.get_default(key):
            words.append(f"--{key.replace('_', '-')}")
            words += [] if value is True else [places.get(key, str(value))]
    return shlex.join(words)


def saved_source(
    args: argparse.Namespace, model: nn.Module, pruned: Pruned, arch: str, made_from: dict[str, Any]
) -> Any:
    """The narrow network under a name that builds it from its widths alone."""
    from ..hub.folders import DATA_KEYS, Source, cfg_of
    from ..hub.saved import named_network

    named = named_network(pruned.model, arch, made_from)
    cfg = cfg_of(model)
    keys = ("label_names", "label_descriptions", "license", "paper_ids")
    about = {
        "base_model": "" if is_folder(args.name) else args.name.removeprefix("hf-hub:").partition("@")[0],
        "method": args.method,
        "command": command_of(args),
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
    """Architecture of the full network, and the arguments that it was built with.

    Raises:
        UsageError: It is to be narrowed before it has a base.
    """
    from ..hub.folders import CONFIG, cfg_of
    from ..weights import WEIGHTS, weights_of

    config = folder_of(args.name) / CONFIG
    arch, found = str(cfg_of(model).get("architecture")), dict(getattr(model, "_model_args", None) or {})
    if config.is_file():
        found = json.loads(config.read_bytes()).get("model_args", {})
    elif not args.name.startswith("hf-hub:"):
        rows = [WEIGHTS[args.name]] if args.name in WEIGHTS else weights_of(args.name)
        found = dict(rows[0].model_args) if rows and args.weights != "none" else {}
    if arch == "narrow_cnn" and "base" not in found:
        raise UsageError(
            f'"{args.name}" is a name for networks that are narrow already, and says of which network.\n'
            "  expected  the full network, such as resnet18, or the folder of a narrow one"
        )
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

    if widths:
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
    if channels:
        rows.append(("channels", str(channels), str(kept), f"{kept / channels:.3f}"))
    return rows
