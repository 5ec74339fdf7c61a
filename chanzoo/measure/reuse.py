"""Which earlier features each layer of a CondenseNet reads, and which it refreshes.

The heatmap of Huang et al., "Densely Connected Convolutional Networks" (CVPR 2017, arXiv:1608.06993), figure
5, for learned group convolutions, and the same for sparse reactivations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..layers import CondensedConv2d, CondensedReactivation, LearnedGroupConv2d, SparseReactivation
from ..models.condensenet import CondenseNet, CondensingLayer

__all__ = ["ReuseRow", "measure_reuse"]


@dataclass(frozen=True)
class ReuseRow:
    """How strongly one layer uses the features of an earlier one.

    Attributes:
        layer: Name of the layer, as in the network.
        source: Name of the layer that made the features; the stem comes first.
        reads: Mean magnitude of the weights with which the layer reads them; dropped ones count as 0.
        refreshes: Mean magnitude of those with which it updates them; 0 without reactivation.
    """

    layer: str
    source: str
    reads: float
    refreshes: float


@torch.no_grad()
def measure_reuse(model: nn.Module) -> list[ReuseRow]:
    """All pairs of a layer and an earlier one, in the order of the network.

    Args:
        model: A CondenseNet in either form; masks count, so do not wait for the last stage.

    Raises:
        UsageError: It is another network.

    Source:
        arXiv:1608.06993, figure 5.
    """
    if not isinstance(model, CondenseNet):
        raise UsageError(
            f"--reuse draws which earlier features each layer of a CondenseNet uses; "
            f"this is a {type(model).__name__}.\n  See: chanzoo ls 'condensenet*'"
        )
    sources = [("stem", model.stem.out_channels)]
    rows = []
    for name, layer in model.named_modules():
        if not isinstance(layer, CondensingLayer):
            continue
        sizes = [size for _, size in sources]
        reads = [part.mean().item() for part in _magnitudes(layer.conv1).split(sizes)]
        refreshes = [0.0] * len(sizes)
        if layer.sfr is not None:
            refreshes = [part.mean().item() for part in _magnitudes(layer.sfr).split(sizes)]
        rows += [
            ReuseRow(name, source, *values)
            for (source, _), *values in zip(sources, reads, refreshes, strict=True)
        ]
        sources.append((name, layer.conv2.out_channels))
    return rows


def _magnitudes(layer: nn.Module) -> Tensor:
    """Mean magnitude of a layer's weights at each old feature; dropped ones count as zeros."""
    if isinstance(layer, LearnedGroupConv2d):
        return layer.masked_weight().abs().mean(dim=(0, 2, 3)).float()
    if isinstance(layer, SparseReactivation):
        return layer.masked_weight().abs().mean(dim=(1, 2, 3)).float()
    if isinstance(layer, CondensedConv2d):
        columns = (
            layer.weight.abs().view(layer.groups, -1, layer.weight.shape[1]).sum(dim=1).flatten().float()
        )
        total = torch.zeros(layer.in_channels, device=columns.device).index_add_(0, layer.index, columns)
        return total / layer.out_channels
    assert isinstance(layer, CondensedReactivation)
    rows = layer.weight.abs().sum(dim=(1, 2, 3)).float()
    total = torch.zeros(layer.out_channels, device=rows.device).index_add_(0, layer.index, rows)
    return total / layer.in_channels
