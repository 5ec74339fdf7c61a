"""Layers: tensors in, tensors out. They import torch and ``timm.layers`` only."""

from .decorrelation import BatchDecorrelation, inverse_sqrt
from .equilibrium import ChannelEquilibrium, EquilibriumAct, EquilibriumConv2d, MergedEquilibrium
from .reweight import AdaptiveInstanceInverse

__all__ = [
    "AdaptiveInstanceInverse",
    "BatchDecorrelation",
    "ChannelEquilibrium",
    "EquilibriumAct",
    "EquilibriumConv2d",
    "MergedEquilibrium",
    "inverse_sqrt",
]
