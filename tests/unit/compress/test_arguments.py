"""Targets and arguments of prune in Python, and the narrow network on its way to a folder and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from chanzoo.compress import Budget, Group, prune, recalibrate_norms
from chanzoo.compress.rates import keep_counts
from chanzoo.errors import UsageError

SMALL = "cifar_resnet20"


def kept_of(rates: Any) -> dict[str, int]:
    pruned = prune(timm.create_model(SMALL), method="l1", rates=rates)
    return {name: len(indices) for name, indices in pruned.kept.items()}


# Targets


def test_rates_may_be_a_text_an_array_or_a_tensor() -> None:
    expected = kept_of([0.5] * 9)
    assert kept_of("[0.5]*9") == kept_of(np.full(9, 0.5)) == kept_of(torch.full((9,), 0.5)) == expected
    assert set(expected.values()) == {8, 16, 32}


@pytest.mark.parametrize(
    "rates", [{"layer1.*": 0.5, "layer1.0.conv1": 0.25}, {"layer1.0.conv1": 0.25, "layer1.*": 0.5}]
)
def test_a_name_counts_before_patterns(rates: dict[str, float]) -> None:
    kept = kept_of(rates)
    assert (kept["layer1.0.conv1"], kept["layer1.1.conv1"], kept["layer2.0.conv1"]) == (12, 8, 32)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"macs": "0.5x"}, "macs='0.5x': expected a share"),
        ({"macs": True}, "macs=True: expected a share"),
        ({"params": float("nan")}, "params=nan: expected a share"),
        ({"rates": [None] * 9}, "rates hold None: expected fractions"),
        ({"rates": {"layer1.*": "0.5"}}, "rates hold '0.5': expected fractions"),
        ({"rates": torch.ones(9)}, "expected a fraction of filters to remove, at least 0 and below 1"),
        ({"rates": "[0.5]*8"}, "8 rates: expected 9"),
        ({"rates": {"layer1.*": 0.5, "layer1.0*": 0.25}}, 'give layer "layer1.0.conv1" both'),
        ({"rates": {"layer1.0.conv": 0.5}}, "Did you mean layer1.0.conv1?"),
        ({"rates": {"layer3.2.conv2": 0.5}}, "cannot be pruned here: layer"),
    ],
)
def test_what_is_no_target_is_refused(target: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        prune(timm.create_model(SMALL), method="l1", **target)
    assert words in str(caught.value)
    assert "Nothing was pruned." in str(caught.value)


def test_rounding_keeps_the_least_width() -> None:
    groups = [Group(name, channels, (), (name,)) for name, channels in (("a", 16), ("b", 64), ("c", 6))]
    rates = {"a": 0.9, "b": 0.9, "c": 0.5}
    assert keep_counts(groups, rates, min_width=10, round_to=8) == {"a": 16, "b": 16, "c": 6}
    assert keep_counts(groups, rates, min_width=2, round_to=8) == {"a": 8, "b": 8, "c": 3}


def test_a_measured_budget_is_measured_again() -> None:
    """A first measurement that was too good does not decide."""
    seen: dict[int, int] = {}

    def cost(small: nn.Module) -> float:
        size = sum(parameter.numel() for parameter in small.parameters())
        seen[size] = seen.get(size, 0) + 1
        return float(size) if seen[size] > 1 else 0.9 * size

    target = 140_000
    pruned = prune(timm.create_model(SMALL), method="l1", budget=Budget("parameters", target, cost))
    assert sum(parameter.numel() for parameter in pruned.model.parameters()) <= target


# Networks


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"num_classes": 0, "global_pool": ""}])
def test_without_a_classifier_the_features_stay(options: dict[str, Any]) -> None:
    model = timm.create_model("resnet18", **options).eval()
    pruned = prune(model, method="l1", rates=0.5, keep_head=False)
    reasons = {group.root: group.reason for group in pruned.groups if group.reason}
    words = "the narrow network puts out other features than the full one, which has no classifier"
    assert reasons == {"layer4.0.conv2": words}
    image = torch.randn(2, 3, 64, 64)
    assert pruned.model.eval()(image).shape == model(image).shape
    assert len(pruned.kept["layer4.1.conv1"]) == 256


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), timm.create_model(SMALL, features_only=True)],
    ids=["sequential", "features_only"],
)
def test_what_keeps_no_contract_is_refused(model: nn.Module) -> None:
    with pytest.raises(
        UsageError, match=r"has no forward_\w+: expected a classifier with timm's model contract"
    ):
        prune(model, method="l1", macs=0.5)


@pytest.mark.parametrize("item", [{"image": torch.zeros(2, 3, 32, 32)}, torch.zeros(3, 32, 32), ()])
def test_a_loader_has_to_give_images(item: Any) -> None:
    model = timm.create_model(SMALL)
    for call in (lambda: prune(model, [item], macs=0.5), lambda: recalibrate_norms(model, [item])):
        with pytest.raises(UsageError, match=r"expected images \(b, c, h, w\), alone or first in a tuple"):
            call()


# To a folder and back


@pytest.mark.parametrize(
    ("name", "options", "arch"),
    [
        (SMALL, {}, "narrow_cnn"),
        ("cifar_resnet56", {"num_classes": 5}, "hrank_cifar_resnet56"),
        ("resnet18", {"in_chans": 1, "num_classes": 7}, "narrow_cnn"),
        ("mobilenetv3_small_050", {"drop_rate": 0.2}, "narrow_cnn"),
    ],
)
def test_timm_saves_what_was_pruned(tmp_path: Path, name: str, options: dict[str, Any], arch: str) -> None:
    pruned = prune(timm.create_model(name, **options), method="l1", macs=0.7)
    small = comes_back(pruned.model, tmp_path / "once")
    assert small.pretrained_cfg["architecture"] == arch
    again = prune(small, method="random", macs=0.8)
    comes_back(again.model, tmp_path / "twice")


def test_each_layers_own_channels_are_saved_too(tmp_path: Path) -> None:
    model = timm.create_model("cifar_resnet56")
    pruned = prune(model, method="l1", compress_rate="[0.]+[0.18]*29", align="own")
    assert [(group.root, group.channels) for group in pruned.groups[:2]] == [
        ("conv1", 16),
        ("layer1.0.conv1", 16),
    ]
    comes_back(pruned.model, tmp_path)


def test_a_classifier_that_was_replaced(tmp_path: Path) -> None:
    model: Any = timm.create_model(SMALL)
    model.reset_classifier(3)
    assert comes_back(prune(model, method="l1", macs=0.5).model, tmp_path).num_classes == 3


def test_a_network_that_no_name_builds_keeps_its_own() -> None:
    model: Any = timm.create_model(SMALL)
    model.conv1 = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1))
    small: Any = prune(model, method="l1", rates=0.5).model
    assert small.pretrained_cfg["architecture"] == SMALL


def comes_back(model: Any, folder: Path) -> Any:
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    channels = model.get_submodule(again.pretrained_cfg["first_conv"]).in_channels
    image = torch.randn(2, channels, *again.pretrained_cfg["input_size"][1:])
    assert torch.equal(model.eval()(image), again(image))
    return again


# Norms


def test_norms_are_means_over_images_whatever_the_batches() -> None:
    """Two batches of unequal size and mean: the mean of all images, not that of the two batches."""
    model: Any = timm.create_model(SMALL)
    images = torch.cat([torch.randn(12, 3, 32, 32), 3 + 2 * torch.randn(4, 3, 32, 32)])
    firsts: Tensor = model.conv1(images).detach()
    assert recalibrate_norms(model, [images[:12], images[12:]]) > 0
    torch.testing.assert_close(model.bn1.running_mean, firsts.mean((0, 2, 3)))
