"""A stage of condensed dense layers as one module, for inference on a CPU: little is copied, nothing joined.

What it does to the layers of CondenseNet V2 (CVPR 2021, arXiv:2104.04382):

* All maps of the stage lie in one tensor, channels first, then images. New maps are written behind the old
  ones, which are refreshed in place; what else is needed is taken once and used by every layer.
* As many images are worked on at once as stay in the cache: one where maps are large.
* The norm behind the first convolution is folded into it.
* Grouped 1×1 convolutions are batched matrix products.
* So is a 3×3 convolution with few outputs in each group: it multiplies all its maps by each of its nine taps
  at once and adds the products, shifted; maps with zeros around them, and one column of zeros between rows,
  make a shift the same step everywhere. torch's own takes two to five times as long there.
* Maps are halved by adding every second row, then every second column.

Each is worth 3 % of a network's time or more; scripts/bench_condense.py measures the whole. While a program
records the stage (``torch.export``, ``torch.compile``, tracing) it computes the same in the ordinary way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SEModule
from torch import Tensor, nn

from ..errors import UsageError
from .learned_group import CondensedConv2d, CondensedReactivation
from .shuffle import channel_shuffle

__all__ = ["FusedLayer", "FusedStage", "can_fuse"]

# Pixels of all images worked on at once. On 8 images networks take 14 to 30 % longer with 1, and 26 to 110 %
# without a limit (one core with 1 MB of cache; anything from 512 to 8192 is within 10 %).
_PIXELS = 2048
_FEW_OUTPUTS = 8  # of a group of a 3×3 convolution; from 16 on torch's own is faster
_ACTS: dict[type[nn.Module], Any] = {nn.ReLU: F.relu, nn.Hardswish: F.hardswish}


def can_fuse(layers: Sequence[Any]) -> bool:
    """Whether layers of a dense stage are condensed, alike, and of parts that :class:`FusedStage` knows.

    Args:
        layers: With the parts of ``CondensingLayer``, in the order in which they run.
    """
    kinds = {_kind(layer) for layer in layers}
    return len(kinds) == 1 and None not in kinds


def _kind(layer: Any) -> tuple[Any, ...] | None:
    """What has to be the same in all layers of a stage; None for a layer that cannot be fused."""
    conv, sfr, wide = layer.conv1, layer.sfr, layer.conv2
    norms, acts = [layer.norm2], {type(layer.act)}
    for part, known in ((conv, CondensedConv2d), (sfr, CondensedReactivation)):
        if part is not None:
            if type(part) is not known:
                return None
            norms.append(part.norm)
            acts.add(type(part.act))
    plain = all(
        type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) and norm.track_running_stats for norm in norms
    )
    if not plain or len(acts) > 1 or not acts <= set(_ACTS) or not _is_plain(wide) or not _is_known(layer.se):
        return None
    inner = (conv.groups, conv.out_channels, wide.out_channels, wide.groups)
    return (acts.pop(), *inner, type(layer.se), sfr and sfr.groups)


def _is_plain(conv: nn.Conv2d) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.bias is None
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.padding_mode == "zeros"
    )


def _is_known(se: Any) -> bool:
    """Whether a squeeze-and-excitation is two linear maps, ReLU between them and a sigmoid behind."""
    return isinstance(se, nn.Identity) or (
        isinstance(se, SEModule)
        and not se.add_maxpool
        and isinstance(se.bn, nn.Identity)
        and se.fc1.bias is None
        and se.fc2.bias is None
        and isinstance(se.act, nn.ReLU)
        and type(se.gate).__name__ == "Sigmoid"
    )


class FusedStage(nn.Module):
    """All layers of a dense stage, with the pooling in front of them.

    Attributes:
        layers: One :class:`FusedLayer` for each.
        has_pool: Whether maps are halved first, by averages of 2×2.
        growth: Maps that the stage adds.

    Source:
        arXiv:2104.04382, section 3.3, for what is computed.
    """

    def __init__(self, layers: Sequence[Any], has_pool: bool) -> None:
        """Take the tensors of condensed layers for which :func:`can_fuse` holds; these stay as they are."""
        super().__init__()
        self.has_pool = has_pool
        self.in_channels = layers[0].conv1.in_channels
        self.growth = sum(layer.conv2.out_channels for layer in layers)
        self.layers = nn.ModuleList(FusedLayer(layer) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        """Run the stage.

        Shape:
            x ``(b, c, h, w)`` → ``(b, c + growth, h', w')``, halved if there is pooling.

        Raises:
            UsageError: It is in training mode, or gradients are wanted: old maps are overwritten here. Or
                maps are too small to be halved.
        """
        recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if self.training or (torch.is_grad_enabled() and x.requires_grad and not recorded):
            raise UsageError(
                "a fused stage is for inference: it overwrites what gradients need.\n"
                "  Call eval() and torch.inference_mode(), or train the network that it was made from."
            )
        if recorded:
            return self._recorded(x)
        b, _, h, w = x.shape
        if self.has_pool:
            if h < 2 or w < 2:
                raise UsageError(f"maps of {h}×{w} are too small to be halved.   Take larger images.")
            h, w = h // 2, w // 2
        like: Any = self.layers[0].weight1
        channels = self.in_channels
        total = channels + self.growth
        result = like.new_empty(b, total, h, w)
        at_once = max(1, _PIXELS // (h * w) if x.is_cpu else b)
        memory = None
        for first in range(0, b, at_once):
            part = x[first : first + at_once].transpose(0, 1)
            images = part.shape[1]
            if memory is None or memory.images != images:
                memory = _Memory(self.layers, images, h, w)
            # The maps of one image lie in the result as they have to.
            maps = result[first] if images == 1 else like.new_empty(total, images, h, w)
            maps = maps.view(total, images * h * w)
            start = maps[:channels].view(-1, images, h, w)
            if self.has_pool:
                _halve(part, start)
            else:
                start.copy_(part)
            for layer in self.layers:
                layer(maps, memory)
            if images > 1:
                result[first : first + images] = maps.view(total, images, h, w).transpose(0, 1)
        return result

    def _recorded(self, x: Tensor) -> Tensor:
        """The same from operations that any program can record."""
        if self.has_pool:
            x = F.avg_pool2d(x, 2)
        for layer in self.layers:
            x = layer.recorded(x)  # pyright: ignore[reportCallIssue]
        return x


class _Memory:
    """What layers compute between the maps they read and those they write, taken once for a stage.

    Rows are ``pixels = images · h · w`` long; those of ``wide_input`` for taps have zeros around each image.
    What is not needed at the same time shares its place, for the sake of the cache.
    """

    def __init__(self, layers: Any, images: int, h: int, w: int) -> None:
        layer: FusedLayer = layers[0]
        like, growth, inner, groups2 = layer.weight1, layer.growth, layer.inner, layer.groups2
        self.images, self.pixels = images, images * h * w
        gathered = max(max(other.reads, other.writes) for other in layers) * self.pixels
        made = inner * self.pixels
        step, size = w + 1, h * (w + 1)
        row = size + 2 * (step + 1)  # taps reach over the edges by a line and a pixel
        products, columns = 9 * growth * images * row, 3 * growth * images * (size + 2)
        if not layer.has_taps:
            products = columns = 0

        first = max(gathered + made, products)
        self.flat = like.new_empty(first + max(columns, growth * self.pixels))
        second = self.flat[first:]
        self.inner = self.flat[gathered : gathered + made].view(layer.groups1, -1, self.pixels)
        self.shuffled = self.inner.view(layer.groups1, -1, images, h, w).transpose(0, 1)
        self.act3 = second[: growth * self.pixels].view(growth, self.pixels)
        if layer.groups3:
            self.grouped3 = self.act3.view(-1, layer.groups3, self.pixels).transpose(0, 1)
        if not layer.has_taps:
            self.wide_input = like.new_empty(images, inner, h, w)
            self.inside = self.wide_input.view(images, -1, layer.groups1, h, w).permute(1, 2, 0, 3, 4)
            self.shape = (growth, images, h, w)
            return
        self.wide_input = like.new_zeros(inner, images, row)
        inside = self.wide_input[..., step + 1 : step + 1 + size]
        self.inside = _lines(inside, h, w).view(-1, layer.groups1, images, h, w)
        self.framed = self.wide_input.view(groups2, -1, images * row)
        self.products = self.flat[:products].view(groups2, -1, images * row)
        taps = self.products.view(groups2, 3, 3, -1, images, row)
        self.rows = [taps[:, i, ..., i * step : i * step + size + 2] for i in range(3)]
        self.columns = second[:columns].view(groups2, 3, -1, images, size + 2)
        self.left, self.middle, right = (self.columns[:, i, ..., i : i + size] for i in range(3))
        self.last = _lines(self.left, h, w), _lines(right, h, w)
        self.shape = (groups2, -1, images, h, w)


def _lines(rows: Tensor, h: int, w: int) -> Tensor:
    """View ``(…, h, w)`` of rows ``(…, h · (w + 1))`` whose lines end with one pixel that does not count."""
    return rows.view(*rows.shape[:-1], h, w + 1)[..., :w]


class FusedLayer(nn.Module):
    """One layer of a fused stage, its norms folded or made scale and shift.

    Attributes:
        index1: ``(n,)``; the maps that the first convolution reads, group by group.
        scale1: ``(n, 1)``; of the norm in front of it; ``shift1`` likewise.
        weight1: ``(G, out / G, n / G)`` of the first convolution; bias1 ``(G, out / G, 1)``.
        weight2: ``(groups, 9 · k / groups, in / groups)`` of the 3×3 convolution, tap by tap; as convolutions
            have it if there are too many outputs.
        weight3: ``(G, rows, k / G)`` of the reactivation, with ``scale3``, ``shift3`` and ``index3``.
    """

    index1: Tensor
    index3: Tensor

    def __init__(self, layer: Any) -> None:
        """Take the tensors of a condensed layer."""
        super().__init__()
        conv, wide, sfr = layer.conv1, layer.conv2, layer.sfr
        self.act = _ACTS[type(layer.act)]
        self.in_channels, self.growth = conv.in_channels, wide.out_channels
        self.groups1, self.groups2, self.groups3 = conv.groups, wide.groups, sfr.groups if sfr else 0
        self.inner, self.outputs2 = conv.out_channels, wide.out_channels // wide.groups
        self.has_taps, self.has_se = self.outputs2 <= _FEW_OUTPUTS, not isinstance(layer.se, nn.Identity)
        self.reads, self.writes = len(conv.index), len(sfr.index) if sfr else 0

        self.register_buffer("index1", conv.index)
        self.scale1, self.shift1 = (_frozen(v.unsqueeze(1), conv) for v in _affine(conv.norm))
        # Row g · out / G + a of the grouped convolution makes channel a · G + g.
        scale, shift = (v.view(-1, conv.groups).t().unsqueeze(2) for v in _affine(layer.norm2))
        self.weight1 = _frozen(conv.weight.view(*scale.shape[:2], -1) * scale, conv)
        self.bias1 = _frozen(shift, conv)
        weight = wide.weight
        if self.has_taps:
            taps = weight.view(wide.groups, self.outputs2, -1, 9).permute(0, 3, 1, 2)
            weight = taps.reshape(wide.groups, 9 * self.outputs2, -1)
        self.weight2 = _frozen(weight, conv)
        if self.has_se:
            self.squeeze = _frozen(layer.se.fc1.weight.flatten(1), conv)
            self.excite = _frozen(layer.se.fc2.weight.flatten(1), conv)
        if sfr is not None:
            self.register_buffer("index3", sfr.index)
            self.scale3, self.shift3 = (_frozen(v.unsqueeze(1), conv) for v in _affine(sfr.norm))
            self.weight3 = _frozen(sfr.weight.view(sfr.groups, -1, sfr.weight.shape[1]), conv)

    def forward(self, maps: Tensor, memory: _Memory) -> None:
        """Refresh maps and write new ones behind them, in place.

        Shape:
            maps ``(all maps of the stage, pixels)``, of which the first ``in_channels`` are filled.
        """
        act, pixels = self.act, memory.pixels
        held: Any = {**self._parameters, **self._buffers}  # attributes take a tenth of a small layer's time
        gathered = memory.flat[: self.reads * pixels].view(self.reads, pixels)
        torch.index_select(maps, 0, held["index1"], out=gathered)
        act(gathered.mul_(held["scale1"]).add_(held["shift1"]), inplace=True)
        grouped = gathered.view(self.groups1, -1, pixels)
        torch.baddbmm(held["bias1"], held["weight1"], grouped, out=memory.inner)
        memory.inside.copy_(memory.shuffled)
        act(memory.wide_input, inplace=True)
        new = maps[self.in_channels : self.in_channels + self.growth]
        if self.has_taps:
            torch.bmm(held["weight2"], memory.framed, out=memory.products)
            top, centre, bottom = memory.rows
            torch.add(top, centre, out=memory.columns).add_(bottom)
            memory.left.add_(memory.middle)
            torch.add(*memory.last, out=new.view(memory.shape))
        else:
            made = F.conv2d(memory.wide_input, held["weight2"], padding=1, groups=self.groups2)
            new.view(memory.shape).copy_(made.transpose(0, 1))
        if self.has_se:
            images = new.view(self.growth, memory.images, -1)
            gate = held["excite"].mm(held["squeeze"].mm(images.mean(2)).relu_()).sigmoid_()
            images.mul_(gate.unsqueeze(2))
        if self.groups3:
            act(torch.mul(new, held["scale3"], out=memory.act3).add_(held["shift3"]), inplace=True)
            update = memory.flat[: self.writes * pixels].view(self.writes, pixels)
            torch.bmm(held["weight3"], memory.grouped3, out=update.view(self.groups3, -1, pixels))
            maps.index_add_(0, held["index3"], update)

    def recorded(self, x: Tensor) -> Tensor:
        """The same from operations that any program can record, nothing in place.

        Shape:
            x ``(b, in, h, w)`` → ``(b, in + growth, h, w)``, old ones first.
        """
        act = self.act
        new = act(x.index_select(1, self.index1) * self.scale1.unsqueeze(2) + self.shift1.unsqueeze(2))
        weight = self.weight1.reshape(self.inner, -1, 1, 1)
        new = F.conv2d(new, weight, self.bias1.flatten(), groups=self.groups1)
        weight = self.weight2
        if self.has_taps:
            taps = weight.view(self.groups2, 3, 3, self.outputs2, -1).permute(0, 3, 4, 1, 2)
            weight = taps.flatten(0, 1)
        new = act(channel_shuffle(new, self.groups1))
        new = F.conv2d(new, weight, padding=1, groups=self.groups2)
        if self.has_se:
            gate = new.mean((2, 3)).matmul(self.squeeze.t()).relu().matmul(self.excite.t()).sigmoid()
            new = new * gate[:, :, None, None]
        if self.groups3:
            update = act(new * self.scale3.unsqueeze(2) + self.shift3.unsqueeze(2))
            update = channel_shuffle(update, self.growth // self.groups3)
            weight = self.weight3.reshape(self.writes, -1, 1, 1)
            update = F.conv2d(update, weight, groups=self.groups3)
            # Into zeros: torch's ONNX export takes an index 0, 1, 2, … for an assignment.
            x = x + torch.zeros_like(x).index_add(1, self.index3, update)
        return torch.cat([x, new], dim=1)


def _halve(x: Tensor, out: Tensor) -> None:
    """Averages of 2×2, without a last odd row or column."""
    h, w = 2 * out.shape[2], 2 * out.shape[3]
    rows = x[:, :, 0:h:2, :w] + x[:, :, 1:h:2, :w]
    torch.add(rows[..., 0::2], rows[..., 1::2], out=out).mul_(0.25)


@torch.no_grad()
def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift that a batch norm is in evaluation."""
    dtype = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(dtype)
    shift = -norm.running_mean.to(dtype) * scale
    return scale, shift if norm.bias is None else shift + norm.bias.to(dtype)


def _frozen(tensor: Tensor, like: Any) -> nn.Parameter:
    """A parameter without gradient, in the type of a layer's weight."""
    return nn.Parameter(tensor.detach().to(like.weight.dtype).contiguous(), requires_grad=False)
