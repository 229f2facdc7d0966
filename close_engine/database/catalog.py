"""What a database says of itself: columns, indexes, foreign keys and triggers, in the same words for each.

A database's dialect makes its catalog, and `verify` compares it with the models:

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

__all__ = ["Catalog", "Column", "ForeignKey", "Index", "Trigger"]


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        type, default: as the database prints them.
        required: whether NULL is refused.
    """

    type: str
    required: bool
    default: str | None = None

    def __str__(self) -> str:
        return f"{self.type}{' NOT NULL' * self.required}{f' DEFAULT {self.default}' if self.default else ''}"


@dataclass(frozen=True)
class Index:
    """An index; a partial one covers only some rows, and Prisma does not see it."""

    columns: tuple[str, ...]
    unique: bool = False
    partial: bool = False

    def __str__(self) -> str:
        return f"{'partial ' * self.partial}{'unique ' * self.unique}index on ({', '.join(self.columns)})"


@dataclass(frozen=True)
class ForeignKey:
    """A foreign key of one column. SQLite tells no name: it is None there."""

    name: str | None
    column: str
    table: str
    on_delete: str | None
    on_update: str | None

    def __str__(self) -> str:
        return (
            f"{self.name or 'one'} from {self.column} to {self.table} "
            f"(ON DELETE {self.on_delete} ON UPDATE {self.on_update})"
        )


@dataclass(frozen=True)
class Trigger:
    """A trigger.

    Attributes:
        enabled: whether it fires for an ordinary writer.
        rewrites: whether it may change the row that is to be written, and so what another one checked before.
        protected: whether it works whatever rights and settings the writer has.
    """

    enabled: bool = True
    rewrites: bool = False
    protected: bool = True


class Catalog:
    """How a catalog is read; by Peewee's introspection where that tells enough.

    Attributes:
        exact: whether types, defaults and names of foreign keys are to agree, or names and nullability alone.
    """

    exact: bool

    def __init__(self, database: peewee.Database) -> None:
        self.database = database

    def columns(self, table: str, schema: str | None = None) -> dict[str, Column]:
        """The columns of a table by name; none where there is no such table."""
        return {
            column.name: Column(str(column.full_type), column.primary_key or not column.null, column.default)
            for column in self.database.get_columns(table, schema)
        }

    def indexes(self, table: str, schema: str | None = None) -> dict[str, Index]:
        """The indexes of a table by name."""
        return {
            index.name: Index(tuple(index.columns), index.unique, " WHERE " in (index.sql or "").upper())
            for index in self.database.get_indexes(table, schema)
        }

    def foreign_keys(self, table: str) -> list[ForeignKey]:
        """The foreign keys of a table that Prisma sees."""
        raise NotImplementedError

    def triggers(self, table: str) -> dict[str, Trigger]:
        """The triggers of a table that Prisma sees, by name, in the order in which they fire."""
        raise NotImplementedError

    def expected(self, field: Any) -> Column:
        """The column that a model's field is to be stored in, as this database would print it."""
        defaults = [constraint.sql for constraint in field.constraints or () if constraint.sql.startswith("DEFAULT ")]
        default = defaults[0].removeprefix("DEFAULT ") if defaults else None
        return self.printed(field.ddl_datatype(self.database.get_sql_context()).sql, not field.null, default)

    def printed(self, ddl_type: str, required: bool, default: str | None) -> Column:
        """A column as this database prints it, from what DDL says."""
        return Column(ddl_type, required, default)
