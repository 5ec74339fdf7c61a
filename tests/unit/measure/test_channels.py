"""Channel statistics on networks small enough to know the answer."""

from __future__ import annotations

import statistics
import sys
from itertools import pairwise

import pytest
import timm
import torch
from torch import Tensor, nn

from chanzoo.errors import ChanzooError, UsageError
from chanzoo.layers import ChannelEquilibrium
from chanzoo.layers.decorrelation import instance_variance
from chanzoo.measure import plots
from chanzoo.measure.channels import (
    AblationPoint,
    ablation_curve,
    effective_gain,
    measure_channels,
)
from chanzoo.measure.sites import find_sites


class Block(nn.Module):
    """A stem and a residual branch; one activation module is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.gate = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(x))
        branch = branch * self.gate(branch.mean((2, 3), keepdim=True))
        branch += x
        return self.head(self.act(branch).mean((2, 3)))


@pytest.fixture
def net() -> Block:
    return Block().eval()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6, 3, 9, 9), torch.arange(6) % 4), (torch.randn(3, 3, 9, 9), torch.arange(3))]


def test_sites_of_a_residual_block(net: Block) -> None:
    first, second = find_sites(net, torch.randn(1, 3, 9, 9))
    assert (first.name, first.call, first.channels, first.branch) == ("act#0", ("act", 0), 8, None)
    assert (second.name, second.call) == ("act#1", ("act", 1))  # the gate's own activation is none
    assert find_sites(net, torch.randn(1, 3, 9, 9), "*#1") == [second]


@pytest.mark.parametrize(
    ("name", "sites", "branches", "some"),
    [
        ("cifar_resnet20", 19, 9, "layer1.0.act2"),
        ("ce_cifar_resnet20", 19, 9, "layer3.2.act2"),
        ("resnet18", 17, 8, "layer4.1.act2"),
        ("mobilenetv2_035", 35, 0, "blocks.1.0.bn1.act"),
        ("ce_mobilenetv2_050", 35, 0, "blocks.1.0.bn2.act.act"),
        ("vgg11_bn", 8, 0, "features.2"),
        ("resnetv2_18", 17, 0, "norm.act"),
    ],
)
def test_sites_of_real_networks(name: str, sites: int, branches: int, some: str) -> None:
    found = find_sites(timm.create_model(name, num_classes=2).eval(), torch.randn(1, 3, 64, 64))
    assert (len(found), sum(site.branch is not None for site in found)) == (sites, branches)
    assert some in [site.name for site in found]


def test_no_site(net: Block) -> None:
    with pytest.raises(UsageError, match="Sequential has no activation that a norm feeds"):
        find_sites(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), torch.randn(1, 3, 4, 4))
    with pytest.raises(UsageError, match=r'no site matches "x".\n  sites: act#0, act#1'):
        find_sites(net, torch.randn(1, 3, 9, 9), "x")


def test_tracing_leaves_the_network_as_it_was(net: Block) -> None:
    net.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    find_sites(net, torch.randn(2, 3, 9, 9))
    assert net.training and all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_inhibited_channels_are_those_whose_gain_is_zero(net: Block, batches) -> None:
    with torch.no_grad():
        net.bn1.weight[:3] = 0
        net.bn1.bias[:3] = torch.tensor([-1.0, 0.0, 0.009])
        net.bn1.weight[3] = -1
    report = measure_channels(net, batches, find_sites(net, batches[0][0][:1], "act#0"))
    assert (report.images, report.inhibited("act#0")) == (9, 3)
    assert (report.mean_ratio, report.overall_ratio) == (3 / 8, 3 / 8)
    assert report.magnitudes["act#0"][:3].tolist() == pytest.approx([0, 0, 0.009], abs=1e-9)
    with torch.no_grad():
        x = torch.cat([images for images, _ in batches])
        expected = net.bn1(net.conv1(x)).relu().double().mean((0, 2, 3))
    torch.testing.assert_close(report.magnitudes["act#0"], expected, rtol=1e-5, atol=1e-8)
    (gain, _) = report.gains
    assert gain.layer == "bn1" and gain.weight.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert gain.effective is None


def test_mean_of_sites_and_all_channels_differ() -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 12, 1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(12, 2)),
    ).eval()
    nn.init.zeros_(net.get_parameter("1.weight"))
    batches = [(torch.randn(5, 3, 1, 1), torch.zeros(5, dtype=torch.long))]
    report = measure_channels(net, batches, find_sites(net, batches[0][0]), threshold=1e-6)
    first, second = (report.ratio(site) for site in ("2", "5"))
    assert first == 1
    assert report.mean_ratio == (first + second) / 2
    assert report.overall_ratio == pytest.approx((4 * first + 12 * second) / 16)


def test_the_branch_alone() -> None:
    net = timm.create_model("cifar_resnet20").eval()
    nn.init.zeros_(net.get_parameter("layer1.0.bn2.weight"))
    nn.init.constant_(net.get_parameter("layer1.0.bn2.bias"), -1)
    x = torch.randn(4, 3, 32, 32)
    logits = net(x)
    batches = [(x, torch.zeros(4, dtype=torch.long))]
    sites = find_sites(net, x[:1], "layer1.0.act2")
    whole = measure_channels(net, batches, sites)
    alone = measure_channels(net, batches, sites, branch=True)
    assert whole.ratio("layer1.0.act2") < 1
    assert alone.magnitudes["layer1.0.act2"].tolist() == [0] * 16
    assert torch.equal(net(x), logits)  # nothing stays behind


def test_the_effective_gain_is_that_of_the_map_itself() -> None:
    layer = ChannelEquilibrium(8, group_size=4).train()
    layer(torch.randn(8, 8, 5, 5) * torch.linspace(0.1, 2, 8).view(1, 8, 1, 1))
    nn.init.constant_(layer.mix, 0.7)
    layer.eval().double()
    weight = torch.linspace(-1, 1, 8, dtype=torch.float64)
    normalised = torch.randn(1, 8, 6, 6, dtype=torch.float64)
    x = normalised * weight.view(1, 8, 1, 1)
    with torch.no_grad():
        pixels = normalised.flatten(2)[0]  # the layer is linear in one sample: solve for its matrix
        matrix = torch.linalg.lstsq(pixels.T, layer(x).flatten(2)[0].T).solution.T
        gate = layer.reweight.gate(instance_variance(x))[0]
    torch.testing.assert_close(effective_gain(layer, weight, gate), matrix.norm(dim=1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "layers"), [("ce_cifar_resnet20", 7), ("ce_mobilenetv2_050", 17)])
def test_every_equilibrium_layer_is_paired_with_its_norm(name: str, layers: int) -> None:
    net = timm.create_model(name, num_classes=2).eval()
    batches = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))]
    report = measure_channels(net, batches, find_sites(net, batches[0][0]))
    paired = [gain for gain in report.gains if gain.effective is not None]
    assert len(paired) == layers
    assert all(g.effective is not None and g.effective.shape == g.weight.shape for g in paired)
    assert len(report.gains) == sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def test_ablation(net: Block, batches) -> None:
    sites = find_sites(net, batches[0][0][:1])
    seen: list[list[Tensor]] = []
    net.head.register_forward_pre_hook(lambda _module, args: seen[-1].append(args[0]) if seen else None)
    plain = (
        net(batches[0][0]).argmax(1).eq(batches[0][1]).sum()
        + net(batches[1][0]).argmax(1).eq(batches[1][1]).sum()
    )
    points = ablation_curve(net, batches, sites, seeds=2)
    assert [(p.seed, p.ratio) for p in points] == [(s, k / 10) for s in range(2) for k in range(10)]
    assert points[0].top1 == points[10].top1 == int(plain) / 9
    assert points == ablation_curve(net, batches, sites, seeds=2)  # the seed decides, nothing else
    assert not any(m._forward_hooks for m in net.modules() if m is not net.head)


def test_silenced_channels_grow_in_nested_sets(net: Block, batches) -> None:
    sites = find_sites(net, batches[0][0][:1], "act#1")
    silent = []
    net.head.register_forward_pre_hook(lambda _module, args: silent.append((args[0] == 0).all(0)))
    with torch.no_grad():
        net.bn1.bias += 5  # every channel is alive before
    ablation_curve(net, batches[:1], sites, seeds=1)
    assert [int(s.sum()) for s in silent] == [8 * k // 10 for k in range(10)]
    assert all((a <= b).all() for a, b in pairwise(silent))


def test_summary_and_missing_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        AblationPoint(seed, ratio, top1)
        for seed, ratio, top1 in ((0, 0.1, 0.2), (1, 0.1, 0.6), (0, 0.0, 1.0))
    ]
    assert plots.summarise(points) == [(0.0, 1.0, 0.0), (0.1, 0.4, statistics.stdev([0.2, 0.6]))]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ChanzooError, match=r"chanzoo\[plot\]"):
        plots.require_matplotlib()
