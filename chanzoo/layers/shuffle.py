"""Channel shuffle: interleave the channels of groups."""

# No postponed annotations here: scripting needs the type of an argument, not its name.

from torch import Tensor

__all__ = ["channel_shuffle"]


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave groups of channels: the first of each group, then the second of each, and so on.

    Args:
        x: Maps whose channels lie group by group.
        groups: Divides the channels.

    Shape:
        x ``(b, c, h, w)`` → same; channel ``g · (c / groups) + a`` moves to ``a · groups + g``.

    Source:
        Zhang et al., "ShuffleNet" (CVPR 2018, arXiv:1707.01083).
    """
    b, c, h, w = x.shape
    return x.reshape(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)
