"""``chanzoo info``: what a network is, what it costs, and where its weights come from."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_format, check_name, emit, human_bytes, human_count, percent, where
from .folders import folder_of, is_folder

HELP = "show size, cost, input, source and licence of a network"
EXAMPLES = """\
  chanzoo info ce_resnet50
  chanzoo info resnet50.a1_in1k          any network of timm's
  chanzoo info ce_resnet50 --format json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", metavar="NAME", help="arch or arch.tag; hf-hub:ORG/REPO; or a folder")
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Show one network."""
    check_name(args.name)
    data = describe(f"local-dir:{folder_of(args.name)}" if is_folder(args.name) else args.name)
    emit(data, args.format == "json", ("", ""), table(data))
    return 0


def describe(name: str) -> dict[str, Any]:
    """Everything known about a network; nothing is downloaded or computed."""
    import timm
    import torch

    from ..measure import count_macs, count_params
    from ..weights import DATASETS, WEIGHTS, weights_of

    arch, _, tag = name.partition(".")
    rows = weights_of(arch)
    row = WEIGHTS.get(name) if tag else (rows[0] if rows else None)
    with torch.device("meta"):
        model = timm.create_model(row.name if row else name)
    cfg: Any = model.pretrained_cfg
    params = count_params(model)
    data: dict[str, Any] = {
        "name": row.name if row else name,
        "arch": arch,
        "tag": row.tag if row else cfg.get("tag") or None,
        "params": params,
        "macs": count_macs(model, cfg["input_size"]),
        "param_bytes": 4 * params,
        "num_classes": model.num_classes,
        "input_size": list(cfg["input_size"]),
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
        "crop_pct": cfg.get("crop_pct"),
        "interpolation": cfg.get("interpolation"),
        "source": _source(cfg),
        "licence": cfg.get("license"),
        "paper": cfg.get("paper_ids"),
        "weights": [other.name for other in rows],
    }
    if row:
        dataset = DATASETS[row.dataset]
        data |= {
            "source": {"embedded": "embedded", "local": "$CHANZOO_WEIGHTS", "none": None}.get(
                where(row), _hub(row)
            ),
            "file_bytes": row.file_bytes,
            "sha256": row.sha256,
            "dataset": dataset.title,
            "dataset_note": dataset.note,
            "metrics": row.metrics,
            "recipe": row.recipe,
            "command": row.command,
            "seed": row.seed,
            "hours": row.hours,
            "licence": row.licence,
            "paper": row.paper,
            "published": row.published or None,
            "model_args": row.model_args,
        }
    return data


def _hub(row: Any) -> str:
    return f"{row.hub_repo}@{row.revision}"


def _source(cfg: dict[str, Any]) -> str | None:
    return cfg.get("file") or cfg.get("hf_hub_id") or cfg.get("url") or None


def table(data: dict[str, Any]) -> list[tuple[str, str]]:
    """The same for people: units, and nothing that is unknown."""
    size = "×".join(str(n) for n in data["input_size"])
    shown = {
        "name": data["name"],
        "params": f"{human_count(data['params'])} ({human_bytes(data['param_bytes'])} in 32-bit floats)",
        "MACs": f"{human_count(data['macs'])} at {size}",
        "input": f"{size}, crop {data['crop_pct']}, {data['interpolation']}",
        "mean, std": f"{_numbers(data['mean'])}; {_numbers(data['std'])}",
        "classes": str(data["num_classes"]),
        "weights": ", ".join(data["weights"]),
        "source": data["source"] or "none: no weights, or not on this machine",
        "file": f"{data['file_bytes']:,} bytes, sha256 {data['sha256']}" if "sha256" in data else "",
        "data": data.get("dataset", ""),
        "": data.get("dataset_note", ""),
        "metrics": ", ".join(f"{key} {percent(value)}" for key, value in data.get("metrics", {}).items()),
        "recipe": f"{data['recipe']}, seed {data['seed']}, {data['hours']} h" if "recipe" in data else "",
        "command": data.get("command", ""),
        "published": data.get("published") or "",
        "licence": data["licence"] or "",
        "paper": _text(data["paper"]),
    }
    return [(key, value) for key, value in shown.items() if value]


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, (list, tuple)) else value or ""
