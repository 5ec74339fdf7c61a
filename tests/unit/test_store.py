"""What the store promises: the published bytes or a clear refusal, never something else, never in silence."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models import PretrainedCfg, _registry
from torch import Tensor

from chanzoo import store
from chanzoo.errors import ChanzooError, HubError, NoWeightsError, UsageError, WeightsRejectedError
from chanzoo.models._build import arch_cfgs, cifar_cfg
from chanzoo.weights import WEIGHTS, Weight, load_rows, save_rows, weights_of

ARCH = "cifar_resnet20"
NAME = f"{ARCH}.t9_c10j"


def create(name: str, **kwargs: Any) -> Any:
    """A network, of which the type checker need not know the attributes."""
    return timm.create_model(name, **kwargs)


def make_file(path: Path, arch: str = ARCH, seed: int = 1, **kwargs: Any) -> dict[str, Tensor]:
    """Write the 16-bit weights of a random network, as a filed run would be; returns them in 32 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = create(arch, **kwargs).state_dict()
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    save_file(half, path, metadata={"format": "pt"})
    return {key: value.float() if value.is_floating_point() else value for key, value in half.items()}


def make_row(path: Path, **changes: Any) -> Weight:
    data = path.read_bytes()
    row = Weight(
        name=NAME, dataset="c10j", recipe="c10j_pad4_40e", command="none", seed=0, hours=0.0, metrics={},
        params=0, macs=0, file_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(),
        licence="apache-2.0", paper="arXiv:1512.03385",
    )  # fmt: skip
    return replace(row, **changes)


class Zoo(NamedTuple):
    row: Weight
    file: Path
    state: dict[str, Tensor]
    embedded: Path


def publish(monkeypatch: pytest.MonkeyPatch, row: Weight) -> None:
    """Make a row known to our table and its tag known to timm, for one test."""
    monkeypatch.setitem(WEIGHTS, row.name, row)
    values: Any = arch_cfgs([ARCH], cifar_cfg(), stride=4)[row.name]
    cfg = PretrainedCfg(**{**values, "architecture": row.arch, "tag": row.tag})
    monkeypatch.setitem(_registry._model_pretrained_cfgs, row.name, cfg)


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Zoo:
    """One weight, whose file lies in $CHANZOO_WEIGHTS; nothing is embedded and no other weight exists."""
    for name in list(WEIGHTS):
        monkeypatch.delitem(WEIGHTS, name)
    monkeypatch.setattr(store, "_PACKAGE", tmp_path / "site" / "chanzoo")
    monkeypatch.setattr(store, "_CHECKOUT", tmp_path / "site" / "weights")
    monkeypatch.setenv("CHANZOO_WEIGHTS", str(tmp_path / "store"))
    file = tmp_path / "store" / f"{NAME}.safetensors"
    state = make_file(file)
    row = make_row(file)
    publish(monkeypatch, row)
    return Zoo(row, file, state, tmp_path / "site" / "chanzoo" / "embedded" / NAME / "model.safetensors")


def assert_holds(model: torch.nn.Module, state: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    own = model.state_dict()
    for key, value in state.items():
        if not key.startswith(but or ("\0",)):
            torch.testing.assert_close(own[key], value, rtol=0, atol=0)


def refusal(file: Path, row: Weight, found: str) -> str:
    return (
        f"{file} is not the published file of {row.name}\n"
        f"  expected  sha256 {row.sha256}, {row.file_bytes:,} bytes\n"
        f"  found     {found}\n"
        "  It was not opened, and no network was built."
    )


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def describe(path: Path) -> str:
    data = path.read_bytes()
    return f"sha256 {hashlib.sha256(data).hexdigest()}, {len(data):,} bytes"


# The published file loads


@pytest.mark.parametrize("name", [NAME, ARCH])
def test_the_published_weights_are_loaded(zoo: Zoo, name: str) -> None:
    model = create(name, pretrained=True)
    assert_holds(model, zoo.state)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.pretrained_cfg["tag"] == "t9_c10j"
    assert model.pretrained_cfg["label_names"][3] == "cat"
    assert "state_dict" not in model.pretrained_cfg


def test_a_new_head_keeps_the_body(zoo: Zoo) -> None:
    model = create(NAME, pretrained=True, num_classes=5)
    assert_holds(model, zoo.state, but=("fc.",))
    assert model.fc.weight.shape == (5, 64)


def test_no_head_keeps_the_body(zoo: Zoo) -> None:
    assert_holds(create(NAME, pretrained=True, num_classes=0), zoo.state, but=("fc.",))


def test_one_channel_sums_the_first_filters(zoo: Zoo) -> None:
    model = create(NAME, pretrained=True, in_chans=1)
    assert_holds(model, zoo.state, but=("conv1.",))
    summed = zoo.state["conv1.weight"].float().sum(1, keepdim=True)
    torch.testing.assert_close(model.conv1.weight.data, summed)


def test_features_come_from_the_published_weights(zoo: Zoo) -> None:
    image = torch.randn(2, 3, 32, 32)
    features = create(NAME, pretrained=True, features_only=True).eval()
    whole = create(NAME, pretrained=True).eval()
    with torch.no_grad():
        expected = whole.forward_intermediates(image, intermediates_only=True)
        for ours, theirs in zip(features(image), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for holder in (features, getattr(features, "model", None)):
        assert "state_dict" not in (getattr(holder, "pretrained_cfg", None) or {})


def test_a_rows_arguments_build_the_network_that_fits_its_file(
    monkeypatch: pytest.MonkeyPatch, zoo: Zoo
) -> None:
    widths = [8, 16, 24, 40, *[6] * 9]
    state = make_file(zoo.file, widths=widths)
    publish(monkeypatch, make_row(zoo.file, model_args={"widths": widths}))
    assert_holds(create(NAME, pretrained=True), state)
    assert create(NAME).fc.in_features == 40
    with pytest.raises(RuntimeError, match="size mismatch"):
        create(NAME, pretrained=True, widths=[8, 16, 24, 41, *widths[4:]])


# Anything else is refused


@pytest.mark.parametrize(
    "damage",
    [
        "one flipped bit",
        "cut in half",
        "empty",
        "another network",
        "same network, other weights",
        "a pickle",
        "a pointer",
    ],
)
def test_a_file_that_is_not_the_published_one_is_refused(zoo: Zoo, damage: str) -> None:
    data = zoo.file.read_bytes()
    if damage == "one flipped bit":
        flip(zoo.file, 8 * (len(data) // 2) + 3)
    elif damage == "cut in half":
        zoo.file.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        zoo.file.write_bytes(b"")
    elif damage == "another network":
        make_file(zoo.file, arch="cifar_resnet32")
    elif damage == "same network, other weights":
        make_file(zoo.file, seed=2)
        assert zoo.file.stat().st_size == zoo.row.file_bytes
    elif damage == "a pickle":
        zoo.file.write_bytes(pickle.dumps(Detonator()))
    else:
        zoo.file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(WeightsRejectedError) as caught:
        create(NAME, pretrained=True)
    assert str(caught.value).startswith(refusal(zoo.file, zoo.row, describe(zoo.file)))
    assert "Restore it, or remove it to use another source." in str(caught.value)
    assert (caught.value.path, caught.value.found) == (str(zoo.file), describe(zoo.file))
    assert caught.value.exit_code == 3


class Detonator:
    """Fails the test if it is ever unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return _detonate, ("unpickled",)


def _detonate(text: str) -> None:
    raise AssertionError(text)


def test_an_unreadable_file_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(WeightsRejectedError) as caught:
        store.load_tensors(zoo.row, tmp_path)
    assert str(caught.value).startswith(refusal(tmp_path, zoo.row, "unreadable: Is a directory"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_refused(zoo: Zoo) -> None:
    zoo.file.chmod(0)
    with pytest.raises(WeightsRejectedError, match="found     unreadable: Permission denied"):
        create(NAME, pretrained=True)


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Weight, bytes, Path]:
    file = tmp_path_factory.mktemp("genuine") / "model.safetensors"
    make_file(file)
    return make_row(file), file.read_bytes(), file.with_name("damaged.safetensors")


@given(data=st.data())
def test_any_flipped_bit_is_refused(genuine: tuple[Weight, bytes, Path], data: st.DataObject) -> None:
    row, content, path = genuine
    path.write_bytes(content)
    flip(path, data.draw(st.integers(0, 8 * len(content) - 1)))
    with pytest.raises(WeightsRejectedError, match="is not the published file"):
        store.load_tensors(row, path)


@given(data=st.data())
def test_any_cut_is_refused(genuine: tuple[Weight, bytes, Path], data: st.DataObject) -> None:
    row, content, path = genuine
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(WeightsRejectedError, match="is not the published file"):
        store.load_tensors(row, path)


@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_safetensors_file_are_refused(data: bytes) -> None:
    with pytest.raises(WeightsRejectedError, match=r"own\.safetensors is not a safetensors file: "):
        store.parse_tensors(data, Path("own.safetensors"))


# Missing files


def test_a_file_that_is_nowhere(zoo: Zoo) -> None:
    zoo.file.unlink()
    with pytest.raises(NoWeightsError) as caught:
        create(NAME, pretrained=True)
    assert str(caught.value).splitlines() == [
        f"the file of {NAME} is not on this machine, and it is not published on the Hub.",
        f"  tried  {zoo.embedded}",
        f"  tried  $CHANZOO_WEIGHTS = {zoo.file.parent}",
        f"  No network was built.   Put {NAME}.safetensors into a folder and name it: CHANZOO_WEIGHTS=FOLDER",
    ]


@pytest.mark.parametrize("kind", ["a folder", "a dangling link"])
def test_what_is_no_file_counts_as_missing(monkeypatch: pytest.MonkeyPatch, zoo: Zoo, kind: str) -> None:
    zoo.file.unlink()
    if kind == "a folder":
        zoo.file.mkdir()
    else:
        zoo.file.symlink_to(zoo.file.with_name("gone"))
    with pytest.raises(NoWeightsError, match="is not on this machine"):
        create(NAME, pretrained=True)
    monkeypatch.delenv("CHANZOO_WEIGHTS")
    with pytest.raises(NoWeightsError, match=r"\$CHANZOO_WEIGHTS = \(not set\)"):
        create(NAME, pretrained=True)


def test_a_published_file_while_offline(monkeypatch: pytest.MonkeyPatch, zoo: Zoo, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it was read from the environment
    zoo.file.unlink()
    publish(monkeypatch, replace(zoo.row, hub_repo="nobody/nothing", revision="5b2e9d1" + "0" * 33))
    with pytest.raises(HubError) as caught:
        create(NAME, pretrained=True, cache_dir=tmp_path)
    assert str(caught.value).splitlines() == [
        f"cannot get the weights of {NAME}: HF_HUB_OFFLINE is set and it is not in the cache.",
        "  tried  this machine, then nobody/nothing at 5b2e9d1",
        f"  No network was built.   Try again: chanzoo pull {NAME}   Or put {NAME}.safetensors into a folder "
        "and name it: CHANZOO_WEIGHTS=FOLDER",
    ]
    assert caught.value.exit_code == 4


@pytest.mark.slow  # the client tries again for some 20 seconds
def test_a_published_file_while_the_hub_is_unreachable(zoo: Zoo) -> None:
    code = (
        "from chanzoo import store, weights\n"
        f"row = weights.Weight({NAME!r}, 'c10j', '', '', 0, 0, {{}}, 0, 0, 0, '', '', '',\n"
        "    hub_repo='nobody/nothing', revision='0' * 40)\n"
        "try:\n    store.locate(row)\nexcept store.HubError as error:\n    print(error)\n"
    )
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "CHANZOO_WEIGHTS": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=200)
    assert done.stdout.startswith(f"cannot get the weights of {NAME}: the Hub cannot be reached ("), (
        done.stderr
    )


def test_a_config_that_timm_looked_up_beforehand_is_checked_too(zoo: Zoo) -> None:
    """timm's newer scripts resolve the config first and hand it over as a dictionary."""
    found = timm.get_pretrained_cfg(NAME)
    assert found
    cfg = found.to_dict()
    assert cfg["file"] == str(zoo.file)
    assert_holds(create(ARCH, pretrained=True, pretrained_cfg=cfg), zoo.state)
    flip(zoo.file, 12345)
    with pytest.raises(WeightsRejectedError) as caught:
        create(ARCH, pretrained=True, pretrained_cfg=cfg)
    assert str(caught.value).startswith(refusal(zoo.file, zoo.row, describe(zoo.file)))


# Order of sources


def test_the_embedded_file_comes_first(zoo: Zoo) -> None:
    zoo.embedded.parent.mkdir(parents=True)
    shutil.copy(zoo.file, zoo.embedded)
    zoo.file.write_bytes(b"never read")
    assert store.locate(zoo.row) == zoo.embedded
    assert_holds(create(NAME, pretrained=True), zoo.state)


def test_a_damaged_embedded_file_is_not_passed_over(zoo: Zoo) -> None:
    zoo.embedded.parent.mkdir(parents=True)
    zoo.embedded.write_bytes(b"damaged")
    with pytest.raises(WeightsRejectedError) as caught:
        create(NAME, pretrained=True)
    assert str(caught.value).startswith(refusal(zoo.embedded, zoo.row, describe(zoo.embedded)))


def test_a_checkout_reads_its_weights_folder(zoo: Zoo) -> None:
    site = zoo.embedded.parents[3]
    (site / "weights").mkdir(parents=True)
    (site / "pyproject.toml").write_text("")
    assert store.embedded_path(NAME) == site / "weights" / NAME / "model.safetensors"


def test_the_users_folder_may_hold_a_folder_per_weight(zoo: Zoo) -> None:
    inner = zoo.file.parent / NAME / "model.safetensors"
    inner.parent.mkdir()
    zoo.file.rename(inner)
    assert store.locate(zoo.row) == inner


# Names without weights


def test_an_unknown_tag_names_what_exists(zoo: Zoo) -> None:
    with pytest.raises(NoWeightsError) as caught:
        store.row_for(ARCH, "t8_c10j")
    assert str(caught.value).splitlines() == [
        f'no pretrained weights exist for "{ARCH}.t8_c10j".',
        f"  {ARCH} has: {NAME}",
        "  No network was built.   See all: chanzoo ls   Random weights: pretrained=False",
    ]


def test_an_unknown_tag_never_builds_a_network(zoo: Zoo) -> None:
    with pytest.raises(RuntimeError, match="t8_c10j"):
        create(f"{ARCH}.t8_c10j", pretrained=True)


def test_a_network_without_weights_names_those_that_have_some(zoo: Zoo) -> None:
    with pytest.raises(NoWeightsError) as caught:
        create("cifar_resnet44", pretrained=True)
    assert str(caught.value).startswith('no pretrained weights exist for "cifar_resnet44".\n')
    assert f"  weights exist for: {ARCH}\n" in str(caught.value)
    assert isinstance(caught.value, ChanzooError) and caught.value.exit_code == 1


def test_no_weights_at_all(monkeypatch: pytest.MonkeyPatch, zoo: Zoo) -> None:
    monkeypatch.delitem(WEIGHTS, NAME)
    with pytest.raises(NoWeightsError, match="no weights exist yet"):
        create(ARCH, pretrained=True)


# An explicit file


def test_an_explicit_file_stands_in_for_the_rows(zoo: Zoo, tmp_path: Path) -> None:
    file = zoo.file.rename(tmp_path / "copy.safetensors")
    model = create(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    assert_holds(model, zoo.state)
    assert "state_dict" not in model.pretrained_cfg


def test_an_explicit_file_comes_before_the_others_and_is_checked(zoo: Zoo, tmp_path: Path) -> None:
    file = tmp_path / "copy.safetensors"
    shutil.copy(zoo.file, file)
    flip(file, 12345)
    with pytest.raises(WeightsRejectedError) as caught:
        create(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    assert str(caught.value).startswith(refusal(file, zoo.row, describe(file)))


@pytest.mark.parametrize("overlay", [{}, {"num_classes": -1}])
def test_an_explicit_file_that_does_not_exist(zoo: Zoo, tmp_path: Path, overlay: dict[str, Any]) -> None:
    overlay = dict(file=str(tmp_path / "gone.safetensors"), **overlay)
    with pytest.raises(UsageError) as caught:
        create(ARCH, pretrained=True, pretrained_cfg_overlay=overlay)
    assert str(caught.value) == f'no weight file "{overlay["file"]}" for {ARCH}.\n  No network was built.'
    assert caught.value.exit_code == 2


def test_the_users_own_file_has_no_published_hash(zoo: Zoo, tmp_path: Path) -> None:
    own = make_file(tmp_path / "own.safetensors", seed=5, num_classes=7)
    overlay = dict(file=str(tmp_path / "own.safetensors"), num_classes=-1)
    model = create(ARCH, pretrained=True, pretrained_cfg_overlay=overlay)
    assert_holds(model, own, but=("fc.",))
    assert model.fc.weight.shape == (10, 64)


def test_the_users_own_checkpoint_of_the_train_script(zoo: Zoo, tmp_path: Path) -> None:
    own = make_file(tmp_path / "own.safetensors", seed=5)
    torch.save({"state_dict": own}, tmp_path / "last.pth.tar")
    overlay = dict(file=str(tmp_path / "last.pth.tar"), num_classes=-1)
    model = create(ARCH, pretrained=True, pretrained_cfg_overlay=overlay)
    assert_holds(model, own, but=("fc.",))


def test_a_pickle_in_the_users_own_safetensors_file_is_never_opened(zoo: Zoo, tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    file.write_bytes(pickle.dumps(Detonator()))
    with pytest.raises(WeightsRejectedError) as caught:
        create(ARCH, pretrained=True, pretrained_cfg_overlay=dict(file=str(file), num_classes=-1))
    assert str(caught.value).startswith(f"{file} is not a safetensors file: ")
    assert "other formats are never opened" in str(caught.value)


def test_a_pickle_in_the_users_own_checkpoint_runs_nothing(zoo: Zoo, tmp_path: Path) -> None:
    torch.save({"state_dict": Detonator()}, tmp_path / "last.pth.tar")
    overlay = dict(file=str(tmp_path / "last.pth.tar"), num_classes=-1)
    with pytest.raises(RuntimeError, match=r"blocked loading.*_detonate"):
        create(ARCH, pretrained=True, pretrained_cfg_overlay=overlay)


# The table


def test_rows_survive_the_table(zoo: Zoo, tmp_path: Path) -> None:
    full = replace(
        zoo.row, name=f"{ARCH}.c10j", metrics={"top1": 0.5}, model_args={"widths": [1, 2]}, published="–"
    )
    rows = {full.name: full, zoo.row.name: zoo.row}
    save_rows(rows, tmp_path / "weights.json")
    assert load_rows(tmp_path / "weights.json") == rows
    assert [path.name for path in tmp_path.glob("weights*")] == ["weights.json"]


def test_a_misspelt_field_is_named_with_its_row(zoo: Zoo, tmp_path: Path) -> None:
    table = tmp_path / "weights.json"
    save_rows({NAME: zoo.row}, table)
    table.write_text(table.read_text().replace('"licence"', '"license"'))
    with pytest.raises(ValueError, match=rf"^weights\.json: row '{NAME}': .*'license'"):
        load_rows(table)


def test_the_plain_tag_is_the_default(monkeypatch: pytest.MonkeyPatch, zoo: Zoo) -> None:
    for tag in ("a0_c10j", "c10j"):
        monkeypatch.setitem(WEIGHTS, f"{ARCH}.{tag}", replace(zoo.row, name=f"{ARCH}.{tag}"))
    assert [row.tag for row in weights_of(ARCH)] == ["c10j", "a0_c10j", "t9_c10j"]
    assert store.row_for(ARCH, None).tag == "c10j"
