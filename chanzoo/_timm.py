"""Every import of a private timm name, in one place, so that a timm release can break one file only.

* ``feature_take_indices`` is what timm's own models call in ``forward_intermediates`` and
  ``prune_intermediate_layers``; timm does not export it.
* ``decode_arch_def`` and ``round_channels`` are how timm writes down and scales
  MobileNetV2; the EfficientNet class takes block arguments in no other form.
* ``update_model_args`` notes a change of a built network among the arguments that rebuild it.
* ``DepthwiseSeparableConv`` and ``InvertedResidual`` are the blocks timm's builder makes for it; we extend
  them.
"""

from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args

__all__ = [
    "DepthwiseSeparableConv",
    "InvertedResidual",
    "decode_arch_def",
    "feature_take_indices",
    "round_channels",
    "update_model_args",
]
