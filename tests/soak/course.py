"""The course of a run: who is started, when the clock jumps, who is killed or suspended, what the owner does."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

import peewee
import psutil

import close_engine
from close_engine import CloseEngineConversation, Delivery, DeliveryStatus, Stage, outbox
from tests.servers import PrivateServer, execute
from tests.soak import agency, people
from tests.soak.audit import STUCK
from tests.soak.clock import Calendar, DatabaseClock
from tests.soak.figures import Span
from tests.soak.gauges import Gauges
from tests.soak.notes import Log

WORKERS = 3
#: Seconds from one jump of the clock to the next.
EVERY = 20.0
JUMP = timedelta(hours=4)
#: How long a worker is suspended: beyond its leases.
SUSPENDED = agency.LEASE.total_seconds() * 1.5
#: How long the calls feel a jump: each session plans anew what it had planned, because the clock is another function.
AFTER_A_JUMP = 2.0
#: What `prune` empties is older than this.
OLD = timedelta(days=2)
#: The longest that anything may take that must come.
LIMIT = 120.0

_PREFIX = "close_engine_soak_"
_IN_FLIGHT = "SELECT count(*) FROM close_engine.outbox WHERE status = 'PENDING' AND leased_by IS NOT NULL"
_MOMENT = "SELECT close_engine.moment()"
_COUNTS = """
    SELECT (SELECT count(*) FROM close_engine_conversations),
        (SELECT count(*) FROM close_engine_conversations WHERE stage NOT IN ('COMPLETED', 'CLOSED_LOST', 'STALLED')),
        (SELECT count(*) FROM close_engine_conversations WHERE stage = 'STALLED'),
        (SELECT count(*) FROM close_engine.outbox WHERE status = 'PENDING'),
        (SELECT count(*) FROM pending_actions WHERE status = 'PENDING')
"""
#: The CRM's own role: what docs/prisma.md grants it.
_CRM = (
    "CREATE ROLE crm_app LOGIN",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON close_engine_conversations, pending_actions TO crm_app",
)


class Failed(Exception):
    """The run cannot go on: a process ended, or something that must come did not."""


def clear_old_runs() -> list[str]:
    """End the servers of runs that were killed, and remove their directories. Return what was removed."""
    removed = []
    for place in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if psutil.pid_exists(int(place.name.removeprefix(_PREFIX).partition("_")[0])):
            continue
        for pid_file in place.glob("*/postmaster.pid"):
            with suppress(psutil.NoSuchProcess, ValueError):
                server = psutil.Process(int(pid_file.read_text().split()[0]))
                if str(pid_file.parent) in server.cmdline():
                    server.send_signal(signal.SIGQUIT)
                    server.wait(30)
        shutil.rmtree(place, ignore_errors=True)
        removed.append(str(place))
    return removed


class Run:
    """A run, to be used in a `with` block, which leaves nothing behind.

    Args:
        minutes: how long it takes.
        say: is called with each sentence to print.

    Attributes:
        span: from when all is up until the leads are silent.
        stirred: the parts of it that say nothing of how long a call takes.
        struck: process ids of the workers that were killed or suspended.
        drained_at: when the workers had sent all that was due; by the database's clock.
    """

    span: Span
    drained_at: datetime

    def __init__(self, minutes: float, say: Callable[[str], None]) -> None:
        self.seconds = minutes * 60
        self.say = say
        self.jumps = int(self.seconds // EVERY)
        self.stirred: list[Span] = []
        self.struck: set[int] = set()
        self.kills = self.suspensions = 0
        self.codes: dict[str, int | None] = {}
        self._processes: dict[str, BaseProcess] = {}
        self._context = multiprocessing.get_context("spawn")

    def __enter__(self) -> Run:
        self.place = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}_"))
        self.place.chmod(0o755)  # PostgreSQL, which does not run as root, has its directory in it
        try:
            self._server = PrivateServer(place=str(self.place))
            self._server.__enter__()
        except BaseException:
            shutil.rmtree(self.place, ignore_errors=True)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()
        with suppress(Exception):
            self.database.close()
        self._server.__exit__(*error)
        shutil.rmtree(self.place, ignore_errors=True)

    # -- from the beginning to the end

    def play(self) -> None:
        self._set_up()
        self._begun = time.monotonic()
        for number in range(1, self.jumps + 1):
            self._rest_until(self._begun + (number - 0.5) * EVERY)
            self._strike(number)
            self._rest_until(self._begun + number * EVERY)
            self._jump(number)
        self._rest_until(self._begun + self.seconds)
        self.span = Span(self._begun, time.monotonic())
        self._wind_down()

    def _set_up(self) -> None:
        url = self._server.url
        self.calendar = Calendar(RawValue("d", 0.0))
        self.database: peewee.Database = close_engine.connect(url, clock=self.calendar)
        close_engine.migrate(standalone=True)
        agency.subscribe()
        execute(url, *_CRM)
        self.log = Log(self.place)
        self._clock = DatabaseClock(self.database, self.calendar)
        self._clock.be_behind(self.jumps * JUMP)
        postmaster = int(next(self.place.glob("*/postmaster.pid")).read_text().split()[0])
        self.gauges = Gauges(self.database, postmaster)
        for number in range(1, WORKERS + 1):
            self._start(f"worker {number}", agency.work)
        self._start("webhooks", people.lead_and_provide)
        self._start("approvals", people.decide)
        self._wait(lambda: self.log.delivered.path.stat().st_size, "the first text is delivered")
        self._say(f"{WORKERS} workers, webhooks and approvals are up; {self._counted()}")

    def _start(self, name: str, work: Callable[..., None]) -> None:
        arguments = (name, self._server.url, self.place, self.calendar)
        process = self._context.Process(target=work, args=arguments, name=name)
        # What is ignored now is ignored there: Ctrl-C is for this process, which ends the others.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        process.start()
        signal.signal(signal.SIGINT, before)
        self._processes[name] = process

    def _wind_down(self) -> None:
        for name in ("webhooks", "approvals"):
            self._end(name)
        if self.calendar.behind:
            self._jump(self.jumps)
        self._wait(self._is_drained, "all that is due is sent")
        for name in list(self._processes):
            self._end(name)

    def _is_drained(self) -> bool:
        (self.drained_at,) = self.database.execute_sql(_MOMENT).fetchone()
        stuck = self.database.execute_sql(STUCK, (self.drained_at, self.drained_at)).fetchall()
        return not stuck and not self._number(_IN_FLIGHT)

    def _end(self, name: str) -> None:
        process = self._processes.pop(name)
        process.terminate()
        process.join(LIMIT)
        self.codes[name] = process.exitcode

    # -- what happens

    def _jump(self, number: int) -> None:
        """Let hours pass, while nothing is in flight: leases are by this clock, too."""
        began = time.monotonic()
        close_engine.pause_sending("the clock is about to jump", by="soak")
        self._wait(lambda: not any(self._number(_IN_FLIGHT) for _ in range(3)), "nothing is in flight")
        self._clock.be_behind((self.jumps - number) * JUMP)
        close_engine.resume_sending(by="soak")
        self.stirred.append(Span(began, time.monotonic() + AFTER_A_JUMP))
        passed = number * JUMP
        self._say(f"day {passed.days + 1}, {passed.seconds // 3600:02}:00 — {self._counted()}")
        if passed.seconds == 0:
            self._keep_house()

    def _strike(self, number: int) -> None:
        """Kill a worker, or suspend one for longer than its leases. The first one lives, for its memory to be seen."""
        if number % 2:
            name = f"worker {2 + self.kills % (WORKERS - 1)}"
            self.kills += 1
            victim = self._processes[name]
            self.struck.add(self._pid(name))
            victim.kill()
            victim.join()
            self._say(f"{name} was killed, and is started again")
            self._start(name, agency.work)
        else:
            name = f"worker {1 + self.suspensions % WORKERS}"
            self.suspensions += 1
            pid, began = self._pid(name), time.monotonic()
            self.struck.add(pid)
            os.kill(pid, signal.SIGSTOP)
            self._rest_until(began + SUSPENDED)
            os.kill(pid, signal.SIGCONT)
            self.stirred.append(Span(began, time.monotonic() + 0.5))
            self._say(f"{name} was suspended for {SUSPENDED:.0f} seconds")

    def _keep_house(self) -> None:
        """What an owner does at night: empty what is old, forget who asked for it, send again what did not arrive."""
        pruned = close_engine.prune(older_than=OLD)
        lead = CloseEngineConversation.select().where(CloseEngineConversation.stage == Stage.COMPLETED)
        for conversation in lead.order_by(peewee.fn.random()).limit(2):
            close_engine.forget(conversation.lead_id)
        lost = Delivery.select().where(Delivery.status == DeliveryStatus.UNDELIVERED).order_by(Delivery.at.desc())
        again = 0
        for delivery in lost.limit(10):
            with suppress(close_engine.CloseEngineError):
                outbox.requeue(delivery.message_id)
                again += 1
        self._say(
            f"the owner pruned {sum(vars(pruned).values())} rows, forgot two leads, and sent {again} texts again that "
            "had not arrived"
        )

    # -- waiting and looking

    def _rest_until(self, end: float) -> None:
        """Measure, and see that everybody lives, until this moment."""
        sample_every = min(10.0, self.seconds / 30)
        while (left := end - time.monotonic()) > 0:
            samples = self.gauges.samples
            if not samples or time.monotonic() - samples[-1].at >= sample_every:
                self._sample()
            self._look()
            time.sleep(min(0.25, left))

    def _sample(self) -> None:
        self.gauges.take({name: self._pid(name) for name in self._processes} | {"this": os.getpid()})

    def _look(self) -> None:
        for name, process in self._processes.items():
            if process.exitcode is not None:
                logs = (self.place / f"{name}.log").read_text()[-3000:]
                raise Failed(f"{name} ended with status {process.exitcode}:\n{logs}")

    def _wait(self, condition: Callable[[], Any], what: str) -> None:
        end = time.monotonic() + LIMIT
        while not condition():
            if time.monotonic() > end:
                raise Failed(f"After {LIMIT:.0f} seconds it is still not true that {what}.")
            self._look()
            time.sleep(0.05)

    def _pid(self, name: str) -> int:
        pid = self._processes[name].pid
        assert pid is not None
        return pid

    def _number(self, query: str) -> int:
        return int(self.database.execute_sql(query).fetchone()[0])

    def _counted(self) -> str:
        counts = self.database.execute_sql(_COUNTS).fetchone()
        texts = "{} conversations, {} active, {} stalled; {} messages wait, and {} drafts for approval"
        return texts.format(*counts)

    def _say(self, sentence: str) -> None:
        passed = int(time.monotonic() - getattr(self, "_begun", time.monotonic()))
        self.say(f"{passed // 60:02}:{passed % 60:02}  {sentence}")
