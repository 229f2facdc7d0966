"""Queries over tables in which some rows may be unreadable: they stood there before the guards, which let in no more.

A query raises `UnreadableRow` for such a row. A `readable()` query passes over it, and says so:

    waiting = CloseEngineConversation.select().readable()
    for conversation in waiting: ...
    waiting.passed_over                                 # a list of UnreadableRow

As long as every row can be read, this costs no statement. Otherwise, the query is repeated on ever smaller parts of the
table, until it is known which rows cannot be read. That needs nothing of the driver: psycopg 2, psycopg 3 and SQLite
fail at different moments, and only some of them can go on after the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import peewee
from playhouse.pool import MaxConnectionsExceeded

from close_engine.errors import UnreadableRow, one_line
from close_engine.printable import get_logger

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Rows", "is_unreadable"]

logger = get_logger(__name__)

M = TypeVar("M", bound=peewee.Model)

if TYPE_CHECKING:

    class SelectOf(peewee.ModelSelect[M]):
        """What Peewee's stubs leave out."""

        _cursor_wrapper: Any
        _database: Any
        _load_tree: Any
        _group_by: Any
        _distinct: Any
        _simple_distinct: Any
        _limit: Any
        _constructor: Any

        def select(self, *fields_or_models: Any) -> Self: ...
else:

    class SelectOf(peewee.ModelSelect):
        """As `FieldOf` for fields: Peewee's stubs make ModelSelect generic, Peewee itself does not."""

        def __class_getitem__(cls, item):
            return cls


#: What drivers and fields raise for a value that Python cannot hold.
_UNREADABLE = (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError)

#: How many rows are looked at in one statement when an unreadable one is searched for.
_PART = 500


def is_unreadable(error: Exception) -> bool:
    """Return whether an error that came up while rows were read may be about a value in one of them."""
    # What a driver itself raises while rows are fetched. Peewee wraps only what it raises while a statement runs.
    is_drivers = type(error).__name__ in ("DataError", "OperationalError") and not isinstance(
        error, peewee.PeeweeException
    )
    return is_drivers or (isinstance(error, _UNREADABLE) and not isinstance(error, MaxConnectionsExceeded))


class Rows(SelectOf[M]):
    """Peewee's SELECT query, except that it names the row that cannot be read, or passes over it.

    Attributes:
        passed_over: sequence of UnreadableRow: what a `readable()` query passed over when it ran.
    """

    passed_over: Sequence[UnreadableRow] = ()
    _is_readable = False

    def readable(self) -> Self:
        """Return this query without the rows that cannot be read. With `limit()`, others take their places.

        `iterator()` keeps no row, so it cannot begin again: it still raises UnreadableRow.
        """
        query = self.clone()
        query._is_readable = True
        return query

    def iterator(self, database: Any = None) -> Iterator[Any]:
        if self._load_tree:
            return super().iterator(database)  # Peewee refuses
        return self._stream(database or self._database)

    def _stream(self, database: Any) -> Iterator[Any]:
        rows = super()._execute(database)  # type: ignore[misc]
        try:
            yield from rows.iterator()
        except Exception as error:
            rows.cursor.close()
            raise next(self._unreadable(database, error))[1] from error

    def _execute(self, database: Any) -> Any:
        if self._cursor_wrapper is None:
            self._cursor_wrapper = self._read(database)
        return self._cursor_wrapper

    def _read(self, database: Any) -> Any:
        query, key = self, _key(self.model)
        bad: dict[Any, UnreadableRow] = {}
        while True:
            try:
                rows = _run(query, database)
                break
            except Exception as error:
                self._cursor_wrapper = None
                found = query._unreadable(database, error)
                if not self._is_readable:
                    raise next(found)[1] from error
                bad.update(found)
                query = self.where(key.not_in(list(bad)))
        self.passed_over = list(bad.values())
        for row in self.passed_over:
            logger.warning("passed over a row: %s", row)
        return rows

    def _unreadable(self, database: Any, error: Exception) -> Iterator[tuple[Any, UnreadableRow]]:
        """Yield the rows that cannot be read, each with its key in this query's table; without any, raise the error."""
        if not is_unreadable(error):
            raise error
        found = False
        if self._group_by or self._distinct or self._simple_distinct:
            rows = _without(self, "group_by", "having", "distinct", "simple_distinct")
        else:
            rows = self if self._limit else _without(self)
        try:
            with database.atomic():
                every = [row[0] for row in _run(rows.select(_key(self.model)).tuples(), database)]
        except peewee.DatabaseError:
            raise error from None  # of such a query, no row has a key
        part = _without(self)
        if self._constructor is not None:
            part = part.tuples()  # what the user's own constructor raises is no matter of the row
        for start in range(0, len(every), _PART):
            for bad in _search(part, every[start : start + _PART], database):
                found = True
                yield bad
        if not found:
            raise error


def _key(model: Any) -> Any:
    return model._meta.primary_key


def _without(query: Any, *clauses: str) -> Any:
    """Return a query without its order and its limits, and without these clauses."""
    query = query.clone()
    for clause in ("order_by", "limit", "offset", *clauses):
        setattr(query, f"_{clause}", None)
    return query


def _run(query: Any, database: Any) -> Any:
    """Run a query as Peewee does, and read all of its rows."""
    rows = super(Rows, query)._execute(database)
    try:
        rows.fill_cache()
    except Exception:
        # SQLite reads on in the past as long as a cursor is not at its end, and the error keeps this one.
        rows.cursor.close()
        raise
    return rows


def _failure(query: Any, database: Any) -> Exception | None:
    """Return why a query cannot be read, if it cannot."""
    try:
        _run(query, database)
    except Exception as error:
        if not is_unreadable(error):
            raise
        return error
    return None


def _search(query: Any, ids: list[Any], database: Any) -> Iterator[tuple[Any, UnreadableRow]]:
    """Yield the rows of a query with these ids that cannot be read, each with its id."""
    part = query.where(_key(query.model).in_(ids))
    error = _failure(part, database)
    if error is None:
        return
    if len(ids) == 1:
        yield ids[0], _named(part, ids[0], error, database)
    else:
        yield from _search(query, ids[: len(ids) // 2], database)
        yield from _search(query, ids[len(ids) // 2 :], database)


def _named(query: Any, row_id: Any, error: Exception, database: Any) -> UnreadableRow:
    """Find the column that cannot be read, in a query for one row."""
    model, column, single = query.model, None, _without(query, "group_by", "having")
    for field in query._returning:
        if not isinstance(field, peewee.Field) or isinstance(field, peewee.FieldAlias):
            continue
        failure = _failure(single.select(field).tuples(), database)
        if failure is not None:
            error, column = failure, str(field.column_name)
            if field.model is not model:  # it is in a joined table
                model = field.model
                row_id = _run(single.select(_key(model)).tuples(), database)[0][0]
            break
    table = ".".join(filter(None, (model._meta.schema, model._meta.table_name)))
    why = "it is nested too deep" if isinstance(error, RecursionError) else one_line(error)
    return UnreadableRow(table, row_id, column, why)
