"""``chanzoo inspect``: which channels of a network do any work."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .common import (
    add_format,
    add_model_options,
    build_model,
    check_name,
    emit,
    natural,
    percent,
    positive,
    progress_bar,
    say,
)
from .folders import check_output, write_whole

if TYPE_CHECKING:
    from ..measure.channels import AblationPoint, ChannelReport

HELP = "measure channels of any convolutional network, or what the layers of a CondenseNet reuse"
EXAMPLES = """\
  chanzoo inspect cifar_resnet20.c10j --against ce_cifar_resnet20.c10j --channels DATA -o channels
  chanzoo inspect resnet50 --channels DATA --sites "layer1.*" --branch -o channels
  chanzoo inspect ce_resnet50 --channels DATA --weights none --images 200 --seeds 1 -o fresh
  chanzoo inspect condensenetv2_cifar110.c10j --against condensenet_cifar62.c10j --reuse -o reuse

A site is an activation that a norm feeds. OUT_DIR gets tables (CSV), a summary (JSON) and pictures (PNG):
  sites      channels of each site whose mean magnitude is below the threshold
  channels   the magnitude of each channel
  ablation   accuracy while 0 … 90 % of every site's channels are silenced, in random order
  gains      |γ| of the batch norms, and the gain with Channel Equilibrium behind it
With --reuse there is one table and one picture: which earlier features each layer of a CondenseNet reads
and refreshes, as the mean magnitude of its weights. In the picture each row is scaled by its largest, so
rows and networks do not compare by colour. It needs no images.
"""
_FILES = {
    "summary.json",
    *(f"{name}.csv" for name in ("sites", "channels", "ablation", "gains")),
    *(f"{name}.png" for name in ("sites", "ablation", "gains")),
    *("reuse.csv", "reuse.png"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", metavar="NAME", help="arch or arch.tag, ours or timm's; or a folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--channels", metavar="DATA_DIR", help="folder of images, see chanzoo eval")
    what.add_argument("--reuse", action="store_true", help="which features each layer of a CondenseNet uses")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT_DIR", help="where the results go"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT_DIR if it is there")
    parser.add_argument(
        "--against", metavar="NAME2", help="a second network, for the same tables and pictures"
    )
    parser.add_argument("--split", default="val", help="split of the images (default: val)")
    parser.add_argument(
        "--images", type=positive, default=1000, metavar="N", help="spread over it (default: 1000)"
    )
    parser.add_argument(
        "--seeds", type=positive, default=3, metavar="N", help="orders of silencing (default: 3)"
    )
    parser.add_argument("--threshold", type=float, default=0.01, help="inhibited below this (default: 0.01)")
    parser.add_argument("--sites", default="*", metavar="GLOB", help="sites to look at (default: all)")
    parser.add_argument(
        "--branch", action="store_true", help="at residual additions, look at the branch alone"
    )
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    parser.add_argument("--batch-size", type=positive, default=100, metavar="N", help="(default: 100)")
    parser.add_argument(
        "--workers", type=natural, default=0, metavar="N", help="processes that read images (default: 0)"
    )
    add_model_options(parser)
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Measure everything, then write everything."""
    check_output(args.output, _FILES, args.overwrite)
    if args.channels and not Path(args.channels).exists():
        raise UsageError(f'no image folder "{args.channels}".')
    names = [args.name, *([args.against] if args.against else [])]
    if len(set(names)) < len(names):
        raise UsageError(f"--against {args.against} is the network itself.")
    if args.checkpoint and args.against:
        raise UsageError("--checkpoint belongs to one network: leave --against out.")
    for name in names:
        check_name(name)
    if not args.no_plots:
        from ..measure.plots import require_matplotlib

        require_matplotlib()
    if args.reuse:
        return _reuse(names, args)
    reports: dict[str, ChannelReport] = {}
    curves: dict[str, list[AblationPoint]] = {}
    for name in names:
        reports[name], curves[name] = _measure(name, args)
    data = _summary(args, reports, curves)
    write_whole(args.output, lambda folder: _write(folder, data, reports, curves, plots=not args.no_plots))
    rows = [
        (
            net["model"],
            f"{net['sites']}",
            f"{net['channels']:,}",
            percent(net["mean_ratio"]),
            percent(net["overall_ratio"]),
            percent(net["ablation"][0]["top1"]),
            percent(net["ablation"][5]["top1"]),
        )
        for net in data["networks"]
    ]
    headers = (
        "model",
        "sites",
        "channels",
        "inhibited, mean of sites",
        "of all channels",
        "top-1",
        "at 50 % silenced",
    )
    emit(data, args.format == "json", headers, rows)
    say(f"chanzoo: tables{'' if args.no_plots else ' and pictures'} are in {args.output}")
    return 0


def _reuse(names: list[str], args: argparse.Namespace) -> int:
    """Measure which features the layers use, and write all of it."""
    from ..measure.reuse import measure_reuse

    networks = {name: measure_reuse(build_model(name, args)) for name in names}
    header = ("model", "layer", "source", "reads", "refreshes")
    lines = [
        (name, row.layer, row.source, f"{row.reads:.6g}", f"{row.refreshes:.6g}")
        for name, rows in networks.items()
        for row in rows
    ]

    def write(folder: Path) -> None:
        write_csv(folder / "reuse.csv", header, lines)
        if not args.no_plots:
            from ..measure.plots import plot_reuse

            plot_reuse(networks, folder / "reuse.png")

    write_whole(args.output, write)
    data = [{"model": name, "layers": len({row.layer for row in rows})} for name, rows in networks.items()]
    emit(data, args.format == "json", ("model", "layers"), [(n["model"], str(n["layers"])) for n in data])
    say(f"chanzoo: the table{'' if args.no_plots else ' and the picture'} of reuse are in {args.output}")
    return 0


def _measure(name: str, args: argparse.Namespace) -> tuple[ChannelReport, list[AblationPoint]]:
    from ..measure.channels import ablation_curve, measure_channels, sample_batches
    from ..measure.sites import find_sites

    model = build_model(name, args).to(args.device)
    batches = sample_batches(
        model,
        args.channels,
        images=args.images,
        split=args.split,
        batch_size=args.batch_size,
        workers=args.workers,
        device=args.device,
    )
    sites = find_sites(model, batches[0][0][:1], args.sites)
    report = measure_channels(model, batches, sites, threshold=args.threshold, branch=args.branch)
    with progress_bar(f"silencing channels of {name}") as progress:
        return report, ablation_curve(model, batches, sites, seeds=args.seeds, progress=progress)


def _summary(
    args: argparse.Namespace, reports: dict[str, ChannelReport], curves: dict[str, list[AblationPoint]]
) -> dict[str, Any]:
    from ..measure.plots import summarise

    networks = []
    for name, report in reports.items():
        networks.append(
            {
                "model": name,
                "images": report.images,
                "sites": len(report.magnitudes),
                "channels": sum(map(len, report.magnitudes.values())),
                "inhibited": sum(map(report.inhibited, report.magnitudes)),
                "mean_ratio": report.mean_ratio,
                "overall_ratio": report.overall_ratio,
                "ablation": [
                    {"ratio": ratio, "top1": mean, "deviation": spread}
                    for ratio, mean, spread in summarise(curves[name])
                ],
            }
        )
    return {
        "data": args.channels,
        "split": args.split,
        "weights": str(args.checkpoint) if args.checkpoint else args.weights or "pretrained",
        "threshold": args.threshold,
        "site_glob": args.sites,
        "branch": args.branch,
        "seeds": args.seeds,
        "output": str(args.output),
        "networks": networks,
    }


def _write(
    folder: Path,
    data: dict[str, Any],
    reports: dict[str, ChannelReport],
    curves: dict[str, list[AblationPoint]],
    plots: bool,
) -> None:
    (folder / "summary.json").write_text(
        json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    write_csv(
        folder / "sites.csv",
        ("model", "site", "channels", "inhibited", "ratio"),
        (
            (name, site, len(report.magnitudes[site]), report.inhibited(site), report.ratio(site))
            for name, report in reports.items()
            for site in report.magnitudes
        ),
    )
    write_csv(
        folder / "channels.csv",
        ("model", "site", "channel", "magnitude"),
        (
            (name, site, channel, value)
            for name, report in reports.items()
            for site, magnitude in report.magnitudes.items()
            for channel, value in enumerate(magnitude.tolist())
        ),
    )
    write_csv(
        folder / "ablation.csv",
        ("model", "seed", "ratio", "top1"),
        ((name, point.seed, point.ratio, point.top1) for name, points in curves.items() for point in points),
    )
    write_csv(
        folder / "gains.csv",
        ("model", "layer", "channel", "weight", "effective"),
        (
            (
                name,
                gain.layer,
                channel,
                value,
                "" if gain.effective is None else gain.effective[channel].item(),
            )
            for name, report in reports.items()
            for gain in report.gains
            for channel, value in enumerate(gain.weight.tolist())
        ),
    )
    if plots:
        from ..measure.plots import plot_ablation, plot_gains, plot_inhibited

        plot_inhibited(reports, folder / "sites.png")
        plot_ablation(curves, folder / "ablation.png")
        plot_gains(reports, folder / "gains.png")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
