"""The mistakes that the demo makes on purpose. Each must be refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import peewee

from close_engine.approvals import PendingAction, submit
from close_engine.conversations import CloseEngineConversation, open_conversation
from close_engine.database.binding import current
from close_engine.database.fields import create_id
from close_engine.demo.stories import Role
from close_engine.errors import (
    ActionDecided,
    ConditionNotMet,
    ConversationClosed,
    ConversationCompleted,
    KeyReused,
    LeadHasNoPhone,
    LeaseLost,
    PaymentUnmatched,
    StageAssignmentRefused,
    StageConflict,
    TransitionNotAllowed,
)
from close_engine.machine import TRIGGERS, trigger_between, triggers_from
from close_engine.models import Lead
from close_engine.payments import record_payment
from close_engine.stages import ACTIVE_STAGES, CLOSED_STAGES, ActionStatus, ActionType, EntryPoint, Stage

__all__ = ["MISTAKES", "Mistake", "Turn"]


@dataclass
class Turn:
    """The situation after one step of a conversation, in which a mistake can be made.

    Attributes:
        random: the demo's random numbers.
        role: the lead's Role.
        conversation: CloseEngineConversation, as it is after the step.
        stale: another worker's copy of it, loaded before the step.
    """

    random: Random
    role: Role
    conversation: CloseEngineConversation
    stale: CloseEngineConversation

    def unreachable_stages(self) -> list[Stage]:
        """Return the stages that no trigger leads to from here."""
        stage = self.conversation.stage
        return [other for other in Stage if other is not stage and trigger_between(stage, other) is None]

    def has_stale_copy(self) -> bool:
        """Whether the other worker's copy is outdated, but still active, so that the worker would act on it."""
        return self.stale.stage in ACTIVE_STAGES and self.stale.updated_at != self.conversation.updated_at

    def closed_action(self) -> PendingAction | None:
        """Return the lead's action if it was rejected or has expired."""
        action = self.role.action
        return action if action and action.status in (ActionStatus.REJECTED, ActionStatus.EXPIRED) else None


@dataclass(frozen=True)
class Mistake:
    """Something that must not happen, attempted on purpose.

    Attributes:
        description: what a worker does wrong, as in "sending a message twice".
        refusal: the exception class that it must get.
        make: function that makes the mistake.
        is_possible: function that says if the mistake can be made now.
    """

    description: str
    refusal: type[Exception]
    make: Callable[[Turn], object]
    is_possible: Callable[[Turn], object] = lambda turn: True


def _fire_wrong_trigger(turn: Turn) -> object:
    allowed = triggers_from(turn.conversation.stage)
    return turn.conversation.fire(turn.random.choice([name for name in TRIGGERS if name not in allowed]))


def _assign_stage(turn: Turn) -> None:
    turn.conversation.stage = turn.random.choice(turn.unreachable_stages())


def _write_bypassing_the_library(turn: Turn) -> None:
    table = peewee.Table("close_engine_conversations", _database=current().database)
    stage = turn.random.choice(turn.unreachable_stages())
    table.update(stage=stage.value).where(table.c.id == turn.conversation.id).execute()


def _text_without_a_phone(turn: Turn) -> object:
    return open_conversation(Lead.create(phone=None), EntryPoint.REP_CLOSE)


def _approve_closed_action(turn: Turn) -> None:
    if action := turn.closed_action():
        action.approve(by="ben")


def _report_again(turn: Turn) -> None:
    if turn.role.sent:
        turn.role.sent.retry("no answer")


MISTAKES = (
    Mistake("firing a trigger that the stage does not allow", TransitionNotAllowed, _fire_wrong_trigger),
    Mistake(
        "giving up a lead without a reason",
        ConditionNotMet,
        lambda turn: turn.conversation.fire("close_lost"),
        lambda turn: "close_lost" in triggers_from(turn.conversation.stage),
    ),
    Mistake(
        "sending a payment link without the approval it needs",
        ConditionNotMet,
        lambda turn: turn.conversation.send_payment_link("https://pay.example.com/too-early"),
        lambda turn: turn.conversation.stage is Stage.PENDING_APPROVAL,
    ),
    Mistake(
        "recording a payment although no payment link was sent",
        PaymentUnmatched,
        lambda turn: record_payment(turn.conversation.lead_id, key=create_id()),
        lambda turn: turn.conversation.payment_link_sent_at is None,
    ),
    Mistake(
        "acting on a stale copy of a conversation",
        StageConflict,
        lambda turn: turn.stale.stall(),
        Turn.has_stale_copy,
    ),
    Mistake(
        "sending a reply that was drafted before the lead's latest text",
        StageConflict,
        lambda turn: submit(turn.stale, ActionType.SEND_MESSAGE, "As I said:"),
        Turn.has_stale_copy,
    ),
    Mistake(
        "texting a lead whose conversation is closed",
        ConversationClosed,
        lambda turn: submit(turn.conversation, ActionType.SEND_MESSAGE, "One more thing:"),
        lambda turn: turn.conversation.stage in CLOSED_STAGES,
    ),
    Mistake(
        "approving a draft that was rejected or has expired", ActionDecided, _approve_closed_action, Turn.closed_action
    ),
    Mistake("reporting a message as failed after it was sent", LeaseLost, _report_again, lambda turn: turn.role.sent),
    Mistake(
        "using the key of one event for another",
        KeyReused,
        lambda turn: turn.conversation.fire("stall", key=f"lead-{turn.role.number}"),
    ),
    Mistake("assigning the stage directly", StageAssignmentRefused, _assign_stage, Turn.unreachable_stages),
    Mistake(
        "writing the stage with raw SQL", peewee.IntegrityError, _write_bypassing_the_library, Turn.unreachable_stages
    ),
    Mistake("texting a lead without a phone number", LeadHasNoPhone, _text_without_a_phone),
    Mistake(
        "opening a conversation with a lead who has paid",
        ConversationCompleted,
        lambda turn: open_conversation(turn.conversation.lead_id, EntryPoint.PREVIEW_CTA),
        lambda turn: turn.conversation.stage is Stage.COMPLETED,
    ),
)
