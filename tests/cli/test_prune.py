"""``chanzoo prune``: what comes out; what is refused is in test_prune_refused.py."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import chanzoo
from chanzoo.recipes.check import script_options

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
NETWORK = {"config.json", "model.safetensors"}
TABLES = {*NETWORK, "report.json", "widths.csv", "finetune.txt"}
MEASURED = {*TABLES, "ranks.csv"}
PICTURES = {"widths.png", "rank_histograms.png", "rank_stability.png", "rank_stability.csv"}
L1 = ("prune", "cifar_resnet20", "--weights", "none", "--method", "l1")
QUICK = ("--weights", "none", "--images", "8", "--recalibrate", "8", "--batch-size", "4")


def load(folder: Path) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.fixture
def both(images: Path, tmp_path: Path) -> Path:
    """Images to learn from and images to be judged by; the same here."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "val"):
        (folder / split).symlink_to(images / "val")
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_half_by_rank(cli, both: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    arguments = ("cifar_resnet20", "--macs", "0.5x", "--data", both, *QUICK, "-o", out)
    done = cli("prune", *arguments, "--format", "json")
    assert done.code == 0, done.err
    assert {path.name for path in out.iterdir()} == MEASURED | PICTURES
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    report = json.loads(done.out)
    assert report == json.loads((out / "report.json").read_text())
    model = load(out)
    assert chanzoo.count_macs(model, (3, 32, 32)) == report["macs"]["pruned"]
    assert 0.47 < report["macs"]["pruned"] / report["macs"]["full"] <= 0.5
    assert chanzoo.count_params(model) == report["params"]["pruned"]
    assert set(report["top1"]) == {"full", "sliced", "recalibrated"}
    assert report["images"] == 8 and report["recalibrated_layers"] == 19
    whole = [group for group in report["groups"] if group["whole_because"]]
    assert [group["name"] for group in whole] == ["conv1"] and whole[0]["kept"] == 16
    assert [int(row["kept"]) for row in rows(out / "widths.csv")] == [g["kept"] for g in report["groups"]]
    assert {row["images"] for row in rows(out / "rank_stability.csv")} == {"4", "8"}
    for path in out.glob("*.png"):
        assert min(Image.open(path).size) >= 400
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "narrow_cnn" and config["model_args"]["base"] == "cifar_resnet20"
    assert config["chanzoo"]["base_model"] == "cifar_resnet20" and config["chanzoo"]["method"] == "hrank"

    again = cli("prune", *arguments)
    assert again.code == 2 and "is not empty" in again.err and "--overwrite" in again.err
    assert cli("prune", *arguments, "--overwrite", "--no-plots", "--seed", "1").code == 0
    assert {path.name for path in out.iterdir()} == MEASURED


def test_fine_tuning_command_is_one_of_the_train_script(cli, both: Path, tmp_path: Path) -> None:
    import os

    out = tmp_path / "my out"
    done = cli("prune", "cifar_resnet20", "--macs", "0.5x", "--data", both, *QUICK, "-o", out, "--no-plots")
    command = shlex.split((out / "finetune.txt").read_text())
    assert done.err.rstrip().endswith((out / "finetune.txt").read_text().rstrip())
    assert command[command.index("--model") + 1] == f"local-dir:{out}" and "--pretrained" in command
    if "TIMM_REPO" not in os.environ:
        pytest.skip("TIMM_REPO is not set: the options were not compared with timm's train.py")
    known = script_options(Path(os.environ["TIMM_REPO"], "train.py"))
    given = {part[2:].replace("-", "_") for part in command if part.startswith("--")}
    assert given <= known


@pytest.mark.parametrize(
    ("base", "name"), [("cifar_resnet56", "hrank_cifar_resnet56"), ("cifar_vgg16_bn", "hrank_cifar_vgg16_bn")]
)
def test_named_networks_keep_their_name(cli, tmp_path: Path, base: str, name: str) -> None:
    out = tmp_path / "out"
    done = cli(
        "prune", base, "--weights", "none", "--method", "l1", "--rates", "0.5", "-o", out, "--no-plots"
    )
    assert done.code == 0, done.err
    assert {path.name for path in out.iterdir()} == TABLES
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == name
    assert all(isinstance(width, int) for width in config["model_args"]["widths"].values())
    report = json.loads((out / "report.json").read_text())
    assert chanzoo.count_macs(load(out), (3, 32, 32)) == report["macs"]["pruned"]


def test_a_folder_can_be_pruned_again(cli, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    options = ("--method", "l1", "--no-plots")
    start = ("cifar_resnet20", "--weights", "none", "--num-classes", "7")
    assert cli("prune", *start, *options, "--macs", "0.6x", "-o", first).code == 0
    done = cli("prune", first, *options, "--macs", "0.5x", "-o", second)
    assert done.code == 0, done.err
    before, after = load(first), load(second)
    assert after.num_classes == 7
    ratio = chanzoo.count_macs(after, (3, 32, 32)) / chanzoo.count_macs(before, (3, 32, 32))
    assert 0.45 < ratio <= 0.5
    config = json.loads((second / "config.json").read_text())
    assert config["architecture"] == "narrow_cnn" and config["model_args"]["base"] == "cifar_resnet20"


def test_same_seed_same_file(cli, both: Path, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        out = tmp_path / name
        arguments = ("cifar_resnet20", "--macs", "0.5x", "--data", both, *QUICK, "-o", out, "--no-plots")
        assert cli("prune", *arguments).code == 0
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_rates_from_a_file(cli, tmp_path: Path) -> None:
    rates, out = tmp_path / "rates.json", tmp_path / "out"
    rates.write_text('{"layer1.*": 0.5}')
    done = cli(
        "prune", "cifar_resnet20", "--weights", "none", "--method", "random", "--rates", rates, "-o", out,
        "--no-plots", "--format", "json",
    )  # fmt: skip
    assert done.code == 0, done.err
    kept = {group["name"]: group["kept"] for group in json.loads(done.out)["groups"]}
    assert kept["layer1.0.conv1"] == 8 and kept["layer2.0.conv1"] == 32


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Times that the search and the report find, instead of this machine's; the full network takes 2 ms."""
    times = {"search": 0.001, "report": 0.001}

    def measure(models: Mapping[str, torch.nn.Module], _size: object, **options: object) -> dict[str, float]:
        other = times["search" if "rounds" in options else "report"]
        return {name: 0.002 if network is models["full"] else other for name, network in models.items()}

    monkeypatch.setattr("chanzoo.measure.latency.measure_latency", measure)
    return times


@pytest.mark.parametrize(
    ("asked", "seconds", "reached"),
    [("0.7x", 0.0012, True), ("0.7x", 0.0016, False), ("1.5ms", 0.0016, False)],
)
def test_latency_that_a_second_measurement_does_not_confirm_is_told(
    cli, tmp_path: Path, clock: dict[str, float], asked: str, seconds: float, reached: bool
) -> None:
    clock["report"] = seconds
    done = cli(*L1, "--latency", asked, "-o", tmp_path / "out", "--format", "json")
    report = json.loads(done.out)
    assert done.code == 0 and report["reached"] is reached and report["target"] == f"--latency {asked}"
    assert (f"chanzoo: --latency {asked} was not reached" in done.err) is not reached
    found = "0.800x of the full network's time" if asked.endswith("x") else "takes 1.6 ms"
    assert (found in done.err) is not reached


def test_each_layer_keeps_its_own_as_the_authors_have_it(cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rates = ("--compress-rate", "[0.]+[0.18]*29", "--align", "own")
    done = cli("prune", "cifar_resnet56", "--weights", "none", "--method", "l1", *rates, "-o", out)
    assert done.code == 0, done.err
    assert {path.name for path in out.iterdir()} == TABLES | {"widths.png"}
    report = json.loads((out / "report.json").read_text())
    kept = {row["group"]: int(row["kept"]) for row in rows(out / "widths.csv")}
    assert kept["layer1.0.conv1"] == 13 and kept["layer3.0.conv2"] == 64 and len(kept) == 55
    assert report["align"] == "own" and chanzoo.count_params(load(out)) == report["params"]["pruned"]
    assert re.search(r"^channels +\d+ +\d+ +0\.\d+$", done.out, re.MULTILINE)


def test_a_chart_that_fails_leaves_nothing(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chanzoo.cli.pruned.table", lambda _report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli(*L1, "--macs", "0.5x", "-o", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_config_holds_the_command_that_was_run(cli, both: Path, tmp_path: Path) -> None:
    out = tmp_path / "my out"
    options = ("--macs", "0.5x", "--round-to", "4", "--seed", "3", "--crop-pct", "0.9", *QUICK, "--no-plots")
    done = cli("prune", "cifar_resnet20", *options, "--data", both, "-o", out, "--format", "json")
    assert done.code == 0, done.err
    command = shlex.split(json.loads((out / "config.json").read_text())["chanzoo"]["command"])
    assert command[:3] == ["chanzoo", "prune", "cifar_resnet20"] and str(tmp_path) not in " ".join(command)
    assert {"--data DATA", "--output OUT", "--seed 3", "--crop-pct 0.9"} <= set(
        map(" ".join, pairwise(command))
    )
    again = [
        str(both) if part == "DATA" else str(tmp_path / "b") if part == "OUT" else part for part in command
    ]
    assert cli(*again[1:]).code == 0
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    report = json.loads(done.out)
    assert report["recalibrated_images"] == 8 and report["batch_size"] == 4 and report["crop_pct"] == 0.9
    assert (report["split"], report["val_split"], report["round_to"]) == ("train", "val", 4)
    assert report["reached"] is True and report["device"] == "cpu"


def test_places_on_this_machine_stay_private(cli, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli(*L1, "--macs", "0.6x", "--no-plots", "-o", first).code == 0
    rates = tmp_path / "rates.json"
    rates.write_text("0.5".join(('{"*": ', "}")))
    done = cli("prune", f"local-dir:{first}", "--method", "l1", "--rates", rates, "--no-plots", "-o", second)
    assert done.code == 0, done.err
    about = json.loads((second / "config.json").read_text())["chanzoo"]
    command = "chanzoo prune FOLDER --output OUT --method l1 --rates RATES.json --no-plots"
    assert about == {"method": "l1", "command": command}


def test_fine_tuning_is_judged_by_the_same_images(cli, images: Path, tmp_path: Path) -> None:
    """That timm's own choice, where there is no folder called validation or val, is not left to chance."""
    data = tmp_path / "data"
    data.mkdir()
    for split in ("learn", "judge"):
        (data / split).symlink_to(images / "val")
    options = ("--split", "learn", "--val-split", "judge", "--data", data, *QUICK, "--no-plots")
    done = cli("prune", "cifar_resnet20", "--macs", "0.5x", *options, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    command = shlex.split((tmp_path / "out" / "finetune.txt").read_text())
    assert command[command.index("--train-split") + 1] == "learn"
    assert command[command.index("--val-split") + 1] == "judge"


def test_wrong_number_of_classes_is_known_before_any_work(cli, both: Path, tmp_path: Path) -> None:
    arguments = ("--weights", "none", "--num-classes", "3", "--macs", "0.5x", "--data", both)
    done = cli("prune", "cifar_resnet20", *arguments, "-o", tmp_path / "out")
    assert done.code == 2 and "3 outputs" in done.err and not (tmp_path / "out").exists()
    assert "Nothing was pruned." in done.err and "measured" not in done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet50", "mobilenetv2_100", "densenet121", "efficientnet_b0", "convnext_atto", "ce_resnet50"],
)
def test_families_come_back_by_name(cli, tmp_path: Path, name: str) -> None:
    """Every one is compared with the full network and with what comes back, bit by bit, before it is kept."""
    out = tmp_path / "out"
    options = ("--weights", "none", "--num-classes", "5", "--method", "l1", "--macs", "0.5x", "--no-plots")
    done = cli("prune", name, *options, "-o", out, "--format", "json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    model = load(out)
    size = model.pretrained_cfg["input_size"]
    assert chanzoo.count_macs(model, size) == report["macs"]["pruned"] <= report["macs"]["full"] / 2
    features = timm.create_model(f"local-dir:{out}", pretrained=True, features_only=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert features.feature_info.channels() == [maps.shape[1] for maps in features(x)]
    model.reset_classifier(2)
    assert model(x).shape == (1, 2)
