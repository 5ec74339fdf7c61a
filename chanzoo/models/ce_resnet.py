"""Residual networks with Channel Equilibrium.

Shao et al., "Channel Equilibrium Networks for Learning Deep Representation" (ICML 2020,
arXiv:2003.00214): CE behind the last norm of each residual branch, before the addition, in every stage
but the last, and behind the norm of the stem.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..layers import ChannelEquilibrium, EquilibriumAct
from ._build import build, cifar_cfg
from .cifar_resnet import CifarResNet

__all__ = ["CECifarResNet"]


class CECifarResNet(CifarResNet):
    """CIFAR residual network with CE in the stem and in every stage but the last.

    The backbone is built exactly as without CE: under the same seed both start from the same weights
    and leave the random state alike, so that they also see the same data in the same order.

    Source:
        arXiv:2003.00214 (layer and placement), arXiv:1512.03385 (backbone). The paper reports no
        networks of this family; carrying the placement over is our choice.
    """

    def __init__(self, *args: Any, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        """Build the network; the arguments are those of :class:`CifarResNet`."""
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        with torch.random.fork_rng(devices=[]):
            stem = ChannelEquilibrium(self.conv1.out_channels, device=device, dtype=dtype)
            self.act1 = EquilibriumAct(stem, self.act1)
            for stage in (self.layer1, self.layer2):
                for block in stage:
                    block.ce = ChannelEquilibrium(block.conv2.out_channels, device=device, dtype=dtype)


default_cfgs = generate_default_cfgs({f"ce_cifar_resnet{depth}": cifar_cfg() for depth in (20, 56)})


def _create_cifar(variant: str, pretrained: bool, depth: int, **kwargs: Any) -> nn.Module:
    return build(CECifarResNet, variant, pretrained, out_indices=(0, 1, 2, 3), defaults=dict(depth=depth), **kwargs)


@register_model
def ce_cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 for 32×32 images with Channel Equilibrium."""
    return _create_cifar("ce_cifar_resnet20", pretrained, 20, **kwargs)


@register_model
def ce_cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for 32×32 images with Channel Equilibrium."""
    return _create_cifar("ce_cifar_resnet56", pretrained, 56, **kwargs)
