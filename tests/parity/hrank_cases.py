"""Cases of HRank that go through ``compress``: ranks of networks, sliced weights, masks of the first code."""

from __future__ import annotations

from typing import Any

import torch
from fill import make_input
from timm import create_model
from torch import Tensor, nn

from chanzoo.compress import collect_ranks
from chanzoo.compress.own import authors_vectors, layer_masks, own_masks
from chanzoo.compress.surgery import narrowed
from chanzoo.models import hrank_authors
from chanzoo.models.hrank import read_rates, widths_of_rates


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
    theirs = {key: case.spec["reference_checksums"][key] for key in case.spec["reference_class"]["sliced"]}
    for key, expected in (*case.spec["sliced_checksums"].items(), *theirs.items()):
        if key not in state:
            raise ValueError(f"we have no {key}")
        found = checksum(state[key])
        if not torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-7):
            raise ValueError(f"{key} is another slice: {found.tolist()}, expected {expected}")
    return ours


def masks(case: Any) -> dict[str, Tensor]:
    """The full network with every layer masked in turn: which entries are zero, and its logits."""
    variant, model = network(case)
    ranks = {key.removeprefix("rank/"): v for key, v in case.stored.items() if key.startswith("rank/")}
    parameters = dict(model.named_parameters())
    stay: dict[str, Tensor] = {}
    with torch.no_grad():
        for layer in layer_masks(variant, ranks, read_rates(case.spec["compress_rate"])):
            for name, mask in layer.items():
                if name in parameters:
                    parameters[name][~mask] = 0
                    stay[name] = mask
        ours = {"output": model(case.x)}
    # Their names of the parameters, by sending the masks through the converter as if they were weights.
    marked = {
        key: torch.ones_like(value) for key, value in model.state_dict().items() if value.is_floating_point()
    }
    for name, mask in stay.items():
        marked[name][~mask] = 0
    theirs = hrank_authors.to_authors({**model.state_dict(), **marked}, variant)
    for key, indices in case.spec["zeroed"].items():
        found = (theirs[key].flatten(1) if theirs[key].ndim > 1 else theirs[key][:, None]).sum(1)
        if (found == 0).nonzero()[:, 0].tolist() != indices:
            raise ValueError(f"{key}: other entries are zero")
    return ours


def checksum(tensor: Tensor) -> Tensor:
    """Sum, sum of absolute values, and product with a ramp."""
    flat = tensor.double().flatten()
    ramp = torch.linspace(-1, 1, len(flat), dtype=torch.float64)
    return torch.stack([flat.sum(), flat.abs().sum(), flat @ ramp])


__all__ = ["masks", "rank_net", "transfer"]
