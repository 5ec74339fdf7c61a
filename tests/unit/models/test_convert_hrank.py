"""The HRank authors' checkpoints: slim and full-size ones become folders, odd ones are refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[2] / "parity"))

from convert_hrank import convert, main  # pyright: ignore[reportMissingImports]
from fill import load_case

from chanzoo.errors import UsageError
from chanzoo.models.hrank import full_network
from chanzoo.models.hrank_authors import AUTHORS_NETS, find_variant, from_authors, to_authors, widths_of

CASES = Path(__file__).parents[2] / "parity" / "hrank"
State = dict[str, Tensor]
FAST = ("vgg_16_bn", "densenet_40")
SLIM = [pytest.param(net, marks=[] if net in FAST else pytest.mark.slow) for net in AUTHORS_NETS]


def state_of(net: str) -> State:
    return load_case(CASES / f"slim_{net}")[1]


def full_state(net: str) -> State:
    """Random weights of the full-size network under the authors' names."""
    variant = AUTHORS_NETS[net]
    return to_authors(timm.create_model(variant).state_dict(), variant)


@pytest.mark.parametrize("net", SLIM)
def test_a_slim_checkpoint_becomes_a_folder(
    net: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, state, x, expected = load_case(CASES / f"slim_{net}")
    saved = {f"module.{key}": value for key, value in state.items() if "num_batches" not in key}
    torch.save({"epoch": 3, "state_dict": saved, "best_top1_acc": torch.tensor(93.0)}, tmp_path / "a.pth.tar")
    assert main([str(tmp_path / "a.pth.tar"), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().err
    assert f"{AUTHORS_NETS[net]}, {spec['params']:,} parameters" in printed and "zero" not in printed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == AUTHORS_NETS[net]
    assert all(isinstance(width, int) for width in config["model_args"]["widths"].values())
    assert "license" not in config["pretrained_cfg"]
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        logits = model(x)
    assert (logits - expected["output"]).abs().max() <= 1e-4 * expected["output"].abs().max()


def test_the_means_of_the_authors_are_kept(tmp_path: Path) -> None:
    torch.save(state_of("vgg_16_bn"), tmp_path / "bare.pt")
    assert main([str(tmp_path / "bare.pt"), str(tmp_path / "out")]) == 0
    cfg = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).pretrained_cfg
    assert tuple(cfg["std"]) == (0.2023, 0.1994, 0.2010)
    assert tuple(cfg["mean"]) == (0.4914, 0.4822, 0.4465)


def test_a_checkpoint_with_zeros_stays_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = full_state("densenet_40")
    state["dense1.0.conv1.weight"][:5] = 0
    torch.save({"state_dict": state}, tmp_path / "v1.pt")
    assert main([str(tmp_path / "v1.pt"), str(tmp_path / "out")]) == 0
    assert "5 of 936 filters are zero" in capsys.readouterr().err
    assert "widths" not in json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).state_dict()
    assert all(torch.equal(again[k], v) for k, v in from_authors(state, "hrank_cifar_densenet40").items())


@pytest.mark.parametrize("net", AUTHORS_NETS)
def test_names_go_there_and_back(net: str) -> None:
    state = {key: value.to("meta") for key, value in state_of(net).items()}
    variant = AUTHORS_NETS[net]
    assert find_variant(state) == variant
    ours = from_authors(state, variant)
    assert ours.keys() == full_network(variant).state_dict().keys()
    assert all(ours[k].dim() == v.dim() for k, v in full_network(variant).state_dict().items())
    back = to_authors(ours, variant)
    assert [(k, v.shape) for k, v in back.items()] == [(k, v.shape) for k, v in state.items()]
    assert widths_of({k: v for k, v in full_network(variant).state_dict().items()}, variant) == {}


def change(state: State, **tensors: Any) -> State:
    return {**state, **tensors}


def refused(state: State) -> str:
    with pytest.raises(UsageError) as caught:
        convert(state)
    return str(caught.value)


def without(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if not key.startswith(name)}


def test_what_is_refused() -> None:
    state, name = state_of("vgg_16_bn"), "hrank_cifar_vgg16_bn"
    assert f"the nearest is {name}.\n  missing     classifier.norm1\n" in refused(
        without(state, "classifier.norm1")
    )
    assert "unexpected  head" in refused(change(state, **{"head.weight": torch.zeros(1)}))
    assert refused(without(state, "features.norm1.bias")) == f'"stage1.1.bn.bias" of {name} is missing.'
    assert refused(without(state, "features.conv1.weight")) == f'"stage1.1.conv.weight" of {name} is missing.'
    key = "features.conv0.weight"
    assert "cannot put out 70 channels: expected 1 to 64" in refused(
        change(state, **{key: state[key][:1].repeat(70, 1, 1, 1)})
    )
    alpha = change(state, **{"features.conv0.alpha": torch.zeros(1)})
    assert refused(alpha) == f'"stage1.0.conv.alpha" is no entry of {name}.'
    short, nan = torch.ones(3), torch.full((50,), torch.nan)
    assert refused(change(state, **{"features.norm0.weight": short})) == (
        '"stage1.0.bn.weight" does not fit the other tensors\n  expected  [50]\n  found     [3]'
    )
    assert '"stage1.0.bn.bias" holds infinity' in refused(change(state, **{"features.norm0.bias": nan}))
    with pytest.raises(UsageError, match=r'"head\.weight" is no entry of'):
        from_authors({"head.weight": short}, name)


@pytest.mark.slow
def test_a_shortcut_that_only_theirs_has_is_named() -> None:
    model = timm.create_model("hrank_mobilenetv2", compress_rate=[0, 0, 0, 0, 0, 1 / 3, 0, 0])
    state = to_authors(model.state_dict(), "hrank_mobilenetv2")
    assert 'block "blocks.4.0" has 64 channels before and after' in refused(state)


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.pt"), str(tmp_path / "out")]) == 2
    assert "there is no file" in capsys.readouterr().err
    torch.save(state_of("vgg_16_bn"), tmp_path / "a.pt")
    (tmp_path / "out").mkdir()
    assert main([str(tmp_path / "a.pt"), str(tmp_path / "out")]) == 2
    assert "exists already" in (printed := capsys.readouterr().err) and "Nothing was written." in printed
    assert list((tmp_path / "out").iterdir()) == []


def test_damaged_files_and_targets_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    junk, good, file = tmp_path / "junk.pth", tmp_path / "good.pth", tmp_path / "file"
    junk.write_text("junk\n")
    file.write_text("mine")
    assert main([str(junk), str(tmp_path / "out")]) == 2
    assert "junk.pth holds more than tensors and options, or is damaged: KeyError" in capsys.readouterr().err
    torch.save(state_of("vgg_16_bn"), good)
    (tmp_path / "out.partial").mkdir()
    assert main([str(good), str(file / "out")]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "good.pth", "junk.pth", "out.partial"]
