"""One frozen row per published weight, one per data set, and where the rows come from.

The rows themselves are data, in ``weights.json`` beside this file: written by ``scripts/train_next.py``
when a run is filed, by ``chanzoo publish`` when a file is published, and by nobody by hand. A row exists
when its file exists.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["DATASETS", "WEIGHTS", "Dataset", "Weight", "load_rows", "save_rows", "weights_of"]

TABLE = Path(__file__).with_name("weights.json")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR10_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    """What a weight was trained on, and how its images reach the network.

    Attributes:
        tag: Short name, the last part of a weight's tag.
        title: Full name.
        note: What a reader of a metric has to know.
        hub_id: The Hub's name of the data set it derives from.
        train_images: Of the training split.
        num_classes: Classes.
        input_size: Channels, height, width.
        mean: Per channel, of inputs in [0, 1].
        std: Per channel, likewise.
        crop_pct: Share of the resized image that the centre crop keeps.
        interpolation: Of the resize.
        label_names: In the order of the outputs; empty when they are too many to list here.
    """

    tag: str
    title: str
    note: str
    hub_id: str
    train_images: int
    num_classes: int
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    label_names: tuple[str, ...] = ()

    def cfg(self, stride: int) -> dict[str, Any]:
        """The data part of a timm config for a network that divides the image size by ``stride``."""
        size = self.input_size[1:]
        cfg: dict[str, Any] = {
            "num_classes": self.num_classes,
            "input_size": self.input_size,
            "pool_size": tuple(-(-n // stride) for n in size),
            "mean": self.mean,
            "std": self.std,
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
        }
        if self.label_names:
            cfg["label_names"] = self.label_names
        return cfg


@dataclass(frozen=True)
class Weight:
    """A weight file that exists, and what was measured from that very file.

    Attributes:
        name: ``arch.tag``.
        dataset: Key of :data:`DATASETS`.
        recipe: Name of the recipe that made it.
        command: The whole command line of the training run.
        seed: Of the run.
        hours: Wall-clock hours of the run, on the machine named in its notes.
        metrics: Measured from the file, as fractions: ``top1``, ``top5``.
        params: Parameters.
        macs: Multiply-adds of one image, see ``chanzoo.measure``.
        file_bytes: Size of ``model.safetensors``.
        sha256: Of ``model.safetensors``.
        licence: Of the weights (SPDX).
        paper: Of the method.
        model_args: Constructor arguments that differ from the architecture's own.
        hub_repo: Repository on the Hub, empty until published.
        revision: Commit there, 40 hexadecimal digits, empty until published.
        published: What a paper reports for the nearest setting, empty if it reports none.
    """

    name: str
    dataset: str
    recipe: str
    command: str
    seed: int
    hours: float
    metrics: dict[str, float]
    params: int
    macs: int
    file_bytes: int
    sha256: str
    licence: str
    paper: str
    model_args: dict[str, Any] = field(default_factory=dict)
    hub_repo: str = ""
    revision: str = ""
    published: str = ""

    @property
    def arch(self) -> str:
        """The architecture's registered name."""
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        """What follows the architecture."""
        return self.name.partition(".")[2]


DATASETS = {
    row.tag: row
    for row in (
        Dataset(
            tag="c10j",
            title="CIFAR-10, re-encoded as JPEG",
            note="JPEG quality 75 with chroma subsampling: expect 1–2 points below original CIFAR-10, "
            "do not compare with it.",
            hub_id="uoft-cs/cifar10",
            train_images=50_000,
            num_classes=10,
            input_size=(3, 32, 32),
            mean=CIFAR10_MEAN,
            std=CIFAR10_STD,
            label_names=CIFAR10_NAMES,
        ),
        Dataset(
            tag="tin",
            title="Tiny ImageNet",
            note="200 classes of ImageNet at 64×64; metrics are on the 10,000 validation images.",
            hub_id="zh-plus/tiny-imagenet",
            train_images=100_000,
            num_classes=200,
            input_size=(3, 64, 64),
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        ),
    )
}


def load_rows(path: Path = TABLE) -> dict[str, Weight]:
    """Rows of a table file, by name.

    Raises:
        ValueError: The file is not such a table; names the row.
    """
    rows = {}
    for entry in json.loads(path.read_text(encoding="utf-8")):
        try:
            row = Weight(**entry)
        except TypeError as error:
            raise ValueError(f"{path.name}: row {entry.get('name')!r}: {error}") from None
        rows[row.name] = row
    return rows


def save_rows(rows: dict[str, Weight], path: Path = TABLE) -> None:
    """Write a table file whole: beside the old one, then over it."""
    text = json.dumps([asdict(rows[name]) for name in sorted(rows)], indent=1, ensure_ascii=False) + "\n"
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


WEIGHTS = load_rows()


def weights_of(arch: str) -> list[Weight]:
    """Rows of one architecture: the plain ``arch.<dataset>`` tag first, then by name."""
    rows = [row for row in WEIGHTS.values() if row.arch == arch]
    return sorted(rows, key=lambda row: (row.tag != row.dataset, row.name))
