"""``chanzoo prune``: a trained network and a budget in, a narrower network out."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .common import (
    add_format,
    add_model_options,
    build_model,
    check_name,
    emit,
    natural,
    positive,
    progress_bar,
    say,
)
from .folders import check_output, is_folder, write_whole
from .targets import check_unmet, read_target

if TYPE_CHECKING:
    from torch import nn

    from ..compress import Pruned, RankTable

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
_NOTHING = "Nothing was pruned."
_MOST_SEED = 2**32 - 1  # what the train script's generators take
# What messages of the library say: there, arguments of functions; here, options.
_WORDS = {
    r"(No network was built|The network is unchanged|Nothing was (?:measured|recorded|sent))\.": _NOTHING,
    r"\bcompress_rate=": "--compress-rate ",
    r"\bcompress_rate\b": "--compress-rate",
    r'\balign="own"': "--align own",
}


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
        "--workers", type=natural, default=0, metavar="N", help="processes that read images (default: 0)"
    )
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    add_model_options(parser)
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything, prune, measure, and write everything or nothing."""
    from .pruned import base_of, make_report, measure, missed, saved_source, table, write

    with in_words_of_this_command():
        check_arguments(args)
        import torch

        model = build_model(args.name, args).to(args.device)
        arch, made_from = base_of(args, model)
        data = Images(model, args) if args.data else None
        target = read_target(args, model)
        check_unmet(args, model, target)
        history: list[RankTable] = []
        torch.manual_seed(args.seed)
        pruned = prune_it(args, model, data, target, history)
    accuracy, recalibrated = measure(args, model, pruned.model, data)
    report = make_report(args, model, pruned, target, accuracy, recalibrated)
    shown = table(report)
    source = saved_source(args, model, pruned, arch, made_from)
    write_whole(args.output, lambda folder: write(folder, args, source, report, pruned, history))
    emit(report, args.format == "json", ("", "full", "pruned", "share"), shown)
    if not report["reached"]:
        say(f"chanzoo: {missed(args, report)}")
    say(f'chanzoo: the narrow network is timm.create_model("local-dir:{args.output}", pretrained=True)')
    if data:
        say(f"Fine-tune it:\n  {report['finetune']}")
    return 0


def prune_it(
    args: argparse.Namespace,
    model: nn.Module,
    data: Images | None,
    target: dict[str, Any],
    history: list[RankTable],
) -> Pruned:
    """The narrow network; tables of ranks on the way are added to the history."""
    from ..compress import prune
    from ..compress.scores import saturated

    with progress_bar(f"ranking the maps of {args.name}") as progress, warnings_said():
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
    if pruned.ranks and saturated(pruned.ranks):
        say("  There the choice is close to a lot.   Compare --method l1, or rank more: --images N")
    return pruned


@contextmanager
def in_words_of_this_command() -> Iterator[None]:
    """Have every refusal name options, and say what was left undone."""
    try:
        yield
    except UsageError as error:
        text = str(error)
        for pattern, words in _WORDS.items():
            text = re.sub(pattern, words, text)
        raise UsageError(text if "Nothing was " in text else f"{text}\n  {_NOTHING}") from error


@contextmanager
def warnings_said() -> Iterator[None]:
    """Show the library's warnings as remarks of the command."""

    class Remarks(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"chanzoo: {record.getMessage()}")

    logger, handler = logging.getLogger("chanzoo"), Remarks(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be done before any work.

    Raises:
        UsageError: A method, file, folder, number or combination that cannot be.
        ChanzooError: A library is missing.
    """
    from ..compress import METHODS
    from ..compress.groups import require_torch_pruning

    check_output(args.output, _FILES, args.overwrite, args.name)
    if args.method not in METHODS:
        raise UsageError(f'no method "{args.method}"; there are: {", ".join(METHODS)}.')
    if not is_folder(args.name):
        check_name(args.name)
    if args.data and not Path(args.data).exists():
        raise UsageError(f'no image folder "{args.data}".')
    if METHODS[args.method].needs_data and not args.data:
        raise UsageError(f"--method {args.method} looks at images: pass --data DIR.")
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        raise UsageError(f"--crop-pct {args.crop_pct}: expected a share above 0, up to 1.")
    if args.recalibrate < 0 or args.recalibrate == 1:
        raise UsageError(f"--recalibrate {args.recalibrate}: expected 2 images or more, or 0.")
    if args.data and args.recalibrate and args.batch_size == 1:
        raise UsageError("--batch-size 1: expected 2 or more, for statistics of norms, or --recalibrate 0.")
    if not 0 <= args.seed <= _MOST_SEED:
        raise UsageError(f"--seed {args.seed}: expected a whole number from 0 to {_MOST_SEED}.")
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
