"""A checkout in a temporary folder with one weight, of a narrow network, and images to measure it on."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load, save

from chanzoo import store, weights
from chanzoo.measure import count_macs, count_params
from chanzoo.measure.accuracy import evaluate
from chanzoo.recipes import table
from chanzoo.recipes.check import recipe_path
from chanzoo.recipes.table import RECIPES, Run
from chanzoo.weights import Weight, save_rows

NAME = "cifar_resnet20.c10j"  # a name that timm knows, with another file behind it
WIDTHS = [4, 4, 6, 8, *[3] * 9]
EPOCHS = 40


class Shelf(NamedTuple):
    """The checkout; its row passes every check."""

    root: Path
    row: Weight
    images: Path

    @property
    def folder(self) -> Path:
        return self.root / "weights" / NAME


def make_images(root: Path, classes: int = 10, mode: str = "RGB") -> Path:
    """23 images in val/, no two alike."""
    generator = torch.Generator().manual_seed(0)
    for index in range(23):
        folder = root / "val" / f"class{index % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(coarse.numpy()).convert(mode).resize((40, 36)).save(folder / f"{index}.png")
    return root


def make_shelf(root: Path, images: Path, patch: pytest.MonkeyPatch) -> Shelf:
    """Make the checkout, and put its table in the place of the package's own."""
    for name in list(weights.WEIGHTS):
        patch.delitem(weights.WEIGHTS, name)
    patch.setattr(store, "_PACKAGE", root / "chanzoo")
    patch.setattr(store, "_CHECKOUT", root / "weights")
    patch.setattr(weights, "TABLE", root / "chanzoo" / "weights.json")
    folder = root / "weights" / NAME
    folder.mkdir(parents=True)
    (root / "chanzoo").mkdir()
    (root / "pyproject.toml").touch()

    torch.manual_seed(7)
    model = timm.create_model("cifar_resnet20", widths=WIDTHS)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    content = save(state)
    model.load_state_dict(load(content))
    result = evaluate(model, images)
    recipe = next(name for name, row in RECIPES.items() if row.dataset == "c10j")
    run = Run(NAME, recipe, 0, 1.0, "cpu", "arXiv:1512.03385")
    patch.setattr(table, "RUNS", (run,))
    row = Weight(
        name=NAME,
        dataset="c10j",
        recipe=recipe,
        command="python -P $TIMM_REPO/train.py --config recipe.yaml",
        seed=0,
        hours=0.5,
        metrics={"top1": round(result.top1, 6), "top5": round(result.top5, 6)},
        params=count_params(model),
        macs=count_macs(model, (3, 32, 32)),
        file_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        licence="apache-2.0",
        paper="arXiv:1512.03385",
        model_args={"widths": WIDTHS},
    )
    (folder / "model.safetensors").write_bytes(content)
    (folder / "recipe.yaml").write_bytes(recipe_path(recipe).read_bytes())
    with (folder / "summary.csv").open("w") as file:
        csv.writer(file).writerows([["epoch", "eval_top1"], *([epoch, 10] for epoch in range(EPOCHS))])
    report = {"weight": NAME, "split": "val", "images": result.images, "sha256": row.sha256}
    (folder / "eval.json").write_text(json.dumps({**report, "metrics": row.metrics}))
    (folder / "notes.md").write_text(f"# {NAME}\n")
    shelf = Shelf(root, row, images)
    put(shelf, row, patch)
    return shelf


def put(shelf: Shelf, row: Weight, patch: pytest.MonkeyPatch) -> None:
    """Let the table say this of the weight."""
    patch.setitem(weights.WEIGHTS, NAME, replace(row))
    save_rows({NAME: row}, shelf.root / "chanzoo" / "weights.json")
