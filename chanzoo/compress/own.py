"""The HRank authors' way: their measured points by name, and filters that each layer chooses for itself.

In their networks every convolution keeps its own filters, also where several add to one stream: channels are
packed by position, so that a sum adds channels that were not added before. Fine-tuning has to repair that.
It is here for comparison with what they published; :func:`chanzoo.compress.prune` keeps streams together.
Their rank vectors, files ``rank_conv<id>.npy``, have the names of the sites here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..models.hrank import keep_count
from .groups import is_depthwise
from .scores import select
from .sites import RankSite, _Part, _Trace, evaluating

__all__ = ["Vector", "authors_vectors", "layer_masks", "own_masks"]


@dataclass(frozen=True)
class Vector:
    """One of the authors' rank vectors.

    Attributes:
        site: Where it is measured; has the vector's name.
        convs: Convolutions whose filters it judges.
    """

    site: RankSite
    convs: tuple[str, ...]


def authors_vectors(variant: str) -> list[Vector]:
    """The authors' rank vectors of one of their networks.

    Args:
        variant: One of the ``hrank_*`` networks.

    Raises:
        UsageError: It is none of them.

    Source:
        The authors' code of arXiv:2002.10179.
    """
    if variant not in _VECTORS:
        raise UsageError(f'no rank vectors of "{variant}" are known; of: {", ".join(_VECTORS)}.')
    return _VECTORS[variant]


def _vector(name: str, module: str, *convs: str, start: int = 0, stop: int | None = None) -> Vector:
    return Vector(RankSite(f"rank_conv{name}", module, 0, start, stop), convs)


def _vgg16() -> list[Vector]:
    found = []
    for stage, count in enumerate((2, 2, 3, 3, 2), start=1):
        for i in range(count):
            path, is_last = f"stage{stage}.{i + (stage > 1)}", i == count - 1 and stage < 5
            module = f"stage{stage + 1}.0" if is_last else f"{path}.act"  # behind the pool that follows
            found.append(_vector(str(len(found) + 1), module, f"{path}.conv"))
    return found


def _cifar_resnet(blocks: int) -> list[Vector]:
    found = [_vector("1", "act1", "conv1")]
    for path in (f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(blocks)):
        for k in (1, 2):
            found.append(_vector(str(len(found) + 1), f"{path}.act{k}", f"{path}.conv{k}"))
    return found


def _densenet40() -> list[Vector]:
    found = []
    for stage in (1, 2, 3):
        first = "stage1.0" if stage == 1 else f"stage{stage}.0.conv"
        found.append(_vector(str(len(found) + 1), f"stage{stage}.1.act", first))
        for layer in range(1, 13):
            following = f"stage{stage}.{layer + 1}.act"
            if layer == 12:
                following = "stage3.act" if stage == 3 else f"stage{stage + 1}.0.act"
            found.append(_vector(str(len(found) + 1), following, f"stage{stage}.{layer}.conv", start=-12))
    return found


def _googlenet() -> list[Vector]:
    widths = (
        (64, 128, 32, 32), (128, 192, 96, 64), (192, 208, 48, 64), (160, 224, 64, 64), (128, 256, 64, 64),
        (112, 288, 64, 64), (256, 320, 128, 128), (256, 320, 128, 128), (384, 384, 128, 128),
    )  # fmt: skip
    places = [(stage, i) for stage, count in ((1, 2), (2, 5), (3, 2)) for i in range(1, count + 1)]
    found = [_vector("1", "stage1.0", "stage1.0.conv")]
    for k, ((stage, i), branches) in enumerate(zip(places, widths, strict=True), start=2):
        path = f"stage{stage}.{i}"
        module = f"stage{stage + 1}.0" if (stage, i) in ((1, 2), (2, 5)) else path
        convs = (
            ("n1x1", ("branch1.conv",)),
            ("n3x3", ("branch3.1.conv",)),
            ("n5x5", ("branch5.1.conv", "branch5.2.conv")),
            ("pool_planes", ("branch_pool.1.conv",)),
        )
        start = 0
        for (name, judged), width in zip(convs, branches, strict=True):
            names = (f"{path}.{conv}" for conv in judged)
            found.append(_vector(f"{k}_{name}", module, *names, start=start, stop=start + width))
            start += width
    return found


def _resnet50() -> list[Vector]:
    found = [_vector("1", "maxpool", "conv1")]
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            path = f"layer{stage}.{block}"
            for layer, act in (("conv1", 1), ("conv2", 2), ("downsample.0", 3), ("conv3", 3)):
                if layer != "downsample.0" or block == 0:
                    found.append(_vector(str(len(found) + 1), f"{path}.act{act}", f"{path}.{layer}"))
    return found


def _mobilenet(blocks: Sequence[int], names: Sequence[str], first: Sequence[str], last: bool) -> list[Vector]:
    found = [_vector("1", "bn1", "conv_stem")]
    for stage, count in enumerate(blocks):
        for block in range(count):
            for i, layer in enumerate(first if stage == 0 else names, start=1):
                path = f"blocks.{stage}.{block}"
                found.append(_vector(str(len(found) + 1), f"{path}.bn{i}", f"{path}.{layer}"))
    return [*found, _vector(str(len(found) + 1), "bn2", "conv_head")] if last else found


_PAIR = ("conv_dw", "conv_pw")
_VECTORS = {
    "hrank_cifar_vgg16_bn": _vgg16(),
    "hrank_cifar_resnet56": _cifar_resnet(9),
    "hrank_cifar_resnet110": _cifar_resnet(18),
    "hrank_cifar_densenet40": _densenet40(),
    "hrank_cifar_googlenet": _googlenet(),
    "hrank_resnet50": _resnet50(),
    "hrank_mobilenetv1": _mobilenet((1, 2, 2, 6, 2), _PAIR, _PAIR, False),
    "hrank_mobilenetv2": _mobilenet((1, 2, 3, 4, 3, 3, 1), ("conv_pw", "conv_dw", "conv_pwl"), _PAIR, True),
}


def own_masks(
    model: nn.Module, image: Tensor, widths: Mapping[str, list[int]], scores: Mapping[str, Tensor]
) -> dict[tuple[str, str], Tensor]:
    """Which channels of every layer stay when each convolution keeps its own best filters.

    Inputs follow what reaches them: of several convolutions that add to one tensor, the last to run.

    Args:
        model: The full network.
        image: A batch for it; one image is enough.
        widths: Table of the narrow network, see :func:`chanzoo.models.hrank.widths_of_rates`.
        scores: By convolution, of its filters; of those that are cut.

    Raises:
        UsageError: A convolution that is cut has no scores.

    Source:
        The authors' one-shot code of arXiv:2002.10179, with its slips mended: here every tensor is a slice.
    """
    flow = _Flow()
    handles = [handle for name, module in model.named_modules() for handle in flow.watch(name, module)]
    try:
        with evaluating(model), flow:
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    modules = dict(model.named_modules())
    kept: dict[str, Tensor] = {}
    for name in flow.order:
        conv: Any = modules[name]
        if name in widths and widths[name][0] < conv.out_channels:
            if name not in scores:
                raise UsageError(f'layer "{name}" is cut and has no scores.\n  Nothing was pruned.')
            kept[name] = torch.zeros(conv.out_channels, dtype=torch.bool)
            kept[name][select(scores[name], widths[name][0])] = True
    masks = {(name, "out"): mask for name, mask in kept.items()}
    for name, parts in flow.inputs.items():
        module: Any = modules[name]
        axis = "in" if isinstance(module, (nn.Conv2d, nn.Linear)) and not is_depthwise(module) else "out"
        length = getattr(module, "in_channels", 0) or getattr(module, "in_features", 0)
        length = length or getattr(module, "num_features", 0)
        last = {}
        for part in sorted(parts, key=lambda part: flow.order[part.conv]):
            last[part.start] = part
        mask = torch.ones(length, dtype=torch.bool)
        for part in last.values():
            if part.conv in kept:
                mask[part.start : part.start + part.channels] = kept[part.conv]
        if not mask.all():
            masks[name, axis] = mask
    return masks


class _Flow(_Trace):
    """Follows channels through the whole network, and notes what reaches each layer with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, tuple[_Part, ...]] = {}
        self.order: dict[str, int] = {}

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        """Hooks for one module."""
        is_layer = isinstance(module, (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm))
        is_leaf = not any(True for _ in module.children())

        def before(_module: nn.Module, args: Any) -> None:
            if is_layer and args:
                self.inputs[name] = self.parts(args[0])

        def after(_module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not args or not isinstance(args[0], Tensor):
                return
            if isinstance(module, nn.Conv2d) and not is_depthwise(module):
                self.order[name] = len(self.order)
                self.mark(output, (_Part(name, 0, module.out_channels),))
            elif (is_leaf or is_layer) and output.shape[:2] == args[0].shape[:2]:
                parts = self.inputs[name] if name in self.inputs else self.parts(args[0])
                self.mark(output, parts)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


# The first release: one layer at a time, zeros instead of slices.


def layer_masks(variant: str, ranks: Mapping[str, Tensor], rates: Sequence[float]) -> list[dict[str, Tensor]]:
    """Masks of the authors' first procedure: one layer after the other, in a network that keeps its size.

    Args:
        variant: One of the VGG, ResNet and DenseNet among the ``hrank_*`` networks.
        ranks: The rank vectors by name, see :func:`authors_vectors`.
        rates: One per vector, in order; those behind the last vector are not used.

    Returns:
        For each vector, names of parameters → which of their entries along the first axis stay. The mask of a
        layer is held from its turn on.

    Raises:
        UsageError: There are too few rates, or no such masks of the network are known.

    Source:
        The authors' first code of arXiv:2002.10179, which trains after each layer.
    """
    vectors = authors_vectors(variant)
    if variant not in _LAYERWISE:
        raise UsageError(f"{variant} has no layer-by-layer masks; have: {', '.join(_LAYERWISE)}.")
    if len(rates) < len(vectors):
        raise UsageError(f"{len(rates)} rates: expected {len(vectors)}, one per rank vector of {variant}.")
    found, carried = [], torch.ones(0, dtype=torch.bool)
    for vector, rate in zip(vectors, rates, strict=False):
        scores = ranks[vector.site.name]
        stays = torch.zeros(len(scores), dtype=torch.bool)
        stays[select(scores, keep_count(len(scores), rate, "v1"))] = True
        masks = {}
        for conv in vector.convs:
            masks |= {f"{conv}.weight": stays, f"{conv}.bias": stays}
            if "densenet" in variant:  # the norm that follows sees all that was put out before
                is_start = vector.site.start == 0
                carried = stays if is_start else torch.cat([carried, stays])
                norm = vector.site.module.removesuffix("act") + "bn"
                masks |= {f"{norm}.{leaf}": carried for leaf in ("weight", "bias")}
            else:
                norm = re.sub(r"conv(\d*)$", r"bn\1", conv).replace("downsample.0", "downsample.1")
                masks |= {f"{norm}.{leaf}": stays for leaf in ("weight", "bias")}
        found.append(masks)
    return found


_LAYERWISE = (
    "hrank_cifar_vgg16_bn", "hrank_cifar_resnet56", "hrank_cifar_resnet110", "hrank_cifar_densenet40",
    "hrank_resnet50",
)  # fmt: skip
