"""ShuffleNet V2: torchvision's network, and the same with sparse feature reactivation in both forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import chanzoo
from chanzoo.errors import UsageError
from chanzoo.layers import CondensedReactivation, SparseReactivation, condense
from chanzoo.layers.condensing import learned_layers
from chanzoo.models.reactivate import add_reactivation
from chanzoo.models.shufflenetv2 import VARIANTS, ShuffleNetV2

# Parameters and multiply-adds at 224×224: plain, in the form to train, condensed.
SIZES = {
    "x0_5": ((1_366_792, 40_476_448), (1_413_688, 46_347_040), (1_373_872, 41_210_272)),
    "x1_0": ((2_278_604, 144_907_992), (2_547_724, 179_193_880), (2_330_746, 154_468_480)),
    "x1_5": ((3_503_624, 295_759_392), (4_120_504, 374_686_240), (3_585_200, 305_625_248)),
}
# The smallest network that has every part.
SMALL = {"channels": (8, 16, 24, 32, 40), "depths": (2, 3, 1), "num_classes": 5}


def name_of(width: str) -> str:
    return {"x1_0": "sfr_shufflenetv2"}.get(width, f"sfr_shufflenetv2_{width}")


def theirs(width: str) -> nn.Module:
    """torchvision's network with norms that do something."""
    network = getattr(torchvision.models, f"shufflenet_v2_{width}")(num_classes=10)
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        assert norm.running_mean is not None and norm.running_var is not None
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return network.eval()


def refreshing(model: nn.Module) -> nn.Module:
    """Reactivations that do something; they start with zeros."""
    for module in model.modules():
        if isinstance(module, (SparseReactivation, CondensedReactivation)):
            module.reset_parameters()
    return model


def finished(model: nn.Module) -> nn.Module:
    for layer in learned_layers(refreshing(model)).values():
        nn.init.normal_(layer.norm.running_mean)
        layer.condense_to(layer.condensation_factor - 1)
    return model.eval()


@pytest.mark.parametrize("width", SIZES)
def test_plain_network_is_torchvisions(width: str) -> None:
    reference = theirs(width)
    model = timm.create_model(f"shufflenetv2_{width}", num_classes=10).eval()
    assert list(model.state_dict()) == list(reference.state_dict())
    model.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x))


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("condensed", [False, True])
def test_starts_from_torchvisions_function(width: str, condensed: bool) -> None:
    reference = theirs(width)
    model = timm.create_model(name_of(width), num_classes=10, condensed=condensed).eval()
    missing, unexpected = model.load_state_dict(reference.state_dict(), strict=False)
    assert not unexpected
    assert missing and all(".sfr." in key or key == "progress.train_step" for key in missing)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference(x)
        torch.testing.assert_close(model(x), expected)
        assert not torch.allclose(refreshing(model)(x), expected, atol=1e-3)


def test_zeros_at_the_start_have_a_gradient() -> None:
    model = ShuffleNetV2(reactivation=True, **SMALL)
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    layers = learned_layers(model)
    grads = [layer.weight.grad for layer in layers.values()]
    assert len(grads) == 3 and all(grad is not None and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("width", SIZES)
def test_sizes(width: str) -> None:
    names = (f"shufflenetv2_{width}", name_of(width), name_of(width))
    for name, condensed, size in zip(names, (False, False, True), SIZES[width], strict=True):
        model = timm.create_model(name, condensed=condensed, device="meta")
        assert (chanzoo.count_params(model), chanzoo.count_macs(model, (3, 224, 224))) == size


def test_groups_are_the_largest_that_fit() -> None:
    layers = learned_layers(timm.create_model("sfr_shufflenetv2", device="meta"))
    units = {"stage2": range(1, 4), "stage3": range(1, 8), "stage4": range(1, 4)}
    assert list(layers) == [f"{stage}.{i}.sfr" for stage, indices in units.items() for i in indices]
    sizes = {(n.in_channels, n.out_channels, n.groups, n.condensation_factor) for n in layers.values()}
    assert sizes == {(58, 58, 2, 2), (116, 116, 4, 4), (232, 232, 8, 8)}


def test_new_maps_refresh_what_passes_through() -> None:
    model: Any = refreshing(ShuffleNetV2(reactivation=True, **SMALL)).eval()
    unit = model.stage2[1]
    x = torch.randn(2, 16, 6, 6)
    with torch.no_grad():
        old, new = x[:, :8], unit.branch2(x[:, 8:])
        out = unit(x)
    torch.testing.assert_close(out[:, 1::2], new)
    torch.testing.assert_close(out[:, ::2], old + unit.sfr.convolve(new))


@pytest.mark.parametrize("name", [name for name in VARIANTS if "sfr" in name])
def test_condensed_by_function_and_by_name_are_one(name: str, tmp_path: Path) -> None:
    model = finished(timm.create_model(name, num_classes=10))
    small = condense(model)
    named = timm.create_model(name, num_classes=10, condensed=True).eval()
    named.load_state_dict(small.state_dict())
    assert small.condensed and not model.condensed and small.progress is None
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert (small(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert torch.equal(named(x), small(x))
    timm.models.save_for_hf(small, tmp_path / "saved", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


@pytest.mark.parametrize("options", [{}, {"reactivation": True}, {"reactivation": True, "condensed": True}])
def test_scripted_network_computes_the_same(options: dict[str, bool]) -> None:
    model = refreshing(ShuffleNetV2(**SMALL, **options)).eval()
    x = torch.randn(2, 3, 64, 64)
    with pytest.warns(FutureWarning, match=r"torch.jit.script"):
        scripted = torch.jit.script(model)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), model(x))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_drops_connections(checkpointing: bool) -> None:
    model = ShuffleNetV2(reactivation=True, total_steps=16, **SMALL)
    model.set_grad_checkpointing(checkpointing)
    stages = []
    for _ in range(16):
        model(torch.randn(2, 3, 64, 64)).sum().backward()
        stages.append({name: int(layer.stage) for name, layer in learned_layers(model).items()})
    assert int(model.progress.train_step) == 16
    assert [stage["stage2.1.sfr"] for stage in stages] == [0, 0, 1, 2, 3, 4, 5, 6, *[7] * 8]  # C = 8
    assert [stage["stage3.1.sfr"] for stage in stages] == [0, 0, 0, 1, 1, 1, 2, 2, *[3] * 8]  # C = 4
    model.eval()(torch.randn(2, 3, 64, 64))
    assert int(model.progress.train_step) == 16
    condense(model)


def test_plain_network_has_nothing_to_condense() -> None:
    model = ShuffleNetV2(**SMALL)
    assert model.progress is None
    with pytest.raises(UsageError, match="nothing to condense"):
        condense(model)


@pytest.mark.parametrize(
    "options",
    [
        {"channels": (8, 16, 24, 40)},
        {"channels": (8, 16, 25, 32, 40)},
        {"channels": (0, 16, 24, 32, 40)},
        {"depths": (2, 3)},
        {"depths": (2, 0, 1)},
    ],
    ids=str,
)
def test_refuses_sizes_that_do_not_fit(options: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(UsageError, match="expected 5 and 3 numbers above 0") as caught:
        ShuffleNetV2(**{**SMALL, **options})
    assert "Nothing was built" in str(caught.value)


def test_refuses_steps_that_are_none() -> None:
    with pytest.raises(UsageError, match="total_steps=0"):
        ShuffleNetV2(reactivation=True, total_steps=0, **SMALL)


def test_reactivation_added_by_hand_is_not_among_the_arguments() -> None:
    """No argument of a plain network builds the condensed form of what was added to it."""
    model: Any = timm.create_model("shufflenetv2_x0_5")
    add_reactivation(model, "stage2.1", total_steps=1)
    model.train()(torch.randn(2, 3, 64, 64))
    for layer in learned_layers(model).values():
        layer.condense_to(layer.condensation_factor - 1)
    small: Any = condense(model)
    assert not small.condensed and "condensed" not in small._model_args
