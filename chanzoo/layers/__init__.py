"""Layers: tensors in, tensors out. They import torch and ``timm.layers`` only."""

from .decorrelation import BatchDecorrelation, inverse_sqrt
from .equilibrium import ChannelEquilibrium, EquilibriumAct
from .reweight import AdaptiveInstanceInverse

__all__ = [
    "AdaptiveInstanceInverse",
    "BatchDecorrelation",
    "ChannelEquilibrium",
    "EquilibriumAct",
    "inverse_sqrt",
]
