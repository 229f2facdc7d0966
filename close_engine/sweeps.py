"""Sweeps: what time alone brings about. Each is one call that returns what it moved; the timer lives elsewhere.

    sweep()                                             # all of them, as a cron job or a worker's timer does
    stall_silent(after=timedelta(hours=72))

Each moves its rows in batches, with one set-based statement a batch that passes over rows which others hold: any
number of workers may sweep at once. The guard and the history are the same as for a trigger.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from close_engine import hooks
from close_engine.backend import current, now
from close_engine.conversations import CloseEngineConversation
from close_engine.errors import InvalidValue
from close_engine.fields import stored_time
from close_engine.firing import change_stage, context_of, written_by
from close_engine.machine import TRIGGERS
from close_engine.transaction import atomic

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
_SILENT = """
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
    """
    return _move("stall", _SILENT, ("c", "s"), after, batch, None)


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
        InvalidValue: the reason is empty.
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
    """
    moment = stored_time(now())
    context = {"moment": moment, "actor": ACTOR, "reason": "it was not approved in time"}
    statement = "UPDATE pending_actions SET status = 'EXPIRED'"
    return _in_batches(_EXPIRED, ("a",), [moment], statement, [], batch, context)


def release_leases(*, batch: int = 1000) -> list[int]:
    """Take messages back from workers that died with them; one that was tried as often as it may be is dead.

    Args:
        batch: how many are moved in one transaction.

    Returns:
        the ids of the messages.
    """
    statement = (
        "UPDATE {outbox} SET leased_by = NULL, last_error = 'the lease of ' || leased_by || ' ran out', "
        "status = CASE WHEN attempts >= max_attempts THEN 'DEAD' ELSE status END"
    )
    return _in_batches(_RUN_OUT, ("o",), [stored_time(now())], statement, [], batch, {})


def _move(trigger: str, due: str, lock: tuple[str, ...], after: timedelta, batch: int, reason: str | None) -> list[str]:
    """Fire a trigger on every conversation that is due: in one statement, or one by one where hooks ask for it."""
    _check(batch)
    transition, moment = TRIGGERS[trigger], now()
    due_before = [stored_time(moment - after), stored_time(moment)]
    given = {"closed_lost_reason": reason}
    context = context_of(trigger, ACTOR, reason, None, None)
    if hooks.concern(transition):
        return _one_by_one(trigger, due, lock, due_before, batch, given, context)
    values = written_by(transition, moment, given)
    fields = CloseEngineConversation._meta.fields
    assignments = ", ".join(f'"{fields[name].column_name}" = %s' for name in values)
    return _in_batches(
        due,
        lock,
        due_before,
        f"UPDATE close_engine_conversations SET {assignments}",
        [fields[name].db_value(value) for name, value in values.items()],
        batch,
        {**context, "updated_at": stored_time(moment)},
    )


def _one_by_one(
    trigger: str,
    due: str,
    lock: tuple[str, ...],
    due_before: list[Any],
    batch: int,
    given: dict[str, Any],
    context: dict[str, Any],
) -> list[str]:
    dialect, moved = current().dialect, []
    text = dialect.sql(due.replace("SELECT c.id", "SELECT c.*").replace("{lock}", dialect.skip_locked(*lock)))
    while True:
        with atomic():
            found = list(CloseEngineConversation.raw(text, *due_before, batch))
            for conversation in found:
                change_stage(conversation, trigger, given, context)
        moved += [conversation.id for conversation in found]
        if len(found) < batch:
            return moved


def _in_batches(
    due: str,
    lock: tuple[str, ...],
    due_before: list[Any],
    update: str,
    values: list[Any],
    batch: int,
    context: dict[str, Any],
) -> list[Any]:
    """Run an UPDATE on what is due until there is no full batch left, and return the ids.

    Args:
        due: the query for it, with {lock} at its end.
        lock: the aliases in it whose rows are to be held.
        due_before: the values in it, but for the size of the batch.
        update: the UPDATE, without its WHERE.
        values: the values in it.
        batch: how many rows at once.
        context: what the guard records with them.
    """
    _check(batch)
    binding, moved = current(), []
    due = due.replace("{lock}", binding.dialect.skip_locked(*lock))
    text = binding.dialect.sql(f"WITH due AS ({due}) {update} WHERE id IN (SELECT id FROM due) RETURNING id")
    while True:
        with atomic(), binding.dialect.context(binding.database, context):
            ids = [row[0] for row in binding.database.execute_sql(text, (*due_before, batch, *values)).fetchall()]
        moved += ids
        if len(ids) < batch:
            return moved


def _check(batch: int) -> None:
    if batch < 1:
        raise InvalidValue("batch", batch, "it must be at least 1")
