"""The thin call into timm's builder, our weight resolution, and the config rows that our families share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg
from torch import nn

from .._timm import update_model_args
from ..errors import UsageError
from ..layers.condensing import CondensingProgress, follow_progress, learned_layers
from ..store import find_local, load_tensors, locate, parse_tensors, row_for, widen
from ..weights import DATASETS, IMAGENET_MEAN, IMAGENET_STD, weights_of
from ._saved import check_config, check_network, read_saved

__all__ = ["arch_cfgs", "build", "cifar_cfg", "imagenet_cfg"]

_SOURCES = ("url", "file", "state_dict", "hf_hub_id")
_BASES: dict[str, dict[str, Any]] = {}  # architecture → config without weights


def cifar_cfg(stride: int = 4, **kwargs: Any) -> dict[str, Any]:
    """Config of a network for 32×32 images with ten classes."""
    return {**DATASETS["c10j"].cfg(stride), "first_conv": "conv1", "classifier": "fc", **kwargs}


def imagenet_cfg(**kwargs: Any) -> dict[str, Any]:
    """Config of a network for ImageNet-1k at 224×224 with a total stride of 32."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        **kwargs,
    }


def arch_cfgs(
    archs: Iterable[str], base: dict[str, Any], stride: int = 32
) -> dict[str, dict[str, Any] | PretrainedCfg]:
    """Config entries of architectures: one per weight row, or the bare architecture without rows.

    Args:
        archs: Registered names.
        base: What they share.
        stride: By which the features are smaller than the image.
    """
    cfgs: dict[str, dict[str, Any] | PretrainedCfg] = {}
    for arch in archs:
        _BASES.setdefault(arch, base)
        for row in weights_of(arch):
            source: dict[str, Any] = {}
            if row.revision:
                source["hf_hub_id"] = f"{row.hub_repo}@{row.revision}"
                source["hf_hub_filename"] = "model.safetensors"
            if path := find_local(row):
                source["file"] = str(path)
            data = DATASETS[row.dataset].cfg(stride)
            cfgs[row.name] = {**base, **data, "license": row.licence, "paper_ids": row.paper, **source}
        if not weights_of(arch):
            cfgs[arch] = base
    return cfgs


def build(
    model_cls: Any,
    variant: str,
    pretrained: bool,
    *,
    defaults: dict[str, Any] | None = None,
    feature_levels: tuple[int, ...] = (0, 1, 2, 3, 4),
    flatten_sequential: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build ``variant`` through timm, with weights from our store when pretrained ones are asked for.

    Args:
        model_cls: Network class, or a function that makes one.
        variant: Registered name.
        pretrained: Load weights.
        defaults: Constructor arguments that give way to a weight row's, and those to the user's.
        feature_levels: Levels that ``features_only`` returns unless told otherwise.
        flatten_sequential: Whether feature levels lie one ``Sequential`` below the network.
        pretrained_cfg: timm's: None, a tag, or a whole config (``hf-hub:``, ``local-dir:``).
        pretrained_cfg_overlay: timm's: entries over the config; a ``file`` here is the explicit file.
        cache_dir: Where the Hub's client keeps files.
        **kwargs: For the constructor and for timm's builder.

    Raises:
        NoWeightsError: No such weights.
        WeightsRejectedError: The file is not the published one.
        HubError: The weights are on the Hub only, and it cannot be reached.
        UsageError: The explicit file does not exist or cannot be read.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    row_args: dict[str, Any] = {}
    source: Any = pretrained_cfg
    if pretrained_cfg is None or isinstance(pretrained_cfg, str):
        tag = pretrained_cfg or None
        if pretrained and not any(overlay.get(key) for key in _SOURCES):
            row = row_for(variant, tag)
            source = row.tag
            row_args = row.model_args
            overlay["state_dict"] = load_tensors(row, locate(row, cache_dir))
        elif pretrained and overlay.get("file"):
            overlay = _explicit_file(variant, tag, overlay)
        elif tag:
            row_args = next((row.model_args for row in weights_of(variant) if row.tag == tag), {})
        elif not pretrained:  # the network as published; timm would take the data set of its first weights
            source = _BASES.get(variant)
    else:
        source = dict(source) if isinstance(source, dict) else source.to_dict(remove_null=False)
        if source.get("source") in ("hf-hub", "local-dir"):
            overlay |= _saved_source(model_cls, defaults or {}, source, pretrained, cache_dir, kwargs)
        elif pretrained and not any(overlay.get(key) for key in _SOURCES):
            overlay |= _resolved_source(variant, source, cache_dir)
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=source,
        pretrained_cfg_overlay=overlay,
        cache_dir=cache_dir,
        feature_cfg=dict(out_indices=feature_levels, flatten_sequential=flatten_sequential),
        **{**(defaults or {}), **row_args, **kwargs},
    )
    if row_args:
        update_model_args(model, **row_args)  # timm sees and records the user's arguments only
    counts = any(isinstance(module, CondensingProgress) for module in model.modules())
    if kwargs.get("total_steps") and not counts and learned_layers(model):
        follow_progress(
            model, kwargs["total_steps"]
        )  # timm's wrapper for features has left behind what counts
    for holder in (model, getattr(model, "model", None)):  # a feature wrapper keeps the network inside
        if isinstance(cfg := getattr(holder, "pretrained_cfg", None), dict):
            cfg.pop("state_dict", None)
    return model


def _saved_source(
    model_cls: Any,
    defaults: dict[str, Any],
    cfg: dict[str, Any],
    pretrained: bool,
    cache_dir: str | Path | None,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Take over what timm found in a folder (``local-dir:``) or a repository (``hf-hub:``).

    Returns:
        What goes over the config: no source, and with ``pretrained`` the tensors.
    """
    where, digest = check_config(cfg, kwargs.get("pretrained_model_args", {}))
    saved_args = {**defaults, "num_classes": cfg["num_classes"]}
    if cfg.get("fixed_input_size"):  # then timm's builder hands the size to the network
        saved_args["img_size"] = cfg.get("input_size", (3, 224, 224))[1:]
    saved_args |= kwargs.get("pretrained_model_args", {})
    tensors = read_saved(cfg, digest, cache_dir) if pretrained else {}
    check_network(where, lambda: model_cls(**saved_args), tensors or None)
    return {"source": None, "file": None} | ({"state_dict": widen(tensors)} if tensors else {})


def _resolved_source(variant: str, cfg: dict[str, Any], cache_dir: str | Path | None) -> dict[str, Any]:
    """Check the file of a row that timm has looked up in our configs beforehand, as its scripts do."""
    row = next((row for row in weights_of(variant) if row.tag == cfg.get("tag")), None)
    if row is None or cfg.get("url") or cfg.get("file") not in (None, str(find_local(row))):
        return {}
    return {"state_dict": load_tensors(row, locate(row, cache_dir))}


def _explicit_file(variant: str, tag: str | None, overlay: dict[str, Any]) -> dict[str, Any]:
    """Check an explicit file. It stands in for the row's file, unless it says it is something else.

    timm's train script says so by ``num_classes=-1`` (``--pretrained-path``): such a file is the user's
    own, of which no row knows the hash.
    """
    path = Path(overlay["file"])
    if not path.is_file():
        raise UsageError(f'no weight file "{path}" for {variant}.\n  No network was built.')
    if "num_classes" not in overlay and weights_of(variant):
        overlay["state_dict"] = load_tensors(row_for(variant, tag), path)
    elif path.suffix == ".safetensors":
        try:
            overlay["state_dict"] = parse_tensors(path.read_bytes(), path)
        except OSError as error:
            raise UsageError(f'cannot read "{path}": {error.strerror}.\n  No network was built.') from error
    return overlay
