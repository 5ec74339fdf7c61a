"""Channels that can only go together, as groups: which layers make them and which take them.

Torch-Pruning (extra ``chanzoo[prune]``) reads the couplings off one traced forward; nothing else of it is
used, and nothing outside this file knows it. What it cannot see, or what may not be cut, is marked with the
reason.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ChanzooError, UsageError
from ..layers import ChannelEquilibrium

__all__ = ["Group", "Slot", "find_groups", "is_depthwise", "require_torch_pruning"]

_JOINT_NORMS = ("LayerNorm", "GroupNorm", "RmsNorm", "GlobalResponseNorm", "LocalResponseNorm")


@dataclass(frozen=True)
class Slot:
    """Where a group's channels are in one module.

    Attributes:
        name: Path of the module, or of a parameter that a block holds directly.
        axis: ``"out"`` for what the module puts out (and for norms, whose channels come and go alike),
            ``"in"`` for what a convolution or linear layer takes.
        index: Position of each channel along that axis.
        root: The group's channel that it is.
    """

    name: str
    axis: str
    index: Tensor
    root: Tensor


@dataclass(frozen=True)
class Group:
    """Channels that stay or go in all their slots alike.

    Attributes:
        root: Convolution that the group is named after, the first to put the channels out.
        channels: How many.
        slots: Where they are.
        convs: Convolutions that make them as maps, in the order of the forward. Depthwise ones, and those
            that put out single pixels (squeeze and excitation), follow and are not here.
        chunks: Runs of equal length that have to keep equally many channels (grouped convolutions, groups of
            batch decorrelation).
        is_head: Whether they are the features that the classifier gets.
        reason: Why they cannot be cut; empty if they can.
    """

    root: str
    channels: int
    slots: tuple[Slot, ...]
    convs: tuple[str, ...]
    chunks: int = 1
    is_head: bool = False
    reason: str = ""


def require_torch_pruning() -> Any:
    """The library that finds the couplings.

    Raises:
        ChanzooError: It is not installed; says how to get it.
    """
    try:
        import torch_pruning
    except ImportError:
        raise ChanzooError(
            "finding coupled channels needs Torch-Pruning, which is not installed.\n"
            '  Install it: python -m pip install "chanzoo[prune]"   (loading a pruned network goes without)'
        ) from None
    return torch_pruning


def find_groups(model: nn.Module, size: tuple[int, int]) -> list[Group]:
    """Groups of coupled channels of a CNN, in the order of the forward.

    Args:
        model: With timm's model contract; left untouched, nothing is computed.
        size: Height and width of an image.

    Raises:
        UsageError: The network has no convolution whose outputs could be cut, or cannot be traced.
        ChanzooError: Torch-Pruning is not installed.
    """
    library = require_torch_pruning()
    ghost: Any = copy.deepcopy(model).to("meta").eval()
    for parameter in ghost.parameters():
        parameter.requires_grad_(True)  # the couplings are read from the graph of gradients
    for name, module in list(ghost.named_modules()):
        if isinstance(module, ChannelEquilibrium):  # keeps every channel in its place, as a norm does
            stand_in = nn.BatchNorm2d(module.decorrelation.channels, device="meta").eval()
            ghost.set_submodule(name, stand_in)
    channels = (
        getattr(model, "in_chans", None)
        or (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3,))[0]
    )
    image = torch.empty(2, channels, *size, device="meta")
    order, single = _order(ghost, image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on parameters it finds, which are read off its result
        try:
            graph = library.DependencyGraph().build_dependency(ghost, example_inputs=image)
            found = list(graph.get_all_groups(ignored_layers=_heads(ghost), root_module_types=[nn.Conv2d]))
        except Exception as error:  # whatever it raises on what it cannot follow
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"the couplings of {type(model).__name__}'s channels cannot be traced: {text}\n"
                "  Nothing was pruned."
            ) from error
    names = {id(module): name for name, module in ghost.named_modules()}
    names |= {id(parameter): name for name, parameter in ghost.named_parameters()}
    groups = [_read(group, names, order, single, model) for group in found]
    groups.sort(key=lambda group: order.get(group.root, len(order)))
    if not groups:
        raise UsageError(f"{type(model).__name__} has no convolution to prune.")
    return _check_overlaps(groups)


def _order(ghost: nn.Module, image: Tensor) -> tuple[dict[str, int], set[str]]:
    """Position of each module's first call in the forward, and the modules that put out single pixels."""
    order: dict[str, int] = {}
    single: set[str] = set()

    def watch(name: str, module: nn.Module) -> list[Any]:
        def before(_module: nn.Module, _args: Any) -> None:
            order.setdefault(name, len(order))

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.shape[2:].numel() == 1:
                single.add(name)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    handles = [handle for name, module in ghost.named_modules() if name for handle in watch(name, module)]
    try:
        with torch.no_grad():
            ghost(image)
    finally:
        for handle in handles:
            handle.remove()
    return order, single


def _read(
    found: Any, names: dict[int, str], order: dict[str, int], single: set[str], model: nn.Module
) -> Group:
    """One of the library's groups as ours."""
    pairs: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    reason = ""
    for item in found:
        name = names.get(id(item.dep.target.module))
        if name is None:
            continue  # an operation without tensors of its own
        axis = "in" if item.dep.pruning_fn.__name__ == "prune_in_channels" else "out"
        for index, root in zip(item.idxs, item.root_idxs, strict=True):
            if pairs[name, axis].setdefault(index, root) != root:
                reason = reason or f'layer "{name}" couples several channels of its input with one another'
    slots = tuple(
        Slot(name, axis, torch.tensor(list(pair)), torch.tensor(list(pair.values())))
        for (name, axis), pair in sorted(pairs.items(), key=lambda item: order.get(item[0][0], -1))
    )
    modules = dict(model.named_modules())
    convs, chunks, channels = [], 1, len(found[0].idxs)
    for slot in slots:
        module = modules.get(slot.name)
        split = _split(module, slot.axis)
        if isinstance(module, nn.Conv2d) and slot.axis == "out" and not is_depthwise(module):
            if slot.name not in single:
                convs.append(slot.name)
            if len(slot.index) != module.out_channels:
                reason = reason or (
                    f'layer "{slot.name}" has {module.out_channels} channels, of which {len(slot.index)} are '
                    "coupled with others: a shortcut that pads or cuts channels"
                )
        elif any(norm in type(module).__name__ for norm in _JOINT_NORMS):
            reason = reason or (
                f'layer "{slot.name}" ({type(module).__name__}) normalises its channels together: without '
                "one the others change"
            )
        if split > 1:
            finer, coarser = max(chunks, split), min(chunks, split)
            whole = torch.equal(slot.root.sort().values, torch.arange(channels))
            if finer % coarser or channels % finer or not whole:
                reason = reason or f'layer "{slot.name}" works on groups of channels that others do not share'
            chunks = finer
    if not convs:
        reason = (
            reason or f'layer "{slots[0].name}" puts out single pixels, which have no maps to judge it by'
        )
    heads = {name for name, module in modules.items() if any(module is head for head in _heads(model))}
    return Group(
        root=convs[0] if convs else slots[0].name,
        channels=channels,
        slots=slots,
        convs=tuple(convs),
        chunks=chunks,
        is_head=any(slot.axis == "in" and slot.name in heads for slot in slots),
        reason=reason,
    )


def _heads(model: Any) -> list[nn.Module]:
    head = model.get_classifier()
    return list(head) if isinstance(head, (tuple, list)) else [head]


def is_depthwise(module: nn.Module | None) -> bool:
    """Whether a module is a convolution of each channel for itself: it puts out the channels that it gets."""
    if not isinstance(module, nn.Conv2d):
        return False
    return module.groups == module.in_channels == module.out_channels > 1


def _split(module: nn.Module | None, axis: str) -> int:
    """Into how many groups a module divides its channels."""
    if isinstance(module, ChannelEquilibrium):
        return module.decorrelation.groups
    if isinstance(module, nn.Conv2d) and not is_depthwise(module):
        return module.groups
    return 1


def _check_overlaps(groups: list[Group]) -> list[Group]:
    """Mark groups that claim the same channel of the same layer."""
    owners: dict[tuple[str, str, int], set[int]] = defaultdict(set)
    for number, group in enumerate(groups):
        for slot in group.slots:
            for index in slot.index.tolist():
                owners[slot.name, slot.axis, index].add(number)
    shared = {number: place[0] for place, claims in owners.items() if len(claims) > 1 for number in claims}
    return [
        replace(group, reason=group.reason or f'layer "{shared[number]}" belongs to two groups of channels')
        if number in shared
        else group
        for number, group in enumerate(groups)
    ]
