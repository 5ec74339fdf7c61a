"""Channel Equilibrium: batch decorrelation and instance re-weighting, mixed by one learned scalar.

Follows Shao et al., "Channel Equilibrium Networks for Learning Deep Representation" (ICML 2020,
arXiv:2003.00214). Both branches are linear in the input, so they are added as small matrices and
applied once. Unlike the authors' code: statistics in 32-bit floats whatever the input, valid fresh
buffers, no NaN for constant inputs, optional statistics over all processes.
"""

# No postponed annotations in this file: TorchScript reads the types of buffers from the class.

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from .decorrelation import (
    BatchDecorrelation,
    instance_variance,
    one_pass_instance_variance,
    sample_statistics,
)
from .reweight import AdaptiveInstanceInverse

__all__ = ["ChannelEquilibrium", "EquilibriumAct", "EquilibriumConv2d", "MergedEquilibrium"]


def mix_channels(x: Tensor, operator: Tensor, gain: Tensor) -> Tensor:
    """Apply ``operator + diag(gain)`` to the channels of each sample, group by group.

    Shape:
        x ``(b, g·d, h, w)``, operator ``(g, d, d)``, gain ``(b, g·d)`` → the shape and type of ``x``.

    Source:
        arXiv:2003.00214: both branches are linear in ``x``, so they add up to one matrix.
    """
    b, c, h, w = x.shape
    g, d = operator.shape[0], operator.shape[1]
    matrix = operator + torch.diag_embed(gain.view(b, g, d))
    return torch.bmm(matrix.view(b * g, d, d).to(x.dtype), x.reshape(b * g, d, h * w)).view(b, c, h, w)


class _FullPrecision(nn.Module):
    """A layer that computes its statistics in 32-bit floats, inside autocast as well."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Shape:
            x ``(b, c, h, w)`` → the same, more channels for a convolution; type of ``x``.

        Raises:
            ValueError: Training on maps of a single pixel, which have no variance.
            RuntimeError: Training a layer that was merged for inference.
        """
        if not torch.jit.is_scripting():
            device = x.device.type
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return self._forward(x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ChannelEquilibrium(_FullPrecision):
    """``λ · BD(x) + (1 − λ) · IR(x)`` with ``λ = sigmoid(mix)``; between a norm and its activation.

    BD is :class:`BatchDecorrelation`, IR is :class:`AdaptiveInstanceInverse`. In training samples
    depend on each other (covariance, scale); in evaluation they do not.

    Attributes:
        mix: Parameter ``(1,)``, the logit of λ, 0 when fresh.
        decorrelation: Holds the buffer ``running_wm``.
        reweight: Holds ``fc1``, ``norm``, ``fc2`` and the buffer ``running_scale``.

    Source:
        Shao et al. 2020, arXiv:2003.00214.

    Example:
        >>> layer = ChannelEquilibrium(24).eval()
        >>> layer(torch.randn(2, 24, 7, 7)).shape
        torch.Size([2, 24, 7, 7])
    """

    def __init__(
        self,
        channels: int,
        group_size: int = 16,
        reduction: int = 4,
        newton_steps: int = 3,
        eps: float = 1e-5,
        momentum: float = 0.1,
        sync: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the layer.

        Args:
            channels: Channels of the input.
            group_size: Channels per decorrelated group; halved until it divides ``channels``.
            reduction: Channels per hidden feature of the re-weighting.
            newton_steps: Newton iterations (the paper's T). Trained weights expect 3.
            eps: Added to the diagonal of the covariance.
            momentum: Weight of the newest statistics in the moving averages.
            sync: Share statistics between processes in training (like synchronised batch norm).
            device: Where to create parameters and buffers.
            dtype: Type of parameters and buffers; statistics are computed in 32-bit floats at least.

        Raises:
            ValueError: ``channels``, ``group_size`` or ``newton_steps`` is below 1.
        """
        super().__init__()
        self.decorrelation = BatchDecorrelation(
            channels, group_size, newton_steps, eps, momentum, sync, device, dtype
        )
        self.reweight = AdaptiveInstanceInverse(channels, reduction, momentum, sync, device, dtype)
        self.mix = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def _forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        g, d = self.decorrelation.groups, self.decorrelation.group_size
        maps = x.reshape(b * g, d, h * w)
        if self.training:
            if h * w == 1:
                raise ValueError(
                    f"channel equilibrium got maps of 1×1 pixels (input {list(x.shape)}): a single pixel "
                    "has no variance to learn from. Train with larger images; evaluation works at any size."
                )
            mean, moment = sample_statistics(maps)
            variance = torch.diagonal(moment, dim1=1, dim2=2).reshape(b, c) / (h * w - 1)
            whitener = self.decorrelation.whitener(mean.view(b, g, d), moment.view(b, g, d, d), h * w)
        else:
            variance = instance_variance(x)
            whitener = self.decorrelation.running_wm.to(variance.dtype)
        gain = self.reweight.gate(variance) / self.reweight.scale(variance)
        mix = torch.sigmoid(self.mix.to(variance.dtype))
        return mix_channels(x, mix * whitener, (1 - mix) * gain)

    @torch.no_grad()
    def fuse(self) -> "MergedEquilibrium":
        """The evaluation form of this layer; ``timm.utils.reparameterize_model`` puts it in its place."""
        wide = torch.promote_types(self.mix.dtype, torch.float32)
        mix = torch.sigmoid(self.mix.to(wide))
        operator = mix * self.decorrelation.running_wm.to(wide)
        scale = (1 - mix) / self.reweight.running_scale.to(wide)
        return MergedEquilibrium(operator.to(self.mix.dtype), scale.to(self.mix.dtype), self.reweight)


class MergedEquilibrium(_FullPrecision):
    """Channel Equilibrium for evaluation only, everything constant worked out beforehand.

    Attributes:
        operator: Buffer ``(g, d, d)``, ``λ · running_wm``.
        scale: Buffer ``(1,)``, ``(1 − λ) / running_scale``.
        reweight: Holds ``fc1``, ``norm`` and ``fc2`` of the layer it was made from.

    Source:
        arXiv:2003.00214, with both branches merged.
    """

    operator: Tensor
    scale: Tensor

    def __init__(self, operator: Tensor, scale: Tensor, reweight: AdaptiveInstanceInverse) -> None:
        """Take the constants of a trained layer; see :meth:`ChannelEquilibrium.fuse`."""
        super().__init__()
        self.register_buffer("operator", operator)
        self.register_buffer("scale", scale)
        self.reweight = reweight
        self.train(reweight.training)

    def _forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("this Channel Equilibrium layer was merged for inference and cannot train.")
        variance = one_pass_instance_variance(x)
        gain = self.scale.to(variance.dtype) * self.reweight.gate(variance)
        return mix_channels(x, self.operator.to(variance.dtype), gain)


class EquilibriumConv2d(_FullPrecision):
    """A 1×1 convolution and the Channel Equilibrium layer behind it as one convolution per sample.

    For evaluation. The map between the two is never made: its variances follow from the covariance of the
    narrow input, ``v = diag(A cov Aᵀ)``, and the operator of the layer is multiplied into the weights.
    Faster than both in turn where the input is much narrower than the output and the maps are large.

    Attributes:
        weight: Buffer ``(out, in)``, A.
        bias: Buffer ``(out,)``.
        mixed_weight: Buffer ``(out, in)``, A behind the constant part of the operator.
        mixed_bias: Buffer ``(out,)``.
        scale: Buffer ``(1,)``, ``(1 − λ) / running_scale``.
        reweight: Holds ``fc1``, ``norm`` and ``fc2``.

    Source:
        arXiv:2003.00214, with everything linear multiplied out.
    """

    weight: Tensor
    bias: Tensor
    mixed_weight: Tensor
    mixed_bias: Tensor
    scale: Tensor

    def __init__(self, conv: nn.Conv2d, merged: MergedEquilibrium) -> None:
        """Join a convolution (1×1, stride 1, one group, with bias) and a merged layer."""
        super().__init__()
        assert conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1 and conv.bias is not None
        g, d = merged.operator.shape[:2]
        weight, bias = conv.weight.detach().flatten(1), conv.bias.detach()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("mixed_weight", torch.bmm(merged.operator, weight.view(g, d, -1)).flatten(0, 1))
        self.register_buffer("mixed_bias", torch.bmm(merged.operator, bias.view(g, d, 1)).flatten())
        self.register_buffer("scale", merged.scale)
        self.reweight = merged.reweight
        self.train(merged.training)

    def _forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("this Channel Equilibrium layer was merged for inference and cannot train.")
        b, c, h, w = x.shape
        maps = x.reshape(b, c, h * w)
        moment = sample_statistics(maps)[1]
        weight, bias = self.weight.to(moment.dtype), self.bias.to(moment.dtype)
        variance = (torch.matmul(weight, moment) * weight).sum(dim=2) / max(h * w - 1, 1)
        gain = self.scale.to(moment.dtype) * self.reweight.gate(variance)
        own_weight = torch.addcmul(self.mixed_weight.to(moment.dtype), weight, gain.unsqueeze(2))
        own_bias = torch.addcmul(self.mixed_bias.to(moment.dtype), bias, gain).unsqueeze(2)
        out = torch.baddbmm(own_bias.to(x.dtype), own_weight.to(x.dtype), maps)
        return out.view(b, out.shape[1], h, w)


class EquilibriumAct(nn.Module):
    """Channel Equilibrium, then an activation: fills the activation slot behind a norm.

    Source:
        arXiv:2003.00214 (position of the layer).
    """

    def __init__(self, ce: nn.Module, act: nn.Module) -> None:
        """Join a layer and the activation that follows it."""
        super().__init__()
        self.ce = ce
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Apply both.

        Shape:
            x ``(b, c, h, w)`` → the same.
        """
        return self.act(self.ce(x))


for _layer in (ChannelEquilibrium, MergedEquilibrium, EquilibriumConv2d):
    register_notrace_module(_layer)  # whole nodes for torch.fx: they look at the shape of their input
