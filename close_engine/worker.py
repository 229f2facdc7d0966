"""A worker that needs no queue server: it claims messages, sends them, records the results, and sweeps on a timer.

    worker = Worker(send, concurrency=4)                # send(message) returns the provider's id for the message
    worker.run()                                        # until worker.stop(); the messages being sent are finished

Up to `concurrency` messages are sent at once, each in a thread with a connection of its own. A message is claimed when
there is a thread to send it. `send` raises `CannotBeSent` if a message can never be delivered, and `Snooze` if it is to
be tried later. After any other error, the message is tried again. `send` is called once per lease, and again if a
worker dies in the middle of a send: pass `message.send_key` to the provider as its idempotency key, or give the worker
an object that has `find` as well as `send`.

A worker wakes at once if a message is put in: PostgreSQL tells it. Where nobody tells it, it looks every `idle`. Its
first log line says which.

While it runs, a row in the table `workers` says so, which the board shows.

If the database restarts, the worker waits for it. What it has sent meanwhile is recorded as soon as the database is
back. One line is logged per event, under the name `close_engine.worker`.

>>> from close_engine import connect, migrate
>>> database = connect("sqlite:///:memory:")
>>> applied = migrate(standalone=True)
>>> Worker(lambda message: f"SM-{message.id}").run_until_empty()
0
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from types import ModuleType, NoneType
from typing import Any, Protocol

import peewee
from playhouse.pool import PooledDatabase

from close_engine import deliveries, heartbeats, optouts, outbox, pauses, policies, sweeps, tally
from close_engine.database.binding import current, is_transient, now
from close_engine.database.notices import Listener
from close_engine.errors import (
    CannotBeSent,
    ConfigurationError,
    InvalidValue,
    LeadNotFound,
    LeaseLost,
    MessageNotFound,
    RecipientOptedOut,
    SchemaError,
    Snooze,
    first_line,
    one_line,
)
from close_engine.outbox import OutboxMessage
from close_engine.policies import DailyCap, QuietHours
from close_engine.printable import get_logger, log_value
from close_engine.schema.scripts import pending
from close_engine.stages import MessageStatus

__all__ = ["FindingSender", "Sender", "Worker", "load_module", "load_sender"]

logger = get_logger(__name__)

Sender = Callable[[OutboxMessage], "str | None"]
"""A function that sends a message and returns the provider's id for it, or None if it has none."""


#: The most senders of one worker: each has a thread and a connection.
MOST_SENDERS = 1000

#: The longest that a thread can wait on every platform, and then some.
LONGEST = timedelta(days=30)


class FindingSender(Protocol):
    """A sender that can tell whether a message has left, for a provider without idempotency keys."""

    def send(self, message: OutboxMessage) -> str | None:
        """Send a message, and return the provider's id for it, or None if it has none."""

    def find(self, message: OutboxMessage) -> str | None:
        """Return the provider's id of the message if it left in an earlier attempt, or None if it did not.

        It is asked before a message is sent again. An error is no answer: the message is tried again later.
        """


def load_module(name: str) -> ModuleType:
    """Import a module by name. The current directory is searched too.

    Args:
        name: str, the module's name.

    Returns:
        the module.

    Raises:
        ConfigurationError: it cannot be imported.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # Whatever a module does when it is imported may fail, also in its own way.
        kind = "" if isinstance(error, ImportError) else type(error).__name__
        what = ": ".join(filter(None, (kind, one_line(error))))
        raise ConfigurationError(f"The module {name!r} cannot be imported: {what}.") from error


def load_sender(name: str) -> Sender | FindingSender:
    """Import a sender by name. The current directory is searched too.

    Args:
        name: str, as `module:name`.

    Returns:
        the function, or the object with the methods `send` and `find`.

    Raises:
        ConfigurationError: there is no such module or name, or it cannot be called.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ConfigurationError(f"The sender {name!r} must have the form module:name.")
    sender = getattr(load_module(module), attribute, None)
    if sender is None:
        raise ConfigurationError(f"There is no sender {name!r}: {module} has no {attribute}.")
    _methods(sender)
    found: Sender | FindingSender = sender
    return found


class Worker:
    """Send the messages in the outbox, several at once.

    It opens connections of its own: one for each sender, one to extend the leases, one to sweep. Where its threads
    would not see the messages, it sends one at a time in the caller's thread: with `sqlite:///:memory:`, and inside the
    transaction of a test that is rolled back in the end.

    Args:
        send: the sender: a function of one OutboxMessage, or an object with the methods `send` and `find`.
        name: str, the owner of its leases and the actor in the history. No two workers may share one; the default is
            unique.
        concurrency: int, how many messages to send at once, from 1 to 1000.
        topics: sequence of str, the topics to send; the default is all.
        lease: timedelta, how long its messages stay leased if it dies. While it lives, it extends its leases.
        idle: timedelta, the longest to wait before it looks for messages again, or for the database if that is down.
        sweep: the function that sweeps, or None to turn sweeps off.
        sweep_every: timedelta, how often to sweep. The first sweep runs when the worker starts.
        quiet_hours: QuietHours, when leads are not texted: their texts are snoozed until they may be.
        daily_cap: DailyCap, how many texts a lead gets from the AI in a day: what is beyond it, a human decides.

    Raises:
        ConfigurationError: the sender cannot be called, or is a coroutine function.
        InvalidValue: `concurrency` is not from 1 to 1000, `topics` is no list or empty, a timedelta is not greater than
            zero or too long to wait for, or a policy is none.
    """

    def __init__(
        self,
        send: Sender | FindingSender,
        *,
        name: str | None = None,
        concurrency: int = 4,
        topics: Sequence[str] | None = None,
        lease: timedelta = timedelta(minutes=1),
        idle: timedelta = timedelta(seconds=1),
        sweep: Callable[[], sweeps.Swept] | None = sweeps.sweep,
        sweep_every: timedelta = timedelta(minutes=1),
        quiet_hours: QuietHours | None = None,
        daily_cap: DailyCap | None = None,
    ) -> None:
        if not 1 <= concurrency <= MOST_SENDERS:
            raise InvalidValue("concurrency", concurrency, f"it must be at least 1 and at most {MOST_SENDERS}")
        if topics is not None and (isinstance(topics, str) or not topics):
            raise InvalidValue("topics", topics, "it must be a list of at least one topic")
        for option, duration in {"lease": lease, "idle": idle, "sweep_every": sweep_every}.items():
            if duration <= timedelta(0):
                raise InvalidValue(option, str(duration), "it must be greater than zero")
            if duration > LONGEST:
                raise InvalidValue(option, str(duration), f"it can be at most {LONGEST.days} days")
        if not isinstance(quiet_hours, (QuietHours, NoneType)):
            raise InvalidValue("quiet_hours", quiet_hours, "it must be a QuietHours")
        if not isinstance(daily_cap, (DailyCap, NoneType)):
            raise InvalidValue("daily_cap", daily_cap, "it must be a DailyCap")
        self.send, self.find = _methods(send)
        self.name = name or f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}"
        self.concurrency = concurrency
        self.topics = None if topics is None else tuple(map(str, topics))
        self.lease = lease
        self.idle = idle
        self.sweep = sweep
        self.sweep_every = sweep_every
        # At night nothing is counted: tomorrow is another day.
        self.policies = [policy for policy in (quiet_hours, daily_cap) if policy is not None]
        self.stopping = False
        self._swept_at: datetime | None = None
        # A signal handler may put to a SimpleQueue while the same thread waits for it. It must not set an Event.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def stop(self) -> None:
        """Ask the worker to stop: it finishes the messages that it is sending and returns.

        It can be called from any thread or signal handler.
        """
        self.stopping = True
        self._wake.put(None)

    def run(self) -> None:
        """Send and sweep until `stop` is called. If the database is down, wait for it.

        Raises:
            ConfigurationError: CLOSE_ENGINE_LISTEN names no PostgreSQL database.
            SchemaError: the database is not migrated.
            peewee.PeeweeException: `stop` was called while the database was down, and the result of a message could
                not be recorded within the length of a lease; or the database raised another kind of error.
        """
        self._work(_Shift(self, patient=True))
        logger.info("stopped worker=%s", self.name)

    def run_until_empty(self) -> int:
        """Send everything that can be sent now, for example from a cron job. Messages that are not due are left.

        Returns:
            int, how many messages were claimed.

        Raises:
            SchemaError: the database is not migrated.
            peewee.PeeweeException: the database cannot be reached.
        """
        return self._work(_Shift(self))

    def run_once(self) -> int:
        """Sweep if it is time, then send up to `concurrency` messages at once.

        Returns:
            int, how many messages were claimed.

        Raises:
            SchemaError: the database is not migrated.
            peewee.PeeweeException: the database cannot be reached.
        """
        return self._work(_Shift(self, each=1))

    def pause(self, seconds: float | None = None) -> None:
        """Wait this long, or else as long as `idle` says, or until `stop` or `wake` is called."""
        with suppress(queue.Empty):
            self._wake.get(timeout=self.idle.total_seconds() if seconds is None else seconds)

    def wake(self) -> None:
        """End `pause` early."""
        self._wake.put(None)

    def sweep_if_due(self) -> None:
        """Sweep if it is time. What fails, for example a hook of the user's, is logged; the next sweep tries again."""
        moment, last = now(), self._swept_at
        if self.sweep is None or (last is not None and last <= moment < last + self.sweep_every):
            return
        self._swept_at = moment
        try:
            swept = self.sweep()
        except Exception as error:
            if is_transient(error):
                self._swept_at = last
                raise
            logger.exception("sweep failed worker=%s", self.name)
            return
        for row_id, sentence in swept.failed.items():
            logger.error("sweep passed over worker=%s id=%s error=%s", self.name, log_value(row_id), sentence)
        if any(vars(swept).values()):
            counts = " ".join(f"{kind}={len(ids)}" for kind, ids in vars(swept).items())
            logger.info("swept worker=%s %s", self.name, counts)

    def _work(self, shift: _Shift) -> int:
        database = current().database
        in_memory = isinstance(database, peewee.SqliteDatabase) and database.database in ("", ":memory:")
        if in_memory or database.in_transaction():
            shift.in_this_thread()
        else:
            shift.in_threads()
        return shift.claimed


class _Shift:
    """One run of a worker: its senders, its heartbeat, its sweeps.

    Args:
        worker: Worker.
        patient: bool, whether to wait for work and for the database until the worker is stopped.
        each: int, the most messages for each sender; None for any number.
    """

    def __init__(self, worker: Worker, *, patient: bool = False, each: int | None = None) -> None:
        self.worker = worker
        self.patient = patient
        self.each = each
        self.claimed = 0
        self._began = time.monotonic()
        self._is_said: bool | None = None  # whether the database knows that this worker runs; None until it was told
        self._failure: BaseException | None = None
        self._over = threading.Event()
        self._ears = Listener(self._announce, self._note_wakes, worker.idle.total_seconds()) if patient else None
        self._wakes: str | None = None  # as the log says it; None until the first line
        self._look_at = 0.0  # when to look for messages in any case, by time.monotonic()
        #: Guards everything below. `_turn` is notified when a sender may claim again, `_work` when one should look.
        self._lock = threading.Lock()
        self._turn, self._work = threading.Condition(self._lock), threading.Condition(self._lock)
        self._checked = False
        self._busy = 0  # senders that claim or send
        self._alone = False  # whether one of them sends what may kill this process, or looks for such a message
        self._pausing = False  # whether nothing new is claimed while one is busy, so that one of them can look for it
        self._in_flight: dict[int, OutboxMessage] = {}
        self._waits = False  # whether senders wait for work
        self._news = 0  # how often something may have become free to claim
        self._paused: list[str] = []  # as the log says it

    # -- the threads

    def in_this_thread(self) -> None:
        """Work in the caller's thread, one message at a time."""
        self._note_wakes("it works in the caller's thread")
        while not self.worker.stopping:
            self._require_migrated()
            self.worker.sweep_if_due()
            before = self.claimed
            self._send()
            if not self.patient:
                return
            if self.claimed == before:
                self.worker.pause(self._until_next_look())

    def in_threads(self) -> None:
        """Work in threads, each with connections of its own, and wait for them."""
        name = self.worker.name
        sweeper = self._thread(f"{name} sweep", self._sweep)
        heartbeat = self._thread(f"{name} heartbeat", self._beat)
        senders = [self._thread(f"{name} sender {n}", self._send) for n in range(1, self.worker.concurrency + 1)]
        background = [heartbeat]
        self._waits = self.patient
        if self._ears is not None:
            listener = self._thread(f"{name} listener", self._ears.run)
            background.append(listener)
            listener.start()
        while self.patient and self._wakes is None and not self._ending:
            self.worker.pause()
        if self.worker.sweep is not None:
            background.append(sweeper)
            sweeper.start()
            if not self.patient:
                sweeper.join()
        for thread in (heartbeat, *senders):
            thread.start()
        try:
            while self.patient and not self._ending:
                self.worker.pause(self._until_next_look())
                if not self._until_next_look():
                    self._look_in(self.worker.idle)
                    self._announce()
            with self._lock:
                self._wake_all()
            for thread in senders:
                thread.join()
        finally:
            self._over.set()
            if self._ears is not None:
                self._ears.stop()
        for thread in background:
            thread.join()
        if self._failure is not None:
            raise self._failure

    @property
    def _ending(self) -> bool:
        return self.worker.stopping or self._failure is not None

    def _thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """Make a thread whose failure ends the worker."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                with self._lock:
                    self._failure = self._failure or error
                    self._wake_all()
                self.worker.wake()
            finally:
                _disconnect()

        return threading.Thread(target=run, name=name, daemon=True)

    def _beat(self) -> None:
        """Extend the leases of what is in flight, and say that the worker runs, until the end. No error stops it."""
        began = time.monotonic()
        every = {self._extend: self.worker.lease.total_seconds() / 3, self._say: heartbeats.EVERY.total_seconds()}
        due = {act: began + seconds for act, seconds in every.items()}
        if self.patient:
            due[self._say] = began
        while not self._over.wait(min(due.values()) - time.monotonic()):
            act = min(due, key=due.__getitem__)
            due[act] = time.monotonic() + every[act]
            act()
        if self._is_said:
            with suppress(Exception):  # then it will be seen that nobody sees it any more
                _connect()
                heartbeats.end(self.worker.name)

    def _extend(self) -> None:
        """Extend the leases of what is in flight."""
        worker = self.worker
        with self._lock:
            held = list(self._in_flight.values())
        try:
            if held:
                _connect()
                outbox.extend(held, worker.lease)
                # Where one sender or another is always busy, nobody would ever look. A message that hangs holds up
                # the others every other beat at most.
                self._pause(not self._pausing and outbox.suspect_is_next(worker.topics))
        except Exception as error:
            # The next beat tries again. If the lease is lost by then, recording the result reports it.
            logger.warning("heartbeat failed worker=%s: %s", worker.name, first_line(error))
            _drop_connection()

    def _say(self) -> None:
        """Say that the worker runs, for people to see. If that cannot be said, the worker runs all the same."""
        worker = self.worker
        try:
            self._require_migrated()
            if self._is_said is None:
                heartbeats.clear()
            runs = timedelta(seconds=time.monotonic() - self._began)
            heartbeats.beat(worker.name, worker.concurrency, worker.topics, len(self._in_flight), runs)
        except Exception as error:
            if is_transient(error):
                _drop_connection()  # whoever sends or sweeps says that the database is away
            elif self._is_said is not False:
                logger.warning("unseen worker=%s: %s", worker.name, first_line(error))
                self._is_said = False
        else:
            self._is_said = True

    def _pause(self, pausing: bool) -> None:
        with self._lock:
            self._pausing = pausing
            self._turn.notify_all()

    def _sweep(self) -> None:
        """Sweep once, or on the timer until the end."""
        while True:
            try:
                self._require_migrated()
                self.worker.sweep_if_due()
            except Exception as error:
                self._recover(error)
            if not self.patient or self._over.wait(min(self.worker.sweep_every, self.worker.idle).total_seconds()):
                return

    # -- when to look for messages

    def _note_wakes(self, why_it_polls: str | None) -> None:
        """Log what wakes the senders, if that is news. The first time, they wait for it."""
        worker, before = self.worker, self._wakes
        self._wakes = "notices" if why_it_polls is None else "polling"
        details = "" if why_it_polls is None else f" every={worker.idle.total_seconds():g}s why={why_it_polls!r}"
        if self.patient and before is None:
            logger.info(
                "started worker=%s concurrency=%s wakes=%s%s", worker.name, worker.concurrency, self._wakes, details
            )
        elif self.patient and before != self._wakes:
            level = logging.INFO if why_it_polls is None else logging.WARNING
            logger.log(level, "changed worker=%s wakes=%s%s", worker.name, self._wakes, details)
        worker.wake()

    def _look_in(self, wait: timedelta | None) -> None:
        """Note when something becomes due, so that a sender looks then, or after `idle` at the latest."""
        seconds = min(wait or self.worker.idle, self.worker.idle).total_seconds()
        with self._lock:
            before, self._look_at = self._look_at, time.monotonic() + seconds
        if self._look_at < before:
            self.worker.wake()

    def _until_next_look(self) -> float:
        return max(0.0, self._look_at - time.monotonic())

    # -- one sender

    def _send(self) -> None:
        """Claim and send, until there is nothing left or the worker is stopped."""
        sent = 0
        while not self._ending and sent != self.each:
            seen = self._news
            message = self._take()
            if message is None:
                if not self._wait_for_news(seen):
                    return
                continue
            sent += 1
            try:
                self._deliver(message)
            finally:
                self._put_down(message)

    def _take(self) -> OutboxMessage | None:
        """Claim a message to send now. What may kill this process is claimed only if nothing else is in flight."""
        with self._lock:
            while (self._alone or (self._pausing and self._busy)) and not self._ending:
                self._turn.wait()
            self._alone = suspects = self._busy == 0
            self._pausing = self._pausing and not suspects
            self._busy += 1
        message = None
        try:
            message = self._claim(suspects)
        finally:
            with self._lock:
                if suspects and (message is None or not message.unreported):
                    self._let_others_claim()
                if message is None:
                    self._rest()
                else:
                    self.claimed += 1
                    self._in_flight[message.id] = message
                    self._news += 1
                    self._work.notify()  # another sender may find more
        return message

    def _put_down(self, message: OutboxMessage) -> None:
        with self._lock:
            del self._in_flight[message.id]
            if not self._in_flight:
                self._let_others_claim()
            self._rest()

    def _let_others_claim(self) -> None:
        self._alone = False
        self._turn.notify_all()

    def _rest(self) -> None:
        """Note that this sender does nothing now; those that wait only for the others can end with the last of them."""
        self._busy -= 1
        if not self._busy:
            self._turn.notify_all()
        if not self._busy and not self._waits:
            self._work.notify_all()

    def _wake_all(self) -> None:
        self._turn.notify_all()
        self._work.notify_all()

    def _claim(self, suspects: bool) -> OutboxMessage | None:
        worker = self.worker
        while not self._ending:
            try:
                self._require_migrated()
                claimed = outbox.claim(1, worker.lease, worker.name, topics=worker.topics, suspects=suspects)
                if not claimed:
                    self._note_pauses()
                if not claimed and self.patient:
                    self._look_in(outbox.due_in(worker.idle))
            except Exception as error:
                self._recover(error)
            else:
                return claimed[0] if claimed else None
        return None

    def _note_pauses(self) -> None:
        """Log what is paused, if that is news."""
        found = [str(pause) for pause in pauses.paused()]
        with self._lock:
            before, self._paused = self._paused, found
        for sentence in found:
            if sentence not in before:
                logger.warning("paused worker=%s why=%r", self.worker.name, sentence)
        if before and not found:
            logger.info("resumed worker=%s", self.worker.name)

    def _wait_for_news(self, seen: int) -> bool:
        """Wait until there may be something to claim; return False if there will not be."""
        with self._lock:
            while self._news == seen and not self._ending and (self._waits or self._busy):
                self._work.wait()
            return self._news != seen

    def _announce(self) -> None:
        """Have one sender look for a message; it tells the next one if it finds any."""
        with self._lock:
            self._news += 1
            self._work.notify()

    def _require_migrated(self) -> None:
        _connect()
        if not self._checked:
            if missing := pending():
                raise SchemaError(
                    f"The database is not migrated ({', '.join(missing)} pending): run close-engine migrate."
                )
            for policy in self.worker.policies:
                policies.require_column(policy)
            self._checked = True

    # -- one message

    def _deliver(self, message: OutboxMessage) -> None:
        try:
            provider_id = self._found(message)
            if provider_id is None:
                if held := self._held_back(message):
                    event, report = held
                    self._report(event, message, report)
                    return
                provider_id = self._call(message)
        except CannotBeSent as error:
            self._report("failed", message, partial(message.give_up, error))
        except RecipientOptedOut as error:
            self._report("withdrawn", message, partial(_opt_out, message, error))
        except Snooze as error:
            self._snooze(message, error)
        except Exception as error:
            logger.debug("sender failed worker=%s message=%s", self.worker.name, message.id, exc_info=True)
            self._report("failed", message, partial(message.retry, error))
        else:
            self._record(message, provider_id)

    def _call(self, message: OutboxMessage) -> str | None:
        began = time.monotonic()
        try:
            return self.worker.send(message)
        finally:
            tally.SEND_SECONDS.observe(message.topic, time.monotonic() - began)

    def _snooze(self, message: OutboxMessage, asked: Snooze) -> None:
        try:
            self._report("snoozed", message, partial(message.snooze, asked.until))
        except InvalidValue as error:  # its time has no timezone
            self._report("failed", message, partial(message.retry, error))

    def _found(self, message: OutboxMessage) -> str | None:
        """Ask the sender for the provider's id if the message may have left before."""
        if self.worker.find is None or message.claims == 1:
            return None
        provider_id = self.worker.find(message)
        if provider_id is None:
            return None
        _connect()
        first = OutboxMessage.with_provider_id(provider_id)
        # The same words may have been said twice: what is recorded for another message is not this one. Nor is what was
        # not delivered, before this one was put back.
        if first is None and deliveries.was_of_another_sending(provider_id, message.send_key):
            return None
        return provider_id if first is None or first.id == message.id else None

    def _held_back(self, message: OutboxMessage) -> policies.Held | None:
        """Return what becomes of a message that is not sent now: a policy forbids it, or its lease is over."""
        held = None
        if self.worker.policies:
            try:
                _connect()
                held = policies.held_back(message, self.worker.policies)
            except Exception as error:
                if not is_transient(error):
                    raise
                self._wait_for_database(error)
                held = ("snoozed", partial(message.snooze, self.worker.idle))  # sending never began: no attempt counts
        return held if message.is_leased else ("dropped", message.drop)

    def _record(self, message: OutboxMessage, provider_id: str | None) -> None:
        try:
            self._report("sent", message, partial(message.sent, provider_id))
        except Exception as error:
            if is_transient(error):
                raise
            logger.exception("recording failed worker=%s %s", self.worker.name, _described(message))
            if message.status is not MessageStatus.SENT:
                # The message was sent, so it must not be sent again, even if the sender returned an unusable id.
                self._report("sent", message, partial(message.give_up, error))

    def _report(self, event: str, message: OutboxMessage, report: Callable[[], OutboxMessage]) -> None:
        """Record the result of a message. If the database is down, wait until it is back."""
        name = self.worker.name
        give_up_at = time.monotonic() + self.worker.lease.total_seconds()
        while True:
            try:
                _connect()
                report()
            except (LeaseLost, MessageNotFound) as error:
                if not _is_already_recorded(error, name):
                    logger.error("lost worker=%s %s: %s", name, _described(message), error)
                    tally.REPORTS.add(message.topic, "lost")
                    return
                break
            except Exception as error:
                if not is_transient(error):
                    raise
                if self._ending and time.monotonic() >= give_up_at:
                    logger.error("unrecorded worker=%s %s: it was %s", name, _described(message), event)
                    raise
                self._wait_for_database(error)
            else:
                break
        level, why = logging.INFO, message.refusal
        if event in ("failed", "dropped", "withdrawn") or message.status is MessageStatus.DEAD:
            level, why = logging.WARNING, message.last_error
        if message.status is MessageStatus.DEAD:
            event, level = "dead", logging.ERROR
        tally.REPORTS.add(message.topic, event)
        if event == "sent":
            tally.ATTEMPTS.observe(message.topic, message.attempts)
        logger.log(level, "%s worker=%s %s%s", event, name, _described(message), f" why={why!r}" if why else "")

    # -- the database is away

    def _recover(self, error: Exception) -> None:
        """Wait for the database if that helps; raise the error if it does not, or if nobody is to wait."""
        if not self.patient or not is_transient(error):
            raise error
        self._wait_for_database(error)

    def _wait_for_database(self, error: Exception) -> None:
        logger.warning("database unreachable worker=%s: %s", self.worker.name, first_line(error))
        _drop_connection()
        self._over.wait(self.worker.idle.total_seconds())


def _methods(sender: Any) -> tuple[Sender, Sender | None]:
    """Return a sender's function to send, and its function to find or None.

    Raises:
        ConfigurationError: it cannot be called, or is a coroutine function.
    """
    send, find = getattr(sender, "send", sender), getattr(sender, "find", None)
    for function in (send, find) if find is not None else (send,):
        if not callable(function):
            raise ConfigurationError(f"The sender {sender!r} cannot be called: pass a function of one OutboxMessage.")
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            raise ConfigurationError(
                f"The sender {sender!r} is a coroutine function, and a worker awaits nothing: pass a function that "
                "runs it, such as lambda message: asyncio.run(send(message))."
            )
    return send, find


def _opt_out(message: OutboxMessage, error: RecipientOptedOut) -> OutboxMessage:
    """Record that the provider says that the recipient opted out: first the opt-out, which holds in any case."""
    lead_id = message.lead_id
    if lead_id is not None:
        with suppress(LeadNotFound):
            optouts.opt_out(lead_id, source="provider")
    return message.withdraw(f"the recipient opted out{f': {error}' if str(error) else ''}")


def _connect() -> None:
    """Open this thread's connection if it has none: the user's database may not do it by itself."""
    current().database.connect(reuse_if_open=True)


def _disconnect() -> None:
    """Give this thread's connection up."""
    with suppress(Exception):
        current().database.close()


def _drop_connection() -> None:
    """Close this thread's connection, which is of no use any more: a pool must not hand it out again."""
    database = current().database
    with suppress(Exception):
        if isinstance(database, PooledDatabase):
            database.manual_close()
    _disconnect()


def _is_already_recorded(error: LeaseLost | MessageNotFound, name: str) -> bool:
    """Whether this report was committed before, and only the connection broke afterwards."""
    return isinstance(error, LeaseLost) and error.status is MessageStatus.SENT and error.leased_by == name


def _described(message: OutboxMessage) -> str:
    return (
        f"message={message.id} topic={log_value(message.topic)} conversation={log_value(message.conversation_id)} "
        f"attempt={message.attempts} provider_id={log_value(message.provider_id)}"
    )
