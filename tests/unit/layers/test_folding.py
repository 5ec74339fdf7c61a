"""Batch norms folded into convolutions."""

import copy
import pickle

import pytest
import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from timm.utils import reparameterize_model
from torch import Tensor, nn

from chanzoo.layers.folding import fold, fold_pairs, link_pair


def batch_norm(channels: int, cls: type[nn.BatchNorm2d] = nn.BatchNorm2d, **kwargs: bool) -> nn.BatchNorm2d:
    norm = cls(channels, **kwargs).eval()
    with torch.no_grad():
        for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_()
    return norm


class Net(nn.Module):
    """A convolution and a norm as direct children of a network."""

    def __init__(self, cls: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = batch_norm(8, cls)
        link_pair(self.conv, self.norm)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_fold(bias: bool, affine: bool, groups: int) -> None:
    conv = nn.Conv2d(3, 6, 3, groups=groups, bias=bias)
    norm = batch_norm(6, affine=affine)
    expected = norm(conv(X))
    rest = fold(conv, norm)
    assert isinstance(rest, nn.Identity)
    torch.testing.assert_close(conv(X), expected)
    assert isinstance(conv.bias, nn.Parameter)


def test_fold_keeps_the_activation_and_the_type() -> None:
    conv, norm = nn.Conv2d(3, 6, 3).double(), batch_norm(6, BatchNormAct2d).double()
    expected = norm(conv(X.double()))
    rest = fold(conv, norm)
    assert isinstance(rest, nn.ReLU)
    torch.testing.assert_close(rest(conv(X.double())), expected)
    assert conv.weight.dtype == torch.float64


@pytest.mark.parametrize(
    "norm",
    [nn.GroupNorm(2, 6), batch_norm(6, track_running_stats=False), batch_norm(4)],
    ids=["group", "batch", "other"],
)
def test_fold_refuses(norm: nn.Module) -> None:
    conv = nn.Conv2d(3, 6, 3)
    before = copy.deepcopy(conv.state_dict())
    with pytest.raises(ValueError, match="cannot fold"):
        fold(conv, norm)
    assert all(torch.equal(before[key], value) for key, value in conv.state_dict().items())


def test_fold_pairs_skips_what_is_between() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), batch_norm(6), nn.Conv2d(6, 6, 1), batch_norm(6)
    ).eval()
    expected = net(X)
    fold_pairs(net)
    assert isinstance(net[2], nn.BatchNorm2d) and isinstance(net[4], nn.Identity)
    torch.testing.assert_close(net(X), expected)


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), lambda net: net]
)
def test_linked_pair(cls: type[nn.BatchNorm2d], make) -> None:
    net = make(Net(cls))
    assert type(net.norm) is cls and type(net.conv) is nn.Conv2d
    expected = net(X)
    folded = reparameterize_model(net)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(X), expected)
    assert torch.equal(net(X), expected) and type(net.norm) is cls
    assert torch.equal(reparameterize_model(folded)(X), folded(X))


def test_linked_pair_in_place() -> None:
    net = Net()
    expected = net(X)
    assert reparameterize_model(net, inplace=True) is net
    assert isinstance(net.norm, nn.Identity)
    torch.testing.assert_close(net(X), expected)


def test_a_replaced_convolution_is_not_folded_into() -> None:
    net = Net()
    net.conv = nn.Conv2d(3, 8, 3)
    expected = net(X)
    folded = reparameterize_model(net)
    assert isinstance(folded.norm, nn.BatchNorm2d)
    assert torch.equal(folded(X), expected)


def test_a_replaced_norm_is_not_folded() -> None:
    net = Net()
    net.norm = batch_norm(8)
    expected = net(X)
    assert torch.equal(reparameterize_model(net)(X), expected)
    assert torch.equal(
        reparameterize_model(convert_sync_batchnorm(Net()))(X[:0]), X[:0].new_zeros(0, 8, 4, 4)
    )


def test_a_moved_network_folds() -> None:
    net = Net().double()
    expected = net(X.double())
    torch.testing.assert_close(reparameterize_model(net)(X.double()), expected)


def test_link_pair_ignores_other_norms() -> None:
    norm = nn.GroupNorm(2, 8)
    link_pair(nn.Conv2d(3, 8, 1), norm)
    assert not hasattr(norm, "fuse")
