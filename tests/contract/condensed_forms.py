"""Names for the condensed forms of our networks, so that timm's tests can be pointed at them."""

from __future__ import annotations

from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from torch import nn

import chanzoo

PREFIX = "condensed_"
SOURCES = [
    name
    for name in chanzoo.list_models()
    if name.startswith(("condensenet", "sfr_"))  # timm.create_model takes condensed=True for these
]

__all__: list[str] = []
default_cfgs = generate_default_cfgs(
    {PREFIX + name: timm.get_pretrained_cfg(name, allow_unregistered=False) for name in SOURCES}  # type: ignore
)


def _register(source: str) -> None:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if not isinstance(kwargs.get("pretrained_cfg"), dict):
            kwargs.pop("pretrained_cfg", None)
        return timm.model_entrypoint(source)(pretrained, **{"condensed": True, **kwargs})

    build.__name__ = PREFIX + source
    register_model(build)


for _name in SOURCES:
    _register(_name)
