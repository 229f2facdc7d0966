"""What the tests of the workers' half share: races, SQL past the library, and what the tables hold afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import peewee

from close_engine import CloseEngineConversation, OutboxMessage, PendingAction, outbox
from close_engine.database.binding import current
from close_engine.models import BaseModel
from tests.rows import replayed
from tests.waiting import LIMIT, Running, until_they_wait

LINK = "https://pay.example.com/1"


def race(functions: Sequence[Callable[..., Any]], behind: Callable[[], object] | None = None) -> list[Any]:
    """Run functions at the same moment, each in a thread with a connection of its own.

    Args:
        functions: what the racers do.
        behind: takes hold of what every racer needs. It is held until all of them wait for it, so none has ended before
            the last has begun; whatever it wrote is taken back. Without it they only begin together, for tests of what
            holds however they overlap. SQLite does not show who waits: nothing is held there.

    Returns:
        what each returned or raised, in their order.
    """
    database, barrier = current().database, threading.Barrier(len(functions), timeout=LIMIT)

    def at_once(function: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> Any:
            barrier.wait()
            return function()

        return run

    def start() -> list[Running]:
        return [Running(at_once(function)) for function in functions]

    if behind is None or not isinstance(database, peewee.PostgresqlDatabase):
        racers = start()
    else:
        with database.atomic() as transaction:
            behind()
            racers = start()
            until_they_wait(racers)
            transaction.rollback()
    return [racer.result() for racer in racers]


def held(row: BaseModel) -> Callable[[], object]:
    """Takes hold of a row, for `race` to have the racers wait for it."""
    model = type(row)
    return lambda: model.select(model.id).where(model.id == row.id).for_update().execute()


def sql(statement: str, *values: Any) -> list[tuple[Any, ...]]:
    """Run a statement as somebody who does not use this library; `{outbox}` is our own table of that name."""
    cursor = current().database.execute_sql(current().dialect.sql(statement), values)
    return [tuple(row) for row in cursor.fetchall()] if cursor.description else []


def values(row: Any) -> dict[str, Any]:
    """Everything an object holds: one that was just created has no entry for an empty column."""
    return {name: row.__data__.get(name) for name in row._meta.sorted_field_names}


def messages(conversation: CloseEngineConversation | None = None) -> list[OutboxMessage]:
    """What the outbox holds, or holds for this conversation, oldest first."""
    query = OutboxMessage.select().order_by(OutboxMessage.id)
    return list(query if conversation is None else query.where(OutboxMessage.conversation_id == conversation.id))


def claimed(worker: str = "w", lease: timedelta = timedelta(minutes=1)) -> OutboxMessage:
    """The one message that can be claimed now."""
    (message,) = outbox.claim(worker=worker, lease=lease)
    return message


def assert_consistent() -> None:
    """What holds at any moment, whoever did what: stages and history, leases, approvals and their messages."""
    for conversation in CloseEngineConversation.select():
        assert replayed(conversation.id) == conversation.stage
    in_flight: Any = (
        OutboxMessage.select(peewee.fn.COUNT(1))
        .where((OutboxMessage.status == "PENDING") & OutboxMessage.leased_by.is_null(False))
        .group_by(OutboxMessage.conversation_id)
        .tuples()
    )
    assert all(count == 1 for (count,) in in_flight)
    keys = [key for message in messages() if (key := message.key or "").startswith("close_engine:action:")]
    approved = PendingAction.select(PendingAction.id).where(PendingAction.status == "APPROVED")
    assert sorted(keys) == sorted(f"close_engine:action:{action.id}" for action in approved)
