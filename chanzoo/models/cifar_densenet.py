"""Densely connected network of depth 40 for 32×32 images.

Huang et al., "Densely Connected Convolutional Networks" (CVPR 2017, arXiv:1608.06993): growth 12, three
blocks of twelve layers, no bottlenecks and no compression. The stem has 24 channels, as in pruning papers (16
in the paper).
"""

# No postponed annotations here: scripting needs the type of forward's argument, not its name.

from collections import OrderedDict
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ._build import arch_cfgs, build, cifar_cfg
from ._staged import StagedNet

__all__ = ["CifarDenseNet", "DenseLayer"]

_STEM, _GROWTH, _LAYERS, _BLOCKS = 24, 12, 12, 3


class DenseLayer(nn.Module):
    """Norm, activation, 3×3 convolution; its outputs join its inputs.

    Source:
        arXiv:1608.06993, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        growth: int,
        act_layer: type[nn.Module],
        norm_layer: type[nn.Module],
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Build the layer."""
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.bn = norm_layer(in_channels, **dd)
        self.act = act_layer(inplace=True)
        self.conv = nn.Conv2d(in_channels, growth, 3, 1, 1, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Append new maps.

        Shape:
            x ``(b, in, h, w)`` → ``(b, in + growth, h, w)``.
        """
        return torch.cat([x, self.conv(self.act(self.bn(x)))], dim=1)


class CifarDenseNet(StagedNet):
    """Densely connected network for small images; features are 4 times smaller than the image.

    Source:
        arXiv:1608.06993.
    """

    def _layers(
        self, in_chans: int, act: Any, norm: Any, place: dict[str, Any]
    ) -> tuple[list[nn.Module], list[int]]:
        channels = _STEM
        stages, ends = [], []
        for _ in range(_BLOCKS):
            first = nn.Conv2d(in_chans, channels, 3, 1, 1, bias=False, **place)
            if stages:
                parts = OrderedDict(
                    bn=norm(channels, **place),
                    act=act(inplace=True),
                    conv=nn.Conv2d(channels, channels, 1, bias=False, **place),
                    pool=nn.AvgPool2d(2),
                )
                first = nn.Sequential(parts)
            layers: list[nn.Module] = [first]
            for _ in range(_LAYERS):
                layers.append(DenseLayer(channels, _GROWTH, act, norm, **place))
                channels += _GROWTH
            stages.append(nn.Sequential(*layers))
            ends.append(channels)
        stages[-1].add_module("bn", norm(channels, **place))
        stages[-1].add_module("act", act())  # not in place: checkpointing saves its input
        return stages, ends


default_cfgs = generate_default_cfgs(
    arch_cfgs(
        ["cifar_densenet40"],
        cifar_cfg(4, first_conv="stage1.0", license="apache-2.0", paper_ids="arXiv:1608.06993"),
        stride=4,
    )
)


@register_model
def cifar_densenet40(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DenseNet-40 of growth 12 for 32×32 images."""
    return build(
        CifarDenseNet,
        "cifar_densenet40",
        pretrained,
        feature_levels=(0, 1, 2),
        **kwargs,
    )
