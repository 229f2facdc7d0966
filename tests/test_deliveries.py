"""Whether what was sent arrived: in any order, repeated, early, of other systems; and what follows from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    DELIVERY_WORDS,
    ActionType,
    CloseEngineConversation,
    ConversationClosed,
    Delivery,
    DeliveryStatus,
    InvalidValue,
    LeadOptedOut,
    MessageNotDead,
    MessageStatus,
    OutboxMessage,
    Stage,
    StageChange,
    Worker,
    outbox,
    record_delivery,
    submit,
    subscribe,
)
from close_engine.board import outbox_line
from close_engine.testing import FakeSender, MovableClock
from tests.command_line import run
from tests.rows import copy_of
from tests.waiting import Running, until_they_wait
from tests.workers import claimed, messages, race, sql

ConversationIn = Callable[..., CloseEngineConversation]

MINUTE = timedelta(minutes=1)
QUEUED, SENT, UNDELIVERED, DELIVERED, READ = DeliveryStatus


@pytest.fixture
def conversation(conversation_in: ConversationIn) -> CloseEngineConversation:
    return conversation_in(Stage.QUALIFYING)


@pytest.fixture
def in_flight(conversation: CloseEngineConversation) -> OutboxMessage:
    """A text that a worker has just given to the provider, and not marked as sent."""
    outbox.enqueue(conversation, "SEND_MESSAGE", "hello")
    return claimed()


def told(topic: str = "tell_owner") -> list[Any]:
    return [message.payload for message in messages() if message.topic == topic]


def stored() -> list[tuple[Any, ...]]:
    return [(each.provider_id, each.message_id, each.status) for each in Delivery.select().order_by(Delivery.id)]


# -- statuses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [*DELIVERY_WORDS, *DeliveryStatus, " Delivered"])
def test_every_word_of_twilio_is_known(in_flight: OutboxMessage, word: str) -> None:
    in_flight.sent("SM1")
    status = DELIVERY_WORDS[str(word).strip().lower()]
    assert record_delivery(word, provider_id="SM1").status is status
    delivery = copy_of(in_flight).delivery
    assert delivery is not None
    assert delivery.status is status


def test_an_unknown_word_is_refused_with_the_known_ones(in_flight: OutboxMessage) -> None:
    known = "accepted, scheduled, queued, sending, sent, undelivered, failed, canceled, delivered, read"
    for word in ("lost", "", None, 7):
        with pytest.raises(InvalidValue, match=f"status cannot be .*: it must be one of {known}"):
            record_delivery(word, provider_id="SM1")  # type: ignore[arg-type]
    assert stored() == []


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "give the provider's id of the message, or its send_key"),
        ({"provider_id": " "}, "leave it out if it is not known"),
        ({"send_key": ""}, "leave it out if it is not known"),
        ({"provider_id": "a\x00"}, "NUL"),
        ({"provider_id": "SM1", "at": datetime(2026, 1, 1)}, "it has no timezone"),
        ({"provider_id": "SM1", "at": "now"}, "it must be a datetime with a timezone"),
    ],
)
def test_what_makes_no_sense_is_refused(database: peewee.Database, given: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidValue, match=why):
        record_delivery("sent", **given)
    assert stored() == []


@pytest.mark.parametrize("order", list(itertools.permutations(["sent", "undelivered", "delivered", "sent"]))[:24:5])
def test_a_status_only_goes_forward_in_whatever_order_it_is_said(
    in_flight: OutboxMessage, order: tuple[str, ...]
) -> None:
    """Delivered is further than undelivered: who says that it arrived knows it."""
    for when, word in enumerate(order):
        if when == 2:
            in_flight.sent("SM1")
        record_delivery(word, provider_id="SM1")
    assert stored() == [("SM1", in_flight.id, DELIVERED)]
    assert record_delivery("queued", send_key=in_flight.send_key).status is DELIVERED
    assert record_delivery("read", provider_id="SM1").status is READ


def test_when_and_why_are_those_of_the_furthest_status(
    in_flight: OutboxMessage, close_engine_clock: MovableClock
) -> None:
    in_flight.sent("SM1")
    at = datetime(2026, 1, 31, 8, 0, 0, 999999, tzinfo=timezone(timedelta(hours=2)))
    first = record_delivery("failed", provider_id="SM1", error=30003, at=at)
    assert (first.error, first.at) == ("30003", datetime(2026, 1, 31, 6, 0, 0, 999000, tzinfo=timezone.utc))
    again = record_delivery("undelivered", provider_id="SM1", error="another word", at=at + MINUTE)
    assert (again.error, again.at) == (first.error, first.at)
    now = record_delivery("delivered", provider_id="SM1")
    assert (now.error, now.at) == (None, close_engine_clock.now.replace(microsecond=now.at.microsecond))
    assert record_delivery("failed", provider_id="SM2", error="half \ud800 a\x00").error == "half ? a"


# -- before sent() was recorded, and of other systems ------------------------------------------------------------------


@pytest.mark.parametrize("by", ["provider_id", "send_key", "both", "each"])
def test_what_is_said_too_early_becomes_the_messages(in_flight: OutboxMessage, by: str) -> None:
    subscribe("tell_owner", events=["message:undelivered"])
    ids: dict[str, Any] = {"provider_id": "SM1", "send_key": in_flight.send_key}
    if by == "each":
        record_delivery("sent", send_key=in_flight.send_key)
        record_delivery("undelivered", provider_id="SM1", error="30003")
    else:
        given = ids if by == "both" else {by: ids[by]}
        record_delivery("undelivered", error="30003", **given)
    assert told() == []
    in_flight.sent("SM1")
    assert stored() == [("SM1", in_flight.id, UNDELIVERED)]
    delivery = copy_of(in_flight).delivery
    assert delivery is not None
    assert (delivery.send_key, delivery.error) == (in_flight.send_key, "30003")
    said = {"event": "message:undelivered", "message_id": in_flight.id, "topic": "SEND_MESSAGE", "error": "30003"}
    assert told() == [{**said, "provider_id": "SM1"}]
    record_delivery("undelivered", error="30003", **ids)
    assert len(told()) == 1


def test_what_an_effect_has_sent_is_adopted_too(conversation: CloseEngineConversation) -> None:
    message = outbox.enqueue(conversation, "send_email")
    record_delivery("delivered", provider_id="mail-1")
    claimed().sent("mail-1")
    assert stored() == [("mail-1", message.id, DELIVERED)]


def test_two_ids_that_turn_out_to_be_one_sending_are_joined(in_flight: OutboxMessage) -> None:
    record_delivery("delivered", send_key=in_flight.send_key)
    record_delivery("sent", provider_id="SM1")
    assert len(stored()) == 2
    assert record_delivery("queued", provider_id="SM1", send_key=in_flight.send_key).status is DELIVERED
    assert stored() == [("SM1", None, DELIVERED)]
    in_flight.sent("SM1")
    assert stored() == [("SM1", in_flight.id, DELIVERED)]


@pytest.mark.parametrize("first", ["send_key", "provider_id"])
def test_two_that_turn_out_to_be_one_sending_are_one_event(in_flight: OutboxMessage, first: str) -> None:
    subscribe("tell_owner", events=["message:undelivered"])
    in_flight.sent()
    ids: dict[str, Any] = {"send_key": in_flight.send_key, "provider_id": "SM1"}
    for name in sorted(ids, key=lambda name: name != first):
        record_delivery("undelivered", **{name: ids[name]})
    record_delivery("undelivered", **ids)
    assert stored() == [("SM1", in_flight.id, UNDELIVERED)]
    assert len(told()) == 1


def test_a_message_of_another_system_is_kept_and_nobodys(in_flight: OutboxMessage) -> None:
    subscribe("tell_owner", events=["message:undelivered"])
    assert record_delivery("undelivered", provider_id="theirs").message_id is None
    assert record_delivery("delivered", send_key="theirs, too").message_id is None
    in_flight.sent("SM1")
    assert copy_of(in_flight).delivery is None
    assert told() == []
    assert outbox_line().undelivered == 0


def test_a_text_that_is_found_by_its_send_key_only(in_flight: OutboxMessage) -> None:
    """The provider gave no id."""
    in_flight.sent()
    assert record_delivery("delivered", send_key=in_flight.send_key).message_id == in_flight.id
    assert record_delivery("read", send_key=in_flight.send_key, provider_id="SM9").provider_id == "SM9"
    assert record_delivery("sent", provider_id="SM9").status is READ
    assert len(stored()) == 1


def test_what_is_rolled_back_was_never_said(in_flight: OutboxMessage) -> None:
    in_flight.sent("SM1")
    subscribe("tell_owner", events=["message:undelivered"])
    with close_engine.atomic() as transaction:
        record_delivery("undelivered", provider_id="SM1")
        transaction.rollback()
    assert (stored(), told()) == ([], [])


def test_it_survives_the_lead(in_flight: OutboxMessage) -> None:
    in_flight.sent("SM1")
    subscribe("tell_owner", events=["message:undelivered"])
    sql("DELETE FROM leads")
    assert record_delivery("undelivered", provider_id="SM1").message_id == in_flight.id
    assert len(told()) == 1


# -- at once -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"], indirect=True)
def test_any_number_may_say_it_at_once(in_flight: OutboxMessage, kind: str) -> None:
    subscribe("tell_owner", events=["message:undelivered"])
    in_flight.sent("SM1")
    words = ["sent", "undelivered", "undelivered", "queued"]
    ids = [{"provider_id": "SM1"}, {"send_key": in_flight.send_key}]
    outcomes = race([lambda word=word, one=one: record_delivery(word, **one) for word in words for one in ids])
    assert not [each for each in outcomes if isinstance(each, BaseException)]
    assert stored() == [("SM1", in_flight.id, UNDELIVERED)]
    assert len(told()) == 1


@pytest.mark.parametrize("by", ["provider_id", "send_key"])
@pytest.mark.parametrize("first", ["sent", "said"])
@pytest.mark.parametrize("kind", ["postgresql"], indirect=True)
def test_it_is_said_at_the_moment_at_which_it_is_marked_as_sent(
    in_flight: OutboxMessage, first: str, by: str, kind: str
) -> None:
    """Neither sees what the other has not committed: one waits for the other."""
    subscribe("tell_owner", events=["message:undelivered"])
    given: dict[str, Any] = {by: {"provider_id": "SM1", "send_key": in_flight.send_key}[by]}
    mark, say = (lambda: in_flight.sent("SM1")), (lambda: record_delivery("undelivered", **given))
    with close_engine.atomic():
        (mark if first == "sent" else say)()
        other = Running(say if first == "sent" else mark)
        until_they_wait([other])
    assert not isinstance(other.result(), BaseException), other.result()
    assert stored() == [("SM1", in_flight.id, UNDELIVERED)]
    assert len(told()) == 1


# -- what follows ------------------------------------------------------------------------------------------------------


def test_other_writers_say_it_too(in_flight: OutboxMessage) -> None:
    subscribe("tell_owner", events=["message:undelivered"])
    in_flight.sent("SM1")
    sql(
        "INSERT INTO {deliveries} (provider_id, message_id, status, at) VALUES "
        f"('SM1', {in_flight.id}, 'sent', '2026-01-01 00:00:00.000')"
    )
    sql("UPDATE {deliveries} SET status = 'undelivered', error = '30003'")
    sql("UPDATE {deliveries} SET error = '30004'")
    assert [each["error"] for each in told()] == ["30003"]


def test_who_tells_of_an_undelivered_message_tells_of_no_other(in_flight: OutboxMessage) -> None:
    """Or each notice that does not arrive makes another one, for ever."""
    subscribe("tell_owner", events=["message:undelivered", "message:dead"])
    in_flight.sent("SM1")
    record_delivery("undelivered", provider_id="SM1")
    claimed().sent("SM2")
    record_delivery("undelivered", provider_id="SM2")
    assert len(told()) == 1


def test_an_undelivered_message_is_sent_again_by_a_new_key(
    in_flight: OutboxMessage, conversation: CloseEngineConversation, fake_sender: FakeSender
) -> None:
    subscribe("tell_owner", events=["message:undelivered"])
    in_flight.sent("SM1")
    for status in ("queued", "sent"):
        record_delivery(status, provider_id="SM1")
        with pytest.raises(MessageNotDead, match="only a DEAD one, or one that was not delivered"):
            outbox.requeue(in_flight)
    record_delivery("undelivered", provider_id="SM1", error="30003: unreachable")
    assert outbox_line().undelivered == 1
    again = outbox.requeue(in_flight.id)
    assert (again.status, again.provider_id, again.sent_at, again.leased_by) == (
        MessageStatus.PENDING,
        None,
        None,
        None,
    )
    assert again.send_key != in_flight.send_key
    assert again.delivery is None
    assert outbox_line().undelivered == 0
    with pytest.raises(MessageNotDead):
        outbox.requeue(again)
    worker = Worker(fake_sender, sweep=None, concurrency=1, topics=["SEND_MESSAGE"])
    assert worker.run_until_empty() == 1
    (sent,) = fake_sender.sent
    assert (sent.id, sent.send_key, sent.body) == (in_flight.id, again.send_key, "hello")
    record_delivery("undelivered", send_key=again.send_key)
    assert [each["message_id"] for each in told()] == [in_flight.id] * 2
    assert record_delivery("delivered", provider_id="SM1").message_id == in_flight.id
    assert [status for _, _, status in stored()] == [DELIVERED, UNDELIVERED]


def test_one_that_arrived_after_all_is_not_sent_again(in_flight: OutboxMessage) -> None:
    in_flight.sent("SM1")
    record_delivery("undelivered", provider_id="SM1")
    record_delivery("delivered", provider_id="SM1")
    with pytest.raises(MessageNotDead):
        outbox.requeue(in_flight)
    assert copy_of(in_flight).status is MessageStatus.SENT


def test_it_may_be_sent_again_with_another_text_but_not_to_everybody(
    in_flight: OutboxMessage, conversation: CloseEngineConversation
) -> None:
    in_flight.sent("SM1")
    record_delivery("undelivered", provider_id="SM1")
    close_engine.opt_out(conversation.lead_id, source="phone call")
    with pytest.raises(LeadOptedOut):
        outbox.requeue(in_flight, "Hello!")
    close_engine.opt_in(conversation.lead_id, source="phone call")
    with pytest.raises(ConversationClosed):
        outbox.requeue(in_flight, "Hello!")
    copy_of(conversation).reopen()
    assert outbox.requeue(in_flight, "Hello!").body == "Hello!"


def test_one_that_was_emptied_is_sent_again_only_with_another_text(
    in_flight: OutboxMessage, close_engine_clock: MovableClock
) -> None:
    in_flight.sent("SM1")
    record_delivery("undelivered", provider_id="SM1")
    close_engine_clock.move(timedelta(days=400))
    close_engine.prune(timedelta(days=365))
    with pytest.raises(InvalidValue, match="the text of this message was emptied since: give another one"):
        outbox.requeue(in_flight)
    assert copy_of(in_flight).status is MessageStatus.SENT
    assert outbox.requeue(in_flight, "Hello again!").body == "Hello again!"


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"], indirect=True)
def test_two_who_put_it_back_at_once_send_it_once(in_flight: OutboxMessage, kind: str) -> None:
    in_flight.sent("SM1")
    record_delivery("undelivered", provider_id="SM1")
    outcomes = race([lambda: outbox.requeue(in_flight.id), lambda: outbox.requeue(in_flight.id)])
    assert sorted(type(each).__name__ for each in outcomes) == ["MessageNotDead", "OutboxMessage"]


def test_a_sender_that_finds_the_undelivered_one_has_not_found_the_new_one(in_flight: OutboxMessage) -> None:
    """It looks for the same words to the same number."""
    in_flight.sent("SM1")
    record_delivery("undelivered", provider_id="SM1")
    outbox.requeue(in_flight)
    sent = []

    class Finding:
        def find(self, message: OutboxMessage) -> str:
            return "SM1"

        def send(self, message: OutboxMessage) -> str:
            sent.append(message.send_key)
            return "SM2"

    Worker(Finding(), sweep=None, concurrency=1).run_until_empty()
    assert len(sent) == 1
    assert copy_of(in_flight).provider_id == "SM2"


def test_what_was_behind_it_still_stands(conversation_in: ConversationIn) -> None:
    """The stage has changed when it was sent first. Sending it again changes nothing more."""
    conversation = conversation_in(Stage.INITIATED)
    submit(conversation, ActionType.SEND_MESSAGE, "hello", key="k")
    claimed().sent("SM1")
    record_delivery("failed", provider_id="SM1")
    (message,) = messages()
    outbox.requeue(message)
    again = claimed().sent("SM2")
    assert again.refusal is None
    assert [change.dest for change in StageChange.select().order_by(StageChange.id)] == ["INITIATED", "QUALIFYING"]
    assert submit(copy_of(conversation), ActionType.SEND_MESSAGE, "hello", key="k") == message


def test_it_is_shown(in_flight: OutboxMessage, database_url: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_flight.sent("SM1")
    record_delivery("undelivered", provider_id="SM1", error="30003: the phone\x1b[2J is off")
    (line,) = outbox.undelivered_lines()
    assert (line.error, line.count, line.example) == ("30003", 1, in_flight.id)
    if kind == "sqlite-memory":
        return
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", database_url)
    shown = run("outbox").out
    assert "Undelivered" in shown
    assert f"{in_flight.id}: 30003: the phone\\x1b[2J is off" in shown
    assert ["undelivered", "1"] in run("board", "--once").lines or "undelivered" in run("board", "--once").out
    assert run("outbox", "requeue", str(in_flight.id)).code == 0
    assert "Undelivered" not in run("outbox").out
