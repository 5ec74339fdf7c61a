"""Any CNN of timm or ours at other widths, from its name and a table: how a pruned network loads by name.

``narrow_cnn`` builds the base and makes its layers narrower (:mod:`chanzoo.layers.narrow`); the network is of
the base's class. Base and table are constructor arguments, so a saved network brings them along in its
``config.json`` and comes back from tensors alone, without the tool that pruned it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from timm.models import (
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    list_models,
    model_entrypoint,
    register_model,
)
from torch import nn

from ..errors import UsageError
from ..layers.narrow import apply_widths, check_cnn
from ._build import arch_cfgs, build, imagenet_cfg
from ._saved import allowance

__all__ = ["FORMAT", "features_of", "narrowed", "read_table", "record_args", "refuse_path", "without_memory"]

FORMAT = 1
_NAME = "narrow_cnn"
_DEFAULT = "resnet18"
_NOTHING = "No network was built."

# What a network inherits from the config of its base: how to feed it, and the names of its ends.
_INHERITED = (
    "num_classes", "input_size", "test_input_size", "fixed_input_size", "min_input_size", "pool_size",
    "test_pool_size", "crop_pct", "test_crop_pct", "crop_mode", "interpolation", "mean", "std", "first_conv",
    "classifier",
)  # fmt: skip

# How timm's wrappers for features are asked for. The last two are networks of their own, whose layers run one
# after the other, so that a list does for them.
_WRAPPERS = {
    "FeatureListNet": "list",
    "FeatureDictNet": "dict",
    "FeatureHookNet": "hook",
    "FeatureGetterNet": "getter",
    "FeatureGraphNet": "fx",
    "EfficientNetFeatures": "list",
    "MobileNetV3Features": "list",
}

# A config that comes with its weights may not make us build a giant for the sake of a dwarf.
_FREE_PARAMS, _MAX_CUT = 50_000_000, 64


@dataclass(frozen=True)
class _Base:
    arch: str
    cfg: dict[str, Any]


def read_table(widths: Any) -> tuple[str | None, dict[str, Any]]:
    """Read a widths table in any form that ``narrow_cnn`` takes.

    Args:
        widths: None, a table (module name → sizes), the object that a file holds, or the path of a file:
            ``{"format": 1, "base": "resnet50", "widths": {"conv1": [48, 3], …}}``.

    Returns:
        The base that the file or object names, None for a plain table; and the table as plain lists.

    Raises:
        UsageError: The file cannot be read, or holds something else.
    """
    if widths is None:
        return None, {}
    where, is_file = "widths", isinstance(widths, (str, Path))
    if is_file:
        where = f'"{widths}"'
        try:
            widths = json.loads(Path(widths).read_bytes())
        except OSError as error:
            raise UsageError(f"cannot read {where}: {error.strerror}.\n  {_NOTHING}") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where} is not JSON: {error}\n  {_NOTHING}") from error
    base = None
    if is_file or (isinstance(widths, Mapping) and {"format", "widths"} <= widths.keys()):
        entries = widths if isinstance(widths, Mapping) else {}
        base = entries.get("base")
        if entries.get("format") != FORMAT or not isinstance(base, str):
            raise UsageError(
                f'{where} is no table of widths: expected {{"format": {FORMAT}, "base": NAME, "widths": '
                f"{{LAYER: SIZES, …}}}}.\n  {_NOTHING}"
            )
        widths = entries.get("widths")
    if not isinstance(widths, Mapping):
        raise UsageError(
            f"{where} holds a {type(widths).__name__}: expected a table, module name → sizes.\n  {_NOTHING}"
        )
    return base, {name: list(v) if isinstance(v, (list, tuple)) else v for name, v in widths.items()}


def _look_up(base: Any) -> _Base:
    """What the name of a base stands for, if it may be one."""
    if not isinstance(base, str) or not base or ":" in base or "/" in base:
        raise UsageError(
            f"base={base!r}: expected the name of a CNN of timm or chanzoo, such as resnet50.\n"
            f"  A saved network, narrowed or not, loads as hf-hub:NAME or local-dir:FOLDER.   {_NOTHING}"
        )
    arch = base.partition(".")[0]
    if arch == _NAME:
        raise UsageError(f"base={base!r}: {_NAME} cannot be its own base.\n  {_NOTHING}")
    if not is_model(arch):
        near = difflib.get_close_matches(arch, list_models(), n=1)
        hint = f"Did you mean {near[0]}?   " if near else ""
        raise UsageError(f'no model "{arch}" to take as base. {hint}See all: chanzoo ls --timm\n  {_NOTHING}')
    return _facts(base)


@lru_cache(maxsize=64)
def _facts(base: str) -> _Base:
    arch = base.partition(".")[0]
    try:
        cfg = get_pretrained_cfg(base)
    except RuntimeError as error:
        raise UsageError(f"base={base!r}: {error}\n  {_NOTHING}") from error
    model = without_memory(model_entrypoint(arch))
    try:
        check_cnn(model)
    except UsageError as error:
        raise UsageError(str(error).replace("The network is unchanged.", _NOTHING)) from error
    inherited = {key: value for key in _INHERITED if (value := getattr(cfg, key, None)) is not None}
    return _Base(arch, inherited)


def _inherit(base: _Base, cfg: Any) -> dict[str, Any]:
    """What a config takes from the base's: all but what a saved network, or the user, says itself."""
    if cfg is None or isinstance(cfg, str):
        return base.cfg
    given = cfg if isinstance(cfg, dict) else cfg.to_dict(remove_null=False)
    if given.get("source") in ("hf-hub", "local-dir"):
        return {}
    bare: Any = get_pretrained_cfg(_NAME)  # which timm's scripts look up beforehand
    return {key: value for key, value in base.cfg.items() if given.get(key) == getattr(bare, key)}


@lru_cache(maxsize=64)
def features_of(arch: str) -> dict[str, Any]:
    """How timm wraps the base for ``features_only``, as arguments of :func:`build`."""
    make = model_entrypoint(arch)
    own: Any = without_memory(lambda: make(features_only=True))
    levels = tuple(own.feature_info.out_indices)
    info = without_memory(make).feature_info
    is_nested = any("." in str(level.get("module", "")) for level in cast(Any, info))
    wrapper = _WRAPPERS.get(type(own).__name__)
    if wrapper is None:  # a class that builds the family's own layers; these two wrap any network
        wrapper = "getter" if hasattr(without_memory(make), "forward_intermediates") else "hook"
    return {"feature_cls": wrapper, "feature_levels": levels, "flatten_sequential": is_nested}


def without_memory(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a network on the ``meta`` device.

    A saved network is first made within an allowance that its weight file sets (``check_network``). A base is
    larger than the file: it has an allowance of its own, that of a network without a file.
    """
    with torch.device("meta"), allowance():
        return make()


def _network(base: Any = _DEFAULT, widths: Any = None, **kwargs: Any) -> nn.Module:
    make_base = model_entrypoint(_look_up(base).arch)
    refuse_path(widths)
    named, table = read_table(widths)
    _check_same(base, named)
    return narrowed(base, partial(make_base, pretrained=False, **kwargs), table)


def refuse_path(widths: Any) -> None:
    """A path is for a user's own call, not for what comes with a saved network.

    Raises:
        UsageError: ``widths`` is a path.
    """
    if isinstance(widths, (str, Path)):
        raise UsageError(
            f"widths={str(widths)!r}: a saved network brings its table, not a path.\n  {_NOTHING}"
        )


def narrowed(base: str, make_base: Callable[[], nn.Module], table: dict[str, Any]) -> nn.Module:
    """The base, narrowed. Without memory in a ``meta`` context, which is how a saved one is checked.

    Args:
        base: Name of the full network, for messages.
        make_base: Makes it.
        table: Module name → sizes.

    Raises:
        UsageError: The table does not fit; or, in a check, the base is a giant for the sake of a dwarf.
    """
    is_check = torch.get_default_device().type == "meta"

    def make() -> nn.Module:
        model = make_base()
        before = _count(model)
        apply_widths(model, table)
        if is_check and before > _MAX_CUT * _count(model) + _FREE_PARAMS:
            raise UsageError(
                f"base={base!r} has {before:,} parameters and is narrowed to {_count(model):,}: expected a "
                f"cut of at most {_MAX_CUT} times.\n  {_NOTHING}"
            )
        return model

    try:
        return without_memory(make) if is_check else make()
    except UsageError as error:
        raise UsageError(str(error).replace("The network is unchanged.", _NOTHING)) from error


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _check_same(base: str, named: str | None) -> None:
    if named is not None and named.partition(".")[0] != base.partition(".")[0]:
        raise UsageError(
            f"the table of widths is of another base.\n  expected  {base}\n  found     {named}\n  {_NOTHING}"
        )


def _spell_out(model: nn.Module, prefix: str, keep_vars: bool, table: dict[str, Any]) -> None:
    """Before weights are saved: the table takes the place of its path among the recorded arguments."""
    args: Any = getattr(model, "_model_args", {})
    if isinstance(args.get("widths"), (str, Path)):
        model._model_args = {**args, "widths": table}  # pyright: ignore[reportArgumentType]


def record_args(model: Any, args: dict[str, Any], given: Any) -> None:
    """Record what a network was made from, for whoever saves it.

    Args:
        model: The network.
        args: Constructor arguments, with the table of widths itself.
        given: The widths as the user gave them; timm records arguments as they were given.
    """
    model._model_args = args
    if isinstance(given, (str, Path)):
        model.register_state_dict_pre_hook(partial(_spell_out, table=args["widths"]))


default_cfgs = generate_default_cfgs(
    arch_cfgs([_NAME], imagenet_cfg(license="apache-2.0", paper_ids="arXiv:2002.10179"))
)


@register_model
def narrow_cnn(pretrained: bool = False, base: Any = None, widths: Any = None, **kwargs: Any) -> nn.Module:
    """Any CNN of timm or ours, narrowed to a table of widths.

    Args:
        pretrained: Load weights: from a folder or the Hub (``local-dir:``, ``hf-hub:``) or an explicit file.
        base: Name of the full network; the one that ``widths`` names, or resnet18, if not given.
        widths: Module name → sizes, for all layers that differ from the base, or the path of a JSON file; see
            :func:`read_table` and :mod:`chanzoo.layers.narrow`.
        **kwargs: As for every network of timm: ``num_classes``, ``in_chans``, ``global_pool``,
            ``features_only`` and so on, and whatever the base takes.

    Raises:
        UsageError: The base is no CNN with a name, or the table does not fit it.
        TypeError: The base does not take an argument.
    """
    refuse_path((kwargs.get("pretrained_model_args") or {}).get("widths"))
    named, table = read_table(widths)
    base = named or _DEFAULT if base is None else base
    facts = _look_up(base)
    _check_same(base, named)
    inherited = _inherit(facts, kwargs.get("pretrained_cfg"))
    kwargs["pretrained_cfg_overlay"] = {**inherited, **(kwargs.get("pretrained_cfg_overlay") or {})}
    if kwargs.get("features_only"):
        kwargs = {**features_of(facts.arch), **kwargs}
    model = build(
        _network,
        _NAME,
        pretrained,
        base=base,
        widths=table,
        **kwargs,
    )
    record_args(model, {"base": base, "widths": table}, widths)
    return model
