"""Sparse feature reactivation for any CNN: where old maps pass a module unchanged, its new ones refresh them.

The layer is that of Yang et al., "CondenseNet V2: Sparse Feature Reactivation for Deep Networks" (CVPR 2021,
arXiv:2104.04382), who put it into their own network and ShuffleNet V2. Which maps pass is found by trial, so
it fits dense layers that concatenate, units of two branches, with or without a shuffle, and the dense layers
of timm's and torchvision's DenseNets, which share a list of maps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..layers._trial import ghost_of
from ..layers.condensing import CondensingProgress, follow_progress
from ..layers.learned_group import CondensedReactivation, SparseReactivation
from .condensenet import CondensingLayer
from .shufflenetv2 import ShuffleUnit

__all__ = ["Reactivated", "add_reactivation"]

_LAYERS = (SparseReactivation, CondensedReactivation)
_READY = (CondensingLayer, ShuffleUnit)  # run the layer by themselves once they have one
_CONTAINERS = (nn.Sequential, nn.ModuleDict)  # run whatever is put into them
_TRIAL_SIZE = 64  # pixels
_PROOF = 4  # values that must agree, and their negatives, for a map to be the same; fewer could by chance
_SHOWN = 4  # names in a message


def add_reactivation(
    model: nn.Module,
    pattern: str | Iterable[str],
    *,
    exclude: str | Iterable[str] = (),
    groups: int | None = None,
    condensation_factor: int | None = None,
    group_lasso: float = 0.0,
    total_steps: int | None = None,
    condensed: bool = False,
    example: Tensor | None = None,
) -> list[str]:
    """Put a sparse reactivation into every module that carries maps through beside new ones, in place.

    Afterwards such a module puts out its old maps plus an update by its new ones. All names stay; those of
    the layer start with ``<module>.sfr.``, and ``progress.train_step`` counts the training forwards. Only a
    module that is itself a container (``Sequential``, ``ModuleDict``) moves down one, to ``<module>.body``.

    The convolutions of the layers start with zeros, which have a gradient: at first the network computes what
    it did. So load pretrained weights before this call, and weights of the changed network after the same
    call on a fresh one, with ``condensed=True`` for those of the form that :func:`chanzoo.condense` makes of
    it when trained. The random state is left as it was. A network that counted its training already starts
    anew at 0; what it dropped stays dropped. In modules that are not ours a hook runs the layer, which
    cannot be scripted.

    Args:
        model: Any network of maps ``(b, c, h, w)``.
        pattern: Shell glob, or several, over the names of ``model.named_modules()``; ``*`` crosses dots. What
            matches but carries nothing through is passed over as long as something does; of modules within
            each other the inner ones are taken.
        exclude: Globs over the names to leave out.
        groups: The paper's G; the largest of 8, 4, 2 and 1 that divides both old and new maps if not given.
        condensation_factor: The paper's C; ``groups`` if not given.
        group_lasso: As of :class:`chanzoo.layers.LearnedGroupConv2d`.
        total_steps: Training forwards in all (epochs × batches per epoch). Masks stay as they are if not
            given, now or in an earlier call.
        condensed: Put in layers of the condensed form, to load tensors of that.
        example: Input to try the network with, if it takes no images of 64×64 or its own size. Only its shape
            and type matter.

    Returns:
        Names of the modules that got a layer, in the order of the network.

    Raises:
        UsageError: A pattern matches no module or none that carries maps through, everything is excluded, a
            module has a layer already or another part ``sfr``, groups or factor do not divide its maps,
            ``total_steps`` is no number of steps or was given for the condensed form, or the network does
            not run. It is not changed then.

    Source:
        arXiv:2104.04382, section 3.2.

    Example:
        >>> import timm
        >>> net = timm.create_model("shufflenetv2_x0_5")
        >>> add_reactivation(net, "stage2.*", total_steps=1000)
        ['stage2.1', 'stage2.2', 'stage2.3']
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    excluded = [exclude] if isinstance(exclude, str) else list(exclude)
    names = [name for name, _ in model.named_modules() if name]
    for glob in patterns:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UsageError(_no_match(model, f'no module is called "{glob}"', names, example))
    matched = [name for name in names if _matches(name, patterns)]
    for name in matched:
        if not _matches(name, excluded):
            _check_free(model, name)
    carriers = _find_carriers(model, matched, example)
    for glob in patterns:
        if not any(fnmatchcase(name, glob) for name in carriers):
            what = f'no module called "{glob}" carries maps through unchanged beside new ones'
            raise UsageError(_no_match(model, what, names, example))
    chosen = {name: carried for name, carried in carriers.items() if not _matches(name, excluded)}
    chosen = {n: carried for n, carried in chosen.items() if not any(o.startswith(f"{n}.") for o in chosen)}
    if not chosen:
        raise UsageError(_no_match(model, "every matched module is excluded", names, example))
    earlier = _check_progress(model, total_steps)
    if condensed and (total_steps is not None or group_lasso):
        raise UsageError(
            "total_steps and group_lasso belong to the training form: the condensed one drops nothing.\n"
            "  The network is unchanged."
        )
    make: Any = CondensedReactivation if condensed else partial(SparseReactivation, group_lasso=group_lasso)
    with torch.random.fork_rng(devices={p.device.index for p in model.parameters() if p.is_cuda}):
        layers = {
            name: _layer(model, name, carried, make, groups, condensation_factor)
            for name, carried in chosen.items()
        }
    for name, carried in chosen.items():
        _insert(model, name, layers[name], carried)
    network: Any = model
    if getattr(network, "learns_connections", False):
        network.learns_connections = False  # as far as its arguments say
    if not condensed:
        if earlier is not None:
            earlier.train_step.zero_()
            total_steps = earlier.total_steps if total_steps is None else total_steps
        follow_progress(model, total_steps)
    return list(chosen)


class Reactivated(nn.Module):
    """Stands in for a container, which would run the layer as if it were one of its own.

    Attributes:
        body: The container.
        sfr: The layer; a hook runs it.
    """

    def __init__(self, body: nn.Module) -> None:
        """Take the place of ``body``."""
        super().__init__()
        self.body = body

    def forward(self, x: Any) -> Any:
        """What the container makes of it.

        Shape:
            As of the container.
        """
        return self.body(x)


class _Carried(NamedTuple):
    """How many maps are old and how many new; their places in the output, None if they share a list."""

    old_channels: int
    new_channels: int
    places: tuple[slice | list[int], slice | list[int]] | None = None


class _Refresh:
    """Hook behind a module that puts out old maps and new ones: refreshes the old."""

    def __init__(self, old: slice | list[int], new: slice | list[int]) -> None:
        self.old, self.new = old, new

    def __call__(self, module: Any, _args: Any, output: Tensor) -> Tensor:
        refreshed = output.clone()
        update = module.sfr(output[:, self.new], output[:, self.old])
        refreshed[:, self.old] = update.to(output.dtype)
        return refreshed


def _refresh_list(module: Any, args: tuple[list[Tensor]], output: Tensor) -> None:
    """Hook behind a module that reads a list of maps, to which its caller appends the new ones."""
    features = args[0]
    features[:] = [module.sfr(output, torch.cat(features, dim=1))]


def _find_carriers(model: nn.Module, names: list[str], example: Tensor | None) -> dict[str, _Carried]:
    """Those of the named modules that carry maps through beside new ones."""
    calls = _trial(model, names, example)
    found = {}
    for name in (name for name in names if name in calls):
        given, channels, output = calls[name]
        if isinstance(given, Tensor):
            carried = _carried(model.get_submodule(name), given.shape)
            if carried is not None:
                found[name] = carried
        elif any(maps is output for maps in given):  # appended since
            found[name] = _Carried(channels, output.shape[1])
    return found


def _trial(model: nn.Module, names: list[str], example: Tensor | None) -> dict[str, tuple[Any, int, Tensor]]:
    """Run the network without memory or arithmetic.

    Returns:
        Name → maps or list of maps that went in, their channels at that time, maps that came out; of modules
        that leave the size of the maps as it is.
    """
    reason = ""
    for images in _images(model, example):
        calls: dict[str, tuple[Any, int, Tensor]] = {}
        ghost = ghost_of(model)
        for name in names:
            ghost.get_submodule(name).register_forward_hook(_recorder(name, calls), with_kwargs=True)
        try:
            with torch.no_grad():
                ghost(images)
        except Exception as error:  # whatever a network raises on images that do not fit
            reason = f"{list(images.shape)}: {(str(error).splitlines() or [type(error).__name__])[0]}"
        else:
            return calls
    raise UsageError(
        f"{type(model).__name__} does not run on images {reason}\n"
        "  Pass a batch that it takes as example=.   The network is unchanged."
    )


def _images(model: nn.Module, example: Tensor | None) -> Iterator[Tensor]:
    """Batches to try."""
    if example is not None:
        yield torch.empty_like(example, device="meta")
        return
    cfg = getattr(model, "pretrained_cfg", None) or {}
    own = tuple(cfg.get("input_size") or (3, 224, 224))[-2:]
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    channels = getattr(model, "in_chans", None) or (convs[0].in_channels if convs else 3)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for size in [own] if cfg.get("fixed_input_size") else [(_TRIAL_SIZE, _TRIAL_SIZE), own]:
        yield torch.empty(2, channels, *size, device="meta", dtype=dtype)


def _recorder(name: str, calls: dict[str, tuple[Any, int, Tensor]]) -> Any:
    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if len(args) != 1 or kwargs:
            return
        maps = args[0] if isinstance(args[0], list) else [args[0]]
        for each in (*maps, output):
            if not isinstance(each, Tensor) or each.dim() != 4 or each.shape[2:] != output.shape[2:]:
                return
        calls.setdefault(name, (args[0], sum(each.shape[1] for each in maps), output))

    return hook


@torch.no_grad()
def _carried(module: nn.Module, shape: torch.Size) -> _Carried | None:
    """Which outputs of a module are inputs, whatever its weights; None if none or all are."""
    random = torch.Generator().manual_seed(0)
    probe: Any = copy.deepcopy(module).eval()
    tensors = [*probe.parameters(), *probe.buffers()]
    bare = any(tensor.is_meta for tensor in tensors)
    probe = probe.to_empty(device="cpu") if bare else probe.cpu()
    probe.float()
    for tensor in chain(probe.parameters(), probe.buffers() if bare else ()):
        # Positive, so that no gate is open for negative maps, and no map of an activation comes out whole.
        tensor.copy_(torch.rand(tensor.shape, generator=random) * 0.09 + 0.01)
    maps = torch.rand(-(-_PROOF // shape[2:].numel()), *shape[1:], generator=random) + 0.5
    maps = torch.cat([maps, -maps])
    inputs = {each.numpy().tobytes() for each in maps.unbind(1)}  # before the module can change it in place
    output = probe(maps).contiguous()
    old, new = [], []
    for i, each in enumerate(output.unbind(1)):
        (old if each.numpy().tobytes() in inputs else new).append(i)
    if not old or not new:
        return None
    return _Carried(len(old), len(new), (_places(old), _places(new)))


def _places(indices: list[int]) -> slice | list[int]:
    """The same as a slice if the steps are equal."""
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    regular = range(indices[0], indices[-1] + 1, step)
    return slice(regular.start, regular.stop, step) if indices == list(regular) else indices


def _check_free(model: nn.Module, name: str) -> None:
    """Raise if a module cannot take a layer."""
    part = getattr(model.get_submodule(name), "sfr", None)
    if isinstance(part, _LAYERS) or isinstance(model.get_submodule(name.rpartition(".")[0]), Reactivated):
        raise UsageError(f'module "{name}" has a reactivation already.\n  The network is unchanged.')
    if part is not None:
        raise UsageError(f'module "{name}" has a part "sfr" of its own.\n  The network is unchanged.')


def _check_progress(model: nn.Module, total_steps: int | None) -> CondensingProgress | None:
    """Raise if the network cannot count with ``total_steps``; what it counts with so far."""
    CondensingProgress(total_steps)
    earlier = getattr(model, "progress", None)
    if earlier is not None and not isinstance(earlier, CondensingProgress):
        raise UsageError(
            f'{type(model).__name__} has a part "progress" of its own.\n  The network is unchanged.'
        )
    return earlier


def _layer(
    model: nn.Module, name: str, carried: _Carried, make: Any, groups: int | None, factor: int | None
) -> SparseReactivation | CondensedReactivation:
    module = model.get_submodule(name)
    old, new = carried.old_channels, carried.new_channels
    tensors = chain(module.parameters(), module.buffers(), model.parameters())
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    groups = math.gcd(old, new, 8) if groups is None else groups
    try:
        layer = make(new, old, groups, factor, device=like.device, dtype=like.dtype)
    except UsageError as error:
        raise UsageError(
            f'module "{name}" has {old} old maps and {new} new ones: {error}\n  The network is unchanged.'
        ) from error
    nn.init.zeros_(layer.weight)
    return layer.train(module.training)


def _insert(model: nn.Module, name: str, layer: nn.Module, carried: _Carried) -> None:
    module: Any = model.get_submodule(name)
    if isinstance(module, _READY):
        module.sfr = layer
        return
    if isinstance(module, _CONTAINERS):
        parent, _, leaf = name.rpartition(".")
        module = Reactivated(module).train(module.training)
        setattr(model.get_submodule(parent), leaf, module)
    module.sfr = layer
    module.register_forward_hook(_Refresh(*carried.places) if carried.places else _refresh_list)


def _matches(name: str, globs: list[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _no_match(model: nn.Module, what: str, names: list[str], example: Tensor | None) -> str:
    there = list(_find_carriers(model, names, example))
    shown = ", ".join(there[:_SHOWN]) + (f", … ({len(there)} in all)" if len(there) > _SHOWN else "")
    kind = type(model).__name__
    return (
        f"{what} in {kind}.\n  there are  {shown or 'none that could get one'}\n  The network is unchanged."
    )
