"""MobileNetV2 with Channel Equilibrium.

The layer is that of Shao et al., "Channel Equilibrium Networks for Learning Deep Representation" (ICML
2020, arXiv:2003.00214); the backbone that of Sandler et al. 2018, arXiv:1801.04381. The authors released
no such network: one CE layer between every depthwise norm and its activation is our choice, and the
paper's figures for a CE-MobileNetV2 do not carry over to it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models import EfficientNet, generate_default_cfgs, register_model
from torch import nn

from .._timm import DepthwiseSeparableConv, InvertedResidual, decode_arch_def, round_channels
from ..layers import ChannelEquilibrium, EquilibriumAct
from ..layers.folding import fold_pairs, link_pair
from ._build import arch_cfgs, build, imagenet_cfg

__all__ = ["CEMobileNetV2"]

_HEAD_WIDTH = 1280

# Table 2 of arXiv:1801.04381 in timm's notation: block, repeats, kernel, stride, expansion, channels.
_STAGES = (
    "ds_r1_k3_s1_c16",
    "ir_r2_k3_s2_e6_c24",
    "ir_r3_k3_s2_e6_c32",
    "ir_r4_k3_s2_e6_c64",
    "ir_r3_k3_s1_e6_c96",
    "ir_r3_k3_s2_e6_c160",
    "ir_r1_k3_s1_e6_c320",
)


class FoldableDepthwiseSeparableConv(DepthwiseSeparableConv):
    """timm's block without expansion, able to fold its batch norms for inference."""

    def reparameterize(self) -> None:
        """Fold every batch norm into its convolution; called by ``timm.utils.reparameterize_model``."""
        fold_pairs(self)


class FoldableInvertedResidual(InvertedResidual):
    """timm's inverted residual block, able to fold its batch norms for inference."""

    def reparameterize(self) -> None:
        """Fold every batch norm into its convolution; called by ``timm.utils.reparameterize_model``."""
        fold_pairs(self)


# Block type, ours, and the name of its depthwise norm.
_BLOCKS = {
    DepthwiseSeparableConv: (FoldableDepthwiseSeparableConv, "bn1"),
    InvertedResidual: (FoldableInvertedResidual, "bn2"),
}


class CEMobileNetV2(EfficientNet):
    """MobileNetV2 with CE behind every depthwise norm, before its activation.

    The backbone is timm's and is built first: under the same seed it starts from the same weights as the
    plain network and leaves the random state alike.

    Source:
        arXiv:2003.00214 (layer), arXiv:1801.04381 (backbone). The placement is ours.
    """

    def __init__(
        self,
        width: float = 1.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: Any = "relu6",
        norm_layer: Any = "batchnorm2d",
        group_size: int = 16,
        reduction: int = 4,
        sync: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Build the network.

        Args:
            width: Multiplier of every width; the head keeps at least 1280 channels.
            num_classes: Outputs; 0 for no classifier.
            in_chans: Channels of the image.
            output_stride: 32, 16 or 8; the smaller ones dilate the last stages.
            global_pool: Pooling before the classifier; empty for none.
            drop_rate: Dropout before the classifier.
            drop_path_rate: Stochastic depth at the last block, rising linearly from 0.
            act_layer: Activation, by timm's name or class.
            norm_layer: Norm, by timm's name or class.
            group_size: Channels per decorrelated group; halved until it divides a width.
            reduction: Channels per hidden feature of the re-weighting.
            sync: Share CE statistics between processes in training.
            device: Where to create parameters and buffers.
            dtype: Type of parameters and buffers.
        """
        round_width = partial(round_channels, multiplier=width)
        super().__init__(
            block_args=decode_arch_def([[stage] for stage in _STAGES]),
            num_classes=num_classes,
            num_features=max(_HEAD_WIDTH, round_width(_HEAD_WIDTH)),
            in_chans=in_chans,
            output_stride=output_stride,
            act_layer=act_layer,
            norm_layer=norm_layer,
            round_chs_fn=round_width,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            global_pool=global_pool,
            device=device,
            dtype=dtype,
        )
        ce: dict[str, Any] = dict(
            group_size=group_size, reduction=reduction, sync=sync, device=device, dtype=dtype
        )
        with torch.random.fork_rng(devices=[]):
            stages: Any = self.blocks
            for block in (block for stage in stages for block in stage):
                block.__class__, name = _BLOCKS[type(block)]
                norm = getattr(block, name)
                norm.act = EquilibriumAct(ChannelEquilibrium(norm.num_features, **ce), norm.act)
        link_pair(self.conv_stem, self.bn1)
        link_pair(self.conv_head, self.bn2)


_WIDTHS = {
    "ce_mobilenetv2": 1.0,
    "ce_mobilenetv2_050": 0.5,
    "ce_mobilenetv2_075": 0.75,
    "ce_mobilenetv2_140": 1.4,
}

default_cfgs = generate_default_cfgs(
    arch_cfgs(
        _WIDTHS,
        imagenet_cfg(
            first_conv="conv_stem",
            classifier="classifier",
            license="apache-2.0",
            paper_ids="arXiv:2003.00214",
        ),
    )
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build(
        CEMobileNetV2,
        variant,
        pretrained,
        flatten_sequential=True,
        defaults=dict(width=_WIDTHS[variant]),
        **kwargs,
    )


@register_model
def ce_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2 with Channel Equilibrium."""
    return _create("ce_mobilenetv2", pretrained, **kwargs)


@register_model
def ce_mobilenetv2_050(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2 of half width with Channel Equilibrium."""
    return _create("ce_mobilenetv2_050", pretrained, **kwargs)


@register_model
def ce_mobilenetv2_075(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2 of three quarters width with Channel Equilibrium."""
    return _create("ce_mobilenetv2_075", pretrained, **kwargs)


@register_model
def ce_mobilenetv2_140(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2 of 1.4 times the width with Channel Equilibrium."""
    return _create("ce_mobilenetv2_140", pretrained, **kwargs)
