"""Channel Equilibrium for any timm network: a layer behind every norm whose name matches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

import torch
from timm.layers import GroupNorm1, LayerNorm2d, RmsNorm2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from ..errors import UsageError
from ..layers import ChannelEquilibrium, EquilibriumAct

__all__ = ["add_channel_equilibrium"]

_CHANNEL_NORMS = (
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm2d,
    FrozenBatchNorm2d,
    GroupNorm1,
    LayerNorm2d,
    RmsNorm2d,
)
_SHOWN = 4  # names in a message


def add_channel_equilibrium(
    model: nn.Module,
    pattern: str | Iterable[str],
    *,
    exclude: str | Iterable[str] = (),
    group_size: int = 16,
    reduction: int = 4,
    sync: bool = False,
) -> list[str]:
    """Put a Channel Equilibrium layer behind the norms of a network, in place.

    A norm with an activation (timm's norm-act layers) gets the layer between the two: its own names stay,
    the layer's start with ``<norm>.act.ce.``. A plain norm becomes ``Sequential(norm, layer)``: its names
    change from ``<norm>.weight`` to ``<norm>.0.weight``, the layer's start with ``<norm>.1.``. So load
    plain pretrained weights before this call, and weights of the changed network after the same call on a
    fresh one. The random state is left as it was.

    Args:
        model: Any network whose norms see maps ``(b, c, h, w)``.
        pattern: Shell glob, or several, over the names of norm layers, as in ``model.named_modules()``;
            ``*`` crosses dots.
        exclude: Globs over the names to leave out.
        group_size: Channels per decorrelated group; halved until it divides the channels of a norm.
        reduction: Channels per hidden feature of the re-weighting.
        sync: Share statistics between processes in training.

    Returns:
        Names of the norms that got a layer, in the order of the network.

    Raises:
        UsageError: A pattern matches no norm, everything matched is excluded, a matched norm is not one of
            the channels of 2-D maps, or it has a layer already. The network is not changed then.
        ValueError: ``group_size`` is below 1. Likewise.

    Source:
        arXiv:2003.00214: the layer sits between a norm and its activation.

    Example:
        >>> import timm
        >>> net = timm.create_model("regnetx_002")
        >>> add_channel_equilibrium(net, "s1.*.conv2.bn")
        ['s1.b1.conv2.bn']
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    excluded = [exclude] if isinstance(exclude, str) else list(exclude)
    norms = dict(_norms(model))
    for glob in patterns:
        if not any(fnmatchcase(name, glob) for name in norms):
            raise UsageError(_no_match(model, f'no norm layer is called "{glob}"', norms))
    chosen = {name: norm for name, norm in norms.items() if _matches(name, patterns)}
    chosen = {name: norm for name, norm in chosen.items() if not _matches(name, excluded)}
    if not chosen:
        raise UsageError(_no_match(model, "every matched norm layer is excluded", norms))
    for name, norm in chosen.items():
        if _has_layer(model, name, norm):
            raise UsageError(
                f'norm layer "{name}" has a Channel Equilibrium layer already.\n  The network is unchanged.'
            )
        if not isinstance(norm, _CHANNEL_NORMS):
            raise UsageError(
                f'norm layer "{name}" ({type(norm).__name__}) is no norm of the channels of 2-D maps, '
                "which Channel Equilibrium needs.\n"
                "  Leave it out with exclude=.   The network is unchanged."
            )
    with torch.random.fork_rng(devices=[]):
        layers = {
            name: ChannelEquilibrium(
                _channels(norm), group_size=group_size, reduction=reduction, sync=sync, **_place(norm, model)
            ).train(norm.training)
            for name, norm in chosen.items()
        }
    for name, norm in chosen.items():
        _insert(model, name, norm, layers[name])
    return list(chosen)


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and norm layers; one that got a layer in its slot goes by the name of the slot."""
    modules = dict(model.named_modules())
    ours = tuple(f"{name}." for name, module in modules.items() if isinstance(module, ChannelEquilibrium))
    for name, module in modules.items():
        if name and _is_norm(module) and not name.startswith(ours):
            slot = name.rpartition(".")[0]
            yield (slot if _is_slot(modules.get(slot)) else name), module


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is called a norm and holds none (timm calls a whole stage part ``ConvNormAct``)."""
    return "Norm" in type(module).__name__ and not any(_is_norm(child) for child in module.children())


def _is_slot(module: nn.Module | None) -> bool:
    """Whether a module is what :func:`_insert` makes of a plain norm."""
    return (
        isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[1], ChannelEquilibrium)
    )


def _has_layer(model: nn.Module, name: str, norm: nn.Module) -> bool:
    return _is_slot(model.get_submodule(name)) or isinstance(getattr(norm, "act", None), EquilibriumAct)


def _matches(name: str, globs: list[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _channels(norm: nn.Module) -> int:
    for attribute in ("num_features", "num_channels"):
        if isinstance(channels := getattr(norm, attribute, None), int):
            return channels
    sized: Any = norm.normalized_shape if hasattr(norm, "normalized_shape") else norm.weight.shape
    return int(sized[0])


def _place(norm: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Device and type of a norm; those of the network for a norm without tensors."""
    tensors = chain(norm.parameters(), norm.buffers(), model.parameters(), model.buffers())
    tensor = next((t for t in tensors if t.is_floating_point()), None)
    return {} if tensor is None else {"device": tensor.device, "dtype": tensor.dtype}


def _insert(model: nn.Module, name: str, norm: nn.Module, layer: ChannelEquilibrium) -> None:
    if isinstance(act := getattr(norm, "act", None), nn.Module):
        norm.act = EquilibriumAct(layer, act).train(norm.training)
        return
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Sequential(norm, layer).train(norm.training))


def _no_match(model: nn.Module, what: str, norms: dict[str, nn.Module]) -> str:
    names = list(norms)
    there = ", ".join(names[:_SHOWN]) + (f", … ({len(names)} in all)" if len(names) > _SHOWN else "")
    return f"{what} in {type(model).__name__}.\n  there are  {there or 'none'}\n  The network is unchanged."
