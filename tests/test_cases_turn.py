"""Whose turn it is, stalling and resuming, and sweeps: inputs that once failed, by the number of their case.

Each runs on every database, and has a variant: another writer, table or stage.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import peewee
import pytest

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    ConversationNotFound,
    EntryPoint,
    InboxEntry,
    InvalidValue,
    Stage,
    StageConflict,
    lose_stalled,
    lose_unanswered,
    outbox,
    receive,
    stall_silent,
    submit,
    sweep,
    waiting_for_us,
)
from close_engine.board import WaitingLine, pipeline
from close_engine.database.binding import moment
from close_engine.testing import MovableClock, bring_to, new_lead
from tests.foreign import ForeignWriter
from tests.rows import copy_of, triggers
from tests.waiting import Running, until_they_wait
from tests.workers import claimed, race, sql

ConversationIn = Callable[..., CloseEngineConversation]

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
THREE_DAYS = timedelta(hours=72)
WEEK = timedelta(days=7)


def turn(conversation: CloseEngineConversation) -> list[str]:
    """Return whose turn it is in a conversation: `stall` for the lead's, `answer` for ours; nothing for nobody's."""
    rows = sql(
        "SELECT \"trigger\" FROM {deadlines} WHERE \"trigger\" IN ('stall', 'answer') AND subject_id = %s",
        conversation.id,
    )
    return [trigger for (trigger,) in rows]


def waiting(longer_than: timedelta = timedelta(0)) -> list[str]:
    return [conversation.id for conversation in waiting_for_us(longer_than)]


# -- C1: the owner was silent, and the lead is lost --------------------------------------------------------------------


def test_c1_nobody_is_lost_because_we_were_silent(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    """C1: the lead wrote, the draft waits for its owner, and the sweeps come by for weeks."""
    conversation = conversation_in(Stage.QUALIFYING, autonomy_level=AutonomyLevel.MANUAL)
    received = receive(conversation.lead_id, "SM1", "I want to buy!")
    assert received.conversation is not None
    submit(received.conversation, ActionType.SEND_MESSAGE, "Great!", expires_after=None)
    for passed in (THREE_DAYS + HOUR, WEEK + DAY, timedelta(days=365)):
        close_engine_clock.move(passed)
        swept = sweep()
        assert (swept.stalled, swept.lost) == ([], [])
    assert copy_of(conversation).stage is Stage.QUALIFYING
    assert waiting() == [conversation.id]


def test_c1_what_was_stalled_by_hand_while_it_was_our_turn_is_not_lost(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    """C1, for a conversation that somebody stalled: that is allowed, but it is still we who are silent."""
    conversation, other = conversation_in(Stage.BUILDING), conversation_in(Stage.BUILDING)
    receive(conversation.lead_id, "SM1", "how is it going?")
    for each in (conversation, other):
        copy_of(each).stall()
    close_engine_clock.move(WEEK + HOUR)
    assert waiting() == [conversation.id]
    assert lose_stalled() == [other.id]
    copy_of(conversation).resume()
    assert turn(conversation) == ["answer"]
    outbox.enqueue(conversation.id, "SEND_MESSAGE", "It is done.")
    claimed().sent("p1")
    close_engine_clock.move(THREE_DAYS)
    assert stall_silent() == [conversation.id]
    close_engine_clock.move(WEEK)
    assert lose_stalled() == [conversation.id]


@pytest.mark.parametrize("topic", list(ActionType))
def test_c1_a_text_of_ours_makes_it_the_leads_turn(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, topic: ActionType
) -> None:
    """C1, the other way round: once we have answered, the lead's silence counts, to the millisecond."""
    conversation = conversation_in(Stage.EDIT_LOOP)
    receive(conversation.lead_id, "SM1", "well?")
    close_engine_clock.move(DAY)
    outbox.enqueue(conversation.id, topic, "Here it is.")
    assert turn(conversation) == ["answer"]
    claimed().sent("p1")
    assert turn(conversation) == ["stall"]
    close_engine_clock.move(THREE_DAYS - timedelta(milliseconds=1))
    assert stall_silent() == []
    close_engine_clock.move(timedelta(milliseconds=1))
    assert stall_silent() == [conversation.id]


def test_c1_another_effect_is_no_answer(conversation_in: ConversationIn) -> None:
    """C1, for what the outbox holds beside texts: the lead sees nothing of it."""
    conversation = conversation_in(Stage.BUILDING)
    receive(conversation.lead_id, "SM1", "well?")
    outbox.enqueue(conversation.id, "build_site")
    claimed().sent("p1")
    assert turn(conversation) == ["answer"]


def test_c1_a_stage_change_alone_is_no_text(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, database: peewee.Database
) -> None:
    """C1, for stages: they neither answer the lead nor prolong the silence."""
    silent, ours = conversation_in(Stage.INITIATED), conversation_in(Stage.INITIATED)
    receive(ours.lead_id, "SM1", "hello?")
    for conversation in (silent, copy_of(ours)):
        close_engine_clock.move(DAY)
        for trigger in ("start_qualifying", "start_building", "send_preview"):
            conversation.fire(trigger)
    assert (turn(silent), turn(ours)) == (["stall"], ["answer"])
    close_engine_clock.move(THREE_DAYS - 2 * DAY)
    assert stall_silent() == [silent.id]


def test_c1_whoever_marks_a_text_sent(foreign: ForeignWriter, conversation_in: ConversationIn) -> None:
    """C1, for another worker that writes SQL: it is the lead's turn from then on, and from when it was first sent."""
    conversation = conversation_in(Stage.QUALIFYING)
    receive(conversation.lead_id, "SM1", "hello?")
    asked = foreign.deadlines("answer")[conversation.id]
    message = outbox.enqueue(conversation.id, "SEND_MESSAGE", "Hi!")
    foreign.run("UPDATE close_engine.outbox SET leased_by = 'a script' WHERE id = %s", message.id)
    assert foreign.deadlines("answer") == {conversation.id: asked}
    foreign.run("UPDATE close_engine.outbox SET status = 'SENT' WHERE id = %s", message.id)
    since = foreign.deadlines("stall")
    assert foreign.deadlines("answer") == {}
    assert since[conversation.id] >= asked
    foreign.run("UPDATE close_engine.outbox SET status = 'SENT', provider_id = 'p1' WHERE id = %s", message.id)
    assert foreign.deadlines("stall") == since


def test_c1_whoever_moves_the_stage(foreign: ForeignWriter, conversation_in: ConversationIn) -> None:
    """C1, for a writer that knows nothing of turns: stalling keeps ours, closing ends it, reopening is the lead's."""
    conversation = conversation_in(Stage.QUALIFYING)
    assert turn(conversation) == ["stall"]
    receive(conversation.lead_id, "SM1", "hello?")
    for stage, expected in (
        ("BUILDING", ["answer"]),
        ("STALLED", ["answer"]),
        ("BUILDING", ["answer"]),
        ("CLOSED_LOST", []),
        ("INITIATED", ["stall"]),
        ("STALLED", []),
        ("INITIATED", ["stall"]),
    ):
        foreign.update(conversation.id, stage=stage)
        assert turn(conversation) == expected, stage
    receive(conversation.lead_id, "SM2", "hello?")
    foreign.run("DELETE FROM close_engine_conversations WHERE id = %s", conversation.id)
    assert turn(conversation) == []


def test_c1_the_lead_waits_since_the_first_text_that_is_not_answered(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    """C1, for the board: who asks again has not waited less."""
    first, second = conversation_in(Stage.QUALIFYING), conversation_in(Stage.STALLED)
    conversation_in(Stage.QUALIFYING)
    for number in range(3):
        receive(first.lead_id, f"SM{number}", "hello?")
        close_engine_clock.move(DAY)
    receive(second.lead_id, "SM9", "I am back")
    close_engine_clock.move(HOUR)
    assert waiting() == [first.id, second.id]
    assert waiting(timedelta(days=3, hours=1)) == waiting(HOUR * 2) == [first.id]
    assert waiting(timedelta(days=3, hours=2)) == []
    assert waiting_for_us().count() == 2
    assert pipeline().waiting_for_us == WaitingLine(2, timedelta(days=3, hours=1))


def test_c1_who_says_that_no_reply_is_needed_is_written_down(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    """C1, for a text that needs no answer: the silence counts from when somebody says so, and who and why stays."""
    conversation = conversation_in(Stage.QUALIFYING)
    receive(conversation.lead_id, "SM1", "Thanks!")
    receive(conversation.lead_id, "SM2", "And bye!")
    close_engine_clock.move(DAY)
    conversation = copy_of(conversation)
    conversation.no_reply("they said goodbye", actor="dana")
    assert (turn(conversation), waiting()) == (["stall"], [])
    conversation.no_reply("they said goodbye", actor="eve")  # nothing is asked any more
    said = [(entry.key, entry.no_reply_reason, entry.no_reply_by) for entry in InboxEntry.select()]
    assert sorted(said) == [("SM1", None, None), ("SM2", "they said goodbye", "dana")]
    close_engine_clock.move(THREE_DAYS)
    assert stall_silent() == [conversation.id]
    assert triggers(conversation)[-1] == "stall"


def test_c1_no_reply_is_not_said_of_words_that_nobody_has_read(conversation_in: ConversationIn) -> None:
    """C1, for a lead who writes again meanwhile: what was decided before is a conflict."""
    conversation = conversation_in(Stage.QUALIFYING)
    receive(conversation.lead_id, "SM1", "Thanks!")
    conversation = copy_of(conversation)
    receive(conversation.lead_id, "SM2", "I want to buy!")
    with pytest.raises(StageConflict):
        conversation.no_reply("they only said thanks")
    assert turn(conversation) == ["answer"]
    conversation.reload()
    for reason in ("", " \n"):
        with pytest.raises(InvalidValue, match="a reason must be given"):
            conversation.no_reply(reason)
    with pytest.raises(InvalidValue):
        conversation.no_reply("they said thanks", actor="a\x00")
    CloseEngineConversation.delete_by_id(conversation.id)
    with pytest.raises(ConversationNotFound):
        conversation.no_reply("they are gone")


def test_c1_what_waits_for_us_for_too_long_is_closed_if_that_is_wanted(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    """C1, for what nobody will ever answer: an option of the sweep closes it, stalled or not."""
    active, stalled = conversation_in(Stage.PAYMENT_SENT), conversation_in(Stage.BUILDING)
    answered, closed = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    for conversation in (active, stalled, answered, closed):
        receive(conversation.lead_id, f"SM {conversation.id}", "hello?")
    copy_of(stalled).stall()
    copy_of(answered).no_reply("they are fine")
    copy_of(closed).close_lost("a competitor")
    close_engine_clock.move(timedelta(days=29, hours=23))
    assert lose_unanswered() == []
    close_engine_clock.move(HOUR)
    assert sweep().lost == []
    assert sorted(sweep(lose_unanswered_after=timedelta(days=30)).lost) == sorted([active.id, stalled.id])
    for conversation in (active, stalled):
        change = copy_of(conversation).history()[-1]
        assert (change.trigger, change.actor, change.reason) == (
            "close_lost",
            "sweep",
            "the lead's last words were not answered",
        )
        assert turn(conversation) == []
    with pytest.raises(InvalidValue, match="a reason must be given"):
        lose_unanswered(reason=" ")


def test_c1_of_a_text_that_comes_while_ours_is_marked_sent_nothing_is_lost(postgres: peewee.Database) -> None:
    """C1, for both at once: whichever is later has its turn, and there is exactly one."""
    conversation = bring_to(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.QUALIFYING)
    for number in range(20):
        message = outbox.enqueue(conversation.id, "SEND_MESSAGE", f"text {number}")
        (leased,) = outbox.claim()
        assert leased.id == message.id
        race(
            [
                lambda leased=leased, number=number: leased.sent(f"p{number}"),
                lambda number=number: receive(conversation.lead_id, f"SM{number}", "hello"),
            ]
        )
        assert turn(conversation) in (["stall"], ["answer"])
    with close_engine.atomic():
        receive(conversation.lead_id, "SM last", "hello")
        outbox.enqueue(conversation.id, "SEND_MESSAGE", "Hi!")
        claimed().sent("p last")
    assert turn(conversation) == ["stall"]


def test_c1_what_marks_a_text_sent_waits_for_nobody(postgres: peewee.Database) -> None:
    """C1, for a text that the lead writes while ours is marked sent: it is our turn, whoever commits first."""
    conversation = bring_to(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.QUALIFYING)
    outbox.enqueue(conversation.id, "SEND_MESSAGE", "Hi!")
    message = claimed()
    with close_engine.atomic():
        receive(conversation.lead_id, "SM1", "hello")
        assert Running(lambda: message.sent("p1")).result() is message
    assert turn(conversation) == ["answer"]
    outbox.enqueue(conversation.id, "SEND_MESSAGE", "Hi!")
    message = claimed()
    with close_engine.atomic():
        message.sent("p2")
        late = Running(lambda: receive(conversation.lead_id, "SM2", "hello"))
        until_they_wait([late])
    assert late.result().answer
    assert turn(conversation) == ["answer"]


def test_c1_a_silence_whose_beginning_nobody_knows_counts_from_now(
    foreign: ForeignWriter, conversation_in: ConversationIn
) -> None:
    """C1, for conversations that the library finds when it is installed, or whose deadlines were lost."""
    unknown, ours = foreign.insert("QUALIFYING", updated_at="2020-01-01 00:00:00.000"), conversation_in(Stage.BUILDING)
    receive(ours.lead_id, "SM1", "hello?")
    asked = foreign.deadlines("answer")
    foreign.run("DELETE FROM close_engine.deadlines WHERE subject_id = %s", unknown)
    foreign.run("DELETE FROM close_engine.migrations WHERE name = '0003_guard'")
    before = moment().replace(tzinfo=None)
    assert close_engine.migrate() == ["0003_guard"]
    since = foreign.deadlines("stall")
    assert set(since) == {unknown}
    assert since[unknown] >= before
    assert foreign.deadlines("answer") == asked
