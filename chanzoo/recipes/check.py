"""Recipes on disk: where they are, whether the train script knows their keys, how they are launched."""

from __future__ import annotations

import ast
import difflib
import os
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError
from ..weights import DATASETS, WEIGHTS
from .table import RECIPES, RUNS, Run

__all__ = [
    "Problem",
    "check_recipe",
    "count_steps",
    "launch_command",
    "prune_command",
    "recipe_path",
    "script_options",
    "train_script",
    "wanted",
]

_FOLDER = Path(__file__).parent / "data"
_SHIPPED_OPTIONS = _FOLDER / "train_options.txt"
_OWN_BLOCK = "chanzoo"  # our own settings inside a recipe; the train script ignores it


@dataclass(frozen=True)
class Problem:
    """A key of a recipe that the train script would ignore in silence.

    Attributes:
        line: Line of the file, from 1.
        key: As written.
        suggestion: Nearest option of the script, empty if none is near.
    """

    line: int
    key: str
    suggestion: str


def recipe_path(name: str) -> Path:
    """File of a recipe.

    Raises:
        UsageError: There is no such recipe; names the nearest.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f'no recipe "{name}".{hint}   See all: chanzoo recipe ls')
    return _FOLDER / f"{name}.yaml"


def train_script() -> Path:
    """Timm's train script in the checkout named by ``$TIMM_REPO``.

    Raises:
        UsageError: The variable is not set, or the script is not there.
    """
    repo = os.environ.get("TIMM_REPO")
    if not repo:
        raise UsageError(
            "timm's train.py is needed and is not in timm's pip package.\n"
            "  Clone timm's repository and name the folder: export TIMM_REPO=FOLDER"
        )
    script = Path(repo, "train.py")
    if not script.is_file():
        raise UsageError(f"TIMM_REPO={repo}: there is no train.py in that folder.")
    return script


def script_options(script: Path) -> set[str]:
    """Names that a script's argument parser accepts as defaults, read from its source without running it."""
    names = set()
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr != "add_argument":
            continue
        flags = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        dest = next(
            (k.value.value for k in node.keywords if k.arg == "dest" and isinstance(k.value, ast.Constant)),
            None,
        )
        long = next((flag for flag in flags if flag.startswith("--")), flags[0] if flags else "")
        names.add(str(dest) if dest else long.lstrip("-").replace("-", "_"))
    return names - {"", "config"}


def check_recipe(path: Path, script: Path | None = None) -> list[Problem]:
    """Keys of a recipe that the train script does not know.

    Args:
        path: YAML file.
        script: The train script to compare with; without it ``$TIMM_REPO/train.py`` where that is set,
            else the list of its options that chanzoo ships.

    Raises:
        UsageError: The file is missing, is no YAML, or is not a table of options.
    """
    if not path.is_file():
        raise UsageError(f'no recipe file "{path}".')
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path} is not a table of options: expected lines such as `lr: 0.1`.")
    if script is None and os.environ.get("TIMM_REPO"):
        script = train_script()
    known = script_options(script) if script else set(_SHIPPED_OPTIONS.read_text().split())
    problems, seen = [], set()
    for node, _ in root.value:
        key, line = str(node.value), node.start_mark.line + 1
        if key in seen:
            problems.append(Problem(line, key, f"{key}, once only"))
        elif key not in known and key != _OWN_BLOCK:
            near = difflib.get_close_matches(key.replace("-", "_"), sorted(known), n=1)
            problems.append(Problem(line, key, near[0] if near else ""))
        seen.add(key)
    return problems


def wanted() -> list[Run]:
    """Runs whose weight has no row yet, in the order of the queue."""
    return [run for run in RUNS if run.weight not in WEIGHTS]


def prune_command(run: Run, data_dir: str, folder: str) -> list[str]:
    """Command line that makes the network which a run with a source trains.

    Args:
        run: What to train.
        data_dir: Folder of the data set.
        folder: Where the network goes.
    """
    options = (*run.prune, "--seed", str(run.seed), "--data", data_dir, "-o", folder)
    return [sys.executable, "-m", "chanzoo", "prune", run.source, *options]


def count_steps(options: dict[str, Any], images: int, processes: int = 1) -> int:
    """Training forwards of a whole run of timm's script, which networks that condense have to know.

    Accumulating gradients changes nothing: every batch is a forward.

    Args:
        options: Of the script, as in a recipe; what is missing is the script's default.
        images: Of the training split.
        processes: That train together.

    Raises:
        UsageError: There is less than one batch.
    """
    if odd := [key for key in ("epoch_repeats", "aug_repeats") if options.get(key)]:
        raise UsageError(
            f"batches cannot be counted with {odd[0]}: leave it out, or count a run of one epoch."
        )
    import torch
    from timm.scheduler import create_scheduler_v2, scheduler_kwargs

    given = {"sched": "cosine", "epochs": 300, "warmup_epochs": 5, **options, "sched_on_updates": False}
    lonely = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    try:
        schedule: Any = scheduler_kwargs(Namespace(**given))
        _, epochs = create_scheduler_v2(lonely, **schedule)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UsageError(f"timm makes no schedule of these options: {error}") from error
    batch = options.get("batch_size", 128)
    steps = epochs * (-(-images // processes) // batch)
    if steps < 1:
        raise UsageError(
            f"{images} images make no batch of {batch}"
            f"{f' for each of {processes} processes' if processes > 1 else ''}: incomplete ones are dropped."
        )
    return steps


def launch_command(
    run: Run, data_dir: str, script: str | None = None, start_from: str = "PRUNED"
) -> list[str]:
    """Command line that trains a run with timm's unmodified script.

    Args:
        run: What to train.
        data_dir: Folder of the data set.
        script: Path of the train script, ``$TIMM_REPO/train.py`` by default.
        start_from: For a run with a source: the folder of the pruned network.
    """
    script = script or str(train_script())
    # -P keeps the script's folder, and with it the checkout's own timm, off the path; Python 3.10 lacks it.
    start = ["-P", script, "--device-modules", "chanzoo"]
    if sys.version_info < (3, 11):
        start = ["-m", "chanzoo", "run", script]
    learning = []
    if run.condenses:
        options = yaml.safe_load(recipe_path(run.recipe).read_text(encoding="utf-8"))
        images = DATASETS[RECIPES[run.recipe].dataset].train_images
        learning = ["--model-kwargs", f"total_steps={count_steps(options, images)}"]
    return [
        sys.executable,
        *start,
        *("--config", str(recipe_path(run.recipe))),
        *(("--model", f"local-dir:{start_from}", "--pretrained") if run.source else ("--model", run.model)),
        *("--data-dir", data_dir),
        *("--seed", str(run.seed)),
        *learning,
        *run.options,
    ]
