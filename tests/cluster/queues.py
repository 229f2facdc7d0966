"""`python -m tests.cluster.queues`: Celery on several hosts, on Redis and then on RabbitMQ, and what befalls them.

An application submits texts, half of which the CRM approves by SQL. Celery on two hosts sends them; its beat is on the
application's host. Meanwhile a host is killed, another one's network is cut, the broker dies, and the database is away.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.audit import NOTING, SENT_TWICE
from tests.cluster.bounded import bounded
from tests.cluster.hosts import Host, Network
from tests.cluster.postgres import DATABASE, USER, Node, until
from tests.cluster.record import Line, Reader
from tests.cluster.run import OPTIONS
from tests.debian import require
from tests.prose import ROOT

__all__ = ["run"]

PACKAGES = ("iproute2", "postgresql", "redis-server", "rabbitmq-server")

#: Conversations, and seconds between two texts.
CONVERSATIONS, PAUSE = 100, 0.02

URL = f"postgresql://{USER}@db/{DATABASE}?{OPTIONS}"

#: Seconds within which everything must be well again.
PATIENCE = 90

_OUTBOX = "SELECT body, send_key, status, provider_id, conversation_id FROM close_engine.outbox ORDER BY id"
_LATE = """
    SELECT count(*) FROM close_engine.outbox
    WHERE status = 'PENDING' AND created_at < close_engine.moment() - interval '1 s'
"""
_WAITING = "SELECT count(*) FROM close_engine.outbox WHERE status = 'PENDING'"


class Broker:
    """A broker on a host of its own."""

    name: str
    url: str
    user: str
    ready: str

    def __init__(self, host: Host, place: Path) -> None:
        self.host = host
        self.place = place / "broker"
        self.place.mkdir()
        shutil.chown(self.place, self.user)
        self.log = place / "broker.log"
        self.environment: dict[str, str] = {}
        self._starts = 0

    def command(self) -> list[str | Path]:
        raise NotImplementedError

    def start(self) -> None:
        self._starts += 1
        with self.log.open("ab") as log:
            self.host.popen(
                self.command(),
                user=self.user,
                env={**os.environ, **self.environment},
                cwd=self.place,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(lambda: self.log.read_text().count(self.ready) >= self._starts, f"{self.name} is up; see {self.log}")

    def kill(self) -> None:
        """Kill all its processes with SIGKILL."""
        self.host.kill()


class Redis(Broker):
    """It keeps nothing: when it is killed, all tasks are lost."""

    name, url, user = "Redis", "redis://broker:6379/0", "redis"
    ready = "Ready to accept connections"

    def command(self) -> list[str | Path]:
        return ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--appendonly", "no"]


class RabbitMQ(Broker):
    """As Debian has it, with its files in a directory of the run."""

    name, url, user = "RabbitMQ", "amqp://guest:guest@broker:5672//", "rabbitmq"
    ready = "Server startup complete"

    def __init__(self, host: Host, place: Path) -> None:
        super().__init__(host, place)
        (self.place / "rabbitmq.conf").write_text("loopback_users = none\nlisteners.tcp.default = 5672\n")
        self.environment = {
            "HOME": str(self.place),
            "RABBITMQ_NODENAME": "rabbit@localhost",
            "RABBITMQ_CONFIG_FILE": str(self.place / "rabbitmq"),
            "RABBITMQ_MNESIA_BASE": str(self.place / "mnesia"),
            "RABBITMQ_SCHEMA_DIR": str(self.place / "schema"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(self.place / "config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.place / "plugins"),
            "RABBITMQ_PID_FILE": str(self.place / "pid"),
            "RABBITMQ_LOGS": "-",
        }

    def command(self) -> list[str | Path]:
        return ["/usr/lib/rabbitmq/bin/rabbitmq-server"]  # the other one is for root


@dataclass
class Celery:
    """A worker or the beat on a host, and what its provider notes."""

    name: str
    host: Host
    arguments: tuple[str, ...]
    environment: dict[str, str]
    place: Path
    lines: list[Line] = field(default_factory=list)

    def start(self) -> None:
        self.log = self.place / f"{self.name}.log"
        self.reader = Reader(self.place / f"{self.name}.record")
        environment = {**os.environ, **self.environment, "RECORD": str(self.place / f"{self.name}.record")}
        command = [sys.executable, "-W", "ignore", "-m", "celery", "--app", "tests.cluster.celery_app", *self.arguments]
        with self.log.open("ab") as log:
            options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.process = self.host.popen(command, env=environment, cwd=ROOT, **options)

    def look(self) -> None:
        """Read what it noted.

        Raises:
            RuntimeError: it has ended, and nobody has killed it.
        """
        self.lines += self.reader.news()
        status = self.process.poll()
        if status is not None:
            said = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"{self.name} on {self.host.name} ended by itself, with status {status}:\n{said}")

    def stop(self) -> None:
        """Warm shutdown."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        self.lines += self.reader.news()
        if status:
            raise RuntimeError(f"{self.name} was asked to stop, and ended with status {status}: see {self.log}")


@dataclass
class Outage:
    """Seconds until both hosts sent again, and until no text waited for longer than a second."""

    what: str
    again: float
    caught_up: float


class Play:
    """Celery on one kind of broker, and what befalls it."""

    def __init__(self, network: Network, place: Path, kind: type[Broker]) -> None:
        self.began = time.monotonic()
        self.place = place
        self.database = Node(network["db"], place)
        self.broker = kind(network["broker"], place)
        self.network = network
        self.outages: list[Outage] = []
        self.calm: list[tuple[float, float]] = []
        self.wrong: list[str] = []
        self.lines: list[Line] = []
        self.gone: list[Celery] = []
        self.environment = {"BROKER": self.broker.url, "CLOSE_ENGINE_DATABASE": URL}

    def say(self, sentence: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {sentence}", flush=True)

    # -- before

    def set_up(self) -> None:
        self.database.make()
        self.broker.start()
        app = self.network["app"]
        app.run([Path(sys.executable).parent / "close-engine", "migrate", "--standalone", "--database", URL])
        for statement in NOTING:
            self.database.query(statement)
        self.workers = [self._worker("worker1", 1), self._worker("worker2", 1)]
        beat = ("beat", "--loglevel", "INFO", "--pidfile", "")
        self.beat = Celery("beat", app, beat, self.environment, self.place)
        self.beat.start()
        record = self.place / "submitter.record"
        command = [sys.executable, "-m", "tests.cluster.submitter", str(record), str(CONVERSATIONS), str(PAUSE)]
        with (self.place / "submitter.log").open("ab") as log:
            self.submitter = app.popen(
                command, env={**os.environ, **self.environment}, cwd=ROOT, stdout=log, stderr=log
            )
        self.submitted = Reader(record)
        began = time.monotonic()
        self._wait_until_all_send(began)
        self.say(f"{self.broker.name}: two hosts send, with two processes each; half of the texts are approved by SQL.")
        self._measure_calm()

    def _worker(self, host: str, generation: int) -> Celery:
        arguments = ("worker", "--pool", "prefork", "--concurrency", "2", "--loglevel", "INFO")
        made = Celery(f"{host}-{generation}", self.network[host], arguments, self.environment, self.place)
        made.start()
        return made

    def _measure_calm(self) -> None:
        """Nothing befalls it for eight seconds, of which the last two are for what is under way."""
        now = time.monotonic()
        self.calm.append((now, now + 6))
        while time.monotonic() < now + 8:
            self._look()
            time.sleep(0.1)

    # -- what befalls it

    def kill_a_host(self) -> None:
        began = time.monotonic()
        old = self.workers.pop(0)
        old.host.kill()
        old.lines += old.reader.news()
        self.gone.append(old)
        self.say(f"{old.host.name} is killed, with all its processes.")
        time.sleep(3)
        self.workers.insert(0, self._worker(old.host.name, 2))
        self._measure("a worker's host is killed, and back after 3 s", began)

    def cut_a_host(self) -> None:
        began = time.monotonic()
        host = self.workers[1].host
        host.cut()
        self.say(f"The cable of {host.name} is out for ten seconds.")
        time.sleep(10)
        gone = time.monotonic()
        host.heal()
        self._measure("a worker's network is cut for 10 s", began, gone)

    def kill_the_broker(self) -> None:
        began = time.monotonic()
        self.broker.kill()
        self.say(f"{self.broker.name} is killed.")
        time.sleep(5)
        gone = time.monotonic()
        self.broker.start()
        self.say(f"{self.broker.name} is started again, and up after {time.monotonic() - gone:.1f} s.")
        self._measure("the broker is killed, and started again after 5 s", began, gone)

    def kill_the_database(self) -> None:
        began = time.monotonic()
        self.database.kill()
        self.say("PostgreSQL is killed.")
        time.sleep(3)
        gone = time.monotonic()
        self.database.start()
        self._measure("PostgreSQL is killed, and started again after 3 s", began, gone)

    def _measure(self, what: str, began: float, gone: float | None = None) -> None:
        again = self._wait_until_all_send(gone or began)
        end = time.monotonic() + PATIENCE
        while self.database.query(_LATE) != [(0,)]:
            self._look()
            if time.monotonic() > end:
                raise RuntimeError(f"After {PATIENCE} s, texts still wait.")
            time.sleep(0.1)
        self.outages.append(Outage(what, again - began, time.monotonic() - began))
        self.say(f"Both hosts send again after {again - began:.1f} s, and no text is late.")

    def _wait_until_all_send(self, since: float) -> float:
        """Return when the last of the workers sent for the first time since then."""
        end = time.monotonic() + PATIENCE
        while True:
            self._look()
            firsts = [next((line.at for line in worker.lines if line.at > since), None) for worker in self.workers]
            if None not in firsts:
                return max(at for at in firsts if at is not None)
            if time.monotonic() > end:
                idle = [worker.name for worker, first in zip(self.workers, firsts, strict=True) if first is None]
                raise RuntimeError(f"After {PATIENCE} s, these do not send: {', '.join(idle)}.")
            time.sleep(0.1)

    def _look(self) -> None:
        for one in (*self.workers, self.beat):
            one.look()
        self.lines += self.submitted.news()
        if self.submitter.poll() is not None:
            raise RuntimeError(f"The application ended by itself: see {self.place}/submitter.log")

    # -- afterwards

    def finish(self) -> None:
        self._measure_calm()
        self.submitter.terminate()
        self.submitter.wait(60)
        self.lines += self.submitted.news()
        until(lambda: self.database.query(_WAITING) == [(0,)], "the workers have sent all that waits", PATIENCE)
        for one in (*self.workers, self.beat):
            one.look()
            one.stop()
        self.say("All that was committed is sent, and everybody has stopped.")
        self._audit()

    def _audit(self) -> None:
        rows = self.database.query(_OUTBOX)
        deliveries = [line for one in (*self.gone, *self.workers) for line in one.lines if line.word == "delivered"]
        first: dict[str, float] = {}
        for line in sorted(deliveries, key=lambda line: line.at):
            first.setdefault(line.about, line.at)
        done = {line.about for line in self.lines if line.word == "done"}
        tried = {line.about: line.at for line in self.lines if line.word == "try"}
        texts = [f"{body} {send_key}" for body, send_key, *_ in rows]
        self._none(done - {body for body, *_ in rows}, "texts were acknowledged and are lost")
        self._none([body for body, count in Counter(row[0] for row in rows).items() if count > 1], "are there twice")
        self._none([row[0] for row in rows if row[2] != "SENT"], "texts are not sent")
        self._none([row[0] for row in rows if row[3] != f"SM-{row[1]}"], "texts have another provider id")
        self._none(self.database.query(SENT_TWICE), "texts were recorded as sent twice")
        self._none([key for key, count in Counter(row[1] for row in rows).items() if count > 1], "send_keys repeat")
        self._none(set(texts) - first.keys(), "texts are recorded as sent and never were")
        self._none(first.keys() - set(texts), "deliveries are of no text, or under another key")
        last: dict[str, float] = {}
        overtaken = []
        for body, send_key, _, _, conversation in rows:
            at = first.get(f"{body} {send_key}", 0.0)
            if at < last.get(conversation, 0.0):
                overtaken.append(body)
            last[conversation] = at
        self._none(overtaken, "texts overtook another one of their conversation")
        waits = sorted(
            (first[text] - tried[body]) * 1000
            for text, (body, *_) in zip(texts, rows, strict=True)
            if text in first and any(begin < tried[body] < end for begin, end in self.calm)
        )
        said = "".join(one.log.read_text() for one in (*self.gone, *self.workers))
        self.figures = {
            "texts sent": len(rows),
            "of these approved by SQL": sum(line.word == "approved" for line in self.lines),
            "deliver tasks received": len(re.findall(r"Task close_engine\.deliver\[\S+\] received", said)),
            "deliveries beyond the first of a text, with the same key": len(deliveries) - len(first),
            "ms from before a commit to the provider, while nothing befalls it, median": round(
                statistics.median(waits)
            ),
            "ms at most, of 99 in 100": round(waits[len(waits) * 99 // 100]),
        }

    def _none(self, found: Any, what: str) -> None:
        listed = list(found)
        if listed:
            self.wrong.append(f"{len(listed)} {what}: {', '.join(map(str, listed[:5]))}")

    def report(self) -> None:
        print()
        for what, figure in self.figures.items():
            print(f"  {figure:>8,}  {what}")
        print("\n  both hosts send again   nothing is late")
        for outage in self.outages:
            print(f"  {outage.again:>19.1f} s {outage.caught_up:>15.1f} s   {outage.what}")
        print()


def _played(kind: type[Broker]) -> list[str]:
    place = Path(tempfile.mkdtemp(prefix=f"close-engine-cluster-{os.getpid()}-"))
    place.chmod(0o711)
    shutil.chown(place, "postgres")
    wrong: list[str] = []
    try:
        with Network("db", "broker", "app", "worker1", "worker2") as network:
            play = Play(network, place, kind)
            acts: list[Callable[[], None]] = [
                *(play.set_up, play.kill_a_host, play.cut_a_host, play.kill_the_broker, play.kill_the_database),
                *(play.finish, play.report),
            ]
            try:
                for act in acts:
                    act()
            except RuntimeError as error:
                play.wrong.append(str(error))
            wrong = play.wrong
    finally:
        if not wrong:
            shutil.rmtree(place, ignore_errors=True)
    return [f"{kind.name}: {sentence} (see {place})" for sentence in wrong]


def run(kinds: tuple[type[Broker], ...] = (Redis, RabbitMQ)) -> int:
    """Play it on each kind of broker, and return the exit status."""
    require(PACKAGES, "make cluster")
    began = time.monotonic()
    wrong = [sentence for kind in kinds for sentence in _played(kind)]
    minutes = (time.monotonic() - began) / 60
    if wrong:
        print(f"After {minutes:.1f} minutes, this is wrong:")
        print("\n".join(f"  {sentence}" for sentence in wrong))
        return 1
    names = " and ".join(kind.name for kind in kinds)
    print(
        f"In {minutes:.1f} minutes with Celery on {names}: 0 texts lost, 0 recorded twice, none overtook another one."
    )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.queues", description=__doc__)
    brokers: dict[str, type[Broker]] = {kind.__name__.lower(): kind for kind in (Redis, RabbitMQ)}
    parser.add_argument("brokers", nargs="*", help=f"only these, of {' and '.join(brokers)}; by default each of them")
    names = parser.parse_args().brokers or list(brokers)
    if unknown := [name for name in names if name not in brokers]:
        parser.error(f"there is no broker {unknown[0]!r}: choose from {', '.join(brokers)}")
    return bounded(lambda: run(tuple(brokers[name] for name in names)), seconds=900)


if __name__ == "__main__":
    sys.exit(main())
