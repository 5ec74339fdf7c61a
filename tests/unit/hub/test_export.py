"""Exported files: what is in them, and that none is kept which differs from its network."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chanzoo.errors import ChanzooError, UsageError
from chanzoo.hub import export
from chanzoo.hub.export import FORMATS, TOLERANCE, Format, Trial, check_target, export_network
from chanzoo.layers import ChannelEquilibrium
from chanzoo.layers.folding import fold_pairs

SUFFIX = {name: kind.suffix for name, kind in FORMATS.items()}
CFG = {"input_size": (3, 12, 10), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "crop_pct": 0.9}


class Block(nn.Module):
    """A convolution, its norm, and Channel Equilibrium."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.bn = nn.BatchNorm2d(8)
        self.ce = ChannelEquilibrium(8)

    def reparameterize(self) -> None:
        fold_pairs(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.ce(self.bn(self.conv(x))).relu()


class Net(nn.Module):
    """The smallest network with everything that folding changes."""

    pretrained_cfg = CFG

    def __init__(self, end: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.block = Block()
        self.fc = nn.Linear(8, 5)
        self.end = end
        nn.init.uniform_(self.block.bn.running_var, 0.5, 2)
        nn.init.normal_(self.block.bn.running_mean)

    def forward(self, x: Tensor) -> Any:
        out = self.fc(self.block(x).mean(dim=(2, 3)))
        return self.end(out) if self.end else out


def net(end: Callable[[Tensor], Any] | None = None) -> Net:
    torch.manual_seed(1)
    return Net(end).eval()


def run_onnx(path: Path, x: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["outputs"], {"images": x.numpy()})[0])


def run_torch(path: Path, x: Tensor) -> Tensor:
    return torch.export.load(path).module()(x).detach()


RUN = {"onnx": run_onnx, "torch-export": run_torch}


@pytest.mark.parametrize(
    ("format", "dynamic"), [("onnx", True), ("torch-export", True), ("torch-export", False)]
)
def test_the_file_gives_the_outputs_of_the_network(format: str, dynamic: bool, tmp_path: Path) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / f"net{SUFFIX[format]}"
    steps: list[tuple[int, int]] = []
    result = export_network(
        model, path, format, dynamic_size=dynamic, progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(n, 4) for n in range(5)]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert (result.path, result.file_bytes) == (path, path.stat().st_size)
    assert result.inputs == ("batch", 3, *(("height", "width") if dynamic else (12, 10)))
    assert result.outputs == ("batch", 5)
    assert (result.norms_folded, result.norms_left, result.layers_merged) == (1, 0, 1)
    shapes = [(1, 3, 12, 10), (3, 3, 12, 10), (1, 3, 24, 30)]
    assert [trial.shape for trial in result.trials] == shapes[: 2 + dynamic]
    # Sums in another order: a few units of the last place of 32-bit floats, 1.2e-7 each.
    assert result.worst.relative == max(trial.relative for trial in result.trials) < 2e-6
    for shape in ((1, 3, 12, 10), (7, 3, 12, 10), *([(2, 3, 33, 21)] if dynamic else [])):
        x = torch.randn(*shape)
        with torch.no_grad():
            torch.testing.assert_close(RUN[format](path, x), model(x), rtol=1e-5, atol=1e-5)
    assert type(model.block.bn) is nn.BatchNorm2d, "the network itself is not folded"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_file_without_folding(tmp_path: Path) -> None:
    result = export_network(net(), tmp_path / "net.pt2", "torch-export", fold=False, size=(9, 8), batch=4)
    assert (result.norms_folded, result.norms_left, result.layers_merged) == (0, 1, 0)
    assert [trial.shape for trial in result.trials] == [(1, 3, 9, 8), (4, 3, 9, 8)]
    assert result.opset is None
    assert any("batch_norm" in str(n.target) for n in torch.export.load(tmp_path / "net.pt2").graph.nodes)


def test_what_an_onnx_file_says_of_itself(tmp_path: Path) -> None:
    import onnx

    facts = {"name": "net.x", "sha256": None, "label_names": ["Katze", "Bär"]}
    paths = [tmp_path / name for name in ("a.onnx", "b.onnx")]
    results = [export_network(net(), path, "onnx", metadata=facts, opset=18) for path in paths]
    assert paths[0].read_bytes() == paths[1].read_bytes(), "the same network gives the same bytes"
    model = onnx.load(paths[0])
    onnx.checker.check_model(model, full_check=True)
    assert results[0].opset == model.opset_import[0].version == 18
    assert (results[0].inputs, results[0].outputs) == (("batch", 3, 12, 10), ("batch", 5))
    x = torch.randn(5, 3, 12, 10)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(paths[0], x), net()(x), rtol=1e-5, atol=1e-5)
    texts = {item.key: item.value for item in model.metadata_props}
    assert texts.pop("name") == "net.x"
    assert {key: json.loads(texts[key]) for key in ("input_size", "mean", "std", "crop_pct")} == {
        key: list(value) if isinstance(value, tuple) else value for key, value in CFG.items()
    }
    assert json.loads(texts["label_names"]) == ["Katze", "Bär"]
    assert "sha256" not in texts, "what nobody knows is left out"
    folder = str(Path(torch.__file__).parent.parent).encode()
    for path in paths:
        assert folder not in path.read_bytes() and __file__.encode() not in path.read_bytes()


def test_what_a_torch_file_says_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    export_network(net(), path, "torch-export", metadata={"name": "net.x"})
    extra = {export.METADATA_FILE: ""}
    torch.export.load(path, extra_files=extra)
    facts = json.loads(extra[export.METADATA_FILE])
    assert (facts["name"], facts["input_size"], facts["mean"]) == ("net.x", [3, 12, 10], [0.5, 0.4, 0.3])
    assert str(Path(torch.__file__).parent.parent).encode() not in path.read_bytes()


def runtime(change: Callable[[Tensor], Tensor]) -> Format:
    """A format whose runtime gets something wrong."""
    return Format(
        ".pt2", (), None, lambda *_: (b"the new file", None), lambda path: lambda x: change(net()(x).detach())
    )


def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(b"the old file")
    for change, found in (
        (lambda y: 1.01 * y, "found     0.0"),
        (lambda y: y * torch.tensor([1, 1, 1, 1, float("nan")]), "found     nan"),
        (lambda y: y[:, :4], "found     inf"),
        (lambda y: y[:1], "found     inf for images of 3×3×12×10\n"),  # right for one image
    ):
        monkeypatch.setitem(FORMATS, "torch-export", runtime(change))
        with pytest.raises(ChanzooError) as caught:
            export_network(net(), path, "torch-export", overwrite=True)
        assert caught.value.exit_code == 1
        lines = str(caught.value).splitlines()
        assert lines[0] == "the exported file does not compute what the network computes."
        assert lines[1].startswith("  expected  at most 0.001 of the largest output, which is 0.")
        assert found in str(caught.value)
        assert lines[3] == f'  The file was not kept; "{path}" is untouched.'
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("net.pt2", b"the old file")]
    small = runtime(lambda y: y + 0.5 * TOLERANCE * y.abs().max())
    monkeypatch.setitem(FORMATS, "torch-export", small)
    result = export_network(net(), path, "torch-export", overwrite=True)
    assert 4e-4 < result.worst.relative < 6e-4 and path.read_bytes() == b"the new file"


def test_outputs_that_are_all_zero_have_no_relative_difference(tmp_path: Path) -> None:
    result = export_network(net(lambda y: 0 * y), tmp_path / "net.pt2", "torch-export")
    assert (result.worst.difference, result.worst.largest, result.worst.relative) == (0, 0, 0)
    assert Trial((1, 3, 12, 10), 1e-9, 0.0).relative == float("inf")


def fail(error: BaseException) -> Callable[..., Any]:
    def failing(*args: Any) -> Any:
        raise error

    return failing


def test_failures_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.pt2"
    kind = FORMATS["torch-export"]
    wrapped = RuntimeError("Failed\nfor a reason")
    wrapped.__cause__ = TypeError("no such operation\nand a long story")
    for part, error in (("encode", wrapped), ("load", wrapped), ("load", OSError("unreadable"))):
        monkeypatch.setitem(FORMATS, "torch-export", replace(kind, **{part: fail(error)}))
        with pytest.raises(ChanzooError) as caught:
            export_network(net(), path, "torch-export")
        reason = "unreadable" if isinstance(error, OSError) else "no such operation"
        assert str(caught.value) == (
            f"Net does not export to torch-export: {reason}\n"
            "  The file was not written; what was there is untouched.   All of it: --debug"
        )
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(FORMATS, "torch-export", replace(kind, encode=fail(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        export_network(net(), path, "torch-export")
    monkeypatch.setitem(FORMATS, "torch-export", kind)
    monkeypatch.setattr(Path, "write_bytes", fail(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        export_network(net(), path, "torch-export")
    assert list(tmp_path.iterdir()) == []


def test_networks_that_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    nothing = "  Nothing was exported."
    for model, options, message in (
        (net().train(), {}, "only a network in evaluation mode can be exported: call model.eval() first."),
        (net(lambda y: [y]), {}, f"Net gives list: expected one tensor with a row per image.\n{nothing}"),
        (
            net(lambda y: y.sum()),
            {},
            f"Net gives Tensor: expected one tensor with a row per image.\n{nothing}",
        ),
        (Fixed(), {"size": (9, 9)}, "Fixed takes no images of 3×9×9: "),
        (Fixed(), {"dynamic_size": True}, "Fixed takes no images of 3×24×30: "),
    ):
        with pytest.raises(UsageError) as caught:
            export_network(model, path, "onnx", **options)
        assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(f"\n{nothing}   Leave --dynamic-size out")
    with pytest.raises(UsageError, match="Choose another: --img-size H W"):
        export_network(Fixed(), path, "onnx", size=(9, 9))
    with pytest.raises(ChanzooError, match="outputs are not finite for random images of 3×12×10; nothing"):
        export_network(net(lambda y: y.log()), path, "onnx")
    monkeypatch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], limit_bytes=1000))
    with pytest.raises(UsageError, match=r"holds at most 1,000 bytes of weights; this network has 1,\d\d\d"):
        export_network(net(), path, "onnx")
    assert list(tmp_path.iterdir()) == []


class Fixed(nn.Module):
    """Takes images of one size alone, as far as the classifier goes."""

    pretrained_cfg = CFG

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(360, 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


class Picky(nn.Module):
    """Takes any size, but not by one graph."""

    pretrained_cfg = CFG

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) * (2 if x.shape[2] == 12 else 3)


def test_a_network_whose_graph_depends_on_the_size(tmp_path: Path) -> None:
    model = Picky().eval()
    with pytest.raises(ChanzooError) as caught:
        export_network(model, tmp_path / "net.pt2", "torch-export", dynamic_size=True)
    assert caught.value.exit_code == 1
    assert str(caught.value).startswith("Picky does not export to torch-export: ")
    assert str(caught.value).endswith("It may do so without --dynamic-size.")
    assert export_network(model, tmp_path / "net.pt2", "torch-export").inputs == ("batch", 3, 12, 10)


def test_an_opset_that_the_exporter_does_not_reach(tmp_path: Path) -> None:
    with pytest.raises(ChanzooError) as caught:
        export_network(net(), tmp_path / "net.onnx", "onnx", opset=9)
    message = "this network cannot be written in opset 9; 18 is what the exporter made of it.\n"
    assert str(caught.value).startswith(message) and str(caught.value).endswith("Try --opset 18")
    assert list(tmp_path.iterdir()) == []


def test_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "net.onnx"
    check_target(file, "onnx")
    check_target(file, "onnx", opset=18)
    assert list(tmp_path.iterdir()) == [], "a check leaves nothing behind"
    file.touch()
    folder = tmp_path / "folder.onnx"
    folder.mkdir()
    check_target(file, "onnx", overwrite=True)
    wrong: tuple[tuple[Path, str, int | None, str], ...] = (
        (file, "onnx", None, f'"{file}" is there already.\n  Nothing was exported.   Replace it: --force'),
        (folder, "onnx", None, f'"{folder}" is a folder; name a file.'),
        (
            file,
            "torch-export",
            None,
            f'"{file}" has another ending than .pt2, that of --format torch-export.',
        ),
        (
            tmp_path / "no" / "net.onnx",
            "onnx",
            None,
            f'no folder "{tmp_path / "no"}".\n  Nothing was exported.',
        ),
        (file / "net.onnx", "onnx", None, f'no folder "{file}".'),
        (
            tmp_path / f"{'x' * 300}.onnx",
            "onnx",
            None,
            f'cannot write "{tmp_path}/{"x" * 300}.onnx": File name',
        ),
        (
            tmp_path / "net.pt2",
            "torch-export",
            18,
            "--opset belongs to --format onnx; torch-export has none.",
        ),
        (
            tmp_path / "n.onnx",
            "onnx",
            999,
            "--opset 999 is newer than the installed onnx, which knows up to ",
        ),
    )
    for path, format, opset, message in wrong:
        with pytest.raises(UsageError) as caught:
            check_target(path, format, opset=opset)
        assert str(caught.value).startswith(message)
    monkeypatch.setattr(Path, "touch", fail(PermissionError(13, "Permission denied")))
    with pytest.raises(UsageError, match=r'cannot write ".*n.onnx": Permission denied.\n  Nothing was exp'):
        check_target(tmp_path / "n.onnx", "onnx")


@pytest.mark.parametrize("missing", [("onnx",), ("onnxruntime", "onnxscript")])
def test_packages_that_are_missing(
    missing: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError) as caught:
        check_target(tmp_path / "net.onnx", "onnx")
    assert str(caught.value) == (
        f"--format onnx needs {', '.join(missing)}, which is not installed.\n"
        '  Nothing was exported.   Install it: python -m pip install "chanzoo[export]"'
    )
    check_target(tmp_path / "net.pt2", "torch-export")  # needs nothing
