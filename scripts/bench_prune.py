"""How much of the multiply-adds that pruning removes is won as time.

    python scripts/bench_prune.py                       ResNet-50 at half, in multiples of 8 channels, CPU
    python scripts/bench_prune.py --model mobilenetv2_100 --device cuda --batch 32

Channels are drawn by lot (which ones does not matter for time). The full and the narrow network take turns,
so that both see the same machine; the ratio counts, not the seconds. The goal is for one thread: several
share a layer in blocks of channels, of which a narrow one may have too few to keep them busy on one image.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import timm
import torch
from timm.utils import reparameterize_model

import chanzoo
from chanzoo.compress import prune
from chanzoo.errors import ChanzooError
from chanzoo.measure.latency import measure_latency

GOAL = 0.85  # of the cut of ResNet-50 in multiples of 8 channels, on one thread of a CPU


def main() -> int:
    """Run the command line; 1 if a row that has a goal misses it, 2 for a network that cannot be pruned."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5], help="shares to reach")
    parser.add_argument("--round-to", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--fold", action="store_true", help="fold batch norms into convolutions first")
    args = parser.parse_args()
    if not timm.is_model(args.model):
        parser.error(f'no network "{args.model}"')
    try:
        return run(args)
    except ChanzooError as error:
        print(f"bench_prune: {error}", file=sys.stderr)
        return error.exit_code


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    missed = 0
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    full = timm.create_model(args.model).eval()
    size: Any = full.pretrained_cfg["input_size"]  # pyright: ignore
    where = f"{args.device}, {args.threads} thread(s), torch {torch.__version__}"
    print(f"{args.model} at {size[1]}×{size[2]}, {where}")
    print("target  round  batch   MACs removed   time won   share of the cut that shows as time")
    for share in args.macs:
        for step in args.round_to:
            small = prune(full, method="random", macs=share, round_to=step).model
            removed = 1 - chanzoo.count_macs(small, size) / chanzoo.count_macs(full, size)
            networks = {"full": full, "narrow": small}
            if args.fold:
                networks = {name: reparameterize_model(net) for name, net in networks.items()}
            networks = {name: net.to(args.device) for name, net in networks.items()}
            for batch in args.batch:
                seconds = measure_latency(networks, size, batch_size=batch, rounds=args.rounds)
                won = 1 - seconds["narrow"] / seconds["full"]
                has_goal = (args.model, args.device, args.threads, step) == ("resnet50", "cpu", 1, 8)
                missed += has_goal and won < GOAL * removed
                goal = f"   goal {100 * GOAL:.0f} %" if has_goal else ""
                print(
                    f"{share:>5.2f}x  {step:>5}  {batch:>5}   {100 * removed:>10.1f} %   "
                    f"{100 * won:>6.1f} %   {100 * won / removed:>6.1f} %{goal}",
                    flush=True,
                )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
