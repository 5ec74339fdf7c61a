"""The environment of every test, set before anything imports timm or the Hub's client."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

# No test reaches the network by accident: the client is offline, and its address leads nowhere.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_ENDPOINT="http://127.0.0.1:9",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_XET="1",
    MPLBACKEND="Agg",
)
# Nor does one read this user's files.
for name in ("CHANZOO_WEIGHTS", "HF_TOKEN", "HF_HUB_CACHE", "TORCH_HOME"):
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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked gpu where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
    return 0
