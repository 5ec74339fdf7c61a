"""Time of a forward, of several networks side by side."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.benchmark import Timer

__all__ = ["measure_latency"]


def measure_latency(
    models: Mapping[str, nn.Module],
    input_size: tuple[int, int, int],
    *,
    batch_size: int = 1,
    rounds: int = 5,
    seconds: float = 0.2,
) -> dict[str, float]:
    """Seconds per image in evaluation, by name.

    The networks take turns, so that what else the machine does is shared by all of them: compare the numbers
    of one call with each other, not with those of another.

    Args:
        models: By name; on their devices, left in their modes.
        input_size: Channels, height, width.
        batch_size: Images at a time.
        rounds: Turns of each network; the median of their medians counts.
        seconds: Least time of a turn.
    """
    found: dict[str, list[float]] = {name: [] for name in models}
    modes = {name: model.training for name, model in models.items()}
    try:
        timers = {}
        for name, model in models.items():
            first = next(model.parameters())
            image = torch.randn(batch_size, *input_size, device=first.device, dtype=first.dtype)
            model.eval()
            timers[name] = Timer(
                "with torch.inference_mode(): model(image)",
                globals={"torch": torch, "model": model, "image": image},
                num_threads=torch.get_num_threads(),
            )
            timers[name].timeit(2)  # the first runs pick kernels
        for _ in range(rounds):
            for name, timer in timers.items():
                found[name].append(timer.blocked_autorange(min_run_time=seconds).median)
    finally:
        for name, model in models.items():
            model.train(modes[name])
    return {name: statistics.median(values) / batch_size for name, values in found.items()}
