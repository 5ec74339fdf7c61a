"""Accuracy against a loop that shares nothing with it, and sharing without duplicates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from chanzoo.errors import UsageError
from chanzoo.measure.accuracy import Accuracy, evaluate
from chanzoo.measure.images import Picked, open_images

# timm's reader leaves the closing of files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 images of 32×32 in ten classes; 20 of them would be too many to check by hand."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for index in range(13):
        path = root / "val" / f"{index % 10:02d}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture
def model() -> nn.Module:
    """Says something else for every image."""
    model = timm.create_model("cifar_resnet20")
    nn.init.normal_(model.get_submodule("fc").get_parameter("weight"), std=5)
    return model


def by_hand(model: nn.Module, folder: Path) -> Accuracy:
    """One image at a time, arithmetic in 64 bits."""
    model = model.double().eval()
    cfg = getattr(model, "pretrained_cfg")  # noqa: B009
    top1 = top5 = 0
    losses = []
    files = sorted((folder / "val").rglob("*.png"))
    for path in files:
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image)).double().permute(2, 0, 1) / 255
        mean, std = (torch.tensor(cfg[key], dtype=torch.float64).view(3, 1, 1) for key in ("mean", "std"))
        with torch.no_grad():
            logits = model(((pixels - mean) / std)[None])
        target = int(path.parent.name)
        rank = int((logits[0] > logits[0, target]).sum())
        top1, top5 = top1 + (rank == 0), top5 + (rank < 5)
        losses.append(F.cross_entropy(logits, torch.tensor([target])).item())
    model.float()
    return Accuracy(len(files), top1, top5, sum(losses) / len(files))


def test_against_a_loop_by_hand(model: nn.Module, folder: Path) -> None:
    expected = by_hand(model, folder)
    assert 0 < expected.top5_count < 13
    model.train()
    seen = []
    found = evaluate(model, folder, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert (found.images, found.top1_count, found.top5_count) == (
        13,
        expected.top1_count,
        expected.top5_count,
    )
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)  # 32 against 64 bits
    assert (found.top1, found.top5) == (found.top1_count / 13, found.top5_count / 13)
    assert seen == [(4, 13), (8, 13), (12, 13), (13, 13)]
    assert model.training  # as before


def test_shares_are_whole_and_disjoint(model: nn.Module, folder: Path) -> None:
    dataset = open_images(model, folder)
    for world in (1, 2, 3, 20):
        shares = [Picked(dataset, range(rank, 13, world)) for rank in range(world)]
        taken = sorted(index for share in shares for index in share.indices)
        assert taken == list(range(13)) and sum(map(len, shares)) == 13
    share = Picked(dataset, range(1, 13, 2))
    share.transform = lambda image: image.size
    assert dataset.transform is share.transform and share[0] == ((32, 32), dataset[1][1])


def test_fewer_than_five_classes(folder: Path) -> None:
    model = timm.create_model("cifar_resnet20", num_classes=3)
    for name in ("00", "01", "02"):
        path = folder.parent / "three" / name
        path.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(path / "a.png")
    found = evaluate(model, folder.parent / "three")
    assert (found.images, found.top5) == (3, 1.0)


def test_grey_networks_get_grey_images(folder: Path) -> None:
    assert evaluate(timm.create_model("cifar_resnet20", in_chans=1), folder).images == 13


def test_a_wrong_folder_is_refused_before_work(model: nn.Module, tmp_path: Path) -> None:
    model.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    with pytest.raises(UsageError, match="no image folder"):
        evaluate(model, tmp_path / "none")
