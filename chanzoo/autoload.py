"""Start-up hook: imports chanzoo right after timm, in every Python of an environment that opted in.

``chanzoo autoload enable`` copies this file into site-packages as ``_chanzoo_autoload.py``, with a
``.pth`` and a ``.start`` file (PEP 829) that call :func:`install` when Python starts. So it stands alone:
only the standard library, and next to nothing until timm is imported. ``CHANZOO_AUTOLOAD=0`` switches it
off.
"""

from __future__ import annotations

import os
import sys
from typing import Any

__all__ = ["TimmFinder", "install"]


class TimmFinder:
    """Import hook that steps aside once it has seen timm."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Leave every module but timm to others; to timm's import, append ours."""
        if name != "timm":
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        loader: Any = spec and spec.loader
        if hasattr(loader, "exec_module"):
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _import_chanzoo()

            loader.exec_module = exec_module
        return spec


def _import_chanzoo() -> None:
    try:
        import chanzoo  # noqa: F401
    except Exception as error:
        import warnings

        warnings.warn(
            f"chanzoo was not imported with timm: {error}\n"
            f"  To stop trying: chanzoo autoload disable, CHANZOO_AUTOLOAD=0, or remove {__file__}",
            RuntimeWarning,
            stacklevel=2,
        )


def install() -> None:
    """Watch for the import of timm; once per process."""
    off = os.environ.get("CHANZOO_AUTOLOAD") == "0" or "timm" in sys.modules
    if not off and not any(type(finder).__name__ == "TimmFinder" for finder in sys.meta_path):
        sys.meta_path.insert(0, TimmFinder())  # pyright: ignore[reportArgumentType]
