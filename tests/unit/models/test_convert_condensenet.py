"""The converter of the CondenseNet V2 authors' checkpoints, as a script on files."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

from convert_condensenet import convert, main  # pyright: ignore[reportMissingImports]

from chanzoo.errors import UsageError
from chanzoo.layers.condensing import condense, learned_layers
from chanzoo.models.condensenet_authors import to_authors

LAYER = "features.denseblock_1.denselayer_1."


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("condensenetv2_a", num_classes=7).eval()
    for layer in learned_layers(model).values():
        layer.condense_to(layer.condensation_factor - 1)
    return model


def theirs(model: nn.Module) -> dict[str, torch.Tensor]:
    return to_authors(model.state_dict())


@pytest.mark.parametrize("condensed", [False, True])
def test_both_forms_come_in_and_go_out_again(trained: nn.Module, tmp_path: Path, condensed: bool) -> None:
    model = condense(trained) if condensed else trained
    file, folder, back = tmp_path / "a.pth.tar", tmp_path / "ours", tmp_path / "back.pth.tar"
    state = theirs(model)
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, file)
    assert main([str(file), str(folder)]) == 0
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert main([str(folder), str(back), "--to-authors"]) == 0
    returned = torch.load(back, weights_only=True)["state_dict"]
    assert returned.keys() == state.keys()
    assert all(torch.equal(returned[key], value) for key, value in state.items())


def test_of_a_training_run_the_averaged_weights_are_taken(trained: nn.Module, tmp_path: Path) -> None:
    """Beside tensors, such a file holds the options of the run."""
    plain, averaged = theirs(trained), theirs(trained)
    averaged["classifier.bias"] = averaged["classifier.bias"] + 1
    file = tmp_path / "a.pth.tar"
    torch.save({"state_dict": plain, "state_dict_ema": averaged, "args": Namespace(lr=0.4)}, file)
    for options, shift in (((), 1), (("--no-ema",), 0)):
        folder = tmp_path / f"ours{shift}"
        assert main([str(file), str(folder), *options]) == 0
        found = timm.create_model(f"local-dir:{folder}", pretrained=True).fc.bias
        assert torch.equal(found, trained.fc.bias + shift)
    torch.save({"state_dict": plain, "args": nn.Linear(1, 1)}, file)
    assert main([str(file), str(tmp_path / "more")]) == 2


def test_what_their_layout_cannot_say_is_not_written(tmp_path: Path, capsys) -> None:
    model = timm.create_model("condensenetv2_a", reactivation_factor=4)
    timm.models.save_for_hf(model, tmp_path / "ours", safe_serialization=True)
    assert main([str(tmp_path / "ours"), str(tmp_path / "back.pth"), "--to-authors"]) == 2
    assert "has 8 groups and condensation factor 4: theirs has one number" in capsys.readouterr().err
    assert not (tmp_path / "back.pth").exists()


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (f"{LAYER}conv_1.norm.weight", None, "is missing"),
        (f"{LAYER}conv_1.norm.weight", torch.ones(3), "does not fit the other tensors"),
        ("classifier.bias", torch.full((7,), float("nan")), "not a number"),
        (f"{LAYER}conv_1._stage", torch.tensor([5.0]), "2 connections left at stage 5\n  expected  6 of 16"),
        ("features.more", torch.ones(3), "is no entry of a CondenseNet V2"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_written(
    trained: nn.Module, tmp_path: Path, capsys, key: str, change: torch.Tensor | None, message: str
) -> None:
    state = theirs(trained)
    if change is None:
        del state[key]
    else:
        state[key] = change
    file = tmp_path / "a.pth"
    torch.save(state, file)
    assert main([str(file), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and "Nothing was written" in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("classifier.bias", None, '"fc.bias" of condensenetv2_a is missing'),
        ("classifier.bias", torch.tensor(1.0), '"fc.bias" of condensenetv2_a is of another shape'),
        ("features.init_conv.weight", torch.zeros(3), '"stem.weight" of condensenetv2_a is of another shape'),
        (f"{LAYER}conv_1._mask", torch.tensor(1.0), "is no mask: expected the shape of the weight"),
        (f"{LAYER}conv_1._stage", torch.zeros(2), "has 2 numbers: expected one"),
    ],
)
def test_entries_of_odd_shapes_are_named(
    trained: nn.Module, entry: str, value: torch.Tensor | None, words: str
) -> None:
    state = theirs(trained)
    assert entry in state
    del state[entry]
    with pytest.raises(UsageError, match=words):
        convert(state if value is None else {**state, entry: value})


def test_a_checkpoint_of_theirs_is_not_overwritten(
    trained: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timm.models.save_for_hf(trained, tmp_path / "ours", safe_serialization=True)
    target = tmp_path / "x.pth"
    target.write_text("mine")
    assert main(["--to-authors", str(tmp_path / "ours"), str(target)]) == 2
    assert "exists already" in capsys.readouterr().err and target.read_text() == "mine"
    assert main(["--to-authors", str(tmp_path / "ours"), str(tmp_path / "no" / "x.pth")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_an_index_beyond_the_channels_is_refused(trained: nn.Module) -> None:
    state = theirs(condense(trained))
    state[f"{LAYER}conv_1.index"][0] = 16
    with pytest.raises(UsageError, match=r'"stage1\.0\.conv1\.index" names channels that there are not'):
        convert(state)


def test_existing_folders_and_other_networks_are_left_alone(
    trained: nn.Module, tmp_path: Path, capsys
) -> None:
    file = tmp_path / "a.pth"
    torch.save(theirs(trained), file)
    (tmp_path / "out").mkdir()
    assert main([str(file), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([str(tmp_path / "none.pth"), str(tmp_path / "new")]) == 2
    other = tmp_path / "other"
    timm.models.save_for_hf(timm.create_model("cifar_resnet20"), other, safe_serialization=True)
    assert main([str(other), str(tmp_path / "b.pth"), "--to-authors"]) == 2
    assert "holds no CondenseNet V2 but a CifarResNet" in capsys.readouterr().err
    assert not (tmp_path / "b.pth").exists()
