"""Accuracy of a classifier on a folder of images, in one process or in several that share the work.

The numbers are those of timm's ``validate.py``: the same images, batches, arithmetic and ties. Sums are of
whole images, so several processes give what one gives: each takes every n-th image and none takes one twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ..errors import ChanzooError
from .images import Picked, open_images, open_loader

__all__ = ["Accuracy", "default_batch_size", "evaluate"]


@dataclass(frozen=True)
class Accuracy:
    """What was counted.

    Attributes:
        images: Images seen, by all processes together.
        top1_count: Those whose class came first.
        top5_count: Those whose class was among the first five (or among all, if the outputs are fewer).
        loss: Mean cross-entropy.
    """

    images: int
    top1_count: int
    top5_count: int
    loss: float

    @property
    def top1(self) -> float:
        """Fraction of images whose class came first."""
        return self.top1_count / self.images

    @property
    def top5(self) -> float:
        """Fraction of images whose class was among the first five."""
        return self.top5_count / self.images


def default_batch_size(device: torch.device | str) -> int:
    """Images at a time: 32 on CPUs, where the maps of more overrun caches and cost fresh memory; else 256."""
    return 32 if torch.device(device).type == "cpu" else 256


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data_dir: str | Path,
    *,
    split: str = "val",
    batch_size: int | None = None,
    workers: int = 0,
    device: torch.device | str = "cpu",
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    progress: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """Measure accuracy with the preprocessing that the network's config names.

    Where ``torch.distributed`` is initialised, every process calls this and every process gets the sums.

    Args:
        model: A timm network; moved to ``device``, otherwise as before afterwards.
        data_dir: See :func:`chanzoo.measure.images.open_images`.
        split: Part of the data.
        batch_size: Images at a time, per process; if not given, what :func:`default_batch_size` says.
        workers: Processes that read images; 0 for none besides this one.
        device: Where to compute.
        amp: Compute in 16 bits where that is safe.
        amp_dtype: Which 16 bits.
        progress: Called after each batch with the images done and all images of this process.

    Raises:
        UsageError: The folder is not what the network needs; nothing was computed.
        ChanzooError: An output is not finite.
    """
    device = torch.device(device)
    batch_size = default_batch_size(device) if batch_size is None else batch_size
    dataset = open_images(model, data_dir, split)
    if dist.is_available() and dist.is_initialized():
        dataset = Picked(dataset, range(dist.get_rank(), len(dataset), dist.get_world_size()))
    loader = open_loader(model, dataset, batch_size=batch_size, workers=workers, device=device)
    was_training = model.training
    model.to(device).eval()
    images, top1, top5, loss = 0, 0, 0, 0.0
    try:
        for batch, target in loader:
            with torch.autocast(device.type, dtype=amp_dtype) if amp else nullcontext():
                output = model(batch)
                mean_loss = F.cross_entropy(output, target).item()
            best = output.topk(min(5, output.shape[1])).indices
            hits = best == target[:, None]
            images += len(target)
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.sum())
            loss += mean_loss * len(target)
            if progress:
                progress(images, len(dataset))
    finally:
        model.train(was_training)
    images, top1, top5, loss = _sum_processes(images, top1, top5, loss, device)
    if not math.isfinite(loss):
        hint = " Try without --amp, or with --amp-dtype bfloat16." if amp else ""
        raise ChanzooError(f"the network's outputs are not finite; there is no accuracy to report.{hint}")
    return Accuracy(images, top1, top5, loss / images)


def _sum_processes(
    images: int, top1: int, top5: int, loss: float, device: torch.device
) -> tuple[int, int, int, float]:
    if not (dist.is_available() and dist.is_initialized()):
        return images, top1, top5, loss
    # 64-bit floats hold every whole number up to 2^53.
    sums = torch.tensor([images, top1, top5, loss], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    counts = [round(value) for value in sums[:3].tolist()]
    return counts[0], counts[1], counts[2], sums[3].item()
