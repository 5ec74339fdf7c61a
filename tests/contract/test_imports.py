"""Imports point one way, timm's private names stay in one file, and importing us costs next to nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import chanzoo

PACKAGE = Path(chanzoo.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

BOTTOM = {"errors", "weights", "store", "macs", "_timm"}
NETS = BOTTOM | {"layers", "models"}
TOOLS = {"compress", "recipes", "measure"}
# What each part of the package may import of ours; the root is the package's own __init__.
ARROWS = {
    "errors": set(),
    "weights": set(),
    "_timm": set(),
    "macs": set(),
    "store": {"errors", "weights"},
    "layers": {"errors"},
    "models": BOTTOM | {"layers"},
    "compress": NETS,
    "recipes": NETS,
    "measure": NETS,
    "hub": NETS | TOOLS | {"root"},
    "launch": {"errors", "root"},
    "autoload": {"errors", "root"},
    "cli": NETS | TOOLS | {"hub", "launch", "autoload", "root"},
    "root": NETS | TOOLS,
    "__main__": {"cli"},
}
STDLIB_ONLY = {"errors", "weights"}
RUNTIME = {"torch", "torchvision", "timm", "safetensors", "huggingface_hub", "yaml", "rich", "PIL", "numpy"}


class Import(NamedTuple):
    """One imported module or name, fully dotted."""

    target: str
    line: int
    at_top: bool


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Every import of a module's source, those in functions and under TYPE_CHECKING included."""
    tree = ast.parse(source)
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{prefix}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (Import(name, node.lineno, node in tree.body) for name in names)


def part_of(dotted: str) -> str:
    """Part of the package that a dotted name of ours belongs to."""
    second = [*dotted.split("."), ""][1]
    return second if second in ARROWS else "root"


def first_bad_arrow(source: str, module: str, is_package: bool = False) -> str | None:
    """The first import that points back, as text; None if there is none."""
    here = part_of(module)
    for item in imports(source, module, is_package):
        if item.target.split(".")[0] != "chanzoo":
            continue
        there = part_of(item.target)
        if there != here and there not in ARROWS[here]:
            return f"{module}, line {item.line}: {here} → {there} ({item.target})"
    return None


def private_timm(source: str, module: str) -> list[str]:
    """Imports of underscored modules or names of timm."""
    return [
        f"{module}, line {item.line}: {item.target}"
        for item in imports(source, module)
        if item.target.split(".")[0] == "timm" and any(p.startswith("_") for p in item.target.split("."))
    ]


def unpickling(source: str, module: str) -> list[str]:
    """Ways to open a pickle: the module itself, or torch.load without ``weights_only=True``."""
    bad = [
        f"{module}, line {item.line}: {item.target}"
        for item in imports(source, module)
        if item.target.split(".")[0] in ("pickle", "cloudpickle", "dill") or item.target == "torch.load"
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            bad += [] if safe else [f"{module}, line {node.lineno}: torch.load"]
    return bad


def name_of(path: Path) -> str:
    """Dotted name of a file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.fixture(params=FILES, ids=name_of)
def file(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_module_has_its_place() -> None:
    parts = {[*name_of(path).split("."), "root"][1] for path in FILES}
    assert parts <= set(ARROWS), "add the new part to ARROWS"


def test_no_arrow_points_back(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert first_bad_arrow(source, name_of(file), file.name == "__init__.py") is None


def test_private_timm_names_are_in_one_file(file: Path) -> None:
    if file.name == "_timm.py":
        return
    assert private_timm(file.read_text(encoding="utf-8"), name_of(file)) == []


def test_no_pickle_is_opened(file: Path) -> None:
    assert unpickling(file.read_text(encoding="utf-8"), name_of(file)) == []


def test_module_level_imports_are_runtime_dependencies(file: Path) -> None:
    allowed = {"chanzoo"} if part_of(name_of(file)) in STDLIB_ONLY else {"chanzoo"} | RUNTIME
    for item in imports(file.read_text(encoding="utf-8"), name_of(file), file.name == "__init__.py"):
        top = item.target.split(".")[0]
        if item.at_top:
            assert top in allowed or top in sys.stdlib_module_names, item


def test_layers_use_torch_and_timm_layers_only(file: Path) -> None:
    if part_of(name_of(file)) != "layers":
        return
    for item in imports(file.read_text(encoding="utf-8"), name_of(file), file.name == "__init__.py"):
        top = item.target.split(".")[0]
        ours = top in ("chanzoo", "torch") or item.target.startswith("timm.layers")
        assert ours or top in sys.stdlib_module_names, item


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        (
            "chanzoo.layers.x",
            "from ..models import cifar_resnet",
            "layers → models (chanzoo.models.cifar_resnet)",
        ),
        ("chanzoo.layers.x", "def f():\n    import chanzoo.hub.pull", "line 2: layers → hub"),
        ("chanzoo.measure.x", "from chanzoo.recipes.table import RUNS", "measure → recipes"),
        ("chanzoo.recipes.x", "from .. import compress", "recipes → compress (chanzoo.compress)"),
        ("chanzoo.compress.x", "from .. import __version__", "compress → root (chanzoo.__version__)"),
        ("chanzoo.models.x", "import chanzoo", "models → root (chanzoo)"),
        ("chanzoo.store", "from . import models", "store → models"),
        (
            "chanzoo.store",
            "if TYPE_CHECKING:\n    from .models._build import build",
            "line 2: store → models",
        ),
        ("chanzoo.errors", "from .weights import WEIGHTS", "errors → weights"),
        ("chanzoo.hub.x", "from ..cli import main", "hub → cli"),
        ("chanzoo.hub.x", "from ..launch import run", "hub → launch"),
    ],
)
def test_the_checker_names_a_bad_arrow(module: str, source: str, found: str) -> None:
    assert found in (first_bad_arrow(source, module) or "")


def test_the_checker_lets_good_arrows_pass() -> None:
    lines = ["import torch", "from . import table", "from ..weights import WEIGHTS", "from .. import models"]
    source = "\n".join(lines)
    assert first_bad_arrow(source, "chanzoo.recipes.x") is None
    assert first_bad_arrow("from .equilibrium import A", "chanzoo.layers", is_package=True) is None


def test_the_checker_finds_private_timm_names_and_pickles() -> None:
    lines = [
        "from timm.models._features import a",
        "import timm.layers._fx",
        "from timm.models import _registry",
    ]
    assert len(private_timm("\n".join([*lines, "import timm"]), "m")) == 3
    lines = ["import torch, pickle", "torch.load(f)", "torch.load(f, weights_only=False)"]
    assert len(unpickling("\n".join([*lines, "torch.load(f, weights_only=True)"]), "m")) == 3


def test_importing_us_loads_nothing_but_us() -> None:
    probe = (
        "import sys, timm; before = set(sys.modules); import chanzoo\n"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})\n"
        "print(*(m for m in set(sys.modules) - before if m.startswith('chanzoo.')))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    tops, ours = (set(line.split()) for line in done.stdout.splitlines())
    assert tops == {"chanzoo"}
    assert {part_of(name) for name in ours} <= NETS
