"""Rank of feature maps as a score of filters: HRank's criterion, for any CNN, in one pass over the images.

Follows Lin et al., "HRank: Filter Pruning using High-Rank Feature Map" (CVPR 2020, arXiv:2002.10179). The
authors' code makes one pass per layer and one singular value decomposition per map; here every layer is
measured in the same pass, and most ranks are read off a Cholesky factorisation. The numbers are the same.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from .scores import RankTable, keep_count, saturated, select
from .sites import RankSite, evaluating, find_rank_sites

__all__ = ["collect_ranks", "rank_of_maps"]

_log = logging.getLogger(__name__)

_EPS = torch.finfo(torch.float32).eps
_CHUNK = 2**17  # numbers at a time: 1 MB in 64 bits, what a core's cache holds
_MIN_IMAGES = 256  # before an early stop; with fewer the order of a trained net's filters is noise


# Ranks of maps.


@torch.no_grad()
def rank_of_maps(maps: Tensor) -> Tensor:
    """Numerical rank of each map, as ``torch.linalg.matrix_rank`` has it for 32-bit floats.

    The rank is the number of singular values above ``max(h, w) · eps · (the largest)``. They are the roots of
    the eigenvalues of the Gram matrix of the smaller side, which is formed in 64 bits and so resolves them
    far below the threshold. Most maps need no eigenvalues: if a Cholesky factorisation of the Gram matrix
    minus an upper bound of the threshold exists, empty rows aside, the others are all counted.

    Args:
        maps: On any device that has 64-bit floats; taken as 32-bit floats whatever the type.

    Shape:
        maps ``(…, h, w)`` → ``(…)``, 64-bit integers on the same device.

    Raises:
        UsageError: There are fewer than two axes, or a value is not finite.

    Source:
        arXiv:2002.10179, with the threshold of its authors' code.
    """
    if maps.ndim < 2:
        raise UsageError(f"maps has shape {list(maps.shape)}: expected (…, h, w).")
    return torch.cat([_rank(chunk) for chunk in _chunks(maps)]).view(maps.shape[:-2])


def _chunks(maps: Tensor) -> Sequence[Tensor]:
    flat = maps.detach().float().reshape(maps.shape[:-2].numel(), *maps.shape[-2:])
    return flat.split(max(1, _CHUNK // max(1, flat.shape[1] * flat.shape[2])))


def _rank(maps: Tensor) -> Tensor:
    count, h, w = maps.shape
    if maps.numel() == 0:
        return torch.zeros(count, dtype=torch.int64, device=maps.device)
    rows = (maps if h <= w else maps.mT).double()
    gram = rows @ rows.mT
    energy = gram.diagonal(dim1=1, dim2=2).clone()  # of each row
    total = energy.sum(1, keepdim=True)  # at least the largest eigenvalue
    if not total.isfinite().all():  # 64 bits hold the squares of all 32-bit floats
        raise UsageError("a feature map has values that are not finite: it has no rank.")
    tolerance = (max(h, w) * _EPS) ** 2
    empty = energy == 0
    shifted = gram.clone()
    shifted.diagonal(dim1=1, dim2=2).copy_(torch.where(empty, 1.0, energy - 1.1 * tolerance * total))
    failed = torch.linalg.cholesky_ex(shifted).info != 0
    ranks = rows.shape[1] - empty.sum(1)
    if failed.any():
        eigenvalues = torch.linalg.eigvalsh(gram[failed])
        ranks[failed] = (eigenvalues > tolerance * eigenvalues[:, -1:]).sum(1)
    return ranks


class _Ranker:
    """Ranks on CPU threads, or where the maps are if that is faster."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self.is_faster_there: dict[tuple[int, ...], bool] = {}  # by size of maps

    def __call__(self, maps: Tensor) -> Tensor:
        if maps.device.type != "cuda":
            return self.on_threads(maps)
        size = tuple(maps.shape[-2:])
        if size not in self.is_faster_there:
            rank_of_maps(maps[:1])  # load the libraries
            there, here = _seconds(lambda: rank_of_maps(maps).cpu()), _seconds(lambda: self.on_threads(maps))
            self.is_faster_there[size] = there < here
        return rank_of_maps(maps).cpu() if self.is_faster_there[size] else self.on_threads(maps)

    def on_threads(self, maps: Tensor) -> Tensor:
        return torch.cat(list(self.pool.map(rank_of_maps, _chunks(maps.cpu())))).view(maps.shape[:-2])


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@contextmanager
def _ranker(threads: int | None) -> Iterator[_Ranker]:
    """A pool whose threads use one core each; torch's own threads do nothing for many small matrices."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads or before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield _Ranker(pool)
    finally:
        torch.set_num_threads(before)  # the pool's setting is also that of threads to come


# Ranks of a network's filters.


def collect_ranks(
    model: nn.Module,
    loader: Iterable[Any],
    sites: Sequence[RankSite] | None = None,
    images: int = 768,
    *,
    threads: int | None = None,
    early_stop: float | Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
    snapshot: Callable[[RankTable], None] | None = None,
) -> RankTable:
    """Rank of every filter's maps, in one pass over the images.

    The network runs in evaluation mode, without gradients and in true 32 bits; its mode and torch's
    settings are restored, also after an error. Maps are ranked as they appear and never stored. Logs a
    warning that names the sites where the ranks are saturated.

    With an initialised process group every process calls this with its own part of the images and gets the
    table of all of them.

    Args:
        model: On any device, with 32-bit parameters.
        loader: Batches ``(b, c, h, w)``, alone or first in a tuple (images, classes).
        sites: Where to measure; without it where :func:`find_rank_sites` says.
        images: Most to use, of all processes together. The published ranks are means over 768.
        threads: For the ranks, on the CPU; without it as many as torch's.
        early_stop: Fraction of filters to be removed, for all sites or by name: stop after 256 images or more
            as soon as two more batches have not changed which filters would stay.
        progress: Called after each batch with the images done and all images, of this process.
        snapshot: Called after each batch with the table so far, of this process.

    Raises:
        UsageError: A site is not there, an image gives maps that are not finite, parameters are not of 32
            bits, or the loader gives no images.

    Source:
        arXiv:2002.10179. Its authors measure each layer on other images; the early stop is ours.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    world, rank = (dist.get_world_size(), dist.get_rank()) if several else (1, 0)
    if early_stop is not None and several:
        raise UsageError("early_stop works in one process only: each would stop at another time.")
    if images < world:
        raise UsageError(f"images={images}: expected at least one for each of {world} process(es).")
    odd = next(
        (n for n, p in model.named_parameters() if p.is_floating_point() and p.dtype != torch.float32), ""
    )
    if odd:
        raise UsageError(
            f"parameter {odd} is {model.get_parameter(odd).dtype}: ranks need a network of 32-bit floats.\n"
            "  Convert it first: model.float()"
        )
    share = images // world + (rank < images % world)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    meter: _Meter | None = None
    kept: list[Any] = []
    with evaluating(model), _ranker(threads) as ranker:
        try:
            for item in loader:
                batch = images_of(item).to(device)
                meter = meter or _Meter(model, sites or find_rank_sites(model, batch[:1]), ranker)
                meter.run(batch[: share - meter.images])
                if progress:
                    progress(meter.images, share)
                if snapshot:
                    snapshot(meter.table())
                if early_stop is not None:
                    kept.append(_kept(meter.table(), early_stop))
                    if meter.images >= _MIN_IMAGES and kept[-3:] == 3 * kept[-1:]:
                        break
                if meter.images >= share:
                    break
        finally:
            if meter:
                meter.remove()
    if meter is None or not meter.images:
        raise UsageError("the loader gave no images: there are no ranks.")
    table = _sum_processes(meter.table(), device) if several else meter.table()
    flat = saturated(table)
    if flat and rank == 0:
        shown = ", ".join(flat[:6]) + (", …" if len(flat) > 6 else "")
        _log.warning(
            "ranks hardly tell filters apart at %d of %d sites: %s", len(flat), len(table.sites), shown
        )
    return table


def images_of(item: Any) -> Tensor:
    """The images of what a loader gives: a batch, alone or first in a tuple.

    Raises:
        UsageError: It gives something else.
    """
    batch = item[0] if isinstance(item, (tuple, list)) and item else item
    if not isinstance(batch, Tensor) or batch.ndim != 4:
        found = f"of shape {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise UsageError(
            f"the loader gives batches {found}: expected images (b, c, h, w), alone or first in a tuple."
        )
    return batch


class _Meter:
    """Hooks that rank maps as the network puts them out."""

    def __init__(self, model: nn.Module, sites: Sequence[RankSite], ranker: _Ranker) -> None:
        self.model = model
        self.sites = tuple(sites)
        self.ranker = ranker
        self.images = 0
        self.counts: Counter[str] = Counter()
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.max_ranks: dict[str, int] = {}
        modules = dict(model.named_modules())
        for site in self.sites:
            if site.module not in modules:
                raise UsageError(f'site "{site.name}": the network has no module "{site.module}".')
        if len({site.name for site in self.sites}) < len(self.sites):
            raise UsageError("two sites have the same name.")
        self.handles = [model.register_forward_pre_hook(lambda _module, _args: self.counts.clear())]
        for module in dict.fromkeys(site.module for site in self.sites):
            self.handles.append(modules[module].register_forward_hook(self.hook(module)))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def run(self, batch: Tensor) -> None:
        self.images += len(batch)
        self.model(batch)
        for site in self.sites:
            if site.name not in self.sums:
                raise UsageError(f'site "{site.name}": call {site.call} of "{site.module}" never came.')

    def table(self) -> RankTable:
        return RankTable(self.images, self.sites, dict(self.max_ranks), dict(self.sums), dict(self.squares))

    def hook(self, module: str) -> Callable[[nn.Module, Any, Any], None]:
        def run(_module: nn.Module, _args: Any, output: Any) -> None:
            call = self.counts[module]
            self.counts[module] += 1
            here = [site for site in self.sites if (site.module, site.call) == (module, call)]
            ranks: dict[Any, tuple[int, Tensor]] = {}
            for site in here:  # several may share what is measured
                key = (site.start, site.stop, site.pool)
                if key not in ranks:
                    ranks[key] = self.rank(site, output)
                self.max_ranks[site.name], found = ranks[key]
                self.sums[site.name] = self.sums.get(site.name, 0) + found.sum(0)
                self.squares[site.name] = self.squares.get(site.name, 0) + (found**2).sum(0)

        return run

    def rank(self, site: RankSite, output: Any) -> tuple[int, Tensor]:
        if not isinstance(output, Tensor) or output.ndim != 4:
            raise UsageError(f'site "{site.name}": "{site.module}" does not put out maps (b, c, h, w).')
        maps = output.detach()[:, site.start : site.stop]
        if not maps.shape[1]:
            raise UsageError(f'site "{site.name}": "{site.module}" has only {output.shape[1]} channels.')
        if site.pool:
            kernel, stride, padding = site.pool
            maps = F.max_pool2d(maps, kernel, stride, padding)
        try:
            return min(maps.shape[2:]), self.ranker(maps)
        except UsageError as error:
            raise UsageError(f'site "{site.name}" ("{site.module}"): {error}') from error


def _kept(table: RankTable, rates: float | Mapping[str, float]) -> list[list[int]]:
    if not isinstance(rates, Mapping):
        rates = {site.name: rates for site in table.sites}
    if unknown := rates.keys() - table.sums.keys():
        raise UsageError(f'early_stop names "{min(unknown)}", which is no site.')
    counts = {name: keep_count(len(table.sums[name]), rate) for name, rate in rates.items()}
    return [select(table.mean(name), keep).tolist() for name, keep in counts.items()]


def _sum_processes(table: RankTable, device: torch.device) -> RankTable:
    names = [site.name for site in table.sites]
    sizes = [len(table.sums[name]) for name in names]
    values = [torch.tensor([table.images]), *(part[n] for part in (table.sums, table.squares) for n in names)]
    flat = torch.cat(values).to(device)
    dist.all_reduce(flat)
    images, *parts = flat.cpu().split([1, *sizes, *sizes])
    sums, squares = parts[: len(names)], parts[len(names) :]
    return RankTable(
        int(images),
        table.sites,
        table.max_ranks,
        dict(zip(names, sums, strict=True)),
        dict(zip(names, squares, strict=True)),
    )
