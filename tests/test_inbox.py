"""Inbound texts and payments are processed once, never conflict, and never get lost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    ACTIVE_STAGES,
    ActionType,
    CloseEngineConversation,
    EntryPoint,
    InboxEntry,
    InvalidValue,
    Lead,
    LeadNotFound,
    PaymentUnmatched,
    Stage,
    StageChange,
    StageConflict,
    TransitionNotAllowed,
    on_enter,
    receive,
    record_payment,
    submit,
)
from close_engine.database.fields import milliseconds
from close_engine.testing import MovableClock, bring_to, new_lead
from tests.rows import copy_of, triggers
from tests.waiting import Running
from tests.workers import LINK, assert_consistent, held, race, sql, values

ConversationIn = Callable[..., CloseEngineConversation]

HOUR = timedelta(hours=1)


def entries() -> list[tuple[Any, ...]]:
    """Return the entries of the inbox, oldest first."""
    return [(e.kind, e.key, e.lead_id, e.conversation_id, e.body) for e in InboxEntry.select().order_by(InboxEntry.id)]


def turns(conversation: CloseEngineConversation) -> list[tuple[Any, ...]]:
    return sql('SELECT "trigger" FROM {deadlines} WHERE subject_id = %s', conversation.id)


# -- texts -------------------------------------------------------------------------------------------------------------


def test_a_text_is_kept_and_is_to_be_answered_in_every_active_stage(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    for stage in ACTIVE_STAGES:
        conversation = conversation_in(stage)
        received = receive(conversation.lead, f"SM {stage}", "Yes, let's go! é🍞")
        assert received.answer
        assert (received.duplicate, received.resumed) == (False, None)
        assert values(received.conversation) == values(copy_of(conversation))
        assert received.conversation.stage is stage
        assert entries()[-1] == ("text", f"SM {stage}", conversation.lead_id, conversation.id, "Yes, let's go! é🍞")
    assert InboxEntry.get().received_at == milliseconds(close_engine_clock.now)


def test_the_lead_is_no_longer_silent(conversation_in: ConversationIn, close_engine_clock: MovableClock) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    close_engine_clock.move(HOUR)
    receive(conversation.lead_id, "SM1", "hello")
    assert turns(conversation) == [("answer",)]
    assert close_engine.stall_silent(after=HOUR) == []


def test_a_reply_that_was_drafted_before_the_text_came_is_a_conflict(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    receive(conversation.lead_id, "SM1", "wait!")
    with pytest.raises(StageConflict):
        submit(conversation, ActionType.SEND_MESSAGE, "as I was saying")


def test_a_text_resumes_a_stalled_conversation_where_it_stalled(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.BUILDING)
    conversation.stall()
    close_engine_clock.move(HOUR)
    received = receive(conversation.lead_id, "SM1", "I'm back")
    assert received.answer
    assert received.conversation.stage is Stage.BUILDING
    assert received.conversation.stalled_at is None
    change = received.resumed
    assert values(change) == values(received.conversation.history()[-1])
    assert (change.trigger, change.actor, change.reason) == ("resume", f"lead:{conversation.lead_id}", "the lead wrote")
    assert close_engine.stall_silent(after=HOUR) == []


def test_whoever_received_it_can_be_named(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.STALLED)
    assert receive(conversation.lead_id, "SM1", "hi", actor="webhook").resumed.actor == "webhook"


@pytest.mark.parametrize("stage", [Stage.COMPLETED, Stage.CLOSED_LOST])
def test_there_is_nothing_to_answer_in_a_closed_conversation(conversation_in: ConversationIn, stage: Stage) -> None:
    conversation = conversation_in(stage)
    received = receive(conversation.lead_id, "SM1", "hello?")
    assert (received.answer, received.duplicate, received.resumed) == (False, False, None)
    assert values(received.conversation) == values(conversation) == values(copy_of(conversation))
    assert entries() == [("text", "SM1", conversation.lead_id, conversation.id, "hello?")]


def test_there_is_nothing_to_answer_where_there_is_no_conversation(database: peewee.Database) -> None:
    lead = new_lead()
    received = receive(lead, "SM1", "hello?")
    assert (received.answer, received.conversation, received.duplicate) == (False, None, False)
    assert receive(lead, "SM1", "hello?").duplicate
    assert entries() == [("text", "SM1", lead.id, None, "hello?")]


def test_the_same_text_again_changes_nothing(conversation_in: ConversationIn, close_engine_clock: MovableClock) -> None:
    for stage in (Stage.QUALIFYING, Stage.STALLED):
        conversation = conversation_in(stage)
        first = receive(conversation.lead_id, f"SM {stage}", "hello")
        copy_of(conversation).stall()
        close_engine_clock.move(HOUR)
        before = values(copy_of(conversation)), triggers(conversation), entries()
        again = receive(conversation.lead_id, f"SM {stage}", "hello")
        assert (again.duplicate, again.answer, again.resumed) == (True, False, first.resumed)
        assert values(again.conversation) == values(copy_of(conversation))
        assert (values(copy_of(conversation)), triggers(conversation), entries()) == before


def test_a_text_and_a_payment_may_have_the_same_key(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PAYMENT_SENT)
    conversation.stall()
    assert receive(conversation.lead_id, "1", "paid!").resumed
    assert record_payment(conversation.lead_id, "1").completed.dest is Stage.COMPLETED


def test_an_unknown_lead_is_an_error(database: peewee.Database) -> None:
    with pytest.raises(LeadNotFound) as missing:
        receive("nobody", "SM1", "hello")
    assert missing.value.lead_id == "nobody"
    assert entries() == []


@pytest.mark.parametrize("stage", [Stage.QUALIFYING, Stage.STALLED, Stage.COMPLETED])
def test_a_text_that_cannot_be_kept_is_refused(conversation_in: ConversationIn, stage: Stage) -> None:
    conversation = conversation_in(stage)
    for given in ({"key": ""}, {"key": "a\x00"}, {"key": 7}, {"text": "a\x00"}, {"text": b"x"}, {"text": None}):
        options: dict[str, Any] = {"key": "SM1", "text": "hello", **given}
        with pytest.raises(InvalidValue):
            receive(conversation.lead_id, **options)
    assert entries() == []
    assert values(copy_of(conversation)) == values(conversation)


def test_a_text_whose_processing_fails_can_come_again(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.STALLED)

    @on_enter(Stage.QUALIFYING)
    def fail(conversation: CloseEngineConversation, change: StageChange) -> None:
        raise RuntimeError("no disk")

    try:
        with pytest.raises(RuntimeError):
            receive(conversation.lead_id, "SM1", "hello")
    finally:
        fail.remove()
    assert receive(conversation.lead_id, "SM1", "hello").answer


# -- payments ----------------------------------------------------------------------------------------------------------


def paid_link(conversation: CloseEngineConversation) -> CloseEngineConversation:
    """Return the same conversation as if a payment link had been sent earlier."""
    sql(
        "UPDATE close_engine_conversations SET payment_link_sent_at = %s WHERE id = %s",
        "2026-01-01 00:00:00.000",
        conversation.id,
    )
    return copy_of(conversation)


def test_a_payment_completes_from_every_stage_after_a_link_was_sent(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    for stage in Stage:
        if stage is Stage.COMPLETED:
            continue
        conversation = paid_link(conversation_in(stage))
        change = record_payment(conversation.lead, f"evt {stage}", actor="stripe", metadata={"amount": 499}).completed
        row = copy_of(conversation)
        assert (row.stage, row.completed_at) == (Stage.COMPLETED, change.created_at)
        assert values(change) == values(row.history()[-1])
        assert (change.source, change.trigger, change.actor) == (stage, "complete", "stripe")
        assert change.metadata == {"amount": 499}
    assert_consistent()


def test_the_same_payment_again_returns_the_first_result_and_changes_nothing(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.PAYMENT_SENT)
    first = record_payment(conversation.lead_id, "evt_1", amount=90000, currency="usd")
    before = values(copy_of(conversation)), entries()
    close_engine_clock.move(HOUR)
    again = record_payment(conversation.lead_id, "evt_1", actor="again")
    assert values(again.completed) == values(first.completed)
    assert (first.duplicate, again.duplicate, again.surplus) == (False, True, False)
    paid = InboxEntry.get(InboxEntry.kind == "payment")
    assert (paid.amount, paid.currency, paid.issue) == (90000, "USD", None)
    assert (values(copy_of(conversation)), entries()) == before


def test_the_payment_behind_a_conversation_that_was_completed_by_hand_is_taken(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.COMPLETED)
    first = conversation.history()[-1]
    for _ in range(2):
        payment = record_payment(conversation.lead_id, "evt_1")
        assert (values(payment.completed), payment.surplus) == (values(first), False)
    assert record_payment(conversation.lead_id, "evt_2").surplus


def unmatched(lead_id: str, key: str, why: str) -> None:
    before = entries()
    for _ in range(2):  # it does not count as processed
        with pytest.raises(PaymentUnmatched) as error:
            record_payment(lead_id, key)
        assert (error.value.lead_id, error.value.key, error.value.why) == (lead_id, key, why)
        assert str(error.value) == f"Payment {key!r} of lead {lead_id!r} matches no open conversation: {why}."
    assert entries() == before


def test_a_payment_that_matches_nothing_is_a_clear_error(conversation_in: ConversationIn) -> None:
    unmatched("nobody", "evt_1", "the lead has no close conversation")
    unmatched(new_lead().id, "evt_1", "the lead has no close conversation")
    conversation = conversation_in(Stage.PREVIEW_SENT)
    unmatched(conversation.lead_id, "evt_1", "no payment link was sent to the lead")
    assert values(copy_of(conversation)) == values(conversation)


def test_a_payment_of_no_money_is_refused(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PAYMENT_SENT)
    wrong: list[tuple[Any, Any]] = [
        (1, None),
        (None, "USD"),
        (-1, "USD"),
        (1.5, "USD"),
        (True, "USD"),
        (1, "US"),
        (1, "€€€"),
    ]
    for amount, currency in wrong:
        with pytest.raises(InvalidValue):
            record_payment(conversation.lead_id, "evt_1", amount=amount, currency=currency)
    assert entries() == []


@pytest.mark.parametrize("stage", [Stage.PAYMENT_SENT, Stage.COMPLETED, Stage.PREVIEW_SENT])
def test_the_key_of_another_leads_payment_is_a_clear_error(conversation_in: ConversationIn, stage: Stage) -> None:
    record_payment(conversation_in(Stage.PAYMENT_SENT).lead_id, "evt_1")
    other = conversation_in(stage)
    unmatched(other.lead_id, "evt_1", "this key was already used for the payment of another conversation")
    assert copy_of(other).stage is stage


def test_a_payment_that_was_unmatched_can_be_recorded_once_it_matches(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    unmatched(conversation.lead_id, "evt_1", "no payment link was sent to the lead")
    conversation.send_payment_link(LINK)
    assert record_payment(conversation.lead_id, "evt_1").completed.dest is Stage.COMPLETED


def test_a_payment_that_cannot_be_stored_is_refused(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PAYMENT_SENT)
    for given in ({"key": " "}, {"key": "a\x00"}, {"actor": "a\x00"}, {"metadata": {"a": object()}}):
        options: dict[str, Any] = {"key": "evt_1", **given}
        with pytest.raises(InvalidValue):
            record_payment(conversation.lead_id, **options)
    assert entries() == []
    assert values(copy_of(conversation)) == values(conversation)


def test_payments_and_texts_that_are_rolled_back_can_come_again(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PAYMENT_SENT)
    with close_engine.atomic() as transaction:
        receive(conversation.lead_id, "SM1", "paid")
        record_payment(conversation.lead_id, "evt_1")
        transaction.rollback()
    assert entries() == []
    assert receive(conversation.lead_id, "SM1", "paid").answer
    assert record_payment(conversation.lead_id, "evt_1").completed.dest is Stage.COMPLETED


# -- races -------------------------------------------------------------------------------------------------------------


def opened(stage: Stage) -> CloseEngineConversation:
    return bring_to(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), stage)


def test_of_many_deliveries_of_one_text_one_is_processed(postgres: peewee.Database) -> None:
    for conversation in (opened(Stage.STALLED), opened(Stage.QUALIFYING), None):
        lead_id = conversation.lead_id if conversation else new_lead().id
        # Where there is no conversation, nothing is held: this holds however they overlap.
        results = race(
            [lambda lead_id=lead_id: receive(lead_id, f"SM {lead_id}", "hello")] * 8,
            behind=held(conversation) if conversation else None,
        )
        assert sorted(result.duplicate for result in results) == [False] + [True] * 7
    assert len(entries()) == 3
    assert_consistent()


def test_of_many_deliveries_of_one_payment_one_is_processed_and_all_return_it(postgres: peewee.Database) -> None:
    conversation = opened(Stage.PAYMENT_SENT)
    results = race([lambda: record_payment(conversation.lead_id, "evt_1")] * 8, behind=held(conversation))
    assert len({result.completed.id for result in results}) == 1
    assert triggers(conversation).count("complete") == 1


def test_of_several_payments_of_one_lead_at_once_one_completes_and_the_others_are_surplus(
    postgres: peewee.Database,
) -> None:
    for _ in range(5):
        conversation = opened(Stage.PAYMENT_SENT)
        payments = [lambda k=key, i=conversation.lead_id: record_payment(i, f"{i} {k}") for key in range(4)]
        results = race(payments, behind=held(conversation))
        assert sorted(result.surplus for result in results) == [False] + [True] * 3


def test_neither_fails_with_a_conflict_while_others_fire_on_the_same_conversation(postgres: peewee.Database) -> None:
    conversation = opened(Stage.PAYMENT_SENT)

    def write(number: int) -> None:
        for text in range(15):
            receive(conversation.lead_id, f"SM {number}.{text}", "hello")

    def fire() -> None:
        for _ in range(60):
            copy = copy_of(conversation)
            with suppress(StageConflict, TransitionNotAllowed):  # another thread was first
                copy.fire("resume" if copy.stage is Stage.STALLED else "stall")

    def pay() -> StageChange | None:
        for _ in range(10):
            copy_of(conversation).record(data={"n": 1})
        return record_payment(conversation.lead_id, "evt_1").completed

    *others, paid = race([lambda n=number: write(n) for number in range(3)] + [fire, fire, pay])
    assert others == [None] * 5
    assert paid.dest is Stage.COMPLETED
    assert InboxEntry.select().count() == 3 * 15 + 1
    assert copy_of(conversation).stage is Stage.COMPLETED
    assert_consistent()


def test_a_text_that_comes_while_the_conversation_is_opened_is_not_lost(postgres: peewee.Database) -> None:
    first, second, *others = [new_lead().id for _ in range(5)]

    def open_for(lead_id: str) -> CloseEngineConversation:
        return close_engine.open_conversation(lead_id, EntryPoint.SMS_REPLY)

    with close_engine.atomic():
        open_for(first)
        assert Running(lambda: receive(first, f"SM {first}", "hello")).result().conversation is None
    with close_engine.atomic():
        assert receive(second, f"SM {second}", "hello").conversation is None
        assert isinstance(Running(lambda: open_for(second)).result(), CloseEngineConversation)
    for lead_id in others:  # whichever comes first
        opening, received = race([lambda i=lead_id: open_for(i), lambda i=lead_id: receive(i, f"SM {i}", "hello")])
        assert isinstance(opening, CloseEngineConversation)
        assert received.conversation in (None, opening)
    for lead_id in (first, second, *others):
        assert Lead.get_by_id(lead_id).close_conversation.stage is Stage.INITIATED
    assert sorted(str(entry.lead_id) for entry in InboxEntry.select()) == sorted([first, second, *others])
