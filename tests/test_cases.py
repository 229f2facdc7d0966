"""Inputs that once failed, one test per case, by its number."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from close_engine import (
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    OutboxMessage,
    PendingAction,
    Stage,
    submit,
)
from close_engine.testing import MovableClock
from tests.foreign import ForeignWriter
from tests.workers import LINK, claimed

Factory = Callable[..., CloseEngineConversation]

# -- F9: what is given for the history ------------------------------------------------------------------------------

SENT_FROM: dict[str, tuple[Stage, dict[str, Any]]] = {
    "SEND_MESSAGE": (Stage.INITIATED, {}),
    "SEND_PREVIEW": (Stage.BUILDING, {"previewUrl": "https://preview.example.com"}),
    "SEND_PAYMENT_LINK": (Stage.PREVIEW_SENT, {"paymentUrl": LINK}),
}


@pytest.mark.parametrize("level", list(AutonomyLevel))
@pytest.mark.parametrize("type", SENT_FROM)
def test_f9_who_drafted_a_message_reaches_the_history(conversation_in: Factory, type: str, level: str) -> None:
    """`submit(actor=…)` was documented "for the history", and for most messages was stored nowhere."""
    stage, metadata = SENT_FROM[type]
    conversation = conversation_in(stage, autonomy_level=AutonomyLevel(level))
    submitted = submit(conversation, ActionType(type), "Hello!", metadata=metadata, actor="writer-3")
    if isinstance(submitted, PendingAction):
        submitted.approve(by="dana")

    message = claimed()
    assert message.submitted_by == "writer-3"
    message.sent("p1")

    sent = conversation.history()[-1]
    assert (sent.actor, sent.metadata["submitted_by"]) == (message.leased_by, "writer-3")


def test_f9_a_message_that_moves_no_stage_keeps_who_drafted_it(conversation_in: Factory) -> None:
    """A further text has no history row of its own, so the outbox itself says who drafted it."""
    conversation = conversation_in(Stage.QUALIFYING)
    submit(conversation, ActionType.SEND_MESSAGE, "And where are you?", actor="writer-3")
    claimed().sent("p1")

    assert [message.submitted_by for message in OutboxMessage.select()] == ["writer-3"]


def test_f9_an_approval_asked_for_by_the_crm_names_its_own_author(
    conversation_in: Factory, foreign: ForeignWriter, close_engine_clock: MovableClock
) -> None:
    """A foreign writer's action names its author in its metadata, as the library's own does."""
    conversation = conversation_in(Stage.QUALIFYING)
    foreign.run(
        "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message, metadata, status) "
        "VALUES ('a1', %s, %s, 'SEND_MESSAGE', 'Hello!', '{\"submittedBy\": \"the CRM\"}', 'PENDING')",
        conversation.id,
        conversation.lead_id,
    )
    foreign.run("UPDATE pending_actions SET status = 'APPROVED', approved_by = 'dana' WHERE id = 'a1'")
    close_engine_clock.move(timedelta(minutes=1))

    assert claimed().submitted_by == "the CRM"
