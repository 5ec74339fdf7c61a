"""Where the channels of a network are looked at for ranks: named by hand, or found by one traced forward.

The rule is that of the HRank paper's experiments, put for any CNN: a convolution is measured at the last of
conv → norm → activation, behind the residual addition where the activation comes after it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UsageError
from ..layers import ChannelEquilibrium

__all__ = ["RankSite", "evaluating", "find_rank_sites"]

_NORMS = (
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.InstanceNorm2d,
    ChannelEquilibrium,
)
_ACTIVATION_HOMES = ("torch.nn.modules.activation", "timm.layers.activations")
_GATES = {"Sigmoid", "Hardsigmoid", "HardSigmoid", "HardSigmoidMe", "Softmax", "Softmax2d"}
_CATS = {"cat", "concat", "concatenate"}
_POOLS = {"max_pool2d", "avg_pool2d", "boolean_dispatch"}
# Functions whose output may be as large as their input without having its channels.
_MIXING = {
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose2d",
    "linear",
    "matmul",
    "__matmul__",
    "bmm",
    "einsum",
}
_MOVING = {
    "transpose",
    "permute",
    "flip",
    "roll",
    "swapaxes",
    "movedim",
    "reshape",
    "view",
    "channel_shuffle",
}


@dataclass(frozen=True)
class RankSite:
    """A tensor, or some of its channels, whose maps are ranked.

    Attributes:
        name: Of the row in the table; for a site that was found, the convolution it stands for.
        module: Path of the module whose output is measured; an activation, a norm, a pool.
        call: Which of the module's calls in one forward.
        start: First channel.
        stop: Channel behind the last; None for all that follow, negative to count from the end.
        pool: Kernel, stride and padding of a max pool to apply first, where the network's own pool is no
            module that could be named.
    """

    name: str
    module: str
    call: int = 0
    start: int = 0
    stop: int | None = None
    pool: tuple[int, int, int] | None = None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, true 32-bit arithmetic; afterwards everything is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    device = next((p.device.type for p in model.parameters()), "cpu")
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        model.eval()
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32
        for module, mode in modes:
            module.training = mode


def find_rank_sites(model: nn.Module, image: Tensor) -> list[RankSite]:
    """Measured point of every convolution, in the order of the forward.

    A convolution is followed through norms, additions, gates, concatenations and pools to its first
    activation; without one, to its norm; without either it is measured itself. Where it feeds a concatenation
    the site is its slice of the channels. A stem of stride 2 whose max pool comes next is measured behind the
    pool: there are four times fewer pixels. Convolutions that put out single pixels (squeeze and excitation)
    have no site. Several may share a tensor: those whose outputs are added before the activation.

    Args:
        model: Any CNN; run once in evaluation mode.
        image: A batch for it; one image is enough.

    Raises:
        UsageError: There is no convolution whose maps are larger than one pixel.

    Source:
        arXiv:2002.10179 as published with its code; slices and stem pool likewise. Rules for networks
        that the paper did not have (pre-activation, layer scale) are ours.
    """
    trace = _Trace()
    handles = [handle for name, module in model.named_modules() for handle in trace.watch(name, module)]
    try:
        with evaluating(model), trace:
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    if not trace.sites:
        raise UsageError(
            f"{type(model).__name__} has no convolution with maps larger than one pixel: nothing to rank.\n"
            f"  It was tried on images of {image.shape[-2]}×{image.shape[-1]}."
        )
    return list(trace.sites.values())


@dataclass(frozen=True)
class _Part:
    """Channels of a tensor that come from one convolution."""

    conv: str
    start: int
    channels: int


class _Trace(TorchFunctionMode):
    """Follows each convolution's channels through a forward."""

    def __init__(self) -> None:
        super().__init__()
        # The tensors are kept, so that an id stays its tensor's own.
        self.marks: dict[int, tuple[Tensor, tuple[_Part, ...]]] = {}
        self.sites: dict[str, RankSite] = {}
        self.normed: set[str] = set()
        self.activated: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.is_strided = self.is_pooled = False  # whether some convolution was, and a max pool came
        self.settled: tuple[Tensor | None, set[str]] = (None, set())  # the last tensor with sites, and whose

    def parts(self, tensor: Any) -> tuple[_Part, ...]:
        return self.marks[id(tensor)][1] if id(tensor) in self.marks else ()

    def mark(self, tensor: Tensor, parts: tuple[_Part, ...]) -> None:
        if parts:
            self.marks[id(tensor)] = (tensor, tuple(dict.fromkeys(parts)))
        else:  # an operation in place may have ended what the tensor was
            self.marks.pop(id(tensor), None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if not isinstance(output, Tensor) or output.ndim != 4 or name in _MIXING | _MOVING:
            return output
        parts: list[_Part] = []
        if name in _CATS:
            tensors = kwargs.get("tensors", args[0] if args else ())
            if kwargs.get("dim", args[1] if len(args) > 1 else 0) in (1, -3):
                offset = 0
                for tensor in tensors:
                    parts += [replace(part, start=part.start + offset) for part in self.parts(tensor)]
                    offset += tensor.shape[1]
        elif name in _POOLS:
            first = args[0] if args else kwargs.get("input")
            parts += self.parts(first) if output.shape[:2] == getattr(first, "shape", ())[:2] else ()
        else:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.shape == output.shape:
                    parts += self.parts(value)
        self.mark(output, tuple(parts))
        return output

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        """Hooks for one module."""
        kind = type(module)
        is_activation = kind.__module__.startswith(_ACTIVATION_HOMES) and kind.__name__ not in _GATES
        is_norm = isinstance(module, _NORMS) or (
            "Norm" in kind.__name__ and not any(isinstance(part, nn.Conv2d) for part in module.modules())
        )
        always = is_activation or isinstance(module, ChannelEquilibrium)
        entered: list[tuple[_Part, ...]] = []

        def before(_module: nn.Module, args: Any) -> None:
            entered.append(self.parts(args[0]) if args else ())

        def after(_module: nn.Module, args: Any, output: Any) -> None:
            parts, call = entered.pop(), self.counts[name]
            self.counts[name] += 1
            if not isinstance(output, Tensor) or output.ndim != 4:
                return
            if isinstance(module, nn.Conv2d):
                if output.shape[2:].numel() > 1 and name not in self.sites:
                    self.sites[name] = RankSite(name, name, call)
                    self.is_strided |= max(module.stride) > 1
                    self.mark(output, (_Part(name, 0, output.shape[1]),))
            elif is_activation or is_norm:
                # A second norm is that of another layer, behind an addition.
                kept = tuple(part for part in parts if always or part.conv not in self.normed)
                for part in kept:
                    self.settle(part, name, call, output)
                (self.activated if is_activation else self.normed).update(part.conv for part in kept)
                self.mark(output, kept)
            elif isinstance(module, nn.MaxPool2d):
                if self.is_strided and not self.is_pooled and args and args[0] is self.settled[0]:
                    for conv in self.settled[1]:
                        self.sites[conv] = replace(self.sites[conv], module=name, call=call)
                self.is_pooled = True

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def settle(self, part: _Part, name: str, call: int, output: Tensor) -> None:
        """Move a convolution's site to a norm or activation, unless it has come to rest already."""
        if part.conv in self.activated:
            return
        whole = part.start == 0 and part.channels == output.shape[1]
        stop = None if whole else part.start + part.channels
        self.sites[part.conv] = RankSite(part.conv, name, call, part.start, stop)
        self.settled = (output, {part.conv, *(self.settled[1] if self.settled[0] is output else ())})
