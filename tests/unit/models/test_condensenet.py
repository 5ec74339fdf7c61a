"""CondenseNet and CondenseNet V2: published sizes, both forms, and the authors' checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import chanzoo
from chanzoo.errors import UsageError
from chanzoo.layers.condensing import condense, is_condensed, learned_layers
from chanzoo.models import condensenet_authors
from chanzoo.models.condensenet import VARIANTS, CondenseNet

TINY = {"depths": (1, 2), "growth": (8, 16), "head_width": 24, "hard_swish_from": 1, "se_from": 1}

# Parameters to train and condensed, multiply-adds of both in millions, at the size of their data set.
SIZES = {
    "condensenetv2_a": (3_350_244, 2_038_444, 150.3, 43.1),
    "condensenetv2_b": (6_311_412, 3_592_662, 457.5, 140.5),
    "condensenetv2_c": (15_097_752, 6_177_512, 1389.9, 295.8),
    "condensenetv2_cifar110": (1_477_594, 477_994, 159.5, 39.0),
    "condensenetv2_cifar146": (2_547_450, 775_610, 270.2, 59.2),
}
# Published parameters of V1, in millions; ours keep the whole classifier, theirs half of it.
V1_PARAMS = {"condensenet_cifar50": 0.22, "condensenet_cifar74": 0.41, "condensenet_cifar86": 0.52}


def finished(model: nn.Module) -> nn.Module:
    """With every connection dropped that has to be, and norms that are not the identity."""
    torch.manual_seed(3)
    for layer in learned_layers(model).values():
        layer.condense_to(layer.condensation_factor - 1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name: str) -> None:
    size = (3, 32, 32) if "cifar" in name else (3, 224, 224)
    with torch.device("meta"):
        forms = [timm.create_model(name), timm.create_model(name, condensed=True)]
    assert [chanzoo.count_params(form) for form in forms] == list(SIZES[name][:2])
    assert [round(chanzoo.count_macs(form, size) / 1e6, 1) for form in forms] == list(SIZES[name][2:])


@pytest.mark.parametrize("name", V1_PARAMS)
def test_first_version_has_about_the_published_size(name: str) -> None:
    params = chanzoo.count_params(timm.create_model(name, condensed=True, device="meta")) / 1e6
    assert abs(params - V1_PARAMS[name]) < 0.01


def test_the_two_versions_that_are_compared_cost_the_same() -> None:
    names = ("condensenetv2_cifar110", "condensenet_cifar62")
    costs = [chanzoo.count_macs(timm.create_model(n, condensed=True), (3, 32, 32)) for n in names]
    assert 0.9 < costs[1] / costs[0] < 1.05


@pytest.mark.parametrize("options", [{}, {"reactivation_groups": 0}, {"groups": 4, "condensation_factor": 8}])
def test_condensed_by_function_and_by_name_are_one(options: dict, tmp_path: Path) -> None:
    args = {**TINY, **options}
    model = finished(timm.create_model("condensenetv2_a", num_classes=7, **args))
    small = condense(model)
    named = timm.create_model("condensenetv2_a", num_classes=7, condensed=True, **args).eval()
    named.load_state_dict(small.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(named(x), small(x))
    assert small.condensed and not model.condensed and small.progress is None
    timm.models.save_for_hf(small, tmp_path / "saved", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


def test_condensed_networks_script_and_train() -> None:
    model = timm.create_model("condensenetv2_a", condensed=True, num_classes=5, **TINY)
    x = torch.randn(2, 3, 64, 64)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with pytest.warns(FutureWarning, match="deprecated"):
        scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))


def test_it_condenses_while_it_trains() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "condensenetv2_a", num_classes=5, total_steps=14, group_lasso=1e-5, **TINY
    ).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(14):
        assert int(model.progress.train_step) == step
        optimizer.zero_grad()
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()
        assert {int(layer.stage) for layer in learned_layers(model).values()} == {min(step, 7)}
    assert is_condensed(model)
    model.forward_head(model.forward_features(torch.randn(2, 3, 32, 32)))  # as in feature distillation
    assert int(model.progress.train_step) == 15


@pytest.mark.parametrize("options", [{}, {"feature_cls": "getter"}])
def test_a_backbone_condenses_while_it_trains(options: dict) -> None:
    model = timm.create_model("condensenetv2_a", features_only=True, total_steps=4, **options, **TINY).train()
    for _ in range(4):
        sum(level.sum() for level in model(torch.randn(2, 3, 32, 32))).backward()
    assert is_condensed(model)
    x = torch.randn(2, 3, 32, 32)
    small = condense(model.eval())
    for one, other in zip(small(x), model(x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    plain = timm.create_model("condensenetv2_a", features_only=True, **options, **TINY)
    assert not any("progress" in key for key in plain.state_dict()) or options


def test_checkpointing_does_not_count_twice() -> None:
    model = timm.create_model("condensenetv2_a", num_classes=5, total_steps=50, **TINY).train()
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert int(model.progress.train_step) == 1


def test_pretrained_tensors_of_another_head_keep_their_masks() -> None:
    model = finished(timm.create_model("condensenetv2_cifar110", depths=(1, 1, 1)))
    overlay = {"state_dict": model.state_dict(), "num_classes": 10}
    tuned = timm.create_model(
        "condensenetv2_cifar110",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        num_classes=3,
        depths=(1, 1, 1),
    )
    assert is_condensed(tuned) and tuned.fc.out_features == 3


def test_an_input_of_another_size() -> None:
    model = timm.create_model("condensenetv2_a", num_classes=5, **TINY).eval()
    assert model(torch.randn(1, 3, 50, 70)).shape == (1, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 6}, r"layer 0 of stage 1: groups=6 does not divide out_channels=32"),
        (
            {"condensation_factor": 5},
            r"layer 0 of stage 1: condensation_factor=5 does not divide in_channels=16",
        ),
        ({"groups_3x3": 3}, "layer 0 of stage 1: groups_3x3=3 does not divide the 8 new maps"),
        ({"depths": (1,)}, r"depths=\[1\] and growth=\[8, 16\]: expected one number each"),
        ({"total_steps": 0}, "total_steps=0: expected a whole number above 0"),
        ({"bottleneck": 0}, "bottleneck below 1: every layer has to make maps"),
        ({"growth": (0, 16)}, "growth below 1: every layer has to make maps"),
        ({"group_lasso": -1.0}, r"group_lasso=-1\.0: expected 0 or more"),
    ],
)
def test_arguments_that_do_not_fit_name_the_layer(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        timm.create_model("condensenetv2_a", **{**TINY, **options})


def test_an_unfinished_network_is_refused_by_name() -> None:
    model = timm.create_model("condensenetv2_a", **TINY)
    with pytest.raises(UsageError, match=r'layer "stage1\.0\.conv1" cannot be condensed.*has 16 of 16'):
        condense(model)


@pytest.mark.parametrize("name", ["condensenetv2_a", "condensenetv2_b"])
@pytest.mark.parametrize("condensed", [False, True])
def test_checkpoints_go_to_the_authors_layout_and_back(name: str, condensed: bool) -> None:
    model = finished(timm.create_model(name))
    if condensed:
        model = condense(model)
    ours = {key: value for key, value in model.state_dict().items() if not key.startswith("progress")}
    theirs = condensenet_authors.to_authors(ours)
    assert (
        len(theirs)
        == {
            ("condensenetv2_a", False): 520,
            ("condensenetv2_a", True): 440,
            ("condensenetv2_b", False): 664,
            ("condensenetv2_b", True): 560,
        }[name, condensed]
    )
    assert condensenet_authors.find_variant(theirs) == name
    groups = VARIANTS[name].get("groups", 8)
    prefixed = {f"module.{key}": value for key, value in theirs.items()}
    again = condensenet_authors.from_authors(prefixed, groups)
    assert again.keys() == ours.keys()
    for key, value in ours.items():
        assert torch.equal(again[key], value) and again[key].dtype == value.dtype, key
    if not condensed:
        layer = "features.denseblock_3.denselayer_2."
        assert theirs[f"{layer}conv_1._mask"].shape == theirs[f"{layer}conv_1.conv.weight"].shape
        assert theirs[f"{layer}sfr._count"].item() == theirs[f"{layer}sfr.conv.weight"].shape[0] * (
            1 - 1 / groups
        )


def test_masks_and_indices_that_training_does_not_make_are_refused() -> None:
    model = finished(CondenseNet(**TINY))
    theirs = condensenet_authors.to_authors(model.state_dict())
    key = "features.denseblock_1.denselayer_1.conv_1._mask"
    for change in (lambda m: 0.5 * m, lambda m: m.index_fill(0, torch.tensor(0), 1)):
        edited = {**theirs, key: change(theirs[key])}
        with pytest.raises(UsageError, match=f'"{key}" is no mask of 8 groups'):
            condensenet_authors.from_authors(edited, 8)
    small = condensenet_authors.to_authors(condense(model).state_dict())
    key = "features.denseblock_1.denselayer_1.sfr.index"
    with pytest.raises(UsageError, match=f'"{key}" is no index'):
        condensenet_authors.from_authors({**small, key: 0.5 * small[key]}, 8)
    with pytest.raises(UsageError, match=r'"features\.what" is no entry'):
        condensenet_authors.from_authors({"features.what": small[key]}, 8)
    with pytest.raises(UsageError, match="is none of ours"):
        condensenet_authors.find_variant(theirs)


def test_masks_may_be_copied_but_not_averaged() -> None:
    model = finished(CondenseNet(**TINY))
    fresh = copy.deepcopy(model.state_dict())
    averaged = {key: 0.5 * v.float() if key.endswith("mask") else v for key, v in fresh.items()}
    with pytest.raises(RuntimeError, match="holds fractions"):
        model.load_state_dict(averaged)


def test_tensors_of_the_other_form_are_refused_before_any_is_loaded() -> None:
    trained = timm.create_model("condensenet_cifar50")
    small = timm.create_model("condensenet_cifar50", condensed=True)
    for model, other, hint in (
        (small, trained, "Condense them first"),
        (trained, small, "Build it with condensed=True"),
    ):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        for state in (other.state_dict(), {"stem.weight": trained.stem.weight + 1, **other.state_dict()}):
            with pytest.raises(UsageError, match=rf"Nothing was loaded\.   {hint}"):
                model.load_state_dict(state)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(UsageError, match="CondenseNet is condensed already: there is nothing to condense"):
        condense(small)
