"""``chanzoo run``: other people's scripts find our networks and the installed timm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import timm

from chanzoo.weights import WEIGHTS

REPO = os.environ.get("TIMM_REPO", "")
needs_repo = pytest.mark.skipif(not REPO, reason="TIMM_REPO IS NOT SET: no script of timm's to run")

PROBE = """
import sys, multiprocessing
def child(queue):
    import timm
    queue.put(timm.__file__)
if __name__ == "__main__":
    import timm, helper
    print(sys.argv)
    print(timm.__file__, timm.is_model("ce_resnet50"), helper.VALUE)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start(); print(queue.get()); process.join()
    sys.exit(7)
"""


def test_a_script_beside_another_timm(python, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    (clone / "timm").mkdir(parents=True)
    (clone / "timm" / "__init__.py").write_text("raise SystemExit('the wrong timm')\n")
    (clone / "helper.py").write_text("VALUE = 'beside'\n")
    (clone / "probe.py").write_text(PROBE)
    done = python("-m", "chanzoo", "run", "clone/probe.py", "-m", "x", "--help")
    assert (done.code, done.err) == (7, "")
    argv, found, child = done.out.splitlines()
    assert argv == "['clone/probe.py', '-m', 'x', '--help']"
    assert found == f"{timm.__file__} True beside"
    assert child == timm.__file__


def test_a_module_and_errors_of_its_own(python, tmp_path: Path) -> None:
    (tmp_path / "tool.py").write_text("import sys, timm; print(sys.argv[1:], __name__); open('none.txt')\n")
    done = python("-m", "chanzoo", "run", "-m", "tool", "--flag")
    assert (done.code, done.out) == (1, "['--flag'] __main__\n")
    assert "Traceback" in done.err and "FileNotFoundError" in done.err


def test_the_front_of_the_path(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [])
    (tmp_path / "script.py").write_text("import sys; print(sys.path[0])\n")
    assert cli("run", tmp_path / "script.py").out == f"{tmp_path.resolve()}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["none.py"], 'no script "none.py".'),
        (["."], 'no script ".". It is a folder.'),
        (
            ["-m", "no_such_module"],
            'no module "no_such_module".   A script is run without -m: chanzoo run SCRIPT',
        ),
        ([], "the following arguments are required: SCRIPT, ARGS\n  See: chanzoo run --help"),
    ],
)
def test_mistakes(cli, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str) -> None:
    monkeypatch.setattr("sys.argv", [])
    done = cli("run", *args)
    assert (done.code, done.out, done.err) == (2, "", f"chanzoo: {message}\n")


@pytest.mark.slow
@needs_repo
def test_benchmark(python) -> None:
    script = (
        "-m",
        "chanzoo",
        "run",
        Path(REPO, "benchmark.py"),
        "--model",
        "cifar_resnet20",
        "--device",
        "cpu",
    )
    sizes = ("--bench", "inference", "-b", "4", "--num-bench-iter", "5", "--num-warm-iter", "1")
    done = python(*script, *sizes)
    assert done.code == 0, done.err
    assert '"infer_samples_per_sec"' in done.out and '"param_count": 0.27' in done.out


@needs_repo
def test_validate_finds_our_weights(python, images: Path) -> None:
    name = next(iter(WEIGHTS))
    script = ("-m", "chanzoo", "run", Path(REPO, "validate.py"), "--model", name, "--pretrained")
    done = python(*script, "--data-dir", images, "--split", "val", "-b", "8", "--device", "cpu", "-j", "0")
    assert done.code == 0, done.err
    assert f'"model": "{name}"' in done.out
