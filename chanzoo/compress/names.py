"""The name and the arguments that build a narrow network again."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from ..errors import ChanzooError, UsageError
from ..layers.narrow import read_widths
from ..models.hrank import HRANK_NAMES, short_widths

__all__ = ["name_of", "narrow_name", "record_name"]


def narrow_name(small: nn.Module, arch: str, model_args: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What to call a narrow network, and the arguments for that name.

    Args:
        small: A network of the architecture, narrowed.
        arch: Registered name of the full one.
        model_args: Arguments that the full one was built with; those of a network that was narrowed before
            may hold its widths.

    Raises:
        UsageError: It differs from the full one in other ways than widths, or that cannot be built.
    """
    rest = {key: value for key, value in model_args.items() if key not in ("base", "widths", "compress_rate")}
    base = str(model_args.get("base", "")) if arch == "narrow_cnn" else arch
    try:
        with torch.device("meta"):
            full = timm.create_model(base, **rest)
    except ChanzooError:
        raise
    except Exception as error:  # whatever a constructor raises
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f'cannot build the full network "{base}": {first}') from error
    widths = read_widths(small, full)
    name = base if base in HRANK_NAMES.values() else HRANK_NAMES.get(base, "narrow_cnn")
    if name == "narrow_cnn":
        return name, {"base": base, "widths": widths, **rest}
    return name, {"widths": short_widths(name, widths), **rest}


def record_name(small: Any, full: Any) -> None:
    """Let timm's ``save_for_hf`` write a narrow network down so that it comes back.

    Nothing happens where no name builds the full network: it was made by hand, or changed afterwards.
    """
    cfg = getattr(full, "pretrained_cfg", None) or {}
    arch = str(cfg.get("architecture") or "")
    args = {key: value for key, value in getattr(full, "_model_args", {}).items() if value is not None}
    if not timm.is_model(arch):
        return
    try:
        name, args = narrow_name(small, arch, {**args, "num_classes": full.num_classes})
    except UsageError:
        return
    small.pretrained_cfg = {**cfg, "architecture": name}
    small._model_args = args


def name_of(model: nn.Module) -> str:
    """The registered name of a network, else its class's, for messages."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)
