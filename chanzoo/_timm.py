"""Every import of a private timm name, in one place, so that a timm release can break one file only.

``feature_take_indices`` is what timm's own models call in ``forward_intermediates`` and
``prune_intermediate_layers``; timm does not export it.
"""

from timm.models._features import feature_take_indices

__all__ = ["feature_take_indices"]
