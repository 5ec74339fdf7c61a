"""Networks that bring their own config: what is loaded, and what is refused before memory is taken."""

from __future__ import annotations

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from chanzoo.errors import UsageError, WeightsRejectedError
from chanzoo.models import check_folder
from chanzoo.models._saved import allowance, sha256_note
from chanzoo.store import file_sha256

WIDTHS = [4, 4, 6, 8, *[3] * 9]


def save(folder: Path, name: str = "cifar_resnet20", note: bool = True, **kwargs: Any) -> torch.nn.Module:
    """A folder as ``save_for_hf`` writes it, with the note of the file's hash."""
    torch.manual_seed(3)
    model = timm.create_model(name, **kwargs).eval()
    save_for_hf(model, str(folder), safe_serialization=True)
    if note:
        digest = file_sha256(folder / "model.safetensors")
        edit(folder, lambda config: config["pretrained_cfg"].update(notes=["kept", sha256_note(digest)]))
    return model


def edit(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("cifar_resnet20", {"widths": WIDTHS}),
        ("cifar_resnet20", {"num_classes": 7, "in_chans": 1}),
        ("ce_cifar_resnet20", {"shortcut": "B"}),
        ("ce_mobilenetv2_050", {"num_classes": 3}),
    ],
)
def test_a_saved_network_comes_back_bit_by_bit(tmp_path: Path, name: str, kwargs: dict[str, Any]) -> None:
    model = save(tmp_path, name, **kwargs)
    check_folder(tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, kwargs.get("in_chans", 3), 32, 32)
    assert torch.equal(model(x), again(x))
    cfg = again.pretrained_cfg
    assert cfg["notes"] == ("kept",), "the hash is true of that file, not of what is made from it"
    assert "state_dict" not in cfg and "file" not in cfg


def test_a_saved_network_takes_other_classes_and_channels(tmp_path: Path) -> None:
    save(tmp_path, num_classes=7)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, in_chans=1)
    assert (other.fc.out_features, other.conv1.in_channels) == (3, 1)
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True)
    assert [level.shape[1] for level in features(torch.randn(1, 3, 32, 32))] == [16, 16, 32, 64]


def test_16_bit_files_are_read_as_32_bit_networks(tmp_path: Path) -> None:
    save(tmp_path, note=False)
    file = tmp_path / "model.safetensors"
    half = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
    save_file(half, file)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(again.conv1.weight, half["conv1.weight"].float())


@pytest.mark.parametrize(
    ("place", "key", "value", "words"),
    [
        ("", "num_classes", 10**9, "a whole number of 0 to 1,000,000"),
        ("", "num_classes", "ten", "a whole number"),
        ("", "num_classes", 9, "that of model_args, 10"),
        ("pretrained_cfg", "input_size", [3, 32], "3 whole numbers"),
        ("pretrained_cfg", "mean", ["a"], "numbers"),
        ("pretrained_cfg", "interpolation", 3, "text"),
        ("pretrained_cfg", "first_conv", {}, "the name of a layer"),
        ("pretrained_cfg", "fixed_input_size", "yes", "true or false"),
        ("pretrained_cfg", "hf_hub_filename", "../../secret.bin", "expected model.safetensors"),
        ("pretrained_cfg", "url", "http://127.0.0.1/x.pth", "no source of weights"),
        ("pretrained_cfg", "custom_load", True, "no source of weights"),
        ("model_args", "widths", [10**9] * 13, "more than 1,271,117 parameters"),
        ("model_args", "widths", [2], "widths has 1 number"),
        ("model_args", "nonsense", 1, "unexpected keyword argument 'nonsense'"),
    ],
)  # fmt: skip
def test_a_hostile_config_is_refused(tmp_path: Path, place: str, key: str, value: Any, words: str) -> None:
    save(tmp_path)
    edit(tmp_path, lambda config: (config[place] if place else config).update({key: value}))
    tracemalloc.start()
    with pytest.raises(UsageError) as caught:
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert words in str(caught.value) and str(caught.value).endswith("No network was built.")
    assert peak < 50e6


def test_a_config_without_its_file_may_not_ask_for_everything(tmp_path: Path) -> None:
    save(tmp_path)
    edit(tmp_path, lambda config: config["model_args"].update(widths=[10**6] * 13))
    with pytest.raises(UsageError, match="more than 4,000,000,000 parameters"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=False)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", note=False)
    save(tmp_path / "b", widths=WIDTHS, note=False)
    (tmp_path / "b" / "model.safetensors").rename(tmp_path / "a" / "model.safetensors")
    with pytest.raises(UsageError) as caught:
        timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"model.safetensors and config.json of {tmp_path / 'a'} do not belong together."
    assert lines[1].startswith("  expected  bn1.bias [16]") and lines[2].startswith(
        "  found     bn1.bias [4]"
    )


def test_a_file_that_is_not_the_noted_one_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsRejectedError, match=r"is not the file that its config\.json was written for"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    model = save(tmp_path, note=False)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"has no model\.safetensors\.\n  No network was built; other"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    torch.save(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(WeightsRejectedError, match="is not a safetensors file"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "is not JSON"),
        ("{", "is not JSON"),
        ("9" * 100_000, "is not JSON"),
        ("[]", "has top level='[]': expected an object"),
        ('{"architecture": "evil_net"}', "has architecture='evil_net': expected a network of timm"),
        ('{"architecture": 3}', "has architecture='3'"),
        ('{"architecture": "resnet18", "model_args": [1]}', "has model_args='[1]': expected an object"),
        ('{"architecture": "resnet18", "model_args": {"device": 1, "pruned": 1}}', "has model_args='pruned'"),
        ('{"architecture": "resnet18", "pretrained_cfg": {"evil": 1}}', "has pretrained_cfg="),
        ('{"architecture": "resnet18", "pretrained_cfg": {"input_size": null}}', "has input_size='None'"),
        ('{"architecture": "resnet18", "pretrained_cfg": {}, "label_names": 3}', "has label_names='3'"),
        (
            '{"architecture": "resnet18", "model_args": {"layers": [9, 999999999, 9, 9]}}',
            "describes no network that can be built",
        ),
    ],
)  # fmt: skip
def test_a_folder_is_checked_before_timm_reads_it(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError) as caught:
        check_folder(tmp_path)
    assert words in str(caught.value)


def test_a_folder_of_timms_networks_is_checked_too(tmp_path: Path) -> None:
    save(tmp_path, "resnet10t", note=False, num_classes=4)
    check_folder(tmp_path)
    edit(tmp_path, lambda config: config["model_args"].update(num_classes=5))
    with pytest.raises(UsageError, match="num_classes"):
        check_folder(tmp_path)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"A saved network is a folder with config\.json"):
        check_folder(tmp_path)


def test_allowances() -> None:
    with allowance(100, 10), pytest.raises(ValueError, match="more than 100 parameters"):
        torch.nn.Linear(10, 10)
    with allowance(1000, 3), pytest.raises(ValueError, match="more than 3 modules"):
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(4)))
    torch.nn.Linear(10, 10)


def test_an_inner_allowance_is_not_charged_to_the_outer_one() -> None:
    with allowance(200, 10):
        torch.nn.Linear(10, 10)
        with allowance(1000, 10):
            torch.nn.Linear(20, 20)
            with pytest.raises(ValueError, match="more than 1,000 parameters"):
                torch.nn.Linear(30, 30)
        with pytest.raises(ValueError, match="more than 200 parameters"):
            torch.nn.Linear(10, 10)


def test_an_allowance_is_one_threads_own() -> None:
    with ThreadPoolExecutor(1) as pool, allowance(100, 10):
        assert pool.submit(torch.nn.Linear, 20, 20).result().out_features == 20
