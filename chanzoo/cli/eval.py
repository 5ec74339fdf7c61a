"""``chanzoo eval``: accuracy of a network on a folder of images."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UsageError
from .common import add_format, add_model_options, build_model, emit, natural, percent, positive, progress_bar

HELP = "measure accuracy on a folder of images"
EXAMPLES = """\
  chanzoo eval ce_cifar_resnet20.c10j DATA                  DATA/val/CLASS/*.png
  chanzoo eval ce_cifar_resnet20 DATA --checkpoint runs/x/last.pth.tar
  chanzoo eval resnet50 DATA --device cuda --amp --format json
  torchrun --nproc-per-node 2 -m chanzoo eval ce_resnet50 DATA --num-classes 200
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", metavar="NAME", help="arch or arch.tag, ours or timm's")
    parser.add_argument("data", metavar="DATA_DIR", help="folder with one folder per class, or per split")
    parser.add_argument(
        "--split", default="val", help="split, or name of a tar file in DATA_DIR (default: val)"
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="per process (default: 32 on a CPU, else 256)"
    )
    parser.add_argument(
        "--workers", type=natural, default=2, metavar="N", help="processes that read images (default: 2)"
    )
    parser.add_argument("--amp", action="store_true", help="compute in 16 bits where that is safe")
    parser.add_argument(
        "--amp-dtype", choices=("float16", "bfloat16"), default="float16", help="(default: float16)"
    )
    add_model_options(parser)
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print, once however many processes there are."""
    if not os.path.exists(args.data):  # before anything slow
        raise UsageError(f'no image folder "{args.data}".')
    import torch

    from ..measure.accuracy import default_batch_size, evaluate

    with processes(args.device) as (rank, world, device):
        args.device = device
        batch_size = args.batch_size or default_batch_size(device)
        model = build_model(args.name, args)
        start = time.perf_counter()
        with progress_bar(f"{args.name} on {args.split}") as progress:
            result = evaluate(
                model,
                args.data,
                split=args.split,
                batch_size=batch_size,
                workers=args.workers,
                device=device,
                amp=args.amp,
                amp_dtype=getattr(torch, args.amp_dtype),
                progress=progress,
            )
    seconds = time.perf_counter() - start
    if rank:
        return 0
    data = {
        "model": args.name,
        "weights": str(args.checkpoint) if args.checkpoint else args.weights or "pretrained",
        "data": args.data,
        "split": args.split,
        "images": result.images,
        "top1": result.top1,
        "top5": result.top5,
        "top1_count": result.top1_count,
        "top5_count": result.top5_count,
        "loss": result.loss,
        "batch_size": batch_size,
        "device": device,
        "amp": args.amp_dtype if args.amp else None,
        "processes": world,
        "seconds": round(seconds, 2),
    }
    rows = [
        ("model", args.name),
        ("weights", data["weights"]),
        ("images", f"{result.images:,} of {args.data} ({args.split})"),
        ("top-1", f"{percent(result.top1)} ({result.top1_count:,})"),
        ("top-5", f"{percent(result.top5)} ({result.top5_count:,})"),
        ("loss", f"{result.loss:.4f}"),
        ("rate", f"{result.images / seconds:,.0f} images/s on {device}, {world} process{'es' * (world > 1)}"),
    ]
    emit(data, args.format == "json", ("", ""), rows)
    return 0


@contextmanager
def processes(device: str) -> Iterator[tuple[int, int, str]]:
    """Join the processes that torchrun started; gives rank, number of processes, and this one's device."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1, device
        return
    import torch
    import torch.distributed as dist

    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield dist.get_rank(), world, device
    finally:
        dist.destroy_process_group()
