"""Racers start at a barrier; exactly one of them wins, and the history has no gap and no duplicate."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.synchronize import Barrier as ProcessBarrier
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import CloseEngineConversation, EntryPoint, Stage, StageConflict, open_conversation
from close_engine.database.binding import current
from close_engine.testing import new_lead
from tests.rows import replayed, triggers
from tests.waiting import LIMIT

Barrier = threading.Barrier | ProcessBarrier
Task = Callable[..., Any]
Rounds = Sequence[tuple[Any, ...]]
Race = Callable[[Task, Rounds], list[tuple[Any, ...]]]

ROUNDS = ["start_qualifying", "collect_info", "start_building", "send_preview", "request_edits"]

race_between = pytest.mark.parametrize(
    ("kind", "racers"),
    [
        ("postgresql", "32 threads"),
        ("postgresql", "8 processes"),
        ("sqlite-file", "8 threads"),
        ("sqlite-file", "8 processes"),
    ],
)


# The tasks of a racer. Each process imports this module to run one.


barrier: Barrier


def get_ready(the_barrier: Barrier) -> None:
    """Prepare a racer; called first in each."""
    global barrier
    barrier = the_barrier


def fire(conversation_id: str, trigger: str) -> int | tuple[Stage | None, Stage | None]:
    """Fire. The winner returns the id of its history row, the others what they expected and found."""
    conversation = CloseEngineConversation.get_by_id(conversation_id)
    barrier.wait(LIMIT)
    try:
        return int(conversation.fire(trigger).id)
    except StageConflict as conflict:
        return conflict.expected, conflict.found


def fire_with_key(conversation_id: str, trigger: str) -> int:
    """Fire with a key, and return the id of the history row."""
    conversation = CloseEngineConversation.get_by_id(conversation_id)
    barrier.wait(LIMIT)
    return int(conversation.fire(trigger, key=f"webhook of {trigger}").id)


def open_for(lead_id: str, entry_point: EntryPoint) -> str:
    """The id of the conversation."""
    barrier.wait(LIMIT)
    return str(open_conversation(lead_id, entry_point).id)


def compete(task: Task, rounds: Rounds, url: str | None = None) -> list[Any]:
    """Run the rounds one after another, and return the outcome of each. A process connects first."""
    if url:
        close_engine.connect(url)
    outcomes = []
    for arguments in rounds:
        barrier.wait(LIMIT)
        outcomes.append(task(*arguments))
    current().database.close()
    return outcomes


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Eight processes, shared because they start slowly."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(8, mp_context=spawn, initializer=get_ready, initargs=(spawn.Barrier(8),)) as pool:
        yield pool


@pytest.fixture
def race(database: peewee.Database, database_url: str, racers: str, request: pytest.FixtureRequest) -> Race:
    """Let racers compete in a task, and return the outcomes of each round."""
    number = int(racers.split()[0])

    def run(task: Task, rounds: Rounds) -> list[tuple[Any, ...]]:
        pool: AbstractContextManager[Executor]
        url: str | None
        if racers.endswith("processes"):
            pool, url = nullcontext(request.getfixturevalue("processes")), database_url
        else:
            barrier = threading.Barrier(number)
            pool, url = ThreadPoolExecutor(number, initializer=get_ready, initargs=(barrier,)), None
        with pool as racing:
            running = [racing.submit(compete, task, rounds, url) for _ in range(number)]
            return list(zip(*(racer.result(LIMIT) for racer in running), strict=True))

    return run


@race_between
def test_of_all_who_fire_at_once_exactly_one_wins(race: Race) -> None:
    conversation = open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    outcomes = race(fire, [(conversation.id, trigger) for trigger in ROUNDS])
    history = conversation.history()
    assert [change.trigger for change in history] == ["open", *ROUNDS]
    for change, outcome in zip(history[1:], outcomes, strict=True):
        winners = [found for found in outcome if not isinstance(found, tuple)]
        conflicts = [found for found in outcome if isinstance(found, tuple)]
        assert winners == [change.id]
        assert conflicts == [(change.source, change.dest)] * (len(outcome) - 1)
    conversation.reload()
    assert replayed(conversation.id) is conversation.stage


@race_between
def test_all_who_fire_at_once_with_the_same_key_get_the_one_change(race: Race) -> None:
    conversation = open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    outcomes = race(fire_with_key, [(conversation.id, trigger) for trigger in ROUNDS])
    assert triggers(conversation) == ["open", *ROUNDS]
    assert [set(outcome) for outcome in outcomes] == [{change.id} for change in conversation.history()[1:]]


@race_between
def test_all_who_open_at_once_get_the_same_conversation(race: Race) -> None:
    leads = [new_lead() for _ in range(4)]
    outcomes = race(open_for, [(lead.id, EntryPoint.SMS_REPLY) for lead in leads])
    for lead, outcome in zip(leads, outcomes, strict=True):
        conversation = lead.close_conversation
        assert conversation is not None
        assert set(outcome) == {conversation.id}
        assert triggers(conversation) == ["open"]


@race_between
def test_all_who_reopen_at_once_get_the_same_conversation(race: Race) -> None:
    conversations = [open_conversation(new_lead(), EntryPoint.SMS_REPLY) for _ in range(4)]
    for conversation in conversations:
        conversation.close_lost("no answer")
    outcomes = race(open_for, [(conversation.lead_id, EntryPoint.REP_CLOSE) for conversation in conversations])
    for conversation, outcome in zip(conversations, outcomes, strict=True):
        assert set(outcome) == {conversation.id}
        assert triggers(conversation) == ["open", "close_lost", "reopen"]
