"""Turns one network into another; never trains."""

from .budget import Budget
from .groups import Group, find_groups
from .methods import METHODS, Evidence, Method
from .prune import Pruned, prunable, prune
from .rank import collect_ranks, rank_of_maps
from .recalibrate import recalibrate_norms
from .scores import RankTable, keep_count, read_ranks, saturated, select, undecided
from .sites import RankSite, find_rank_sites

__all__ = [
    "METHODS",
    "Budget",
    "Evidence",
    "Group",
    "Method",
    "Pruned",
    "RankSite",
    "RankTable",
    "collect_ranks",
    "find_groups",
    "find_rank_sites",
    "keep_count",
    "prunable",
    "prune",
    "rank_of_maps",
    "read_ranks",
    "recalibrate_norms",
    "saturated",
    "select",
    "undecided",
]
