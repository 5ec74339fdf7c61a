"""Figures of a network: size, cost, accuracy, channel statistics."""

from ..macs import count_macs, count_params
from .accuracy import Accuracy, evaluate

__all__ = ["Accuracy", "count_macs", "count_params", "evaluate"]
