"""Networks that drop connections under timm's unmodified train script."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from chanzoo.layers.condensing import condensing_stage, learned_layers
from chanzoo.recipes.check import recipe_path

pytestmark = pytest.mark.slow

# 130 images in batches of 16 are 8 steps an epoch: drops (C = 4) at steps 6, 11 and 16 of 32.
EPOCHS, PER_EPOCH, FACTOR = 4, 8, 4
TOTAL = EPOCHS * PER_EPOCH
SMALL = ("depths=[1,1,1]", f"condensation_factor={FACTOR}", f"reactivation_factor={FACTOR}")


def command(
    repo: Path, data: Path, out: Path, *options: str, total: int = TOTAL, epochs: int = EPOCHS
) -> list[str]:
    """The script as a user would run it."""
    start = [sys.executable, "-m", "chanzoo", "run", str(repo / "train.py")]
    if sys.version_info >= (3, 11):
        start = [sys.executable, "-P", str(repo / "train.py"), "--device-modules", "chanzoo"]
    start += ["--config", str(recipe_path("c10j_pad4_24e")), "--data-dir", str(data), "-b", "16"]
    start += ["--model", "condensenetv2_cifar110", "--model-kwargs", f"total_steps={total}", *SMALL]
    start += ["--epochs", str(epochs), "--checkpoint-hist", "99", "--warmup-epochs", "0", *options]
    return [*start, "--output", str(out.parent), "--experiment", out.name]


def train(repo: Path, data: Path, out: Path, *options: str, **kinds: Any) -> str:
    """Run it; what it said."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = command(repo, data, out, *options, **kinds)
    run = subprocess.run(words, capture_output=True, text=True, timeout=600, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stderr + run.stdout


def state(path: Path, key: str = "state_dict") -> dict[str, torch.Tensor]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return saved[key]


def stages(tensors: dict[str, torch.Tensor]) -> set[int]:
    return {int(value) for key, value in tensors.items() if key.endswith(".stage")}


@pytest.fixture(scope="module")
def unbroken(timm_repo: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with averaged weights."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    said = train(timm_repo, image_folder, out, "--model-ema", "--model-ema-decay", "0.9")
    assert f"step 16 of {TOTAL}: stage 3 of 3, 1 of 4 connections are left" in said
    assert "not condensed" not in said and "total_steps=" not in said.replace(f"total_steps={TOTAL}", "")
    return out


@pytest.mark.parametrize("key", ["state_dict", "state_dict_ema"])
def test_stages_come_when_they_are_due_in_both_copies(unbroken: Path, key: str) -> None:
    for epoch in range(EPOCHS):
        found = state(unbroken / f"checkpoint-{epoch}.pth.tar", key)
        steps = (epoch + 1) * PER_EPOCH
        assert int(found["progress.train_step"]) == steps
        assert stages(found) == {condensing_stage((steps - 1) / TOTAL, FACTOR)}
        masks = {name: value for name, value in found.items() if name.endswith(".mask")}
        assert masks and all(value.dtype == torch.bool for value in masks.values())
    last = state(unbroken / "last.pth.tar", key)
    assert stages(last) == {FACTOR - 1}
    model = timm.create_model("condensenetv2_cifar110", depths=(1, 1, 1), condensation_factor=4,
                              reactivation_factor=4)  # fmt: skip
    model.load_state_dict(last)


def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(
    timm_repo: Path, image_folder: Path, tmp_path: Path
) -> None:
    """With all images in one batch: the script shuffles anew when it resumes."""
    epochs = 12  # drops at steps 2, 4 and 6
    options = ("--batch-size", "130", "--no-aug", "--lr", "0.01")
    kinds: dict[str, Any] = {"total": epochs, "epochs": epochs}
    train(timm_repo, image_folder, tmp_path / "whole", *options, **kinds)
    out = tmp_path / "part"
    with subprocess.Popen(
        command(timm_repo, image_folder, out, *options, **kinds),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as first:
        while first.poll() is None and not (out / "checkpoint-2.pth.tar").exists():
            time.sleep(0.02)
        first.kill()
    assert not (out / f"checkpoint-{epochs - 1}.pth.tar").exists()
    last = max(out.glob("checkpoint-*.pth.tar"), key=lambda path: int(path.name[11:].partition(".")[0]))
    middle = state(last)
    assert 0 < max(stages(middle)) < FACTOR - 1
    train(timm_repo, image_folder, out, *options, "--resume", str(last), **kinds)
    whole, part = state(tmp_path / "whole" / "last.pth.tar"), state(out / "last.pth.tar")
    assert int(part["progress.train_step"]) == epochs and stages(part) == {FACTOR - 1}
    for key, value in whole.items():
        if key.endswith((".mask", ".stage")):
            assert torch.equal(part[key], value), key
        elif key.endswith("weight"):
            torch.testing.assert_close(part[key], value, rtol=0.01, atol=0.01)  # 16-bit floats


def test_accumulating_gradients_counts_forwards(timm_repo: Path, image_folder: Path, tmp_path: Path) -> None:
    said = train(timm_repo, image_folder, tmp_path / "run", "--grad-accum-steps", "2", "--sync-bn")
    last = state(tmp_path / "run" / "last.pth.tar")
    assert int(last["progress.train_step"]) == TOTAL and stages(last) == {FACTOR - 1}
    assert "not condensed" not in said


def test_group_lasso_shrinks_groups_under_the_script(
    unbroken: Path, timm_repo: Path, image_folder: Path, tmp_path: Path
) -> None:
    """The same run with it, from the same weights: its gradient is all that differs."""
    options = ("--model-kwargs", f"total_steps={TOTAL}", *SMALL, "group_lasso=0.001")
    train(timm_repo, image_folder, tmp_path / "run", *options)
    sums = []
    for run in (tmp_path / "run", unbroken):
        model = timm.create_model("condensenetv2_cifar110", depths=(1, 1, 1), condensation_factor=FACTOR,
                                  reactivation_factor=FACTOR)  # fmt: skip
        model.load_state_dict(state(run / "checkpoint-0.pth.tar"))  # before the last drop, which ends it
        sums.append(sum(layer.lasso_penalty().item() for layer in learned_layers(model).values()))
    assert 0 < sums[0] < 0.999 * sums[1]


def test_a_wrong_number_of_steps_is_said_before_a_drop_is_missed(
    timm_repo: Path, image_folder: Path, tmp_path: Path
) -> None:
    said = train(timm_repo, image_folder, tmp_path / "run", total=100, epochs=1)
    assert f"total_steps=100 is 12.50 times the {PER_EPOCH} training batches" in said
    assert f"training ended at step {PER_EPOCH} of total_steps=100, at stage 0 of 3" in said


def test_the_trained_network_is_condensed_by_command(
    unbroken: Path, tmp_path: Path, image_folder: Path
) -> None:
    out = tmp_path / "condensed"
    call = [sys.executable, "-m", "chanzoo", "condense", str(unbroken / "last.pth.tar"), "-o", str(out)]
    run = subprocess.run([*call, "--data", str(image_folder)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert model.condensed and not any(key.endswith("mask") for key in model.state_dict())
    early = [*call[:4], str(unbroken / "checkpoint-0.pth.tar"), "-o", str(tmp_path / "early")]
    refused = subprocess.run(early, capture_output=True, text=True)
    assert refused.returncode == 2 and 'layer "stage1.0.conv1" cannot be condensed' in refused.stderr
    assert not (tmp_path / "early").exists()
