"""Layers: tensors in, tensors out. They import torch and ``timm.layers`` only."""

from .condensing import condense, follow_progress, is_condensed, learned_layers, reset_progress
from .decorrelation import BatchDecorrelation, inverse_sqrt
from .equilibrium import ChannelEquilibrium, EquilibriumAct, EquilibriumConv2d, MergedEquilibrium
from .learned_group import CondensedConv2d, CondensedReactivation, LearnedGroupConv2d, SparseReactivation
from .reweight import AdaptiveInstanceInverse

__all__ = [
    "AdaptiveInstanceInverse",
    "BatchDecorrelation",
    "ChannelEquilibrium",
    "CondensedConv2d",
    "CondensedReactivation",
    "EquilibriumAct",
    "EquilibriumConv2d",
    "LearnedGroupConv2d",
    "MergedEquilibrium",
    "SparseReactivation",
    "condense",
    "follow_progress",
    "inverse_sqrt",
    "is_condensed",
    "learned_layers",
    "reset_progress",
]
