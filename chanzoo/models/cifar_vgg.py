"""VGG-16 with batch norm for 32×32 images, as pruning papers use it.

The thirteen convolutions of Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition" (ICLR 2015, arXiv:1409.1556), configuration D, each with a batch norm; one hidden layer of 512
features instead of two of 4096, and no pooling behind the last convolution.
"""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from ._build import arch_cfgs, build, cifar_cfg
from ._staged import ConvBlock, StagedNet

__all__ = ["CifarVGG"]

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class CifarVGG(StagedNet):
    """Plain convolutional network for small images; features are 16 times smaller than the image.

    Source:
        arXiv:1409.1556, configuration D, with the changes that pruning papers made for CIFAR.
    """

    hidden = 512

    def _layers(
        self, in_chans: int, act: Any, norm: Any, place: dict[str, Any]
    ) -> tuple[list[nn.Module], list[int]]:
        channels = in_chans
        stages = []
        for widths in _STAGES:
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if stages else []
            for width in widths:
                layers.append(ConvBlock(channels, width, 3, act, norm, **place))
                channels = width
            stages.append(nn.Sequential(*layers))
        return stages, [widths[-1] for widths in _STAGES]


default_cfgs = generate_default_cfgs(
    arch_cfgs(
        ["cifar_vgg16_bn"],
        cifar_cfg(16, first_conv="stage1.0.conv", license="apache-2.0", paper_ids="arXiv:1409.1556"),
        stride=16,
    )
)


@register_model
def cifar_vgg16_bn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VGG-16 with batch norm for 32×32 images."""
    return build(
        CifarVGG,
        "cifar_vgg16_bn",
        pretrained,
        feature_levels=(0, 1, 2, 3, 4),
        **kwargs,
    )
