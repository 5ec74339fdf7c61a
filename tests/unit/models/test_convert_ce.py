"""The authors' checkpoints: every entry finds its place, and anything odd is refused by name."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[2] / "parity"))

from convert_ce import convert, main  # pyright: ignore[reportMissingImports]
from fill import load_case

from chanzoo.errors import UsageError
from chanzoo.models.ce_resnet import CEResNet, from_authors, to_authors

ROOT = Path(__file__).parents[3]
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def resnet50() -> State:
    return load_case(ROOT / "tests/parity/ce/resnet50_64")[1]


@pytest.fixture
def resnet18() -> State:
    return load_case(ROOT / "tests/parity/ce/resnet18_64")[1]


def same(a: State, b: State) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_432_entries_and_back(resnet50: State, tmp_path: Path) -> None:
    assert len(resnet50) == 432
    torch.save(
        {"epoch": 99, "model": "resnet", "state_dict": resnet50, "best_prec1": 78.2}, tmp_path / "a.tar"
    )
    assert main([str(tmp_path / "a.tar"), str(tmp_path / "b.safetensors")]) == 0
    ours = load_file(tmp_path / "b.safetensors")
    CEResNet(50, device="meta").load_state_dict(ours, assign=True)
    assert main([str(tmp_path / "b.safetensors"), str(tmp_path / "c.tar"), "--to-authors"]) == 0
    back = torch.load(tmp_path / "c.tar", weights_only=True)["state_dict"]
    assert back.keys() == resnet50.keys()
    for key, value in resnet50.items():
        if not (key.endswith("running_mean") and "ce" in key):
            assert torch.equal(back[key], value), key
    assert main([str(tmp_path / "c.tar"), str(tmp_path / "d.safetensors")]) == 0
    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert len(file.metadata()) == 1
    assert not list(tmp_path.glob("*.partial"))


def test_names(resnet18: State) -> None:
    ours = from_authors(resnet18)
    assert torch.equal(ours["act1.ce.mix"], resnet18["ce1.x_weight"])
    assert torch.equal(ours["layer3.1.se.reweight.fc2.weight"], resnet18["layer3.1.ce.AR.fc.3.weight"])
    assert ours["layer1.0.conv1.weight"] is resnet18["layer1.0.conv1.weight"]
    assert same(from_authors(to_authors(ours)), ours)


def test_what_may_differ(resnet18: State) -> None:
    expected = convert(resnet18)
    prefixed = {f"module.{key}": value for key, value in resnet18.items()}
    bare = {k: v for k, v in resnet18.items() if not k.endswith("tracked")}
    bare = {k: v for k, v in bare.items() if not (k.endswith("running_mean") and "ce" in k)}
    assert same(convert(prefixed), expected)
    converted = convert(bare)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("layer1.0.conv1.weight", None, '"layer1.0.conv1.weight" of ce_resnet18 is missing'),
        ("layer2.0.ce.x_weight", None, '"layer2.0.se.mix" of ce_resnet18 is missing'),
        ("fc.weight", None, '"fc.weight" is missing'),
        ("fc.weight", torch.ones(1000, 3), r'"fc.weight" is not(.|\n)*\[1000, 512\](.|\n)*\[1000, 3\]'),
        ("layer4.1.ce.x_weight", torch.zeros(1), '"layer4.1.se.mix" is no entry of ce_resnet18'),
        ("layer1.0.ce.extra", torch.zeros(1), '"layer1.0.ce.extra" is no entry'),
        ("head.weight", torch.zeros(1), '"head.weight" is no entry'),
        ("ce1.AR.running_scale", torch.zeros(1), "a positive number"),
        ("ce1.AR.running_scale", torch.tensor([float("nan")]), "finite numbers"),
        ("ce1.running_wm", 5 * torch.eye(64)[None], r"eigenvalues in \[0.99, 3.38\](.|\n)*\[5.00, 5.00\]"),
        ("ce1.running_wm", torch.eye(64)[None] + torch.eye(64).roll(1, 0) * 2e-3, "symmetric"),
    ],
)
def test_refuses(resnet18: State, key: str, value: Tensor | None, words: str) -> None:
    state = {**resnet18, key: value} if value is not None else {k: v for k, v in resnet18.items() if k != key}
    with pytest.raises(UsageError, match=words):
        convert(state)  # pyright: ignore[reportArgumentType]


def test_refuses_other_networks(resnet18: State) -> None:
    state = {k: v for k, v in resnet18.items() if not k.startswith("layer3.1.")}
    with pytest.raises(UsageError, match="7 blocks of 2 convolutions are no CE-ResNet"):
        convert(state)


class Trap:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> tuple:
        return (print, ("executed",))


def test_nothing_in_the_pickle_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Trap()}, tmp_path / "evil.tar")
    assert main([str(tmp_path / "evil.tar"), str(tmp_path / "out.safetensors")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "holds more than tensors" in captured.err and "Nothing was written" in captured.err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"state_dict": {"a": 1}}, [1], {}])
def test_a_file_without_tensors(content: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(content, tmp_path / "a.tar")
    assert main([str(tmp_path / "a.tar"), str(tmp_path / "out")]) == 2
    assert "no state dict" in (err := capsys.readouterr().err) or "is no tensor" in err


def test_damaged_and_missing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").write_text(json.dumps({}))
    assert main([str(tmp_path / "a"), str(tmp_path / "out")]) == 2
    assert main([str(tmp_path / "a"), str(tmp_path / "out"), "--to-authors"]) == 2
    (tmp_path / "b").write_bytes(pickle.dumps([3], protocol=2)[:-1])
    assert main([str(tmp_path / "b"), str(tmp_path / "out")]) == 2
    assert main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("Nothing was written") == 4
    assert not (tmp_path / "out").exists()
