"""What holds for layers that learn their connections, whatever their sizes, G and C."""

import copy
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from chanzoo.layers import LearnedGroupConv2d, SparseReactivation


@st.composite
def layers(draw: st.DrawFn) -> Any:
    """A layer of either kind with G and C of their own, weights and a norm drawn by lot, in 64 bits."""
    kind = draw(st.sampled_from([LearnedGroupConv2d, SparseReactivation]))
    groups, factor = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    dropped, grouped = factor * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))
    sizes = (grouped, dropped) if kind is SparseReactivation else (dropped, grouped)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layer = kind(*sizes, groups, factor, act_layer=draw(st.sampled_from(["relu", "hard_swish"])))
    nn.init.uniform_(layer.norm.weight, -1, 2)
    nn.init.normal_(layer.norm.bias)
    layer.norm.running_mean.normal_()
    layer.norm.running_var.uniform_(0.5, 2)
    return layer.double().eval()


@given(layers())
def test_masks_only_lose_and_end_with_one_of_c_in_each_group(layer: Any) -> None:
    before = layer.alive().clone()
    assert before.all()
    for stage in range(1, layer.condensation_factor):
        nn.init.normal_(layer.weight)  # between stages the layer is trained
        layer.condense_to(stage)
        alive = layer.alive().clone()
        assert not (alive & ~before).any()
        before = alive
    assert (before.sum(dim=1) == layer.candidates // layer.condensation_factor).all()


@given(layers())
def test_one_jump_is_the_single_steps(layer: Any) -> None:
    jump = copy.deepcopy(layer)
    for stage in range(1, layer.condensation_factor):
        layer.condense_to(stage)
    jump.condense_to(layer.condensation_factor - 1)
    assert torch.equal(layer.mask, jump.mask)


@given(layers(), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
def test_condensed_equals_masked(layer: Any, images: int, h: int, w: int) -> None:
    layer.condense_to(layer.condensation_factor - 1)
    maps = [torch.randn(images, layer.in_channels, h, w, dtype=torch.float64)]
    if isinstance(layer, SparseReactivation):
        maps.append(torch.randn(images, layer.out_channels, h, w, dtype=torch.float64))
    small = layer.condensed()
    torch.testing.assert_close(small(*maps), layer(*maps), rtol=1e-12, atol=1e-12)
    assert small.weight.numel() == layer.weight.numel() // layer.condensation_factor
