"""The card of a repository: valid metadata, whole sections, our numbers apart from published ones."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import timm
from huggingface_hub import ModelCard

import chanzoo
from chanzoo.hub.card import Facts, Listed, Measured, model_card
from chanzoo.hub.families import FAMILIES, family_of
from chanzoo.weights import WEIGHTS
from tests.hub.repos import read_card

FACTS = Facts(
    repo_id="zoo/ce_cifar_resnet20.c10j",
    title="ce_cifar_resnet20.c10j",
    arch="ce_cifar_resnet20",
    is_ours=True,
    params=271_857,
    macs=41_994_880,
    input_size=(3, 32, 32),
    num_classes=10,
    licence="apache-2.0",
    files=(Listed("model.safetensors", 565_896, "a" * 64), Listed("recipe.yaml", 5, "b" * 64)),
    dataset="c10j",
    measured=Measured({"top1": 0.8684, "top5": 0.9948}, "val", 10_000),
    command="python train.py --seed 0",
    seed=0,
    hours=1.78,
    paper="arXiv:2003.00214",
)
SECTIONS = ["Use", "How it was made", "Numbers", "Limits", "Files", "Licence", "Citation"]


def section(card: str, title: str, level: str = "##") -> str:
    return re.split(rf"^{level} ", card.partition(f"\n{level} {title}\n")[2], flags=re.MULTILINE)[0]


def test_the_metadata_is_valid_and_complete() -> None:
    text = model_card(replace(FACTS, base_model="timm/resnet50.a1_in1k"))
    data, errors = read_card(text)
    assert errors == []
    results = data.pop("model-index")
    assert data == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "chanzoo", "channel-equilibrium"],
        "license": "apache-2.0",
        "datasets": ["uoft-cs/cifar10"],
        "base_model": "timm/resnet50.a1_in1k",
        "metrics": ["accuracy"],
    }
    assert [result["name"] for result in results] == ["ce_cifar_resnet20.c10j"]
    [result] = results[0]["results"]
    assert result["dataset"] == {"name": "CIFAR-10, re-encoded as JPEG", "type": "c10j", "split": "val"}
    assert [(m["name"], m["value"]) for m in result["metrics"]] == [
        ("top-1 accuracy", 0.8684),
        ("top-5 accuracy", 0.9948),
    ]
    assert str(ModelCard(text)) == text


def test_the_sections_stand_in_their_order_and_nothing_changes_from_run_to_run() -> None:
    text = model_card(FACTS)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    assert text == model_card(FACTS) and text.endswith("```\n") and "  \n" not in text
    assert not re.search(r"\b20\d\d-\d\d-\d\d\b", text)


def test_how_to_use_it() -> None:
    use = section(model_card(FACTS), "Use")
    shell, python = re.findall(r"```\w+\n(.*?)```", use, re.DOTALL)
    assert shell == "pip install chanzoo\n"
    assert python.startswith("import chanzoo\nimport timm\n")
    assert 'timm.create_model("hf-hub:zoo/ce_cifar_resnet20.c10j", pretrained=True)' in python
    assert "Without it timm answers `Unknown model (ce_cifar_resnet20)`" in use
    theirs = model_card(replace(FACTS, arch="resnet50", is_ours=False))
    assert "Unknown model" not in theirs and "comes back without chanzoo too" in theirs


def test_our_numbers_and_published_ones_never_meet() -> None:
    text = model_card(replace(FACTS, published="91.25 % (He et al., table 6)"))
    ours, theirs = section(text, "Ours", "###"), section(text, "Published", "###")
    assert "| CIFAR-10, re-encoded as JPEG | val | 10,000 | 86.84 | 99.48 |" in ours
    assert "91.25" not in ours and "78.2" not in ours
    assert "91.25 % (He et al., table 6)" in theirs
    assert "| CE-ResNet-50 | ImageNet-1k | 78.2 | authors' repository, released file |" in theirs
    assert "86.84" not in theirs
    assert "No figure is published" in model_card(replace(FACTS, arch="cifar_resnet20"))


def test_without_a_measurement_it_says_so() -> None:
    text = model_card(replace(FACTS, measured=None))
    data, errors = read_card(text)
    assert errors == [] and "model-index" not in data and "metrics" not in data
    assert "Nothing was measured: there is no accuracy to report." in section(text, "Ours", "###")


def test_how_it_was_made() -> None:
    made = section(
        model_card(replace(FACTS, method="hrank", base_model="cifar_resnet20.c10j")), "How it was made"
    )
    for line in (
        "python train.py --seed 0\n",
        "- **Data**: CIFAR-10, re-encoded as JPEG",
        "- **Method**: hrank",
        "- **Made from**: cifar_resnet20.c10j\n",
        "- **Seed**: 0\n- **Time**: 1.78 h",
        "- **Evidence** beside this card: `recipe.yaml`",
    ):
        assert line in made
    plain = replace(FACTS, command="", seed=None, hours=None, base_model="me/net")
    made = section(model_card(plain), "How it was made")
    assert "The command that made it is not recorded." in made and "Seed" not in made
    assert "[me/net](https://huggingface.co/me/net)" in made


def test_files_limits_licence_and_citation() -> None:
    text = model_card(FACTS)
    assert f"| `model.safetensors` | 565,896 | `{'a' * 64}` |" in section(text, "Files")
    assert "JPEG quality 75 with chroma subsampling" in section(text, "Limits")
    assert "- **Weights**: apache-2.0\n" in section(text, "Licence")
    assert "https://huggingface.co/datasets/uoft-cs/cifar10" in section(text, "Licence")
    assert "@inproceedings{shao2020channel," in section(text, "Citation")
    unknown = model_card(replace(FACTS, arch="resnet50", is_ours=False, dataset=""))
    assert "arXiv:2003.00214" in section(unknown, "Citation")
    assert "the publisher's own images" in section(unknown, "Licence")
    assert read_card(unknown)[1] == [] and "datasets" not in read_card(unknown)[0]


def test_a_data_set_by_its_name_on_the_hub() -> None:
    data, errors = read_card(model_card(replace(FACTS, dataset="me/birds")))
    assert (errors, data["datasets"]) == ([], ["me/birds"])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.tag)
def test_families(family) -> None:
    assert all(timm.is_model(name) for name in (*family.archs, *family.baselines))
    assert all(family_of(name) is family for name in family.archs)
    assert set(family.archs) <= set(chanzoo.list_models()) and not set(family.baselines) & set(family.archs)
    assert family.citation.startswith("@") and family.citation.count("{") == family.citation.count("}")


def test_every_weight_of_ours_has_a_family_and_timms_have_none() -> None:
    ours = {row.arch for row in WEIGHTS.values()} & set(chanzoo.list_models())
    assert [name for name in ours if not family_of(name)] == []
    assert family_of("resnet50") is None and family_of("nothing") is None
