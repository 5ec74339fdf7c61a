"""Which channels of a convolutional network do any work: the analysis of the Channel Equilibrium paper.

Looks at the sites of ``sites.py``. Follows Shao et al., "Channel Equilibrium Networks for Learning Deep
Representation" (ICML 2020, arXiv:2003.00214). The paper draws its curves for chosen layers of VGG; which
sites count is an argument here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import AdaptiveInstanceInverse, ChannelEquilibrium
from ..layers.decorrelation import instance_variance
from .images import Picked, open_images, open_loader
from .sites import BATCH_NORMS, Call, Site, trace

__all__ = [
    "DROP_TENTHS",
    "AblationPoint",
    "ChannelReport",
    "Gain",
    "ablation_curve",
    "effective_gain",
    "measure_channels",
    "sample_batches",
]

Batches = Sequence[tuple[Tensor, Tensor]]

DROP_TENTHS = tuple(range(10))


@dataclass(frozen=True)
class Gain:
    """Gains of the channels behind one norm.

    Attributes:
        layer: Path of the norm.
        weight: ``|γ|`` of each channel.
        effective: With the Channel Equilibrium layer behind it, see :func:`effective_gain`; else None.
    """

    layer: str
    weight: Tensor
    effective: Tensor | None


@dataclass(frozen=True)
class ChannelReport:
    """What the channels of a network put out.

    Attributes:
        images: Images it was measured on.
        threshold: Magnitude below which a channel counts as inhibited.
        magnitudes: By site: mean absolute output of each channel over samples and pixels.
        gains: Of every batch norm.
    """

    images: int
    threshold: float
    magnitudes: dict[str, Tensor]
    gains: list[Gain]

    def inhibited(self, site: str) -> int:
        """Number of inhibited channels of a site."""
        return int((self.magnitudes[site] < self.threshold).sum())

    def ratio(self, site: str) -> float:
        """Inhibited share of a site's channels."""
        return self.inhibited(site) / len(self.magnitudes[site])

    @property
    def mean_ratio(self) -> float:
        """Mean of the sites' ratios: every site counts the same."""
        return sum(map(self.ratio, self.magnitudes)) / len(self.magnitudes)

    @property
    def overall_ratio(self) -> float:
        """Ratio over all channels: every channel counts the same."""
        return sum(map(self.inhibited, self.magnitudes)) / sum(map(len, self.magnitudes.values()))


@dataclass(frozen=True)
class AblationPoint:
    """Accuracy with some channels silenced.

    Attributes:
        seed: Of the order in which channels are silenced.
        ratio: Share of each site's channels that is silenced, rounded down to whole channels.
        top1: Fraction of images whose class came first.
    """

    seed: int
    ratio: float
    top1: float


def sample_batches(
    model: nn.Module,
    data_dir: str | Path,
    *,
    images: int = 1000,
    split: str = "val",
    batch_size: int = 100,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> list[tuple[Tensor, Tensor]]:
    """Images at equal distances through a data set, in memory (0.6 GB for 1000 of 224×224).

    Raises:
        UsageError: See :func:`chanzoo.measure.images.open_images`.
    """
    dataset = open_images(model, data_dir, split)
    count = min(images, len(dataset))
    picked = Picked(dataset, [i * len(dataset) // count for i in range(count)])
    return list(open_loader(model, picked, batch_size=batch_size, workers=workers, device=device))


@torch.no_grad()
def measure_channels(
    model: nn.Module,
    batches: Batches,
    sites: Sequence[Site],
    *,
    threshold: float = 0.01,
    branch: bool = False,
) -> ChannelReport:
    """Mean magnitude of every channel at every site, and the gains of the norms.

    Args:
        model: A network in evaluation mode.
        batches: Images and classes, see :func:`sample_batches`.
        sites: See :func:`find_sites`.
        threshold: Below it a channel is inhibited.
        branch: At residual additions, look at the branch alone: the activation of the summand.

    Source:
        arXiv:2003.00214: inhibited are channels behind norm and ReLU whose output stays below 0.01.
    """
    sums: dict[str, Tensor] = {}
    gates: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    pairs = trace(model, batches[0][0][:1]).norm_before

    def add_output(site: Site) -> Callable[[nn.Module, Any, Tensor], None]:
        def action(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if branch and site.branch:  # not in place, the network goes on with it; and without hooks
                output = modules[site.call[0]].forward(output.clone())
            size = output.abs().double()
            size = size.flatten(2).mean(2) if size.ndim > 2 else size
            sums[site.name] = sums.get(site.name, 0) + size.sum(0)

        return action

    def add_gate(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def action(module: nn.Module, args: Any, _output: Tensor) -> None:
            gate = _reweight(module).gate(instance_variance(args[0]))
            gates[name] = gates.get(name, 0) + gate.double().sum(0)

        return action

    actions: list[tuple[Call, Any]] = []
    for site in sites:
        actions.append((site.branch if branch and site.branch else site.call, add_output(site)))
    actions += [((name, 0), add_gate(name)) for name in pairs]
    with _at_calls(model, actions):
        for images, _ in batches:
            model(images)
    count = sum(len(images) for images, _ in batches)

    norm_to_ce = {norm: ce for ce, norm in pairs.items()}
    gains = []
    for name, module in modules.items():
        if isinstance(module, BATCH_NORMS) and module.weight is not None:
            effective = None
            if ce := norm_to_ce.get(name):
                layer = modules[ce]
                assert isinstance(layer, ChannelEquilibrium)
                effective = effective_gain(layer, module.weight, gates[ce] / count).cpu()
            gains.append(Gain(name, module.weight.detach().double().abs().cpu(), effective))
    return ChannelReport(
        count, threshold, {site.name: (sums[site.name] / count).cpu() for site in sites}, gains
    )


@torch.no_grad()
def effective_gain(layer: ChannelEquilibrium, weight: Tensor, mean_gate: Tensor) -> Tensor:
    """Gain of each channel through a norm's weight and the Channel Equilibrium layer behind it.

    Row norms of ``(λ · running_wm + (1 − λ) / s · diag(y)) · diag(γ)``, which is what the layer multiplies
    the normalised channels with in evaluation, at the mean gate ``y``.

    Shape:
        weight ``(c,)``, mean_gate ``(c,)`` → ``(c,)``, 64-bit floats.

    Source:
        arXiv:2003.00214, which reads an inhibited channel off ``|γ|`` near zero; the matrix norm is ours.
    """
    whitener = layer.get_buffer("decorrelation.running_wm").double()
    scale = layer.get_buffer("reweight.running_scale").double()
    groups, size = whitener.shape[:2]
    mix = torch.sigmoid(layer.get_parameter("mix").double())
    gain = (1 - mix) / scale * mean_gate.double()
    operator = mix * whitener + torch.diag_embed(gain.view(groups, size))
    return (operator * weight.double().view(groups, 1, size)).norm(dim=2).flatten()


@torch.no_grad()
def ablation_curve(
    model: nn.Module,
    batches: Batches,
    sites: Sequence[Site],
    *,
    seeds: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> list[AblationPoint]:
    """Accuracy while a growing random share of the channels is silenced, at all given sites at once.

    Each seed draws one order of the channels per site; a larger share silences the channels of the smaller
    one and more.

    Args:
        model: A network in evaluation mode.
        batches: Images and classes.
        sites: Where to silence.
        seeds: How many orders.
        progress: Called with the shares done and all shares.

    Source:
        arXiv:2003.00214, cumulative ablation. That sets are nested and all sites go at once is our choice.
    """
    device = batches[0][0].device
    whole = _top1(model, batches)
    points = []
    total = seeds * len(DROP_TENTHS)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        orders = {site: torch.randperm(site.channels, generator=generator) for site in sites}
        for tenths in DROP_TENTHS:
            top1 = whole
            if tenths:
                actions = []
                for site, order in orders.items():
                    mask = torch.ones(site.channels, device=device)
                    mask[order[: tenths * site.channels // 10]] = 0
                    actions.append((site.call, _silence(mask)))
                with _at_calls(model, actions):
                    top1 = _top1(model, batches)
            points.append(AblationPoint(seed, tenths / 10, top1))
            if progress:
                progress(len(points), total)
    return points


def _reweight(layer: nn.Module) -> AdaptiveInstanceInverse:
    part = layer.get_submodule("reweight")
    assert isinstance(part, AdaptiveInstanceInverse)
    return part


def _silence(mask: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def action(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output * mask.to(output.dtype).view(1, -1, *(1,) * (output.ndim - 2))

    return action


def _top1(model: nn.Module, batches: Batches) -> float:
    hits = sum(int((model(images).argmax(dim=1) == target).sum()) for images, target in batches)
    return hits / sum(len(target) for _, target in batches)


@contextmanager
def _at_calls(model: nn.Module, actions: Iterable[tuple[Call, Any]]) -> Iterator[None]:
    """Forward hooks that run at one call each, counted from the start of the network's forward."""
    counts: Counter[str] = Counter()
    by_module: dict[str, dict[int, list[Any]]] = {}
    for (name, call), action in actions:
        by_module.setdefault(name, {}).setdefault(call, []).append(action)

    def hook(name: str) -> Any:
        def run(module: nn.Module, args: Any, output: Any) -> Any:
            call = counts[name]
            counts[name] += 1
            for action in by_module[name].get(call, ()):
                changed = action(module, args, output)
                output = output if changed is None else changed
            return output

        return run

    handles = [model.register_forward_pre_hook(lambda _module, _args: counts.clear())]
    handles += [model.get_submodule(name).register_forward_hook(hook(name)) for name in by_module]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
