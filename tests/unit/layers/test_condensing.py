"""The position in training, what it does to a network, and the condensed network."""

from __future__ import annotations

import copy
import gc
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.layers import set_layer_config
from torch import nn

import chanzoo  # noqa: F401  # registers the networks
from chanzoo.errors import UsageError
from chanzoo.layers import LearnedGroupConv2d, SparseReactivation, condense
from chanzoo.layers.condensing import (
    CondensingProgress,
    condensing_stage,
    follow_progress,
    is_condensed,
    learned_layers,
    reset_progress,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def said(caplog: pytest.LogCaptureFixture, beginning: str) -> list[str]:
    """Messages that begin so; a network of an earlier test may be cleared away, and say so, at any time."""
    return [text for r in caplog.records if (text := r.getMessage()).startswith(beginning)]


class Net(nn.Module):
    """A network of one's own, with layers of two factors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = LearnedGroupConv2d(16, 8, 4)
        self.sfr = SparseReactivation(8, 16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        new = self.conv(x)
        return torch.cat([self.sfr(new, x), new], dim=1).mean(dim=(2, 3))


def run(model: nn.Module, steps: int, lr: float = 0.1) -> list[tuple[int, ...]]:
    """Train; stages of the layers after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    stages = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        stages.append(tuple(int(layer.stage) for layer in learned_layers(model).values()))
    return stages


def net(total_steps: int | None) -> Net:
    model = Net().train()
    follow_progress(model, total_steps)
    return model


@pytest.mark.parametrize(
    ("factor", "drops"),
    [(4, [1 / 6, 1 / 3, 0.5]), (6, [0.1, 0.2, 0.3, 0.4, 0.5]), (8, [t / 14 for t in range(1, 8)]), (1, [])],
)
def test_drops_are_spread_over_the_first_half(factor: int, drops: list[float]) -> None:
    for count, progress in enumerate(drops):
        assert condensing_stage(progress - 1e-9, factor) == count
        assert condensing_stage(progress + 1e-9, factor) == count + 1
    assert condensing_stage(0, factor) == 0
    assert condensing_stage(1, factor) == condensing_stage(0.5, factor) == factor - 1


def test_any_loop_condenses_a_network() -> None:
    model = net(12)
    # before step i, i / 12 is done: C = 4 drops at 2, 4 and 6, C = 2 at 6
    assert run(model, 12) == [(0, 0)] * 2 + [(1, 0)] * 2 + [(2, 0)] * 2 + [(3, 1)] * 6
    assert int(model.progress.train_step) == 12 and is_condensed(model)


@pytest.mark.parametrize("total", [1, 2, 3, 5, 9, 999])
def test_odd_and_tiny_numbers_of_steps_end_condensed(total: int) -> None:
    model = net(total)
    model.progress.train_step.fill_(max(0, (total - 1) // 2))
    run(model, total - int(model.progress.train_step))
    assert is_condensed(model) or total == 1  # one step is over before half of it is done


def test_without_a_number_of_steps_masks_stay() -> None:
    model = net(None)
    assert set(run(model, 3)) == {(0, 0)} and int(model.progress.train_step) == 0


def test_evaluation_and_measuring_norms_change_nothing() -> None:
    model = net(4)
    run(model, 1)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(2, 3, 6, 6))
    model.train()
    with torch.no_grad():
        model(torch.randn(2, 3, 6, 6))
    norms = ("running_mean", "running_var", "num_batches_tracked")
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) or key.endswith(norms)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been() -> None:
    whole = net(20)
    start = copy.deepcopy(whole.state_dict())
    torch.manual_seed(1)
    stages = run(whole, 20)
    part = net(20)
    part.load_state_dict(start)
    torch.manual_seed(1)
    first = run(part, 5)  # in the middle of a stage
    state, random = copy.deepcopy(part.state_dict()), torch.get_rng_state()
    again = net(20)
    again.load_state_dict(state)
    torch.set_rng_state(random)
    assert first + run(again, 15) == stages
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_loading_moves_the_position() -> None:
    model = net(12)
    run(model, 12)
    done = copy.deepcopy(model.state_dict())
    other = net(12)
    run(other, 1)
    other.load_state_dict(done)
    assert run(other, 1) == [(3, 1)] and int(other.progress.train_step) == 13


def test_a_stage_that_was_passed_over_is_caught_up() -> None:
    model = net(12)
    model.progress.train_step.fill_(7)
    assert run(model, 1) == [(3, 1)]
    for layer in learned_layers(model).values():
        assert (layer.alive().sum(dim=1) == layer.candidates // layer.condensation_factor).all()


def test_copies_do_not_train_and_carry_on() -> None:
    model = net(12)
    run(model, 3)
    ema = copy.deepcopy(model).eval()
    run(model, 3)
    for (key, ours), value in zip(ema.state_dict().items(), model.state_dict().values(), strict=True):
        if ours.is_floating_point():
            ours.lerp_(value, 0.1)
        else:
            ours.copy_(value)
        assert key
    assert [int(layer.stage) for layer in learned_layers(ema).values()] == [2, 0]
    assert int(ema.progress.train_step) == 6


def test_compiled_networks_condense_without_compiling_again() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    model = net(12)
    compiled = torch.compile(model, backend=backend)
    run(compiled, 1)
    count = len(graphs)
    assert run(compiled, 11)[-1] == (3, 1)
    assert 0 < count == len(graphs)


def test_it_says_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(net(12), 12)
    text = caplog.text
    assert "step 2 of 12: stage 1 of 3, 3 of 4 connections are left" in text
    assert "step 6 of 12: stage 1 of 1, 1 of 2 connections are left" in text
    assert not said(caplog, "total_steps") and not said(caplog, "training goes on")


def test_an_epoch_that_does_not_fit_is_noticed_before_drops_are_missed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = net(100)
    run(model, 7)
    model.eval()
    model.train()
    assert said(caplog, "total_steps=100 is 14.29 times the 7 training batches")
    run(model, 5)
    model.eval()
    model = net(21)
    run(model, 7)
    model.eval()
    assert len(said(caplog, "total_steps=")) == 1


def test_a_run_that_is_longer_or_shorter_than_said_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model = net(6)
    run(model, 8)
    assert len(said(caplog, "training goes on after total_steps=6")) == 1
    del model
    gc.collect()
    assert not said(caplog, "training ended at step 8")
    model = net(24)
    run(model, 8)
    del model
    gc.collect()
    assert said(caplog, "training ended at step 8 of total_steps=24, at stage 1 of 3: the network is not")


@pytest.mark.parametrize("total", [0, -3, 2.5, True, "many"])
def test_a_number_of_steps_that_is_none(total: object) -> None:
    with pytest.raises(UsageError, match=r"total_steps=.*expected a whole number above 0"):
        CondensingProgress(total)


@pytest.mark.parametrize("total", [4, None])
def test_lasso_and_scaled_losses_do_not_mix(total: int | None) -> None:
    model = net(total)
    model.conv.group_lasso = 0.1
    with torch.autocast("cpu", torch.float16), pytest.raises(UsageError, match="float16"):
        model(torch.randn(2, 3, 6, 6))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 6, 6)).float().sum().backward()


def test_following_needs_layers_and_a_free_name() -> None:
    with pytest.raises(UsageError, match="Conv2d has no layer that learns"):
        follow_progress(nn.Conv2d(3, 3, 1), 5)
    model = Net()
    model.progress = nn.Identity()
    with pytest.raises(UsageError, match='a part "progress" of its own'):
        follow_progress(model, 5)


def test_following_anew_keeps_the_position_and_counts_once() -> None:
    model = net(10)
    run(model, 2)
    follow_progress(model, 12)
    run(model, 1)
    assert int(model.progress.train_step) == 3 and model.progress.total_steps == 12


def test_following_anew_is_not_the_end_of_training(caplog: pytest.LogCaptureFixture) -> None:
    model = net(100)
    run(model, 3)
    follow_progress(model, 40)
    gc.collect()
    assert not said(caplog, "training ended at step 3 of total_steps=100")
    run(model, 2)
    del model
    gc.collect()
    assert said(caplog, "training ended at step 5 of total_steps=40")


def test_a_copy_says_itself_when_its_training_ends_too_early(caplog: pytest.LogCaptureFixture) -> None:
    model = net(50)
    run(model, 1)
    again = copy.deepcopy(model)
    run(again, 3)
    del again
    gc.collect()
    assert said(caplog, "training ended at step 4 of total_steps=50")


def test_the_first_epoch_says_what_the_steps_mean(caplog: pytest.LogCaptureFixture) -> None:
    model = net(60)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            run(model, 5)
            model.eval()
            model.train()
    (text,) = said(caplog, "total_steps=60 stands for 12 epochs of 5 batches")
    assert "the first connections are dropped in epoch 2, the last in epoch 6, counted from 0" in text
    assert all(stage == (0, 0) for stage in run(net(60), 10))
    assert (
        run(net(60), 11)[-1] == (1, 0) and run(net(60), 30)[-1] == (2, 0) and run(net(60), 31)[-1] == (3, 1)
    )


def test_another_number_of_steps_on_the_way_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model, again = net(100), net(25)
    run(model, 20)
    again.load_state_dict(model.state_dict())
    run(again, 1)
    (text,) = said(caplog, "20 training forwards were counted towards total_steps=100 (20 %)")
    assert "which is 25 now (80 %)" in text and text.endswith("set progress.train_step to 5.")
    third = net(25)
    third.load_state_dict(again.state_dict())
    run(third, 1)
    assert len(said(caplog, "2")) == 1


def test_counts_of_earlier_versions_load() -> None:
    model, again = net(8), net(8)
    run(model, 3)
    state = model.state_dict()
    del state["progress.planned_steps"]
    again.load_state_dict(state)
    assert int(again.progress.train_step) == 3
    run(again, 5)
    assert is_condensed(again)


def test_starting_over() -> None:
    model = net(6)
    run(model, 6)
    reset_progress(model)
    assert all(layer.mask.all() and layer.stage == 0 for layer in learned_layers(model).values())
    assert run(model, 6)[0] == (0, 0) and is_condensed(model)
    with pytest.raises(UsageError, match="does not count its training"):
        reset_progress(nn.Conv2d(3, 3, 1))


def test_a_network_of_ones_own_is_condensed() -> None:
    model = net(6)
    run(model, 6)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    small = condense(model)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-6)
    assert not learned_layers(small) and not small.training
    assert not any("progress" in key or "mask" in key for key in small.state_dict())
    assert model.progress is not None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    small.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_a_layer_with_two_names_stays_one() -> None:
    model = Net()
    model.again = model.conv
    for layer in learned_layers(model).values():
        layer.condense_to(layer.condensation_factor - 1)
    small = condense(model)
    assert small.again is small.conv


def test_what_cannot_be_condensed_is_named() -> None:
    with pytest.raises(UsageError, match="Conv2d has no layer that learns its connections"):
        condense(nn.Conv2d(3, 3, 1))
    model = Net()
    model.conv.condense_to(3)
    with pytest.raises(UsageError, match='layer "sfr" cannot be condensed: group 0 of 2 has 16 of 16'):
        condense(model)


@pytest.mark.slow
@pytest.mark.parametrize("broadcast", [True, False])
def test_processes_that_train_together_drop_the_same(broadcast: bool, tmp_path: Path) -> None:
    worker, root = Path(__file__).with_name("condensing_worker.py"), Path(__file__).parents[3]
    command = [sys.executable, str(worker)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path), str(broadcast)],
            env={**os.environ, "PYTHONPATH": str(root)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for process in workers:
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error.decode()[-2000:]
    ranks = [torch.load(tmp_path / f"out{rank}.pt", weights_only=True) for rank in range(2)]
    for step, (one, other) in enumerate(zip(*ranks, strict=True)):
        for (state, average), (its_state, its_average) in [(one, other)]:
            masks = [key for key in state if key.endswith((".mask", ".stage", "train_step"))]
            assert int(state["progress.train_step"]) == step + 1
            assert {int(state[key]) for key in masks if key.endswith(".stage")} == {min(step, 7)}
            for key in masks:
                assert torch.equal(state[key], its_state[key]), key
                assert torch.equal(state[key], average[key]) and torch.equal(average[key], its_average[key])
            for key, value in state.items():
                if "running" not in key and "num_batches" not in key:
                    assert torch.equal(value, its_state[key]), key


def test_two_forwards_before_one_backward() -> None:
    model = net(8)
    x = torch.randn(2, 3, 6, 6)
    for _ in range(4):
        (model(x) + model(x)).sum().backward()
    assert is_condensed(model)


@pytest.mark.parametrize("total", [4, 100])
def test_a_finished_network_is_trained_further_in_silence(
    caplog: pytest.LogCaptureFixture, total: int
) -> None:
    """It has dropped all it had to, whatever the count says."""
    model, again = net(4), net(total)
    run(model, 4)
    again.load_state_dict(model.state_dict())
    caplog.clear()
    run(again, 3)
    again.eval()
    assert is_condensed(again)
    assert not said(caplog, "total_steps=") and not said(caplog, "4 training forwards")
    del again
    gc.collect()
    assert not said(caplog, "training goes on") and not said(caplog, "training ended at step 7")


def test_a_position_beyond_the_end_is_noticed_once(caplog: pytest.LogCaptureFixture) -> None:
    model, again = net(20), net(5)
    run(model, 6)
    again.load_state_dict(model.state_dict())
    run(again, 3)
    assert is_condensed(again)
    assert len(said(caplog, "training goes on after total_steps=5")) == 1


def test_scripted_networks_say_that_they_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    with set_layer_config(scriptable=True):
        CondensingProgress(None)
        assert not said(caplog, "total_steps")
        CondensingProgress(4)
    assert said(caplog, "total_steps=4: a scripted network does not count its training")
