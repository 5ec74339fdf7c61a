"""One of several processes that share the statistics of a layer; see test_sync.py.

``sync_worker.py RANK WORLD FOLDER``: reads ``FOLDER/job.pt``, trains on its own part of the batch, writes
``FOLDER/out<rank>.pt``.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from chanzoo.layers import ChannelEquilibrium


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    job = torch.load(folder / "job.pt", weights_only=True)
    layer = ChannelEquilibrium(job["channels"], group_size=16, sync=True)
    layer.load_state_dict(job["state"])
    x = job["x"].split(job["split"])[rank].clone().requires_grad_()
    out = layer(x)
    (out * job["cotangent"].split(job["split"])[rank]).sum().backward()
    assert x.grad is not None
    result = {"output": out.detach(), "grad": x.grad, "buffers": dict(layer.named_buffers())}
    result["params"] = {name: p.grad for name, p in layer.named_parameters()}
    torch.save(result, folder / f"out{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
