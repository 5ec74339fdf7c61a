"""Ranks of feature maps, where they are measured, and what is selected by them."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chanzoo.compress import (
    RankSite,
    RankTable,
    collect_ranks,
    find_rank_sites,
    keep_count,
    rank_of_maps,
    read_ranks,
    saturated,
    select,
    undecided,
)
from chanzoo.compress import rank as rank_module
from chanzoo.errors import ChanzooError, UsageError

WORKER = Path(__file__).with_name("rank_worker.py")
ROOT = Path(__file__).parents[3]


def one_by_one(maps: Tensor) -> Tensor:
    """The ranks as the paper's code has them: a singular value decomposition per map."""
    flat = maps.reshape(-1, *maps.shape[-2:])
    return torch.stack([torch.linalg.matrix_rank(m) for m in flat]).view(maps.shape[:-2])


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("cifar_resnet20", widths=[4, 4, 4, 6, *[4] * 9])


def table_of(ranks: dict[str, Tensor], max_rank: int = 9) -> RankTable:
    """A table from ranks (images, filters) by name."""
    return RankTable(
        len(next(iter(ranks.values()))),
        tuple(RankSite(name, name) for name in ranks),
        dict.fromkeys(ranks, max_rank),
        {name: r.sum(0) for name, r in ranks.items()},
        {name: (r**2).sum(0) for name, r in ranks.items()},
    )


# Ranks of maps.


@pytest.mark.parametrize(
    "size", [(7, 7), (8, 8), (12, 20), (20, 12), (28, 28), (1, 5), (2, 2), (1, 1)], ids=str
)
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e15])
def test_ranks_are_those_of_single_maps(size: tuple[int, int], scale: float) -> None:
    maps = scale * torch.randn(3, 7, *size).relu()
    maps[0, 0] = 0
    maps[0, 1, size[0] // 2 :] = 0  # empty rows
    maps[0, 2, :, size[1] // 2 :] = 0  # empty columns
    maps[0, 3] = maps[0, 3, :1].clone()  # equal rows
    maps[0, 4] = maps[0, 4].fill_(scale).triu()
    ranks = rank_of_maps(maps)
    assert ranks.dtype == torch.int64
    assert torch.equal(ranks, one_by_one(maps))


def test_the_threshold_is_that_of_32_bits() -> None:
    n = 16
    limit = n * torch.finfo(torch.float32).eps
    maps = torch.stack([torch.eye(n) for _ in range(2)])
    maps[0, 5, 5], maps[1, 5, 5] = 0.98 * limit, 1.02 * limit
    assert rank_of_maps(maps).tolist() == [n - 1, n] == one_by_one(maps).tolist()
    assert rank_of_maps(maps.double()).tolist() == [n - 1, n]


def test_extreme_numbers_neither_vanish_nor_overflow() -> None:
    tiny, huge = torch.finfo(torch.float32).smallest_normal / 1e6, torch.finfo(torch.float32).max
    assert rank_of_maps(torch.stack([tiny * torch.eye(4), huge * torch.eye(4)])).tolist() == [4, 4]


def test_shapes_and_layouts() -> None:
    assert rank_of_maps(torch.ones(5, 5)).shape == ()
    assert rank_of_maps(torch.ones(0, 3, 5, 5)).shape == (0, 3)
    assert rank_of_maps(torch.ones(2, 3, 0, 5)).tolist() == [[0] * 3] * 2
    maps = torch.randn(2, 3, 6, 6)
    assert torch.equal(rank_of_maps(maps.contiguous(memory_format=torch.channels_last)), rank_of_maps(maps))
    with pytest.raises(UsageError, match=r"maps has shape \[5\]: expected \(…, h, w\)"):
        rank_of_maps(torch.ones(5))


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.randn(3, 11, 6, 6).relu()
    expected = rank_of_maps(maps)
    monkeypatch.setattr(rank_module, "_CHUNK", 100)
    assert torch.equal(rank_of_maps(maps), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    maps = torch.randn(4, 5, 5)
    maps[2, 3, 3] = value
    with pytest.raises(ValueError, match="not finite") as caught:
        rank_of_maps(maps)
    assert isinstance(caught.value, ChanzooError)


@pytest.mark.gpu
def test_gpu_ranks_are_cpu_ranks() -> None:
    maps = torch.randn(4, 32, 28, 28).relu()
    maps[:, :9, 3:] = 0
    assert torch.equal(rank_of_maps(maps.cuda()).cpu(), rank_of_maps(maps))
    model = small_net()
    images = torch.randn(4, 3, 32, 32)
    here = collect_ranks(model, [images])
    there = collect_ranks(model.cuda(), [images])
    equal = [torch.equal(there.sums[name], here.sums[name]) for name in here.sums]
    assert sum(equal) >= 0.9 * len(equal)  # the maps differ in their last bits


# One pass over the images.


def test_table_holds_what_hooks_and_single_maps_give() -> None:
    model = small_net()
    images = torch.randn(5, 3, 32, 32)
    seen: list[tuple[int, int]] = []
    table = collect_ranks(
        model, [(images[:3], 0), (images[3:], 0)], images=4, progress=lambda *a: seen.append(a)
    )
    assert seen == [(3, 4), (4, 4)]
    assert table.images == 4
    assert [site.name for site in table.sites] == [
        n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)
    ]
    maps: dict[str, Tensor] = {}
    for site in table.sites:
        model.get_submodule(site.module).register_forward_hook(
            lambda _m, _a, out, name=site.name: maps.update({name: out.clone()})
        )
    with torch.no_grad():
        model.eval()(images[:4])
    for name, value in maps.items():
        ranks = one_by_one(value)
        assert torch.equal(table.sums[name], ranks.sum(0))
        assert torch.equal(table.squares[name], (ranks**2).sum(0))
        torch.testing.assert_close(table.mean(name), ranks.double().mean(0))
        torch.testing.assert_close(table.standard_error(name), ranks.double().std(0) / 2)
        assert table.max_ranks[name] == min(value.shape[2:])


def test_batches_and_threads_make_no_difference() -> None:
    model, images = small_net(), torch.randn(4, 3, 32, 32)
    whole = collect_ranks(model, [images], threads=1)
    parts = collect_ranks(model, images.split([1, 3]), threads=3)
    for name in whole.sums:  # convolutions of other batches differ in their last bits
        assert (whole.sums[name] - parts.sums[name]).abs().max() <= 1


def state_of_torch() -> tuple:
    return (
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.get_num_threads(),
        torch.is_autocast_enabled("cpu"),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(fails: bool) -> None:
    model = small_net().train()
    model.bn1.eval()  # modules need not all be in one mode
    modes = {name: module.training for name, module in model.named_modules()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    torch.set_float32_matmul_precision("medium")
    inside: list[tuple] = []

    def images() -> Iterator[Tensor]:
        yield torch.randn(2, 3, 32, 32)
        inside.append((*state_of_torch(), model.training))
        if fails:
            raise OSError("the disk is gone")

    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            before = state_of_torch()
            if fails:
                with pytest.raises(OSError, match="disk"):
                    collect_ranks(model, images(), threads=2)
            else:
                collect_ranks(model, images(), threads=2)
            assert state_of_torch() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert inside == [(False, "highest", False, before[3], False, False)]
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


class Branches(nn.Module):
    """A shared activation, a function for a pool, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        return torch.cat(
            [x, self.act(self.b(F.max_pool2d(x, 2))).repeat_interleave(2, 2)[..., :1, :1] + 0 * x[:, :1]], 1
        )


def test_sites_name_calls_channels_and_pools() -> None:
    model, images = Branches(), torch.randn(3, 3, 10, 10)
    sites = [
        RankSite("first", "act"),
        RankSite("second", "act", call=1),
        RankSite("last two", "act", start=-2),
        RankSite("middle", "act", start=1, stop=3),
        RankSite("again", "act", start=1, stop=3),
        RankSite("pooled", "act", pool=(2, 2, 0)),
        RankSite("padded", "act", pool=(3, 2, 1)),
        RankSite("whole", ""),
    ]
    table = collect_ranks(model, [images], sites)
    with torch.no_grad():
        first = model.act(model.a(images))
        second = model.act(model.b(F.max_pool2d(first, 2)))
        expected = {
            "first": first,
            "second": second,
            "last two": first[:, -2:],
            "middle": first[:, 1:3],
            "again": first[:, 1:3],
            "pooled": F.max_pool2d(first, 2),
            "padded": F.max_pool2d(first, 3, 2, 1),
            "whole": model(images),
        }
    for name, maps in expected.items():
        assert torch.equal(table.sums[name], one_by_one(maps).sum(0)), name
        assert table.max_ranks[name] == min(maps.shape[2:])


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (RankSite("x", "nothing"), 'site "x": the network has no module "nothing"'),
        (RankSite("x", "act", call=2), 'call 2 of "act" never came'),
        (RankSite("x", "act", start=9), '"act" has only 4 channels'),
        (RankSite("x", "flat"), '"flat" does not put out maps'),
    ],
)
def test_a_site_that_is_not_there_is_named(site: RankSite, message: str) -> None:
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(3, 4, 3))
    model.add_module("act", nn.ReLU())
    model.add_module("flat", nn.Flatten())
    with pytest.raises(UsageError) as caught:
        collect_ranks(model, [torch.randn(1, 3, 8, 8)], [site])
    assert message in str(caught.value)
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_input_is_refused() -> None:
    model, images = small_net(), [torch.randn(1, 3, 32, 32)]
    with pytest.raises(UsageError, match="the loader gave no images"):
        collect_ranks(model, [])
    with pytest.raises(UsageError, match="images=0"):
        collect_ranks(model, images, images=0)
    with pytest.raises(UsageError, match="two sites have the same name"):
        collect_ranks(model, images, 2 * [RankSite("a", "act1")])
    with pytest.raises(UsageError, match=r"parameter conv1.weight is torch.float16.*\n.*model.float\(\)"):
        collect_ranks(small_net().half(), images)
    with pytest.raises(UsageError, match="Linear has no convolution"):
        collect_ranks(nn.Linear(4, 4), [torch.randn(1, 3, 4, 4)])


def test_a_layer_whose_maps_are_not_finite_is_named() -> None:
    model = small_net()
    with torch.no_grad():
        model.layer2[1].bn1.weight[2] = float("inf")
    with pytest.raises(UsageError, match=r'site "layer2.1.conv1" \("layer2.1.act1"\): .* not finite'):
        collect_ranks(model, [torch.randn(1, 3, 32, 32)])


def test_early_stop_waits_for_256_images_and_a_settled_choice() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False))
    nn.init.ones_(model[0].weight)
    site = [RankSite("conv", "0")]
    batch = torch.eye(3).expand(100, 1, 3, 3)
    done: list[int] = []
    table = collect_ranks(model, 9 * [batch], site, 900, early_stop=0.5, progress=lambda n, _: done.append(n))
    assert table.images == 300
    assert done == [100, 200, 300]
    assert collect_ranks(model, 9 * [batch], site, 900).images == 900
    with pytest.raises(UsageError, match='early_stop names "b", which is no site'):
        collect_ranks(model, [batch], site, early_stop={"conv": 0.5, "b": 0.5})

    def moving() -> Iterator[Tensor]:  # the choice changes at the third batch
        for i in range(9):
            with torch.no_grad():
                model[0].weight.copy_(torch.tensor([i > 1, i > 1, i < 2, i < 2]).view(4, 1, 1, 1))
            yield batch[:100] if i != 2 else batch[:1].expand(250, 1, 3, 3)

    assert collect_ranks(model, moving(), site, 2000, early_stop={"conv": 0.5}).images == 650


def test_two_processes_equal_one(tmp_path: Path) -> None:
    images = torch.randn(7, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), "2", str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for worker in workers:
        error = worker.communicate(timeout=240)[1]
        assert worker.returncode == 0, error.decode()[-2000:]
    tables = [read_ranks(tmp_path / f"ranks{rank}.csv") for rank in range(2)]
    alone = collect_ranks(small_net(), [*images[[0, 2, 4]].split(2), images[[1, 3]]])
    for table in tables:
        assert table.images == alone.images == 5
        assert table.sites == alone.sites
        assert all(torch.equal(table.sums[name], alone.sums[name]) for name in alone.sums)
        assert all(torch.equal(table.squares[name], alone.squares[name]) for name in alone.sums)


def test_early_stop_needs_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 0}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with pytest.raises(UsageError, match="early_stop works in one process only"):
        collect_ranks(small_net(), [], early_stop=0.5)
    with pytest.raises(UsageError, match=r"images=1: expected at least one for each of 2 process\(es\)"):
        collect_ranks(small_net(), [], images=1)


class OnGpu:
    """Stands in for a tensor on a GPU."""

    device = torch.device("cuda")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape = tensor, tensor.shape

    def __getitem__(self, index: slice) -> "OnGpu":
        return OnGpu(self.tensor[index])

    def cpu(self) -> Tensor:
        return self.tensor


def test_the_first_maps_of_a_size_decide_where_ranks_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def fake(maps: Tensor | OnGpu) -> Tensor:
        used.append("gpu" if isinstance(maps, OnGpu) else "cpu")
        return rank_of_maps(maps.tensor if isinstance(maps, OnGpu) else maps)

    seconds = iter([1.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(rank_module, "rank_of_maps", fake)
    monkeypatch.setattr(rank_module, "_seconds", lambda action: (action(), next(seconds))[1])
    with rank_module._ranker(1) as ranker:
        for size, place in ((5, "gpu"), (6, "cpu")):
            maps = torch.randn(2, 3, size, size)
            for _ in range(2):
                assert torch.equal(ranker(OnGpu(maps)), rank_of_maps(maps))
                assert used[-1] == place
    assert next(seconds, None) is None


# Sites of timm's networks.


def places(name: str, size: int = 64) -> dict[str, tuple]:
    sites = find_rank_sites(timm.create_model(name), torch.randn(1, 3, size, size))
    return {site.name: (site.module, site.start, site.stop) for site in sites}


def test_sites_of_resnets() -> None:
    found = places("resnet50")
    assert len(found) == 53
    assert found["conv1"] == ("maxpool", 0, None)
    assert found["layer2.0.conv2"] == ("layer2.0.act2", 0, None)
    assert found["layer2.0.conv3"] == found["layer2.0.downsample.0"] == ("layer2.0.act3", 0, None)
    assert len(set(found.values())) == 49  # four shortcuts share their block's last activation


def test_sites_of_cifar_resnets() -> None:
    found = places("cifar_resnet20", 32)
    assert [place[0] for place in found.values()] == [
        "act1",
        *(f"layer{s}.{b}.act{a}" for s in (1, 2, 3) for b in range(3) for a in (1, 2)),
    ]


def test_sites_of_mobilenetv2_are_before_the_addition() -> None:
    found = places("mobilenetv2_100")
    assert len(found) == 52
    assert found["blocks.1.0.conv_pw"] == ("blocks.1.0.bn1.act", 0, None)
    assert found["blocks.1.1.conv_pwl"] == ("blocks.1.1.bn3", 0, None)


def test_sites_of_densenet_are_slices_at_the_next_norm() -> None:
    found = places("densenet121")
    assert len(found) == 120
    block = "features.denseblock1.denselayer"
    assert found[f"{block}1.conv2"] == (f"{block}2.norm1.act", 64, 96)
    assert found[f"{block}6.conv2"] == ("features.transition1.norm.act", 224, 256)
    assert found["features.transition1.conv"] == ("features.denseblock2.denselayer1.norm1.act", 0, None)


@pytest.mark.parametrize(
    ("name", "conv", "place"),
    [
        ("efficientnet_b0", "blocks.1.0.conv_dw", "blocks.1.0.bn2.act"),
        ("regnety_004", "s1.b1.conv3.conv", "s1.b1.act3"),
        ("convnext_atto", "stages.0.blocks.0.mlp.fc1", "stages.0.blocks.0.mlp.act"),
        ("convnext_atto", "stages.0.blocks.1.mlp.fc2", "stages.1.downsample.0"),
        ("resnetv2_50", "stages.0.blocks.0.conv3", "stages.0.blocks.1.norm1.act"),
        ("ce_resnet18", "layer1.0.conv2", "layer1.0.act2"),
    ],
)
def test_sites_of_other_families(name: str, conv: str, place: str) -> None:
    found = places(name)
    assert found[conv][0] == place
    assert not any(".se." in conv for conv in found)


def test_finding_sites_changes_nothing() -> None:
    model = small_net().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    find_rank_sites(model, torch.randn(1, 3, 32, 32))
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Tables.


def test_csv_round_trip(tmp_path: Path) -> None:
    table = collect_ranks(
        Branches(),
        [torch.randn(3, 3, 10, 10)],
        [RankSite('a "name", quoted', "act", 1, -2), RankSite("b", "act", 0, 0, 3, (3, 2, 1))],
    )
    table.to_csv(tmp_path / "ranks.csv")
    again = read_ranks(tmp_path / "ranks.csv")
    assert again.sites == table.sites
    assert (again.images, again.max_ranks) == (table.images, table.max_ranks)
    assert all(torch.equal(again.sums[name], table.sums[name]) for name in table.sums)
    assert all(torch.equal(again.squares[name], table.squares[name]) for name in table.sums)
    header, row = (tmp_path / "ranks.csv").read_text().splitlines()[:2]
    assert header == (
        "site,module,call,start,stop,pool,max_rank,filter,images,sum,squares,mean,standard_error"
    )
    assert row.startswith('"a ""name"", quoted",act,1,-2,,,')


@pytest.mark.parametrize("change", ["", "a,b\n1,2\n", "no rows", "x", "swap", "missing"])
def test_a_file_that_is_no_table_is_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "ranks.csv"
    table_of({"a": torch.tensor([[1, 2], [3, 4]])}).to_csv(path)
    lines = path.read_text().splitlines(keepends=True)
    texts = {
        "no rows": lines[0],
        "x": "".join(lines).replace(",4,10,", ",x,10,"),
        "swap": lines[0] + lines[2] + lines[1],
    }
    if change == "missing":
        path.unlink()
    else:
        path.write_text(texts.get(change, change))
    with pytest.raises(UsageError, match=r'ranks\.csv" is no table of ranks'):
        read_ranks(path)


def test_one_image_says_nothing_of_the_error() -> None:
    table = table_of({"a": torch.tensor([[1, 2]])})
    assert table.standard_error("a").tolist() == [float("inf")] * 2


def test_saturated_sites_are_named(caplog: pytest.LogCaptureFixture) -> None:
    ranks = {"flat": torch.tensor([[9, 9, 9, 1]]), "fine": torch.tensor([[9, 9, 5, 1]])}
    ranks["zero"] = torch.zeros(1, 4, dtype=torch.int64)
    ranks["single"] = torch.tensor([[3, 3, 3, 3]])[:, :1]
    assert saturated(table_of(ranks)) == ["flat", "zero"]
    assert saturated(table_of(ranks), share=0.5) == ["flat", "fine", "zero"]
    model = nn.Sequential(nn.Conv2d(1, 3, 1))
    with caplog.at_level(logging.WARNING):
        collect_ranks(model, [torch.randn(2, 1, 5, 5)], [RankSite("conv", "0")])
    assert caplog.messages == ["ranks hardly tell filters apart at 1 of 1 sites: conv"]


def test_undecided_filters_are_near_the_cut() -> None:
    noise = torch.tensor([[-1], [1]]).repeat(50, 1)
    ranks = torch.tensor([[10, 40, 41, 80]]) + 5 * noise
    table = table_of({"a": ranks, "b": ranks[:, [0, 0, 3, 3]]})
    found = undecided(table, {"a": 0.5, "b": 0.5})
    assert {name: where.tolist() for name, where in found.items()} == {"a": [1, 2]}
    assert undecided(table, {"a": 0.0}) == {}
    with pytest.raises(UsageError, match='no site "c"'):
        undecided(table, {"c": 0.5})


# Selection.


def test_keep_count_has_the_published_truncation() -> None:
    counts = {(320, 0.9): 31, (160, 0.8): 31, (160, 0.9): 15, (320, 0.8): 63, (16, 0.18): 13, (64, 0.0): 64}
    assert {key: keep_count(*key) for key in counts} == counts
    assert keep_count(16, 0.18, "v1") == 14


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_a_rate_outside_is_refused(rate: float) -> None:
    with pytest.raises(UsageError, match=r"at least 0 and below 1"):
        keep_count(16, rate)


def test_an_empty_layer_and_an_unknown_rule_are_refused() -> None:
    with pytest.raises(UsageError, match=r"rate=0.95 leaves none of 12 filters"):
        keep_count(12, 0.95)
    assert keep_count(12, 0.95, "v1") == 1
    with pytest.raises(UsageError, match='rule="v2": expected "plus" or "v1"'):
        keep_count(12, 0.5, "v2")


def test_select_is_stable_and_ascending() -> None:
    assert select(torch.tensor([5.0, 1.0, 5.0, 7.0, 5.0]), 3).tolist() == [2, 3, 4]
    assert select(torch.ones(100), 40).tolist() == list(range(60, 100))
    assert select(torch.tensor([1, 2]), 2).tolist() == [0, 1]
    for keep in (0, 3, -1):
        with pytest.raises(UsageError, match=f"keep={keep}: expected 1 to 2"):
            select(torch.tensor([1.0, 2.0]), keep)


# The reference's ranks.


def test_ranks_of_stored_maps_are_the_references(capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(ROOT / "tests/parity"))
    from run import main  # a script, not a package

    assert main([str(ROOT / "tests/parity/hrank")]) == 0, capsys.readouterr().out
