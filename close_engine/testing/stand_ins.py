"""What the stand-ins of the providers are made of: an HTTP server on the loopback address, in a thread of its own.

A stand-in answers the real SDK over real HTTP, so a test needs no account and no mock:

    class Echo(StandIn):
        def answer(self, call: Call) -> Reply:
            return Reply(200, call.body)

    with Echo() as echo:
        requests.post(f"{echo.url}/anything", data="Hello!")
        print([call.path for call in echo.calls])
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Call", "Reply", "StandIn"]


@dataclass(frozen=True)
class Call:
    """A request that a stand-in got.

    Attributes:
        method, path: as in the request; the path is without the query.
        query: dict of the query's first value by name.
        headers: mapping of the headers, by name in lower case.
        body: bytes.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    @property
    def form(self) -> dict[str, str]:
        """The body as a form: the last value by name."""
        return dict(parse_qsl(self.body.decode(), keep_blank_values=True))


@dataclass(frozen=True)
class Reply:
    """What a stand-in answers.

    Attributes:
        status: int, the HTTP status.
        body: bytes.
        headers: mapping of further headers, such as Retry-After.
        media_type: str, the type of the body.
    """

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    media_type: str = "application/json"


class StandIn:
    """A loopback HTTP server that answers as a provider would. Use it as a context manager.

    Attributes:
        calls: list of Call, every request so far, in the order in which they came.
        failures: list of Reply to give at the next calls, one per call, instead of the answer.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.failures: list[Reply] = []
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.stand_in = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def answer(self, call: Call) -> Reply:
        """Answer a request. Several threads may call it at once: hold `lock` around what they share."""
        raise NotImplementedError

    def handle(self, call: Call) -> Reply:
        """Note a request, and answer it or fail as `failures` says."""
        with self.lock:
            self.calls.append(call)
            failure = self.failures.pop(0) if self.failures else None
        return failure or self.answer(call)

    def start(self) -> Self:
        """Listen, in a thread."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop listening, and give the port back."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    stand_in: StandIn


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Without this, an answer of two packets waits for the client's acknowledgement of the first: 40 ms.
    disable_nagle_algorithm = True
    server: _Server

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        reply = self.server.stand_in.handle(
            Call(
                self.command,
                parts.path,
                dict(reversed(parse_qsl(parts.query, keep_blank_values=True))),
                {name.lower(): value for name, value in self.headers.items()},
                self.rfile.read(int(self.headers.get("Content-Length") or 0)),
            )
        )
        self.send_response(reply.status)
        for name, value in {
            "Content-Type": reply.media_type,
            "Content-Length": str(len(reply.body)),
            **reply.headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)

    do_GET = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the calls are in `calls`."""
