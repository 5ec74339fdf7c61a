"""Checkpoints of the HRank authors: their names of layers, and the widths that their tensors have.

Both releases (arXiv:2002.10179) name layers alike. A checkpoint of the first is full-size, with zeros where
filters were removed; one of the second, "Plus", is slim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..layers.narrow import fill_widths
from .hrank import full_network

__all__ = ["AUTHORS_NETS", "find_variant", "from_authors", "to_authors", "widths_of"]

_NORM_LEAVES = ("running_var", "num_batches_tracked")


# Their names of layers with tensors, in the order in which they and ours run.


def _vgg16() -> Iterator[str]:
    for i in (0, 1, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15, 16):  # pools count, norms do not
        yield from (f"features.conv{i}", f"features.norm{i}")
    yield from ("classifier.linear1", "classifier.norm1", "classifier.linear2")


def _cifar_resnet(blocks: int, classifier: str) -> Iterator[str]:
    yield from ("conv1", "bn1")
    for stage in (1, 2, 3):
        for block in range(blocks):
            yield from (f"layer{stage}.{block}.{layer}" for layer in ("conv1", "bn1", "conv2", "bn2"))
    yield classifier


def _densenet40() -> Iterator[str]:
    yield "conv1"
    for stage in (1, 2, 3):
        if stage > 1:
            yield from (f"trans{stage - 1}.bn1", f"trans{stage - 1}.conv1")
        for layer in range(12):
            yield from (f"dense{stage}.{layer}.bn1", f"dense{stage}.{layer}.conv1")
    yield from ("bn", "fc")


def _googlenet() -> Iterator[str]:
    yield from ("pre_layers.0", "pre_layers.1")
    branches = {"1x1": (0, 1), "3x3": (0, 1, 3, 4), "5x5": (0, 1, 3, 4, 6, 7), "_pool": (1, 2)}
    for module in ("a3", "b3", "a4", "b4", "c4", "d4", "e4", "a5", "b5"):
        for branch, places in branches.items():
            yield from (f"inception_{module}.branch{branch}.{i}" for i in places)
    yield "linear"


def _resnet50() -> Iterator[str]:
    yield from ("conv1", "bn1")
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            for i in (1, 2, 3):
                yield from (f"layer{stage}.{block}.conv{i}", f"layer{stage}.{block}.bn{i}")
            if block == 0:
                yield from (f"layer{stage}.0.downsample.0", f"layer{stage}.0.downsample.1")
    yield "fc"


def _mobilenetv1() -> Iterator[str]:
    yield from ("conv1.0", "conv1.1")
    for block in range(13):
        yield from (f"features.{block}.{i}" for i in (0, 1, 3, 4))
    yield "classifier.0"


def _mobilenetv2() -> Iterator[str]:
    yield from ("features.0.0", "features.0.1")
    for block in range(1, 18):
        yield from (
            f"features.{block}.conv.{i}" for i in ((0, 1, 3, 4) if block == 1 else (0, 1, 3, 4, 6, 7))
        )
    yield from ("features.18.0", "features.18.1", "classifier.1")


_LAYERS: dict[str, Callable[[], Iterator[str]]] = {
    "hrank_cifar_vgg16_bn": _vgg16,
    "hrank_cifar_resnet56": partial(_cifar_resnet, 9, "fc"),
    "hrank_cifar_resnet110": partial(_cifar_resnet, 18, "linear"),
    "hrank_cifar_densenet40": _densenet40,
    "hrank_cifar_googlenet": _googlenet,
    "hrank_resnet50": _resnet50,
    "hrank_mobilenetv1": _mobilenetv1,
    "hrank_mobilenetv2": _mobilenetv2,
}

AUTHORS_NETS = {
    "vgg_16_bn": "hrank_cifar_vgg16_bn",
    "resnet_56": "hrank_cifar_resnet56",
    "resnet_110": "hrank_cifar_resnet110",
    "densenet_40": "hrank_cifar_densenet40",
    "googlenet": "hrank_cifar_googlenet",
    "resnet_50": "hrank_resnet50",
    "mobilenet_v1": "hrank_mobilenetv1",
    "mobilenet_v2": "hrank_mobilenetv2",
}
"""The authors' names of networks, and ours."""


@lru_cache(maxsize=len(_LAYERS))
def _names(variant: str) -> dict[str, str]:
    """Their name of each layer → ours; both lists are in the order of the forward pass."""
    ours = [name for name, module in full_network(variant).named_modules() if module._parameters]
    return dict(zip(_LAYERS[variant](), ours, strict=True))


def find_variant(state: dict[str, Tensor]) -> str:
    """Which of our networks a state dict of the authors belongs to.

    Args:
        state: The authors' ``state_dict``, with or without a prefix ``module.``.

    Raises:
        UsageError: None; says which layers the nearest one has more or less.
    """
    found = {key.removeprefix("module.").rpartition(".")[0] for key in state}
    layers = {variant: set(make()) for variant, make in _LAYERS.items()}
    best = min(layers, key=lambda variant: len(layers[variant] ^ found))
    if layers[best] == found:
        return best
    missing, odd = sorted(layers[best] - found), sorted(found - layers[best])
    raise UsageError(
        f"these are no layers of a network of the HRank authors; the nearest is {best}.\n"
        f"  missing     {_list(missing)}\n  unexpected  {_list(odd)}"
    )


def _list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "none"


def from_authors(state: dict[str, Tensor], variant: str) -> dict[str, Tensor]:
    """Rename a state dict of the authors' networks to ours.

    A prefix ``module.`` is stripped, a missing ``num_batches_tracked`` becomes 0, and the hidden linear layer
    of VGG becomes a 1×1 convolution. Tensors are not copied.

    Args:
        state: The authors' ``state_dict``, full-size or slim.
        variant: Our name of the network; see :func:`find_variant`.

    Raises:
        UsageError: An entry belongs to no layer; names the key.

    Source:
        arXiv:2002.10179, the authors' released code (key names only).
    """
    names, kernels = _names(variant), _kernels(variant)
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        layer, _, leaf = key.removeprefix("module.").rpartition(".")
        if layer not in names:
            raise UsageError(f'"{key}" is no entry of {variant}.')
        name = f"{names[layer]}.{leaf}"
        ours[name] = value[:, :, None, None] if name in kernels and value.dim() == 2 else value
    for key in [key for key in ours if key.endswith(_NORM_LEAVES[0])]:
        ours.setdefault(key.replace(*_NORM_LEAVES), torch.tensor(0))
    return ours


def to_authors(state: dict[str, Tensor], variant: str) -> dict[str, Tensor]:
    """Rename a state dict of ours to the authors' names, in their order; the inverse of :func:`from_authors`.

    Args:
        state: ``state_dict`` of the network.
        variant: Our name of it.
    """
    theirs = {ours: name for name, ours in _names(variant).items()}
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        layer, _, leaf = key.rpartition(".")
        name = f"{theirs[layer]}.{leaf}"
        result[name] = value.flatten(1) if name == "classifier.linear1.weight" else value
    return result


@lru_cache(maxsize=len(_LAYERS))
def _kernels(variant: str) -> frozenset[str]:
    """Weights that are kernels of ours."""
    modules = full_network(variant).named_modules()
    return frozenset(f"{name}.weight" for name, module in modules if isinstance(module, nn.Conv2d))


def widths_of(ours: dict[str, Tensor], variant: str) -> dict[str, list[int]]:
    """The table of widths that tensors have.

    Args:
        ours: State dict with our names.
        variant: Our name of the network.

    Returns:
        Module name → sizes; empty for a full-size network.

    Raises:
        UsageError: A convolution is missing or wider than in the full network, or the widths do not fit
            together.
    """
    full = full_network(variant)
    outputs: dict[str, int] = {}
    for name, module in full.named_modules():
        if not isinstance(module, nn.Conv2d) or module.groups > 1:
            continue
        weight = ours.get(f"{name}.weight")
        if weight is None:
            raise UsageError(f'"{name}.weight" of {variant} is missing.')
        if len(weight) != module.out_channels:
            outputs[name] = len(weight)
    return fill_widths(full, outputs)
