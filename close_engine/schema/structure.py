"""Check the structure of the database: tables, columns, indexes, triggers, functions, the table of allowed changes.

The models say what the tables must be. The migrations' SQL files say what the triggers and functions must be.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import peewee

from close_engine import approvals, heartbeats, inbox, numbers, texts  # noqa: F401 - defines more models to check
from close_engine.database.binding import current
from close_engine.database.catalog import Catalog, Column, ForeignKey, Index
from close_engine.machine import ACTION_TRANSITIONS, pairs
from close_engine.models import BaseModel, Client, Lead, User
from close_engine.schema import scripts
from close_engine.schema.problems import (
    AGAIN,
    REPAIR,
    Check,
    Problem,
    current_catalog,
    fetch,
    key_column,
    literal,
    own_columns,
    quoted_table,
    table_name,
)

__all__ = ["CRM_COLUMNS", "structure"]

#: The CRM's own columns that the models read: they must exist, but their types are up to the CRM.
CRM_COLUMNS: dict[type[BaseModel], set[str]] = {Lead: {"id", "phone"}, User: {"id"}, Client: {"id"}}


@dataclass(frozen=True)
class Helper:
    """A table of the library that has no model: its columns, and the columns of an index that it needs."""

    columns: tuple[str, ...]
    index: tuple[str, ...] = ()


#: The library's tables that have no model, by name.
_HELPERS = {
    "carried": Helper(("conversation_id", "key", "at")),
    "created": Helper(("table_name", "column_name", "identity")),
    "deadlines": Helper(("trigger", "subject_id", "at"), ("trigger", "at")),
    "drafts": Helper(("action_id", "after_text")),
    "subscriptions": Helper(("topic", "event", "stage", "payload", "send_after", "debounce", "at_most", "before")),
    "transitions": Helper(("machine", "trigger", "source", "dest", "subscribed")),
}
_SQLITE_HELPERS = {
    "bursts": Helper(("conversation_id", "topic", "key", "payload", "said", "at", "until")),
    "clock": Helper(("at",)),
    "context": Helper(("id", "context")),
    "events": Helper(("event", "stage", "conversation_id", "fact", "facts")),
    "resumes_to": Helper(("conversation_id", "stage")),
}


def structure() -> list[Check]:
    """Check what the migrations make. No row of a table with many rows is read."""
    catalog = current_catalog()
    models = BaseModel.__subclasses__()
    made = [Check(f"table {table_name(model)}", list(_table_problems(catalog, model))) for model in models]
    made.append(Check("helper tables", list(_helper_problems(catalog))))
    tables = list(dict.fromkeys((trigger.schema, trigger.table) for trigger in scripts.triggers()))
    for schema, table in tables:
        made.append(Check(f"triggers on {table}", list(_trigger_problems(catalog, schema, table))))
    if catalog.exact:
        made.append(Check("functions", list(_function_problems(catalog))))
    made.append(Check("allowed stage changes", list(_transition_problems(catalog, "conversation", pairs()))))
    made.append(Check("allowed decisions", list(_transition_problems(catalog, "action", ACTION_TRANSITIONS))))
    return made


def _table_problems(catalog: Catalog, model: type[BaseModel]) -> Iterator[Problem]:
    meta = model._meta
    table = table_name(model)
    found = catalog.columns(meta.table_name, meta.schema)
    if not found and model in CRM_COLUMNS:
        yield Problem(
            f"The table {table} is missing", f"restore it from a backup, or name it with connect(…, {meta.name}s=…)"
        )
        return
    if not found:
        yield Problem(f"The table {table} is missing", f"restore it from a backup, or {AGAIN}, empty", again=True)
        return
    for field in meta.sorted_fields:
        yield from _column_problems(catalog, model, field, found.get(field.column_name))
    if model not in CRM_COLUMNS:
        yield from _index_problems(catalog, model)
        yield from _foreign_key_problems(catalog, model)
    known = {field.column_name for field in meta.sorted_fields}
    for name, column in found.items():
        if model not in CRM_COLUMNS and name not in known and column.required and column.default is None:
            yield Problem(
                f"The column {table}.{name} is NOT NULL without a default, and close_engine does not know it, so no "
                "row can be inserted",
                "make it nullable or give it a default",
            )


def _column_problems(catalog: Catalog, model: type[BaseModel], field: Any, found: Column | None) -> Iterator[Problem]:
    where, expected = f"{table_name(model)}.{field.column_name}", catalog.expected(field)
    if found is None and field.column_name in CRM_COLUMNS.get(model, ()):
        yield Problem(
            f"The column {where} is missing, and close_engine reads it", f"add it to the CRM's table, as {expected}"
        )
    elif found is None and model in CRM_COLUMNS:
        yield Problem(f"The column {where} is missing", "run close-engine migrate, which adds it", again=True)
    elif found is None:
        add = f'ALTER TABLE {quoted_table(model)} ADD COLUMN "{field.column_name}" {expected}'
        yield Problem(f"The column {where} is missing", f"add it ({add})")
    elif field.column_name in CRM_COLUMNS.get(model, ()):
        return
    elif found.required != expected.required:
        null = "not allow NULL" if expected.required else "allow NULL"
        yield Problem(f"The column {where} should {null}", f"found {found}, expected {expected}; alter it")
    elif catalog.exact and found.type != expected.type:
        yield Problem(f"The column {where} has the type {found.type}, expected {expected.type}", "alter it")
    elif catalog.exact and isinstance(field, peewee.AutoField):
        if found.default is None:
            add = f'ALTER TABLE {quoted_table(model)} ALTER "{field.column_name}" ADD GENERATED BY DEFAULT AS IDENTITY'
            yield Problem(f"The column {where} has no sequence", f"add one ({add})")
    elif catalog.exact and found.default != expected.default:
        yield Problem(
            f"The column {where} has the default {found.default or 'none'}, expected {expected.default or 'none'}",
            "alter it",
        )


def _index_problems(catalog: Catalog, model: type[BaseModel]) -> Iterator[Problem]:
    meta = model._meta
    found = catalog.indexes(meta.table_name, meta.schema)
    expected = {}
    if catalog.exact:
        expected[f"{meta.table_name}_pkey"] = Index((key_column(model),), unique=True)
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
                yield Problem(f"The table {table_name(model)} has no {index}", "create one")
        elif name not in found:
            yield Problem(f"The table {table_name(model)} has no {index} named {name}", "create it")
        elif found[name] != index:
            yield Problem(
                f"The index {name} on {table_name(model)} is wrong",
                f"found {found[name]}, expected {index}; drop it and create it again",
            )
    if not hasattr(meta, "own_table"):
        for name, index in found.items():
            if index.partial and "close_engine" in name:
                yield Problem(
                    f"The index {name} on {table_name(model)} is partial, and some versions of Prisma drop it",
                    "drop it; close_engine needs none there",
                )


def _foreign_key_problems(catalog: Catalog, model: type[BaseModel]) -> Iterator[Problem]:
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
            yield Problem(
                f"The table {table_name(model)} needs the foreign key {expected}, found {there}",
                "add it, in place of any other on that column",
            )


def _helper_problems(catalog: Catalog) -> Iterator[Problem]:
    helpers = _HELPERS if catalog.exact else _HELPERS | _SQLITE_HELPERS
    views = set() if catalog.exact else {view.name for view in current().database.get_views()}
    for table, helper in helpers.items():
        schema, name = current().dialect.own_table(table)
        found, shown = catalog.columns(name, schema), ".".join(filter(None, (schema, name)))
        if not found and name in views:
            continue  # its tables are gone, and the checks of those say so
        elif not found:
            yield Problem(f"The table {shown} is missing", AGAIN, again=True)
        elif not found.keys() >= set(helper.columns):
            yield Problem(
                f"The table {shown} should have the columns {', '.join(helper.columns)}, found {', '.join(found)}",
                f"drop it, and {AGAIN}",
            )
        elif helper.index and Index(helper.index) not in catalog.indexes(name, schema).values():
            yield Problem(f"The table {shown} has no {Index(helper.index)}", "create one")


def _trigger_problems(catalog: Catalog, schema: str | None, table: str) -> Iterator[Problem]:
    if not catalog.columns(table, schema):
        return
    found, here = catalog.triggers(table, schema), catalog.schema()
    ours = [each for each in scripts.triggers() if each.table == table]
    so = "so the table is not guarded" if schema is None else "so nothing follows from what is written there"
    for expected in ours:
        trigger, named = found.get(expected.name), f"The trigger {expected.name} on {table}"
        statement = catalog.printed_trigger(scripts.as_run(expected.statement, here))
        if trigger is None:
            yield Problem(f"{named} is missing, {so}", AGAIN, again=True)
        elif not trigger.enabled:
            yield Problem(
                f"{named} is disabled, {so}",
                "run close-engine migrate, which enables it",
                again=True,
            )
        elif trigger.statement != statement:
            yield Problem(f"{named} is not the one that this version makes", AGAIN, again=True)
    guards = [name for name in found if found[name].rewrites and name in {each.name for each in ours}]
    later = list(found)[list(found).index(guards[-1]) + 1 :] if guards else []
    for other in later:
        if found[other].rewrites and found[other].enabled:
            yield Problem(
                f"The trigger {other} on {table} fires after {guards[-1]}, so it can still change or drop the row, "
                "and store a stage that no guard has seen",
                f"rename it so that it sorts before (ALTER TRIGGER {other} ON {table} RENAME TO …)",
            )


def _function_problems(catalog: Catalog) -> Iterator[Problem]:
    found, here = catalog.functions(), catalog.schema()
    for expected in scripts.functions():
        function, name = found.get(expected.name), f"close_engine.{expected.name}()"
        if function is None:
            yield Problem(f"The function {name} is missing", AGAIN, again=True)
            continue
        if function.body != scripts.as_run(expected.body, here):
            there = _schema_in(function.body, scripts.as_run(expected.body, "public"))
            yield Problem(
                f"The function {name} speaks of the schema {there}, and the CRM's tables are in {here}"
                if there
                else f"The function {name} is not the one that this version makes",
                AGAIN,
                again=True,
            )
        elif expected.protected and not function.protected:
            yield Problem(
                f"The function {name} is not SECURITY DEFINER with search_path = pg_catalog, pg_temp, so it does not "
                "work for every role",
                AGAIN,
                again=True,
            )
        for role in function.executors if expected.revoked else ():
            everybody = role == "PUBLIC"
            yield Problem(
                f"{'Everybody' if everybody else f'The role {role}'} may execute {name}, which only triggers need",
                f"{AGAIN} and revokes that" if everybody else f"REVOKE EXECUTE ON FUNCTION {name} FROM {role}",
                again=everybody,
            )


def _schema_in(found: str, expected: str) -> str | None:
    """Return the schema that a function speaks of, if it differs from what the migrations make in nothing else."""
    first, *others = expected.split("public.")
    if not others:
        return None
    between = [re.escape(each) for each in others]
    pattern = (
        re.escape(first) + r"(?P<schema>.+?)\." + between[0] + "".join(rf"(?P=schema)\.{each}" for each in between[1:])
    )
    match = re.fullmatch(pattern, found, re.DOTALL)
    return match["schema"] if match else None


def _transition_problems(catalog: Catalog, machine: str, expected: Iterable[tuple[str, str, str]]) -> Iterator[Problem]:
    if not own_columns("transitions").keys() >= set(_HELPERS["transitions"].columns):
        return  # the check of the helper tables has reported it
    found = set(fetch('SELECT "trigger", source, dest FROM {transitions} WHERE machine = %s', [machine]))
    allowed = {(trigger, str(source), str(dest)) for trigger, source, dest in expected}
    for trigger, source, dest in sorted(allowed - found):
        yield Problem(
            f"The database refuses {trigger} from {source} to {dest}, which the machine allows", AGAIN, again=True
        )
    for trigger, source, dest in sorted(found - allowed):
        yield Problem(
            f"The database allows {trigger} from {source} to {dest}, which the machine refuses",
            f"{REPAIR}, which forbids it",
            mend=current().sql('DELETE FROM {transitions} WHERE (machine, "trigger", source, dest) = ')
            + f"({', '.join(map(literal, (machine, trigger, source, dest)))})",
        )
