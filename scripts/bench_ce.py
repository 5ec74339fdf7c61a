"""Cost of Channel Equilibrium on this CPU, as ratios to the plain networks.

``python scripts/bench_ce.py [--threads N] [--json]`` times each CE network and its plain twin in turn, in
the order plain, CE, CE, plain within every repetition, and reports the median over repetitions of the
ratio. Only ratios of one run mean anything: absolute times depend on the machine and its load. For
inference both networks have their batch norms folded into their convolutions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import chanzoo  # noqa: F401  # registers the networks
from chanzoo.layers.folding import fold_pairs

PAIRS = (("ce_resnet50", "resnet50"), ("ce_mobilenetv2", "mobilenetv2_100"))
GOALS = {("ce_resnet50", "eval"): 1.15, ("ce_mobilenetv2", "eval"): 1.20, ("ce_resnet50", "train"): 1.35}


@dataclass(frozen=True)
class Ratio:
    """Time of a CE network over that of its twin.

    Attributes:
        model: The CE network.
        baseline: The plain one.
        mode: ``eval`` (one forward, everything folded) or ``train`` (forward, backward, SGD step).
        batch: Images at once.
        size: Pixels of an image's side.
        threads: Of torch.
        wall: Median ratio of wall-clock times.
        wall_low: Quartile below.
        wall_high: Quartile above.
        cpu: Median ratio of the process's CPU times; less disturbed by other processes.
        goal: What we aim at; 0 for none.
    """

    model: str
    baseline: str
    mode: str
    batch: int
    size: int
    threads: int
    wall: float
    wall_low: float
    wall_high: float
    cpu: float
    goal: float

    def line(self) -> str:
        """The ratio for people."""
        goal = f"   goal {self.goal:.2f}" if self.goal else ""
        return (
            f"{self.model:<16} / {self.baseline:<16} {self.mode:<5} batch {self.batch:<2} {self.size} px "
            f"{self.threads} threads   wall {self.wall:.3f} ({self.wall_low:.3f}–{self.wall_high:.3f})   "
            f"cpu {self.cpu:.3f}{goal}"
        )


def fold_all(model: nn.Module) -> nn.Module:
    """Fold every batch norm of a plain network whose modules are registered in the order they run."""
    for module in list(model.modules()):
        fold_pairs(module)
    return model.eval()


def settle(model: nn.Module, size: int) -> nn.Module:
    """Give a fresh network running statistics, so that its activations are of ordinary magnitude."""
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(4, 3, size, size))
    return model.eval()


def inference(name: str, batch: int, size: int) -> Callable[[], object]:
    """A function that runs one folded forward."""
    model = settle(timm.create_model(name), 64)
    x = torch.randn(batch, 3, size, size)
    with torch.no_grad():
        before = model(x)
        folded = reparameterize_model(model) if name.startswith("ce_") else fold_all(model)
        if not torch.allclose(folded(x), before, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
            raise RuntimeError(f"{name} changed its output when folded.")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())

    def step() -> object:
        with torch.inference_mode():
            return folded(x)

    return step


def training(name: str, batch: int, size: int) -> Callable[[], object]:
    """A function that runs one training step."""
    model = timm.create_model(name).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    x, target = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))

    def step() -> object:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        return optimizer.step()

    return step


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(model: str, baseline: str, mode: str, batch: int, size: int, repeats: int) -> Ratio:
    """Time a pair of networks in turn."""
    make = inference if mode == "eval" else training
    plain, ours = make(baseline, batch, size), make(model, batch, size)
    wall, cpu = [], []
    for i in range(repeats + 1):
        a, b, c, d = timed(plain), timed(ours), timed(ours), timed(plain)
        if i:  # the first round warms up
            wall.append((b[0] + c[0]) / (a[0] + d[0]))
            cpu.append((b[1] + c[1]) / (a[1] + d[1]))
    low, _, high = statistics.quantiles(wall, n=4)
    return Ratio(
        model,
        baseline,
        mode,
        batch,
        size,
        torch.get_num_threads(),
        statistics.median(wall),
        low,
        high,
        statistics.median(cpu),
        GOALS.get((model, mode), 0.0),
    )


def main() -> int:
    """Run the comparisons asked for."""
    parser = argparse.ArgumentParser(
        description="Cost of Channel Equilibrium as ratios to the plain networks."
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1], help="images at once (default 8 1)")
    parser.add_argument(
        "--size", type=int, default=224, help="pixels of the images for inference (default 224)"
    )
    parser.add_argument("--train-size", type=int, default=128, help="pixels for training steps (default 128)")
    parser.add_argument("--repeats", type=int, default=15, help="repetitions (default 15)")
    parser.add_argument("--mode", choices=["eval", "train", "both"], default="both")
    parser.add_argument("--model", choices=[pair[0] for pair in PAIRS], help="only this pair")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for model, baseline in PAIRS:
        if args.model not in (None, model):
            continue
        todo = [("eval", batch, args.size) for batch in args.batch] if args.mode != "train" else []
        todo += [("train", max(args.batch), args.train_size)] if args.mode != "eval" else []
        for mode, batch, size in todo:
            rows.append(compare(model, baseline, mode, batch, size, args.repeats))
            print(rows[-1].line(), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
