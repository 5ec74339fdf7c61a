"""The loopback Hub with the real client: every route, every refusal, and every fault does what it says."""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import RemoteDisconnected
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request as Sent
from urllib.request import urlopen

import httpx2
import pytest
import timm
import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models import push_to_hf_hub

import chanzoo  # noqa: F401  (registers)
from tests.hub.routes import INITIAL_FILES
from tests.hub.server import KINDS, Fault, Hub

REPO = "zoo/net"
WEIGHTS = bytes(range(256)) * 40
CARD = b"---\nlicense: mit\ntags: [image-classification]\n---\n# Net\n"
FILES = {"model.safetensors": WEIGHTS, "config.json": b"{}\n", "sub/notes.md": b"notes\n"}


def push(files: dict[str, bytes], **options) -> str:
    additions = [CommitOperationAdd(path, data) for path, data in files.items()]
    return HfApi().create_commit(REPO, additions, commit_message="files", **options).oid


def pull(path: str = "model.safetensors", **options) -> bytes:
    return Path(hf_hub_download(REPO, path, **options)).read_bytes()


def traffic(hub: Hub) -> list[str]:
    """Methods and paths since the last call, with names for what differs from run to run."""
    lines = [f"{request.method} {request.path.partition('?')[0]}" for request in hub.requests]
    hub.requests.clear()
    for index, commit in enumerate(hub.commits(REPO)):
        lines = [line.replace(commit, f"COMMIT{index}") for line in lines]
    return ["/".join("SHA256" if len(p) == 64 else p for p in line.split("/")) for line in lines]


# Repositories, commits, revisions


@pytest.mark.usefixtures("signed_in")
def test_a_repository_is_made_once(hub: Hub) -> None:
    url = HfApi().create_repo(REPO, private=True)
    assert (url, url.repo_id) == (f"{hub.url}/{REPO}", REPO)
    assert (hub.has_repo(REPO), hub.is_private(REPO), hub.has_repo("zoo/other")) == (True, True, False)
    assert HfApi().create_repo(REPO, exist_ok=True) == url
    with pytest.raises(HfHubHTTPError, match="You already created this model repo") as caught:
        HfApi().create_repo(REPO)
    assert caught.value.response.status_code == 409
    assert HfApi().create_repo("net").repo_id == f"{HfApi().whoami()['name']}/net"
    assert hub.files(REPO) == INITIAL_FILES and len(hub.commits(REPO)) == 1


@pytest.mark.usefixtures("signed_in")
def test_what_is_pushed_is_pulled(hub: Hub, hub_cache: Path) -> None:
    HfApi().create_repo(REPO)
    oid = push({**FILES, "README.md": CARD})
    assert traffic(hub) == [
        "POST /api/repos/create",
        "POST /api/validate-yaml",
        f"POST /api/models/{REPO}/preupload/main",
        f"POST /{REPO}.git/info/lfs/objects/batch",
        f"PUT /lfs/{REPO}/SHA256",
        f"POST /api/models/{REPO}/commit/main",
    ]
    assert hub.commits(REPO)[1:] == [oid]
    assert hub.files(REPO) == {**INITIAL_FILES, **FILES, "README.md": CARD}
    folder = Path(snapshot_download(REPO))
    assert folder == hub_cache / "models--zoo--net" / "snapshots" / oid
    assert {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    } == hub.files(REPO)
    info = HfApi().model_info(REPO, files_metadata=True)
    assert (info.sha, info.private, info.tags) == (oid, False, ["image-classification"])
    assert info.card_data is not None and info.card_data.license == "mit"
    sizes = {sibling.rfilename: (sibling.size, bool(sibling.lfs)) for sibling in info.siblings or []}
    assert sizes == {p: (len(d), p == "model.safetensors") for p, d in hub.files(REPO).items()}
    found = HfApi().get_paths_info(REPO, ["sub", "config.json", "nowhere"])
    assert [entry.path for entry in found] == ["config.json", "sub"]
    assert [e.path for e in HfApi().list_repo_tree(REPO)] == [".gitattributes", "README.md", "config.json",
                                                              "model.safetensors", "sub"]  # fmt: skip
    assert [e.path for e in HfApi().list_repo_tree(REPO, "sub")] == ["sub/notes.md"]


@pytest.mark.usefixtures("signed_in")
def test_what_is_there_already_is_not_sent_again(hub: Hub) -> None:
    oid = hub.add_repo(REPO, FILES)
    assert push(FILES) == oid
    assert hub.commits(REPO) == [oid]
    assert not any(request.is_storage for request in hub.requests)
    hub.requests.clear()
    second = push({"again.safetensors": WEIGHTS, "config.json": b"{}\n"})
    assert hub.commits(REPO) == [oid, second]
    assert not any(request.is_storage for request in hub.requests), "the storage knows the bytes"
    assert hub.files(REPO, oid) == FILES


@pytest.mark.usefixtures("signed_in")
def test_revisions(hub: Hub) -> None:
    first = hub.add_repo(REPO, {"model.safetensors": b"first"})
    api = HfApi()
    api.create_tag(REPO, tag="v1")
    second = hub.commit(REPO, {"model.safetensors": b"second"})
    api.create_branch(REPO, branch="old", revision=first)
    third = push({"model.safetensors": b"third"}, revision="old")
    pull_request = api.create_commit(
        REPO, [CommitOperationDelete("model.safetensors")], commit_message="out", create_pr=True
    )
    assert pull_request.pr_revision == "refs/pr/1"
    assert hub.files(REPO, "refs/pr/1") == {}
    contents = {"v1": b"first", first: b"first", first[:7]: b"first", "main": b"second", "old": b"third"}
    assert {revision: pull(revision=revision) for revision in contents} == contents
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [(ref.name, ref.target_commit) for ref in refs.branches] == [("main", second), ("old", third)]
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]
    assert [ref.target_commit for ref in refs.pull_requests or []] == [pull_request.oid]
    for again in (api.create_tag, api.create_branch):
        name = {"tag": "v1"} if again == api.create_tag else {"branch": "old"}
        again(REPO, **name, exist_ok=True)
        with pytest.raises(HfHubHTTPError) as caught:
            again(REPO, **name)
        assert caught.value.response.status_code == 409


@pytest.mark.usefixtures("hub_cache")
def test_how_often_a_download_asks(hub: Hub) -> None:
    oid = hub.add_repo(REPO, FILES)
    pull()
    assert traffic(hub) == [f"HEAD /{REPO}/resolve/main/model.safetensors", f"GET /lfs/{REPO}/SHA256"]
    pull("config.json")
    assert traffic(hub) == [f"{method} /{REPO}/resolve/main/config.json" for method in ("HEAD", "GET")]
    pull()
    assert traffic(hub) == [f"HEAD /{REPO}/resolve/main/model.safetensors"]
    pull(revision=oid)
    assert traffic(hub) == [], "pinned and cached: no request at all"


@pytest.mark.usefixtures("signed_in")
def test_a_commit_on_a_stale_parent_changes_nothing(hub: Hub) -> None:
    first = hub.add_repo(REPO, FILES)
    second = hub.commit(REPO, {"config.json": b"[]"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        push({"config.json": b"mine"}, parent_commit=first)
    assert caught.value.response.status_code == 412
    assert (hub.commits(REPO), hub.files(REPO)["config.json"]) == ([first, second], b"[]")
    third = push({"config.json": b"mine"}, parent_commit=second)
    assert hub.commits(REPO) == [first, second, third]


@pytest.mark.usefixtures("signed_in")
def test_a_commit_is_all_or_nothing(hub: Hub) -> None:
    oid = hub.add_repo(REPO, FILES)
    operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("nowhere.txt")]
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        HfApi().create_commit(REPO, operations, commit_message="half")
    assert (hub.commits(REPO), hub.files(REPO)) == ([oid], FILES)
    HfApi().create_commit(REPO, [CommitOperationDelete("sub/")], commit_message="folder")
    assert set(hub.files(REPO)) == {"model.safetensors", "config.json"}


@pytest.mark.parametrize(
    ("front", "message"),
    [
        ("license: [mit", "YAML Metadata Error: while parsing a flow sequence"),
        ("- license", "YAML Metadata Error: the metadata must be an object"),
        ("license: Apache 2.0", '"license" must be one of the identifiers'),
        ("tags: [1]", '"tags\\[0\\]" with value 1 is not valid'),
        ("datasets: uoft-cs/cifar 10", '"datasets\\[0\\]" with value "uoft-cs/cifar 10" is not valid'),
        ("base_model: net", '"base_model\\[0\\]" with value "net" is not valid'),
        ("pipeline_tag: [x]", '"pipeline_tag" must be a string'),
        ("model-index:\n- name: net", '"model-index\\[0\\].results" is required'),
    ],
)
@pytest.mark.usefixtures("signed_in")
def test_a_card_with_bad_front_matter_is_refused(hub: Hub, front: str, message: str) -> None:
    oid = hub.add_repo(REPO, {})
    with pytest.raises(ValueError, match=f"Invalid metadata in README.md.\n- {message}"):
        push({"README.md": f"---\n{front}\n---\n# Net\n".encode()})
    assert hub.commits(REPO) == [oid]


@pytest.mark.usefixtures("signed_in")
def test_a_card_without_front_matter_is_warned_of(hub: Hub) -> None:
    hub.add_repo(REPO, {})
    with pytest.warns(UserWarning, match="empty or missing yaml metadata in repo card"):
        push({"README.md": b"# Net\n"})
    push({"README.md": b"---\ntags: net\n---\n# Net\n"})  # a licence is not required


# Who may see and change what


def test_a_private_repository(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, FILES, private=True)
    for path in FILES:
        with pytest.raises(RepositoryNotFoundError) as caught:
            pull(path)
        assert caught.value.response.status_code == 401
        assert pull(path, token=hub.token) == FILES[path]
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info(REPO)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert HfApi().model_info(REPO).private


def test_a_wrong_token_opens_nothing(hub: Hub) -> None:
    hub.add_repo(REPO, FILES)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as caught:
        pull(token="hf_wrong")
    assert caught.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()


def test_without_a_token_nothing_is_changed(hub: Hub) -> None:
    hub.add_repo(REPO, FILES)
    for change in (
        lambda: push({"config.json": b"mine"}),
        lambda: HfApi().create_tag(REPO, tag="v1"),
        lambda: HfApi().create_branch(REPO, branch="new"),
        lambda: HfApi().create_repo("zoo/other"),
    ):
        with pytest.raises(HfHubHTTPError) as caught:
            change()
        assert caught.value.response.status_code == 401
    assert len(hub.commits(REPO)) == 1 and hub.files(REPO) == FILES and not hub.has_repo("zoo/other")
    assert HfApi().list_repo_refs(REPO).tags == []


def test_what_does_not_exist(hub: Hub, hub_cache: Path) -> None:
    oid = hub.add_repo(REPO, FILES)
    for token, status in ((None, 401), (hub.token, 404)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            hf_hub_download("zoo/nowhere", "config.json", token=token)
        assert caught.value.response.status_code == status
    for revision in ("v9", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            pull(revision=revision)
    with pytest.raises(RemoteEntryNotFoundError):
        pull("nowhere.txt")
    assert (hub_cache / "models--zoo--net" / ".no_exist" / oid / "nowhere.txt").is_file()
    assert not HfApi().file_exists(REPO, "nowhere.txt")
    with pytest.raises(RemoteEntryNotFoundError):
        list(HfApi().list_repo_tree(REPO, "nowhere"))
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("nowhere")
    with pytest.raises(HTTPError, match="404"):
        urlopen(f"{hub.url}/api/nothing-of-this-name").close()


@pytest.mark.usefixtures("signed_in")
def test_the_storage_never_sees_the_token(hub: Hub) -> None:
    hub.add_repo(REPO, {}, private=True)
    push(FILES)
    assert pull() == WEIGHTS
    for request in hub.requests:
        assert ("authorization" in request.headers) != request.is_storage
    stored = [request for request in hub.requests if request.is_storage]
    assert [request.method for request in stored] == ["PUT", "GET"]
    assert {request.headers["host"] for request in stored} == {hub.storage_url.removeprefix("http://")}
    address = hub.storage_url + stored[1].path
    with urlopen(address) as answer:
        assert answer.read() == WEIGHTS
    for wrong in (
        Sent(address, headers={"Authorization": f"Bearer {hub.token}"}),
        Sent(address.partition("?")[0], b"other bytes", method="PUT"),
    ):
        with pytest.raises(HTTPError, match="400") as caught:
            urlopen(wrong)
        caught.value.close()


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [
        ("bytes=4-7", 206, WEIGHTS[4:8]),
        ("bytes=10000-", 206, WEIGHTS[10000:]),
        ("bytes=-3", 206, WEIGHTS[-3:]),
        ("bytes=10239-99999", 206, WEIGHTS[-1:]),
        ("lines=1-2", 200, WEIGHTS),
    ],
)
def test_ranges(hub: Hub, asked: str, status: int, part: bytes) -> None:
    hub.add_repo(REPO, {"weights.txt": WEIGHTS, "model.bin": WEIGHTS})
    for path in ("weights.txt", "model.bin"):
        sent = Sent(f"{hub.url}/{REPO}/resolve/main/{path}", headers={"Range": asked})
        with urlopen(sent) as answer:
            assert (answer.status, answer.read()) == (status, part)
        sent.add_header("Range", "bytes=10240-")
        with pytest.raises(HTTPError, match="416") as caught:
            urlopen(sent)
        assert caught.value.headers["Content-Range"] == "bytes */10240"
        caught.value.close()


# timm, and the client's own check


@pytest.mark.parametrize("name", ["test_resnet", "cifar_resnet20"])
@pytest.mark.usefixtures("signed_in")
def test_timm_pushes_and_pulls(hub: Hub, name: str) -> None:
    model = timm.create_model(name, num_classes=7).eval()
    for _ in range(2):  # the second time nothing has changed
        push_to_hf_hub(model, REPO, safe_serialization=True)
    assert len(hub.commits(REPO)) == 2
    assert set(hub.files(REPO)) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    again = timm.create_model(f"hf-hub:{REPO}", pretrained=True).eval()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    batch = torch.randn(1, *model.pretrained_cfg["input_size"])
    assert torch.equal(model(batch), again(batch))


def test_the_client_finds_a_damaged_file_in_its_cache(hub: Hub, hub_cache: Path) -> None:
    hub.add_repo(REPO, FILES)
    folder = Path(snapshot_download(REPO))
    assert HfApi().verify_repo_checksums(REPO, cache_dir=hub_cache).mismatches == []
    for path in ("model.safetensors", "config.json"):
        (folder / path).write_bytes(FILES[path][:-1] + b"!")
        found = HfApi().verify_repo_checksums(REPO, cache_dir=hub_cache)
        assert path in [mismatch["path"] for mismatch in found.mismatches]


# Faults


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(ValueError, match="no fault 'cutt'; there are status, timeout, cut"):
        Fault("cutt")
    assert {fault.kind for fault in map(Fault, KINDS)} == set(KINDS)


@pytest.mark.usefixtures("hub_cache")
def test_status(hub: Hub) -> None:
    hub.add_repo(REPO, FILES)
    hub.fail(Fault("status", "HEAD", "safetensors", times=1, status=503))
    assert pull() == WEIGHTS, "the client asks a second time"
    assert [request.method for request in hub.requests] == ["HEAD", "HEAD", "GET"]
    hub.fail(Fault("status", "GET", "config", status=403, headers={"X-Error-Message": "as told"}))
    with pytest.raises(HfHubHTTPError, match="403 Forbidden: as told"):
        pull("config.json")
    assert pull("sub/notes.md") == FILES["sub/notes.md"], "the path does not match"


@pytest.mark.usefixtures("impatient")
def test_timeout(hub: Hub) -> None:
    hub.add_repo(REPO, FILES)
    hub.fail(Fault("timeout", "HEAD", times=1, seconds=30))
    start = time.monotonic()
    assert pull() == WEIGHTS
    assert 1 <= time.monotonic() - start < 25, "the client, not the Hub, has lost patience"
    hub.fail(Fault("timeout", "HEAD", times=1))
    with pytest.raises(httpx2.RemoteProtocolError, match="without sending a response"):
        pull("config.json")


@pytest.mark.parametrize("size", [1000, 10 * 2**20 + 1000])
def test_cut(hub: Hub, size: int) -> None:
    """The client comes back after a second, for the rest if it had more than 10 MiB."""
    whole = WEIGHTS * (size // len(WEIGHTS) + 1)
    hub.add_repo(REPO, {"model.safetensors": whole})
    hub.fail(Fault("cut", "GET", times=1, after=size))
    assert pull() == whole
    ranges = [request.headers.get("range") for request in hub.requests]
    assert ranges == [None, None, f"bytes={10 * 2**20}-" if size > 10 * 2**20 else None]


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_short(hub: Hub, hub_cache: Path, path: str) -> None:
    hub.add_repo(REPO, FILES)
    hub.fail(Fault("short", "GET", after=2))
    with pytest.raises(OSError, match=f"should be of size {len(FILES[path])} but has size 2"):
        pull(path)
    assert not [p for p in hub_cache.rglob("*") if p.is_file() and p.parent.name == "blobs"]
    hub.reset()
    hub.add_repo(REPO, FILES)
    hub.fail(Fault("short", "", after=2))
    with urlopen(f"{hub.url}/{REPO}/resolve/main/config.json") as answer:
        assert (answer.read(), answer.headers["X-Linked-Size"]) == (b"{}", "3")


def test_etag(hub: Hub, hub_cache: Path) -> None:
    hub.add_repo(REPO, FILES)
    hub.fail(Fault("etag", "HEAD"))
    assert pull() == WEIGHTS
    assert [path.name for path in (hub_cache / "models--zoo--net" / "blobs").iterdir()] == ["0" * 64]


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_bytes(hub: Hub, hub_cache: Path, path: str) -> None:
    """The client compares sizes only, so it takes them."""
    hub.add_repo(REPO, FILES)
    hub.fail(Fault("bytes", "GET", path))
    whole = FILES[path]
    assert pull(path) == whole[:-1] + bytes([whole[-1] ^ 1])
    hub.reset()
    hub.add_repo(REPO, FILES)
    assert len(HfApi().verify_repo_checksums(REPO, cache_dir=hub_cache).mismatches) == 1


@pytest.mark.usefixtures("hub_cache")
def test_redirect(hub: Hub) -> None:
    hub.add_repo(REPO, FILES)
    hub.fail(Fault("redirect", "HEAD", "model"))
    with pytest.raises(httpx2.TooManyRedirects):
        pull()
    hub.fail(Fault("redirect", "HEAD", "config", headers={"Location": "http://127.0.0.1:9/config.json"}))
    with pytest.raises(LocalEntryNotFoundError, match="missing the 'X-Repo-Commit' header"):
        pull("config.json")


@pytest.mark.parametrize("after", [0, 100])
@pytest.mark.usefixtures("hub_cache")
def test_hold(hub: Hub, after: int) -> None:
    hub.add_repo(REPO, FILES)
    fault = Fault("hold", "GET", "safetensors", after=after)
    hub.fail(fault)
    with ThreadPoolExecutor(1) as threads:
        pulled = threads.submit(pull)
        assert fault.reached.wait(30)
        assert not pulled.done()
        fault.release.set()
        assert pulled.result(30) == WEIGHTS


@pytest.mark.usefixtures("signed_in")
def test_what_is_held_during_a_reset_has_no_effect(hub: Hub) -> None:
    hub.add_repo(REPO, FILES)
    fault = Fault("hold", "POST", "/commit/")
    hub.fail(fault)
    with ThreadPoolExecutor(1) as threads:
        pushed = threads.submit(push, {"config.json": b"mine"})
        assert fault.reached.wait(30)
        assert hub.files(REPO) == FILES
        hub.reset()
        hub.add_repo(REPO, FILES)
        assert isinstance(pushed.exception(30), httpx2.RemoteProtocolError)
    assert hub.files(REPO) == FILES


@pytest.mark.usefixtures("hub_cache")
def test_slow(hub: Hub) -> None:
    hub.add_repo(REPO, FILES)
    hub.fail(Fault("slow", "GET", after=1024, seconds=0.05))
    start = time.monotonic()
    assert pull() == WEIGHTS
    assert time.monotonic() - start >= 9 * 0.05, "ten pieces"


# The server itself


def test_each_process_has_its_own(hub: Hub) -> None:
    assert constants.ENDPOINT == hub.url != hub.storage_url
    hub.add_repo(REPO, FILES)
    hub.fail(Fault("status"))
    hub.reset()
    assert (hub.requests, hub.has_repo(REPO)) == ([], False)


def test_a_mistake_of_the_server_is_kept_for_the_fixture_to_find(hub: Hub) -> None:
    hub.add_repo(REPO, FILES)
    headers = {"Authorization": f"Bearer {hub.token}"}
    sent = Sent(f"{hub.url}/api/models/{REPO}/tag/main", b"{}", headers, method="POST")
    with pytest.raises(RemoteDisconnected):
        urlopen(sent)
    assert isinstance(hub.errors.pop(), KeyError)


def test_a_body_in_chunks(hub: Hub) -> None:
    """An upload may come without its length."""
    hub.add_repo(REPO, {})
    address = f"{hub.storage_url}/lfs/{REPO}/{hashlib.sha256(WEIGHTS).hexdigest()}"
    with urlopen(Sent(address, iter([WEIGHTS[:1000], WEIGHTS[1000:]]), method="PUT")) as answer:
        assert answer.status == 200
    assert hub.requests[0].headers["transfer-encoding"] == "chunked"
    with urlopen(address) as answer:
        assert answer.read() == WEIGHTS


def test_stop_leaves_nothing_behind() -> None:
    before = set(threading.enumerate())
    hub = Hub()
    hub.start()
    hub.add_repo(REPO, FILES)
    fault = Fault("hold", after=1)
    hub.fail(fault)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(lambda: urlopen(f"{hub.url}/{REPO}/resolve/main/config.json").close())
        assert fault.reached.wait(30)
        hub.stop()
        asked.exception(30)
    assert set(threading.enumerate()) <= before  # threads of earlier tests may have ended since
    hub.stop()
    Hub().stop()
