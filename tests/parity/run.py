"""Compare our layers and networks with tensors that the methods' reference code produced.

``python tests/parity/run.py DIR…`` runs every case in the folders, one line per case, and ends with
``N passed, N failed``. A case is NAME.json beside NAME.safetensors (see fill.py). The reference's weights
reach our modules through the converters we ship, so those are tested as well.

A new family adds one function from a case to our tensors and one row to ``KINDS``. A kind of case that has no
tensors, only a json file, adds one function from that to what is wrong, and one row to ``LISTS``.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import condense_cases
import hrank_cases
from fill import load_case, make_input
from safetensors.torch import load_file

from chanzoo.compress import RankSite, collect_ranks, rank_of_maps
from chanzoo.layers import ChannelEquilibrium
from chanzoo.layers.narrow import apply_widths, read_widths
from chanzoo.macs import count_macs, count_params
from chanzoo.models import hrank_authors
from chanzoo.models.ce_mobilenetv2 import CEMobileNetV2
from chanzoo.models.ce_resnet import AUTHORS_LEAVES, CEResNet, from_authors, to_authors
from chanzoo.models.hrank import full_network, widths_of_rates

LAYER_TOLERANCE = 1e-5  # 32-bit noise of one layer is below 1e-6; every slip in a formula is above 1e-3
DOUBLE_TOLERANCE = 1e-10  # 64-bit noise of a whole network is below 1e-13
MODEL_TOLERANCE = 1e-4  # 50 to 150 layers of 32-bit noise in another order of summation


@dataclass(frozen=True)
class Case:
    """One case as read from its two files.

    Attributes:
        spec: The json file.
        state: State dict with the reference's names.
        x: Input.
        stored: All tensors of the other file.
    """

    spec: dict[str, Any]
    state: dict[str, Tensor]
    x: Tensor
    stored: dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What came of one case; ``why`` is empty if it could be compared and agreed."""

    name: str
    error: float
    tolerance: float
    why: str = ""

    @property
    def passed(self) -> bool:
        """Whether every expected tensor agreed."""
        return not self.why

    def line(self) -> str:
        """The outcome for people."""
        verdict = "ok" if self.passed else f"FAIL  {self.why}"
        return f"{self.name:<32} error {self.error:9.2e}  tolerance {self.tolerance:.0e}  {verdict}"


def ce_layer(case: Case) -> dict[str, Tensor]:
    """One Channel Equilibrium layer: train, eval or several steps, with buffers and gradients."""
    config = case.spec["config"]
    layer = ChannelEquilibrium(
        config["num_features"],
        group_size=config["num_channels"],
        reduction=config.get("reduction", 4),
        newton_steps=config.get("T", 3),
        eps=config.get("eps", 1e-5),
        momentum=config.get("momentum", 0.1),
    )
    prefix = "ce1."  # a lone layer is converted as if it were a stem
    state = from_authors({prefix + key: value for key, value in case.state.items()})
    layer.load_state_dict({key.removeprefix("act1.ce."): value for key, value in state.items()})
    steps = case.spec.get("steps") or [{"mode": case.spec["mode"], "scale": 1.0, "shift": 0.0}]
    ours: dict[str, Tensor] = {}
    x = case.x.clone().requires_grad_()
    for i, step in enumerate(steps):
        layer.train(step["mode"] == "train")
        ours["output"] = ours[f"output/step{i}"] = layer(step["scale"] * x + step["shift"])
    if "cotangent_seed" in case.spec:
        cotangent = make_input(list(ours["output"].shape), case.spec["cotangent_seed"])
        (ours["output"] * cotangent).sum().backward()
        assert x.grad is not None
        ours["output/grad/input"] = x.grad
        for theirs, name in AUTHORS_LEAVES.items():
            grad = dict(layer.named_parameters()).get(name)
            if grad is not None and grad.grad is not None:
                ours[f"output/grad/{theirs}"] = grad.grad
    for theirs, name in AUTHORS_LEAVES.items():
        ours[f"output/buffer/{theirs}"] = layer.state_dict()[name]
    return ours


def ce_resnet(case: Case) -> dict[str, Tensor]:
    """A whole CE-ResNet, with features by module name and buffers by the authors' names."""
    depth = re.search(r"ce_resnet(\d+)", case.spec["model"])
    assert depth
    model = CEResNet(
        int(depth[1]), num_classes=len(case.state["fc.bias"]), in_chans=case.state["conv1.weight"].shape[1]
    )
    model.load_state_dict(from_authors(case.state))
    ours = _forward(model, case)
    ours.update({f"output/buffer/{key}": value for key, value in to_authors(model.state_dict()).items()})
    for key in case.state:  # what to_authors only makes up
        if key.endswith(".running_mean") and ("ce." in key or key.startswith("ce1.")):
            ours.pop(f"output/buffer/{key}", None)
    return ours


def ce_mobilenetv2(case: Case) -> dict[str, Tensor]:
    """A whole CE-MobileNetV2: timm's names, with the authors' layer as ``blocks.S.B.ce``."""
    suffix = re.search(r"ce_mobilenetv2_?(\d*)", case.spec["model"])
    assert suffix
    model = CEMobileNetV2(
        width=int(suffix[1] or 100) / 100,
        num_classes=len(case.state["classifier.bias"]),
        in_chans=case.state["conv_stem.weight"].shape[1],
    )
    state = {}
    for key, value in from_authors(case.state).items():
        block, found, leaf = key.partition(".se.")
        norm = "bn1" if block == "blocks.0.0" else "bn2"  # the first block has no expansion
        state[f"{block}.{norm}.act.ce.{leaf}" if found else key] = value
    model.load_state_dict(state)
    ours = _forward(model, case)
    for key, value in model.state_dict().items():
        block, found, leaf = re.sub(r"\.bn[12]\.act\.ce\.", ".se.", key).partition(".se.")
        if found:
            key = next(f"{block}.ce.{theirs}" for theirs, name in AUTHORS_LEAVES.items() if name == leaf)
        ours[f"output/buffer/{key}"] = value
    return ours


def rank_maps(case: Case) -> dict[str, Tensor]:
    """Ranks of stored maps: of each map, of each channel over a batch, and over batches of unequal size."""
    maps = {name: case.stored[f"maps/{name}"] for name in (*case.spec["maps"], *case.spec["stream"])}

    def mean(names: list[str]) -> Tensor:
        batches = [maps[name] for name in names]
        table = collect_ranks(nn.Sequential(nn.Identity()), batches, [RankSite("maps", "0")])
        return table.mean("maps")

    ours = {f"output/per_map/{name}": rank_of_maps(maps[name]) for name in case.spec["maps"]}
    ours.update({f"output/{name}": mean([name]) for name in case.spec["maps"]})
    return {**ours, "output/stream": mean(case.spec["stream"])}


def slim(case: Case) -> dict[str, Tensor]:
    """A whole network by its compress rate: shapes, parameters and MACs exact, and its logits."""
    spec = case.spec
    variant = hrank_authors.AUTHORS_NETS[spec["model"]]
    assert hrank_authors.find_variant(case.state) == variant
    model = timm.create_model(variant, compress_rate=spec["compress_rate"])
    state = hrank_authors.from_authors(case.state, variant)
    model.load_state_dict(state)
    shapes = {
        key: list(value.shape) for key, value in hrank_authors.to_authors(model.state_dict(), variant).items()
    }
    _expect("shapes", list(shapes.items()), [(key, shape) for key, shape, _ in spec["state"]])
    _expect("widths", hrank_authors.widths_of(state, variant), read_widths(model, full_network(variant)))
    macs, size = spec["macs"], spec["macs"]["at"]
    _expect("params", count_params(model), spec["params"])
    _expect("macs", count_macs(model, (3, size, size)), macs["conv"] + macs["linear"])
    return _forward(model, case)


def slim_widths(spec: dict[str, Any]) -> None:
    """Widths that many lists of rates leave: channels, parameters, and a hash of all names and shapes."""
    for i, row in enumerate(spec["rows"]):
        variant = hrank_authors.AUTHORS_NETS[row["model"]]
        table = widths_of_rates(variant, row["compress_rate"])
        model = full_network(variant)
        apply_widths(model, table)
        state = hrank_authors.to_authors(model.state_dict(), variant)
        weights = [value for value in state.values() if value.dim() > 1]
        layout = ";".join(f"{key}:{'x'.join(map(str, value.shape))}" for key, value in state.items())
        found = {
            "params": count_params(model),
            "out_channels": [len(weight) for weight in weights],
            "in_channels": [weight.shape[1] for weight in weights],
            "sha256": hashlib.sha256(layout.encode()).hexdigest(),
        }
        for key, value in found.items():
            _expect(f"row {i} ({row['model']}): {key}", value, row[key])


def _expect(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"{what} {str(found)[:40]} expected {str(expected)[:40]}")


def _forward(model: nn.Module, case: Case) -> dict[str, Tensor]:
    """Output, and each module's output that the case asks for (``_avg``: its spatial mean)."""
    ours: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            ours[f"output/{name}"] = output.detach().clone()
            ours[f"output/{name}_avg"] = output.detach().mean(dim=(2, 3))

        return hook

    modules = dict(model.named_modules())
    for name in {key.removeprefix("output/").removesuffix("_avg") for key in case.spec["expected"]}:
        module = modules.get(re.sub(r"^ce1$", "act1.ce", re.sub(r"\.ce$", ".se", name)))
        if module is not None:
            module.register_forward_hook(keep(name))
    model.train(case.spec.get("mode") == "train")
    with torch.no_grad():
        ours["output"] = model(case.x)
    return ours


# Pattern of a case's "kind", or of its "model" if it states no kind; what runs it, and the tolerance.
KINDS: tuple[tuple[str, Callable[[Case], dict[str, Tensor]], float], ...] = (
    (r"ChannelEquilibrium\b", ce_layer, LAYER_TOLERANCE),
    (r"ce_resnet\d+\b", ce_resnet, MODEL_TOLERANCE),
    (r"ce_mobilenetv2(_\d+)?\b", ce_mobilenetv2, MODEL_TOLERANCE),
    (r"rank_maps\b", rank_maps, LAYER_TOLERANCE),  # ranks are whole numbers, so this means equal
    (r"slim\b", slim, MODEL_TOLERANCE),
    (r"rank_net\b", hrank_cases.rank_net, LAYER_TOLERANCE),
    (r"transfer\b", hrank_cases.transfer, MODEL_TOLERANCE),
    (r"masks\b", hrank_cases.masks, MODEL_TOLERANCE),
    (r"layer_schedule\b", condense_cases.layer_schedule, DOUBLE_TOLERANCE),
    (r"layer_backward\b", condense_cases.layer_backward, DOUBLE_TOLERANCE),
    (r"layer_convert\b", condense_cases.layer_convert, DOUBLE_TOLERANCE),
    (r"model\b", condense_cases.model, DOUBLE_TOLERANCE),
    (r"model_converted_checkpoint\b", condense_cases.converted_checkpoint, DOUBLE_TOLERANCE),
    (r"train_run\b", condense_cases.train_run, DOUBLE_TOLERANCE),
    (r"sfr_shufflenetv2\b", condense_cases.sfr_shufflenetv2, DOUBLE_TOLERANCE),
)
# Expected tensors that document the reference's own slips: nothing of ours corresponds to them.
SLIPS = {"transfer": ("output",)}

# Kinds of cases without tensors; what runs them raises if anything differs.
LISTS: dict[str, Callable[[dict[str, Any]], None]] = {"widths": slim_widths}


def run_case(path: Path) -> Outcome:
    """Run the case in ``path`` (.json) and compare every tensor it expects."""
    tolerance, worst = 0.0, float("nan")
    try:
        spec = json.loads(path.read_text())
        if check := LISTS.get(spec.get("kind")):
            check(spec)
            return Outcome(path.stem, 0.0, tolerance)
        spec, state, x, expected = load_case(path)
        called = spec.get("kind") or spec["model"]
        kind = next((row for row in KINDS if re.match(row[0], called)), None)
        if kind is None:
            return Outcome(path.stem, worst, tolerance, f"no kind of case is called {called!r}")
        tolerance = kind[2]
        stored = load_file(path.with_suffix(".safetensors"))
        ours = kind[1](Case({"expected": sorted(expected), **spec}, state, x, stored))
        if not expected:
            return Outcome(path.stem, worst, tolerance, "the case expects nothing")
        worst, why = 0.0, ""
        for name, theirs in expected.items():
            if name not in ours:
                if name not in (*spec.get("optional", ()), *SLIPS.get(called, ())):
                    why = why or f"we have no {name}"
                continue
            error = _error(ours[name].detach(), theirs)
            if not error <= tolerance:
                why = why or f"{name} is off by {error:.2e}"
            worst = max(worst, error) if error == error else float("inf")
        return Outcome(path.stem, worst, tolerance, why)
    except Exception as error:  # a case that cannot be run is a failed case, whatever the cause
        return Outcome(
            path.stem, worst, tolerance, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        )


def _error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest expected entry."""
    if ours.shape != theirs.shape:
        raise ValueError(f"our shape {list(ours.shape)} is not the expected {list(theirs.shape)}")
    scale = theirs.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((ours.double() - theirs.double()).abs().max() / scale).item()


def find_cases(folders: list[str]) -> Iterator[Path]:
    """The json file of every case in the folders and below, whether or not both its files are there."""
    for folder in folders:
        files = (path for path in Path(folder).rglob("*") if path.suffix in (".json", ".safetensors"))
        yield from sorted({path.with_suffix(".json") for path in files})


def main(folders: list[str]) -> int:
    """Run all cases of the folders; 0 if all passed."""
    if not folders or folders[0].startswith("-"):
        print("usage: python tests/parity/run.py DIR…", file=sys.stderr)
        return 2
    passed = failed = 0
    for folder in folders:
        if not any(find_cases([folder])):
            print(f"{folder}: no case in this folder", file=sys.stderr)
            failed += 1
    for path in find_cases(folders):
        outcome = run_case(path)
        print(outcome.line(), flush=True)
        passed += outcome.passed
        failed += not outcome.passed
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
