"""ShuffleNet V2, plain and with sparse feature reactivation.

Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design" (ECCV 2018,
arXiv:1807.11164); Yang et al., "CondenseNet V2: Sparse Feature Reactivation for Deep Networks" (CVPR 2021,
arXiv:2104.04382). Half of the maps pass a unit unchanged; with reactivation (``sfr_``) the other half, fresh
from its convolutions, updates them. The authors released neither code nor settings of that network: where the
update is taken, its groups and that it starts at zero are our choice. The plain network has torchvision's
names and computes the same.
"""

# No postponed annotations here: scripting needs the type of forward's argument, not its name.

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..errors import UsageError
from ..layers.condensing import CondensingProgress
from ..layers.learned_group import CondensedReactivation, SparseReactivation
from ..layers.shuffle import channel_shuffle
from ._build import arch_cfgs, build, imagenet_cfg
from ._staged import StagedNet

__all__ = ["VARIANTS", "ShuffleNetV2", "ShuffleUnit"]

_STAGES = ("stage2", "stage3", "stage4")


class ShuffleUnit(nn.Module):
    """Two branches of equal width, concatenated and shuffled.

    Attributes:
        branch1: Halves the maps; empty if they keep their size: then half of them passes through.
        branch2: Makes the new maps.
        sfr: Update of what passes through by the new maps, or None.

    Source:
        arXiv:1807.11164, figure 3 (c) and (d); ``sfr``: arXiv:2104.04382.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        act_layer: type[nn.Module],
        norm_layer: type[nn.Module],
        sfr: nn.Module | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Build the unit; one of stride 1 needs as many channels in as out."""
        super().__init__()
        self.stride = stride
        width = out_channels // 2
        inputs = in_channels if stride > 1 else width
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def pointwise(channels: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels, width, 1, bias=False, **dd)
            return [conv, norm_layer(width, **dd), act_layer(inplace=True)]

        def depthwise(channels: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False, **dd)
            return [conv, norm_layer(channels, **dd)]

        self.branch1 = nn.Sequential(*([*depthwise(inputs), *pointwise(inputs)] if stride > 1 else []))
        self.branch2 = nn.Sequential(*pointwise(inputs), *depthwise(width), *pointwise(width))
        self.sfr = sfr

    def forward(self, x: Tensor) -> Tensor:
        """Make new maps, refresh the old ones, interleave the two.

        Shape:
            x ``(b, in, h, w)`` → ``(b, out, h / stride, w / stride)``; new maps at odd places.
        """
        if self.stride == 1:
            old, x = x.chunk(2, dim=1)
        else:
            old = self.branch1(x)
        new = self.branch2(x)
        if self.sfr is not None:
            old = self.sfr(new, old)
        return channel_shuffle(torch.cat([old, new], dim=1), 2)


class ShuffleNetV2(StagedNet):
    """ShuffleNet V2 with or without sparse feature reactivation, in the form to train or the condensed one.

    Attributes:
        conv1: First convolution, norm, activation.
        maxpool: Pooling behind it.
        stage2: First of three stages; each begins with a unit that halves the maps.
        conv5: Last convolution, norm, activation.
        fc: The classifier.
        progress: Counts training forwards and drops connections when due; None if there is nothing to drop.
        condensed: Whether the reactivation is in the condensed form.

    Source:
        arXiv:1807.11164, table 5; arXiv:2104.04382.
    """

    if TYPE_CHECKING:
        progress: Any
        conv1: Any
        maxpool: Any
        conv5: Any
    chain = ("conv1", "maxpool", *_STAGES, "conv5")

    def __init__(
        self,
        channels: Sequence[int] = (24, 116, 232, 464, 1024),
        depths: Sequence[int] = (4, 8, 4),
        reactivation: bool = False,
        condensed: bool = False,
        total_steps: int | None = None,
        group_lasso: float = 0.0,
        num_classes: int = 1000,
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
            channels: Of the stem, the three stages and the last convolution.
            depths: Units of each stage.
            reactivation: Refresh what passes through a unit. Groups and factor are the largest of 8, 4, 2 and
                1 that divides the width of a branch.
            condensed: Build the condensed form of the reactivation.
            total_steps: Training forwards in all (epochs × batches per epoch); masks stay as they are if not
                given.
            group_lasso: As of :class:`chanzoo.layers.LearnedGroupConv2d`.
            num_classes: Outputs; 0 for no classifier.
            in_chans: Channels of the image.
            global_pool: Pooling before the classifier; empty for none, which leaves the outputs maps.
            drop_rate: Dropout before the classifier.
            act_layer: Activation, by timm's name or class.
            norm_layer: Norm, by timm's name or class.
            device: Where to create parameters and buffers.
            dtype: Type of parameters and buffers.

        Raises:
            UsageError: Not five ``channels`` or three ``depths``, one below 1, or a stage of odd width.
        """
        sized = len(channels) == len(_STAGES) + 2 and len(depths) == len(_STAGES)
        if not sized or min(*channels, *depths) < 1 or any(n % 2 for n in channels[1:-1]):
            raise UsageError(
                f"channels={list(channels)} and depths={list(depths)}: expected 5 and 3 numbers above 0, the "
                "channels of the three stages even.\n  Nothing was built."
            )
        # Plain values may be set before the constructor below, which asks for the parts.
        self.channels, self.depths = tuple(channels), tuple(depths)
        self.reactivation, self.condensed, self.group_lasso = reactivation, condensed, group_lasso
        self.learns_connections = reactivation
        super().__init__(
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            act_layer=act_layer,
            norm_layer=norm_layer,
            device=device,
            dtype=dtype,
        )
        learns = reactivation and not condensed
        self.progress = CondensingProgress(total_steps, device) if learns else None

    @torch.jit.ignore()
    def _parts(self, in_chans: int, act: Any, norm: Any, place: dict[str, Any]) -> dict[str, nn.Module]:
        stem, *widths, last = self.channels
        parts: dict[str, nn.Module] = {
            "conv1": nn.Sequential(
                nn.Conv2d(in_chans, stem, 3, 2, 1, bias=False, **place),
                norm(stem, **place),
                act(inplace=True),
            ),
            "maxpool": nn.MaxPool2d(3, 2, 1),
        }
        inputs = stem
        for name, depth, width in zip(_STAGES, self.depths, widths, strict=True):
            units = [ShuffleUnit(inputs, width, 2, act, norm, **place)]
            for _ in range(depth - 1):
                sfr = self._sfr(width // 2, act, norm, place) if self.reactivation else None
                units.append(ShuffleUnit(width, width, 1, act, norm, sfr, **place))
            parts[name] = nn.Sequential(*units)
            inputs = width
        parts["conv5"] = nn.Sequential(
            nn.Conv2d(inputs, last, 1, bias=False, **place), norm(last, **place), act(inplace=True)
        )
        levels = ("conv1", "maxpool", "stage2", "stage3", "conv5")
        self.feature_info += [
            dict(num_chs=n, reduction=2 ** (i + 1), module=level)
            for i, (n, level) in enumerate(zip((stem, stem, *widths[:2], last), levels, strict=True))
        ]
        return parts

    @torch.jit.ignore()
    def _sfr(self, width: int, act: Any, norm: Any, place: dict[str, Any]) -> nn.Module:
        groups = math.gcd(width, 8)
        options: Any = {"act_layer": act, "norm_layer": norm, **place}
        if self.condensed:
            return CondensedReactivation(width, width, groups, **options)
        return SparseReactivation(width, width, groups, group_lasso=self.group_lasso, **options)

    @torch.jit.ignore()
    def init_weights(self) -> None:
        """Kaiming normal with fan out for convolutions; the classifier as torch makes it.

        Those of reactivations start with zeros, which have a gradient. So the network begins as the plain
        one: weights of that one (``load_state_dict(…, strict=False)``) keep their function, and training
        from nothing goes better than with random updates.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (SparseReactivation, CondensedReactivation)):
                nn.init.zeros_(module.weight)

    @torch.jit.ignore()
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that split the parameters by depth, for layer-wise learning rates."""
        return dict(stem=r"^conv1", blocks=r"^stage(\d+)" if coarse else r"^stage(\d+)\.(\d+)")

    @torch.jit.ignore()
    def _layers_of(self, name: str) -> Any:
        # The first and last part stay whole: their activation works in place on what a checkpoint would keep.
        part: nn.Module = getattr(self, name)
        return part if name in _STAGES else [part]

    @torch.jit.ignore()
    def _before_forward(self) -> None:
        if self.progress is not None:
            self.progress.tick(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Unpooled features; in training, connections are dropped first when it is time.

        Shape:
            x ``(b, in_chans, h, w)`` → ``(b, num_features, h / 32, w / 32)``.
        """
        if not torch.jit.is_scripting():
            if self.training:
                self._before_forward()
            if self.grad_checkpointing:
                return self._checkpointed(x)
        return self.conv5(self.stage4(self.stage3(self.stage2(self.maxpool(self.conv1(x))))))


_X0_5: dict[str, Any] = {"channels": (24, 48, 96, 192, 1024)}
_X1_0: dict[str, Any] = {"channels": (24, 116, 232, 464, 1024)}
_X1_5: dict[str, Any] = {"channels": (24, 176, 352, 704, 1024)}
_SFR: dict[str, Any] = {"reactivation": True}

VARIANTS: dict[str, dict[str, Any]] = {
    "shufflenetv2_x0_5": _X0_5,
    "shufflenetv2_x1_0": _X1_0,
    "shufflenetv2_x1_5": _X1_5,
    "sfr_shufflenetv2": {**_X1_0, **_SFR},
    "sfr_shufflenetv2_x0_5": {**_X0_5, **_SFR},
    "sfr_shufflenetv2_x1_5": {**_X1_5, **_SFR},
}
_PLAIN = [name for name in VARIANTS if not name.startswith("sfr_")]
_REACTIVATED = [name for name in VARIANTS if name.startswith("sfr_")]

default_cfgs = generate_default_cfgs(
    {
        **arch_cfgs(
            _PLAIN, imagenet_cfg(first_conv="conv1.0", license="apache-2.0", paper_ids="arXiv:1807.11164")
        ),
        **arch_cfgs(
            _REACTIVATED,
            imagenet_cfg(first_conv="conv1.0", license="apache-2.0", paper_ids="arXiv:2104.04382"),
        ),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build(ShuffleNetV2, name, pretrained, defaults=VARIANTS[name], **kwargs)


@register_model
def shufflenetv2_x0_5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNet V2 of half width."""
    return _create("shufflenetv2_x0_5", pretrained, **kwargs)


@register_model
def shufflenetv2_x1_0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNet V2."""
    return _create("shufflenetv2_x1_0", pretrained, **kwargs)


@register_model
def shufflenetv2_x1_5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNet V2 of 1.5 times the width."""
    return _create("shufflenetv2_x1_5", pretrained, **kwargs)


@register_model
def sfr_shufflenetv2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNet V2 1.0× with sparse feature reactivation."""
    return _create("sfr_shufflenetv2", pretrained, **kwargs)


@register_model
def sfr_shufflenetv2_x0_5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNet V2 of half width with sparse feature reactivation."""
    return _create("sfr_shufflenetv2_x0_5", pretrained, **kwargs)


@register_model
def sfr_shufflenetv2_x1_5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ShuffleNet V2 of 1.5 times the width with sparse feature reactivation."""
    return _create("sfr_shufflenetv2_x1_5", pretrained, **kwargs)
