"""``chanzoo condense``, ``inspect --reuse`` and ``recipe steps``: what comes out, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image

import chanzoo
from chanzoo.layers.condensing import condense, learned_layers
from chanzoo.measure.reuse import measure_reuse

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
ARGS = {"depths": [1, 1, 1], "num_classes": 10}
FILES = {"config.json", "model.safetensors", "report.json"}


def network(stage: int = 7) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("condensenetv2_cifar110", **ARGS).eval()
    for layer in learned_layers(model).values():
        layer.condense_to(stage)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network as timm saves it."""
    folder = tmp_path_factory.mktemp("saved") / "net"
    timm.models.save_for_hf(network(), folder, safe_serialization=True)
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What timm's train script leaves: a finished checkpoint, and an early one."""
    folder = tmp_path / "run"
    folder.mkdir()
    options = {"model": "condensenetv2_cifar110", "model_kwargs": {"depths": [1, 1, 1], "total_steps": 9}}
    (folder / "args.yaml").write_text(yaml.safe_dump(options))
    (folder / "summary.csv").write_text("epoch,eval_top1\n7,50.0\n")
    for name, stage in (("last.pth.tar", 7), ("checkpoint-0.pth.tar", 3)):
        torch.save({"state_dict": network(stage).state_dict(), "epoch": stage}, folder / name)
    return folder


def load(folder: Path) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def test_a_saved_network(cli, saved: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    done = cli("condense", saved, "-o", out, "--data", images, "--format", "json")
    assert done.code == 0, done.err
    assert {path.name for path in out.iterdir()} == FILES
    report = json.loads(done.out)
    assert report == json.loads((out / "report.json").read_text())
    model, full = load(out), network()
    image = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(image), full(image), rtol=1e-4, atol=1e-4)
        assert torch.equal(model(image), condense(full)(image))
    for key, measure in (
        ("params", chanzoo.count_params),
        ("macs", lambda m: chanzoo.count_macs(m, (3, 32, 32))),
    ):
        assert report[key] == {"training": measure(full), "condensed": measure(model)}
    assert report["bytes"]["condensed"] < report["bytes"]["training"]
    assert report["difference"] < 1e-5 and report["layers"] == 6
    assert set(report["latency_ms"]) == {"training", "condensed", "folded"}
    assert report["top1"]["training"] == report["top1"]["condensed"]
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "condensenetv2_cifar110" and config["model_args"]["condensed"] is True
    assert config["chanzoo"] == {"method": "condensed", "command": "chanzoo condense CHECKPOINT -o FOLDER"}

    again = cli("condense", saved, "-o", out)
    assert again.code == 2 and "is not empty" in again.err
    assert cli("condense", saved, "-o", out, "--overwrite").code == 0
    twice = cli("condense", out, "-o", tmp_path / "twice")
    assert twice.code == 2 and "is the condensed form already" in twice.err


@pytest.mark.parametrize("which", ["", "last.pth.tar"])
def test_a_training_run(cli, run_folder: Path, tmp_path: Path, which: str) -> None:
    out = tmp_path / "out"
    done = cli("condense", run_folder / which, "-o", out)
    assert done.code == 0, done.err
    assert "0.0" not in done.out.split("params")[0] and "latency_ms, folded" in done.out
    assert load(out).condensed
    assert {path.name for path in out.iterdir()} == FILES | {"recipe.yaml", "summary.csv"}  # of the training
    assert (out / "summary.csv").read_bytes() == (run_folder / "summary.csv").read_bytes()
    about = json.loads((out / "config.json").read_text())["chanzoo"]
    assert "train.py" in about["command"] and about["command"].endswith(
        "chanzoo condense CHECKPOINT -o FOLDER"
    )


def test_a_named_network_with_a_checkpoint(cli, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("condensenet_cifar50").eval()
    for layer in learned_layers(model).values():
        layer.condense_to(layer.condensation_factor - 1)
    torch.save(model.state_dict(), tmp_path / "net.pth")
    done = cli(
        "condense", "condensenet_cifar50", "--checkpoint", tmp_path / "net.pth", "-o", tmp_path / "out"
    )
    assert done.code == 0, done.err
    about = json.loads((tmp_path / "out" / "config.json").read_text())["chanzoo"]
    command = "chanzoo condense condensenet_cifar50 --checkpoint CHECKPOINT -o FOLDER"
    assert about == {"method": "condensed", "command": command}


def test_an_unfinished_network_is_refused(cli, run_folder: Path, tmp_path: Path) -> None:
    done = cli("condense", run_folder / "checkpoint-0.pth.tar", "-o", tmp_path / "out")
    assert done.code == 2
    assert (
        'layer "stage1.0.conv1" cannot be condensed: group 0 of 8 has 10 of 16 in_channels left' in done.err
    )
    assert "expected  2 (1 of 8), after stage 7" in done.err
    assert "\n  Nothing was written.   Train it to the end with --model-kwargs total_steps=N" in done.err
    assert not (tmp_path / "out").exists()


def test_a_norm_that_cannot_be_taken_apart(cli, tmp_path: Path) -> None:
    model = timm.create_model("condensenetv2_cifar110", **ARGS, norm_layer="groupnorm1")
    for layer in learned_layers(model).values():
        layer.condense_to(7)
    timm.models.save_for_hf(
        model, tmp_path / "net", model_args={**ARGS, "norm_layer": "groupnorm1"}, safe_serialization=True
    )
    done = cli("condense", tmp_path / "net", "-o", tmp_path / "out")
    assert done.code == 2 and "its norm is a GroupNorm1" in done.err
    assert done.err.rstrip().endswith("Nothing was written.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cifar_resnet20", "--weights", "none"), "CifarResNet has no layer that learns its connections"),
        (("condensenetv2_cifar11",), "Did you mean condensenetv2_cifar110?"),
        (("condensenetv2_cifar146",), "no pretrained weights"),
        (("condensenetv2_a", "--weights", "none", "--data", "nowhere"), 'no image folder "nowhere"'),
    ],
)
def test_what_cannot_be_condensed(cli, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = cli("condense", *arguments, "-o", tmp_path / "out")
    assert done.code != 0 and message in done.err
    assert not (tmp_path / "out").exists()


def test_a_lone_checkpoint_and_folders_that_are_not_ours(cli, saved: Path, tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "net.pth")
    done = cli("condense", tmp_path / "net.pth", "-o", tmp_path / "out")
    assert done.code == 2 and "chanzoo condense ARCH --checkpoint" in done.err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    done = cli("condense", saved, "-o", tmp_path / "mine", "--overwrite")
    assert done.code == 2 and "not ours to replace: thesis.tex" in done.err
    assert cli("condense", saved, "-o", saved, "--overwrite").code == 2


def test_which_features_are_reused(cli, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    names = ("condensenet_cifar50", "--against", "condensenetv2_cifar110")
    done = cli("inspect", *names, "--reuse", "--weights", "none", "-o", out, "--format", "json")
    assert done.code == 0, done.err
    assert {path.name for path in out.iterdir()} == {"reuse.csv", "reuse.png"}
    assert min(Image.open(out / "reuse.png").size) > 400
    with (out / "reuse.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 * 25 // 2 + 36 * 37 // 2
    assert {float(row["refreshes"]) > 0 for row in rows if row["model"] == "condensenetv2_cifar110"} == {True}
    assert {float(row["refreshes"]) for row in rows if row["model"] == "condensenet_cifar50"} == {0}
    done = cli("inspect", "cifar_resnet20", "--reuse", "--weights", "none", "-o", tmp_path / "no")
    assert done.code == 2 and "this is a CifarResNet" in done.err


def test_both_forms_reuse_the_same() -> None:
    full = network()
    for one, other in zip(measure_reuse(full), measure_reuse(condense(full)), strict=True):
        assert (one.layer, one.source) == (other.layer, other.source)
        assert one.reads == pytest.approx(other.reads, rel=1e-5, abs=1e-8)
        assert one.refreshes == pytest.approx(other.refreshes, rel=1e-5, abs=1e-8)
    first = measure_reuse(full)[0]
    weight = full.stage1[0].conv1.masked_weight()
    assert first.reads == pytest.approx(weight.abs().mean().item(), rel=1e-5)


def test_steps_of_recipes(cli, images: Path, tmp_path: Path) -> None:
    done = cli("recipe", "steps", "c10j_pad4_24e")
    assert (done.code, done.out.strip()) == (0, "9360")
    assert "--model-kwargs total_steps=9360" in done.err
    done = cli(
        "recipe", "steps", "c10j_pad4_24e", "--processes", "8", "--batch-size", "64", "--format", "json"
    )
    assert json.loads(done.out)["total_steps"] == 24 * (6250 // 64)
    mine = tmp_path / "mine.yaml"
    mine.write_text("epochs: 3\nbatch_size: 4\nwarmup_epochs: 2\nwarmup_prefix: true\ntrain_split: val\n")
    assert cli("recipe", "steps", mine, "--data", images).out.strip() == str(5 * (23 // 4))
    for text, epochs in (
        ("lr_cycle_limit: 2", 6),
        ("sched: step\ncooldown_epochs: 5", 3),
        ("cooldown_epochs: 5", 8),
    ):
        mine.write_text(f"epochs: 3\nbatch_size: 4\nwarmup_epochs: 0\ntrain_split: val\n{text}\n")
        assert cli("recipe", "steps", mine, "--data", images).out.strip() == str(epochs * (23 // 4))
    mine.write_text("aug_repeats: 3\n")
    assert "cannot be counted with aug_repeats" in cli("recipe", "steps", mine, "--data", images).err
    mine.write_text("sched: cosin\nlr_cycle_limit: many\n")
    assert "no schedule of these options: Unknown" in cli("recipe", "steps", mine, "--data", images).err
    mine.write_text("batch_size: 4\n")
    assert "pass --data" in cli("recipe", "steps", mine).err
    assert 'no image folder "none"' in cli("recipe", "steps", mine, "--data", "none").err
    done = cli("recipe", "steps", mine, "--data", images, "--processes", "9")
    assert done.code == 2 and "make no batch of 4 for each of 9 processes" in done.err
    mine.write_text("epochs: many\n")
    assert "epochs is 'many', expected a whole number" in cli("recipe", "steps", mine, "--data", images).err


def test_a_run_is_measured_as_it_was_trained(cli, run_folder: Path, images: Path, tmp_path: Path) -> None:
    options = yaml.safe_load((run_folder / "args.yaml").read_text())
    (run_folder / "args.yaml").write_text(yaml.safe_dump({**options, "img_size": 48, "mean": [0.1] * 3}))
    done = cli("condense", run_folder, "-o", tmp_path / "out", "--data", images, "--format", "json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["input_size"] == [3, 48, 48]
    assert report["macs"]["condensed"] == chanzoo.count_macs(load(tmp_path / "out"), (3, 48, 48))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert (config["input_size"], config["mean"]) == ([3, 48, 48], [0.1] * 3)


def test_a_best_epoch_before_the_last_drop_gives_way_to_the_last(
    cli, run_folder: Path, tmp_path: Path
) -> None:
    (run_folder / "checkpoint-0.pth.tar").rename(run_folder / "model_best.pth.tar")
    done = cli("condense", run_folder, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "chanzoo: The weights of the run's last epoch, number 7 counted from 0." in done.err
    asked = cli("condense", run_folder / "model_best.pth.tar", "-o", tmp_path / "best")
    assert asked.code == 2 and "Train it to the end" in asked.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--num-classes", "3"), "--num-classes belongs to a name"),
        (("--checkpoint", "zzz"), "--checkpoint belongs to a name"),
        (("--weights", "none"), "--weights belongs to a name"),
        (("--ema",), "--ema belongs to a name"),
        (("--device", "foo"), 'no device "foo" here'),
    ],
)
def test_options_that_a_run_has_no_use_for(
    cli, run_folder: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    done = cli("condense", run_folder, "-o", tmp_path / "out", *options)
    assert done.code == 2 and words in done.err and not (tmp_path / "out").exists()


def test_places_where_there_is_no_network(cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("empty", "holds no network: neither config.json"),
        ("none", "there is no folder or"),
    ):
        done = cli("condense", tmp_path / name, "-o", tmp_path / "out")
        assert done.code == 2 and words in done.err


def test_a_condensed_folder_is_a_network_for_other_commands(cli, saved: Path, tmp_path: Path) -> None:
    assert cli("condense", saved, "-o", tmp_path / "small").code == 0
    assert cli("inspect", tmp_path / "small", "--reuse", "-o", tmp_path / "reuse", "--no-plots").code == 0
    told = cli("info", tmp_path / "small", "--format", "json")
    assert told.code == 0, told.err
    assert json.loads(told.out)["arch"]
