"""Reads an object and its row, for tests that compare them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from close_engine import CloseEngineConversation, StageChange
from close_engine.models import BaseModel

Row = TypeVar("Row", bound=BaseModel)


def copy_of(row: Row) -> Row:
    """Load the same row again, as another worker does."""
    found: Row = type(row).get_by_id(row.id)
    return found


def in_memory(row: BaseModel) -> tuple[dict[str, Any], set[str]]:
    """Return everything that an object holds: its values, and which of them are unsaved."""
    return dict(row.__data__), set(row._dirty)


def stored(conversation: CloseEngineConversation) -> dict[str, Any]:
    """Return everything that the row holds."""
    return dict(copy_of(conversation).__data__)


def triggers(conversation: CloseEngineConversation) -> list[str]:
    """Return the triggers in the history, oldest first."""
    return [change.trigger for change in conversation.history()]


def replayed(conversation_id: str) -> str | None:
    """Return the stage that the history leads to. Each row must start where the one before it ended."""
    stage = None
    for change in StageChange.select().where(StageChange.conversation_id == conversation_id).order_by(StageChange.id):
        assert change.source == stage
        stage = change.dest
    return stage


class Stop(Exception):
    """The caller's own error."""


@contextmanager
def left_by_an_error(block: AbstractContextManager[Any]) -> Iterator[Any]:
    """Run the body in the block and leave it with an error, which the block must let through."""
    try:
        with block as entered:
            yield entered
            raise Stop
    except Stop:
        return
    raise AssertionError("the block swallowed the error")
