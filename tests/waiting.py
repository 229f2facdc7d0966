"""Waiting for a state and never for a time: until it is there, or until it is certain that it never comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from close_engine.database.binding import current

Found = TypeVar("Found")

#: Seconds. On the slowest machine, everything that is waited for is there by then; only what never comes takes so long.
LIMIT = 120

#: Seconds between two looks, which leave the processor to those who bring the state about.
PAUSE = 0.002


def until(condition: Callable[[], Found], what: str) -> Found:
    """Return what the condition gives, as soon as that is true.

    Args:
        condition: is asked again and again; it may raise, where it is certain that the state never comes.
        what: the sentence that says what is waited for.
    """
    end = time.monotonic() + LIMIT
    while not (found := condition()):
        assert time.monotonic() < end, f"After {LIMIT} seconds it is still not true that {what}."
        time.sleep(PAUSE)
    return found


class Running:
    """A function that runs in a thread of its own, with a connection of its own."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._outcome: list[Any] = []
        # A daemon: one that hangs fails its test, and does not keep the run from ending.
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with current().database.connection_context():
            try:
                self._outcome.append(self._function())
            except BaseException as error:
                self._outcome.append(error)

    @property
    def ended(self) -> bool:
        return not self.thread.is_alive()

    def result(self) -> Any:
        """What it returned or raised, once it has ended."""
        self.thread.join(LIMIT)
        assert self.ended, f"After {LIMIT} seconds, a thread has not ended."
        return self._outcome[0]


def own_session() -> int:
    """The process id of this thread's session on PostgreSQL."""
    return int(current().database.execute_sql("SELECT pg_backend_pid()").fetchone()[0])


#: Those who wait for a session, and those who wait for them; pg_stat_activity would not change within a transaction.
BEHIND = """
    WITH RECURSIVE behind (pid) AS (
        SELECT %s
        UNION
        SELECT waiting.pid FROM behind JOIN pg_catalog.pg_locks waiting
            ON NOT waiting.granted AND behind.pid = ANY (pg_catalog.pg_blocking_pids(waiting.pid))
    )
    SELECT count(*) - 1 FROM behind
"""


def until_they_wait(running: Sequence[Running], holder: int | None = None) -> None:
    """Return once each of them waits for what a session on PostgreSQL holds, itself or behind another one.

    Args:
        running: all who use the database besides this thread and the holder.
        holder: the process id of the session; the default is this thread's own.
    """
    pid = own_session() if holder is None else holder

    def all_of_them_wait() -> bool:
        for one in running:
            assert not one.ended, f"One did not wait, and ended with {one.result()!r}."
        return bool(current().database.execute_sql(BEHIND, (pid,)).fetchone()[0] >= len(running))

    until(all_of_them_wait, f"{len(running)} wait for session {pid}")
