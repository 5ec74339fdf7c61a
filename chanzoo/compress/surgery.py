"""From the channels that stay to the narrow network: its widths, its tensors, and the proof that it is right.

Nothing here decides anything. Every tensor of the narrow network is a slice of the full one's; in evaluation
it computes what the full network computes when the columns that read the removed channels are zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..layers import ChannelEquilibrium
from ..layers.narrow import apply_widths
from .groups import Group, is_depthwise

__all__ = ["Masks", "check_same", "masks_of", "narrowed", "sliced_state", "tried", "widths_of", "zeroed"]

Masks = Mapping[tuple[str, str], Tensor]
"""(name of a module or bare parameter, ``"out"`` or ``"in"``) → which of its channels stay."""

_TOLERANCE = 1e-6  # of 64-bit arithmetic through some hundred layers; a wrong channel is off by a tenth


def masks_of(
    model: nn.Module, groups: Sequence[Group], kept: Mapping[str, Tensor]
) -> dict[tuple[str, str], Tensor]:
    """Which channels of every layer stay.

    Args:
        model: The full network.
        groups: Its groups of coupled channels.
        kept: By root of a group: indices of the channels that stay; groups that are not named stay whole.
    """
    masks: dict[tuple[str, str], Tensor] = {}
    for group in groups:
        stays = torch.ones(group.channels, dtype=torch.bool)
        if group.root in kept:
            stays[:] = False
            stays[kept[group.root]] = True
        if stays.all():
            continue
        for slot in group.slots:
            place = (slot.name, slot.axis)
            if place not in masks:
                masks[place] = torch.ones(_length(model, *place), dtype=torch.bool)
            masks[place][slot.index[~stays[slot.root]]] = False
    return masks


def _length(model: nn.Module, name: str, axis: str) -> int:
    module = dict(model.named_modules()).get(name)
    if isinstance(module, nn.Conv2d):
        return module.out_channels if axis == "out" else module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features if axis == "out" else module.in_features
    if isinstance(module, ChannelEquilibrium):
        return module.decorrelation.channels
    if module is None:
        return model.get_parameter(name).numel()
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return max(tensor.numel() for tensor in own)


def widths_of(model: nn.Module, masks: Masks) -> dict[str, list[int]]:
    """The table of widths that the masks leave, for :func:`chanzoo.layers.narrow.apply_widths`."""
    widths: dict[str, list[int]] = {}
    modules = dict(model.named_modules())
    for name in dict.fromkeys(name for name, _ in masks):
        module = modules.get(name)
        out, into = (
            int(m.sum()) if (m := masks.get((name, axis))) is not None else 0 for axis in ("out", "in")
        )
        if isinstance(module, nn.Conv2d):
            depthwise = is_depthwise(module)
            widths[name] = [out or module.out_channels, out if depthwise else into or module.in_channels]
        elif isinstance(module, nn.Linear):
            widths[name] = [out or module.out_features, into or module.in_features]
        elif isinstance(module, ChannelEquilibrium):
            widths[f"{name}.decorrelation"] = [out, out // module.decorrelation.groups]
            widths[f"{name}.reweight.fc1"] = [module.reweight.fc1.out_features, out]
            widths[f"{name}.reweight.fc2"] = [out, module.reweight.fc2.in_features]
        else:  # a norm, or the block of a bare parameter
            widths[name if module is not None else name.rpartition(".")[0]] = [out]
    return widths


def sliced_state(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """State dict of the narrow network: slices of the full one's, by index."""
    state = {}
    modules = dict(model.named_modules())
    mixers = {name: module for name, module in modules.items() if isinstance(module, ChannelEquilibrium)}
    for key, tensor in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        module = modules[owner]
        out, into = masks.get((owner, "out")), masks.get((owner, "in"))
        mixer = next((name for name in mixers if key.startswith(f"{name}.")), None)
        if mixer is not None:
            mask = masks.get((mixer, "out"))
            tensor = tensor if mask is None else _slice_mixer(key.removeprefix(f"{mixer}."), tensor, mask)
        elif (key, "out") in masks:
            tensor = _take(tensor, masks[key, "out"])
        elif isinstance(module, nn.Conv2d) and leaf == "weight":
            tensor = _slice_conv(module, tensor, out, into)
        elif isinstance(module, nn.Linear) and leaf == "weight":
            tensor = tensor if out is None else tensor[out]
            tensor = tensor if into is None else tensor[:, into]
        elif out is not None:
            tensor = _take(tensor, out)
        state[key] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return state


def _take(tensor: Tensor, mask: Tensor) -> Tensor:
    """A tensor with one axis of channels, or none (a counter)."""
    axis = next((i for i, n in enumerate(tensor.shape) if n == len(mask)), None)
    return tensor if axis is None else tensor.index_select(axis, mask.nonzero()[:, 0].to(tensor.device))


def _slice_conv(conv: nn.Conv2d, weight: Tensor, out: Tensor | None, into: Tensor | None) -> Tensor:
    out = torch.ones(conv.out_channels, dtype=torch.bool) if out is None else out
    if is_depthwise(conv):
        return weight[out]
    into = torch.ones(conv.in_channels, dtype=torch.bool) if into is None else into
    rows = weight.chunk(conv.groups)
    pairs = zip(rows, out.chunk(conv.groups), into.chunk(conv.groups), strict=True)
    return torch.cat([part[o][:, i] for part, o, i in pairs])


def _slice_mixer(leaf: str, tensor: Tensor, mask: Tensor) -> Tensor:
    """A tensor of a Channel Equilibrium layer; each of its groups keeps equally many channels."""
    if leaf == "decorrelation.running_wm":
        parts = zip(tensor, mask.view(len(tensor), -1), strict=True)
        return torch.stack([matrix[m][:, m] for matrix, m in parts])
    if leaf == "reweight.fc1.weight":
        return tensor[:, mask]
    return tensor[mask] if leaf == "reweight.fc2.weight" else tensor


def narrowed(model: nn.Module, masks: Masks) -> nn.Module:
    """The narrow network, as a copy.

    Raises:
        UsageError: The widths do not fit together; names the layer.
    """
    small = copy.deepcopy(model)
    apply_widths(small, widths_of(model, masks))
    small.load_state_dict(sliced_state(model, masks))
    return small


@torch.no_grad()
def zeroed(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy of the full network in which nothing reads the removed channels."""
    copied = copy.deepcopy(model)
    for (name, axis), mask in masks.items():
        module = dict(copied.named_modules()).get(name)
        if isinstance(module, ChannelEquilibrium):
            wm = module.decorrelation.running_wm
            wm *= mask.view(len(wm), 1, -1).to(wm)
            module.reweight.fc1.weight *= mask.to(module.reweight.fc1.weight)
        elif isinstance(module, nn.Linear) and axis == "in":
            module.weight *= mask.to(module.weight)
        elif isinstance(module, nn.Conv2d) and axis == "in":
            columns = mask.view(module.groups, 1, -1, 1, 1).to(module.weight)
            module.weight.view(module.groups, -1, *module.weight.shape[1:]).mul_(columns)
    return copied


@torch.no_grad()
def check_same(model: nn.Module, small: nn.Module, masks: Masks, size: tuple[int, int]) -> None:
    """Check on random images, in 64 bits, that a narrow network is the full one without the removed channels.

    Raises:
        UsageError: It is not: the couplings are more than what was found.
    """
    if not masks:
        return
    first = next(model.parameters())
    channels = getattr(model, "in_chans", 3)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, channels, *size, generator=generator, dtype=torch.float64).to(first.device)
    ours, theirs = (copy.deepcopy(net).double().eval()(image) for net in (small, zeroed(model, masks)))
    if ours.shape != theirs.shape:
        raise UsageError(
            "the narrow network puts out other features than the full one, which has no classifier.\n"
            "  Nothing was pruned."
        )
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    if not error <= _TOLERANCE:
        raise UsageError(
            "the narrow network is not the full one without the removed channels: its outputs are off by "
            f"{float(error):.1e} of the largest.\n  Nothing was pruned."
        )


def tried(model: nn.Module, groups: Sequence[Group], size: tuple[int, int]) -> list[Group]:
    """The groups, after each that has no reason against it was cut by a channel per chunk and compared.

    All of them are tried at once; one by one only if that fails, to find out which of them are to blame.

    Args:
        model: The network.
        groups: Of the network.
        size: Height and width of an image.
    """
    good = [group for group in groups if not group.reason]
    if not _blame(model, good, size):
        return list(groups)
    found = {group.root: _blame(model, [group], size) for group in good}
    if not any(found.values()):  # each alone is right
        found = dict.fromkeys(found, "the layers around it mix channels in a way that was not followed")
    return [replace(group, reason=group.reason or found[group.root]) for group in groups]


def _blame(model: nn.Module, groups: Sequence[Group], size: tuple[int, int]) -> str:
    """Why the groups cannot be cut; empty if they can."""
    kept = {}
    for group in groups:
        length = group.channels // group.chunks
        if length > 1:
            places = torch.arange(group.channels)
            kept[group.root] = places[places % length != length // 2]
    masks = masks_of(model, groups, kept)
    try:
        check_same(model, narrowed(model, masks), masks, size)
    except UsageError as error:
        return str(error).partition("\n")[0].rstrip(".")
    return ""
