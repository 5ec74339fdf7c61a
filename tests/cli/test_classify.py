"""``chanzoo classify``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from chanzoo import weights
from chanzoo.weights import CIFAR10_NAMES, WEIGHTS

ASSETS = Path(__file__).parents[1] / "assets"
CAT, ROCKET = ASSETS / "cat.jpg", ASSETS / "rocket.jpg"


def test_json(cli) -> None:
    done = cli("classify", CAT, ROCKET, "--model", "cifar_resnet20", "--weights", "none", "--format", "json")
    assert (done.code, done.err) == (0, "")
    first, second = json.loads(done.out)
    assert (first["image"], second["image"]) == (str(CAT), str(ROCKET))
    assert (set(first), first["model"]) == ({"image", "model", "predictions"}, "cifar_resnet20")
    assert len(first["predictions"]) == 5
    for item in first["predictions"]:
        assert item["label"] == CIFAR10_NAMES[item["index"]]
    probabilities = [item["probability"] for item in first["predictions"]]
    assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) < 1
    again = cli("classify", CAT, "--model", "cifar_resnet20", "--weights", "none", "--format", "json")
    assert json.loads(again.out) == [first]


def test_table_and_labels_of_imagenet(cli) -> None:
    done = cli("classify", CAT, "--model", "test_resnet", "--weights", "none", "--top", "3")
    header, *lines = done.out.splitlines()
    assert header.split() == ["image", "class", "probability", "index"]
    assert len(lines) == 3 and lines[0].startswith(str(CAT)) and lines[1].startswith(" ")
    assert not any(line.split()[-4].isdigit() for line in lines)  # words, not numbers


def test_outputs_without_names_are_numbered(cli) -> None:
    args = ("--model", "cifar_resnet20", "--weights", "none", "--num-classes", "7", "--format", "json")
    (item,) = json.loads(cli("classify", CAT, *args).out)
    assert all(p["label"] == str(p["index"]) for p in item["predictions"])


def test_what_cannot_be_read(cli, tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(CAT.read_bytes()[:9000])
    for path, message in (
        (tmp_path / "none.jpg", f'no image "{tmp_path / "none.jpg"}".'),
        (tmp_path, f'no image "{tmp_path}". It is a folder.'),
        (text, f'cannot read image "{text}": it is in no format that Pillow knows.'),
        (cut, f'cannot read image "{cut}": image file is truncated'),
    ):
        done = cli("classify", CAT, path, "--model", "cifar_resnet20", "--weights", "none")
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"chanzoo: {message}")


def test_any_mode_of_picture(cli, tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "CMYK"):
        path = tmp_path / f"{mode}.tiff"
        Image.open(CAT).convert(mode).save(path)
        assert cli("classify", path, "--model", "cifar_resnet20", "--weights", "none").code == 0


def test_no_default_and_no_weights(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "WEIGHTS", {})
    done = cli("classify", CAT)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("chanzoo: no --model given, and no weights are part of this package.")
    done = cli("classify", CAT, "--model", "cifar_resnet32")
    assert done.code == 1
    assert done.err.startswith('chanzoo: no pretrained weights exist for "cifar_resnet32".')


def test_other_mistakes(cli, checkpoint: Path) -> None:
    for args, code, message in (
        (("--model", "cifar_resnet2O"), 2, 'no model "cifar_resnet2O". Did you mean cifar_resnet'),
        (("--model", "cifar_resnet20", "--checkpoint", "none.pth"), 2, 'no checkpoint "none.pth".'),
        (("--model", "cifar_resnet20", "--checkpoint", checkpoint), 2, f'"{checkpoint}" is no checkpoint of'),
        (("--model", "cifar_resnet20", "--device", "abacus"), 2, 'no device "abacus" here: '),
        (("--model", "test_vit", "--weights", "none", "--checkpoint", checkpoint), 2, "--checkpoint and --w"),
        (("--model", "resnet50.a1_in1k"), 4, "cannot get the weights of resnet50.a1_in1k: the Hub cannot"),
    ):
        done = cli("classify", CAT, *args)
        assert (done.code, done.out) == (code, ""), args
        assert done.err.startswith(f"chanzoo: {message}"), done.err


def test_embedded_weights_are_the_default(cli) -> None:
    done = cli("classify", CAT, "--format", "json")
    assert done.code == 0
    (item,) = json.loads(done.out)
    assert f"using {item['model']}, whose weights are part of the package." in done.err
    assert item["model"] in WEIGHTS


def test_a_named_weight_in_a_process_of_its_own(python) -> None:
    name = next(iter(WEIGHTS))
    done = python("-W", "error", "-m", "chanzoo", "classify", CAT, "--model", name, "--format", "json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)[0]["model"] == name
