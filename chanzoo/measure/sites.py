"""The activations of a network that norms feed, found by one traced forward; nothing in it is changed.

A site is an activation that a norm feeds, directly or through Channel Equilibrium, gates and residual
additions: where the analysis of Shao et al. (ICML 2020, arXiv:2003.00214) looks at channels.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UsageError
from ..layers import ChannelEquilibrium

__all__ = ["BATCH_NORMS", "Call", "Site", "find_sites", "trace"]

Call = tuple[str, int]  # module, and which of its calls in one forward

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORM_FUNCTIONS = {F.batch_norm, F.group_norm, F.layer_norm, F.instance_norm, F.rms_norm}
_MIXING_FUNCTIONS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.linear}
_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
_ACTIVATION_HOMES = ("torch.nn.modules.activation", "timm.layers.activations")
_GATES = {
    "Sigmoid",
    "Hardsigmoid",
    "HardSigmoid",
    "HardSigmoidMe",
    "Softmax",
    "Softmax2d",
    "LogSoftmax",
    "Softmin",
}


@dataclass(frozen=True)
class Site:
    """An activation that a norm feeds.

    Attributes:
        name: Path of the activation module, with ``#k`` for its k-th call where it is called more than once.
        call: The module and which of its calls in a forward.
        channels: Of its output.
        branch: Where the input is a sum: the call whose output is the first summand that comes from a norm.
    """

    name: str
    call: Call
    channels: int
    branch: Call | None


def find_sites(model: nn.Module, image: Tensor, pattern: str = "*") -> list[Site]:
    """Sites of a network in the order of its forward.

    Args:
        model: Any network of convolutions; run once in evaluation mode.
        image: A batch for it.
        pattern: Shell glob that a site's name must match.

    Raises:
        UsageError: There is no site, or none matches.
    """
    sites = trace(model, image).sites
    if not sites:
        raise UsageError(
            f"{type(model).__name__} has no activation that a norm feeds: there are no channels to inspect.\n"
            "  The analysis is for convolutional networks whose activations follow their norms."
        )
    chosen = [site for site in sites if fnmatch.fnmatch(site.name, pattern)]
    if not chosen:
        raise UsageError(f'no site matches "{pattern}".\n  sites: {", ".join(site.name for site in sites)}')
    return chosen


@dataclass
class _Mark:
    """A tensor that comes from a norm; it is kept so that its id stays its own."""

    tensor: Tensor
    branch: Call | None = None


class Trace(TorchFunctionMode):
    """Follows what norms put out through a forward, until a convolution, a linear layer or an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[int, _Mark] = {}
        self.producers: dict[int, Call] = {}
        self.norms: dict[int, str] = {}
        self.running_norm = ""
        self.norm_before: dict[str, str] = {}
        self.sites: list[Site] = []
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not isinstance(output, Tensor):
            return output
        inputs = [a for a in args if isinstance(a, Tensor)]
        marked = [a for a in inputs if id(a) in self.marks]
        branch = None
        if func in _ADDITIONS and marked and len(inputs) == 2 and inputs[0].shape == inputs[1].shape:
            branch = self.producers.get(id(marked[0]))
        elif marked:
            branch = self.marks[id(marked[0])].branch
        self.marks.pop(id(output), None)  # an operation in place may have ended what the tensor was
        if all(output is not tensor for tensor in inputs):  # the id may be that of a tensor long gone
            self.producers.pop(id(output), None)
            self.norms.pop(id(output), None)
        if func in _NORM_FUNCTIONS:
            self.marks[id(output)] = _Mark(output)
            self.norms[id(output)] = self.running_norm
        elif marked and func not in _MIXING_FUNCTIONS:
            self.marks[id(output)] = _Mark(output, branch)
        return output

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        """Hooks for one module."""
        is_activation = (
            type(module).__module__.startswith(_ACTIVATION_HOMES) and type(module).__name__ not in _GATES
        )

        def before(_module: nn.Module, args: Any) -> None:
            if isinstance(module, BATCH_NORMS):
                self.running_norm = name
            first = args[0] if args and isinstance(args[0], Tensor) else None
            mark = self.marks.get(id(first))
            if is_activation and mark and first is not None and first.ndim in (2, 4):
                self.sites.append(Site(name, (name, self.counts[name]), first.shape[1], mark.branch))
            if isinstance(module, ChannelEquilibrium) and id(first) in self.norms:
                self.norm_before[name] = self.norms[id(first)]

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            call = self.counts[name]
            self.counts[name] += 1
            if id(output) not in self.marks:
                return
            if is_activation:
                del self.marks[id(output)]
                return
            self.producers[id(output)] = (name, call)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


@torch.no_grad()
def trace(model: nn.Module, image: Tensor) -> Trace:
    """Run a network once in evaluation mode and note its sites, and the norm before each CE layer."""
    seen = Trace()
    handles = [handle for name, module in model.named_modules() for handle in seen.watch(name, module)]
    was_training = model.training
    model.eval()
    try:
        with seen:
            model(image)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    repeated = {name for name, count in Counter(site.call[0] for site in seen.sites).items() if count > 1}
    seen.sites = [
        Site(f"{s.name}#{s.call[1]}", s.call, s.channels, s.branch) if s.name in repeated else s
        for s in seen.sites
    ]
    seen.marks.clear()
    return seen
