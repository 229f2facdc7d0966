"""Sending is paused and resumed: every worker sees it at its next claim, and nothing is lost or changes its order."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    CloseEngineConversation,
    EntryPoint,
    InvalidValue,
    MessageStatus,
    OutboxMessage,
    Pause,
    Stage,
    Worker,
    outbox,
    pause_sending,
    paused,
    resume_sending,
)
from close_engine.board import pipeline
from close_engine.database.fields import milliseconds
from close_engine.testing import FakeSender, MovableClock, new_lead
from tests.command_line import run
from tests.test_notices import waiting
from tests.waiting import Running, until, until_they_wait
from tests.workers import claimed, race, sql

ConversationIn = Callable[..., CloseEngineConversation]

MINUTE = timedelta(minutes=1)


@pytest.fixture
def conversation(conversation_in: ConversationIn) -> CloseEngineConversation:
    return conversation_in(Stage.QUALIFYING)


def seen(pauses: list[Pause]) -> list[tuple[str, str, str | None]]:
    return [(pause.topic, pause.reason, pause.paused_by) for pause in pauses]


def test_nothing_leaves_while_sending_is_paused_and_everything_in_order_after_it(
    conversation: CloseEngineConversation, fake_sender: FakeSender
) -> None:
    for text in ("one", "two"):
        outbox.enqueue(conversation, "SEND_MESSAGE", text)
    outbox.enqueue(conversation, "build_site", "three")
    pause_sending("the provider is down", by="dana")
    assert fake_sender.deliver() == 0
    assert outbox.claimable() == []
    assert outbox.due_in() is None
    assert not outbox.suspect_is_next()
    assert {(each.status, each.attempts, each.claims) for each in OutboxMessage.select()} == {
        (MessageStatus.PENDING, 0, 0)
    }
    (ended,) = resume_sending(by="ana")
    assert (ended.resumed_by, ended.resumed_at is not None) == ("ana", True)
    assert fake_sender.deliver() == 3
    texts = [each.body for each in fake_sender.sent if each.topic == "SEND_MESSAGE"]
    assert texts == ["one", "two"]


def test_a_topic_is_paused_and_its_lane_waits_behind_it(
    conversation: CloseEngineConversation, conversation_in: ConversationIn
) -> None:
    outbox.enqueue(conversation, "SEND_PREVIEW", "first")
    outbox.enqueue(conversation, "SEND_MESSAGE", "behind it")
    outbox.enqueue(conversation, "build_site", "another lane")
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "another conversation")
    pause_sending("the previews are broken", topics=["SEND_PREVIEW"])
    assert [each.body for each in outbox.claimable()] == ["another lane", "another conversation"]
    assert sorted(str(each.body) for each in outbox.claim(limit=10)) == ["another conversation", "another lane"]
    resume_sending(topics=["SEND_PREVIEW"])
    assert claimed().body == "first"


def test_what_is_in_flight_leaves_and_is_not_tried_again_until_then(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    outbox.enqueue(conversation, "SEND_MESSAGE", "in flight")
    outbox.enqueue(conversation, "build_site", "fails")
    (one, other) = sorted(outbox.claim(limit=2), key=lambda each: each.id)
    pause_sending("lunch")
    assert one.sent("SM1").status is MessageStatus.SENT
    other.retry("busy", after=MINUTE)
    close_engine_clock.move(2 * MINUTE)
    assert outbox.claim() == []
    resume_sending()
    assert claimed().id == other.id


def test_pausing_twice_goes_on_for_the_new_reason(database: peewee.Database, close_engine_clock: MovableClock) -> None:
    (first,) = pause_sending("the provider is slow", by="dana")
    since = milliseconds(close_engine_clock.now)
    close_engine_clock.move(MINUTE)
    (again,) = pause_sending("the provider is down", by="ana")
    assert (again.id, again.reason, again.paused_by, again.paused_at) == (
        first.id,
        "the provider is down",
        "ana",
        since,
    )
    assert len(resume_sending()) == 1
    assert resume_sending() == []
    assert paused() == []
    (anew,) = pause_sending("again")
    assert anew.id != first.id


def test_topics_and_everything_are_paused_apart(database: peewee.Database) -> None:
    pause_sending("previews are broken", topics=["SEND_PREVIEW", "build_site", "build_site"], by="dana")
    pause_sending("night", by="ana")
    assert seen(paused()) == [
        ("SEND_PREVIEW", "previews are broken", "dana"),
        ("build_site", "previews are broken", "dana"),
        ("", "night", "ana"),
    ]
    assert resume_sending(topics=["SEND_MESSAGE"]) == []
    assert seen(resume_sending(topics=["SEND_PREVIEW"])) == [("SEND_PREVIEW", "previews are broken", "dana")]
    assert [pause.topic for pause in resume_sending()] == ["build_site", ""]
    assert paused() == []


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"reason": " "}, "say why nothing is to be sent"),
        ({"reason": "night", "topics": []}, "it must be a list of at least one topic"),
        ({"reason": "night", "topics": "SEND_MESSAGE"}, "it must be a list of at least one topic"),
        ({"reason": "night", "topics": [""]}, "a topic must have a name"),
        ({"reason": "night", "by": ""}, "say who pauses"),
        ({"reason": "a\x00"}, "NUL"),
    ],
)
def test_what_makes_no_sense_is_refused(database: peewee.Database, given: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidValue, match=why):
        pause_sending(**given)
    assert paused() == []
    if "topics" in given:
        with pytest.raises(InvalidValue, match=why):
            resume_sending(topics=given["topics"])


def test_a_pause_that_is_rolled_back_never_was(conversation: CloseEngineConversation) -> None:
    outbox.enqueue(conversation, "SEND_MESSAGE", "hello")
    with close_engine.atomic() as transaction:
        pause_sending("night")
        assert outbox.claim() == []
        transaction.rollback()
    assert len(outbox.claim()) == 1


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"], indirect=True)
def test_two_who_pause_at_once_make_one_pause(database: peewee.Database, kind: str) -> None:
    outcomes = race([lambda: pause_sending("one"), lambda: pause_sending("two")])
    assert not [each for each in outcomes if isinstance(each, BaseException)]
    assert len(paused()) == 1


@pytest.mark.parametrize("kind", ["postgresql"], indirect=True)
def test_who_pauses_in_another_order_waits_and_is_no_deadlock(database: peewee.Database, kind: str) -> None:
    with close_engine.atomic():
        pause_sending("one", topics=["b"])
        others = [Running(lambda: pause_sending("two", topics=["a", "b"])), Running(resume_sending)]
        until_they_wait(others)
        pause_sending("one", topics=["a"])
    assert not [each for other in others if isinstance(each := other.result(), BaseException)]


def test_it_is_shown_wherever_the_outbox_is(
    conversation: CloseEngineConversation, database_url: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "sqlite-memory":
        pause_sending("the provider is down", by="dana")
        assert seen(pipeline().outbox.paused) == [("", "the provider is down", "dana")]
        return
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", database_url)
    outbox.enqueue(conversation, "SEND_MESSAGE", "hello")
    assert run("resume-sending").out == "Pauses ended: 0.\n"
    done = run("pause", "the provider\x1b[2J is down", "--by", "dana")
    assert done.code == 0
    sentence = "PAUSED: nothing is sent since "
    assert done.out.startswith(sentence)
    assert done.out.endswith("UTC, says dana: the provider\\x1b[2J is down\n")
    run("pause", "broken", "--topic", "SEND_PREVIEW", "--topic", "build_site")
    for command in (("board", "--once"), ("outbox",), ("worker", "--print")):
        shown = run(*command).out
        assert sentence in shown, command
        assert "PAUSED: build_site is not sent since " in shown, command
        assert "hello" not in shown, command
    left = run("resume-sending", "--topic", "SEND_PREVIEW", "--topic", "build_site", "--by", "ana").out
    assert left.startswith(f"Pauses ended: 2.\n{sentence}")
    assert run("resume-sending").out == "Pauses ended: 1.\n"
    assert "PAUSED" not in run("outbox").out
    assert "hello" in run("worker", "--print").out
    assert run("pause", " ").code == 1


def test_a_worker_logs_a_change_once(
    conversation: CloseEngineConversation, fake_sender: FakeSender, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "close_engine.worker")
    outbox.enqueue(conversation, "SEND_MESSAGE", "hello")
    pause_sending("night", by="dana")
    looks = []

    class Looking(Worker):
        def pause(self, seconds: float | None = None) -> None:
            looks.append(outbox.claimable())
            if len(looks) == 3:
                pause_sending("day")
            if len(looks) == 5:
                resume_sending()
            if len(looks) > 7:
                self.stop()

    database = close_engine.database.binding.current().database
    with database.atomic():  # so that it works in this thread
        Looking(fake_sender, name="w", concurrency=1, sweep=None).run()
    told = [line for line in caplog.messages if line.startswith(("paused", "resumed", "sent"))]
    assert [line.partition(" ")[0] for line in told] == ["paused", "paused", "sent", "resumed"]
    assert "says dana: night" in told[0]
    assert told[1].endswith(": day'")


def test_workers_wake_when_sending_is_resumed(postgres: peewee.Database) -> None:
    """They would not look for a day otherwise. Whoever resumes."""
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    for resume in (resume_sending, lambda: sql("DELETE FROM {pauses}")):
        pause_sending("night")
        outbox.enqueue(conversation, "other", "one")
        with waiting() as it:
            until(lambda: [line for line in it.log if line.startswith("paused")], "it has looked")
            resume()
            it.until_sent("one")


def test_a_backlog_that_is_paused_is_not_read(postgres: peewee.Database) -> None:
    """All of it: a claim that finds nothing looks at nothing. The plan is the one of the function."""
    sql("INSERT INTO {pauses} (topic, reason, paused_at) VALUES ('', 'night', now())")
    sql(
        "INSERT INTO {outbox} (conversation_id, topic, created_at, available_at) "
        "SELECT 'c' || n, 'build_site', now(), now() - interval '1 hour' FROM generate_series(1, 5000) n"
    )
    sql("ANALYZE close_engine.outbox")
    before = read_rows()
    assert outbox.claim() == []
    assert read_rows() - before < 100


def read_rows() -> int:
    """How many rows and index entries of the outbox this session has read."""
    sql("SELECT pg_stat_force_next_flush()")
    ((count,),) = sql(
        "SELECT (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE relname = 'outbox') + seq_tup_read "
        "FROM pg_stat_user_tables WHERE relname = 'outbox' AND schemaname = 'close_engine'"
    )
    return int(count)
