"""Parameters and multiply-adds of a network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_macs", "count_params", "input_size_of"]


def count_params(model: nn.Module) -> int:
    """Number of parameters; buffers do not count."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-adds of one image in evaluation: convolutions, linear layers and matrix products.

    Element-wise work (norms, activations, additions) is not counted, as in most papers. Nothing is
    computed: the network is copied to the meta device.

    Args:
        model: Any network; left untouched.
        input_size: Channels, height, width.

    Source:
        Half of what ``torch.utils.flop_counter`` counts.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    dtype = next((p.dtype for p in shadow.parameters() if p.is_floating_point()), torch.float32)
    image = torch.empty(1, *input_size, device="meta", dtype=dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(image)
    return counter.get_total_flops() // 2


def input_size_of(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images a network is made for."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = cfg.get("input_size") or (3, 224, 224)
    return int(getattr(model, "in_chans", channels)), int(height), int(width)
