"""Sweeps: what time alone brings about. Each is one call that returns what it moved; the timer lives elsewhere.

    sweep()                                             # all of them, as a cron job or a worker's timer does
    stall_silent(after=timedelta(hours=72))

Each takes hold of what is due in batches, passing over what others hold, and moves a batch with one set-based
statement: any number of workers may sweep at once. The guard and the history are the same as for a trigger.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from close_engine import hooks
from close_engine.conversations import CloseEngineConversation
from close_engine.database.binding import current, now
from close_engine.database.fields import stored_time
from close_engine.database.provenance import Provenance, Write
from close_engine.database.transaction import atomic
from close_engine.errors import InvalidValue
from close_engine.firing import assigned_by, change_stage
from close_engine.machine import TRIGGERS

__all__ = ["ACTOR", "Swept", "expire_actions", "lose_stalled", "release_leases", "stall_silent", "sweep"]

#: Who moved them, in the history.
ACTOR = "sweep"


@dataclass(frozen=True)
class Swept:
    """What one `sweep` moved.

    Attributes:
        stalled: ids of conversations.
        lost: ids of conversations.
        expired: ids of pending actions.
        released: ids of messages whose lease had run out.
    """

    stalled: list[str]
    lost: list[str]
    expired: list[str]
    released: list[int]


# What is due, in the order in which it became so: {lock} passes over what others hold.
_PERHAPS_SILENT = """
    SELECT c.id FROM {silence} s JOIN close_engine_conversations c ON c.id = s.conversation_id
    WHERE s.since <= %s AND c.updated_at < %s AND c.stage NOT IN ('COMPLETED', 'STALLED', 'CLOSED_LOST')
    ORDER BY s.since LIMIT %s {lock}
"""
_STALLED = """
    SELECT c.id FROM close_engine_conversations c
    WHERE c.stage = 'STALLED' AND c.stalled_at <= %s AND c.updated_at < %s ORDER BY c.stalled_at LIMIT %s {lock}
"""
_EXPIRED = """
    SELECT a.id FROM pending_actions a
    WHERE a.status = 'PENDING' AND a.expires_at <= %s ORDER BY a.expires_at LIMIT %s {lock}
"""
_RUN_OUT = """
    SELECT o.id FROM {outbox} o
    WHERE o.status = 'PENDING' AND o.leased_by IS NOT NULL AND o.available_at <= %s
    ORDER BY o.available_at LIMIT %s {lock}
"""


def sweep() -> Swept:
    """All of the sweeps, as they are by default."""
    return Swept(stall_silent(), lose_stalled(), expire_actions(), release_leases())


def stall_silent(after: timedelta = timedelta(hours=72), *, batch: int = 1000) -> list[str]:
    """Stall the active conversations whose leads are silent.

    Args:
        after: since the later of the last inbound text and the last stage change.
        batch: how many are moved in one transaction.

    Returns:
        the ids of the conversations.

    Raises:
        InvalidValue: the batch is less than one.
    """
    return _move("stall", _PERHAPS_SILENT, ("c", "s"), after, batch, spared=_not_silent)


def lose_stalled(
    after: timedelta = timedelta(days=7), reason: str = "silent since it stalled", *, batch: int = 1000
) -> list[str]:
    """Close the conversations that have been stalled for long as lost.

    Args:
        after: since it stalled.
        reason: stands in `closed_lost_reason` and in the history.
        batch: how many are moved in one transaction.

    Returns:
        the ids of the conversations.

    Raises:
        InvalidValue: the reason is empty, or the batch is less than one.
    """
    if not reason.strip():
        raise InvalidValue("reason", reason, "a lost conversation must have one")
    return _move("close_lost", _STALLED, ("c",), after, batch, reason)


def expire_actions(*, batch: int = 1000) -> list[str]:
    """Expire the pending actions that are past their time; conversations that waited for them go back.

    Args:
        batch: how many are moved in one transaction.

    Returns:
        the ids of the actions.

    Raises:
        InvalidValue: the batch is less than one.
    """
    moment = stored_time(now())
    provenance = Provenance(ACTOR, "it was not approved in time")

    def expire(held: list[str]) -> list[str]:
        _execute("UPDATE pending_actions SET status = 'EXPIRED' WHERE id IN {these}", these=held)
        return held

    return _in_batches(_EXPIRED, ("a",), [moment], batch, expire, (provenance, Write("expire", None, moment)))


def release_leases(*, batch: int = 1000) -> list[int]:
    """Take messages back from workers that died with them; one that was tried as often as it may be is dead.

    Args:
        batch: how many are moved in one transaction.

    Returns:
        the ids of the messages.

    Raises:
        InvalidValue: the batch is less than one.
    """

    def release(held: list[int]) -> list[int]:
        _execute(
            "UPDATE {outbox} SET leased_by = NULL, last_error = 'the lease of ' || leased_by || ' ran out', "
            "status = CASE WHEN attempts >= max_attempts THEN 'DEAD' ELSE status END WHERE id IN {these}",
            these=held,
        )
        return held

    return _in_batches(_RUN_OUT, ("o",), [stored_time(now())], batch, release)


def _move(
    trigger: str,
    due: str,
    lock: tuple[str, ...],
    after: timedelta,
    batch: int,
    reason: str | None = None,
    spared: Callable[[list[str], str], set[str]] | None = None,
) -> list[str]:
    """Fire a trigger on every conversation that is due: in one statement, or one by one where hooks ask for it.

    `spared` says which of those that are held are not due after all.
    """
    transition, moment = TRIGGERS[trigger], now()
    before, at, given = stored_time(moment - after), stored_time(moment), {"closed_lost_reason": reason}
    provenance = Provenance(ACTOR, reason)
    assignments = assigned_by(transition, at, given)
    columns = ", ".join(f'"{assignment.column}" = {assignment.sql}' for assignment in assignments)
    parameters = [parameter for assignment in assignments for parameter in assignment.parameters]

    def move(held: list[str]) -> list[str]:
        not_due = spared(held, before) if spared else set()
        ids = [conversation_id for conversation_id in held if conversation_id not in not_due]
        if hooks.crosses_a_hook(transition):
            for conversation in CloseEngineConversation.select().where(CloseEngineConversation.id.in_(ids)):
                change_stage(conversation, trigger, given, provenance)
        elif ids:
            _execute(f"UPDATE close_engine_conversations SET {columns} WHERE id IN {{these}}", *parameters, these=ids)
        return ids

    return _in_batches(due, lock, [before, at], batch, move, (provenance, Write(trigger, None, at)))


def _not_silent(held: list[str], before: str) -> set[str]:
    """Those whose stage changed later than their row says, which is moved on: only now, to spare each stage change."""
    changed = (
        "(SELECT created_at FROM {history} WHERE conversation_id = {silence}.conversation_id "
        "AND \"trigger\" <> 'adopted' ORDER BY id DESC LIMIT 1)"
    )
    rows = _execute(
        f"UPDATE {{silence}} SET since = {changed} WHERE {changed} > %s AND conversation_id IN {{these}} "
        "RETURNING conversation_id",
        before,
        these=held,
    )
    return {row[0] for row in rows}


def _in_batches(
    due: str,
    lock: tuple[str, ...],
    due_before: list[str],
    batch: int,
    write: Callable[[list[Any]], list[Any]],
    attributed_to: tuple[Provenance, Write] | None = None,
) -> list[Any]:
    """Hold what is due and write it, a batch in a transaction, until there is no full batch left.

    Args:
        due: the query for the ids of what is due, with {lock} at its end.
        lock: the aliases in it whose rows are to be held.
        due_before: the values in it, but for the size of the batch.
        batch: how many rows at once.
        write: gets the ids that are held, and returns those that it moved.
        attributed_to: what the history says of them.

    Returns:
        the ids of all that was moved.
    """
    if batch < 1:
        raise InvalidValue("batch", batch, "it must be at least 1")
    binding, moved = current(), []
    find = binding.dialect.sql(due.replace("{lock}", binding.dialect.skip_locked(*lock)))
    while True:
        with atomic(), binding.attributed(*attributed_to) if attributed_to else nullcontext():
            held = [row[0] for row in binding.database.execute_sql(find, (*due_before, batch)).fetchall()]
            if held:
                moved += write(held)
        if len(held) < batch:
            return moved


def _execute(text: str, *values: Any, these: list[Any]) -> list[tuple[Any, ...]]:
    """Run a statement on these ids; the other values come before them."""
    marks = ", ".join(["%s"] * len(these))
    cursor = current().execute(text.replace("{these}", f"({marks})"), (*values, *these))
    rows: list[tuple[Any, ...]] = cursor.fetchall() if cursor.description else []
    return rows
