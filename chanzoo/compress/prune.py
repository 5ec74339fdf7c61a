"""Prune any CNN: judge coupled channels, meet rates or a budget, and slice.

    scores of the groups → how many channels each keeps → which → masks → the narrow network

Training is not done here. Before any fine-tuning, norms are measured anew by
:func:`chanzoo.compress.recalibrate_norms`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..layers import CondensedConv2d, CondensedReactivation, LearnedGroupConv2d, SparseReactivation
from ..macs import input_size_of
from ..models.hrank import HRANK_NAMES, widths_of_rates
from .budget import Budget, Target, solve
from .groups import Group, Slot, find_groups
from .methods import METHODS, Evidence, Method
from .names import name_of, record_name
from .own import authors_vectors, own_masks
from .rank import collect_ranks
from .rates import cut, is_number, keep_counts, rates_by_root
from .scores import RankTable
from .surgery import check_same, masks_of, narrowed, tried, widths_of

__all__ = ["Pruned", "prunable", "prune"]

_NOTHING = "Nothing was pruned."
_CHOOSES = (CondensedConv2d, CondensedReactivation, LearnedGroupConv2d, SparseReactivation)
_CONTRACT = ("forward_features", "forward_head", "get_classifier")


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
    size = input_size_of(model)[1:]
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
        by_root = rates_by_root(groups, rates)
        counts = keep_counts(free, by_root, round_to=round_to)
    else:
        target = Target.of(model, macs, params, budget)
        rate, counts = solve(model, groups, target, min_width=min_width, round_to=round_to)
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
    name = name_of(model)
    return name if name in HRANK_NAMES.values() else HRANK_NAMES.get(name, "")


def _published(model: nn.Module, compress_rate: str | Sequence[float]) -> dict[str, list[int]]:
    """Widths by a published list, for a full network that has such lists."""
    variant = _variant(model)
    if not variant:
        raise UsageError(
            f"compress_rate: no such lists are known for {name_of(model)}; for: {', '.join(HRANK_NAMES)}.\n"
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
    image = torch.zeros(1, *input_size_of(model), device=first.device, dtype=first.dtype)
    masks = own_masks(model, image, table, scores)
    small = narrowed(model, masks)
    kept = {name: mask.nonzero()[:, 0] for (name, axis), mask in masks.items() if axis == "out"}
    kept = {name: indices for name, indices in kept.items() if isinstance(modules[name], nn.Conv2d)}
    rates = {name: 1 - len(indices) / modules[name].out_channels for name, indices in kept.items()}
    record_name(small, model)
    groups = tuple(Group(name, modules[name].out_channels, (), (name,)) for name in convs)
    return Pruned(small, widths_of(model, masks), kept, rates, groups, evidence.ranks)


def _check_arguments(targets: dict[str, Any], min_width: int, round_to: int) -> None:
    given = [name for name, value in targets.items() if value is not None]
    if len(given) != 1:
        raise UsageError(
            f"{' and '.join(given) or 'nothing'} given: expected one of {', '.join(targets)}.\n  {_NOTHING}"
        )
    for name in ("macs", "params"):
        if targets[name] is not None and not (is_number(targets[name]) and targets[name] > 0):
            raise UsageError(f"{name}={targets[name]!r}: expected a share up to 1, or a count.\n  {_NOTHING}")
    for name, value in (("min_width", min_width), ("round_to", round_to)):
        if value < 1:
            raise UsageError(f"{name}={value}: expected 1 or more.\n  {_NOTHING}")


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
                f'layer "{name}" of {name_of(model)} ({type(module).__name__}) chooses its connections '
                f"itself: its channels cannot be removed.\n  {_NOTHING}   See: chanzoo condense --help"
            )
    if missing := [name for name in _CONTRACT if not callable(getattr(model, name, None))]:
        raise UsageError(
            f"{name_of(model)} has no {missing[0]}: expected a classifier with timm's model contract, as "
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
            "\n".join([f"{name_of(model)} has no channels that can be removed.", *lines, f"  {_NOTHING}"])
        )
    return groups
