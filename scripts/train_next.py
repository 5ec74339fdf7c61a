"""Train the next wanted weight of the zoo and file the result.

    TIMM_REPO=... python scripts/train_next.py --data c10j=FOLDER --device cpu
    python scripts/train_next.py --weight cifar_resnet20.c10j --data c10j=FOLDER --file-only --hours 1.1

A run is resumed from its checkpoint after any interruption. Filing writes ``weights/<arch.tag>/`` (the
file in 16-bit floats and the evidence beside it), measures accuracy from that very file, adds the row to
``chanzoo/weights.json`` and builds the cards anew. Needs timm's checkout in ``$TIMM_REPO``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load, save
from torch import Tensor

import chanzoo
from chanzoo.errors import ChanzooError, UsageError
from chanzoo.layers import condense
from chanzoo.measure import count_macs, count_params
from chanzoo.measure.accuracy import evaluate
from chanzoo.recipes.check import check_recipe, launch_command, prune_command, recipe_path, wanted
from chanzoo.recipes.table import CONDENSED, RECIPES, RUNS, Run
from chanzoo.weights import DATASETS, TABLE, Weight, load_rows, save_rows

PRUNED = "pruned"  # folder of a run's network before training

ROOT = Path(__file__).resolve().parent.parent
# Newest first: the finished checkpoint, the one being moved into its place, then numbered ones.
CHECKPOINTS = ("last.pth.tar", "tmp.pth.tar", "checkpoint-*.pth.tar")


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", action="append", default=[], metavar="TAG=FOLDER", help="where a data set is"
    )
    parser.add_argument("--weight", metavar="ARCH.TAG", help="this one instead of the next wanted one")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="only runs meant for this device")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the checkpoints")
    parser.add_argument("--file-only", action="store_true", help="the run has ended: file it")
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="checkout whose weights/ and table are written"
    )
    parser.add_argument("--hours", type=float, help="wall-clock hours, for a run that was started by hand")
    args = parser.parse_args()
    try:
        run = pick(args.weight, args.device)
        data = data_folder(run, args.data)
        out = args.runs / run.weight
        if not args.file_only:
            train(run, data, out)
        row = file_run(run, data, out, args.root, args.hours)
    except ChanzooError as error:
        print(f"train_next: {error}", file=sys.stderr)
        return error.exit_code
    if args.root == ROOT:
        subprocess.run([sys.executable, str(ROOT / "scripts" / "build_cards.py")], check=True)
    print(f"{row.name}: top-1 {100 * row.metrics['top1']:.2f} %, {row.file_bytes:,} bytes, filed")
    return 0


def pick(weight: str | None, device: str | None) -> Run:
    """The run of a weight, or the next wanted one; the costliest first on a GPU, whose time is lent."""
    if weight:
        runs = [run for run in RUNS if run.weight == weight]
    else:
        runs = [run for run in wanted() if device in (None, run.device)]
        if device == "gpu":
            runs.sort(key=lambda run: -run.cost_hours)
    if not runs:
        raise UsageError(f"no run for {weight}" if weight else "no weight is wanted; nothing to train.")
    return runs[0]


def data_folder(run: Run, folders: list[str]) -> str:
    """Folder of the run's data set, from ``TAG=FOLDER`` options."""
    tag = RECIPES[run.recipe].dataset
    found = {name: folder for name, _, folder in (item.partition("=") for item in folders)}.get(tag)
    if not found or not Path(found).is_dir():
        raise UsageError(
            f"{run.weight} needs {DATASETS[tag].title}: pass --data {tag}=FOLDER (found: {found})."
        )
    return found


def train(run: Run, data: str, out: Path) -> None:
    """Train to the end, from the newest checkpoint that opens; keeps a log and the hours spent."""
    if problems := check_recipe(recipe_path(run.recipe)):
        raise UsageError(f"{run.recipe}: line {problems[0].line}: unknown key {problems[0].key}")
    out.mkdir(parents=True, exist_ok=True)
    if run.source and not (out / PRUNED).is_dir():
        subprocess.run(prune_command(run, data, str(out / PRUNED)), check=True)
    command = launch_command(run, data, start_from=str(out / PRUNED))
    command += ["--output", str(out.parent), "--experiment", out.name]
    if checkpoint := newest_checkpoint(out):
        command += ["--resume", str(checkpoint)]
    print(f"{run.weight}: {'resuming' if checkpoint else 'starting'}, log in {out / 'log.txt'}", flush=True)
    with (out / "log.txt").open("a") as log:
        code = run_timed(command, log, out / "hours.txt")
    if code:
        raise ChanzooError(
            f"the train script ended with {code}: see {out / 'log.txt'}. Run this again to resume."
        )


def run_timed(command: list[str], log: Any, hours: Path) -> int:
    """Run a command to its end; a line of ``hours`` grows meanwhile, so that being killed loses a minute."""
    earlier = hours.read_text() if hours.exists() else ""
    start = time.time()
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        code = None
        while code is None:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(60)
            hours.write_text(f"{earlier}{(time.time() - start) / 3600:.4f}\n")
        return code
    finally:
        process.kill()


def newest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint of a run that can be opened; a half-written one is passed over."""
    for pattern in CHECKPOINTS:
        for path in sorted(out.glob(pattern), key=lambda p: p.stat().st_mtime, reverse=True):
            try:
                open_checkpoint(path)
            except Exception as error:
                print(f"passed over {path}: {error}", file=sys.stderr)
                continue
            return path
    return None


def open_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of the train script: tensors, plain values and its options."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def to_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published form of a state dict: 16-bit floats, contiguous; integers stay."""
    half = {}
    for key, value in state.items():
        half[key] = value.half().contiguous() if value.is_floating_point() else value.contiguous()
        if value.is_floating_point() and not torch.isfinite(half[key]).all():
            raise ChanzooError(f"{key} does not fit into 16-bit floats or is not finite; nothing was filed.")
    return half


def file_run(run: Run, data: str, out: Path, root: Path, hours: float | None) -> Weight:
    """Write the weight folder and the row of a finished run into the checkout ``root``."""
    checkpoint = newest_checkpoint(out)
    if not checkpoint:
        raise UsageError(f"{out} holds no checkpoint: train first.")
    saved = open_checkpoint(checkpoint)
    epochs = saved["args"].epochs
    if saved["epoch"] + 1 < epochs:
        raise UsageError(f"{out} has reached epoch {saved['epoch'] + 1} of {epochs}: train to the end first.")
    if hours is None:
        hours = sum(float(line) for line in (out / "hours.txt").read_text().split())
    args, pruning = read_pruned(run, out)
    model = build(run, args)
    model.load_state_dict(saved["state_dict"])
    network = (run.weight, model, args, neutral_command(run), pruning)
    row = file_weight(*network, run, data, out, root, hours)
    if run.condenses:
        arch, _, tag = run.weight.partition(".")
        model.load_state_dict(load((root / "weights" / run.weight / "model.safetensors").read_bytes()))
        name, command = (
            f"{arch}.{CONDENSED}{tag}",
            f"{row.command} && chanzoo condense {run.weight} -o FOLDER",
        )
        small = condense(model.eval())
        file_weight(name, small, {**args, "condensed": True}, command, {}, run, data, out, root, hours)
    return row


def build(run: Run, args: dict[str, Any]) -> Any:
    """The network of a run, whose images are those of the data set whatever its architecture is made for."""
    dataset = DATASETS[RECIPES[run.recipe].dataset]
    model: Any = timm.create_model(run.model, num_classes=dataset.num_classes, **args)
    model.pretrained_cfg = {**model.pretrained_cfg, **dataset.cfg(32)}
    return model


def file_weight(
    name: str,
    model: torch.nn.Module,
    args: dict[str, Any],
    command: str,
    pruning: dict[str, Any],
    run: Run,
    data: str,
    out: Path,
    root: Path,
    hours: float,
) -> Weight:
    """Write one network's folder and row; its metrics are measured from the bytes that were written."""
    dataset = DATASETS[RECIPES[run.recipe].dataset]
    content = save(to_half(model.state_dict()))  # no metadata: equal tensors give equal bytes
    model.load_state_dict(load(content))
    result = evaluate(model, data, split="val")
    trained = read_summary(out / "summary.csv")
    row = Weight(
        name=name,
        dataset=dataset.tag,
        recipe=run.recipe,
        command=command,
        seed=run.seed,
        hours=round(hours, 2),
        metrics={"top1": round(result.top1, 6), "top5": round(result.top5, 6)},
        params=count_params(model),
        macs=count_macs(model, dataset.input_size),
        file_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        licence="apache-2.0",
        paper=run.paper,
        model_args=args,
    )
    folder = root / "weights" / name
    partial = folder.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(content)
    shutil.copyfile(recipe_path(run.recipe), partial / "recipe.yaml")
    (partial / "summary.csv").write_text("\n".join(trained) + "\n")
    evidence = {"weight": name, "dataset": dataset.title, "split": "val", "images": result.images}
    evidence |= {"sha256": row.sha256, "metrics": row.metrics, "command": f"chanzoo eval {name} DATA"}
    evidence |= {"pruning": pruning} if pruning else {}
    (partial / "eval.json").write_text(json.dumps(evidence, indent=1) + "\n")
    (partial / "notes.md").write_text(notes(row, trained) + pruning_notes(run, pruning))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    table = root / TABLE.relative_to(ROOT)
    rows = load_rows(table)
    rows[row.name] = row
    save_rows(rows, table)
    return row


def read_pruned(run: Run, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a run with a source: arguments of the network, and what pruning reported."""
    if not run.source:
        return {}, {}
    config = json.loads((out / PRUNED / "config.json").read_text())
    report = json.loads((out / PRUNED / "report.json").read_text())
    if config["architecture"] != run.model:
        raise UsageError(f"{out / PRUNED} holds a {config['architecture']}, not a {run.model}.")
    args = {key: value for key, value in config["model_args"].items() if key != "num_classes"}
    keys = ("method", "target", "align", "seed", "images", "macs", "params", "latency_ms", "top1")
    return args, {"source": run.source, **{key: report[key] for key in keys}}


def pruning_notes(run: Run, pruning: dict[str, Any]) -> str:
    """What became of the accuracy before training."""
    if not pruning:
        return ""
    stages = ", ".join(f"{stage} {100 * top1:.2f} %" for stage, top1 in pruning["top1"].items())
    return (
        f"- Pruned from {run.source} by {pruning['method']} to {pruning['macs']['pruned']:,} multiply-adds "
        f"of {pruning['macs']['full']:,}. Top-1 before the training above: {stages}.\n"
    )


def read_summary(path: Path) -> list[str]:
    """Header and one line per epoch; of an epoch that was repeated after a kill, the later one.

    The train script writes its header again when it resumes.
    """
    header, *lines = path.read_text().strip().splitlines()
    return [header, *{line.partition(",")[0]: line for line in lines if line != header}.values()]


def neutral_command(run: Run) -> str:
    """The command line without the paths of this machine."""
    steps = [prune_command(run, "DATA", "PRUNED")] if run.source else []
    steps.append(launch_command(run, "DATA", script="$TIMM_REPO/train.py"))
    recipe = str(recipe_path(run.recipe))
    lines = (" ".join(["python", *(part.replace(recipe, "recipe.yaml") for part in s[1:])]) for s in steps)
    return " && ".join(lines)


def notes(row: Weight, summary: list[str]) -> str:
    """What a reader cannot see from the other files."""
    last = dict(zip(summary[0].split(","), summary[-1].split(","), strict=True))
    cpu = next(iter(re.findall(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))), platform.processor())
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{cpu}, {os.cpu_count()} cores, shared"
    )
    return (
        f"# {row.name}\n\n"
        f"- Trained for {len(summary) - 1} epochs in {row.hours} h (seed {row.seed}) on {device}; "
        f"torch {torch.__version__.partition('+')[0]}, timm {timm.__version__}, "
        f"chanzoo {chanzoo.__version__}.\n"
        f"- The last epoch's own evaluation (training precision): top-1 {float(last['eval_top1']):.2f} %. "
        f"Measured from the 16-bit file, in 32-bit floats: {100 * row.metrics['top1']:.2f} %.\n"
        f"- The weights are those of the last epoch, not of the best one.\n"
        f"- {DATASETS[row.dataset].title}: {DATASETS[row.dataset].note}\n"
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
