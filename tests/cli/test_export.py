"""``chanzoo export``: files that other runtimes read, and what is said of them."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor

from chanzoo.cli import export as command
from chanzoo.cli.main import main
from chanzoo.hub.export import FORMATS
from chanzoo.store import file_sha256
from chanzoo.weights import CIFAR10_NAMES, WEIGHTS

NAME = "ce_cifar_resnet20.c10j"
WIDTHS = [4, 4, 6, 8, *[3] * 9]


class File(NamedTuple):
    path: Path
    data: dict
    err: str


def run(path: Path, x: Tensor) -> Tensor:
    """What the file makes of images, by the runtime of its ending."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x).detach()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def facts(path: Path) -> dict[str, str]:
    """What an ONNX file says of itself."""
    import onnx

    return {item.key: item.value for item in onnx.load(path).metadata_props}


def outputs(name: str, x: Tensor, **kwargs: bool) -> Tensor:
    with torch.no_grad():
        return timm.create_model(name, **kwargs).eval()(x)


def write(folder: Path, name: str, format: str, *options: str) -> File:
    """Run the command outside a test, for several of them."""
    path = folder / f"net{FORMATS[format].suffix}"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["export", name, "--format", format, "-o", str(path), "--json", *options])
    assert code == 0, err.getvalue()
    return File(path, json.loads(out.getvalue()), err.getvalue())


@pytest.fixture(scope="session", params=FORMATS)
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> File:
    """Our network with weights of the package, in each format."""
    return write(tmp_path_factory.mktemp("pretrained"), NAME, request.param)


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved network with widths of its own."""
    folder = tmp_path_factory.mktemp("saved") / "narrow.net"
    torch.manual_seed(3)
    model = timm.create_model("cifar_resnet20", widths=WIDTHS, num_classes=3)
    model(3 * torch.randn(16, 3, 32, 32))  # moves the running statistics
    save_for_hf(model, str(folder), model_config={"label_names": ["a", "b", "c"]}, safe_serialization=True)
    return folder


def test_pretrained_weights(pretrained: File) -> None:
    data = pretrained.data
    assert set(data) == {
        "model", "weights", "format", "opset", "output", "file_bytes", "inputs", "outputs", "norms_folded",
        "norms_left", "layers_merged", "difference", "relative_difference", "trials", "seconds",
    }  # fmt: skip
    assert (data["model"], data["weights"], pretrained.err) == (NAME, "pretrained", "")
    assert (data["inputs"], data["outputs"]) == (["batch", 3, 32, 32], ["batch", 10])
    assert (data["norms_folded"], data["norms_left"], data["layers_merged"]) == (19, 0, 7)
    assert data["file_bytes"] == pretrained.path.stat().st_size
    assert [trial["shape"][0] for trial in data["trials"]] == [1, 3]
    assert data["difference"] == max(trial["difference"] for trial in data["trials"])
    # 19 convolutions in 32-bit floats, 1.2e-7 each, folded and summed in another order.
    assert data["relative_difference"] < 1e-5
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(run(pretrained.path, x), outputs(NAME, x, pretrained=True), rtol=0, atol=1e-4)
    assert list(pretrained.path.parent.iterdir()) == [pretrained.path]


def test_what_the_file_says_of_itself(pretrained: File) -> None:
    if pretrained.path.suffix == ".onnx":
        found = facts(pretrained.path)
        assert json.loads(found["label_names"]) == list(CIFAR10_NAMES)
        assert json.loads(found["input_size"]) == [3, 32, 32]
        assert json.loads(found["mean"]) == pytest.approx([0.4914, 0.4822, 0.4465])
        assert pretrained.data["opset"] >= 18
    else:
        extra = {"chanzoo.json": ""}
        torch.export.load(pretrained.path, extra_files=extra)
        found = json.loads(extra["chanzoo.json"])
        assert found["label_names"] == list(CIFAR10_NAMES)
        assert pretrained.data["opset"] is None
    assert (found["name"], found["sha256"]) == (NAME, WEIGHTS[NAME].sha256)


@pytest.mark.parametrize("format", FORMATS)
def test_a_saved_network_of_another_size(format: str, narrow: Path, tmp_path: Path) -> None:
    file = write(tmp_path, str(narrow), format, "--img-size", "40", "24", "--batch", "6")
    assert (file.data["inputs"], file.data["outputs"]) == (["batch", 3, 40, 24], ["batch", 3])
    assert [trial["shape"] for trial in file.data["trials"]] == [[1, 3, 40, 24], [6, 3, 40, 24]]
    x = torch.randn(2, 3, 40, 24)
    expected = outputs(f"local-dir:{narrow}", x, pretrained=True)
    torch.testing.assert_close(run(file.path, x), expected, rtol=0, atol=1e-5)
    if format == "onnx":
        found = facts(file.path)
        assert found["sha256"] == file_sha256(narrow / "model.safetensors")
        assert json.loads(found["input_size"]) == [3, 40, 24]
        assert json.loads(found["label_names"]) == ["a", "b", "c"]


def test_a_network_of_timm_for_people(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = ("resnet10t", "--weights", "none", "--format", "torch-export", "--img-size", "32")
    done = cli("export", *args)
    assert (done.code, done.err) == (0, "")
    lines = dict(line.split("  ", 1) for line in done.out.splitlines())
    table = {key: value.strip() for key, value in lines.items()}
    assert table["model"] == "resnet10t" and table["weights"] == "none"
    assert table["file"].startswith("resnet10t.pt2 (") and table["file"].endswith(" MB, torch-export)")
    assert (table["images"], table["outputs"]) == ("batch×3×32×32", "batch×1000")
    assert table["batch norms"] == "0 folded, 14 left", "timm's own norms stay"
    assert table["compared at"] == "1×3×32×32, 3×3×32×32"
    assert float(table["largest difference"]) <= float(table["relative"].split(" of the largest output, ")[0])
    assert [path.name for path in tmp_path.iterdir()] == ["resnet10t.pt2"]
    again = cli("export", *args)
    assert (again.code, again.out) == (2, "")
    assert again.err == (
        'chanzoo: "resnet10t.pt2" is there already.\n  Nothing was exported.   Replace it: --force\n'
    )


def test_mistakes_come_before_work(
    cli, tmp_path: Path, narrow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.onnx").write_text("old")
    onnx = ("--format", "onnx", "--weights", "none")
    for args, message in (
        (("ce_cifar_resnet2O", *onnx), 'no model "ce_cifar_resnet2O". Did you mean ce_cifar_resnet20?'),
        (("cifar_resnet20.c10", *onnx), 'no weights "cifar_resnet20.c10". Did you mean cifar_resnet20.c10j?'),
        (("local-dir:nowhere", *onnx), f'cannot read "{Path("nowhere", "config.json")}": No such file'),
        (("cifar_resnet20",), "the following arguments are required: --format"),
        (("cifar_resnet20", "--format", "tflite"), "argument --format: invalid choice: 'tflite'"),
        (
            ("cifar_resnet20", *onnx, "-o", "old.onnx"),
            '"old.onnx" is there already.\n  Nothing was exported.',
        ),
        (("cifar_resnet20", *onnx, "-o", "."), '"." is a folder; name a file.'),
        (("cifar_resnet20", *onnx, "-o", "net.pt2"), '"net.pt2" has another ending than .onnx, that of'),
        (("cifar_resnet20", *onnx, "-o", "no/net.onnx"), 'no folder "no".\n'),
        (("cifar_resnet20", *onnx, "--opset", "999"), "--opset 999 is newer than the installed onnx"),
        (("cifar_resnet20", *onnx, "--img-size", "0"), "argument --img-size: '0' is not a whole number"),
        (("cifar_resnet20", *onnx, "--img-size", "1", "2", "3"), "--img-size takes one number, or height"),
        (("cifar_resnet20", *onnx, "--batch", "1"), "one image is compared in any case: --batch takes 2"),
        (("cifar_resnet20", *onnx, "--device", "cuda"), "files are made and compared on the CPU: leave"),
        (("cifar_resnet20", *onnx, "--checkpoint", "no.pth"), 'no checkpoint "no.pth".'),
        (
            ("test_vit", *onnx, "--img-size", "100"),
            "VisionTransformer takes no images of 3×100×100: Input height (100) should be divisible by "
            "patch size (16).\n"
            "  Nothing was exported.   Choose another: --img-size H W\n",
        ),
    ):
        done = cli("export", *args)
        assert (done.code, done.out) == (2, ""), args
        assert done.err.startswith(f"chanzoo: {message}"), done.err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = cli("export", "cifar_resnet20", *onnx)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("chanzoo: --format onnx needs onnxruntime, which is not installed.\n")
    assert 'pip install "chanzoo[export]"' in done.err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.onnx", "old")]


def test_the_formats_are_those_of_the_hub() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for name in FORMATS:
        assert parser.parse_args(["x", "--format", name]).format == name
    choices = next(action.choices for action in parser._actions if action.dest == "format")
    assert choices == tuple(FORMATS)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ce_cifar_resnet20.c10j", "ce_cifar_resnet20.c10j"),
        ("hf-hub:me/my-net", "my-net"),
        ("hf-hub:me/my.net@1234abc", "my.net"),
    ],
)
def test_names_of_files(name: str, file: str) -> None:
    assert command.default_name(name) == file


def test_names_of_files_of_folders(narrow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(narrow)
    assert [command.default_name(name) for name in (".", "local-dir:.", str(narrow))] == ["narrow.net"] * 3


def test_whose_sha256_is_named(narrow: Path, checkpoint: Path) -> None:
    def sha256(name: str, **options: object) -> str | None:
        plain = {"weights": None, "checkpoint": None, "num_classes": None}
        return command.weights_sha256(argparse.Namespace(name=name, **{**plain, **options}))

    assert sha256(NAME) == sha256(NAME.partition(".")[0]) == WEIGHTS[NAME].sha256
    assert sha256(str(narrow)) == sha256(f"local-dir:{narrow}") == file_sha256(narrow / "model.safetensors")
    assert sha256(NAME, checkpoint=checkpoint) == file_sha256(checkpoint)
    for name, options in (
        (NAME, {"weights": "none"}),
        (NAME, {"num_classes": 3}),  # the classifier is another
        ("resnet10t.c3_in1k", {}),
        ("hf-hub:me/my-net", {}),
    ):
        assert sha256(name, **options) is None


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["ce_resnet18", "ce_resnet50", "ce_mobilenetv2"])
def test_large_networks(name: str, format: str, tmp_path: Path) -> None:
    file = write(tmp_path, name, format, "--weights", "none", "--img-size", "64")
    assert file.data["norms_left"] == 0 and file.data["layers_merged"] > 0
    assert file.data["relative_difference"] < 1e-4
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)  # as the command's own random weights
    expected = outputs(name, x)
    torch.testing.assert_close(run(file.path, x), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_free_height_and_width(format: str, tmp_path: Path) -> None:
    file = write(tmp_path, NAME, format, "--dynamic-size")
    assert file.data["inputs"] == ["batch", 3, "height", "width"]
    assert file.data["relative_difference"] < 1e-5
    x = torch.randn(2, 3, 48, 56)
    torch.testing.assert_close(run(file.path, x), outputs(NAME, x, pretrained=True), rtol=0, atol=1e-4)
