"""Figures of a network: size, cost, accuracy, channel statistics."""

from .accuracy import Accuracy, evaluate
from .macs import count_macs, count_params

__all__ = ["Accuracy", "count_macs", "count_params", "evaluate"]
