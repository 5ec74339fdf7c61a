"""A dense stage of condensed layers as one module, for inference: nothing is concatenated, little is copied.

What it does to the layers of CondenseNet V2 (arXiv:2104.04382), each worth 3 % of a network or more on a CPU:

* All maps of a stage lie in one tensor. New maps are written behind the old ones, which are updated in place.
* The norm behind the first convolution is folded into it; grouped 1×1 convolutions are batched products.
* ``relu(s·x + b)`` is ``s·max(x, −b/s) + b`` for positive s, and a linear map follows: one pass, not three.
* The shuffle behind the first convolution is done by the activation, which writes its results in that order.
* 3×3 convolutions with few outputs run dense, as one with zeros: many times the multiply-adds, half the time.
* Average pooling adds every second row, then every second column, in whole vectors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from .learned_group import CondensedConv2d, CondensedReactivation

__all__ = ["FusedStage", "can_fuse"]

_DENSE_OUTPUTS = 16  # 3×3 convolutions with at most so many outputs are run dense


def can_fuse(layer: Any) -> bool:
    """Whether a layer of a dense network is condensed and of norms and activations that can be folded."""
    sfr = layer.sfr
    return (
        isinstance(layer.conv1, CondensedConv2d)
        and (sfr is None or isinstance(sfr, CondensedReactivation))
        and all(_is_plain(norm) for norm in (layer.conv1.norm, layer.norm2, *([sfr.norm] if sfr else ())))
        and all(
            isinstance(act, (nn.ReLU, nn.Hardswish))
            for act in (layer.conv1.act, layer.act, *([sfr.act] if sfr else ()))
        )
        and layer.conv2.bias is None
    )


def _is_plain(norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.running_var is not None


class FusedStage(nn.Module):
    """All layers of a dense stage, with its pooling.

    Attributes:
        layers: One :class:`FusedLayer` for each.
        has_pool: Whether maps are halved first, by averages of 2×2.
    """

    def __init__(self, layers: list[Any], has_pool: bool) -> None:
        """Take the tensors of condensed layers; these are left as they are."""
        super().__init__()
        self.has_pool = has_pool
        self.layers = nn.ModuleList([FusedLayer(layer) for layer in layers])
        self.growth = sum(layer.conv2.out_channels for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        """Run the stage.

        Shape:
            x ``(b, c, h, w)`` → ``(b, c + growth of all layers, h', w')``, halved if there is pooling.

        Raises:
            UsageError: Gradients are wanted: old maps are overwritten here.
        """
        if self.training or (torch.is_grad_enabled() and x.requires_grad):
            raise UsageError(
                "a fused stage is for inference: it overwrites what gradients need.\n"
                "  Call eval() and torch.inference_mode(), or train the network that it was made from."
            )
        if self.has_pool:
            x = _halved(x)
        b, channels, h, w = x.shape
        maps = x.new_empty(b, channels + self.growth, h, w)
        maps[:, :channels] = x
        for layer in self.layers:
            channels = layer.write(maps, channels)  # pyright: ignore[reportCallIssue]
        return maps


class FusedLayer(nn.Module):
    """One layer; see the module's text."""

    index: Tensor
    weight: Tensor
    bias: Tensor
    kernel: Tensor
    sfr_index: Tensor
    sfr_weight: Tensor
    sfr_bias: Tensor

    def __init__(self, layer: Any) -> None:
        """Fold norms into weights."""
        super().__init__()
        conv, sfr = layer.conv1, layer.sfr
        self.groups = groups = conv.groups
        self.growth = layer.conv2.out_channels
        self.is_relu = isinstance(layer.act, nn.ReLU)
        self.se = layer.se
        self.before = _Entry(conv.norm, conv.act)
        weight = conv.weight.detach().view(groups, -1, conv.weight.shape[1])  # (groups, rows, kept)
        weight, bias = self.before.absorbed(weight, lambda v: v.view(groups, 1, -1))
        scale, shift = (v.view(-1, groups).t().unsqueeze(2) for v in _affine(layer.norm2))
        _keep(self, index=conv.index, weight=weight * scale, bias=bias * scale + shift)
        kernel, self.groups_3x3 = layer.conv2.weight.detach(), layer.conv2.groups
        if self.growth <= _DENSE_OUTPUTS:
            kernel, self.groups_3x3 = _dense(kernel, self.groups_3x3), 1
        _keep(self, kernel=kernel)
        self.has_reactivation = sfr is not None
        if sfr is not None:
            self.sfr_groups = sfr.groups
            self.between = _Entry(sfr.norm, sfr.act)
            weight = sfr.weight.detach().view(sfr.groups, -1, sfr.weight.shape[1])
            weight, bias = self.between.absorbed(weight, lambda v: v.view(-1, sfr.groups).t().unsqueeze(1))
            _keep(self, sfr_index=sfr.index, sfr_weight=weight, sfr_bias=bias)

    def write(self, maps: Tensor, channels: int) -> int:
        """Write new maps behind the old ones and update these; how many there are now.

        Shape:
            maps ``(b, all, h, w)``, of which the first ``channels`` are filled.
        """
        b, _, h, w = maps.shape
        new = self.before(maps.index_select(1, self.index))
        new = _grouped(self.weight, self.bias, new.view(b, self.groups, -1, h * w))
        shuffled = torch.empty_like(new.transpose(1, 2), memory_format=torch.contiguous_format)
        if self.is_relu:
            torch.clamp_min(new.transpose(1, 2), 0, out=shuffled)
        else:
            torch.ops.aten.hardswish.out(new.transpose(1, 2), out=shuffled)
        new = F.conv2d(shuffled.view(b, -1, h, w), self.kernel, padding=1, groups=self.groups_3x3)
        new = self.se(new)
        end = channels + self.growth
        maps[:, channels:end] = new
        if self.has_reactivation:
            grouped = self.between(new).view(b, -1, self.sfr_groups, h * w).transpose(1, 2)
            update = _grouped(self.sfr_weight, self.sfr_bias, grouped).view(b, -1, h, w)
            maps[:, :channels].index_add_(1, self.sfr_index, update)
        return end


class _Entry(nn.Module):
    """Norm and activation in front of a linear map, in place; scale and shift go to the map if they can."""

    scale: Tensor
    shift: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        scale, shift = _affine(norm)
        self.is_relu = isinstance(act, nn.ReLU)
        self.is_rising = bool((scale > 0).all())
        if self.is_relu:
            edge = torch.where(scale == 0, torch.zeros_like(shift), -shift / scale)
            _keep(
                self,
                low=torch.where(scale > 0, edge, -torch.inf).view(-1, 1, 1),
                high=torch.where(scale < 0, edge, torch.inf).view(-1, 1, 1),
            )
            # A channel of scale zero is a constant: relu of its shift.
            self.after = scale, torch.where(scale == 0, shift.clamp(min=0), shift)
        else:
            _keep(self, scale=scale.view(-1, 1, 1), shift=shift.view(-1, 1, 1))
            self.after = torch.ones_like(scale), torch.zeros_like(shift)

    def absorbed(self, weight: Tensor, columns: Any) -> tuple[Tensor, Tensor]:
        """Weight ``(groups, rows, columns)`` and bias ``(groups, rows, 1)`` of the map behind."""
        scale, shift = (columns(vector) for vector in self.after)
        del self.after
        return weight * scale, (weight * shift).sum(dim=2, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_relu:
            return F.hardswish(x.mul_(self.scale).add_(self.shift), inplace=True)
        x = torch.maximum(x, self.low, out=x)
        return x if self.is_rising else torch.minimum(x, self.high, out=x)


def _keep(module: nn.Module, **tensors: Tensor) -> None:
    """Buffers, so that they move with the network."""
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor.detach().clone(memory_format=torch.contiguous_format))


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift that a batch norm is in evaluation."""
    scale = norm.weight.detach() * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias.detach() - norm.running_mean * scale


def _grouped(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Grouped 1×1 convolution: ``(b, groups, columns, pixels)`` → ``(b, groups, rows, pixels)``."""
    if len(x) == 1:
        return torch.baddbmm(bias, weight, x[0]).unsqueeze(0)
    return torch.matmul(weight, x).add_(bias)


def _dense(kernel: Tensor, groups: int) -> Tensor:
    """The kernel of a grouped convolution as one without groups."""
    out, inputs = kernel.shape[:2]
    dense = kernel.new_zeros(out, inputs * groups, *kernel.shape[2:])
    for g in range(groups):
        rows, columns = (slice(g * n, (g + 1) * n) for n in (out // groups, inputs))
        dense[rows, columns] = kernel[rows]
    return dense


def _halved(x: Tensor) -> Tensor:
    """Averages of 2×2, without a last odd row or column."""
    h, w = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    rows = x[:, :, 0:h:2] + x[:, :, 1:h:2]
    return (rows[..., 0:w:2] + rows[..., 1:w:2]).mul_(0.25)
