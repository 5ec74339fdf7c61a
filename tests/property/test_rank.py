"""What holds for ranks of maps and for selection whatever the numbers."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from chanzoo.compress import keep_count, rank_of_maps, select

seeds = st.integers(0, 2**31)
sides = st.integers(1, 40)


def one_by_one(maps: Tensor) -> Tensor:
    return torch.stack([torch.linalg.matrix_rank(m) for m in maps])


@given(sides, sides, st.floats(0, 1), st.floats(-25, 25), seeds)
def test_rectified_noise(h: int, w: int, density: float, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(4, h, w, generator=generator).abs()
    maps *= torch.rand(4, h, w, generator=generator) < density
    assert torch.equal(rank_of_maps(10**scale * maps), one_by_one(10**scale * maps))


@given(sides, sides, st.integers(0, 40), seeds)
def test_products_of_whole_numbers_have_the_rank_of_their_factors(h: int, w: int, r: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-3, 4, (4, h, r), generator=generator).float()
    right = torch.randint(-3, 4, (4, r, w), generator=generator).float()
    maps = left @ right
    ranks = rank_of_maps(maps)
    assert torch.equal(ranks, one_by_one(maps))
    assert ranks.max() <= min(h, w, r)


@given(st.integers(2, 32), st.integers(0, 32), st.floats(0.0, 5.0), seeds)
def test_spectra_that_keep_off_the_threshold(n: int, r: int, decades: float, seed: int) -> None:
    """Singular values down to ten times the threshold, then none above a tenth of it."""
    r = min(n, r)
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(4, n, n, generator=generator).double())[0] for _ in range(2))
    eps = torch.finfo(torch.float32).eps
    values = torch.full((n,), 0.1 * eps, dtype=torch.float64)
    values[:r] = torch.logspace(0, -decades, n, dtype=torch.float64)[:r].clamp(min=10 * n * eps)
    maps = (left * values @ right.mT).float()
    if r == 0:  # nothing but the noise, which has full rank by its own measure
        return
    assert rank_of_maps(maps).tolist() == one_by_one(maps).tolist() == [r] * 4


@given(sides, sides, seeds)
def test_bounds_transposition_and_powers_of_two(h: int, w: int, seed: int) -> None:
    maps = torch.randn(4, h, w, generator=torch.Generator().manual_seed(seed)).relu()
    ranks = rank_of_maps(maps)
    assert ranks.min() >= 0
    assert ranks.max() <= min(h, w)
    assert torch.equal(rank_of_maps(maps.mT), ranks)
    assert torch.equal(rank_of_maps(2.0**-60 * maps), ranks)


@given(st.integers(1, 2048), st.floats(0, 0.99))
def test_both_rules_agree_within_one(channels: int, rate: float) -> None:
    first = channels - int(rate * channels)
    assert keep_count(channels, rate, "v1") == first
    if int(channels * (1 - rate)):
        assert first - keep_count(channels, rate) in (0, 1)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_no_filter_that_goes_has_more_than_one_that_stays(scores: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, len(scores)))
    kept = select(torch.tensor(scores), keep).tolist()
    assert kept == sorted(set(kept))
    assert len(kept) == keep
    gone = [i for i in range(len(scores)) if i not in kept]
    assert all((scores[i], i) < (scores[j], j) for i in gone for j in kept)
