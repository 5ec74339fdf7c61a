"""Statistics of norms, measured anew after a network was cut: the cheapest repair there is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..layers import AdaptiveInstanceInverse, BatchDecorrelation, ChannelEquilibrium
from .rank import images_of

__all__ = ["recalibrate_norms"]


@torch.no_grad()
def recalibrate_norms(
    model: nn.Module,
    loader: Iterable[Any],
    images: int = 1024,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Replace the running statistics of batch norms, and of Channel Equilibrium, by plain means over images.

    Weights stay. Everything else runs as in evaluation; modes and momenta are restored. After an error the
    statistics are the old ones.

    Args:
        model: On any device.
        loader: Batches of images ``(b, c, h, w)``, alone or first in a tuple; larger batches do better.
        images: Most to use; a last batch of a single image is left out.
        progress: Called after each batch with images done and all images.

    Returns:
        How many layers were measured; 0 for a network without any, which is left as it is.

    Raises:
        UsageError: The loader gives no batch of two images, or something else.
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    mixers = [m for m in model.modules() if isinstance(m, (BatchDecorrelation, AdaptiveInstanceInverse))]
    if not norms and not mixers:
        return 0
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    momenta: list[tuple[Any, Any]] = [(module, module.momentum) for module in (*norms, *mixers)]
    done = 0
    try:
        model.eval()
        for module in model.modules():
            if isinstance(module, ChannelEquilibrium) or module in {*norms, *mixers}:
                module.training = True  # of the layer itself, not of what it holds
        for norm in norms:
            norm.reset_running_stats()
        for item in loader:
            batch = images_of(item)[: images - done].to(device)
            if len(batch) < 2:
                break
            done += len(batch)
            for module in (*norms, *mixers):
                module.momentum = len(batch) / done  # the mean so far and that of the batch, by their images
            model(batch)
            if progress:
                progress(done, images)
            if done >= images:
                break
        if not done:
            raise UsageError("the loader gave no batch of two images or more: no statistics were measured.")
    except BaseException:
        model.load_state_dict(before)
        raise
    finally:
        for module, momentum in momenta:
            module.momentum = momentum
        for module, mode in modes:
            module.training = mode
    return len(norms) + len(mixers)
