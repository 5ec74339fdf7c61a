"""timm's own model tests, run on our networks.

The tests are those of the installed timm's source distribution, fetched once with pip into the user's
cache; ``$CHANZOO_TIMM_TESTS`` names a folder that has them already.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import timm

import chanzoo

QUICK = ["cifar_resnet20", "ce_cifar_resnet20", "condensenet_cifar50"]
TWO_FORMS = ("condensenet", "sfr_")
HERE = Path(__file__).parent


def fetch_tests() -> Path:
    """Folder with timm's tests; raises OSError or CalledProcessError if it cannot be had."""
    if folder := os.environ.get("CHANZOO_TIMM_TESTS"):
        return Path(folder)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chanzoo"
    target = cache / f"timm-{timm.__version__}-tests"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--dest", scratch, f"timm=={timm.__version__}"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            tests = [entry for entry in archive.getmembers() if entry.name.split("/")[1:2] == ["tests"]]
            archive.extractall(scratch, members=tests, filter="data")
        if not target.is_dir():  # another process may have been faster
            shutil.move(str(next(Path(scratch).glob("*/tests"))), target)
    return target


@pytest.fixture(scope="module")
def timm_tests() -> Path:
    try:
        folder = fetch_tests()
    except (OSError, StopIteration, subprocess.SubprocessError) as error:
        pytest.skip(f"timm's tests were NOT run: they cannot be fetched ({error}); set CHANZOO_TIMM_TESTS")
    if not (folder / "test_models.py").is_file():
        pytest.fail(f"{folder} has no test_models.py")
    return folder


def names() -> list:
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in chanzoo.list_models() if name not in QUICK]
    condensed = [
        pytest.param(f"condensed_{name}", marks=pytest.mark.slow)
        for name in chanzoo.list_models()
        if name.startswith(TWO_FORMS)
    ]
    return [*QUICK, *slow, *condensed]


@pytest.mark.parametrize("name", names())
def test_timm_suite(name: str, timm_tests: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment.pop("GITHUB_ACTIONS", None)  # timm leaves tests out when it is set
    environment["CHANZOO_SUITE_NAMES"] = name
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # neither our settings nor timm's
    command = [sys.executable, "-m", "pytest", "-q", "-p", "timm_suite", "--import-mode", "importlib"]
    command += ["-c", str(tmp_path / "pytest.ini"), "--rootdir", str(tmp_path)]
    command += [str(timm_tests / "test_models.py"), str(timm_tests / "test_prune.py")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and " skipped" not in result.stdout, result.stdout[-2000:]
