"""Coupled channels, the cut to a target, the narrow network and its norms."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import chanzoo
from chanzoo.compress import (
    METHODS,
    Budget,
    Evidence,
    Group,
    find_groups,
    prunable,
    prune,
    recalibrate_norms,
)
from chanzoo.compress.own import authors_vectors, layer_masks
from chanzoo.compress.rates import cut, keep_counts
from chanzoo.compress.surgery import check_same, masks_of, narrowed, tried, zeroed
from chanzoo.errors import UsageError
from chanzoo.layers.narrow import apply_widths, read_widths

# Families the issue names, at the smallest size that leaves maps to rank.
FAMILIES = (
    ("resnet18", 64), ("resnet50", 64), ("mobilenetv2_100", 64), ("densenet121", 64), ("efficientnet_b0", 64),
    ("convnext_atto", 64), ("ce_resnet50", 64), ("ce_mobilenetv2", 64), ("cifar_resnet20", 32),
    ("ce_cifar_resnet20", 32), ("cifar_vgg16_bn", 32), ("resnext50_32x4d", 64), ("regnety_004", 64),
    ("mobilenetv3_large_100", 64), ("resnetv2_50", 64),
)  # fmt: skip


def lively(name: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A network whose norms, statistics and whiteners are all different from one another."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{"num_classes": 10, **kwargs}).eval()
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif key.endswith("running_wm"):
                buffer += 0.1 * torch.randn_like(buffer)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def images(count: int = 4, size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def free(groups: list[Group]) -> list[Group]:
    return [group for group in groups if not group.reason]


def some(groups: list[Group], share: float = 0.6, seed: int = 0) -> dict[str, Tensor]:
    """A lot of each group's channels, equally many in each chunk."""
    generator = torch.Generator().manual_seed(seed)
    scores = {g.root: torch.rand(g.channels, generator=generator) for g in groups}
    counts = {g.root: g.chunks * max(1, int(share * g.channels / g.chunks)) for g in groups}
    return cut(groups, scores, counts)


# The narrow network is the full one without the removed channels.


@pytest.mark.parametrize(("name", "size"), FAMILIES)
def test_narrow_network_equals_full_one_without_the_channels(name: str, size: int) -> None:
    model = lively(name)
    groups = tried(model, find_groups(model, (size, size)), (size, size))
    assert free(groups)
    masks = masks_of(model, groups, some(free(groups)))
    small = narrowed(model, masks)
    assert chanzoo.count_params(small) < 0.75 * chanzoo.count_params(model)
    x = images(2, size).double()
    with torch.no_grad():
        full, ours = zeroed(model, masks).double()(x), small.double()(x)
        assert (full - model.double()(x)).abs().max() > 1e-3 * full.abs().max()  # the cut does something
    assert (
        ours - full
    ).abs().max() <= 1e-6 * full.abs().max()  # 64-bit noise is below 1e-12, a slip above 1e-2


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnext50_32x4d",
        pytest.param("ce_mobilenetv2", marks=pytest.mark.slow),
        pytest.param("densenet121", marks=pytest.mark.slow),
    ],
)
def test_each_group_alone(name: str) -> None:
    model = lively(name)
    for group in free(find_groups(model, (64, 64)))[::7]:
        masks = masks_of(model, [group], some([group], 0.5))
        check_same(model, narrowed(model, masks), masks, (64, 64))


def test_wrong_slice_is_noticed() -> None:
    model = lively("resnet18")
    groups = find_groups(model, (64, 64))
    masks = masks_of(model, groups, some(free(groups)))
    small = narrowed(model, masks)
    with torch.no_grad():
        small.get_submodule("layer2.0.conv2").weight.copy_(
            small.get_submodule("layer2.0.conv2").weight.flip(1)
        )
    with pytest.raises(UsageError, match="not the full one without the removed channels"):
        check_same(model, small, masks, (64, 64))


@pytest.mark.parametrize("name", ["resnet18", "ce_resnet18", "cifar_resnet20"])
def test_nothing_removed_changes_nothing(name: str) -> None:
    model = lively(name)
    pruned = prune(model, method="l1", rates=0.0)
    assert not pruned.widths
    x = images(2, 64)
    assert torch.equal(pruned.model(x), model(x))


def test_full_network_stays_as_it_was() -> None:
    model = lively("resnet18").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = prune(model, [images(4, 64)], macs=0.5, images=4).model
    assert model.training and small.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in small.parameters())


# Groups.


def test_streams_and_inner_channels_of_a_resnet() -> None:
    groups = {group.root: group for group in find_groups(timm.create_model("resnet18"), (64, 64))}
    assert groups["conv1"].convs == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    assert groups["layer1.0.conv1"].convs == ("layer1.0.conv1",)
    assert [root for root, group in groups.items() if group.is_head] == ["layer4.0.conv2"]
    assert len(groups) == 12 and not any(group.reason for group in groups.values())


def test_concatenation_gives_positions() -> None:
    groups = {g.root: g for g in find_groups(timm.create_model("densenet121"), (64, 64))}
    slots = {(s.name, s.axis): s for s in groups["features.denseblock1.denselayer2.conv2"].slots}
    into = slots["features.denseblock1.denselayer3.conv1", "in"]
    assert into.index.tolist() == list(range(96, 128)) and into.root.tolist() == list(range(32))


def test_chunks_of_grouped_convolutions_and_whiteners() -> None:
    groups = {g.root: g for g in find_groups(timm.create_model("resnext50_32x4d"), (64, 64))}
    assert groups["layer1.0.conv1"].chunks == groups["layer1.0.conv2"].chunks == 32
    groups = {g.root: g for g in find_groups(timm.create_model("ce_resnet18"), (64, 64))}
    assert groups["conv1"].chunks == 4  # 64 channels, whitened 16 at a time


@pytest.mark.parametrize(
    ("name", "size", "layer"),
    [
        ("cifar_resnet20", 32, r'"layer2\.0\.conv2" has 32 channels, of which 16 are coupled'),
        ("convnext_atto", 64, r'"stem\.1" \(LayerNorm2d\) normalises its channels together'),
        ("efficientnet_b0", 64, r'"blocks\.0\.0\.se\.conv_reduce" puts out single pixels'),
    ],
)
def test_what_cannot_be_cut_says_why(name: str, size: int, layer: str) -> None:
    import re

    reasons = [group.reason for group in find_groups(timm.create_model(name), (size, size))]
    assert any(re.search(layer, reason) for reason in reasons)


def test_mixing_that_cannot_be_seen_is_found_by_trial() -> None:
    model = lively("convnextv2_atto")  # response normalisation in every block
    with pytest.raises(
        UsageError, match=r"has no channels that can be removed(.|\n)*stages\.0\.blocks\.0\.mlp\.fc1"
    ):
        prunable(model, (64, 64))


def test_a_network_without_maps_to_cut() -> None:
    with pytest.raises(UsageError, match=r"blocks\.0\.norm1(.|\n)*normalises its channels together"):
        prune(timm.create_model("vit_tiny_patch16_224", num_classes=3), method="l1", rates=0.3)


def test_works_without_the_library_that_finds_couplings_but_for_finding(tmp_path: Any) -> None:
    code = (
        "import sys; sys.modules['torch_pruning'] = None\n"
        "import chanzoo, timm\n"
        "from chanzoo.compress import prune\n"
        "timm.create_model('narrow_cnn', base='resnet18', widths={'layer1.0.conv1': [32, 64], "
        "'layer1.0.bn1': [32], 'layer1.0.conv2': [64, 32]})\n"
        "try: prune(timm.create_model('cifar_resnet20'), method='l1', rates=0.5)\n"
        "except chanzoo.errors.ChanzooError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert 'pip install "chanzoo[prune]"' in done.stdout, done.stderr


# Which channels, and how many.


def group_of(channels: int, root: str = "conv", chunks: int = 1) -> Group:
    return Group(root, channels, (), (root,), chunks)


@pytest.mark.parametrize(
    ("channels", "rate", "chunks", "round_to", "expected"),
    [
        (320, 0.9, 1, 1, 31),  # the float's error is part of the published counts
        (64, 0.0, 1, 8, 64),
        (60, 0.5, 1, 8, 32),
        (100, 0.97, 1, 8, 8),
        (6, 0.5, 1, 8, 3),  # narrower than the multiple
        (64, 0.4, 4, 1, 40),
        (64, 0.99, 4, 1, 8),  # two in each chunk: a group of one is another kind of layer
        (96, 0.5, 12, 8, 48),
    ],
)
def test_counts(channels: int, rate: float, chunks: int, round_to: int, expected: int) -> None:
    found = keep_counts([group_of(channels, chunks=chunks)], {"conv": rate}, min_width=1, round_to=round_to)
    assert found == {"conv": expected}


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_rate_outside_names_the_layer(rate: float) -> None:
    with pytest.raises(
        UsageError, match=r'layer "conv": rate=.*at least 0 and below 1(.|\n)*Nothing was pruned'
    ):
        keep_counts([group_of(16)], {"conv": rate})


def test_empty_layer_is_named() -> None:
    with pytest.raises(UsageError, match=r'layer "conv": rate=0\.95 leaves none of 12'):
        keep_counts([group_of(12)], {"conv": 0.95})


def test_highest_scores_stay_and_later_ones_of_equals() -> None:
    kept = cut([group_of(5)], {"conv": torch.tensor([3.0, 1, 3, 2, 3])}, {"conv": 2})
    assert kept["conv"].tolist() == [2, 4]
    kept = cut([group_of(6, chunks=2)], {"conv": torch.tensor([3.0, 1, 2, 0, 9, 1])}, {"conv": 2})
    assert kept["conv"].tolist() == [0, 4]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_same_seed_same_network(method: str) -> None:
    model = lively("cifar_resnet20")
    first, second = (prune(model, [images()], method=method, macs=0.6, images=4, seed=3) for _ in range(2))
    assert first.kept.keys() == second.kept.keys()
    assert all(torch.equal(first.kept[root], second.kept[root]) for root in first.kept)
    x = images(2)
    assert torch.equal(first.model.eval()(x), second.model.eval()(x))


def test_methods_disagree() -> None:
    model = lively("cifar_resnet20")
    kept = {m: prune(model, [images()], method=m, rates=0.5, images=4).kept for m in METHODS}
    roots = list(kept["l1"])
    for one, other in (("l1", "random"), ("l1", "hrank"), ("hrank", "random")):
        assert any(not torch.equal(kept[one][root], kept[other][root]) for root in roots)


def test_seed_moves_lots_only() -> None:
    model = lively("cifar_resnet20")
    for method, same in (("random", False), ("l1", True)):
        a, b = (prune(model, method=method, rates=0.5, seed=seed).kept for seed in (0, 1))
        assert all(torch.equal(a[root], b[root]) for root in a) == same


def test_filter_norm_by_hand() -> None:
    model = lively("cifar_resnet20")
    groups = [group for group in find_groups(model, (32, 32)) if group.root == "layer1.0.conv1"]
    weight: Any = model.get_submodule("layer1.0.conv1").weight
    norms = torch.tensor([float(sum(abs(v) for v in w.flatten().tolist())) for w in weight])
    scores = METHODS["l1"].score(model, groups, Evidence())
    assert torch.allclose(scores["layer1.0.conv1"], (norms / norms.mean()).double(), rtol=1e-5)


def test_stream_is_judged_by_every_tensor_once() -> None:
    """Projection and last convolution of a block end in one sum, which counts once."""
    from chanzoo.compress import collect_ranks

    model = lively("resnet50")
    ranks = collect_ranks(model, [images(2, 64)], images=2)
    groups = [group for group in find_groups(model, (64, 64)) if "layer1.0.conv3" in group.convs]
    assert {"layer1.0.downsample.0", "layer1.0.conv3"} <= set(groups[0].convs)
    blocks = [ranks.mean(f"layer1.{i}.conv3") for i in range(3)]
    scores = METHODS["hrank"].score(model, groups, Evidence(ranks))[groups[0].root]
    assert torch.allclose(scores, torch.stack(blocks).mean(0))


# Targets.


@pytest.mark.parametrize(
    "name",
    [
        "cifar_resnet20",
        "convnext_atto",
        "ce_resnet18",
        pytest.param("mobilenetv2_100", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("target", ["macs", "params"])
def test_budget_is_met_closely(name: str, target: str) -> None:
    model = lively(name)
    size = model.pretrained_cfg["input_size"]  # pyright: ignore
    small = prune(model, method="l1", **{target: 0.7}).model  # pyright: ignore
    count = {"macs": lambda net: chanzoo.count_macs(net, size), "params": chanzoo.count_params}[target]
    assert 0.66 < count(small) / count(model) <= 0.7


def test_budget_as_a_count() -> None:
    model = lively("cifar_resnet20")
    small = prune(model, method="l1", macs=30e6).model
    assert 28e6 < chanzoo.count_macs(small, (3, 32, 32)) <= 30e6


def test_budget_below_the_floor_says_the_floor() -> None:
    model = lively("cifar_resnet20")
    with pytest.raises(
        UsageError,
        match=r"cannot reach 100 k MACs for cifar_resnet20: with 4 or more channels per layer the floor is "
        r"[\d.]+ M(.|\n)*conv1 stays whole(.|\n)*Nothing was pruned",
    ):
        prune(model, method="l1", macs=1e5, min_width=4)


def test_any_cost_can_be_a_budget() -> None:
    model = lively("cifar_resnet20")
    costs: list[float] = []

    def layers_wider_than_eight(network: nn.Module) -> float:
        costs.append(sum(m.out_channels > 8 for m in network.modules() if isinstance(m, nn.Conv2d)))
        return costs[-1]

    small = prune(model, method="l1", budget=Budget("wide layers", 16, layers_wider_than_eight)).model
    assert layers_wider_than_eight(small) <= 16 < layers_wider_than_eight(model)


def test_multiples_are_kept() -> None:
    small = prune(lively("resnet18"), method="random", macs=0.5, round_to=8).model
    widths = {m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)}
    assert all(width % 8 == 0 for width in widths)


def test_inner_channels_only() -> None:
    pruned = prune(lively("resnet18"), method="l1", rates=0.5, align="inner")
    assert pruned.model.get_submodule("layer2.0.conv2").out_channels == 128
    assert pruned.model.get_submodule("layer2.0.conv1").out_channels == 64


def test_head_may_be_narrowed_on_request() -> None:
    model = lively("resnet18")
    assert prune(model, method="l1", rates=0.5).model.num_features == 512
    small: Any = prune(model, method="l1", rates=0.5, keep_head=False).model
    assert small.num_features == small.fc.in_features == 256


def test_rates_by_pattern_and_by_group() -> None:
    model = lively("cifar_resnet20")
    pruned = prune(model, method="l1", rates={"layer1.*": 0.5, "layer3.2.conv1": 0.25})
    assert pruned.widths["layer1.1.conv1"] == [8, 16] and pruned.widths["layer3.2.conv1"] == [48, 64]
    assert "layer2.0.conv1" not in pruned.widths
    pruned = prune(model, method="l1", rates=[0.5] + [0.0] * 8)
    assert set(pruned.widths) == {"layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"rates": [0.5] * 3},
            "3 rates: expected 9, one for each group from layer1.0.conv1 to layer3.2.conv1",
        ),
        ({"rates": {"layr1.0.conv1": 0.5}}, "Did you mean layer1.0.conv1?"),
        ({"rates": {"conv1": 0.5}}, "cannot be pruned here"),
        ({}, "nothing given"),
        ({"rates": 0.5, "macs": 0.5}, "rates and macs given"),
        ({"macs": 0.0}, "macs=0.0: expected"),
        ({"macs": 0.5, "method": "l2"}, 'no method "l2"; there are: hrank, l1, random'),
        ({"macs": 0.5, "method": "hrank"}, "pass a loader"),
        ({"macs": 0.5, "align": "own"}, 'align="own"'),
        ({"macs": 0.5, "min_width": 0}, "min_width=0"),
        ({"macs": 0.5, "round_to": 0}, "round_to=0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    model = lively("cifar_resnet20")
    with pytest.raises(UsageError) as caught:
        prune(model, **{"method": "l1", **arguments})
    assert message in str(caught.value) and "Nothing was pruned." in str(caught.value)


def test_other_inputs() -> None:
    model = lively("resnet18", in_chans=1)
    small = prune(model, [images(4, 64, 1)], macs=0.5, images=4).model
    assert small(images(2, 64, 1)).shape == (2, 10)


# Norms.


def test_statistics_are_plain_means() -> None:
    model = lively("cifar_resnet20").train()
    batches = [images(8), images(8) + 1]
    stem: Any = model.get_submodule("bn1")
    with torch.no_grad():
        maps = [model.get_submodule("conv1")(batch) for batch in batches]
    count = recalibrate_norms(model, batches, images=16)
    assert count == 19 and model.training and stem.momentum == 0.1
    assert torch.allclose(
        stem.running_mean, torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0), atol=1e-6
    )
    assert torch.allclose(stem.running_var, torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0), rtol=1e-5)


def test_whiteners_are_measured_too() -> None:
    model = lively("ce_cifar_resnet20")
    layer: Any = next(m for n, m in model.named_modules() if n.endswith("decorrelation"))
    before, momentum = layer.running_wm.clone(), layer.momentum
    recalibrate_norms(model, [images(16), images(16) + 1], images=32)
    assert not torch.allclose(layer.running_wm, before) and layer.momentum == momentum and not layer.training
    kept = layer.running_wm.clone()
    recalibrate_norms(model, [images(16), images(16) + 1], images=32)
    assert torch.allclose(layer.running_wm, kept, atol=1e-5)  # nothing of what was there before is left


def test_failing_loader_leaves_the_old_statistics() -> None:
    model = lively("cifar_resnet20")
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def loader() -> Any:
        yield images(8)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        recalibrate_norms(model, loader())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(UsageError, match="no batch of two images"):
        recalibrate_norms(model, [images(1)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_norms_nothing_to_do() -> None:
    assert recalibrate_norms(nn.Sequential(nn.Conv2d(3, 4, 3)), [images(4)]) == 0


def test_widths_build_the_same_network_again() -> None:
    model = lively("ce_resnet18")
    pruned = prune(model, method="random", macs=0.5)
    again = timm.create_model("ce_resnet18", num_classes=10)
    apply_widths(again, pruned.widths)
    again.load_state_dict(pruned.model.state_dict())
    assert torch.equal(again.eval()(images(2, 64)), pruned.model(images(2, 64)))


# The authors' lists.


@pytest.mark.parametrize("method", ["hrank", "l1", "random"])
def test_own_channels_by_a_published_list(method: str) -> None:
    rates = "[0.]+[0.15]*2+[0.4]*27"
    pruned = prune(
        lively("cifar_resnet56"), [images()], method=method, compress_rate=rates, align="own", images=4
    )
    assert chanzoo.count_params(pruned.model) == 485_413
    assert pruned.widths == read_widths(pruned.model, timm.create_model("cifar_resnet56"))
    named = timm.create_model("hrank_cifar_resnet56", compress_rate=rates)
    named.load_state_dict(pruned.model.state_dict())
    assert torch.equal(named.eval()(images()), pruned.model(images()))


@pytest.mark.parametrize(
    ("name", "rates", "params"),
    [
        ("cifar_vgg16_bn", "[0.21]*7+[0.75]*5", 2_766_541),
        ("cifar_resnet56", "[0.]*3+[0.4]*27", 506_446),
    ],
)
def test_published_list_with_streams_kept_together(name: str, rates: str, params: int) -> None:
    assert chanzoo.count_params(prune(lively(name), method="l1", compress_rate=rates).model) == params


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cifar_resnet56", {"compress_rate": "[0.]+[0.2]*29"}, 'cuts layer "layer1.0.conv2"'),
        ("cifar_resnet56", {"compress_rate": "[0.]*29"}, "29 rates"),
        ("resnet18", {"compress_rate": "[0.]*20"}, "no such lists are known for resnet18"),
    ],
)
def test_lists_that_do_not_fit(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        prune(lively(name), method="l1", **arguments)
    assert message in str(caught.value)


def test_a_narrow_network_is_not_made_wider_by_a_list() -> None:
    model = timm.create_model("hrank_cifar_vgg16_bn", compress_rate="[0.5]*12")
    with pytest.raises(UsageError, match="Published lists are for the full network"):
        prune(model, method="l1", compress_rate="[0.3]*12")


def test_layer_masks_refuse_what_is_not_known() -> None:
    with pytest.raises(UsageError, match="has no layer-by-layer masks"):
        layer_masks("hrank_mobilenetv2", {}, [0.5] * 60)
    with pytest.raises(UsageError, match="expected 55"):
        layer_masks("hrank_cifar_resnet56", {}, [0.5] * 30)
    with pytest.raises(UsageError, match="no rank vectors"):
        authors_vectors("resnet18")


@pytest.mark.parametrize("condensed", [False, True])
def test_networks_that_choose_their_connections_are_refused(condensed: bool) -> None:
    model = timm.create_model("condensenetv2_cifar110", condensed=condensed)
    with pytest.raises(UsageError, match=r'layer "stage1\.0\.conv1" of .*chooses its connections itself'):
        prune(model, method="l1", macs=0.5)
