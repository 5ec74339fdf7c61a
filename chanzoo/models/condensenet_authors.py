"""Names and layouts of the CondenseNet V2 authors' checkpoints, in both forms, and ours.

Theirs hold each mask at the size of its weight, in floats, and the index of a condensed reactivation as a
dense matrix; ours are compact. Only state dicts here; ``scripts/convert_condensenet.py`` reads files.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .condensenet import VARIANTS

__all__ = ["find_variant", "from_authors", "to_authors"]

_LAYER = re.compile(r"features\.denseblock_(\d+)\.denselayer_(\d+)\.(.+)")
_OUR_LAYER = re.compile(r"stage(\d+)\.(\d+)\.(.+)")
# Theirs and ours: beginnings of names, longer ones first.
_NAMES = (
    ("features.init_conv.", "stem."),
    ("features.norm_last.", "norm."),
    ("features.se_last.fc.0.", "pre_logits.se.fc1."),
    ("features.se_last.fc.2.", "pre_logits.se.fc2."),
    ("classifier.", "fc."),
    ("fc.", "pre_logits.fc."),
)
_LAYER_NAMES = (
    ("conv_1.conv.weight", "conv1.weight"),
    ("conv_1.", "conv1."),
    ("conv_2.norm.", "norm2."),
    ("conv_2.conv.", "conv2."),
    ("se.fc.0.", "se.fc1."),
    ("se.fc.2.", "se.fc2."),
    ("sfr.conv.weight", "sfr.weight"),
    ("sfr.", "sfr."),
)
_MAPS = re.compile(r"(se\.fc[12]|pre_logits\.fc)\.weight")  # 1×1 convolutions here, linear layers there


def from_authors(
    state: dict[str, Tensor], groups: int, reactivation_groups: int | None = None
) -> dict[str, Tensor]:
    """Our state dict from the authors', of either form.

    Args:
        state: May have the prefix ``module.``.
        groups: G of the learned group convolutions.
        reactivation_groups: G of the reactivations; ``groups`` if not given.

    Raises:
        UsageError: A name is unknown, or a mask or index is not one that their training makes.

    Source:
        arXiv:2104.04382, the authors' released code (names of layers, and the two forms).
    """
    ours: dict[str, Tensor] = {}
    theirs = {key.removeprefix("module."): value for key, value in state.items()}
    for key, value in theirs.items():
        if key.endswith("._count"):  # follows from the mask
            continue
        name = _renamed(key, 0, 1)
        layer, _, leaf = name.rpartition(".")
        if leaf == "_mask":
            is_sfr = layer.endswith(".sfr")
            size = groups if reactivation_groups is None or not is_sfr else reactivation_groups
            ours[f"{layer}.mask"] = _compact(key, value, size, is_sfr)
        elif leaf == "_stage":
            if value.numel() != 1:
                raise UsageError(f'"{key}" has {value.numel()} numbers: expected one.')
            ours[f"{layer}.stage"] = value.reshape(()).to(torch.int64)
        elif leaf == "index" and value.ndim == 2:
            ours[name] = _slots(key, value)
        elif _MAPS.search(name) and value.ndim == 2:
            ours[name] = value[:, :, None, None]
        else:
            ours[name] = value
    return ours


def to_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict from ours, of either form; the inverse of :func:`from_authors`.

    Raises:
        UsageError: The index of a reactivation cannot be theirs, which has one entry per old map (G = C).
    """
    theirs: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("progress."):
            continue
        name = _renamed(key, 1, 0)
        layer, _, leaf = name.rpartition(".")
        is_sfr = layer.endswith(".sfr")
        if leaf == "mask":
            out, inputs = state[key.removesuffix("mask") + "weight"].shape[:2]
            full = value.repeat(1, inputs // value.shape[1]) if is_sfr else value.repeat(out // len(value), 1)
            dropped = (~(value[:, 0] if is_sfr else value[0])).sum()
            theirs[f"{layer}._mask"] = full[:, :, None, None].float()
            theirs[f"{layer}._count"] = dropped.reshape(1).float()
        elif leaf == "stage":
            theirs[f"{layer}._stage"] = value.reshape(1).float()
        elif leaf == "index" and is_sfr:
            if len(value) <= int(value.max()):
                raise UsageError(f'"{key}" updates more maps than it has entries: theirs cannot say that.')
            theirs[name] = torch.eye(len(value))[value]
        elif _MAPS.search(key):
            theirs[name] = value.flatten(1)
        else:
            theirs[name] = value
    return theirs


def find_variant(state: dict[str, Tensor]) -> str:
    """Our name of the network that a state dict of the authors belongs to.

    Raises:
        UsageError: It is none of ours.
    """
    layers: dict[int, int] = {}
    growth: dict[int, int] = {}
    for key, value in state.items():
        if (match := _LAYER.fullmatch(key.removeprefix("module."))) and match[3] == "conv_2.conv.weight":
            layers[int(match[1])] = max(layers.get(int(match[1]), 0), int(match[2]))
            growth[int(match[1])] = len(value)
    found: Any = (tuple(layers[i] for i in sorted(layers)), tuple(growth[i] for i in sorted(growth)))
    for name, variant in VARIANTS.items():
        if "v2" in name and found == (variant["depths"], variant["growth"]):
            return name
    raise UsageError(
        f"a network of {list(found[0])} layers and growth {list(found[1])} is none of ours.\n"
        f"  expected  one of {', '.join(name for name in VARIANTS if 'v2' in name)}"
    )


def _renamed(key: str, source: int, target: int) -> str:
    """A name in the other layout; 0 is theirs, 1 ours."""
    names, start, rest = _NAMES, "", key
    if match := (_LAYER, _OUR_LAYER)[source].fullmatch(key):
        names, rest = _LAYER_NAMES, match[3]
        stage, layer = int(match[1]), int(match[2])
        start = (
            f"stage{stage}.{layer - 1}." if target else f"features.denseblock_{stage}.denselayer_{layer + 1}."
        )
    for pair in names:
        if rest.startswith(pair[source]):
            return start + pair[target] + rest.removeprefix(pair[source])
    raise UsageError(f'"{key}" is no entry of a CondenseNet V2.')


def _compact(key: str, full: Tensor, groups: int, is_sfr: bool) -> Tensor:
    """The mask of the groups from a mask of the weight's size.

    Raises:
        UsageError: It holds fractions, or is not the same for all members of a group.
    """
    if full.ndim < 2:
        raise UsageError(f'"{key}" is no mask: expected the shape of the weight, found {list(full.shape)}.')
    flat = full.flatten(1)
    mask = flat != 0
    compact = mask[:, :groups] if is_sfr else mask[:groups]
    again = compact.repeat(1, flat.shape[1] // groups) if is_sfr else compact.repeat(len(flat) // groups, 1)
    if not ((flat == 0) | (flat == 1)).all() or again.shape != mask.shape or not torch.equal(again, mask):
        raise UsageError(
            f'"{key}" is no mask of {groups} groups: it was averaged or edited.\n'
            "  expected  ones and zeros, the same for all members of a group"
        )
    return compact.contiguous()


def _slots(key: str, matrix: Tensor) -> Tensor:
    """Index of a reactivation from its matrix: row s has its one at the map that entry s updates."""
    if (
        matrix.shape[0] != matrix.shape[1]
        or not torch.equal(matrix.sum(dim=1), torch.ones_like(matrix[0]))
        or (not ((matrix == 0) | (matrix == 1)).all())
    ):
        raise UsageError(f'"{key}" is no index: expected a square matrix with a single one in each row.')
    return matrix.argmax(dim=1)
