"""Zeros that stay zeros while a network trains: pruning without changing a shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError

__all__ = ["hold_masks"]


def hold_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> Any:
    """Set entries of parameters to zero, now and before every forward.

    An optimiser moves them in between, by momentum and weight decay of what they were; the next forward, in
    training or evaluation, sees zeros again.

    Args:
        model: Whose parameters they are.
        masks: Name of a parameter → which entries along its first axis stay, ``(n,)`` of truth values.

    Returns:
        A handle whose ``remove()`` lets the parameters go.

    Raises:
        UsageError: A name or length is not the network's. Nothing is changed then.
    """
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise UsageError(
                f'masks name "{name}", which is no parameter of the network.\n  Nothing was masked.'
            )
        found = (mask.dtype, tuple(mask.shape))
        expected = (torch.bool, (parameters[name].shape[0],))
        if found != expected:
            raise UsageError(
                f'the mask of "{name}" is not one of its first axis.\n'
                f"  expected  {expected[0]} {list(expected[1])}\n  found     {found[0]} {list(found[1])}\n"
                "  Nothing was masked."
            )

    @torch.no_grad()
    def hold(_module: nn.Module, _args: Any) -> None:
        for name, mask in masks.items():
            parameter = model.get_parameter(name)
            parameter[~mask.to(parameter.device)] = 0

    hold(model, ())
    return model.register_forward_pre_hook(hold)
