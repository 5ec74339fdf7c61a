"""What a network costs with some of its channels gone, worked out without building it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..layers import ChannelEquilibrium
from .groups import is_depthwise
from .surgery import Masks

__all__ = ["Ledger"]


class Ledger:
    """Multiply-adds and parameters of a network, by what they depend on.

    The sums are those of :func:`chanzoo.count_macs` and :func:`chanzoo.count_params` of the narrow network.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int]) -> None:
        """Count a network once.

        Args:
            model: The full network; left untouched.
            input_size: Channels, height, width.
        """
        # (amount, layer, how often its channels out and in count)
        self.entries: dict[str, list[tuple[int, str, int, int]]] = {"macs": [], "params": []}
        self.widths: dict[str, tuple[int, int]] = {}
        ghost: Any = copy.deepcopy(model).to("meta").eval()
        modules = dict(ghost.named_modules())
        mixers = [name for name, module in modules.items() if isinstance(module, ChannelEquilibrium)]
        for name, module in modules.items():
            self._add_params(name, module, next((m for m in mixers if name.startswith(f"{m}.")), ""))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            ghost(torch.empty(1, *input_size, device="meta", dtype=next(ghost.parameters()).dtype))
        rest = counter.get_total_flops() // 2
        for path, counts in counter.get_flop_counts().items():
            name, macs = path.partition(".")[2], sum(counts.values()) // 2
            module = modules.get(name)
            parts: list[tuple[int, int, int]] = []  # amount, powers
            if isinstance(module, nn.Conv2d):
                parts = [(macs, 1, 0 if is_depthwise(module) else 1)]
            elif isinstance(module, nn.Linear):
                parts = [(macs, 1, 1)]
            elif isinstance(module, ChannelEquilibrium):
                gate = module.reweight.fc1.weight.numel() + module.reweight.fc2.weight.numel()
                parts = [(gate, 1, 0), (macs - gate, 2, 0)]  # each channel is mixed from all of its group
            for amount, out_power, in_power in parts:
                self.entries["macs"].append((amount, name, out_power, in_power))
                rest -= amount
        self.entries["macs"].append((rest, "", 0, 0))

    def _add_params(self, name: str, module: nn.Module, mixer: str) -> None:
        if isinstance(module, nn.Conv2d):
            self.widths[name] = (module.out_channels, module.in_channels)
        elif isinstance(module, nn.Linear):
            self.widths[name] = (module.out_features, module.in_features)
        elif isinstance(module, ChannelEquilibrium):
            self.widths[name] = (module.decorrelation.channels, 1)
        for leaf, parameter in module.named_parameters(recurse=False):
            layer, out_power, in_power = name, 1, 0
            if mixer:
                layer, out_power = mixer, int(parameter.ndim > 1)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                in_power = int(leaf == "weight" and not is_depthwise(module))
            elif isinstance(module, ChannelEquilibrium):
                out_power = 0  # the gate between its branches
            else:
                layer = f"{name}.{leaf}"  # of a norm, or of a block: masks name one or the other
                self.widths[layer] = (parameter.numel(), 1)
            self.entries["params"].append((parameter.numel(), layer, out_power, in_power))

    def __call__(self, what: str, masks: Masks) -> int:
        """The sum with the removed channels gone.

        Args:
            what: ``"macs"`` or ``"params"``.
            masks: Which channels stay.
        """
        kept = {place: int(mask.sum()) for place, mask in masks.items()}
        total = 0
        for amount, layer, out_power, in_power in self.entries[what]:
            out, into = self.widths.get(layer, (1, 1))
            parent = layer.rpartition(".")[0] if what == "params" and (into, in_power) == (1, 0) else layer
            new_out = kept.get((layer, "out"), kept.get((parent, "out"), out))
            stays = new_out**out_power * kept.get((layer, "in"), into) ** in_power
            total += amount * stays // (out**out_power * into**in_power)
        return total
