"""Batch decorrelation: a linear map over small channel groups, made from the batch covariance.

Follows Shao et al., "Channel Equilibrium Networks for Learning Deep Representation" (ICML 2020,
arXiv:2003.00214). As in the authors' networks the map acts on the uncentred input and keeps the
trace scaling of the covariance. Unlike their code, statistics are always computed in 32-bit (or
wider) floats, fresh buffers are valid, and statistics can be shared between processes.
"""

# No postponed annotations in this file: TorchScript reads the types of buffers from the class.

import torch
from torch import Tensor, nn

__all__ = ["BatchDecorrelation", "block_size", "inverse_sqrt", "sample_statistics"]


def block_size(channels: int, group_size: int) -> int:
    """Largest group size reached from ``group_size`` by halving that divides ``channels``.

    Args:
        channels: Number of channels to split into groups.
        group_size: Requested channels per group.

    Raises:
        ValueError: ``channels`` or ``group_size`` is below 1.

    Source:
        arXiv:2003.00214, the authors' rule for widths that are not a multiple of the group size.

    Example:
        >>> block_size(64, 16), block_size(20, 16), block_size(17, 16)
        (16, 4, 1)
    """
    if channels < 1 or group_size < 1:
        raise ValueError(
            f"channels={channels} and group_size={group_size}: both must be 1 or more; nothing was built."
        )
    while channels % group_size:
        group_size //= 2
    return group_size


def inverse_sqrt(cov: Tensor, newton_steps: int = 3, rescale: bool = True) -> Tensor:
    """Approximate the inverse square root of each covariance matrix in a stack.

    Scales every matrix to unit trace so that Newton's iteration converges, then undoes the scaling.

    Args:
        cov: Symmetric, positive definite. Add a small number to the diagonal first.
        newton_steps: More steps, more accuracy; the authors use 3.
        rescale: Undo the trace scaling. The authors' layer does not.

    Shape:
        cov ``(g, c, c)`` → ``(g, c, c)``, same dtype; ``g`` channel groups of ``c`` channels.

    Raises:
        ValueError: ``newton_steps`` is below 1, or ``cov`` is not a stack of square matrices.

    Source:
        Shao et al. 2020, arXiv:2003.00214 (batch decorrelation).

    Example:
        >>> whitener = inverse_sqrt(4 * torch.eye(2)[None], newton_steps=8)
        >>> round(whitener[0, 0, 0].item(), 4)
        0.5
    """
    if newton_steps < 1:
        raise ValueError(f"newton_steps={newton_steps}: at least 1 step is needed.")
    if cov.dim() != 3 or cov.shape[1] != cov.shape[2]:
        raise ValueError(f"cov has shape {list(cov.shape)}: expected a stack of square matrices (g, c, c).")
    trace = torch.diagonal(cov, dim1=1, dim2=2).sum(dim=1).view(-1, 1, 1)
    scaled = cov / trace
    # The first step from the identity needs no product: 1.5 I - 0.5 S.
    root = 1.5 * torch.eye(cov.shape[1], dtype=cov.dtype, device=cov.device) - 0.5 * scaled
    for _ in range(newton_steps - 1):
        cube = torch.bmm(torch.bmm(root, root), root)
        root = 1.5 * root - 0.5 * torch.bmm(cube, scaled)
    return root / trace.sqrt() if rescale else root


class _SampleStatistics(torch.autograd.Function):
    """Per-sample channel means and centred second moments; keeps only its input for the backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        stats = _sample_statistics(x)
        ctx.save_for_backward(x, stats[0])
        return stats

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_moment: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean = ctx.saved_tensors
        # moment = xc xcᵀ with xc = x - mean, whose pixels sum to zero, so the mean gets no share of it.
        symmetric = grad_moment + grad_moment.transpose(1, 2)
        offset = grad_mean.unsqueeze(-1) / x.shape[2] - torch.bmm(symmetric, mean.unsqueeze(-1))
        return torch.baddbmm(offset, symmetric, x.to(symmetric.dtype)).to(x.dtype)


def _sample_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.mean(dim=2)
    centred = x - mean.unsqueeze(-1)
    return mean, torch.bmm(centred, centred.transpose(1, 2))


def sample_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and centred second moment of each matrix in a stack, at least in 32-bit floats.

    Shape:
        x ``(b, c, n)`` → mean ``(b, c)``, moment ``(b, c, c)`` = Σ over the ``n`` pixels of the
        outer product of the centred columns (a sum, not an average).

    Source:
        arXiv:2003.00214; splitting the batch covariance by sample gives the covariance of the batch
        and the variances of each sample in one pass.
    """
    if not torch.jit.is_scripting():
        return _SampleStatistics.apply(x)
    return _sample_statistics(x)


class _AllReduceSum(torch.autograd.Function):
    """Sum over all processes, in both directions."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.clone()
        torch.distributed.all_reduce(grad)
        return grad


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum ``value`` over all processes, differentiably; the value itself without a process group.

    Shape:
        any shape → the same.

    Source:
        Gradient of a sum over ranks: the sum of the ranks' gradients.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  # TorchScript leaves out the inside of this alone
        if is_distributed():
            return _AllReduceSum.apply(value)
    return value


def is_distributed() -> bool:
    """Whether a process group of more than one process is running."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def instance_variance(x: Tensor) -> Tensor:
    """Unbiased variance over the pixels of each channel of each sample; 0 for a single pixel.

    Subtracting the mean and taking the norm is as exact as ``torch.var`` and several times faster on CPU.

    Shape:
        x ``(b, c, h, w)`` → ``(b, c)``, at least 32-bit floats.

    Source:
        arXiv:2003.00214 (input of the adaptive instance inverse).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
    centred = x - x.mean(dim=2, keepdim=True)
    return torch.linalg.vector_norm(centred, dim=2).square() / max(x.shape[2] - 1, 1)


def one_pass_instance_variance(x: Tensor) -> Tensor:
    """:func:`instance_variance` without a centred copy of the input, for inference.

    ``‖x‖² − n · mean²`` loses relative accuracy where a channel's mean dwarfs its deviation (1e-3 at a
    hundredfold), and may end a rounding error below 0. What such a channel adds to the input of the gate is
    small beside the others' variances.

    Shape:
        x ``(b, c, h, w)`` → ``(b, c)``, at least 32-bit floats.

    Source:
        arXiv:2003.00214 (input of the adaptive instance inverse).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
    pixels = x.shape[2]
    total = x.sum(dim=2)
    spread = torch.linalg.vector_norm(x, dim=2).square_().addcmul_(total, total, value=-1.0 / pixels)
    return spread.mul_(1.0 / max(pixels - 1, 1))  # few small operations: they cost more than their sums


class BatchDecorrelation(nn.Module):
    """Multiply each channel group by the approximate inverse root of its batch covariance.

    ``y = P x`` with ``P`` from :func:`inverse_sqrt` of the trace-normalised covariance (the trace is
    not put back, ``x`` is not centred). In training ``P`` comes from the batch and gradients flow
    through it; in evaluation it is the moving average of the operators seen in training.

    Attributes:
        running_wm: Buffer ``(g, d, d)``, the averaged operators, identity when fresh; eigenvalues lie
            in [1, 1.5 ** newton_steps].

    Source:
        Shao et al. 2020, arXiv:2003.00214 (batch decorrelation).
    """

    running_wm: Tensor

    def __init__(
        self,
        channels: int,
        group_size: int = 16,
        newton_steps: int = 3,
        eps: float = 1e-5,
        momentum: float = 0.1,
        sync: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the layer.

        Args:
            channels: Channels of the input.
            group_size: Channels per group; halved until it divides ``channels``.
            newton_steps: Newton iterations (the paper's T). Trained weights expect 3.
            eps: Added to the diagonal of the covariance.
            momentum: Weight of the newest operator in the moving average.
            sync: Share statistics between processes in training.
            device: Where to create the buffer.
            dtype: Type of the buffer.

        Raises:
            ValueError: ``channels``, ``group_size`` or ``newton_steps`` is below 1.
        """
        super().__init__()
        if newton_steps < 1:
            raise ValueError(f"newton_steps={newton_steps}: at least 1 step is needed.")
        self.channels = channels
        self.group_size = block_size(channels, group_size)
        self.groups = channels // self.group_size
        self.newton_steps = newton_steps
        self.eps = eps
        self.momentum = momentum
        self.sync = sync
        identity = torch.eye(self.group_size, device=device, dtype=dtype)
        self.register_buffer("running_wm", identity.repeat(self.groups, 1, 1))

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{self.channels}, groups={self.groups}, group_size={self.group_size}, sync={self.sync}"

    def whitener(self, mean: Tensor, moment: Tensor, pixels: int) -> Tensor:
        """Operators of this batch; updates the moving average.

        Args:
            mean: Channel means of each sample.
            moment: Centred second moments of each sample, summed over its pixels.
            pixels: Pixels of one sample.

        Shape:
            mean ``(b, g, d)``, moment ``(b, g, d, d)`` → ``(g, d, d)``.

        Source:
            arXiv:2003.00214: covariance biased, ``eps`` added before the trace is taken.
        """
        sums = torch.cat([mean.sum(dim=0).flatten(), mean.new_full((1,), float(mean.shape[0]))])
        sums = sums * pixels
        if self.sync:
            sums = all_reduce_sum(sums)
        count = sums[-1]
        centre = (sums[:-1] / count).view(self.groups, self.group_size)
        # Σ over samples of (their own spread + pixels × offset offsetᵀ) is the spread of the whole batch.
        offset = (mean - centre).transpose(0, 1)
        total = moment.sum(dim=0) + pixels * torch.bmm(offset.transpose(1, 2), offset)
        if self.sync:
            total = all_reduce_sum(total)
        eye = torch.eye(self.group_size, dtype=total.dtype, device=total.device)
        whitener = inverse_sqrt(total / count + self.eps * eye, self.newton_steps, rescale=False)
        self.running_wm.lerp_(whitener.detach().to(self.running_wm.dtype), self.momentum)
        return whitener

    def forward(self, x: Tensor) -> Tensor:
        """Decorrelate the channels of each group.

        Shape:
            x ``(b, c, h, w)`` → the same.
        """
        b, c, h, w = x.shape
        if self.training:
            mean, moment = sample_statistics(x.reshape(b * self.groups, self.group_size, h * w))
            whitener = self.whitener(
                mean.view(b, self.groups, self.group_size),
                moment.view(b, self.groups, self.group_size, self.group_size),
                h * w,
            )
        else:
            whitener = self.running_wm
        grouped = x.reshape(b, self.groups, self.group_size, h * w)
        return torch.matmul(whitener.to(x.dtype), grouped).view(b, c, h, w)
