"""Widths of small networks: what follows a narrowed layer, what cannot be narrowed, and how it says so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, CondConv2d, LayerNorm2d, ScaledStdConv2d, SelectAdaptivePool2d
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from chanzoo.errors import UsageError
from chanzoo.layers import ChannelEquilibrium
from chanzoo.layers.narrow import apply_widths, check_cnn, fill_widths, read_widths


class Net(nn.Module):
    """The least of timm's contract around some layers."""

    def __init__(self, *layers: nn.Module, features: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(*layers)
        self.global_pool = SelectAdaptivePool2d(flatten=True)
        self.fc = nn.Linear(features, 5)
        self.num_features = self.head_hidden_size = features
        self.pretrained_cfg = {"first_conv": "stem", "classifier": "fc", "architecture": "net"}
        self.feature_info = [dict(num_chs=8, reduction=1, module="stem")]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.fc


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def check(model: nn.Module, widths: dict[str, list[int]], size: int = 16) -> None:
    """Narrow a copy; it is what the table says, runs, trains, and starts with the entries of the full one."""
    narrow = copy.deepcopy(model)
    apply_widths(narrow, widths)
    assert read_widths(narrow, model) == widths
    full = model.state_dict()
    for key, tensor in narrow.state_dict().items():
        if "running_wm" not in key:
            assert torch.equal(tensor, full[key][tuple(slice(n) for n in tensor.shape)]), key
        assert tensor.is_contiguous()
    out = narrow(torch.randn(2, 3, size, size))
    assert out.isfinite().all()
    out.sum().backward()
    fresh = copy.deepcopy(model)
    apply_widths(fresh, widths)
    fresh.load_state_dict(narrow.state_dict())


def refuses(model: nn.Module, widths: Any, *words: str) -> None:
    before, state = repr(model), {k: v.clone() for k, v in model.state_dict().items()}
    tensors = {k: id(v) for k, v in model.named_parameters()}
    with pytest.raises(UsageError) as caught:
        apply_widths(model, widths)
    for word in words:
        assert word in str(caught.value)
    assert str(caught.value).endswith("The network is unchanged.")
    assert repr(model) == before and tensors == {k: id(v) for k, v in model.named_parameters()}
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


NORMS: dict[str, Any] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(8),
    "BatchNormAct2d": lambda: BatchNormAct2d(8),
    "frozen statistics": lambda: nn.BatchNorm2d(8, affine=False),
    "LayerNorm2d": lambda: LayerNorm2d(8),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(8, affine=True),
    "GroupNorm1": lambda: timm.layers.GroupNorm1(8),
    "RmsNorm2d": lambda: timm.layers.RmsNorm2d(8),
    "EvoNorm2dS0": lambda: timm.layers.EvoNorm2dS0(8, groups=2),
    "FilterResponseNormAct2d": lambda: timm.layers.FilterResponseNormAct2d(8),
    "LayerScale2d": lambda: timm.layers.LayerScale2d(8),
    "GlobalResponseNorm": lambda: GlobalResponseNorm(8, channels_last=False),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_and_layers_with_a_value_per_channel(name: str) -> None:
    layer = NORMS[name]()
    model = Net(layer, nn.Conv2d(8, 8, 1))
    check(model, {"stem": [6, 3], "body.0": [6], "body.1": [8, 6]})


def test_a_group_norm_keeps_its_groups() -> None:
    model = Net(nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 1))
    refuses(model, {"stem": [6, 3], "body.0": [6], "body.1": [8, 6]}, "num_groups=4 does not divide 6")


def test_depthwise_stays_depthwise_and_groups_stay() -> None:
    model = Net(nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 8, 1, groups=4))
    widths = {"stem": [6, 3], "body.0": [12, 6], "body.1": [4, 12], "fc": [5, 4]}
    check(model, widths)
    apply_widths(model, widths)
    assert [layer.groups for layer in model.body] == [6, 4]
    assert (model.num_features, model.head_hidden_size, model.feature_info[0]["num_chs"]) == (4, 4, 6)
    again = Net(nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 8, 1, groups=4))
    refuses(again, {"body.0": [16, 6]}, '"body.0"', "it is depthwise, and 6 does not divide 16")
    refuses(again, {"body.1": [6, 16]}, '"body.1"', "groups=4 does not divide out_channels=6")
    refuses(again, {"body.1": [8, 14]}, "groups=4 does not divide in_channels=14")


def test_scaled_weight_standardisation_scales_by_the_new_fan_in() -> None:
    model = Net(ScaledStdConv2d(8, 8, 3, padding=1))
    widths = {"stem": [4, 3], "body.0": [8, 4]}
    check(model, widths)
    apply_widths(model, widths)
    assert model.body[0].scale == pytest.approx(ScaledStdConv2d(4, 8, 3).scale)


@pytest.mark.parametrize(("entry", "group_size"), [([12, 4], 4), ([12], 4), ([12, 12], 12), ([12, 6], 6)])
def test_channel_equilibrium(entry: list[int], group_size: int) -> None:
    model = Net(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), ChannelEquilibrium(16), features=16)
    widths = {
        "body.0": [12, 8],
        "body.1": [12],
        "body.2.decorrelation": entry,
        "body.2.reweight.fc1": [3, 12],
        "body.2.reweight.norm": [3],
        "body.2.reweight.fc2": [12, 3],
        "fc": [5, 12],
    }
    apply_widths(full := copy.deepcopy(model), widths)
    layer = full.body[2].decorrelation
    assert (layer.channels, layer.groups, layer.group_size) == (12, 12 // group_size, group_size)
    assert torch.equal(layer.running_wm, torch.eye(group_size).repeat(12 // group_size, 1, 1))
    check(model, {**widths, "body.2.decorrelation": [12, group_size]})
    del widths["body.2.decorrelation"]
    refuses(model, widths, 'layer "body.2" (ChannelEquilibrium) does not run')
    refuses(model, {"body.2.decorrelation": [12, 5]}, "group_size=5 does not divide 12")
    refuses(model, {"body.2.decorrelation": [12, 24]}, "expected [channels, group_size] of at most [16, 12]")


def test_equilibrium_groups_may_grow() -> None:
    model = Net(nn.Conv2d(8, 32, 1), ChannelEquilibrium(32, group_size=4), features=32)
    check(
        model,
        {
            "body.0": [30, 8],
            "body.1.decorrelation": [30, 10],
            "body.1.reweight.fc1": [8, 30],
            "body.1.reweight.fc2": [30, 8],
            "fc": [5, 30],
        },
    )


def test_a_width_of_one_does_not_stretch_unseen() -> None:
    model = Net(Residual(nn.Conv2d(8, 8, 1)))
    refuses(
        model, {"body.0.branch.0": [1, 8]}, 'layer "body.0" combines maps of one channel with maps of many'
    )
    model = Net(Residual(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1)))
    check(model, {"body.0.branch.0": [1, 8], "body.0.branch.1": [1], "body.0.branch.2": [8, 1]})


def test_sums_of_other_widths_name_their_block() -> None:
    model = Net(Residual(nn.Conv2d(8, 8, 1)))
    refuses(
        model, {"body.0.branch.0": [6, 8]}, 'layer "body.0" (Residual) does not run', "but expected shape"
    )


def test_the_ends_stay_as_built() -> None:
    model = Net(nn.Conv2d(8, 8, 1))
    model.stem = nn.Conv2d(1, 8, 3)
    apply_widths(model, {"stem": [6, 3], "body.0": [7, 6], "fc": [1000, 7]})
    assert (model.stem.in_channels, model.stem.out_channels) == (1, 6)
    assert (model.fc.in_features, model.fc.out_features) == (7, 5)
    bare = Net(nn.Conv2d(8, 8, 1))
    bare.fc = nn.Identity()
    apply_widths(bare, {"body.0": [7, 8], "fc": [1000, 7]})
    assert bare.num_features == bare.head_hidden_size == 7


def test_frozen_parameters_types_and_devices_are_kept() -> None:
    model = Net(nn.Conv2d(8, 8, 1)).to(torch.bfloat16).requires_grad_(False)
    apply_widths(model, {"body.0": [7, 8], "fc": [5, 7]})
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    meta = Net(nn.Conv2d(8, 8, 1)).to("meta")
    apply_widths(meta, {"body.0": [7, 8], "fc": [5, 7]})
    assert {p.device.type for p in meta.parameters()} == {"meta"} and meta.training


@pytest.mark.parametrize(
    ("widths", "words"),
    [
        ([("stem", [4, 3])], "widths is list: expected a table"),
        ({"stm": [4, 3]}, 'net has no layer "stm", which widths names.   Did you mean stem?'),
        ({"": [4]}, 'has no layer ""'),
        ({3: [4]}, 'has no layer "3"'),
        ({"body": [4]}, 'layer "body" (Sequential) cannot be narrowed'),
        ({"global_pool": [4]}, "it holds  none"),
        ({"stem": 4}, "has widths 4: expected [out, in]"),
        ({"stem": [4]}, "expected [out, in], whole numbers of 1 or more"),
        ({"stem": [True, 3]}, "whole numbers"),
        ({"stem": [4.0, 3]}, "whole numbers"),
        ({"stem": ["4", 3]}, "whole numbers"),
        ({"stem": [0, 3]}, "whole numbers of 1 or more"),
        ({"stem": [-4, 3]}, "whole numbers of 1 or more"),
        ({"stem": [9, 3]}, "has widths [9, 3]: expected [out, in] of at most [8, 3]"),
        ({"stem": [6, 3]}, 'layer "body.0" (Conv2d) gets 6 channels.\n  expected  [out, in] = [8, 6]'),
        ({"fc": [5, 6]}, 'layer "fc" (Linear) gets 8 channels.'),
    ],
)
def test_what_is_refused(widths: Any, words: str) -> None:
    refuses(Net(nn.Conv2d(8, 8, 1)), widths, words)


def test_layers_of_other_kinds_are_named() -> None:
    model = Net(CondConv2d(8, 8, 1, num_experts=3))
    refuses(model, {"body.0": [6, 8]}, 'layer "body.0" (CondConv2d) cannot be narrowed', "weight [3, 64]")
    refuses(Net(nn.ConvTranspose2d(8, 8, 1)), {"body.0": [6, 8]}, "(ConvTranspose2d) cannot be narrowed")


def test_nothing_to_do() -> None:
    model = Net(nn.Conv2d(8, 8, 1))
    before = repr(model)
    apply_widths(model, {})
    apply_widths(model, {"body.0": [8, 8]})
    assert repr(model) == before and read_widths(model, model) == {}


def test_networks_that_differ_by_more_than_widths() -> None:
    model = Net(nn.Conv2d(8, 8, 1))
    with pytest.raises(
        UsageError, match=r'layer "body.0" \(Conv2d\) differs .*\n  expected  weight \[8, 8, 3'
    ):
        read_widths(model, Net(nn.Conv2d(8, 8, 3)))
    with pytest.raises(UsageError, match=r'layer "body\.1" is in one of the two networks only'):
        read_widths(Net(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)), model)
    with pytest.raises(UsageError, match=r"groups=4\n  found .* groups=2\n  Nothing was recorded"):
        read_widths(Net(nn.Conv2d(8, 4, 1, groups=2)), Net(nn.Conv2d(8, 8, 1, groups=4)))
    wider = Net(ChannelEquilibrium(8, group_size=4))
    assert read_widths(wider, Net(ChannelEquilibrium(8))) == {"body.0.decorrelation": [8, 4]}


def test_what_is_no_cnn() -> None:
    check_cnn(Net(nn.Conv2d(8, 8, 1)))
    with pytest.raises(UsageError, match=r"Sequential cannot be narrowed: it is no CNN with timm's"):
        check_cnn(nn.Sequential(nn.Conv2d(3, 8, 1)))
    with pytest.raises(UsageError, match=r"its features are \[2, 8, 784\]: expected maps \[b, 8, h, w\]"):
        check_cnn(Net(nn.MaxPool2d(8), nn.Flatten(2)))


def shrink(model: nn.Module, factor: int, *names: str) -> dict[str, list[int]]:
    """Both sizes of the named layers divided."""
    widths = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            widths[name] = [layer.out_channels // factor, layer.in_channels // factor]
        else:
            widths[name] = [layer.num_features // factor]
    return widths


def test_blocks_that_cut_their_maps_into_pieces() -> None:
    model = timm.create_model("res2net50_26w_4s", num_classes=5)
    block = "layer1.1."
    widths = {f"{block}conv1": [52, 256], f"{block}bn1": [52], f"{block}conv3": [256, 52]}
    widths |= shrink(model, 2, *(f"{block}{kind}.{i}" for kind in ("convs", "bns") for i in range(3)))
    check(model, widths, size=64)
    apply_widths(model, widths)
    assert model.layer1[1].width == 13


def test_blocks_that_remember_what_comes_in() -> None:
    model = timm.create_model("rexnet_100", num_classes=5)
    width = 12  # instead of 16, the stream that the next block extends
    widths = {"features.0.conv_pwl.conv": [width, 32], "features.0.conv_pwl.bn": [width]}
    widths["features.1.conv_exp.conv"] = [96, width]
    check(model, widths, size=64)
    apply_widths(model, widths)
    assert model.features[1].in_channels == width
    extended = model.features[2]  # adds its input to the first channels of its output
    assert extended.use_shortcut and extended.in_channels == extended.conv_exp.conv.in_channels


def test_mixed_kernels_and_blurred_pooling() -> None:
    model = timm.create_model("mixnet_s", num_classes=5)
    mixed = next(n for n, m in model.named_modules() if type(m).__name__ == "MixedConv2d" and "dw" in n)
    block = mixed.rpartition(".")[0]
    parts = [f"{mixed}.{i}" for i in range(len(model.get_submodule(mixed)))]
    widths = shrink(model, 2, *parts, f"{block}.bn1", f"{block}.bn2")
    hidden = widths[f"{block}.bn1"][0]
    layer: Any = model.get_submodule(block)
    expand = layer.conv_pw
    if isinstance(expand, nn.Conv2d):
        widths[f"{block}.conv_pw"] = [hidden, expand.in_channels]
    else:
        for i, conv in enumerate(expand.values()):
            widths[f"{block}.conv_pw.{i}"] = [conv.out_channels // 2, conv.in_channels]
    if isinstance(layer.conv_pwl, nn.Conv2d):
        widths[f"{block}.conv_pwl"] = [layer.conv_pwl.out_channels, hidden]
    else:
        for i, conv in enumerate(layer.conv_pwl.values()):
            widths[f"{block}.conv_pwl.{i}"] = [conv.out_channels, conv.in_channels // 2]
    if hasattr(layer.se, "conv_reduce"):
        widths[f"{block}.se.conv_reduce"] = [layer.se.conv_reduce.out_channels, hidden]
        widths[f"{block}.se.conv_expand"] = [hidden, layer.se.conv_expand.in_channels]
    check(model, widths, size=64)

    blurred = timm.create_model("resnetblur18", num_classes=5)
    check(
        blurred,
        {"layer2.0.conv1": [64, 64], "layer2.0.bn1": [64], "layer2.0.conv2": [128, 64]},
        size=64,
    )


class Padded(nn.Module):
    """Keeps more than tensors: how many channels its shortcut pads."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.follow_widths()

    def follow_widths(self) -> None:
        self.more = self.conv.out_channels - self.conv.in_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + nn.functional.pad(x, (0, 0, 0, 0, 0, self.more))


def test_blocks_that_say_how_they_follow() -> None:
    model = Net(Padded(8), nn.Conv2d(8, 8, 1))
    widths = {"stem": [4, 3], "body.0.conv": [6, 4], "body.1": [8, 6]}
    check(model, widths)
    assert fill_widths(model, {"stem": 4, "body.0.conv": 6}) == widths
    apply_widths(model, widths)
    assert model.body[0].more == 2


def test_the_rest_of_a_table_follows_from_the_outputs() -> None:
    model = Net(
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3, groups=8),
        LayerNorm2d(16),
        Residual(nn.Conv2d(16, 16, 1), nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 1)),
        features=16,
    )
    table = fill_widths(model, {"stem": 6, "body.3.branch.0": 8, "body.3.branch.2": 12})
    assert table == {
        "stem": [6, 3],
        "body.0": [6],
        "body.1": [12, 6],
        "body.2": [12],
        "body.3.branch.0": [8, 12],
        "body.3.branch.1": [8],
        "body.3.branch.2": [12, 8],
        "fc": [5, 12],
    }
    check(model, table)
    assert fill_widths(model, {}) == {} == fill_widths(model, {"stem": 8})
    assert model.stem.out_channels == 8


def test_the_rest_of_a_table_with_pooling_side_by_side() -> None:
    model = timm.create_model("resnet10t", global_pool="catavgmax", num_classes=5)
    table = fill_widths(model, {"layer4.0.conv2": 96, "layer4.0.downsample.1": 96})
    assert table["fc"] == [5, 96]
    check(model, table, size=64)


def test_equilibrium_needs_a_whole_table() -> None:
    model = Net(nn.Conv2d(8, 16, 1), ChannelEquilibrium(16), features=16)
    with pytest.raises(UsageError, match=r'layer "body\.1" \(ChannelEquilibrium\) does not run'):
        fill_widths(model, {"body.0": 12})


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ({"body.3.branch.2": 8}, 'layer "body.3" (Residual) does not run'),
        ({"body.3.branch.2": 1}, 'layer "body.3" combines maps of one channel'),
        ({"body.3.branch.0": 6}, 'layer "body.3.branch.1" (GroupNorm) would have widths [6]: num_groups=4'),
        ({"body.9": 6}, 'net has no convolution "body.9" with outputs of its own'),
        ({"body.0": 6}, 'no convolution "body.0"'),
        ({"body.1": 6}, 'no convolution "body.1" with outputs of its own'),
        ({"stem": 9}, 'layer "stem" cannot put out 9 channels: expected 1 to 8'),
        ({"stem": 0}, "cannot put out 0 channels"),
        ({"stem": True}, "cannot put out True channels"),
        ({"stem": 4.0}, "cannot put out 4.0 channels"),
    ],
)
def test_outputs_that_cannot_be(outputs: Any, words: str) -> None:
    model = Net(
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3, groups=8),
        LayerNorm2d(16),
        Residual(nn.Conv2d(16, 16, 1), nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 1)),
        features=16,
    )
    before = repr(model)
    with pytest.raises(UsageError) as caught:
        fill_widths(model, outputs)
    assert words in str(caught.value) and str(caught.value).endswith("The network is unchanged.")
    assert repr(model) == before
