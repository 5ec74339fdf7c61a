"""Pictures of channel statistics, one network or several. Needs matplotlib (``chanzoo[plot]``)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ChanzooError
from .channels import AblationPoint, ChannelReport

__all__ = ["plot_ablation", "plot_gains", "plot_inhibited", "require_matplotlib", "summarise"]

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


def summarise(points: Sequence[AblationPoint]) -> list[tuple[float, float, float]]:
    """Ratio, mean accuracy, and deviation over the seeds (0 for one seed)."""
    rows = []
    for ratio in sorted({point.ratio for point in points}):
        values = [point.top1 for point in points if point.ratio == ratio]
        rows.append((ratio, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0))
    return rows


def _axes() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
