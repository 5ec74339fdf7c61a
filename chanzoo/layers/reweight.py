"""Instance re-weighting: a gain per sample and channel from that sample's channel variances.

Follows Shao et al., "Channel Equilibrium Networks for Learning Deep Representation" (ICML 2020,
arXiv:2003.00214). Unlike the authors' code the fresh layer can be evaluated (its scale starts at 1)
and an input without any variance gives finite numbers.
"""

# No postponed annotations in this file: TorchScript reads the types of buffers from the class.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decorrelation import all_reduce_sum, instance_variance

__all__ = ["AdaptiveInstanceInverse"]


class AdaptiveInstanceInverse(nn.Module):
    """Gain in (0, 1) per sample and channel, over one scale for the whole layer.

    ``y = sigmoid(fc2(relu(norm(fc1(v))))) / s · x`` with ``v`` the variances over the pixels of a
    sample. ``s`` is the root mean variance of the batch in training, its moving average in evaluation.

    Attributes:
        running_scale: Buffer ``(1,)``, the averaged scale, 1 when fresh, positive.

    Source:
        Shao et al. 2020, arXiv:2003.00214 (adaptive instance inverse; "adaptive reweight" in the
        authors' code).
    """

    running_scale: Tensor

    def __init__(
        self,
        channels: int,
        reduction: int = 4,
        momentum: float = 0.1,
        sync: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the layer.

        Args:
            channels: Channels of the input.
            reduction: Channels per hidden feature of the two linear maps.
            momentum: Weight of the newest scale in the moving average.
            sync: Share the scale between processes in training.
            device: Where to create parameters and buffer.
            dtype: Type of parameters and buffer.
        """
        super().__init__()
        hidden = max(1, channels // reduction)
        self.momentum = momentum
        self.sync = sync
        self.fc1 = nn.Linear(channels, hidden, bias=False, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, channels, bias=False, device=device, dtype=dtype)
        self.register_buffer("running_scale", torch.ones(1, device=device, dtype=dtype))

    def gate(self, variance: Tensor) -> Tensor:
        """Gain before the division by the scale.

        Shape:
            variance ``(b, c)`` → ``(b, c)``, values in (0, 1), type of ``variance``.
        """
        dtype = variance.dtype
        hidden = F.linear(variance, self.fc1.weight.to(dtype))
        hidden = F.layer_norm(
            hidden,
            self.norm.normalized_shape,
            self.norm.weight.to(dtype),
            self.norm.bias.to(dtype),
            self.norm.eps,
        )
        return torch.sigmoid(F.linear(F.relu(hidden), self.fc2.weight.to(dtype)))

    def scale(self, variance: Tensor) -> Tensor:
        """Scale of this batch (training) or its moving average (evaluation).

        Shape:
            variance ``(b, c)`` → ``(1,)``, type of ``variance``.
        """
        if not self.training:
            return self.running_scale.to(variance.dtype)
        sums = torch.stack([variance.sum(), variance.new_full((), float(variance.numel()))])
        if self.sync:
            sums = all_reduce_sum(sums)
        # The floor is below the square of any deviation that 32-bit statistics can resolve.
        scale = (sums[0] / sums[1]).clamp(min=1e-12).sqrt().view(1)
        self.running_scale.lerp_(scale.detach().to(self.running_scale.dtype), self.momentum)
        return scale

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight the channels of each sample.

        Shape:
            x ``(b, c, h, w)`` → the same.
        """
        variance = instance_variance(x)
        gain = self.gate(variance) / self.scale(variance)
        return x * gain.to(x.dtype)[:, :, None, None]
