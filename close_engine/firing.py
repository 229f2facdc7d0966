"""One stage change: ask the machine, write with the guard, name the failure; memory follows last.

`CloseEngineConversation.fire` ends here. The machine decides on a draft, never on the row; the row changes only if
nobody changed it since it was loaded; the database adds the history row and refuses what is not in its table.

>>> from close_engine import CloseEngineConversation, connect
>>> database = connect("sqlite:///:memory:")
>>> draft_of(CloseEngineConversation(id="c1", lead="l1", entry_point="SMS_REPLY"), {}).stage
<Stage.INITIATED: 'INITIATED'>
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import datetime, timedelta
from functools import cache, partial
from threading import local
from typing import TYPE_CHECKING, Any, TypedDict

from close_engine import hooks
from close_engine.columns import is_row
from close_engine.database.binding import Binding, current, now
from close_engine.database.dialect import Dialect
from close_engine.database.fields import clean_json, clean_text, stored_time
from close_engine.database.transaction import atomic, remember, run_after_commit
from close_engine.errors import (
    ConversationNotFound,
    InvalidValue,
    KeyReused,
    PartlyLoaded,
    StageConflict,
    TransitionRefused,
)
from close_engine.machine import TRIGGERS, Draft, Stamp, Transition, decide
from close_engine.models import StageChange
from close_engine.stages import Stage

if TYPE_CHECKING:
    from close_engine.conversations import CloseEngineConversation

__all__ = [
    "Context",
    "change_stage",
    "conflict",
    "context_of",
    "draft_of",
    "entered",
    "next_version",
    "require_whole",
    "write_fields",
    "written_by",
]

#: What fits an index of PostgreSQL in any alphabet.
LONGEST_KEY = 255

_TICK = timedelta(milliseconds=1)

#: What a decision, its write and its history row rest on.
_NEEDED = {"id", "lead", "stage", "autonomy_level", "payment_link_sent_at", "updated_at"}


class Context(TypedDict, total=False):
    """What every trigger takes: who fires it, why, what else is known of it, and the key of the event behind it."""

    actor: str | None
    reason: str | None
    metadata: Mapping[str, Any] | None
    key: str | None


def draft_of(conversation: CloseEngineConversation, given: Mapping[str, Any]) -> Draft:
    """What the machine decides on."""
    require_whole(conversation)
    sent = conversation.payment_link_sent_at is not None
    return Draft(conversation.stage, conversation.id, conversation.autonomy_level, sent, given)


def require_whole(conversation: CloseEngineConversation) -> None:
    """Refuse an object whose query left out columns: what is not loaded is not the same as what is empty.

    Raises:
        PartlyLoaded: it lacks a column that a decision rests on.
    """
    if not conversation.__data__.keys() >= _NEEDED and is_row(conversation):
        raise PartlyLoaded(conversation.id, sorted(_NEEDED - conversation.__data__.keys()))


def next_version(conversation: CloseEngineConversation) -> datetime:
    """The `updated_at` of the next write: later than the last, also where clocks differ."""
    return max(now(), conversation.updated_at + _TICK)


def context_of(
    trigger: str, actor: str | None, reason: str | None, metadata: Mapping[str, Any] | None, key: str | None
) -> dict[str, Any]:
    """What the history row says besides the stages, checked."""
    texts = {"actor": actor, "reason": reason, "key": key}
    for name, text in texts.items():
        if text is not None:
            texts[name] = clean_text(name, text)
    if key is not None and not key.strip():
        raise InvalidValue("key", key, "an idempotency key must not be empty")
    if key is not None and len(key) > LONGEST_KEY:
        raise InvalidValue("key", key, f"an idempotency key has at most {LONGEST_KEY} characters")
    if metadata is not None:
        if not isinstance(metadata, Mapping):
            raise InvalidValue("metadata", metadata, "it must be a mapping")
        metadata = clean_json("metadata", metadata)
    return {"trigger": trigger, **texts, "metadata": metadata}


def change_stage(
    conversation: CloseEngineConversation,
    trigger: str,
    given: Mapping[str, Any],
    context: dict[str, Any],
    also: Mapping[str, Any] | None = None,
) -> StageChange:
    """One stage change: ask the machine, write with the guard, name the failure; memory follows last.

    `also` are further columns to write with it.
    """
    source = conversation.stage
    try:
        transition = decide(trigger, draft_of(conversation, given))
        hooked = hooks.hooks_for(source, transition.dests)
        with atomic() if hooked else nullcontext():
            if hooked:
                hooks.run_on_exit(conversation, transition)
            values = {**written_by(transition, next_version(conversation), given), **(also or {})}
            row = _write(current(), conversation, source, transition, values, context)
            if row is None:
                raise conflict(conversation, trigger, source)
            change = _take_over(conversation, source, values, row, context)
            entered(conversation, change)
    except (TransitionRefused, StageConflict, ConversationNotFound):
        # Only now, so that the first use of a key costs nothing: was it used before?
        earlier = _earlier(conversation.id, trigger, context["key"])
        if earlier is None:
            raise
        return earlier
    return change


def write_fields(conversation: CloseEngineConversation, values: Mapping[str, Any], what: str) -> None:
    """A guarded write of fields other than the stage: whoever else decided on the same state is in conflict.

    The version moves with them, and alone where there are none.

    Raises:
        StageConflict: somebody changed the conversation since it was loaded.
        ConversationNotFound: it was deleted.
    """
    model = type(conversation)
    values = {**values, "updated_at": next_version(conversation)}
    same = (model.id == conversation.id) & (model.updated_at == conversation.updated_at)
    if not model.update(values).where(same & model.stage.still(conversation.stage)).execute():
        raise conflict(conversation, what, conversation.stage)
    remember(conversation, list(values))
    conversation.__data__["updated_at"] = values["updated_at"]
    conversation._dirty.difference_update(values)


def written_by(transition: Transition, moment: datetime, given: Mapping[str, Any]) -> dict[str, Any]:
    """Column name to the value that the transition writes there."""
    values: dict[str, Any] = {"stage": transition.dest, "updated_at": moment}
    for column, stamp in transition.stamps.items():
        if stamp is Stamp.NOW:
            values[column] = moment
        elif stamp is Stamp.CLEARED:
            values[column] = None
        elif stamp is Stamp.GIVEN:
            values[column] = given[column]
        else:
            values[column] = 1
    return values


def _write(
    binding: Binding,
    conversation: CloseEngineConversation,
    source: Stage,
    transition: Transition,
    values: Mapping[str, Any],
    context: dict[str, Any],
) -> tuple[Any, ...] | None:
    key, meta = context["key"], conversation._meta
    statement = _statement(meta, binding.dialect, transition.trigger, tuple(values), key is not None)
    stored = {name: meta.fields[name].db_value(value) for name, value in values.items()}
    context = {**context, "id": conversation.id, "updated_at": stored["updated_at"]}
    if transition.dest is None:
        stored["stage"] = conversation.id  # _STALLED_IN finds the stage
    parameters = [*stored.values(), conversation.id, source.value, stored_time(conversation.updated_at)]
    if key is not None:
        parameters += [conversation.id, key]
    return binding.dialect.execute_guarded(binding.database, statement, parameters, context)


_STALLED_IN = (
    "COALESCE((SELECT source FROM {history} WHERE conversation_id = %s AND dest = 'STALLED' "
    "ORDER BY id DESC LIMIT 1), 'QUALIFYING')"
)


@cache
def _statement(meta: Any, dialect: Dialect, trigger: str, written: tuple[str, ...], keyed: bool) -> str:
    """The text of a transition's one write, made once for each shape it comes in."""
    fields, transition = meta.fields, TRIGGERS[trigger]
    assignments = []
    for name in written:
        column = f'"{fields[name].column_name}"'
        value = "%s"
        if name == "stage" and transition.dest is None:
            value = _STALLED_IN
        elif transition.stamps.get(name) is Stamp.INCREMENTED:
            value = f"{column} + %s"
        assignments.append(f"{column} = {value}")
    # As `EnumField.still` writes it: the key alone is to find the row.
    conditions = '"id" = %s AND "stage" || \'\' = %s AND "updated_at" = %s'
    if keyed:
        conditions += " AND NOT EXISTS (SELECT 1 FROM {history} WHERE conversation_id = %s AND key = %s)"
    return dialect.guarded_update(
        meta.table_name,
        ", ".join(assignments),
        conditions,
        ", ".join(f'"{fields[name].column_name}"' for name in written),
    )


def _take_over(
    conversation: CloseEngineConversation,
    source: Stage,
    values: Mapping[str, Any],
    row: tuple[Any, ...],
    context: dict[str, Any],
) -> StageChange:
    """Copy what was written into the object, and say what the history row holds."""
    fields = conversation._meta.fields
    remember(conversation, list(values))
    for name, value in zip(values, row[:-1], strict=True):
        conversation.__data__[name] = fields[name].python_value(value)
    conversation._dirty.difference_update(values)
    return StageChange(
        __no_default__=True,
        id=row[-1],
        conversation_id=conversation.id,
        lead_id=conversation.lead_id,
        source=source,
        dest=conversation.stage,
        created_at=conversation.updated_at,
        **context,
    )


def _earlier(conversation_id: str, trigger: str, key: str | None) -> StageChange | None:
    """The history row that this key made already."""
    if key is None:
        return None
    change: StageChange | None = StageChange.get_or_none(
        (StageChange.conversation_id == conversation_id) & (StageChange.key == key)
    )
    if change is not None and change.trigger != trigger:
        raise KeyReused(conversation_id, key, change.trigger, trigger)
    return change


def conflict(
    conversation: CloseEngineConversation, trigger: str, expected: Stage
) -> StageConflict | ConversationNotFound:
    """Why a guarded write found no row."""
    model = type(conversation)
    found = model.select(model.stage).where(model.id == conversation.id).first()
    if found is None:
        return ConversationNotFound(conversation.id)
    return StageConflict(conversation.id, trigger, expected, found.stage)


def entered(conversation: CloseEngineConversation, change: StageChange) -> None:
    """Run what waits for the entering of a stage: some functions now, others after the commit."""
    waiting = hooks.committed_hooks(change.dest)
    if current().database.in_transaction():
        _uncommitted.changes[change.id] = change
        run_after_commit(*(partial(_run_if_kept, hook, conversation, change) for hook in waiting))
    else:
        run_after_commit(*(partial(hook, conversation, change) for hook in waiting))
    hooks.run_on_enter(conversation, change)


class _Uncommitted(local):
    """The newest change of each id, until it is committed: SQLite gives a rolled-back id out again."""

    def __init__(self) -> None:
        self.changes: weakref.WeakValueDictionary[int, StageChange] = weakref.WeakValueDictionary()


_uncommitted = _Uncommitted()


def _run_if_kept(hook: hooks.Hook, conversation: CloseEngineConversation, change: StageChange) -> None:
    """Run a function after the commit, unless a savepoint was rolled back before it: the history knows."""
    same = (StageChange.id == change.id) & (StageChange.created_at == change.created_at)
    kept = StageChange.get_or_none(same & (StageChange.conversation_id == change.conversation_id))
    if kept is not None and _uncommitted.changes.get(change.id) is change:
        hook(conversation, change)
