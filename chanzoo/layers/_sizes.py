"""What the modules of a network hold per channel, and how they are cut; the ends of a network by name."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame
from torch import Tensor, nn

from .decorrelation import BatchDecorrelation

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a module itself."""
    hidden = module._non_persistent_buffers_set
    tensors = chain(module._parameters.items(), module._buffers.items())
    return {name: tensor for name, tensor in tensors if tensor is not None and name not in hidden}


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if own_tensors(module))


def is_depthwise(conv: Any) -> bool:
    return conv.groups > 1 and conv.groups == conv.in_channels


def sizes_of(module: nn.Module) -> list[int]:
    """Sizes of a module as in a table; empty if it has none, or not of a kind that can be narrowed."""
    if isinstance(module, CONVS):
        return [module.out_channels, module.in_channels]
    if isinstance(module, nn.Linear):
        return [module.out_features, module.in_features]
    if isinstance(module, BatchDecorrelation):
        return [module.channels, module.group_size]
    long = [[n for n in tensor.shape if n > 1] for tensor in own_tensors(module).values()]
    found = {n for sizes in long for n in sizes}
    return [found.pop()] if len(found) == 1 and max(map(len, long)) == 1 else []


def form_of(module: nn.Module) -> str:
    if isinstance(module, BatchDecorrelation):
        return "[channels, group_size]"
    return "[out, in]" if isinstance(module, (*CONVS, nn.Linear)) else "[n]"


def shapes_at(module: nn.Module, sizes: list[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the module's own tensors at other sizes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in own_tensors(module).items()}
    old = sizes_of(module)
    if isinstance(module, BatchDecorrelation):
        return {"running_wm": (sizes[0] // sizes[1], sizes[1], sizes[1])}
    if len(old) == 1:
        return {name: tuple(sizes[0] if n == old[0] else n for n in s) for name, s in shapes.items()}
    for name, shape in shapes.items():
        if name == "weight":
            groups = 1
            if isinstance(module, CONVS):
                groups = sizes[1] if is_depthwise(module) else module.groups
            shapes[name] = (sizes[0], sizes[1] // groups, *shape[2:])
        elif shape:
            shapes[name] = (sizes[0], *shape[1:])
    return shapes


def say_shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


def indivisible(module: nn.Module, sizes: list[int]) -> str:
    """What does not divide what, if so."""
    if isinstance(module, BatchDecorrelation):
        return f"group_size={sizes[1]} does not divide {sizes[0]}" if sizes[0] % sizes[1] else ""
    if isinstance(module, CONVS):
        if is_depthwise(module):
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


def resize(module: Any, sizes: list[int]) -> None:
    """Cut the tensors of a module, and set what it remembers of them."""
    old, shapes = sizes_of(module), shapes_at(module, sizes)
    scaled = isinstance(module, (ScaledStdConv2d, ScaledStdConv2dSame))
    fan_in = own_tensors(module)["weight"][0].numel() if scaled else 1
    for name, tensor in own_tensors(module).items():
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
    elif isinstance(module, CONVS):
        if is_depthwise(module):
            module.groups = sizes[1]
        module.out_channels, module.in_channels = sizes
        if scaled:  # it keeps 1 / √fan-in as a number
            module.scale *= (fan_in / own_tensors(module)["weight"][0].numel()) ** 0.5
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = sizes
    else:
        for attribute in ("num_features", "num_channels"):
            if getattr(module, attribute, None) == old[0]:
                setattr(module, attribute, sizes[0])
        if hasattr(module, "normalized_shape"):
            module.normalized_shape = tuple(sizes)


# The ends of a network, which a table of widths does not rule.


def _names(value: Any) -> set[str]:
    return {value} if isinstance(value, str) else set(value or ())


def stems_of(model: nn.Module) -> set[str]:
    """Names of the layers that see the image."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return _names(cfg.get("first_conv"))


def classifiers_of(model: Any) -> set[str]:
    """Names of the layers that make logits, whether they are there or not."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    found = _names(cfg.get("classifier"))
    if hasattr(model, "get_classifier"):
        head: Any = model.get_classifier()
        heads = head if isinstance(head, (tuple, list)) else (head,)
        found |= {name for name, module in model.named_modules() if any(module is h for h in heads)}
    return found


def concats_of(model: nn.Module) -> int:
    """How many poolings the classifier sees side by side."""
    holders = (getattr(model, "head", None), model)
    pool: Any = next((p for h in holders if hasattr(p := getattr(h, "global_pool", None), "feat_mult")), None)
    count = int(pool.feat_mult()) if pool is not None else 1
    pooled = count * int(getattr(model, "num_features", 0))  # not so where a layer stands in between
    names = classifiers_of(model)
    heads = [module for name, module in model.named_modules() if name in names]
    return count if any(sizes_of(head)[1:] == [pooled] for head in heads) else 1
