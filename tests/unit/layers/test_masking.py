"""Zeros that an optimiser cannot move for good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from chanzoo.errors import UsageError
from chanzoo.layers.masking import hold_masks


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))


def test_zeros_survive_momentum_and_decay() -> None:
    model = net()
    masks = {"0.weight": torch.tensor([True, False, True, False]), "1.bias": torch.tensor([False] * 4)}
    before = model.get_parameter("0.weight")[0].clone()
    handle = hold_masks(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    assert model.get_parameter("0.weight")[1].abs().sum() > 0  # the step moved it
    model.eval()(torch.randn(1, 3, 8, 8))
    weight = model.get_parameter("0.weight")
    assert weight[1].abs().sum() == weight[3].abs().sum() == model.get_parameter("1.bias").abs().sum() == 0
    assert not torch.equal(weight[0], before)
    handle.remove()
    with torch.no_grad():
        weight += 1
    model(torch.randn(1, 3, 8, 8))
    assert weight[1].abs().sum() > 0


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"0.wait": torch.ones(4, dtype=torch.bool)}, '"0.wait", which is no parameter'),
        ({"0.weight": torch.ones(3, dtype=torch.bool)}, r"found     torch.bool \[3\]"),
        ({"0.weight": torch.ones(4)}, r"found     torch.float32 \[4\]"),
    ],
)
def test_masks_that_do_not_fit_change_nothing(masks: dict[str, torch.Tensor], message: str) -> None:
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=message):
        hold_masks(model, {"1.bias": torch.zeros(4, dtype=torch.bool), **masks})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model._forward_pre_hooks


def test_masks_of_a_named_network_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    save_file({"conv1.weight": torch.tensor([True] * 15 + [False])}, path)
    model = timm.create_model("hrank_cifar_resnet56", masks=path)
    assert model.get_parameter("conv1.weight")[15].abs().sum() == 0
    save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    assert "masks" not in (tmp_path / "saved" / "config.json").read_text()
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    assert again.get_parameter("conv1.weight")[15].abs().sum() == 0 and not again._forward_pre_hooks
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["model_args"] = {"masks": str(path)}
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="a saved network has its zeros"):
        timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    with pytest.raises(UsageError, match="cannot read the masks"):
        timm.create_model("hrank_cifar_resnet56", masks=tmp_path / "nothing")
