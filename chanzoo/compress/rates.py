"""Rates of removal: read from what a user gives, as counts of channels, as the channels that stay."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..models.hrank import read_rates
from .groups import Group
from .scores import keep_count, select

__all__ = ["cut", "is_number", "keep_counts", "rates_by_root"]

_NOTHING = "Nothing was pruned."


def rates_by_root(groups: Sequence[Group], rates: Any) -> dict[str, float]:
    """A rate for every group that may be cut."""
    free = [group for group in groups if not group.reason]
    rates = read_rates(rates) if isinstance(rates, str) else rates
    rates = rates.tolist() if callable(getattr(rates, "tolist", None)) else rates  # of an array, a tensor
    every = (
        rates.values() if isinstance(rates, Mapping) else rates if isinstance(rates, Sequence) else [rates]
    )
    if odd := [rate for rate in every if not is_number(rate)]:
        raise UsageError(
            f"rates hold {odd[0]!r}: expected fractions to remove, from 0 to below 1.\n  {_NOTHING}"
        )
    if isinstance(rates, Mapping):
        return dict.fromkeys((group.root for group in free), 0.0) | _by_pattern(groups, rates)
    if isinstance(rates, Sequence):
        if len(rates) != len(free):
            raise UsageError(
                f"{len(rates)} rates: expected {len(free)}, one for each group from {free[0].root} to "
                f"{free[-1].root}.\n  {_NOTHING}"
            )
        return {group.root: rate for group, rate in zip(free, rates, strict=True)}
    return {group.root: rates for group in free}


def _by_pattern(groups: Sequence[Group], rates: Mapping[str, float]) -> dict[str, float]:
    """Rates of the groups that are named, or else match a pattern; several of them have to agree."""
    found: dict[str, float] = {}
    patterns = {key for key in rates if set("*?[") & set(key)}
    for keys in (rates.keys() - patterns, patterns):
        settled = set(found)
        for key in sorted(keys):
            hit = [g for g in groups if any(fnmatch.fnmatchcase(conv, key) for conv in g.convs)]
            if all(group.reason for group in hit):
                names = [conv for group in groups if not group.reason for conv in group.convs]
                near = difflib.get_close_matches(key, names, n=1)
                why = f": {hit[0].reason}." if hit else f". Did you mean {near[0]}?" if near else "."
                raise UsageError(f'rates name "{key}", which cannot be pruned here{why}\n  {_NOTHING}')
            for root in {group.root for group in hit if not group.reason} - settled:
                if found.setdefault(root, rates[key]) != rates[key]:
                    raise UsageError(
                        f'rates give layer "{root}" both {found[root]} and {rates[key]} (by "{key}").\n'
                        f"  {_NOTHING}   A layer's own name counts before patterns"
                    )
    return found


def keep_counts(
    groups: Sequence[Group], rates: Mapping[str, float], *, min_width: int = 0, round_to: int = 1
) -> dict[str, int]:
    """How many channels each group keeps.

    Args:
        groups: With a rate each.
        rates: By root, fraction removed.
        min_width: Least channels that stay; 0 for an error where none would.
        round_to: See :func:`prune`.

    Raises:
        UsageError: A rate is outside [0, 1), or leaves nothing; names the layer.
    """
    counts = {}
    for group in groups:
        rate = rates[group.root]
        try:
            keep = keep_count(group.channels, rate, least=min_width)
        except UsageError as error:
            raise UsageError(f'layer "{group.root}": {error}\n  {_NOTHING}') from error
        step = math.lcm(group.chunks, round_to)
        step = step if step < group.channels else group.chunks
        least = 2 * group.chunks if group.chunks > 1 else 1  # a group of one channel is another kind of layer
        if rate and step > 1:
            keep = max(step * math.ceil(max(least, min_width) / step), step * round(keep / step))
        counts[group.root] = min(keep, group.channels) if rate else group.channels
    return counts


def cut(
    groups: Sequence[Group], scores: Mapping[str, Tensor], counts: Mapping[str, int]
) -> dict[str, Tensor]:
    """Which channels stay: those of the highest scores, equally many in each chunk of a group.

    Returns:
        By root: ascending indices.
    """
    kept = {}
    for group in groups:
        chunks = scores[group.root].chunk(group.chunks)
        length, keep = group.channels // group.chunks, counts[group.root] // group.chunks
        kept[group.root] = torch.cat([select(part, keep) + i * length for i, part in enumerate(chunks)])
    return kept


def is_number(value: Any) -> bool:
    """A real number, of Python or NumPy; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)
