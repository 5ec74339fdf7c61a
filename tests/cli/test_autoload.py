"""``chanzoo autoload`` and the hook that it installs, in throw-away environments only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

import chanzoo
from chanzoo.cli import autoload

ROOT = Path(chanzoo.__file__).parent.parent


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The site-packages folder of a new, empty environment, which the command takes for its own."""
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    (folder,) = env.glob("lib/python*/site-packages")
    monkeypatch.setattr(autoload, "folder", lambda: folder)
    return folder


@pytest.fixture
def python(site: Path) -> Callable[..., tuple[str, str]]:
    """Run code in that environment; returns output and errors."""

    def run(code: str, *options: str, **env: str) -> tuple[str, str]:
        file = site.parents[3] / "code.py"
        file.write_text(code)
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [str(site.parents[2] / "bin" / "python"), *options, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, env={**clean, **env})
        assert done.returncode == 0, done.stderr
        return done.stdout.strip(), done.stderr

    return run


def pretend(site: Path, chanzoo_source: str = "print('chanzoo imported')") -> None:
    """Two tiny packages in place of the large ones."""
    (site / "timm").mkdir(exist_ok=True)
    (site / "timm" / "__init__.py").write_text("print('timm imported')\n")
    (site / "timm" / "data.py").write_text("")
    (site / "chanzoo.py").write_text(f"import timm\n{chanzoo_source}\n")


def test_enable_status_disable(cli, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(site.iterdir())

    def state() -> str:
        return json.loads(cli("autoload", "status", "--format", "json").out)["state"]

    assert state() == "disabled"
    done = cli("autoload", "enable")
    assert (done.code, done.out) == (0, "")
    assert done.err == f"chanzoo: autoload is enabled in {site}.   Undo: chanzoo autoload disable\n"
    assert state() == "enabled"
    assert {path.name for path in site.iterdir()} - {path.name for path in before} == set(autoload.files())
    assert (site / "_chanzoo_autoload.start").read_text() == "_chanzoo_autoload:install\n"
    (site / "_chanzoo_autoload.py").write_text("def install(): ...\n")
    assert state() == "outdated"
    (site / "_chanzoo_autoload.start").unlink()
    assert state() == "incomplete"
    monkeypatch.setenv("CHANZOO_AUTOLOAD", "0")
    assert "here      switched off by CHANZOO_AUTOLOAD=0" in cli("autoload", "status").out
    done = cli("autoload", "disable")
    assert done.err == f"chanzoo: autoload is disabled; 2 files were removed from {site}.\n"
    assert state() == "disabled" and sorted(site.iterdir()) == before
    assert "; 0 files" in cli("autoload", "disable").err


def test_the_hook_waits_for_timm(cli, site: Path, python) -> None:
    cli("autoload", "enable")
    pretend(site)
    code = (
        "import sys\n"
        "assert not {'torch', 'timm', 'chanzoo', 'importlib.util'} & set(sys.modules) or 1\n"
        "assert not {'torch', 'timm', 'chanzoo'} & set(sys.modules)\n"
        "hooks = [f for f in sys.meta_path if type(f).__name__ == 'TimmFinder']\n"
        "assert len(hooks) == 1\n"
        "import json, timm.data\n"
        "assert not set(map(id, hooks)) & set(map(id, sys.meta_path))\n"
        "import timm, chanzoo\n"
    )
    for option in ((), ("-I",)):
        assert python(code, *option) == ("timm imported\nchanzoo imported", "")
    assert python("import chanzoo") == ("timm imported\nchanzoo imported", "")
    assert python("import timm", CHANZOO_AUTOLOAD="0") == ("timm imported", "")
    cli("autoload", "disable")
    assert python("import timm") == ("timm imported", "")


def test_children_started_afresh_have_it_too(cli, site: Path, python) -> None:
    cli("autoload", "enable")
    pretend(site)
    code = (
        "import multiprocessing\n"
        "def child():\n    import timm\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=child)\n"
        "    process.start(); process.join()\n"
    )
    assert python(code) == ("timm imported\nchanzoo imported", "")


def test_our_errors_become_a_warning(cli, site: Path, python) -> None:
    cli("autoload", "enable")
    pretend(site, "raise ImportError('chanzoo needs a newer timm')")
    out, err = python("import timm; print('goes on')")
    assert out == "timm imported\ngoes on"
    assert "RuntimeWarning: chanzoo was not imported with timm: chanzoo needs a newer timm\n" in err
    assert f"chanzoo autoload disable, CHANZOO_AUTOLOAD=0, or remove {site / '_chanzoo_autoload.py'}" in err
    (site / "chanzoo.py").unlink()  # uninstalled
    assert "No module named 'chanzoo'" in python("import timm")[1]


def test_a_timm_that_fails_fails_as_without_us(cli, site: Path, python) -> None:
    cli("autoload", "enable")
    pretend(site)
    (site / "timm" / "__init__.py").write_text("raise ImportError('broken')\n")
    code = "try:\n    import timm\nexcept ImportError as error:\n    print(error)\n"
    assert python(code) == ("broken", "")


def test_this_environment_is_left_alone() -> None:
    folder = Path(sysconfig.get_path("purelib"))
    assert not any((folder / name).exists() for name in autoload.files())


@pytest.mark.slow
def test_with_the_real_packages(cli, site: Path, python) -> None:
    cli("autoload", "enable")
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(ROOT)}
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in paths))
    assert python("import timm; print(timm.is_model('ce_resnet50'))", "-I") == ("True", "")
