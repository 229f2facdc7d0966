"""A worker for people with no queue of their own: claims messages, sends them, reports, and sweeps on a timer.

    worker = Worker(send)                               # send(message) returns the provider's id of the message
    worker.run()                                        # until worker.stop(), which lets it finish what it holds

`send` raises `CannotBeSent` for what will never succeed; any other error is tried again later. It is called once for
each lease, and again after a crash in mid-send: hand `message.send_key` to the provider as its idempotency key.

A database that restarts is waited for: a message that was sent meanwhile is recorded as soon as it is back. One line
is logged for each event, under the name `close_engine.worker`.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import peewee

from close_engine import outbox, sweeps
from close_engine.backend import current, now
from close_engine.errors import CannotBeSent, ConfigurationError, LeaseLost, SchemaError
from close_engine.outbox import OutboxMessage
from close_engine.schema import status
from close_engine.stages import MessageStatus

__all__ = ["Sender", "Worker", "load_sender", "print_sender"]

logger = logging.getLogger(__name__)

#: Sends a message, and returns the provider's id of it, or None where it has none.
Sender = Callable[[OutboxMessage], "str | None"]

_UNREACHABLE = (peewee.OperationalError, peewee.InterfaceError)


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
        name: how its leases are marked; the default is unique.
        limit: how many messages it claims at once.
        lease: for how long; it is extended while it works, and ends that long after it died.
        idle: how long it waits when there is nothing to send.
        sweep: run every `sweep_every`; None for no sweeps.
        sweep_every: how often.
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
        self.send = send
        self.name = name or f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}"
        self.limit = limit
        self.lease = lease
        self.idle = idle
        self.sweep = sweep
        self.sweep_every = sweep_every
        self._stopping = threading.Event()
        self._next_sweep = now()

    def stop(self) -> None:
        """Let it finish the message it is sending, give back the others, and return; from any thread or signal."""
        self._stopping.set()

    def run(self) -> None:
        """Work until it is stopped.

        Raises:
            SchemaError: the database is not migrated.
            peewee.OperationalError: it cannot be reached when the worker starts; later it is waited for.
        """
        if pending := [migration.name for migration in status() if migration.applied_at is None]:
            raise SchemaError(f"The database lacks {', '.join(pending)}: run close-engine migrate first.")
        logger.info("started worker=%s", self.name)
        while not self._stopping.is_set():
            try:
                if not self.run_once():
                    self._stopping.wait(self.idle.total_seconds())
            except _UNREACHABLE as error:
                self._wait_for_database(error)
        logger.info("stopped worker=%s", self.name)

    def run_once(self) -> int:
        """Sweep if it is time, and send what can be sent now, up to `limit` messages.

        Returns:
            how many messages were claimed.
        """
        if self.sweep is not None and now() >= self._next_sweep:
            self._next_sweep = now() + self.sweep_every
            swept = self.sweep()
            if any(vars(swept).values()):
                counts = " ".join(f"{what}={len(ids)}" for what, ids in vars(swept).items())
                logger.info("swept worker=%s %s", self.name, counts)
        messages = outbox.claim(self.limit, self.lease, self.name)
        with self._kept_leased(messages):
            for message in messages:
                if self._stopping.is_set():
                    self._report("released", message, message.release)
                else:
                    self._deliver(message)
        return len(messages)

    def _deliver(self, message: OutboxMessage) -> None:
        try:
            provider_id = self.send(message)
        except CannotBeSent as error:
            refused = error
            self._report("gave up", message, lambda: message.give_up(refused))
        except Exception as error:
            failure = error
            self._report("failed", message, lambda: message.retry(failure))
        else:
            self._report("sent", message, lambda: message.sent(provider_id))

    def _report(self, event: str, message: OutboxMessage, report: Callable[[], OutboxMessage]) -> None:
        """Record what came of a message, however long the database takes to come back."""
        while True:
            try:
                report()
            except _UNREACHABLE as error:
                if self._stopping.is_set() and now() > message.available_at:
                    logger.error("%s worker=%s %s, and it cannot be recorded", event, self.name, _described(message))
                    return
                self._wait_for_database(error)
            except LeaseLost as error:
                logger.error("lost worker=%s %s: %s", self.name, _described(message), error)
                return
            except Exception:
                logger.exception("%s worker=%s %s, and recording it failed", event, self.name, _described(message))
                return
            else:
                why = message.refusal or (message.last_error if event != "sent" else None)
                logger.info("%s worker=%s %s%s", event, self.name, _described(message), f" why={why!r}" if why else "")
                return

    @contextmanager
    def _kept_leased(self, messages: Sequence[OutboxMessage]) -> Iterator[None]:
        """Extend the leases of these messages from another thread, which has its own connection."""
        done = threading.Event()
        ids = [message.id for message in messages]

        def extend() -> None:
            try:
                while not done.wait(self.lease.total_seconds() / 3):
                    try:
                        OutboxMessage.update(available_at=now() + self.lease).where(
                            OutboxMessage.id.in_(ids)
                            & (OutboxMessage.status == MessageStatus.PENDING)
                            & (OutboxMessage.leased_by == self.name)
                        ).execute()
                    except _UNREACHABLE as error:
                        logger.warning("heartbeat failed worker=%s: %s", self.name, _first_line(error))
                        current().database.close()
            finally:
                current().database.close()

        if not ids:
            yield
            return
        heart = threading.Thread(target=extend, name=f"{self.name} heartbeat", daemon=True)
        heart.start()
        try:
            yield
        finally:
            done.set()
            heart.join()

    def _wait_for_database(self, error: peewee.PeeweeException) -> None:
        """Drop the broken connection, and wait a moment."""
        logger.warning("database unreachable worker=%s: %s", self.name, _first_line(error))
        current().database.close()
        time.sleep(self.idle.total_seconds())


def _described(message: OutboxMessage) -> str:
    return (
        f"message={message.id} topic={message.topic} conversation={message.conversation_id} "
        f"attempt={message.attempts} provider_id={message.provider_id}"
    )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
