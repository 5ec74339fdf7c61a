"""Turns one network into another; never trains."""

from .rank import collect_ranks, rank_of_maps
from .scores import RankTable, keep_count, read_ranks, saturated, select, undecided
from .sites import RankSite, find_rank_sites

__all__ = [
    "RankSite",
    "RankTable",
    "collect_ranks",
    "find_rank_sites",
    "keep_count",
    "rank_of_maps",
    "read_ranks",
    "saturated",
    "select",
    "undecided",
]
