"""What holds for Channel Equilibrium whatever the numbers."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from chanzoo.layers import ChannelEquilibrium, inverse_sqrt
from chanzoo.layers.decorrelation import block_size

seeds = st.integers(0, 2**31)


@given(st.integers(1, 4096), st.integers(1, 256))
def test_block_size_divides_and_is_a_halving(channels: int, group_size: int) -> None:
    size = block_size(channels, group_size)
    assert channels % size == 0
    halvings = [group_size >> k for k in range(group_size.bit_length())]
    assert size == next(half for half in halvings if channels % half == 0)


@given(st.integers(1, 12), st.integers(1, 3), seeds)
def test_inverse_sqrt_whitens(c: int, g: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(g, c, 4 * c, generator=generator, dtype=torch.float64)
    cov = factor @ factor.transpose(1, 2) / (4 * c) + 0.05 * torch.eye(c, dtype=torch.float64)
    root = inverse_sqrt(cov, newton_steps=14)  # enough for this spread; many more would amplify rounding
    whitened = root @ cov @ root
    torch.testing.assert_close(whitened, torch.eye(c, dtype=torch.float64).expand(g, c, c), rtol=0, atol=1e-4)


@given(st.integers(1, 16), st.integers(1, 5), st.floats(-4, 4), seeds)
def test_operators_have_eigenvalues_between_one_and_the_limit(
    c: int, steps: int, scale: float, seed: int
) -> None:
    factor = torch.randn(2, c, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cov = 10**scale * factor @ factor.transpose(1, 2) + 1e-5 * torch.eye(c, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(inverse_sqrt(cov, steps, rescale=False))
    assert eigenvalues.min() >= 1 - 1e-9
    assert eigenvalues.max() <= 1.5**steps + 1e-9


@given(st.sampled_from([(8, 8), (16, 4), (24, 16), (10, 16)]), st.booleans(), seeds)
def test_permuting_channels_within_groups_permutes_decorrelation(
    shape: tuple[int, int], training: bool, seed: int
) -> None:
    channels, group_size = shape
    generator = torch.Generator().manual_seed(seed)
    layer = ChannelEquilibrium(channels, group_size).decorrelation.double()
    layer(torch.randn(2, channels, 4, 5, generator=generator, dtype=torch.float64))
    d = layer.group_size
    order = torch.cat([k * d + torch.randperm(d, generator=generator) for k in range(layer.groups)])
    x = torch.randn(3, channels, 4, 5, generator=generator, dtype=torch.float64)
    layer.train(training)
    expected = layer(x)[:, order]
    local = order.view(-1, d) - d * torch.arange(layer.groups)[:, None]
    for k, permutation in enumerate(local):  # the averaged operators follow their channels
        layer.running_wm[k] = layer.running_wm[k][permutation][:, permutation]
    torch.testing.assert_close(layer(x[:, order]), expected)
