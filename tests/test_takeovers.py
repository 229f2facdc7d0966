"""A human leads a conversation: nobody else's drafts are let in, and the human's own leave at once."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import peewee
import pytest

import close_engine
from close_engine import (
    ActionStatus,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    ConversationClosed,
    ConversationNotFound,
    ConversationTakenOver,
    InvalidValue,
    MessageStatus,
    PendingAction,
    Stage,
    StageConflict,
    outbox,
    receive,
    submit,
)
from close_engine.board import pipeline
from close_engine.testing import MovableClock
from tests.command_line import run
from tests.foreign import ForeignWriter
from tests.rows import copy_of
from tests.workers import LINK, messages, race

ConversationIn = Callable[..., CloseEngineConversation]

HOUR = timedelta(hours=1)
MESSAGE = ActionType.SEND_MESSAGE


def test_the_drafts_of_others_are_refused_and_what_waits_of_theirs_is_withdrawn(
    conversation_in: ConversationIn,
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    waiting = submit(conversation, MESSAGE, "Hello from the AI!", actor="ai")
    action = submit(conversation, MESSAGE, "And more", actor="ai", policy=lambda level, type: True)
    being_drafted = copy_of(conversation)
    taken = conversation.take_over(by="dana")
    assert (taken.taken_by, taken.until, taken.conversation_id) == ("dana", None, conversation.id)
    message = outbox.OutboxMessage.get_by_id(waiting.id)
    assert (message.status, message.last_error) == (MessageStatus.WITHDRAWN, "a human has taken over")
    assert PendingAction.get_by_id(action.id).status is ActionStatus.EXPIRED
    for actor in ("ai", None, "Dana"):
        with pytest.raises(ConversationTakenOver) as refused:
            submit(conversation, MESSAGE, "Hello", actor=actor)
        assert (refused.value.conversation_id, refused.value.taken_by) == (conversation.id, "dana")
        with pytest.raises(ConversationTakenOver):
            outbox.enqueue(conversation, MESSAGE, "Hello", submitted_by=actor)
    assert outbox.enqueue(conversation, "build_site").status is MessageStatus.PENDING
    conversation.hand_back(by="dana")
    with pytest.raises(StageConflict):
        submit(being_drafted, MESSAGE, "As I said", actor="ai")
    assert submit(conversation, MESSAGE, "Back again", actor="ai").status is MessageStatus.PENDING


@pytest.mark.parametrize("level", list(AutonomyLevel))
def test_what_the_human_submits_leaves_at_once_and_is_seen_by_a_human(
    conversation_in: ConversationIn, level: AutonomyLevel
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=level)
    conversation.take_over(by="dana")
    first = submit(conversation, MESSAGE, "Dana here.", actor="dana", key="k")
    assert isinstance(first, outbox.OutboxMessage)
    assert (first.approved_by, first.submitted_by) == ("dana", "dana")
    assert PendingAction.get_by_id(first.action_id).status is ActionStatus.APPROVED
    again = submit(copy_of(conversation), MESSAGE, "Dana here.", actor="dana", key="k")
    assert again == PendingAction.get_by_id(first.action_id)
    link = submit(conversation, ActionType.SEND_PAYMENT_LINK, "Pay", metadata={"paymentUrl": LINK}, actor="dana")
    assert copy_of(conversation).stage is Stage.PREVIEW_SENT
    for message in (first, link):
        (claimed,) = outbox.claim()
        assert claimed.id == message.id
        claimed.sent()
    assert copy_of(conversation).stage is Stage.PAYMENT_SENT


def test_a_payment_link_of_somebody_else_leaves_pending_approval(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.MANUAL)
    submit(conversation, ActionType.SEND_PAYMENT_LINK, "Pay", metadata={"paymentUrl": LINK}, actor="ai")
    conversation.take_over(by="dana")
    assert conversation.stage is copy_of(conversation).stage is Stage.PREVIEW_SENT
    conversation.request_edits()


def test_a_text_that_is_in_flight_or_was_put_in_by_others_does_not_leave(
    conversation_in: ConversationIn, foreign: ForeignWriter, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    submit(conversation, MESSAGE, "Hello", actor="ai")
    (message,) = outbox.claim()
    conversation.take_over(by="dana")
    message.retry("503")
    foreign.run(
        "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message) VALUES (%s, %s, %s, %s, %s)",
        "a1",
        conversation.id,
        conversation.lead_id,
        "SEND_MESSAGE",
        "from the CRM",
    )
    foreign.run("UPDATE pending_actions SET status = 'APPROVED', approved_by = 'robot' WHERE id = 'a1'")
    close_engine_clock.move(HOUR)
    assert outbox.claim(10) == outbox.claim(10) == []
    assert [(each.status, each.last_error) for each in messages(conversation)] == [
        (MessageStatus.WITHDRAWN, "a human has taken over")
    ] * 2


def test_the_lead_is_answered_by_the_human(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.take_over(by="dana")
    received = receive(conversation.lead_id, "SM1", "Hello?")
    assert (received.answer, received.taken_over_by) == (False, "dana")
    copy_of(conversation).hand_back(by="dana")
    received = receive(conversation.lead_id, "SM2", "Hello?")
    assert (received.answer, received.taken_over_by) == (True, None)


def test_it_ends_by_itself_when_its_time_is_up(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    taken = conversation.take_over(by="dana", until=2 * HOUR)
    assert taken.until == taken.taken_at + 2 * HOUR
    close_engine_clock.move(HOUR)
    assert pipeline().taken_over == 1
    assert conversation.take_over(by="dana", until=2 * HOUR).id == taken.id
    close_engine_clock.move(2 * HOUR)
    assert conversation.takeover() is None
    assert pipeline().taken_over == 0
    submit(copy_of(conversation), MESSAGE, "Back again", actor="ai")
    assert conversation.take_over(by="lee").taken_by == "lee"
    assert [(each.taken_by, each.handed_back_by) for each in close_engine.Takeover.select()] == [
        ("dana", None),
        ("lee", None),
    ]


def test_what_makes_no_sense_is_refused(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.take_over(by="dana")
    with pytest.raises(ConversationTakenOver, match="dana"):
        copy_of(conversation).take_over(by="lee")
    for by in ("", " ", "a\x00"):
        with pytest.raises(InvalidValue):
            conversation.take_over(by=by)
        with pytest.raises(InvalidValue):
            conversation.hand_back(by=by)
    with pytest.raises(InvalidValue):
        conversation.take_over(by="dana", until=datetime(2030, 1, 1))
    with pytest.raises(ConversationClosed):
        conversation_in(Stage.CLOSED_LOST).take_over()
    conversation.hand_back()
    conversation.hand_back()
    CloseEngineConversation.delete().where(CloseEngineConversation.id == conversation.id).execute()
    for change in (conversation.take_over, conversation.hand_back):
        with pytest.raises(ConversationNotFound):
            change()


def test_of_many_who_take_it_over_at_once_one_has_it(postgres: peewee.Database) -> None:
    from tests.test_inbox import opened

    conversation = opened(Stage.QUALIFYING)
    takers = [lambda n=number: copy_of(conversation).take_over(by=f"human {n}") for number in range(6)]
    results = race(takers)
    assert sorted(isinstance(result, ConversationTakenOver) for result in results) == [False] + [True] * 5


def test_sweeps_leave_it_alone(conversation_in: ConversationIn, close_engine_clock: MovableClock) -> None:
    silent, stalled, unanswered = (
        conversation_in(stage) for stage in (Stage.QUALIFYING, Stage.STALLED, Stage.BUILDING)
    )
    receive(unanswered.lead_id, "SM1", "Hello?")
    for conversation in (silent, stalled, unanswered):
        copy_of(conversation).take_over(by="dana", until=100 * 24 * HOUR)
    close_engine_clock.move(99 * 24 * HOUR)
    swept = close_engine.sweep(lose_unanswered_after=HOUR)
    assert (swept.stalled, swept.lost) == ([], [])
    close_engine_clock.move(2 * 24 * HOUR)
    swept = close_engine.sweep(lose_unanswered_after=HOUR)
    assert (swept.stalled, sorted(swept.lost)) == ([silent.id], sorted([stalled.id, unanswered.id]))


@pytest.mark.parametrize("kind", ["sqlite-file"], indirect=True)
def test_who_shows_it_sees_why(
    kind: str, conversation_in: ConversationIn, database_url: str, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.take_over(by="dana", reason="they ask\nfor a human")
    taken = conversation.take_over(by="dana", until=HOUR)  # the reason stays
    assert taken.reason == "they ask\nfor a human"
    assert conversation.take_over(by="dana", reason="they are angry").reason == "they are angry"
    with pytest.raises(InvalidValue):
        conversation.take_over(by="dana", reason="\0")
    close_engine_clock.let_go()
    shown = run("--database", database_url, "show", conversation.id).out
    assert "taken_over" in shown
    assert "they are angry" in shown
