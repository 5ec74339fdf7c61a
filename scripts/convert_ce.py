"""Convert a checkpoint of the authors' CE-ResNet to ours, and back.

``python scripts/convert_ce.py checkpoint.pth.tar model.safetensors`` reads tensors only: nothing in the
pickle is executed. ``--to-authors`` writes one of our safetensors files in the authors' layout. Everything
is checked before anything is written. The authors state no licence for their weights: convert your own
copy, do not pass the result on.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from chanzoo.errors import ChanzooError, UsageError
from chanzoo.models.ce_resnet import CEResNet, from_authors, to_authors

_SYMMETRY = 1e-3  # what 100 epochs of a 32-bit moving average may leave
_EIGENVALUES = (1 - 1e-2, 1.5**3 + 1e-2)  # of three Newton steps, with slack for the same reason


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from the authors' one.

    Args:
        state: The authors' ``state_dict``; a prefix ``module.``, a missing ``num_batches_tracked`` and a
            missing or present ``running_mean`` of CE layers are accepted.

    Raises:
        UsageError: Anything else is missing, unknown or of another shape; a CE buffer is not one.

    Source:
        arXiv:2003.00214; bounds of the operators from three Newton steps on unit-trace covariances.
    """
    ours = from_authors(state)
    check(ours)
    return ours


def check(ours: dict[str, Tensor]) -> None:
    """Check a state dict of ours: names, shapes, and the buffers of every CE layer.

    Raises:
        UsageError: Names the entry, with what was expected and found.
    """
    depth = find_depth(ours)
    fc = ours.get("fc.weight")
    if fc is None:
        raise UsageError('"fc.weight" is missing.')
    expected = CEResNet(depth, num_classes=len(fc), device="meta").state_dict()
    for key in sorted(expected.keys() | ours.keys()):
        if key not in ours:
            raise UsageError(f'"{key}" of ce_resnet{depth} is missing.')
        if key not in expected:
            raise UsageError(f'"{key}" is no entry of ce_resnet{depth}.')
        _expect(key, ours[key].shape == expected[key].shape, list(expected[key].shape), list(ours[key].shape))
    for key, value in ours.items():
        value = value.double()
        _expect(key, bool(value.isfinite().all()), "finite numbers", "not a number or infinity")
        if key.endswith("running_scale"):
            _expect(key, value.item() > 0, "a positive number", value.item())
        if key.endswith("running_wm"):
            skew = (value - value.transpose(1, 2)).abs().max().item()
            _expect(key, skew <= _SYMMETRY, f"symmetric to {_SYMMETRY}", f"differences of {skew:.2g}")
            eigenvalues = torch.linalg.eigvalsh((value + value.transpose(1, 2)) / 2)
            low, high = eigenvalues.min().item(), eigenvalues.max().item()
            bounds = f"eigenvalues in [{_EIGENVALUES[0]:.2f}, {_EIGENVALUES[1]:.2f}]"
            inside = low >= _EIGENVALUES[0] and high <= _EIGENVALUES[1]
            _expect(key, inside, bounds, f"[{low:.2f}, {high:.2f}]")


def _expect(key: str, holds: bool, expected: Any, found: Any) -> None:
    if not holds:
        raise UsageError(f'"{key}" is not what it should be\n  expected  {expected}\n  found     {found}')


def find_depth(state: dict[str, Tensor]) -> int:
    """Depth of the network that a state dict belongs to: weighted layers on the main path."""
    blocks = {match[0] for key in state if (match := re.match(r"layer\d+\.\d+\.", key))}
    layers = 3 if any(key.endswith("conv3.weight") for key in state) else 2
    depth = layers * len(blocks) + 2
    if depth not in (18, 34, 50, 101, 152):
        raise UsageError(
            f"{len(blocks)} blocks of {layers} convolutions are no CE-ResNet of 18 to 152 layers."
        )
    return depth


def read_authors(path: Path, ema: bool = False) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint, without executing anything from the file.

    Args:
        path: Tensors and plain values; the options of a run may be among them.
        ema: Take the averaged weights if there are any.

    Raises:
        UsageError: It holds other things, or no state dict.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever reading a damaged file raises
        raise UsageError(
            f"{path} holds more than tensors and options, or is damaged: {_first_line(error)}"
        ) from None
    state = content
    if isinstance(content, dict):
        averaged = content.get("state_dict_ema") if ema else None
        state = averaged or content.get("state_dict", content)
    if not isinstance(state, dict) or not state:
        raise UsageError(f"{path} holds no state dict.")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UsageError(f'"{key}" in {path} is no tensor.')
    return {str(key): value for key, value in state.items()}


def _first_line(error: Exception) -> str:
    line = f"{type(error).__name__}: {error}".partition("\n")[0]
    return re.sub(r"\x1b\[[0-9;]*m", "", line)  # torch prints some words bold


def read_ours(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{path} is no safetensors file: {error}") from None


def write(path: Path, data: dict[str, Tensor], as_authors: bool) -> None:
    """Write beside the target, then over it, so that the target is never half written."""
    partial = path.with_name(path.name + ".partial")
    if as_authors:
        torch.save({"state_dict": data}, partial)
    else:
        tensors = {key: value.contiguous() for key, value in data.items()}
        partial.write_bytes(save(tensors, metadata={"format": "pt"}))
    partial.replace(path)


def main(argv: list[str] | None = None) -> int:
    """Convert one file; the exit code."""
    parser = argparse.ArgumentParser(
        description="Convert CE-ResNet checkpoints between the authors' layout and ours."
    )
    parser.add_argument("file", type=Path, help="the authors' checkpoint, or ours with --to-authors")
    parser.add_argument("out", type=Path, help="safetensors file to write, or checkpoint with --to-authors")
    parser.add_argument("--to-authors", action="store_true", help="convert ours to the authors' layout")
    args = parser.parse_args(argv)
    try:
        if not args.file.is_file():
            raise UsageError(f"there is no file {args.file}.")
        if args.to_authors:
            ours = read_ours(args.file)
            check(ours)
            result = to_authors(ours)
        else:
            result = ours = convert(read_authors(args.file))
        write(args.out, result, args.to_authors)
    except ChanzooError as error:
        print(f"chanzoo: {error}\n  Nothing was written.", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"chanzoo: cannot write {args.out}: {error.strerror}.", file=sys.stderr)
        return 1
    print(f"{args.out}: ce_resnet{find_depth(ours)}, {len(result)} entries", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
