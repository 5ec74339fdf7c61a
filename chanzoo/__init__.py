"""Channel methods for timm: importing this package registers its networks with ``timm.create_model``.

Nothing else happens on import: no output, no download, no device. Names that need more than the networks
do are loaded at first use.
"""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, distribution
from typing import TYPE_CHECKING, Any

import timm
from torch.torch_version import TorchVersion

if TYPE_CHECKING:
    from .compress import prune
    from .layers import condense
    from .macs import count_macs, count_params
    from .models import add_channel_equilibrium, add_reactivation

__all__ = [
    "__version__",
    "add_channel_equilibrium",
    "add_reactivation",
    "condense",
    "count_macs",
    "count_params",
    "list_models",
    "prune",
]

__version__ = "0.1.0"

_TIMM_FLOOR = "1.0.31"
_LAZY = {
    "add_channel_equilibrium": "models",
    "add_reactivation": "models",
    "condense": "layers",
    "count_macs": "macs",
    "count_params": "macs",
    "prune": "compress",
}


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """Names of chanzoo's networks, for ``timm.create_model``.

    Args:
        pattern: Shell glob.
        pretrained: Only those with weights, one name ``arch.tag`` per weight.

    Example:
        >>> list_models("cifar_resnet2*")
        ['cifar_resnet20']
    """
    return [name for name in timm.list_models(pattern, pretrained=pretrained) if _is_ours(name)]


def _is_ours(name: str) -> bool:
    return timm.model_entrypoint(name).__module__.startswith(f"{__name__}.")


def _check_timm() -> None:
    """Refuse a timm that is too old, and one that hides the installed timm (a source clone on the path)."""
    found = getattr(timm, "__version__", "0+unknown")
    file = getattr(timm, "__file__", None) or "a folder without __init__.py"
    try:
        installed = distribution("timm")
        own_file = str(installed.locate_file("timm/__init__.py"))
    except PackageNotFoundError:
        installed, own_file = None, ""
    # An editable install has no file of its own in site-packages: then nothing is hidden.
    hidden = os.path.isfile(own_file) and not (os.path.isfile(file) and os.path.samefile(file, own_file))
    if TorchVersion(found) >= _TIMM_FLOOR and not hidden:
        return
    lines = [f"chanzoo needs an installed timm {_TIMM_FLOOR} or newer; Python imported timm {found}"]
    lines += [f"  imported   {file}"]
    if hidden and installed:
        lines += [f"  installed  {own_file} ({installed.version}), hidden by the one above"]
        lines += ["  Start Python in another folder, with python -P (PYTHONSAFEPATH=1), or fix PYTHONPATH."]
    else:
        lines += [f'  Update it: python -m pip install -U "timm>={_TIMM_FLOOR}"']
    lines += ["  No network was registered."]
    raise ImportError("\n".join(lines), name="timm", path=file)


def _register() -> None:
    """Register our networks; a name that timm has already is a defect that must not pass in silence."""
    theirs = {name for name in timm.list_models() if not _is_ours(name)}
    importlib.import_module(".models", __name__)
    if taken := sorted(name for name in theirs if _is_ours(name)):
        raise ImportError(
            f"chanzoo {__version__} and timm {timm.__version__} both have: {', '.join(taken)}\n"
            "  timm's is replaced until Python is restarted.\n"
            "  Update chanzoo: python -m pip install -U chanzoo"
        )


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


_check_timm()
_register()
