"""Image folders as timm reads them, checked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tarfile import TarError
from typing import Any

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from torch import nn
from torch.utils.data import Dataset

from ..errors import UsageError

__all__ = ["Picked", "data_config", "open_images", "open_loader"]

# Names under which timm looks for a split, and one that it does not know.
_SPLITS = ("train", "training", "val", "valid", "validation", "eval", "evaluation", "test")


class Picked(Dataset):
    """Some samples of a data set, in the order given; the loader's transform reaches the data set itself."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        """Keep a data set and the indices to take from it."""
        self.dataset = dataset
        self.indices = indices

    @property
    def transform(self) -> Any:
        """Of the data set."""
        return self.dataset.transform

    @transform.setter
    def transform(self, value: Any) -> None:
        self.dataset.transform = value

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]

    def __len__(self) -> int:
        return len(self.indices)


def data_config(model: nn.Module) -> dict[str, Any]:
    """How images reach a network in evaluation: timm's answer, with the channels it really has."""
    config = resolve_data_config({}, model=model, use_test_size=True)
    channels = getattr(model, "in_chans", config["input_size"][0])
    return {**config, "input_size": (channels, *config["input_size"][1:])}


def open_images(model: nn.Module, data_dir: str | Path, split: str = "val") -> Any:
    """A data set of images that fits a network.

    Args:
        model: A timm network.
        data_dir: A folder with one folder per class, or with one such folder per split; or a tar file of
            class folders.
        split: Which split; the names that timm takes for one another are all right.

    Returns:
        timm's data set.

    Raises:
        UsageError: There is no such folder or split, it holds no images, or its classes are not as many as
            the network's outputs.
    """
    root = Path(data_dir)
    if not root.exists():
        raise UsageError(f'no image folder "{root}".')
    if root.is_file() and root.suffix != ".tar":
        raise UsageError(f'"{root}" is neither a folder nor a tar file of images.')
    channels = data_config(model)["input_size"][0]
    try:
        dataset = create_dataset(
            "", root=str(root), split=split, input_img_mode="RGB" if channels == 3 else "L"
        )
    except (RuntimeError, TarError) as error:
        if "Found 0 images" not in str(error):
            raise UsageError(f'cannot read images from "{root}": {error}') from error
        expected = "one folder per class, or a folder per split that holds such folders"
        raise UsageError(f'"{root}" holds no images.\n  expected  {expected}') from None
    reader: Any = getattr(dataset, "reader", None)
    if str(getattr(reader, "root", "")) == str(root) and root.is_dir():
        splits = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name in _SPLITS)
        if splits:
            raise UsageError(f'"{root}" has no split "{split}"; it has: {", ".join(splits)}')
    _check_classes(model, root, list(getattr(reader, "class_to_idx", {})))
    return dataset


def _check_classes(model: nn.Module, root: Path, classes: list[str]) -> None:
    outputs = getattr(model, "num_classes", None)
    if not classes or outputs is None or len(classes) == outputs:
        return
    if classes == [""]:
        raise UsageError(f'"{root}" holds images outside class folders; expected one folder per class.')
    shown = ", ".join(classes[:6]) + (", …" if len(classes) > 6 else "")
    raise UsageError(
        f'"{root}" has {len(classes)} classes and the network {outputs} outputs.\n'
        f"  found  {shown}\n"
        "  Nothing was measured."
    )


def open_loader(
    model: nn.Module,
    dataset: Any,
    *,
    batch_size: int,
    workers: int = 0,
    device: torch.device | str = "cpu",
    crop_pct: float | None = None,
) -> Any:
    """Batches as the network was evaluated: its test size, crop, mean and deviation.

    Args:
        model: A timm network.
        dataset: Of :func:`open_images`, or :class:`Picked` from one.
        batch_size: Images at a time.
        workers: Processes that read images; 0 for none besides this one.
        device: Where the batches go.
        crop_pct: Share of an image that the centre crop keeps, if not the network's own.

    Returns:
        An iterable of images ``(b, c, h, w)`` and classes ``(b,)`` on the device.
    """
    config = data_config(model)
    return create_loader(
        dataset,
        input_size=config["input_size"],
        batch_size=batch_size,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=workers,
        crop_pct=crop_pct or config["crop_pct"],
        crop_mode=config["crop_mode"],
        device=torch.device(device),
    )
