"""How fast the forms of CondenseNet V2 are, against the form that is trained.

    python scripts/bench_condense.py                                A, B and C at 224×224, CPU
    python scripts/bench_condense.py --model condensenetv2_c --batch 1 --threads 2

All forms of a network take turns, so that they see the same machine; the ratios count, not the seconds.

* training: masks, multiplied into the weights at every call
* condensed: grouped convolutions and indices, as it is saved
* fused: the same after ``timm.utils.reparameterize_model``
* plain: condensed without its indices, so a plain grouped network of the same multiply-adds that computes
  something else; what the indices cost is the difference

Multiply-adds are those that are really executed: of masks the whole weights, of fused layers also the zeros.
Masks are made final on random weights; which connections stay does not matter for time.
"""

from __future__ import annotations

import argparse
import copy
from types import MethodType
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

import chanzoo
from chanzoo.layers import CondensedConv2d, CondensedReactivation
from chanzoo.layers.condensing import learned_layers
from chanzoo.layers.shuffle import channel_shuffle
from chanzoo.measure.latency import measure_latency


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [f"condensenetv2_{letter}" for letter in "abc"]
    parser.add_argument("--model", nargs="+", default=names)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, help="of the image (default: the network's own)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="least time of a turn")
    args = parser.parse_args()
    print(f"CPU, torch {torch.__version__}")
    for name in args.model:
        torch.manual_seed(0)
        forms = make_forms(name)
        own: Any = forms["training"].pretrained_cfg["input_size"]  # pyright: ignore
        size = (3, args.size, args.size) if args.size else own
        macs = {form: chanzoo.count_macs(network, size) for form, network in forms.items()}
        file_bytes = {form: len(save(tensors(network))) for form, network in forms.items() if form != "plain"}
        print(f"\n{name} at {size[1]}×{size[2]}")
        for form, network in forms.items():
            stored = file_bytes.get(form)
            shown = f"{stored:>12,} bytes ({stored / file_bytes['training']:.2f})" if stored else ""
            print(f"  {form:<10} {macs[form] / 1e6:>8.1f} M MACs   {count(network):>11,} params   {shown}")
        print("  threads  batch   " + "".join(f"{form:>22}" for form in forms))
        for threads in args.threads:
            torch.set_num_threads(threads)
            for batch in args.batch:
                seconds = measure_latency(
                    forms, size, batch_size=batch, rounds=args.rounds, seconds=args.seconds
                )
                cells = (
                    f"{1000 * batch * time:>10.1f} ms ({seconds['training'] / time:.2f}×)"
                    for time in seconds.values()
                )
                print(f"  {threads:>7}  {batch:>5}   " + "".join(f"{cell:>22}" for cell in cells), flush=True)


def make_forms(name: str) -> dict[str, nn.Module]:
    """The forms of one network."""
    model = timm.create_model(name).eval()
    for layer in learned_layers(model).values():
        layer.condense_to(layer.condensation_factor - 1)
    small = chanzoo.condense(model)
    plain = copy.deepcopy(small)
    for module in plain.modules():
        if isinstance(module, CondensedConv2d):
            module.forward = MethodType(_plain_conv, module)
        elif isinstance(module, CondensedReactivation):
            module.forward = MethodType(_plain_reactivation, module)
    return {"training": model, "condensed": small, "fused": reparameterize_model(small), "plain": plain}


def _plain_conv(self: Any, x: Tensor) -> Tensor:
    """Each group reads a run of channels."""
    x = F.conv2d(self.act(self.norm(x)), self.weight, groups=self.groups)
    return channel_shuffle(x, self.groups)


def _plain_reactivation(self: Any, new: Tensor, old: Tensor) -> Tensor:
    """Each group updates a run of channels."""
    new = channel_shuffle(self.act(self.norm(new)), self.in_channels // self.groups)
    return old + F.conv2d(new, self.weight, groups=self.groups)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """What is saved."""
    return {key: value.contiguous() for key, value in model.state_dict().items()}


def count(model: nn.Module) -> int:
    """Numbers that a network computes with, statistics of norms included."""
    return sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())


if __name__ == "__main__":
    main()
