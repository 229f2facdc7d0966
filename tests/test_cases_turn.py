"""Whose turn it is, stalling and resuming, and sweeps: inputs that once failed, by the number of their case.

Each runs on every database, and has a variant: another writer, table or stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    ACTIVE_STAGES,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    ConversationNotFound,
    EntryPoint,
    GuardMissing,
    InboxEntry,
    InvalidValue,
    MessageStatus,
    Moved,
    OutboxMessage,
    PendingAction,
    Stage,
    StageChange,
    StageConflict,
    after_commit,
    expire_actions,
    lose_stalled,
    lose_unanswered,
    on_enter,
    outbox,
    receive,
    record_payment,
    stall_silent,
    submit,
    sweep,
    waiting_for_us,
)
from close_engine.board import WaitingLine, pipeline
from close_engine.database.binding import moment
from close_engine.machine import TRIGGERS
from close_engine.testing import MovableClock, bring_to, new_lead
from tests.foreign import REFUSED, Change, ForeignWriter
from tests.rows import copy_of, triggers
from tests.waiting import Running, until_they_wait
from tests.workers import LINK, claimed, race, sql

ConversationIn = Callable[..., CloseEngineConversation]
Register = Callable[..., Callable[..., Any]]

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


@pytest.mark.parametrize("topic", list(ActionType))
def test_c1_a_text_that_was_drafted_before_the_leads_words_does_not_answer_them(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, topic: ActionType
) -> None:
    """C1, for words that cross: the lead writes while a text of ours is on its way, and nobody answers for weeks."""
    conversation = conversation_in(Stage.EDIT_LOOP)
    receive(conversation.lead_id, "SM1", "How is it going?")
    outbox.enqueue(conversation.id, topic, "Here it is.", if_lead_writes="send")
    message = claimed()
    receive(conversation.lead_id, "SM2", "And what does it cost?")
    message.sent("p1")
    assert turn(conversation) == ["answer"]
    close_engine_clock.move(WEEK)
    assert (stall_silent(), waiting()) == ([], [conversation.id])
    outbox.enqueue(conversation.id, "SEND_MESSAGE", "900 dollars.")
    claimed().sent("p2")
    assert (turn(conversation), waiting()) == (["stall"], [])


def test_c1_what_is_approved_after_the_leads_words_answers_them(conversation_in: ConversationIn) -> None:
    """C1, for a draft that waits when the lead writes: whoever approves it then decides on it after those words."""
    conversation = conversation_in(Stage.BUILDING, autonomy_level=AutonomyLevel.MANUAL)
    preview = submit(
        conversation, ActionType.SEND_PREVIEW, "Here it is.", metadata={"previewUrl": "https://p.example/1"}
    )
    assert isinstance(preview, PendingAction)
    receive(conversation.lead_id, "SM1", "What does it cost?")
    assert turn(conversation) == ["answer"]
    preview.approve(by="Ann")
    claimed().sent("p1")
    assert (copy_of(conversation).stage, turn(conversation)) == (Stage.PREVIEW_SENT, ["stall"])


def test_c1_what_is_sent_late_does_not_ask_again_for_an_answer(conversation_in: ConversationIn) -> None:
    """C1, for a text that was put off: the lead wrote after it was drafted, and has been answered since."""
    conversation = conversation_in(Stage.PREVIEW_SENT)
    later = outbox.enqueue(conversation.id, "SEND_MESSAGE", "Any news?", send_after=DAY, if_lead_writes="send")
    for number, answer in enumerate(("a reply", "no reply")):
        receive(conversation.lead_id, f"SM{number}", "Thanks!")
        if answer == "a reply":
            outbox.enqueue(conversation.id, "SEND_MESSAGE", "You are welcome.")
            claimed().sent("p1")
        else:
            copy_of(conversation).no_reply("they only said thanks")
        assert turn(conversation) == ["stall"]
    sql("UPDATE {outbox} SET available_at = {moment} WHERE id = %s RETURNING id", later.id)
    claimed().sent("p2")
    assert turn(conversation) == ["stall"]


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
    crossing = outbox.enqueue(conversation.id, "SEND_MESSAGE", "Are you there?", if_lead_writes="send")
    receive(conversation.lead_id, "SM2", "yes")
    foreign.run("UPDATE close_engine.outbox SET status = 'SENT' WHERE id = %s", crossing.id)
    assert list(foreign.deadlines("answer")) == [conversation.id]


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
    """C1, for both at once: whichever commits first, our text was drafted before theirs, and does not answer it."""
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
        assert turn(conversation) == ["answer"]
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
    assert "0003_guard" in close_engine.migrate()
    since = foreign.deadlines("stall")
    assert set(since) == {unknown}
    assert since[unknown] >= before
    assert foreign.deadlines("answer") == asked


# -- C2: `resume` forgets what happened --------------------------------------------------------------------------------


def back(conversation: CloseEngineConversation, by: str) -> Stage:
    """Bring a stalled conversation back, and return where it resumes."""
    if by == "the lead":
        receive(conversation.lead_id, f"SM {by}", "I am back")
    elif by == "resume()":
        copy_of(conversation).resume()
    elif by == "open_conversation()":
        close_engine.open_conversation(conversation.lead_id, EntryPoint.REP_CLOSE)
    return copy_of(conversation).stage


BY = pytest.mark.parametrize("by", ["the lead", "resume()", "open_conversation()"])


@BY
@pytest.mark.parametrize("decision", ["reject", "expire", "delete", "withdraw"])
def test_c2_an_approval_that_nobody_waits_for_is_not_resumed(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, decision: str, by: str
) -> None:
    """C2: it stalled while its payment link waited, and the link was rejected, or ended in another way, since."""
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.SEMI_AUTO)
    link = submit(conversation, ActionType.SEND_PAYMENT_LINK, "Pay", metadata={"paymentUrl": LINK}, expires_after=HOUR)
    assert isinstance(link, PendingAction)
    conversation.stall()
    if decision == "reject":
        link.reject(by="dana")
    elif decision == "expire":
        close_engine_clock.move(HOUR)
        assert expire_actions() == [link.id]
    elif decision == "delete":
        PendingAction.delete_by_id(link.id)
    else:
        link.approve(by="dana")
        (message,) = outbox.claim()
        message.withdraw("the offer is over")
    assert back(conversation, by) is Stage.PREVIEW_SENT
    assert copy_of(conversation).history()[-1].trigger == "resume"


@BY
@pytest.mark.parametrize("approved", [False, True])
def test_c2_an_approval_that_still_waits_is_resumed(conversation_in: ConversationIn, approved: bool, by: str) -> None:
    """C2, where something waits: for the human, or, approved, for a worker."""
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.SEMI_AUTO)
    link = submit(conversation, ActionType.SEND_PAYMENT_LINK, "Pay", metadata={"paymentUrl": LINK})
    assert isinstance(link, PendingAction)
    conversation.stall()
    if approved:
        link.approve(by="dana")
    assert back(conversation, by) is Stage.PENDING_APPROVAL


#: What is sent while a conversation is stalled, by where it stalled: where things stand then.
SENT: dict[tuple[Stage, ActionType], Stage] = {
    **{(stage, ActionType.SEND_MESSAGE): stage for stage in ACTIVE_STAGES if stage is not Stage.PENDING_APPROVAL},
    **{(stage, ActionType.SEND_PREVIEW): Stage.PREVIEW_SENT for stage in ACTIVE_STAGES},
    **{(stage, ActionType.SEND_PAYMENT_LINK): Stage.PAYMENT_SENT for stage in ACTIVE_STAGES},
    (Stage.INITIATED, ActionType.SEND_MESSAGE): Stage.QUALIFYING,
    (Stage.PENDING_APPROVAL, ActionType.SEND_MESSAGE): Stage.PREVIEW_SENT,
}
TRIGGER = {ActionType.SEND_PREVIEW: "send_preview", ActionType.SEND_PAYMENT_LINK: "send_payment_link"}


@pytest.mark.parametrize("stage", ACTIVE_STAGES)
@pytest.mark.parametrize("topic", list(ActionType))
@pytest.mark.parametrize("fires", [False, True])
def test_c2_sending_something_to_a_stalled_lead_brings_the_conversation_back(
    conversation_in: ConversationIn, stage: Stage, topic: ActionType, fires: bool
) -> None:
    """C2, for texts of ours: the conversation goes on from what was sent, with a trigger and without."""
    conversation = conversation_in(stage)
    conversation.stall()
    link = {"paymentUrl": LINK} if topic is ActionType.SEND_PAYMENT_LINK else None
    trigger = TRIGGER.get(topic, "start_qualifying") if fires else None
    outbox.enqueue(conversation, topic, "Hello!", payload=link, trigger=trigger, approved_by="dana")
    message = claimed("w1").sent("p1")
    row = copy_of(conversation)
    assert row.stage is SENT[stage, topic]
    resumed = row.history()[-1]
    assert (resumed.trigger, resumed.actor, resumed.reason) == ("resume", "w1", "a text was sent")
    assert resumed.metadata == {"message_id": message.id, "provider_id": "p1"}
    assert (message.status, message.provider_id) == (MessageStatus.SENT, "p1")
    assert (copy_of(message).refusal is None) is (trigger is None or TRIGGERS[trigger].dest is row.stage)
    assert copy_of(message).refusal == message.refusal
    assert (turn(row), row.stalled_at) == (["stall"], None)
    if link is not None:
        assert (row.payment_link_url, row.payment_link_sent_at) == (LINK, message.sent_at)
        record_payment(row.lead_id, "pi_1")
        assert copy_of(row).stage is Stage.COMPLETED
    message.sent("p1")  # reporting it again changes nothing
    assert len(row.history()) == len(copy_of(row).history())


def test_c2_another_effect_brings_nothing_back(conversation_in: ConversationIn) -> None:
    """C2, for what the lead does not see."""
    conversation = conversation_in(Stage.STALLED)
    outbox.enqueue(conversation, "build_site")
    claimed().sent("p1")
    assert copy_of(conversation).stage is Stage.STALLED


def test_c2_a_hook_that_fails_does_not_unsend_a_text(conversation_in: ConversationIn) -> None:
    """C2, for a hook of the stage that is resumed: the text is recorded, and the lead's next words resume it."""
    conversation = conversation_in(Stage.INITIATED)
    conversation.stall()
    outbox.enqueue(conversation, "SEND_MESSAGE", "Hello!")
    message = claimed()

    @on_enter(Stage.QUALIFYING)
    def fail(conversation: CloseEngineConversation, change: StageChange) -> None:
        raise RuntimeError("no disk")

    try:
        with pytest.raises(RuntimeError, match="no disk"):
            message.sent("p1")
    finally:
        fail.remove()
    row = copy_of(message)
    assert (row.status, row.provider_id, row.refusal) == (MessageStatus.SENT, "p1", "RuntimeError: no disk")
    assert copy_of(conversation).stage is Stage.STALLED
    assert receive(conversation.lead_id, "SM1", "Hi!").resumed is not None


@BY
@pytest.mark.parametrize("topic", list(ActionType))
def test_c2_what_another_worker_sent_counts_too(
    foreign: ForeignWriter, conversation_in: ConversationIn, topic: ActionType, by: str
) -> None:
    """C2, for a worker that marks texts sent by SQL, with or without their time, past this library."""
    conversation = conversation_in(Stage.INITIATED)
    before = outbox.enqueue(conversation, "SEND_MESSAGE", "Hello!")
    foreign.run("UPDATE close_engine.outbox SET status = 'SENT' WHERE id = %s", before.id)
    conversation.stall()
    assert back(conversation, by) is Stage.INITIATED, "that was sent before it stalled"
    for sent_at in ("2099-01-01 00:00:00.000", None):
        copy_of(conversation).stall()
        message = outbox.enqueue(conversation.id, topic, "Hello!")
        foreign.run("UPDATE close_engine.outbox SET status = 'SENT', sent_at = %s WHERE id = %s", sent_at, message.id)
        conversation.reload()
        conversation.resume()
        assert conversation.stage is SENT[Stage.INITIATED, topic]
        assert conversation.payment_link_sent_at == copy_of(conversation).payment_link_sent_at
        assert (conversation.payment_link_sent_at is None) is (topic is not ActionType.SEND_PAYMENT_LINK)
        foreign.run("DELETE FROM close_engine.outbox WHERE id = %s", message.id)


@pytest.mark.parametrize("link_sent", [False, True])
def test_c2_what_the_history_does_not_know_resumes_by_its_stamps(foreign: ForeignWriter, link_sent: bool) -> None:
    """C2, for conversations that were stalled before the library came."""
    sent_at = "2026-01-01 00:00:00.000" if link_sent else None
    adopted = foreign.insert("STALLED", stalled_at="2026-02-01 00:00:00.000", payment_link_sent_at=sent_at)
    forgotten = foreign.insert("STALLED", stalled_at="2026-02-01 00:00:00.000", payment_link_sent_at=sent_at)
    foreign.run("DELETE FROM close_engine.history WHERE conversation_id = %s", forgotten)
    expected = Stage.PAYMENT_SENT if link_sent else Stage.QUALIFYING
    for conversation_id in (adopted, forgotten):
        conversation = CloseEngineConversation.get_by_id(conversation_id)
        conversation.resume()
        assert conversation.stage is expected


# -- G10: a foreign writer resumes into any stage ----------------------------------------------------------------------


@pytest.mark.parametrize("stalled_in", [Stage.INITIATED, Stage.EDIT_LOOP, Stage.PENDING_APPROVAL])
def test_g10_a_foreign_writer_resumes_only_to_where_things_stand(
    foreign: ForeignWriter, conversation_in: ConversationIn, stalled_in: Stage
) -> None:
    """G10: a raw UPDATE went INITIATED, STALLED, PAYMENT_SENT. The refusal names the stage that it may resume to."""
    conversation = conversation_in(stalled_in)
    foreign.update(conversation.id, stage="STALLED")
    expected = Stage.PREVIEW_SENT if stalled_in is Stage.PENDING_APPROVAL else stalled_in
    for stage in ACTIVE_STAGES:
        if stage is not expected:
            with pytest.raises(REFUSED, match=f"can resume only to {expected}, where things stand"):
                foreign.update(conversation.id, stage=stage)
    assert foreign.stage(conversation.id) == "STALLED"
    foreign.update(conversation.id, stage=expected)
    assert foreign.history(conversation.id)[-1] == Change("resume", "STALLED", expected, foreign.actor)


def test_g10_a_foreign_writer_resumes_to_what_was_sent_since(
    foreign: ForeignWriter, conversation_in: ConversationIn
) -> None:
    """G10, for a preview that was sent since, and for a link whose stamp the writer sets along with the stage."""
    conversation = conversation_in(Stage.BUILDING)
    conversation.stall()
    with pytest.raises(REFUSED, match="can resume only to BUILDING"):
        foreign.update(conversation.id, stage="PAYMENT_SENT", payment_link_sent_at="2026-01-01 00:00:00.000")
    message = outbox.enqueue(conversation, "SEND_PREVIEW", "Look!")
    foreign.run("UPDATE close_engine.outbox SET status = 'SENT' WHERE id = %s", message.id)
    with pytest.raises(REFUSED, match="can resume only to PREVIEW_SENT"):
        foreign.update(conversation.id, stage="BUILDING")
    now = foreign.row(conversation.id)["stalled_at"] + timedelta(seconds=1)
    foreign.update(conversation.id, stage="PAYMENT_SENT", payment_link_sent_at=f"{now:%Y-%m-%d %H:%M:%S.%f}")
    assert foreign.history(conversation.id)[-1].dest == "PAYMENT_SENT"


def test_g10_what_is_sent_at_that_moment_is_no_error_of_the_librarys(postgres: peewee.Database) -> None:
    """G10, for `resume()` while a text is marked sent: it leads to where things stand then, and memory knows it."""
    for number in range(10):
        conversation = bring_to(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.BUILDING)
        conversation.stall()
        message = outbox.enqueue(conversation, "SEND_PREVIEW", "Look!")
        mark = f"UPDATE close_engine.outbox SET status = 'SENT', provider_id = 'p{number}' WHERE id = {message.id}"
        resumed, _ = race([lambda c=conversation: c.resume(), lambda mark=mark: postgres.execute_sql(mark)])
        row = copy_of(conversation)
        assert row.stage is resumed.dest is conversation.stage
        assert row.stage in (Stage.BUILDING, Stage.PREVIEW_SENT)
        assert row.history()[-1].dest is row.stage


# -- B5: one hook that fails stops all sweeps for all ------------------------------------------------------------------


@pytest.fixture
def poisoned(conversation_in: ConversationIn, register: Register) -> CloseEngineConversation:
    """A silent conversation for which a hook fails, with its neighbours."""
    conversation_in(Stage.BUILDING)
    poison = conversation_in(Stage.BUILDING)
    conversation_in(Stage.BUILDING)

    def fail(conversation: CloseEngineConversation, change: StageChange) -> None:
        outbox.enqueue(conversation, "tell_the_rep", key="stalled")
        if conversation.id == poison.id:
            raise KeyError("phone")

    register(on_enter, Stage.STALLED)(fail)
    return poison


@pytest.fixture
def register() -> Iterator[Register]:
    """Registers hooks until the test ends."""
    hooks = []

    def make(kind: Callable[..., Any], *stages: Stage) -> Callable[..., Any]:
        def decorate(function: Callable[..., Any]) -> Any:
            hooks.append(kind(*stages)(function))
            return hooks[-1]

        return decorate

    yield make
    for hook in hooks:
        hook.remove()


def test_b5_what_a_hook_fails_on_is_passed_over_and_named(
    poisoned: CloseEngineConversation, conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    """B5: nobody was stalled or lost, no action expired and no lease was taken back, for ever."""
    lost = conversation_in(Stage.STALLED)
    asked = conversation_in(Stage.QUALIFYING, autonomy_level=AutonomyLevel.MANUAL)
    action = submit(asked, ActionType.SEND_MESSAGE, "hello", expires_after=HOUR)
    outbox.enqueue(asked, "build_site")
    message = claimed(lease=HOUR)
    close_engine_clock.move(WEEK + HOUR)
    swept = sweep()
    others = [c.id for c in CloseEngineConversation.select() if c.id not in (poisoned.id, lost.id)]
    assert sorted(swept.stalled) == sorted(others)
    assert (swept.lost, swept.expired, swept.released) == ([lost.id], [action.id], [message.id])
    assert swept.failed == {poisoned.id: "KeyError: 'phone'"}
    assert copy_of(poisoned).stage is Stage.BUILDING
    told = OutboxMessage.select().where(OutboxMessage.topic == "tell_the_rep")
    assert poisoned.id not in {message.conversation_id for message in told}, "its effect is undone, too"
    again = sweep()
    assert (again.stalled, again.failed) == ([], {poisoned.id: "KeyError: 'phone'"})


def test_b5_one_sweep_alone_names_it_too(
    poisoned: CloseEngineConversation, close_engine_clock: MovableClock, caplog: pytest.LogCaptureFixture
) -> None:
    """B5, for who calls one sweep."""
    close_engine_clock.move(THREE_DAYS)
    moved = stall_silent(batch=1)
    assert len(moved) == 2
    assert moved.failed == {poisoned.id: "KeyError: 'phone'"}
    assert f"the sweep passed over {poisoned.id}: KeyError: 'phone'" in caplog.text


def test_b5_what_fails_after_the_commit_has_moved(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, register: Register
) -> None:
    """B5, for a function that runs after the commit: the change stands, and is named as well."""
    conversations = [conversation_in(Stage.BUILDING) for _ in range(2)]

    def fail(conversation: CloseEngineConversation, change: StageChange) -> None:
        raise RuntimeError("no disk")

    register(after_commit, Stage.STALLED)(fail)
    close_engine_clock.move(THREE_DAYS)
    moved = stall_silent()
    assert sorted(moved) == sorted(moved.failed) == sorted(each.id for each in conversations)
    assert {copy_of(each).stage for each in conversations} == {Stage.STALLED}
    assert set(moved.failed.values()) == {
        "The change is committed, but functions that ran after it failed: RuntimeError: no disk"
    }


TRIGGERS_OF_THE_CRM = {
    "close_engine_conversations": "NEW.stage = 'STALLED' AND NEW.id = %s",
    "pending_actions": "NEW.status = 'EXPIRED' AND NEW.id = %s",
}


def refuse_in_the_crm(foreign: ForeignWriter, table: str, row_id: str) -> None:
    """Make a trigger of the CRM's that refuses what the sweep writes into one row."""
    when = TRIGGERS_OF_THE_CRM[table].replace("%s", f"'{row_id}'")
    if foreign.is_postgres:
        foreign.run(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$body$BEGIN RAISE EXCEPTION 'not this one'; END$body$"
        )
        foreign.run(f"CREATE TRIGGER crm BEFORE UPDATE ON {table} FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION refuse()")
    else:
        foreign.run(
            f"CREATE TRIGGER crm BEFORE UPDATE ON {table} WHEN {when} BEGIN SELECT RAISE(ABORT, 'not this one'); END"
        )


@pytest.mark.parametrize("table", list(TRIGGERS_OF_THE_CRM))
@pytest.mark.parametrize("batch", [1, 2, 1000])
def test_b5_what_the_database_refuses_is_passed_over_and_named(
    foreign: ForeignWriter,
    conversation_in: ConversationIn,
    close_engine_clock: MovableClock,
    table: str,
    batch: int,
) -> None:
    """B5, for a trigger of the CRM's own: without hooks, a batch is one statement, and one row failed it."""
    conversations = [conversation_in(Stage.QUALIFYING, autonomy_level=AutonomyLevel.MANUAL) for _ in range(4)]
    ids = [conversation.id for conversation in conversations]
    job: Callable[..., Moved] = stall_silent
    if table == "pending_actions":
        ids = [submit(each, ActionType.SEND_MESSAGE, "hello", expires_after=HOUR).id for each in conversations]
        job = expire_actions
    refuse_in_the_crm(foreign, table, ids[1])
    close_engine_clock.move(THREE_DAYS + HOUR)
    close_engine_clock.rule()
    moved = job(batch=batch)
    assert sorted(moved) == sorted(set(ids) - {ids[1]})
    assert list(moved.failed) == [ids[1]]
    assert "not this one" in moved.failed[ids[1]]
    assert job(batch=batch) == []


def test_b5_a_sweep_with_hooks_holds_one_row_while_they_run(postgres: peewee.Database, register: Register) -> None:
    """B5: `receive()` waited for seconds behind a thousand rows that a slow hook held."""
    conversations = [
        bring_to(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.BUILDING) for _ in range(5)
    ]
    seen: list[str] = []

    def look(conversation: CloseEngineConversation, change: StageChange) -> None:
        seen.append(conversation.id)
        if len(seen) == 2:
            for other in conversations:
                if other.id != conversation.id:
                    text = Running(partial(receive, other.lead_id, f"SM {other.id}", "hello"))
                    assert text.result().answer, "no other row is held"

    register(on_enter, Stage.STALLED)(look)
    sql("UPDATE {deadlines} SET at = '2026-01-01 00:00:00.000'")
    moved = stall_silent()
    assert (moved, moved.failed) == (seen, {})
    assert len(seen) == 2, "whose leads have written since are not silent any more"


def test_b5_a_sweep_that_fails_as_a_whole_stops_no_other(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, foreign: ForeignWriter
) -> None:
    """B5, for a table without its guards: the other sweeps go on, and the error is raised after them."""
    conversation = conversation_in(Stage.BUILDING)
    outbox.enqueue(conversation, "build_site")
    message = claimed(lease=HOUR)
    close_engine_clock.move(THREE_DAYS)
    close_engine_clock.rule()
    if foreign.is_postgres:
        foreign.run("ALTER TABLE close_engine_conversations DISABLE TRIGGER USER")
    else:
        foreign.run("DROP TRIGGER close_engine_record")
    with pytest.raises(GuardMissing):
        sweep()
    assert copy_of(message).leased_by is None
    assert copy_of(conversation).stage is Stage.BUILDING
    for after in (timedelta(days=-1), timedelta(days=400_000)):
        with pytest.raises(InvalidValue):
            sweep(lose_unanswered_after=after)


def test_b5_sweeps_leave_alone_what_a_human_has_taken_over(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    """B5's neighbour: what a human leads is neither stalled nor lost, until it is handed back or the time is up."""
    active, stalled, asked = (
        conversation_in(Stage.BUILDING),
        conversation_in(Stage.STALLED),
        conversation_in(Stage.BUILDING),
    )
    receive(asked.lead_id, "SM1", "hello?")
    for conversation in (active, stalled, asked):
        copy_of(conversation).take_over(by="dana", until=timedelta(days=40))
    close_engine_clock.move(timedelta(days=39))
    swept = sweep(lose_unanswered_after=timedelta(days=30))
    assert (swept.stalled, swept.lost) == ([], [])
    copy_of(stalled).hand_back(by="dana")
    close_engine_clock.move(HOUR)
    assert sweep(lose_unanswered_after=timedelta(days=30)).lost == [stalled.id]
    close_engine_clock.move(DAY)
    swept = sweep(lose_unanswered_after=timedelta(days=30))
    assert (swept.stalled, swept.lost) == ([active.id], [asked.id])
