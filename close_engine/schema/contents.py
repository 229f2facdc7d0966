"""Check what is in the database: words, references, history, stamps, deadlines; and who may do what in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peewee

from close_engine import approvals, heartbeats, inbox, texts  # noqa: F401 - defines more models to check
from close_engine.conversations import CloseEngineConversation
from close_engine.database.binding import current
from close_engine.database.catalog import Catalog
from close_engine.database.dialect import identifier
from close_engine.database.fields import EnumField, JsonField, UtcDateTimeField, why_unreadable
from close_engine.machine import TRIGGERS, Stamp
from close_engine.models import BaseModel, Lead, StageChange, User
from close_engine.schema.problems import (
    REPAIR,
    Check,
    Problem,
    current_catalog,
    fetch,
    key_column,
    literal,
    own_columns,
    rows_of,
    table_name,
)

__all__ = ["contents"]

_BACK_REFERENCES = ((Lead, "close_conversation"), (User, "close_engine_conversations"))


def contents() -> list[Check]:
    """Check the rows, and who may do what. Every row that must fit is read."""
    catalog = current_catalog()
    models = BaseModel.__subclasses__()
    readable = {model for model in models if _has_every_column(catalog, model)}
    made = []
    if catalog.exact:
        made.append(Check("rights", list(_rights_problems(catalog))))
        made.append(Check("sequences", list(_sequence_problems(catalog, readable))))
    made += [
        Check(
            f"values in {table_name(model)}",
            [*_unknown_words(model), *_unreadable_times(model), *_unreadable_json(model)],
        )
        for model in models
        if model in readable
    ]
    if {Lead, User, CloseEngineConversation} <= readable:
        made.append(Check("back-references", list(_reference_problems())))
    if {StageChange, CloseEngineConversation} <= readable:
        made.append(Check("history", list(_history_problems())))
        made.append(Check("stamps", list(_stamp_problems())))
    if {CloseEngineConversation, approvals.PendingAction} <= readable and own_columns("deadlines"):
        made.append(Check("deadlines", list(_deadline_problems())))
    return made


def _has_every_column(catalog: Catalog, model: type[BaseModel]) -> bool:
    found = catalog.columns(model._meta.table_name, model._meta.schema)
    return all(field.column_name in found for field in model._meta.sorted_fields)


def _rights_problems(catalog: Catalog) -> Iterator[Problem]:
    owners = catalog.owners()
    keeper = next((owner for _, name, owner in owners if name == "close_engine.history"), None)
    for kind, name, owner in owners:
        if keeper is not None and owner != keeper:
            give = f"ALTER {kind} {name} OWNER TO {identifier(keeper)}"
            yield Problem(
                f"The {kind.lower()} {name} belongs to {owner}, and close_engine.history to {keeper}",
                f"give them one owner ({give}), or {REPAIR} as a superuser",
                mend=give,
            )
    for owner, right, table in catalog.missing_rights():
        grant = f"GRANT {right} ON {table} TO {owner}"
        yield Problem(
            f"The functions of close_engine run with the rights of {owner}, who lacks {right} on {table}",
            f"grant it ({grant}), or {REPAIR} as the table's owner",
            mend=grant,
        )
    for role, right, table in catalog.forgers():
        yield Problem(
            f"{'Everybody' if role == 'PUBLIC' else f'The role {role}'} may {right} on {table}, which only the "
            "library's triggers and migrations write",
            f"REVOKE {right} ON {table} FROM {role}",
        )
    for table, owner in catalog.hidden_rows():
        yield Problem(
            f"Row-level security hides rows of {table} from the functions of close_engine, which run with the rights "
            f"of {owner}",
            f"give that role BYPASSRLS, or a policy (CREATE POLICY close_engine ON {table} TO {owner} USING (true))",
        )


def _sequence_problems(catalog: Catalog, readable: set[type[BaseModel]]) -> Iterator[Problem]:
    for model in (model for model in BaseModel.__subclasses__() if model in readable):
        key = model._meta.primary_key
        if not isinstance(key, peewee.AutoField):
            continue
        sequence, last = catalog.sequence(model._meta.table_name, key.column_name)
        if sequence is None:
            continue
        if last is None:
            yield Problem(
                f"This role may not read the sequence {sequence}, so it is not checked",
                f"have its owner GRANT SELECT ON SEQUENCE {sequence}",
            )
            continue
        ((newest,),) = fetch(f'SELECT pg_catalog.max("{key.column_name}") FROM <table>', model=model)
        if (newest or 0) > last:
            yield Problem(
                f"The sequence {sequence} is at {last}, and {table_name(model)} has the id {newest}, so the next row "
                "cannot be inserted",
                f"{REPAIR}, which sets it",
                mend=f"SELECT pg_catalog.setval({literal(sequence)}::pg_catalog.regclass, {newest})",
            )


def _unknown_words(model: type[BaseModel]) -> Iterator[Problem]:
    for field in model._meta.sorted_fields:
        if isinstance(field, EnumField):
            words = [str(word.value) for word in field.words]
            marks = ", ".join(["%s"] * len(words))
            builtin = current().dialect.builtin
            # Plain SQL, because the field refuses to load an unknown value.
            strange = fetch(
                f'SELECT "{field.column_name}", {builtin}count(*), {builtin}min("{key_column(model)}") FROM <table> '
                f'WHERE "{field.column_name}" NOT IN ({marks}) GROUP BY 1 ORDER BY 1',
                words,
                model,
            )
            for word, count, example in strange:
                # A decision has consequences, so the guard lets nothing become one that did not wait for it.
                known = words if field is not approvals.PendingAction.status else words[:1]
                yield Problem(
                    f"In {rows_of(model, count, repr(example))}, {field.column_name} has the unknown value {word!r}",
                    f"change it to {'one of ' * (len(known) > 1)}{', '.join(known)}",
                )


def _unreadable_times(model: type[BaseModel]) -> Iterator[Problem]:
    """Find the times from before the guards that Python cannot hold."""
    builtin = current().dialect.builtin
    for field in (field for field in model._meta.sorted_fields if isinstance(field, UtcDateTimeField)):
        column = field.column_name
        found = fetch(
            f'SELECT {builtin}count(*), {builtin}min("{key_column(model)}") FROM <table> '
            f"WHERE {current().dialect.unreadable_time(identifier(column))} HAVING {builtin}count(*) > 0",
            model=model,
        )
        for count, example in found:
            yield Problem(
                f"In {rows_of(model, count, repr(example))}, {column} is not between the years 1 and 9998",
                "set it to a time that Python can read",
            )


def _unreadable_json(model: type[BaseModel]) -> Iterator[Problem]:
    """Find the JSON from before the guards that not every reader can read."""
    dialect = current().dialect
    for field in (field for field in model._meta.sorted_fields if isinstance(field, JsonField)):
        text, key = f"CAST({identifier(field.column_name)} AS TEXT)", identifier(key_column(model))
        # As text, a document cannot fail while it is fetched.
        suspects = fetch(f"SELECT {key}, {text} FROM <table> WHERE {dialect.suspect_json(text)} ORDER BY 1", (), model)
        reasons: dict[str, list[Any]] = {}
        for row_id, document in suspects:
            if why := why_unreadable(document):
                reasons.setdefault(why, []).append(row_id)
        for why, ids in reasons.items():
            yield Problem(
                f"In {rows_of(model, len(ids), repr(ids[0]))}, {field.column_name} {why}",
                "set it to JSON that every reader can read",
            )


def _reference_problems() -> Iterator[Problem]:
    for model, name in _BACK_REFERENCES:
        if name not in {key.backref for key in model._meta.backrefs}:
            yield Problem(
                f"The model {model.__name__} has no back-reference {name}", "import close_engine, not a part of it"
            )
    for key in CloseEngineConversation._meta.refs:
        column, target = key.column_name, key.rel_model._meta.table_name
        dangling = fetch(
            f"SELECT {current().dialect.builtin}count(*) OVER (), c.id, c.{column} FROM close_engine_conversations c "
            f"LEFT JOIN <table> t ON t.id = c.{column} "
            f"WHERE c.{column} IS NOT NULL AND t.id IS NULL ORDER BY c.id LIMIT 1",
            model=key.rel_model,
        )
        for count, example, missing in dangling:
            yield Problem(
                f"In {rows_of(CloseEngineConversation, count, repr(example))}, {column} refers to {missing!r}, which "
                f"is not in {target}",
                "delete these conversations, or restore what they refer to",
            )


def _history_problems() -> Iterator[Problem]:
    history, counted = table_name(StageChange), f"{current().dialect.builtin}count(*) OVER ()"
    adopts = f"a writer bypassed the guard; {REPAIR}, which records the stage as it is"
    unrecorded = fetch(
        f"SELECT {counted}, c.id, c.stage FROM close_engine_conversations c "
        "WHERE NOT EXISTS (SELECT 1 FROM {history} h WHERE h.conversation_id = c.id) ORDER BY c.id LIMIT 1"
    )
    for count, example, stage in unrecorded:
        yield Problem(
            f"For {rows_of(CloseEngineConversation, count, f'{example!r} in {stage}')}, {history} has no row",
            adopts,
            again=True,
        )
    differing = fetch(
        f"SELECT {counted}, id, stage, dest FROM (SELECT c.id, c.stage, "
        "(SELECT h.dest FROM {history} h "
        "WHERE h.conversation_id = c.id ORDER BY h.id DESC LIMIT 1) AS dest FROM close_engine_conversations c) newest "
        "WHERE stage <> dest ORDER BY id LIMIT 1"
    )
    for count, example, stage, dest in differing:
        yield Problem(
            f"In {rows_of(CloseEngineConversation, count, f'{example!r}: {stage} instead of {dest}')}, the stage "
            f"differs from the newest row of {history}",
            adopts,
            again=True,
        )


def _stamp_problems() -> Iterator[Problem]:
    """Find the rows without the stamps that their stage needs."""
    binding = current()
    for transition in TRIGGERS.values():
        for column in (column for column, stamp in transition.stamps.items() if stamp is Stamp.NOW):
            stage = transition.dest
            missing = f"stage = '{stage}' AND {column} IS NULL"
            found = fetch(
                f"SELECT {binding.dialect.builtin}count(*) OVER (), id FROM close_engine_conversations WHERE {missing} "
                "ORDER BY id LIMIT 1"
            )
            for count, example in found:
                yield Problem(
                    f"In {rows_of(CloseEngineConversation, count, repr(example))}, the stage is {stage} and {column} "
                    "is empty",
                    f"set it, or {REPAIR}, which takes it from the history",
                    mend=binding.sql(
                        f"UPDATE close_engine_conversations SET {column} = coalesce((SELECT h.created_at FROM "
                        "{history} h WHERE h.conversation_id = close_engine_conversations.id "
                        f"AND h.dest = '{stage}' ORDER BY h.id DESC LIMIT 1), updated_at) WHERE {missing}"
                    ),
                )


#: A row that the sweeps must find by time: the model, which of its rows, and what one of its deadlines must say.
_DUE: tuple[tuple[type[BaseModel], str, tuple[str, ...]], ...] = (
    (CloseEngineConversation, "s.stage NOT IN ('COMPLETED', 'STALLED', 'CLOSED_LOST')", ("stall", "answer")),
    (CloseEngineConversation, "s.stage = 'STALLED' AND s.stalled_at IS NOT NULL", ("close_lost",)),
    (approvals.PendingAction, "s.status = 'PENDING' AND s.expires_at IS NOT NULL", ("expire",)),
)


def _deadline_problems() -> Iterator[Problem]:
    for model, due, triggers in _DUE:
        marks = ", ".join(["%s"] * len(triggers))
        found = fetch(
            f"SELECT {current().dialect.builtin}count(*) OVER (), s.id FROM {table_name(model)} s WHERE {due} "
            f'AND NOT EXISTS (SELECT 1 FROM {{deadlines}} d WHERE d."trigger" IN ({marks}) AND d.subject_id = s.id) '
            "ORDER BY s.id LIMIT 1",
            triggers,
        )
        for count, example in found:
            yield Problem(
                f"For {rows_of(model, count, repr(example))}, {current().sql('{deadlines}')} has no row "
                f"{' or '.join(triggers)}, so no sweep finds it",
                f"{REPAIR}, which adds it",
                again=True,
            )
