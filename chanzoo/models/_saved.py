"""Networks that bring a config of their own, from a folder or a repository: read with suspicion.

Whoever wrote ``config.json`` is unknown. Before memory is taken for a network, its values are checked and
the network is made without memory, within a budget set by the weight file; names and shapes have to
agree. Only ``model.safetensors`` is ever opened.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from timm.models import PretrainedCfg, create_model, model_entrypoint
from torch import Tensor, nn

from ..errors import ChanzooError, HubError, UsageError, WeightsRejectedError
from ..store import FILE_NAME, hub_trouble, parse_tensors

__all__ = ["allowance", "check_config", "check_folder", "check_network", "read_saved", "sha256_note"]

MAX_PARAMS, MAX_MODULES = 4_000_000_000, 50_000  # of a network that comes without a weight file
MAX_NUMBER = 1_000_000
_NOTE = re.compile(r"sha256:([0-9a-f]{64})")
_SIZES = {"input_size": 3, "test_input_size": 3, "min_input_size": 3, "pool_size": 2, "test_pool_size": 2}
_TEXTS = ("interpolation", "crop_mode", "tag", "license", "architecture")
_NAMES = ("first_conv", "classifier")
_FIELDS = {field.name for field in fields(PretrainedCfg)}
_RESERVED = {*inspect.signature(create_model).parameters, "pretrained_model_args", "features_only", "pruned"}
_counting: ContextVar[Any] = ContextVar("_counting", default=None)  # the innermost allowance of this thread
_ARGS = "an object with arguments of the network alone"


def sha256_note(digest: str) -> str:
    """The entry of a config's ``notes`` that says which weight file belongs to it; timm passes it by."""
    return f"sha256:{digest}"


def check_config(cfg: dict[str, Any], model_args: dict[str, Any]) -> tuple[str, str]:
    """Check the data part of a saved config.

    Args:
        cfg: As timm hands it over; loses the note of the weight file's hash, which is true of that file only.
        model_args: The saved arguments of the network.

    Returns:
        Where it comes from, for messages, and the sha256 that it gives for the weight file, or nothing.

    Raises:
        UsageError: A value of another kind or size than timm writes, or a source of its own.
    """
    where = str(cfg.get("hf_hub_id") if cfg["source"] == "hf-hub" else cfg.get("file"))
    for key in ("url", "state_dict", "custom_load", *(("file",) if cfg["source"] == "hf-hub" else ())):
        if cfg.get(key):
            raise _refused(where, key, cfg[key], "no source of weights, which lie beside it")
    if cfg.get("hf_hub_filename") not in (None, "", FILE_NAME):
        raise _refused(where, "hf_hub_filename", cfg["hf_hub_filename"], FILE_NAME)
    if not _is_whole(cfg.get("num_classes"), 0):
        raise _refused(where, "num_classes", cfg.get("num_classes"), f"a whole number of 0 to {MAX_NUMBER:,}")
    if model_args.get("num_classes", cfg["num_classes"]) != cfg["num_classes"]:
        raise _refused(
            where, "num_classes", cfg["num_classes"], f"that of model_args, {model_args['num_classes']!r}"
        )
    if not isinstance(cfg.get("fixed_input_size"), (bool, type(None))):
        raise _refused(where, "fixed_input_size", cfg["fixed_input_size"], "true or false")
    for key, length in _SIZES.items():
        value = cfg.get(key)
        if value is None and (key != "input_size" or key not in cfg):
            continue
        if not (
            isinstance(value, (list, tuple)) and len(value) == length and all(_is_whole(n, 1) for n in value)
        ):
            raise _refused(where, key, value, f"{length} whole numbers")
    for key in ("mean", "std"):
        value = cfg.get(key)
        if value is not None and not (isinstance(value, (list, tuple)) and all(map(_is_number, value))):
            raise _refused(where, key, value, "numbers")
    for key in _TEXTS:
        if not isinstance(cfg.get(key), (str, type(None))):
            raise _refused(where, key, cfg[key], "text")
    for key in _NAMES:
        value = cfg.get(key)
        names = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(name, (str, type(None))) for name in names):
            raise _refused(where, key, value, "the name of a layer")
    notes = cfg.get("notes") or ()
    if isinstance(notes, str) or not isinstance(notes, (list, tuple)):
        raise _refused(where, "notes", notes, "a list of texts")
    found = [match[1] for note in notes if isinstance(note, str) and (match := _NOTE.fullmatch(note))]
    cfg["notes"] = tuple(n for n in notes if not (isinstance(n, str) and _NOTE.fullmatch(n))) or None
    return where, found[0] if found else ""


def check_folder(folder: str | Path) -> None:
    """Check the ``config.json`` of a folder before timm reads it; the network too where it is not ours.

    Raises:
        UsageError: It is missing, unreadable, or describes nothing that can be built.
        WeightsRejectedError: The weight file beside it is not safetensors.
    """
    import timm

    path = Path(folder, "config.json")
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(
            f'cannot read "{path}": {error.strerror}.\n  A saved network is a folder with config.json and '
            f"{FILE_NAME}; no network was built."
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f'"{path}" is not JSON: {error}\n  No network was built.') from error
    where = str(folder)
    if not isinstance(config, dict):
        raise _refused(where, "top level", config, "an object")
    arch, args, cfg = (config.get(key, {}) for key in ("architecture", "model_args", "pretrained_cfg"))
    if not isinstance(arch, str) or not timm.is_model(arch):
        raise _refused(where, "architecture", arch, "a network of timm or chanzoo (see: chanzoo ls)")
    if not isinstance(args, dict):
        raise _refused(where, "model_args", args, _ARGS)
    if wrong := sorted(_RESERVED.intersection(args)):
        raise _refused(where, "model_args", wrong[0], _ARGS)
    if not isinstance(cfg, dict) or not cfg.keys() <= _FIELDS:
        raise _refused(where, "pretrained_cfg", cfg, "an object with the fields of timm's PretrainedCfg")
    labels = config.get("label_names", cfg.get("label_names"))
    if not isinstance(labels, (list, tuple, dict, type(None))):
        raise _refused(where, "label_names", labels, "a list of texts")
    cfg = {**cfg, "num_classes": config.get("num_classes", cfg.get("num_classes", 1000))}
    cfg |= {"source": "local-dir", "file": where}
    _, digest = check_config(cfg, args)
    if not model_entrypoint(arch).__module__.startswith("chanzoo."):  # ours do the rest themselves
        saved_args = {"num_classes": cfg["num_classes"], **args}
        check_network(where, lambda: timm.create_model(arch, **saved_args), read_saved(cfg, digest, None))


def read_saved(cfg: dict[str, Any], digest: str, cache_dir: str | Path | None) -> dict[str, Tensor]:
    """Tensors of the weight file that lies beside a checked config.

    Raises:
        UsageError: There is none, or it cannot be read.
        HubError: It cannot be had from the Hub.
        WeightsRejectedError: It is not safetensors, or not the file that the config was written for.
    """
    path = (
        _from_hub(cfg["hf_hub_id"], cache_dir) if cfg["source"] == "hf-hub" else Path(cfg["file"], FILE_NAME)
    )
    if not path.is_file():
        raise UsageError(
            f'"{path.parent}" has no {FILE_NAME}.\n  No network was built; other formats are never opened.   '
            "timm.models.save_for_hf writes it with safe_serialization=True"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f'cannot read "{path}": {error.strerror}.\n  No network was built.') from error
    found = hashlib.sha256(data).hexdigest()
    if digest and found != digest:
        raise WeightsRejectedError(
            f"{path} is not the file that its config.json was written for\n"
            f"  expected  sha256 {digest}\n"
            f"  found     sha256 {found}, {len(data):,} bytes\n"
            "  It was not opened, and no network was built.   Fetch or save both anew.",
            path=str(path),
            expected=f"sha256 {digest}",
            found=f"sha256 {found}",
        )
    return parse_tensors(data, path)


def _from_hub(hub_id: str, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import hf_hub_download

    repo, _, revision = hub_id.partition("@")
    try:
        return Path(hf_hub_download(repo, FILE_NAME, revision=revision or None, cache_dir=cache_dir))
    except Exception as error:  # the client raises its own errors, its HTTP library's, and those of files
        raise HubError(
            f"cannot get {FILE_NAME} of {hub_id}: {hub_trouble(error)}.\n"
            "  No network was built; other formats are never opened."
        ) from error


def check_network(where: str, make: Callable[[], nn.Module], tensors: dict[str, Tensor] | None) -> None:
    """Make the network that a config describes without memory, and compare it with its weight file.

    Args:
        where: Where the config comes from.
        make: Makes the network from the saved arguments.
        tensors: Of the weight file; without one the network only has to be of a credible size.

    Raises:
        UsageError: The arguments describe no network, too large a one, or another than the file's.
    """
    params = sum(t.numel() for t in tensors.values()) + 1_000_000 if tensors else MAX_PARAMS
    modules = 40 * len(tensors) + 1_000 if tensors else MAX_MODULES
    try:
        with torch.device("meta"), allowance(params, modules):
            shapes = {key: tuple(value.shape) for key, value in make().state_dict().items()}
    except ChanzooError:
        raise
    except Exception as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"config.json of {where} describes no network that can be built: {text}\n  No network was built."
        ) from error
    if tensors is None:
        return
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if shapes != found:
        key = sorted(key for key in {*shapes, *found} if shapes.get(key) != found.get(key))[0]
        raise UsageError(
            f"{FILE_NAME} and config.json of {where} do not belong together.\n"
            f"  expected  {key} {list(shapes[key]) if key in shapes else 'absent'}\n"
            f"  found     {key} {list(found[key]) if key in found else 'absent'}\n"
            "  No network was built."
        )


@contextmanager
def allowance(params: int = MAX_PARAMS, modules: int = MAX_MODULES) -> Iterator[None]:
    """Stop this thread from making networks with more parameters or modules than that, all together.

    Inside another allowance this one counts alone: what is made here is not charged to the outer one. So the
    base of a narrowed network, which is larger than the file that sets the outer allowance, can be made.
    """
    used = [0, 0]

    def parameter(_module: nn.Module, _name: str, value: Any) -> None:
        if isinstance(value, Tensor) and _counting.get() is used:
            spend(0, value.numel(), params, "parameters")

    def child(_module: nn.Module, _name: str, value: Any) -> None:
        if value is not None and _counting.get() is used:
            spend(1, 1, modules, "modules")

    def spend(index: int, amount: int, limit: int, what: str) -> None:
        used[index] += amount
        if used[index] > limit:
            raise ValueError(f"it has more than {limit:,} {what}, which no such weight file has")

    hooks = [
        nn.modules.module.register_module_parameter_registration_hook(parameter),
        nn.modules.module.register_module_buffer_registration_hook(parameter),
        nn.modules.module.register_module_module_registration_hook(child),
    ]
    outer = _counting.set(used)
    try:
        yield
    finally:
        _counting.reset(outer)
        for hook in hooks:
            hook.remove()


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_NUMBER


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def _refused(where: str, key: str, value: Any, expected: str) -> UsageError:
    return UsageError(
        f"config.json of {where} has {key}={str(value)[:80]!r}: expected {expected}.\n  No network was built."
    )
