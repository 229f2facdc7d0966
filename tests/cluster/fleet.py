"""The clients and the workers: processes on the hosts, which are watched, killed and started anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.hosts import Host
from tests.cluster.record import Reader
from tests.prose import ROOT

__all__ = ["Fleet", "Member"]

#: What shows that a member is at work again: of a client, and of a worker.
DONE, AT_WORK = ("changed",), ("pinged", "swept")


@dataclass
class Member:
    """A process.

    Attributes:
        name: its own; whoever takes its place has another one.
        signs: the words by which it shows that it is at work.
        counted: how often it has noted each word.
        seen: when it first noted each word after the last thing that befell it.
    """

    name: str
    host: Host
    environment: dict[str, str]
    module: str
    arguments: tuple[str, ...]
    signs: tuple[str, ...]
    record: Path
    counted: Counter[str] = field(default_factory=Counter)
    seen: dict[str, float] = field(default_factory=dict)
    since: float = 0.0

    def start(self) -> None:
        self._reader = Reader(self.record)
        command = (sys.executable, "-m", self.module, str(self.record), self.name, *self.arguments)
        with self.log.open("ab") as log:
            self.process = self.host.popen(
                command,
                env={**os.environ, **self.environment},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> Path:
        return self.record.with_suffix(".log")

    def read(self) -> None:
        for line in self._reader.news():
            self.counted[line.word] += 1
            if line.at > self.since:
                self.seen.setdefault(line.word, line.at)

    @property
    def is_at_work(self) -> bool:
        return all(sign in self.seen for sign in self.signs)


class Fleet:
    """All clients and workers.

    Attributes:
        members: those that are to run.
        killed: how many were killed, by their module.
    """

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.killed: Counter[str] = Counter()
        self._gone: Counter[str] = Counter()

    def start(self, member: Member) -> None:
        member.start()
        self.members.append(member)

    def of(self, signs: Sequence[str]) -> list[Member]:
        return [member for member in self.members if member.signs == signs]

    def replace(self, member: Member, name: str) -> Member:
        """Kill a process with SIGKILL, and start another one in its place, as whoever watches over them does."""
        member.process.kill()
        member.process.wait(60)
        self.killed[member.module] += 1
        member.read()
        self._gone.update(member.counted)
        self.members.remove(member)
        record = member.record.with_name(f"{name}{member.record.suffix}")
        heir = Member(name, member.host, member.environment, member.module, member.arguments, member.signs, record)
        self.start(heir)
        return heir

    def look(self) -> None:
        """Read what they noted.

        Raises:
            RuntimeError: one of them has ended, and nobody has killed it.
        """
        for member in self.members:
            status = member.process.poll()
            if status is not None:
                said = "\n".join(member.log.read_text(errors="replace").splitlines()[-30:])
                raise RuntimeError(
                    f"{member.name} on {member.host.name} ended by itself, with status {status}:\n{said}"
                )
            member.read()

    def count(self, word: str) -> int:
        return self._gone[word] + sum(member.counted[word] for member in self.members)

    def watch_from(self, moment: float) -> None:
        """Only what is noted after that moment shows that they are at work."""
        for member in self.members:
            member.since = moment
            member.seen.clear()

    def idle(self) -> list[str]:
        return [f"{member.name} on {member.host.name}" for member in self.members if not member.is_at_work]

    def stop(self, signs: Sequence[str], limit: float = 60) -> None:
        """Ask some of them to stop, and wait for them.

        Raises:
            RuntimeError: one does not stop in time, or not with status 0.
        """
        stopping = self.of(signs)
        for member in stopping:
            member.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + limit
        for member in stopping:
            status = member.process.wait(max(0.1, end - time.monotonic()))
            if status:
                raise RuntimeError(f"{member.name} was asked to stop, and ended with status {status}: see {member.log}")
            member.read()
            self._gone.update(member.counted)
            self.members.remove(member)
