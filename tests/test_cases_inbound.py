"""Inputs that once failed, one test per case, by its number: what the lead says, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    ActionStatus,
    ActionSuperseded,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    EntryPoint,
    InboxEntry,
    Lead,
    LeadHasNoPhone,
    MessageCleared,
    MessageStatus,
    OutboxMessage,
    PendingAction,
    Stage,
    TextOfAnotherLead,
    outbox,
    receive,
    record_payment,
    submit,
)
from close_engine.board import pipeline
from close_engine.testing import MovableClock, new_lead
from tests.foreign import REFUSED, ForeignWriter
from tests.rows import copy_of
from tests.waiting import Running, until_they_wait
from tests.workers import LINK, assert_consistent, messages, race, sql, values

ConversationIn = Callable[..., CloseEngineConversation]

DAYS = timedelta(days=2)


def manual(conversation_in: ConversationIn, stage: Stage = Stage.QUALIFYING) -> CloseEngineConversation:
    return conversation_in(stage, autonomy_level=AutonomyLevel.MANUAL)


def draft(conversation: CloseEngineConversation, text: str = "the draft", **options: Any) -> Any:
    return submit(copy_of(conversation), options.pop("type", ActionType.SEND_MESSAGE), text, **options)


def row(draft: OutboxMessage | PendingAction) -> Any:
    return type(draft).get_by_id(draft.id)


# -- A5: what is scheduled blocks what is due --------------------------------------------------------------------------


def test_a5_a_nudge_is_withdrawn_when_the_lead_writes_and_holds_up_nothing(conversation_in: ConversationIn) -> None:
    """A text that waits for two days held up the reply to what the lead wrote meanwhile, and then left before it."""
    conversation = conversation_in(Stage.QUALIFYING)
    nudge = draft(conversation, "Still there?", send_after=DAYS)
    received = receive(conversation.lead_id, "SM1", "Here I am.")
    outbox.enqueue(conversation, "draft_reply", "Here I am.")
    assert [message.id for message in received.superseded] == [nudge.id]
    assert (row(nudge).status, row(nudge).last_error) == (MessageStatus.WITHDRAWN, "the lead has written since")
    assert [message.topic for message in outbox.claim(10)] == ["draft_reply"]


def test_a5_what_is_in_flight_or_retried_when_the_lead_writes_does_not_leave_later(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    """A reply that a worker holds when the lead writes may leave once; if it failed, it is not tried again."""
    conversation = conversation_in(Stage.QUALIFYING)
    draft(conversation)
    (message,) = outbox.claim()
    assert receive(conversation.lead_id, "SM1", "Forget it.").superseded == ()
    message.retry("503")
    close_engine_clock.move(DAYS)
    assert outbox.claim() == []
    assert (row(message).status, row(message).last_error) == (MessageStatus.WITHDRAWN, "the lead has written since")


def test_a5_what_was_said_to_be_sent_all_the_same_leaves(conversation_in: ConversationIn) -> None:
    """Whoever drafts a text may say that it leaves though the lead writes; a preview does so by itself."""
    conversation = conversation_in(Stage.BUILDING)
    draft(conversation, "Office hours are 9 to 5.", if_lead_writes="send")
    draft(conversation, "Here it is.", type=ActionType.SEND_PREVIEW)
    draft(conversation, "Here it is again.", type=ActionType.SEND_PREVIEW, if_lead_writes="withdraw")
    received = receive(conversation.lead_id, "SM1", "Are you open?")
    assert [message.body for message in received.superseded] == ["Here it is again."]
    assert [outbox.claim()[0].sent().body for _ in range(2)] == ["Office hours are 9 to 5.", "Here it is."]
    with pytest.raises(close_engine.InvalidValue, match="if_lead_writes"):
        draft(conversation, if_lead_writes="maybe")


def test_a5_the_text_of_another_conversation_withdraws_nothing(conversation_in: ConversationIn) -> None:
    """Only the lead's own words supersede what was drafted for the lead."""
    conversation, other = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    draft(conversation)
    assert receive(other.lead_id, "SM1", "Hello").superseded == ()
    assert len(outbox.claim(10)) == 1


# -- A6: stale drafts can be approved ----------------------------------------------------------------------------------


def test_a6_a_draft_from_before_the_leads_words_cannot_be_approved(conversation_in: ConversationIn) -> None:
    """A draft waited, the lead wrote "Forget it", a second draft was submitted, and both could be approved and sent."""
    conversation = manual(conversation_in)
    first = draft(conversation, "Shall we start?")
    received = receive(conversation.lead_id, "SM1", "Forget it")
    second = draft(conversation, "Sorry to hear that.")
    assert received.superseded == (first,)
    assert row(first).status is ActionStatus.EXPIRED
    assert row(first).metadata["supersededBy"] == InboxEntry.get().id
    with pytest.raises(close_engine.ActionDecided):
        first.approve(by="dana")
    second.approve(by="dana")
    assert [message.body for message in messages(conversation)] == ["Sorry to hear that."]
    assert_consistent()


def test_a6_what_is_not_superseded_says_that_the_lead_has_written(conversation_in: ConversationIn) -> None:
    """Previews and payment links stay, and whoever approves them sees that the lead has written since."""
    conversation = manual(conversation_in, Stage.PREVIEW_SENT)
    link = draft(conversation, type=ActionType.SEND_PAYMENT_LINK, metadata={"paymentUrl": LINK})
    kept = draft(conversation, if_lead_writes="send")
    assert receive(conversation.lead_id, "SM1", "One question").superseded == ()
    for action in (link, kept):
        assert row(action).status is ActionStatus.PENDING
        assert row(action).metadata["leadWroteSince"] == InboxEntry.get().id
        action.approve(by="dana")
    assert len(messages(conversation)) == 2


def test_a6_a_payment_link_that_is_superseded_leaves_pending_approval(conversation_in: ConversationIn) -> None:
    """A link that is to be withdrawn if the lead writes takes its conversation back to PREVIEW_SENT."""
    conversation = manual(conversation_in, Stage.PREVIEW_SENT)
    draft(conversation, type=ActionType.SEND_PAYMENT_LINK, metadata={"paymentUrl": LINK}, if_lead_writes="withdraw")
    received = receive(conversation.lead_id, "SM1", "Change the colour first")
    assert len(received.superseded) == 1
    assert received.conversation is not None
    assert received.conversation.stage is copy_of(conversation).stage is Stage.PREVIEW_SENT
    received.conversation.request_edits()


def test_a6_a_draft_of_the_crms_own_is_superseded_too(conversation_in: ConversationIn, foreign: ForeignWriter) -> None:
    """An action that the CRM inserted says nothing of what it knew: the database notes it, and refuses it."""
    conversation = foreign.insert("QUALIFYING")
    lead_id = CloseEngineConversation.get_by_id(conversation).lead_id
    insert = (
        "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message) VALUES (%s, %s, %s, %s, %s)"
    )
    foreign.run(insert, "old", conversation, lead_id, "SEND_MESSAGE", "old")
    sql(
        'INSERT INTO {inbox} (kind, "key", lead_id, conversation_id, body, received_at) '
        "VALUES ('text', 'SM0', %s, %s, 'wait', '2026-01-01 00:00:00')",
        lead_id,
        conversation,
    )
    foreign.run(insert, "new", conversation, lead_id, "SEND_MESSAGE", "new")
    approve = "UPDATE pending_actions SET status = 'APPROVED', approved_by = 'dana' WHERE id = %s"
    with pytest.raises(REFUSED, match="the lead has written since it was drafted"):
        foreign.run(approve, "old")
    with pytest.raises(ActionSuperseded):
        PendingAction.get_by_id("old").approve(by="dana")
    foreign.run(approve, "new")
    assert [message.body for message in messages()] == ["new"]
    assert close_engine.supersede_drafts() == ["old"]
    assert PendingAction.get_by_id("old").metadata == {"supersededBy": InboxEntry.get().id}


def test_a6_an_approval_that_meets_the_leads_text_does_not_let_the_draft_through(postgres: peewee.Database) -> None:
    """While the lead's text is being taken in, somebody approves: neither deadlocks, and the draft is not sent."""
    lead = new_lead(autonomy_level=AutonomyLevel.MANUAL)
    conversation = close_engine.open_conversation(lead, EntryPoint.SMS_REPLY)
    action = draft(conversation)
    with close_engine.atomic():
        receive_first = PendingAction.select().where(PendingAction.id == action.id).for_update()
        list(receive_first)  # somebody is about to decide
        received = Running(lambda: receive(lead, "SM1", "Forget it")).result()
    assert received.superseded == ()
    with pytest.raises(ActionSuperseded) as refused:
        action.approve(by="dana")
    assert refused.value.action_id == action.id
    with close_engine.atomic():
        receive(lead, "SM2", "Really")
        approving = Running(lambda: action.approve(by="dana"))
        until_they_wait([approving])
    assert isinstance(approving.result(), close_engine.ActionDecided)
    assert messages() == []


# -- C3: the first text is outside the conversation --------------------------------------------------------------------


def test_c3_one_call_opens_the_conversation_and_has_the_first_text_in_it(database: peewee.Database) -> None:
    """The webhook got no conversation for a lead's first text, and whoever opened one then had lost the text."""
    lead = new_lead()
    received = receive(lead, "SM1", "I want a site", open=EntryPoint.SMS_REPLY, metadata={"from": "+1555"})
    conversation = received.conversation
    assert conversation is not None
    assert received.answer
    assert (conversation.stage, conversation.entry_point) == (Stage.INITIATED, EntryPoint.SMS_REPLY)
    assert received.opened is not None
    assert (received.opened.trigger, received.opened.actor) == ("open", f"lead:{lead.id}")
    entry = InboxEntry.get()
    assert (entry.conversation_id, entry.body, entry.metadata) == (conversation.id, "I want a site", {"from": "+1555"})
    again = receive(lead, "SM1", "I want a site", open=EntryPoint.SMS_REPLY)
    assert (again.duplicate, again.answer, values(again.opened)) == (True, False, values(received.opened))
    assert len(conversation.history()) == 1


def test_c3_a_lost_lead_who_writes_again_is_taken_back_where_that_is_wanted(conversation_in: ConversationIn) -> None:
    """A CLOSED_LOST lead who wrote "I changed my mind!" was not answered."""
    conversation = conversation_in(Stage.CLOSED_LOST)
    assert not receive(conversation.lead_id, "SM1", "Hello?").answer
    received = receive(conversation.lead_id, "SM2", "I changed my mind!", open=EntryPoint.SMS_REPLY)
    assert received.answer
    assert received.opened is not None
    assert received.opened.trigger == "reopen"
    assert copy_of(conversation).stage is Stage.INITIATED
    conversation = copy_of(conversation)
    conversation.close_lost("no budget")
    assert receive(conversation.lead_id, "SM2", "I changed my mind!", open=EntryPoint.SMS_REPLY).duplicate
    assert copy_of(conversation).stage is Stage.CLOSED_LOST


def test_c3_what_cannot_be_opened_is_refused_whole(database: peewee.Database, conversation_in: ConversationIn) -> None:
    """A lead without a phone number cannot be texted: nothing is recorded. A lead who has paid is not reopened."""
    with pytest.raises(LeadHasNoPhone):
        receive(Lead.create(phone=None), "SM1", "Hello", open=EntryPoint.SMS_REPLY)
    assert InboxEntry.select().count() == 0
    paid = conversation_in(Stage.COMPLETED)
    received = receive(paid.lead_id, "SM1", "Thanks!", open=EntryPoint.SMS_REPLY)
    assert (received.answer, received.opened, copy_of(paid).stage) == (False, None, Stage.COMPLETED)


def test_c3_two_first_texts_at_once_open_one_conversation(postgres: peewee.Database) -> None:
    """Two webhooks of one lead's first texts arrive at the same moment."""
    for _ in range(5):
        lead_id = new_lead().id
        first, second = race(
            [lambda k=key, i=lead_id: receive(i, f"{i} {k}", "Hi", open=EntryPoint.SMS_REPLY) for key in range(2)]
        )
        assert first.conversation == second.conversation
        assert first.answer
        assert second.answer
        assert sorted([first.opened is None, second.opened is None]) == [False, True]
        assert InboxEntry.select().where(InboxEntry.conversation_id == first.conversation.id).count() == 2


# -- C4: one provider id for a second lead -----------------------------------------------------------------------------


def test_c4_the_id_of_another_leads_text_is_an_error(conversation_in: ConversationIn) -> None:
    """A text under an id that another lead's text has was silently a duplicate: nobody answered it."""
    first, second = conversation_in(Stage.QUALIFYING), conversation_in(Stage.STALLED)
    receive(first.lead_id, "SM1", "hello")
    for lead_id in (second.lead_id, new_lead().id):
        with pytest.raises(TextOfAnotherLead) as error:
            receive(lead_id, "SM1", "hello")
        assert (error.value.key, error.value.lead_id, error.value.first) == ("SM1", lead_id, first.lead_id)
    assert values(copy_of(second)) == values(second)
    assert record_payment(conversation_in(Stage.PAYMENT_SENT).lead_id, "SM1").completed


def test_c4_after_a_merge_the_texts_are_those_of_the_lead_that_was_kept(conversation_in: ConversationIn) -> None:
    """A webhook that comes again after the CRM has merged two leads is the duplicate that it was before."""
    conversation, kept = conversation_in(Stage.QUALIFYING), new_lead()
    receive(conversation.lead_id, "SM1", "hello")
    sql("UPDATE close_engine_conversations SET lead_id = %s WHERE id = %s", kept.id, conversation.id)
    assert receive(kept, "SM1", "hello").duplicate


# -- C5: one payment, several events -----------------------------------------------------------------------------------


def test_c5_a_further_payment_is_recorded_as_surplus_and_shown(conversation_in: ConversationIn) -> None:
    """A second payment of a completed conversation was refused at every retry of its webhook, for ever."""
    conversation = conversation_in(Stage.PAYMENT_SENT)
    first = record_payment(conversation.lead_id, "pi_1", amount=50000, currency="usd")
    for duplicate in (False, True):
        second = record_payment(conversation.lead_id, "pi_2", amount=40000, currency="usd")
        assert (second.surplus, second.duplicate, second.completed.id) == (True, duplicate, first.completed.id)
    (entry,) = close_engine.payment_issues()
    assert (entry.key, entry.amount, entry.currency, entry.issue) == ("pi_2", 40000, "USD", "surplus")
    assert entry.conversation_id == conversation.id
    assert not record_payment(conversation.lead_id, "pi_1").surplus
    assert pipeline().payment_issues == 1


# -- C6: approving again after the retention ---------------------------------------------------------------------------


def test_c6_approving_again_when_the_message_was_cleared_away_says_so(conversation_in: ConversationIn) -> None:
    """After old messages were deleted, a second click on "approve" raised a raw DoesNotExist."""
    conversation = manual(conversation_in)
    action = draft(conversation)
    action.approve(by="dana").withdraw("no longer needed")
    OutboxMessage.delete().execute()
    with pytest.raises(MessageCleared, match="cleared away"):
        action.approve(by="dana")
    assert row(action).status is ActionStatus.APPROVED
    assert messages() == []
