"""Statistics shared by two processes equal those of one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chanzoo.layers import ChannelEquilibrium

WORKER = Path(__file__).with_name("sync_worker.py")
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("split", [[3, 1]], ids=str)
def test_two_processes_equal_one(split: list[int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, cotangent = torch.randn(sum(split), 32, 5, 4), torch.randn(sum(split), 32, 5, 4)
    layer = ChannelEquilibrium(32, group_size=16)
    job = {"channels": 32, "state": layer.state_dict(), "x": x, "cotangent": cotangent, "split": split}
    torch.save(job, tmp_path / "job.pt")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(WORKER)]
    workers = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path)], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for worker in workers:
        error = worker.communicate(timeout=120)[1]
        assert worker.returncode == 0, error.decode()[-2000:]

    x.requires_grad_()
    out = layer(x)
    (out * cotangent).sum().backward()
    results = [torch.load(tmp_path / f"out{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(torch.cat([r["output"] for r in results]), out)
    torch.testing.assert_close(torch.cat([r["grad"] for r in results]), x.grad, rtol=1e-4, atol=1e-5)
    for name, buffer in layer.named_buffers():
        for result in results:
            torch.testing.assert_close(result["buffers"][name], buffer)
    for name, parameter in layer.named_parameters():
        total = sum(result["params"][name] for result in results)
        torch.testing.assert_close(total, parameter.grad, rtol=1e-4, atol=1e-5)


def test_without_processes_sync_changes_nothing() -> None:
    torch.manual_seed(0)
    plain, shared = ChannelEquilibrium(16), ChannelEquilibrium(16, sync=True)
    shared.load_state_dict(plain.state_dict())
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(plain(x), shared(x))
