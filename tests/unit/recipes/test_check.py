"""Recipes: every shipped one is known to the train script, every misspelt key is found."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from chanzoo.errors import UsageError
from chanzoo.recipes import check
from chanzoo.recipes.table import RECIPES, RUNS
from chanzoo.weights import DATASETS, WEIGHTS

SCRIPT = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--config")
group = parser.add_argument_group("x")
group.add_argument("--lr", type=float)
group.add_argument("-b", "--batch-size", type=int)
group.add_argument("--torchscript", dest="script_it", action="store_true")
"""


def test_options_are_read_from_the_source_without_running_it(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT + "\nraise SystemExit('must not run')\n")
    assert check.script_options(script) == {"lr", "batch_size", "script_it"}


def test_problems_have_line_key_and_suggestion(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("# a comment\nlr: 0.1\nweight_dacay: 1.0\n\nwarmup: 5\nlr: 0.2\nchanzoo: {stage: 3}\n")
    problems = check.check_recipe(recipe)
    assert [(p.line, p.key) for p in problems] == [(3, "weight_dacay"), (5, "warmup"), (6, "lr")]
    assert problems[0].suggestion == "weight_decay"
    assert problems[1].suggestion.startswith("warmup_")
    assert "once" in problems[2].suggestion


@pytest.mark.parametrize(
    ("text", "words"), [("[1, 2]", "not a table"), ("lr: [1", "is not YAML"), (None, "no recipe file")]
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    recipe = tmp_path / "r.yaml"
    if text is not None:
        recipe.write_text(text)
    with pytest.raises(UsageError, match=words):
        check.check_recipe(recipe)


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_have_no_problem_and_end_at_zero(name: str) -> None:
    path = check.recipe_path(name)
    assert check.check_recipe(path) == []
    options = yaml.safe_load(path.read_text())
    assert options["min_lr"] == 0 and options["sched"] == "cosine"
    epochs = re.fullmatch(r".+_(ft)?(\d+)e", name)
    assert epochs and options["epochs"] == int(epochs[2])
    assert epochs[1] or options["epochs"] >= 12  # from nothing; a fine-tuning has less to learn
    assert RECIPES[name].dataset in DATASETS


def test_shipped_option_list_is_that_of_the_script() -> None:
    if not os.environ.get("TIMM_REPO"):
        pytest.skip("TIMM_REPO is not set: the list of options was not compared with timm's train.py")
    shipped = set((check.recipe_path("c10j_pad4_40e").parent / "train_options.txt").read_text().split())
    assert check.script_options(check.train_script()) == shipped


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean c10j_pad4_40e"):
        check.recipe_path("c10j_40")


def test_train_script_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TIMM_REPO", raising=False)
    with pytest.raises(UsageError, match="export TIMM_REPO"):
        check.train_script()
    monkeypatch.setenv("TIMM_REPO", str(tmp_path))
    with pytest.raises(UsageError, match=r"no train\.py"):
        check.train_script()


def test_runs_name_known_recipes_and_filed_weights_are_not_wanted() -> None:
    assert len({run.weight for run in RUNS}) == len(RUNS)
    for run in RUNS:
        assert run.recipe in RECIPES
        assert run.weight.endswith(RECIPES[run.recipe].dataset)
        assert run.cost_hours > 0
    assert {run.weight for run in check.wanted()} == {run.weight for run in RUNS} - set(WEIGHTS)


def test_launch_command_is_the_unmodified_script_with_our_names() -> None:
    command = check.launch_command(RUNS[0], "DATA", script="train.py")
    assert "train.py" in command and command[command.index("--model") + 1] == RUNS[0].model
    assert command[command.index("--seed") + 1] == str(RUNS[0].seed)
