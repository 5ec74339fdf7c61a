"""Build hook: weight files small enough travel inside the package.

Into the wheel as ``chanzoo/embedded/<arch.tag>/model.safetensors``, into the source distribution where
they lie in a checkout, so that a wheel built from either is the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EmbedWeights(BuildHookInterface):
    """Adds the files; found by hatchling as the only hook class of this file."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add every weight file up to the limit. An editable install reads the checkout instead."""
        if version == "editable":
            return
        root = Path(self.root)
        folder = "weights" if self.target_name == "sdist" else "chanzoo/embedded"
        limit = _limit_bytes(root)
        for path in sorted(root.glob("weights/*/model.safetensors")):
            if path.stat().st_size <= limit:
                build_data["force_include"][str(path)] = f"{folder}/{path.parent.name}/{path.name}"


def _limit_bytes(root: Path) -> int:
    """The limit, read from its source line: importing the package here would need torch."""
    source = (root / "chanzoo" / "store.py").read_text(encoding="utf-8")
    match = re.search(r"^EMBEDDED_LIMIT_BYTES = ([\d_]+)$", source, re.MULTILINE)
    if not match:
        raise ValueError("chanzoo/store.py has no line EMBEDDED_LIMIT_BYTES = N.")
    return int(match[1])
