"""Pytest plugin that points timm's own model tests at networks of ours.

Loaded with ``-p timm_suite`` in a process of its own (see test_timm_suite.py), where
``$CHANZOO_SUITE_NAMES`` lists the networks. Before timm's test module asks timm for names, timm's listing
functions are narrowed to ours; the tests that timm runs on a hand-picked list of its networks, although
they hold for any, get ours instead; what is left over (other networks, downloads of weights) is dropped.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import pytest
import timm
import timm.models

import chanzoo  # noqa: F401  # registers the networks

NAMES = [name for name in os.environ.get("CHANZOO_SUITE_NAMES", "").split(",") if name]
if any(name.startswith("condensed_") for name in NAMES):
    import condensed_forms  # noqa: F401  # registers more

# Tests with a hand-picked list, and what follows the network's name in each of their rows.
HAND_PICKED: dict[str, tuple[Any, ...]] = {
    "test_features_only_grad_checkpointing_backward": (),
    "test_forward_after_prune_intermediate_layers": (),
    "test_head_hidden_size": ({},),
    "test_prune_intermediate_layers_last_feature": (False,),
    "test_prune_intermediate_layers_params_used": (),
    "test_prune_to_stem_feature": (),
    "test_pruned_feature_info_matches_forward": (),
    "test_reset_classifier_keeps_pool": (),
}
MARKERS = "base forward backward cfg cfg_nonstd torchscript features fxforward fxbackward timeout"

collected: dict[str, set[str]] = defaultdict(set)


def pytest_configure(config: pytest.Config) -> None:
    """Narrow timm's listings; a selection by timm's module names never excludes us."""
    for marker in MARKERS.split():
        config.addinivalue_line("markers", f"{marker}: of timm's tests")
    everything = timm.list_models

    def list_models(filter: Any = "", module: Any = "", *args: Any, **kwargs: Any) -> list[str]:
        return [name for name in everything(filter, "", *args, **kwargs) if _is_ours(name)]

    def list_pretrained(filter: Any = "", exclude_filters: Any = "") -> list[str]:
        return list_models(filter, pretrained=True, exclude_filters=exclude_filters, include_tags=True)

    for place in (timm, timm.models):
        place.list_models, place.list_pretrained = list_models, list_pretrained


def _is_ours(name: object) -> bool:
    return isinstance(name, str) and name.partition(".")[0] in NAMES


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(name: str, obj: Any) -> None:
    """Put our names into a hand-picked list, before pytest reads it."""
    if name not in HAND_PICKED:
        return
    extra = HAND_PICKED[name]
    rows = [(ours, *extra) if extra else ours for ours in NAMES]
    obj.pytestmark = [
        pytest.mark.parametrize(mark.args[0], rows).mark
        if mark.name == "parametrize" and "model_name" in mark.args[0]
        else mark
        for mark in obj.pytestmark
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop tests of other networks and tests that download."""
    kept, dropped = [], []
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        test = getattr(item, "originalname", item.name)
        downloads = test.endswith("_pretrained") or test == "test_model_inference"
        if _is_ours(params.get("model_name")) and not downloads:
            kept.append(item)
            collected[params["model_name"].partition(".")[0]].add(test)
        else:
            dropped.append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A network that gets fewer tests than another, or fewer than the hand-picked ones, has failed."""
    every = set(HAND_PICKED).union(*collected.values())
    short = {name: sorted(every - collected[name]) for name in NAMES if every - collected[name]}
    if short and session.exitstatus == pytest.ExitCode.OK:
        print(f"\nnot every test was collected: {short}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
