"""``chanzoo doctor``: what this installation consists of, and whether its weight files are whole."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import add_format, emit, human_bytes, say

if TYPE_CHECKING:
    from ..hub.pull import Checked

HELP = "show versions, devices and caches, and verify the embedded weight files"
EXAMPLES = """\
  chanzoo doctor
  chanzoo doctor --format json > report.json     to attach to a bug report
"""
_PACKAGES = ("torch", "torchvision", "timm", "huggingface-hub", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Collect and print; 3 if a weight file is not the published one."""
    data, checked = examine(), embedded()
    weights = [{"name": item.name, "file": str(item.path), "ok": not item.error} for item in checked]
    data["weights"] = weights
    bad = [item.error for item in checked if item.error]
    rows = [(key, value) for key, value in data["versions"].items()]
    rows += [
        ("timm's file", data["timm_file"]),
        ("devices", ", ".join(data["devices"])),
        ("Hub cache", f"{data['hub_cache']} ({human_bytes(data['hub_cache_bytes'])})"),
        *((name, value or "(not set)") for name, value in data["environment"].items()),
        ("autoload", data["autoload"]["state"]),
        ("embedded", f"{len(weights)} weight files, {len(weights) - len(bad)} ok"),
        *(("", f"{'ok ' if item['ok'] else 'BAD'}  {item['name']}") for item in weights),
    ]
    emit(data, args.format == "json", ("", ""), rows)
    for error in bad:
        say(f"chanzoo: {error}")
    return 3 if bad else 0


def examine() -> dict[str, Any]:
    """The report without the weights."""
    import timm
    from huggingface_hub.constants import HF_HUB_CACHE

    from .. import __version__
    from .autoload import status

    return {
        "versions": {
            "chanzoo": __version__,
            "python": platform.python_version(),
            **{name: installed(name) for name in _PACKAGES},
        },
        "timm_file": str(timm.__file__),
        "devices": devices(),
        "hub_cache": HF_HUB_CACHE,
        "hub_cache_bytes": folder_bytes(Path(HF_HUB_CACHE)),
        "environment": {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "CHANZOO_WEIGHTS")},
        "autoload": status(),
    }


def installed(package: str) -> str:
    """Version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def devices() -> list[str]:
    """What torch can compute on."""
    import torch

    found = [f"cpu ({torch.get_num_threads()} threads)"]
    found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def folder_bytes(folder: Path) -> int:
    """Size of the files of a folder; links are not followed, so that nothing counts twice."""
    total = 0
    for root, _, names in os.walk(folder):
        total += sum(os.lstat(os.path.join(root, name)).st_size for name in names)
    return total


def embedded() -> list[Checked]:
    """Compare each embedded weight file with its row; none is moved."""
    from ..hub.pull import check
    from ..store import embedded_path
    from ..weights import WEIGHTS

    paths = {name: embedded_path(name) for name in WEIGHTS}
    return [check(WEIGHTS[name], path, move=False) for name, path in paths.items() if path.is_file()]
