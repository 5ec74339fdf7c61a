"""CondenseNet and CondenseNet V2: dense networks that learn which connections they need.

Yang et al., "CondenseNet V2: Sparse Feature Reactivation for Deep Networks" (CVPR 2021, arXiv:2104.04382) and
Huang et al., "CondenseNet: An Efficient DenseNet using Learned Group Convolutions" (CVPR 2018,
arXiv:1711.09224). A layer reads all earlier features through a learned group convolution; in V2 its new
features also update the old ones. Each network has two forms: with masks, to train, and ``condensed=True``,
to use. Differences from the authors' code: the position in training is kept in the network, pooling at the
end is global, and V2's networks for 32×32 images are a reconstruction from the published sizes, as no
configuration was released.
"""

# No postponed annotations here: scripting needs the type of forward's argument, not its name.

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import SEModule
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..errors import UsageError
from ..layers.condensing import CondensingProgress
from ..layers.fused_dense import FusedStage, can_fuse
from ..layers.learned_group import (
    CondensedConv2d,
    CondensedReactivation,
    LearnedGroupConv2d,
    SparseReactivation,
)
from ._build import arch_cfgs, build, cifar_cfg, imagenet_cfg
from ._staged import StagedNet

__all__ = ["VARIANTS", "CondenseNet", "CondensingLayer", "DenseStage"]

_STAGES = 5


class CondensingLayer(nn.Module):
    """One layer of a dense network: new maps from all old ones, then old ones refreshed by the new.

    Source:
        arXiv:2104.04382, figure 3; without ``sfr`` arXiv:1711.09224, figure 1.
    """

    def __init__(
        self,
        conv1: Any,
        norm2: Any,
        act: Any,
        conv2: Any,
        se: Any,
        sfr: Any,
    ) -> None:
        """Build the layer from its parts."""
        super().__init__()
        self.conv1 = conv1
        self.norm2 = norm2
        self.act = act
        self.conv2 = conv2
        self.se = se
        self.sfr = sfr

    def forward(self, x: Tensor) -> Tensor:
        """Refresh maps and append new ones.

        Shape:
            x ``(b, in, h, w)`` → ``(b, in + growth, h, w)``, old ones first.
        """
        new = self.se(self.conv2(self.act(self.norm2(self.conv1(x)))))
        if self.sfr is not None:
            x = self.sfr(new, x)
        return torch.cat([x, new], dim=1)


class DenseStage(nn.Sequential):
    """Layers of a dense network in a row, with pooling in front of all stages but the first."""

    @torch.jit.ignore()
    def fuse(self) -> nn.Module:
        """The stage in its fastest form for inference; called by ``timm.utils.reparameterize_model``.

        A stage with masks, or with layers that cannot be folded, stays as it is.
        """
        layers = [layer for layer in self if isinstance(layer, CondensingLayer)]
        if not can_fuse(layers):
            return self
        return FusedStage(layers, "pool" in self._modules).train(self.training)


class CondenseNet(StagedNet):
    """CondenseNet with or without sparse feature reactivation, in the form to train or the condensed one.

    Attributes:
        stem: First convolution.
        stage1: First of up to five stages; each but the first begins with average pooling.
        norm: Last norm, with its activation behind it.
        pre_logits: Squeeze-and-excitation of the pooled features, hidden layer, activation.
        fc: The classifier.
        progress: Counts training forwards and drops connections when due; None in the condensed form.
        condensed: Which form it is.

    Source:
        arXiv:2104.04382, section 4; arXiv:1711.09224, section 3.
    """

    if TYPE_CHECKING:
        progress: Any
        stem: Any
        norm: Any
        act: Any
    learns_connections = True
    chain = ("stem", *(f"stage{i + 1}" for i in range(_STAGES)), "norm", "act")

    def __init__(
        self,
        depths: Sequence[int] = (1, 1, 4, 6, 8),
        growth: Sequence[int] = (8, 8, 16, 32, 64),
        groups: int = 8,
        condensation_factor: int | None = None,
        groups_3x3: int | None = None,
        reactivation_groups: int | None = None,
        reactivation_factor: int | None = None,
        bottleneck: int = 4,
        stem_stride: int = 2,
        hard_swish_from: int = 2,
        se_from: int = 3,
        head_reduction: int = 16,
        head_width: int = 828,
        condensed: bool = False,
        total_steps: int | None = None,
        group_lasso: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        norm_layer: str | type[nn.Module] = "batchnorm2d",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Build the network.

        Args:
            depths: Layers of each stage.
            growth: New maps of a layer, by stage; the stem makes twice the first.
            groups: Of the learned group convolutions, the paper's G.
            condensation_factor: The paper's C: they keep one connection of so many; ``groups`` if not given.
            groups_3x3: Of the 3×3 convolutions; ``groups`` if not given.
            reactivation_groups: Of the reactivation; ``groups`` if not given, 0 for no reactivation (V1).
            reactivation_factor: Its C; ``reactivation_groups`` if not given.
            bottleneck: Inner maps of a layer for each new one.
            stem_stride: Of the first convolution.
            hard_swish_from: First stage, counted from 0, with hard-swish instead of ReLU.
            se_from: First stage, counted from 0, whose layers have squeeze-and-excitation.
            head_reduction: Of the squeeze-and-excitation before the classifier; 0 for none.
            head_width: Outputs of the hidden layer; 0 for none.
            condensed: Build the condensed form.
            total_steps: Training forwards in all (epochs × batches per epoch); masks stay as they are if not
                given.
            group_lasso: As of :class:`chanzoo.layers.LearnedGroupConv2d`.
            num_classes: Outputs; 0 for no classifier.
            in_chans: Channels of the image.
            global_pool: Pooling before the classifier; empty for none, which leaves the outputs maps.
            drop_rate: Dropout before the classifier.
            norm_layer: Norm, by timm's name or class.
            device: Where to create parameters and buffers.
            dtype: Type of parameters and buffers.

        Raises:
            UsageError: Sizes do not fit each other; names the layer.
        """
        if not 0 < len(depths) == len(growth) <= _STAGES:
            raise UsageError(
                f"depths={list(depths)} and growth={list(growth)}: expected one number each for 1 to "
                f"{_STAGES} stages.\n  Nothing was built."
            )
        numbers = {"depths": min(depths), "growth": min(growth), "bottleneck": bottleneck}
        if odd := [name for name, value in numbers.items() if value < 1]:
            raise UsageError(f"{odd[0]} below 1: every layer has to make maps.\n  Nothing was built.")
        # Plain values may be set before the constructor below, which asks for the parts.
        self.depths, self.growth = tuple(depths), tuple(growth)
        self.bottleneck, self.stem_stride = bottleneck, stem_stride
        self.hard_swish_from, self.se_from = hard_swish_from, se_from
        self.head_reduction, self.hidden = head_reduction, head_width
        self.condensed = condensed
        self.groups_3x3 = groups if groups_3x3 is None else groups_3x3
        self.lgc_sizes = (groups, condensation_factor)
        self.sfr_sizes = (groups if reactivation_groups is None else reactivation_groups, reactivation_factor)
        self.group_lasso = group_lasso
        super().__init__(
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            norm_layer=norm_layer,
            device=device,
            dtype=dtype,
        )
        self.progress = None if condensed else CondensingProgress(total_steps, device)

    @torch.jit.ignore()
    def _parts(self, in_chans: int, act: Any, norm: Any, place: dict[str, Any]) -> dict[str, nn.Module]:
        channels = 2 * self.growth[0]
        stem = nn.Conv2d(in_chans, channels, 3, self.stem_stride, 1, bias=False, **place)
        parts: dict[str, nn.Module] = {"stem": stem}
        for i, (depth, growth) in enumerate(zip(self.depths, self.growth, strict=True)):
            layers: OrderedDict[str, nn.Module] = OrderedDict(pool=nn.AvgPool2d(2)) if i else OrderedDict()
            for j in range(depth):
                try:
                    layers[str(j)] = self._layer(channels, growth, i, act, norm, place)
                except UsageError as error:
                    raise UsageError(f"layer {j} of stage {i + 1}: {error}") from error
                channels += growth
            name = f"stage{i + 1}"
            parts[name] = DenseStage(layers)
            self.feature_info.append(dict(num_chs=channels, reduction=self.stem_stride * 2**i, module=name))
        parts |= {
            "norm": norm(channels, **place),
            "act": act(),
        }  # not in place: checkpointing saves its input
        self.feature_info[-1]["module"] = "act"
        return parts

    @torch.jit.ignore()
    def _layer(
        self, channels: int, growth: int, stage: int, act: Any, norm: Any, place: dict[str, Any]
    ) -> CondensingLayer:
        kind: Any = nn.Hardswish if stage >= self.hard_swish_from else act
        learning = {} if self.condensed else {"group_lasso": self.group_lasso}
        options: Any = {"act_layer": kind, "norm_layer": norm, **learning, **place}
        inner = self.bottleneck * growth
        lgc, sfr = CondensedConv2d, CondensedReactivation
        if not self.condensed:
            lgc, sfr = LearnedGroupConv2d, SparseReactivation
        conv1 = lgc(channels, inner, *self.lgc_sizes, **options)
        if self.groups_3x3 < 1 or growth % self.groups_3x3:
            raise UsageError(
                f"groups_3x3={self.groups_3x3} does not divide the {growth} new maps.   Nothing was built."
            )
        return CondensingLayer(
            conv1,
            norm(inner, **place),
            kind(inplace=True),
            nn.Conv2d(inner, growth, 3, 1, 1, groups=self.groups_3x3, bias=False, **place),
            SEModule(growth, rd_channels=growth, bias=False, **place)
            if stage >= self.se_from
            else nn.Identity(),
            sfr(growth, channels, *self.sfr_sizes, **options) if self.sfr_sizes[0] else None,
        )

    @torch.jit.ignore()
    def _make_hidden(self, pooled: int, width: int, place: dict[str, Any]) -> nn.Module:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if self.head_reduction:
            layers["se"] = SEModule(pooled, rd_channels=pooled // self.head_reduction, bias=False, **place)
        if self.hidden:
            layers["fc"] = nn.Conv2d(pooled, width, 1, **place)
            layers["act"] = nn.Hardswish(inplace=True)
        return nn.Sequential(layers)

    @torch.jit.ignore()
    def init_weights(self) -> None:
        """Kaiming normal with fan out for the convolutions of the body; the head as torch makes it."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.startswith("pre_logits") and ".se." not in name:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @torch.jit.ignore()
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that split the parameters by depth, for layer-wise learning rates."""
        return dict(stem=r"^stem", blocks=r"^stage(\d+)" if coarse else r"^stage(\d+)\.(\d+)")

    @torch.jit.ignore()
    def _before_forward(self) -> None:
        if self.progress is not None:
            self.progress.tick(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """Unpooled features; in training, connections are dropped first when it is time.

        Shape:
            x ``(b, in_chans, h, w)`` → ``(b, num_features, h', w')``.
        """
        if not torch.jit.is_scripting():
            if self.training:
                self._before_forward()
            if self.grad_checkpointing:
                return self._checkpointed(x)
        x = self.stage5(self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x))))))
        return self.act(self.norm(x))


_A: dict[str, Any] = dict(depths=(1, 1, 4, 6, 8), growth=(8, 8, 16, 32, 64), head_width=828)
_B: dict[str, Any] = dict(depths=(2, 4, 6, 8, 6), growth=(6, 12, 24, 48, 96), groups=6, head_width=1024)
_C: dict[str, Any] = dict(depths=(4, 6, 8, 10, 8), growth=(8, 16, 32, 64, 128), head_width=1024)
_CIFAR: dict[str, Any] = dict(
    growth=(8, 16, 32), groups_3x3=4, stem_stride=1, hard_swish_from=3, se_from=3, head_width=0
)
_V1: dict[str, Any] = {**_CIFAR, "groups": 4, "reactivation_groups": 0, "head_reduction": 0}

VARIANTS: dict[str, dict[str, Any]] = {
    "condensenetv2_a": _A,
    "condensenetv2_b": _B,
    "condensenetv2_c": _C,
    "condensenetv2_cifar110": {**_CIFAR, "depths": (12, 12, 12), "head_reduction": 6},
    "condensenetv2_cifar146": {**_CIFAR, "depths": (16, 16, 16), "head_reduction": 6},
    "condensenet_cifar50": {**_V1, "depths": (8, 8, 8)},
    "condensenet_cifar62": {**_V1, "depths": (10, 10, 10)},
    "condensenet_cifar74": {**_V1, "depths": (12, 12, 12)},
    "condensenet_cifar86": {**_V1, "depths": (14, 14, 14)},
}
_V2_PAPER, _V1_PAPER = "arXiv:2104.04382", "arXiv:1711.09224"
_SMALL = [name for name in VARIANTS if "_cifar" in name]
_LARGE = [name for name in VARIANTS if "_cifar" not in name]

default_cfgs = generate_default_cfgs(
    {
        **arch_cfgs(
            _LARGE[:2],
            imagenet_cfg(
                first_conv="stem", interpolation="bicubic", license="apache-2.0", paper_ids=_V2_PAPER
            ),
        ),
        **arch_cfgs(_LARGE[2:], imagenet_cfg(first_conv="stem", license="apache-2.0", paper_ids=_V2_PAPER)),
        **arch_cfgs(
            [name for name in _SMALL if "v2" in name],
            cifar_cfg(4, first_conv="stem", license="apache-2.0", paper_ids=_V2_PAPER),
            stride=4,
        ),
        **arch_cfgs(
            [name for name in _SMALL if "v2" not in name],
            cifar_cfg(4, first_conv="stem", license="apache-2.0", paper_ids=_V1_PAPER),
            stride=4,
        ),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    saved = kwargs.get("pretrained_model_args") or {}
    depths = kwargs.get("depths") or saved.get("depths") or VARIANTS[name]["depths"]
    return build(
        CondenseNet,
        name,
        pretrained,
        defaults=VARIANTS[name],
        feature_levels=tuple(range(len(depths))),
        **kwargs,
    )


@register_model
def condensenetv2_a(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CondenseNet V2, configuration A."""
    return _create("condensenetv2_a", pretrained, **kwargs)


@register_model
def condensenetv2_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CondenseNet V2, configuration B."""
    return _create("condensenetv2_b", pretrained, **kwargs)


@register_model
def condensenetv2_c(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CondenseNet V2, configuration C."""
    return _create("condensenetv2_c", pretrained, **kwargs)


@register_model
def condensenetv2_cifar110(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CondenseNet V2 of depth 110 for 32×32 images, rebuilt from its published size."""
    return _create("condensenetv2_cifar110", pretrained, **kwargs)


@register_model
def condensenetv2_cifar146(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CondenseNet V2 of depth 146 for 32×32 images, rebuilt from its published size."""
    return _create("condensenetv2_cifar146", pretrained, **kwargs)


@register_model
def condensenet_cifar50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CondenseNet of depth 50 for 32×32 images."""
    return _create("condensenet_cifar50", pretrained, **kwargs)


@register_model
def condensenet_cifar62(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CondenseNet of depth 62 for 32×32 images; about the cost of ``condensenetv2_cifar110``."""
    return _create("condensenet_cifar62", pretrained, **kwargs)


@register_model
def condensenet_cifar74(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CondenseNet of depth 74 for 32×32 images."""
    return _create("condensenet_cifar74", pretrained, **kwargs)


@register_model
def condensenet_cifar86(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CondenseNet of depth 86 for 32×32 images."""
    return _create("condensenet_cifar86", pretrained, **kwargs)
