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
    shufflenetv2,
)
from ._saved import check_folder
from .insert import add_channel_equilibrium
from .reactivate import add_reactivation

__all__ = [
    "add_channel_equilibrium",
    "add_reactivation",
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
    "shufflenetv2",
]
