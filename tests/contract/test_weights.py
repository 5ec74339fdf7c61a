"""Every weight row: its file, its evidence, its cards, and its metric measured again from the file."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import chanzoo
from chanzoo.measure import count_macs, count_params
from chanzoo.recipes.check import check_recipe
from chanzoo.recipes.table import RECIPES, RUNS
from chanzoo.store import embedded_path
from chanzoo.weights import DATASETS, WEIGHTS, Weight

ROOT = Path(__file__).resolve().parents[2]
ROWS = [pytest.param(row, id=row.name) for row in WEIGHTS.values()]


@pytest.mark.parametrize("row", ROWS)
def test_the_file_is_the_one_of_the_row_and_its_evidence_agrees(row: Weight) -> None:
    folder = ROOT / "weights" / row.name
    content = (folder / "model.safetensors").read_bytes()
    assert (hashlib.sha256(content).hexdigest(), len(content)) == (row.sha256, row.file_bytes)
    evidence = json.loads((folder / "eval.json").read_text())
    assert (evidence["sha256"], evidence["metrics"]) == (row.sha256, row.metrics)
    assert check_recipe(folder / "recipe.yaml") == []
    summary = (folder / "summary.csv").read_text().splitlines()
    assert len(summary) > 40 and summary[0].startswith("epoch,")
    assert row.name in (folder / "notes.md").read_text()


@pytest.mark.parametrize("row", ROWS)
def test_the_row_describes_the_network(row: Weight) -> None:
    run = next(run for run in RUNS if run.weight == row.name)
    assert (row.recipe, row.seed, RECIPES[row.recipe].dataset) == (run.recipe, run.seed, row.dataset)
    model = timm.create_model(row.name, pretrained=True)
    size = DATASETS[row.dataset].input_size
    assert (count_params(model), count_macs(model, size)) == (row.params, row.macs)
    assert (model.num_classes, model.pretrained_cfg["tag"]) == (DATASETS[row.dataset].num_classes, row.tag)
    assert model.pretrained_cfg["input_size"] == size


@pytest.mark.parametrize("row", ROWS)
def test_the_network_knows_more_than_chance(row: Weight) -> None:
    """The sample photo of a cat, where the classes have one."""
    names = DATASETS[row.dataset].label_names
    photo = next((ROOT / "tests" / "assets").glob("cat*"), None)
    if "cat" not in names or photo is None:
        pytest.skip(f"{row.dataset} has no class for a sample photo")
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    model = timm.create_model(row.name, pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    with torch.no_grad():
        scores = model(transform(Image.open(photo).convert("RGB"))[None]).softmax(1)[0]
    assert names.index("cat") in scores.topk(3).indices


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's image reader leaves it to Python
@pytest.mark.parametrize("row", ROWS)
def test_the_metric_is_measured_again_from_the_file(row: Weight) -> None:
    from chanzoo.measure.accuracy import evaluate

    variable = f"CHANZOO_{row.dataset.upper()}"
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set: the metric of {row.name} was NOT measured again")
    result = evaluate(timm.create_model(row.name, pretrained=True), os.environ[variable], split="val")
    assert abs(result.top1 - row.metrics["top1"]) < 1e-4
    assert abs(result.top5 - row.metrics["top5"]) < 1e-4


def test_timm_lists_what_has_weights() -> None:
    listed = {name for name in timm.list_pretrained() if name in WEIGHTS}
    registered = {
        row.name for row in WEIGHTS.values() if timm.is_model(row.arch) and embedded_path(row.name).is_file()
    }
    assert listed == registered == set(chanzoo.list_models(pretrained=True))


def test_cards_are_fresh() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "build_cards.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}{run.stderr}  Mend: python scripts/build_cards.py"
