"""What the tests of real training share: timm's script, and small image folders."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def timm_repo() -> Path:
    """timm's checkout; without it the test is skipped, and says so."""
    repo = os.environ.get("TIMM_REPO")
    if not repo:
        pytest.skip("TIMM_REPO is not set: timm's own train.py was NOT run against our models")
    return Path(repo)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of coloured stripes: 130 training and 40 validation images of 32×32 pixels."""
    root = tmp_path_factory.mktemp("stripes")
    for split, per_class in (("train", 13), ("val", 4)):
        for label in range(10):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(per_class):
                stripes(label, 100 * label + i).save(folder / f"{i}.png")
    return root


def stripes(label: int, seed: int) -> Image.Image:
    """Noisy stripes whose angle and period tell the class."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[:32, :32]
    angle, period = label * np.pi / 10, 4 + label % 3
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period + rng.uniform(0, 6))
    pixels = 128 + 60 * wave[..., None] * rng.uniform(0.5, 1, 3) + rng.normal(0, 20, (32, 32, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
