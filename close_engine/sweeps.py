"""Sweeps: changes that happen because time passes. Call them from a timer; each returns what it changed.

    sweep()                                             # all of them, from a cron job or a worker's timer
    stall_silent(after=timedelta(hours=72))

A sweep finds in the table `deadlines` what is due. It locks those rows, a batch at a time, and changes each batch with
one statement. It skips rows that others have locked, so any number of workers may sweep at once. The guard checks every
change and the history has it.

If hooks must run, each row gets a transaction of its own. What fails is passed over and named, and everything else goes
on. The database may refuse a row, too: then the rows of its batch are written one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

import peewee

from close_engine import hooks
from close_engine.approvals import expire_superseded, if_lead_writes
from close_engine.conversations import CloseEngineConversation
from close_engine.database.binding import current, is_transient, moment
from close_engine.database.fields import LONGEST_SPAN, clean_words, stored_time
from close_engine.database.provenance import Provenance, Write, own_key
from close_engine.database.transaction import atomic
from close_engine.errors import AfterCommitError, CloseEngineError, GuardMissing, InvalidValue, one_line
from close_engine.firing import assigned_by, change_stage
from close_engine.machine import TRIGGERS
from close_engine.outbox import MAX_UNREPORTED, OutboxMessage
from close_engine.printable import get_logger, log_value
from close_engine.stages import ACTIVE_STAGES, INDEXED_TEXTS, Event
from close_engine.subscriptions import WARN_BEFORE, publish

__all__ = [
    "ACTOR",
    "Moved",
    "Swept",
    "expire_actions",
    "lose_stalled",
    "lose_unanswered",
    "release_leases",
    "stall_silent",
    "supersede_drafts",
    "sweep",
    "withdraw_approvals",
]

#: How long a lead is silent before its conversation stalls, …
STALL_AFTER = timedelta(hours=72)
#: … and how long it is stalled before it is lost.
LOSE_AFTER = timedelta(days=7)

#: How long the lead waits for our answer before the conversation is lost, if that is wanted at all.
LOSE_UNANSWERED_AFTER = timedelta(days=30)

#: As many as there are.
_ALL = 2**63 - 1

logger = get_logger(__name__)

#: The actor of these changes in the history.
ACTOR = "sweep"


@dataclass(frozen=True)
class Swept:
    """What one `sweep` changed.

    Attributes:
        stalled: list of str, ids of the conversations that were stalled.
        lost: list of str, ids of the conversations that were closed as lost: stalled or unanswered for too long.
        expired: list of str, ids of the pending actions that expired.
        released: list of int, ids of the messages whose lease had run out.
        superseded: list of str, ids of the pending actions that the lead's words had superseded.
        withdrawn: list of str, ids of the conversations that left PENDING_APPROVAL, because their payment link was
            approved and then withdrawn.
        failed: dict, the id of each conversation, action or message that was passed over because it failed, for
            example because a hook raised, to a sentence that says why. The next sweep tries it again.
    """

    stalled: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    superseded: list[str] = field(default_factory=list)
    withdrawn: list[str] = field(default_factory=list)
    failed: dict[Any, str] = field(default_factory=dict)


class Moved(list[Any]):
    """The ids of what a sweep changed.

    Attributes:
        failed: dict, id to sentence: what was passed over, as in `Swept`. If a function that runs after the commit
            failed, the id is among the changed ones, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed: dict[Any, str] = {}


class _Due(NamedTuple):
    """What a sweep looks for.

    Attributes:
        query: the ids of the rows that are due, oldest first. Its last value is the size of a batch; it ends in {lock}.
        values: the query's other values.
        lock: the aliases in the query whose rows to lock. The first is that of the ids.
        asks_twice: whether to ask again once the rows are locked, because the query decides from rows that it does not
            lock, and whoever writes those locks its rows first.
    """

    query: str
    values: tuple[str, ...]
    lock: tuple[str, ...]
    asks_twice: bool = False


#: Whether a human leads the conversation `c`: sweeps leave it alone.
_TAKEN_OVER = """EXISTS (SELECT 1 FROM {takeovers} t WHERE t.conversation_id = c.id
            AND t.handed_back_at IS NULL AND (t.until IS NULL OR t.until > {moment}))"""

_ACTIVE = ", ".join(f"'{stage}'" for stage in ACTIVE_STAGES)

# A deadline only says where to look. The row itself decides, so a deadline that was left behind takes no place in a
# batch, nor does a stage that the guard does not know. {only} names one row, for what is tried alone. On
# PostgreSQL, {lock} becomes FOR NO KEY UPDATE OF c, d SKIP LOCKED.
_SILENT = f"""
    SELECT c.id FROM {{deadlines}} d JOIN close_engine_conversations c ON c.id = d.subject_id
    WHERE d."trigger" = 'stall' AND d.at <= %s AND c.updated_at < %s
        AND c.stage IN ({_ACTIVE}) AND NOT {_TAKEN_OVER} {{only}}
    ORDER BY d.at LIMIT %s {{lock}}
"""
_UNANSWERED = f"""
    SELECT c.id FROM {{deadlines}} d JOIN close_engine_conversations c ON c.id = d.subject_id
    WHERE d."trigger" = 'answer' AND d.at <= %s AND c.updated_at < %s
        AND c.stage IN ({_ACTIVE}, 'STALLED') AND NOT {_TAKEN_OVER} {{only}}
    ORDER BY d.at LIMIT %s {{lock}}
"""
_STALLED = f"""
    SELECT c.id FROM {{deadlines}} d JOIN close_engine_conversations c ON c.id = d.subject_id
    WHERE d."trigger" = 'close_lost' AND d.at <= %s AND c.updated_at < %s
        AND c.stage = 'STALLED' AND c.stalled_at <= %s AND NOT {_TAKEN_OVER} {{only}}
        AND NOT EXISTS (SELECT 1 FROM {{deadlines}} a WHERE a."trigger" = 'answer' AND a.subject_id = c.id)
    ORDER BY d.at LIMIT %s {{lock}}
"""
_EXPIRED = """
    SELECT a.id FROM {deadlines} d JOIN pending_actions a ON a.id = d.subject_id
    WHERE d."trigger" = 'expire' AND d.at <= %s AND a.status = 'PENDING' AND a.expires_at <= %s {only}
    ORDER BY d.at LIMIT %s {lock}
"""
# Those who subscribed want to know it in good time, and once.
_EXPIRING = """
    SELECT a.id, CAST(d.at AS TEXT), d.at FROM {deadlines} d JOIN pending_actions a ON a.id = d.subject_id
    WHERE d."trigger" = 'expire' AND d.at > {moment} AND d.at <= {later} AND a.status = 'PENDING'
        AND NOT EXISTS (SELECT 1 FROM {told} t WHERE t.conversation_id = a.conversation_id
            AND t.key = CAST(%s AS TEXT) || a.id || ':' || CAST(d.at AS TEXT))
    ORDER BY d.at
"""
_DRAFT = """
    SELECT a.conversation_id, a.type, {submitted_by}, CAST(a.draft_message AS TEXT)
    FROM pending_actions a WHERE a.id = %s
"""
_STALE = """
    SELECT a.id FROM {drafts} d JOIN pending_actions a ON a.id = d.action_id
    WHERE a.status = 'PENDING' AND {rule} = 'withdraw' AND EXISTS (SELECT 1 FROM {inbox} i
        WHERE i.kind = 'text' AND i.conversation_id = a.conversation_id AND i.id > d.after_text) {only}
    ORDER BY a.id LIMIT %s {lock}
"""
# The history says since when the conversation waits; resuming is no new beginning. The conditions of the partial index
# are here as they are there, or SQLite would not use it. Each subquery returns one value: PostgreSQL may turn EXISTS
# into a hash of the whole table.
_LINK_WITHDRAWN = f"""
    SELECT c.id FROM close_engine_conversations c
    WHERE c.stage = 'PENDING_APPROVAL' AND c.updated_at < %s
        AND (SELECT o.id FROM {{outbox}} o
            WHERE o.conversation_id = c.id AND o.status <> 'PENDING' AND o.topic IN ({INDEXED_TEXTS})
                AND o.status = 'WITHDRAWN' AND o.topic = 'SEND_PAYMENT_LINK' AND o.after_change >= (
                    SELECT h.id FROM {{history}} h WHERE h.conversation_id = c.id AND h.dest = 'PENDING_APPROVAL'
                        AND h."trigger" <> 'resume' ORDER BY h.id DESC LIMIT 1)
            LIMIT 1) IS NOT NULL
        AND (SELECT o.id FROM {{outbox}} o
            WHERE o.conversation_id = c.id AND o.status <> 'PENDING' AND o.topic IN ({INDEXED_TEXTS})
                AND o.status = 'DEAD' AND o.topic = 'SEND_PAYMENT_LINK' LIMIT 1) IS NULL
        AND (SELECT o.id FROM {{outbox}} o
            WHERE o.conversation_id = c.id AND o.status = 'PENDING' AND o.topic = 'SEND_PAYMENT_LINK' LIMIT 1) IS NULL
        AND (SELECT a.id FROM pending_actions a
            WHERE a.conversation_id = c.id AND a.status = 'PENDING' AND a.type = 'SEND_PAYMENT_LINK' LIMIT 1) IS NULL
        {{only}}
    ORDER BY c.id LIMIT %s {{lock}}
"""
_RUN_OUT = """
    SELECT o.id FROM {outbox} o
    WHERE o.status = 'PENDING' AND o.leased_by IS NOT NULL AND o.available_at <= %s {only}
    ORDER BY o.available_at LIMIT %s {lock}
"""


def sweep(
    *,
    stall_after: timedelta = STALL_AFTER,
    lose_after: timedelta = LOSE_AFTER,
    lose_unanswered_after: timedelta | None = None,
) -> Swept:
    """Run all sweeps. One that fails keeps no other from running; its error is raised after them.

    Args:
        stall_after: timedelta, as for `stall_silent`.
        lose_after: timedelta, as for `lose_stalled`.
        lose_unanswered_after: timedelta, as for `lose_unanswered`; None to close nothing that waits for us.

    Returns:
        Swept.

    Raises:
        InvalidValue: a timedelta is negative or too long.
    """
    for after in (stall_after, lose_after, lose_unanswered_after or stall_after):
        _before_and_now(after)
    steps: list[tuple[str, Callable[[], Moved]]] = [
        ("stalled", partial(stall_silent, stall_after)),
        ("lost", partial(lose_stalled, lose_after)),
        ("expired", expire_actions),
        ("expired", _announce_expiring),  # which expires nothing itself
        ("released", release_leases),
        ("superseded", supersede_drafts),
        ("withdrawn", withdraw_approvals),
    ]
    if lose_unanswered_after is not None:
        steps.append(("lost", partial(lose_unanswered, lose_unanswered_after)))
    swept, errors = Swept(), []
    for kind, step in steps:
        try:
            moved = step()
        except Exception as error:
            errors.append(error)
            continue
        getattr(swept, kind).extend(moved)
        swept.failed.update(moved.failed)
    if errors:
        raise errors[0]
    return swept


def stall_silent(after: timedelta = STALL_AFTER, *, batch: int = 1000) -> Moved:
    """Stall active conversations whose leads are silent. Where it is our turn, the lead is not silent.

    Args:
        after: timedelta, how long it has been the lead's turn: since the last text of ours was sent, or else since the
            conversation was opened, resumed, reopened or adopted.
        batch: int, how many to change in one transaction.

    Returns:
        Moved, a list of the ids of the conversations.

    Raises:
        InvalidValue: `after` is negative or too long, or the batch is less than 1.
        GuardMissing: the database would not record the changes.
    """
    before, at = _before_and_now(after)
    return _move("stall", at, _Due(_SILENT, (before, at), lock=("c", "d")), batch)


def lose_stalled(after: timedelta = LOSE_AFTER, reason: str = "silent since it stalled", *, batch: int = 1000) -> Moved:
    """Close long-stalled conversations as lost. Where it is our turn, the lead is not lost: see `lose_unanswered`.

    Args:
        after: timedelta, how long since the conversation stalled.
        reason: str, for `closed_lost_reason` and the history.
        batch: int, how many to change in one transaction.

    Returns:
        Moved, a list of the ids of the conversations.

    Raises:
        InvalidValue: the reason is empty, `after` is negative or too long, or the batch is less than 1.
        GuardMissing: the database would not record the changes.
    """
    before, at = _before_and_now(after)
    return _move("close_lost", at, _Due(_STALLED, (before, at, before), lock=("c",)), batch, _given(reason))


def lose_unanswered(
    after: timedelta = LOSE_UNANSWERED_AFTER,
    reason: str = "the lead's last words were not answered",
    *,
    batch: int = 1000,
) -> Moved:
    """Close conversations as lost in which the lead has waited for us for too long.

    Args:
        after: timedelta, how long it has been our turn.
        reason: str, for `closed_lost_reason` and the history.
        batch: int, how many to change in one transaction.

    Returns:
        Moved, a list of the ids of the conversations.

    Raises:
        InvalidValue: the reason is empty, `after` is negative or too long, or the batch is less than 1.
        GuardMissing: the database would not record the changes.
    """
    before, at = _before_and_now(after)
    return _move("close_lost", at, _Due(_UNANSWERED, (before, at), lock=("c", "d")), batch, _given(reason))


def _given(reason: str) -> str:
    return clean_words("reason", reason, "a reason must be given")


def _before_and_now(after: timedelta) -> tuple[str, str]:
    """Return the moment this long ago and the moment now, as they are stored."""
    if not timedelta(0) <= after <= LONGEST_SPAN:
        raise InvalidValue("after", str(after), f"it must be from 0 to {LONGEST_SPAN.days} days")
    present = moment()
    return stored_time(present - after), stored_time(present)


def expire_actions(*, batch: int = 1000) -> Moved:
    """Expire pending actions whose time is up. A conversation without a pending payment link leaves PENDING_APPROVAL.

    Args:
        batch: int, how many to change in one transaction.

    Returns:
        Moved, a list of the ids of the actions.

    Raises:
        InvalidValue: the batch is less than 1.
        GuardMissing: the database would not record the changes.
    """
    at = stored_time(moment())
    provenance = Provenance(ACTOR, "it was not approved in time")

    def expire(held: list[str]) -> None:
        _execute("UPDATE pending_actions SET status = 'EXPIRED' WHERE id IN {these}", these=held)

    due = _Due(_EXPIRED, (at, at), lock=("a",))
    return _in_batches(due, batch, expire, (provenance, Write("expire", None, at)))


def _announce_expiring() -> Moved:
    """Say of the pending actions that expire soon that they do, once of each time, to whoever subscribed to that."""
    event, binding, said, moved = Event.ACTION_EXPIRING, current(), set(), Moved()
    subscribed = "SELECT topic, debounce, before FROM {subscriptions} WHERE event = %s"
    for topic, debounce, before in binding.execute(subscribed, (event.value,)).fetchall():
        query = _EXPIRING.replace("{told}", "{carried}" if debounce else "{outbox}")
        seconds = WARN_BEFORE.total_seconds() if before is None else before / 1000
        soon = binding.execute(query, (seconds, own_key("effect", topic, event, "")))
        for action_id, fact, at in soon.fetchall():
            if action_id in said:
                continue  # it was said to all whose time has come
            said.add(action_id)
            try:
                _announce(event, action_id, fact, OutboxMessage.available_at.python_value(at))
            except Exception as error:
                _pass_over(moved, action_id, error)
    return moved


def _announce(event: Event, action_id: str, fact: str, expires_at: datetime) -> None:
    submitted_by = current().dialect.json_text("a.metadata", "submittedBy")
    with atomic():
        found = current().execute(_DRAFT.replace("{submitted_by}", submitted_by), (action_id,)).fetchall()
        for conversation_id, type, by, draft in found:
            until = expires_at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            facts = {"action_id": action_id, "type": type, "submitted_by": by, "draft": draft, "expires_at": until}
            publish(event, conversation_id, f"{action_id}:{fact}", facts)


def _pass_over(moved: Moved, row_id: Any, error: Exception) -> None:
    """Name a row that failed, so that the others go on; raise if the database itself is away."""
    moment()
    logger.warning("the sweep passed over %s: %s", log_value(row_id), _sentence(error))
    moved.failed[row_id] = _sentence(error)


def supersede_drafts(*, batch: int = 1000) -> Moved:
    """Expire the drafts that the lead's words have superseded, and that somebody was deciding on when they came.

    Args:
        batch: int, how many to change in one transaction.

    Returns:
        Moved, a list of the ids of the actions.

    Raises:
        InvalidValue: the batch is less than 1.
        GuardMissing: the database would not record the changes.
    """
    last_text = (
        "SELECT a.id, (SELECT i.id FROM {inbox} i WHERE i.kind = 'text' AND i.conversation_id = a.conversation_id "
        "ORDER BY i.id DESC LIMIT 1) FROM pending_actions a WHERE a.id IN {these} ORDER BY a.id"
    )

    def supersede(held: list[str]) -> None:
        for action_id, text_id in _execute(last_text, these=held):
            expire_superseded([action_id], text_id)

    stale = _STALE.replace("{rule}", if_lead_writes("a.type", "a.metadata"))
    return _in_batches(_Due(stale, (), lock=("a",)), batch, supersede)


def withdraw_approvals(*, batch: int = 1000) -> Moved:
    """Take conversations back from PENDING_APPROVAL to PREVIEW_SENT whose approved payment link was withdrawn.

    A link may be withdrawn after it was approved: it could not leave in time, the lead has written since, a human has
    taken over, or your code withdrew it. If another payment link waits to be approved or sent, or is DEAD, the
    conversation stays.

    Args:
        batch: int, how many to change in one transaction.

    Returns:
        Moved, a list of the ids of the conversations.

    Raises:
        InvalidValue: the batch is less than 1.
        GuardMissing: the database would not record the changes.
    """
    at = stored_time(moment())
    due = _Due(_LINK_WITHDRAWN, (at,), lock=("c",), asks_twice=True)
    return _move("withdraw_approval", at, due, batch, "its payment link was withdrawn")


def release_leases(*, batch: int = 1000) -> Moved:
    """Reclaim messages whose lease has run out. After too many of them, or after `max_attempts`, a message is DEAD.

    Args:
        batch: int, how many to change in one transaction.

    Returns:
        Moved, a list of the ids of the messages.

    Raises:
        InvalidValue: the batch is less than 1.
    """

    def release(held: list[int]) -> None:
        _execute(
            "UPDATE {outbox} SET leased_by = NULL, leased_at = NULL, unreported = unreported + 1, "
            "last_error = 'the lease of ' || leased_by || ' ran out', status = CASE "
            "WHEN attempts >= max_attempts OR unreported >= %s THEN 'DEAD' ELSE status END WHERE id IN {these}",
            MAX_UNREPORTED - 1,
            these=held,
        )

    return _in_batches(_Due(_RUN_OUT, (stored_time(moment()),), lock=("o",)), batch, release)


#: The triggers that PostgreSQL's function fires on many conversations at once.
_AT_ONCE = ("stall", "close_lost")


def _move(trigger: str, at: str, due: _Due, batch: int, reason: str | None = None) -> Moved:
    """Fire a trigger on every conversation that is due: in one statement, or one by one if hooks must run."""
    transition, given = TRIGGERS[trigger], {"closed_lost_reason": reason}
    provenance = Provenance(ACTOR, reason)
    assignments = assigned_by(transition, at, given)
    columns = ", ".join(f'"{assignment.column}" = {assignment.sql}' for assignment in assignments)
    parameters = [parameter for assignment in assignments for parameter in assignment.parameters]
    is_hooked, binding = hooks.crosses_a_hook(transition), current()
    is_at_once = not is_hooked and trigger in _AT_ONCE and binding.dialect.sweeps_at_once(binding.database)

    def move(ids: list[str]) -> None:
        if is_hooked:
            for conversation_id in ids:
                change_stage(CloseEngineConversation.get_by_id(conversation_id), trigger, given, provenance)
        elif is_at_once:
            binding.execute("SELECT {sweep}(%s::text[], %s::text)", (ids, trigger))
        else:
            _execute(f"UPDATE close_engine_conversations SET {columns} WHERE id IN {{these}}", *parameters, these=ids)

    attributed_to = None if is_hooked else (provenance, Write(trigger, None, at))
    return _in_batches(due, batch, move, attributed_to, one_by_one=is_hooked)


def _in_batches(
    due: _Due,
    batch: int,
    write: Callable[[list[Any]], None],
    attributed_to: tuple[Provenance, Write] | None = None,
    *,
    one_by_one: bool = False,
) -> Moved:
    """Lock the rows that are due and write them, one batch per transaction, until a batch is not full.

    If the database refuses a row of a batch, each row that is left gets a transaction of its own.

    Args:
        due: what to look for.
        batch: int, how many rows to lock at a time.
        write: function that gets the ids of the locked rows, and writes them.
        attributed_to: the provenance of the changes, and their write.
        one_by_one: bool, whether each row gets a transaction of its own from the beginning.

    Returns:
        Moved, the ids of all changed rows.
    """
    if batch < 1:
        raise InvalidValue("batch", batch, "it must be at least 1")
    binding, moved = current(), Moved()
    lock = binding.dialect.skip_locked(*due.lock)

    def find(limit: int, lock: str, only: str = "", *values: Any) -> list[Any]:
        query = due.query.replace("{only}", only).replace("{lock}", lock)
        return [row[0] for row in binding.execute(query, (*due.values, *values, limit)).fetchall()]

    def locked_and_written(limit: int, only: str = "", *values: Any) -> list[Any]:
        with atomic(), binding.attributed(*attributed_to) if attributed_to else nullcontext():
            held = find(limit, lock, only, *values)
            if held and due.asks_twice:
                these = ", ".join(["%s"] * len(held))
                held = find(limit, "", f"AND {due.lock[0]}.id IN ({these})", *held)
            if held:
                write(held)
        return held

    while not one_by_one:
        try:
            held = locked_and_written(batch)
        except (peewee.DataError, peewee.IntegrityError, peewee.InternalError, peewee.OperationalError) as error:
            if is_transient(error):
                raise
            one_by_one = True  # to find the row that is refused
        else:
            moved += held
            if len(held) < batch:
                return moved

    for row_id in find(_ALL, ""):
        try:
            moved += locked_and_written(1, f"AND {due.lock[0]}.id = %s", row_id)
        except GuardMissing:
            raise
        except Exception as error:
            _pass_over(moved, row_id, error)
            if isinstance(error, AfterCommitError):
                moved.append(row_id)
    return moved


def _sentence(error: Exception) -> str:
    return one_line(error) if isinstance(error, CloseEngineError) else f"{type(error).__name__}: {one_line(error)}"


def _execute(text: str, *values: Any, these: list[Any]) -> list[tuple[Any, ...]]:
    """Run a statement on these ids, which replace {these}. The other values come before them in the text."""
    marks = ", ".join(["%s"] * len(these))
    cursor = current().execute(text.replace("{these}", f"({marks})"), (*values, *these))
    rows: list[tuple[Any, ...]] = cursor.fetchall() if cursor.description else []
    return rows
