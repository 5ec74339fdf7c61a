"""What goes to the Hub, whole and checked, before anything is sent.

A package is made from a row of the table, or from a folder: one that ``timm.models.save_for_hf`` wrote, or
the output of timm's train script. It is rebuilt from its own files and compared with the original, bit by
bit. A pickle never goes up.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint

from .. import weights
from ..errors import UsageError
from ..macs import count_macs, count_params, input_size_of
from ..store import FILE_NAME, cached_path, embedded_path, find_local, load_tensors
from ..weights import DATASETS, Weight
from .card import Facts, Listed, Measured, model_card
from .folders import CONFIG, DATA_KEYS, EVIDENCE, Source, cfg_of, load, read_saved, read_training
from .saved import check_comes_back, config_bytes

__all__ = ["OURS", "Package", "package_folder", "package_row", "with_measured"]

CARD = "README.md"
OURS = (FILE_NAME, CONFIG, CARD, *EVIDENCE)


@dataclass(frozen=True)
class Package:
    """The files of a repository, complete.

    Attributes:
        name: ``arch.tag`` of a row, the folder's name otherwise.
        repo_id: Repository that the card names.
        files: Bytes by path.
        sha256: Of ``model.safetensors``.
        facts: From which the card was made.
        row: None for a folder.
    """

    name: str
    repo_id: str
    files: dict[str, bytes]
    sha256: str
    facts: Facts
    row: Weight | None = None

    @property
    def file_bytes(self) -> int:
        """Size of ``model.safetensors``."""
        return len(self.files[FILE_NAME])

    @property
    def listed(self) -> list[Listed]:
        """Size and sha256 of every file, the card's too."""
        return [_listed(path, content) for path, content in self.files.items()]

    @property
    def metrics(self) -> dict[str, float]:
        """What was measured, empty before that."""
        return self.facts.measured.metrics if self.facts.measured else {}


def package_row(name: str, repo_id: str) -> Package:
    """Package a row of the table: the row's own file, byte by byte, its evidence, config and card.

    Raises:
        UsageError: There is no such row, or its evidence is not here.
        NoWeightsError: Its file is not on this machine.
        WeightsRejectedError: The file is not the one of the row.
    """
    row = _find_row(name)
    path = find_local(row) or (cached_path(row) if row.revision else embedded_path(row.name))
    if not path.is_file():
        raise UsageError(
            f"the file of {row.name} is not on this machine.\n"
            f"  expected  {path}\n"
            f"  Nothing was sent.   {f'Fetch it: chanzoo pull {row.name}' if row.revision else ''}".rstrip()
        )
    tensors = load_tensors(row, path)
    dataset = DATASETS[row.dataset]
    arch_cfg: Any = get_pretrained_cfg(row.arch)
    data = dataset.cfg(arch_cfg.input_size[1] // arch_cfg.pool_size[0])
    labels = data.pop("label_names", None)
    args = {"num_classes": dataset.num_classes, **row.model_args}
    model = timm.create_model(row.arch, **args).eval()
    load(model, tensors, row.name)
    files = {FILE_NAME: path.read_bytes(), **_evidence_of(row, path.parent)}
    cfg = {**data, "tag": row.tag, "license": row.licence, "paper_ids": row.paper, "label_names": None}
    files[CONFIG] = config_bytes(
        Source(model, tensors, cfg, row.model_args, {k: data[k] for k in DATA_KEYS if k in data}),
        files[FILE_NAME],
        {"label_names": labels} if labels else {},
    )
    check_comes_back(files, tensors, model, row.name)
    evidence = _read_eval(files["eval.json"], row.name)
    return _seal(
        files,
        Facts(
            repo_id=repo_id,
            title=row.name,
            arch=row.arch,
            is_ours=_is_ours(row.arch),
            params=row.params,
            macs=row.macs,
            input_size=dataset.input_size,
            num_classes=dataset.num_classes,
            licence=row.licence,
            files=(),
            dataset=row.dataset,
            measured=Measured(row.metrics, str(evidence.get("split")), int(evidence.get("images") or 0)),
            command=row.command,
            seed=row.seed,
            hours=row.hours,
            paper=row.paper,
            published=row.published,
        ),
        row.name,
        row,
    )


def package_folder(
    path: str | Path, repo_id: str, *, licence: str = "", base_model: str = "", dataset: str = ""
) -> Package:
    """Package a network from a folder; it has no metrics before :func:`with_measured` adds them.

    Args:
        path: With ``config.json`` and ``model.safetensors``, or the output of timm's train script
            (``args.yaml`` and a checkpoint, of which the averaged weights come first).
        repo_id: ``ORG/REPO``.
        licence: Of the weights; needed where the config names none.
        base_model: What the network was made from, if the folder does not say.
        dataset: A key of ``DATASETS`` or a data set's name on the Hub, if the folder does not say.

    Raises:
        UsageError: The folder is neither, or does not describe its tensors: the network that comes back
            from it is not the same.
        WeightsRejectedError: The weight file is not safetensors, or not the one its config was written for.
    """
    folder = Path(path)
    shown = str(folder)
    if (folder / CONFIG).is_file():
        source = read_saved(folder)
        licence = licence or str(cfg_of(source.model).get("license") or "")
    elif (folder / "args.yaml").is_file():
        source = read_training(folder)
    else:
        what = f"{CONFIG} and {FILE_NAME}, or args.yaml and a checkpoint of timm's train script"
        raise UsageError(f'cannot publish "{shown}".\n  expected  {what}\n  Nothing was sent.')
    if not licence:
        raise UsageError(
            f'"{shown}" names no licence of the weights.\n'
            "  Nothing was sent.   Name one: --license apache-2.0"
        )
    if dataset and source.about.get("dataset", dataset) != dataset:
        raise UsageError(
            f'"{shown}" says that its data set is {source.about["dataset"]}, not {dataset}.\n'
            "  Nothing was sent."
        )
    about = {**source.about, **({"dataset": dataset} if dataset else {})}
    about["base_model"] = _hub_name(base_model or about.get("base_model", ""))
    for key, value in source.state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UsageError(f'{key} in "{shown}" is not finite.\n  Nothing was sent.')
    from safetensors.torch import save

    files = {**source.files, FILE_NAME: save({k: v.clone().contiguous() for k, v in source.state.items()})}
    source.cfg["license"] = licence
    extra: dict[str, Any] = {}
    about = {key: value for key, value in about.items() if value}
    if about:
        extra["chanzoo"] = about
    names = DATASETS[about["dataset"]].label_names if about.get("dataset") in DATASETS else ()
    if "label_names" in source.cfg and len(names) == getattr(source.model, "num_classes", None):
        extra["label_names"] = names
    files[CONFIG] = config_bytes(source, files[FILE_NAME], extra)
    again = check_comes_back(files, source.state, source.model, shown)
    arch, size = json.loads(files[CONFIG])["architecture"], input_size_of(again)
    return _seal(
        files,
        Facts(
            repo_id=repo_id,
            title=repo_id.rpartition("/")[2],
            arch=arch,
            is_ours=_is_ours(arch),
            params=count_params(again),
            macs=count_macs(again, size),
            input_size=size,
            num_classes=int(getattr(again, "num_classes", 0)),
            licence=licence,
            files=(),
            remark=source.remark,
            seed=source.seed,
            dataset=about.get("dataset", ""),
            command=about.get("command", ""),
            method=about.get("method", ""),
            base_model=about.get("base_model", ""),
        ),
        folder.resolve().name,
    )


def with_measured(package: Package, measured: Measured) -> Package:
    """The package of a folder with an accuracy in its card and in ``eval.json``."""
    report = {
        "weight": package.repo_id,
        "dataset": package.facts.data_title,
        "split": measured.split,
        "images": measured.images,
        "sha256": package.sha256,
        "metrics": measured.metrics,
        "command": f"chanzoo eval hf-hub:{package.repo_id} DATA",
    }
    files = {**package.files, "eval.json": (json.dumps(report, indent=1) + "\n").encode()}
    return _seal(files, replace(package.facts, measured=measured), package.name, package.row)


def _seal(files: dict[str, bytes], facts: Facts, name: str, row: Weight | None = None) -> Package:
    """Add the card, which lists the other files."""
    listed = tuple(_listed(path, files[path]) for path in OURS if path in files and path != CARD)
    facts = replace(facts, files=listed)
    ordered = {file.path: files[file.path] for file in listed}
    return Package(
        name=name,
        repo_id=facts.repo_id,
        files={**ordered, CARD: model_card(facts).encode()},
        sha256=hashlib.sha256(files[FILE_NAME]).hexdigest(),
        facts=facts,
        row=row,
    )


def _listed(path: str, content: bytes) -> Listed:
    return Listed(path, len(content), hashlib.sha256(content).hexdigest())


# Rows


def _find_row(name: str) -> Weight:
    if name in weights.WEIGHTS:
        return weights.WEIGHTS[name]
    near = difflib.get_close_matches(name, weights.WEIGHTS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UsageError(f'no weights "{name}", and no such folder.{hint}   See all: chanzoo ls --pretrained')


def _evidence_of(row: Weight, beside: Path) -> dict[str, bytes]:
    """The evidence of a row, from beside its file or from the checkout."""
    folders = (beside, embedded_path(row.name).parent)
    folder = next((f for f in folders if (f / "eval.json").is_file()), beside)
    if missing := [name for name in EVIDENCE if not (folder / name).is_file()]:
        raise UsageError(
            f"the evidence of {row.name} is not complete.\n"
            f"  missing  {', '.join(missing)} in {folder}\n"
            "  Nothing was sent.   The evidence of a row is in a checkout of chanzoo: publish from there"
        )
    return {name: (folder / name).read_bytes() for name in EVIDENCE}


def _read_eval(content: bytes, shown: str) -> dict[str, Any]:
    try:
        report = json.loads(content)
    except ValueError as error:
        raise UsageError(f"eval.json of {shown} is not JSON: {error}\n  Nothing was sent.") from error
    if not isinstance(report, dict):
        raise UsageError(f"eval.json of {shown} is not an object.\n  Nothing was sent.")
    return report


# Names


def _is_ours(arch: str) -> bool:
    return model_entrypoint(arch).__module__.startswith("chanzoo.")


def _hub_name(name: str) -> str:
    """The repository of a registered name, if it has one; any other name as it is."""
    if name in weights.WEIGHTS:
        return weights.WEIGHTS[name].hub_repo or name
    if name and "/" not in name and timm.is_model(name):
        try:
            cfg: Any = get_pretrained_cfg(name)
        except RuntimeError:
            return name
        return str(cfg.hf_hub_id or name).partition("@")[0]
    return name
