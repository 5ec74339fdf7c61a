"""The wheel and the source distribution: what is inside, and that an installed wheel works by itself."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import replace
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
from safetensors.torch import save_file

from chanzoo.store import EMBEDDED_LIMIT_BYTES
from chanzoo.weights import Weight, load_rows, save_rows

ROOT = Path(__file__).resolve().parents[2]
MARKDOWN = {path.name for path in ROOT.glob("*.md")}
PARTS = ("chanzoo", "weights", "scripts", "tests", "pyproject.toml", "LICENSE", ".gitignore", *MARKDOWN)
RUNTIME = {"torch", "torchvision", "timm>=1.0.31", "safetensors", "huggingface-hub", "pyyaml", "rich"}
NAME = "cifar_resnet20.t9_c10j"

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="builds from a checkout")

LOAD_ALL = """
import json, sys
import timm, chanzoo
from chanzoo import store, weights
assert chanzoo.__file__.startswith(sys.prefix), chanzoo.__file__
loaded = []
for row in weights.WEIGHTS.values():
    if store.embedded_path(row.name).is_file():
        model = timm.create_model(row.name, pretrained=True)
        assert str(store.locate(row)).startswith(sys.prefix)
        loaded.append(row.name)
print(json.dumps([loaded, chanzoo.__version__]))
"""


class Built(NamedTuple):
    source: Path
    wheel: Path
    sdist: Path
    direct: Path
    embedded: set[str]


def run(*args: str | Path, cwd: Path) -> str:
    """Run a command away from the checkout; returns its output, fails with its words."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(a) for a in args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both distributions of a copy of the checkout, to which one small weight and one too large are added."""
    tmp = tmp_path_factory.mktemp("dist")
    source = tmp / "source"
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / part).is_file():
            shutil.copy(ROOT / part, source / part)
    small = source / "weights" / NAME / "model.safetensors"
    small.parent.mkdir(parents=True)
    save_file(timm.create_model("cifar_resnet20").state_dict(), small)
    row = Weight(
        name=NAME, dataset="c10j", recipe="", command="", seed=0, hours=0, metrics={}, params=0, macs=0,
        file_bytes=small.stat().st_size, sha256=hashlib.sha256(small.read_bytes()).hexdigest(),
        licence="apache-2.0", paper="arXiv:1512.03385",
    )  # fmt: skip
    table = source / "chanzoo" / "weights.json"
    save_rows(
        {
            **load_rows(table),
            NAME: row,
            "cifar_resnet20.t8_c10j": replace(row, name="cifar_resnet20.t8_c10j"),
        },
        table,
    )
    for name, size in (
        ("cifar_resnet20.t8_c10j", EMBEDDED_LIMIT_BYTES + 1),
        ("x.edge", EMBEDDED_LIMIT_BYTES),
    ):
        file = source / "weights" / name / "model.safetensors"
        file.parent.mkdir()
        file.write_bytes(bytes(size))
    embedded = {
        path.parent.name
        for path in source.glob("weights/*/model.safetensors")
        if path.stat().st_size <= EMBEDDED_LIMIT_BYTES
    }
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    run(*build, tmp / "dist", source, cwd=tmp)
    run(*build, tmp / "direct", "--wheel", source, cwd=tmp)
    (wheel,), (sdist,) = (tmp / "dist").glob("*.whl"), (tmp / "dist").glob("*.tar.gz")
    (direct,) = (tmp / "direct").glob("*.whl")
    return Built(source, wheel, sdist, direct, embedded)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a fresh environment with the wheel; its dependencies come from the running environment."""
    env = tmp_path_factory.mktemp("env")
    run(sys.executable, "-m", "venv", "--without-pip", env, cwd=env)
    site = next(env.glob("lib/python*/site-packages"))
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in paths))
    pip = (sys.executable, "-m", "pip", "--python", env / "bin" / "python")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", built.wheel, cwd=env)
    return env


def test_the_wheel_holds_the_package_and_the_small_weights(built: Built) -> None:
    package = built.source / "chanzoo"
    expected = {path.relative_to(built.source).as_posix() for path in package.rglob("*") if path.is_file()}
    expected |= {f"chanzoo/embedded/{name}/model.safetensors" for name in built.embedded}
    names = set(zipfile.ZipFile(built.wheel).namelist())
    found = {name for name in names if ".dist-info/" not in name}
    assert found == expected
    assert {NAME, "x.edge"} <= built.embedded
    for needed in (
        "py.typed",
        "weights.json",
        "recipes/data/c10j_pad4_40e.yaml",
        "recipes/data/train_options.txt",
    ):
        assert f"chanzoo/{needed}" in found
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_from_the_sdist_is_the_same(built: Built) -> None:
    contents = [
        {info.filename: info.CRC for info in zipfile.ZipFile(wheel).infolist()}
        for wheel in (built.wheel, built.direct)
    ]
    assert contents[0] == contents[1]


def test_the_sdist_holds_what_a_packager_needs(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name.partition("/")[0] for name in names} == {*PARTS, "PKG-INFO"}
    assert {"tests/conftest.py", "scripts/hatch_build.py", *MARKDOWN} <= names
    weights = {name for name in names if name.endswith("model.safetensors") and name.startswith("weights/")}
    assert weights == {f"weights/{name}/model.safetensors" for name in built.embedded}


def test_the_metadata(built: Built) -> None:
    archive = zipfile.ZipFile(built.wheel)
    files = {name.rpartition("/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
    meta = Parser().parsestr(archive.read(files["METADATA"]).decode())
    required = {line for line in meta.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert required == RUNTIME
    assert (meta["Requires-Python"], meta["License-Expression"]) == ("<3.14,>=3.10", "Apache-2.0")
    assert "chanzoo = chanzoo.cli.main:main" in archive.read(files["entry_points.txt"]).decode()


def test_an_installed_wheel_loads_every_embedded_weight(
    built: Built, installed: Path, tmp_path: Path
) -> None:
    loaded, version = json.loads(run(installed / "bin" / "python", "-c", LOAD_ALL, cwd=tmp_path))
    assert set(loaded) == built.embedded - {"x.edge"}
    assert built.wheel.name.startswith(f"chanzoo-{version}-")


def test_the_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    assert "usage: chanzoo" in run(installed / "bin" / "chanzoo", "--help", cwd=tmp_path)
