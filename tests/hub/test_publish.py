"""Publishing with the real client: what comes back, what is refused, who dies on the way, what is said."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import HfApi, snapshot_download
from timm.models import save_for_hf
from torch import nn

from chanzoo import store, weights
from chanzoo.errors import HubError, UsageError, WeightsRejectedError
from chanzoo.hub.gate import check_package
from chanzoo.hub.package import OURS, Package, package_folder, package_row
from chanzoo.hub.publish import Published, publish, record
from chanzoo.weights import DATASETS, WEIGHTS, load_rows
from tests.hub.routes import INITIAL_FILES
from tests.hub.server import Fault, Hub
from tests.hub.shelf import NAME, WIDTHS, Shelf, make_images, make_shelf, put

REPO = "zoo/net"
AT_ONCE = {"Retry-After": "0"}
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
ROWS = [pytest.param(row.name, id=row.name) for row in WEIGHTS.values()]

# timm's reader leaves the closing of files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def shelf(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    return make_shelf(tmp_path / "checkout", pictures, monkeypatch)


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Package:
    """Of such a row; it is the same for every test."""
    with pytest.MonkeyPatch.context() as patch:
        make_shelf(tmp_path_factory.mktemp("checkout") / "zoo", pictures, patch)
        return package_row(NAME, REPO)


def outputs(model: nn.Module, channels: int = 3) -> torch.Tensor:
    x = torch.randn(4, channels, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.eval()(x)


def writes(hub: Hub) -> list[str]:
    return [r.path for r in hub.requests if r.method in ("POST", "PUT", "DELETE")]


def holds(hub: Hub, package: Package) -> bool:
    return hub.files(REPO) == {**INITIAL_FILES, **package.files}


# What comes back


@pytest.mark.usefixtures("signed_in")
@pytest.mark.parametrize("name", ROWS)
def test_every_weight_comes_back_bit_by_bit(
    hub: Hub, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = WEIGHTS[name]
    path = store.find_local(row)
    if path is None:
        pytest.skip(f"the file of {name} is not here: it was NOT published")
    repo, content = f"zoo/{name}", path.read_bytes()
    original = timm.create_model(row.arch, num_classes=DATASETS[row.dataset].num_classes, **row.model_args)
    original.load_state_dict(store.load_tensors(row, path))
    done = publish(package_row(name, repo), repo)
    assert hub.files(repo, done.revision)["model.safetensors"] == content
    assert done == Published(repo, hub.commits(repo)[-1], row.sha256, True)
    cache = tmp_path / "second"
    pulled = timm.create_model(f"hf-hub:{repo}@{done.revision}", pretrained=True, cache_dir=cache)
    folder = snapshot_download(repo, local_dir=tmp_path / "copy")
    copied = timm.create_model(f"local-dir:{folder}", pretrained=True)
    monkeypatch.setattr(store, "_PACKAGE", tmp_path / "nowhere")
    monkeypatch.setattr(store, "_CHECKOUT", tmp_path / "nowhere")
    monkeypatch.setitem(WEIGHTS, name, replace(row, hub_repo=repo, revision=done.revision))
    named = timm.create_model(name, pretrained=True)
    expected, data = outputs(original), DATASETS[row.dataset].cfg(1)
    for model in (pulled, copied, named):
        assert torch.equal(outputs(model), expected)
        cfg = model.pretrained_cfg
        assert (cfg["tag"], cfg["license"]) == (row.tag, row.licence)
        for key in ("input_size", "mean", "std"):
            assert tuple(cfg[key]) == data[key]
        for key in ("crop_pct", "interpolation"):
            assert cfg[key] == data[key]


@pytest.mark.slow
@pytest.mark.usefixtures("signed_in")
@pytest.mark.parametrize("name", ROWS)
def test_every_weight_passes_its_checks_and_is_published(hub: Hub, name: str) -> None:
    variable = f"CHANZOO_{WEIGHTS[name].dataset.upper()}"
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set: {name} was NOT measured again")
    package = check_package(package_row(name, REPO), os.environ[variable])
    assert publish(package, REPO).changed
    assert holds(hub, package)


@pytest.mark.usefixtures("signed_in")
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("cifar_resnet20", {"widths": WIDTHS}),
        ("cifar_resnet20", {"in_chans": 1}),
        ("cifar_resnet20", {"num_classes": 7}),
        ("ce_cifar_resnet20", {"shortcut": "B", "global_pool": "max"}),
        ("test_resnet", {"num_classes": 7, "in_chans": 1}),
    ],
    ids=["narrow", "1-channel", "7-class", "arguments", "timm"],
)
def test_a_network_of_ones_own_comes_back_bit_by_bit(
    hub: Hub, tmp_path: Path, arch: str, options: dict[str, Any]
) -> None:
    model = timm.create_model(arch, **options)
    save_for_hf(model, str(tmp_path / "net"), safe_serialization=True)
    images = make_images(
        tmp_path / "images", options.get("num_classes", 10 if "cifar" in arch else 1000),
        "L" if options.get("in_chans") == 1 else "RGB",
    )  # fmt: skip
    package = check_package(package_folder(tmp_path / "net", REPO, licence="mit"), images)
    done = publish(package, REPO)
    assert holds(hub, package)
    channels = options.get("in_chans", 3)
    pulled = timm.create_model(f"hf-hub:{REPO}@{done.revision}", pretrained=True, cache_dir=tmp_path / "new")
    copied = timm.create_model(f"local-dir:{snapshot_download(REPO)}", pretrained=True)
    for again in (pulled, copied):
        assert torch.equal(outputs(again, channels), outputs(model, channels))
    report = json.loads(hub.files(REPO)["eval.json"])
    assert (report["images"], report["sha256"]) == (23, done.sha256)
    info = HfApi().model_info(REPO)
    assert info.card_data is not None and info.card_data.eval_results
    assert info.card_data.eval_results[0].metric_value == report["metrics"]["top1"]


@pytest.mark.usefixtures("signed_in")
def test_the_same_again_makes_no_commit(hub: Hub, package: Package) -> None:
    done = publish(package, REPO)
    commits = hub.commits(REPO)
    assert len(commits) == 2, "the Hub's own, and one of ours with every file"
    hub.requests.clear()
    assert publish(package, REPO) == replace(done, changed=False)
    assert hub.commits(REPO) == commits
    assert writes(hub) == ["/api/repos/create"]


@pytest.mark.usefixtures("signed_in")
def test_a_second_version_replaces_the_first(hub: Hub, package: Package) -> None:
    first = publish(package, REPO)
    hub.commit(REPO, {"theirs.md": b"kept", "config.json": b"{}"})
    files = {name: data for name, data in package.files.items() if name != "notes.md"}
    second = publish(replace(package, files=files), REPO)
    assert second.revision != first.revision
    assert hub.files(REPO) == {**INITIAL_FILES, **files, "theirs.md": b"kept"}
    assert hub.files(REPO, first.revision)["notes.md"] == package.files["notes.md"]


@pytest.mark.usefixtures("signed_in")
def test_private(hub: Hub, package: Package) -> None:
    publish(package, REPO, private=True)
    assert hub.is_private(REPO)
    hub.add_repo("zoo/open", {"a.txt": b"a"})
    hub.requests.clear()
    with pytest.raises(UsageError, match="zoo/open exists and is public") as caught:
        publish(package, "zoo/open", private=True)
    assert "No file there was changed" in str(caught.value)
    assert hub.files("zoo/open") == {"a.txt": b"a"}


@pytest.mark.usefixtures("signed_in")
def test_a_dry_run_asks_for_nothing(hub: Hub, package: Package) -> None:
    assert publish(package, REPO, dry_run=True) == Published(REPO, "", package.sha256, False)
    assert hub.requests == []


@pytest.mark.usefixtures("signed_in")
def test_a_checkouts_table_gets_the_revision(hub: Hub, shelf: Shelf, package: Package) -> None:
    done = publish(package, REPO)
    assert record(shelf.row, done)
    row = load_rows(weights.TABLE)[NAME]
    assert row == replace(shelf.row, hub_repo=REPO, revision=hub.commits(REPO)[-1])
    assert not record(shelf.row, done), "it says so already"
    (shelf.root / "pyproject.toml").unlink()
    before = weights.TABLE.read_bytes()
    assert not record(shelf.row, replace(done, revision="0" * 40)), "an installed package is left alone"
    assert weights.TABLE.read_bytes() == before


# What is refused before anything is sent


def test_a_weight_passes_its_checks(shelf: Shelf, package: Package) -> None:
    assert check_package(package, shelf.images) is package


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metrics": {"top1": 0.99, "top5": 0.99}}, "metrics in eval.json"),
        ({"params": 1}, "params"),
        ({"macs": 1}, "macs"),
        ({"seed": 3}, "recipe, seed and data set"),
    ],
)
def test_a_row_that_disagrees_is_refused(
    hub: Hub, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str
) -> None:
    put(shelf, replace(shelf.row, **change), monkeypatch)
    with pytest.raises(UsageError) as caught:
        check_package(package_row(NAME, REPO), shelf.images)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{NAME} is not what its row says: {words}"
    assert lines[1].startswith("  expected  ") and lines[2].startswith("  found     ")
    assert lines[3].startswith("  Nothing was sent.")
    assert hub.requests == []


def test_metrics_that_are_not_measured_again_are_refused(
    hub: Hub, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = {**shelf.row.metrics, "top5": shelf.row.metrics["top5"] + 2e-4}
    report = json.loads((shelf.folder / "eval.json").read_text())
    (shelf.folder / "eval.json").write_text(json.dumps({**report, "metrics": metrics}))
    put(shelf, replace(shelf.row, metrics=metrics), monkeypatch)
    with pytest.raises(WeightsRejectedError) as caught:
        check_package(package_row(NAME, REPO), shelf.images)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{NAME} is not what it claims to be: its top5"
    assert lines[1:] == [
        f"  expected  {metrics['top5']:.6f}, as claimed",
        f"  found     {shelf.row.metrics['top5']:.6f}, measured from the file",
        "  Nothing was sent.",
    ]
    assert hub.requests == []


def test_metrics_of_a_folder_have_to_agree(tmp_path: Path, shelf: Shelf) -> None:
    save_for_hf(timm.create_model("cifar_resnet20"), str(tmp_path / "net"), safe_serialization=True)
    (tmp_path / "net" / "eval.json").write_text('{"metrics": {"top1": 0.97}}')
    with pytest.raises(WeightsRejectedError, match="net is not what it claims to be: its top1"):
        check_package(package_folder(tmp_path / "net", REPO), shelf.images)


def test_a_tampered_weight_is_refused(shelf: Shelf) -> None:
    path = shelf.folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsRejectedError, match=f"is not the published file of {NAME}"):
        package_row(NAME, REPO)


@pytest.mark.parametrize("name", ["recipe.yaml", "summary.csv", "eval.json", "notes.md"])
def test_missing_evidence_is_refused(shelf: Shelf, name: str) -> None:
    (shelf.folder / name).unlink()
    with pytest.raises(UsageError) as caught:
        package_row(NAME, REPO)
    assert str(caught.value).splitlines()[0] == f"the evidence of {NAME} is not complete."
    assert name in str(caught.value).splitlines()[1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("recipe.yaml", "weight_dacay: 1\n", "line 1: weight_dacay"),
        ("summary.csv", "epoch,eval_top1\n0,10\n", "1 lines"),
        ("notes.md", "# another\n", "another text"),
        ("eval.json", "{}", "None"),
    ],
)
def test_evidence_of_something_else_is_refused(shelf: Shelf, name: str, content: str, words: str) -> None:
    (shelf.folder / name).write_text(content)
    with pytest.raises(UsageError) as caught:
        check_package(package_row(NAME, REPO), shelf.images)
    assert f"  found     {words}" in str(caught.value)


@pytest.mark.parametrize("repo", ["net", "a/b/c", "zoo/", "zoo/n t", "../x", "zoo/a--b"])
@pytest.mark.usefixtures("signed_in")
def test_a_bad_name_of_a_repository(hub: Hub, package: Package, repo: str) -> None:
    with pytest.raises(UsageError, match="cannot name a repository"):
        publish(package, repo)
    assert hub.requests == []


# What goes wrong


def test_nobody_is_logged_in(hub: Hub, package: Package) -> None:
    with pytest.raises(UsageError) as caught:
        publish(package, REPO)
    assert str(caught.value) == (
        f"cannot publish to {REPO}: nobody is logged in to the Hub.\n"
        "  No file there was changed.   Log in: hf auth login"
    )
    assert hub.requests == []


def test_a_wrong_token(hub: Hub, package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_secret")
    with pytest.raises(HubError) as caught:
        publish(package, REPO)
    assert str(caught.value) == (
        f"cannot publish to {REPO}: the Hub does not know this token (status 401).\n"
        "  No file there was changed.   Log in: hf auth login"
    )
    assert not hub.has_repo(REPO)


CREATE, COMMIT, PUT = "/api/repos/create", "/commit/", "^/lfs/"
FAULTS = [
    (Fault("status", path=CREATE, status=403), "this account may not write there (status 403)", "No file"),
    (Fault("status", path=CREATE, status=429), "the Hub is asked too often (status 429)", "No file"),
    (Fault("status", path=CREATE, status=500), "the Hub answered with status 500", "No file"),
    (Fault("timeout", path=CREATE), "the Hub cannot be reached (Server disconnected", "No file"),
    (Fault("status", path="validate-yaml", status=500), "the Hub answered with status 500", "No file"),
    (Fault("status", path="preupload", status=403), "this account may not write there", "No file"),
    (Fault("status", path=PUT, status=500, headers=AT_ONCE), "the Hub answered with status 500", "No file"),
    (Fault("status", path=COMMIT, status=403), "this account may not write there (status 403)", "No file"),
    (Fault("status", path=COMMIT, status=429), "the Hub is asked too often (status 429)", "No file"),
    (Fault("status", path=COMMIT, status=500), "the Hub answered with status 500", "Whether the commit"),
    (Fault("timeout", path=COMMIT), "the Hub cannot be reached (Server disconnected", "Whether the commit"),
]


@pytest.mark.usefixtures("signed_in")
@pytest.mark.parametrize(
    ("fault", "why", "kept"), FAULTS, ids=[f"{f.kind}-{f.status}-{f.path.strip('^/')}" for f, _, _ in FAULTS]
)
def test_a_fault_of_the_server_is_named(
    hub: Hub, package: Package, fault: Fault, why: str, kept: str
) -> None:
    hub.fail(fault)
    with pytest.raises(HubError) as caught:
        publish(package, REPO)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"cannot publish to {REPO}: {why}")
    assert second.startswith(f"  {kept}")
    assert caught.value.exit_code == 4
    assert not hub.has_repo(REPO) or hub.files(REPO) == INITIAL_FILES
    fault.times = 0
    publish(package, REPO)
    assert holds(hub, package)


@pytest.mark.usefixtures("signed_in")
def test_the_listing_after_the_commit_fails(hub: Hub, package: Package) -> None:
    before = hub.add_repo(REPO, {})
    hub.fail(Fault("status", path=f"/tree/(?!{before})", headers=AT_ONCE))
    with pytest.raises(HubError) as caught:
        publish(package, REPO)
    assert str(caught.value).splitlines()[1] == (
        "  The commit was made, but could not be compared with what was sent.   Run the same command again."
    )
    assert set(hub.files(REPO)) == set(package.files)


@pytest.mark.usefixtures("signed_in")
def test_the_hub_holds_something_else(hub: Hub, package: Package) -> None:
    hold = Fault("hold", method="PUT")
    hub.fail(hold)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(publish, package, REPO)
        assert hold.reached.wait(30)
        other = b"x" + package.files["model.safetensors"][1:]
        hold.release.set()
        fault = Fault("hold", path=COMMIT)
        hub.fail(fault)
        assert fault.reached.wait(30)
        hub.storage[package.sha256] = other
        fault.release.set()
        with pytest.raises(WeightsRejectedError) as caught:
            running.result()
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{REPO} does not hold what was sent: model.safetensors"
    assert lines[1] == f"  expected  sha256 {package.sha256} of model.safetensors"
    assert lines[2].startswith(f"  found     {hashlib.sha256(other).hexdigest()}")


@pytest.mark.usefixtures("signed_in")
def test_somebody_else_was_faster(hub: Hub, package: Package) -> None:
    hub.add_repo(REPO, INITIAL_FILES)
    fault = Fault("hold", path=COMMIT)
    hub.fail(fault)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(publish, package, REPO)
        assert fault.reached.wait(30)
        hub.commit(REPO, {"theirs.md": b"theirs"})
        fault.release.set()
        with pytest.raises(HubError) as caught:
            running.result()
    assert str(caught.value) == (
        f"cannot publish to {REPO}: somebody else has changed it meanwhile.\n"
        "  No file there was changed.   Run the same command again."
    )
    assert hub.files(REPO) == {**INITIAL_FILES, "theirs.md": b"theirs"}
    fault.times = 0
    publish(package, REPO)
    assert hub.files(REPO) == {**INITIAL_FILES, "theirs.md": b"theirs", **package.files}


@pytest.mark.usefixtures("signed_in")
def test_offline_and_unreachable(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match=f"cannot publish to {REPO}: HF_HUB_OFFLINE is set"):
            publish(package, REPO)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError) as caught:
        publish(package, REPO)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"cannot publish to {REPO}: the Hub cannot be reached (")
    assert second == "  No file there was changed.   Run the same command again."


@pytest.mark.usefixtures("signed_in")
def test_a_licence_that_the_hub_does_not_know(hub: Hub, tmp_path: Path, shelf: Shelf) -> None:
    save_for_hf(timm.create_model("cifar_resnet20"), str(tmp_path / "net"), safe_serialization=True)
    with pytest.raises(UsageError) as caught:
        publish(package_folder(tmp_path / "net", REPO, licence="Apache 2.0"), REPO)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"cannot publish to {REPO}: the Hub does not accept the metadata of the card."
    assert '"license" must be one of the identifiers' in lines[1]
    assert lines[2].endswith("A licence is named as on the Hub: --license apache-2.0")
    assert hub.files(REPO) == INITIAL_FILES


def test_the_token_goes_to_the_hub_alone(
    hub: Hub, signed_in: str, package: Package, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    publish(package, REPO)
    hub.fail(Fault("status", path=CREATE, status=500, times=1))
    with pytest.raises(HubError) as caught:
        publish(package, REPO)
    storage = [r for r in hub.requests if r.is_storage]
    assert storage and not any("authorization" in r.headers for r in storage)
    assert all(signed_in not in value for r in storage for value in (r.path, *r.headers.values()))
    told = [*capfd.readouterr(), str(caught.value), repr(package)]
    assert all(signed_in not in text for text in told)
    for folder in (tmp_path, Path(os.environ["HF_HOME"])):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert not [path for path in files if signed_in.encode() in path.read_bytes()]


# Death at any moment


def child(work: Callable[[], object]) -> int:
    """Run something in a copy of this process; returns its process id."""
    if pid := os.fork():
        return pid
    try:
        work()
    finally:
        os._exit(0)


def settle(hub: Hub) -> None:
    """Wait for what the server still does for somebody who has gone."""
    deadline = time.monotonic() + 30
    while hub.connections and time.monotonic() < deadline:
        time.sleep(0.001)


@pytest.mark.slow
@FORKS
@pytest.mark.usefixtures("signed_in")
def test_killed_at_fifty_moments(hub: Hub, package: Package) -> None:
    """Before each request takes effect, and at moments that no request marks."""
    paths = (CREATE, f"/api/models/{REPO}$", "/tree/", "validate-yaml", "preupload", "/batch", PUT, COMMIT)
    seconds = random.Random(0)
    outcomes = {"nothing": 0, "all": 0}
    for number in range(50):
        hub.reset()
        update = number % 2  # of a first version that is there already
        before = dict(INITIAL_FILES)
        if update:
            before |= {"config.json": b"{}", "model.safetensors": b"1"}
            hub.add_repo(REPO, before)
        fault = Fault("hold", path=paths[number // 2]) if number < 2 * len(paths) else None
        if fault:
            hub.fail(fault)
        pid = child(lambda: publish(package, REPO))
        if fault:
            assert fault.reached.wait(30)
        else:
            time.sleep(seconds.uniform(0, 0.25))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if fault:
            fault.times = 0
            fault.release.set()
        settle(hub)
        done = hub.has_repo(REPO) and holds(hub, package)
        assert done or not hub.has_repo(REPO) or hub.files(REPO) == before, "all or nothing"
        outcomes["all" if done else "nothing"] += 1
        publish(package, REPO)
        assert holds(hub, package)
        assert len(hub.commits(REPO)) == 2, "one commit of ours, whoever made it"
    assert outcomes["nothing"] >= 14 and outcomes["all"] >= 2


def test_what_is_ours_is_what_a_package_holds(package: Package) -> None:
    assert set(package.files) == set(OURS)
