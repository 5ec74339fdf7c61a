"""Widths of a built network: read what was narrowed, and narrow the same places in a fresh one.

A pruned network is described by a table, module name → sizes: ``[out, in]`` for a convolution or a linear
layer, ``[n]`` for a norm and for any other module with one value per channel (layer scale, the blocks of
ConvNeXt), ``[channels, group_size]`` for batch decorrelation. Only what differs from the full network is
listed. Sizes say nothing about which channels were kept: that is in the weights.

What the network remembers about its widths besides its tensors follows: groups of depthwise convolutions,
``num_features``, ``feature_info`` and their kind. A table is tried out on a copy without memory first.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from timm.layers import BlurPool2d, MixedConv2d, ScaledStdConv2d, ScaledStdConv2dSame
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import UsageError
from .decorrelation import BatchDecorrelation, block_size

__all__ = ["apply_widths", "check_cnn", "read_widths"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRIAL_SIZE = 64  # pixels
_UNTOUCHED = "The network is unchanged."

# Where blocks and heads remember how many channels come in and go out, and what they agree with.
_INPUTS, _OUTPUTS = ("in_channels", "in_chs", "in_features"), ("out_channels", "out_chs")

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
    ours, theirs = dict(_owners(model)), dict(_owners(base_model))
    if ours.keys() != theirs.keys():
        name = min(ours.keys() ^ theirs.keys())
        raise UsageError(
            f'layer "{name}" is in one of the two networks only: widths describe a network with the layers '
            "of its base.\n  Nothing was recorded."
        )
    widths: dict[str, list[int]] = {}
    classifier = _classifier(model)
    for name, module in ours.items():
        base = theirs[name]
        new, old = _sizes(module), _sizes(base)
        if len(old) == 1 and not new:
            new = [1]  # a single channel leaves no axis to read
        if new and old and new != old:
            widths[name] = [new[0], new[1] // _concats(model)] if name in classifier else new
            expected = _shapes(base, new)
        else:
            expected = {key: tuple(t.shape) for key, t in _own(base).items()}
        found = {key: tuple(t.shape) for key, t in _own(module).items()}
        groups = getattr(module, "groups", None)
        if expected != found or (
            isinstance(base, _CONVS) and not _is_depthwise(base) and groups != base.groups
        ):
            raise UsageError(
                f'layer "{name}" ({type(module).__name__}) differs from the base\'s by more than its width.\n'
                f"  expected  {_say_shapes(expected)}, groups={getattr(base, 'groups', 1)}\n"
                f"  found     {_say_shapes(found)}, groups={groups or 1}\n"
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
            f"widths is {type(widths).__name__}: expected a table, module name → sizes.\n  {_UNTOUCHED}"
        )
    if not widths:
        return
    table = _check(model, widths)
    full, size = _first_trial(model)
    ghost = _ghost(model)
    for name, sizes in table.items():
        _resize(ghost.get_submodule(name), sizes)
    _follow(ghost)
    narrow = _Trial(ghost, full)
    try:
        narrow.run(size)
    except _MisfitError as error:
        raise UsageError(f"the widths do not fit together: {error}\n  {_UNTOUCHED}") from error
    for name, sizes in table.items():
        _resize(model.get_submodule(name), sizes)
    _follow(model)
    for (name, attribute), value in narrow.remembered.items():
        setattr(model.get_submodule(name), attribute, value)
    _keep_books(model, full, narrow)


def check_cnn(model: nn.Module) -> None:
    """Check that a network can be narrowed at all.

    Args:
        model: On any device; it is run without memory.

    Raises:
        UsageError: It does not keep timm's contract, or its features are no maps ``(b, num_features, h, w)``.
    """
    _first_trial(model)


# What a module holds.


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a module itself."""
    hidden = module._non_persistent_buffers_set
    tensors = chain(module._parameters.items(), module._buffers.items())
    return {name: tensor for name, tensor in tensors if tensor is not None and name not in hidden}


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if _own(module))


def _is_depthwise(conv: Any) -> bool:
    return conv.groups > 1 and conv.groups == conv.in_channels


def _sizes(module: nn.Module) -> list[int]:
    """Sizes of a module as in a table; empty if it has none, or not of a kind that can be narrowed."""
    if isinstance(module, _CONVS):
        return [module.out_channels, module.in_channels]
    if isinstance(module, nn.Linear):
        return [module.out_features, module.in_features]
    if isinstance(module, BatchDecorrelation):
        return [module.channels, module.group_size]
    long = [[n for n in tensor.shape if n > 1] for tensor in _own(module).values()]
    found = {n for sizes in long for n in sizes}
    return [found.pop()] if len(found) == 1 and max(map(len, long)) == 1 else []


def _shapes(module: nn.Module, sizes: list[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the module's own tensors at other sizes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in _own(module).items()}
    old = _sizes(module)
    if isinstance(module, BatchDecorrelation):
        return {"running_wm": (sizes[0] // sizes[1], sizes[1], sizes[1])}
    if len(old) == 1:
        return {name: tuple(sizes[0] if n == old[0] else n for n in s) for name, s in shapes.items()}
    for name, shape in shapes.items():
        if name == "weight":
            groups = 1
            if isinstance(module, _CONVS):
                groups = sizes[1] if _is_depthwise(module) else module.groups
            shapes[name] = (sizes[0], sizes[1] // groups, *shape[2:])
        elif shape:
            shapes[name] = (sizes[0], *shape[1:])
    return shapes


def _say_shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


# The ends of a network, which the table does not rule.


def _names(value: Any) -> set[str]:
    return {value} if isinstance(value, str) else set(value or ())


def _stems(model: nn.Module) -> set[str]:
    """Names of the layers that see the image."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return _names(cfg.get("first_conv"))


def _classifier(model: Any) -> set[str]:
    """Names of the layers that make logits, whether they are there or not."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    found = _names(cfg.get("classifier"))
    if hasattr(model, "get_classifier"):
        head: Any = model.get_classifier()
        heads = head if isinstance(head, (tuple, list)) else (head,)
        found |= {name for name, module in model.named_modules() if any(module is h for h in heads)}
    return found


def _concats(model: nn.Module) -> int:
    """How many poolings the classifier sees side by side."""
    holders = (getattr(model, "head", None), model)
    pool: Any = next((p for h in holders if hasattr(p := getattr(h, "global_pool", None), "feat_mult")), None)
    count = int(pool.feat_mult()) if pool is not None else 1
    pooled = count * int(getattr(model, "num_features", 0))  # not so where a layer stands in between
    heads = [m for n, m in model.named_modules() if n in _classifier(model)]
    return count if any(_sizes(head)[1:] == [pooled] for head in heads) else 1


# Checks of single entries.


def _check(model: nn.Module, widths: Mapping[str, Any]) -> dict[str, list[int]]:
    """The table as it holds for this network, or an error that names the entry."""
    modules = dict(model.named_modules())
    stems, classifier, concats = _stems(model), _classifier(model), _concats(model)
    table: dict[str, list[int]] = {}
    for name, value in widths.items():
        module = modules.get(name) if isinstance(name, str) and name else None
        if module is None:
            near = difflib.get_close_matches(str(name), [n for n, m in _owners(model)], n=1)
            raise UsageError(
                f'{_name(model)} has no layer "{name}", which widths names.'
                + (f"   Did you mean {near[0]}?" if near else "")
                + f"\n  {_UNTOUCHED}"
            )
        if name in classifier and isinstance(module, nn.Identity):
            continue  # built without classes
        old = _sizes(module)
        label = f'layer "{name}" ({type(module).__name__})'
        if not old:
            held = _say_shapes({key: tuple(t.shape) for key, t in _own(module).items()}) or "none"
            raise UsageError(
                f"{label} cannot be narrowed: it is no convolution, linear layer or norm.\n"
                f"  it holds  {held}\n  {_UNTOUCHED}"
            )
        form = _form(module)
        lengths = (1, 2) if isinstance(module, BatchDecorrelation) else (len(old),)
        if (
            not isinstance(value, (list, tuple))
            or len(value) not in lengths
            or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in value)
        ):
            raise UsageError(
                f"{label} has widths {value!r}: expected {form}, whole numbers of 1 or more.\n  {_UNTOUCHED}"
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
                f"{label} has widths {sizes}: expected {form} of at most {limits}.\n  {_UNTOUCHED}"
            )
        if problem := _indivisible(module, sizes):
            raise UsageError(f"{label} has widths {sizes}: {problem}.\n  {_UNTOUCHED}")
        table[name] = sizes
    return table


def _form(module: nn.Module) -> str:
    if isinstance(module, BatchDecorrelation):
        return "[channels, group_size]"
    return "[out, in]" if isinstance(module, (*_CONVS, nn.Linear)) else "[n]"


def _indivisible(module: nn.Module, sizes: list[int]) -> str:
    """What does not divide what, if so."""
    if isinstance(module, BatchDecorrelation):
        return f"group_size={sizes[1]} does not divide {sizes[0]}" if sizes[0] % sizes[1] else ""
    if isinstance(module, _CONVS):
        if _is_depthwise(module):
            return (
                ""
                if sizes[0] % sizes[1] == 0
                else f"it is depthwise, and {sizes[1]} does not divide {sizes[0]}"
            )
        for what, n in zip(("out_channels", "in_channels"), sizes, strict=True):
            if n % module.groups:
                return f"groups={module.groups} does not divide {what}={n}"
    for name in ("num_groups", "groups"):
        groups = getattr(module, name, 1)
        if len(sizes) == 1 and isinstance(groups, int) and sizes[0] % groups:
            return f"{name}={groups} does not divide {sizes[0]}"
    return ""


# The change itself.


def _resize(module: Any, sizes: list[int]) -> None:
    """Cut the tensors of a module, and set what it remembers of them."""
    old, shapes = _sizes(module), _shapes(module, sizes)
    scaled = isinstance(module, (ScaledStdConv2d, ScaledStdConv2dSame))
    fan_in = _own(module)["weight"][0].numel() if scaled else 1
    for name, tensor in _own(module).items():
        shape = shapes[name]
        if shape == tuple(tensor.shape):
            continue
        if isinstance(module, BatchDecorrelation):
            eye = torch.eye(sizes[1], device=tensor.device, dtype=tensor.dtype)
            setattr(module, name, eye.repeat(shape[0], 1, 1))
            continue
        part = tensor.detach()[tuple(slice(n) for n in shape)].clone(memory_format=torch.contiguous_format)
        is_parameter = name in module._parameters
        setattr(
            module, name, nn.Parameter(part, requires_grad=tensor.requires_grad) if is_parameter else part
        )
    if isinstance(module, BatchDecorrelation):
        module.channels, module.group_size = sizes
        module.groups = sizes[0] // sizes[1]
    elif isinstance(module, _CONVS):
        if _is_depthwise(module):
            module.groups = sizes[1]
        module.out_channels, module.in_channels = sizes
        if scaled:  # it keeps 1 / √fan-in as a number
            module.scale *= (fan_in / _own(module)["weight"][0].numel()) ** 0.5
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = sizes
    else:
        for attribute in ("num_features", "num_channels"):
            if getattr(module, attribute, None) == old[0]:
                setattr(module, attribute, sizes[0])
        if hasattr(module, "normalized_shape"):
            module.normalized_shape = tuple(sizes)


def _follow(model: nn.Module) -> None:
    """Set what modules around the narrowed ones remember, where it follows from tensors."""
    for module in model.modules():
        if isinstance(module, BlurPool2d) and module.channels is not None:
            blur: Any = module
            blur.filt = blur.filt[:1].clone()  # the same filter for every channel, however many there are
            blur.channels = None
        elif isinstance(module, MixedConv2d):
            module.splits = [conv.in_channels for conv in module.values()]
        elif piece := _PIECES.get(type(module).__name__):
            attribute, path, width = piece
            setattr(module, attribute, getattr(module.get_submodule(path), width))


def _keep_books(model: Any, full: _Trial, narrow: _Trial) -> None:
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


# The trial without memory.


class _MisfitError(Exception):
    """Why a network does not run."""


def _name(model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)


def _ghost(model: nn.Module) -> Any:
    """A copy for evaluation that takes no memory."""
    memo: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        bare = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(bare, requires_grad=False) if is_parameter else bare
    return copy.deepcopy(model, memo).eval()


def _first_trial(model: nn.Module) -> tuple[_Trial, tuple[int, int]]:
    """Run the network as it is, on images of 64×64, its smallest or its own size."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    own = tuple(cfg.get("input_size") or (3, 224, 224))[-2:]
    least = tuple(cfg.get("min_input_size") or (1, 1))[-2:]
    small = (max(_TRIAL_SIZE, least[0]), max(_TRIAL_SIZE, least[1]))
    reason = ""
    for size in [own] if cfg.get("fixed_input_size") else [small, own]:
        trial = _Trial(_ghost(model))
        try:
            trial.run((int(size[0]), int(size[1])))
        except _MisfitError as error:
            reason = str(error)
        else:
            return trial, (int(size[0]), int(size[1]))
    raise UsageError(
        f"{_name(model)} cannot be narrowed: it is no CNN with timm's forward_features and forward_head.\n"
        f"  {reason}\n  {_UNTOUCHED}"
    )


@dataclass
class _Trial:
    """One run of a ghost, and what was seen.

    Attributes:
        ghost: Consumed by the run.
        full: The run of the full network, which this one has to resemble.
        features: Channels of the features.
        hidden: Inputs of the classifier.
        channels: Module name → channels in and out, of its last call.
        remembered: (module name, attribute) → value, for blocks that remember their channels.
        stretches: Per sum or product the module it happened in, and along which axes it was stretched.
        levels: Channels of each feature level.
    """

    ghost: Any
    full: _Trial | None = None
    features: int = 0
    hidden: int = 0
    channels: dict[str, tuple[int, int]] = field(default_factory=dict)
    remembered: dict[tuple[str, str], int] = field(default_factory=dict)
    stretches: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)
    _running: list[tuple[str, nn.Module]] = field(default_factory=list)

    def run(self, size: tuple[int, int]) -> None:
        """Run the ghost on two images.

        Raises:
            _MisfitError: It does not run, or not as the full network does.
        """
        for name, module in self.ghost.named_modules():
            module.register_forward_pre_hook(self._enter(name))
            module.register_forward_hook(self._leave(name))
        dtype = next((p.dtype for p in self.ghost.parameters()), torch.float32)
        stems = [m for n, m in self.ghost.named_modules() if n in _stems(self.ghost)]
        channels = getattr(self.ghost, "in_chans", None) or (_sizes(stems[0])[1] if stems else 3)
        x = torch.empty(2, channels, *size, device="meta", dtype=dtype)
        try:
            with torch.no_grad(), _Stretches(self):
                if hasattr(self.ghost, "forward_intermediates"):
                    maps, levels = self.ghost.forward_intermediates(x)
                    self.levels = [level.shape[1] for level in levels]
                else:
                    maps = self.ghost.forward_features(x)
                wanted = int(self.ghost.num_features)
                shape = list(maps.shape) if isinstance(maps, Tensor) else [type(maps).__name__]
                if len(shape) != 4 or (self.full is None and shape[1] != wanted):
                    raise _MisfitError(f"its features are {shape}: expected maps [b, {wanted}, h, w].")
                self.features = maps.shape[1]
                self.hidden = self.ghost.forward_head(maps, pre_logits=True).shape[1]
                self.ghost.forward_head(maps)
                self._compare()
        except _MisfitError:
            raise
        except Exception as error:  # whatever a network raises on tensors that do not fit
            name, module = self._running[-1] if self._running else ("", self.ghost)
            where = f'layer "{name}"' if name else "the network"
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise _MisfitError(f"{where} ({type(module).__name__}) does not run: {text}") from error

    def level(self, index: int, info: dict[str, Any]) -> int | None:
        """Channels of a feature level."""
        if index < len(self.levels):
            return self.levels[index]
        into, out = self.channels.get(info.get("module", ""), (0, 0))
        return into if info.get("hook_type") == "forward_pre" else out

    def _compare(self) -> None:
        """A width of 1 fits everything, and means something else."""
        if self.full is None or len(self.stretches) != len(self.full.stretches):
            return
        for (name, axes), (_, expected) in zip(self.stretches, self.full.stretches, strict=True):
            if axes != expected:
                raise _MisfitError(
                    f'layer "{name}" combines maps of one channel with maps of many, which the full network '
                    "does not."
                )

    def _enter(self, name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            self._running.append((name, module))
            x = args[0] if args and isinstance(args[0], Tensor) else None
            if x is None or x.dim() < 2:
                return
            self._check_input(name, module, x)
            self.channels[name] = (x.shape[1], 0)
            self._remember(name, module, _INPUTS, 0)

        return hook

    def _leave(self, name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], result: Any) -> None:
            self._running.pop()
            if isinstance(result, Tensor) and result.dim() > 1:
                self.channels[name] = (self.channels.get(name, (0, 0))[0], result.shape[1])
                self._remember(name, module, _OUTPUTS, 1)

        return hook

    def _check_input(self, name: str, module: nn.Module, x: Tensor) -> None:
        sizes = _sizes(module)
        if isinstance(module, _CONVS) and x.dim() == len(module.kernel_size) + 2:
            expected, found = sizes[1], x.shape[1]
        elif isinstance(module, nn.Linear):
            expected, found = sizes[1], x.shape[-1]
        elif isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)) and sizes:
            expected, found = sizes[0], x.shape[1]
        else:
            return
        if expected != found:
            raise _MisfitError(
                f'layer "{name}" ({type(module).__name__}) gets {found} channels.\n'
                f"  expected  {_form(module)} = {[*sizes[:-1], found]}\n  found     {sizes}"
            )

    def _remember(self, name: str, module: nn.Module, attributes: tuple[str, ...], side: int) -> None:
        if self.full is None or isinstance(module, (*_CONVS, nn.Linear)):
            return
        for attribute in attributes:
            old, value = self.full.channels.get(name, (0, 0))[side], self.channels[name][side]
            if value != old and getattr(module, attribute, None) == old:
                setattr(module, attribute, value)
                self.remembered[name, attribute] = value


class _Stretches(TorchDispatchMode):
    """Notes along which axes the operands of sums and products are stretched."""

    _OPS = tuple(
        getattr(torch.ops.aten, name) for name in ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_")
    )

    def __init__(self, trial: _Trial) -> None:
        super().__init__()
        self.trial = trial

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func.overloadpacket in self._OPS
            and len(args) > 1
            and all(isinstance(a, Tensor) for a in args[:2])
        ):
            a, b = (t.shape[::-1] for t in args[:2])
            axes = tuple(i for i, (m, n) in enumerate(zip(a, b, strict=False)) if (m == 1) != (n == 1))
            self.trial.stretches.append((self.trial._running[-1][0] if self.trial._running else "", axes))
        return func(*args, **(kwargs or {}))
