"""Learned group convolution and sparse reactivation: masks, stages, lasso, and the condensed layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from chanzoo.errors import UsageError
from chanzoo.layers import CondensedConv2d, CondensedReactivation, LearnedGroupConv2d, SparseReactivation

# in, out, G, C: equal, fewer and more groups than the factor, groups of one, and no dropping at all
SIZES = [(16, 24, 4, 4), (24, 16, 2, 8), (24, 24, 8, 2), (24, 24, 4, 6), (6, 6, 6, 6), (8, 8, 4, 1)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def lgc(inputs: int, outputs: int, groups: int, factor: int, **options: object) -> LearnedGroupConv2d:
    return shaken(LearnedGroupConv2d(inputs, outputs, groups, factor, **options))


def sfr(inputs: int, outputs: int, groups: int, factor: int, **options: object) -> SparseReactivation:
    return shaken(SparseReactivation(outputs, inputs, groups, factor, **options))


def shaken(layer: Any) -> Any:
    """With a norm that is not the identity."""
    nn.init.uniform_(layer.norm.weight, -1, 2)
    nn.init.normal_(layer.norm.bias)
    layer.norm.running_mean.normal_()
    layer.norm.running_var.uniform_(0.5, 2)
    return layer.double().eval()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("make", [lgc, sfr])
def test_each_stage_drops_a_share_of_each_group_for_good(make, sizes) -> None:
    layer = make(*sizes)
    factor = sizes[3]
    before = layer.alive().clone()
    assert before.all()
    for stage in range(1, factor):
        nn.init.normal_(layer.weight)
        layer.condense_to(stage)
        alive = layer.alive()
        assert (alive.sum(dim=1) == layer.candidates - stage * (layer.candidates // factor)).all()
        assert not (alive & ~before).any()
        assert int(layer.stage) == stage
        before = alive.clone()
    assert layer.is_condensed()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("make", [lgc, sfr])
def test_the_condensed_layer_computes_the_same_and_leaves_the_source_alone(make, sizes) -> None:
    layer = make(*sizes, act_layer="hard_swish")
    layer.condense_to(sizes[3] - 1)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    small = layer.condensed()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    shared = {value.data_ptr() for value in layer.state_dict().values()}
    assert not shared & {value.data_ptr() for value in small.state_dict().values()}
    x = torch.randn(2, layer.in_channels, 5, 4, dtype=torch.float64)
    args = [x] if make is lgc else [x, torch.randn(2, layer.out_channels, 5, 4, dtype=torch.float64)]
    torch.testing.assert_close(small(*args), layer(*args), rtol=1e-12, atol=1e-12)
    groups, factor = sizes[2:]
    assert small.weight.numel() == layer.weight.numel() // factor
    assert len(small.index) == groups * layer.candidates // factor
    assert (small.index.view(groups, -1).diff(dim=1) > 0).all()


@pytest.mark.parametrize("make", [lgc, sfr])
def test_what_is_frozen_and_in_which_mode_stays(make) -> None:
    layer = make(*SIZES[0]).train()
    layer.condense_to(layer.condensation_factor - 1)
    layer.norm.eval().requires_grad_(False)
    small = layer.condensed()
    assert small.training and not small.norm.training
    assert [p.requires_grad for p in small.norm.parameters()] == [False, False] and small.weight.requires_grad
    layer.norm.train().requires_grad_(True)
    layer.weight.requires_grad_(False)
    small = layer.condensed()
    assert small.norm.training and small.norm.weight.requires_grad and not small.weight.requires_grad


def test_the_strongest_stay_and_of_equals_the_first() -> None:
    layer = LearnedGroupConv2d(4, 2, 1, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 3, 2, 3], [1, -3, 2, 3]]).view(2, 4, 1, 1))
    assert layer.importance().tolist() == [[2, 6, 4, 6]]
    layer.condense_to(3)
    assert layer.mask.tolist() == [[False, True, False, False]]
    layer.weight.data.zero_()
    fresh = LearnedGroupConv2d(4, 2, 1, 4)
    fresh.weight.data.zero_()
    fresh.condense_to(2)
    assert fresh.mask.tolist() == [[True, True, False, False]]


def test_a_weight_of_zero_that_is_left_outlives_what_was_dropped() -> None:
    layer = LearnedGroupConv2d(4, 2, 1, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, 1, 2, 3]] * 2).view(2, 4, 1, 1))
    layer.condense_to(1)
    layer.weight.data.zero_()
    layer.condense_to(2)
    assert not layer.mask[0, 0] and layer.mask.sum() == 2


def test_dropped_weights_have_no_gradient_and_no_say() -> None:
    layer = lgc(16, 24, 4, 4, act_layer="hard_swish")
    layer.condense_to(3)
    x = torch.randn(2, 16, 3, 3, dtype=torch.float64)
    y = layer(x)
    y.square().sum().backward()
    dead = layer.masked_weight() == 0
    grad = layer.weight.grad
    assert grad is not None and (grad[dead] == 0).all() and (grad[~dead] != 0).all()
    with torch.no_grad():
        layer.weight[dead] = 99.0
        torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("make", [lgc, sfr])
def test_the_added_gradient_is_that_of_the_penalty(make) -> None:
    plain, with_lasso = make(24, 24, 4, 4), make(24, 24, 4, 4)
    with_lasso.load_state_dict(plain.state_dict())
    with_lasso.group_lasso = 0.3
    x = torch.randn(2, 24, 3, 3, dtype=torch.float64)
    for stage in (0, 2, 3):
        for layer in (plain, with_lasso):
            layer.condense_to(stage)
            layer.train()
            layer.zero_grad()
        plain.convolve(x).square().sum().add(0.3 * plain.lasso_penalty()).backward()
        with_lasso.convolve(x).square().sum().backward()
        torch.testing.assert_close(with_lasso.weight.grad, plain.weight.grad, rtol=1e-12, atol=1e-12)
    assert plain.lasso_penalty() == 0  # at the last stage
    with_lasso.eval().zero_grad()
    plain.eval().zero_grad()
    for layer in (plain, with_lasso):
        layer.convolve(x).sum().backward()
    assert torch.equal(with_lasso.weight.grad, plain.weight.grad)


def test_groups_near_zero_get_no_lasso() -> None:
    layer = LearnedGroupConv2d(4, 4, 2, 4, group_lasso=1.0).train()
    layer.weight.data.mul_(0)
    layer(torch.randn(2, 4, 3, 3)).sum().backward()
    assert torch.isfinite(layer.weight.grad).all()


def test_a_layer_in_low_precision() -> None:
    layer = LearnedGroupConv2d(16, 16, 4, dtype=torch.bfloat16)
    layer.condense_to(3)
    assert layer(torch.randn(2, 16, 3, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    small = layer.condensed()
    assert small.weight.dtype == small.norm.weight.dtype == torch.bfloat16
    assert small(torch.randn(2, 16, 3, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedGroupConv2d(16, 18, 4), "groups=4 does not divide out_channels=18"),
        (lambda: LearnedGroupConv2d(18, 16, 4), "condensation_factor=4 does not divide in_channels=18"),
        (lambda: SparseReactivation(18, 16, 4), "groups=4 does not divide in_channels=18"),
        (lambda: SparseReactivation(16, 18, 4), "condensation_factor=4 does not divide out_channels=18"),
        (lambda: CondensedConv2d(16, 16, 0), "groups=0 does not divide out_channels=16"),
        (lambda: CondensedReactivation(16, 16, 4, 3), "condensation_factor=3 does not divide"),
    ],
)
def test_sizes_that_do_not_fit(make, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        make()
    assert "usable: 1, 2" in str(error.value) and "nothing was built" in str(error.value)


@pytest.mark.parametrize("stage", [-1, 4])
def test_there_are_only_so_many_stages(stage: int) -> None:
    layer = LearnedGroupConv2d(16, 16, 4)
    with pytest.raises(UsageError, match=rf"stage {stage} .* expected 0 … 3"):
        layer.condense_to(stage)
    assert layer.mask.all()


def test_an_unfinished_layer_cannot_be_condensed() -> None:
    layer = SparseReactivation(16, 24, 4)
    layer.condense_to(2)
    with pytest.raises(UsageError) as error:
        layer.condensed()
    assert "group 0 of 4 has 12 of 24 out_channels left" in str(error.value)
    assert "expected  6 (1 of 4), after stage 3" in str(error.value)


def test_a_norm_of_several_channels_cannot_be_taken_apart() -> None:
    layer = LearnedGroupConv2d(16, 16, 4, norm_layer="groupnorm1")
    layer.condense_to(3)
    with pytest.raises(UsageError, match="its norm is a GroupNorm1"):
        layer.condensed()


def test_a_batch_norm_that_does_more_is_refused() -> None:
    layer = lgc(8, 8, 2, 2, norm_layer=BatchNormAct2d)
    layer.condense_to(1)
    with pytest.raises(UsageError, match="its norm is a BatchNormAct2d"):
        layer.condensed()


def test_an_averaged_mask_is_refused() -> None:
    layer = LearnedGroupConv2d(16, 16, 4)
    state = layer.state_dict()
    layer.load_state_dict({**state, "mask": state["mask"].float()})
    with pytest.raises(RuntimeError, match='"mask" holds fractions: was it averaged'):
        layer.load_state_dict({**state, "mask": 0.5 * state["mask"].float()})


def test_fresh_condensed_layers_use_every_channel() -> None:
    conv = CondensedConv2d(16, 16, 4)
    assert sorted(conv.index.tolist()) == list(range(16))
    assert sorted(CondensedReactivation(8, 16, 4).index.tolist()) == list(range(16))
    assert CondensedConv2d(16, 16, 8, 2).index.max() == 15


def test_an_index_may_add_twice() -> None:
    layer = CondensedReactivation(4, 4, 2, 2).eval()
    layer.index.copy_(torch.tensor([1, 2, 1, 3]))
    new, old = torch.randn(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    update = layer(new, old)
    assert (update[:, 0] == 0).all() and (old == 0).all()
    one, other = layer.weight[0], layer.weight[2]
    z = layer.act(layer.norm(new))
    expected = z[:, 0] * one[0] + z[:, 2] * one[1] + z[:, 1] * other[0] + z[:, 3] * other[1]
    torch.testing.assert_close(update[:, 1], expected)


def test_old_maps_of_another_type_are_promoted() -> None:
    masked = SparseReactivation(4, 8, 2)
    masked.condense_to(1)
    small = masked.condensed()
    new, old = torch.randn(1, 4, 3, 3), torch.randn(1, 8, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        one, other = masked.train()(new, old), small.train()(new, old)
    assert one.dtype == other.dtype == torch.float32
    torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.filterwarnings("ignore")  # of torch's exporter, about itself
def test_an_index_in_order_survives_onnx(tmp_path: Path, shuffled: bool) -> None:
    runtime = pytest.importorskip("onnxruntime")
    layer = CondensedReactivation(8, 16, 8).eval()
    if shuffled:
        layer.index.copy_(torch.randint(16, (16,)))
    inputs = (torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 4))
    torch.onnx.export(layer, inputs, tmp_path / "layer.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "layer.onnx")
    names = [entry.name for entry in session.get_inputs()]
    found = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))[0]
    torch.testing.assert_close(torch.from_numpy(found), layer(*inputs), rtol=1e-4, atol=1e-5)
