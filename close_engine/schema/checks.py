"""Verify that the bound database is what this library needs. Nothing is written.

    for problem in close_engine.verify():
        print(problem)

The models and the migrations say what to expect. The database's catalog and its rows say what is there.

>>> from close_engine.database.url import connect
>>> from close_engine import migrate
>>> database = connect("sqlite:///:memory:")
>>> verify()
['The database is not migrated: run close-engine migrate, or close_engine.migrate().']
>>> _ = migrate(standalone=True)
>>> verify()
[]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import peewee

from close_engine import approvals, inbox  # noqa: F401 - defines more models to check
from close_engine.conversations import CloseEngineConversation
from close_engine.database.binding import current
from close_engine.database.catalog import Catalog, Column, ForeignKey, Index
from close_engine.database.fields import EnumField
from close_engine.machine import ACTION_TRANSITIONS, pairs
from close_engine.models import BaseModel, Client, Lead, StageChange, User
from close_engine.schema.migrations import directory, status

__all__ = ["Check", "checks", "verify"]

#: The CRM's own columns that the models read: they must exist, but their types are up to the CRM.
_CRM_COLUMNS: dict[type[BaseModel], set[str]] = {Lead: {"id", "phone"}, User: {"id"}, Client: {"id"}}

_BACK_REFERENCES = ((Lead, "close_conversation"), (User, "close_engine_conversations"))


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        subject: what was checked.
        problems: list of str, a sentence each: what is wrong and what to do about it. Empty if nothing is wrong.
    """

    subject: str
    problems: list[str]


@dataclass(frozen=True)
class Guard:
    """The triggers that a migration puts on a table."""

    table: str
    migration: str
    triggers: tuple[str, ...]


@dataclass(frozen=True)
class Helper:
    """A table of the library that has no model, and the migrations that create and fill it."""

    columns: tuple[str, ...]
    migrations: tuple[str, ...]


#: The library's tables that have no model, by name.
_HELPERS = {
    "created": Helper(("table_name", "column_name"), ("0001_conversations",)),
    "deadlines": Helper(("trigger", "subject_id", "at"), ("0002_history", "0003_guard", "0005_decisions")),
    "transitions": Helper(("machine", "trigger", "source", "dest"), ("0002_history", "0005_decisions")),
}
_SQLITE_HELPERS = {"context": Helper(("id", "context"), ("0002_history",))}


def verify() -> list[str]:
    """Compare the bound database with what the library needs, and say what is wrong.

    Returns:
        list of str, one sentence for each problem; empty if nothing is wrong.

    Raises:
        ConfigurationError: no database is bound.
    """
    return [problem for check in checks() for problem in check.problems]


def checks() -> list[Check]:
    """Run every check of `verify`.

    Returns:
        list of Check, in order. A database without any migration gets only one.

    Raises:
        ConfigurationError: no database is bound.
    """
    migrations = status()
    if not any(migration.applied_at for migration in migrations):
        problem = "The database is not migrated: run close-engine migrate, or close_engine.migrate()."
        return [Check("migrations", [problem])]
    pending = [migration.name for migration in migrations if migration.applied_at is None]
    unknown = [migration.name for migration in migrations if not migration.known]
    found = [f"The migration {name} is pending: run close-engine migrate." for name in pending]
    found += [f"The migration {name} is unknown to this version: upgrade close-engine." for name in unknown]

    catalog = current().dialect.catalog(current().database)
    models = BaseModel.__subclasses__()
    readable = {model for model in models if not _missing_columns(catalog, model)}
    made = [Check("migrations", found)]
    made += [Check(f"table {_name(model)}", list(_table_problems(catalog, model))) for model in models]
    made.append(Check("helper tables", list(_helper_problems(catalog))))
    made += [Check(_triggers(guard), list(_trigger_problems(catalog, guard))) for guard in guards()]
    made.append(Check("allowed stage changes", list(_transition_problems(catalog, "conversation", pairs()))))
    made.append(Check("allowed decisions", list(_transition_problems(catalog, "action", ACTION_TRANSITIONS))))
    made += [
        Check(f"enum values in {_name(model)}", list(_unknown_words(model))) for model in models if model in readable
    ]
    if {Lead, User, CloseEngineConversation} <= readable:
        made.append(Check("back-references", list(_reference_problems())))
    if {StageChange, CloseEngineConversation} <= readable:
        made.append(Check("history", list(_history_problems())))
    return made


#: Finds a trigger in a migration's SQL file: its name and its table.
_TRIGGER = re.compile(
    r"^CREATE (?:OR REPLACE )?TRIGGER (?:IF NOT EXISTS )?(\w+)\s[^;]*?\sON (?:public\.)?(\w+)", re.MULTILINE
)


def guards() -> Iterator[Guard]:
    """Yield the triggers that the migrations create on this kind of database."""
    kind = current().dialect.name
    for script in sorted(directory().glob("[0-9]*.py")):
        file = script.with_name(f"{script.stem}.{kind}.sql")
        made: dict[str, list[str]] = {}
        for trigger, table in _TRIGGER.findall(file.read_text("utf-8")):
            made.setdefault(table, []).append(trigger)
        for table, triggers in made.items():
            yield Guard(table, script.stem, tuple(triggers))


def _missing_columns(catalog: Catalog, model: type[BaseModel]) -> list[Any]:
    found = catalog.columns(model._meta.table_name, model._meta.schema)
    return [field for field in model._meta.sorted_fields if field.column_name not in found]


def _table_problems(catalog: Catalog, model: type[BaseModel]) -> Iterator[str]:
    meta = model._meta
    table = _name(model)
    found = catalog.columns(meta.table_name, meta.schema)
    if not found:
        configured = f", or name it with connect(…, {meta.name}s=…)" if model in _CRM_COLUMNS else ""
        yield f"The table {table} is missing: restore it from a backup{configured}."
        return
    for field in meta.sorted_fields:
        yield from _column_problems(catalog, model, field, found.get(field.column_name))
    if model not in _CRM_COLUMNS:
        yield from _index_problems(catalog, model)
        yield from _foreign_key_problems(catalog, model)
    known = {field.column_name for field in meta.sorted_fields}
    for name, column in found.items():
        if model not in _CRM_COLUMNS and name not in known and column.required and column.default is None:
            yield (
                f"The column {table}.{name} is NOT NULL without a default, and close_engine does not know it, so no "
                "row can be inserted: make it nullable or give it a default."
            )


def _column_problems(catalog: Catalog, model: type[BaseModel], field: Any, found: Column | None) -> Iterator[str]:
    where, expected = f"{_name(model)}.{field.column_name}", catalog.expected(field)
    if found is None and field.column_name in _CRM_COLUMNS.get(model, ()):
        yield f"The column {where} is missing, and close_engine reads it: add it to the CRM's table, as {expected}."
    elif found is None:
        add = f'ALTER TABLE {_quoted(model)} ADD COLUMN "{field.column_name}" {expected}'
        yield f"The column {where} is missing: add it ({add})."
    elif field.column_name in _CRM_COLUMNS.get(model, ()):
        return
    elif found.required != expected.required:
        null = "not allow NULL" if expected.required else "allow NULL"
        yield f"The column {where} should {null}: found {found}, expected {expected}; alter it."
    elif catalog.exact and found.type != expected.type:
        yield f"The column {where} has the type {found.type}, expected {expected.type}: alter it."
    elif catalog.exact and found.default != expected.default and not isinstance(field, peewee.AutoField):
        yield (
            f"The column {where} has the default {found.default or 'none'}, expected {expected.default or 'none'}: "
            "alter it."
        )


def _index_problems(catalog: Catalog, model: type[BaseModel]) -> Iterator[str]:
    meta = model._meta
    found = catalog.indexes(meta.table_name, meta.schema)
    expected = {}
    if catalog.exact:
        expected[f"{meta.table_name}_pkey"] = Index((_primary_key(model),), unique=True)
    for index in meta.fields_to_index():
        columns = tuple(field.column_name for field in index._expressions)
        suffix = "key" if index._unique else "idx"
        expected["_".join((meta.table_name, *columns, suffix))] = Index(
            columns, bool(index._unique), index._where is not None
        )
    for name, index in expected.items():
        # Only Prisma needs the names of indexes, and it does not see the library's own tables.
        if hasattr(meta, "own_table"):
            if index not in found.values():
                yield f"The table {_name(model)} has no {index}: create one."
        elif name not in found:
            yield f"The table {_name(model)} has no {index} named {name}: create it."
        elif found[name] != index:
            yield (
                f"The index {name} on {_name(model)} is wrong: found {found[name]}, expected {index}; drop it and "
                "create it again."
            )


def _foreign_key_problems(catalog: Catalog, model: type[BaseModel]) -> Iterator[str]:
    meta = model._meta
    if not meta.refs:
        return
    found = catalog.foreign_keys(meta.table_name)
    for field in meta.refs:
        expected = ForeignKey(
            field.constraint_name if catalog.exact else None,
            field.column_name,
            field.rel_model._meta.table_name,
            field.on_delete,
            field.on_update,
        )
        if expected not in found:
            there = ", ".join(map(str, found)) or "none"
            yield (
                f"The table {_name(model)} needs the foreign key {expected}, found {there}: add it, in place of any "
                "other on that column."
            )


def _helper_problems(catalog: Catalog) -> Iterator[str]:
    helpers = _HELPERS if catalog.exact else _HELPERS | _SQLITE_HELPERS
    for table, helper in helpers.items():
        schema, name = current().dialect.own_table(table)
        found, shown = catalog.columns(name, schema), current().dialect.sql(f"{{{table}}}")
        if not found:
            yield f"The table {shown} is missing: {_how_to_recreate(helper.migrations)}."
        elif not found.keys() >= set(helper.columns):
            yield (
                f"The table {shown} should have the columns {', '.join(helper.columns)}, found {', '.join(found)}: "
                f"drop it, {_how_to_recreate(helper.migrations)}."
            )


def _how_to_recreate(migrations: Sequence[str]) -> str:
    """Say how to run these migrations again, which recreates what they create."""
    return (
        f"delete the row {' and the row '.join(migrations)} from {current().dialect.sql('{migrations}')} and run "
        "close-engine migrate, which recreates it"
    )


def _triggers(guard: Guard) -> str:
    return f"triggers on {guard.table} by {guard.migration}"


def _trigger_problems(catalog: Catalog, guard: Guard) -> Iterator[str]:
    if not catalog.columns(guard.table):
        return
    found = catalog.triggers(guard.table)
    for name in guard.triggers:
        trigger = found.get(name)
        if trigger is None:
            yield (
                f"The trigger {name} on {guard.table} is missing, so the table is not guarded: "
                f"{_how_to_recreate([guard.migration])}."
            )
        elif not trigger.enabled:
            yield (
                f"The trigger {name} on {guard.table} is disabled, so the table is not guarded: "
                f"ALTER TABLE {guard.table} ENABLE TRIGGER {name}."
            )
        elif not trigger.protected:
            yield (
                f"The function of the trigger {name} on {guard.table} must be SECURITY DEFINER with "
                "search_path = pg_catalog, pg_temp, so that it works for every role: alter it."
            )
        later = list(found)[list(found).index(name) + 1 :] if trigger and trigger.rewrites else []
        for other in later:
            if found[other].rewrites and found[other].enabled and other not in guard.triggers:
                yield (
                    f"The trigger {other} on {guard.table} fires after {name} and can still change or drop the row: "
                    f"rename it so that it sorts before (ALTER TRIGGER {other} ON {guard.table} RENAME TO …)."
                )


def _transition_problems(catalog: Catalog, machine: str, expected: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    dialect = current().dialect
    schema, name = dialect.own_table("transitions")
    if not catalog.columns(name, schema).keys() >= set(_HELPERS["transitions"].columns):
        return  # the check of the helper tables has reported it
    table = dialect.sql("{transitions}")
    found = set(_rows('SELECT "trigger", source, dest FROM {transitions} WHERE machine = %s', [machine]))
    allowed = {(trigger, str(source), str(dest)) for trigger, source, dest in expected}
    for verb, differing in (("refuses", allowed - found), ("allows", found - allowed)):
        for trigger, source, dest in sorted(differing):
            against = "allows" if verb == "refuses" else "refuses"
            yield (
                f"The database {verb} {trigger} from {source} to {dest}, which the machine {against}: "
                f"correct the rows of {table} to match this version's migrations."
            )


def _unknown_words(model: type[BaseModel]) -> Iterator[str]:
    table, primary_key = _quoted(model), _primary_key(model)
    for field in model._meta.sorted_fields:
        if isinstance(field, EnumField):
            words = [str(word.value) for word in field.words]
            marks = ", ".join(["%s"] * len(words))
            builtin = current().dialect.builtin
            # Plain SQL, because the field refuses to load an unknown value.
            strange = _rows(
                f'SELECT "{field.column_name}", {builtin}count(*), {builtin}min("{primary_key}") FROM {table} '
                f'WHERE "{field.column_name}" NOT IN ({marks}) GROUP BY 1 ORDER BY 1',
                words,
            )
            for word, count, example in strange:
                yield (
                    f"In {_rows_of(model, count, repr(example))}, {field.column_name} has the unknown value {word!r}: "
                    f"change it to one of {', '.join(words)}."
                )


def _reference_problems() -> Iterator[str]:
    for model, name in _BACK_REFERENCES:
        if name not in {key.backref for key in model._meta.backrefs}:
            yield f"The model {model.__name__} has no back-reference {name}: import close_engine, not a part of it."
    for key in CloseEngineConversation._meta.refs:
        column, target = key.column_name, key.rel_model._meta.table_name
        dangling = _rows(
            f"SELECT {current().dialect.builtin}count(*) OVER (), c.id, c.{column} FROM close_engine_conversations c "
            f"LEFT JOIN {_quoted(key.rel_model)} t ON t.id = c.{column} "
            f"WHERE c.{column} IS NOT NULL AND t.id IS NULL ORDER BY c.id LIMIT 1"
        )
        for count, example, missing in dangling:
            yield (
                f"In {_rows_of(CloseEngineConversation, count, repr(example))}, {column} refers to {missing!r}, which "
                f"is not in {target}: delete these conversations, or restore what they refer to."
            )


def _history_problems() -> Iterator[str]:
    history, counted = _name(StageChange), f"{current().dialect.builtin}count(*) OVER ()"
    unrecorded = _rows(
        f"SELECT {counted}, c.id, c.stage FROM close_engine_conversations c "
        "WHERE NOT EXISTS (SELECT 1 FROM {history} h WHERE h.conversation_id = c.id) ORDER BY c.id LIMIT 1"
    )
    for count, example, stage in unrecorded:
        yield (
            f"For {_rows_of(CloseEngineConversation, count, f'{example!r} in {stage}')}, {history} has no row: a "
            "writer bypassed the guard; insert a row with the trigger 'adopted' for each."
        )
    differing = _rows(
        f"SELECT {counted}, id, stage, dest FROM (SELECT c.id, c.stage, "
        "(SELECT h.dest FROM {history} h "
        "WHERE h.conversation_id = c.id ORDER BY h.id DESC LIMIT 1) AS dest FROM close_engine_conversations c) newest "
        "WHERE stage <> dest ORDER BY id LIMIT 1"
    )
    for count, example, stage, dest in differing:
        yield (
            f"In {_rows_of(CloseEngineConversation, count, f'{example!r}: {stage} instead of {dest}')}, the stage "
            f"differs from the newest row of {history}: a writer bypassed the guard; insert the missing row for each."
        )


def _rows(sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = current().execute(sql, values).fetchall()
    return rows


def _rows_of(model: type[BaseModel], count: int, example: str) -> str:
    if count == 1:
        return f"1 row of {_name(model)} ({example})"
    return f"{count} rows of {_name(model)} (for example {example})"


def _name(model: type[BaseModel]) -> str:
    return ".".join(filter(None, (model._meta.schema, model._meta.table_name)))


def _primary_key(model: type[BaseModel]) -> str:
    field: Any = model._meta.primary_key
    return str(field.column_name)


def _quoted(model: type[BaseModel]) -> str:
    names = filter(None, (model._meta.schema, model._meta.table_name))
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)
