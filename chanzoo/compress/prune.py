"""Prune any CNN: judge coupled channels, meet rates or a budget, and slice.

    scores of the groups → how many channels each keeps → which → masks → the narrow network

Training is not done here. Before any fine-tuning, norms are measured anew by
:func:`chanzoo.compress.recalibrate_norms`.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..layers import CondensedConv2d, CondensedReactivation, LearnedGroupConv2d, SparseReactivation
from ..models.hrank import HRANK_NAMES, read_rates, widths_of_rates
from .cost import Ledger
from .groups import Group, Slot, find_groups
from .methods import METHODS, Evidence, Method
from .names import record_name
from .own import authors_vectors, own_masks
from .rank import collect_ranks
from .scores import RankTable, keep_count, select
from .surgery import Masks, check_same, masks_of, narrowed, tried, widths_of

__all__ = ["Budget", "Pruned", "cut", "keep_counts", "prunable", "prune"]

_NOTHING = "Nothing was pruned."
_CHOOSES = (CondensedConv2d, CondensedReactivation, LearnedGroupConv2d, SparseReactivation)
_CONTRACT = ("forward_features", "forward_head", "get_classifier")
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
class Pruned:
    """A narrow network and how it came about.

    Attributes:
        model: On the device of the full one, in the same mode. ``timm.models.save_for_hf`` writes it down so
            that it comes back, if a registered name with arguments builds the full one.
        widths: Its table of widths.
        kept: By root of a group: indices of the channels that stay.
        rates: By root of a group: fraction that was asked to be removed.
        groups: All groups of the full network, with reasons for those that were left whole.
        ranks: Of the feature maps, if the method needs them.
    """

    model: nn.Module
    widths: dict[str, list[int]]
    kept: dict[str, Tensor]
    rates: dict[str, float]
    groups: tuple[Group, ...]
    ranks: RankTable | None = None


def prune(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    method: str = "hrank",
    rates: float | Sequence[float] | Mapping[str, float] | None = None,
    macs: float | None = None,
    params: float | None = None,
    budget: Budget | None = None,
    compress_rate: str | Sequence[float] | None = None,
    align: str = "group",
    min_width: int = 1,
    round_to: int = 1,
    keep_head: bool = True,
    images: int = 768,
    ranks: RankTable | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    snapshot: Callable[[RankTable], None] | None = None,
) -> Pruned:
    """Remove channels from a CNN of timm or ours.

    The full network is not changed. The narrow one has been compared with it: in evaluation it computes the
    same as the full one with nothing reading the removed channels (but for ``align="own"``, which adds
    other channels to one another).

    Args:
        model: Any CNN with timm's model contract.
        loader: Batches of images, alone or first in a tuple, for methods that look at data.
        method: Key of :data:`chanzoo.compress.METHODS`.
        rates: Fraction of channels to remove: one for all groups, one per group in the order of the forward,
            or by pattern (shell glob) of a group's convolutions, where groups that match nothing stay whole
            and a name counts before patterns.
        macs: Instead of rates, multiply-adds to reach: up to 1 a share of the full network's, else a count.
        params: Likewise, parameters.
        budget: Likewise, anything that can be counted or measured.
        compress_rate: Instead of rates, a published list for one of the networks that HRank's authors
            pruned, see :mod:`chanzoo.models.hrank`.
        align: ``"group"``: layers that add to one stream keep the same channels of it. ``"inner"``: such
            streams stay whole. ``"own"``: each layer keeps its own, as the authors have it; only with
            ``compress_rate``, and fine-tuning has to repair the sums.
        min_width: Least channels of a group, under a budget.
        round_to: Channels of a group are rounded to a multiple of this, where the group is larger.
        keep_head: Leave the features whole that the classifier gets.
        images: Most images to rank the maps of.
        ranks: Ranks that were collected before, for ``method="hrank"``.
        seed: For criteria that draw lots.
        progress: Called with images done and all images.
        snapshot: See :func:`chanzoo.compress.collect_ranks`.

    Raises:
        UsageError: An argument is not one of the above, a budget cannot be reached, a layer would be left
            empty, or nothing in the network can be cut.
        ChanzooError: Torch-Pruning is not installed.

    Source:
        Lin et al. 2020, arXiv:2002.10179, for one-shot pruning by rank and the counting of filters. One rate
        for all groups under a budget is ours: the authors chose rates by hand.
    """
    targets = {"rates": rates, "macs": macs, "params": params, "budget": budget}
    _check_arguments({**targets, "compress_rate": compress_rate}, min_width, round_to)
    if method not in METHODS:
        raise UsageError(f'no method "{method}"; there are: {", ".join(METHODS)}.\n  {_NOTHING}')
    criterion = METHODS[method]
    if criterion.needs_data and loader is None and ranks is None:
        raise UsageError(f'method "{method}" looks at images: pass a loader.\n  {_NOTHING}')
    size = _input_size(model)[1:]
    table = {} if compress_rate is None else _published(model, compress_rate)
    if align == "own":
        if not table:
            raise UsageError(f'align="own" follows a published list: pass compress_rate.\n  {_NOTHING}')
        if criterion.needs_data and ranks is None and loader is not None:
            sites = [vector.site for vector in authors_vectors(_variant(model))]
            ranks = collect_ranks(model, loader, sites, images, progress=progress, snapshot=snapshot)
        return _prune_own(model, table, criterion, Evidence(ranks, seed))
    groups = prunable(model, size, align=align, keep_head=keep_head)
    free = [group for group in groups if not group.reason]
    if table:
        by_root, counts = _from_table(model, groups, table)
    elif rates is not None:
        by_root = _by_root(groups, rates)
        counts = keep_counts(free, by_root, round_to=round_to)
    else:
        target = _Target.of(model, groups, macs, params, budget)
        rate, counts = _solve(model, groups, target, min_width=min_width, round_to=round_to)
        by_root = {group.root: rate for group in free}
    if criterion.needs_data and ranks is None and loader is not None:
        ranks = collect_ranks(model, loader, images=images, progress=progress, snapshot=snapshot)
    kept = cut(free, criterion.score(model, free, Evidence(ranks, seed)), counts)
    masks = masks_of(model, groups, kept)
    small = narrowed(model, masks)
    check_same(model, small, masks, size)
    record_name(small, model)
    return Pruned(small, widths_of(model, masks), kept, by_root, tuple(groups), ranks)


def _variant(model: nn.Module) -> str:
    name = _name(model)
    return name if name in HRANK_NAMES.values() else HRANK_NAMES.get(name, "")


def _published(model: nn.Module, compress_rate: str | Sequence[float]) -> dict[str, list[int]]:
    """Widths by a published list, for a full network that has such lists."""
    variant = _variant(model)
    if not variant:
        raise UsageError(
            f"compress_rate: no such lists are known for {_name(model)}; for: {', '.join(HRANK_NAMES)}.\n"
            f"  {_NOTHING}   Use rates, or a budget"
        )
    table = widths_of_rates(variant, compress_rate)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name in table and table[name][0] > module.out_channels:
            raise UsageError(
                f'compress_rate: layer "{name}" has {module.out_channels} channels already, and '
                f"{table[name][0]} would stay.\n  {_NOTHING}   Published lists are for the full network"
            )
    return table


def _from_table(
    model: nn.Module, groups: Sequence[Group], table: Mapping[str, list[int]]
) -> tuple[dict[str, float], dict[str, int]]:
    """Counts of the groups by a table of widths."""
    counts: dict[str, int] = {}
    for group in groups:
        wanted = {conv: table[conv][0] if conv in table else group.channels for conv in group.convs}
        cut = {conv: width for conv, width in wanted.items() if width < group.channels}
        if cut and (group.reason or len(set(wanted.values())) > 1):
            reason = group.reason or "layers that add to it keep other numbers of channels"
            raise UsageError(
                f'compress_rate cuts layer "{min(cut)}", which has to stay whole: {reason}.\n'
                f'  {_NOTHING}   align="own" cuts it as the authors did'
            )
        if not group.reason:
            counts[group.root] = min(wanted.values())
    return {g.root: 1 - counts[g.root] / g.channels for g in groups if g.root in counts}, counts


def _prune_own(
    model: nn.Module,
    table: Mapping[str, list[int]],
    criterion: Method,
    evidence: Evidence,
) -> Pruned:
    """Each convolution keeps its own filters."""
    vectors = authors_vectors(_variant(model))
    convs = [conv for vector in vectors for conv in vector.convs]
    modules: dict[str, Any] = dict(model.named_modules())
    scores: dict[str, Tensor] = {}
    for vector in vectors:
        if evidence.ranks is not None:
            scores |= dict.fromkeys(vector.convs, evidence.ranks.mean(vector.site.name))
    if evidence.ranks is None:
        lone = []
        for conv in convs:
            layer: Any = modules[conv]
            every = torch.arange(layer.out_channels)
            lone.append(Group(conv, layer.out_channels, (Slot(conv, "out", every, every),), (conv,)))
        scores = criterion.score(model, lone, evidence)
    first = next(model.parameters())
    image = torch.zeros(1, *_input_size(model), device=first.device, dtype=first.dtype)
    masks = own_masks(model, image, table, scores)
    small = narrowed(model, masks)
    kept = {name: mask.nonzero()[:, 0] for (name, axis), mask in masks.items() if axis == "out"}
    kept = {name: indices for name, indices in kept.items() if isinstance(modules[name], nn.Conv2d)}
    rates = {name: 1 - len(indices) / modules[name].out_channels for name, indices in kept.items()}
    record_name(small, model)
    groups = tuple(Group(name, modules[name].out_channels, (), (name,)) for name in convs)
    return Pruned(small, widths_of(model, masks), kept, rates, groups, evidence.ranks)


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = cfg.get("input_size") or (3, 224, 224)
    return int(getattr(model, "in_chans", channels)), int(height), int(width)


def _check_arguments(targets: dict[str, Any], min_width: int, round_to: int) -> None:
    given = [name for name, value in targets.items() if value is not None]
    if len(given) != 1:
        raise UsageError(
            f"{' and '.join(given) or 'nothing'} given: expected one of {', '.join(targets)}.\n  {_NOTHING}"
        )
    for name in ("macs", "params"):
        if targets[name] is not None and not (_is_number(targets[name]) and targets[name] > 0):
            raise UsageError(f"{name}={targets[name]!r}: expected a share up to 1, or a count.\n  {_NOTHING}")
    for name, value in (("min_width", min_width), ("round_to", round_to)):
        if value < 1:
            raise UsageError(f"{name}={value}: expected 1 or more.\n  {_NOTHING}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def prunable(
    model: nn.Module, size: tuple[int, int], *, align: str = "group", keep_head: bool = True
) -> list[Group]:
    """Groups of a network, with a reason for each that is to stay whole.

    Args:
        model: The network.
        size: Height and width of an image.
        align: See :func:`prune`.
        keep_head: See :func:`prune`.

    Raises:
        UsageError: ``align`` is neither, or no group is left; names the layers that stand in the way.
        ChanzooError: Torch-Pruning is not installed.
    """
    if align not in ("group", "inner"):
        raise UsageError(f'align="{align}": expected "group", "inner" or "own".\n  {_NOTHING}')
    for name, module in model.named_modules():
        if isinstance(module, _CHOOSES):
            raise UsageError(
                f'layer "{name}" of {_name(model)} ({type(module).__name__}) chooses its connections itself: '
                f"its channels cannot be removed.\n  {_NOTHING}   See: chanzoo condense --help"
            )
    if missing := [name for name in _CONTRACT if not callable(getattr(model, name, None))]:
        raise UsageError(
            f"{_name(model)} has no {missing[0]}: expected a classifier with timm's model contract, as "
            f"timm.create_model builds it without features_only.\n  {_NOTHING}"
        )
    groups = []
    for group in find_groups(model, size):
        reason = group.reason
        if keep_head and group.is_head:
            reason = reason or "it is what the classifier gets"
        if align == "inner" and len(group.convs) > 1:
            reason = reason or f"{len(group.convs)} layers add to it"
        if group.channels == group.chunks:
            reason = reason or "none of its channels can go"
        groups.append(replace(group, reason=reason))
    groups = tried(model, groups, size)
    if all(group.reason for group in groups):
        lines = [f"  {group.root}: {group.reason}" for group in groups[:5]]
        raise UsageError(
            "\n".join([f"{_name(model)} has no channels that can be removed.", *lines, f"  {_NOTHING}"])
        )
    return groups


def _by_root(groups: Sequence[Group], rates: Any) -> dict[str, float]:
    """A rate for every group that may be cut."""
    free = [group for group in groups if not group.reason]
    rates = read_rates(rates) if isinstance(rates, str) else rates
    rates = rates.tolist() if callable(getattr(rates, "tolist", None)) else rates  # of an array, a tensor
    every = (
        rates.values() if isinstance(rates, Mapping) else rates if isinstance(rates, Sequence) else [rates]
    )
    if odd := [rate for rate in every if not _is_number(rate)]:
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


@dataclass(frozen=True)
class _Target:
    """A cost to stay below, of the network that some masks leave."""

    name: str
    amount: float
    cost: Callable[[Masks], float]
    is_measured: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        groups: Sequence[Group],
        macs: float | None,
        params: float | None,
        budget: Budget | None,
    ) -> _Target:
        if budget is not None:
            measure = budget.cost
            return cls(budget.name, budget.target, lambda masks: measure(narrowed(model, masks)), True)
        what, amount, name = ("macs", macs, "MACs") if macs is not None else ("params", params, "parameters")
        assert amount is not None
        cost = partial(Ledger(model, _input_size(model)), what)
        return cls(name, amount * cost({}) if amount <= 1 else amount, cost)


def _solve(
    model: nn.Module, groups: Sequence[Group], target: _Target, *, min_width: int = 1, round_to: int = 1
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
            f"cannot reach {_say(target.amount)} {target.name} for {_name(model)}: with {min_width} or more "
            f"channels per layer the floor is {_say(floor)}.",
            *(f"  {group.root} stays whole: {group.reason}" for group in whole[:5]),
            f"  {_NOTHING}",
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


def _name(model: nn.Module) -> str:
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)
