"""``narrow_cnn``: networks of many families at other widths, built, saved and built again."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from chanzoo.errors import NoWeightsError, UsageError
from chanzoo.layers.narrow import apply_widths, fill_widths, read_widths
from chanzoo.models import check_folder
from chanzoo.models.ce_resnet import CECifarResNet
from chanzoo.models.cifar_resnet import CifarResNet
from chanzoo.models.narrow import read_table

Widths = dict[str, list[int]]
SIZE = 64


class Plan:
    """A table under construction: which layer makes, takes or carries how many channels."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.table: Widths = {}

    def _set(self, name: str, place: int, n: int) -> None:
        layer = self.model.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            full = [layer.out_channels, layer.in_channels]
        else:
            full = [layer.out_features, layer.in_features]
        self.table.setdefault(name, full)[place] = n

    def make(self, n: int, *names: str) -> None:
        for name in names:
            self._set(name, 0, n)

    def take(self, n: int, *names: str) -> None:
        for name in names:
            self._set(name, 1, n)

    def carry(self, n: int, *names: str) -> None:
        for name in names:
            if isinstance(self.model.get_submodule(name), nn.Conv2d):  # depthwise
                self.table[name] = [n, n]
            else:
                self.table[name] = [n]

    def equilibrium(self, n: int, name: str, group_size: int) -> None:
        hidden = max(1, n // 4)
        self.table[f"{name}.decorrelation"] = [n, group_size]
        self.table[f"{name}.reweight.fc1"] = [hidden, n]
        self.table[f"{name}.reweight.norm"] = [hidden]
        self.table[f"{name}.reweight.fc2"] = [n, hidden]


def resnet(model: nn.Module, multiple: int = 1) -> Widths:
    """Stem by half, streams to 3/4, inner widths by half or to a multiple; CE where there is some."""
    plan = Plan(model)
    bottleneck = hasattr(model.layer1[0], "conv3")
    stem = 32 if bottleneck else 48
    plan.make(stem, "conv1")
    plan.carry(stem, "bn1")
    if hasattr(model.act1, "ce"):
        plan.equilibrium(stem, "act1.ce", stem)  # all channels at once, as in the full network
    before = stem
    for stage in (1, 2, 3, 4):
        for i, block in enumerate(getattr(model, f"layer{stage}")):
            name = f"layer{stage}.{i}"
            last = "conv3" if bottleneck else "conv2"
            inner = max(block.conv1.out_channels // 2 // multiple, 1) * multiple
            stream = getattr(block, last).out_channels * 3 // 4
            plan.take(before, f"{name}.conv1")
            plan.make(inner, f"{name}.conv1")
            plan.carry(inner, f"{name}.bn1")
            plan.take(inner, f"{name}.conv2")
            if bottleneck:
                plan.make(inner, f"{name}.conv2")
                plan.carry(inner, f"{name}.bn2")
                plan.take(inner, f"{name}.conv3")
            plan.make(stream, f"{name}.{last}")
            plan.carry(stream, f"{name}.bn{last[-1]}")
            if block.downsample is not None:
                plan.take(before, f"{name}.downsample.0")
                plan.make(stream, f"{name}.downsample.0")
                plan.carry(stream, f"{name}.downsample.1")
            if hasattr(block.se, "decorrelation"):
                plan.equilibrium(stream, f"{name}.se", 12)
            before = stream
    plan.take(before, "fc")
    return plan.table


def efficientnet(model: nn.Module) -> Widths:
    """Every width to 3/4: stem, streams, hidden widths with their squeeze-and-excitation, head."""
    plan = Plan(model)
    before = 24
    plan.make(before, "conv_stem")
    plan.carry(before, "bn1")
    for name, block in model.named_modules():
        if not hasattr(block, "conv_dw"):
            continue
        hidden = block.conv_dw.out_channels * 3 // 4
        if hasattr(block, "conv_pwl"):
            plan.take(before, f"{name}.conv_pw")
            plan.make(hidden, f"{name}.conv_pw")
            plan.carry(hidden, f"{name}.bn1", f"{name}.conv_dw", f"{name}.bn2")
            project, norm = f"{name}.conv_pwl", f"{name}.bn3"
        else:
            plan.carry(hidden, f"{name}.conv_dw", f"{name}.bn1")
            project, norm = f"{name}.conv_pw", f"{name}.bn2"
        if isinstance(block.se, nn.Module) and hasattr(block.se, "conv_reduce"):
            plan.take(hidden, f"{name}.se.conv_reduce")
            plan.make(hidden, f"{name}.se.conv_expand")
        before = model.get_submodule(project).out_channels * 3 // 4
        plan.take(hidden, project)
        plan.make(before, project)
        plan.carry(before, norm)
    head = model.conv_head.out_channels * 3 // 4
    plan.take(before, "conv_head")
    plan.make(head, "conv_head")
    plan.carry(head, "bn2")
    plan.take(head, "classifier")
    return plan.table


def densenet(model: nn.Module) -> Widths:
    """Stem 48, bottlenecks by half, 24 new channels a layer instead of 32, transitions by half."""
    plan = Plan(model)
    before = 48
    plan.make(before, "features.conv0")
    plan.carry(before, "features.norm0")
    for stage in (1, 2, 3, 4):
        block = f"features.denseblock{stage}"
        for name, _ in model.get_submodule(block).named_children():
            plan.carry(before, f"{block}.{name}.norm1")
            plan.take(before, f"{block}.{name}.conv1")
            plan.make(64, f"{block}.{name}.conv1")
            plan.carry(64, f"{block}.{name}.norm2")
            plan.take(64, f"{block}.{name}.conv2")
            plan.make(24, f"{block}.{name}.conv2")
            before += 24
        if stage < 4:
            plan.carry(before, f"features.transition{stage}.norm")
            plan.take(before, f"features.transition{stage}.conv")
            before //= 2
            plan.make(before, f"features.transition{stage}.conv")
    plan.carry(before, "features.norm5")
    plan.take(before, "classifier")
    return plan.table


def convnext(model: nn.Module) -> Widths:
    """Streams to 3/4, hidden widths by half; the blocks themselves hold the layer scale."""
    plan = Plan(model)
    before = 0
    for i, stage in enumerate(model.stages):
        width = stage.blocks[0].conv_dw.out_channels * 3 // 4
        if i:
            plan.carry(before, f"stages.{i}.downsample.0")
            plan.take(before, f"stages.{i}.downsample.1")
            plan.make(width, f"stages.{i}.downsample.1")
        else:
            plan.make(width, "stem.0")
            plan.carry(width, "stem.1")
        for j, _ in enumerate(stage.blocks):
            name = f"stages.{i}.blocks.{j}"
            plan.carry(width, name, f"{name}.conv_dw", f"{name}.norm")
            plan.take(width, f"{name}.mlp.fc1")
            plan.make(2 * width, f"{name}.mlp.fc1")
            plan.take(2 * width, f"{name}.mlp.fc2")
            plan.make(width, f"{name}.mlp.fc2")
        before = width
    plan.carry(before, "head.norm")
    plan.take(before, "head.fc")
    return plan.table


def regnet(model: nn.Module) -> Widths:
    """Streams by a quarter, inner widths to half, in whole groups."""
    plan = Plan(model)
    before = 24
    plan.make(before, "stem.conv")
    plan.carry(before, "stem.bn")
    for name, block in model.named_modules():
        if not hasattr(block, "conv3"):
            continue
        groups = block.conv2.conv.groups
        inner = groups * (block.conv2.conv.out_channels // 2 // groups)
        stream = block.conv3.conv.out_channels * 3 // 4
        plan.take(before, f"{name}.conv1.conv")
        plan.make(inner, f"{name}.conv1.conv", f"{name}.conv2.conv", f"{name}.se.fc2")
        plan.carry(inner, f"{name}.conv1.bn", f"{name}.conv2.bn")
        plan.take(inner, f"{name}.conv2.conv", f"{name}.conv3.conv", f"{name}.se.fc1")
        plan.make(stream, f"{name}.conv3.conv")
        plan.carry(stream, f"{name}.conv3.bn")
        if isinstance(block.downsample, nn.Module) and hasattr(block.downsample, "conv"):
            plan.take(before, f"{name}.downsample.conv")
            plan.make(stream, f"{name}.downsample.conv")
            plan.carry(stream, f"{name}.downsample.bn")
        before = stream
    plan.take(before, "head.fc")
    return plan.table


def vgg(model: nn.Module) -> Widths:
    """Convolutions to 3/4, the two layers behind them to 256 and 192."""
    plan = Plan(model)
    before = 3
    for name, layer in model.features.named_children():
        if isinstance(layer, nn.Conv2d):
            plan.take(before, f"features.{name}")
            before = layer.out_channels * 3 // 4
            plan.make(before, f"features.{name}")
        elif isinstance(layer, nn.BatchNorm2d):
            plan.carry(before, f"features.{name}")
    plan.take(before, "pre_logits.fc1")
    plan.make(256, "pre_logits.fc1")
    plan.take(256, "pre_logits.fc2")
    plan.make(192, "pre_logits.fc2")
    plan.take(192, "head.fc")
    return plan.table


def cifar(outputs: Callable[[int], int]) -> Callable[[Any], Widths]:
    """Every convolution by a rule, the rest follows."""

    def rule(model: nn.Module) -> Widths:
        convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        return fill_widths(model, {name: outputs(conv.out_channels) for name, conv in convs.items()})

    return rule


slow = pytest.mark.slow
RULES: dict[str, Callable[[Any], Widths]] = {
    "resnet18": resnet,
    "resnet50": resnet,
    "resnext50_32x4d": lambda model: resnet(model, multiple=32),
    "ce_resnet50": resnet,
    "resnetblur50": resnet,
    "mobilenetv2_100": efficientnet,
    "efficientnet_b0": efficientnet,
    "densenet121": densenet,
    "convnext_atto": convnext,
    "regnety_004": regnet,
    "vgg11_bn": vgg,
    "cifar_vgg16_bn": cifar(lambda n: n * 3 // 4),
    "cifar_resnet20": cifar(lambda n: n * 3 // 4 + 1),  # streams too: 13, 25, 49
    "cifar_densenet40": cifar(lambda n: n * 3 // 4),
    "cifar_googlenet": cifar(lambda n: n * 3 // 4),
}
FAST = ("resnet18", "mobilenetv2_100", "convnext_atto", "cifar_resnet20", "cifar_vgg16_bn")
FAMILIES = [pytest.param(name, marks=[] if name in FAST else slow) for name in RULES]


def table(name: str) -> Widths:
    return RULES[name](timm.create_model(name, device="meta"))


def narrow(base: str, **kwargs: Any) -> nn.Module:
    return timm.create_model("narrow_cnn", base=base, **kwargs).eval()


def run(model: nn.Module, channels: int = 3) -> Tensor:
    with torch.no_grad():
        return model(torch.randn(2, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1)))


def stir(model: nn.Module) -> None:
    """Weights of no special values, so that nothing comes back by chance."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1 + torch.rand_like(tensor) / 32).add_(1 / 64 if tensor.dim() == 1 else 0)


def save(model: nn.Module, folder: Path) -> None:
    stir(model)
    save_for_hf(model, str(folder), safe_serialization=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_narrowed_network_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    widths = table(name)
    model = narrow(name, widths=widths, num_classes=7)
    assert type(model) is type(timm.create_model(name, device="meta"))
    full = timm.create_model(name, num_classes=7, device="meta")
    assert sum(p.numel() for p in model.parameters()) < 0.75 * sum(p.numel() for p in full.parameters())
    classifier = model.pretrained_cfg["classifier"]
    widths[classifier][0] = 7
    assert read_widths(model, full) == widths
    save(model, tmp_path)
    expected = run(model)
    assert expected.isfinite().all() and expected.shape == (2, 7)
    del model
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["base"] == name
    check_folder(tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(run(again), expected)
    for key in ("mean", "std", "crop_pct", "interpolation", "input_size", "first_conv", "classifier"):
        found, expected_value = again.pretrained_cfg[key], full.pretrained_cfg[key]
        assert (tuple(found) if isinstance(found, list) else found) == expected_value

    # as it was saved, but for a part
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    own = timm.create_model(name, features_only=True, device="meta")
    with torch.no_grad():
        levels = features(torch.randn(1, 3, SIZE, SIZE))
    assert [level.shape[1] for level in levels] == features.feature_info.channels()
    assert features.feature_info.reduction() == own.feature_info.reduction()
    assert max(features.feature_info.channels()) < max(own.feature_info.channels())
    if name != "vgg11_bn":  # its levels are taken in front of the activations in one way, behind in the other
        with torch.no_grad():
            taken = again.forward_intermediates(torch.zeros(1, 3, SIZE, SIZE), intermediates_only=True)
        assert [level.shape[1] for level in taken[-len(levels) :]] == features.feature_info.channels()
    del features
    grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1, num_classes=3).eval()
    assert run(grey, channels=1).shape == (2, 3)
    del grey

    # what timm does to a network
    with torch.no_grad():
        maps = again.forward_features(torch.zeros(1, 3, SIZE, SIZE))
        assert maps.shape[1] == again.num_features
        assert again.forward_head(maps, pre_logits=True).shape == (1, again.head_hidden_size)
    again.reset_classifier(5)
    assert run(again).shape == (2, 5)
    again.reset_classifier(0)
    assert run(again).shape == (2, again.head_hidden_size)
    again.prune_intermediate_layers([1])
    again.reset_classifier(4, "avg")
    assert run(again).shape == (2, 4)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_reaches_every_parameter(name: str) -> None:
    model = narrow(name, widths=table(name), num_classes=3).train()
    model(torch.randn(2, 3, SIZE, SIZE)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_without_widths_it_is_the_base() -> None:
    torch.manual_seed(5)
    base = timm.create_model("resnet10t")
    torch.manual_seed(5)
    model = timm.create_model("narrow_cnn", base="resnet10t")
    assert type(model) is type(base)
    state = model.state_dict()
    assert state.keys() == base.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())
    assert model.pretrained_cfg["architecture"] == "narrow_cnn"
    assert model.pretrained_cfg["test_input_size"] == base.pretrained_cfg["test_input_size"]
    assert not model.pretrained_cfg.get("hf_hub_id"), "weights of the base are not weights of this"


RESNET10T = {"layer1.0.conv1": [24, 64], "layer1.0.bn1": [24], "layer1.0.conv2": [64, 24]}


def test_the_tag_of_a_base_chooses_its_preprocessing() -> None:
    cfgs = [timm.create_model("narrow_cnn", base=b).pretrained_cfg for b in ("resnet18", "resnet18.tv_in1k")]
    assert cfgs[0]["test_input_size"] != cfgs[1].get("test_input_size")


def test_arguments_of_every_network_of_timms() -> None:
    kwargs = dict(widths=RESNET10T, num_classes=6, in_chans=4, drop_rate=0.3, dtype=torch.bfloat16)
    model = narrow("resnet10t", global_pool="max", **kwargs)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (model.conv1[0].in_channels, model.fc.out_features, model.drop_rate) == (4, 6, 0.3)
    assert model.global_pool.pool_type == "max" and model.layer1[0].conv1.out_channels == 24
    meta = narrow("resnet10t", widths=RESNET10T, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert meta.layer1[0].conv1.weight.shape == (24, 64, 3, 3)
    dilated = narrow("resnet10t", widths=RESNET10T, output_stride=16)
    assert dilated.feature_info[-1]["reduction"] == 16 and dilated.layer1[0].conv1.out_channels == 24
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        narrow("resnet10t", widths=RESNET10T, colour="red")
    with pytest.raises(NoWeightsError):
        narrow("resnet10t", pretrained=True)


def test_pooling_side_by_side_and_no_classifier() -> None:
    widths = table("resnet18")
    model = narrow("resnet18", widths=widths, global_pool="catavgmax")
    assert (model.fc.in_features, model.num_features, model.head_hidden_size) == (768, 384, 768)
    full = timm.create_model("resnet18", global_pool="catavgmax", device="meta")
    assert read_widths(model, full) == widths
    bare = narrow("resnet18", widths=widths, num_classes=0)
    assert run(bare).shape == (2, 384) == (2, bare.head_hidden_size)
    assert run(narrow("resnet18", widths=widths, num_classes=0, global_pool="")).shape == (2, 384, 2, 2)


@pytest.mark.parametrize("wrapper", ["list", "dict", "hook", "getter", "fx"])
def test_feature_wrappers_and_levels(wrapper: str) -> None:
    kwargs: dict[str, Any] = dict(widths=table("resnet18"), features_only=True, feature_cls=wrapper)
    model = narrow("resnet18", out_indices=(1, -1) if wrapper == "getter" else (1, 4), **kwargs)
    with torch.no_grad():
        levels = model(torch.randn(1, 3, SIZE, SIZE))
    levels = list(levels.values()) if isinstance(levels, Mapping) else levels
    assert [level.shape[1] for level in levels] == model.feature_info.channels() == [48, 384]


def test_a_file_names_its_base_and_is_spelt_out_when_saved(tmp_path: Path) -> None:
    file = tmp_path / "widths.json"
    file.write_text(json.dumps({"format": 1, "base": "resnet10t", "widths": RESNET10T}))
    for widths in (str(file), file):
        model = timm.create_model("narrow_cnn", widths=widths, num_classes=3).eval()
        assert model.layer1[0].conv1.out_channels == 24
        model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        save(model, tmp_path / "saved")
        args = json.loads((tmp_path / "saved" / "config.json").read_text())["model_args"]
        assert (args["base"], args["widths"]) == ("resnet10t", RESNET10T)
    file.unlink()
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(run(again), run(model))
    whole = {"format": 1, "base": "resnet10t", "widths": RESNET10T}
    assert timm.create_model("narrow_cnn", widths=whole).layer1[0].conv1.out_channels == 24


def test_timms_scripts_look_up_the_config_beforehand(tmp_path: Path) -> None:
    found = timm.models.resolve_model_input_args(
        "narrow_cnn", {}, base="mobilenetv3_small_050", pretrained_cfg_overlay={"crop_pct": 0.5}
    )
    assert found["pretrained_cfg"]["first_conv"] == "conv1", "timm cannot know the base"
    cfg = timm.create_model(**found).pretrained_cfg
    assert (cfg["first_conv"], cfg["interpolation"], cfg["crop_pct"]) == ("conv_stem", "bicubic", 0.5)
    save(narrow("resnet10t", widths=RESNET10T, num_classes=3), tmp_path)
    found = timm.models.resolve_model_input_args(f"local-dir:{tmp_path}", {})
    again = timm.create_model(pretrained=True, **found)
    assert again.pretrained_cfg["first_conv"] == "conv1.0" and again.layer1[0].conv1.out_channels == 24


def test_explicit_files_load_with_the_preprocessing_of_the_base(tmp_path: Path) -> None:
    model = narrow("resnet10t", widths=RESNET10T)
    save(model, tmp_path)
    overlay = {"file": str(tmp_path / "model.safetensors"), "crop_pct": 0.5}
    again = narrow("resnet10t", widths=RESNET10T, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(run(again), run(model))
    assert again.pretrained_cfg["crop_pct"] == 0.5
    assert again.pretrained_cfg["first_conv"] == "conv1.0"


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("resnet5O", 'no model "resnet5O" to take as base. Did you mean resnet50?'),
        ("resnet18.nonsense", "Invalid pretrained tag (nonsense)"),
        ("hf-hub:timm/resnet18.a1_in1k", "expected the name of a CNN"),
        ("local-dir:/tmp", "expected the name of a CNN"),
        (18, "expected the name of a CNN"),
        ("narrow_cnn", "narrow_cnn cannot be its own base"),
        ("vit_tiny_patch16_224", "its features are [2, 197, 192]: expected maps [b, 192, h, w]"),
        ("mixer_s32_224", "is no CNN"),
    ],
)
def test_what_is_no_base(base: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        narrow(base)
    assert words in str(caught.value) and str(caught.value).endswith("No network was built.")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"layer9.conv": [3, 3]}, 'resnet10t has no layer "layer9.conv", which widths names.'),
        ({"layer1.0.conv1": [24]}, 'layer "layer1.0.conv1" (Conv2d) has widths [24]: expected [out, in]'),
        ({"layer1.0.conv1": [24, 0]}, "whole numbers of 1 or more"),
        ({"layer1.0.bn1": [24.0]}, "expected [n], whole numbers"),
        ({"layer1.0.bn1": [65]}, "has widths [65]: expected [n] of at most [64]"),
        ({"layer1.0.conv1": [24, 64]}, 'layer "layer1.0.bn1" (BatchNorm2d) gets 24 channels.'),
        ({**RESNET10T, "layer1.0.conv2": [32, 24]}, 'layer "layer1.0.bn2" (BatchNorm2d) gets 32 channels.'),
        ({**RESNET10T, "fc": [1000, 100]}, "expected  [out, in] = [1000, 512]\n  found     [1000, 100]"),
    ],
)
def test_what_is_no_table_of_widths(entries: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        narrow("resnet10t", widths=entries)
    assert words in str(caught.value) and str(caught.value).endswith("No network was built.")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[1]", "is no table of widths"),
        ('{"conv1": [3, 3]}', 'expected {"format": 1, "base": NAME, "widths"'),
        ('{"format": 2, "base": "resnet10t", "widths": {}}', 'expected {"format": 1'),
        ('{"format": 1, "base": "resnet10t", "widths": [3]}', "holds a list"),
        ('{"format": 1, "base": "resnet18", "widths": {}}', "expected  resnet10t\n  found     resnet18"),
    ],
)
def test_what_is_no_file_of_widths(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "widths.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError) as caught:
        narrow("resnet10t", widths=str(file))
    assert words in str(caught.value) and str(caught.value).endswith("No network was built.")


def test_tables_in_memory() -> None:
    assert read_table(None) == (None, {}) == read_table({})
    assert read_table({"a": (1, 2)}) == (None, {"a": [1, 2]})
    with pytest.raises(UsageError, match="widths holds a list"):
        read_table([3])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"widths": "/etc/passwd"}, "a saved network brings its table, not a path"),
        ({"base": "hf-hub:someone/something"}, "expected the name of a CNN"),
        ({"base": "resnet34"}, "model.safetensors and config.json"),
        ({"widths": {"layer1.0.conv1": [24, 64]}}, "the widths do not fit together"),
        ({"widths": {**RESNET10T, "layer1.0.bn2": [10**9]}}, "of at most [64]"),
        ({"widths": {}}, "do not belong together"),
        ({"base": "resnet50", "base_width": 10**5}, "more than 4,000,000,000 parameters"),
        ({"nonsense": 1}, "unexpected keyword argument 'nonsense'"),
    ],
)
def test_a_hostile_config_is_refused(tmp_path: Path, args: dict[str, Any], words: str) -> None:
    save(narrow("resnet10t", widths=RESNET10T, num_classes=3), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["model_args"].update(args)
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError) as caught:
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert words in str(caught.value) and str(caught.value).endswith("No network was built.")


CIFAR_WIDTHS = [14, 12, 25, 40, *(8, 16, 5), *(17, 32, 30), *(64, 33, 2)]  # stem, stages, inner


@pytest.mark.parametrize("make", [CifarResNet, CECifarResNet])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_shortcuts_without_parameters_follow(make: type[CifarResNet], shortcut: str) -> None:
    widths = CIFAR_WIDTHS if shortcut == "A" else [16, 16, *CIFAR_WIDTHS[2:]]  # B has a projection otherwise
    small = make(20, widths=widths, shortcut=shortcut).eval()
    stir(small)
    into = make(20, shortcut=shortcut).eval()
    apply_widths(into, read_widths(small, into))
    into.load_state_dict(small.state_dict())
    assert torch.equal(run(into), run(small))
    assert repr(into) == repr(small)


def test_a_narrow_cnn_of_cifar_streams_comes_back(tmp_path: Path) -> None:
    small = CifarResNet(20, widths=CIFAR_WIDTHS)
    table = read_widths(small, CifarResNet(20))
    model: Any = narrow("cifar_resnet20", widths=table)
    assert model.num_features == 40
    assert [info["num_chs"] for info in model.feature_info] == [14, 12, 25, 40]
    save(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(run(again), run(model))


def test_a_saved_dwarf_of_a_giant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chanzoo.models.narrow._FREE_PARAMS", 0)
    with torch.device("meta"):
        narrow("resnet10t", widths=RESNET10T)
        monkeypatch.setattr("chanzoo.models.narrow._MAX_CUT", 1)
        with pytest.raises(UsageError, match=r"and is narrowed to [\d,]+: expected a cut of at most 1 times"):
            narrow("resnet10t", widths=RESNET10T)
