"""What ``chanzoo prune`` is asked to reach, from the words of the command line."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .common import human_count

if TYPE_CHECKING:
    from torch import nn

    from ..compress import Budget

__all__ = ["check_unmet", "is_share", "read_target"]

_UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def read_target(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """The options for a target, as an argument of :func:`chanzoo.compress.prune`.

    Raises:
        UsageError: They cannot be read.
    """
    for name in ("macs", "params"):
        if (amount := getattr(args, name)) is not None:
            return {name: read_amount(amount, f"--{name}", ("k", "M", "G"))}
    if args.compress_rate is not None:
        return {"compress_rate": args.compress_rate}
    if args.latency is not None:
        return {"budget": latency_budget(model, args.latency)}
    if not Path(args.rates).is_file():
        return {"rates": read_rates(args.rates)}
    try:
        rates = json.loads(Path(args.rates).read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f'cannot read "{args.rates}": {error}') from error
    numbers = rates.values() if isinstance(rates, dict) else rates if isinstance(rates, list) else [None]
    if not numbers or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
        raise UsageError(
            f'"{args.rates}" holds no rates: expected an object, name of a convolution → fraction to remove, '
            "or a list."
        )
    return {"rates": rates}


def read_rates(text: str) -> float | list[float]:
    """One rate, or one for each group.

    Raises:
        UsageError: It is neither.
    """
    from ..models.hrank import read_rates as read_list

    try:
        return float(text)
    except ValueError:
        pass
    try:
        return read_list(text)
    except UsageError as error:
        if "[" in text:
            words = str(error).replace("compress_rate=", "--rates ").replace("compress_rate", "--rates")
            raise UsageError(words) from error
        raise UsageError(
            f"--rates {shlex.quote(text)}: there is no file of this name, and it is no rate.\n"
            "  expected  one number, such as 0.3; one per group, as [0.]+[0.3]*8; or a JSON file"
        ) from error


def read_amount(text: str, option: str, units: tuple[str, ...]) -> float:
    """A share (``0.5x``, below 1) or an amount (``2.0G``).

    Raises:
        UsageError: It is neither.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([a-zA-Z]*)", text.strip())
    value, unit = (float(match[1]), match[2]) if match else (0.0, "")
    if unit == "x" and 0 < value < 1:
        return value
    least = 1e-9 if "s" in units else 1.0  # a count of 1 or less would be taken for a share
    amount = value * _UNITS.get(unit, 0.0)
    if unit not in ("", *units) or (not unit and "s" in units) or amount <= least:
        shown = ", ".join(f"{1.5:g}{unit}" for unit in units)
        raise UsageError(
            f"{option} {shlex.quote(text)}: expected a share such as 0.5x, or an amount such as {shown}."
        )
    return amount


def check_unmet(args: argparse.Namespace, model: nn.Module, target: dict[str, Any]) -> None:
    """Refuse a budget that the network meets as it is, before anything that takes long.

    Raises:
        UsageError: Likewise.
    """
    from ..macs import count_macs, count_params, input_size_of

    name, asked = next(iter(target.items()))
    if name == "budget" and not is_share(args.latency):
        name, asked, found = "latency", asked.target, asked.cost(model)
    elif name in ("macs", "params"):
        found = count_macs(model, input_size_of(model)) if name == "macs" else count_params(model)
    else:
        return
    if found <= asked:  # a share never is
        has = f"{1000 * found:.3g} ms here" if name == "latency" else human_count(int(found))
        raise UsageError(
            f"--{name} {getattr(args, name)} is met already: {args.name} has {has}.\n"
            "  expected  less than that, or a share of it such as 0.5x"
        )


def is_share(text: str) -> bool:
    """Whether a target is a share of the full network's."""
    return text.strip().endswith("x")


def latency_budget(model: nn.Module, text: str) -> Budget:
    """A budget of time; each candidate takes turns with the full network."""
    from ..compress import Budget
    from ..macs import input_size_of
    from ..measure.latency import measure_latency

    amount = read_amount(text, "--latency", ("us", "ms", "s"))
    relative = is_share(text)

    def cost(small: nn.Module) -> float:
        found = measure_latency({"full": model, "small": small}, input_size_of(model), rounds=3)
        return found["small"] / found["full"] if relative else found["small"]

    name = "of the full network's time" if relative else "seconds"
    return Budget(name, amount, cost)
