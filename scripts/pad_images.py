"""Prepare small images for training with random crops: pad the training images once, by reflection.

    python scripts/pad_images.py c10j c10j_pad4

timm's train script has no crop with padding, the usual augmentation of 32×32 images (He et al. 2016,
arXiv:1512.03385, section 4.2). On training images padded to 40×40 its random resized crop with
``scale: [0.64, 0.64]`` and ``ratio: [1.0, 1.0]`` is just that: a crop of 32×32 pixels at a random place,
not resized. Validation images are copied as they are.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--pad", type=int, default=4, metavar="N", help="pixels on each side (default: 4)")
    args = parser.parse_args()
    images = sorted(path for path in args.source.glob("train/*/*") if path.is_file())
    if not images or not (args.source / "val").is_dir():
        print(f"pad_images: {args.source} has no train/<class>/ and val/ folders.", file=sys.stderr)
        return 2
    if args.out.exists():
        print(f"pad_images: {args.out} exists already; nothing was written.", file=sys.stderr)
        return 2
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    border = ((args.pad, args.pad), (args.pad, args.pad), (0, 0))
    for path in images:
        target = partial / path.relative_to(args.source).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        padded = np.pad(np.asarray(Image.open(path).convert("RGB")), border, mode="reflect")
        Image.fromarray(padded).save(target, compress_level=1)
    shutil.copytree(args.source / "val", partial / "val")
    partial.rename(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
