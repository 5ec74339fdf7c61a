"""One of several processes that share the images of a table of ranks; see test_rank.py.

``rank_worker.py RANK WORLD FOLDER``: reads ``FOLDER/images.pt``, ranks its own part, writes
``FOLDER/ranks<rank>.csv``.
"""

import sys
from pathlib import Path

import timm
import torch
import torch.distributed as dist

import chanzoo  # noqa: F401  # registers the networks
from chanzoo.compress import collect_ranks


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20", widths=[4, 4, 4, 6, *[4] * 9])
    images = torch.load(folder / "images.pt", weights_only=True)[rank::world]
    collect_ranks(model, images.split(2), images=5).to_csv(folder / f"ranks{rank}.csv")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
