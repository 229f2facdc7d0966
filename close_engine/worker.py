"""A worker for people with no queue of their own: claims messages, sends them, reports, and sweeps on a timer.

    worker = Worker(send)                               # send(message) returns the provider's id of the message
    worker.run()                                        # until worker.stop(), which lets it finish what it is sending

`send` raises `CannotBeSent` for what will never succeed; any other error is tried again later. It is called once for
each lease, and again after a crash in mid-send: hand `message.send_key` to the provider as its idempotency key.

A database that restarts is waited for: a message that was sent meanwhile is recorded as soon as it is back. One line
is logged for each event, under the name `close_engine.worker`.

>>> from close_engine import connect, migrate
>>> database = connect("sqlite:///:memory:")
>>> applied = migrate(standalone=True)
>>> Worker(print_sender).run_until_empty()
0
"""

from __future__ import annotations

import importlib
import logging
import os
import queue
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial

import peewee

from close_engine import outbox, sweeps
from close_engine.database.binding import current, is_transient, now
from close_engine.errors import (
    CannotBeSent,
    ConfigurationError,
    InvalidValue,
    LeaseLost,
    MessageNotFound,
    SchemaError,
    first_line,
)
from close_engine.outbox import OutboxMessage
from close_engine.schema.migrations import pending
from close_engine.stages import MessageStatus

__all__ = ["Sender", "Worker", "load_sender", "print_sender"]

logger = logging.getLogger(__name__)

Sender = Callable[[OutboxMessage], "str | None"]
"""Sends a message and returns the provider's id of it, or None if the provider gives none."""


def print_sender(message: OutboxMessage) -> None:
    """The built-in sender: prints what it would send."""
    print(f"{message.topic} to lead {message.lead_id}: {message.body or message.payload}", flush=True)


def load_sender(name: str) -> Sender:
    """The sender that `module:function` names; the current directory is searched, too.

    Raises:
        ConfigurationError: there is no such thing, or it cannot be called.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ConfigurationError(f"The sender {name!r} must be given as module:function.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        sender = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise ConfigurationError(f"The sender {name!r} cannot be imported: {error}.") from error
    if not callable(sender):
        raise ConfigurationError(f"The sender {name!r} cannot be called: {module} has no function {attribute}.")
    found: Sender = sender
    return found


class Worker:
    """Sends what the outbox holds, one message after the other.

    Args:
        send: the sender.
        name: how its leases are marked, and the actor in the history; no two workers may share one. The default is
            unique.
        limit: how many messages it claims at once.
        lease: for how long; it is extended while the worker lives, and ends that long after it died.
        idle: how long it waits when there is nothing to send, or the database is away.
        sweep: what it runs every `sweep_every`; None for no sweeps.
        sweep_every: how often, beginning when it starts.

    Raises:
        InvalidValue: it could never work like this.
    """

    def __init__(
        self,
        send: Sender,
        *,
        name: str | None = None,
        limit: int = 10,
        lease: timedelta = timedelta(minutes=1),
        idle: timedelta = timedelta(seconds=1),
        sweep: Callable[[], sweeps.Swept] | None = sweeps.sweep,
        sweep_every: timedelta = timedelta(minutes=1),
    ) -> None:
        if limit < 1:
            raise InvalidValue("limit", limit, "it must be at least 1")
        for option, duration in {"lease": lease, "idle": idle, "sweep_every": sweep_every}.items():
            if duration <= timedelta(0):
                raise InvalidValue(option, str(duration), "it must be longer than nothing")
        self.send = send
        self.name = name or f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}"
        self.limit = limit
        self.lease = lease
        self.idle = idle
        self.sweep = sweep
        self.sweep_every = sweep_every
        self._checked = False
        self._next_sweep: datetime | None = None
        self._stopping = False
        # Unlike an Event, it may be put to from a signal handler that interrupts the wait for it.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def stop(self) -> None:
        """Let it finish the message it is sending, give back the others, and return; from any thread or signal."""
        self._stopping = True
        self._wake.put(None)

    def run(self) -> None:
        """Work until it is stopped.

        Raises:
            SchemaError: the database is not migrated.
            peewee.PeeweeException: it was stopped while the database is away, and could not record, for as long as a
                lease is, what came of a message. Otherwise it waits for the database.
        """
        logger.info("started worker=%s", self.name)
        while not self._stopping:
            try:
                messages = self._claim()
            except peewee.PeeweeException as error:
                self._reconnect(error)
                continue
            self._deliver(messages)
            if not messages:
                self._pause()
        logger.info("stopped worker=%s", self.name)

    def run_until_empty(self) -> int:
        """Send whatever can be sent now, as from a cron job: what waits for its time, or failed, is left for later.

        Returns:
            how many messages were claimed.

        Raises:
            SchemaError: the database is not migrated.
            peewee.PeeweeException: it cannot be reached.
        """
        claimed = 0
        while not self._stopping and (count := self.run_once()):
            claimed += count
        return claimed

    def run_once(self) -> int:
        """Sweep if it is time, and send what can be sent now, up to `limit` messages.

        Returns:
            how many messages were claimed.

        Raises:
            SchemaError: the database is not migrated.
            peewee.PeeweeException: it cannot be reached.
        """
        messages = self._claim()
        self._deliver(messages)
        return len(messages)

    def _claim(self) -> list[OutboxMessage]:
        if not self._checked:
            if missing := pending():
                raise SchemaError(f"The database lacks {', '.join(missing)}: run close-engine migrate first.")
            self._checked = True
        if self.sweep is not None and (self._next_sweep is None or now() >= self._next_sweep):
            self._next_sweep = now() + self.sweep_every
            self._run_sweep(self.sweep)
        return outbox.claim(self.limit, self.lease, self.name)

    def _run_sweep(self, sweep: Callable[[], sweeps.Swept]) -> None:
        try:
            swept = sweep()
        except Exception as error:
            if is_transient(error):
                raise
            # A hook of the user's failed. It will be swept again, and those who wait for messages need not wait for it.
            logger.exception("sweep failed worker=%s", self.name)
            return
        if any(vars(swept).values()):
            counts = " ".join(f"{what}={len(ids)}" for what, ids in vars(swept).items())
            logger.info("swept worker=%s %s", self.name, counts)

    def _deliver(self, messages: Sequence[OutboxMessage]) -> None:
        with self._kept_leased(messages):
            for message in messages:
                if self._stopping:
                    self._report("released", message, message.release)
                else:
                    self._deliver_one(message)

    def _deliver_one(self, message: OutboxMessage) -> None:
        try:
            provider_id = self.send(message)
        except CannotBeSent as error:
            self._report("failed", message, partial(message.give_up, error))
        except Exception as error:
            logger.debug("the sender failed worker=%s message=%s", self.name, message.id, exc_info=True)
            self._report("failed", message, partial(message.retry, error))
        else:
            self._record(message, provider_id)

    def _record(self, message: OutboxMessage, provider_id: str | None) -> None:
        try:
            self._report("sent", message, partial(message.sent, provider_id))
        except Exception as error:
            if is_transient(error):
                raise
            logger.exception("recording failed worker=%s %s", self.name, _described(message))
            if message.status is not MessageStatus.SENT:
                # It did leave. Whatever is wrong with what the sender returned, sending it again would not help.
                self._report("sent", message, partial(message.give_up, error))

    def _report(self, event: str, message: OutboxMessage, report: Callable[[], OutboxMessage]) -> None:
        """Write what came of a message, however long the database takes to come back."""
        until = now() + self.lease
        while True:
            try:
                report()
            except peewee.PeeweeException as error:
                if self._stopping and now() >= until:
                    logger.error("unrecorded worker=%s %s: it was %s", self.name, _described(message), event)
                    raise
                self._reconnect(error)
            except (LeaseLost, MessageNotFound) as error:
                if not self._recorded_before(error):
                    logger.error("lost worker=%s %s: %s", self.name, _described(message), error)
                    return
                break
            else:
                break
        level, why = logging.INFO, message.refusal
        if event == "failed" or message.status is MessageStatus.DEAD:
            level, why = logging.WARNING, message.last_error
        if message.status is MessageStatus.DEAD:
            event, level = "dead", logging.ERROR
        logger.log(level, "%s worker=%s %s%s", event, self.name, _described(message), f" why={why!r}" if why else "")

    def _recorded_before(self, error: LeaseLost | MessageNotFound) -> bool:
        """Whether this very report was committed already, just before the connection broke."""
        return isinstance(error, LeaseLost) and error.status is MessageStatus.SENT and error.leased_by == self.name

    @contextmanager
    def _kept_leased(self, messages: Sequence[OutboxMessage]) -> Iterator[None]:
        """Extend the leases of these messages from another thread, which has its own connection."""
        if not messages:
            yield
            return
        done = threading.Event()
        held = (
            OutboxMessage.id.in_([message.id for message in messages])
            & OutboxMessage.status.is_still(MessageStatus.PENDING)
            & (OutboxMessage.leased_by == self.name)
        )

        def extend() -> None:
            database = current().database
            while not done.wait(self.lease.total_seconds() / 3):
                try:
                    OutboxMessage.update(available_at=now() + self.lease).where(held).execute()
                except peewee.PeeweeException as error:
                    # It beats again; what cannot be reached by then the report will say.
                    logger.warning("heartbeat failed worker=%s: %s", self.name, first_line(error))
                database.close()

        heart = threading.Thread(target=extend, name=f"{self.name} heartbeat", daemon=True)
        heart.start()
        try:
            yield
        finally:
            done.set()
            heart.join()

    def _reconnect(self, error: peewee.PeeweeException) -> None:
        """Drop the broken connection, and wait a moment before the next; any other error is raised again."""
        if not is_transient(error):
            raise error
        logger.warning("database unreachable worker=%s: %s", self.name, first_line(error))
        current().database.close()
        self._pause()

    def _pause(self) -> None:
        with suppress(queue.Empty):
            self._wake.get(timeout=self.idle.total_seconds())


def _described(message: OutboxMessage) -> str:
    return (
        f"message={message.id} topic={message.topic} conversation={message.conversation_id} "
        f"attempt={message.attempts} provider_id={message.provider_id}"
    )
