"""The autonomy level is judged when a draft is submitted, and again when it leaves: the stricter one holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from close_engine import (
    ActionStatus,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    MessageStatus,
    OutboxMessage,
    PendingAction,
    Stage,
    needs_approval,
    outbox,
    submit,
)
from tests.foreign import ForeignWriter
from tests.rows import copy_of
from tests.workers import LINK, sql

ConversationIn = Callable[..., CloseEngineConversation]

MESSAGE, LINK_TYPE = ActionType.SEND_MESSAGE, ActionType.SEND_PAYMENT_LINK
PAYMENT = {"paymentUrl": LINK}


def set_level(conversation: CloseEngineConversation, level: str, table: str = "leads") -> None:
    of = conversation.lead_id if table == "leads" else conversation.id
    sql(f"UPDATE {table} SET autonomy_level = %s WHERE id = %s", level, of)


def test_the_level_of_the_lead_holds_if_it_has_become_stricter(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    set_level(conversation, "MANUAL")
    assert isinstance(submit(conversation, MESSAGE, "Hello"), PendingAction)


def test_the_level_of_the_conversation_holds_if_it_is_the_stricter_one(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING, autonomy_level=AutonomyLevel.MANUAL)
    set_level(conversation, "FULL_AUTO")
    assert isinstance(submit(conversation, MESSAGE, "Hello"), PendingAction)


def test_a_level_that_nobody_knows_is_the_strictest(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    set_level(conversation, "SUPERVISED")
    assert isinstance(submit(conversation, MESSAGE, "Hello"), PendingAction)


@pytest.mark.parametrize("table", ["leads", "close_engine_conversations"])
def test_a_text_becomes_an_action_if_a_human_must_see_it_now(conversation_in: ConversationIn, table: str) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    message = submit(conversation, MESSAGE, "Hello", key="k", actor="ai", metadata={"n": 1}, if_lead_writes="send")
    assert isinstance(message, OutboxMessage)
    assert message.level is AutonomyLevel.FULL_AUTO
    set_level(conversation, "SEMI_AUTO", table)
    (claimed,) = outbox.claim()
    claimed.release()
    set_level(conversation, "MANUAL", table)
    assert outbox.claim() == []
    message = OutboxMessage.get_by_id(message.id)
    assert (message.status, message.last_error) == (MessageStatus.WITHDRAWN, "a human must approve it first")
    action = PendingAction.get_by_id(message.action_id)
    assert (action.status, action.draft_message, action.type) == (ActionStatus.PENDING, "Hello", MESSAGE)
    assert (action.conversation_id, action.lead_id) == (conversation.id, conversation.lead_id)
    assert action.metadata == {"n": 1, "submittedBy": "ai", "ifLeadWrites": "send"}
    assert action.expires_at is not None
    assert submit(copy_of(conversation), MESSAGE, "Hello", key="k") == action
    approved = action.approve(by="dana")
    (claimed,) = outbox.claim()
    assert (claimed.id, claimed.action_id, claimed.body) == (approved.id, action.id, "Hello")
    assert claimed.sent().status is MessageStatus.SENT


def test_a_level_that_changes_while_a_draft_is_judged_is_not_the_one_it_was_judged_at(
    conversation_in: ConversationIn,
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)

    def judge(level: AutonomyLevel, type: ActionType) -> bool:
        set_level(conversation, "MANUAL")
        return needs_approval(level, type)

    message = submit(conversation, MESSAGE, "Hello", policy=judge)
    assert isinstance(message, OutboxMessage)
    assert message.level is AutonomyLevel.FULL_AUTO
    assert outbox.claim() == []
    assert PendingAction.get().draft_message == "Hello"


def test_a_payment_link_is_asked_about_at_a_middle_level(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    submit(conversation, LINK_TYPE, "Pay", metadata=PAYMENT)
    set_level(conversation, "SEMI_AUTO")
    assert outbox.claim() == []
    (action,) = PendingAction.select()
    action.approve(by="dana")
    outbox.claim()[0].sent()
    assert copy_of(conversation).stage is Stage.PAYMENT_SENT


def test_what_a_human_has_seen_and_what_was_judged_at_that_level_leaves(conversation_in: ConversationIn) -> None:
    seen, let_through = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    for conversation in (seen, let_through):
        set_level(conversation, "MANUAL")
    action = submit(seen, MESSAGE, "Hello")
    assert isinstance(action, PendingAction)
    action.approve(by="dana")
    own = submit(let_through, MESSAGE, "Hello", policy=lambda level, type: False)
    assert isinstance(own, OutboxMessage)
    assert (own.approved_by, own.level) == ("policy", AutonomyLevel.MANUAL)
    assert len(outbox.claim(10)) == 2


def test_a_laxer_level_takes_back_no_question(conversation_in: ConversationIn, foreign: ForeignWriter) -> None:
    conversation = conversation_in(Stage.QUALIFYING, autonomy_level=AutonomyLevel.MANUAL)
    action = submit(conversation, MESSAGE, "Hello")
    for table in ("leads", "close_engine_conversations"):
        set_level(conversation, "FULL_AUTO", table)
    assert PendingAction.get_by_id(action.id).status is ActionStatus.PENDING
    assert isinstance(submit(copy_of(conversation), MESSAGE, "Hello again"), OutboxMessage)


def test_another_effect_is_nobodys_question(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    outbox.enqueue(conversation, "build_site")
    set_level(conversation, "MANUAL")
    assert [message.topic for message in outbox.claim()] == ["build_site"]
