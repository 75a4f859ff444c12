"""Serves a bucket that fails on request: an HTTP proxy in front of gcp-storage-emulator.

The emulator ignores preconditions; the proxy enforces `ifGenerationMatch` and `generation` like
Google's servers, for every kind of request. It also adds faults: rules, an outage, or a stop after
a number of changes. All random numbers are seeded, and every request is logged.

    python -m tests.faults.proxy --port 9023 --fault '{"action": "status", "probability": 0.3}'

serves the bucket `test-bucket`, prints STORAGE_EMULATOR_HOST for other processes, starts or ends an
outage at every SIGUSR1, and prints the requests since the last SIGUSR2 at every SIGUSR2.
"""

import argparse
import contextlib
import http.client
import json
import logging
import random
import re
import signal
import socket
import struct
import sys
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NoReturn

BUCKET = "test-bucket"
_PIECE_BYTES = 1 << 13  # sent at once on a slow connection
_WAKE_UP_S = 0.01  # least time between two pieces on a fast connection
_HEAD_BYTES = 1 << 16  # of a body; an upload starts with its metadata
_OBJECT = re.compile(r"(?:/download)?(?:/storage/v1)?/b/([^/]+)/o/([^/]+)")
_COPY = re.compile(r"(?:/storage/v1)?/b/[^/]+/o/[^/]+/(?:copyTo|rewriteTo)/b/([^/]+)/o/([^/]+)")
_COMPOSE = re.compile(r"(?:/storage/v1)?/b/([^/]+)/o/([^/]+)/compose")
_UPLOAD = re.compile(r"(?:/upload)?(?:/storage/v1)?/b/([^/]+)/o")
_XML = re.compile(r"/(?!storage/|upload/|download/|batch/|b/)([^/]+)/(.+)")
_OWN_HEADERS = {"content-length", "connection", "transfer-encoding", "server", "date"}

Kind = Literal["put", "session", "part", "get", "stat", "list", "delete", "other"]
Action = Literal[
    "status",  # the answer is `status`, nothing else happens
    "reset-early",  # the connection breaks before the body is read
    "reset",  # it breaks after that, still before anything happens
    "lose-answer",  # it breaks after the request was carried out
    "stall",  # the request is carried out `seconds` late
    "stall-answer",  # it is carried out at once, and answered `seconds` late
    "truncate",  # half of the answer's body arrives, then the connection breaks
    "flip",  # one bit of the answer's body is wrong
    "slow",  # the bodies of request and answer take `bytes_per_s`
]


@dataclass(frozen=True)
class Fault:
    """A rule that selects requests, and the fault that it causes.

    `kinds` (none: all), `method` and `name` (searched in the object's name) select requests. Each
    of them is hit with `probability`, at most `count` of them (None: no limit).
    """

    action: Action
    status: int = 503
    seconds: float = 1.0
    bytes_per_s: float = 1e6
    delay_s: float = 0.0  # before that happens
    kinds: tuple[Kind, ...] = ()
    method: str = ""
    name: str = ""
    probability: float = 1.0
    count: int | None = None


@dataclass(frozen=True)
class Logged:
    """A request and how it was answered; `status` 0: the connection was broken."""

    method: str
    kind: Kind
    name: str
    status: int
    fault: str


@dataclass(frozen=True)
class _Request:
    method: str
    path: str
    kind: Kind
    bucket: str
    name: str
    if_generation: int | None  # the precondition
    generation: int | None  # the generation that is asked for
    upload_id: str
    is_change: bool  # an object is another one, or gone, when it has succeeded


@dataclass(frozen=True)
class _Answer:
    status: int
    body: bytes
    headers: dict[str, str]


@dataclass
class _Gate:
    """A stall that delays requests."""

    opened: threading.Event = field(default_factory=threading.Event)
    is_cleared: bool = False


class FaultProxy:
    """The proxy; usable from any thread, also while it serves.

    Attributes:
        down: whether there is an outage: every connection is broken.
        creates_only: whether nothing may be deleted or replaced, as for an account with the roles
            objectCreator and objectViewer: to replace an object takes storage.objects.delete.
        log: the latest requests, oldest first.
        num_changes: objects written or deleted so far.
    """

    def __init__(
        self, upstream: str, *, host: str = "127.0.0.1", port: int = 0, seed: int = 0
    ) -> None:
        self.down = False
        self.creates_only = False
        self.log: deque[Logged] = deque(maxlen=100_000)
        self.num_changes = 0
        self._upstream = upstream.removeprefix("http://")
        self._random = random.Random(seed)
        self._mutex = threading.Lock()  # of everything here
        self._changing = threading.Lock()  # makes a precondition and its change one step
        # The emulator serves one request at a time and lets 5 wait; others lose a second.
        self._asking = threading.Lock()
        self._faults: list[tuple[Fault, list[int]]] = []
        self._stop_at: tuple[int, Callable[[], None] | None] | None = None
        self._sessions: dict[str, tuple[str, str, int | None]] = {}
        self._finished: dict[str, _Answer] = {}
        self._stalled = threading.Event()  # a request was held back since the last `clear`
        self._gate = _Gate()
        self._server = _Server((host, port), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def address(self) -> str:
        """The value for STORAGE_EMULATOR_HOST."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        """Serves until `close`."""
        self._thread.start()

    def close(self) -> None:
        """Ends the service and drops running requests."""
        self._open_gate(is_cleared=True)
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add(self, *faults: Fault) -> None:
        """Adds rules; the first one that hits a request counts."""
        with self._mutex:
            self._faults += [(fault, [0]) for fault in faults]

    def clear(self) -> None:
        """Ends all faults, including running stalls, and clears the log."""
        with self._mutex:
            self._faults.clear()
            self._stop_at = None
            self.down = False
            self.creates_only = False
            self.log.clear()
            self._stalled.clear()
        self._open_gate(is_cleared=True)

    def wait_for_stall(self) -> None:
        """Waits until a request is stalled."""
        self._stalled.wait()

    def resume(self) -> None:
        """Continues the stalled requests."""
        self._open_gate(is_cleared=False)

    def stop_after(self, num_changes: int, then: Callable[[], None] | None = None) -> None:
        """Starts an outage after that many more changes; the answer of the last one is lost.

        Args:
            then: called at that moment, before any other request is handled.
        """
        with self._mutex:
            self._stop_at = self.num_changes + num_changes, then

    def count(self, kind: Kind | None = None, name: str = "", status: int | None = None) -> int:
        """Returns how many logged requests have this kind, object name (searched) and status."""
        return sum(
            (kind is None or entry.kind == kind)
            and re.search(name, entry.name) is not None
            and (status is None or entry.status == status)
            for entry in tuple(self.log)
        )

    def take_log(self) -> list[Logged]:
        """Returns the logged requests, oldest first, and clears the log."""
        taken = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self.log.popleft())
        return taken

    def fault_of(self, request: _Request) -> Fault | None:
        """Returns the fault for a request, None for no fault."""
        with self._mutex:
            if self.down:
                return Fault("reset-early")
            for fault, hits in self._faults:
                if self._is_hit(fault, hits[0], request):
                    hits[0] += 1
                    return fault
        return None

    def hold(self, seconds: float) -> bool:
        """Waits that long, or until `resume` or `clear`; returns whether faults were cleared."""
        with self._mutex:
            gate = self._gate
            self._stalled.set()
        gate.opened.wait(seconds)
        return gate.is_cleared

    def parse(self, method: str, target: str, headers: Message, head: bytes) -> _Request:
        """Parses a request; `head` is the beginning of its body."""
        url = urllib.parse.urlsplit(target)
        query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
        kind, bucket, name = _meaning(method, url.path, query, head)
        condition = query.get("ifGenerationMatch", headers.get("x-goog-if-generation-match"))
        if_generation = None if condition is None else int(condition)
        upload_id = query.get("upload_id", "")
        is_change = kind in ("put", "delete") or (kind == "other" and method == "POST")
        if kind == "part":
            with self._mutex:
                bucket, name, if_generation = self._sessions.get(upload_id, (bucket, "", None))
            is_change = _is_last_part(headers.get("Content-Range", ""))
        generation = int(query["generation"]) if "generation" in query else None
        return _Request(
            method, target, kind, bucket, name, if_generation, generation, upload_id, is_change
        )

    def carry_out(self, request: _Request, body: bytes, headers: Message) -> _Answer | None:
        """Returns the emulator's answer, None if an outage started meanwhile."""
        with self._changing if request.is_change else contextlib.nullcontext():
            if self.down:
                return None
            if request.upload_id in self._finished:  # as Google answers; the emulator forgets it
                return self._finished[request.upload_id]
            refusal = self._forbid(request) or self._check(request)
            if refusal:
                return refusal
            answer = self._ask(request.method, request.path, body, dict(headers))
            answer = self._completed(request, answer)
            if request.is_change and answer.status in (200, 201, 204):
                if request.upload_id:
                    self._finished[request.upload_id] = answer
                if self._has_changed():
                    return None
            return answer

    def _open_gate(self, *, is_cleared: bool) -> None:
        with self._mutex:
            gate, self._gate = self._gate, _Gate()
        gate.is_cleared = is_cleared
        gate.opened.set()

    def _is_hit(self, fault: Fault, num_hits: int, request: _Request) -> bool:
        return (
            (fault.count is None or num_hits < fault.count)
            and (not fault.kinds or request.kind in fault.kinds)
            and re.search(fault.method, request.method) is not None
            and re.search(fault.name, request.name) is not None
            and self._random.random() < fault.probability
        )

    def _has_changed(self) -> bool:
        """Counts a change; returns whether it was the last one before a stop."""
        with self._mutex:
            self.num_changes += 1
            if not self._stop_at or self.num_changes < self._stop_at[0]:
                return False
            then = self._stop_at[1]
            self._stop_at = None
            self.down = True
        if then:
            then()
        return True

    def _forbid(self, request: _Request) -> _Answer | None:
        """Returns the refusal of a request that the account's roles do not allow."""
        if not self.creates_only or request.kind not in ("put", "session", "part", "delete"):
            return None
        if self._metadata(request) is None:
            return None
        return _error(403, "the account does not have storage.objects.delete access to the object")

    def _check(self, request: _Request) -> _Answer | None:
        """Returns the refusal of a request whose preconditions do not hold."""
        if not request.name or (request.if_generation is None and request.generation is None):
            return None
        found = self._metadata(request)
        generation = int(found["generation"]) if found else 0
        if request.if_generation not in (None, generation):
            return _error(412, "conditionNotMet")
        if request.generation not in (None, generation):
            return _error(404, f"No such object: {request.bucket}/{request.name}")
        return None

    def _metadata(self, request: _Request) -> dict[str, Any] | None:
        name = urllib.parse.quote(request.name, safe="")
        answer = self._ask("GET", f"/storage/v1/b/{request.bucket}/o/{name}", b"", {})
        return json.loads(answer.body) if answer.status == 200 else None

    def _completed(self, request: _Request, answer: _Answer) -> _Answer:
        """Adds what Google's servers send and the emulator does not, and returns the answer."""
        headers = dict(answer.headers)
        if request.kind == "session" and answer.status == 200:
            query = urllib.parse.urlsplit(headers["Location"]).query
            upload_id = urllib.parse.parse_qs(query)["upload_id"][0]
            with self._mutex:
                place = request.bucket, request.name, request.if_generation
                self._sessions[upload_id] = place
        if answer.status == 308 and headers.get("Range") == "bytes=0-0":
            del headers["Range"]  # it means that nothing has arrived
        if request.kind == "get" and answer.status in (200, 206):
            found = self._metadata(request)
            if found:
                headers["X-Goog-Generation"] = found["generation"]
                headers["X-Goog-Hash"] = f"crc32c={found['crc32c']},md5={found['md5Hash']}"
                headers["X-Goog-Stored-Content-Length"] = str(found["size"])
                if found.get("contentEncoding"):
                    headers["Content-Encoding"] = found["contentEncoding"]
        return _Answer(answer.status, answer.body, headers)

    def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> _Answer:
        kept = {k: v for k, v in headers.items() if k.lower() not in _OWN_HEADERS}
        with self._asking, contextlib.closing(http.client.HTTPConnection(self._upstream)) as server:
            server.request(method, path, body, kept)
            answer = server.getresponse()
            return _Answer(answer.status, answer.read(), dict(answer.headers))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Clients are killed and connections broken on purpose here.
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go out separately
    server: _Server

    def _serve(self) -> None:
        proxy = self.server.proxy
        body = self._body()
        head = next(body, b"")
        request = proxy.parse(self.command, self.path, self.headers, head)
        fault = proxy.fault_of(request)
        action = fault.action if fault else ""
        if fault and action == "slow":
            head += b"".join(_slowly(body, fault.bytes_per_s))
        elif action != "reset-early":
            head += b"".join(body)
        if fault and action == "stall" and proxy.hold(fault.seconds):
            action = "reset"  # the client is of a test that has ended
        if fault and action == "status":
            answer: _Answer | None = _error(fault.status, "a fault was asked for")
        elif action in ("reset", "reset-early"):
            answer = None
        else:
            answer = proxy.carry_out(request, head, self.headers)
        if fault and action == "stall-answer":
            proxy.hold(fault.seconds)
        if fault and fault.delay_s:
            time.sleep(fault.delay_s)
        if action == "lose-answer":
            answer = None
        status = answer.status if answer else 0
        proxy.log.append(Logged(self.command, request.kind, request.name, status, action))
        self._answer(answer, action, fault.bytes_per_s if fault else 0.0)

    def _body(self) -> Iterator[bytes]:
        """Yields the request's body, first its head."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        length = int(self.headers.get("Content-Length") or 0)
        yield self.rfile.read(min(length, _HEAD_BYTES))
        for begin in range(_HEAD_BYTES, length, _PIECE_BYTES):
            yield self.rfile.read(min(_PIECE_BYTES, length - begin))

    def _answer(self, answer: _Answer | None, action: str, bytes_per_s: float) -> None:
        if answer is None:
            self._break()
        body = answer.body
        if action == "flip" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            if key.lower() not in _OWN_HEADERS:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if action == "truncate":
            body = body[: len(body) // 2]
            self.close_connection = True  # politely, or the client could miss what was sent
        if action == "slow":
            # Fast connections send larger pieces: a server in Python cannot wake up so often.
            size = max(_PIECE_BYTES, int(bytes_per_s * _WAKE_UP_S))
            pieces = (body[i : i + size] for i in range(0, len(body), size))
            for piece in _slowly(pieces, bytes_per_s):
                self.wfile.write(piece)
            return
        self.wfile.write(body)

    def _break(self) -> NoReturn:
        """Resets the connection: the client gets ECONNRESET."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        for part in (self.rfile, self.wfile, self.connection):
            part.close()
        raise ConnectionAbortedError("on purpose")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _slowly(pieces: Iterable[bytes], bytes_per_s: float) -> Iterator[bytes]:
    """Yields `pieces` at the rate of a slow connection.

    Each piece has a time at which it is due, so that late wake-ups do not add up.
    """
    due = time.monotonic()
    for piece in pieces:
        due += len(piece) / bytes_per_s
        time.sleep(max(due - time.monotonic(), 0.0))
        yield piece


def start_emulator(bucket: str = BUCKET) -> tuple[Any, str]:
    """Returns a running emulator in memory, whose `stop` ends it, and its address."""
    from gcp_storage_emulator.server import create_server  # type: ignore[import-untyped]

    # The emulator logs every request for a missing object as an error.
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    emulator = create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket)
    storage = emulator._storage
    # By default, every change writes the whole state as JSON to an unused place, and deleted
    # objects stay for seven days: with thousands of changes, this would dominate the time.
    storage._write_config_to_file = lambda: None
    storage.buckets[bucket]["softDeletePolicy"] = {"retentionDurationSeconds": "0"}
    emulator.start()
    return emulator, f"http://127.0.0.1:{port}"


def _meaning(method: str, path: str, query: dict[str, str], head: bytes) -> tuple[Kind, str, str]:
    """Returns kind, bucket and object name of a request."""
    copied = _COPY.fullmatch(path) or _COMPOSE.fullmatch(path)
    if copied:
        return "other", copied[1], urllib.parse.unquote(copied[2])
    upload = _UPLOAD.fullmatch(path)
    if upload and method == "GET":
        return "list", upload[1], ""
    if upload and "upload_id" in query:
        return "part", upload[1], ""
    if upload:
        name = query.get("name") or _name_in(head)
        return ("session" if query.get("uploadType") == "resumable" else "put"), upload[1], name
    found = _OBJECT.fullmatch(path) or _XML.fullmatch(path)
    if found is None:
        return "other", "", ""
    name = urllib.parse.unquote(found[2])
    is_media = query.get("alt") == "media" or not _OBJECT.fullmatch(path)
    kinds: dict[str, Kind] = {"GET": "get" if is_media else "stat", "PUT": "put"}
    return kinds.get(method, "delete" if method == "DELETE" else "other"), found[1], name


def _name_in(head: bytes) -> str:
    """Returns the name in the metadata of an upload: JSON, or the first part of a multipart."""
    start = head.find(b"{")
    if start < 0:
        return ""
    # Not the whole head is text; latin-1 keeps its bytes.
    text = head[start:].decode("latin-1")
    name: str = json.JSONDecoder().raw_decode(text)[0].get("name", "")
    return name.encode("latin-1").decode()


def _is_last_part(content_range: str) -> bool:
    match = re.fullmatch(r"bytes (?:\d+-(\d+)|\*)/(\d+|\*)", content_range.strip())
    if match is None:
        return True  # all of it in one request
    return match[1] is not None and match[2] == str(int(match[1]) + 1)


def _error(status: int, message: str) -> _Answer:
    body = {"error": {"code": status, "message": message, "errors": [{"message": message}]}}
    return _Answer(status, json.dumps(body).encode(), {"Content-Type": "application/json"})


def _print_log(proxy: FaultProxy) -> None:
    print(json.dumps([vars(entry) for entry in proxy.take_log()]), flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a bucket that fails on request.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--bucket", default=BUCKET)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", action="append", default=[], help="a rule, as JSON")
    arguments = parser.parse_args()
    emulator, upstream = start_emulator(arguments.bucket)
    proxy = FaultProxy(upstream, host=arguments.host, port=arguments.port, seed=arguments.seed)
    proxy.add(*(Fault(**json.loads(text)) for text in arguments.fault))
    sys.setswitchinterval(1e-4)  # or each of many threads waits 5 ms for its turn
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    signal.signal(signal.SIGUSR1, lambda *_: setattr(proxy, "down", not proxy.down))
    signal.signal(signal.SIGUSR2, lambda *_: _print_log(proxy))
    proxy.start()
    print(f"STORAGE_EMULATOR_HOST={proxy.address}", flush=True)  # noqa: T201
    while not ended.is_set():
        time.sleep(0.2)
    proxy.close()
    emulator.stop()


if __name__ == "__main__":
    main()
