"""Every stored parity case, and what the runner says of cases that it cannot run."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))

from run import find_cases, main, run_case  # a script, not a package

HERE = Path(__file__).parent
FOLDERS = {"ce": 18, "condensenetv2": 21, "hrank": 25}  # how many cases each holds
SLOW = {"slim_widths_a"}
CASES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])
    for path in find_cases([str(HERE / folder) for folder in FOLDERS])
]


@pytest.mark.parametrize("path", CASES)
def test_case(path: Path) -> None:
    outcome = run_case(path)
    assert outcome.passed, outcome.line()
    assert outcome.error <= outcome.tolerance


def test_all_cases_are_there() -> None:
    found = {folder: len(list(find_cases([str(HERE / folder)]))) for folder in FOLDERS}
    assert found == FOLDERS
    assert sum(file.stat().st_size for folder in FOLDERS for file in (HERE / folder).iterdir()) < 8_000_000


def test_a_few_lists_of_widths(tmp_path: Path) -> None:
    spec = json.loads((HERE / "hrank" / "slim_widths_a.json").read_text())
    rows = {row["model"]: row for row in spec["rows"]}
    spec["rows"] = [rows[model] for model in ("vgg_16_bn", "densenet_40", "googlenet", "mobilenet_v1")]
    path = tmp_path / "few.json"
    path.write_text(json.dumps(spec))
    assert run_case(path).passed
    spec["rows"][2]["in_channels"][1] += 1
    path.write_text(json.dumps(spec))
    assert "row 2 (googlenet): in_channels" in run_case(path).line()


def test_a_slim_network_of_other_shapes_fails(tmp_path: Path) -> None:
    for suffix in (".json", ".safetensors"):
        shutil.copy(HERE / "hrank" / f"slim_resnet_56{suffix}", tmp_path)
    path = tmp_path / "slim_resnet_56.json"
    spec = json.loads(path.read_text())
    for change, why in (
        ({"params": 485_412}, "params 485413"),
        ({"compress_rate": "[0.]*30"}, "loading state_dict"),
    ):
        path.write_text(json.dumps({**spec, **change}))
        assert why in run_case(path).line()


@pytest.fixture
def case(tmp_path: Path) -> Path:
    for suffix in (".json", ".safetensors"):
        shutil.copy(HERE / "ce" / f"layer_eval_c20_g16{suffix}", tmp_path / f"case{suffix}")
    return tmp_path / "case.json"


def test_a_wrong_number_fails_and_is_named(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(case.with_suffix(".safetensors"))
    tensors["output"] = 1.001 * tensors["output"]
    save_file(tensors, case.with_suffix(".safetensors"))
    assert main([str(case.parent)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert "output is off by 9.99e-04" in out[0]
    assert out[-1] == "0 passed, 1 failed"


def test_nan_fails(case: Path) -> None:
    tensors = load_file(case.with_suffix(".safetensors"))
    tensors["output"].view(-1)[0] = float("nan")
    save_file(tensors, case.with_suffix(".safetensors"))
    assert not run_case(case).passed


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model": "PerceptualEquilibrium"}, "no kind of case"),
        ({"state": [["x_weight", [1], "float32"]]}, "RuntimeError"),
        ({"config": {}}, "KeyError"),
    ],
)
def test_a_case_that_cannot_be_run_fails(case: Path, change: dict, why: str) -> None:
    case.write_text(json.dumps({**json.loads(case.read_text()), **change}))
    outcome = run_case(case)
    assert not outcome.passed
    assert why in outcome.line()


def test_half_a_case_fails(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case.unlink()
    assert main([str(case.parent)]) == 1
    assert "FileNotFoundError" in capsys.readouterr().out


def test_a_tensor_we_lack_fails_unless_optional(case: Path) -> None:
    tensors = load_file(case.with_suffix(".safetensors"))
    save_file({**tensors, "output/buffer/running_mean": torch.zeros(1)}, case.with_suffix(".safetensors"))
    assert "we have no output/buffer/running_mean" in run_case(case).line()
    spec = json.loads(case.read_text())
    case.write_text(json.dumps({**spec, "optional": ["output/buffer/running_mean"]}))
    assert run_case(case).passed


def test_script_needs_folders() -> None:
    assert main([]) == 2


def test_an_empty_folder_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 1 failed"
