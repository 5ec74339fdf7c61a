"""A short run of the fuzzer: every mutated file is refused in our words or changes nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fuzz_files.py"


def test_mutated_files_are_refused_or_change_nothing() -> None:
    spec = importlib.util.spec_from_file_location("fuzz_files", SCRIPT)
    assert spec and spec.loader
    fuzz = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_files"] = fuzz
    spec.loader.exec_module(fuzz)
    outcomes = fuzz.run(cases=450, seed=20)
    assert sum(outcomes.values()) == 450
    assert [name for name in outcomes if "FAULT" in name] == []
    assert outcomes["row file: refused"] > 140 and outcomes["config: refused"] > 70
    assert outcomes["config: intact"] > 10, "a fuzzer that breaks everything finds nothing"
