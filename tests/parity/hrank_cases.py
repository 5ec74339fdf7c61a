"""Cases of HRank that go through ``compress``: ranks of whole networks, sliced weights, the masks of the first release."""

from __future__ import annotations

from typing import Any

import torch
from fill import fill, make_input
from timm import create_model
from torch import Tensor, nn

from chanzoo.compress import collect_ranks
from chanzoo.compress.own import authors_vectors, own_masks
from chanzoo.compress.surgery import narrowed
from chanzoo.models import hrank_authors
from chanzoo.models.hrank import widths_of_rates


def network(case: Any) -> tuple[str, nn.Module]:
    """The full network of a case, with the reference's weights."""
    variant = hrank_authors.AUTHORS_NETS[case.spec["model"]]
    model = create_model(variant, num_classes=_classes(case.state)).eval()
    model.load_state_dict(hrank_authors.from_authors(case.state, variant))
    return variant, model


def _classes(state: dict[str, Tensor]) -> int:
    return list(state.values())[-1].shape[0]


def rank_net(case: Any) -> dict[str, Tensor]:
    """Mean ranks at the reference's points of a whole network, over its batches."""
    variant, model = network(case)
    batches = [make_input(batch["shape"], batch["seed"]) for batch in case.spec["batches"]]
    table = collect_ranks(model, batches, [vector.site for vector in authors_vectors(variant)])
    return {f"output/{site.name}": table.mean(site.name).float() for site in table.sites}


def transfer(case: Any) -> dict[str, Tensor]:
    """The slim network with plain slices of every tensor, each convolution keeping its own filters."""
    variant, model = network(case)
    widths = widths_of_rates(variant, case.spec["compress_rate"])
    vectors = {key.removeprefix("rank/"): v for key, v in case.stored.items() if key.startswith("rank/")}
    scores = {
        conv: vectors[vector.site.name]
        for vector in authors_vectors(variant)
        for conv in vector.convs
        if vector.site.name in vectors
    }
    small = narrowed(model, own_masks(model, case.x[:1], widths, scores))
    with torch.no_grad():
        ours = {"output/sliced": small.eval()(case.x)}
    state = hrank_authors.to_authors(small.state_dict(), variant)
    for key, expected in case.spec["sliced_checksums"].items():
        if key not in state:
            raise ValueError(f"we have no {key}")
        found = checksum(state[key])
        if not torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-7):
            raise ValueError(f"{key} is another slice: {found.tolist()}, expected {expected}")
    return ours


def checksum(tensor: Tensor) -> Tensor:
    """Sum, sum of absolute values, and product with a ramp."""
    flat = tensor.double().flatten()
    ramp = torch.linspace(-1, 1, len(flat), dtype=torch.float64)
    return torch.stack([flat.sum(), flat.abs().sum(), flat @ ramp])


__all__ = ["fill", "rank_net", "transfer"]
