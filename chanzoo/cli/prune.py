"""``chanzoo prune``: a trained network and a budget in, a narrower network out."""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
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
    check_writable,
    emit,
    human_count,
    positive,
    progress_bar,
    say,
)
from .inspect import write_whole

if TYPE_CHECKING:
    from torch import nn

    from ..compress import Budget, Pruned, RankTable

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
    r"(No network was built|The network is unchanged|Nothing was (measured|recorded|sent))\.": _NOTHING,
    r"\bcompress_rate=": "--compress-rate ",
    r"\bcompress_rate\b": "--compress-rate",
    r'\balign="own"': "--align own",
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

    check_writable(args.output)
    if args.output.exists() and not args.output.is_dir():
        raise UsageError(f'"{args.output}" is a file; name a folder.')
    if is_folder(args.name) and args.output.resolve() == folder_of(args.name).resolve():
        raise UsageError(f'"{args.output}" is the network itself: name another folder.')
    names = {path.name for path in args.output.iterdir()} if args.output.is_dir() else set()
    if names and not args.overwrite:
        raise UsageError(f'"{args.output}" is not empty.\n  {_NOTHING}   Replace it: --overwrite')
    if others := sorted(names - _FILES):
        raise UsageError(f'"{args.output}" holds what is not ours to replace: {", ".join(others[:5])}')
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
    if args.workers < 0:
        raise UsageError(f"--workers {args.workers}: expected 0 processes or more.")
    if not 0 <= args.seed <= _MOST_SEED:
        raise UsageError(f"--seed {args.seed}: expected a whole number from 0 to {_MOST_SEED}.")
    require_torch_pruning()
    if not args.no_plots:
        from ..measure.plots import require_matplotlib

        require_matplotlib()


def folder_of(name: str) -> Path:
    """Where a network is that was named by its folder."""
    return Path(name.removeprefix("local-dir:"))


def is_folder(name: str) -> bool:
    """Whether a network was named by its folder."""
    return (folder_of(name) / "config.json").is_file()


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
    for name in ("macs", "params"):
        if (amount := getattr(args, name)) is not None:
            return {name: read_amount(amount, f"--{name}", ("k", "M", "G"))}
    if args.compress_rate is not None:
        return {"compress_rate": args.compress_rate}
    if args.latency is not None:
        return {"budget": latency_budget(model, args.latency)}
    if not Path(args.rates).is_file():
        return {"rates": read_rates(args.rates)}
    try:
        rates = json.loads(Path(args.rates).read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f'cannot read "{args.rates}": {error}') from error
    numbers = rates.values() if isinstance(rates, dict) else rates if isinstance(rates, list) else [None]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
        raise UsageError(
            f'"{args.rates}" holds no rates: expected an object, name of a convolution → fraction to remove, '
            "or a list."
        )
    return {"rates": rates}


def read_rates(text: str) -> float | list[float]:
    """One rate, or one for each group.

    Raises:
        UsageError: It is neither.
    """
    from ..models.hrank import read_rates as read_list

    try:
        return float(text)
    except ValueError:
        pass
    try:
        return read_list(text)
    except UsageError as error:
        if "[" in text:
            words = str(error).replace("compress_rate=", "--rates ").replace("compress_rate", "--rates")
            raise UsageError(words) from error
        raise UsageError(
            f"--rates {shlex.quote(text)}: there is no file of this name, and it is no rate.\n"
            "  expected  one number, such as 0.3; one per group, as [0.]+[0.3]*8; or a JSON file"
        ) from error


def read_amount(text: str, option: str, units: tuple[str, ...]) -> float:
    """A share (``0.5x``, below 1) or an amount (``2.0G``).

    Raises:
        UsageError: It is neither.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-zA-Z]*)", text.strip())
    value, unit = (float(match[1]), match[2]) if match else (0.0, "")
    if unit == "x" and 0 < value < 1:
        return value
    least = 1e-9 if "s" in units else 1.0  # a count of 1 or less would be taken for a share
    amount = value * _UNITS.get(unit, 0.0)
    if unit not in ("", *units) or (not unit and "s" in units) or amount <= least:
        shown = ", ".join(f"{1.5:g}{unit}" for unit in units)
        raise UsageError(
            f"{option} {shlex.quote(text)}: expected a share such as 0.5x, or an amount such as {shown}."
        )
    return amount


def check_unmet(args: argparse.Namespace, model: nn.Module, target: dict[str, Any]) -> None:
    """Refuse a budget that the network meets as it is, before anything that takes long.

    Raises:
        UsageError: Likewise.
    """
    from ..hub.saved import input_size_of
    from ..macs import count_macs, count_params

    name, asked = next(iter(target.items()))
    if name == "budget" and not is_share(args.latency):
        name, asked, found = "latency", asked.target, asked.cost(model)
    elif name in ("macs", "params"):
        found = count_macs(model, input_size_of(model)) if name == "macs" else count_params(model)
    else:
        return
    if found <= asked:  # a share never is
        has = f"{1000 * found:.3g} ms here" if name == "latency" else human_count(int(found))
        raise UsageError(
            f"--{name} {getattr(args, name)} is met already: {args.name} has {has}.\n"
            "  expected  less than that, or a share of it such as 0.5x"
        )


def is_share(text: str) -> bool:
    """Whether a target is a share of the full network's."""
    return text.strip().endswith("x")


def latency_budget(model: nn.Module, text: str) -> Budget:
    """A budget of time; each candidate takes turns with the full network."""
    from ..compress import Budget
    from ..hub.saved import input_size_of
    from ..measure.latency import measure_latency

    amount = read_amount(text, "--latency", ("us", "ms", "s"))
    relative = is_share(text)

    def cost(small: nn.Module) -> float:
        found = measure_latency({"full": model, "small": small}, input_size_of(model), rounds=3)
        return found["small"] / found["full"] if relative else found["small"]

    name = "of the full network's time" if relative else "seconds"
    return Budget(name, amount, cost)
