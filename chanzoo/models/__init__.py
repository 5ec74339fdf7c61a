"""Network families; importing this package registers every name with timm."""

from . import (
    ce_mobilenetv2,
    ce_resnet,
    cifar_densenet,
    cifar_googlenet,
    cifar_resnet,
    cifar_vgg,
    condensenet,
    hrank,
    narrow,
)
from ._saved import check_folder
from .insert import add_channel_equilibrium

__all__ = [
    "add_channel_equilibrium",
    "ce_mobilenetv2",
    "ce_resnet",
    "check_folder",
    "cifar_densenet",
    "cifar_googlenet",
    "cifar_resnet",
    "cifar_vgg",
    "condensenet",
    "hrank",
    "narrow",
]
