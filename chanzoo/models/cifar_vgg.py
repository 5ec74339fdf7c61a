"""VGG-16 with batch norm for 32×32 images, as pruning papers use it.

The thirteen convolutions of Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition" (ICLR 2015, arXiv:1409.1556), configuration D, each with a batch norm; one hidden layer of 512
features instead of two of 4096, and no pooling behind the last convolution.
"""

from __future__ import annotations

from typing import Any

from timm.layers import get_act_layer, get_norm_layer
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ._build import arch_cfgs, build, cifar_cfg
from ._staged import ConvBlock, StagedNet

__all__ = ["CifarVGG"]

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_HIDDEN = 512


class CifarVGG(StagedNet):
    """Plain convolutional network for small images; features are 16 times smaller than the image.

    Source:
        arXiv:1409.1556, configuration D, with the changes that pruning papers made for CIFAR.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        act_layer: str | type[nn.Module] = "relu",
        norm_layer: str | type[nn.Module] = "batchnorm2d",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Build the network.

        Args:
            num_classes: Outputs; 0 for no classifier.
            in_chans: Channels of the image.
            global_pool: Pooling before the classifier; empty for none.
            drop_rate: Dropout before the classifier.
            act_layer: Activation, by timm's name or class.
            norm_layer: Norm, by timm's name or class.
            device: Where to create parameters and buffers.
            dtype: Type of parameters and buffers.
        """
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        act: Any = get_act_layer(act_layer)
        norm: Any = get_norm_layer(norm_layer)
        channels = in_chans
        stages = []
        for widths in _STAGES:
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if stages else []
            for width in widths:
                layers.append(ConvBlock(channels, width, 3, act, norm, **dd))
                channels = width
            stages.append(nn.Sequential(*layers))
        pooled = channels * (2 if global_pool.endswith("catavgmax") else 1)
        # A 1×1 convolution is a linear layer that also takes maps that were not pooled.
        hidden = ConvBlock(pooled, _HIDDEN, 1, act, norm, **dd)
        ends = [widths[-1] for widths in _STAGES]
        self._end(stages, ends, hidden, num_classes, in_chans, global_pool, drop_rate, dd)


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
