"""``chanzoo classify``: what a network sees in a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import NoWeightsError, UsageError
from .common import add_format, add_model_options, build_model, check_name, emit, percent, positive, say

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

HELP = "classify pictures"
EXAMPLES = """\
  chanzoo classify cat.jpg                            with the first weights that are part of the package
  chanzoo classify *.jpg --model ce_resnet50 --top 3
  chanzoo classify cat.jpg --model resnet50.a1_in1k --format json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="picture files")
    parser.add_argument(
        "--model", metavar="NAME", help="arch or arch.tag, ours or timm's (default: embedded weights)"
    )
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="classes to show (default: 5)")
    add_model_options(parser)
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Classify every picture, then print."""
    for path in args.images:
        read_image(path, decode=False)
    name = args.model or default_model()
    check_name(name)
    if not args.model:
        say(f"chanzoo: no --model given; using {name}, whose weights are part of the package.")
    import torch
    from timm.data import create_transform, resolve_data_config

    model = build_model(name, args).to(args.device)
    config = resolve_data_config({}, model=model, use_test_size=True)
    transform: Any = create_transform(**config)
    labels = class_labels(model)
    mode = "RGB" if config["input_size"][0] == 3 else "L"
    results, rows = [], []
    for path in args.images:
        image = read_image(path).convert(mode)
        with torch.inference_mode():
            probabilities = model(transform(image)[None].to(args.device)).softmax(dim=1)[0].cpu()
        best = probabilities.topk(min(args.top, len(probabilities)))
        predictions = [
            {"index": index, "label": labels[index] if labels else str(index), "probability": value}
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        results.append({"image": str(path), "model": name, "predictions": predictions})
        rows += [
            (str(path) if not rank else "", str(p["label"]), percent(p["probability"]), str(p["index"]))
            for rank, p in enumerate(predictions)
        ]
    emit(results, args.format == "json", ("image", "class", "probability", "index"), rows)
    return 0


def read_image(path: Path, decode: bool = True) -> Image:
    """Open a picture.

    Raises:
        UsageError: It is missing, or no picture that can be read.
    """
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise UsageError(f'no image "{path}".' + (" It is a folder." if path.is_dir() else ""))
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
    except UnidentifiedImageError:
        raise UsageError(f'cannot read image "{path}": it is in no format that Pillow knows.') from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f'cannot read image "{path}": {error}') from error
    return image


def default_model() -> str:
    """The first weight that is part of the package.

    Raises:
        NoWeightsError: There is none.
    """
    from ..store import embedded_path
    from ..weights import WEIGHTS

    name = next((row.name for row in WEIGHTS.values() if embedded_path(row.name).is_file()), None)
    if name is None:
        raise NoWeightsError(
            "no --model given, and no weights are part of this package.\n  See all: chanzoo ls"
        )
    return name


def class_labels(model: nn.Module) -> list[str]:
    """Names of the outputs, empty where nobody knows them."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    cfg: Any = model.pretrained_cfg
    names: list[str] = list(cfg.get("label_names") or ())
    if len(names) == model.num_classes:
        return names
    if subset := infer_imagenet_subset(model):
        info = ImageNetInfo(subset)
        return [info.index_to_description(index) for index in range(info.num_classes())]
    return []
