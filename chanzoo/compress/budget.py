"""The least rate of removal that brings a network within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn

from ..errors import UsageError
from ..macs import input_size_of
from .cost import Ledger
from .groups import Group
from .names import name_of
from .rates import cut, keep_counts
from .surgery import Masks, masks_of, narrowed

__all__ = ["Budget", "Target", "solve"]

_MOST = 1 - 1e-9  # the highest rate of the search
_TRIES = 6  # measurements anew of a network that is within its time
_STEPS, _MEASURED_STEPS = 12, 7  # halvings of the search: a four-thousandth, a hundredth


@dataclass(frozen=True)
class Budget:
    """What a narrow network may cost, for costs that have to be measured.

    Attributes:
        name: Of what is measured, for messages.
        target: At most this much.
        cost: From a narrow network to its cost.
    """

    name: str
    target: float
    cost: Callable[[nn.Module], float]


@dataclass(frozen=True)
class Target:
    """A cost to stay below, of the network that some masks leave."""

    name: str
    amount: float
    cost: Callable[[Masks], float]
    is_measured: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        macs: float | None,
        params: float | None,
        budget: Budget | None,
    ) -> Target:
        """The one that was given; ``macs`` and ``params`` as of :func:`chanzoo.compress.prune`."""
        if budget is not None:
            measure = budget.cost
            return cls(budget.name, budget.target, lambda masks: measure(narrowed(model, masks)), True)
        what, amount, name = ("macs", macs, "MACs") if macs is not None else ("params", params, "parameters")
        assert amount is not None
        cost = partial(Ledger(model, input_size_of(model)), what)
        return cls(name, amount * cost({}) if amount <= 1 else amount, cost)


def solve(
    model: nn.Module, groups: Sequence[Group], target: Target, *, min_width: int = 1, round_to: int = 1
) -> tuple[float, dict[str, int]]:
    """The least rate that meets a target: the same for all groups, but for what rounding leaves over."""
    free = [group for group in groups if not group.reason]

    def counts_at(rate: float) -> tuple[int, ...]:
        rates = {group.root: rate for group in free}
        return tuple(keep_counts(free, rates, min_width=min_width, round_to=round_to).values())

    @cache
    def cost_of(counts: tuple[int, ...]) -> float:
        scores = {group.root: -torch.arange(group.channels) for group in free}
        kept = cut(free, scores, {group.root: n for group, n in zip(free, counts, strict=True)})
        return target.cost(masks_of(model, groups, kept))

    low, high = 0.0, _MOST
    if cost_of(counts_at(low)) <= target.amount:
        high = low
    elif (floor := cost_of(counts_at(high))) > target.amount:
        whole = [group for group in groups if group.reason]
        lines = [
            f"cannot reach {_say(target.amount)} {target.name} for {name_of(model)}: with {min_width} or "
            f"more channels per layer the floor is {_say(floor)}.",
            *(f"  {group.root} stays whole: {group.reason}" for group in whole[:5]),
            "  Nothing was pruned.",
        ]
        raise UsageError("\n".join(lines))
    for _ in range(_MEASURED_STEPS if target.is_measured else _STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost_of(counts_at(middle)) <= target.amount else (middle, high)
    # Between the two rates many layers lose a channel at once: as many of the first as fit stay wider.
    wide, narrow = counts_at(low), counts_at(high)
    fits, too_many = 0, len(free)
    while not target.is_measured and too_many - fits > 1:
        middle = (fits + too_many) // 2
        is_within = cost_of((*wide[:middle], *narrow[middle:])) <= target.amount
        fits, too_many = (middle, too_many) if is_within else (fits, middle)
    counts = (*wide[:fits], *narrow[fits:])
    for _ in range(_TRIES if target.is_measured else 0):  # the one measurement may have been a lucky one
        if cost_of.__wrapped__(counts) <= target.amount:
            break
        high += (_MOST - high) / 8
        counts = counts_at(high)
    return high, {group.root: n for group, n in zip(free, counts, strict=True)}


def _say(value: float) -> str:
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"
