"""Inputs that once failed, one test per case, by its number: tasks, isolation levels, bindings and connections."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    EntryPoint,
    Lead,
    Stage,
    StageConflict,
    atomic,
    locked,
    outbox,
    submit,
)
from close_engine.database.binding import current, is_transient
from close_engine.errors import sqlstate
from close_engine.testing import bring_to, new_lead
from tests.rows import copy_of, triggers
from tests.servers import execute
from tests.waiting import LIMIT, Running, until_they_wait
from tests.workers import LINK, held, messages, race, sql

ConversationIn = Callable[..., CloseEngineConversation]
Opened = Callable[[], AbstractContextManager[Any]]


def save(conversation: CloseEngineConversation) -> None:
    conversation.edit_rounds = 3
    conversation.save()


# F6: databases whose default isolation level is stricter.

LEVELS = ("REPEATABLE READ", "SERIALIZABLE")
RACERS = 6


@pytest.fixture(params=LEVELS)
def strict(request: pytest.FixtureRequest, postgres_url: str) -> Iterator[peewee.Database]:
    """A PostgreSQL database whose transactions are strict, unless they say otherwise."""
    name = close_engine.connect(postgres_url).connect_params.get("dbname") or current().database.database
    execute(postgres_url, f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = '{request.param.lower()}'")
    database = close_engine.connect(postgres_url)
    assert sql("SHOW transaction_isolation") == [(request.param.lower(),)]
    yield database
    database.close()


def opened(stage: Stage, **lead: Any) -> CloseEngineConversation:
    return bring_to(close_engine.open_conversation(new_lead(**lead), EntryPoint.SMS_REPLY), stage)


def conflicts(outcomes: list[Any]) -> int:
    """How many lost the race as documented; nobody got another error."""
    lost = [outcome for outcome in outcomes if isinstance(outcome, StageConflict)]
    assert all(conflict.found is not None for conflict in lost)
    assert [outcome for outcome in outcomes if isinstance(outcome, Exception) and outcome not in lost] == []
    return len(lost)


def test_f6_a_transaction_that_we_begin_is_read_committed(strict: peewee.Database) -> None:
    """What another one commits meanwhile is seen, as everything in this library needs it."""
    lead = new_lead()
    with atomic():
        assert sql("SHOW transaction_isolation") == [("read committed",)]
        Running(lambda: Lead.update(phone="+1").where(Lead.id == lead.id).execute()).result()
        assert copy_of(lead).phone == "+1"
        with atomic():
            pass
    with strict.atomic():
        assert sql("SHOW transaction_isolation") != [("read committed",)]


def test_f6_the_guarded_write_loses_its_race_as_documented(strict: peewee.Database) -> None:
    """It leaked "could not serialize". One wins; the others are told what they found."""
    conversation = opened(Stage.QUALIFYING)
    for lose in (lambda c: c.start_building(), save):
        copies = [copy_of(conversation) for _ in range(RACERS)]
        outcomes = race([partial(lose, copy) for copy in copies], behind=held(conversation))
        assert conflicts(outcomes) == RACERS - 1
    assert triggers(conversation)[-1:] == ["start_building"]


def test_f6_a_key_that_came_twice_is_one_change(strict: peewee.Database) -> None:
    """A variant: every racer gets the first result."""
    conversation = opened(Stage.QUALIFYING)
    copies = [copy_of(conversation) for _ in range(RACERS)]

    changes = race([partial(copy.start_building, key="SM1") for copy in copies], behind=held(conversation))

    assert {change.id for change in changes} == {conversation.history()[-1].id}


def test_f6_whoever_waits_for_the_row_gets_it(strict: peewee.Database) -> None:
    """`locked()` failed in 24 of 32, `receive()` in 5 of 32: nobody may lose where nobody decides on a copy."""
    conversation = opened(Stage.QUALIFYING)

    def count() -> None:
        with locked(conversation.id) as found:
            found.edit_rounds += 1
            found.save()

    for work in (
        lambda number: count(),
        lambda number: close_engine.receive(conversation.lead_id, f"SM{number}", "Hello!"),
        lambda number: copy_of(conversation).record(questions=[f"question {number}"]),
        lambda number: outbox.enqueue(conversation.id, f"topic {number}", "Hello!"),
    ):
        outcomes = race([partial(work, number) for number in range(RACERS)], behind=held(conversation))
        assert conflicts(outcomes) == 0
    stored_now = copy_of(conversation)
    assert stored_now.edit_rounds == len(stored_now.questions_asked) == RACERS
    assert len(messages()) == close_engine.InboxEntry.select().count() == RACERS


def test_f6_two_openings_at_once_are_one(strict: peewee.Database) -> None:
    """`open_conversation()` failed in 19 of 32."""
    lead = new_lead()

    outcomes = race(
        [partial(close_engine.open_conversation, lead.id, EntryPoint.SMS_REPLY)] * RACERS, behind=held(lead)
    )

    assert len({conversation.id for conversation in outcomes}) == 1
    assert triggers(outcomes[0]) == ["open"]


def test_f6_claims_and_decisions_lose_nothing(strict: peewee.Database) -> None:
    """A variant: what the worker and the owner do, at once."""
    conversations = [opened(Stage.INITIATED, autonomy_level=AutonomyLevel.MANUAL) for _ in range(RACERS)]
    actions = [submit(conversation, ActionType.SEND_MESSAGE, "Hello!") for conversation in conversations]

    for decide in (lambda action: copy_of(action).approve(by="dana"), lambda action: copy_of(action).approve(by="eve")):
        outcomes = race([partial(decide, actions[0])] * RACERS)
        assert {message.id for message in outcomes} == {messages()[0].id}
    race([partial(action.approve, by="dana") for action in actions[1:]])

    def work() -> int:
        sent = 0
        while claimed := outbox.claim(worker=threading.current_thread().name):
            for message in claimed:
                message.sent(provider_id=f"SM{message.id}")
                sent += 1
        return sent

    assert sum(race([work] * RACERS)) == RACERS
    assert {copy_of(conversation).stage for conversation in conversations} == {Stage.QUALIFYING}


LOSING: dict[str, Callable[[CloseEngineConversation], object]] = {
    "fire": lambda c: c.start_building(),
    "save": save,
    "submit": lambda c: submit(c, ActionType.SEND_MESSAGE, "Hello!", key="reply"),
    "locked": lambda c: locked(c.id).__enter__(),
    "receive": lambda c: close_engine.receive(c.lead_id, "SM1", "Hello!"),
    "record": lambda c: c.record(questions=["budget"]),
    "enqueue": lambda c: outbox.enqueue(c, "draft_reply", "Hello!"),
    "approve": lambda c: close_engine.pending_actions(c).get().approve(by="dana"),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("lose", LOSING.values(), ids=LOSING)
def test_f6_in_a_callers_stricter_transaction_a_lost_race_finds_nothing(
    level: str, lose: Callable[[CloseEngineConversation], object], postgres: peewee.Database
) -> None:
    """The transaction cannot see what the other one wrote: it is rolled back, and memory with it."""
    conversation = opened(Stage.QUALIFYING)
    submit(conversation, ActionType.SEND_MESSAGE, "A draft", policy=lambda level, type: True)
    copy = copy_of(conversation)

    def begin_and_lose() -> None:
        with postgres.atomic(level):
            assert copy_of(conversation).stage is Stage.QUALIFYING
            Running(copy_of(conversation).collect_info).result()
            lose(copy)

    with pytest.raises(StageConflict) as lost:
        begin_and_lose()

    assert lost.value.found is None
    assert "begin again" in str(lost.value)
    assert is_transient(lost.value)
    if lose is LOSING["fire"]:
        assert (lost.value.conversation_id, lost.value.operation) == (conversation.id, "start_building")
        assert lost.value.expected is Stage.QUALIFYING
    assert copy.stage is Stage.QUALIFYING
    assert triggers(conversation)[-1] == "collect_info"
    assert messages() == []


@pytest.mark.parametrize("level", ["READ COMMITTED", *LEVELS])
@pytest.mark.parametrize("end", ["REJECTED", "EXPIRED", "deleted"])
def test_f6_two_links_that_end_at_once_leave_nothing_behind(level: str, end: str, postgres: peewee.Database) -> None:
    """Both committed, and PENDING_APPROVAL stayed with nothing waiting. Now the second decides right, or fails."""
    conversation = opened(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.MANUAL)
    first, second = (
        submit(copy_of(conversation), ActionType.SEND_PAYMENT_LINK, "Pay!", metadata={"paymentUrl": LINK})
        for _ in range(2)
    )
    assert copy_of(conversation).stage is Stage.PENDING_APPROVAL

    def finish(action: Any) -> None:
        if end == "deleted":
            sql("DELETE FROM pending_actions WHERE id = %s", action.id)
        else:
            sql("UPDATE pending_actions SET status = %s WHERE id = %s", end, action.id)

    def finish_second() -> None:
        with postgres.atomic(level):
            sql("SELECT count(*) FROM pending_actions")  # from now on, a strict one sees nothing new
            seen.set()
            finish(second)

    seen = threading.Event()
    with postgres.atomic(level):
        finish(first)
        late = Running(finish_second)
        assert seen.wait(LIMIT)
        until_they_wait([late])
    outcome = late.result()

    if level == "READ COMMITTED":
        assert outcome is None
    else:
        assert sqlstate(outcome) == "40001"
        assert copy_of(conversation).stage is Stage.PENDING_APPROVAL
        finish(second)
    assert copy_of(conversation).stage is Stage.PREVIEW_SENT
    assert list(close_engine.pending_actions()) == []


def test_f6_a_decision_writes_the_conversation_even_if_another_link_waits(conversation_in: ConversationIn) -> None:
    """A variant, on every database: whoever decided on the conversation before has a conflict."""
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.MANUAL)
    actions = [
        submit(copy_of(conversation), ActionType.SEND_PAYMENT_LINK, "Pay!", metadata={"paymentUrl": LINK})
        for _ in range(3)
    ]
    for end in (lambda: actions[0].reject(by="dana"), actions[1].delete_instance):
        before = copy_of(conversation)
        end()
        with pytest.raises(StageConflict):
            before.stall()
        assert copy_of(conversation).stage is Stage.PENDING_APPROVAL
    actions[2].reject(by="dana", reason="too dear")

    assert triggers(conversation)[-2:] == ["request_approval", "withdraw_approval"]
    assert conversation.history()[-1].actor == "dana"
