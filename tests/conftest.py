"""The environment of every test, set before anything imports timm or the Hub's client."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.hub.server import Hub  # imports nothing of ours, of timm or of the client

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

# No test reaches the network by accident: to the client this Hub, one per process and empty unless a test
# fills it, is the only one there is. A busy machine must not be taken for a Hub that does not answer.
HUB = Hub()
HUB.start()
os.environ.update(
    HF_ENDPOINT=HUB.url,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_ETAG_TIMEOUT="5",
    HF_HUB_DOWNLOAD_TIMEOUT="5",
    NO_PROXY="127.0.0.1,localhost",
    no_proxy="127.0.0.1,localhost",
    MPLBACKEND="Agg",
)
# Nor does one read this user's files.
for name in (
    "CHANZOO_WEIGHTS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN",
    "HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TORCH_HOME",
):  # fmt: skip
    os.environ.pop(name, None)
if not IS_WORKER:  # the workers inherit it
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="chanzoo-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
if IS_WORKER:  # one process per core is enough
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

if IS_WORKER:
    torch.set_num_threads(1)

# The same examples on every machine and in every run; how long one takes depends on the machine.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile("fixed")


def pytest_configure(config: pytest.Config) -> None:
    """Bear with the client: where it uploads large files it calls its HTTP library in a deprecated way."""
    config.addinivalue_line("filterwarnings", "ignore:Use 'content=<...>' to upload:DeprecationWarning")


def pytest_unconfigure() -> None:
    """Leave no thread and no socket behind."""
    HUB.stop()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked gpu where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
    return 0


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub's client, its default here and in child processes during the test."""
    path = tmp_path / "hub_cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(path))
    monkeypatch.setenv("HF_HUB_CACHE", str(path))
    return path


@pytest.fixture
def hub(hub_cache: Path) -> Iterator[Hub]:
    """This process's Hub, empty, with an empty cache at the client's side."""
    HUB.reset()
    yield HUB
    errors = list(HUB.errors)
    HUB.reset()
    assert not errors
