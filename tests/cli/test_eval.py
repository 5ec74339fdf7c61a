"""``chanzoo eval``: the numbers of timm's validate.py, in one process and in two."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from chanzoo.weights import WEIGHTS

REPO = os.environ.get("TIMM_REPO", "")
needs_repo = pytest.mark.skipif(not REPO, reason="TIMM_REPO IS NOT SET: no script of timm's to compare with")
NAME = "ce_cifar_resnet20"
# timm's reader leaves the closing of files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def result(out: str) -> dict:
    """What follows ``--result`` in the output of timm's scripts."""
    return json.loads(out.partition("--result\n")[2])


def test_json(cli, images: Path, checkpoint: Path) -> None:
    args = ("--checkpoint", checkpoint, "--batch-size", "8", "--workers", "0")
    done = cli("eval", NAME, images, *args, "--format", "json")
    assert (done.code, done.err) == (0, "")
    data = json.loads(done.out)
    assert set(data) == {
        "model", "weights", "data", "split", "images", "top1", "top5", "top1_count", "top5_count", "loss",
        "batch_size", "device", "amp", "processes", "seconds",
    }  # fmt: skip
    assert (data["images"], data["processes"], data["amp"]) == (23, 1, None)
    assert data["top1"] == data["top1_count"] / 23 and data["top5"] == data["top5_count"] / 23
    table = cli("eval", NAME, images, *args).out
    assert f"top-1    {100 * data['top1']:.2f} % ({data['top1_count']})" in table
    assert "images   23 of" in table and f"loss     {data['loss']:.4f}" in table
    mixed = json.loads(
        cli("eval", NAME, images, *args, "--amp", "--amp-dtype", "bfloat16", "--format", "json").out
    )
    assert mixed["amp"] == "bfloat16" and abs(mixed["loss"] - data["loss"]) < 0.1


@needs_repo
def test_the_numbers_are_those_of_validate(cli, python, images: Path, checkpoint: Path) -> None:
    args = ("--checkpoint", checkpoint, "--workers", "0")
    ours = json.loads(cli("eval", NAME, images, *args, "--batch-size", "8", "--format", "json").out)
    script = ("-m", "chanzoo", "run", Path(REPO, "validate.py"), "--model", NAME, "--data-dir", images)
    done = python(*script, *args, "--split", "val", "-b", "8", "--device", "cpu", "--log-freq", "1")
    assert done.code == 0, done.err
    theirs = result(done.out)
    assert theirs["top1"] == pytest.approx(100 * ours["top1"], abs=1e-4)  # they round to 4 digits
    assert theirs["top5"] == pytest.approx(100 * ours["top5"], abs=1e-4)
    assert round(ours["loss"], 4) == float(re.findall(r"Loss:.*?\( *([\d.]+)\)", done.out + done.err)[-1])


def test_two_processes_count_what_one_counts(cli, python, images: Path, checkpoint: Path) -> None:
    args = ("eval", NAME, images, "--checkpoint", checkpoint, "--workers", "0", "--format", "json")
    alone = json.loads(cli(*args).out)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "chanzoo")
    done = python(*launcher, *args)
    assert done.code == 0, done.err
    together = json.loads(done.out)  # one result, not two
    assert together.pop("processes") == 2 and alone.pop("processes") == 1
    assert together.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-6)
    assert together | {"seconds": 0} == alone | {"seconds": 0}


def test_what_is_no_image_folder(cli, tmp_path: Path, images: Path) -> None:
    empty = tmp_path / "empty"
    (empty / "val" / "class0").mkdir(parents=True)
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (8, 8)).save(flat / "a.png")
    damaged = tmp_path / "val.tar"
    damaged.write_text("no archive")
    three = tmp_path / "three"
    for name in "abc":
        (three / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(three / name / "a.png")
    for folder, options, message in (
        (tmp_path / "none", (), f'no image folder "{tmp_path / "none"}".'),
        (flat / "a.png", (), f'"{flat / "a.png"}" is neither a folder nor a tar file of images.'),
        (damaged, (), f'cannot read images from "{damaged}": '),
        (empty, (), f'"{empty}" holds no images.\n  expected  one folder per class'),
        (flat, (), f'"{flat}" holds images outside class folders; expected one folder per class.'),
        (three, (), f'"{three}" has 3 classes and the network 10 outputs.\n  found  a, b, c\n'),
        (images, ("--split", "test"), f'"{images}" has no split "test"; it has: val'),
        (images, ("--split", "train"), f'"{images}" has no split "train"; it has: val'),
    ):
        done = cli("eval", "cifar_resnet20", folder, "--weights", "none", "--workers", "0", *options)
        assert (done.code, done.out) == (2, ""), folder
        assert done.err.startswith(f"chanzoo: {message}"), done.err
    args = ("cifar_resnet20", three, "--weights", "none", "--workers", "0", "--num-classes", "3")
    assert cli("eval", *args).code == 0


def test_outputs_that_are_not_finite(cli, images: Path, checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    state["fc.bias"][0] = float("nan")
    torch.save({"state_dict": state}, tmp_path / "nan.pth")
    args = ("--checkpoint", tmp_path / "nan.pth", "--workers", "0")
    done = cli("eval", NAME, images, *args)
    assert (done.code, done.out) == (1, "")
    assert done.err == "chanzoo: the network's outputs are not finite; there is no accuracy to report.\n"
    assert cli("eval", NAME, images, *args, "--amp").err.endswith("--amp-dtype bfloat16.\n")


def test_pretrained_weights(cli, images: Path) -> None:
    name = next(iter(WEIGHTS))
    done = cli("eval", name, images, "--workers", "0", "--format", "json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["weights"] == "pretrained"
