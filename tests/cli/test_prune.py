"""``chanzoo prune``: what comes out, and that nothing is written unless all is well."""

from __future__ import annotations

import csv
import json
import shlex
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


def test_latency_is_a_target(cli, tmp_path: Path) -> None:
    """That a time below any network's is refused, and a generous one is met without cutting."""
    start = (
        "prune",
        "cifar_resnet20",
        "--weights",
        "none",
        "--method",
        "l1",
        "--no-plots",
        "-o",
        tmp_path / "o",
    )
    done = cli(*start, "--latency", "1us")
    assert done.code == 2 and "cannot reach" in done.err and "seconds" in done.err, done.err
    assert not (tmp_path / "o").exists()
    done = cli(*start, "--latency", "100s", "--format", "json")
    assert (
        done.code == 0 and json.loads(done.out)["params"]["pruned"] == json.loads(done.out)["params"]["full"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--macs", "0.001x"), "cannot reach"),
        (("--macs", "1.5x"), "expected a share such as 0.5x"),
        (("--macs", "half"), "expected a share such as 0.5x"),
        (("--macs", "0.5"), "expected a share such as 0.5x"),
        (("--params", "10ms"), "expected a share such as 0.5x"),
        (("--latency", "2.0G"), "or an amount such as 1.5us, 1.5ms, 1.5s"),
        (("--rates", "1.0"), "at least 0 and below 1"),
        (("--rates", "-0.1"), "expected"),
        (("--rates", "[0.5]*3"), "3 rates: expected 9"),
        (("--rates", "[0.5"), "cannot read"),
        (("--rates", "0.99"), "leaves none of 16"),
        (("--macs", "0.5x", "--method", "l2"), 'no method "l2"; there are: hrank, l1, random'),
        (("--macs", "0.5x", "--method", "hrank"), "pass --data DIR"),
        (("--macs", "0.5x", "--data", "nowhere"), 'no image folder "nowhere"'),
        (("--macs", "0.5x", "--data", "HERE"), "holds no images"),
        (("--macs", "0.5x", "--recalibrate", "1"), "expected 2 images or more"),
        (("--macs", "0.5x", "--crop-pct", "2"), "--crop-pct 2.0"),
        (("--macs", "0.5x", "--min-width", "17"), "cannot reach"),
        ((), "one of the arguments"),
    ],
)
def test_bad_input_writes_nothing(cli, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    given = [str(empty) if part == "HERE" else part for part in arguments]
    method = () if "--method" in given else ("--method", "l1")
    done = cli("prune", "cifar_resnet20", "--weights", "none", *method, *given, "-o", out, "--no-plots")
    assert done.code == 2 and message in done.err, done.err
    assert done.err.startswith("chanzoo: ") and "Traceback" not in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_network_without_channels_to_remove_names_the_layer(cli, tmp_path: Path) -> None:
    arguments = (
        "--weights",
        "none",
        "--method",
        "l1",
        "--macs",
        "0.5x",
        "-o",
        tmp_path / "out",
        "--no-plots",
    )
    done = cli("prune", "vit_tiny_patch16_224", *arguments)
    assert done.code == 2 and 'layer "blocks.0.norm1" (LayerNorm)' in done.err, done.err
    assert not (tmp_path / "out").exists()


def test_other_files_are_safe(cli, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    arguments = ("--weights", "none", "--method", "l1", "--macs", "0.5x", "--overwrite", "-o", tmp_path)
    done = cli("prune", "cifar_resnet20", *arguments)
    assert done.code == 2 and "holds what is not ours to replace: thesis.tex" in done.err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_wrong_number_of_classes_is_known_before_any_work(cli, both: Path, tmp_path: Path) -> None:
    arguments = ("--weights", "none", "--num-classes", "3", "--macs", "0.5x", "--data", both)
    done = cli("prune", "cifar_resnet20", *arguments, "-o", tmp_path / "out")
    assert done.code == 2 and "3 outputs" in done.err and not (tmp_path / "out").exists()


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
