"""A network as files: what timm reads back, and the check that it is the same network, bit by bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save
from timm.models import save_for_hf
from torch import Tensor, nn

from ..compress.names import narrow_name
from ..errors import ChanzooError, UsageError
from ..macs import input_size_of
from ..models import check_folder
from ..models._saved import sha256_note
from ..store import FILE_NAME, widen
from .folders import CONFIG, Source, create

__all__ = ["check_comes_back", "config_bytes", "named_network", "network_files", "unpacked"]

# What of a timm config says how a network is used; the rest says where it came from.
_CFG_KEYS = {
    "tag", "custom_load", "input_size", "test_input_size", "min_input_size", "fixed_input_size",
    "interpolation", "crop_pct", "test_crop_pct", "crop_mode", "mean", "std", "num_classes", "label_names",
    "label_descriptions", "pool_size", "test_pool_size", "first_conv", "classifier", "license", "description",
    "paper_name", "paper_ids", "notes",
}  # fmt: skip
_NULL = ("pool_size", "first_conv", "classifier")  # may be null, which says something


@contextmanager
def unpacked(files: dict[str, bytes]) -> Iterator[Path]:
    """A temporary folder that holds the files."""
    with TemporaryDirectory(prefix="chanzoo-") as name:
        for path, content in files.items():
            Path(name, path).write_bytes(content)
        yield Path(name)


def config_bytes(source: Source, content: bytes, extra: dict[str, Any]) -> bytes:
    """``config.json`` as timm writes it, without sources, and with the note of the weight file's hash."""
    with TemporaryDirectory(prefix="chanzoo-") as folder:
        try:
            save_for_hf(
                source.model,
                folder,
                model_config={"pretrained_cfg": source.cfg},
                model_args=source.model_args,
                data_config=source.data,
                safe_serialization=True,
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise UsageError(
                f"the network cannot be written down: {str(error).splitlines()[0]}\n"
                "  expected  arguments that are numbers, texts, and lists of them\n"
                "  Nothing was sent or saved."
            ) from error
        config = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
    cfg = {**config["pretrained_cfg"], **source.cfg}
    notes = [note for note in cfg.get("notes") or () if not note.startswith("sha256:")]
    cfg["notes"] = [*notes, sha256_note(hashlib.sha256(content).hexdigest())]
    config["pretrained_cfg"] = {
        key: value for key, value in cfg.items() if key in _CFG_KEYS and (value is not None or key in _NULL)
    }
    return (json.dumps({**config, **extra}, indent=1, ensure_ascii=False) + "\n").encode()


def named_network(small: nn.Module, arch: str, model_args: dict[str, Any]) -> nn.Module:
    """The same network under a name that builds it from its widths.

    Arguments and errors as of :func:`chanzoo.compress.names.narrow_name`.
    """
    name, args = narrow_name(small, arch, model_args)
    model = create(name, args.get("base", arch), **args)
    model.load_state_dict(small.state_dict())
    return model


def network_files(source: Source, extra: dict[str, Any]) -> dict[str, bytes]:
    """Config and weight file of a network, complete and checked.

    Args:
        source: The network; its tensors are stored as they are in ``state``.
        extra: More entries of the config, such as ``chanzoo``.

    Raises:
        UsageError: It would not come back as it is.
    """
    content = save({key: value.contiguous() for key, value in source.state.items()})
    files = {FILE_NAME: content, CONFIG: config_bytes(source, content, extra)}
    check_comes_back(files, source.state, source.model, "the network")
    return files


def check_comes_back(
    files: dict[str, bytes], state: dict[str, Tensor], original: nn.Module, shown: str
) -> nn.Module:
    """Rebuild a network from the files alone; raise unless it is the original, bit by bit."""
    with unpacked(files) as folder:
        try:
            check_folder(folder)
            again = create(f"local-dir:{folder}", shown, pretrained=True)
        except ChanzooError as error:
            raise UsageError(
                f'"{shown}" does not come back from what would be published.\n'
                f"  {str(error).replace(str(folder), shown).splitlines()[0]}\n"
                "  Nothing was sent or saved."
            ) from error
    found, expected = again.state_dict(), widen(state)
    same = found.keys() == expected.keys() and all(
        found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in expected.items()
    )
    if same:
        image = torch.randn(2, *input_size_of(again), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            same = torch.equal(original(image), again(image))
    if not same:
        raise UsageError(
            f'"{shown}" comes back as another network: tensors or outputs differ.\n'
            "  Nothing was sent or saved.   64-bit floats do not survive: save the network in 32 or 16 bits"
        )
    return again
