"""``chanzoo recipe``: the training recipes that come with us, and a check of one's own."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path

from ..errors import UsageError
from .common import add_format, emit, positive, say

HELP = "list, show and check training recipes"
EXAMPLES = """\
  chanzoo recipe ls
  chanzoo recipe ls --wanted                  training runs whose weights do not exist yet
  chanzoo recipe show c10j_pad4_40e > mine.yaml    a copy to edit
  chanzoo recipe check mine.yaml              find keys that timm's train script would ignore in silence
  chanzoo recipe steps mine.yaml --data DATA  total_steps of networks that drop connections while they train
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("ls", help="list the recipes", description="List the recipes.")
    listing.add_argument(
        "--wanted", action="store_true", help="list training runs whose weights do not exist yet"
    )
    show = actions.add_parser("show", help="print a recipe", description="Print a recipe, and how to run it.")
    show.add_argument("name", metavar="NAME", help="see chanzoo recipe ls")
    check = actions.add_parser("check", help="check a recipe", description="Check the keys of a recipe.")
    check.add_argument("file", metavar="FILE", help="YAML file, or the name of a recipe")
    check.add_argument("--script", type=Path, help="train script to compare with (default: timm's)")
    steps = actions.add_parser(
        "steps",
        help="count the training forwards of a recipe",
        description="Count the training forwards of a recipe, for --model-kwargs total_steps=N.",
    )
    steps.add_argument("file", metavar="FILE", help="YAML file, or the name of a recipe")
    steps.add_argument("--data", metavar="DATA_DIR", help="folder of images (default: the recipe's data set)")
    steps.add_argument("--processes", type=positive, default=1, metavar="N", help="that train together")
    steps.add_argument("--epochs", type=positive, metavar="N", help="instead of the recipe's")
    steps.add_argument(
        "--batch-size", type=positive, metavar="N", help="of one process, instead of the recipe's"
    )
    for action in (listing, show, check, steps):
        add_format(action)


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    return {"ls": _ls, "show": _show, "check": _check, "steps": _steps}[args.action](args)


def _ls(args: argparse.Namespace) -> int:
    from ..recipes.check import wanted
    from ..recipes.table import RECIPES, RUNS

    if args.wanted:
        runs = wanted()
        rows = [(r.weight, r.recipe, str(r.seed), r.device, f"{r.cost_hours} h") for r in runs]
        emit(
            [asdict(r) for r in runs], args.format == "json", ("weight", "recipe", "seed", "on", "cost"), rows
        )
        return 0
    recipes = list(RECIPES.values())
    runs_of = {recipe.name: sum(r.recipe == recipe.name for r in RUNS) for recipe in recipes}
    rows = [(r.name, r.dataset, str(runs_of[r.name]), r.title) for r in recipes]
    data = [{**asdict(r), "runs": runs_of[r.name]} for r in recipes]
    emit(data, args.format == "json", ("recipe", "data", "runs", "what"), rows)
    return 0


def _show(args: argparse.Namespace) -> int:
    from ..recipes.check import launch_command, prune_command, recipe_path
    from ..recipes.table import RECIPES, RUNS

    path = recipe_path(args.name)
    text = path.read_text(encoding="utf-8")
    runs = [run for run in RUNS if run.recipe == args.name]
    commands = []
    for run in runs:
        steps = [prune_command(run, "DATA_DIR", "PRUNED")] if run.source else []
        steps.append(launch_command(run, "DATA_DIR", script="TIMM_REPO/train.py"))
        commands.append(" && ".join(map(shlex.join, steps)))
    if args.format == "json":
        data = {**asdict(RECIPES[args.name]), "file": str(path), "text": text}
        data["runs"] = [{**asdict(run), "command": c} for run, c in zip(runs, commands, strict=True)]
        emit(data, True, (), ())
        return 0
    print(text, end="")
    say(f"chanzoo: {path}")
    for run, command in zip(runs, commands, strict=True):
        say(f"\n{run.weight}\n  {command}")
    return 0


def _steps(args: argparse.Namespace) -> int:
    import yaml

    from ..recipes.check import check_recipe, count_steps, recipe_path
    from ..recipes.table import RECIPES
    from ..weights import DATASETS

    shipped = args.file in RECIPES and not Path(args.file).exists()
    path = recipe_path(args.file) if shipped else Path(args.file)
    check_recipe(path)  # that it is a table of options
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    options |= {key: value for key in ("epochs", "batch_size") if (value := getattr(args, key))}
    for key in ("epochs", "batch_size", "warmup_epochs", "cooldown_epochs"):
        if type(options.get(key, 0)) is not int:
            raise UsageError(f"{path.name}: {key} is {options[key]!r}, expected a whole number.")
    if args.data:
        from timm.data import create_dataset

        split = options.get("train_split", "train")
        if not Path(args.data).exists():
            raise UsageError(f'no image folder "{args.data}".')
        images = len(create_dataset("", root=args.data, split=split))
    elif shipped:
        images = DATASETS[RECIPES[args.file].dataset].train_images
    else:
        raise UsageError(f"how many images {path.name} trains on is not known: pass --data DATA_DIR.")
    total = count_steps(options, images, args.processes)
    data = {"file": str(path), "images": images, "processes": args.processes, "total_steps": total}
    emit(data, args.format == "json", ("", ""), [(str(total), "")])
    say(f"chanzoo: pass  --model-kwargs total_steps={total}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from ..recipes.check import check_recipe, recipe_path
    from ..recipes.table import RECIPES

    if args.script and not args.script.is_file():
        raise UsageError(f'no script "{args.script}".')
    path = (
        recipe_path(args.file) if args.file in RECIPES and not Path(args.file).exists() else Path(args.file)
    )
    problems = check_recipe(path, args.script)
    if args.format == "json":
        emit({"file": str(path), "problems": [asdict(p) for p in problems]}, True, (), ())
    if not problems:
        say(f"chanzoo: recipe {path.name}: the train script knows every key.")
        return 0
    keys = "1 key" if len(problems) == 1 else f"{len(problems)} keys"
    width = max(len(p.key) for p in problems)
    lines = [f"recipe {path.name} has {keys} the train script does not know"]
    for p in problems:
        hint = f"   did you mean {p.suggestion}?" if p.suggestion else ""
        lines.append(f"  line {p.line}  {p.key.ljust(width)}{hint}".rstrip())
    raise UsageError("\n".join(lines))
