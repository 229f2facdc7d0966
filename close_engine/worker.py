"""A worker that needs no queue server: it claims messages, sends them, records the results, and sweeps on a timer.

    worker = Worker(send)                               # send(message) returns the provider's id for the message
    worker.run()                                        # until worker.stop(); the message being sent is finished

`send` raises `CannotBeSent` if a message can never be delivered. After any other error, the message is tried again
later. `send` is called once per lease, and again if a worker dies in the middle of a send: pass `message.send_key` to
the provider as its idempotency key.

If the database restarts, the worker waits for it. What it has sent meanwhile is recorded as soon as the database is
back. One line is logged per event, under the name `close_engine.worker`.

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
from close_engine.schema.scripts import pending
from close_engine.stages import MessageStatus

__all__ = ["Sender", "Worker", "load_sender", "print_sender"]

logger = logging.getLogger(__name__)

Sender = Callable[[OutboxMessage], "str | None"]
"""A function that sends a message and returns the provider's id for it, or None if it has none."""


def print_sender(message: OutboxMessage) -> None:
    """Print what would be sent. This is the built-in sender.

    Args:
        message: OutboxMessage.
    """
    print(f"{message.topic} to lead {message.lead_id}: {message.body or message.payload}", flush=True)


def load_sender(name: str) -> Sender:
    """Import a sender by name. The current directory is searched too.

    Args:
        name: str, as `module:function`.

    Returns:
        the function.

    Raises:
        ConfigurationError: there is no such module or function, or it cannot be called.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ConfigurationError(f"The sender {name!r} must have the form module:function.")
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
    """Send the messages in the outbox, one after the other.

    Args:
        send: the sender, a function of one OutboxMessage.
        name: str, the owner of its leases and the actor in the history. No two workers may share one; the default is
            unique.
        limit: int, how many messages to claim at once, at least 1.
        lease: timedelta, how long its messages stay leased if it dies. While it lives, it extends its leases.
        idle: timedelta, how long to wait when there is nothing to send or the database is down.
        sweep: the function that sweeps, or None to turn sweeps off.
        sweep_every: timedelta, how often to sweep. The first sweep runs when the worker starts.

    Raises:
        InvalidValue: `limit` is less than 1, or a timedelta is not greater than zero.
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
                raise InvalidValue(option, str(duration), "it must be greater than zero")
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
        # A signal handler may put to a SimpleQueue while the same thread waits for it. It must not set an Event.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def stop(self) -> None:
        """Ask the worker to stop: it finishes the message it is sending, releases the others and returns.

        It can be called from any thread or signal handler.
        """
        self._stopping = True
        self._wake.put(None)

    def run(self) -> None:
        """Send and sweep until `stop` is called. If the database is down, wait for it.

        Raises:
            SchemaError: the database is not migrated.
            peewee.PeeweeException: `stop` was called while the database was down, and the result of a message could
                not be recorded within the length of a lease; or the database raised another kind of error.
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
        """Send everything that can be sent now, for example from a cron job. Messages that are not due are left.

        Returns:
            int, how many messages were claimed.

        Raises:
            SchemaError: the database is not migrated.
            peewee.PeeweeException: the database cannot be reached.
        """
        claimed = 0
        while not self._stopping and (count := self.run_once()):
            claimed += count
        return claimed

    def run_once(self) -> int:
        """Sweep if it is time, then claim up to `limit` messages and send them.

        Returns:
            int, how many messages were claimed.

        Raises:
            SchemaError: the database is not migrated.
            peewee.PeeweeException: the database cannot be reached.
        """
        messages = self._claim()
        self._deliver(messages)
        return len(messages)

    def _claim(self) -> list[OutboxMessage]:
        if not self._checked:
            if missing := pending():
                raise SchemaError(
                    f"The database is not migrated ({', '.join(missing)} pending): run close-engine migrate."
                )
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
            # A user's hook failed. The next sweep tries again; meanwhile, messages go on being sent.
            logger.exception("sweep failed worker=%s", self.name)
            return
        if any(vars(swept).values()):
            counts = " ".join(f"{kind}={len(ids)}" for kind, ids in vars(swept).items())
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
            logger.debug("sender failed worker=%s message=%s", self.name, message.id, exc_info=True)
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
                # The message was sent, so it must not be sent again, even if the sender returned an unusable id.
                self._report("sent", message, partial(message.give_up, error))

    def _report(self, event: str, message: OutboxMessage, report: Callable[[], OutboxMessage]) -> None:
        """Record the result of a message. If the database is down, wait until it is back."""
        give_up_at = now() + self.lease
        while True:
            try:
                report()
            except peewee.PeeweeException as error:
                if self._stopping and now() >= give_up_at:
                    logger.error("unrecorded worker=%s %s: it was %s", self.name, _described(message), event)
                    raise
                self._reconnect(error)
            except (LeaseLost, MessageNotFound) as error:
                if not self._is_already_recorded(error):
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

    def _is_already_recorded(self, error: LeaseLost | MessageNotFound) -> bool:
        """Whether this report was committed before, and only the connection broke afterwards."""
        return isinstance(error, LeaseLost) and error.status is MessageStatus.SENT and error.leased_by == self.name

    @contextmanager
    def _kept_leased(self, messages: Sequence[OutboxMessage]) -> Iterator[None]:
        """Extend the leases of these messages from a thread that has its own connection."""
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
                    # The next beat tries again. If the lease is lost by then, recording the result reports it.
                    logger.warning("heartbeat failed worker=%s: %s", self.name, first_line(error))
                database.close()

        heartbeat = threading.Thread(target=extend, name=f"{self.name} heartbeat", daemon=True)
        heartbeat.start()
        try:
            yield
        finally:
            done.set()
            heartbeat.join()

    def _reconnect(self, error: peewee.PeeweeException) -> None:
        """Close a broken connection and wait before the next attempt. Raise any other error again."""
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
