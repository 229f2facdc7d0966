"""Read a database's catalog: columns, indexes, foreign keys and triggers, in one form for every kind of database.

Each dialect has a catalog, which `verify` compares with the models:

>>> from close_engine.database.sqlite import SQLITE
>>> database = peewee.SqliteDatabase(":memory:")
>>> _ = database.execute_sql("CREATE TABLE notes (id TEXT NOT NULL PRIMARY KEY, body TEXT DEFAULT 'none')")
>>> SQLITE.catalog(database).columns("notes")["body"]
Column(type='TEXT', required=False, default="'none'")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peewee

__all__ = ["Catalog", "Column", "ForeignKey", "Function", "Index", "Trigger"]


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        type, default: as the database prints them.
        required: bool, whether the column is NOT NULL.
    """

    type: str
    required: bool
    default: str | None = None

    def __str__(self) -> str:
        return f"{self.type}{' NOT NULL' * self.required}{f' DEFAULT {self.default}' if self.default else ''}"


@dataclass(frozen=True)
class Index:
    """An index. Prisma does not see partial indexes, which cover only some rows."""

    columns: tuple[str, ...]
    unique: bool = False
    partial: bool = False

    def __str__(self) -> str:
        return f"{'partial ' * self.partial}{'unique ' * self.unique}index on ({', '.join(self.columns)})"


@dataclass(frozen=True)
class ForeignKey:
    """A foreign key of one column; on SQLite, which does not show names, `name` is None."""

    name: str | None
    column: str
    table: str
    on_delete: str | None
    on_update: str | None

    def __str__(self) -> str:
        return (
            f"{f'{self.name} ' if self.name else ''}({self.column}) REFERENCES {self.table} "
            f"ON DELETE {self.on_delete} ON UPDATE {self.on_update}"
        )


@dataclass(frozen=True)
class Trigger:
    """A trigger.

    Attributes:
        statement: str, what creates it, in the form that `Catalog.printed_trigger` returns.
        enabled: bool, whether it fires for an ordinary writer.
        rewrites: bool, whether it can change a row before it is written, after another trigger checked it.
    """

    statement: str
    enabled: bool = True
    rewrites: bool = False


@dataclass(frozen=True)
class Function:
    """A function of the library.

    Attributes:
        body: str, its text as stored.
        protected: bool, whether it works regardless of the writer's rights and settings.
        owner: str, the role it belongs to.
        executors: tuple of str, the other roles that may execute it; `PUBLIC` is everybody.
    """

    body: str
    protected: bool
    owner: str
    executors: tuple[str, ...]


class Catalog:
    """Reads a catalog, with Peewee's introspection unless a subclass needs more.

    Attributes:
        exact: bool, whether types, defaults and names of foreign keys must match too, not only names and nullability.
    """

    exact: bool

    def __init__(self, database: peewee.Database) -> None:
        self.database = database

    def columns(self, table: str, schema: str | None = None) -> dict[str, Column]:
        """Return the columns of a table by name; an empty dict if there is no such table."""
        return {
            column.name: Column(str(column.full_type), column.primary_key or not column.null, column.default)
            for column in self.database.get_columns(table, schema)
        }

    def indexes(self, table: str, schema: str | None = None) -> dict[str, Index]:
        """Return the indexes of a table by name."""
        return {
            index.name: Index(tuple(index.columns), index.unique, " WHERE " in (index.sql or "").upper())
            for index in self.database.get_indexes(table, schema)
        }

    def foreign_keys(self, table: str) -> list[ForeignKey]:
        """Return the foreign keys of a table that Prisma sees."""
        raise NotImplementedError

    def triggers(self, table: str, schema: str | None = None) -> dict[str, Trigger]:
        """Return the triggers of a table by name, in the order in which they fire."""
        raise NotImplementedError

    def printed_trigger(self, statement: str) -> str:
        """Convert a CREATE TRIGGER statement to a form in which what was written equals what the database prints."""
        return statement

    # The rest is about schemas, functions, roles and sequences, which only PostgreSQL has.

    def schema(self) -> str:
        """Return the quoted name of the schema in which the CRM's tables are."""
        return ""

    def guarded_schemas(self) -> list[str]:
        """Return the schemas that have tables with the library's triggers."""
        return []

    def functions(self) -> dict[str, Function]:
        """Return the functions of the library by name."""
        return {}

    def owners(self) -> list[tuple[str, str, str]]:
        """Return each table and function of the library as (TABLE or FUNCTION, name, owner)."""
        return []

    def missing_rights(self) -> list[tuple[str, str, str]]:
        """Return what the library's functions may not do and must: their owner, a right, and the table or schema."""
        return []

    def forgers(self) -> list[tuple[str, str, str]]:
        """Return who may write what only the triggers write: the role, a right, and the table."""
        return []

    def hidden_rows(self) -> list[tuple[str, str]]:
        """Return the tables of which row-level security hides rows from the library's functions, and their owner."""
        return []

    def sequence(self, table: str, column: str) -> tuple[str | None, int | None]:
        """Return the sequence of a column in one of the library's tables, and its last value.

        Without a sequence, both are None; without the right to read it, the value is.
        """
        return None, None

    def expected(self, field: Any) -> Column:
        """Return the column that a model's field needs, in the form in which this database prints it."""
        defaults = [constraint.sql for constraint in field.constraints or () if constraint.sql.startswith("DEFAULT ")]
        default = defaults[0].removeprefix("DEFAULT ") if defaults else None
        return self.printed(field.ddl_datatype(self.database.get_sql_context()).sql, not field.null, default)

    def printed(self, ddl_type: str, required: bool, default: str | None) -> Column:
        """Convert a column's DDL to the form in which this database prints it."""
        return Column(ddl_type, required, default)
