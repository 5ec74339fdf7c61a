"""Networks with Channel Equilibrium: construction, placement, edges, compilers, folding."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from timm.models import group_parameters
from timm.utils import reparameterize_model
from torch import Tensor, nn

import chanzoo
from chanzoo.layers import ChannelEquilibrium, EquilibriumAct

PARAMS = {
    "ce_resnet18": 11_778_063,
    "ce_resnet34": 22_036_406,
    "ce_resnet50": 29_331_926,
    "ce_resnet101": 57_245_671,
    "ce_resnet152": 80_237_048,
    "ce_mobilenetv2": 5_764_585,
    "ce_mobilenetv2_050": 2_538_569,
    "ce_mobilenetv2_140": 10_552_465,
}
LAYERS = {"ce_resnet18": 7, "ce_resnet34": 14, "ce_resnet50": 14, "ce_resnet101": 31, "ce_resnet152": 48}
# A network of every family, small enough for every change, and the image it sees here.
SMALL: dict[str, tuple[int, dict[str, Any]]] = {
    "ce_cifar_resnet20": (32, {"depth": 8, "shortcut": "B", "widths": [8, 8, 20, 24, 8, 16, 8]}),
    "ce_resnet18": (33, {"num_classes": 10}),
    "ce_mobilenetv2_050": (64, {"num_classes": 10}),
}
BIG = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("ce_resnet50", "ce_mobilenetv2", "ce_cifar_resnet56")
]
ONE = "ce_cifar_resnet20"
REST = [ONE, *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL if name != ONE)]


def image(size: int, b: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(b, 3, size, size, generator=torch.Generator().manual_seed(seed))


def make(name: str, **kwargs: Any) -> nn.Module:
    """A network with running statistics of some data, in evaluation mode."""
    size, small = SMALL.get(name, (64, {}))
    torch.manual_seed(0)
    model = timm.create_model(name, **{**small, **kwargs})
    with torch.no_grad():
        for i in range(2):
            model(1.3 * image(size, b=4, seed=i) + 0.1)
    return model.eval()


def close(a: Tensor, b: Tensor, relative: float = 1e-4) -> None:
    error = ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
    assert error <= relative, error


def norms(model: nn.Module) -> list[str]:
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]


# Construction


@pytest.mark.parametrize("name", PARAMS)
def test_parameters(name: str) -> None:
    model = timm.create_model(name, device="meta")
    assert chanzoo.count_params(model) == PARAMS[name]
    layers = [module for module in model.modules() if isinstance(module, ChannelEquilibrium)]
    assert len(layers) == LAYERS.get(name, 17)


def test_group_sizes() -> None:
    model: Any = timm.create_model("ce_resnet50", device="meta")
    assert model.act1.ce.decorrelation.group_size == 64
    assert {block.se.decorrelation.group_size for block in model.layer2} == {16}
    assert all(block.se is None for block in model.layer4)


@pytest.mark.parametrize(
    ("name", "twin", "kwargs"),
    [
        ("ce_resnet18", "resnet18", {"zero_init_last": False}),
        ("ce_mobilenetv2_050", "mobilenetv2_050", {}),
        ("ce_cifar_resnet20", "cifar_resnet20", {}),
    ],
)
def test_same_start_as_the_plain_twin(name: str, twin: str, kwargs: dict) -> None:
    torch.manual_seed(3)
    ours = timm.create_model(name, num_classes=10).state_dict()
    our_random = torch.get_rng_state()
    torch.manual_seed(3)
    theirs = timm.create_model(twin, num_classes=10, **kwargs).state_dict()
    assert torch.equal(torch.get_rng_state(), our_random)
    assert theirs.keys() <= ours.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("name", SMALL)
def test_unknown_arguments(name: str) -> None:
    with pytest.raises(TypeError, match="wdth"):
        timm.create_model(name, wdth=2, device="meta")


def test_unknown_depth() -> None:
    with pytest.raises(ValueError, match="depth=20: expected one of 18, 34, 50, 101, 152"):
        timm.create_model("ce_resnet18", depth=20)


@pytest.mark.parametrize("name", SMALL)
def test_device_dtype_and_sync_reach_every_layer(name: str) -> None:
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16, sync=True)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    layers = [module for module in model.modules() if isinstance(module, ChannelEquilibrium)]
    assert layers and all(layer.reweight.sync and layer.decorrelation.sync for layer in layers)


@pytest.mark.parametrize("name", SMALL)
def test_names_and_types_of_the_backbone_are_timms(name: str) -> None:
    model = timm.create_model(name, device="meta")
    plain = timm.create_model(name.removeprefix("ce_"), device="meta")
    modules = dict(model.named_modules())
    for path, module in plain.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert type(modules[path]) is type(module)


@pytest.mark.parametrize("name", REST)
def test_equilibrium_survives_timms_norm_conversions(name: str) -> None:
    for convert in (convert_sync_batchnorm, freeze_batch_norm_2d):
        model = timm.create_model(name, **SMALL[name][1])
        keys = {key for key in model.state_dict() if ".ce." in key or ".se." in key}
        assert keys and keys <= set(convert(model).state_dict())


@pytest.mark.parametrize("name", SMALL)
def test_stem_group_holds_the_stem(name: str) -> None:
    model = timm.create_model(name, device="meta")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    stem = {
        key
        for key, group in groups.items()
        if group == groups[model.pretrained_cfg["first_conv"] + ".weight"]
    }
    assert {key for key in groups if key.startswith("act1.")} <= stem
    assert len(set(groups.values())) > 3


# Numbers


@pytest.mark.parametrize("name", [*REST, *BIG])
@pytest.mark.parametrize("size", [33, 96])
def test_a_fresh_network_is_finite(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL.get(name, (0, {}))[1])
    assert model.eval()(image(size)).isfinite().all()
    model.train()(image(size)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.eval()(image(size)).isfinite().all()


@pytest.mark.parametrize("name", REST)
def test_constant_images_are_finite(name: str) -> None:
    size, kwargs = SMALL[name]
    model = timm.create_model(name, **kwargs)
    for training in (True, False):
        out = model.train(training)(torch.full((2, 3, size, size), 0.5))
        assert out.isfinite().all()


@pytest.mark.parametrize("name", REST)
def test_samples_are_independent_in_evaluation(name: str) -> None:
    model = make(name)
    x = image(SMALL[name][0], b=3)
    with torch.no_grad():
        close(torch.cat([model(sample[None]) for sample in x]), model(x), 1e-5)


def test_maps_of_one_pixel() -> None:
    model = make("ce_cifar_resnet20")
    tiny = image(2)
    assert model(tiny).isfinite().all()
    with pytest.raises(ValueError, match="maps of 1×1 pixels"):
        model.train()(tiny)


def test_features_hold_the_stem_after_equilibrium() -> None:
    model = make("ce_resnet18")
    x = image(33)
    kept = []
    model.act1.register_forward_hook(lambda module, args, output: kept.append(output.clone()))
    with torch.no_grad():
        features = model.forward_intermediates(x, intermediates_only=True)
        wrapped = timm.create_model("ce_resnet18", features_only=True)
        wrapped.load_state_dict(model.state_dict(), strict=False)
        first = wrapped.eval()(x)[0]
    assert isinstance(model.act1, EquilibriumAct)
    assert torch.equal(features[0], kept[0])
    assert torch.equal(first, kept[0])


@pytest.mark.parametrize("name", REST)
def test_bf16_autocast_training_step(name: str) -> None:
    model = make(name).train()
    buffers = {key: b.dtype for key, b in model.named_buffers()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(image(SMALL[name][0])).float().square().mean()
    loss.backward()
    assert loss.isfinite()
    assert {key: b.dtype for key, b in model.named_buffers()} == buffers
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", REST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = make(name)
    x = image(SMALL[name][0])
    with torch.no_grad():
        expected = model(x)
        out = model.to(dtype)(x.to(dtype))
        folded = reparameterize_model(model)(x.to(dtype))
    assert out.dtype == folded.dtype == dtype
    close(out, expected, 0.1 if dtype == torch.bfloat16 else 0.02)
    close(folded, expected, 0.1 if dtype == torch.bfloat16 else 0.02)


# Copies and compilers


@pytest.mark.parametrize("name", REST)
def test_copies(name: str) -> None:
    model = make(name)
    x = image(SMALL[name][0])
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected)
            assert not norms(reparameterize_model(other))


@pytest.mark.parametrize("name", REST)
def test_channels_last(name: str) -> None:
    model = make(name)
    x = image(SMALL[name][0])
    with torch.no_grad():
        expected = model(x)
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        close(last(x.contiguous(memory_format=torch.channels_last)), expected)
        close(reparameterize_model(last)(x.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("name", REST)
@pytest.mark.parametrize("training", [False, True])
def test_compile_without_graph_breaks(name: str, training: bool) -> None:
    model = make(name).train(training)
    x = image(SMALL[name][0])
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    close(compiled(x), model(x))


@pytest.mark.parametrize("name", REST)
@pytest.mark.parametrize("folded", [False, True])
def test_torchscript(name: str, folded: bool) -> None:
    model = make(name)
    x = image(SMALL[name][0])
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch announces the end of TorchScript
        scripted = torch.jit.script(reparameterize_model(model) if folded else model)
    close(scripted(x), expected)


@pytest.mark.parametrize("name", REST)
def test_export_and_onnx_of_the_folded_network(name: str, tmp_path: Any) -> None:
    model = make(name)
    x = image(SMALL[name][0])
    with torch.no_grad():
        expected = model(x)
        folded = reparameterize_model(model)
        program = torch.export.export(folded, (x,))
        close(program.module()(x), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter and onnx warn of each other's versions
            torch.onnx.export(folded, (x,), str(tmp_path / "net.onnx"), dynamo=True, verbose=False)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    out = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    close(torch.from_numpy(out), expected)


# Folding


@pytest.mark.parametrize("name", [*SMALL, *BIG])
def test_folding(name: str) -> None:
    model = make(name)
    x = image(SMALL.get(name, (64, {}))[0])
    with torch.no_grad():
        expected = model(x)
        folded = reparameterize_model(model)
        out = folded(x)
        close(out, expected)
        assert not norms(folded)
        assert not [m for m in folded.modules() if isinstance(m, ChannelEquilibrium)]
        assert norms(model) and torch.equal(model(x), expected)
        assert torch.equal(reparameterize_model(folded)(x), out)
        assert reparameterize_model(model, inplace=True) is model
        assert torch.equal(model(x), out)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_folding_of_plain_cifar_networks(shortcut: str) -> None:
    model = make("cifar_resnet20", shortcut=shortcut)
    x = image(32)
    with torch.no_grad():
        folded = reparameterize_model(model)
        close(folded(x), model(x))
    assert not norms(folded)


@pytest.mark.parametrize("name", [*SMALL, "cifar_resnet20"])
def test_folding_of_features(name: str) -> None:
    torch.manual_seed(0)
    kwargs = {key: value for key, value in SMALL.get(name, (32, {}))[1].items() if key != "num_classes"}
    model = timm.create_model(name, features_only=True, **kwargs)
    x = image(64)
    with torch.no_grad():
        model(x)
        model.eval()
        folded = reparameterize_model(model)
        for ours, expected in zip(folded(x), model(x), strict=True):
            close(ours, expected)
    assert not norms(folded)


def test_a_folded_network_does_not_train() -> None:
    folded = reparameterize_model(make("ce_cifar_resnet20")).train()
    with pytest.raises(RuntimeError, match="merged for inference"):
        folded(image(32))


def test_folding_keeps_what_timm_converted() -> None:
    model = make("ce_cifar_resnet20")
    x = image(32)
    expected = model(x)
    frozen = freeze_batch_norm_2d(model)
    close(reparameterize_model(frozen)(x), expected)
