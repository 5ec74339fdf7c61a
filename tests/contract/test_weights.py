"""Every weight row: its file, its evidence, its cards, and its metric measured again from the file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import chanzoo
from chanzoo.hub.gate import check_evidence, check_metrics, check_network
from chanzoo.store import embedded_path
from chanzoo.weights import DATASETS, WEIGHTS, Weight

ROOT = Path(__file__).resolve().parents[2]
ROWS = [pytest.param(row, id=row.name) for row in WEIGHTS.values()]


@pytest.mark.parametrize("row", ROWS)
def test_the_file_is_the_one_of_the_row_and_its_evidence_agrees(row: Weight) -> None:
    check_evidence(row, ROOT / "weights" / row.name)


@pytest.mark.parametrize("row", ROWS)
def test_the_row_describes_the_network(row: Weight) -> None:
    check_network(row, timm.create_model(row.name, pretrained=True))


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
    check_metrics(row.name, row.metrics, {"top1": result.top1, "top5": result.top5})


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


def test_without_weights_a_network_is_as_published() -> None:
    """Not as the data set of its first weights would have it, which is what timm takes otherwise."""
    for arch in sorted({row.arch for row in WEIGHTS.values()}):
        if timm.is_model(arch):
            model = timm.create_model(arch)
            assert (model.num_classes, model.pretrained_cfg["input_size"]) in {
                (10, (3, 32, 32)),
                (1000, (3, 224, 224)),
            }
            assert "tag" not in model.pretrained_cfg
    assert timm.create_model("condensenetv2_a").num_classes == 1000
    assert timm.create_model("condensenetv2_a", pretrained=True).num_classes == 200
