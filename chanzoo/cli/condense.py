"""``chanzoo condense``: a trained network with masks in, the small convolutions they stand for out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ChanzooError, UsageError
from .common import (
    add_format,
    add_model_options,
    build_model,
    check_device,
    check_name,
    emit,
    human_bytes,
    human_count,
    natural,
    percent,
    positive,
    progress_bar,
    say,
)
from .folders import check_output, write_whole

if TYPE_CHECKING:
    from torch import nn

    from ..hub.folders import Source

HELP = "turn a trained CondenseNet or SFR-ShuffleNet into its condensed form"
EXAMPLES = """\
  chanzoo condense condensenetv2_cifar110.c10j -o condensed
  chanzoo condense output/train/my_run -o condensed                  a folder of timm's train script
  chanzoo condense output/train/my_run/checkpoint-20.pth.tar -o condensed --data DATA
  chanzoo condense condensenetv2_a --checkpoint weights.pth -o condensed

OUT_DIR gets the network (config.json, model.safetensors), which timm loads by name:
timm.create_model("local-dir:OUT_DIR", pretrained=True). Beside it, recipe and summary of a run, and
report.json: multiply-adds, parameters, bytes and latency of both forms, and how much their outputs differ.
The latency called "folded" is that of timm.utils.reparameterize_model(network), the one to deploy on a CPU.
A network that has not dropped all its connections is refused: nothing is dropped here.
"""
_EVIDENCE = ("recipe.yaml", "summary.csv")  # of the training, which is that of both forms
_FILES = {"config.json", "model.safetensors", "report.json", *_EVIDENCE}
_TOLERANCE = 1e-4  # of the largest output; the two forms differ by the order of summation, below 1e-6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "name",
        metavar="NAME|CHECKPOINT",
        help="arch or arch.tag; hf-hub:ORG/REPO; a folder; or a checkpoint of timm's train script",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT_DIR", help="where the network goes"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT_DIR if it is there")
    parser.add_argument("--data", metavar="DATA_DIR", help="measure the accuracy of both forms on images")
    parser.add_argument("--val-split", default="val", metavar="SPLIT", help="for accuracy (default: val)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="(default: 32 on a CPU, else 256)")
    parser.add_argument(
        "--workers", type=natural, default=0, metavar="N", help="processes that read images (default: 0)"
    )
    add_model_options(parser)
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything, condense, measure, and write everything or nothing."""
    _check_arguments(args)
    from ..layers import condense, is_condensed

    source = _open(args)
    model: Any = source.model
    model.pretrained_cfg = {**model.pretrained_cfg, **(source.data or {})}  # as it was trained
    if source.remark:
        say(f"chanzoo: {source.remark}")
    if getattr(model, "condensed", False):
        raise UsageError(f'"{args.name}" is the condensed form already.\n  Nothing was written.')
    try:
        small = condense(model)
    except UsageError as error:
        hint = (
            ""
            if is_condensed(model)
            else "   Train it to the end with --model-kwargs total_steps=N; see: chanzoo recipe steps --help"
        )
        what = str(error).removesuffix("The network is unchanged.").rstrip()
        raise UsageError(f"{what}\n  Nothing was written.{hint}") from error
    report = {**_measure(args, model, small), "of": source.remark}
    saved = _saved(args, source, small)

    def write(folder: Path) -> None:
        from ..hub.saved import network_files

        evidence = {name: source.files[name] for name in _EVIDENCE if name in source.files}
        for path, content in (network_files(*saved) | evidence).items():
            (folder / path).write_bytes(content)
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    write_whole(args.output, write)
    emit(report, args.format == "json", ("", "training form", "condensed", "share"), _table(report))
    say(f'chanzoo: the condensed network is timm.create_model("local-dir:{args.output}", pretrained=True)')
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be done before any work."""
    check_output(args.output, _FILES, args.overwrite, args.name)
    if args.data and not Path(args.data).exists():
        raise UsageError(f'no image folder "{args.data}".\n  Nothing was written.')
    check_device(args.device)
    path = Path(args.name)
    if _is_run(path):
        given = [name for name in ("weights", "checkpoint", "num_classes", "ema") if getattr(args, name)]
        if given:
            raise UsageError(
                f'--{given[0].replace("_", "-")} belongs to a name, and "{path}" is a run: it says itself '
                "what it holds, and its averaged weights are taken if there are any.\n  Nothing was written."
            )
    elif path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(
            f'"{path}" holds no network: neither config.json nor, of a run of the train script, args.yaml.\n'
            "  Nothing was written."
        )
    elif not path.exists() and (path.suffix in (".tar", ".pth", ".pt", ".safetensors") or path.is_absolute()):
        raise UsageError(f'there is no folder or checkpoint "{path}".\n  Nothing was written.')
    elif not path.exists():
        check_name(args.name)


def _is_run(path: Path) -> bool:
    """Whether a checkpoint, or the folder of a run, was named rather than a network."""
    return path.is_file() or ((path / "args.yaml").is_file() and not (path / "config.json").is_file())


def _open(args: argparse.Namespace) -> Source:
    """The network by name, from a folder, or from a checkpoint beside the options of its run."""
    from ..hub.folders import DATA_KEYS, Source, cfg_of, read_training
    from ..layers import is_condensed

    path = Path(args.name)
    if path.is_file():
        if not (path.parent / "args.yaml").is_file():
            raise UsageError(
                f'beside "{path}" there is no args.yaml that says which network it is of.\n'
                f"  Nothing was written.   Name it: chanzoo condense ARCH --checkpoint {path} -o OUT_DIR"
            )
        return read_training(path.parent, path)
    if _is_run(path):
        best, last = read_training(path), path / "last.pth.tar"
        if is_condensed(best.model) or not last.is_file():
            return best
        return read_training(path, last)  # the best epoch came before the last drop
    model = build_model(args.name, args)
    cfg = cfg_of(model)
    keys = ("label_names", "label_descriptions", "license", "paper_ids")
    return Source(
        model=model,
        state={},
        cfg={key: cfg[key] for key in keys if cfg.get(key)},
        data={key: cfg[key] for key in DATA_KEYS if cfg.get(key) is not None},
    )


def _measure(args: argparse.Namespace, model: nn.Module, small: nn.Module) -> dict[str, Any]:
    """All figures, for programs.

    Raises:
        ChanzooError: The two forms do not compute the same.
    """
    import torch
    from safetensors.torch import save
    from timm.utils.model import reparameterize_model

    from ..layers.condensing import learned_layers
    from ..macs import count_macs, count_params, input_size_of
    from ..measure.accuracy import evaluate
    from ..measure.latency import measure_latency

    size = input_size_of(model)
    forms = {"training": model, "condensed": small}
    image = torch.randn(8, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        outputs = {name: form(image).double() for name, form in forms.items()}
    scale = outputs["training"].abs().max().clamp(min=1e-30)
    difference = float((outputs["training"] - outputs["condensed"]).abs().max() / scale)
    if not difference <= _TOLERANCE:
        raise ChanzooError(
            f"the condensed network computes something else: outputs differ by {difference:.1e} of the "
            "largest.\n  This is a defect; please report it.   Nothing was written."
        )
    timed = {**{name: form.to(args.device) for name, form in forms.items()}}
    timed["folded"] = reparameterize_model(small).to(args.device)
    seconds = measure_latency(timed, size)
    top1 = {}
    if args.data:
        for name, form in forms.items():
            with progress_bar(f"accuracy, {name}") as bar:
                options: Any = {"batch_size": args.batch_size, "workers": args.workers}
                result = evaluate(
                    form, args.data, split=args.val_split, device=args.device, progress=bar, **options
                )
            top1[name] = result.top1
    for form in forms.values():
        form.to("cpu")
    return {
        "model": args.name,
        "layers": len(learned_layers(model)),
        "input_size": list(size),
        "macs": {name: count_macs(form, size) for name, form in forms.items()},
        "params": {name: count_params(form) for name, form in forms.items()},
        "bytes": {name: len(save(_tensors(form))) for name, form in forms.items()},
        "latency_ms": {name: round(1000 * value, 4) for name, value in seconds.items()},
        "difference": difference,
        "top1": top1,
        "output": str(args.output),
    }


def _tensors(model: nn.Module) -> dict[str, Any]:
    return {key: value.contiguous() for key, value in model.state_dict().items()}


def _saved(args: argparse.Namespace, source: Source, small: nn.Module) -> tuple[Source, dict[str, Any]]:
    """The condensed network with what is known about it."""
    from ..hub.folders import Source

    is_file = Path(args.name).exists()
    options = " --checkpoint CHECKPOINT" * bool(args.checkpoint) + " --ema" * bool(args.ema)
    step = f"chanzoo condense {'CHECKPOINT' if is_file else args.name + options} -o FOLDER"
    about = {
        **source.about,
        "base_model": ""
        if is_file or args.checkpoint
        else args.name.removeprefix("hf-hub:").partition("@")[0],
        "method": "condensed",
        "command": " && ".join(filter(None, (source.about.get("command"), step))),
    }
    named = Source(model=small, state=small.state_dict(), cfg=source.cfg, data=source.data)
    return named, {"chanzoo": {key: value for key, value in about.items() if value}}


def _table(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The figures for people."""
    rows = []
    for key, show in (("macs", human_count), ("params", human_count), ("bytes", human_bytes)):
        full, small = report[key]["training"], report[key]["condensed"]
        rows.append((key, show(full), show(small), f"{small / full:.3f}"))
    latency = report["latency_ms"]
    for name in ("condensed", "folded"):
        share = f"{latency[name] / latency['training']:.3f}"
        label = "latency_ms" if name == "condensed" else "latency_ms, folded"
        rows.append((label, f"{latency['training']:.2f}", f"{latency[name]:.2f}", share))
    rows.append(("difference", "", f"{report['difference']:.1e}", ""))
    if report["top1"]:
        rows.append(("top-1", *(percent(report["top1"][name]) for name in ("training", "condensed")), ""))
    return rows
