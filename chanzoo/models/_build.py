"""The thin call into timm's builder, and the config rows that our families share."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg
from torch import nn

__all__ = ["CIFAR10_MEAN", "CIFAR10_STD", "build", "cifar_cfg"]

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


def cifar_cfg(**kwargs: Any) -> dict[str, Any]:
    """Config of a network for 32×32 images with ten classes."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": CIFAR10_MEAN,
        "std": CIFAR10_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        **kwargs,
    }


def build(
    model_cls: Any,
    variant: str,
    pretrained: bool,
    *,
    defaults: dict[str, Any] | None = None,
    out_indices: tuple[int, ...] = (0, 1, 2, 3, 4),
    **kwargs: Any,
) -> nn.Module:
    """Build ``variant`` through timm; ``defaults`` give way to what the user passed."""
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=out_indices, flatten_sequential=True),
        **{**(defaults or {}), **kwargs},
    )
