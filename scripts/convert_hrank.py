"""Convert a checkpoint of the HRank authors to a folder that timm reads back.

``python scripts/convert_hrank.py checkpoint.pth.tar FOLDER`` reads tensors only: nothing in the pickle is
executed. The network is found by the names of the layers and its widths by the shapes of the tensors; they go
into ``config.json``, so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` needs nothing else.

A checkpoint of the first release is full-size, with zeros where filters were removed. It stays so: its zeros
are not always removable without a change of the outputs (a filter that is zero still adds to a shortcut), and
what is written computes what the checkpoint computes. How many filters are zero is said.

The authors state no licence for their weights: convert your own copy, do not pass the result on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from convert_ce import read_authors

from chanzoo.cli.folders import write_whole
from chanzoo.errors import ChanzooError, UsageError
from chanzoo.hub.folders import Source
from chanzoo.hub.saved import network_files
from chanzoo.macs import count_params
from chanzoo.models.hrank import short_widths
from chanzoo.models.hrank_authors import find_variant, from_authors, widths_of

# What the authors train with, where it differs from the configs of our networks.
_CIFAR_DATA = {
    "input_size": (3, 32, 32),
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.2010),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
}


@dataclass(frozen=True)
class Converted:
    """A checkpoint as a network of ours.

    Attributes:
        variant: Our name of it.
        model: With the weights, in evaluation mode.
        zeros: How many of its filters are all zeros.
        filters: How many it has.
    """

    variant: str
    model: nn.Module
    zeros: int
    filters: int


def convert(state: dict[str, Tensor]) -> Converted:
    """A network of ours from the authors' state dict.

    Args:
        state: Of either release; a prefix ``module.`` and a missing ``num_batches_tracked`` are accepted.

    Raises:
        UsageError: Anything else is missing, unknown, of another shape, or not finite; or their network has a
            shortcut that ours has not.

    Source:
        arXiv:2002.10179, the authors' released code (names of layers, and when a shortcut is added).
    """
    variant = find_variant(state)
    ours = from_authors(state, variant)
    cfg: Any = timm.get_pretrained_cfg(variant)
    stem, classifier = ours[f"{cfg.first_conv}.weight"], ours[f"{cfg.classifier}.weight"]
    args: dict[str, Any] = {"num_classes": len(classifier), "in_chans": stem.shape[1]}
    if widths := widths_of(ours, variant):
        args["widths"] = short_widths(variant, widths)
    model = timm.create_model(variant, **args).eval()
    _check(ours, model.state_dict(), variant)
    _check_shortcuts(model)
    model.load_state_dict(ours)
    rows = [m.weight.detach().flatten(1) for m in model.modules() if isinstance(m, nn.Conv2d)]
    zeros = sum(int((row == 0).all(dim=1).sum()) for row in rows)
    return Converted(variant, model, zeros, sum(len(row) for row in rows))


def _check(ours: dict[str, Tensor], expected: dict[str, Tensor], variant: str) -> None:
    for key in sorted(expected.keys() | ours.keys()):
        if key not in ours:
            raise UsageError(f'"{key}" of {variant} is missing.')
        if key not in expected:
            raise UsageError(f'"{key}" is no entry of {variant}.')
        if ours[key].shape != expected[key].shape:
            raise UsageError(
                f'"{key}" does not fit the other tensors\n'
                f"  expected  {list(expected[key].shape)}\n  found     {list(ours[key].shape)}"
            )
        if not ours[key].double().isfinite().all():
            raise UsageError(f'"{key}" holds infinity or what is not a number.')


def _check_shortcuts(model: nn.Module) -> None:
    """The authors add a shortcut wherever widths allow it, timm where those of the full network do."""
    for name, module in model.named_modules():
        block: Any = module
        if type(block).__name__ != "InvertedResidual" or block.has_skip:
            continue
        width = block.conv_pw.in_channels
        if block.conv_dw.stride == (1, 1) and width == block.conv_pwl.out_channels:
            raise UsageError(
                f'block "{name}" has {width} channels before and after: there the authors\' network adds a '
                "shortcut, which ours has not."
            )


def write(folder: Path, converted: Converted) -> None:
    """Write the folder in one go; it is checked to come back bit by bit beforehand.

    Raises:
        UsageError: The folder exists, or the network would not come back.
    """
    if folder.exists():
        raise UsageError(f'"{folder}" exists already.   Name another folder, or remove it.')
    data: dict[str, Any] | None = None
    if "_cifar_" in converted.variant:
        channels: Any = converted.model.in_chans
        data = {**_CIFAR_DATA, "input_size": (channels, 32, 32)}
    state = converted.model.state_dict()
    # No licence: the Hub's helpers then refuse to publish it until somebody names one.
    source = Source(model=converted.model, state=state, cfg={"license": None}, data=data)
    files = network_files(source, {})

    def fill(partial: Path) -> None:
        for name, content in files.items():
            (partial / name).write_bytes(content)

    write_whole(folder, fill)


def main(argv: list[str] | None = None) -> int:
    """Convert one file; the exit code."""
    parser = argparse.ArgumentParser(description="Convert checkpoints of the HRank authors to ours.")
    parser.add_argument("file", type=Path, help="the authors' checkpoint, of either release")
    parser.add_argument("folder", type=Path, help="folder to write; must not exist")
    args = parser.parse_args(argv)
    try:
        if not args.file.is_file():
            raise UsageError(f"there is no file {args.file}.")
        converted = convert(read_authors(args.file))
        write(args.folder, converted)
    except ChanzooError as error:
        print(f"chanzoo: {error}\n  Nothing was written.", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"chanzoo: cannot write {args.folder}: {error.strerror}.", file=sys.stderr)
        return 1
    params = count_params(converted.model)
    print(f"{args.folder}: {converted.variant}, {params:,} parameters", file=sys.stderr)
    if converted.zeros:
        print(
            f"  {converted.zeros} of {converted.filters} filters are zero: they stay, and so do the outputs.",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
