"""Widths of a built network: read what was narrowed, and narrow the same places in a fresh one.

A pruned network is described by a table, module name → sizes: ``[out, in]`` for a convolution or a linear
layer, ``[n]`` for a norm and for any other module with one value per channel (layer scale, the blocks of
ConvNeXt), ``[channels, group_size]`` for batch decorrelation. Only what differs from the full network is
listed. Sizes say nothing about which channels were kept: that is in the weights.

What the network remembers about its widths besides its tensors follows: groups of depthwise convolutions,
``num_features``, ``feature_info`` and their kind. A module that keeps more than that, such as a shortcut that
pads, has a method ``follow_widths()``, which is called when layers inside have been narrowed. A table is
tried out on a copy without memory first.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from timm.layers import BlurPool2d, MixedConv2d
from torch import nn

from ..errors import UsageError
from ._sizes import (
    CONVS,
    classifiers_of,
    concats_of,
    form_of,
    indivisible,
    is_depthwise,
    own_tensors,
    owners,
    resize,
    say_shapes,
    shapes_at,
    sizes_of,
    stems_of,
)
from ._trial import UNTOUCHED, MisfitError, Trial, first_trial, ghost_of, name_of
from .decorrelation import BatchDecorrelation, block_size

__all__ = ["apply_widths", "check_cnn", "fill_widths", "read_widths"]

# Blocks that cut their maps into pieces of a remembered size: attribute, the convolution it comes from.
_PIECES = {
    "Bottle2neck": ("width", "convs.0", "in_channels"),  # Res2Net
    "DlaBottle2neck": ("width", "convs.0", "in_channels"),
    "CrossStage": ("expand_chs", "conv_exp.conv", "out_channels"),  # CSPNet
    "CrossStage3": ("expand_chs", "conv_exp.conv", "out_channels"),
}


def read_widths(model: nn.Module, base_model: nn.Module) -> dict[str, list[int]]:
    """Where a network is narrower than the one it was made from.

    Args:
        model: The narrowed network.
        base_model: The full one, with the same names of modules; it may be on the ``meta`` device.

    Returns:
        Module name → sizes, for :func:`apply_widths`; empty for equal networks. The classifier's inputs are
        those of plain pooling, also where pooling is concatenated (``catavgmax``).

    Raises:
        UsageError: The two differ in other ways than widths: in names, kernels, or groups of a convolution
            that is not depthwise.
    """
    ours, theirs = dict(owners(model)), dict(owners(base_model))
    if ours.keys() != theirs.keys():
        name = min(ours.keys() ^ theirs.keys())
        raise UsageError(
            f'layer "{name}" is in one of the two networks only: widths describe a network with the layers '
            "of its base.\n  Nothing was recorded."
        )
    widths: dict[str, list[int]] = {}
    classifier = classifiers_of(model)
    for name, module in ours.items():
        base = theirs[name]
        new, old = sizes_of(module), sizes_of(base)
        if len(old) == 1 and not new:
            new = [1]  # a single channel leaves no axis to read
        if new and old and new != old:
            widths[name] = [new[0], new[1] // concats_of(model)] if name in classifier else new
            expected = shapes_at(base, new)
        else:
            expected = {key: tuple(t.shape) for key, t in own_tensors(base).items()}
        found = {key: tuple(t.shape) for key, t in own_tensors(module).items()}
        groups = getattr(module, "groups", None)
        if expected != found or (
            isinstance(base, CONVS) and not is_depthwise(base) and groups != base.groups
        ):
            raise UsageError(
                f'layer "{name}" ({type(module).__name__}) differs from the base\'s by more than its width.\n'
                f"  expected  {say_shapes(expected)}, groups={getattr(base, 'groups', 1)}\n"
                f"  found     {say_shapes(found)}, groups={groups or 1}\n"
                "  Nothing was recorded."
            )
    return widths


def apply_widths(model: nn.Module, widths: Mapping[str, Any]) -> None:
    """Narrow a network to a table of widths, in place.

    Each tensor keeps its first entries; load weights afterwards. Depthwise convolutions stay depthwise, other
    group counts stay. The inputs of the stem and the outputs of the classifier stay as built, whatever the
    table says of them, so that a table serves any ``in_chans`` and ``num_classes``; without a classifier its
    entry is passed over. ``num_features``, ``head_hidden_size``, ``feature_info`` and what blocks and heads
    remember follow.

    Args:
        model: A CNN that keeps timm's model contract.
        widths: Module name → sizes, as from :func:`read_widths`. For batch decorrelation ``[channels]`` alone
            takes the largest group size that the constructor would.

    Raises:
        UsageError: A name or size cannot be, or the widths do not fit together. The network is not changed
            then: the table is tried out without memory, on images of 64×64 or the network's own size.
    """
    if not isinstance(widths, Mapping):
        raise UsageError(
            f"widths is {type(widths).__name__}: expected a table, module name → sizes.\n  {UNTOUCHED}"
        )
    if not widths:
        return
    table = _check(model, widths)
    full, size = first_trial(model)
    ghost = ghost_of(model)
    for name, sizes in table.items():
        resize(ghost.get_submodule(name), sizes)
    _follow(ghost)
    narrow = Trial(ghost, full)
    try:
        narrow.run(size)
    except MisfitError as error:
        raise UsageError(f"the widths do not fit together: {error}\n  {UNTOUCHED}") from error
    for name, sizes in table.items():
        resize(model.get_submodule(name), sizes)
    _follow(model)
    for (name, attribute), value in narrow.remembered.items():
        setattr(model.get_submodule(name), attribute, value)
    _keep_books(model, full, narrow)


def fill_widths(model: nn.Module, outputs: Mapping[str, int]) -> dict[str, list[int]]:
    """Complete a table of widths from the outputs of some convolutions.

    The network is run without memory, and each layer adapts to the channels that it gets when its turn comes:
    inputs, norms, depthwise convolutions, the classifier. Outputs that are not given stay. Layers of Channel
    Equilibrium do not adapt.

    Args:
        model: A CNN that keeps timm's model contract; not changed.
        outputs: Name of a convolution → channels that it puts out.

    Returns:
        Module name → sizes, for :func:`apply_widths`.

    Raises:
        UsageError: A name or number cannot be, or the widths do not fit together, as where maps of different
            widths are added; names the layer.
    """
    modules = dict(model.named_modules())
    for name, count in outputs.items():
        conv = modules.get(name)
        if not isinstance(conv, CONVS) or is_depthwise(conv):
            raise UsageError(
                f'{name_of(model)} has no convolution "{name}" with outputs of its own.\n  {UNTOUCHED}'
            )
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= conv.out_channels:
            raise UsageError(
                f'layer "{name}" cannot put out {count!r} channels: expected 1 to {conv.out_channels}.\n'
                f"  {UNTOUCHED}"
            )
    full, size = first_trial(model)
    ghost = ghost_of(model)
    _follow(ghost)
    narrow = Trial(ghost, full, outputs)
    try:
        narrow.run(size)
    except MisfitError as error:
        raise UsageError(f"the widths do not fit together: {error}\n  {UNTOUCHED}") from error
    _keep_books(ghost, full, narrow)
    return read_widths(ghost, model)


def check_cnn(model: nn.Module) -> None:
    """Check that a network can be narrowed at all.

    Args:
        model: On any device; it is run without memory.

    Raises:
        UsageError: It does not keep timm's contract, or its features are no maps ``(b, num_features, h, w)``.
    """
    first_trial(model)


# Checks of single entries.


def _check(model: nn.Module, widths: Mapping[str, Any]) -> dict[str, list[int]]:
    """The table as it holds for this network, or an error that names the entry."""
    modules = dict(model.named_modules())
    stems, classifier, concats = stems_of(model), classifiers_of(model), concats_of(model)
    table: dict[str, list[int]] = {}
    for name, value in widths.items():
        module = modules.get(name) if isinstance(name, str) and name else None
        if module is None:
            near = difflib.get_close_matches(str(name), [n for n, m in owners(model)], n=1)
            raise UsageError(
                f'{name_of(model)} has no layer "{name}", which widths names.'
                + (f"   Did you mean {near[0]}?" if near else "")
                + f"\n  {UNTOUCHED}"
            )
        if name in classifier and isinstance(module, nn.Identity):
            continue  # built without classes
        old = sizes_of(module)
        label = f'layer "{name}" ({type(module).__name__})'
        if not old:
            held = say_shapes({key: tuple(t.shape) for key, t in own_tensors(module).items()}) or "none"
            raise UsageError(
                f"{label} cannot be narrowed: it is no convolution, linear layer or norm.\n"
                f"  it holds  {held}\n  {UNTOUCHED}"
            )
        form = form_of(module)
        lengths = (1, 2) if isinstance(module, BatchDecorrelation) else (len(old),)
        if (
            not isinstance(value, (list, tuple))
            or len(value) not in lengths
            or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in value)
        ):
            raise UsageError(
                f"{label} has widths {value!r}: expected {form}, whole numbers of 1 or more.\n  {UNTOUCHED}"
            )
        sizes = list(value)
        if name in stems and len(sizes) == 2:
            sizes[1] = old[1]
        if name in classifier and len(sizes) == 2:
            sizes = [old[0], sizes[1] * concats]
        if isinstance(module, BatchDecorrelation):
            sizes = sizes if len(sizes) == 2 else [*sizes, block_size(sizes[0], old[1])]
            limits = [old[0], sizes[0]]
        else:
            limits = old
        if any(n > limit for n, limit in zip(sizes, limits, strict=True)):
            raise UsageError(
                f"{label} has widths {sizes}: expected {form} of at most {limits}.\n  {UNTOUCHED}"
            )
        if problem := indivisible(module, sizes):
            raise UsageError(f"{label} has widths {sizes}: {problem}.\n  {UNTOUCHED}")
        table[name] = sizes
    return table


# The change itself.


def _follow(model: nn.Module) -> None:
    """Set what modules around the narrowed ones remember, where it follows from tensors."""
    for module in model.modules():
        if isinstance(module, BlurPool2d) and module.channels is not None:
            blur: Any = module
            blur.filt = blur.filt[:1].clone()  # the same filter for every channel, however many there are
            blur.channels = None
        elif isinstance(module, MixedConv2d):
            module.splits = [conv.in_channels for conv in module.values()]
        elif callable(follow := getattr(module, "follow_widths", None)):
            follow()
        elif piece := _PIECES.get(type(module).__name__):
            attribute, path, width = piece
            setattr(module, attribute, getattr(module.get_submodule(path), width))


def _keep_books(model: Any, full: Trial, narrow: Trial) -> None:
    """Set what the network says about itself, as far as the full one said the truth."""
    if model.num_features == full.features:
        model.num_features = narrow.features
    if getattr(model, "head_hidden_size", None) == full.hidden:
        model.head_hidden_size = narrow.hidden
    head = getattr(model, "head", None)
    for attribute in ("num_features", "hidden_size"):
        if isinstance(head, nn.Module) and getattr(head, attribute, None) == full.hidden:
            setattr(head, attribute, narrow.hidden)
    for level, info in enumerate(getattr(model, "feature_info", None) or ()):
        if isinstance(info, dict) and info.get("num_chs") == full.level(level, info):
            info["num_chs"] = narrow.level(level, info)
