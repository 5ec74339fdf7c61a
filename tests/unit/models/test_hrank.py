"""The networks of the HRank papers: published sizes, other arguments, and the way through a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

import chanzoo
from chanzoo.errors import UsageError
from chanzoo.models.hrank import HRANK_NAMES, keep_count, read_rates, widths_of_rates

# Parameters and multiply-adds of the authors' slim networks, counted from their code.
PUBLISHED = (
    ("vgg16_bn", "[0.]*12", 14_991_946, "313.46M"),
    ("vgg16_bn", "[0.21]*7+[0.75]*5", 2_766_541, "130.57M"),
    ("vgg16_bn", "[0.3]*7+[0.75]*5", 2_505_793, "104.24M"),
    ("vgg16_bn", "[0.45]*7+[0.78]*5", 1_901_836, "66.52M"),
    ("resnet56", "[0.]*30", 853_018, "125.49M"),
    ("resnet56", "[0.]+[0.18]*29", 660_157, "89.46M"),
    ("resnet56", "[0.]+[0.15]*2+[0.4]*27", 485_413, "65.17M"),
    ("resnet56", "[0.]+[0.4]*2+[0.5]*9+[0.6]*9+[0.7]*9", 240_793, "34.20M"),
    ("resnet110", "[0.]*57", 1_727_962, "252.89M"),
    ("resnet110", "[0.]+[0.2]*2+[0.3]*18+[0.35]*36", 1_045_951, "139.01M"),
    ("resnet110", "[0.]+[0.25]*2+[0.4]*18+[0.55]*36", 719_746, "100.60M"),
    ("resnet110", "[0.]+[0.4]*2+[0.5]*18+[0.65]*36", 543_742, "70.55M"),
    ("googlenet", "[0.]*10", 6_166_250, "1521.76M"),
    ("googlenet", "[0.3]+[0.6]*2+[0.7]*5+[0.8]*2", 2_857_760, "643.80M"),
    ("googlenet", "[0.]+[0.85]*2+[0.9]*7", 2_099_266, "390.80M"),
    ("densenet40", "[0.]*39", 1_059_298, "282.92M"),
    ("densenet40", "[0.]+[0.2]*12+[0.]+[0.2]*12+[0.]+[0.2]*12", 622_924, "169.58M"),
    ("densenet40", "[0.]+[0.3]*12+[0.1]+[0.3]*12+[0.1]+[0.3]*12", 451_882, "129.83M"),
    ("densenet40", "[0.]+[0.35]*12+[0.]+[0.35]*12+[0.]+[0.35]*12", 395_908, "109.94M"),
    ("densenet40", "[0.]+[0.4]*12+[0.2]+[0.5]*12+[0.3]+[0.6]*12", 218_664, "86.40M"),
    ("resnet50", "[0.]*20", 25_557_032, "4.089G"),
    ("resnet50", "[0.]+[0.1]*3+[0.35]*16", 15_091_575, "2.240G"),
    ("resnet50", "[0.]+[0.25]*3+[0.5]*16", 11_047_336, "1.507G"),
    ("resnet50", "[0.]+[0.5]*3+[0.6]*16", 8_017_755, "0.943G"),
    ("resnet50", "[0.1]+[0.2]*3+[0.5]*16", 11_302_636, "1.549G"),
    ("mobilenetv1", "[0.]*13", 4_231_976, "568.7M"),
    ("mobilenetv1", "[0.]+[0.3]*12", 2_828_731, "304.1M"),
    ("mobilenetv2", "[0.]*8", 3_504_872, "300.8M"),
    ("mobilenetv2", "[0.]+[0.3]*7", 2_472_492, "160.8M"),
)
CIFAR = {"vgg16_bn", "resnet56", "resnet110", "googlenet", "densenet40"}
SMALL = {
    "hrank_cifar_vgg16_bn": "[0.5]*12",
    "hrank_cifar_resnet56": "[0.]+[0.4]*29",
    "hrank_cifar_densenet40": "[0.]+[0.4]*38",
    "hrank_cifar_googlenet": "[0.]+[0.8]*9",
    "hrank_resnet50": "[0.]+[0.5]*19",
    "hrank_mobilenetv1": "[0.]+[0.5]*12",
    "hrank_mobilenetv2": "[0.]+[0.3]*7",
}


def name_of(short: str) -> str:
    return f"hrank_cifar_{short}" if short in CIFAR else f"hrank_{short}"


@pytest.mark.parametrize(("short", "rates", "params", "macs"), PUBLISHED)
def test_published_sizes(short: str, rates: str, params: int, macs: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name_of(short), compress_rate=rates)
    assert chanzoo.count_params(model) == params
    size = model.pretrained_cfg["input_size"]  # pyright: ignore
    unit = {"M": 1e6, "G": 1e9}[macs[-1]]
    digits = len(macs[:-1].partition(".")[2])
    assert f"{chanzoo.count_macs(model, size) / unit:.{digits}f}" == macs[:-1]


@pytest.mark.parametrize("name", SMALL)
def test_through_a_folder_bit_by_bit(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, compress_rate=SMALL[name], num_classes=7, in_chans=1).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    size = model.pretrained_cfg["input_size"][-1]  # pyright: ignore
    x = torch.randn(2, 1, min(size, 64), min(size, 64))
    assert torch.equal(model(x), again(x)) and again.num_classes == 7
    features: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    assert features.feature_info.channels() == [maps.shape[1] for maps in features(x)]
    again.reset_classifier(3)
    assert again(x).shape == (2, 3)


def test_args_that_timm_records_are_short(tmp_path: Path) -> None:
    model = timm.create_model("hrank_cifar_resnet56", widths={"layer1.0.conv1": 9, "layer3.8.conv1": 40})
    assert model.get_submodule("layer1.0.conv2").in_channels == 9
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["widths"] == {"layer1.0.conv1": 9, "layer3.8.conv1": 40}


def test_widths_in_every_form_are_the_same_network(tmp_path: Path) -> None:
    rates = "[0.]+[0.25]*2+[0.5]*27"
    table = widths_of_rates("hrank_cifar_resnet56", rates)
    path = tmp_path / "widths.json"
    path.write_text(json.dumps({"format": 1, "base": "cifar_resnet56", "widths": table}))
    shapes = []
    for options in (
        {"compress_rate": rates},
        {"compress_rate": [0.0, 0.25, 0.25, *[0.5] * 27]},
        {"widths": table},
        {"widths": path},
        {"widths": {name: sizes[0] for name, sizes in table.items() if "conv" in name}},
    ):
        model = timm.create_model("hrank_cifar_resnet56", **options)  # pyright: ignore
        shapes.append({key: value.shape for key, value in model.state_dict().items()})
    assert all(shape == shapes[0] for shape in shapes[1:])


def test_without_rates_a_network_is_its_base() -> None:
    for base, name in HRANK_NAMES.items():
        with torch.device("meta"):
            ours, theirs = timm.create_model(name).state_dict(), timm.create_model(base).state_dict()
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_rates_as_the_train_script_passes_them() -> None:
    from argparse import ArgumentParser

    from timm.utils import ParseKwargs

    parser = ArgumentParser()
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    given = parser.parse_args(["--model-kwargs", "compress_rate=[0.]+[0.18]*29"]).model_kwargs
    assert chanzoo.count_params(timm.create_model("hrank_cifar_resnet56", **given)) == 660_157


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0.]+[0.1]*3", [0.0, 0.1, 0.1, 0.1]),
        (" [0.5] * 2 + [0.25] ", [0.5, 0.5, 0.25]),
        ([0, 0.5], [0.0, 0.5]),
    ],
)
def test_rates_are_read(text: Any, expected: list[float]) -> None:
    assert read_rates(text) == expected


@pytest.mark.parametrize(
    ("channels", "rate", "plus", "v1"),
    [(16, 0.18, 13, 14), (320, 0.9, 31, 32), (160, 0.8, 31, 32), (320, 0.8, 63, 64), (64, 0.0, 64, 64)],
)
def test_counting_keeps_the_errors_of_floats(channels: int, rate: float, plus: int, v1: int) -> None:
    assert keep_count(channels, rate) == plus and keep_count(channels, rate, "v1") == v1


@pytest.mark.parametrize(
    ("name", "rates", "message"),
    [
        ("hrank_cifar_vgg16_bn", "[0.5]*11", "11 rates: hrank_cifar_vgg16_bn takes 12"),
        ("hrank_cifar_vgg16_bn", "[0.5]*13", "13 rates: hrank_cifar_vgg16_bn takes 12"),
        ("hrank_cifar_resnet56", "[0.]*29", "29 rates: hrank_cifar_resnet56 takes 30 or more"),
        ("hrank_cifar_resnet56", "[0.1]*30", "rate 0 is 0.1: expected 0, as the stem"),
        ("hrank_resnet50", "[0.]+[1.0]*19", "rate 1 is 1.0"),
        ("hrank_resnet50", [0.0, -0.5], "rate 1 is -0.5"),
        ("hrank_resnet50", [True] * 20, "rate 0 is True"),
        ("hrank_resnet50", "[0.5]*", "cannot read"),
        ("hrank_resnet50", "0.5", "cannot read '0.5'"),
        ("hrank_resnet50", "[[0.5]*2]*3", "cannot read"),
        ("hrank_resnet50", 0.5, "expected a list of numbers or a text"),
        ("hrank_cifar_densenet40", "[0.]+[0.95]*38", 'layer "stage1.1.conv" would be empty'),
    ],
)
def test_bad_rates(name: str, rates: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        timm.create_model(name, compress_rate=rates)
    assert message in str(caught.value) and "No network was built." in str(caught.value)


def test_longer_lists_are_taken_where_the_authors_take_them() -> None:
    model = timm.create_model("hrank_cifar_resnet56", compress_rate="[0.]+[0.18]*40")
    assert chanzoo.count_params(model) == 660_157


def test_both_ways_at_once() -> None:
    with pytest.raises(UsageError, match="both widths and compress_rate"):
        timm.create_model("hrank_resnet50", compress_rate="[0.]*20", widths={"conv1": 32})


def test_residual_streams_that_do_not_fit_name_the_layer() -> None:
    with pytest.raises(UsageError, match=r"layer \"layer1"):
        timm.create_model("hrank_resnet50", widths={"layer1.0.conv3": 100})
