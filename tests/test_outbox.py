"""Messages leave in order, sent by the worker with the lease, and each result is recorded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import peewee
import psycopg2
import pytest

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    ConversationClosed,
    ConversationNotFound,
    EntryPoint,
    InvalidValue,
    KeyReused,
    LeaseLost,
    MessageNotDead,
    MessageNotFound,
    MessageStatus,
    OutboxMessage,
    ProviderIdTaken,
    Stage,
    StageChange,
    on_enter,
    outbox,
    record_payment,
    submit,
)
from close_engine.database.fields import milliseconds
from close_engine.hooks import Hook
from close_engine.testing import MovableClock, bring_to, new_lead
from tests.rows import copy_of, triggers
from tests.waiting import Running, until_they_wait
from tests.workers import LINK, assert_consistent, claimed, held, messages, race, sql, values

ConversationIn = Callable[..., CloseEngineConversation]

MINUTE = timedelta(minutes=1)


@pytest.fixture
def conversation(conversation_in: ConversationIn) -> CloseEngineConversation:
    return conversation_in(Stage.QUALIFYING)


def bodies(claimed: Sequence[OutboxMessage]) -> list[str | None]:
    return [message.body for message in claimed]


def enqueue(conversation: CloseEngineConversation | str, *texts: str, **options: Any) -> list[OutboxMessage]:
    return [outbox.enqueue(conversation, "SEND_MESSAGE", text, **options) for text in texts]


# -- enqueue -----------------------------------------------------------------------------------------------------------


def test_a_message_is_stored_as_it_was_given(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    message = outbox.enqueue(
        conversation,
        "build_site",
        "é日本 %s",
        payload={"a": [1, None], "b": {"c": "é"}},
        key="k",
        trigger="start_building",
        approved_by="dana",
        max_attempts=3,
    )
    assert values(message) == values(copy_of(message))
    assert message.lead_id == conversation.lead_id
    assert message.status is MessageStatus.PENDING
    assert message.created_at == message.available_at == milliseconds(close_engine_clock.now)
    assert (message.attempts, message.leased_by, message.sent_at) == (0, None, None)
    assert repr(message) == f"<OutboxMessage {message.id}: build_site of {conversation.id}, PENDING>"


def test_a_type_of_action_is_a_topic_and_an_id_is_a_conversation(conversation: CloseEngineConversation) -> None:
    message = outbox.enqueue(conversation.id, ActionType.SEND_PREVIEW)
    assert (message.topic, message.body, message.conversation_id) == ("SEND_PREVIEW", None, conversation.id)


def test_the_outbox_is_vacuumed_after_so_many_messages_however_many_were_sent_before(postgres: peewee.Database) -> None:
    # Each claim passes over the index entries of what was claimed and sent since. By default, that is a fifth of all.
    options = postgres.execute_sql("SELECT reloptions FROM pg_class WHERE oid = 'close_engine.outbox'::regclass")
    assert sorted(options.fetchone()[0]) == [
        "autovacuum_vacuum_scale_factor=0",
        "autovacuum_vacuum_threshold=5000",
        "vacuum_index_cleanup=on",
    ]


def test_enqueuing_is_no_change_of_the_conversation(conversation: CloseEngineConversation) -> None:
    before = values(copy_of(conversation))
    enqueue(conversation, "hello")
    assert values(copy_of(conversation)) == before
    conversation.collect_info()


def test_the_same_key_again_returns_the_first_message_of_the_conversation(
    conversation: CloseEngineConversation, conversation_in: ConversationIn
) -> None:
    (first,) = enqueue(conversation, "first", key="k")
    assert enqueue(conversation, "second", key="k") == [first]
    (other,) = enqueue(conversation_in(Stage.QUALIFYING), "third", key="k")
    assert bodies(messages()) == ["first", "third"]
    assert other != first


def test_a_key_belongs_to_one_topic(conversation: CloseEngineConversation) -> None:
    outbox.enqueue(conversation, "draft_reply", "hi", key="k")
    with pytest.raises(KeyReused) as reused:
        outbox.enqueue(conversation, "build_site", key="k")
    assert (reused.value.key, reused.value.first, reused.value.trigger) == ("k", "draft_reply", "build_site")


def test_a_text_is_not_put_into_a_conversation_that_has_closed(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.COMPLETED)
    with pytest.raises(ConversationClosed):
        enqueue(conversation, "Thank you!")
    assert outbox.enqueue(conversation, "tell_the_boss").status is MessageStatus.PENDING


def test_an_unknown_conversation_has_no_messages(database: peewee.Database) -> None:
    with pytest.raises(ConversationNotFound, match="nobody"):
        outbox.enqueue("nobody", "SEND_MESSAGE", "hello")


def test_what_cannot_be_stored_is_refused(conversation: CloseEngineConversation) -> None:
    for given in (
        {"body": "a\x00"},
        {"topic": "a\x00"},
        {"payload": {"a": object()}},
        {"key": "a\x00"},
        {"key": " "},
        {"trigger": "fly"},
        {"send_after": "soon"},
        {"max_attempts": 0},
    ):
        options: dict[str, Any] = {"topic": "SEND_MESSAGE", "body": "hello", **given}
        with pytest.raises((InvalidValue, close_engine.UnknownTrigger)):
            outbox.enqueue(conversation, **options)
    assert messages() == []


def test_a_message_commits_with_what_causes_it_or_not_at_all(conversation: CloseEngineConversation) -> None:
    for fails in (True, False):
        with close_engine.atomic() as transaction:
            conversation.record(data={"a": fails})
            enqueue(conversation, "hello")
            if fails:
                transaction.rollback()
    assert bodies(messages()) == ["hello"]


# -- claiming ----------------------------------------------------------------------------------------------------------


def test_a_claim_leases_the_message_to_this_worker(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    enqueue(conversation, "hello")
    (message,) = outbox.claim(worker="w1", lease=MINUTE)
    assert values(message) == values(copy_of(message))
    assert (message.leased_by, message.attempts, message.status) == ("w1", 1, MessageStatus.PENDING)
    assert message.available_at == milliseconds(close_engine_clock.now) + MINUTE
    assert (message.claims, message.leased_at) == (1, milliseconds(close_engine_clock.now))
    assert message.is_leased
    assert outbox.claim(10, worker="w2") == []


def test_one_message_of_a_conversation_is_in_flight_and_the_oldest_goes_first(
    conversation: CloseEngineConversation,
) -> None:
    enqueue(conversation, "one", "two", "three")
    sent = []
    while claimed := outbox.claim(limit=10):
        (message,) = claimed
        assert outbox.claim(limit=10) == []
        sent.append(message.sent(f"p{message.id}").body)
    assert sent == ["one", "two", "three"]


def test_the_oldest_messages_are_claimed_first_up_to_the_limit(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    for number in range(5):
        enqueue(conversation_in(Stage.QUALIFYING), str(number))
        close_engine_clock.move(timedelta(seconds=1))
    assert bodies(outbox.claim(limit=2)) == ["0", "1"]
    assert bodies(outbox.claim(limit=10)) == ["2", "3", "4"]


def test_a_delayed_message_is_not_claimed_before_its_time_and_holds_back_nobody(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    enqueue(conversation, "later", send_after=MINUTE)
    enqueue(conversation, "behind it")
    assert claimed().sent().body == "behind it"
    close_engine_clock.move(MINUTE - timedelta(milliseconds=1))
    assert outbox.claim(limit=10) == []
    close_engine_clock.move(timedelta(milliseconds=1))
    enqueue(conversation, "put in when it was due")
    assert claimed().sent().body == "later"
    assert claimed().body == "put in when it was due"


@pytest.mark.parametrize("report", ["retry", "snooze"])
def test_a_message_that_was_begun_keeps_its_place(conversation: CloseEngineConversation, report: str) -> None:
    enqueue(conversation, "first", "second")
    message = claimed()
    if report == "retry":
        message.retry("busy", after=MINUTE)
    else:
        message.snooze(MINUTE)
    assert outbox.claim(limit=10) == []


def test_the_lanes_of_a_conversation_do_not_wait_for_each_other(conversation: CloseEngineConversation) -> None:
    enqueue(conversation, "text")
    outbox.enqueue(conversation, "SEND_PREVIEW", "also a text")
    for topic in ("build_site", "draft_reply", "build_site"):
        outbox.enqueue(conversation, topic)
    assert [message.topic for message in outbox.claim(10)] == ["SEND_MESSAGE", "build_site", "draft_reply"]
    assert outbox.claim(10) == []


def test_a_claim_can_be_of_some_topics_only(conversation: CloseEngineConversation) -> None:
    enqueue(conversation, "text")
    outbox.enqueue(conversation, "build_site")
    assert [message.topic for message in outbox.claim(10, topics=["build_site", "nothing"])] == ["build_site"]


def test_a_moment_can_be_given_as_the_delay(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    (message,) = enqueue(conversation, "later", send_after=close_engine_clock.now + MINUTE)
    assert message.available_at == milliseconds(close_engine_clock.now) + MINUTE


def test_a_lease_that_runs_out_makes_the_message_claimable_again_before_those_behind_it(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    enqueue(conversation, "one", "two")
    claimed("w1")
    close_engine_clock.move(MINUTE - timedelta(milliseconds=1))
    assert outbox.claim(10, worker="w2") == []
    close_engine_clock.move(timedelta(milliseconds=1))
    again = claimed("w2")
    assert (again.body, again.leased_by, again.attempts) == ("one", "w2", 2)
    assert again.send_key == messages()[0].send_key


@pytest.mark.parametrize("sweeps", [True, False])
@pytest.mark.parametrize(("allowed", "claims"), [(3, 3), (36, 5)])
def test_a_message_that_kills_every_worker_is_dead_in_the_end(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock, sweeps: bool, allowed: int, claims: int
) -> None:
    enqueue(conversation, "poison", max_attempts=allowed)
    enqueue(conversation, "behind it")
    for _ in range(claims):
        assert claimed().body == "poison"
        close_engine_clock.move(MINUTE)
        if sweeps:
            assert close_engine.release_leases() == [messages()[0].id]
    assert claimed().body == "behind it"
    dead = messages()[0]
    assert (dead.status, dead.last_error) == (MessageStatus.DEAD, "the lease of w ran out")
    assert (dead.attempts, dead.unreported, dead.leased_by) == (claims, claims, None)


def test_a_message_that_may_have_killed_its_worker_is_claimed_alone(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    for body in ("one", "two"):
        enqueue(conversation_in(Stage.QUALIFYING), body)
    outbox.claim(10)
    close_engine_clock.move(MINUTE)
    enqueue(conversation_in(Stage.QUALIFYING), "three")

    assert bodies(outbox.claim(10)) == ["one"]
    assert [message.attempts for message in messages()] == [2, 1, 0]
    assert bodies(outbox.claim(10, suspects=False)) == ["three"]


def test_an_attempt_that_was_never_begun_is_taken_back_whoever_holds_the_message(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    enqueue(conversation, "hello")
    suspended = claimed("w1")
    close_engine_clock.move(MINUTE)
    assert claimed("w2").attempts == 2
    suspended.drop()
    message = copy_of(suspended)
    assert (message.attempts, message.unreported, message.leased_by) == (1, 0, "w2")


def test_what_no_python_can_read_is_dead_and_alone_in_that(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    bad, good = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    unreadable = outbox.enqueue(bad, "build_site")
    outbox.enqueue(good, "build_site")
    sql("UPDATE {outbox} SET payload = %s WHERE id = %s", f"[{'9' * 5000}]", unreadable.id)

    assert [message.conversation_id for message in outbox.claim(10)] == [good.id]

    (status, error), *_ = sql("SELECT status, last_error FROM {outbox} ORDER BY id")
    assert status == "DEAD"
    assert error.startswith("the message cannot be read: ValueError: ")


def test_a_claim_of_nothing_is_refused(database: peewee.Database) -> None:
    for given in ({"limit": 0}, {"worker": "a\x00"}, {"worker": ""}, {"lease": timedelta(0)}):
        with pytest.raises(InvalidValue):
            outbox.claim(**given)


def test_a_claim_that_is_rolled_back_was_never_made(conversation: CloseEngineConversation) -> None:
    enqueue(conversation, "hello")
    with close_engine.atomic() as transaction:
        assert claimed().body == "hello"
        transaction.rollback()
    assert claimed().attempts == 1


# -- reporting ---------------------------------------------------------------------------------------------------------

REPORTS = {
    "sent": lambda message: message.sent("p1"),
    "retry": lambda message: message.retry("busy"),
    "give_up": lambda message: message.give_up("no such number"),
    "extend": lambda message: message.extend(MINUTE),
    "release": lambda message: message.release(),
}


@pytest.mark.parametrize("report", list(REPORTS))
def test_what_is_reported_is_in_the_object_as_in_the_row(conversation: CloseEngineConversation, report: str) -> None:
    enqueue(conversation, "hello", trigger="start_building")
    message = claimed()
    assert REPORTS[report](message) is message
    assert values(message) == values(copy_of(message))
    assert not message._dirty


@pytest.mark.parametrize("report", list(REPORTS))
def test_a_report_that_is_rolled_back_leaves_the_object_as_it_was(
    conversation: CloseEngineConversation, report: str
) -> None:
    enqueue(conversation, "hello", trigger="start_building")
    message = claimed()
    before = values(message)
    with close_engine.atomic() as transaction:
        REPORTS[report](message)
        transaction.rollback()
    assert values(message) == before == values(copy_of(message))
    assert copy_of(conversation).stage is Stage.QUALIFYING


@pytest.mark.parametrize("report", list(REPORTS))
def test_a_lease_that_another_worker_holds_is_an_error_and_nothing_changes(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock, report: str
) -> None:
    enqueue(conversation, "hello", trigger="start_building")
    for worker in ("w2", "w1"):  # even if the other worker has the same name
        late = claimed("w1")
        close_engine_clock.move(MINUTE)
        other = claimed(worker)
        before, untouched = values(late), values(copy_of(late))
        with pytest.raises(LeaseLost) as lost:
            REPORTS[report](late)
        assert (lost.value.message_id, lost.value.worker) == (late.id, "w1")
        assert (lost.value.status, lost.value.leased_by) == (MessageStatus.PENDING, worker)
        assert f"held by {worker!r}" in str(lost.value)
        assert values(copy_of(late)) == untouched
        assert values(late) == before
        assert copy_of(conversation).stage is Stage.QUALIFYING
        other.release()


@pytest.mark.parametrize("report", list(REPORTS))
def test_what_nobody_has_claimed_cannot_be_reported_on(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock, report: str
) -> None:
    (message,) = enqueue(conversation, "hello", trigger="start_building")
    before = values(copy_of(message))
    with pytest.raises(LeaseLost, match="held by nobody"):
        REPORTS[report](message)
    for finish in ("release", "retry"):
        close_engine_clock.move(timedelta(hours=2))
        message = REPORTS[finish](claimed())
        before = values(copy_of(message))
        with pytest.raises(LeaseLost, match="held by nobody"):
            REPORTS[report](message)
    assert values(copy_of(message)) == before


@pytest.mark.parametrize("report", list(REPORTS))
def test_a_deleted_message_is_named_in_the_error(conversation: CloseEngineConversation, report: str) -> None:
    enqueue(conversation, "hello")
    message = claimed()
    sql("DELETE FROM {outbox} WHERE id = %s", message.id)
    with pytest.raises(MessageNotFound) as missing:
        REPORTS[report](message)
    assert missing.value.message_id == message.id


def test_a_lease_that_ran_out_still_counts_while_nobody_else_has_it(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    enqueue(conversation, "hello")
    message = claimed()
    close_engine_clock.move(timedelta(hours=1))
    assert message.sent("p1").status is MessageStatus.SENT


def test_extending_counts_from_now(conversation: CloseEngineConversation, close_engine_clock: MovableClock) -> None:
    enqueue(conversation, "hello")
    message = claimed()
    close_engine_clock.move(timedelta(seconds=50))
    message.extend(MINUTE)
    close_engine_clock.move(timedelta(seconds=59))
    assert outbox.claim(limit=10) == []
    close_engine_clock.move(timedelta(seconds=1))
    assert claimed().id == message.id


def test_a_released_message_can_be_tried_as_often_as_before(conversation: CloseEngineConversation) -> None:
    enqueue(conversation, "hello", max_attempts=1)
    for _ in range(3):
        assert claimed().release().status is MessageStatus.PENDING
    assert claimed().retry("busy").status is MessageStatus.DEAD


def test_a_retry_waits_twice_as_long_each_time_give_or_take_a_half(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    enqueue(conversation, "hello", max_attempts=14)
    for attempt in range(1, 14):
        message = claimed()
        message.retry(ValueError("busy"))
        assert message.last_error == "ValueError: busy"
        assert (message.leased_by, message.attempts) == (None, attempt)
        wait = (message.available_at - milliseconds(close_engine_clock.now)).total_seconds()
        expected = min(15 * 2 ** (attempt - 1), 3600)
        assert expected * 0.5 - 0.001 <= wait <= min(expected * 1.5, 3600)
        close_engine_clock.move(timedelta(seconds=wait) - timedelta(milliseconds=1))
        assert outbox.claim(limit=10) == []
        close_engine_clock.move(timedelta(milliseconds=1))


def test_retries_of_many_messages_do_not_come_at_once(conversation_in: ConversationIn) -> None:
    for _ in range(10):
        enqueue(conversation_in(Stage.QUALIFYING), "hello")
    assert len({message.retry("busy").available_at for message in outbox.claim(limit=10)}) > 5


def test_a_retry_after_a_time_of_the_callers_own(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    enqueue(conversation, "hello")
    message = claimed().retry("429", after=timedelta(seconds=7))
    assert message.available_at == milliseconds(close_engine_clock.now) + timedelta(seconds=7)


def test_after_its_last_attempt_a_message_is_dead_and_those_behind_it_go_on(
    conversation: CloseEngineConversation,
) -> None:
    enqueue(conversation, "hello", max_attempts=2)
    enqueue(conversation, "behind it")
    claimed().retry("busy", after=timedelta(0))
    message = claimed().retry("still busy")
    assert (message.status, message.last_error, message.leased_by) == (MessageStatus.DEAD, "still busy", None)
    assert claimed().body == "behind it"


def test_giving_up_makes_it_dead_at_once(conversation: CloseEngineConversation) -> None:
    enqueue(conversation, "hello", "behind it")
    message = claimed().give_up(ValueError("no such number\x00\ud800"))
    assert (message.status, message.last_error) == (MessageStatus.DEAD, "ValueError: no such number?")
    assert claimed().body == "behind it"


# -- sent --------------------------------------------------------------------------------------------------------------


def test_what_is_sent_is_recorded_with_the_providers_id(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    enqueue(conversation, "hello")
    message = claimed("w1").sent("p1")
    assert (message.status, message.provider_id, message.refusal) == (MessageStatus.SENT, "p1", None)
    assert message.sent_at == milliseconds(close_engine_clock.now)
    assert OutboxMessage.with_provider_id("p1") == message
    assert OutboxMessage.with_provider_id("p2") is None
    assert outbox.claim(limit=10) == []


def test_the_trigger_behind_a_message_is_fired_when_it_is_sent(conversation: CloseEngineConversation) -> None:
    enqueue(conversation, "hello", trigger="start_building")
    message = claimed("w1").sent("p1")
    change = conversation.history()[-1]
    assert (change.trigger, change.actor, change.key) == ("start_building", "w1", message.send_key)
    assert change.metadata == {"message_id": message.id, "provider_id": "p1"}
    assert copy_of(conversation).stage is Stage.BUILDING


def test_a_trigger_that_leads_where_the_conversation_is_already_is_not_fired(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    submit(conversation, ActionType.SEND_PREVIEW, "here it is again")
    message = claimed().sent("p1")
    assert (message.status, message.refusal) == (MessageStatus.SENT, None)
    assert triggers(conversation)[-1] == "send_preview"
    assert triggers(conversation).count("send_preview") == 1


def test_a_trigger_that_is_no_longer_allowed_leaves_the_message_sent_and_says_why(
    conversation_in: ConversationIn,
) -> None:
    conversation = conversation_in(Stage.PAYMENT_SENT)
    conversation.stall()
    submit(conversation, ActionType.SEND_MESSAGE, "hello")
    OutboxMessage.update(trigger="send_preview").execute()
    message = claimed()
    record_payment(conversation.lead_id, "evt_1")
    message.sent("p1")
    assert (message.status, message.provider_id) == (MessageStatus.SENT, "p1")
    assert message.refusal == (
        f"Conversation {conversation.id!r} is COMPLETED, "
        "and send_preview is not allowed from there; COMPLETED is final."
    )
    assert values(message) == values(copy_of(message))
    assert copy_of(conversation).stage is Stage.COMPLETED


def test_a_message_of_a_deleted_conversation_is_recorded_as_sent(conversation: CloseEngineConversation) -> None:
    enqueue(conversation, "hello", trigger="start_building")
    message = claimed()
    sql("DELETE FROM close_engine_conversations WHERE id = %s", conversation.id)
    message.sent("p1")
    refusal = copy_of(message).refusal
    assert refusal is not None
    assert "There is no conversation" in refusal
    assert copy_of(message).status is MessageStatus.SENT


def test_a_payment_link_that_reached_the_lead_after_it_was_lost_still_lets_it_pay(
    conversation_in: ConversationIn,
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    submit(conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK})
    message = claimed()
    copy_of(conversation).close_lost("silent")
    message.sent("p1")
    assert message.refusal is not None
    assert "is CLOSED_LOST, and send_payment_link is not allowed from there" in message.refusal
    row = copy_of(conversation)
    assert (row.stage, row.payment_link_url) == (Stage.CLOSED_LOST, LINK)
    assert row.payment_link_sent_at == message.sent_at
    record_payment(conversation.lead_id, "evt_1")
    assert copy_of(conversation).stage is Stage.COMPLETED


class HookFailed(Exception):
    pass


def failing_with(error: Exception, *stages: Stage) -> Hook:
    @on_enter(*stages)
    def fail(conversation: CloseEngineConversation, change: StageChange) -> None:
        raise error

    return fail


def test_a_hook_that_fails_leaves_the_message_sent_and_is_raised_once_that_is_recorded(
    conversation: CloseEngineConversation,
) -> None:
    enqueue(conversation, "hello", trigger="start_building")
    message, hook = claimed(), failing_with(HookFailed("no disk"), Stage.BUILDING)
    try:
        with pytest.raises(HookFailed, match="no disk"):
            message.sent("p1")
    finally:
        hook.remove()
    assert values(message) == values(copy_of(message))
    assert (message.status, message.refusal) == (MessageStatus.SENT, "HookFailed: no disk")
    assert copy_of(conversation).stage is Stage.QUALIFYING


def test_a_database_that_fails_in_between_leaves_it_to_be_recorded_again(conversation: CloseEngineConversation) -> None:
    """What passes by waiting must not be recorded as a refusal."""
    enqueue(conversation, "hello", trigger="start_building")
    message, hook = claimed(), failing_with(peewee.OperationalError("database is locked"), Stage.BUILDING)
    try:
        with pytest.raises(peewee.OperationalError):
            message.sent("p1")
    finally:
        hook.remove()
    assert copy_of(message).status is message.status is MessageStatus.PENDING
    message.sent("p1")
    assert copy_of(conversation).stage is Stage.BUILDING


def test_marked_sent_twice_with_the_same_id_it_stays_as_it_was(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    enqueue(conversation, "hello", trigger="start_building")
    message = claimed()
    stale = copy_of(message)
    message.sent("p1")
    close_engine_clock.move(MINUTE)
    before = values(copy_of(message))
    assert values(message.sent("p1")) == values(stale.sent("p1")) == before == values(copy_of(message))
    assert triggers(conversation).count("start_building") == 1


def test_marked_sent_twice_with_another_id_the_first_stands(conversation: CloseEngineConversation) -> None:
    enqueue(conversation, "hello")
    message = claimed("w1")
    stale = copy_of(message)
    message.sent("p1")
    for provider_id in ("p2", None):
        with pytest.raises(LeaseLost) as lost:
            stale.sent(provider_id)
        assert lost.value.status is MessageStatus.SENT
    assert copy_of(message).provider_id == "p1"


def test_an_id_of_the_provider_belongs_to_one_message(conversation_in: ConversationIn) -> None:
    conversations = [conversation_in(Stage.QUALIFYING) for _ in range(2)]
    for conversation in conversations:
        enqueue(conversation, "hello", trigger="start_building")
    first, second = outbox.claim(limit=10)
    first.sent("p1")
    before = values(second)
    with pytest.raises(ProviderIdTaken) as taken:
        second.sent("p1")
    assert (taken.value.provider_id, taken.value.message_id, taken.value.first) == ("p1", second.id, first.id)
    assert values(copy_of(second)) == before == values(second)
    assert copy_of(conversations[1]).stage is Stage.QUALIFYING
    second.sent("p2")


# -- closing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["the library", "another writer", "a payment"])
def test_texts_that_wait_are_withdrawn_when_the_conversation_closes_and_effects_are_not(
    conversation_in: ConversationIn, by: str
) -> None:
    conversation = conversation_in(Stage.PAYMENT_SENT)
    other = conversation_in(Stage.PAYMENT_SENT)
    for topic in (*ActionType, "tell_the_boss"):
        outbox.enqueue(conversation, topic)
    enqueue(other, "of another")
    if by == "the library":
        conversation.close_lost("no")
    elif by == "a payment":
        record_payment(conversation.lead_id, "evt_1")
    else:
        sql("UPDATE close_engine_conversations SET stage = 'CLOSED_LOST' WHERE id = %s", conversation.id)
    *texts, effect = messages(conversation)
    stage = "COMPLETED" if by == "a payment" else "CLOSED_LOST"
    for text in texts:
        assert (text.status, text.last_error) == (MessageStatus.WITHDRAWN, f"the conversation is {stage}")
    assert effect.status is MessageStatus.PENDING
    assert sorted(message.topic for message in outbox.claim(limit=10)) == ["SEND_MESSAGE", "tell_the_boss"]


def test_texts_of_a_deleted_lead_are_withdrawn_and_effects_are_not(conversation: CloseEngineConversation) -> None:
    enqueue(conversation, "hello")
    outbox.enqueue(conversation, "delete_site")
    sql("DELETE FROM leads WHERE id = %s", conversation.lead_id)
    text, effect = messages()
    assert (text.status, text.last_error) == (MessageStatus.WITHDRAWN, "the conversation is deleted")
    effect = claimed().give_up("busy")
    assert outbox.requeue(effect).status is MessageStatus.PENDING


def test_a_dead_text_of_a_deleted_lead_cannot_be_requeued(conversation: CloseEngineConversation) -> None:
    enqueue(conversation, "hello")
    text = claimed().give_up("no")
    sql("DELETE FROM leads WHERE id = %s", conversation.lead_id)
    with pytest.raises(ConversationNotFound):
        outbox.requeue(text)


def test_a_stalled_conversation_keeps_its_messages(conversation: CloseEngineConversation) -> None:
    enqueue(conversation, "still there?")
    conversation.stall()
    assert claimed().body == "still there?"


@pytest.mark.parametrize("then", ["retry", "release", "its worker dies"])
def test_a_text_in_flight_when_the_conversation_closes_is_not_sent_again(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, then: str
) -> None:
    conversation = conversation_in(Stage.PAYMENT_SENT)
    enqueue(conversation, "pay, please")
    outbox.enqueue(conversation, "tell_the_boss")
    message = claimed()
    record_payment(conversation.lead_id, "evt_1")
    if then in REPORTS:
        REPORTS[then](message)
    close_engine_clock.move(timedelta(hours=2))
    assert [message.topic for message in outbox.claim(limit=10)] == ["tell_the_boss"]
    withdrawn = copy_of(message)
    assert (withdrawn.status, withdrawn.leased_by) == (MessageStatus.WITHDRAWN, None)
    assert withdrawn.last_error == "the conversation is closed"


@pytest.mark.parametrize("held", [True, False])
def test_a_message_can_be_withdrawn_with_a_reason(conversation: CloseEngineConversation, held: bool) -> None:
    enqueue(conversation, "hello")
    message = claimed() if held else messages()[0]
    message.withdraw("the owner wrote herself")
    assert (message.status, message.last_error) == (MessageStatus.WITHDRAWN, "the owner wrote herself")
    assert (message.attempts, message.leased_by) == (0, None)
    assert values(message) == values(copy_of(message))


def test_what_another_worker_holds_cannot_be_withdrawn(conversation: CloseEngineConversation) -> None:
    (message,) = enqueue(conversation, "hello")
    claimed()
    with pytest.raises(LeaseLost):
        message.withdraw("the owner wrote herself")
    with pytest.raises(InvalidValue, match="a reason must be given"):
        message.withdraw(" ")


def test_a_snoozed_message_comes_back_and_no_attempt_is_counted(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    enqueue(conversation, "hello", max_attempts=1)
    for _ in range(3):
        message = claimed().snooze(MINUTE)
        assert message.available_at == milliseconds(close_engine_clock.now) + MINUTE
        close_engine_clock.move(MINUTE)
    message = claimed().snooze(close_engine_clock.now + MINUTE)
    assert (message.attempts, message.claims) == (0, 4)


def test_retries_go_on_for_a_day_by_default(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    enqueue(conversation, "hello")
    began = close_engine_clock.now
    while (message := claimed().retry("503")).status is MessageStatus.PENDING:
        close_engine_clock.now = message.available_at
    assert close_engine_clock.now - began >= timedelta(days=1)


# -- requeue -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_id", [True, False])
def test_a_requeued_message_is_tried_as_often_again(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock, by_id: bool
) -> None:
    enqueue(conversation, "hello", max_attempts=2)
    message = claimed().give_up("no such number")
    close_engine_clock.move(MINUTE)
    again = outbox.requeue(message.id if by_id else message)
    assert values(again) == values(copy_of(message))
    assert (again.status, again.attempts, again.last_error) == (MessageStatus.PENDING, 0, "no such number")
    assert again.available_at == milliseconds(close_engine_clock.now)
    claimed().retry("busy", after=timedelta(0))
    assert claimed().retry("busy").status is MessageStatus.DEAD


def test_another_text_gets_another_send_key(conversation: CloseEngineConversation) -> None:
    enqueue(conversation, "Helo!")
    message = claimed().give_up("misspelt")
    assert outbox.requeue(message, body="Helo!").send_key == message.send_key
    claimed().give_up("misspelt")
    again = outbox.requeue(message, body="Hello!")
    assert again.body == "Hello!"
    assert again.send_key != message.send_key


def test_many_are_requeued_by_kind_of_error_and_by_time(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    closed = conversation_in(Stage.QUALIFYING)
    for error in ("HTTPError: 503", "HTTPError: 504", "HTTPErrors: 1", "HTTPError"):
        enqueue(conversation_in(Stage.QUALIFYING), error)
        claimed().give_up(error)
        close_engine_clock.move(MINUTE)
    enqueue(closed, "HTTPError: too late")
    claimed().give_up("HTTPError: too late")
    closed.close_lost("not interested")
    ids = [message.id for message in messages()]

    since = close_engine_clock.now - 2 * MINUTE
    assert outbox.requeue_all(error="HTTPError", since=since) == [ids[3]]
    assert outbox.requeue_all(error="HTTPError") == ids[:2]
    assert outbox.requeue_all() == [ids[2]]
    assert messages()[4].status is MessageStatus.DEAD


def test_only_a_dead_message_can_be_requeued(conversation: CloseEngineConversation) -> None:
    (message,) = enqueue(conversation, "hello")
    for status in MessageStatus:
        if status is not MessageStatus.DEAD:
            OutboxMessage.update(status=status).execute()
            with pytest.raises(MessageNotDead) as refused:
                outbox.requeue(message)
            assert (refused.value.message_id, refused.value.status) == (message.id, status)


def test_a_message_that_is_not_there_cannot_be_requeued(database: peewee.Database) -> None:
    with pytest.raises(MessageNotFound) as missing:
        outbox.requeue(4711)
    assert missing.value.message_id == 4711


def test_a_dead_text_is_not_requeued_into_a_closed_conversation_but_an_effect_is(
    conversation_in: ConversationIn,
) -> None:
    conversation = conversation_in(Stage.PAYMENT_SENT)
    enqueue(conversation, "pay, please")
    text = claimed().give_up("no")
    outbox.enqueue(conversation, "tell_the_boss")
    effect = claimed().give_up("no")
    record_payment(conversation.lead_id, "evt_1")
    with pytest.raises(ConversationClosed) as closed:
        outbox.requeue(text)
    assert (closed.value.conversation_id, closed.value.stage) == (conversation.id, Stage.COMPLETED)
    assert copy_of(text).status is MessageStatus.DEAD
    assert outbox.requeue(effect).status is MessageStatus.PENDING


def test_a_requeued_message_waits_for_the_newer_one_in_flight(conversation: CloseEngineConversation) -> None:
    enqueue(conversation, "older", "newer", "newest")
    older = claimed().give_up("no")
    newer = claimed()
    outbox.requeue(older)
    assert outbox.claim(limit=10) == []
    newer.sent()
    assert claimed().body == "older"


# -- races -------------------------------------------------------------------------------------------------------------


def opened(stage: Stage = Stage.QUALIFYING, level: AutonomyLevel = AutonomyLevel.FULL_AUTO) -> CloseEngineConversation:
    conversation = close_engine.open_conversation(new_lead(autonomy_level=level), EntryPoint.SMS_REPLY)
    return bring_to(conversation, stage)


def test_every_message_is_claimed_exactly_once_and_in_the_order_of_its_conversation(postgres: peewee.Database) -> None:
    conversations = [opened() for _ in range(12)]
    for number in range(8):
        for conversation in conversations:
            enqueue(conversation, str(number), trigger="stall" if number == 7 else None)

    sent: list[tuple[str, str | None]] = []  # by all of them, in the order in which they sent

    def work(worker: str) -> None:
        while OutboxMessage.select().where(OutboxMessage.status == MessageStatus.PENDING).exists():
            for message in outbox.claim(limit=3, worker=worker, lease=timedelta(days=1)):
                sent.append((message.conversation_id, message.body))
                message.sent(f"p{message.id}")

    assert race([lambda w=f"w{number}": work(w) for number in range(8)]) == [None] * 8
    assert sorted(sent) == sorted((c.id, str(number)) for c in conversations for number in range(8))
    for conversation in conversations:
        assert [body for id, body in sent if id == conversation.id] == [str(number) for number in range(8)]
        assert copy_of(conversation).stage is Stage.STALLED
    assert {message.attempts for message in messages()} == {1}
    assert_consistent()


def test_many_claimers_at_once_share_what_there_is(postgres: peewee.Database) -> None:
    for _ in range(40):
        enqueue(opened(), "hello", "again")
    # Claims wait for nobody, so nothing can hold them up: this holds however they overlap.
    results = race([lambda w=f"w{number}": outbox.claim(limit=10, worker=w) for number in range(8)])
    ids = [message.id for result in results for message in result]
    assert len(ids) == len(set(ids)) == 40
    assert {message.body for result in results for message in result} == {"hello"}
    assert_consistent()


def test_a_claim_passes_over_what_another_transaction_holds(postgres: peewee.Database, postgres_url: str) -> None:
    (held,) = enqueue(opened(), "held")
    enqueue(opened(), "free")
    other = psycopg2.connect(postgres_url)
    other.cursor().execute("SELECT 1 FROM close_engine.outbox WHERE id = %s FOR UPDATE", (held.id,))
    assert claimed().body == "free"
    other.rollback()
    other.close()
    assert claimed().body == "held"


def test_a_message_that_is_requeued_at_the_moment_of_a_claim_is_not_in_flight_beside_a_newer_one(
    postgres: peewee.Database, postgres_url: str
) -> None:
    conversation = opened()
    older, newer = enqueue(conversation, "older", "newer")
    claimed().give_up("no")
    # Another worker has claimed the newer one but not committed yet. Meanwhile the older one is requeued.
    other = psycopg2.connect(postgres_url)
    other.cursor().execute(
        "UPDATE close_engine.outbox SET leased_by = 'w2', attempts = 1, available_at = '2100-01-01' WHERE id = %s",
        (newer.id,),
    )
    outbox.requeue(older)
    claim = Running(outbox.claim)
    until_they_wait([claim], other.info.backend_pid)
    other.commit()
    other.close()
    assert claim.result() == []
    assert [message.leased_by for message in messages()] == [None, "w2"]


def test_requeuing_while_others_claim_keeps_one_message_in_flight(postgres: peewee.Database) -> None:
    conversations = [opened() for _ in range(4)]
    for conversation in conversations:
        enqueue(conversation, *"abcdef")

    def work(worker: str) -> None:
        for _ in range(30):
            for message in outbox.claim(limit=2, worker=worker):
                message.give_up("no") if message.attempts % 2 else message.retry("busy", after=timedelta(0))

    def requeue_all() -> None:
        for _ in range(30):
            for message in OutboxMessage.select().where(OutboxMessage.status == MessageStatus.DEAD):
                outbox.requeue(message)

    # This holds however they overlap; the test before this one forces the moment that matters.
    assert race([lambda: work("w1"), lambda: work("w2"), lambda: work("w3"), requeue_all]) == [None] * 4
    assert_consistent()


def test_one_id_of_the_provider_given_to_many_messages_at_once_is_had_by_one(postgres: peewee.Database) -> None:
    for _ in range(8):
        enqueue(opened(), "hello", trigger="start_building")
    claims = outbox.claim(limit=10)
    (taken,) = enqueue(opened(), "has it until it is taken back")
    results = race(
        [lambda m=message: m.sent("p1") for message in claims],
        behind=lambda: OutboxMessage.update(provider_id="p1").where(OutboxMessage.id == taken.id).execute(),
    )
    assert sorted(type(result).__name__ for result in results) == ["OutboxMessage"] + ["ProviderIdTaken"] * 7
    buildings = CloseEngineConversation.in_stages(Stage.BUILDING)
    assert buildings.count() == 1


def test_of_many_enqueued_under_one_key_at_once_there_is_one(postgres: peewee.Database) -> None:
    conversation = opened()
    results = race([lambda: enqueue(conversation.id, "hello", key="k")] * 8, behind=held(conversation))
    assert len({message.id for (message,) in results}) == 1


def test_the_order_of_ids_is_the_order_of_commits(postgres: peewee.Database, postgres_url: str) -> None:
    """A message cannot become visible after a later one was already claimed."""
    conversation = opened()
    first = psycopg2.connect(postgres_url)
    first.cursor().execute(
        "SELECT 1 FROM close_engine_conversations WHERE id = %s FOR NO KEY UPDATE", (conversation.id,)
    )
    later = Running(lambda: enqueue(conversation.id, "hello"))
    until_they_wait([later], first.info.backend_pid)
    assert messages() == []
    first.commit()
    first.close()
    assert bodies(later.result()) == ["hello"]
    assert bodies(messages()) == ["hello"]
