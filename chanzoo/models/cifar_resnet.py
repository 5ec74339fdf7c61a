"""Residual networks for 32×32 images, with every width a constructor argument.

The networks of He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016,
arXiv:1512.03385), section 4.2: depth 6n + 2, three stages of n basic blocks. timm carries only
their large-image relatives. Shortcuts are of option A (parameter-free: subsample and pad with zero
channels) or B (1×1 projection). Differences from the paper: the zero channels go on both sides, as in
the implementations that later pruning and grafting papers start from.
"""

# No postponed annotations here: scripting an fx graph needs the type of forward's argument, not its name.

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, create_classifier, get_act_layer, get_device_dtype, get_norm_layer
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from .._timm import feature_take_indices
from ..layers.folding import fold_pairs, link_pair
from ._build import arch_cfgs, build, cifar_cfg

__all__ = ["CifarBlock", "CifarResNet", "PadShortcut"]

_STAGE_WIDTHS = (16, 32, 64)


class PadShortcut(nn.Module):
    """Parameter-free shortcut: take every ``stride``-th pixel, pad or crop channels on both sides.

    Source:
        arXiv:1512.03385, option A.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        """Build the shortcut; negative padding crops when ``out_channels`` is smaller."""
        super().__init__()
        self.stride = stride
        self.front = (out_channels - in_channels) // 2
        self.back = out_channels - in_channels - self.front

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and pad.

        Shape:
            x ``(b, c, h, w)`` → ``(b, out_channels, ⌈h / stride⌉, ⌈w / stride⌉)``.
        """
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.front, self.back))


class CifarBlock(nn.Module):
    """Basic residual block with its own inner width.

    ``ce`` sits after the last norm of the branch, before the addition: the identity here, a layer in
    the networks that add one.

    Source:
        arXiv:1512.03385, figure 5 left.
    """

    def __init__(
        self,
        in_channels: int,
        inner_channels: int,
        out_channels: int,
        stride: int,
        shortcut: str,
        act_layer: type[nn.Module],
        norm_layer: type[nn.Module],
        drop_path: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Build the block; see :class:`CifarResNet` for the arguments."""
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_channels, inner_channels, 3, stride, 1, bias=False, **dd)
        self.bn1 = norm_layer(inner_channels, **dd)
        self.act1 = act_layer(inplace=True)
        self.conv2 = nn.Conv2d(inner_channels, out_channels, 3, 1, 1, bias=False, **dd)
        self.bn2 = norm_layer(out_channels, **dd)
        self.ce = nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.downsample: nn.Module
        if shortcut == "A" or (stride == 1 and in_channels == out_channels):
            self.downsample = _plain_shortcut(in_channels, out_channels, stride)
        else:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False, **dd),
                norm_layer(out_channels, **dd),
            )
        self.act2 = act_layer(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut.

        Shape:
            x ``(b, in, h, w)`` → ``(b, out, ⌈h / stride⌉, ⌈w / stride⌉)``.
        """
        branch = self.act1(self.bn1(self.conv1(x)))
        branch = self.ce(self.bn2(self.conv2(branch)))
        return self.act2(self.drop_path(branch) + self.downsample(x))

    def follow_widths(self) -> None:
        """Fit a shortcut without parameters to the convolutions; see :mod:`chanzoo.layers.narrow`."""
        if isinstance(self.downsample, (nn.Identity, PadShortcut)):
            into, out, stride = self.conv1.in_channels, self.conv2.out_channels, self.conv1.stride[0]
            self.downsample = _plain_shortcut(into, out, stride).train(self.training)

    def reparameterize(self) -> None:
        """Fold every batch norm into its convolution; called by ``timm.utils.reparameterize_model``."""
        fold_pairs(self)
        fold_pairs(self.downsample)


def _plain_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    is_identity = stride == 1 and in_channels == out_channels
    return nn.Identity() if is_identity else PadShortcut(in_channels, out_channels, stride)


class CifarResNet(nn.Module):
    """Three-stage residual network for small images; follows timm's model contract.

    Source:
        He et al. 2016, arXiv:1512.03385, section 4.2.
    """

    def __init__(
        self,
        depth: int,
        widths: Sequence[int] | None = None,
        shortcut: str = "A",
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: str | type[nn.Module] = "relu",
        norm_layer: str | type[nn.Module] = "batchnorm2d",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Build the network.

        Args:
            depth: Layers with weights on the main path, 6n + 2.
            widths: Output channels of the stem and of the three stages, then the inner channels of
                each block in order: 4 + 3n numbers. Without it 16, 16, 32, 64 and each stage's width.
            shortcut: ``"A"`` (zero padding) or ``"B"`` (projection) where shapes change.
            num_classes: Outputs; 0 for no classifier.
            in_chans: Channels of the image.
            global_pool: Pooling before the classifier; empty for none.
            drop_rate: Dropout before the classifier.
            drop_path_rate: Stochastic depth at the last block, rising linearly from 0.
            act_layer: Activation, by timm's name or class.
            norm_layer: Norm, by timm's name or class.
            device: Where to create parameters and buffers.
            dtype: Type of parameters and buffers.

        Raises:
            ValueError: ``depth``, ``widths`` or ``shortcut`` is not one of the above.
        """
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth}: expected 6n + 2 (8, 14, 20, 32, 44, 56, 110, …).")
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut={shortcut!r}: expected 'A' (zero padding) or 'B' (projection).")
        blocks = (depth - 2) // 6
        widths = _check_widths(widths, blocks)
        stem, outs, inners = widths[0], widths[1:4], widths[4:]
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        act: Any = get_act_layer(act_layer)
        norm: Any = get_norm_layer(norm_layer)

        self.conv1 = nn.Conv2d(in_chans, stem, 3, 1, 1, bias=False, **dd)
        self.bn1 = norm(stem, **dd)
        self.act1 = act(inplace=True)
        self.feature_info: list[dict[str, Any]] = [dict(num_chs=stem, reduction=1, module="act1")]
        channels = stem
        stages = []
        for stage, out in enumerate(outs):
            layer = []
            for i in range(blocks):
                index = stage * blocks + i
                layer.append(
                    CifarBlock(
                        channels,
                        inners[index],
                        out,
                        2 if stage and i == 0 else 1,
                        shortcut,
                        act,
                        norm,
                        drop_path_rate * index / max(1, 3 * blocks - 1),
                        **dd,
                    )
                )
                channels = out
            stages.append(nn.Sequential(*layer))
            self.feature_info.append(dict(num_chs=out, reduction=2**stage, module=f"layer{stage + 1}"))
        self.layer1, self.layer2, self.layer3 = stages
        self.num_features: int = channels
        head: Any = create_classifier(channels, num_classes, pool_type=global_pool, **dd)
        self.global_pool, self.fc = head
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.init_weights()
        link_pair(self.conv1, self.bn1)

    @torch.jit.ignore()
    def init_weights(self) -> None:
        """Kaiming normal with fan in for convolutions and the classifier, as in the paper."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore()
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that split the parameters by depth, for layer-wise learning rates."""
        return dict(stem=r"^conv1|bn1|act1", blocks=r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)")

    @torch.jit.ignore()
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in training."""
        self.grad_checkpointing = enable

    @torch.jit.ignore()
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Outputs of the new one; 0 for none.
            global_pool: Pooling; the current one is kept if not given.
        """
        self.num_classes = num_classes
        place: Any = get_device_dtype(self)
        pool: Any = self.global_pool.pool_type if global_pool is None else global_pool
        head: Any = create_classifier(self.num_features, num_classes, pool_type=pool, **place)
        self.global_pool, self.fc = head
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Final features together with those of earlier levels (stem, then the three stages).

        Args:
            x: Images ``(b, in_chans, h, w)``.
            indices: Last n levels for a number, all for None, else the levels themselves.
            norm: Accepted for timm; every level already ends in an activation.
            stop_early: Do not compute what no level needs.
            output_fmt: Only ``"NCHW"``.
            intermediates_only: Leave out the final features.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take, last = feature_take_indices(4, indices)
        taken = []
        x = self.act1(self.bn1(self.conv1(x)))
        if 0 in take:
            taken.append(x)
        stages = [self.layer1, self.layer2, self.layer3]
        for level, stage in enumerate(stages[:last] if stop_early else stages, start=1):
            x = self._stage(stage, x)
            if level in take:
                taken.append(x)
        return taken if intermediates_only else (x, taken)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop every layer behind the last wanted level.

        Args:
            indices: As in :meth:`forward_intermediates`.
            prune_norm: Accepted for timm; there is no final norm.
            prune_head: Drop the classifier as well; done anyway when a stage goes.
        """
        take, last = feature_take_indices(4, indices)
        for level in range(last + 1, 4):
            setattr(self, f"layer{level}", nn.Sequential())
        if last < 3:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or last < 3:
            self.reset_classifier(0, "")
        return take

    def _stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(stage, x)
        return stage(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Unpooled features.

        Shape:
            x ``(b, in_chans, h, w)`` → ``(b, num_features, ⌈h / 4⌉, ⌈w / 4⌉)``.
        """
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify features.

        Shape:
            x ``(b, num_features, h, w)`` → ``(b, num_classes)``, or ``(b, head_hidden_size)`` before the
            classifier.
        """
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Shape:
            x ``(b, in_chans, h, w)`` → ``(b, num_classes)``.
        """
        return self.forward_head(self.forward_features(x))


def _check_widths(widths: Sequence[int] | None, blocks: int) -> list[int]:
    if widths is None:
        return [_STAGE_WIDTHS[0], *_STAGE_WIDTHS, *(w for w in _STAGE_WIDTHS for _ in range(blocks))]
    widths = list(widths)
    expected = 4 + 3 * blocks
    if len(widths) != expected:
        parts = f"stem, 3 stages, {3 * blocks} inner widths"
        raise ValueError(f"widths has {len(widths)} numbers: expected {expected} ({parts}).")
    for i, width in enumerate(widths):
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"widths[{i}]={width!r}: expected a whole number of channels, 1 or more.")
    return widths


def _create(variant: str, pretrained: bool, default_depth: int, **kwargs: Any) -> nn.Module:
    return build(
        CifarResNet,
        variant,
        pretrained,
        feature_levels=(0, 1, 2, 3),
        defaults=dict(depth=default_depth),
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    arch_cfgs(
        (f"cifar_resnet{depth}" for depth in (20, 32, 44, 56, 110)),
        cifar_cfg(license="apache-2.0", paper_ids="arXiv:1512.03385"),
        stride=4,
    )
)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 for 32×32 images."""
    return _create("cifar_resnet20", pretrained, 20, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32 for 32×32 images."""
    return _create("cifar_resnet32", pretrained, 32, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-44 for 32×32 images."""
    return _create("cifar_resnet44", pretrained, 44, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for 32×32 images."""
    return _create("cifar_resnet56", pretrained, 56, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-110 for 32×32 images."""
    return _create("cifar_resnet110", pretrained, 110, **kwargs)
