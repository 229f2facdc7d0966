"""A problem that a check found, and what the checks share to find it and to say it.

>>> print(Problem("The table notes is missing", "create it"))
The table notes is missing: create it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from close_engine.database.binding import current
from close_engine.database.catalog import Catalog, Column
from close_engine.database.dialect import identifier
from close_engine.models import BaseModel

__all__ = [
    "AGAIN",
    "REPAIR",
    "Check",
    "Problem",
    "current_catalog",
    "fetch",
    "key_column",
    "literal",
    "own_columns",
    "quoted_table",
    "rows_of",
    "table_name",
]

AGAIN = "run close-engine migrate, which makes it again"
REPAIR = "run close-engine verify --repair"


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with the database. Its text is one sentence.

    Attributes:
        what: str, what is wrong.
        remedy: str, what to do about it.
        again: bool, whether running the migrations again mends it. `migrate` does so by itself.
        mend: str, the SQL that mends it, or else empty. `verify --repair` runs it.
    """

    what: str
    remedy: str
    again: bool = False
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}."


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        subject: what was checked.
        problems: list of Problem, empty if nothing is wrong.
    """

    subject: str
    problems: list[Problem]


def current_catalog() -> Catalog:
    """Return the catalog of the bound database."""
    return current().dialect.catalog(current().database)


def own_columns(table: str) -> dict[str, Column]:
    """Return the columns of one of the library's tables; an empty dict if there is no such table."""
    schema, full_name = current().dialect.own_table(table)
    return current_catalog().columns(full_name, schema)


def fetch(sql: str, values: Sequence[Any] = (), model: type[BaseModel] | None = None) -> list[tuple[Any, ...]]:
    """Run a query in which {history} is a table of the library, and <table> the one of the model."""
    binding = current()
    text = binding.sql(sql)
    if model is not None:
        # After the translation: the name of a CRM's table may hold anything, also braces.
        text = text.replace("<table>", binding.dialect.escaped(quoted_table(model)))
    found: list[tuple[Any, ...]] = binding.database.execute_sql(text, values).fetchall()
    return found


def rows_of(model: type[BaseModel], count: int, example: str) -> str:
    """Say how many rows of a table are meant, and name one."""
    if count == 1:
        return f"1 row of {table_name(model)} ({example})"
    return f"{count} rows of {table_name(model)} (for example {example})"


def table_name(model: type[BaseModel]) -> str:
    """Return the name of a model's table with its schema, for sentences."""
    return ".".join(filter(None, (model._meta.schema, model._meta.table_name)))


def key_column(model: type[BaseModel]) -> str:
    """Return the column of a model's primary key."""
    field: Any = model._meta.primary_key
    return str(field.column_name)


def quoted_table(model: type[BaseModel]) -> str:
    """Return the name of a model's table with its schema, for SQL."""
    return ".".join(map(identifier, filter(None, (model._meta.schema, model._meta.table_name))))


def literal(text: str) -> str:
    """Quote a text for SQL that `verify --repair` runs, or that a person may run."""
    return "'" + text.replace("'", "''") + "'"
