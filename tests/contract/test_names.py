"""Our names and timm's never meet, and every name of ours has what timm's listings and tests need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import chanzoo
from chanzoo.weights import WEIGHTS

MODELS = Path(chanzoo.__file__).parent / "models"
MODULES = sorted(path.stem for path in MODELS.glob("*.py") if not path.stem.startswith("_"))
NAMES = chanzoo.list_models()

# timm before it has seen us: which of our names it builds (deprecated ones too), and its modules.
PROBE = """
import json, pkgutil, sys, timm, timm.models
ours = json.loads(sys.argv[1])
taken = [name for name in ours if timm.is_model(name)]
modules = [m.name for m in pkgutil.iter_modules(timm.models.__path__)]
assert "chanzoo" not in sys.modules
print(json.dumps([taken, modules, len(timm.list_models())]))
"""


def test_our_names_and_timms_never_meet() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(NAMES)], capture_output=True, text=True, check=True
    )
    taken, modules, count = json.loads(done.stdout)
    assert taken == [], "networks of timm's"
    assert set(NAMES).isdisjoint(modules)
    assert set(MODULES).isdisjoint(modules), "timm lists networks by the last part of their module"
    assert len(timm.list_models()) == count + len(NAMES), "timm lost a name"


@pytest.mark.parametrize("name", NAMES)
def test_name_is_plain(name: str) -> None:
    assert "pruned" not in name, "timm's tests skip checks by that word"
    assert "." not in name, "the dot separates the tag"
    assert not name.startswith("test_"), "timm keeps that prefix for its own"


@pytest.mark.parametrize("name", NAMES)
def test_name_has_a_config(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    assert cfg.paper_ids, "which paper"
    assert cfg.license, "under what licence"
    assert cfg.input_size and cfg.pool_size and cfg.first_conv and cfg.classifier


@pytest.mark.parametrize("module", MODULES)
def test_module_listing_finds_our_names(module: str) -> None:
    listed = timm.list_models(module=module)
    assert listed == [n for n in NAMES if timm.model_entrypoint(n).__module__ == f"chanzoo.models.{module}"]


def test_every_name_is_in_one_module_listing() -> None:
    listed = [name for module in MODULES for name in timm.list_models(module=module)]
    assert sorted(listed) == sorted(NAMES)


def test_every_weight_row_is_listed_with_its_tag() -> None:
    assert {row.arch for row in WEIGHTS.values()} <= set(timm.list_models())
    assert set(chanzoo.list_models(pretrained=True)) <= set(WEIGHTS)


def test_list_models_takes_a_glob() -> None:
    assert chanzoo.list_models("cifar_resnet2*") == ["cifar_resnet20"]
    assert chanzoo.list_models("resnet50") == []
    assert "resnet50" in timm.list_models()


QUICK = ("cifar_resnet20", "cifar_densenet40", "condensenet_cifar50", "shufflenetv2_x0_5")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_checkpointing_gives_the_gradients_of_the_plain_network(name: str) -> None:
    if name == "narrow_cnn":
        pytest.skip("it is other networks, by their names")
    size = 32 if "cifar" in name else 64
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=3).train()
        model.set_grad_checkpointing(enable)
        model(torch.randn(2, 3, size, size)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)
