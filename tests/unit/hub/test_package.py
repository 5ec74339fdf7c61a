"""Packages: what goes up is what comes back, and what does not come back is refused."""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load, load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from chanzoo.errors import UsageError, WeightsRejectedError
from chanzoo.hub.package import OURS, package_folder, package_row
from chanzoo.hub.saved import unpacked
from chanzoo.models import check_folder
from tests.hub.shelf import NAME, WIDTHS, make_images, make_shelf

REPO = "zoo/net"
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of timm's image reader


def saved(folder: Path, name: str = "cifar_resnet20", **options: Any) -> nn.Module:
    """A folder as ``save_for_hf`` writes it."""
    torch.manual_seed(3)
    model = timm.create_model(name, **options).eval()
    save_for_hf(model, str(folder), safe_serialization=True)
    return model


def trained(
    folder: Path, state: dict[str, Tensor], ema: dict[str, Tensor] | None = None, **args: Any
) -> Path:
    """A folder as timm's train script leaves it."""
    folder.mkdir()
    options = {
        "model": "cifar_resnet20", "pretrained": False, "pretrained_path": None, "num_classes": None,
        "in_chans": None, "input_size": None, "img_size": None, "mean": None, "std": None, "crop_pct": None,
        "interpolation": "", "gp": None, "model_kwargs": {}, "seed": 5, "lr": 0.1, "epochs": 3,
        "data_dir": "/home/me/data", "output": "/home/me/runs", "resume": "", "train_split": "train",
        "some_path": "/home/me/x",
    }  # fmt: skip
    options |= args
    (folder / "args.yaml").write_text(yaml.safe_dump(options))
    (folder / "summary.csv").write_text("epoch,eval_top1\n0,10.0\n")
    checkpoint: dict[str, Any] = {
        "epoch": 2,
        "arch": "x",
        "args": argparse.Namespace(model=options["model"]),
        "state_dict": state,
    }
    if ema:
        checkpoint["state_dict_ema"] = ema
    torch.save(checkpoint, folder / "last.pth.tar")
    return folder


def refusal(path: Path, **options: Any) -> list[str]:
    with pytest.raises(UsageError) as caught:
        package_folder(path, REPO, **options)
    assert "Nothing was sent" in str(caught.value)
    return str(caught.value).splitlines()


def config(package) -> dict[str, Any]:
    return json.loads(package.files["config.json"])


def rebuilt(package) -> nn.Module:
    with unpacked(package.files) as folder:
        check_folder(folder)
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(value, y[key]) for key, value in x.items())


# Rows


def test_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = make_shelf(tmp_path / "checkout", make_images(tmp_path / "images"), monkeypatch)
    package = package_row(NAME, REPO)
    assert set(package.files) == set(OURS)
    for name in ("model.safetensors", "recipe.yaml", "summary.csv", "eval.json", "notes.md"):
        assert package.files[name] == (shelf.folder / name).read_bytes()
    assert (package.sha256, package.file_bytes) == (shelf.row.sha256, shelf.row.file_bytes)
    assert (package.metrics, package.row) == (shelf.row.metrics, shelf.row)
    written = config(package)
    assert written["model_args"]["widths"] == WIDTHS
    assert (written["architecture"], written["label_names"][3]) == ("cifar_resnet20", "cat")
    cfg = written["pretrained_cfg"]
    assert (cfg["tag"], cfg["license"], cfg["paper_ids"]) == ("c10j", "apache-2.0", "arXiv:1512.03385")
    assert cfg["notes"] == [f"sha256:{package.sha256}"]
    assert (cfg["pool_size"], cfg["mean"]) == ([8, 8], [0.4914, 0.4822, 0.4465])
    assert not {"url", "file", "hf_hub_id", "source", "state_dict"} & set(cfg)
    text = "".join(package.files[name].decode() for name in ("config.json", "README.md"))
    assert str(tmp_path) not in text and "/tmp" not in text
    assert package_row(NAME, REPO) == package, "equal rows give equal bytes"
    (shelf.folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=f"the file of {NAME} is not on this machine"):
        package_row(NAME, REPO)


def test_an_unknown_row() -> None:
    with pytest.raises(UsageError, match=r'no weights "cifar_resnet2O\.c10j", and no such folder\. Did you'):
        package_row("cifar_resnet2O.c10j", REPO)


# Saved networks


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cifar_resnet20", {"widths": WIDTHS}),
        ("cifar_resnet20", {"in_chans": 1, "num_classes": 7}),
        ("test_resnet", {"num_classes": 7}),
    ],
)
def test_a_saved_network(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    model = saved(tmp_path / "net", name, **options)
    (tmp_path / "net" / "pytorch_model.bin").write_bytes(b"a pickle")
    (tmp_path / "net" / "notes.md").write_text("mine")
    package = package_folder(tmp_path / "net", REPO, licence="mit")
    assert set(package.files) == {"model.safetensors", "config.json", "notes.md", "README.md"}
    assert same(rebuilt(package), model)
    assert (package.metrics, package.row, package.name, package.facts.title) == ({}, None, "net", "net")
    assert config(package)["pretrained_cfg"]["license"] == "mit"
    assert "Nothing was measured" in package.files["README.md"].decode()
    again = package_folder(tmp_path / "net", REPO, licence="mit")
    assert again == package
    with unpacked(package.files) as folder:  # what comes back can be published anew
        assert package_folder(folder, REPO).files == package.files


def test_16_bit_files_stay_as_they_are_and_lose_their_metadata(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    half = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
    save_file(half, path, metadata={"format": "pt", "from": "/home/me"})
    package = package_folder(tmp_path, REPO)
    content = package.files["model.safetensors"]
    assert b"__metadata__" not in content
    assert all(torch.equal(value, half[key]) for key, value in load(content).items())


def test_what_the_config_says_about_its_making(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "config.json"
    about = {
        "base_model": "some_net",
        "method": "hrank",
        "command": "chanzoo prune x",
        "dataset": "c10j",
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), "chanzoo": about}))
    package = package_folder(tmp_path, REPO)
    assert config(package)["chanzoo"] == about
    card = package.files["README.md"].decode()
    for text in ("chanzoo prune x", "- **Method**: hrank", "uoft-cs/cifar10"):
        assert text in card
    other = package_folder(tmp_path, REPO, base_model="timm/resnet50.a1_in1k")
    assert "base_model: timm/resnet50.a1_in1k" in other.files["README.md"].decode()
    assert refusal(tmp_path, dataset="tin")[0].endswith("says that its data set is c10j, not tin.")
    path.write_text(json.dumps({**json.loads(path.read_text()), "chanzoo": {"command": 3}}))
    with pytest.raises(UsageError, match="a chanzoo entry that is no object of texts"):
        package_folder(tmp_path, REPO)


def test_a_licence_has_to_be_named(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    assert package_folder(tmp_path, REPO).facts.licence == "apache-2.0", "the config's"
    del written["pretrained_cfg"]["license"]
    path.write_text(json.dumps(written))
    first, last = refusal(tmp_path)
    assert first == f'"{tmp_path}" names no licence of the weights.'
    assert last == "  Nothing was sent.   Name one: --license apache-2.0"


def test_widths_that_were_not_recorded_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, widths=WIDTHS)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    del written["model_args"]["widths"]
    path.write_text(json.dumps(written))
    with pytest.raises(UsageError) as caught:
        package_folder(tmp_path, REPO, licence="mit")
    assert "do not belong together" in str(caught.value) and "found     bn1.bias [4]" in str(caught.value)


@pytest.mark.parametrize("change", ["extra", "missing", "not finite", "64 bits"])
def test_tensors_that_are_not_the_networks_are_refused(tmp_path: Path, change: str) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    if change == "extra":
        state["more"] = torch.ones(1)
    elif change == "missing":
        del state["conv1.weight"]
    elif change == "not finite":
        state["conv1.weight"][0, 0, 0, 0] = torch.nan
    else:
        state["conv1.weight"] = state["conv1.weight"].double() + 1e-12
    save_file(state, path)
    with pytest.raises(UsageError) as caught:
        package_folder(tmp_path, REPO)
    words = {"not finite": "conv1.weight in", "64 bits": "comes back as another network"}
    assert words.get(change, "do not belong together") in str(caught.value)


def test_what_is_no_network_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, licence="mit")[0] == f'cannot publish "{tmp_path}".'
    saved(tmp_path / "net")
    (tmp_path / "net" / "model.safetensors").write_bytes(b"\x80\x02}.")
    with pytest.raises(WeightsRejectedError, match="is not a safetensors file"):
        package_folder(tmp_path / "net", REPO)


# The output of timm's train script


def test_a_training_run(tmp_path: Path) -> None:
    model = timm.create_model("cifar_resnet20", widths=WIDTHS, num_classes=7, in_chans=1).eval()
    folder = trained(
        tmp_path / "run", model.state_dict(), model_kwargs={"widths": WIDTHS}, in_chans=1, num_classes=7,
        mean=[0.5], std=[0.25], crop_pct=0.9, interpolation="bicubic",
    )  # fmt: skip
    assert refusal(folder)[0] == f'"{folder}" names no licence of the weights.'
    package = package_folder(folder, REPO, licence="mit")
    assert set(package.files) == {
        "model.safetensors",
        "config.json",
        "recipe.yaml",
        "summary.csv",
        "README.md",
    }
    assert same(rebuilt(package), model)
    cfg = config(package)["pretrained_cfg"]
    assert (cfg["input_size"], cfg["mean"], cfg["std"]) == ([1, 32, 32], [0.5], [0.25])
    assert (cfg["crop_pct"], cfg["interpolation"]) == (0.9, "bicubic")
    assert "label_names" not in cfg and "tag" not in cfg, "those of the start are not those of the end"
    assert b"/home/me" not in b"".join(package.files.values())
    assert yaml.safe_load(package.files["recipe.yaml"])["lr"] == 0.1
    card = package.files["README.md"].decode()
    assert "--config recipe.yaml --data-dir DATA" in card and "- **Seed**: 5" in card
    assert "The weights of the run's last epoch, number 2 counted from 0." in card


def test_averaged_weights_come_first_and_the_best_before_the_last(tmp_path: Path) -> None:
    last, ema = (timm.create_model("cifar_resnet20", num_classes=7) for _ in range(2))
    folder = trained(
        tmp_path / "run", last.state_dict(), {f"module.{k}": v for k, v in ema.state_dict().items()}
    )
    package = package_folder(folder, REPO, licence="mit")
    assert same(rebuilt(package), ema), "and the number of classes is the state's"
    assert "The averaged (EMA) weights of the run's last epoch" in package.files["README.md"].decode()
    torch.save({"epoch": 1, "state_dict": last.state_dict()}, folder / "model_best.pth.tar")
    assert same(rebuilt(package_folder(folder, REPO, licence="mit")), last)


def test_labels_of_a_named_data_set(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", timm.create_model("cifar_resnet20").state_dict())
    package = package_folder(folder, REPO, licence="mit", dataset="c10j")
    assert config(package)["label_names"][3] == "cat"
    assert "uoft-cs/cifar10" in package.files["README.md"].decode()


def test_a_fine_tuned_network_names_what_it_was_made_from(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet.r160_in1k", num_classes=7)
    folder = trained(tmp_path / "run", model.state_dict(), model="test_resnet.r160_in1k", pretrained=True)
    card = package_folder(folder, REPO, licence="mit").files["README.md"].decode()
    assert "base_model: timm/test_resnet.r160_in1k\n" in card


def test_a_run_whose_options_do_not_describe_its_tensors(tmp_path: Path) -> None:
    model = timm.create_model("cifar_resnet20", widths=WIDTHS)
    lines = refusal(trained(tmp_path / "run", model.state_dict()), licence="mit")
    assert lines[0].endswith("are not those of the network that its options describe.")
    assert lines[1:3] == ["  expected  bn1.bias [16]", "  found     bn1.bias [4]"]
    assert lines[3].endswith("Changed widths have to be among the network's arguments")


def test_arguments_that_json_has_no_word_for(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet").state_dict()
    day = datetime.date(2026, 1, 1)  # YAML knows it, and any constructor takes it for true
    folder = trained(tmp_path / "run", state, model="test_resnet", model_kwargs={"zero_init_last": day})
    lines = refusal(folder, licence="mit")
    assert lines[0].startswith("the network cannot be written down: Model argument 'zero_init_last'")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "last.pth.tar").unlink(), "has no checkpoint"),
        (lambda f: (f / "last.pth.tar").write_bytes(b"cos\nsystem\n(S'x'\ntR."), "cannot read"),
        (lambda f: (f / "args.yaml").write_text("- 1"), "is no output of timm's train script"),
        (lambda f: (f / "args.yaml").write_text("model: nothing"), "Unknown model (nothing)"),
    ],
)
def test_a_broken_run_is_refused(tmp_path: Path, change, words: str) -> None:
    folder = trained(tmp_path / "run", timm.create_model("cifar_resnet20").state_dict())
    change(folder)
    assert words in refusal(folder, licence="mit")[0]
