"""Pictures of channel statistics, one network or several. Needs matplotlib (``chanzoo[plot]``)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ChanzooError
from .channels import AblationPoint, ChannelReport
from .reuse import ReuseRow

__all__ = [
    "plot_ablation",
    "plot_gains",
    "plot_inhibited",
    "plot_rank_histograms",
    "plot_rank_stability",
    "plot_reuse",
    "plot_widths",
    "require_matplotlib",
    "summarise",
]

_COLOURS = ("#3b6fb6", "#d9822b", "#4a9a5b", "#a64d79")


def require_matplotlib() -> None:
    """Fail early where pictures cannot be drawn.

    Raises:
        ChanzooError: matplotlib is not installed; says how to get it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ChanzooError(
            "pictures need matplotlib, which is not installed.\n"
            '  Install it: python -m pip install "chanzoo[plot]"   or leave the pictures out: --no-plots'
        ) from None


def plot_inhibited(reports: Mapping[str, ChannelReport], path: Path) -> None:
    """Inhibited share of each site's channels, sites in the order of the forward."""
    figure, axes = _axes()
    for colour, (name, report) in zip(_COLOURS, reports.items(), strict=False):
        ratios = [100 * report.ratio(site) for site in report.magnitudes]
        label = f"{name}: mean {100 * report.mean_ratio:.1f} %"
        axes.plot(range(1, len(ratios) + 1), ratios, marker="o", markersize=3, color=colour, label=label)
    threshold = next(iter(reports.values())).threshold
    axes.set(xlabel="site", ylabel=f"channels below {threshold:g} (%)")
    axes.set_ylim(bottom=0)
    _save(figure, axes, path)


def plot_ablation(curves: Mapping[str, Sequence[AblationPoint]], path: Path) -> None:
    """Accuracy against the share of silenced channels; the band is one deviation of the seeds."""
    figure, axes = _axes()
    for colour, (name, points) in zip(_COLOURS, curves.items(), strict=False):
        rows = summarise(points)
        x = [100 * ratio for ratio, _, _ in rows]
        mean = [100 * value for _, value, _ in rows]
        spread = [100 * value for _, _, value in rows]
        axes.plot(x, mean, marker="o", markersize=3, color=colour, label=name)
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="channels silenced at every site (%)", ylabel="top-1 (%)")
    axes.set_ylim(bottom=0)
    _save(figure, axes, path)


def plot_gains(reports: Mapping[str, ChannelReport], path: Path) -> None:
    """Histogram of the norms' ``|γ|``, and of the effective gain where Channel Equilibrium follows."""
    figure, axes = _axes()
    series = []
    for colour, (name, report) in zip(_COLOURS, reports.items(), strict=False):
        series.append((f"{name}: |γ|", colour, "solid", [v for g in report.gains for v in g.weight.tolist()]))
        effective = [v for g in report.gains if g.effective is not None for v in g.effective.tolist()]
        if effective:
            series.append((f"{name}: with Channel Equilibrium", colour, "dashed", effective))
    top = max((max(values) for *_, values in series if values), default=1.0)
    edges = [i * max(top, 1e-6) / 60 for i in range(61)]
    for label, colour, style, values in series:
        weights = [100 / max(1, len(values))] * len(values)
        axes.hist(
            values, bins=edges, weights=weights, histtype="step", color=colour, linestyle=style, label=label
        )
    axes.set(xlabel="gain of a channel", ylabel="channels (%)")
    _save(figure, axes, path)


def plot_widths(widths: Sequence[tuple[str, int, int]], path: Path) -> None:
    """Channels before and after, one bar per group in the order of the forward."""
    figure, axes = _axes(max(6.4, 0.14 * len(widths)))
    places = range(1, len(widths) + 1)
    axes.bar(places, [before for _, before, _ in widths], color="#d0d4da", label="full")
    axes.bar(places, [after for _, _, after in widths], color=_COLOURS[0], label="kept")
    axes.set(xlabel="group of channels", ylabel="channels")
    _save(figure, axes, path)


def plot_rank_histograms(means: Mapping[str, tuple[Sequence[float], int]], path: Path) -> None:
    """One row per layer: share of its filters by mean rank, in percent of the largest possible."""
    figure, axes = _axes(6.4, max(4.0, 0.16 * len(means)))
    bins = 40
    rows = []
    for values, largest in means.values():
        counts = [0] * bins
        for value in values:
            counts[min(bins - 1, int(bins * value / max(largest, 1)))] += 1
        rows.append([count / max(1, len(values)) for count in counts])
    axes.imshow(rows, aspect="auto", cmap="Blues", vmin=0, extent=(0, 100, len(rows) + 0.5, 0.5))
    axes.set(xlabel="mean rank (% of the largest possible)", ylabel="layer, in the order of the forward")
    axes.grid(visible=False)
    figure.savefig(path, dpi=150)


def plot_rank_stability(series: Mapping[str, Sequence[tuple[int, Sequence[float]]]], path: Path) -> None:
    """Mean rank of each filter against the images seen; one panel per layer, one line per filter."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, points) in enumerate(series.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        lines = zip(*(means for _, means in points), strict=True)
        for line in lines:
            axes.plot([images for images, _ in points], line, linewidth=0.7)
        axes.set_title(name, fontsize=8)
        axes.set(xlabel="images", ylabel="mean rank")
    figure.savefig(path, dpi=150)


def plot_reuse(networks: Mapping[str, Sequence[ReuseRow]], path: Path) -> None:
    """Heatmaps of which earlier features each layer reads and refreshes; networks side by side.

    Each row is scaled by its largest value: darker is stronger. Features of layers that come later are blank.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = ["reads"]
    if any(row.refreshes for rows in networks.values() for row in rows):
        kinds.append("refreshes")
    figure = Figure(figsize=(4.6 * len(networks), 4.2 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    for line, kind in enumerate(kinds):
        for column, (name, rows) in enumerate(networks.items(), start=1):
            values = {(row.layer, row.source): float(getattr(row, kind)) for row in rows}
            if not any(values.values()):
                continue
            layers = list(dict.fromkeys(row.layer for row in rows))
            sources = list(dict.fromkeys(row.source for row in rows))
            grid = []
            for layer in layers:
                found = [values.get((layer, source), float("nan")) for source in sources]
                strongest = max(values[layer, source] for source in sources if (layer, source) in values)
                grid.append([value / (strongest or 1.0) for value in found])
            axes = figure.add_subplot(len(kinds), len(networks), line * len(networks) + column)
            edges = (-0.5, len(sources) - 0.5, len(layers) + 0.5, 0.5)
            axes.imshow(grid, aspect="auto", cmap="Reds", vmin=0, vmax=1, extent=edges)
            axes.set_title(f"{name}: {kind} (each row: share of its largest)", fontsize=8)
            axes.set(xlabel="made by layer (0: stem)", ylabel="layer")
    figure.savefig(path, dpi=150)


def summarise(points: Sequence[AblationPoint]) -> list[tuple[float, float, float]]:
    """Ratio, mean accuracy, and deviation over the seeds (0 for one seed)."""
    rows = []
    for ratio in sorted({point.ratio for point in points}):
        values = [point.top1 for point in points if point.ratio == ratio]
        rows.append((ratio, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0))
    return rows


def _axes(width: float = 6.4, height: float = 4.0) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
