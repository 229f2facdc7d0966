"""A message whose lease ended without a report may have killed its worker: it is sent alone, but it is sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import peewee
import pytest

import close_engine
from close_engine import CloseEngineConversation, EntryPoint, MessageStatus, OutboxMessage, Stage, Worker, outbox
from close_engine.testing import MovableClock, new_lead
from tests.waiting import LIMIT

MINUTE = timedelta(minutes=1)


def test_a_worker_that_is_always_busy_sends_it_in_its_turn(postgres: peewee.Database) -> None:
    """There is always more to send, and never a moment at which all senders are free."""
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    turn, begun, end = threading.Condition(), 0, time.monotonic() + LIMIT

    def send(message: OutboxMessage) -> None:
        nonlocal begun
        with turn:
            begun += 1
            mine = begun
            turn.notify_all()
            if message.topic == "suspect" or time.monotonic() > end:
                worker.stop()
            elif mine == 1:  # somebody else's worker dies
                outbox.enqueue(conversation, "suspect")
                outbox.claim(worker="dead", lease=timedelta(milliseconds=1), topics=["suspect"])
            outbox.enqueue(conversation, f"effect {mine}")
            outbox.enqueue(conversation, f"other effect {mine}")
            # It ends when another one has begun, so one is always in flight; if none begins, it ends all the same.
            turn.wait_for(lambda: begun > mine, timeout=0.1)

    for topic in ("first effect", "second effect"):
        outbox.enqueue(conversation, topic)
    worker = Worker(send, concurrency=2, lease=timedelta(seconds=0.5), sweep=None)
    worker.run()
    suspect = OutboxMessage.get(OutboxMessage.topic == "suspect")
    assert (suspect.status, suspect.claims) == (MessageStatus.SENT, 2)


@pytest.mark.parametrize("topics", [None, ["suspect", "other"]])
def test_whether_it_is_next_is_told_by_its_turn(
    conversation_in: Callable[[Stage], CloseEngineConversation],
    close_engine_clock: MovableClock,
    topics: list[str] | None,
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    assert not outbox.suspect_is_next(topics)
    outbox.enqueue(conversation, "suspect")
    assert not outbox.suspect_is_next(topics)
    outbox.claim(worker="dead", lease=MINUTE)
    assert not outbox.suspect_is_next(topics), "it is in flight"

    other = outbox.enqueue(conversation, "other")
    close_engine_clock.move(MINUTE)
    assert not outbox.suspect_is_next(topics), "another one was due before its lease was over"
    assert outbox.suspect_is_next(["suspect"])
    other.withdraw("not needed")
    assert outbox.suspect_is_next(topics)
    assert not outbox.suspect_is_next(["other"])
    close_engine.release_leases()
    assert outbox.suspect_is_next(topics), "a sweep has ended its lease"
