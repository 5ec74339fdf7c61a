"""``chanzoo ls``, ``info``, ``doctor`` and ``recipe``: what there is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import timm

import chanzoo
from chanzoo import store, weights
from chanzoo.cli import common
from chanzoo.recipes.table import RECIPES, RUNS
from chanzoo.weights import Weight

ROW = Weight(
    name="cifar_resnet20.t1_c10j", dataset="c10j", recipe="c10j_pad4_40e", command="python train.py", seed=3,
    hours=1.5, metrics={"top1": 0.9123, "top5": 0.99}, params=269722, macs=40813184, file_bytes=5, sha256="",
    licence="apache-2.0", paper="arXiv:1512.03385",
)  # fmt: skip


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Weight:
    """The only weight, with a file of five bytes that is the published one."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"bytes")
    made = Weight(**{**vars(ROW), "sha256": hashlib.sha256(b"bytes").hexdigest()})
    monkeypatch.setattr(weights, "WEIGHTS", {made.name: made})
    monkeypatch.setattr(store, "embedded_path", lambda name: file if name == made.name else tmp_path / "none")
    return made


@pytest.mark.usefixtures("row")
def test_ls(cli) -> None:
    done = cli("ls")
    assert (done.code, done.err) == (0, "")
    header, *lines = done.out.splitlines()
    assert header.split() == ["name", "data", "top-1", "params", "MACs", "file"]
    names = [line.split()[0] for line in lines]
    assert [name.partition(".")[0] for name in names] == chanzoo.list_models()
    assert "resnet50" not in names
    found = next(line.split() for line in lines if line.startswith("cifar_resnet20."))
    assert found == [ROW.name, "c10j", "91.23", "%", "269.7", "k", "40.81", "M", "embedded"]
    assert next(line.split() for line in lines if line.startswith("ce_resnet50")) == ["ce_resnet50", "none"]


@pytest.mark.usefixtures("row")
def test_ls_json_globs_and_cost(cli) -> None:
    (item,) = json.loads(cli("ls", "--pretrained", "--format", "json").out)
    assert item == {
        "name": ROW.name, "arch": "cifar_resnet20", "tag": "t1_c10j", "dataset": "c10j", "top1": 0.9123,
        "params": 269722, "macs": 40813184, "where": "embedded",
    }  # fmt: skip
    assert len(json.loads(cli("ls", "cifar_resnet20*", "--format", "json").out)) == 1
    (item,) = json.loads(cli("ls", "cifar_resnet32", "--cost", "--format", "json").out)
    assert item["params"] == 464154 and item["macs"] > 6e7 and item["where"] == "none"
    done = cli("ls", "ce_*", "--pretrained", "--format", "json")
    assert (done.code, json.loads(done.out)) == (0, [])
    assert done.err == "chanzoo: none of these has weights yet.\n"


def test_ls_of_nothing(cli) -> None:
    done = cli("ls", "cifar_resnet2O")
    assert (done.code, done.out) == (2, "")
    assert 'no network of ours is called "cifar_resnet2O". Did you mean cifar_resnet' in done.err


def test_where(row: Weight, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert common.where(row) == "embedded"
    store.embedded_path(row.name).unlink()
    assert common.where(row) == "none"
    assert common.where(Weight(**{**vars(row), "revision": "a" * 40})) == "hub"
    (tmp_path / f"{row.name}.safetensors").touch()
    monkeypatch.setenv("CHANZOO_WEIGHTS", str(tmp_path))
    assert common.where(row) == "local"


def test_info_of_a_network_of_timm(cli) -> None:
    data = json.loads(cli("info", "resnet18.tv_in1k", "--format", "json").out)
    assert (data["params"], data["macs"], data["param_bytes"]) == (11689512, 1814073344, 46758048)
    assert (data["tag"], data["licence"], data["input_size"]) == ("tv_in1k", "bsd-3-clause", [3, 224, 224])
    assert data["source"] == "timm/resnet18.tv_in1k"
    done = cli("info", "ce_cifar_resnet20")
    assert done.code == 0
    assert "params     271.9 k (1.087 MB in 32-bit floats)" in done.out
    assert "input      3×32×32, crop 1.0, bilinear" in done.out


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "ce_mobilenetv2", "levit_128s"])
def test_info_of_other_families(cli, name: str) -> None:
    data = json.loads(cli("info", name, "--format", "json").out)
    assert data["params"] == sum(p.numel() for p in timm.create_model(name).parameters())
    assert data["macs"] > 1e7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", 'no model "resnet5O". Did you mean resnet50?   See all: python -c "import timm; '),
        ("CE_ResNet50", 'no model "CE_ResNet50". Did you mean ce_resnet50?   See all: chanzoo ls "ce_*"'),
        ("qqqqqqqq", 'no model "qqqqqqqq".   See all: chanzoo ls'),
        ("resnet18.a9_in1k", 'no weights "resnet18.a9_in1k". Did you mean resnet18.a'),
    ],
)
def test_unknown_names(cli, name: str, message: str) -> None:
    done = cli("info", name)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"chanzoo: {message}")


@pytest.mark.usefixtures("row")
def test_doctor(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = cli("doctor", "--format", "json")
    data = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert set(data) == {
        "versions", "timm_file", "devices", "hub_cache", "hub_cache_bytes", "environment", "autoload",
        "weights",
    }  # fmt: skip
    assert set(data["versions"]) == {
        "chanzoo", "python", "torch", "torchvision", "timm", "huggingface-hub", "safetensors",
    }  # fmt: skip
    assert (data["versions"]["timm"], data["timm_file"]) == (timm.__version__, timm.__file__)
    assert data["environment"] == {"HF_HUB_OFFLINE": "1", "CHANZOO_WEIGHTS": None}
    assert data["devices"][0].startswith("cpu (")
    assert [(w["name"], w["ok"]) for w in data["weights"]] == [(ROW.name, True)]
    assert "embedded         1 weight files, 1 ok" in cli("doctor").out


def test_doctor_finds_a_damaged_file(cli, row: Weight) -> None:
    store.embedded_path(row.name).write_bytes(b"bytez")
    done = cli("doctor")
    assert done.code == 3
    assert f"BAD  {row.name}" in done.out
    assert f"is not the published file of {row.name}\n" in done.err
    assert f"  expected  sha256 {row.sha256}, {row.file_bytes:,} bytes\n  found     sha256 " in done.err


def test_the_real_embedded_weights_are_whole(cli) -> None:
    assert cli("doctor").code == 0


def test_recipe_ls(cli) -> None:
    data = json.loads(cli("recipe", "ls", "--format", "json").out)
    assert [item["name"] for item in data] == list(RECIPES)
    assert set(data[0]) == {"name", "dataset", "title", "runs"}
    assert all(name in cli("recipe", "ls").out for name in RECIPES)
    wanted = json.loads(cli("recipe", "ls", "--wanted", "--format", "json").out)
    assert [item["weight"] for item in wanted] == [r.weight for r in RUNS if r.weight not in weights.WEIGHTS]
    assert cli("recipe", "ls", "--wanted").out.split()[:5] == ["weight", "recipe", "seed", "on", "cost"]


def test_recipe_show_is_the_file(cli) -> None:
    name = next(iter(RECIPES))
    data = json.loads(cli("recipe", "show", name, "--format", "json").out)
    done = cli("recipe", "show", name)
    assert done.out == data["text"] == Path(data["file"]).read_text(encoding="utf-8")
    assert all(run["weight"] in done.err and "--data-dir DATA_DIR" in run["command"] for run in data["runs"])
    done = cli("recipe", "show", "c10j_pad4_4e")
    assert (done.code, done.err) == (
        2,
        'chanzoo: no recipe "c10j_pad4_4e". Did you mean c10j_pad4_40e?   See all: chanzoo recipe ls\n',
    )


def test_recipe_check(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIMM_REPO", raising=False)
    for name in RECIPES:
        done = cli("recipe", "check", name)
        assert (done.code, done.out) == (0, "")
    mine = tmp_path / "mine.yaml"
    mine.write_text("lr: 0.1\nweight_dacay: 1.0\nqqqqqqqq: 3\n")
    done = cli("recipe", "check", mine)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "chanzoo: recipe mine.yaml has 2 keys the train script does not know\n"
        "  line 2  weight_dacay   did you mean weight_decay?\n"
        "  line 3  qqqqqqqq\n"
    )
    done = cli("recipe", "check", mine, "--format", "json")
    assert done.code == 2
    assert json.loads(done.out)["problems"][0] == {
        "line": 2, "key": "weight_dacay", "suggestion": "weight_decay",
    }  # fmt: skip
    assert cli("recipe", "check", tmp_path / "none.yaml").err.startswith('chanzoo: no recipe file "')
    assert cli("recipe", "check", mine, "--script", "none.py").err == 'chanzoo: no script "none.py".\n'


def test_human_numbers() -> None:
    assert [common.human_count(n) for n in (None, 7, 1500, 269722, 4_089_000_000)] == [
        "", "7", "1.5 k", "269.7 k", "4.089 G",
    ]  # fmt: skip
    assert [common.human_bytes(n) for n in (999, 1000, 46_760_000)] == ["999 B", "1 kB", "46.76 MB"]
