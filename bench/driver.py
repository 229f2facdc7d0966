"""Two ways to measure what a driver does: count what goes over the wire, or replay the server's answers.

Both work for every library that connects through psycopg2: Peewee, Django, SQLAlchemy.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from unittest import mock

import psycopg2
import psycopg2.extensions

from bench.server import Server


class CountingProxy:
    """A proxy that counts the server's `CommandComplete` and `ReadyForQuery` messages.

    The first ends a statement. With the second, the server waits for the client, so it ends a round trip.
    """

    def __init__(self, server: Server, directory: str) -> None:
        self.server, self.directory = server, directory
        self.statements = self.round_trips = 0
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(f"{directory}/.s.PGSQL.5432")
        self.listening.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.directory}&port=5432"

    def counts(self) -> tuple[int, int]:
        """Return the number of statements and of round trips so far."""
        return self.statements, self.round_trips

    def _accept(self) -> None:
        with suppress(OSError):  # the socket was closed
            while True:
                client, _ = self.listening.accept()
                upstream = socket.socket(socket.AF_UNIX)
                upstream.connect(f"{self.server.directory}/.s.PGSQL.{self.server.port}")
                threading.Thread(target=_pump, args=(client, upstream), daemon=True).start()
                threading.Thread(target=self._count, args=(upstream, client), daemon=True).start()

    def _count(self, upstream: socket.socket, client: socket.socket) -> None:
        pending = b""
        while data := upstream.recv(65536):
            pending += data
            # A message is one byte for its kind, then its length, which includes itself.
            while len(pending) >= 5 and len(pending) > (length := int.from_bytes(pending[1:5], "big")):
                self.statements += pending[:1] == b"C"
                self.round_trips += pending[:1] == b"Z"
                pending = pending[1 + length :]
            client.sendall(data)
        client.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    while data := source.recv(65536):
        sink.sendall(data)
    sink.close()


@contextmanager
def counting_proxy(server: Server) -> Iterator[CountingProxy]:
    directory = tempfile.mkdtemp(prefix="close_engine_bench_proxy_")
    proxy = CountingProxy(server, directory)
    try:
        yield proxy
    finally:
        proxy.listening.close()
        shutil.rmtree(directory)


class Tape:
    """Records the server's answers, to replay them."""

    def __init__(self) -> None:
        self.answers: list[tuple[Any, int, list[tuple[Any, ...]]]] = []
        self.position = 0
        self.state = "through"

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.state = "recording"
        yield
        self.state = "through"

    @contextmanager
    def playing(self) -> Iterator[None]:
        """Answer from the tape, and start again after the last answer.

        Raises:
            RuntimeError: nothing was recorded, because the code does not use these cursors.
        """
        if not self.answers:
            raise RuntimeError("the tape is empty: the recorded code does not connect through psycopg2.connect")
        self.state = "playing"
        yield
        self.state = "through"

    def next_answer(self) -> tuple[Any, int, list[tuple[Any, ...]]]:
        answer = self.answers[self.position]
        self.position = (self.position + 1) % len(self.answers)
        return answer


class TapeCursor(psycopg2.extensions.cursor):
    """A cursor that records the server's answers, or answers from the tape."""

    def __init__(self, *arguments: Any, tape: Tape, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._tape = tape
        self._answer: tuple[Any, int, list[tuple[Any, ...]]] = (None, -1, [])

    def execute(self, query: Any, values: Any = None) -> None:
        if self._tape.state == "playing":
            description, rowcount, rows = self._tape.next_answer()
        else:
            super().execute(query, values)
            description, rowcount = super().description, super().rowcount
            rows = super().fetchall() if description else []
            if self._tape.state == "recording":
                self._tape.answers.append((description, rowcount, rows))
        self._answer = (description, rowcount, list(rows))

    @property
    def description(self) -> Any:  # type: ignore[override]
        return self._answer[0]

    @property
    def rowcount(self) -> int:  # type: ignore[override]
        return self._answer[1]

    def fetchone(self) -> Any:
        return self._answer[2].pop(0) if self._answer[2] else None

    def fetchmany(self, size: int | None = None) -> Any:
        size = size or self.arraysize
        taken, self._answer[2][:] = self._answer[2][:size], self._answer[2][size:]
        return taken

    def fetchall(self) -> Any:
        return self.fetchmany(len(self._answer[2]) or 1)

    def __iter__(self) -> Any:
        return iter(self.fetchall())

    def __next__(self) -> Any:
        if not self._answer[2]:
            raise StopIteration
        return self._answer[2].pop(0)


@contextmanager
def replayed() -> Iterator[Tape]:
    """Give every connection that psycopg2 opens within this block cursors that use the tape."""
    tape, connect = Tape(), psycopg2.connect

    def connect_to_tape(*arguments: Any, **options: Any) -> psycopg2.extensions.connection:
        # Override the caller's factory: Django passes psycopg2's default one.
        return connect(*arguments, **{**options, "cursor_factory": partial(TapeCursor, tape=tape)})

    with mock.patch("psycopg2.connect", connect_to_tape):
        yield tape
