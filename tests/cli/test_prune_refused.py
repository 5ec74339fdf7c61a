"""``chanzoo prune``: what is refused, in which words, and that nothing is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
L1 = ("prune", "cifar_resnet20", "--weights", "none", "--method", "l1", "--no-plots")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--macs", "0.001x"), "cannot reach"),
        (("--macs", "1.5x"), "expected a share such as 0.5x"),
        (("--macs", "half"), "expected a share such as 0.5x"),
        (("--macs", "0.5"), "expected a share such as 0.5x"),
        (("--params", "10ms"), "expected a share such as 0.5x"),
        (("--latency", "2.0G"), "or an amount such as 1.5us, 1.5ms, 1.5s"),
        (("--rates", "1.0"), "at least 0 and below 1"),
        (("--rates", "-0.1"), "expected"),
        (("--rates", "[0.5]*3"), "3 rates: expected 9"),
        (("--rates", "[0.5"), "cannot read"),
        (("--rates", "0.99"), "leaves none of 16"),
        (("--rates", "[1.0]*9"), "--rates: rate 0 is 1.0: expected a fraction"),
        (("--rates", "rates.json"), "--rates rates.json: there is no file of this name, and it is no rate"),
        (("--rates", ""), "--rates '': there is no file of this name"),
        (("--compress-rate", "[0.]*30"), "--compress-rate: no such lists are known for cifar_resnet20"),
        (("--macs", ""), "--macs '': expected a share such as 0.5x"),
        (("--params", ""), "--params '': expected a share such as 0.5x"),
        (("--latency", ""), "--latency '': expected a share such as 0.5x"),
        (("--macs", "1x"), "expected a share such as 0.5x"),
        (("--params", "0.0005k"), "expected a share such as 0.5x"),
        (("--macs", "100G"), "--macs 100G is met already: cifar_resnet20 has 40.55 M"),
        (("--params", "3M"), "--params 3M is met already: cifar_resnet20 has 269.7 k"),
        (("--latency", "100s"), "--latency 100s is met already: cifar_resnet20 has "),
        (("--macs", "0.5x", "--workers", "-1"), "'-1' is not a whole number of 0 or more"),
        (("--macs", "0.5x", "--seed", "-1"), "--seed -1: expected a whole number from 0 to 4294967295"),
        (("--macs", "0.5x", "--seed", "9" * 23), f"--seed {'9' * 23}: expected a whole number from 0"),
        (("--macs", "0.5x", "--device", "meta"), 'no device "meta" here'),
        (("--macs", "0.5x", "--align", "own"), "--align own follows a published list: pass --compress-rate"),
        (("--macs", "0.5x", "--data", "HERE", "--batch-size", "1"), "--batch-size 1: expected 2 or more"),
        (("--macs", "0.5x", "--method", "l2"), 'no method "l2"; there are: hrank, l1, random'),
        (("--macs", "0.5x", "--method", "hrank"), "pass --data DIR"),
        (("--macs", "0.5x", "--data", "nowhere"), 'no image folder "nowhere"'),
        (("--macs", "0.5x", "--data", "HERE"), "holds no images"),
        (("--macs", "0.5x", "--recalibrate", "1"), "expected 2 images or more"),
        (("--macs", "0.5x", "--crop-pct", "2"), "--crop-pct 2.0"),
        (("--macs", "0.5x", "--min-width", "17"), "cannot reach"),
        ((), "one of the arguments"),
    ],
)
def test_bad_input_writes_nothing(cli, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    given = [str(empty) if part == "HERE" else part for part in arguments]
    method = () if "--method" in given else ("--method", "l1")
    done = cli("prune", "cifar_resnet20", "--weights", "none", *method, *given, "-o", out, "--no-plots")
    assert done.code == 2 and message in done.err, done.err
    assert "\nchanzoo: " in f"\n{done.err}" and "Traceback" not in done.err
    assert "Nothing was pruned." in done.err or "See: chanzoo prune --help" in done.err
    assert "No network was built" not in done.err and "compress_rate" not in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_network_without_channels_to_remove_names_the_layer(cli, tmp_path: Path) -> None:
    arguments = (
        "--weights",
        "none",
        "--method",
        "l1",
        "--macs",
        "0.5x",
        "-o",
        tmp_path / "out",
        "--no-plots",
    )
    done = cli("prune", "vit_tiny_patch16_224", *arguments)
    assert done.code == 2 and 'layer "blocks.0.norm1" (LayerNorm)' in done.err, done.err
    assert not (tmp_path / "out").exists()


def test_other_files_are_safe(cli, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    arguments = ("--weights", "none", "--method", "l1", "--macs", "0.5x", "--overwrite", "-o", tmp_path)
    done = cli("prune", "cifar_resnet20", *arguments)
    assert done.code == 2 and "holds what is not ours to replace: thesis.tex" in done.err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ("", "--compress-rate '': cannot read"),
        ("nofile.json", "--compress-rate 'nofile.json': cannot read"),
        ("[0.]*3", "--compress-rate has 3 rates: hrank_cifar_resnet56 takes 30"),
        ("[0.5]*30", "--compress-rate: rate 0 is 0.5: expected 0"),
        ("[0.]+[0.5]*2+[0.]*27", "--align own cuts it as the authors did"),
    ],
)
def test_a_published_list_that_cannot_be_used(cli, tmp_path: Path, rates: str, message: str) -> None:
    options = ("--weights", "none", "--method", "l1", "--no-plots", "-o", tmp_path / "out")
    done = cli("prune", "cifar_resnet56", *options, "--compress-rate", rates)
    assert done.code == 2 and message in done.err, done.err
    assert "Nothing was pruned." in done.err and "compress_rate" not in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["afile/deep", "afile/deep/er", "x" * 250, "/proc/nowhere/x"])
def test_a_place_that_cannot_be_written_is_known_before_any_work(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place.startswith("/proc") and not os.path.isdir("/proc"):
        pytest.skip("there is no /proc here")
    (tmp_path / "afile").write_text("")
    monkeypatch.setattr("chanzoo.cli.prune.build_model", lambda *_: pytest.fail("there was work"))
    done = cli(*L1, "--macs", "0.5x", "-o", tmp_path / place)
    assert done.code == 2 and f'cannot make the folder "{tmp_path / place}"' in done.err, done.err
    assert "expected  a place where folders can be made" in done.err and "Nothing was written." in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["afile"]


@pytest.mark.parametrize("name", ["{}", "local-dir:{}", "local-dir:{}/../s1", "local-dir:{}/"])
def test_the_network_itself_is_never_overwritten(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli(*L1, "--macs", "0.6x", "-o", "s1").code == 0
    before = Path("s1", "model.safetensors").read_bytes()
    again = ("--method", "l1", "--macs", "0.5x", "-o", "s1", "--overwrite", "--no-plots")
    done = cli("prune", name.format("s1"), *again)
    assert done.code == 2 and '"s1" is the network itself: name another folder' in done.err, done.err
    assert Path("s1", "model.safetensors").read_bytes() == before


def test_a_folder_may_have_the_name_of_a_network(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(*L1, "--macs", "0.5x", "-o", "cifar_resnet20")
    assert done.code == 0, done.err


def test_a_narrow_network_without_a_base_is_refused(cli, tmp_path: Path) -> None:
    options = ("--weights", "none", "--method", "l1", "--macs", "0.5x", "--no-plots")
    done = cli("prune", "narrow_cnn", *options, "-o", tmp_path / "out")
    assert done.code == 2 and "expected  the full network, such as resnet18" in done.err, done.err
    assert "Nothing was pruned." in done.err and not list(tmp_path.iterdir())


def test_words_about_ranks_that_tell_nothing_are_the_commands_own(
    cli, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes of the library's warning: a remark, and what to do about it."""
    for place in ("chanzoo.compress.rank", "chanzoo.compress.scores"):
        monkeypatch.setattr(f"{place}.saturated", lambda table: [table.sites[0].name])
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        (tmp_path / "data" / split).symlink_to(images / "val")
    options = ("--weights", "none", "--macs", "0.5x", "--images", "4", "--recalibrate", "0", "--no-plots")
    done = cli("prune", "cifar_resnet20", *options, "--data", tmp_path / "data", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.err.startswith("chanzoo: ranks hardly tell filters apart at 1 of "), done.err
    assert "Compare --method l1, or rank more: --images N" in done.err
