"""CPU time of ranking all feature maps of a network, against one decomposition per map.

``python scripts/bench_rank.py [--images N] [--json]`` collects the ranks of ResNet-56 (32×32) and ResNet-50
(224×224) with ``collect_ranks``, and as the paper's code does: for each layer a pass of its own over the
images, then ``torch.linalg.matrix_rank`` map by map. The ranks must be equal. Both run on one thread, in
turn, within one process; CPU times, and only their ratio means anything. Beside the whole procedure the
ratio of the ranks alone is reported, the passes left out on either side.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import chanzoo  # noqa: F401  # registers the networks
from chanzoo.compress import RankSite, collect_ranks, find_rank_sites, rank_of_maps

NETWORKS = {"cifar_resnet56": (32, 32), "resnet50": (224, 1)}  # pixels, images
GOAL = 10.0


@dataclass(frozen=True)
class Speedup:
    """Time of the loop over ours.

    Attributes:
        model: The network.
        images: Ranked.
        maps: Ranked.
        loop_seconds: CPU time of a pass and a loop per layer.
        ours_seconds: CPU time of ``collect_ranks`` with given sites.
        whole: Their ratio.
        ranks_alone: Ratio without the passes.
        goal: For the whole.
    """

    model: str
    images: int
    maps: int
    loop_seconds: float
    ours_seconds: float
    whole: float
    ranks_alone: float
    goal: float = GOAL

    def line(self) -> str:
        """The ratio for people."""
        return (
            f"{self.model:<16} {self.images} image(s) {self.maps} maps   loop {self.loop_seconds:.2f} s   "
            f"ours {self.ours_seconds:.2f} s   {self.whole:.1f}x (goal {self.goal:.0f}x)   "
            f"ranks alone {self.ranks_alone:.1f}x   equal ranks"
        )


def settled(name: str, size: int) -> nn.Module:
    """A fresh network with running statistics, so that its activations are of ordinary magnitude."""
    model = timm.create_model(name).train()
    with torch.no_grad():
        for _ in range(3):
            model(pictures(4, min(size, 64)))
    return model.eval()


def pictures(count: int, size: int) -> Tensor:
    """Smooth random images: maps of plain noise would nearly all be of full rank."""
    coarse = [torch.randn(count, 3, n, n) for n in (2, 5, 13)]
    parts = [F.interpolate(c, size=(size, size), mode="bicubic", align_corners=False) for c in coarse]
    return sum(parts, 0.1 * torch.randn(count, 3, size, size))


def cpu_seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of one call, and what it returned."""
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


@torch.no_grad()
def loop_over(model: nn.Module, images: Tensor, sites: list[RankSite]) -> tuple[dict[str, Tensor], float]:
    """Sums of ranks with a pass per layer and a decomposition per map, and the CPU time of the latter."""
    sums, spent = {}, 0.0
    for site in sites:
        maps = layer_maps(model, images, [site])[site.name]
        seconds, ranks = cpu_seconds(
            lambda maps=maps: [torch.linalg.matrix_rank(m) for m in maps.flatten(0, 1)]
        )
        sums[site.name] = torch.stack(ranks).view(maps.shape[:2]).sum(0)
        spent += seconds
    return sums, spent


@torch.no_grad()
def layer_maps(model: nn.Module, images: Tensor, sites: list[RankSite]) -> dict[str, Tensor]:
    """What the sites' modules put out."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: found.update({name: output.clone()})

    handles = [model.get_submodule(s.module).register_forward_hook(keep(s.name)) for s in sites]
    model(images)
    for handle in handles:
        handle.remove()
    return found


def compare(name: str, size: int, count: int) -> Speedup:
    """Both ways on the same images; ours runs before and after, the faster counts, for a fair warm-up."""
    model, images = settled(name, size), pictures(count, size)
    seen = set()  # a tensor that several convolutions share is measured once, by either
    sites = [s for s in find_rank_sites(model, images[:1]) if not (s.module in seen or seen.add(s.module))]

    def ours() -> Any:
        return collect_ranks(model, [images], sites, threads=1)

    first, table = cpu_seconds(ours)
    loop_seconds, (sums, loop_ranks) = cpu_seconds(lambda: loop_over(model, images, sites))
    second, _ = cpu_seconds(ours)
    for site in sites:
        if not torch.equal(table.sums[site.name], sums[site.name]):
            raise RuntimeError(f"{name}: ranks differ at {site.name}.")
    alone = 0.0
    for maps in layer_maps(model, images, sites).values():
        alone += min(cpu_seconds(lambda maps=maps: rank_of_maps(maps))[0] for _ in range(2))
    ours_seconds = min(first, second)
    total = count * sum(len(values) for values in sums.values())
    whole = loop_seconds / ours_seconds
    return Speedup(name, count, total, loop_seconds, ours_seconds, whole, loop_ranks / alone)


def main() -> int:
    """Run the comparisons asked for; 1 if one misses the goal."""
    parser = argparse.ArgumentParser(description="CPU time of ranking all feature maps of a network.")
    parser.add_argument("--model", choices=list(NETWORKS), help="only this one")
    parser.add_argument("--images", type=int, help="to rank (default 32 of 32×32, 1 of 224×224)")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name, (size, count) in NETWORKS.items():
        if args.model in (None, name):
            rows.append(compare(name, size, args.images or count))
            print(rows[-1].line(), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    return 0 if all(row.whole >= row.goal for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
