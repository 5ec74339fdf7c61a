"""Networks in folders: what ``timm.models.save_for_hf`` writes, and what timm's train script leaves.

A checkpoint of the train script is a pickle: it is opened with ``weights_only``.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.data import resolve_data_config
from timm.models import clean_state_dict
from torch import Tensor, nn

from ..errors import ChanzooError, UsageError
from ..models import check_folder
from ..store import FILE_NAME, parse_tensors

__all__ = ["Source", "cfg_of", "create", "load", "read_saved", "read_training"]

CONFIG = "config.json"
EVIDENCE = ("recipe.yaml", "summary.csv", "eval.json", "notes.md")
CHECKPOINTS = ("model_best.pth.tar", "last.pth.tar")
DATA_KEYS = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
_ABOUT_KEYS = ("base_model", "method", "command", "dataset")
# What a config says about the weights that a training run starts from, not about those that it ends with.
_OF_THE_START = (
    "tag",
    "paper_ids",
    "paper_name",
    "description",
    "notes",
    "label_names",
    "label_descriptions",
)
# Options of the train script that are true of one machine only.
_LOCAL_OPTIONS = {
    "data", "data_dir", "output", "experiment", "resume", "initial_checkpoint", "pretrained_path", "config",
    "class_map", "local_rank", "device_modules", "log_wandb", "wandb_project", "wandb_resume_id",
    "wandb_tags",
}  # fmt: skip


@dataclass
class Source:
    """A network with its weights, and what is known about it.

    Attributes:
        model: In evaluation mode.
        state: Its tensors as they are stored, which may be in 16 bits.
        cfg: Entries of timm's config that are others than the network's own.
        model_args: Constructor arguments that timm did not see.
        data: Size, mean, deviation, crop, if others than the network's own.
        about: ``base_model``, ``method``, ``command``, ``dataset``, as far as they are known.
        files: Evidence.
        remark: For the card.
        seed: Of the run.
    """

    model: nn.Module
    state: dict[str, Tensor]
    cfg: dict[str, Any] = field(default_factory=dict)
    model_args: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] | None = None
    about: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    remark: str = ""
    seed: int | None = None


def read_saved(folder: Path) -> Source:
    """A folder as ``save_for_hf`` writes it.

    Raises:
        UsageError: It describes no network, or another than that of its tensors.
        WeightsRejectedError: Its weight file is not safetensors, or not the one its config was written for.
    """
    check_folder(folder)
    path = folder / FILE_NAME
    if not path.is_file():
        raise UsageError(
            f'"{folder}" has no {FILE_NAME}.\n  Nothing was sent or written; other formats are never sent.'
        )
    state = parse_tensors(path.read_bytes(), path)
    model = create(f"local-dir:{folder}", str(folder), pretrained=True)
    about = json.loads((folder / CONFIG).read_bytes()).get("chanzoo", {})
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        raise UsageError(f'config.json of "{folder}" has a chanzoo entry that is no object of texts.')
    return Source(
        model=model,
        state=state,
        about={key: about[key] for key in _ABOUT_KEYS if about.get(key)},
        files={name: (folder / name).read_bytes() for name in EVIDENCE if (folder / name).is_file()},
    )


def read_training(folder: Path, checkpoint: Path | None = None) -> Source:
    """The output of timm's train script: its options, and the best checkpoint or else the last one.

    Args:
        folder: With ``args.yaml``.
        checkpoint: Another of its checkpoints.

    Raises:
        UsageError: It is no such output, or the options do not describe the tensors.
    """
    path = checkpoint or next((folder / name for name in CHECKPOINTS if (folder / name).is_file()), None)
    if path is None:
        raise UsageError(
            f'"{folder}" has no checkpoint.\n  expected  {" or ".join(CHECKPOINTS)}\n'
            "  Nothing was sent or written."
        )
    try:
        args = yaml.safe_load((folder / "args.yaml").read_text(encoding="utf-8"))
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of the pickle, of YAML, of files
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f'cannot read "{folder}": {first}\n  Nothing was sent or written.') from error
    if not isinstance(args, dict) or not isinstance(args.get("model"), str) or not isinstance(saved, dict):
        raise UsageError(f'"{folder}" is no output of timm\'s train script.\n  Nothing was sent or written.')
    averaged = saved.get("state_dict_ema")
    state = clean_state_dict(averaged or saved.get("state_dict") or {})
    if odd := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise UsageError(f'{odd[0]} in "{path}" is no tensor.\n  Nothing was sent or written.')
    model = _build_trained(args, state, str(folder))
    load(model, state, str(folder))
    try:
        data = resolve_data_config(args, model=model)
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(
            f'args.yaml of "{folder}" has no usable image size, mean or deviation: {error}\n'
            "  Nothing was sent or written."
        ) from error
    channels = int(getattr(model, "in_chans", data["input_size"][0]))
    data["input_size"] = (channels, *data["input_size"][1:])
    name = args["model"]
    known = name.removeprefix("hf-hub:").partition("@")[0] if args.get("pretrained") else ""
    files = {"recipe.yaml": _recipe(args)}
    if (folder / "summary.csv").is_file():
        files["summary.csv"] = (folder / "summary.csv").read_bytes()
    kind = "averaged (EMA) weights" if averaged else "weights"
    which = "best" if path.name == CHECKPOINTS[0] else "last" if path.name == CHECKPOINTS[1] else "chosen"
    return Source(
        model=model,
        state=state,
        cfg=dict.fromkeys(_OF_THE_START),
        data={key: data[key] for key in DATA_KEYS},
        about={
            "command": "python -P $TIMM_REPO/train.py --device-modules chanzoo --config recipe.yaml "
            "--data-dir DATA",
            "base_model": "" if name.startswith("local-dir:") or args.get("pretrained_path") else known,
        },
        files=files,
        remark=f"The {kind} of the run's {which} epoch, number {saved.get('epoch')} counted from 0.",
        seed=args.get("seed") if isinstance(args.get("seed"), int) else None,
    )


def _build_trained(args: dict[str, Any], state: dict[str, Tensor], shown: str) -> nn.Module:
    """The network that the train script built from its options; sizes it took for granted are the state's."""
    options = dict(args.get("model_kwargs") or {})
    plain = create(args["model"], shown, **options)
    first, last = (cfg_of(plain).get(key) for key in ("first_conv", "classifier"))
    for key, name, axis in (("in_chans", first, 1), ("num_classes", last, 0)):
        tensor = state.get(f"{name}.weight") if isinstance(name, str) else None
        if args.get(key) is not None:
            options[key] = args[key]
        elif tensor is not None and tensor.ndim > axis:
            options[key] = tensor.shape[axis]
    if args.get("gp"):
        options["global_pool"] = args["gp"]
    size = (args.get("input_size") or [None])[-1] or args.get("img_size")
    if size and cfg_of(plain).get("fixed_input_size"):
        options["img_size"] = size
    return create(args["model"], shown, **options)


def _recipe(args: dict[str, Any]) -> bytes:
    """The options of a run without what is true of one machine only."""
    kept = {
        key: value
        for key, value in args.items()
        if key not in _LOCAL_OPTIONS
        and not (isinstance(value, str) and (os.path.isabs(value) or value.startswith("~")))
    }
    return yaml.safe_dump(kept, default_flow_style=False).encode()


def create(name: str, shown: str, **options: Any) -> nn.Module:
    """``timm.create_model`` in evaluation mode.

    Raises:
        UsageError: It cannot be built; ``shown`` is what the message names.
    """
    try:
        return timm.create_model(name, **options).eval()
    except ChanzooError:
        raise
    except Exception as error:  # whatever a constructor raises
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f'cannot build the network of "{shown}": {first}\n  Nothing was sent or written.'
        ) from error


def load(model: nn.Module, state: dict[str, Tensor], shown: str) -> None:
    """Load tensors that have to be the network's, all of them and no other.

    Raises:
        UsageError: They are not; names the first that differs.
    """
    expected = {key: list(value.shape) for key, value in model.state_dict().items()}
    found = {key: list(value.shape) for key, value in state.items()}
    if expected != found:
        key = sorted(k for k in {*expected, *found} if expected.get(k) != found.get(k))[0]
        raise UsageError(
            f'the tensors of "{shown}" are not those of the network that its options describe.\n'
            f"  expected  {key} {expected.get(key, 'absent')}\n"
            f"  found     {key} {found.get(key, 'absent')}\n"
            "  Nothing was sent or written.   Changed widths have to be among the network's arguments"
        )
    model.load_state_dict(state)


def cfg_of(model: nn.Module) -> dict[str, Any]:
    """Timm's config of a network."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    return cfg if isinstance(cfg, dict) else {}
