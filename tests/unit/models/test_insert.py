"""Channel Equilibrium in networks that know nothing of it."""

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from timm.utils import reparameterize_model
from torch import nn

from chanzoo.errors import UsageError
from chanzoo.layers import ChannelEquilibrium
from chanzoo.models import add_channel_equilibrium


def layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ChannelEquilibrium)]


FAMILIES = {
    # name, pattern, layers expected, size of the image
    "regnetx_002": ("s*.conv2.bn", 13, 64),
    "dla46_c": ("level[34].*.bn2", 8, 64),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_backward_and_folding(name: str) -> None:
    pattern, count, size = FAMILIES[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    changed = add_channel_equilibrium(model, pattern)
    assert len(changed) == len(layers(model)) == count
    x = torch.randn(4, 3, size, size)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    folded = reparameterize_model(model)
    assert not layers(folded)
    with torch.no_grad():
        expected = model(x)
        assert (folded(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_features_only(name: str) -> None:
    pattern, count, size = FAMILIES[name]
    model = timm.create_model(name, features_only=True)
    assert len(add_channel_equilibrium(model, pattern)) == count
    features = model.eval()(torch.randn(2, 3, size, size))
    assert [f.shape[1] for f in features] == model.feature_info.channels()


def test_names_of_norm_act_layers_stay() -> None:
    model = timm.create_model("regnetx_002")
    before = set(model.state_dict())
    changed = add_channel_equilibrium(model, "stem.bn")
    added = set(model.state_dict()) - before
    assert changed == ["stem.bn"]
    assert before <= set(model.state_dict())
    assert added and all(key.startswith("stem.bn.act.ce.") for key in added)


def test_names_of_plain_norms_move_down_one() -> None:
    model = timm.create_model("resnet18")
    add_channel_equilibrium(model, "bn1")
    assert {"bn1.0.weight", "bn1.1.mix"} <= set(model.state_dict())
    assert "bn1.weight" not in model.state_dict()
    again = timm.create_model("resnet18")
    add_channel_equilibrium(again, "bn1")
    again.load_state_dict(model.state_dict())


def test_exclude_and_several_patterns() -> None:
    model = timm.create_model("resnet18")
    changed = add_channel_equilibrium(model, ["bn1", "layer1.*.bn?"], exclude="*.bn1")
    assert changed == ["bn1", "layer1.0.bn2", "layer1.1.bn2"]


def test_type_device_mode_and_random_state_are_kept() -> None:
    model = timm.create_model("resnet18", dtype=torch.bfloat16).eval()
    state = torch.get_rng_state()
    add_channel_equilibrium(model, "layer1.0.bn2", group_size=8, reduction=8)
    assert torch.equal(torch.get_rng_state(), state)
    layer = model.layer1[0].bn2[1]
    assert layer.mix.dtype == torch.bfloat16 and not layer.training and not model.layer1[0].bn2.training
    assert layer.decorrelation.group_size == 8 and layer.reweight.fc1.out_features == 8
    meta = timm.create_model("resnet18", device="meta")
    add_channel_equilibrium(meta, "*")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "norm",
    [nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.GroupNorm(2, 8, affine=False), LayerNorm2d(8)],
    ids=str,
)
def test_every_norm_of_maps(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
    assert add_channel_equilibrium(model, "1") == ["1"]
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 8, 6, 6)


def refuses(model: nn.Module, words: str, pattern: str | list[str], **kwargs: str) -> None:
    before = repr(model)
    with pytest.raises(UsageError, match=words) as caught:
        add_channel_equilibrium(model, pattern, **kwargs)
    assert "network is unchanged" in str(caught.value)
    assert repr(model) == before


def test_refuses_a_pattern_without_norm() -> None:
    model = timm.create_model("resnet18", device="meta")
    words = r'no norm layer is called "conv1" in ResNet.\n  there are  bn1, layer1.0.bn1, '
    refuses(model, words, ["bn1", "conv1"])
    refuses(nn.Sequential(nn.ReLU()), "there are  none", "*")


def test_refuses_when_all_is_excluded() -> None:
    model = timm.create_model("resnet18", device="meta")
    refuses(model, "every matched norm layer is excluded", "bn1", exclude="b*")


def test_refuses_norms_of_tokens() -> None:
    model = timm.create_model("vit_tiny_patch16_224", device="meta")
    refuses(model, r'norm layer "blocks.0.norm1" \(LayerNorm\) is no norm of the channels', "blocks.0.*")


@pytest.mark.parametrize(("name", "pattern"), [("resnet18", "layer1.*"), ("regnetx_002", "s1.*")])
def test_refuses_a_second_layer(name: str, pattern: str) -> None:
    model = timm.create_model(name, device="meta")
    add_channel_equilibrium(model, pattern)
    refuses(model, "has a Channel Equilibrium layer already", pattern)


def test_refuses_what_our_networks_have() -> None:
    model = timm.create_model("ce_mobilenetv2_050", device="meta")
    refuses(model, 'norm layer "blocks.0.0.bn1" has', "blocks.*")
    assert len(add_channel_equilibrium(model, "bn1")) == 1
