"""Whether a weight is what its row, or its folder, says: the checks that publishing and the tests share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import timm
import yaml
from torch import nn

from ..errors import UsageError, WeightsRejectedError
from ..measure import count_macs, count_params
from ..measure.accuracy import evaluate
from ..recipes.check import check_recipe
from ..recipes.table import RECIPES, run_of
from ..store import FILE_NAME
from ..weights import DATASETS, Weight
from .card import Measured
from .folders import EVIDENCE, cfg_of
from .package import Package, with_measured
from .saved import unpacked

__all__ = ["TOLERANCE", "check_evidence", "check_metrics", "check_network", "check_package", "check_row"]

TOLERANCE = 1e-4  # one image in 10,000: a tie between two classes may fall otherwise on another machine


def check_evidence(row: Weight, folder: Path) -> None:
    """Compare a row with its file, with the evidence beside it, and with the run that was to make it.

    Args:
        row: Of the table.
        folder: With ``model.safetensors`` and the files of the evidence.

    Raises:
        UsageError: Something is missing or says something else.
        WeightsRejectedError: The file is not the one of the row.
    """
    missing = [name for name in (FILE_NAME, *EVIDENCE) if not (folder / name).is_file()]
    if missing:
        raise _disagrees(row, "the evidence", "all of it", f"no {', '.join(missing)}")
    content = (folder / FILE_NAME).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if (digest, len(content)) != (row.sha256, row.file_bytes):
        expected = f"sha256 {row.sha256}, {row.file_bytes:,} bytes"
        found = f"sha256 {digest}, {len(content):,} bytes"
        raise _rejected(row.name, "the weight file", expected, found)
    try:
        report = json.loads((folder / "eval.json").read_bytes())
        recipe = yaml.safe_load((folder / "recipe.yaml").read_bytes())
    except (ValueError, yaml.YAMLError) as error:
        raise _disagrees(row, "the evidence", "JSON and YAML", str(error).splitlines()[0]) from error
    for what, found, expected in (
        ("sha256 in eval.json", report.get("sha256"), row.sha256),
        ("metrics in eval.json", report.get("metrics"), row.metrics),
    ):
        if found != expected:
            raise _disagrees(row, what, expected, found)
    if problems := check_recipe(folder / "recipe.yaml"):
        key = f"line {problems[0].line}: {problems[0].key}"
        raise _disagrees(row, "recipe.yaml", "keys of timm's train script", key)
    header, *epochs = (folder / "summary.csv").read_text(encoding="utf-8").splitlines() or [""]
    if not header.startswith("epoch,") or len(epochs) < recipe.get("epochs", 1):
        raise _disagrees(row, "summary.csv", f"{recipe.get('epochs')} epochs", f"{len(epochs)} lines")
    if row.name not in (folder / "notes.md").read_text(encoding="utf-8"):
        raise _disagrees(row, "notes.md", f"remarks on {row.name}", "another text")
    run = run_of(row.name)
    if run is None:
        raise _disagrees(row, "its run", "a row in chanzoo/recipes/table.py", "none")
    wanted = (run.recipe, run.seed, RECIPES[run.recipe].dataset)
    if (row.recipe, row.seed, row.dataset) != wanted:
        raise _disagrees(row, "recipe, seed and data set", wanted, (row.recipe, row.seed, row.dataset))


def check_network(row: Weight, model: nn.Module) -> None:
    """Compare a row with the network that comes back from its file.

    Raises:
        UsageError: Size, cost, classes, input or tag are others.
    """
    dataset, cfg = DATASETS[row.dataset], cfg_of(model)
    for what, found, expected in (
        ("params", count_params(model), row.params),
        ("macs", count_macs(model, dataset.input_size), row.macs),
        ("classes", getattr(model, "num_classes", None), dataset.num_classes),
        ("input size", tuple(cfg.get("input_size", ())), dataset.input_size),
        ("tag", cfg.get("tag"), row.tag),
    ):
        if found != expected:
            raise _disagrees(row, what, expected, found)


def check_metrics(name: str, claimed: dict[str, float], found: dict[str, float]) -> None:
    """Compare claimed metrics with measured ones.

    Raises:
        WeightsRejectedError: One differs by more than :data:`TOLERANCE`, or cannot be measured.
    """
    for key, value in claimed.items():
        if key not in found or not abs(found[key] - value) <= TOLERANCE:
            measured = f"{found[key]:.6f}" if key in found else "no such metric"
            raise _rejected(
                name, f"its {key}", f"{value:.6f}, as claimed", f"{measured}, measured from the file"
            )


def check_row(
    row: Weight,
    folder: Path,
    data_dir: str | Path,
    split: str = "val",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Check everything about a row: evidence, network, and the metrics, measured again from the file.

    Args:
        row: Of the table.
        folder: What is to be published, see :class:`chanzoo.hub.package.Package`.
        data_dir: The row's data set.
        split: On which the metrics are measured.
        progress: See :func:`chanzoo.measure.accuracy.evaluate`.

    Raises:
        UsageError: A check failed, or the data are not what the network needs.
        WeightsRejectedError: The file is another one, or its metrics are.
    """
    check_evidence(row, folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    check_network(row, model)
    check_metrics(row.name, row.metrics, _measure(model, data_dir, split, progress).metrics)


def check_package(
    package: Package,
    data_dir: str | Path,
    split: str = "val",
    progress: Callable[[int, int], None] | None = None,
) -> Package:
    """Check a package before it is sent; that of a folder gains the metrics that were measured.

    Raises:
        UsageError: A check failed, or the data are not what the network needs.
        WeightsRejectedError: The metrics are not the claimed ones.
    """
    with unpacked(package.files) as folder:
        if package.row:
            check_row(package.row, folder, data_dir, split, progress)
            return package
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        measured = _measure(model, data_dir, split, progress)
    check_metrics(package.name, _claims(package), measured.metrics)
    return with_measured(package, measured)


def _measure(
    model: nn.Module, data_dir: str | Path, split: str, progress: Callable[[int, int], None] | None
) -> Measured:
    result = evaluate(model, data_dir, split=split, progress=progress)
    return Measured({"top1": round(result.top1, 6), "top5": round(result.top5, 6)}, split, result.images)


def _claims(package: Package) -> dict[str, float]:
    """Metrics that the ``eval.json`` of a folder claims."""
    if "eval.json" not in package.files:
        return {}
    try:
        report = json.loads(package.files["eval.json"])
        return {str(key): float(value) for key, value in report.get("metrics", {}).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"eval.json of {package.name} cannot be read: {error}\n  Nothing was sent."
        ) from error


def _disagrees(row: Weight, what: str, expected: object, found: object) -> UsageError:
    return UsageError(
        f"{row.name} is not what its row says: {what}\n"
        f"  expected  {expected}\n"
        f"  found     {found}\n"
        "  Nothing was sent.   File the weight anew: python scripts/train_next.py --file-only"
    )


def _rejected(name: str, what: str, expected: str, found: str) -> WeightsRejectedError:
    return WeightsRejectedError(
        f"{name} is not what it claims to be: {what}\n"
        f"  expected  {expected}\n"
        f"  found     {found}\n"
        "  Nothing was sent.",
        expected=expected,
        found=found,
    )
