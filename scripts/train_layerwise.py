"""HRank's first procedure, for the curious: mask one layer, train, go on to the next.

    TIMM_REPO=... python scripts/train_layerwise.py cifar_resnet56.c10j --data DATA -o runs/layerwise \
        --rates "[0.1]+[0.60]*35+[0.0]*2+[0.6]*6+[0.4]*3+[0.1]+[0.4]+[0.1]+[0.4]+[0.1]+[0.4]+[0.1]+[0.4]"

One training per layer (55 for ResNet-56), by timm's unmodified train script; its authors recommend pruning at
once instead (``chanzoo prune``). The network keeps its size, with zeros where filters were removed; OUT/final
is that network as timm saves it. Run it again after an interruption: finished layers are passed over. Options
that are not its own go to the train script, such as --device cpu.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import chanzoo  # noqa: F401  (registers the networks)
from chanzoo.compress import collect_ranks
from chanzoo.compress.own import authors_vectors, layer_masks
from chanzoo.errors import ChanzooError, UsageError
from chanzoo.layers.masking import hold_masks
from chanzoo.measure.images import Picked, open_images, open_loader
from chanzoo.models.hrank import HRANK_NAMES, read_rates
from chanzoo.recipes.check import train_script


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="weight to start from, such as cifar_resnet56.c10j")
    parser.add_argument("--data", required=True, help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("--rates", required=True, help="one per layer, such as [0.1]+[0.6]*54")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where the runs go")
    parser.add_argument("--epochs", type=int, default=15, help="of each layer's training (default: 15)")
    parser.add_argument("--images", type=int, default=768, help="to rank the maps of (default: 768)")
    parser.add_argument("--layers", type=int, help="stop after so many (default: all)")
    parser.add_argument("--no-pretrained", action="store_true", help="start from random weights")
    args, args.options = parser.parse_known_args()  # the others go to the train script
    try:
        model = run(args)
    except ChanzooError as error:
        print(f"train_layerwise: {error}", file=sys.stderr)
        return error.exit_code
    timm.models.save_for_hf(model, args.output / "final", safe_serialization=True)
    print(f"{args.output / 'final'}: timm.create_model('local-dir:{args.output / 'final'}', pretrained=True)")
    return 0


def run(args: argparse.Namespace) -> nn.Module:
    """Train layer by layer; the network with the zeros of all of them."""
    base = args.name.partition(".")[0]
    variant = HRANK_NAMES.get(base)
    if variant is None:
        raise UsageError(f"{base} is not one of: {', '.join(HRANK_NAMES)}.\n  Nothing was trained.")
    rates, script = read_rates(args.rates), train_script()
    model = timm.create_model(args.name, pretrained=not args.no_pretrained)
    images = open_images(model, args.data, "train")
    open_images(model, args.data, "val")
    ranks = rank_vectors(model, variant, images, args)
    masks: dict[str, Tensor] = {}
    args.output.mkdir(parents=True, exist_ok=True)
    start = args.output / "start.safetensors"
    if not start.exists():
        save_file(model.state_dict(), start)
    known = dict(model.named_parameters())
    for number, layer in enumerate(layer_masks(variant, ranks, rates)[: args.layers], start=1):
        masks |= {name: mask for name, mask in layer.items() if name in known}
        folder = args.output / f"layer{number}"
        if not (folder / "done").exists():
            train(folder, base, masks, start, script, args)
        start = folder / "model.safetensors"
    model.load_state_dict(load_file(start))
    hold_masks(model, masks).remove()
    return model


def rank_vectors(
    model: nn.Module, variant: str, images: object, args: argparse.Namespace
) -> dict[str, Tensor]:
    """Mean ranks of the full network, once and for all."""
    path = args.output / "ranks.safetensors"
    if path.exists():
        return load_file(path)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # pyright: ignore
    loader = open_loader(model, Picked(images, order[: args.images].tolist()), batch_size=128)
    table = collect_ranks(model, loader, [v.site for v in authors_vectors(variant)], args.images)
    ranks = {site.name: table.mean(site.name) for site in table.sites}
    args.output.mkdir(parents=True, exist_ok=True)
    save_file(ranks, path)
    return ranks


def train(
    folder: Path,
    base: str,
    masks: dict[str, Tensor],
    start: Path,
    script: Path,
    args: argparse.Namespace,
) -> None:
    """Train with the masks held; the best epoch's weights become ``folder/model.safetensors``."""
    folder.mkdir(exist_ok=True)
    save_file({name: mask.clone() for name, mask in masks.items()}, folder / "masks.safetensors")
    command = [
        *(sys.executable, "-m", "chanzoo", "run", str(script), "--model", HRANK_NAMES[base]),
        *("--model-kwargs", f"masks={folder / 'masks.safetensors'}", "--initial-checkpoint", str(start)),
        *(
            "--data-dir",
            args.data,
            "--output",
            str(folder),
            "--experiment",
            "run",
            "--epochs",
            str(args.epochs),
        ),
        *("--opt", "sgd", "--momentum", "0.9", "--weight-decay", "5e-4", "--lr", "0.01", "-b", "128"),
        *("--sched", "multistep", "--decay-milestones", "5", "10", "--decay-rate", "0.1"),
        *("--warmup-epochs", "0", "--smoothing", "0", "--checkpoint-hist", "1", *args.options),
    ]
    with (folder / "log.txt").open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise ChanzooError(f"the train script ended with {code}: see {folder / 'log.txt'}.")
    runs = sorted(folder.glob("run*/model_best.pth.tar"), key=lambda path: path.stat().st_mtime)
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(runs[-1], map_location="cpu", weights_only=True)["state_dict"]
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    (folder / "done").touch()


if __name__ == "__main__":
    sys.exit(main())
