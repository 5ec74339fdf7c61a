"""Feed mutated weight files and configs to the loader, and count what it does with them.

    python scripts/fuzz_files.py --cases 100000 --seed 0

Three kinds of cases, in turn: the weight file of a row, the weight file of a saved network whose config
names its hash, and that config. Each is mutated at random (bits, bytes, cuts, insertions, and for the
config also JSON values that are hostile on purpose) and loaded as a user would. The loader has to refuse
it with one of our errors, or hand out exactly the tensors that were saved. Exit code 1 if it did
anything else. Single faults are replayed with ``--seed S --only N``.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

import chanzoo  # noqa: F401  # registers the networks
from chanzoo import store
from chanzoo.errors import ChanzooError
from chanzoo.models import check_folder
from chanzoo.models._saved import sha256_note
from chanzoo.weights import Weight

ARCH = "cifar_resnet20"
WIDTHS = [2, 2, 2, 2, *[2] * 9]  # a small network of a kind whose arguments matter
HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 10**6, 10**9, 10**30, float("nan"), float("inf"), "", "x" * 5000, "\0"),
    *("../../etc/passwd", "/etc/passwd", "hf-hub:a/b", "os.system", "__import__('os')", [], {}, [[[]]]),
    *([10**9] * 13, [2] * 100_000, {"a": 1}, ["a", None, {}], "cifar_resnet110", "resnet50", "vit_giant"),
)  # fmt: skip
KEYS = (
    *("architecture", "num_classes", "model_args", "pretrained_cfg", "widths", "shortcut", "in_chans"),
    *("global_pool", "drop_rate", "device", "dtype", "pretrained", "checkpoint_path", "url", "file"),
    *("source", "hf_hub_filename", "hf_hub_id", "state_dict", "custom_load", "notes", "label_names"),
    *("input_size", "fixed_input_size", "mean", "test_input_size", "min_input_size", "pool_size", "tag"),
    *("act_layer", "norm_layer", "features_only", "out_indices", "img_size", "cache_dir", "pruned"),
)  # fmt: skip
WATCHED = {
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
}


@dataclass(frozen=True)
class Saved:
    """The genuine files.

    Attributes:
        row: A row for the weight file.
        content: The weight file.
        config: The config beside it, which names its hash.
        tensors: What the weight file holds.
    """

    row: Weight
    content: bytes
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def genuine() -> Saved:
    """A small network with weights, and the files that describe it."""
    torch.manual_seed(0)
    model = timm.create_model(ARCH, widths=WIDTHS)
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    content = save(tensors)
    with tempfile.TemporaryDirectory() as folder:
        timm.models.save_for_hf(model, folder, safe_serialization=True)
        config = json.loads(Path(folder, "config.json").read_text())
        Path(folder, "model.safetensors").write_bytes(content)
        digest = store.file_sha256(Path(folder, "model.safetensors"))
    config["pretrained_cfg"]["notes"] = [sha256_note(digest)]
    row = Weight(f"{ARCH}.fuzz", "c10j", "", "", 0, 0, {}, 0, 0, len(content), digest, "", "")
    return Saved(row, content, config, tensors)


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Change some of the bytes; most often near the start, where the header is."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if not data:
            break
        at = rng.randrange(min(len(data), rng.choice((8, 64, 4096, len(data)))))
        how = rng.randrange(6)
        if how == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            data[at] = rng.randrange(256)
        elif how == 2:
            del data[at : at + rng.choice((1, 2, 8, 1000))]
        elif how == 3:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 8, 1000)))
        elif how == 4:
            del data[rng.randrange(len(data)) :]
        else:
            data[at : at + 8] = rng.choice((0, 2**63, 2**64 - 1, len(data), 2**31)).to_bytes(8, "little")
    return bytes(data)


def mutate_config(config: dict[str, Any], rng: random.Random) -> bytes:
    """Change, add or remove values, or break the text."""
    config = copy.deepcopy(config)
    for _ in range(rng.choice((1, 1, 2, 5))):
        places = [config, *(value for value in config.values() if isinstance(value, dict))]
        place = rng.choice(places)
        key = rng.choice((*place, *KEYS))
        how = rng.randrange(4)
        if how == 0:
            place.pop(key, None)
        elif how == 1 and isinstance(place.get(key), list) and place[key]:
            place[key][rng.randrange(len(place[key]))] = rng.choice(HOSTILE)
        else:
            place[key] = copy.deepcopy(rng.choice(HOSTILE))
    data = json.dumps(config).encode()
    if rng.random() < 0.1:
        data = mutate_bytes(data, rng)
    if rng.random() < 0.002:
        data = rng.choice((b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b"\xff\xfe", b"null", b"[]"))
    return data


def load_row(saved: Saved, folder: Path) -> dict[str, Tensor]:
    """Read the file of a row."""
    return store.load_tensors(saved.row, folder / store.FILE_NAME)


def load_folder(_saved: Saved, folder: Path) -> dict[str, Tensor]:
    """Create the network of a folder, as every command of ours does."""
    check_folder(folder)
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model.state_dict()


def run(cases: int, seed: int, only: int | None = None) -> collections.Counter[str]:
    """Run the cases and count the outcomes; a fault is printed with its number.

    Args:
        cases: How many.
        seed: Every case depends on it and on its own number alone.
        only: Run just this one.
    """
    saved = genuine()
    outcomes: collections.Counter[str] = collections.Counter()
    kinds: tuple[tuple[str, Callable[[Saved, Path], dict[str, Tensor]]], ...] = (
        ("row file", load_row),
        ("saved file", load_folder),
        ("config", load_folder),
    )
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        for number in range(cases) if only is None else (only,):
            rng = random.Random(f"{seed}.{number}")
            kind, load = kinds[number % 3]
            config = json.dumps(saved.config).encode()
            content = saved.content
            if kind == "config":
                config = mutate_config(saved.config, rng)
            else:
                content = mutate_bytes(content, rng)
            (folder / "config.json").write_bytes(config)
            (folder / store.FILE_NAME).write_bytes(content)
            outcomes[f"{kind}: {judge(load, saved, folder, number)}"] += 1
    return outcomes


def judge(load: Callable[[Saved, Path], dict[str, Tensor]], saved: Saved, folder: Path, number: int) -> str:
    """What became of one case: ``refused``, ``intact``, or a fault."""
    try:
        tensors = load(saved, folder)
    except ChanzooError:
        return "refused"
    except Exception as error:
        print(f"case {number}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
        return f"FAULT crash by {type(error).__name__}"
    same = tensors.keys() == saved.tensors.keys() and all(
        torch.equal(value, saved.tensors[key]) for key, value in tensors.items()
    )
    if not same:
        print(f"case {number}: other weights than the saved ones", file=sys.stderr)
    return "intact" if same else "FAULT altered weights"


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="run just case N")
    args = parser.parse_args()
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    executed: list[str] = []
    armed = [True]

    def watch(event: str, _args: object) -> None:
        if armed[0] and event in WATCHED:
            executed.append(event)

    sys.addaudithook(watch)
    start = time.time()
    outcomes = run(args.cases, args.seed, args.only)
    armed[0] = False
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for name, count in sorted(outcomes.items()):
        print(f"{count:>8}  {name}")
    faults = sum(count for name, count in outcomes.items() if "FAULT" in name)
    print(
        f"{sum(outcomes.values())} cases in {time.time() - start:.0f} s, {faults} faults, "
        f"{len(executed)} calls of code or network, peak memory grew by {grown:.0f} MB"
    )
    return int(bool(faults or executed))


if __name__ == "__main__":
    sys.exit(main())
