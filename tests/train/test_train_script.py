"""timm's unmodified train script with our models, recipes and queue."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from chanzoo.recipes.check import recipe_path
from chanzoo.weights import TABLE, load_rows, save_rows

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def train(repo: Path, data: Path, out: Path, *options: str) -> list[dict[str, str]]:
    """Run the script as a user would; returns the rows of summary.csv."""
    command = [sys.executable, "-m", "chanzoo", "run", str(repo / "train.py")]
    if sys.version_info >= (3, 11):
        command = [sys.executable, "-P", str(repo / "train.py"), "--device-modules", "chanzoo"]
    command += ["--config", str(recipe_path("c10j_pad4_40e")), "--data-dir", str(data), *options]
    command += ["--output", str(out.parent), "--experiment", out.name]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    with (out / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def test_recipe_trains_a_registered_name_to_a_learning_rate_of_zero(
    timm_repo: Path, image_folder: Path, tmp_path: Path
) -> None:
    options = ("--model", "ce_cifar_resnet20", "--epochs", "3", "--warmup-epochs", "1", "--batch-size", "32")
    rows = train(timm_repo, image_folder, tmp_path / "run", *options)
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[-1]["lr"]) < 0.01  # the last update of three epochs of four steps


def test_fine_tuning_on_other_classes_starts_ahead_of_scratch(
    timm_repo: Path, image_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "six_classes"
    for split in ("train", "val"):
        for label in range(6):
            (data / split).mkdir(parents=True, exist_ok=True)
            (data / split / f"class{label}").symlink_to(image_folder / split / f"class{label}")
    options = ("--model", "ce_cifar_resnet20", "--num-classes", "6", "--batch-size", "16", "--epochs", "1")
    options += ("--warmup-epochs", "0", "--lr", "0.02")
    scratch = train(timm_repo, data, tmp_path / "scratch", *options)
    tuned = train(timm_repo, data, tmp_path / "tuned", *options, "--pretrained")
    assert float(tuned[0]["eval_loss"]) < float(scratch[0]["eval_loss"])
    assert float(tuned[0]["train_loss"]) < float(scratch[0]["train_loss"])


@pytest.mark.parametrize("kill_after", [2, 7])
def test_queue_runner_resumes_after_a_kill_and_files_what_it_measured(
    timm_repo: Path, image_folder: Path, tmp_path: Path, kill_after: int
) -> None:
    root, runs = tmp_path / "checkout", tmp_path / "runs"
    table = root / TABLE.relative_to(ROOT)
    table.parent.mkdir(parents=True)
    save_rows({}, table)
    command = [sys.executable, str(ROOT / "scripts" / "train_next.py"), "--weight", "cifar_resnet20.c10j"]
    command += ["--data", f"c10j={image_folder}", "--runs", str(runs), "--root", str(root)]
    env = {**os.environ, "TIMM_REPO": str(timm_repo), "OMP_NUM_THREADS": "1"}
    summary = runs / "cifar_resnet20.c10j" / "summary.csv"

    first = subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while first.poll() is None and time.time() < deadline:
        if summary.exists() and len(summary.read_text().splitlines()) > kill_after:
            break
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert load_rows(table) == {} and not (root / "weights").exists()

    second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "resuming" in second.stdout
    row = load_rows(table)["cifar_resnet20.c10j"]
    folder = root / "weights" / row.name
    content = (folder / "model.safetensors").read_bytes()
    assert (hashlib.sha256(content).hexdigest(), len(content)) == (row.sha256, row.file_bytes)
    assert {path.name for path in folder.iterdir()} == {
        *("model.safetensors", "recipe.yaml", "summary.csv", "eval.json", "notes.md")
    }
    assert len((folder / "summary.csv").read_text().splitlines()) == 41
    assert json.loads((folder / "eval.json").read_text())["metrics"] == row.metrics
    assert row.params == 269_722 and "$TIMM_REPO" in row.command and str(tmp_path) not in row.command
    assert all(
        str(t.dtype) in ("torch.float16", "torch.int64")
        for t in load_file(folder / "model.safetensors").values()
    )


def test_a_pruned_network_is_fine_tuned_by_the_command_that_prune_prints(
    timm_repo: Path, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "narrow"
    options = ("--macs", "0.5x", "--images", "16", "--recalibrate", "32", "--no-plots")
    prune = [sys.executable, "-m", "chanzoo", "prune", "cifar_resnet20.c10j", "--data", str(image_folder)]
    env = {**os.environ, "TIMM_REPO": str(timm_repo), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*prune, *options, "-o", str(out)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    command = (out / "finetune.txt").read_text().strip()
    command = command.replace("python -P", f"{sys.executable} -P") if sys.version_info >= (3, 11) else command
    command += (
        f" --epochs 1 --lr 1e-12 --output {tmp_path} --experiment tuned --workers 0 --no-prefetcher -b 16"
    )
    run = subprocess.run(command, shell=True, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    args = yaml.safe_load((tmp_path / "tuned" / "args.yaml").read_text())
    assert args["model"] == f"local-dir:{out}" and args["pretrained"] is True
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(tmp_path / "tuned" / "last.pth.tar", weights_only=True)["state_dict"]
    start = load_file(out / "model.safetensors")
    weights = [key for key, value in start.items() if value.ndim > 1]
    assert saved.keys() == start.keys() and all(
        torch.allclose(saved[key], start[key], atol=1e-6) for key in weights
    )


def test_layers_are_masked_one_after_the_other(timm_repo: Path, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "layers"
    command = [sys.executable, str(ROOT / "scripts" / "train_layerwise.py"), "cifar_resnet56", "-o", str(out)]
    command += ["--no-pretrained", "--data", str(image_folder), "--rates", "[0.25]+[0.5]*54", "--images", "8"]
    command += ["--epochs", "1", "--device", "cpu", "--workers", "0", "--no-prefetcher", "--layers"]
    env = {**os.environ, "TIMM_REPO": str(timm_repo), "OMP_NUM_THREADS": "1"}
    for layers in ("1", "2"):  # the second run finds the first layer done
        run = subprocess.run([*command, layers], capture_output=True, text=True, env=env)
        assert run.returncode == 0, run.stderr[-3000:]
    first = (out / "layer1" / "run" / "summary.csv").stat().st_mtime_ns
    assert first < (out / "layer2" / "masks.safetensors").stat().st_mtime_ns
    state = load_file(out / "final" / "model.safetensors")
    zeros = {
        name: int((state[f"{name}.weight"].flatten(1).abs().sum(1) == 0).sum())
        for name in ("conv1", "layer1.0.conv1", "layer1.0.conv2")
    }
    assert zeros == {"conv1": 4, "layer1.0.conv1": 8, "layer1.0.conv2": 0}
