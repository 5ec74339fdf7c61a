"""Network families; importing this package registers every name with timm."""

from . import ce_resnet, cifar_resnet

__all__ = ["ce_resnet", "cifar_resnet"]
