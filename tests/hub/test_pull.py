"""Pulling and verifying with the real client: what arrives, what goes wrong, and who dies on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from huggingface_hub import hf_hub_download, scan_cache_dir
from safetensors.torch import save

from chanzoo import store
from chanzoo.cli.main import main
from chanzoo.errors import HubError, UsageError, WeightsRejectedError
from chanzoo.hub.pull import pull, select, verify
from chanzoo.weights import WEIGHTS, Weight
from tests.hub.server import Fault, Hub

NAME = "cifar_resnet20.c10j"  # a name that timm knows, with another file behind it
REPO = "zoo/cifar_resnet20.c10j"
WIDTHS = [4, 4, 6, 8, *[3] * 9]
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


class Zoo(NamedTuple):
    hub: Hub
    row: Weight
    content: bytes
    cache: Path

    @property
    def file(self) -> Path:
        return store.cached_path(self.row)

    def holds(self) -> bool:
        return self.file.is_file() and self.file.read_bytes() == self.content

    def downloads(self) -> int:
        return sum(r.is_storage and r.method == "GET" for r in self.hub.requests)


@pytest.fixture
def zoo(hub: Hub, hub_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Zoo:
    """One published weight, of a narrow network, that is nowhere but on the Hub."""
    for name in list(WEIGHTS):
        monkeypatch.delitem(WEIGHTS, name)
    monkeypatch.setattr(store, "_PACKAGE", tmp_path / "site" / "chanzoo")
    monkeypatch.setattr(store, "_CHECKOUT", tmp_path / "site" / "weights")
    torch.manual_seed(7)
    state = timm.create_model("cifar_resnet20", widths=WIDTHS).state_dict()
    content = save(
        {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    )
    row = make_row(hub, NAME, REPO, content)
    monkeypatch.setitem(WEIGHTS, NAME, row)
    hub.requests.clear()
    return Zoo(hub, row, content, hub_cache)


def make_row(hub: Hub, name: str, repo: str, content: bytes) -> Weight:
    digest = hashlib.sha256(content).hexdigest()
    return Weight(
        name, "c10j", "r", "c", 0, 0.0, {"top1": 0.5}, 1, 1, len(content), digest,
        "apache-2.0", "p", {"widths": WIDTHS}, repo, hub.add_repo(repo, {"model.safetensors": content}),
    )  # fmt: skip


# What arrives


def test_a_pull_fills_the_clients_own_cache(zoo: Zoo) -> None:
    path = store.fetch(zoo.row)
    assert path == zoo.file and zoo.holds()
    assert path.resolve() == zoo.cache / "models--zoo--cifar_resnet20.c10j" / "blobs" / zoo.row.sha256
    zoo.hub.requests.clear()
    assert store.fetch(zoo.row) == path
    assert hf_hub_download(REPO, "model.safetensors", revision=zoo.row.revision) == str(path)
    assert zoo.hub.requests == []
    info = scan_cache_dir(zoo.cache)
    assert (list(info.warnings), [r.repo_id for r in info.repos]) == ([], [REPO])
    assert info.size_on_disk == len(zoo.content)
    assert not list(path.parents[2].glob("unverified"))


def test_what_the_client_fetched_is_not_fetched_again(zoo: Zoo) -> None:
    """The same blob under another revision of the repository."""
    other = zoo.hub.commit(REPO, {"README.md": b"# about"})
    hf_hub_download(REPO, "model.safetensors", revision=other)
    zoo.hub.requests.clear()
    store.fetch(zoo.row)
    assert zoo.holds() and zoo.hub.requests == []


def test_a_network_pulls_its_weights_by_name(zoo: Zoo) -> None:
    model = timm.create_model(NAME, pretrained=True)
    assert zoo.holds()
    tensors = store.load_tensors(zoo.row, zoo.file)
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    zoo.hub.requests.clear()
    timm.create_model(NAME, pretrained=True, cache_dir=zoo.cache)
    assert zoo.hub.requests == [], "pinned and cached: no request at all"


def test_offline_with_and_without_the_file(zoo: Zoo) -> None:
    code = (
        "import sys\nfrom chanzoo import store, weights\n"
        f"row = weights.Weight(**{ {k: getattr(zoo.row, k) for k in zoo.row.__dataclass_fields__}!r})\n"
        "try:\n    print(store.fetch(row))\nexcept store.HubError as error:\n    print(error)\n"
    )

    def offline() -> str:
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout

    assert offline().splitlines()[0] == (
        f"cannot get the weights of {NAME}: HF_HUB_OFFLINE is set and it is not in the cache."
    )
    assert not zoo.cache.exists(), "nothing is made for a file that cannot come"
    store.fetch(zoo.row)
    zoo.hub.requests.clear()
    assert offline().strip() == str(zoo.file)
    assert zoo.hub.requests == []


# What goes wrong

AT_ONCE = {"Retry-After": "0"}
HEAD = {"method": "HEAD", "path": "resolve"}
GET = {"method": "GET", "path": "/lfs/"}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("status", status=500, headers=AT_ONCE, **HEAD), "the Hub answered with status 500"),
        (Fault("status", status=500, headers=AT_ONCE, **GET), "the Hub answered with status 500"),
        (Fault("status", status=429, headers=AT_ONCE, **HEAD), "the Hub is asked too often (status 429)"),
        (Fault("status", status=403, **HEAD), "the Hub does not permit it (status 403; hf auth login)"),
        (Fault("short", after=1000, **GET), "Consistency check failed: file should be of size"),
        (Fault("redirect", **HEAD), "edirect"),
    ],
    ids=lambda value: f"{value.kind}-{value.status}-{value.method}" if isinstance(value, Fault) else "",
)
def test_a_fault_of_the_server_is_named(zoo: Zoo, fault: Fault, words: str) -> None:
    zoo.hub.fail(fault)
    with pytest.raises(HubError) as caught:
        store.fetch(zoo.row)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"cannot get the weights of {NAME}: ") and words in first
    assert rest[0] == f"  tried  this machine, then {REPO} at {zoo.row.revision[:7]}"
    assert f"Try again: chanzoo pull {NAME}" in rest[1] and "CHANZOO_WEIGHTS=FOLDER" in rest[1]
    assert caught.value.exit_code == 4
    assert not zoo.file.exists()
    fault.times = 0
    store.fetch(zoo.row)
    assert zoo.holds(), "a second run completes"


@pytest.mark.slow  # the client waits a second before each of its own attempts
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("timeout", seconds=8, **HEAD), "the Hub cannot be reached (Server disconnected"),
        (Fault("timeout", seconds=1, **GET), "the Hub cannot be reached (Server disconnected"),
        (Fault("cut", after=0, **GET), "the Hub cannot be reached (peer closed connection"),
    ],
    ids=lambda value: f"{value.kind}-{value.method}" if isinstance(value, Fault) else "",
)
def test_a_hub_that_does_not_answer_is_named(zoo: Zoo, fault: Fault, words: str) -> None:
    test_a_fault_of_the_server_is_named(zoo, fault, words)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("etag", **HEAD),
        Fault("cut", after=5000, times=2, **GET),
        Fault("slow", seconds=0.05, **GET),
        Fault("status", status=503, times=1, headers=AT_ONCE, **HEAD),
    ],
    ids=lambda fault: fault.kind,
)
def test_a_fault_that_does_no_harm(zoo: Zoo, fault: Fault) -> None:
    """A wrong ETag is not believed: the file is what its sha256 says."""
    zoo.hub.fail(fault)
    store.fetch(zoo.row)
    assert zoo.holds()


def test_wrong_bytes_never_get_into_the_cache(zoo: Zoo) -> None:
    fault = Fault("bytes", **GET)
    zoo.hub.fail(fault)
    with pytest.raises(WeightsRejectedError) as caught:
        timm.create_model(NAME, pretrained=True)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{zoo.file} is not the published file of {NAME}"
    assert lines[1] == f"  expected  sha256 {zoo.row.sha256}, {len(zoo.content):,} bytes"
    assert lines[2].startswith("  found     sha256 ") and lines[2].endswith(f", {len(zoo.content):,} bytes")
    assert "it is now model.safetensors.rejected" in lines[3] and f"chanzoo pull {NAME}" in lines[3]
    assert caught.value.exit_code == 3
    assert not zoo.file.exists() and zoo.file.with_name("model.safetensors.rejected").is_file()
    fault.times = 0
    assert store.fetch(zoo.row) == zoo.file and zoo.holds()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hub_repo": "zoo/nothing"}, "its repository does not exist, or is private (hf auth login)"),
        ({"revision": "0" * 40}, "its repository has no such revision"),
    ],
)
def test_what_is_not_on_the_hub(zoo: Zoo, change: dict[str, str], words: str) -> None:
    with pytest.raises(HubError) as caught:
        store.fetch(replace(zoo.row, **change))
    assert str(caught.value).splitlines()[0] == f"cannot get the weights of {NAME}: {words}."


def test_a_repository_without_the_file(zoo: Zoo) -> None:
    row = replace(zoo.row, hub_repo="zoo/empty", revision=zoo.hub.add_repo("zoo/empty", {"a.txt": b"a"}))
    with pytest.raises(HubError, match="its repository has no such file"):
        store.fetch(row)


def test_a_private_repository_asks_for_a_login(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(zoo.row, hub_repo="zoo/own")
    files = {"model.safetensors": zoo.content}
    row = replace(row, revision=zoo.hub.add_repo("zoo/own", files, private=True))
    with pytest.raises(HubError, match=r"or is private \(hf auth login\)"):
        store.fetch(row)
    monkeypatch.setenv("HF_TOKEN", zoo.hub.token)
    assert store.fetch(row).read_bytes() == zoo.content


# Full disks


def child(work: Callable[[], object]) -> int:
    """Run something in a copy of this process; returns its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException as error:
        Path(os.environ["HF_HUB_CACHE"]).parent.joinpath(f"error-{os.getpid()}").write_text(str(error))
    finally:
        os._exit(code)


@FORKS
def test_a_full_disk_is_named_and_nothing_stays(zoo: Zoo) -> None:
    """A limit on the size of files breaks a write in its middle, as a full disk does."""

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
        store.fetch(zoo.row)

    pid = child(work)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    message = zoo.cache.parent.joinpath(f"error-{pid}").read_text()
    assert f"there is no room for it on the disk ({os.strerror(errno.EFBIG)})" in message
    assert not zoo.file.exists()
    assert not [p for p in zoo.cache.rglob("*incomplete*") if p.stat().st_size > 0]
    store.fetch(zoo.row)
    assert zoo.holds()


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size_bytes}", "none", str(folder)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("a disk of a limited size may not be mounted here: the full disk was NOT tried")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.filterwarnings("ignore:Not enough free disk space:UserWarning")
def test_a_disk_that_is_really_full(zoo: Zoo, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4 * 4096) as disk:
        with pytest.raises(HubError) as caught:
            store.fetch(zoo.row, disk)
        assert f"there is no room for it on the disk ({os.strerror(errno.ENOSPC)})" in str(caught.value)
        assert not store.cached_path(zoo.row, disk).exists()


# Many at once, and death at any moment


@FORKS
def test_sixteen_pulls_at_once(zoo: Zoo) -> None:
    zoo.hub.fail(Fault("slow", seconds=0.02, **GET))
    pids = [child(lambda: store.fetch(zoo.row)) for _ in range(16)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * 16
    assert zoo.holds() and zoo.downloads() == 1, "one downloads, the others wait for it"
    assert [p.name for p in zoo.file.parent.iterdir()] == ["model.safetensors"]


@FORKS
def test_killed_at_fifty_moments(zoo: Zoo) -> None:
    """Before each request, within the body, and at moments that no request marks."""
    size = len(zoo.content)
    faults = [Fault("hold", **HEAD), Fault("hold", **GET)]
    faults += [Fault("hold", after=1 + i * (size - 1) // 27, **GET) for i in range(28)]
    outcomes = {"absent": 0, "whole": 0}
    for number in range(50):
        if zoo.file.is_file():  # start over
            blob = zoo.file.resolve()
            zoo.file.unlink()
            blob.unlink()
        fault = faults[number] if number < len(faults) else None
        if fault:
            zoo.hub.fail(fault)
        pid = child(lambda: store.fetch(zoo.row))
        if fault:
            assert fault.reached.wait(30)
        else:
            time.sleep(0.004 * (number - len(faults)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if fault:
            fault.times = 0
            fault.release.set()
        assert not zoo.file.exists() or zoo.holds(), "nothing unverified at the final path"
        outcomes["whole" if zoo.file.exists() else "absent"] += 1
    assert outcomes["absent"] >= 30
    store.fetch(zoo.row)
    assert zoo.holds()
    assert [p.name for p in zoo.file.parent.iterdir()] == ["model.safetensors"]


# Tampering


def tamper(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.resolve().write_bytes(data)


def test_a_tampered_cache_is_refused_set_aside_and_mended(zoo: Zoo) -> None:
    tamper(store.fetch(zoo.row))
    with pytest.raises(WeightsRejectedError, match=r"it is now model\.safetensors\.rejected"):
        timm.create_model(NAME, pretrained=True)
    assert not zoo.file.exists()
    timm.create_model(NAME, pretrained=True)
    assert zoo.holds()


def test_pull_mends_a_tampered_cache(zoo: Zoo) -> None:
    tamper(store.fetch(zoo.row))
    assert [(r.source, r.path, r.error) for r in pull([zoo.row])] == [("hub", zoo.file, None)]
    assert zoo.holds()
    assert [(r.source, r.error) for r in pull([zoo.row])] == [("here", None)]


def test_verify_sets_a_tampered_file_aside_wherever_it_is(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = tmp_path / "own" / f"{NAME}.safetensors"
    own.parent.mkdir()
    own.write_bytes(zoo.content)
    monkeypatch.setenv("CHANZOO_WEIGHTS", str(own.parent))
    cached = store.fetch(zoo.row)
    assert [(c.path, c.error) for c in verify([zoo.row])] == [(own, None), (cached, None)]
    tamper(own)
    tamper(cached)
    checked = list(verify([zoo.row]))
    assert [c.path for c in checked] == [own, cached] and all(c.error for c in checked)
    assert not own.exists() and own.with_name(f"{own.name}.rejected").is_file()
    assert list(verify([zoo.row])) == []


# The commands


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(args))
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_pull_command(zoo: Zoo, cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = cli("pull", "cifar_*")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["name", "state", "size", "file"]
    assert out.splitlines()[1].split()[:2] == [NAME, "pulled"]
    code, out, _ = cli("pull", NAME, "--format", "json")
    assert (code, json.loads(out)) == (
        0,
        [{"name": NAME, "source": "here", "path": str(zoo.file), "error": ""}],
    )


def test_one_failure_hides_no_success(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., tuple[int, str, str]]
) -> None:
    rows = [make_row(zoo.hub, f"cifar_resnet20.n{i}_c10j", f"zoo/n{i}", zoo.content) for i in range(20)]
    for row in rows:
        monkeypatch.setitem(WEIGHTS, row.name, row)
    lost = replace(zoo.row, name="cifar_resnet20.lost_c10j", hub_repo="zoo/lost")
    unpublished = replace(zoo.row, name="cifar_resnet20.own_c10j", hub_repo="", revision="")
    monkeypatch.setitem(WEIGHTS, lost.name, lost)
    monkeypatch.setitem(WEIGHTS, unpublished.name, unpublished)
    code, out, err = cli("pull", "all", "--format", "json")
    results = {item["name"]: item for item in json.loads(out)}
    assert len(results) == 23 and sum(item["source"] == "hub" for item in results.values()) == 21
    assert code == 4
    assert f"chanzoo: cannot get the weights of {lost.name}: its repository does not exist" in err
    assert f"the file of {unpublished.name} is not on this machine, and it is not published" in err


def test_an_unknown_name_is_refused_before_anything_is_pulled(zoo: Zoo) -> None:
    with pytest.raises(UsageError, match=f'no weights "cifar_resnet2O.c10j". Did you mean {NAME}'):
        select([NAME, "cifar_resnet2O.c10j"])
    assert zoo.hub.requests == []


def test_the_verify_command(zoo: Zoo, cli: Callable[..., tuple[int, str, str]]) -> None:
    assert cli("verify")[:2] == (0, f"name{' ' * 17}state   file\n{NAME}  absent\n")
    tamper(store.fetch(zoo.row))
    code, out, err = cli("verify", "all", "--format", "json")
    assert code == 3
    assert [(item["ok"], item["path"]) for item in json.loads(out)] == [(False, str(zoo.file))]
    assert err.startswith(f"chanzoo: {zoo.file} is not the published file of {NAME}\n")
    assert zoo.file.with_name("model.safetensors.rejected").is_file()
