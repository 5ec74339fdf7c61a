"""Convert checkpoints of the CondenseNet V2 authors to ours, and back.

``python scripts/convert_condensenet.py checkpoint.pth.tar FOLDER`` reads tensors only: nothing in the pickle
is executed. Of a training run, the averaged weights are taken, as the authors do, or the plain ones with
``--no-ema``. Both of their forms are understood, with masks and converted; the network is found by the names
and shapes of the layers. What is written computes what the checkpoint computes, and
``timm.create_model("local-dir:FOLDER", pretrained=True)`` needs nothing else.

``python scripts/convert_condensenet.py --to-authors FOLDER checkpoint.pth.tar`` goes the other way, for a
folder of ours that holds one of their networks.

The authors' code is under the MIT licence; they state none for their weights: convert your own copy.
"""

from __future__ import annotations

import argparse
import sys
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
from chanzoo.hub.folders import Source, read_saved
from chanzoo.hub.saved import network_files
from chanzoo.layers import CondensedReactivation, SparseReactivation
from chanzoo.layers.condensing import learned_layers
from chanzoo.macs import count_params
from chanzoo.models.condensenet import VARIANTS, CondenseNet
from chanzoo.models.condensenet_authors import find_variant, from_authors, to_authors


def convert(state: dict[str, Tensor]) -> tuple[str, nn.Module]:
    """A network of ours from the authors' state dict, in the same form.

    Args:
        state: Of a training run or converted; a prefix ``module.`` is accepted.

    Returns:
        Its name, and the network in evaluation mode.

    Raises:
        UsageError: It belongs to no network of ours, an entry is missing, unknown, of another shape or not
            finite, or a mask has not the connections that its stage leaves.

    Source:
        arXiv:2104.04382, the authors' released code (names of layers).
    """
    variant = find_variant(state)
    ours = from_authors(state, VARIANTS[variant].get("groups", 8))
    condensed = any(key.endswith(".index") for key in ours)
    for key, axes in (("fc.bias", 1), ("stem.weight", 4)):  # of which the sizes of the network are taken
        if key not in ours or ours[key].ndim != axes:
            raise UsageError(f'"{key}" of {variant} is {"of another shape" if key in ours else "missing"}.')
    args: dict[str, Any] = {"num_classes": len(ours["fc.bias"]), "in_chans": ours["stem.weight"].shape[1]}
    if condensed:
        args["condensed"] = True
    model = timm.create_model(variant, **args).eval()
    expected = model.state_dict()
    for key, value in expected.items():
        if key.startswith("progress.") or key.endswith("num_batches_tracked"):
            ours.setdefault(key, value)
    for key in sorted(expected.keys() | ours.keys()):
        if key not in ours or key not in expected:
            raise UsageError(f'"{key}" of {variant} is {"missing" if key in expected else "no entry of it"}.')
        if ours[key].shape != expected[key].shape:
            raise UsageError(
                f'"{key}" does not fit the other tensors\n'
                f"  expected  {list(expected[key].shape)}\n  found     {list(ours[key].shape)}"
            )
        if not ours[key].double().isfinite().all():
            raise UsageError(f'"{key}" holds infinity or what is not a number.')
        if key.endswith(".index") and not 0 <= int(ours[key].min()) <= int(ours[key].max()) < _reach(
            model, key
        ):
            raise UsageError(f'"{key}" names channels that there are not.')
    model.load_state_dict(ours)
    for name, layer in learned_layers(model).items():
        left = layer.candidates - int(layer.stage) * (layer.candidates // layer.condensation_factor)
        if found := [count for count in layer.alive().sum(dim=1).tolist() if count != left]:
            raise UsageError(
                f'a group of layer "{name}" has {found[0]} connections left at stage {int(layer.stage)}\n'
                f"  expected  {left} of {layer.candidates}"
            )
    return variant, model


def _reach(model: nn.Module, key: str) -> int:
    """How many channels an index may name."""
    layer: Any = model.get_submodule(key.removesuffix(".index"))
    return layer.out_channels if key.endswith("sfr.index") else layer.in_channels


def write(folder: Path, model: nn.Module) -> None:
    """Write the folder in one go; it is checked to come back bit by bit beforehand.

    Raises:
        UsageError: The folder exists, or the network would not come back.
    """
    if folder.exists():
        raise UsageError(f'"{folder}" exists already.   Name another folder, or remove it.')
    # No licence: the Hub's helpers then refuse to publish it until somebody names one.
    files = network_files(Source(model=model, state=model.state_dict(), cfg={"license": None}), {})

    def fill(partial: Path) -> None:
        for name, content in files.items():
            (partial / name).write_bytes(content)

    write_whole(folder, fill)


def write_authors(path: Path, folder: Path) -> nn.Module:
    """Write a folder of ours as a checkpoint of theirs.

    Raises:
        UsageError: It holds another network.
    """
    if path.exists():
        raise UsageError(f'"{path}" exists already.   Name another file, or remove it.')
    model = read_saved(folder).model
    if not isinstance(model, CondenseNet) or not model.sfr_sizes[0]:
        raise UsageError(f'"{folder}" holds no CondenseNet V2 but a {type(model).__name__}.')
    for name, layer in model.named_modules():
        if isinstance(layer, (SparseReactivation, CondensedReactivation)):
            found = (layer.groups, layer.condensation_factor)
            if found[0] != found[1]:
                raise UsageError(
                    f'layer "{name}" has {found[0]} groups and condensation factor {found[1]}: theirs has '
                    "one number for both."
                )
    state = to_authors(model.state_dict())
    find_variant(state)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:  # whose errors say more than those of torch
        torch.save({"state_dict": state}, file)
    partial.replace(path)
    return model


def main(argv: list[str] | None = None) -> int:
    """Convert one file; the exit code."""
    parser = argparse.ArgumentParser(description="Convert checkpoints of the CondenseNet V2 authors.")
    parser.add_argument("source", type=Path, help="the authors' checkpoint, or our folder with --to-authors")
    parser.add_argument("target", type=Path, help="folder to write, or checkpoint with --to-authors")
    parser.add_argument("--to-authors", action="store_true", help="convert ours to the authors' layout")
    parser.add_argument("--no-ema", action="store_true", help="not the averaged weights of a training run")
    args = parser.parse_args(argv)
    try:
        if args.to_authors:
            name, model = str(args.source), write_authors(args.target, args.source)
        else:
            if not args.source.is_file():
                raise UsageError(f"there is no file {args.source}.")
            name, model = convert(read_authors(args.source, ema=not args.no_ema))
            write(args.target, model)
    except ChanzooError as error:
        print(f"chanzoo: {error}\n  Nothing was written.", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"chanzoo: cannot write {args.target}: {error.strerror}.", file=sys.stderr)
        return 1
    form = "condensed" if getattr(model, "condensed", False) else "training form"
    print(f"{args.target}: {name}, {form}, {count_params(model):,} parameters", file=sys.stderr)
    return 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
