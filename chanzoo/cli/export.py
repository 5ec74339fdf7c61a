"""``chanzoo export``: a network as a file for other runtimes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .classify import class_labels
from .common import add_model_options, build_model, check_name, emit, human_bytes, positive, progress_bar

if TYPE_CHECKING:
    from ..hub.export import Exported

HELP = "write a network as ONNX or torch.export, and compare the file with it"
EXAMPLES = """\
  chanzoo export ce_cifar_resnet20.c10j --format onnx       ce_cifar_resnet20.c10j.onnx, any batch size
  chanzoo export FOLDER --format torch-export -o net.pt2     a network that was saved in a folder
  chanzoo export resnet50.a1_in1k --format onnx --img-size 288 384
  chanzoo export ce_resnet50 --format onnx --checkpoint runs/x/last.pth.tar --dynamic-size

The file is loaded back, in onnxruntime or by torch.export, and has to give the network's outputs for random
images; one that differs by more than a thousandth of the largest output is not kept.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "name", metavar="NAME", help="arch or arch.tag, ours or timm's; hf-hub:ORG/REPO; or a folder"
    )
    parser.add_argument("--format", choices=("onnx", "torch-export"), required=True, help="of the file")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="(default: NAME with .onnx or .pt2, in this folder)"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    parser.add_argument(
        "--img-size", type=positive, nargs="+", metavar="N", help="N or H W (default: the network's own)"
    )
    parser.add_argument("--dynamic-size", action="store_true", help="leave height and width free")
    parser.add_argument(
        "--batch",
        type=positive,
        default=3,
        metavar="N",
        help="compare at this batch size too, beside 1 (default: 3)",
    )
    parser.add_argument("--no-fold", action="store_true", help="keep batch norms and layers as they are")
    parser.add_argument("--opset", type=positive, metavar="N", help="of ONNX (default: torch's own)")
    parser.add_argument("--json", action="store_true", help="print the result for programs")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Write, compare and print."""
    if args.img_size and len(args.img_size) > 2:
        raise UsageError("--img-size takes one number, or height and width.")
    if args.batch == 1:
        raise UsageError("one image is compared in any case: --batch takes 2 or more.")
    if args.device != "cpu":
        raise UsageError("files are made and compared on the CPU: leave --device out.")
    name = args.name
    if not Path(name, "config.json").is_file():
        check_name(name)
    from ..hub.export import check_target, export_network

    path = args.output or Path(default_name(name) + (".onnx" if args.format == "onnx" else ".pt2"))
    check_target(path, args.format, opset=args.opset, overwrite=args.force)
    model = build_model(name, args)
    facts = {"name": name, "sha256": weights_sha256(args), "label_names": class_labels(model) or None}
    with progress_bar(f"exporting {name}") as progress:
        result = export_network(
            model,
            path,
            args.format,
            size=(args.img_size[0], args.img_size[-1]) if args.img_size else None,
            dynamic_size=args.dynamic_size,
            batch=args.batch,
            fold=not args.no_fold,
            opset=args.opset,
            overwrite=args.force,
            metadata=facts,
            progress=progress,
        )
    data = {
        "model": name,
        "weights": str(args.checkpoint) if args.checkpoint else args.weights or "pretrained",
        "format": args.format,
        "opset": result.opset,
        "output": str(path),
        "file_bytes": result.file_bytes,
        "inputs": list(result.inputs),
        "outputs": list(result.outputs),
        "norms_folded": result.norms_folded,
        "norms_left": result.norms_left,
        "layers_merged": result.layers_merged,
        "difference": max(trial.difference for trial in result.trials),
        "relative_difference": result.worst.relative,
        "trials": [
            {"shape": list(trial.shape), "difference": trial.difference, "largest": trial.largest}
            for trial in result.trials
        ],
        "seconds": round(result.seconds, 2),
    }
    emit(data, args.json, ("", ""), table(data, result))
    return 0


def default_name(name: str) -> str:
    """What a file is called after a network: its name, its folder's or its repository's."""
    if name.startswith("hf-hub:"):
        return name.partition("@")[0].rpartition("/")[2]
    folder = name.removeprefix("local-dir:")
    return Path(folder).resolve().name if Path(folder, "config.json").is_file() else folder


def weights_sha256(args: argparse.Namespace) -> str | None:
    """The sha256 of the file that all weights come from; None where there is none or nobody knows it."""
    from ..store import FILE_NAME, file_sha256
    from ..weights import WEIGHTS, weights_of

    if args.weights == "none" or args.num_classes:
        return None
    if args.checkpoint:
        return file_sha256(args.checkpoint)
    folder = Path(args.name.removeprefix("local-dir:"))
    if (folder / "config.json").is_file():
        return file_sha256(folder / FILE_NAME)
    rows = [WEIGHTS[args.name]] if args.name in WEIGHTS else weights_of(args.name)
    return rows[0].sha256 if rows else None


def table(data: dict[str, Any], result: Exported) -> list[tuple[str, str]]:
    """The result for people."""
    merged = f", {result.layers_merged} Channel Equilibrium layers merged" if result.layers_merged else ""
    opset = f", opset {result.opset}" if result.opset else ""
    worst = result.worst
    shapes = ", ".join("×".join(map(str, trial.shape)) for trial in result.trials)
    return [
        ("model", data["model"]),
        ("weights", data["weights"]),
        ("file", f"{data['output']} ({human_bytes(result.file_bytes)}, {data['format']}{opset})"),
        ("images", "×".join(map(str, result.inputs))),
        ("outputs", "×".join(map(str, result.outputs))),
        ("batch norms", f"{result.norms_folded} folded, {result.norms_left} left{merged}"),
        ("compared at", shapes),
        ("largest difference", f"{data['difference']:.2g}"),
        ("relative", f"{worst.relative:.2g} of the largest output, {worst.largest:.4g}"),
        ("time", f"{result.seconds:.1f} s"),
    ]
