"""`import chanzoo` in fresh processes: silent where all is well, one clear error where timm is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import chanzoo

OURS = str(Path(chanzoo.__file__).parent.parent)


def python(*args: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter with our package on the path, behind ``path`` if one is given."""
    parts = [str(path)] if path else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*parts, OURS])}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env)


def fake_timm(folder: Path, version: str | None) -> Path:
    """A package named timm that knows its version and nothing else."""
    package = folder / "timm"
    package.mkdir(parents=True)
    file = package / "__init__.py"
    file.write_text(f"__version__ = {version!r}\n" if version else "")
    return file


def add_distribution(folder: Path, version: str) -> None:
    """What pip leaves beside a package."""
    info = folder / f"timm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: timm\nVersion: {version}\n")


def test_an_old_installed_timm_is_refused(tmp_path: Path) -> None:
    file = fake_timm(tmp_path, "1.0.30")
    add_distribution(tmp_path, "1.0.30")
    done = python("-c", "import chanzoo", path=tmp_path)
    assert done.returncode == 1
    assert "ImportError: chanzoo needs an installed timm 1.0.31 or newer" in done.stderr
    assert "Python imported timm 1.0.30\n" in done.stderr
    assert f"  imported   {file}\n" in done.stderr
    assert 'python -m pip install -U "timm>=1.0.31"' in done.stderr
    assert "hidden" not in done.stderr
    assert "No network was registered." in done.stderr


def test_a_newer_clone_that_hides_the_installed_timm_is_refused(tmp_path: Path) -> None:
    file = fake_timm(tmp_path, "9.9.0.dev0")
    done = python("-c", "import chanzoo", path=tmp_path)
    assert done.returncode == 1
    assert "Python imported timm 9.9.0.dev0\n" in done.stderr
    assert f"  imported   {file}\n" in done.stderr
    assert f"  installed  {timm.__file__} ({timm.__version__}), hidden by the one above\n" in done.stderr
    assert "python -P" in done.stderr


@pytest.mark.parametrize("version", ["1.0.30", "1.0.9", "1.0.31.dev0", "1.0.31rc1", "0.9.16", None])
def test_versions_below_the_floor(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    if version:
        monkeypatch.setattr(timm, "__version__", version)
    else:
        monkeypatch.delattr(timm, "__version__")
    with pytest.raises(ImportError, match=f"Python imported timm {version or '0.unknown'}"):
        chanzoo._check_timm()


@pytest.mark.parametrize("version", ["1.0.31", "1.0.31.post1", "1.0.31+local", "1.0.100", "1.1.0rc1", "2.0"])
def test_versions_from_the_floor_on(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(timm, "__version__", version)
    chanzoo._check_timm()


def test_an_editable_install_is_not_taken_for_a_hidden_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_distribution(tmp_path, timm.__version__)  # its metadata lies where its code does not
    monkeypatch.syspath_prepend(tmp_path)
    chanzoo._check_timm()


def test_a_namespace_folder_named_timm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "__file__", None)
    with pytest.raises(ImportError, match="a folder without __init__"):
        chanzoo._check_timm()


def test_a_script_inside_a_clone_is_refused(tmp_path: Path) -> None:
    fake_timm(tmp_path, "1.0.29.dev0")
    script = tmp_path / "train.py"
    script.write_text("import chanzoo\n")
    done = python(str(script))
    assert done.returncode == 1
    assert "hidden by the one above" in done.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="python -P came with 3.11")
def test_the_advice_helps(tmp_path: Path) -> None:
    fake_timm(tmp_path, "1.0.29.dev0")
    script = tmp_path / "train.py"
    script.write_text("import chanzoo; print(len(chanzoo.list_models('cifar_resnet20')))\n")
    done = python("-P", str(script))
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_import_is_silent_and_the_second_one_does_nothing() -> None:
    code = (
        "import sys, timm, chanzoo\n"
        "names, modules, models = timm.list_models(), set(sys.modules), chanzoo.models\n"
        "import chanzoo, importlib\n"
        "importlib.reload(chanzoo)\n"
        "assert timm.list_models() == names and set(sys.modules) == modules and chanzoo.models is models\n"
    )
    done = python("-W", "error", "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_name_that_timm_has_already_is_refused() -> None:
    code = (
        "import sys, types, warnings, timm\n"
        "from timm.models import register_model\n"
        "warnings.simplefilter('ignore')\n"
        "home = sys.modules['timm.models.resnet']\n"
        "exec('def cifar_resnet20(pretrained=False): pass', home.__dict__)\n"
        "register_model(home.cifar_resnet20)\n"
        "import chanzoo\n"
    )
    done = python("-c", code)
    assert done.returncode == 1
    assert (
        f"chanzoo {chanzoo.__version__} and timm {timm.__version__} both have: cifar_resnet20\n"
        in done.stderr
    )
    assert "python -m pip install -U chanzoo" in done.stderr


def test_lazy_names_are_listed_and_unknown_ones_refused() -> None:
    assert set(chanzoo.__all__) <= set(dir(chanzoo))
    for name in chanzoo.__all__:
        assert getattr(chanzoo, name) is not None
    with pytest.raises(AttributeError, match="module 'chanzoo' has no attribute 'resize_all'"):
        _ = chanzoo.resize_all  # pyright: ignore[reportAttributeAccessIssue]
