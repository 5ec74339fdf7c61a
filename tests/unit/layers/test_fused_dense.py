"""The fused dense stage: the same outputs in every configuration, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn

from chanzoo.errors import UsageError
from chanzoo.layers import condense, fused_dense
from chanzoo.layers.condensing import learned_layers
from chanzoo.layers.fused_dense import FusedStage
from chanzoo.models.condensenet import CondenseNet, DenseStage

SIZES: dict[str, Any] = {"depths": (2, 3), "growth": (8, 24), "head_width": 24, "num_classes": 7}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "relu": {"hard_swish_from": 5, "se_from": 5},
    "hard_swish": {"hard_swish_from": 0, "se_from": 0},
    "both": {"hard_swish_from": 1, "se_from": 1},
    "first_version": {"reactivation_groups": 0, "hard_swish_from": 5},
    "more_groups": {"groups": 8, "condensation_factor": 2, "reactivation_factor": 4},
    "fewer_groups": {"groups": 2, "condensation_factor": 8, "groups_3x3": 4, "reactivation_groups": 4},
    "small_images": {"stem_stride": 1, "head_reduction": 0, "head_width": 0},
    "wide_groups": {"groups_3x3": 1, "hard_swish_from": 1, "se_from": 0},
    "three_stages": {"depths": (1, 1, 4), "growth": (8, 8, 16)},
}


def trained(negative: bool = True, **options: Any) -> nn.Module:
    """A condensed network with norms such as training leaves them, some scales negative or zero."""
    torch.manual_seed(0)
    model = CondenseNet(**{**SIZES, **options})
    for layer in learned_layers(model).values():
        layer.condense_to(layer.condensation_factor - 1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -0.5 if negative else 0.2, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if negative:
                with torch.no_grad():
                    module.weight[::7] = 0
    return condense(model.eval())


def fused(model: nn.Module) -> nn.Module:
    network = reparameterize_model(model)
    stages = [module for name, module in network.named_children() if name.startswith("stage")]
    assert any(isinstance(stage, FusedStage) for stage in stages)
    return network


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_outputs_are_those_of_the_portable_form(options: dict[str, Any], negative: bool, batch: int) -> None:
    portable = trained(negative, **options).double()
    fast = fused(portable)
    x = torch.randn(batch, 3, 38, 52, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), portable(x), rtol=1e-10, atol=1e-12)
        levels = zip(fast.forward_intermediates(x)[1], portable.forward_intermediates(x)[1], strict=True)
        for one, other in levels:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["condensenetv2_a", "condensenetv2_cifar110", "condensenet_cifar50"])
def test_named_networks_in_single_precision(name: str) -> None:
    torch.manual_seed(0)
    portable = timm.create_model(name, condensed=True).eval()
    fast = fused(portable)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = portable(x)
        assert (fast(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("pixels", [1, 300, 10**6])
@pytest.mark.parametrize("options", [CONFIGURATIONS[key] for key in ("both", "wide_groups")])
def test_images_are_independent_of_how_many_run_at_once(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], pixels: int
) -> None:
    monkeypatch.setattr(fused_dense, "_PIXELS", pixels)  # 300: one at a time, then two and the fifth alone
    portable = trained(**options).double()
    fast = fused(portable)
    x = torch.randn(5, 3, 43, 34, dtype=torch.float64)
    with torch.inference_mode():
        expected = portable(x)
        torch.testing.assert_close(fast(x), expected, rtol=1e-10, atol=1e-12)
        fast, x = fast.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(fast(x), expected, rtol=1e-10, atol=1e-12)
        assert fast(x[:0]).shape == (0, 7)


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_program_records_the_same(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    portable = trained(**options).double()
    fast = fused(portable)
    x = torch.randn(2, 3, 38, 52, dtype=torch.float64)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(fast(x), portable(x), rtol=1e-10, atol=1e-12)
    with pytest.raises(UsageError, match="a fused stage is for inference"):
        fast.train()(x)


def test_a_stage_is_exported_for_any_number_of_images() -> None:
    stage = fused(trained()).stage2
    x = torch.randn(5, 32, 8, 8)
    with torch.no_grad():
        free = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.export.export(stage, (x[:2],), dynamic_shapes=free).module()
        for images in (x, x[:1]):
            torch.testing.assert_close(program(images), stage(images), rtol=1e-4, atol=1e-4)


def test_mixed_precision_leaves_a_stage_its_own() -> None:
    portable = trained(negative=False)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        features = fused(portable).forward_intermediates(x, intermediates_only=True)
        torch.testing.assert_close(features[0], portable.stage1(portable.stem(x).float()), rtol=0.1, atol=0.2)
    assert all(level.dtype == torch.float32 for level in features[:1])


def test_maps_that_cannot_be_halved() -> None:
    with torch.no_grad(), pytest.raises(UsageError, match="maps of 1×1 are too small"):
        fused(trained())(torch.randn(1, 3, 2, 2))


def test_it_moves_and_copies_like_any_network() -> None:
    portable = trained()
    fast = copy.deepcopy(fused(portable))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        low = fast.to(torch.bfloat16)(x.bfloat16())
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), portable(x), rtol=0.1, atol=0.1)
        assert fast.to("meta")(x.bfloat16().to("meta")).shape == (1, 7)
    assert all(not isinstance(m, FusedStage) for m in portable.modules())


def test_features_are_not_overwritten_by_a_later_run() -> None:
    fast = fused(trained())
    with torch.no_grad():
        first = fast.forward_features(torch.randn(1, 3, 32, 32))
        kept = first.clone()
        fast(torch.randn(1, 3, 32, 32))
    assert torch.equal(first, kept)


def test_training_is_refused() -> None:
    fast = fused(trained())
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises(UsageError, match="a fused stage is for inference"):
        fast.train()(x)
    with pytest.raises(UsageError, match="a fused stage is for inference"):
        fast.eval()(x)  # the stem has a gradient
    with torch.no_grad():
        fast(x)


@pytest.mark.parametrize("options", [{}, {"condensed": True, "norm_layer": "groupnorm1"}])
def test_what_cannot_be_folded_stays(options: dict[str, Any]) -> None:
    model = CondenseNet(**SIZES, **options).eval()
    same = reparameterize_model(model)
    assert not any(isinstance(module, FusedStage) for module in same.modules())
    with torch.no_grad():
        x = torch.randn(1, 3, 32, 32)
        assert torch.equal(same(x), model(x))


def test_layers_that_differ_stay() -> None:
    first, second = trained().stage1, trained(hard_swish_from=0).stage1
    assert isinstance(first.fuse(), FusedStage)
    mixed = DenseStage(first[0], second[1])
    assert mixed.fuse() is mixed and DenseStage().fuse() is not None
    odd = copy.deepcopy(first)
    odd[1].conv2.stride = (2, 2)
    assert odd.fuse() is odd


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's exporter, about itself
@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
def test_condensed_networks_are_exported(tmp_path: Path, kind: str) -> None:
    from chanzoo.cli.main import main

    folder = tmp_path / "net"
    model = timm.create_model("condensenetv2_cifar110", condensed=True, depths=(2, 2, 2)).eval()
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    file = tmp_path / ("net.onnx" if kind == "onnx" else "net.pt2")
    assert main(["export", str(folder), "--format", kind, "-o", str(file)]) == 0  # compares the outputs
    assert file.stat().st_size > 100_000
