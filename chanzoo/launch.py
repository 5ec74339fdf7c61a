"""Start a Python script or module in which our networks are already registered with timm."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import UsageError

__all__ = ["launch"]


def launch(target: str, arguments: Sequence[str] = (), *, is_module: bool = False) -> None:
    """Run ``target`` as ``__main__``, as Python would; importing this file has registered our networks.

    The script's folder goes to the front of the path, as Python puts it, unless it holds a package named timm
    (a source clone): then it goes to the end, so that processes which the script starts find the installed
    timm as well.

    Args:
        target: Path of a script, or dotted name of a module.
        arguments: What the script finds in ``sys.argv[1:]``.
        is_module: Whether ``target`` is a module, like ``python -m``.

    Raises:
        UsageError: There is no such script or module.
    """
    sys.argv = [target, *arguments]
    if is_module:
        _check_module(target)
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return
    script = Path(target)
    if not script.is_file():
        raise UsageError(f'no script "{script}".' + (" It is a folder." if script.is_dir() else ""))
    folder = script.resolve().parent
    sys.path.insert(len(sys.path) if (folder / "timm").is_dir() else 0, str(folder))
    runpy.run_path(str(script), run_name="__main__")


def _check_module(name: str) -> None:
    from importlib.util import find_spec

    try:
        found = find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise UsageError(f'no module "{name}".   A script is run without -m: chanzoo run SCRIPT')
