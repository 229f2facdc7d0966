"""A message that could not leave in time is withdrawn, whoever put it in and wherever it waited."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import peewee
import pytest

from close_engine import (
    ActionDecided,
    ActionStatus,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    InvalidValue,
    MessageStatus,
    OutboxMessage,
    PendingAction,
    Stage,
    expire_actions,
    outbox,
    submit,
)
from close_engine.database.fields import milliseconds, stored_time
from close_engine.testing import FakeSender, MovableClock
from tests.foreign import REFUSED, ForeignWriter
from tests.rows import copy_of
from tests.workers import LINK, claimed, messages, sql

ConversationIn = Callable[..., CloseEngineConversation]

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
MESSAGE, LINK_TYPE = ActionType.SEND_MESSAGE, ActionType.SEND_PAYMENT_LINK
TOO_LATE = (MessageStatus.WITHDRAWN, "it could not leave in time")


@pytest.fixture
def conversation(conversation_in: ConversationIn) -> CloseEngineConversation:
    return conversation_in(Stage.QUALIFYING)


@pytest.fixture(params=["after so long", "at a moment"])
def in_an_hour(request: pytest.FixtureRequest, close_engine_clock: MovableClock) -> timedelta | datetime:
    """The two forms of the time."""
    return HOUR if request.param == "after so long" else close_engine_clock.now + HOUR


def outcome(message: Any) -> tuple[MessageStatus, str | None]:
    row = OutboxMessage.get_by_id(message.id)
    return row.status, row.last_error


@pytest.mark.parametrize("topic", ["SEND_MESSAGE", "build_site"])
def test_a_message_that_could_not_leave_in_time_is_withdrawn(
    conversation: CloseEngineConversation,
    close_engine_clock: MovableClock,
    in_an_hour: Any,
    topic: str,
    fake_sender: FakeSender,
) -> None:
    in_time = outbox.enqueue(conversation, topic, "Good morning!", not_after=in_an_hour)
    too_late = outbox.enqueue(conversation, topic, "Still morning?", not_after=in_an_hour)
    assert too_late.not_after == milliseconds(close_engine_clock.now) + HOUR
    close_engine_clock.move(HOUR)
    assert claimed().sent().id == in_time.id
    close_engine_clock.move(timedelta(milliseconds=1))
    assert fake_sender.deliver() == 0
    assert outcome(too_late) == TOO_LATE
    assert fake_sender.sent == []


def test_submit_takes_it_too(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock, in_an_hour: Any, fake_sender: FakeSender
) -> None:
    message = submit(conversation, MESSAGE, "Good morning!", not_after=in_an_hour)
    later = submit(conversation, MESSAGE, "Lunch?", send_after=2 * HOUR, not_after=4 * HOUR)
    close_engine_clock.move(3 * HOUR)
    fake_sender.deliver()
    assert [each.body for each in fake_sender.sent] == ["Lunch?"]
    assert outcome(message) == TOO_LATE
    assert outcome(later)[0] is MessageStatus.SENT


@pytest.mark.parametrize("end", ["retry", "snooze", "lease"])
def test_nothing_is_tried_again_when_its_time_is_over(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock, end: str
) -> None:
    """What is too late by its next attempt does not hold up its lane until then, either."""
    first = outbox.enqueue(conversation, "SEND_MESSAGE", "Good morning!", not_after=2 * MINUTE)
    outbox.enqueue(conversation, "SEND_MESSAGE", "How are you?")
    message = claimed(lease=MINUTE)
    if end == "retry":
        message.retry("the network is down", after=HOUR)
    elif end == "snooze":
        message.snooze(HOUR if first.id % 2 else close_engine_clock.now + HOUR)
    assert outbox.claim() == []
    close_engine_clock.move(2 * MINUTE + timedelta(milliseconds=1))
    assert [each.body for each in outbox.claim()] == ["How are you?"]
    assert outcome(first) == TOO_LATE


def test_what_is_snoozed_beyond_its_time_is_not_claimed_in_the_moment_before(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    """Or a worker in whose quiet hours that moment is would claim and snooze it again and again."""
    first = outbox.enqueue(conversation, "SEND_MESSAGE", "Good morning!", not_after=MINUTE)
    claimed().snooze(HOUR)
    close_engine_clock.move(MINUTE)
    assert outbox.claim() == []
    close_engine_clock.move(timedelta(milliseconds=1))
    assert outbox.claim() == []
    assert outcome(first) == TOO_LATE


def test_a_retry_in_time_comes_when_it_would(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    outbox.enqueue(conversation, "SEND_MESSAGE", "Good morning!", not_after=HOUR)
    message = claimed()
    message.retry("busy", after=MINUTE)
    assert message.available_at == milliseconds(close_engine_clock.now) + MINUTE
    close_engine_clock.move(MINUTE)
    message = claimed()
    message.snooze(close_engine_clock.now + MINUTE)
    assert message.available_at == milliseconds(close_engine_clock.now) + MINUTE


def test_a_draft_that_waits_for_approval_keeps_it_and_expires_then(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, in_an_hour: Any
) -> None:
    conversation = conversation_in(Stage.QUALIFYING, autonomy_level=AutonomyLevel.MANUAL)
    until = milliseconds(close_engine_clock.now) + HOUR
    for expires_after in (timedelta(hours=24), None):
        action = submit(conversation, MESSAGE, "Good morning!", not_after=in_an_hour, expires_after=expires_after)
        assert isinstance(action, PendingAction)
        assert action.metadata["notAfter"] == stored_time(until)
        assert action.expires_at == until
    approved = action.approve(by="dana")
    assert approved.not_after == until
    close_engine_clock.move(HOUR + MINUTE)
    assert outbox.claim() == []
    assert outcome(approved) == TOO_LATE


def test_approving_too_late_is_refused_and_the_link_waits_no_more(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    """Whoever clicks learns it, and the conversation does not wait for what will never leave."""
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.MANUAL)
    action = submit(conversation, LINK_TYPE, "Today only!", metadata={"paymentUrl": LINK}, not_after=HOUR)
    assert isinstance(action, PendingAction)
    sooner = submit(conversation, MESSAGE, "Hello", not_after=3 * HOUR, expires_after=MINUTE)
    assert isinstance(sooner, PendingAction)
    assert sooner.expires_at == milliseconds(close_engine_clock.now) + MINUTE
    close_engine_clock.move(HOUR)
    with pytest.raises(ActionDecided, match="EXPIRED"):
        action.approve(by="dana")
    expire_actions()
    assert copy_of(action).status is ActionStatus.EXPIRED
    assert copy_of(conversation).stage is Stage.PREVIEW_SENT
    assert messages() == []


def test_what_a_human_submits_who_took_over_goes_the_same_way(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    conversation.take_over(by="dana")
    message = submit(conversation, MESSAGE, "Good morning!", actor="dana", not_after=HOUR)
    assert isinstance(message, OutboxMessage)
    assert message.not_after == milliseconds(close_engine_clock.now) + HOUR
    over = submit(conversation, MESSAGE, "Good night!", actor="dana", not_after=close_engine_clock.now - HOUR)
    assert outbox.claim()[0].id == message.id
    assert message.id != over.id
    claimed_before = copy_of(message)
    close_engine_clock.move(MINUTE)
    assert [each.id for each in outbox.claim()] == [claimed_before.id]  # the lease is over, the time is not


def test_a_text_that_a_human_must_see_first_keeps_it(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    until = milliseconds(close_engine_clock.now) + HOUR
    message = submit(conversation, MESSAGE, "Good morning!", not_after=HOUR)
    plain = submit(conversation, MESSAGE, "Hello!")
    sql("UPDATE leads SET autonomy_level = 'MANUAL'")
    assert outbox.claim(limit=10) == []
    assert outbox.claim(limit=10) == []
    kept, other = (PendingAction.get_by_id(OutboxMessage.get_by_id(each.id).action_id) for each in (message, plain))
    assert kept.metadata["notAfter"] == stored_time(until)
    assert kept.expires_at == until
    assert "notAfter" not in other.metadata
    assert other.expires_at == milliseconds(close_engine_clock.now) + 24 * HOUR
    assert kept.approve(by="dana").not_after == until
    close_engine_clock.move(2 * HOUR)
    assert [each.body for each in outbox.claim(limit=10)] == []
    assert outcome(OutboxMessage.get(OutboxMessage.action_id == kept.id, OutboxMessage.id != message.id)) == TOO_LATE


def test_it_is_too_late_before_a_human_is_asked(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    message = submit(conversation, MESSAGE, "Good morning!", not_after=MINUTE)
    sql("UPDATE leads SET autonomy_level = 'MANUAL'")
    close_engine_clock.move(HOUR)
    assert outbox.claim() == []
    assert outcome(message) == TOO_LATE
    assert list(PendingAction.select()) == []


def test_a_requeued_message_is_judged_again(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    message = outbox.enqueue(conversation, "SEND_MESSAGE", "Good morning!", not_after=HOUR)
    claimed().give_up("no")
    close_engine_clock.move(2 * HOUR)
    outbox.requeue(message)
    assert outbox.claim() == []
    assert outcome(message) == TOO_LATE


def test_the_same_key_again_returns_the_first(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    until = close_engine_clock.now + HOUR
    first = submit(conversation, MESSAGE, "Good morning!", key="k", not_after=until)
    close_engine_clock.move(2 * HOUR)
    assert submit(copy_of(conversation), MESSAGE, "Good morning!", key="k", not_after=until) == first


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"not_after": "noon"}, "it must be a datetime with a timezone"),
        ({"not_after": datetime(2030, 1, 1)}, "it has no timezone"),
        ({"not_after": timedelta.max}, "it can be at most 36500 days"),
        ({"not_after": timedelta.min}, "it can be at most 36500 days"),
        ({"not_after": MINUTE, "send_after": HOUR}, "it is before send_after, so the message could never leave"),
    ],
)
def test_a_time_that_makes_no_sense_is_refused(
    conversation_in: ConversationIn, given: dict[str, Any], why: str
) -> None:
    for level in (AutonomyLevel.FULL_AUTO, AutonomyLevel.MANUAL):
        conversation = conversation_in(Stage.QUALIFYING, autonomy_level=level)
        with pytest.raises(InvalidValue, match=why):
            outbox.enqueue(conversation, "SEND_MESSAGE", "hello", **given)
        with pytest.raises(InvalidValue, match=why):
            submit(conversation, MESSAGE, "hello", **given)
    assert messages() == []


def test_two_moments_are_compared_too(conversation: CloseEngineConversation, close_engine_clock: MovableClock) -> None:
    at = close_engine_clock.now
    with pytest.raises(InvalidValue, match="it is before send_after"):
        outbox.enqueue(conversation, "SEND_MESSAGE", "hello", send_after=at + HOUR, not_after=at)


# -- other writers -----------------------------------------------------------------------------------------------------


def drafted(foreign: ForeignWriter, not_after: Any) -> str:
    conversation_id = foreign.insert("QUALIFYING")
    foreign.run(
        "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message, metadata) "
        "VALUES ('a1', %s, 'lead', 'SEND_MESSAGE', 'hello', %s)",
        conversation_id,
        json.dumps({"notAfter": not_after}),
    )
    return "a1"


APPROVE = "UPDATE pending_actions SET status = 'APPROVED', approved_by = 'dana' WHERE id = 'a1'"


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("2999-01-31T08:00:00.000Z", "2999-01-31 08:00:00.000"),
        ("2999-01-31T23:59:59.9999999+05:30", "2999-01-31 18:29:59.999"),
        ("2999-01-31 08:00:00.123", "2999-01-31 08:00:00.123"),
        (None, None),
    ],
)
def test_the_crm_may_write_it_as_other_languages_do(
    foreign: ForeignWriter, given: str | None, stored: str | None
) -> None:
    drafted(foreign, given)
    foreign.run(APPROVE)
    (message,) = messages()
    assert (message.not_after and stored_time(message.not_after)) == stored


@pytest.mark.parametrize("given", ["noon", "", 7, ["a"], True, "2999-02-30T08:00:00Z", "infinity"])
def test_a_time_that_nobody_understands_is_refused_at_the_approval(foreign: ForeignWriter, given: Any) -> None:
    action = PendingAction.get_by_id(drafted(foreign, given))
    with pytest.raises(REFUSED, match=r"close_engine: .*metadata.notAfter.* a time like 2026-01-31T08:00:00.000Z"):
        foreign.run(APPROVE)
    with pytest.raises(InvalidValue, match=r"notAfter cannot be .*write a time like 2026-01-31T08:00:00.000Z"):
        action.approve(by="dana")
    assert messages() == []


def test_what_the_crm_approves_too_late_is_withdrawn(foreign: ForeignWriter) -> None:
    drafted(foreign, "2020-01-31T08:00:00.000Z")
    foreign.run(APPROVE)
    (message,) = messages()
    assert outbox.claim() == []
    assert outcome(message) == TOO_LATE


def test_a_raw_insert_may_have_it(conversation: CloseEngineConversation, database: peewee.Database) -> None:
    sql(
        "INSERT INTO {outbox} (conversation_id, topic, created_at, available_at, not_after) "
        f"VALUES ('{conversation.id}', 'build_site', '2020-01-01 00:00:00.000', '2020-01-01 00:00:00.000', "
        "'2020-01-01 00:00:00.001')"
    )
    assert outbox.claim() == []
    (message,) = messages()
    assert outcome(message) == TOO_LATE
