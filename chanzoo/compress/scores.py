"""Ranks of a network's filters as a table, and from scores to the filters that stay."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UsageError
from ..models.hrank import keep_count
from .sites import RankSite

__all__ = ["RankTable", "keep_count", "read_ranks", "saturated", "select", "undecided"]

_COLUMNS = (
    "site",
    "module",
    "call",
    "start",
    "stop",
    "pool",
    "max_rank",
    "filter",
    "images",
    "sum",
    "squares",
)


@dataclass(frozen=True)
class RankTable:
    """Ranks of filters, summed over images; whole numbers, so the order of the images does not matter.

    Attributes:
        images: How many.
        sites: What was measured.
        max_ranks: By name of the site: smaller side of its maps.
        sums: By name of the site: sum of each filter's ranks.
        squares: By name of the site: sum of their squares.
    """

    images: int
    sites: tuple[RankSite, ...]
    max_ranks: dict[str, int]
    sums: dict[str, Tensor]
    squares: dict[str, Tensor]

    def mean(self, name: str) -> Tensor:
        """Mean rank of each filter of a site, 64-bit floats."""
        return self.sums[name].double() / self.images

    def standard_error(self, name: str) -> Tensor:
        """How far each mean may be from that over all images there are; infinite for a single image."""
        n = self.images
        if n < 2:
            return torch.full_like(self.sums[name], torch.inf, dtype=torch.float64)
        spread = n * self.squares[name] - self.sums[name] ** 2  # exact
        return (spread.double() / (n - 1)).sqrt() / n

    def to_csv(self, path: str | Path) -> None:
        """Write one row per filter; :func:`read_ranks` gives the same table back."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*_COLUMNS, "mean", "standard_error"])
            for site in self.sites:
                name, module, call, start, stop, pool = astuple(site)
                head = [
                    name,
                    module,
                    call,
                    start,
                    "" if stop is None else stop,
                    "/".join(map(str, pool or ())),
                ]
                columns = (
                    self.sums,
                    self.squares,
                    {name: self.mean(name)},
                    {name: self.standard_error(name)},
                )
                values = zip(*(column[name].tolist() for column in columns), strict=True)
                for i, (total, squares, mean, error) in enumerate(values):
                    row = [
                        self.max_ranks[name],
                        i,
                        self.images,
                        total,
                        squares,
                        f"{mean:.6f}",
                        f"{error:.6f}",
                    ]
                    writer.writerow([*head, *row])


def read_ranks(path: str | Path) -> RankTable:
    """Read what :meth:`RankTable.to_csv` wrote.

    Raises:
        UsageError: The file is not such a table.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        (images,) = {int(row["images"]) for row in rows}
        sites, max_ranks, sums, squares = [], {}, {}, {}
        for name, group in groupby(rows, key=lambda row: row["site"]):
            filters = list(group)
            first = filters[0]
            if name in sums or [int(row["filter"]) for row in filters] != list(range(len(filters))):
                raise ValueError(f'the filters of site "{name}" are not in order')
            stop = int(first["stop"]) if first["stop"] else None
            pool = [int(n) for n in first["pool"].split("/")] if first["pool"] else []
            place = (first["module"], int(first["call"]), int(first["start"]), stop)
            sites.append(RankSite(name, *place, (pool[0], pool[1], pool[2]) if pool else None))
            max_ranks[name] = int(first["max_rank"])
            sums[name] = torch.tensor([int(row["sum"]) for row in filters])
            squares[name] = torch.tensor([int(row["squares"]) for row in filters])
        return RankTable(images, tuple(sites), max_ranks, sums, squares)
    except (OSError, ValueError, KeyError, TypeError, IndexError, csv.Error) as error:
        raise UsageError(f'"{path}" is no table of ranks: {type(error).__name__}: {error}') from error


def saturated(table: RankTable, *, share: float = 0.75, within: float = 0.01) -> list[str]:
    """Names of the sites whose ranks hardly tell filters apart.

    Args:
        table: Ranks.
        share: Of a site's filters that must be near its largest mean rank.
        within: How near, as a fraction of that.
    """
    names = []
    for site in table.sites:
        mean = table.mean(site.name)
        near = mean >= (1 - within) * mean.max()
        if len(mean) > 1 and near.double().mean() >= share:
            names.append(site.name)
    return names


def undecided(
    table: RankTable, rates: Mapping[str, float], *, rule: str = "plus", errors: float = 2.0
) -> dict[str, Tensor]:
    """Filters that more images might move across the cut.

    Args:
        table: Ranks.
        rates: By name of the site: fraction of filters to be removed.
        rule: See :func:`keep_count`.
        errors: Standard errors of the mean that a filter must be away from the cut, which lies midway between
            the last filter that goes and the first that stays.

    Returns:
        By name of the site: indices of such filters, ascending; sites without any are left out.

    Raises:
        UsageError: A site is not in the table, or see :func:`keep_count`.
    """
    found = {}
    for name, rate in rates.items():
        if name not in table.sums:
            raise UsageError(f'the table has no site "{name}".')
        mean = table.mean(name)
        drop = len(mean) - keep_count(len(mean), rate, rule)
        if drop:
            cut = mean.sort().values[drop - 1 : drop + 1].mean()
            close = (mean - cut).abs() < errors * table.standard_error(name)
            if close.any():
                found[name] = close.nonzero()[:, 0]
    return found


def select(scores: Tensor, keep: int) -> Tensor:
    """Indices of the filters with the highest scores, ascending; of equal ones the later stay.

    Shape:
        scores ``(c,)`` → ``(keep,)``, 64-bit integers.

    Raises:
        UsageError: ``keep`` is not between 1 and the number of scores.
    """
    if not 1 <= keep <= len(scores):
        raise UsageError(f"keep={keep}: expected 1 to {len(scores)} of {len(scores)} filters.")
    order = torch.sort(scores, stable=True).indices
    return order[len(scores) - keep :].sort().values
