"""METHODS: the criteria by which channels are judged. A new one is a function here or beside, and a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .groups import Group
from .scores import RankTable

__all__ = ["METHODS", "Evidence", "Method"]


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at besides the network.

    Attributes:
        ranks: Ranks of the feature maps, where data was asked for.
        seed: For criteria that draw lots.
    """

    ranks: RankTable | None = None
    seed: int = 0


@dataclass(frozen=True)
class Method:
    """A criterion.

    Attributes:
        name: For ``chanzoo prune --method``.
        title: One line.
        score: From network, groups and evidence to scores by root of the group, high for what should stay.
        needs_data: Whether it needs images.
        paper: Where it comes from; empty if nowhere.
    """

    name: str
    title: str
    score: Callable[[nn.Module, Sequence[Group], Evidence], dict[str, Tensor]]
    needs_data: bool = False
    paper: str = ""


def mean_rank(_model: nn.Module, groups: Sequence[Group], evidence: Evidence) -> dict[str, Tensor]:
    """Mean rank of each channel's maps; over all tensors in which a group's channels were measured.

    Raises:
        UsageError: The table lacks a group's convolutions.

    Source:
        arXiv:2002.10179. That channels of a residual stream are judged together is ours: the authors let each
        layer keep other channels of the same sum.
    """
    table = evidence.ranks
    if table is None:
        raise UsageError("the ranks of the feature maps are missing: measure them first (collect_ranks).")
    sites = {site.name: site for site in table.sites}
    scores = {}
    for group in groups:
        seen, total, count = set(), torch.zeros(group.channels, dtype=torch.float64), 0
        for slot in group.slots:
            site = sites.get(slot.name)
            if slot.axis == "in" or site is None:
                continue
            tensor = (site.module, site.call, site.start, site.stop, site.pool)
            if tensor in seen:
                continue  # both convolutions of a projected shortcut end in the same sum
            seen.add(tensor)
            total[slot.root] += table.mean(site.name)[slot.index]
            count += 1
        if not count:
            raise UsageError(f'the table of ranks has no site for layer "{group.root}".')
        scores[group.root] = total / count
    return scores


def filter_norm(model: nn.Module, groups: Sequence[Group], _evidence: Evidence) -> dict[str, Tensor]:
    """Sum of each filter's absolute weights, as a multiple of the layer's mean.

    Of several layers in a group the average counts.

    Source:
        Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017, arXiv:1608.08710); the average over
        layers is ours.
    """
    scores = {}
    for group in groups:
        total = torch.zeros(group.channels, dtype=torch.float64)
        for slot in group.slots:
            if slot.name in group.convs and slot.axis == "out":
                norms = model.get_submodule(slot.name).weight.detach().double().abs().flatten(1).sum(1).cpu()  # pyright: ignore
                total[slot.root] += (norms / norms.mean())[slot.index]
        scores[group.root] = total / len(group.convs)
    return scores


def lots(_model: nn.Module, groups: Sequence[Group], evidence: Evidence) -> dict[str, Tensor]:
    """Drawn at random: what every criterion has to beat."""
    generator = torch.Generator().manual_seed(evidence.seed)
    return {group.root: torch.rand(group.channels, generator=generator) for group in groups}


METHODS = {
    row.name: row
    for row in (
        Method(
            "hrank", "mean rank of the feature maps", mean_rank, needs_data=True, paper="arXiv:2002.10179"
        ),
        Method("l1", "sum of the filter's absolute weights", filter_norm, paper="arXiv:1608.08710"),
        Method("random", "drawn by lot, for comparison", lots),
    )
}
