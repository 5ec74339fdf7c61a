"""A Hugging Face Hub on the loopback interface: state in memory, a record of requests, faults on demand.

It listens at two addresses. One is the Hub; the other is the storage to which requests for large files
are redirected, a different origin as in reality.
"""

from __future__ import annotations

import contextlib
import re
import socket
import socketserver
import sys
import threading
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from tests.hub import routes
from tests.hub.repos import Answer, File, Repo

__all__ = ["Fault", "Hub", "Request"]

KINDS = ("status", "timeout", "cut", "short", "etag", "bytes", "redirect", "hold", "slow")


@dataclass(frozen=True)
class Request:
    """What a client sent, without its body. The names of the headers are in lower case."""

    method: str
    path: str  # with the query, quoted as it came
    headers: dict[str, str]

    @property
    def is_storage(self) -> bool:
        """Whether it went to the origin that stores large files."""
        return self.path.startswith("/lfs/")


@dataclass
class Fault:
    """Something that goes wrong with the requests it matches; the first that matches is used.

    A client asks twice for a large file: ``HEAD /org/name/resolve/REVISION/model.safetensors`` at the Hub,
    then ``GET /lfs/org/name/SHA256?filename=model.safetensors`` at the storage. It uploads one with
    ``PUT /lfs/org/name/SHA256``.

    Args:
        kind: One of

            - ``status``: answer ``status``. ``headers={"Retry-After": "0"}`` makes the client's waits short.
            - ``timeout``: close the connection after ``seconds`` without an answer; nothing takes effect.
            - ``cut``: close it after ``after`` bytes of the body; Content-Length says the whole.
            - ``short``: the first ``after`` bytes as if they were all; X-Linked-Size says the whole.
            - ``etag``: wrong ETag and X-Linked-Etag.
            - ``bytes``: the last bit of the body is flipped.
            - ``redirect``: 302 to ``headers["Location"]``, by default to the very same address.
            - ``hold``: set ``reached`` and wait for ``release`` before the request takes effect; or, with
              ``after``, when it has and that many bytes of the answer's body are sent.
            - ``slow``: the body in pieces of ``after`` bytes (an eighth by default), ``seconds`` apart.
        method: Of the requests it matches; "" is any.
        path: Regular expression, searched in path and query.
        times: How many requests it spoils; -1 is all.
        headers: Of the answer, besides or instead of its own.
    """

    kind: str
    method: str = ""
    path: str = ""
    times: int = -1
    status: int = 500
    after: int = 0
    seconds: float = 0
    headers: dict[str, str] = field(default_factory=dict)
    reached: threading.Event = field(default_factory=threading.Event, repr=False)
    release: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no fault {self.kind!r}; there are {', '.join(KINDS)}")

    def matches(self, request: Request) -> bool:
        if self.times == 0 or self.method not in ("", request.method):
            return False
        return re.search(self.path, request.path) is not None


class Hub:
    """The Hub of one test process. Tests seed and read it by its methods, clients by HTTP.

    ``requests`` are those since the last reset, in the order they came, of both origins.
    """

    token = "hf_test_token"

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.errors: list[BaseException] = []  # of the server itself; there should be none
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.connections: dict[threading.Thread, socket.socket] = {}
        self._faults: list[Fault] = []
        self._epoch = 0  # a request that slept through a reset has no effect
        self._lock = threading.RLock()
        self._threads: list[threading.Thread] = []
        self._servers = [_Server(self), _Server(self)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def start(self) -> None:
        for server in self._servers:
            thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """End every thread and close every socket."""
        self.reset()
        for server in self._servers:
            if self._threads:
                server.shutdown()
            server.server_close()
        for thread, connection in list(self.connections.items()):
            with contextlib.suppress(OSError):  # it ended by itself
                connection.shutdown(socket.SHUT_RDWR)
            self._threads.append(thread)
        while self._threads:
            self._threads.pop().join()

    def reset(self) -> None:
        """Forget repositories, faults and requests, and let go of whomever a fault holds."""
        with self._lock:
            self._epoch += 1
            for fault in self._faults:
                fault.release.set()
            for state in (self.repos, self.storage, self._faults, self.requests, self.errors):
                state.clear()

    def add_repo(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> str:
        """Make a repository with one commit and return that; without files there is none, and it is ""."""
        with self._lock:
            self.repos[repo_id] = Repo(repo_id, private)
            return self.commit(repo_id, files) if files is not None else ""

    def commit(self, repo_id: str, files: dict[str, bytes]) -> str:
        """Add files to main, or replace them, and return the commit."""
        with self._lock:
            repo = self.repos[repo_id]
            head = repo.head("main")
            new = {path: File(path, data) for path, data in files.items()}
            self.storage.update({file.sha256: file.data for file in new.values() if file.is_large})
            return repo.add(repo.commits.get(head, {}) | new, "main", head)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds."""
        with self._lock:
            repo = self.repos[repo_id]
            return {path: file.data for path, file in repo.commits[repo.resolve(revision)].items()}

    def commits(self, repo_id: str) -> list[str]:
        """Every commit of a repository on any branch, the oldest first."""
        with self._lock:
            return list(self.repos[repo_id].commits)

    def has_repo(self, repo_id: str) -> bool:
        return repo_id in self.repos

    def is_private(self, repo_id: str) -> bool:
        return self.repos[repo_id].private

    def fail(self, fault: Fault) -> None:
        """Spoil the requests that a fault matches, until it is used up or the Hub is reset."""
        with self._lock:
            self._faults.append(fault)

    # For the handlers of connections

    def meet(self, request: Request) -> tuple[Fault | None, int]:
        """Record a request; returns the fault it meets, and the epoch it came in."""
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self._faults if fault.matches(request)), None)
            if fault and fault.times > 0:
                fault.times -= 1
            return fault, self._epoch

    def answer(self, request: Request, body: bytes, epoch: int) -> Answer | None:
        """Do what a request asks for; None if the Hub was reset since it came."""
        with self._lock:
            return routes.answer(self, request, body) if epoch == self._epoch else None


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a handler that a fault holds must not keep Python from ending
    request_queue_size = 64

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        """As the parent does, but without asking the name service who we are."""
        socketserver.TCPServer.server_bind(self)
        self.server_port = self.socket.getsockname()[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep what broke for the tests to see; that a client hangs up is no error."""
        error = sys.exc_info()[1]
        if error and not isinstance(error, (ConnectionError, TimeoutError)):
            self.hub.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    """One connection with one request: it is closed behind the answer, so that none is left open."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60

    @property
    def hub(self) -> Hub:
        return cast(_Server, self.server).hub

    def setup(self) -> None:
        super().setup()
        self.hub.connections[threading.current_thread()] = self.connection

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            del self.hub.connections[threading.current_thread()]

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def serve(self) -> None:
        self.close_connection = True
        request = Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
        fault, epoch = self.hub.meet(request)
        body = self.read_body()
        answer = None
        if fault and fault.kind == "hold" and not fault.after:
            fault.reached.set()
            fault.release.wait()
        if fault and fault.kind == "timeout":
            fault.release.wait(fault.seconds)
        elif fault and fault.kind == "status":
            answer = Answer(b'{"error": "as the test asked"}', fault.status)
        elif fault and fault.kind == "redirect":
            origin = self.hub.storage_url if request.is_storage else self.hub.url
            answer = Answer(b"", 302, {"Location": origin + request.path})
        else:
            answer = self.hub.answer(request, body, epoch)
        if answer:
            answer = spoil(answer, fault) if fault else answer
            self.send_head(answer)
            if self.command != "HEAD":
                self.send_body(answer.body, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            pieces.append(self.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionResetError("the client left in the middle of its request")
        return data

    def send_head(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Connection", "close")
        self.end_headers()

    def send_body(self, body: bytes, fault: Fault | None) -> None:
        if fault and fault.kind == "cut":
            self.wfile.write(body[: fault.after])
        elif fault and fault.kind == "hold" and fault.after:
            self.wfile.write(body[: fault.after])
            fault.reached.set()
            fault.release.wait()
            self.wfile.write(body[fault.after :])
        elif fault and fault.kind == "slow":
            size = fault.after or len(body) // 8 or 1
            for start in range(0, len(body), size):
                self.wfile.write(body[start : start + size])
                fault.release.wait(fault.seconds)
        else:
            self.wfile.write(body)


def spoil(answer: Answer, fault: Fault) -> Answer:
    """What a fault makes of an answer before it is sent."""
    body, headers = answer.body, dict(answer.headers)
    if fault.kind == "short":
        headers.setdefault("X-Linked-Size", str(len(body)))
        body = body[: fault.after]
    elif fault.kind == "bytes" and body:
        body = body[:-1] + bytes([body[-1] ^ 1])
    elif fault.kind == "etag":
        headers |= {name: f'"{"0" * 64}"' for name in ("ETag", "X-Linked-Etag")}
    return replace(answer, body=body, headers=headers | fault.headers)
