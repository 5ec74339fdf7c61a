"""Inception network for 32×32 images, as pruning papers use it.

The nine inception modules of Szegedy et al., "Going Deeper with Convolutions" (CVPR 2015, arXiv:1409.4842),
with batch norms, two 3×3 convolutions instead of each 5×5, a single 3×3 stem and no auxiliary classifiers.
"""

# No postponed annotations here: scripting needs the type of forward's argument, not its name.

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ._build import arch_cfgs, build, cifar_cfg
from ._staged import ConvBlock, StagedNet

__all__ = ["CifarGoogLeNet", "Inception"]

_STEM = 192
# Outputs of the 1×1, 3×3, 5×5 and pool branches, then of the reductions before 3×3 and 5×5.
_MODULES = (
    ((64, 128, 32, 32, 96, 16), (128, 192, 96, 64, 128, 32)),
    (
        (192, 208, 48, 64, 96, 16),
        (160, 224, 64, 64, 112, 24),
        (128, 256, 64, 64, 128, 24),
        (112, 288, 64, 64, 144, 32),
        (256, 320, 128, 128, 160, 32),
    ),
    ((256, 320, 128, 128, 160, 32), (384, 384, 128, 128, 192, 48)),
)


class Inception(nn.Module):
    """Four branches side by side.

    Source:
        arXiv:1409.4842, figure 2b, with the 5×5 convolution as two of 3×3.
    """

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, ...],
        act_layer: type[nn.Module],
        norm_layer: type[nn.Module],
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Build the module; ``widths`` as in the table above."""
        super().__init__()
        one, three, five, pool, reduce3, reduce5 = widths
        more: Any = (act_layer, norm_layer, device, dtype)
        self.branch1 = ConvBlock(in_channels, one, 1, *more)
        self.branch3 = nn.Sequential(
            ConvBlock(in_channels, reduce3, 1, *more), ConvBlock(reduce3, three, 3, *more)
        )
        self.branch5 = nn.Sequential(
            ConvBlock(in_channels, reduce5, 1, *more),
            ConvBlock(reduce5, five, 3, *more),
            ConvBlock(five, five, 3, *more),
        )
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), ConvBlock(in_channels, pool, 1, *more))

    def forward(self, x: Tensor) -> Tensor:
        """Run the branches and join their maps in the order of the paper.

        Shape:
            x ``(b, in, h, w)`` → ``(b, sum of the branches, h, w)``.
        """
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x)], dim=1)


class CifarGoogLeNet(StagedNet):
    """Inception network for small images; features are 4 times smaller than the image.

    Source:
        arXiv:1409.4842, with the changes that pruning papers made for CIFAR.
    """

    def _layers(
        self, in_chans: int, act: Any, norm: Any, place: dict[str, Any]
    ) -> tuple[list[nn.Module], list[int]]:
        channels = _STEM
        stages, ends = [], []
        for modules in _MODULES:
            first = nn.MaxPool2d(3, 2, 1) if stages else ConvBlock(in_chans, channels, 3, act, norm, **place)
            layers: list[nn.Module] = [first]
            for widths in modules:
                layers.append(Inception(channels, widths, act, norm, **place))
                channels = sum(widths[:4])
            stages.append(nn.Sequential(*layers))
            ends.append(channels)
        return stages, ends


default_cfgs = generate_default_cfgs(
    arch_cfgs(
        ["cifar_googlenet"],
        cifar_cfg(4, first_conv="stage1.0.conv", license="apache-2.0", paper_ids="arXiv:1409.4842"),
        stride=4,
    )
)


@register_model
def cifar_googlenet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GoogLeNet for 32×32 images."""
    return build(
        CifarGoogLeNet,
        "cifar_googlenet",
        pretrained,
        feature_levels=(0, 1, 2),
        **kwargs,
    )
