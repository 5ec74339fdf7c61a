"""Channel Equilibrium as a layer: modes, precision, formats, edges."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

from chanzoo.layers import BatchDecorrelation, ChannelEquilibrium, EquilibriumAct, MergedEquilibrium
from chanzoo.layers.decorrelation import sample_statistics


@pytest.fixture
def layer() -> ChannelEquilibrium:
    """A layer that has seen some data."""
    torch.manual_seed(0)
    layer = ChannelEquilibrium(24, group_size=16)
    with torch.no_grad():
        layer.mix.fill_(0.3)
        for _ in range(3):
            layer(images() * 1.5 + 0.2)
    return layer


def images(b: int = 3, c: int = 24, h: int = 6, w: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(b, c, h, w, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, relative: float = 1e-5) -> None:
    error = ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
    assert error <= relative, error


def test_branches_add_up(layer: ChannelEquilibrium) -> None:
    layer.eval()
    x = images()
    mix = layer.mix.sigmoid()
    close(layer(x), mix * layer.decorrelation(x) + (1 - mix) * layer.reweight(x))


def test_branches_add_up_in_training(layer: ChannelEquilibrium) -> None:
    x = images()
    apart = copy.deepcopy(layer)
    mix = layer.mix.sigmoid()
    close(layer(x), mix * apart.decorrelation(x) + (1 - mix) * apart.reweight(x))
    close(layer.decorrelation.running_wm, apart.decorrelation.running_wm)
    close(layer.reweight.running_scale, apart.reweight.running_scale)


def test_evaluation_of_a_sample_does_not_depend_on_its_companions(layer: ChannelEquilibrium) -> None:
    layer.eval()
    x = images(b=4)
    together = layer(x)
    for i in range(4):
        close(layer(x[i : i + 1]), together[i : i + 1], 1e-6)


def test_evaluation_leaves_buffers_alone(layer: ChannelEquilibrium) -> None:
    before = copy.deepcopy(layer.state_dict())
    layer.eval()(images())
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_training_and_evaluation_agree_when_momentum_is_one() -> None:
    layer = ChannelEquilibrium(16, momentum=1.0)
    x = images(c=16)
    trained = layer.train()(x)
    close(layer.eval()(x), trained)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_input_is_finite(training: bool, value: float) -> None:
    layer = ChannelEquilibrium(16).train(training)
    x = torch.full((2, 16, 4, 4), value, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert all(b.isfinite().all() for b in layer.buffers())


def test_single_pixel_maps() -> None:
    layer = ChannelEquilibrium(16)
    x = images(c=16, h=1, w=1)
    with pytest.raises(ValueError, match=r"1×1 pixels \(input \[3, 16, 1, 1\]\).*evaluation works"):
        layer(x)
    assert layer.eval()(x).isfinite().all()
    assert layer.fuse()(x).isfinite().all()


def test_batch_of_one() -> None:
    layer = ChannelEquilibrium(16)
    assert layer(images(b=1, c=16)).isfinite().all()


@pytest.mark.parametrize(("channels", "hidden"), [(1, 1), (3, 1), (17, 4), (64, 16)])
def test_odd_widths(channels: int, hidden: int) -> None:
    layer = ChannelEquilibrium(channels)
    assert layer.reweight.fc1.weight.shape == (hidden, channels)
    assert layer(images(c=channels)).shape == (3, channels, 6, 5)


def test_buffers_are_real_memory() -> None:
    layer = ChannelEquilibrium(64)
    layer.decorrelation.running_wm[0].zero_()
    assert torch.equal(layer.decorrelation.running_wm[1], torch.eye(16))


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_module(layer: ChannelEquilibrium, dtype: torch.dtype) -> None:
    x = images()
    expected = copy.deepcopy(layer).eval()(x)
    half = copy.deepcopy(layer).to(dtype)
    out = half.eval()(x.to(dtype))
    assert out.dtype == dtype
    close(out, expected, 2e-2 if dtype == torch.bfloat16 else 3e-3)
    assert half.train()(x.to(dtype)).dtype == dtype
    assert {b.dtype for b in half.buffers()} == {dtype}


def test_double_precision_module(layer: ChannelEquilibrium) -> None:
    double = copy.deepcopy(layer).double()
    assert double(images().double()).dtype == torch.float64


def test_bf16_autocast_step(layer: ChannelEquilibrium) -> None:
    exact = copy.deepcopy(layer)
    conv = nn.Conv2d(24, 24, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        x = conv(images(b=8, h=14, w=14))
        y = layer(x)
    assert x.dtype == y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert conv.weight.grad is not None and conv.weight.grad.isfinite().all()
    assert {b.dtype for b in layer.buffers()} == {torch.float32}
    exact(x.float())
    close(layer.decorrelation.running_wm, exact.decorrelation.running_wm, 1e-3)
    close(layer.reweight.running_scale, exact.reweight.running_scale, 1e-3)


def test_large_activations_in_fp16_do_not_overflow() -> None:
    layer = ChannelEquilibrium(16).half()
    x = (images(c=16) * 1000).half()  # whose variance is beyond fp16
    assert layer(x).isfinite().all()


# Gradients


@pytest.mark.parametrize("training", [False, True])
def test_gradcheck(training: bool) -> None:
    torch.manual_seed(0)
    layer = ChannelEquilibrium(8, group_size=4, momentum=0.0).double().train(training)
    x = images(b=2, c=8, h=3, w=3).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


def test_sample_statistics_match_torch() -> None:
    x = images(h=7, w=9).reshape(3, 24, 63).double().requires_grad_()
    mean, moment = sample_statistics(x)
    for i in range(3):
        close(moment[i] / 62, torch.cov(x[i]), 1e-12)
    close(mean, x.mean(2), 1e-12)
    assert torch.autograd.gradcheck(sample_statistics, (x[:, :3, :5].detach().requires_grad_(),))


# Formats and compilers


@pytest.mark.parametrize("training", [False, True])
def test_channels_last(layer: ChannelEquilibrium, training: bool) -> None:
    layer.train(training)
    other = copy.deepcopy(layer)
    x = images()
    close(other(x.contiguous(memory_format=torch.channels_last)), layer(x))


def test_non_contiguous(layer: ChannelEquilibrium) -> None:
    layer.eval()
    x = images(h=12)[:, :, ::2]
    close(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("fused", [False, True])
def test_torchscript(layer: ChannelEquilibrium, fused: bool) -> None:
    module = layer.eval().fuse() if fused else layer.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch announces the end of TorchScript
        scripted = torch.jit.script(EquilibriumAct(module, nn.ReLU()))
    close(scripted(images()), module(images()).relu())


def test_torchscript_training(layer: ChannelEquilibrium) -> None:
    other = copy.deepcopy(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        scripted = torch.jit.script(other)
    close(scripted(images()), layer(images()))
    close(other.decorrelation.running_wm, layer.decorrelation.running_wm)


@pytest.mark.parametrize("training", [False, True])
def test_compile_without_graph_breaks(layer: ChannelEquilibrium, training: bool) -> None:
    layer.train(training)
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x, y = images().requires_grad_(), images().requires_grad_()
    a, b = compiled(x), layer(y)
    close(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    assert x.grad is not None and y.grad is not None
    close(x.grad, y.grad, 1e-4)
    close(other.decorrelation.running_wm, layer.decorrelation.running_wm)


def test_copies(layer: ChannelEquilibrium) -> None:
    layer.eval()
    expected = layer(images())
    stream = io.BytesIO(pickle.dumps(layer))
    for other in (copy.deepcopy(layer), pickle.load(stream)):
        assert torch.equal(other(images()), expected)


# Folding


def test_fuse(layer: ChannelEquilibrium) -> None:
    layer.eval()
    merged = layer.fuse()
    assert isinstance(merged, MergedEquilibrium)
    close(merged(images()), layer(images()), 1e-6)
    assert set(dict(merged.named_buffers())) >= {"operator", "scale"}


def test_merged_layer_does_not_train(layer: ChannelEquilibrium) -> None:
    merged = layer.fuse()
    assert merged.training
    with pytest.raises(RuntimeError, match="merged for inference"):
        merged(images())


def test_merged_layer_under_autocast(layer: ChannelEquilibrium) -> None:
    merged = layer.eval().fuse()
    x = images().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = merged(x)
    assert y.dtype == torch.bfloat16
    close(y, merged(x.float()), 2e-2)


# Construction


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"channels": 0}, "channels=0"),
        ({"channels": 8, "group_size": 0}, "group_size=0"),
        ({"channels": 8, "newton_steps": 0}, "newton_steps=0"),
    ],
)
def test_refuses(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ChannelEquilibrium(**arguments)


def test_unknown_argument() -> None:
    with pytest.raises(TypeError):
        ChannelEquilibrium(8, groups=2)  # pyright: ignore[reportCallIssue]


def test_device_and_dtype() -> None:
    layer = ChannelEquilibrium(8, device="meta", dtype=torch.float16)
    tensors = [*layer.parameters(), *layer.buffers()]
    assert {(t.device.type, t.dtype) for t in tensors} == {("meta", torch.float16)}
    assert layer.eval()(torch.empty(1, 8, 4, 4, device="meta", dtype=torch.float16)).device.type == "meta"


def test_repr() -> None:
    assert "groups=4, group_size=16" in repr(BatchDecorrelation(64))
