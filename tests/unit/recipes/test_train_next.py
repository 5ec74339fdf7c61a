"""The network that a training run files: it is measured on images as its data set has them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from timm.data import resolve_data_config

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

import train_next  # pyright: ignore[reportMissingImports]

from chanzoo.recipes.table import RECIPES, RUNS, run_of
from chanzoo.weights import DATASETS

ONES = ("cifar_resnet20.c10j", "condensenetv2_a.tin", "shufflenetv2_x0_5.tin", "mobilenetv2_100.tin")


@pytest.mark.parametrize("weight", ONES)
def test_images_are_those_of_the_data_set(weight: str) -> None:
    run: Any = run_of(weight)
    dataset = DATASETS[RECIPES[run.recipe].dataset]
    model = train_next.build(run, {})
    config = resolve_data_config({}, model=model)
    row = dataset.cfg(32)
    assert config["input_size"] == dataset.input_size
    assert (config["crop_pct"], config["interpolation"]) == (row["crop_pct"], row["interpolation"])
    assert model.num_classes == dataset.num_classes


def test_the_costliest_run_for_a_gpu_comes_first() -> None:
    costs = [run.cost_hours for run in RUNS if run.device == "gpu"]
    assert train_next.pick(None, "gpu").cost_hours == max(costs)


def test_hours_are_kept_while_a_run_goes_on(tmp_path: Path) -> None:
    hours = tmp_path / "hours.txt"
    hours.write_text("1.5000\n")
    with (tmp_path / "log.txt").open("w") as log:
        assert train_next.run_timed([sys.executable, "-c", "raise SystemExit(3)"], log, hours) == 3
    first, second = hours.read_text().split()
    assert first == "1.5000" and 0 <= float(second) < 0.1
