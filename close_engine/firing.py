"""One stage change: read, ask the machine, write once, explain a failure, and update the object last.

`CloseEngineConversation.fire` ends here. The machine decides on facts, never on the row. The row changes only if
nobody has changed it since it was loaded. The database adds the history row, and refuses changes not in its table.

>>> from close_engine import CloseEngineConversation, connect
>>> database = connect("sqlite:///:memory:")
>>> facts_of(CloseEngineConversation(id="c1", lead="l1", entry_point="SMS_REPLY"), {}).stage
<Stage.INITIATED: 'INITIATED'>
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import datetime, timedelta
from functools import cache, partial
from threading import local
from typing import TYPE_CHECKING, Any, NamedTuple

from close_engine import hooks, tally
from close_engine.columns import is_row
from close_engine.database.binding import current, now
from close_engine.database.dialect import Dialect
from close_engine.database.fields import clean_text, stored_time
from close_engine.database.provenance import Provenance, Write
from close_engine.database.tasks import require_own_transaction
from close_engine.database.transaction import accept, atomic, run_after_commit
from close_engine.errors import ConversationNotFound, KeyReused, PartlyLoaded, StageConflict, TransitionRefused
from close_engine.machine import Facts, Stamp, Transition, decide
from close_engine.models import StageChange
from close_engine.stages import Stage

if TYPE_CHECKING:
    from close_engine.conversations import CloseEngineConversation

__all__ = [
    "Assignment",
    "assigned",
    "assigned_by",
    "change_stage",
    "conflict",
    "facts_of",
    "next_version",
    "require_whole",
    "run_entry_hooks",
    "write_fields",
]

_TICK = timedelta(milliseconds=1)

#: The fields that a decision, its write and its history row need.
_NEEDED = {"id", "lead", "stage", "autonomy_level", "payment_link_sent_at", "updated_at"}


class Assignment(NamedTuple):
    """What an UPDATE sets one column to.

    Attributes:
        column: the column's name.
        sql: an expression, written as `Dialect.sql` takes it. Each %s is a parameter.
        parameters: tuple of values, as the database stores them.
    """

    column: str
    sql: str
    parameters: tuple[Any, ...] = ()


#: What writes the stage that a transition leads to; None is where things stand, which the database knows.
_STAGE: dict[Stage | None, Assignment] = {
    None: Assignment("stage", "{resumes_to}"),
    **{stage: Assignment("stage", "%s", (stage.value,)) for stage in Stage},
}


#: A payment link that was sent past the library while the conversation was stalled: its stamp is missing.
_LINK_SENT = (
    "CASE WHEN payment_link_sent_at IS NULL AND {resumes_to} = 'PAYMENT_SENT' THEN {moment} "
    "ELSE payment_link_sent_at END"
)


def change_stage(
    conversation: CloseEngineConversation,
    trigger: str,
    given: Mapping[str, Any],
    provenance: Provenance,
    also: Mapping[str, Any] | None = None,
) -> StageChange:
    """Fire a trigger.

    Args:
        conversation: the conversation as the caller knows it.
        trigger: a name of the transition table.
        given: the arguments that the table's conditions and stamps need, by name.
        provenance: goes into the history row. Its key makes the trigger fire only once.
        also: other fields to write in the same UPDATE, by name.

    Returns:
        the history row.

    Raises:
        UnknownTrigger, TransitionNotAllowed, ConditionNotMet, PartlyLoaded: see `decide` and `facts_of`.
        StageConflict, ConversationNotFound: see `conflict`.
        KeyReused: the key was used for another trigger.
        GuardMissing: the database would not record the change.
        InvalidValue: a value cannot be stored.
    """
    source = conversation.stage
    try:
        transition = decide(trigger, facts_of(conversation, given))
        hooked = hooks.runs_in_transaction(source, transition.dests)
        with atomic() if hooked else nullcontext():
            if hooked:
                hooks.run_on_exit(conversation, transition)
            at = stored_time(next_version(conversation))
            assignments = assigned_by(transition, at, given)
            if also:
                fields = assigned(type(conversation), also)
                named = [assignment.column for assignment in fields]
                assignments = [*fields, *(each for each in assignments if each.column not in named)]
            row = _write(conversation, source, assignments, provenance, Write(trigger, conversation.id, at))
            if row is None:
                raise conflict(conversation, trigger, source)
            change = _accept(conversation, source, trigger, assignments, row, provenance)
            run_entry_hooks(conversation, change)
    except (TransitionRefused, StageConflict, ConversationNotFound) as refusal:
        if isinstance(refusal, StageConflict) and refusal.found is None:
            raise  # the transaction can do nothing more
        # Look for an earlier use of the key only now, so that its first use costs nothing.
        earlier = _find_earlier(conversation.id, trigger, provenance.key)
        if earlier is None:
            raise
        return earlier
    return change


def facts_of(conversation: CloseEngineConversation, given: Mapping[str, Any]) -> Facts:
    """Collect the facts that the machine decides on.

    Raises:
        PartlyLoaded: the object lacks a column that a decision needs.
    """
    require_whole(conversation)
    sent = conversation.payment_link_sent_at is not None
    return Facts(conversation.stage, conversation.id, conversation.autonomy_level, sent, given)


def require_whole(conversation: CloseEngineConversation) -> None:
    """Refuse an object whose query left out columns: a value that was not loaded is not an empty value.

    Raises:
        PartlyLoaded: it lacks a column that a decision needs.
    """
    if not conversation.__data__.keys() >= _NEEDED and is_row(conversation):
        raise PartlyLoaded(conversation.id, sorted(_NEEDED - conversation.__data__.keys()))


def next_version(conversation: CloseEngineConversation) -> datetime:
    """Return the `updated_at` of the next write: later than the last, even if the clocks of two writers differ."""
    return max(now(), conversation.updated_at + _TICK)


def assigned_by(transition: Transition, at: str, given: Mapping[str, Any]) -> list[Assignment]:
    """List what a transition writes.

    Args:
        transition: a row of the table.
        at: the new `updated_at`, as the database stores it. Every other moment is the database's own.
        given: the arguments of the trigger, by name.
    """
    assignments = [_STAGE[transition.dest], Assignment("updated_at", "%s", (at,))]
    if transition.dest is None:
        assignments.append(Assignment("payment_link_sent_at", _LINK_SENT))
    for column, stamp in transition.stamps.items():
        if stamp is Stamp.GIVEN:
            assignments.append(Assignment(column, "%s", (clean_text(column, given[column]),)))
        else:
            assignments.append(_assigned_without_value(column, stamp))
    return assignments


@cache
def _assigned_without_value(column: str, stamp: Stamp) -> Assignment:
    return Assignment(column, {Stamp.NOW: "{moment}", Stamp.INCREMENTED: f'"{column}" + 1'}.get(stamp, "NULL"))


def assigned(model: type[CloseEngineConversation], values: Mapping[str, Any]) -> list[Assignment]:
    """List the assignments that write these fields, given by name."""
    fields = [(model._meta.fields[name], value) for name, value in values.items()]
    return [Assignment(field.column_name, "%s", (field.db_value(value),)) for field, value in fields]


def _write(
    conversation: CloseEngineConversation,
    source: Stage,
    assignments: list[Assignment],
    provenance: Provenance,
    write: Write,
) -> tuple[Any, ...] | None:
    """Run the guarded UPDATE. Return the written columns and the history row's id and moment, or None."""
    binding, key = current(), provenance.key
    shape = tuple([assignment[:2] for assignment in assignments])
    statement = _statement(binding.dialect, conversation._meta.table_name, shape, key is not None)
    parameters: list[Any] = []
    for assignment in assignments:
        parameters += assignment.parameters
    parameters += (conversation.id, source.value, stored_time(conversation.updated_at))
    if key is not None:
        parameters += (conversation.id, key)
    require_own_transaction(binding.database)
    try:
        return binding.dialect.execute_guarded(binding.database, statement, parameters, provenance, write)
    except StageConflict as lost:
        raise _counted(StageConflict(conversation.id, write.trigger, source, None)) from lost.__cause__


@cache
def _statement(dialect: Dialect, table: str, shape: tuple[tuple[str, str], ...], is_keyed: bool) -> str:
    """Build the guarded UPDATE, once for each shape. For `collect_info` on PostgreSQL it comes out as

    UPDATE "close_engine_conversations" SET "stage" = %s, "updated_at" = %s
    WHERE "id" = %s AND "stage" || '' = %s AND "updated_at" = %s AND pg_catalog.set_config(…) IS NOT NULL
    RETURNING "stage", "updated_at", close_engine.recorded()
    """
    # `|| ''` keeps the planner off the index on stage, as in `EnumField.is_still`: the id must find the row.
    conditions = '"id" = %s AND "stage" || \'\' = %s AND "updated_at" = %s'
    if is_keyed:
        conditions += " AND NOT EXISTS (SELECT 1 FROM {history} WHERE conversation_id = %s AND key = %s)"
    assignments = ", ".join(f'"{column}" = {sql}' for column, sql in shape)
    returning = ", ".join(f'"{column}"' for column, _ in shape)
    return dialect.guarded_update(table, assignments, conditions, returning)


def _accept(
    conversation: CloseEngineConversation,
    source: Stage,
    trigger: str,
    assignments: list[Assignment],
    row: tuple[Any, ...],
    provenance: Provenance,
) -> StageChange:
    """Copy the written values into the object, and return the history row of the change."""
    columns, values = conversation._meta.columns, {}
    for (column, _, _), value in zip(assignments, row, strict=False):
        values[columns[column].name] = columns[column].python_value(value)
    accept(conversation, values)
    change_id, at = json.loads(row[-1])
    return StageChange(
        __no_default__=True,
        id=change_id,
        conversation_id=conversation.id,
        lead_id=conversation.lead_id,
        trigger=trigger,
        source=source,
        dest=conversation.stage,
        actor=provenance.actor,
        reason=provenance.reason,
        metadata=provenance.metadata,
        key=provenance.key,
        created_at=StageChange.created_at.python_value(at),
    )


def write_fields(conversation: CloseEngineConversation, values: Mapping[str, Any], operation: str) -> None:
    """Write fields other than the stage; anyone else who decided on the same version gets a conflict.

    Args:
        conversation: the conversation as the caller knows it.
        values: field name to value. `updated_at` is written with them, and by itself if there are none.
        operation: the method that writes, for the error.

    Raises:
        StageConflict, ConversationNotFound: see `conflict`.
    """
    model = type(conversation)
    values = {**values, "updated_at": next_version(conversation)}
    same = (model.id == conversation.id) & (model.updated_at == conversation.updated_at)
    update = model.update(values).where(same & model.stage.is_still(conversation.stage))
    try:
        written = update.execute()
    except StageConflict as lost:
        raise _counted(StageConflict(conversation.id, operation, conversation.stage, None)) from lost.__cause__
    if not written:
        raise conflict(conversation, operation, conversation.stage)
    accept(conversation, values)


def _find_earlier(conversation_id: str, trigger: str, key: str | None) -> StageChange | None:
    """Find the history row that this key has already made.

    Raises:
        KeyReused: the key was used for another trigger.
    """
    if key is None:
        return None
    change: StageChange | None = StageChange.get_or_none(
        (StageChange.conversation_id == conversation_id) & (StageChange.key == key)
    )
    if change is not None and change.trigger != trigger:
        raise KeyReused(conversation_id, key, change.trigger, trigger)
    return change


def conflict(
    conversation: CloseEngineConversation, operation: str, expected: Stage
) -> StageConflict | ConversationNotFound:
    """Find out why a guarded UPDATE matched no row: somebody changed the conversation, or it was deleted."""
    model = type(conversation)
    found = model.select(model.stage).where(model.id == conversation.id).first()
    if found is None:
        return ConversationNotFound(conversation.id)
    return _counted(StageConflict(conversation.id, operation, expected, found.stage))


def _counted(conflict: StageConflict) -> StageConflict:
    tally.CONFLICTS.add(str(conflict.operation))
    return conflict


def run_entry_hooks(conversation: CloseEngineConversation, change: StageChange) -> None:
    """Run the functions registered for the stage just entered: `on_enter` now, `after_commit` after the commit."""
    waiting = hooks.committed_hooks(change.dest)
    if current().database.in_transaction():
        _uncommitted.changes[change.id] = change
        run_after_commit(*(partial(_run_if_kept, hook, conversation, change) for hook in waiting))
    else:
        run_after_commit(*(partial(hook, conversation, change) for hook in waiting))
    hooks.run_on_enter(conversation, change)


class _Uncommitted(local):
    """The newest change with each id, until it is committed: SQLite reuses the id of a rolled-back row."""

    def __init__(self) -> None:
        self.changes: weakref.WeakValueDictionary[int, StageChange] = weakref.WeakValueDictionary()


_uncommitted = _Uncommitted()


def _run_if_kept(hook: hooks.Hook, conversation: CloseEngineConversation, change: StageChange) -> None:
    """Run a function after the commit, unless a savepoint rolled its change back: the history shows which."""
    same = (StageChange.id == change.id) & (StageChange.created_at == change.created_at)
    kept = StageChange.get_or_none(same & (StageChange.conversation_id == change.conversation_id))
    if kept is not None and _uncommitted.changes.get(change.id) is change:
        hook(conversation, change)
