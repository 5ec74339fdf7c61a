"""Figures of a network: size, cost, accuracy, channel statistics."""

from .macs import count_macs, count_params

__all__ = ["count_macs", "count_params"]
