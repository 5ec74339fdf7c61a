"""Residual networks with Channel Equilibrium.

Shao et al., "Channel Equilibrium Networks for Learning Deep Representation" (ICML 2020,
arXiv:2003.00214): CE behind the last norm of each residual branch, before the addition, in every stage
but the last, and behind the norm of the stem. Differences from the authors' code: depth 18 and 34 can be
built, pooling adapts to the image size, no dead buffers. Their checkpoints load through
:func:`from_authors`.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from ..errors import UsageError
from ..layers import ChannelEquilibrium, EquilibriumAct, EquilibriumConv2d
from ..layers.folding import fold_pairs, link_pair
from ._build import arch_cfgs, build, cifar_cfg, imagenet_cfg
from .cifar_resnet import CifarResNet

__all__ = ["AUTHORS_LEAVES", "CECifarResNet", "CEResNet", "from_authors", "to_authors"]

_STEM_GROUP_SIZE = 64  # the authors' networks decorrelate the whole stem at once

# Up to this input width the last convolution of a bottleneck and its CE layer are faster as one: see
# scripts/bench_ce.py. In layer2 (128) it makes no difference, in layer3 (256) it costs twice the time.
_NARROW = 64

# The authors' names of what a CE layer holds, and ours.
AUTHORS_LEAVES = {
    "x_weight": "mix",
    "running_wm": "decorrelation.running_wm",
    "AR.running_scale": "reweight.running_scale",
    "AR.fc.0.weight": "reweight.fc1.weight",
    "AR.fc.1.weight": "reweight.norm.weight",
    "AR.fc.1.bias": "reweight.norm.bias",
    "AR.fc.3.weight": "reweight.fc2.weight",
}
_DEAD_LEAF = "running_mean"  # a buffer of the authors' layer that nothing reads


class FoldableBasicBlock(BasicBlock):
    """timm's basic block, able to fold its batch norms for inference."""

    def reparameterize(self) -> None:
        """Fold every batch norm into its convolution; called by ``timm.utils.reparameterize_model``."""
        _fold_block(self)


class FoldableBottleneck(Bottleneck):
    """timm's bottleneck block, able to fold its batch norms for inference."""

    def reparameterize(self) -> None:
        """Fold every batch norm, and CE if that pays, into convolutions; called as above."""
        _fold_block(self)
        ce: Any = self.se
        conv = self.conv3
        if isinstance(ce, ChannelEquilibrium) and conv.in_channels <= _NARROW and conv.bias is not None:
            self.conv3 = EquilibriumConv2d(conv, ce.fuse())
            self.se = None


def _fold_block(block: Any) -> None:
    fold_pairs(block)
    if block.downsample is not None:
        fold_pairs(block.downsample)


_DEPTHS: dict[int, tuple[type[nn.Module], tuple[int, ...]]] = {
    18: (FoldableBasicBlock, (2, 2, 2, 2)),
    34: (FoldableBasicBlock, (3, 4, 6, 3)),
    50: (FoldableBottleneck, (3, 4, 6, 3)),
    101: (FoldableBottleneck, (3, 4, 23, 3)),
    152: (FoldableBottleneck, (3, 8, 36, 3)),
}


class CEResNet(ResNet):
    """ResNet with CE in the stem and in every block of the first three stages.

    The backbone is timm's and is built first: under the same seed it starts from the same weights as the
    plain network and leaves the random state alike. CE fills the ``se`` slot of the blocks and stands
    before the activation in the stem's ``act1``.

    Source:
        arXiv:2003.00214; He et al. 2016, arXiv:1512.03385 (backbone).
    """

    def __init__(
        self,
        depth: int = 50,
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_block_rate: float = 0.0,
        act_layer: Any = "relu",
        norm_layer: Any = "batchnorm2d",
        group_size: int = 16,
        reduction: int = 4,
        sync: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Build the network.

        Args:
            depth: 18, 34, 50, 101 or 152.
            num_classes: Outputs; 0 for no classifier.
            in_chans: Channels of the image.
            output_stride: 32, 16 or 8; the smaller ones dilate the last stages.
            global_pool: Pooling before the classifier; empty for none.
            drop_rate: Dropout before the classifier.
            drop_path_rate: Stochastic depth at the last block, rising linearly from 0.
            drop_block_rate: DropBlock in the last two stages.
            act_layer: Activation, by timm's name or class.
            norm_layer: Norm, by timm's name or class.
            group_size: Channels per decorrelated group in the blocks; the stem is one group of 64.
            reduction: Channels per hidden feature of the re-weighting.
            sync: Share CE statistics between processes in training.
            device: Where to create parameters and buffers.
            dtype: Type of parameters and buffers.

        Raises:
            ValueError: ``depth`` is not one of the above.
        """
        if depth not in _DEPTHS:
            raise ValueError(f"depth={depth}: expected one of {', '.join(map(str, _DEPTHS))}.")
        block, layers = _DEPTHS[depth]
        super().__init__(
            block,  # pyright: ignore[reportArgumentType]  # timm annotates the instance, not the class
            layers,
            num_classes=num_classes,
            in_chans=in_chans,
            output_stride=output_stride,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            drop_block_rate=drop_block_rate,
            act_layer=act_layer,
            norm_layer=norm_layer,
            zero_init_last=False,  # CE has nothing to measure behind a norm that only gives zeros
            device=device,
            dtype=dtype,
        )
        ce: dict[str, Any] = dict(reduction=reduction, sync=sync, device=device, dtype=dtype)
        with torch.random.fork_rng(devices=[]):
            stem = ChannelEquilibrium(64, group_size=_STEM_GROUP_SIZE, **ce)
            self.act1 = EquilibriumAct(stem, self.act1)
            stages: Any = (self.layer1, self.layer2, self.layer3)
            for stage, info in zip(stages, self.feature_info[1:4], strict=True):
                for unit in stage:
                    channels = int(info["num_chs"])
                    unit.se = ChannelEquilibrium(channels, group_size=group_size, **ce)
        link_pair(self.conv1, self.bn1)

    @torch.jit.ignore()
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Timm's patterns that split the parameters by depth, with CE of the stem in the stem."""
        return {**super().group_matcher(coarse), "stem": r"^conv1|^bn1|^act1|^maxpool"}


class CECifarResNet(CifarResNet):
    """CIFAR residual network with CE in the stem and in every stage but the last.

    The backbone is built exactly as without CE: under the same seed both start from the same weights
    and leave the random state alike, so that they also see the same data in the same order.

    Source:
        arXiv:2003.00214 (layer and placement), arXiv:1512.03385 (backbone). The paper reports no
        networks of this family; carrying the placement over is our choice.
    """

    def __init__(
        self, *args: Any, sync: bool = False, device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> None:
        """Build the network; the arguments are those of :class:`CifarResNet`.

        Args:
            *args: Of :class:`CifarResNet`.
            sync: Share CE statistics between processes in training.
            device: Where to create parameters and buffers.
            dtype: Type of parameters and buffers.
            **kwargs: Of :class:`CifarResNet`.
        """
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        ce: dict[str, Any] = dict(sync=sync, device=device, dtype=dtype)
        with torch.random.fork_rng(devices=[]):
            stem = ChannelEquilibrium(self.conv1.out_channels, **ce)
            self.act1 = EquilibriumAct(stem, self.act1)
            stages: Any = (self.layer1, self.layer2)
            for stage in stages:
                for block in stage:
                    block.ce = ChannelEquilibrium(block.conv2.out_channels, **ce)


def from_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of the authors' networks to ours.

    A prefix ``module.`` is stripped, the dead ``running_mean`` of CE layers is dropped, a missing
    ``num_batches_tracked`` becomes 0. Tensors are not copied.

    Args:
        state: The authors' ``state_dict``, of any depth.

    Raises:
        UsageError: A CE layer has an entry that the authors' layer has not; names the key.

    Source:
        arXiv:2003.00214, the authors' released code (key names only).
    """
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        key = name.removeprefix("module.")
        layer, dot, leaf = _split_authors(key)
        if not dot:
            ours[key] = value
        elif leaf in AUTHORS_LEAVES:
            ours[f"{layer}.{AUTHORS_LEAVES[leaf]}"] = value
        elif leaf != _DEAD_LEAF:
            raise UsageError(f'"{name}" is no entry of a Channel Equilibrium layer.')
    for key in [key for key in ours if key.endswith(".running_var")]:
        ours.setdefault(key.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return ours


def to_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of ours to the authors' names, the inverse of :func:`from_authors`.

    The dead ``running_mean`` of CE layers comes back as zeros, which is what it starts from.

    Args:
        state: ``state_dict`` of a :class:`CEResNet`.
    """
    leaves = {ours: theirs for theirs, ours in AUTHORS_LEAVES.items()}
    theirs: dict[str, Tensor] = {}
    for key, value in state.items():
        layer, leaf = _split_ours(key)
        if not layer:
            theirs[key] = value
            continue
        theirs[f"{layer}.{leaves[leaf]}"] = value
        if leaf == "decorrelation.running_wm":
            theirs[f"{layer}.{_DEAD_LEAF}"] = value.new_zeros((*value.shape[:2], 1))
    return theirs


def _split_authors(key: str) -> tuple[str, str, str]:
    """Our name of a CE layer, ".", the authors' leaf; or the key itself if it belongs to none."""
    if key.startswith("ce1."):
        return "act1.ce", ".", key.removeprefix("ce1.")
    layer, dot, leaf = key.partition(".ce.")
    return f"{layer}.se" if dot else key, dot, leaf


def _split_ours(key: str) -> tuple[str, str]:
    """The authors' name of a CE layer and our leaf; two empty strings if the key belongs to none."""
    if key.startswith("act1.ce."):
        return "ce1", key.removeprefix("act1.ce.")
    layer, dot, leaf = key.partition(".se.")
    return (f"{layer}.ce", leaf) if dot else ("", "")


_PAPER = "arXiv:2003.00214"

default_cfgs = generate_default_cfgs(
    {
        **arch_cfgs(
            (f"ce_resnet{depth}" for depth in _DEPTHS), imagenet_cfg(license="apache-2.0", paper_ids=_PAPER)
        ),
        **arch_cfgs(
            (f"ce_cifar_resnet{depth}" for depth in (20, 56)),
            cifar_cfg(license="apache-2.0", paper_ids=_PAPER),
            stride=4,
        ),
    }
)


def _create(variant: str, pretrained: bool, default_depth: int, **kwargs: Any) -> nn.Module:
    return build(CEResNet, variant, pretrained, defaults=dict(depth=default_depth), **kwargs)


def _create_cifar(variant: str, pretrained: bool, default_depth: int, **kwargs: Any) -> nn.Module:
    return build(
        CECifarResNet,
        variant,
        pretrained,
        feature_levels=(0, 1, 2, 3),
        defaults=dict(depth=default_depth),
        **kwargs,
    )


@register_model
def ce_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 with Channel Equilibrium."""
    return _create("ce_resnet18", pretrained, 18, **kwargs)


@register_model
def ce_resnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34 with Channel Equilibrium."""
    return _create("ce_resnet34", pretrained, 34, **kwargs)


@register_model
def ce_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 with Channel Equilibrium."""
    return _create("ce_resnet50", pretrained, 50, **kwargs)


@register_model
def ce_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-101 with Channel Equilibrium."""
    return _create("ce_resnet101", pretrained, 101, **kwargs)


@register_model
def ce_resnet152(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-152 with Channel Equilibrium."""
    return _create("ce_resnet152", pretrained, 152, **kwargs)


@register_model
def ce_cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 for 32×32 images with Channel Equilibrium."""
    return _create_cifar("ce_cifar_resnet20", pretrained, 20, **kwargs)


@register_model
def ce_cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for 32×32 images with Channel Equilibrium."""
    return _create_cifar("ce_cifar_resnet56", pretrained, 56, **kwargs)
