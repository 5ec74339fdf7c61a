"""``chanzoo prune``: a trained network and a budget in, a narrower network out."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .common import (
    add_format,
    add_model_options,
    build_model,
    check_name,
    emit,
    positive,
    progress_bar,
    say,
)
from .inspect import write_whole

if TYPE_CHECKING:
    from torch import nn

    from ..compress import Budget, RankTable
    from ..measure.accuracy import Accuracy

HELP = "make a trained network narrower, to a budget, by the rank of its feature maps"
EXAMPLES = """\
  chanzoo prune cifar_resnet56.c10j --macs 0.5x --data DATA -o resnet56_half
  chanzoo prune resnet50.a1_in1k --macs 2.0G --round-to 8 --data imagenet -o resnet50_2g
  chanzoo prune FOLDER --method l1 --latency 0.6x --data DATA -o faster
  chanzoo prune mobilenetv2_100.ra_in1k --rates "[0.]*5+[0.3]*19" --data DATA -o narrow
  chanzoo prune resnet18 --weights none --method random --params 5M -o shape

DATA holds one folder per class in DATA/train and DATA/val. Ranks and norms are measured on images of train,
accuracy on val; methods other than hrank do without, and then nothing is measured that needs images.
OUT_DIR gets the network (config.json, model.safetensors), which timm loads by name, without the library that
found the couplings: timm.create_model("local-dir:OUT_DIR", pretrained=True). Beside it: report.json, tables
(CSV), pictures (PNG), and finetune.txt, the command of timm's train script that trains it further.
"""
_FILES = {
    *("config.json", "model.safetensors", "report.json", "widths.csv", "widths.png"),
    *("ranks.csv", "rank_histograms.png", "rank_stability.csv", "rank_stability.png", "finetune.txt"),
}
_UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "name", metavar="NAME", help="arch or arch.tag, ours or timm's; hf-hub:ORG/REPO; or a folder"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT_DIR", help="where the network goes"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT_DIR if it is there")
    parser.add_argument(
        "--method", default="hrank", metavar="METHOD", help="hrank, l1 or random (default: hrank)"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--macs", metavar="N", help="multiply-adds to reach: 0.5x of the network's, or 2.0G")
    target.add_argument("--params", metavar="N", help="parameters to reach: 0.5x or 3.2M")
    target.add_argument("--latency", metavar="T", help="time of one image here: 0.6x or 12ms, measured")
    target.add_argument(
        "--rates",
        metavar="R",
        help="fraction of channels to remove: one number; one per group, as [0.]+[0.3]*8; or a JSON file, "
        "names of convolutions (shell globs) to numbers",
    )
    target.add_argument(
        "--compress-rate",
        metavar="R",
        help="a published list of rates, for the networks that HRank's authors pruned",
    )
    parser.add_argument("--data", metavar="DATA_DIR", help="folder of images, see chanzoo eval")
    parser.add_argument("--split", default="train", help="split for ranks and norms (default: train)")
    parser.add_argument(
        "--crop-pct",
        type=float,
        metavar="F",
        help="share of those images that the centre crop keeps (default: the network's own)",
    )
    parser.add_argument("--val-split", default="val", metavar="SPLIT", help="for accuracy (default: val)")
    parser.add_argument(
        "--align",
        choices=("group", "inner", "own"),
        default="group",
        help="inner: leave residual streams whole; own: as HRank's authors, with --compress-rate "
        "(default: group)",
    )
    parser.add_argument(
        "--min-width", type=positive, default=1, metavar="N", help="least channels of a layer"
    )
    parser.add_argument(
        "--round-to", type=positive, default=1, metavar="N", help="channels become a multiple of it"
    )
    parser.add_argument(
        "--prune-head", action="store_true", help="narrow the features that the classifier gets as well"
    )
    parser.add_argument(
        "--images", type=positive, default=768, metavar="N", help="to rank the maps of (default: 768)"
    )
    parser.add_argument(
        "--recalibrate",
        type=int,
        default=1024,
        metavar="N",
        help="images for new statistics of the norms; 0 for none (default: 1024)",
    )
    parser.add_argument("--seed", type=int, default=0, help="which images, and lots (default: 0)")
    parser.add_argument("--batch-size", type=positive, default=128, metavar="N", help="(default: 128)")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read images (default: 0)"
    )
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    add_model_options(parser)
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything, prune, measure, and write everything or nothing."""
    check_arguments(args)
    import torch

    from ..compress import prune, recalibrate_norms
    from ..measure.accuracy import evaluate
    from .pruned import make_report, saved_source, table, write

    model = build_model(args.name, args).to(args.device)
    data = Images(model, args) if args.data else None
    target = read_target(args, model)
    history: list[RankTable] = []
    torch.manual_seed(args.seed)
    with progress_bar(f"ranking the maps of {args.name}") as progress:
        pruned = prune(
            model,
            data.batches(args.images) if data else None,
            method=args.method,
            **target,
            align=args.align,
            min_width=args.min_width,
            round_to=args.round_to,
            keep_head=not args.prune_head,
            images=args.images,
            seed=args.seed,
            progress=progress,
            snapshot=None if args.no_plots else history.append,
        )
    small = pruned.model
    accuracy: dict[str, Accuracy] = {}

    def measure(name: str, network: nn.Module) -> None:
        if data:
            with progress_bar(f"accuracy, {name}") as bar:
                options: Any = {"batch_size": args.batch_size, "workers": args.workers}
                accuracy[name] = evaluate(
                    network, args.data, split=args.val_split, device=args.device, progress=bar, **options
                )

    measure("full", model)
    measure("sliced", small)
    layers = 0
    if data and args.recalibrate:
        with progress_bar("norms") as progress:
            layers = recalibrate_norms(
                small, data.batches(args.recalibrate), args.recalibrate, progress=progress
            )
        measure("recalibrated", small)
    report = make_report(args, model, pruned, accuracy, layers)
    source = saved_source(args, model, pruned, report)
    write_whole(args.output, lambda folder: write(folder, args, source, report, pruned, history))
    emit(report, args.format == "json", ("", "full", "pruned", "share"), table(report))
    say(f'chanzoo: the narrow network is timm.create_model("local-dir:{args.output}", pretrained=True)')
    if data:
        say(f"Fine-tune it:\n  {report['finetune']}")
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be done before any work.

    Raises:
        UsageError: A method, file, folder or combination that does not exist.
        ChanzooError: A library is missing.
    """
    from ..compress import METHODS
    from ..compress.groups import require_torch_pruning

    nothing = "Nothing was pruned."
    if args.output.exists() and not args.output.is_dir():
        raise UsageError(f'"{args.output}" is a file; name a folder.')
    names = {path.name for path in args.output.iterdir()} if args.output.is_dir() else set()
    if names and not args.overwrite:
        raise UsageError(f'"{args.output}" is not empty.\n  {nothing}   Replace it: --overwrite')
    if others := sorted(names - _FILES):
        raise UsageError(f'"{args.output}" holds what is not ours to replace: {", ".join(others[:5])}')
    if args.output.resolve() == Path(args.name).resolve():
        raise UsageError(f'"{args.output}" is the network itself: name another folder.')
    if args.method not in METHODS:
        raise UsageError(f'no method "{args.method}"; there are: {", ".join(METHODS)}.\n  {nothing}')
    if not Path(args.name, "config.json").is_file():
        check_name(args.name)
    if args.data and not Path(args.data).exists():
        raise UsageError(f'no image folder "{args.data}".\n  {nothing}')
    if METHODS[args.method].needs_data and not args.data:
        raise UsageError(f"--method {args.method} looks at images: pass --data DIR.\n  {nothing}")
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        raise UsageError(f"--crop-pct {args.crop_pct}: expected a share above 0, up to 1.\n  {nothing}")
    if args.recalibrate < 0 or args.recalibrate == 1:
        raise UsageError(f"--recalibrate {args.recalibrate}: expected 2 images or more, or 0.\n  {nothing}")
    require_torch_pruning()
    if not args.no_plots:
        from ..measure.plots import require_matplotlib

        require_matplotlib()


class Images:
    """Images of the training split, in an order that the seed gives."""

    def __init__(self, model: nn.Module, args: argparse.Namespace) -> None:
        """Open both splits, so that a wrong folder is known before any work."""
        import torch

        from ..measure.images import open_images

        open_images(model, args.data, args.val_split)
        self.model, self.args = model, args
        self.dataset = open_images(model, args.data, args.split)
        generator = torch.Generator().manual_seed(args.seed)
        self.order = torch.randperm(len(self.dataset), generator=generator).tolist()

    def batches(self, count: int) -> Any:
        """A loader of the first so many."""
        from ..measure.images import Picked, open_loader

        args = self.args
        return open_loader(
            self.model,
            Picked(self.dataset, self.order[:count]),
            batch_size=min(args.batch_size, count),
            workers=args.workers,
            device=args.device,
            crop_pct=args.crop_pct,
        )


def read_target(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """The options for a target, as an argument of :func:`chanzoo.compress.prune`.

    Raises:
        UsageError: They cannot be read.
    """
    if args.macs or args.params:
        name = "macs" if args.macs else "params"
        return {name: read_amount(args.macs or args.params, f"--{name}", ("k", "M", "G"))}
    if args.compress_rate:
        return {"compress_rate": args.compress_rate}
    if args.latency:
        return {"budget": latency_budget(model, args.latency)}
    if not Path(args.rates).is_file():
        from ..models.hrank import read_rates

        try:
            return {"rates": float(args.rates)}
        except ValueError:
            return {"rates": read_rates(args.rates)}
    try:
        rates = json.loads(Path(args.rates).read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f'cannot read "{args.rates}": {error}\n  Nothing was pruned.') from error
    numbers = rates.values() if isinstance(rates, dict) else rates if isinstance(rates, list) else [None]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
        raise UsageError(
            f'"{args.rates}" holds no rates: expected an object, name of a convolution → fraction to remove, '
            "or a list.\n  Nothing was pruned."
        )
    return {"rates": rates}


def read_amount(text: str, option: str, units: tuple[str, ...]) -> float:
    """A share (``0.5x``, at most 1) or an amount (``2.0G``).

    Raises:
        UsageError: It is neither.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-zA-Z]*)", text.strip())
    value, unit = (float(match[1]), match[2]) if match else (0.0, "")
    is_share = unit == "x" and 0 < value <= 1
    if not is_share and not (unit in units and value * _UNITS[unit] > 1e-9 and (value > 1 or unit)):
        shown = ", ".join(f"{1.5:g}{unit}" for unit in units)
        raise UsageError(
            f"{option} {text}: expected a share such as 0.5x, or an amount such as {shown}.\n"
            "  Nothing was pruned."
        )
    return value if is_share else value * _UNITS[unit]


def latency_budget(model: nn.Module, text: str) -> Budget:
    """A budget of time; each candidate takes turns with the full network."""
    from ..compress import Budget
    from ..hub.saved import input_size_of
    from ..measure.latency import measure_latency

    amount = read_amount(text, "--latency", ("us", "ms", "s"))
    is_share = text.strip().endswith("x")

    def cost(small: nn.Module) -> float:
        found = measure_latency({"full": model, "small": small}, input_size_of(model), rounds=3)
        return found["small"] / found["full"] if is_share else found["small"]

    name = "of the full network's time" if is_share else "seconds"
    return Budget(name, amount, cost)
