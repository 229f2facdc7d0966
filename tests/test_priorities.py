"""What is urgent leaves first, within the order of its lane, however long the backlog is."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import peewee
import pytest

from close_engine import (
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    InvalidValue,
    OutboxMessage,
    PendingAction,
    Stage,
    outbox,
    pause_sending,
    resume_sending,
    submit,
)
from close_engine.testing import FakeSender, MovableClock
from tests.foreign import ForeignWriter
from tests.test_pauses import read_rows
from tests.workers import LINK, claimed, messages, race, sql

ConversationIn = Callable[..., CloseEngineConversation]

MINUTE = timedelta(minutes=1)
MESSAGE, LINK_TYPE = ActionType.SEND_MESSAGE, ActionType.SEND_PAYMENT_LINK


def order(limit: int = 1, **options: Any) -> list[str]:
    """In which order everything is claimed and sent."""
    sent: list[str] = []
    while found := outbox.claim(limit=limit, **options):
        sent += [str(message.sent().body) for message in found]
    return sent


def put(conversation: CloseEngineConversation, body: str, topic: str = "SEND_MESSAGE", **options: Any) -> OutboxMessage:
    return outbox.enqueue(conversation, topic, body, **options)


@pytest.mark.parametrize("limit", [1, 3, 10])
def test_what_is_more_urgent_leaves_first(conversation_in: ConversationIn, limit: int) -> None:
    for body, priority in {"n1": 0, "n2": None, "u5": 5, "u1": 1, "u5 too": 5, "u9": 9}.items():
        put(conversation_in(Stage.QUALIFYING), body, priority=priority)
    assert [message.body for message in outbox.claimable()] == ["u9", "u5", "u5 too", "u1", "n1", "n2"]
    assert order(limit) == ["u9", "u5", "u5 too", "u1", "n1", "n2"]


def test_a_payment_link_is_more_urgent_than_nudges_by_default(conversation_in: ConversationIn) -> None:
    for n in range(3):
        put(conversation_in(Stage.QUALIFYING), f"nudge {n}")
    previewed = conversation_in(Stage.PREVIEW_SENT)
    submit(previewed, LINK_TYPE, "pay here", metadata={"paymentUrl": LINK})
    assert order()[0] == "pay here"
    assert outbox.PRIORITIES == {"SEND_PAYMENT_LINK": 5}


def test_within_a_lane_the_older_one_leaves_first_and_is_lifted(conversation_in: ConversationIn) -> None:
    """What is urgent cannot overtake the texts before it, but they do not wait in the backlog of other leads."""
    lifted, other = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    put(other, "someone else's")
    put(lifted, "first")
    put(lifted, "another lane", topic="build_site")
    put(lifted, "second")
    put(lifted, "urgent", priority=9)
    put(lifted, "urgent, too", priority=9)
    put(lifted, "last")
    assert [message.release().body for message in outbox.claim(limit=10)] == ["someone else's", "first", "another lane"]
    assert order() == ["first", "second", "urgent", "urgent, too", "someone else's", "another lane", "last"]


def test_what_is_urgent_and_not_due_lifts_nothing(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    first, second = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    put(first, "one")
    put(second, "two")
    put(second, "tomorrow", priority=9, send_after=timedelta(days=1))
    assert order() == ["one", "two"]
    put(first, "three")
    close_engine_clock.move(timedelta(days=1))
    assert order() == ["tomorrow", "three"]


def test_what_is_urgent_and_cannot_be_claimed_holds_up_nobody(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    put(conversation, "retried")
    claimed().retry("busy", after=timedelta(hours=1))
    put(conversation, "behind it", priority=9)
    put(conversation, "paused", topic="build_site", priority=8)
    put(conversation, "not of this worker", topic="draft", priority=7)
    put(conversation_in(Stage.QUALIFYING), "normal")
    pause_sending("broken", topics=["build_site"])
    assert order(topics=["SEND_MESSAGE", "build_site"]) == ["normal"]
    pause_sending("night")
    assert outbox.claim() == []
    resume_sending()
    assert order() == ["paused", "not of this worker"]
    close_engine_clock.move(timedelta(hours=1))
    assert order() == ["retried", "behind it"]


def test_a_suspect_is_claimed_alone_whatever_its_priority(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    put(conversation_in(Stage.QUALIFYING), "normal")
    put(conversation_in(Stage.QUALIFYING), "poison", priority=3)
    assert claimed(lease=MINUTE).body == "poison"
    close_engine_clock.move(2 * MINUTE)
    assert outbox.suspect_is_next()
    assert [message.body for message in outbox.claim(limit=10, suspects=False)] == ["normal"]
    assert [message.body for message in outbox.claim(limit=10)] == ["poison"]


def test_what_may_not_leave_is_withdrawn_and_the_rest_goes_on(conversation_in: ConversationIn) -> None:
    over = put(conversation_in(Stage.QUALIFYING), "too late", priority=9, not_after=-MINUTE)
    put(conversation_in(Stage.QUALIFYING), "normal")
    assert order() == ["normal"]
    assert OutboxMessage.get_by_id(over.id).last_error == "it could not leave in time"


def test_a_priority_of_another_writer_stops_nobody(conversation_in: ConversationIn, database: peewee.Database) -> None:
    """Whatever it is: the highest number of the column, and on SQLite no number at all."""
    for n in range(4):
        put(conversation_in(Stage.QUALIFYING), f"text {n}", priority=n)
    sql("UPDATE {outbox} SET priority = 2147483647 WHERE body = 'text 0'")
    if isinstance(database, peewee.SqliteDatabase):
        sql("UPDATE {outbox} SET priority = 'high' WHERE body = 'text 1'")
        assert order() == ["text 0", "text 3", "text 2"]
        assert "cannot be read" in sql("SELECT last_error FROM {outbox} WHERE body = 'text 1'")[0][0]
    else:
        sql("UPDATE {outbox} SET priority = -2147483648 WHERE body = 'text 1'")
        assert order() == ["text 0", "text 3", "text 2", "text 1"]


def test_a_snoozed_or_requeued_message_keeps_it(conversation_in: ConversationIn) -> None:
    put(conversation_in(Stage.QUALIFYING), "urgent", priority=9)
    claimed().snooze(timedelta(0))
    message = claimed()
    assert message.priority == 9
    message.give_up("no")
    assert outbox.requeue(message).priority == 9


@pytest.mark.parametrize("priority", [-1, 10, 1.0, True, "high"])
def test_a_priority_that_makes_no_sense_is_refused(conversation_in: ConversationIn, priority: Any) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    for act in (put, lambda one, text, **given: submit(one, MESSAGE, text, **given)):
        with pytest.raises(InvalidValue, match=r"priority cannot be .*: it must be a whole number from 0 to 9"):
            act(conversation, "hello", priority=priority)
    assert messages() == []


# -- approvals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "kept"), [(7, 7), (0, 0), (None, 0)])
def test_an_approved_draft_keeps_it(conversation_in: ConversationIn, given: int | None, kept: int) -> None:
    conversation = conversation_in(Stage.QUALIFYING, autonomy_level=AutonomyLevel.MANUAL)
    action = submit(conversation, MESSAGE, "hello", priority=given)
    assert isinstance(action, PendingAction)
    assert action.approve(by="dana").priority == kept


@pytest.mark.parametrize(("given", "kept"), [(None, 5), (0, 0), (9, 9)])
def test_an_approved_payment_link_is_as_urgent_as_another(
    conversation_in: ConversationIn, given: int | None, kept: int
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.SEMI_AUTO)
    action = submit(conversation, LINK_TYPE, "pay", metadata={"paymentUrl": LINK}, priority=given)
    assert isinstance(action, PendingAction)
    assert action.approve(by="dana").priority == kept


@pytest.mark.parametrize(
    ("metadata", "kept"),
    [
        ('{"sendPriority": 3}', 3),
        ('{"sendPriority": "high"}', 0),
        ('{"sendPriority": 10}', 0),
        ('{"sendPriority": -1}', 0),
        ('{"sendPriority": 1.5}', 0),
        ('{"sendPriority": [1]}', 0),
        ('{"sendPriority": null}', 0),
        (None, 0),
    ],
)
def test_the_crm_may_say_it_and_what_makes_no_sense_hinders_nothing(
    foreign: ForeignWriter, metadata: str | None, kept: int
) -> None:
    foreign.run(
        "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message, metadata) "
        "VALUES ('a1', %s, 'lead', 'SEND_MESSAGE', 'hello', %s)",
        foreign.insert("QUALIFYING"),
        metadata,
    )
    foreign.run("UPDATE pending_actions SET status = 'APPROVED', approved_by = 'dana' WHERE id = 'a1'")
    assert [message.priority for message in messages()] == [kept]


@pytest.mark.parametrize(("given", "kept"), [(None, None), (0, None), (7, 7)])
def test_a_text_that_a_human_must_see_first_keeps_it(
    conversation_in: ConversationIn, given: int | None, kept: int | None
) -> None:
    submit(conversation_in(Stage.QUALIFYING), MESSAGE, "hello", priority=given)
    sql("UPDATE leads SET autonomy_level = 'MANUAL'")
    assert outbox.claim() == []
    action = PendingAction.get()
    assert action.metadata.get("sendPriority") == kept
    assert action.approve(by="dana").priority == (kept or 0)


def test_a_link_that_a_human_must_see_first_keeps_it(conversation_in: ConversationIn) -> None:
    for given, kept in ((None, None), (0, 0)):
        conversation = conversation_in(Stage.PREVIEW_SENT)
        submit(conversation, LINK_TYPE, "pay", metadata={"paymentUrl": LINK}, priority=given)
        sql(f"UPDATE leads SET autonomy_level = 'SEMI_AUTO' WHERE id = '{conversation.lead_id}'")
        assert outbox.claim() == []
        action = PendingAction.get(PendingAction.conversation_id == conversation.id)
        assert action.metadata.get("sendPriority") == kept
        assert action.approve(by="dana").priority == (5 if given is None else 0)
        claimed().sent()


# -- at once, and with a long backlog ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"], indirect=True)
def test_workers_that_claim_at_once_claim_each_message_once(conversation_in: ConversationIn, kind: str) -> None:
    for n in range(4):
        conversation = conversation_in(Stage.QUALIFYING)
        for _ in range(2):
            put(conversation, f"urgent {n}", priority=n % 3)
    found = race([lambda name=name: outbox.claim(limit=2, worker=name) for name in ("a", "b", "c", "d")])
    ids = [message.id for batch in found for message in batch]
    assert len(ids) == len(set(ids)) == 4


def test_a_worker_sends_by_priority(conversation_in: ConversationIn, fake_sender: FakeSender) -> None:
    for n in range(3):
        put(conversation_in(Stage.QUALIFYING), f"nudge {n}")
    put(conversation_in(Stage.QUALIFYING), "urgent", priority=1)
    fake_sender.deliver()
    assert [message.body for message in fake_sender.sent] == ["urgent", "nudge 0", "nudge 1", "nudge 2"]


BACKLOG = """
    INSERT INTO {{outbox}} (conversation_id, topic, body, priority, created_at, available_at)
    SELECT '{what}' || n, 'build_site', '{what}', {priority}, now(), now() + {when} + interval '1 ms' * n
    FROM generate_series(1, 20000) n
"""


def test_a_long_backlog_is_neither_read_nor_sorted(postgres: peewee.Database) -> None:
    """Whether it is due or not, urgent or not."""
    due, later = "interval '-1 hour'", "interval '1 day'"
    for what, priority, when in (("due", 0, due), ("later", 0, later), ("urgent", 5, due), ("urgent later", 9, later)):
        sql(BACKLOG.format(what=what, priority=priority, when=when))
    sql("ANALYZE close_engine.outbox")
    outbox.claim()
    for _ in range(3):
        before = read_rows()
        (message,) = outbox.claim()
        assert message.body == "urgent"
        assert read_rows() - before < 100
    sql("UPDATE {outbox} SET status = 'SENT' WHERE body = 'urgent'")
    sql("VACUUM ANALYZE close_engine.outbox")
    outbox.claim()
    for _ in range(3):
        before = read_rows()
        (message,) = outbox.claim()
        assert message.body == "due"
        assert read_rows() - before < 100
