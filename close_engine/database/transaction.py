"""Transactions that Python objects follow: what the database rolls back is also rolled back in memory.

>>> from close_engine.database.url import connect
>>> database = connect("sqlite:///:memory:")
>>> ran = []
>>> with atomic():
...     run_after_commit(lambda: ran.append("committed"))
...     ran
[]
>>> ran
['committed']

`close_engine.atomic()` nests with Peewee's own, either way round. Peewee's `database.atomic()` alone works too, but it
does not restore the objects in memory when it rolls back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ContextDecorator
from types import TracebackType
from typing import Any

from close_engine.database.binding import current
from close_engine.database.tasks import require_own_transaction, running
from close_engine.errors import AfterCommitError, TransactionFailed

__all__ = ["accept", "accept_row", "atomic", "remember", "run_after_commit"]


class _Scopes(threading.local):
    """The open `atomic` blocks of this thread: Peewee's connections are per thread, too."""

    def __init__(self) -> None:
        self.open: list[atomic] = []


_scopes = _Scopes()


class atomic(ContextDecorator):  # noqa: N801 - named as Peewee names it
    """A transaction, or a savepoint inside one: all of it is written, or none of it, and objects in memory follow.

    Use it as a context manager or a decorator. `with atomic() as transaction:` offers `transaction.rollback()`.

    Raises:
        AfterCommitError: functions that ran after the commit failed; the change is committed.
        TransactionFailed: a statement failed in the block and its error was caught there; nothing is written.
        TransactionOfAnotherTask: another asyncio task or greenlet of this thread has a transaction open.
    """

    def _recreate_cm(self) -> atomic:
        return atomic()

    def __enter__(self) -> atomic:
        self._binding = current()
        database = self._binding.database
        require_own_transaction(database)
        self._before: list[tuple[Any, dict[str, Any], set[str]]] = []
        self._errors: list[Exception] = []
        self._outermost = not database.in_transaction()
        self._inner = database.atomic(*(self._binding.dialect.begin if self._outermost else ()))
        self._transaction = self._inner.__enter__()
        # A savepoint, too, belongs to who opened it.
        self._around: Any = database.top_transaction()
        self._opened_around, self._around.opened_by = getattr(self._around, "opened_by", None), running()
        self._forget_at_commit()
        _scopes.open.append(self)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _scopes.open.remove(self)
        self._around.opened_by = self._opened_around
        failed = exc_type is None and self._binding.dialect.has_failed(self._binding.database)
        try:
            self._inner.__exit__(TransactionFailed if failed else exc_type, exc, traceback)
        except BaseException:
            self._restore()
            raise
        if failed or exc_type is not None:
            self._restore()
        elif _scopes.open:
            _scopes.open[-1]._before.extend(self._before)
        if failed:
            raise TransactionFailed
        if self._errors:
            raise AfterCommitError(self._errors) from self._errors[0]

    def rollback(self) -> None:
        """Undo everything since the block began, in the database and in memory. The block goes on."""
        self._transaction.rollback()
        self._restore()
        self._forget_at_commit()

    def _forget_at_commit(self) -> None:
        # Runs before everything else after the commit: from then on, no failure may restore anything.
        if self._outermost:
            self._binding.database.after_commit(self._before.clear)

    def _restore(self) -> None:
        for instance, data, dirty in reversed(self._before):
            for name, value in data.items():
                if value is _ABSENT:
                    instance.__data__.pop(name, None)
                else:
                    instance.__data__[name] = value
            instance._dirty.difference_update(data)
            instance._dirty.update(dirty)
        self._before.clear()


_ABSENT = object()


def remember(instance: Any, names: list[str]) -> None:
    """Note fields of an object before they are overwritten, so that a rollback can restore them."""
    if _scopes.open:
        data = {name: instance.__data__.get(name, _ABSENT) for name in names}
        _scopes.open[-1]._before.append((instance, data, instance._dirty.intersection(names)))


def accept(instance: Any, values: Mapping[str, Any]) -> None:
    """Copy what was just written into an object. A rollback restores the object.

    Args:
        instance: the object of the row.
        values: field name to the value that the row has now. These fields no longer count as unsaved.
    """
    if _scopes.open:
        remember(instance, list(values))
    if instance.__rel__:
        for name in instance.__rel__.keys() & values.keys():
            if instance.__data__.get(name) != values[name]:
                del instance.__rel__[name]
    instance.__data__.update(values)
    instance._dirty.difference_update(values)


def accept_row(instance: Any, fresh: Any) -> None:
    """Copy the whole row into an object, whose unsaved changes are lost. A rollback restores the object."""
    remember(instance, instance._meta.sorted_field_names)
    instance.__data__, instance.__rel__ = fresh.__data__, {}
    instance._dirty.clear()


def run_after_commit(*functions: Callable[[], object]) -> None:
    """Run functions once the outermost transaction has committed: now if none is open, never if it rolls back.

    Args:
        functions: take no arguments. If one fails, the others still run, the change stays committed, and the outermost
            `atomic()` raises AfterCommitError; if that block is Peewee's own, only for the first call that failed.
    """
    if not functions:
        return
    outermost = next((scope for scope in _scopes.open[:1] if scope._outermost), None)

    def run() -> None:
        errors: list[Exception] = []
        for function in functions:
            try:
                function()
            except Exception as error:
                errors.append(error)
        if outermost is not None:
            outermost._errors.extend(errors)
        elif errors:
            raise AfterCommitError(errors) from errors[0]

    current().database.after_commit(run)
