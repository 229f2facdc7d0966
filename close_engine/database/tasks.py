"""Whose transaction it is: all asyncio tasks and greenlets of a thread share its one connection.

Peewee keeps a connection and its transaction per thread. If one task opens a transaction and waits in it, what another
task writes meanwhile goes into the same transaction, and is committed or rolled back with it. So each transaction is
noted with the task or greenlet that opened it, and nobody else writes in it:

>>> import asyncio
>>> import close_engine
>>> database = close_engine.connect("sqlite:///:memory:")
>>> async def write():
...     with close_engine.atomic():
...         pass
>>> async def main():
...     with close_engine.atomic():
...         await asyncio.gather(write())
>>> asyncio.run(main())
Traceback (most recent call last):
close_engine.TransactionOfAnotherTask: Nothing was written: task 'Task-...' ...
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import peewee

from close_engine.errors import TransactionOfAnotherTask

__all__ = ["note_openers", "require_own_transaction", "running"]


def note_openers(database: peewee.Database) -> None:
    """From now on, note at every transaction of this database who opens it, even if it is Peewee's own."""
    push = type(database).push_transaction
    # Not the database itself: it would keep itself alive, and its connections open.
    itself: Any = weakref.proxy(database)

    def push_transaction(transaction: Any) -> None:
        transaction.opened_by = running()
        push(itself, transaction)

    database.push_transaction = push_transaction  # type: ignore[method-assign]


def running() -> Any:
    """Return the asyncio task or the greenlet that runs; None for the thread's own code.

    Neither library is imported for that: where it is not imported, there is no task and no greenlet.
    """
    return _task() or _greenlet()


def _task() -> Any:
    asyncio = sys.modules.get("asyncio")
    # Half of it may be imported if another thread is at it. Then no loop runs here.
    loop = getattr(asyncio, "_get_running_loop", lambda: None)()
    return None if asyncio is None or loop is None else asyncio.current_task(loop)


def _greenlet() -> Any:
    current = getattr(sys.modules.get("greenlet"), "getcurrent", None)
    # Each thread has a main greenlet, which has no parent.
    return current() if current is not None and current().parent is not None else None


def require_own_transaction(database: peewee.Database) -> None:
    """Refuse to write in a transaction that another task or greenlet of this thread opened.

    Raises:
        TransactionOfAnotherTask: another one opened it.
    """
    transaction: Any = database.top_transaction()
    if transaction is None:
        return
    # One from before this database was bound is not noted.
    opener, here = getattr(transaction, "opened_by", None), running()
    if here is opener:
        return
    # The thread's own code waits while an event loop runs in its transaction, as in a hook that calls asyncio.run().
    if opener is None and here is _task():
        return
    raise TransactionOfAnotherTask(_named(opener), _named(here))


def _named(opener: Any) -> str:
    if opener is None:
        return "the thread's own code"
    if hasattr(opener, "get_name"):
        return f"task {opener.get_name()!r}"
    return f"greenlet {getattr(opener, 'name', None) or hex(id(opener))}"
