"""Leave the last messages to two worker processes, and kill one of them in the middle of a send."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from multiprocessing.connection import Connection, wait
from typing import Any

from close_engine.database.binding import current
from close_engine.database.url import connect
from close_engine.demo.provider import Provider
from close_engine.demo.report import Handover
from close_engine.errors import CloseEngineError
from close_engine.outbox import OutboxMessage
from close_engine.stages import MessageStatus
from close_engine.worker import Worker

__all__ = ["LEASE", "hand_over"]

#: How long the worker processes lease a message.
LEASE = timedelta(minutes=1)


def hand_over(
    url: str,
    provider: Provider,
    preview: OutboxMessage,
    others: list[OutboxMessage],
    moment: datetime,
    set_clock: Callable[[datetime], None],
) -> Handover:
    """Leave the last messages to two worker processes, and kill the one that is sending the preview.

    Args:
        url: str, the URL of the database.
        provider: Provider that delivers the workers' messages.
        preview: OutboxMessage during whose send a worker is killed.
        others: list of OutboxMessage, the rest.
        moment: datetime, the simulated time.
        set_clock: function that sets the simulated time of this process.

    Returns:
        the Handover.

    Raises:
        CloseEngineError: a worker process died by itself.
    """
    last = [message.id for message in (preview, *others)]
    context = multiprocessing.get_context("spawn")
    clock = context.RawValue("d", moment.timestamp())
    workers: dict[Connection, Any] = {}
    try:
        for name in ("worker-5", "worker-6"):
            parent_end, child_end = context.Pipe()
            process = context.Process(target=_work, args=(url, name, clock, child_end), name=name, daemon=True)
            process.start()
            child_end.close()
            workers[parent_end] = process
        killed = _serve(provider, workers, lambda: _unsent(last) == 1, preview.send_key)
        moment += LEASE + timedelta(seconds=1)
        set_clock(moment)
        clock.value = moment.timestamp()
        _serve(provider, workers, lambda: not _unsent(last))
        (survivor,) = workers.values()
        survivor.terminate()
        survivor.join()
    finally:
        for process in workers.values():
            process.kill()
            process.join()
    handed = OutboxMessage.get_by_id(preview.id)
    return Handover(
        messages=len(last),
        topic=handed.topic,
        exit_code=survivor.exitcode,
        killed=killed,
        survivor=handed.leased_by,
        attempts=handed.attempts,
        asked=provider.asked[handed.send_key],
        texts=sum(key == handed.send_key for key in provider.texts),
    )


def _unsent(messages: list[int]) -> int:
    waiting = OutboxMessage.id.in_(messages) & (OutboxMessage.status == MessageStatus.PENDING)
    return current().count(OutboxMessage.select().where(waiting))


def _serve(
    provider: Provider, workers: dict[Connection, Any], done: Callable[[], bool], kill_at: str | None = None
) -> str:
    """Act as the provider of these workers. Kill the one that sends `kill_at` while it waits for the answer.

    Returns:
        the name of the killed worker, or an empty string.
    """
    killed = ""
    while not done():
        ready: list[Any] = wait(list(workers), timeout=0.05)
        for connection in ready:
            try:
                verb, key = connection.recv()
            except EOFError:
                died = workers[connection]
                raise CloseEngineError(f"The process {died.name} died unexpectedly.") from None
            provider_id = provider.send(key) if verb == "send" else provider.find(key)
            if key == kill_at:
                process = workers.pop(connection)
                process.kill()
                process.join()
                killed = process.name
            else:
                connection.send(provider_id)
    return killed


def _end_with_parent() -> None:  # pragma: no cover - runs in the worker process
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


class _Sender:  # pragma: no cover - as above
    """Sends through a pipe, and can ask whether a message has left."""

    def __init__(self, provider: Connection) -> None:
        self._provider = provider

    def send(self, message: OutboxMessage) -> str | None:
        return self._ask("send", message)

    def find(self, message: OutboxMessage) -> str | None:
        return self._ask("find", message)

    def _ask(self, verb: str, message: OutboxMessage) -> str | None:
        self._provider.send((verb, message.send_key))
        found: str | None = self._provider.recv()
        return found


def _work(url: str, name: str, clock: Any, provider: Connection) -> None:  # pragma: no cover - as above
    """Run a worker in this process, with the provider at the other end of a pipe and the clock in shared memory."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connect(url, clock=lambda: datetime.fromtimestamp(clock.value, timezone.utc))

    worker = Worker(_Sender(provider), name=name, concurrency=1, lease=LEASE, idle=timedelta(seconds=0.02), sweep=None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which ends this process
    signal.signal(signal.SIGTERM, lambda number, frame: worker.stop())
    worker.run()
