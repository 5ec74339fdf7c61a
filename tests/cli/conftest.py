"""Small image folders, a checkpoint, and two ways of running the command: inside this process and outside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from PIL import Image

import chanzoo
from chanzoo.cli.main import main

ROOT = str(Path(chanzoo.__file__).parent.parent)


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command in this process."""

    def run(*args: str | Path) -> Done:
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as exit:  # --help and --version leave by it
            code = int(exit.code or 0)
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., Done]:
    """Run Python in an empty folder, as a user would."""

    def run(*args: str | Path, **env: str) -> Done:
        done = subprocess.run(
            [sys.executable, *map(str, args)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", **env},
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes in val/, 23 images (an odd number), no two alike."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for index in range(23):
        folder = root / "val" / f"class{index % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = torch.randint(0, 256, (3, 4, 4), generator=generator, dtype=torch.uint8)
        image = Image.fromarray(coarse.permute(1, 2, 0).numpy()).resize((40, 36))
        image.save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What timm's train script would leave of a network that was never trained."""
    torch.manual_seed(1)
    model = timm.create_model("ce_cifar_resnet20").train()
    model(4 * torch.randn(16, 3, 32, 32))  # moves the running statistics
    path = tmp_path_factory.mktemp("checkpoint") / "last.pth.tar"
    torch.save({"state_dict": model.state_dict()}, path)
    return path
