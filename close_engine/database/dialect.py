"""What differs between databases. Each database has a subclass in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import peewee

from close_engine.database.catalog import Catalog
from close_engine.database.provenance import Provenance, Write
from close_engine.errors import GuardMissing

__all__ = ["Dialect", "identifier"]


def identifier(name: str) -> str:
    """Quote a name for SQL."""
    return '"' + name.replace('"', '""') + '"'


Found = TypeVar("Found")


class Dialect:
    """What differs between databases: one subclass for each."""

    #: The name of this database in the migrations' SQL files: `0003_guard.postgresql.sql`.
    name: str

    #: Prefix of the database's own functions: `pg_catalog.`, or nothing.
    builtin = ""

    #: Arguments of Peewee's `atomic()` when it begins a transaction.
    begin: tuple[str, ...] = ()

    #: Reads the database's catalog.
    catalog: type[Catalog]

    #: Whether statements that are long to plan are functions of the database, which keeps their plans.
    keeps_plans = False

    #: The tables that the migrations guard, and how many triggers each of them has.
    guards: tuple[tuple[str, int], ...]

    #: The current moment by the database's clock, in SQL: what is due, over or leased is judged by it alone.
    moment: str

    #: The moment that is some seconds later, a %s in the text.
    later: str

    #: The stage that a stalled conversation resumes to, in an UPDATE of it: where things stand.
    resumes_to: str

    def unreadable_time(self, column: str) -> str:
        """Return the SQL that says of a column, given by its quoted name, whether Python cannot read the time in it."""
        raise NotImplementedError

    def has_more_than_ascii(self, text: str) -> str:
        """Return the SQL that says of a text whether it has characters that are not in ASCII."""
        raise NotImplementedError

    def suspect_json(self, text: str) -> str:
        """Return the SQL that says of JSON, given as text, whether it may be too deep or have too long a number."""
        raise NotImplementedError

    def set_clock(self, database: peewee.Database, at: str | None) -> None:
        """For tests: stop the database's clock at a moment, or let it go on."""
        raise NotImplementedError

    def own_table(self, name: str) -> tuple[str | None, str]:
        """Return schema and name of one of the library's tables, which Prisma must not see."""
        raise NotImplementedError

    def folded(self, name: str) -> str:
        """Return a table's name as this database compares it with others: on SQLite without regard to case."""
        return name

    def why_no_table(self, name: str) -> str | None:
        """Say why no table of the CRM can have this name here, if that is so."""
        raise NotImplementedError

    def sql(self, text: str) -> str:
        """Translate a statement for this database.

        `%s` is a value, `{history}` a table of the library, `{moment}`, `{later}` and `{resumes_to}` are those of
        this class.
        """
        raise NotImplementedError

    def escaped(self, text: str) -> str:
        """Escape text that goes into a statement as it is, such as a quoted name, from the driver's placeholders."""
        return text

    def function(self, name: str, *arguments: Any) -> peewee.Function:
        """Call one of the database's own functions in a Peewee query."""
        # Peewee decides by the plain name whether to convert the result like a value of the column.
        coerce = name not in peewee.Function.no_coerce_functions
        return peewee.Function(self.builtin + name, arguments, coerce=coerce)

    def run(self, database: peewee.Database, statement: Callable[[], Found]) -> Found:
        """Run one statement, whatever the default isolation level is.

        Raises:
            StageConflict: a transaction of the caller's is open, and cannot see what another one has written.
            GuardMissing: a table or a function of the library is gone.
        """
        raise NotImplementedError

    def guarded_update(self, table: str, assignments: str, conditions: str, returning: str) -> str:
        """Return the text of the one statement that changes a stage; `execute_guarded` runs it."""
        raise NotImplementedError

    def execute_guarded(
        self,
        database: peewee.Database,
        statement: str,
        parameters: Sequence[Any],
        provenance: Provenance,
        write: Write,
    ) -> tuple[Any, ...] | None:
        """Run a guarded update, and give its history row this provenance.

        Returns:
            tuple of the returned columns, followed by the id and the moment of the history row as JSON; None if no row
            matched.

        Raises:
            GuardMissing: the change was not recorded, so it was not made.
            StageConflict: as for `run`.
        """
        raise NotImplementedError

    @contextmanager
    def attributed(self, database: peewee.Database, provenance: Provenance, write: Write) -> Iterator[None]:
        """Inside a transaction, give the history this provenance for the write that the block makes.

        Raises:
            GuardMissing: the triggers that record it are not there, or do not fire.
        """
        raise NotImplementedError
        yield

    def sweeps_at_once(self, database: peewee.Database) -> bool:
        """Return whether the function `{sweep}` is there, and may move and record many conversations together."""
        return False

    def require_guards(self, found: Sequence[int]) -> None:
        """Refuse to write if fewer triggers would fire than the migrations made; `found` is in the order of `guards`.

        Raises:
            GuardMissing: triggers are missing.
        """
        for (table, made), firing in zip(self.guards, found, strict=True):
            if firing < made:
                raise GuardMissing(table)

    def for_update(self, database: peewee.Database, query: peewee.ModelSelect[Any]) -> peewee.ModelSelect[Any]:
        """Inside a transaction, make a query lock the rows that it finds against every other writer."""
        raise NotImplementedError

    def hold(self, database: peewee.Database, what: str, name: str) -> None:
        """Inside a transaction, wait until no other one holds this name, and hold it until the end."""
        raise NotImplementedError

    #: The statement that says that an event without a stage happened: event, conversation, fact and facts.
    publish: str

    #: The clause at the end of a query that locks the rows it finds: `FOR NO KEY UPDATE`, or nothing.
    row_lock: str

    def skip_locked(self, *aliases: str) -> str:
        """Return the clause that locks the rows of these tables and skips locked ones.

        On PostgreSQL: `FOR NO KEY UPDATE OF c, s SKIP LOCKED`. On SQLite, which has one writer at a time: nothing.
        """
        raise NotImplementedError

    def in_subquery(self, query: str) -> str:
        """Compare an id column with a subquery in a form the planner resolves through the primary key.

        On PostgreSQL: `= ANY (ARRAY(SELECT …))`. With `IN (SELECT …)`, the planner might scan the whole table
        for a few ids. On SQLite: `IN (SELECT …)`.
        """
        raise NotImplementedError

    def sample(self, table: str, every: int) -> str:
        """Return a query for about one in `every` rows of one of the library's tables, the same rows each time."""
        raise NotImplementedError

    def merged_list(self, column: str) -> str:
        """Return an expression that merges a list into a JSON column: each element once, in its first position."""
        raise NotImplementedError

    def merged_mapping(self, column: str) -> str:
        """Return an expression that merges a mapping into a JSON column, key by key."""
        raise NotImplementedError

    def json_text(self, column: str, key: str) -> str:
        """Return an expression for the text under a key of a JSON column; NULL if there is none."""
        raise NotImplementedError

    def prepare(self, database: peewee.Database) -> None:
        """Set up what every connection of this database needs. Called once."""

    def has_failed(self, database: peewee.Database) -> bool:
        """Inside a transaction, return whether it has failed, so that even a COMMIT would roll it back."""
        return False

    @contextmanager
    def limit_wait(self, database: peewee.Database, timeout: timedelta) -> Iterator[None]:
        """Limit how long the BEGIN of a migrating transaction waits, if this database waits there.

        Raises:
            SchemaError: another process was writing for all of that time.
        """
        yield

    def lock_migrations(self, database: peewee.Database, timeout: timedelta) -> None:
        """Inside a transaction, wait until no other process migrates this database.

        Raises:
            SchemaError: another process held the lock for all of that time.
        """
        raise NotImplementedError

    #: The statement that creates the schema of the library's tables if there is none, or nothing.
    schema_sql = ""

    def drop_schema(self, database: peewee.Database) -> None:
        """Drop that schema if `schema_sql` created it."""
