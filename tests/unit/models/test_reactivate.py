"""Sparse feature reactivation in networks that know nothing of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import chanzoo
from chanzoo.errors import UsageError
from chanzoo.layers import SparseReactivation, condense
from chanzoo.layers.condensing import learned_layers
from chanzoo.models import add_reactivation


class Dense(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, growth, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(x)], dim=1)


class SequentialDense(nn.Sequential):
    """A container itself; new maps come first."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([super().forward(input), input], dim=1)


class Mixed(nn.Module):
    """Half of its maps pass, and come out between the others without any order."""

    order = (3, 0, 7, 1, 2, 6, 4, 5)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :4], self.conv(x[:, 4:]).relu()], dim=1)[:, self.order]


class Network(nn.Module):
    """One module of each kind, and some that only look like one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Identity())
        self.mixed = Mixed()
        self.blocks = nn.Sequential(Dense(8, 8), SequentialDense(nn.Conv2d(16, 4, 1), nn.ReLU()))
        self.se = timm.layers.SEModule(20)
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.se(self.blocks(self.mixed(self.stem(x)))).mean(dim=(2, 3)))


def tiny_densenet(**kwargs: Any) -> nn.Module:
    return timm.create_model("densenet121", growth_rate=8, block_config=(2, 2), num_classes=5, **kwargs)


NETS: dict[str, tuple[Callable[[], nn.Module], str, list[str]]] = {
    # network, pattern, modules expected
    "own": (Network, "*", ["mixed", "blocks.0", "blocks.1"]),
    "timm": (tiny_densenet, "*", [f"features.denseblock{i}.denselayer{j}" for i in (1, 2) for j in (1, 2)]),
    "torchvision dense": (
        lambda: torchvision.models.DenseNet(8, (2, 1), 16, num_classes=5),
        "*",
        [f"features.denseblock{i}.denselayer{j}" for i, j in ((1, 1), (1, 2), (2, 1))],
    ),
    "torchvision shuffle": (
        lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5),
        "stage4.*",
        [f"stage4.{i}" for i in (1, 2, 3)],
    ),
    "ours shuffle": (
        lambda: timm.create_model("shufflenetv2_x0_5", num_classes=5),
        "stage*",
        [*(f"stage{s}.{i}" for s, n in ((2, 4), (3, 8), (4, 4)) for i in range(1, n))],
    ),
    "ours dense": (
        lambda: timm.create_model("cifar_densenet40"),
        "stage3.[0-9]*",
        [f"stage3.{i}" for i in range(1, 13)],
    ),
    "CondenseNet": (
        lambda: timm.create_model("condensenet_cifar50", depths=(2, 1), growth=(8, 16)),
        "*",
        ["stage1.0", "stage1.1", "stage2.0"],
    ),
    "condensed": (
        lambda: timm.create_model("condensenet_cifar50", depths=(1, 1), growth=(8, 16), condensed=True),
        "*",
        ["stage1.0", "stage2.0"],
    ),
}


@pytest.fixture(params=NETS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, str, list[str]]:
    build, pattern, names = NETS[request.param]
    model = build()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return model, pattern, names


def train(model: nn.Module, x: Tensor, steps: int = 4) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()


def test_inserted_trained_and_condensed(case: tuple[nn.Module, str, list[str]]) -> None:
    model, pattern, names = case
    x = torch.randn(4, 3, 64, 64)
    keys = set(model.state_dict())
    state = torch.get_rng_state()
    with torch.no_grad():
        before = model.eval()(x)
        assert add_reactivation(model, pattern, total_steps=4) == names
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(model(x), before)
    moved = {key for key in keys - set(model.state_dict()) if not key.startswith("blocks.1.")}
    assert not moved
    other = copy.deepcopy(model)
    train(model, x)
    layers = learned_layers(model)
    assert {f"{name}.sfr" for name in names} <= set(layers)
    assert all(layer.is_condensed() and layer.weight.abs().sum() > 0 for layer in layers.values())
    assert int(model.progress.train_step) == 4
    with torch.no_grad():
        assert torch.equal(other(x), before)
        after = model(x)
        assert not torch.allclose(after, before)
        small = condense(model)
        assert not learned_layers(small) and chanzoo.count_params(small) < chanzoo.count_params(model)
        assert (small(x) - after).abs().max() <= 1e-5 * after.abs().max()


def test_old_maps_are_refreshed_and_new_ones_stay() -> None:
    model = Network().eval()
    add_reactivation(model, "mixed", groups=2)
    layer = model.mixed.sfr
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        new = model.mixed.conv(x[:, 4:]).relu()
        # The layer sees maps in the order of the output.
        old_places = [i for i, c in enumerate(Mixed.order) if c < 4]
        new_places = [i for i, c in enumerate(Mixed.order) if c >= 4]
        new_seen = new[:, [c - 4 for c in Mixed.order if c >= 4]]
        old_seen = x[:, [c for c in Mixed.order if c < 4]]
        out = model.mixed(x)
        torch.testing.assert_close(out[:, new_places], new_seen)
        torch.testing.assert_close(out[:, old_places], layer(new_seen, old_seen))
    assert not torch.allclose(out[:, old_places], old_seen)


def test_densenet_refreshes_the_list() -> None:
    """A network of timm's against the sum written out."""
    model = tiny_densenet().eval()
    add_reactivation(model, "*.denseblock1.*")
    block = model.features.denseblock1
    for layer in learned_layers(model).values():
        nn.init.normal_(layer.weight)
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        out = block(x)
        for layer in block.values():
            new = layer.conv2(layer.norm2(layer.bottleneck_fn([x])))
            x = torch.cat([layer.sfr(new, x), new], dim=1)
    torch.testing.assert_close(out, x)


def test_plain_shufflenet_becomes_the_reactivated_one() -> None:
    model = timm.create_model("shufflenetv2_x0_5", num_classes=5).eval()
    add_reactivation(model, "*")
    for layer in learned_layers(model).values():
        nn.init.normal_(layer.weight)
    ours = timm.create_model("sfr_shufflenetv2_x0_5", num_classes=5).eval()
    ours.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), model(x))
    theirs = torchvision.models.shufflenet_v2_x0_5(num_classes=5).eval()
    add_reactivation(theirs, "*")
    theirs.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model(x))


def test_containers_move_down_one() -> None:
    model = tiny_densenet().eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        assert add_reactivation(model, "*", exclude="*.denselayer*") == [
            "features.denseblock1",
            "features.denseblock2",
        ]
        torch.testing.assert_close(model(x), before)
    assert "features.denseblock1.body.denselayer1.conv1.weight" in model.state_dict()
    assert model.features.denseblock1.sfr.out_channels == 16
    with pytest.raises(UsageError, match=r"features\.denseblock1\.body"):
        add_reactivation(model, "features.denseblock1.body")


@pytest.mark.parametrize(
    ("build", "pattern", "count"),
    [
        (lambda: tiny_densenet(features_only=True, out_indices=(0, 1, 2)), "*", 4),
        (lambda: timm.create_model("shufflenetv2_x0_5", features_only=True), "stage2*", 3),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Dense(8, 4), nn.ReLU()), "*", 1),
    ],
    ids=["timm", "ours", "Sequential"],
)
def test_networks_that_run_all_their_parts(build: Callable[[], nn.Module], pattern: str, count: int) -> None:
    model = build().eval()
    x = torch.randn(2, 3, 64, 64)

    def run() -> list[Tensor]:
        out = model(x)
        return list(out) if isinstance(out, list) else [out]

    with torch.no_grad():
        before = run()
        assert len(add_reactivation(model, pattern, total_steps=2)) == count
        after = run()
    assert len(before) == len(after) and all(map(torch.equal, before, after))
    model.train()
    for _ in range(2):
        sum(out.square().mean() for out in run()).backward()
    assert all(layer.is_condensed() for layer in learned_layers(model).values())
    assert all(layer.weight.grad is not None for layer in learned_layers(model).values())


@pytest.mark.slow
@pytest.mark.parametrize("build", [Network, tiny_densenet], ids=["own", "timm"])
def test_compiled_network_computes_the_same_and_condenses(build: Callable[[], nn.Module]) -> None:
    torch.compiler.reset()
    model = build().eval()
    add_reactivation(model, "*", total_steps=4)
    for layer in learned_layers(model).values():
        nn.init.normal_(layer.weight)
    x = torch.randn(2, 3, 64, 64)
    compiled: Any = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    train(compiled, x)
    assert int(model.progress.train_step) == 4
    assert all(layer.is_condensed() for layer in learned_layers(model).values())


def test_options_type_and_mode_are_kept() -> None:
    model = timm.create_model("shufflenetv2_x0_5", dtype=torch.bfloat16).eval()
    assert add_reactivation(
        model, ["stage2.*", "stage4.1"], exclude="*.2", groups=4, condensation_factor=2, total_steps=8
    ) == ["stage2.1", "stage2.3", "stage4.1"]
    layers = learned_layers(model)
    assert {(layer.groups, layer.condensation_factor) for layer in layers.values()} == {(4, 2)}
    assert {layer.weight.dtype for layer in layers.values()} == {torch.bfloat16}
    assert not any(layer.training for layer in layers.values()) and not model.progress.training
    assert model(torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_networks_without_memory() -> None:
    with torch.device("meta"):
        models = [build() for build, _, _ in NETS.values()]
    for model, (_, pattern, names) in zip(models, NETS.values(), strict=True):
        assert add_reactivation(model, pattern) == names
        assert {p.device.type for p in model.parameters()} == {"meta"}


def test_mixed_precision() -> None:
    model = Network()
    add_reactivation(model, "*")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(2, 3, 32, 32)).float().sum().backward()
    assert all(layer.weight.grad is not None for layer in learned_layers(model).values())


def test_what_comes_later_is_trained_from_the_start() -> None:
    """Else new layers would drop connections at once, all of them zeros."""
    model = Network()
    add_reactivation(model, "mixed", total_steps=4)
    x = torch.randn(2, 3, 32, 32)
    train(model, x, 4)
    done = model.mixed.sfr.mask.clone()
    add_reactivation(model, "blocks.*")
    assert int(model.progress.train_step) == 0
    assert model.progress.total_steps == 4
    train(model, x, 1)
    assert all(layer.mask.all() for name, layer in learned_layers(model).items() if name != "mixed.sfr")
    train(model, x, 3)
    assert int(model.progress.train_step) == 4
    assert all(layer.is_condensed() for layer in learned_layers(model).values())
    assert torch.equal(model.mixed.sfr.mask, done)


@pytest.mark.parametrize("make", [Network, tiny_densenet, lambda: timm.create_model("shufflenetv2_x0_5")])
def test_the_condensed_form_comes_back_by_the_same_call(make: Callable[[], nn.Module]) -> None:
    model = make()
    add_reactivation(model, "*", total_steps=2, condensation_factor=2, groups=2)
    x = torch.randn(2, 3, 64, 64)
    train(model, x, 2)
    small, again = condense(model.eval()), make().eval()
    add_reactivation(again, "*", condensed=True, condensation_factor=2, groups=2)
    assert again.state_dict().keys() == small.state_dict().keys()
    again.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


def test_networks_of_ours_with_more_layers_than_their_arguments_say() -> None:
    model = timm.create_model("condensenet_cifar50")
    add_reactivation(model, "stage1.1", total_steps=2)
    train(model, torch.randn(2, 3, 32, 32), 2)
    small = condense(model.eval())
    assert not small.condensed and "condensed" not in small._model_args
    again = timm.create_model("condensenet_cifar50")
    add_reactivation(again, "stage1.1")
    with pytest.raises(UsageError, match="Use add_reactivation with condensed=True"):
        again.load_state_dict(small.state_dict())


def test_lasso() -> None:
    model = Network()
    add_reactivation(model, "*", group_lasso=0.5)
    assert all(layer.group_lasso == 0.5 for layer in learned_layers(model).values())
    refuses(Network(), "belong to the training form", "*", condensed=True, group_lasso=0.5)
    refuses(Network(), "belong to the training form", "*", condensed=True, total_steps=5)


def test_an_example_for_networks_of_another_input() -> None:
    model = nn.Sequential(Dense(6, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 2))
    assert add_reactivation(model, "0", example=torch.zeros(1, 6, 9, 9)) == ["0"]
    fixed = nn.Sequential(Dense(3, 4), nn.Flatten(), nn.Linear(7 * 81, 2))
    with pytest.raises(UsageError, match=r"does not run on images \[2, 3, 224, 224\]: .*\n  Pass a batch"):
        add_reactivation(fixed, "0")
    assert add_reactivation(fixed, "0", example=torch.zeros(1, 3, 9, 9)) == ["0"]


def refuses(model: nn.Module, words: str, pattern: str | list[str], **kwargs: Any) -> None:
    before, keys, state = repr(model), list(model.state_dict()), torch.get_rng_state()
    with pytest.raises(UsageError, match=words) as caught:
        add_reactivation(model, pattern, **kwargs)
    assert "network is unchanged" in str(caught.value) or "Nothing was built" in str(caught.value)
    assert repr(model) == before and list(model.state_dict()) == keys
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_refuses_a_pattern_without_module() -> None:
    words = r'no module is called "stage9" in Network.\n  there are  mixed, blocks, blocks.0, blocks.1\n'
    refuses(Network(), words, ["mixed", "stage9"])


def test_refuses_modules_that_carry_nothing_through() -> None:
    words = 'no module called "{}" carries maps through unchanged beside new ones in'
    refuses(Network(), words.format("stem"), ["mixed", "stem"])
    refuses(Network(), words.format(r"s\*"), "s*")
    refuses(timm.create_model("resnet18"), r"there are  none that could get one", "layer1.*")


def test_refuses_when_all_is_excluded() -> None:
    refuses(Network(), "every matched module is excluded", "blocks*", exclude=["blocks", "blocks.?"])


def test_refuses_a_second_layer() -> None:
    words = 'module "{}" has a reactivation already'
    for name in ("sfr_shufflenetv2_x0_5", "condensenetv2_a"):
        model = timm.create_model(name, device="meta")
        first = next(iter(learned_layers(model))).rpartition(".")[0]
        refuses(model, words.format(first), f"{first}*")
    model = Network()
    add_reactivation(model, "mixed")
    with pytest.raises(UsageError, match=words.format("mixed")):
        add_reactivation(model, "*")
    assert [name for name, m in model.named_modules() if isinstance(m, SparseReactivation)] == ["mixed.sfr"]


def test_refuses_names_that_are_taken() -> None:
    model = Network()
    model.mixed.sfr = nn.Identity()
    refuses(model, 'module "mixed" has a part "sfr" of its own', "mixed")
    model = Network()
    model.progress = nn.Identity()
    refuses(model, 'Network has a part "progress" of its own', "mixed")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"groups": 3}, r'module "blocks.0" has 8 old maps and 8 new ones: groups=3 does not divide'),
        ({"groups": 4, "condensation_factor": 3}, r"condensation_factor=3 does not divide out_channels=8"),
        ({"groups": 0}, "groups=0 does not divide"),
        ({"total_steps": 0}, "total_steps=0: expected a whole number above 0"),
    ],
    ids=str,
)
def test_refuses_numbers_that_do_not_fit(kwargs: dict[str, int], words: str) -> None:
    refuses(Network(), words, "blocks.0", **kwargs)
