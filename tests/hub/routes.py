"""The routes of the loopback Hub: what it answers to each request that its client sends.

Errors are told by headers, a repository one may not see looks like none, and a commit is all or nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.hub.repos import Answer, File, Refusal, Repo, folder_info, is_large, read_card

if TYPE_CHECKING:
    from tests.hub.server import Hub, Request

USER = "tester"
# The first commit of every repository that a client creates.
INITIAL_FILES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
PARTS = {"repo": "[^/]+/[^/]+", "revision": "[^/]+", "name": "[^/]+", "path": ".+", "sha256": "[0-9a-f]{64}"}


@dataclass
class Call:
    """A request on its way to its route, with the named parts of its path."""

    hub: Hub
    request: Request
    body: bytes
    parts: dict[str, str]

    def asks(self, name: str) -> bool:
        """Whether a switch is on in the query."""
        query = parse_qs(urlsplit(self.request.path).query)
        return query.get(name, [""])[0].lower() in ("1", "true")

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError:
            raise Refusal(400, "the body is not JSON") from None

    def is_signed_in(self) -> bool:
        sent = self.request.headers.get("authorization")
        if sent not in (None, f"Bearer {self.hub.token}"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return sent is not None

    def repo(self, *, write: bool = False) -> Repo:
        """The repository that is meant, if the sender may see or change it."""
        signed_in = self.is_signed_in()
        repo = self.hub.repos.get(self.parts["repo"])
        if repo is None or (repo.private and not signed_in):
            raise Refusal(404 if signed_in else 401, "Repository not found", "RepoNotFound")
        if write and not signed_in:  # at the real address the client infers this code
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        return repo

    def commit(self) -> tuple[str, dict[str, File]]:
        """The commit that is meant, and its files."""
        repo = self.repo()
        oid = repo.resolve(self.parts.get("revision", "main"))
        return oid, repo.commits[oid]


Route = Callable[[Call], Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(methods: str, template: str) -> Callable[[Route], Route]:
    """Answer requests to the paths of a template by the decorated function."""
    pattern = re.compile(re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{PARTS[m[1]]})", template))

    def enter(function: Route) -> Route:
        ROUTES.extend((method, pattern, function) for method in methods.split())
        return function

    return enter


def answer(hub: Hub, request: Request, body: bytes) -> Answer:
    """Do what a request asks for, or refuse it."""
    path = urlsplit(request.path).path
    try:
        for method, pattern, function in ROUTES:
            if method == request.method and (match := pattern.fullmatch(path)):
                parts = {name: unquote(part) for name, part in match.groupdict().items() if part}
                return function(Call(hub, request, body, parts))
        if path.startswith("/api/models/") or "/resolve/" in path:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")
    except Refusal as refusal:
        return refusal.answer


def as_json(data: Any, status: int = 200, **headers: str) -> Answer:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(json.dumps(data).encode(), status, {"Content-Type": "application/json", **headers})


# Accounts and repositories


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Answer:
    if not call.is_signed_in():
        raise Refusal(401, "Invalid username or password.")
    auth = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
    return as_json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": auth})


@route("POST", "/api/repos/create")
def create(call: Call) -> Answer:
    if not call.is_signed_in():
        raise Refusal(401, "Invalid username or password.")
    data = call.json()
    repo_id = f"{data.get('organization') or USER}/{data['name']}"
    body = {"url": f"{call.hub.url}/{repo_id}", "name": repo_id}
    if repo_id in call.hub.repos:
        message = "You already created this model repo"
        return as_json({**body, "error": message}, 409, X_Error_Message=message)
    call.hub.add_repo(repo_id, INITIAL_FILES, data.get("visibility") == "private")
    return as_json(body)


@route("GET", "/api/models/{repo}(?:/revision/{revision})?")
def model_info(call: Call) -> Answer:
    repo, (oid, files) = call.repo(), call.commit()
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(files)]
    if call.asks("blobs"):
        for sibling in siblings:
            info = files[sibling["rfilename"]].info("")
            sibling |= {"size": info["size"], "blobId": info["oid"]}
            if lfs := info.get("lfs"):
                sibling["lfs"] = {"sha256": lfs["oid"], **lfs}
    card = read_card(files["README.md"].data.decode())[0] if "README.md" in files else {}
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", repo.created)
    info = {"id": repo.repo_id, "modelId": repo.repo_id, "author": repo.repo_id.split("/")[0], "sha": oid}
    info |= {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
    info |= {"createdAt": stamp, "lastModified": stamp, "siblings": siblings, "cardData": card}
    info |= {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
    return as_json({**info, "tags": card.get("tags") or []})


@route("GET", "/api/models/{repo}/refs")
def refs(call: Call) -> Answer:
    repo = call.repo()
    branches = {name: oid for name, oid in repo.branches.items() if name not in repo.pulls}

    def listing(names: dict[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in names.items()]

    return as_json(
        {
            "branches": listing(branches, "refs/heads/"),
            "tags": listing(repo.tags, "refs/tags/"),
            "pullRequests": listing(repo.pulls, ""),
            "converts": [],
        }
    )


@route("POST", "/api/models/{repo}/tag/{revision}")
def tag(call: Call) -> Answer:
    repo, name = call.repo(write=True), call.json()["tag"]
    if name in repo.tags:
        raise Refusal(409, "Tag reference exists already")
    repo.tags[name] = repo.resolve(call.parts["revision"])
    return as_json({})


@route("POST", "/api/models/{repo}/branch/{name}")
def branch(call: Call) -> Answer:
    repo, name = call.repo(write=True), call.parts["name"]
    if name in repo.branches:
        raise Refusal(409, "Reference already exists")
    repo.branches[name] = repo.resolve(call.json().get("startingPoint", "main"))
    return as_json({})


# Files


@route("HEAD GET", "/{repo}/resolve/{revision}/{path}")
def resolve(call: Call) -> Answer:
    oid, files = call.commit()
    if (file := files.get(call.parts["path"])) is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=oid)
    headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
    if not file.is_large:
        return in_range(call, file.data, headers)
    name = quote(call.parts["path"].rpartition("/")[2])
    location = f"{call.hub.storage_url}/lfs/{call.parts['repo']}/{file.sha256}?filename={name}"
    headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
    return Answer(f"Found. Redirecting to {location}".encode(), 302, {**headers, "Location": location})


def in_range(call: Call, data: bytes, headers: dict[str, str]) -> Answer:
    """Bytes, or those of them that the request's Range names."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", call.request.headers.get("range", ""))
    if not match or match[0] == "bytes=-":
        return Answer(data, 200, headers)
    first, last = match.groups()
    start = int(first) if first else max(0, len(data) - int(last))
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        return Answer(b"", 416, {**headers, "Content-Range": f"bytes */{len(data)}"})
    return Answer(
        data[start:stop], 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
    )


@route("GET", "/api/models/{repo}/tree/{revision}(?:/{path})?")
def tree(call: Call) -> Answer:
    oid, files = call.commit()
    root = f"{call.parts['path'].strip('/')}/" if "path" in call.parts else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in sorted(files.items()):
        if path.startswith(root):
            names = path[len(root) :].split("/")
            folders = (root + "/".join(names[:depth]) for depth in range(1, len(names)))
            entries |= {folder: folder_info(folder) for folder in folders}
            entries[path] = file.info(path)
    if root and not entries:
        raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=oid)
    everything = call.asks("recursive")
    return as_json([info for path, info in entries.items() if everything or "/" not in path[len(root) :]])


@route("POST", "/api/models/{repo}/paths-info/{revision}")
def paths_info(call: Call) -> Answer:
    _, files = call.commit()
    is_form = "form" in call.request.headers.get("content-type", "")
    paths = parse_qs(call.body.decode()).get("paths", []) if is_form else call.json()["paths"]
    folders = [path for path in paths if any(name.startswith(f"{path}/") for name in files)]
    return as_json([files[p].info(p) for p in paths if p in files] + [folder_info(p) for p in folders])


# Uploads


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Answer:
    card, errors = read_card(call.json()["content"])
    warnings = [] if card or errors else ["empty or missing yaml metadata in repo card"]
    data = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
    return as_json(data, 400 if errors else 200)


@route("POST", "/api/models/{repo}/preupload/{revision}")
def preupload(call: Call) -> Answer:
    repo = call.repo(write=True)
    files = repo.commits.get(repo.head(call.parts["revision"]), {})
    answers = []
    for item in call.json()["files"]:
        path = item["path"]
        mode = "lfs" if is_large(path, item["size"]) else "regular"
        oid = {"oid": files[path].oid} if path in files else {}
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
    return as_json({"files": answers})


@route("POST", "/{repo}[.]git/info/lfs/objects/batch")
def lfs_batch(call: Call) -> Answer:
    repo = call.repo(write=True)
    objects = []
    for item in call.json()["objects"]:
        upload = {"href": f"{call.hub.storage_url}/lfs/{repo.repo_id}/{item['oid']}"}
        actions = {} if item["oid"] in call.hub.storage else {"actions": {"upload": upload}}
        objects.append({"oid": item["oid"], "size": item["size"], **actions})
    return as_json({"transfer": "basic", "objects": objects})


@route("PUT HEAD GET", "/lfs/{repo}/{sha256}")
def storage(call: Call) -> Answer:
    sha256 = call.parts["sha256"]
    if "authorization" in call.request.headers:  # its addresses are the permission
        raise Refusal(400, "Only one auth mechanism allowed")
    if call.request.method == "PUT":
        if hashlib.sha256(call.body).hexdigest() != sha256:
            raise Refusal(400, "the bytes do not have the sha256 of their address")
        call.hub.storage[sha256] = call.body
        return Answer()
    if sha256 not in call.hub.storage:
        raise Refusal(403, "AccessDenied")
    return in_range(call, call.hub.storage[sha256], {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})


@route("POST", "/api/models/{repo}/commit/{revision}")
def commit(call: Call) -> Answer:
    repo, name = call.repo(write=True), call.parts["revision"]
    try:
        lines = [json.loads(line) for line in call.body.splitlines()]
    except ValueError:
        raise Refusal(400, "a line of the commit is not JSON") from None
    if len(lines) < 2 or lines[0]["key"] != "header":
        raise Refusal(400, "a commit is a header and at least one operation")
    head = repo.head(name)
    if not head.startswith(lines[0]["value"].get("parentCommit") or ""):
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repo.commits.get(head, {}))
    for line in lines[1:]:
        apply(call.hub, files, line["key"], line["value"])
    number = len(repo.pulls) + 1 if call.asks("create_pr") else 0
    oid = repo.add(files, f"refs/pr/{number}" if number else name, head)
    address = f"{call.hub.url}/{repo.repo_id}"
    pull = {"pullRequestUrl": f"{address}/discussions/{number}"} if number else {}
    return as_json({"success": True, "commitOid": oid, "commitUrl": f"{address}/commit/{oid}", **pull})


def apply(hub: Hub, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
    """Change a listing of files as one line of a commit says."""
    path = value["path"]
    if key == "file":
        files[path] = File(path, base64.b64decode(value["content"]))
        if path == "README.md" and (errors := read_card(files[path].data.decode())[1]):
            raise Refusal(400, f"Invalid metadata in README.md: {errors[0]}")
    elif key == "lfsFile":
        if value["oid"] not in hub.storage:
            raise Refusal(400, f"LFS pointer of {path} points to a file that does not exist")
        files[path] = File(path, hub.storage[value["oid"]])
    elif key in ("deletedFile", "deletedFolder"):
        prefix = path.rstrip("/") + "/" if key == "deletedFolder" else path
        gone = [
            name for name in files if name == path or (key == "deletedFolder" and name.startswith(prefix))
        ]
        if not gone:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise Refusal(400, f"no operation {key}")
