"""Folding of batch norms into the convolutions before them, for inference.

In evaluation a batch norm is a fixed scale and shift per channel, which the convolution before it can do
for free. ``timm.utils.reparameterize_model`` visits every module but the network itself, so:

* a block that knows its layers folds them in its own ``reparameterize()`` with :func:`fold_pairs`;
* a convolution and a norm that are direct children of the network are tied by :func:`link_pair`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["FoldLink", "can_fold", "fold", "fold_pairs", "link_pair"]


def can_fold(conv: nn.Module | None, norm: nn.Module) -> bool:
    """Whether ``norm`` is a batch norm with running statistics for the channels that ``conv`` makes."""
    return (
        isinstance(conv, nn.Conv2d)
        and isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
        and norm.running_mean is not None
        and norm.running_var is not None
        and norm.num_features == conv.out_channels
    )


@torch.no_grad()
def fold(conv: nn.Conv2d, norm: Any) -> nn.Module:
    """Fold a batch norm into a convolution, in place.

    Args:
        conv: Changed; has a bias afterwards.
        norm: Batch norm fed by ``conv`` alone. Not changed.

    Returns:
        What is left of the norm: its activation if it has one (timm's norm-act layers), or the identity.

    Raises:
        ValueError: ``norm`` is not a batch norm with running statistics for the output of ``conv``.

    Source:
        ``γ (W h + b − μ) / √(σ² + ε) + β``, written as one convolution.
    """
    if not can_fold(conv, norm):
        raise ValueError(f"cannot fold {norm} into {conv}; nothing was changed.")
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    shift = -norm.running_mean.to(dtype)
    if conv.bias is not None:
        shift = shift + conv.bias.to(dtype)
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(dtype)
    weight = conv.weight.to(dtype) * scale.view(-1, 1, 1, 1)
    conv.weight.copy_(weight)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
    act = getattr(norm, "act", None)
    return act if isinstance(act, nn.Module) else nn.Identity().train(norm.training)


def fold_pairs(module: nn.Module) -> None:
    """Fold each batch norm among the children of ``module`` into the convolution registered just before it.

    For modules whose children are registered in the order in which they run; ``None`` is skipped. In place,
    and a second call finds nothing to do.

    Args:
        module: A block, or a ``Sequential`` of convolutions and norms.
    """
    before: nn.Module | None = None
    for name, child in list(module.named_children()):
        if isinstance(before, nn.Conv2d) and can_fold(before, child):
            setattr(module, name, fold(before, child))
        before = child


class FoldLink:
    """What ties a convolution to the norm behind it, both direct children of a network.

    timm's walk meets the convolution first (``reparameterize``), then the norm (``fuse``). A convolution
    that was replaced is not met, and its norm then stays. The modules keep their types: what torch and timm
    do by type (tracing, synchronised and frozen norms) they do as ever, and a norm they put in the place
    of this one is not folded.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module) -> None:
        """Tie the two."""
        self.conv = conv
        self.norm = norm
        self.was_met = False

    def meet(self) -> None:
        """The convolution's ``reparameterize``."""
        self.was_met = True

    def fuse(self) -> nn.Module:
        """The norm's ``fuse``: what is left of it after folding, or the norm itself."""
        met, self.was_met = self.was_met, False
        return fold(self.conv, self.norm) if met and can_fold(self.conv, self.norm) else self.norm


def link_pair(conv: nn.Module, norm: nn.Module) -> None:
    """Tie a norm to the convolution before it, both direct children of a network, so that timm can fold them.

    Does nothing unless a batch norm follows a convolution. Both keep their tensors, names and types.

    Args:
        conv: Registered before ``norm``.
        norm: Fed by ``conv`` alone.
    """
    if isinstance(conv, nn.Conv2d) and can_fold(conv, norm):
        link = FoldLink(conv, norm)
        conv.reparameterize = link.meet  # pyright: ignore[reportArgumentType]
        norm.fuse = link.fuse  # pyright: ignore[reportArgumentType]
