"""Lay out Tiny ImageNet as class folders, which is what timm's train script reads.

    python scripts/prepare_tin.py tiny-imagenet-200 OUT

``OUT/train/<class>/*.JPEG`` and ``OUT/val/<class>/*.JPEG`` are hard links where the file system allows,
copies elsewhere; the download itself is left as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder with train/, val/ and wnids.txt, as distributed")
    parser.add_argument("out", type=Path, help="folder to make")
    args = parser.parse_args()
    annotations = args.source / "val" / "val_annotations.txt"
    if not annotations.is_file():
        print(f"prepare_tin: {annotations} is missing: is {args.source} tiny-imagenet-200?", file=sys.stderr)
        return 2
    if args.out.exists():
        print(f"prepare_tin: {args.out} exists already; nothing was written.", file=sys.stderr)
        return 2
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for image in sorted(args.source.glob("train/*/images/*.JPEG")):
        place(image, partial / "train" / image.parent.parent.name / image.name)
    for line in annotations.read_text().splitlines():
        name, label = line.split("\t")[:2]
        place(args.source / "val" / "images" / name, partial / "val" / label / name)
    partial.rename(args.out)
    return 0


def place(source: Path, target: Path) -> None:
    """Hard link, or copy where links are not possible."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


if __name__ == "__main__":
    sys.exit(main())
