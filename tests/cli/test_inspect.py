"""``chanzoo inspect``: what is written, and that nothing is lost or half written."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

FILES = {
    *("summary.json", "sites.csv", "channels.csv", "ablation.csv", "gains.csv"),
    *("sites.png", "ablation.png", "gains.png"),
}
# timm's reader leaves the closing of files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
SMALL = ("--weights", "none", "--images", "12", "--seeds", "2")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_networks(cli, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    names = ("cifar_resnet20", "--against", "ce_cifar_resnet20")
    done = cli("inspect", *names, "--channels", images, *SMALL, "-o", out, "--format", "json")
    assert done.code == 0, done.err
    assert done.err == f"chanzoo: tables and pictures are in {out}\n"
    data = json.loads(done.out)
    assert data == json.loads((out / "summary.json").read_text())
    assert {path.name for path in out.iterdir()} == FILES
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    for path in out.glob("*.png"):
        assert Image.open(path).size == (960, 600)
    for network in data["networks"]:
        assert (network["images"], network["sites"], network["channels"]) == (12, 19, 688)
        assert [point["ratio"] for point in network["ablation"]] == [k / 10 for k in range(10)]
    sites = rows(out / "sites.csv")
    assert len(sites) == 38 and sum(int(row["channels"]) for row in sites) == 2 * 688
    assert len(rows(out / "channels.csv")) == 2 * 688
    assert len(rows(out / "ablation.csv")) == 2 * 2 * 10
    gains = rows(out / "gains.csv")
    assert {row["effective"] == "" for row in gains if row["model"] == "cifar_resnet20"} == {True}
    assert sum(row["effective"] != "" for row in gains) == 4 * 16 + 3 * 32  # stem, two stages

    assert cli("inspect", *names, "--channels", images, *SMALL, "-o", out).err.startswith(
        f'chanzoo: "{out}" is not empty.\n  Nothing was written.   Replace it: --overwrite'
    )
    one = ("cifar_resnet20", "--channels", images, *SMALL, "--sites", "layer3.2.*", "--branch", "--no-plots")
    done = cli("inspect", *one, "-o", out, "--overwrite")
    assert done.code == 0, done.err
    assert {path.name for path in out.iterdir()} == {name for name in FILES if not name.endswith("png")}
    assert [row["site"] for row in rows(out / "sites.csv")] == ["layer3.2.act1", "layer3.2.act2"]
    assert done.out.splitlines()[1].split()[:3] == ["cifar_resnet20", "2", "128"]


def test_mistakes_come_before_work(
    cli, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    file = tmp_path / "file"
    file.touch()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    base = ("--channels", images, *SMALL)
    for args, message in (
        (("cifar_resnet20", *base, "-o", file), f'"{file}" is a file; name a folder.'),
        (
            ("cifar_resnet20", *base, "-o", other, "--overwrite"),
            f'"{other}" holds what is not ours to replace: thesis.tex',
        ),
        (
            ("cifar_resnet20", *base, "-o", out, "--sites", "x*"),
            'no site matches "x*".\n  sites: act1, layer1',
        ),
        (
            ("cifar_resnet20", *base, "-o", out, "--against", "cifar_resnet20"),
            "--against cifar_resnet20 is the",
        ),
        (("cifar_resnet20", *base, "-o", out, "--against", "cifar_resnet2O"), 'no model "cifar_resnet2O".'),
        (
            ("test_convnext", *base, "-o", out, "--num-classes", "10"),
            "ConvNeXt has no activation that a norm feeds: there are no channels to inspect.\n",
        ),
        (
            ("cifar_resnet20", "--channels", tmp_path / "none", "-o", out),
            f'no image folder "{tmp_path / "none"}".',
        ),
    ):
        done = cli("inspect", *args)
        assert (done.code, done.out) == (2, ""), args
        assert done.err.startswith(f"chanzoo: {message}"), done.err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = cli("inspect", "cifar_resnet20", *base, "-o", out)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("chanzoo: pictures need matplotlib, which is not installed.\n")
    assert 'pip install "chanzoo[plot]"' in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"file", "other"}
    assert (other / "thesis.tex").exists()
