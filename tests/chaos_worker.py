"""A worker that the chaos test kills, suspends and poisons, and the provider that it sends to.

It is forked by a process that has imported this module, so that hundreds of workers can die in a minute.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
from dataclasses import astuple, dataclass
from datetime import datetime, timedelta
from pathlib import Path

import close_engine
from close_engine import OutboxMessage, Worker
from close_engine.database.binding import utc_now

LEASE = timedelta(seconds=2)
EFFECT = "look_up_business"

#: The messages of which one in fifty is poisonous, each in other conversations: it kills the worker that sends it.
_POISONOUS = {"Text 1": 10, "Text 2": 27, None: 43}


def is_poisonous(conversation_id: str, body: str | None) -> bool:
    """Whether this message of a conversation (`c1`, `c2`, …) kills its worker; the body of an effect is None."""
    return int(conversation_id[1:]) % 50 == _POISONOUS[body]


@dataclass(frozen=True)
class Line:
    """A line of the record.

    Attributes:
        what: `asked` before the provider is searched, `looked` when the worker looks whether it still has the lease,
            `begun` and `delivered` in the provider's call; `suspended` and `resumed` of a worker.
        at: when, in nanoseconds by a clock that all processes share.
        pid: the worker's process.
        message: id of the message.
        claims: number of its lease.
        conversation: id of its conversation.
        body: its text; empty for an effect.
    """

    what: str
    at: int
    pid: int
    message: int = 0
    claims: int = 0
    conversation: str = ""
    body: str = ""

    @classmethod
    def parse(cls, text: str) -> Line:
        what, at, pid, message, claims, conversation, body = text.split("\t")
        return cls(what, int(at), int(pid), int(message), int(claims), conversation, body)

    @property
    def provider_id(self) -> str:
        return f"SM{self.at}-{self.pid}"


class Record:
    """What happened, in order, whoever wrote it. A line stays, even if its process or the database crashes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY)

    def write(self, what: str, pid: int, *message: object) -> Line:
        line = Line(what, time.monotonic_ns(), pid, *message)  # type: ignore[arg-type]
        os.write(self._file, ("\t".join(map(str, astuple(line))) + "\n").encode())
        return line

    def lines(self) -> list[Line]:
        return [Line.parse(text) for text in self.path.read_text().splitlines()]

    def count(self, what: str) -> int:
        return self.path.read_bytes().count(f"\n{what}\t".encode())


class Provider:
    """A provider without idempotency keys: it delivers all that it is told, and can be searched for what it delivered.

    Args:
        record: where it delivers.
        hold: while there is such a file, the first call for a message hangs just before it delivers.
    """

    def __init__(self, record: Record, hold: Path) -> None:
        self._record = record
        self._hold = hold

    def find(self, message: OutboxMessage) -> str | None:
        """Search by whom and what, as one searches at a provider that knows nothing of messages and their keys."""
        self.note("asked", message)
        words = re.escape(f"\t{message.conversation_id}\t{message.body or ''}".encode())
        found = re.search(rb"^delivered\t.*" + words + rb"$", self._record.path.read_bytes(), re.MULTILINE)
        return None if found is None else Line.parse(found[0].decode()).provider_id

    def send(self, message: OutboxMessage) -> str:
        self.note("begun", message)
        if is_poisonous(message.conversation_id, message.body):
            os.kill(os.getpid(), signal.SIGKILL)
        # Its latency; some calls are slow.
        time.sleep(0.3 if message.id % 20 == 0 else 0.001)
        while message.claims == 1 and self._hold.exists():
            time.sleep(0.001)
        return self.note("delivered", message).provider_id

    def note(self, what: str, message: OutboxMessage) -> Line:
        whose = (message.id, message.claims, message.conversation_id, message.body or "")
        return self._record.write(what, os.getpid(), *whose)

    def note_looks(self) -> None:
        """From now on, note when a message is asked whether it is leased."""
        is_leased = OutboxMessage.is_leased.fget  # type: ignore[attr-defined]

        def look(message: OutboxMessage) -> bool:
            self.note("looked", message)
            return bool(is_leased(message))

        OutboxMessage.is_leased = property(look)  # type: ignore[assignment, method-assign]


def main(url: str, place: Path, log: Path, clock_ahead: timedelta) -> None:
    """Work until SIGTERM.

    Args:
        url: the database.
        place: the directory of the record.
        log: the file to log into.
        clock_ahead: how far this worker's clock is ahead of the true time.
    """
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), sys.stderr.fileno())
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("close_engine").setLevel(logging.INFO)

    def clock() -> datetime:
        return utc_now() + clock_ahead

    close_engine.connect(url, clock=clock)
    provider = Provider(Record(place / "record"), place / "hold")
    provider.note_looks()
    worker = Worker(
        provider,
        concurrency=4,
        lease=LEASE,
        idle=timedelta(seconds=0.1),
        sweep_every=timedelta(seconds=0.5),
    )
    signal.signal(signal.SIGTERM, lambda number, frame: worker.stop())
    worker.run()
