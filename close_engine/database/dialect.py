"""What differs between databases, stated once: a subclass for each, in a file of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import peewee

from close_engine.database.catalog import Catalog
from close_engine.database.provenance import Provenance, Write

__all__ = ["Dialect"]


class Dialect:
    """What differs between databases, stated once: one subclass a database."""

    #: What the SQL files of the migrations are called after.
    name: str

    #: What stands before the name of one of the database's own functions.
    builtin = ""

    #: What Peewee's `atomic()` is given where a transaction begins.
    begin: tuple[str, ...] = ()

    #: What reads the database's own description of itself.
    catalog: type[Catalog]

    def own_table(self, name: str) -> tuple[str | None, str]:
        """Schema and name of one of our tables that Prisma must not see."""
        raise NotImplementedError

    def sql(self, text: str) -> str:
        """The statement in this database's words: `%s` for a value, `{history}` for our tables."""
        raise NotImplementedError

    def function(self, name: str, *arguments: Any) -> peewee.Function:
        """A call of one of the database's own functions, for a query of Peewee's."""
        # Peewee knows by the plain name which results are not values of the column.
        coerce = name not in peewee.Function.no_coerce_functions
        return peewee.Function(self.builtin + name, arguments, coerce=coerce)

    def guarded_update(self, table: str, assignments: str, conditions: str, returning: str) -> str:
        """Text of the one statement that changes a stage; `execute_guarded` runs it."""
        raise NotImplementedError

    def execute_guarded(
        self,
        database: peewee.Database,
        statement: str,
        parameters: Sequence[Any],
        provenance: Provenance,
        write: Write,
    ) -> tuple[Any, ...] | None:
        """Run a guarded update, and have its history row carry the provenance.

        Returns:
            the returned columns and, behind them, the id of the history row; None if no row matched.
        """
        raise NotImplementedError

    @contextmanager
    def attributed(self, database: peewee.Database, provenance: Provenance, write: Write) -> Iterator[None]:
        """Inside a transaction: have the history carry this provenance for the write made within the block."""
        raise NotImplementedError
        yield

    def for_update(self, database: peewee.Database, query: peewee.ModelSelect[Any]) -> peewee.ModelSelect[Any]:
        """Inside a transaction: make the query lock the rows it finds against every other writer."""
        raise NotImplementedError

    #: The end of a query within a statement that locks the rows it finds against every other writer.
    row_lock: str

    def skip_locked(self, *aliases: str) -> str:
        """The end of a query that takes the rows of these tables, but for those that another one holds."""
        raise NotImplementedError

    def ids_of(self, query: str) -> str:
        """What a column of ids is compared with, so that few rows are found by it and not a table searched for them."""
        raise NotImplementedError

    def sample(self, table: str, every: int) -> str:
        """A query for one of so many rows of a table of ours, the same ones each time and without an order."""
        raise NotImplementedError

    def merged_list(self, column: str) -> str:
        """What a JSON column becomes when a list is merged into it: each element once, in the order of its first."""
        raise NotImplementedError

    def merged_mapping(self, column: str) -> str:
        """What a JSON column becomes when a mapping is merged into it, key by key."""
        raise NotImplementedError

    def prepare(self, database: peewee.Database) -> None:
        """Once for a database: what its connections need."""

    def failed(self, database: peewee.Database) -> bool:
        """Inside a transaction: whether it would be rolled back even if it were told to commit."""
        return False

    @contextmanager
    def limit_wait(self, database: peewee.Database, timeout: timedelta) -> Iterator[None]:
        """Around a transaction that migrates: limit how long its beginning waits, if that is where it waits.

        Raises:
            SchemaError: another process wrote for all of that time.
        """
        yield

    def lock_migrations(self, database: peewee.Database, timeout: timedelta) -> None:
        """Inside a transaction: wait until no other process migrates this database.

        Raises:
            SchemaError: another process held the lock for all of that time.
        """
        raise NotImplementedError

    def create_schema(self, database: peewee.Database) -> None:
        """Make room for our tables."""

    def drop_schema(self, database: peewee.Database) -> None:
        """Take away the room, if `create_schema` made it."""
