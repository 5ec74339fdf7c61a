"""One of several processes that train a network which condenses; see test_condensing.py.

``condensing_worker.py RANK WORLD FOLDER BROADCAST``: trains on its own images, averages beside it, and
writes both states after every step to ``FOLDER/out<rank>.pt``.
"""

import copy
import sys
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

import chanzoo  # noqa: F401  # registers the networks

STEPS = 14


def main(rank: int, world: int, folder: Path, broadcast: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.manual_seed(0)
    sizes = dict(depths=(1, 1), growth=(8, 8), head_width=8, num_classes=3)
    model = timm.create_model("condensenetv2_a", total_steps=STEPS, group_lasso=1e-4, **sizes).train()
    average = ModelEmaV3(model, decay=0.5)
    parallel = DistributedDataParallel(model, broadcast_buffers=broadcast)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(rank)
    states = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        parallel(torch.randn(4, 3, 32, 32, generator=generator)).square().mean().backward()
        optimizer.step()
        average.update(model)
        states.append(copy.deepcopy((model.state_dict(), average.module.state_dict())))
    torch.save(states, folder / f"out{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "True")
