"""The mistakes that are made on purpose in the demonstration, each of which must be refused."""

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
from close_engine.inbox import record_payment
from close_engine.machine import TRIGGERS, trigger_between, triggers_from
from close_engine.models import Lead
from close_engine.stages import ACTIVE_STAGES, CLOSED_STAGES, ActionStatus, ActionType, EntryPoint, Stage

__all__ = ["MISTAKES", "Mistake", "Turn"]


@dataclass
class Turn:
    """What one step of a conversation leaves for a mistake to be made with.

    Attributes:
        conversation: as it is after the step.
        outdated: as it was in the memory of another worker before the step.
    """

    random: Random
    role: Role
    conversation: CloseEngineConversation
    outdated: CloseEngineConversation

    def out_of_reach(self) -> list[Stage]:
        """The stages that no trigger leads to from here."""
        stage = self.conversation.stage
        return [other for other in Stage if other is not stage and trigger_between(stage, other) is None]

    def is_outdated(self) -> bool:
        """Whether the other worker has something to act on that is no longer so."""
        return self.outdated.stage in ACTIVE_STAGES and self.outdated.updated_at != self.conversation.updated_at

    def undone(self) -> PendingAction | None:
        """An action that was rejected or has expired."""
        action = self.role.action
        return action if action and action.status in (ActionStatus.REJECTED, ActionStatus.EXPIRED) else None


@dataclass(frozen=True)
class Mistake:
    """What must not happen, tried on purpose.

    Attributes:
        what: what a worker does wrong.
        refusal: the error that it must get.
        make: does it.
        possible: whether it can be made now.
    """

    what: str
    refusal: type[Exception]
    make: Callable[[Turn], object]
    possible: Callable[[Turn], object] = lambda turn: True


def _fire_elsewhere(turn: Turn) -> object:
    allowed = triggers_from(turn.conversation.stage)
    return turn.conversation.fire(turn.random.choice([name for name in TRIGGERS if name not in allowed]))


def _assign_stage(turn: Turn) -> None:
    turn.conversation.stage = turn.random.choice(turn.out_of_reach())


def _write_past_the_library(turn: Turn) -> None:
    table = peewee.Table("close_engine_conversations", _database=current().database)
    stage = turn.random.choice(turn.out_of_reach())
    table.update(stage=stage.value).where(table.c.id == turn.conversation.id).execute()


def _text_without_a_phone(turn: Turn) -> object:
    return open_conversation(Lead.create(phone=None), EntryPoint.REP_CLOSE)


def _approve_what_is_undone(turn: Turn) -> None:
    if action := turn.undone():
        action.approve(by="ben")


def _report_again(turn: Turn) -> None:
    if turn.role.sent:
        turn.role.sent.retry("no answer")


MISTAKES = (
    Mistake("fires a trigger that the stage does not have", TransitionNotAllowed, _fire_elsewhere),
    Mistake(
        "gives a lead up without a reason",
        ConditionNotMet,
        lambda turn: turn.conversation.fire("close_lost"),
        lambda turn: "close_lost" in triggers_from(turn.conversation.stage),
    ),
    Mistake(
        "sends a payment link without the approval it needs",
        ConditionNotMet,
        lambda turn: turn.conversation.send_payment_link("https://pay.example.com/too-early"),
        lambda turn: turn.conversation.stage is Stage.PENDING_APPROVAL,
    ),
    Mistake(
        "books a payment of somebody who was sent no payment link",
        PaymentUnmatched,
        lambda turn: record_payment(turn.conversation.lead_id, key=create_id()),
        lambda turn: turn.conversation.payment_link_sent_at is None,
    ),
    Mistake(
        "acts on what another worker has changed",
        StageConflict,
        lambda turn: turn.outdated.stall(),
        Turn.is_outdated,
    ),
    Mistake(
        "sends a reply that was drafted before the lead's last words",
        StageConflict,
        lambda turn: submit(turn.outdated, ActionType.SEND_MESSAGE, "As I said:"),
        Turn.is_outdated,
    ),
    Mistake(
        "texts a lead whose conversation has closed",
        ConversationClosed,
        lambda turn: submit(turn.conversation, ActionType.SEND_MESSAGE, "One more thing:"),
        lambda turn: turn.conversation.stage in CLOSED_STAGES,
    ),
    Mistake("approves what was rejected or has expired", ActionDecided, _approve_what_is_undone, Turn.undone),
    Mistake("reports on a message that was sent already", LeaseLost, _report_again, lambda turn: turn.role.sent),
    Mistake(
        "uses the key of one event for another",
        KeyReused,
        lambda turn: turn.conversation.fire("stall", key=f"lead-{turn.role.number}"),
    ),
    Mistake("assigns the stage by hand", StageAssignmentRefused, _assign_stage, Turn.out_of_reach),
    Mistake("writes the stage past the library", peewee.IntegrityError, _write_past_the_library, Turn.out_of_reach),
    Mistake("texts a lead without a phone number", LeadHasNoPhone, _text_without_a_phone),
    Mistake(
        "opens a conversation with a lead that has paid",
        ConversationCompleted,
        lambda turn: open_conversation(turn.conversation.lead_id, EntryPoint.PREVIEW_CTA),
        lambda turn: turn.conversation.stage is Stage.COMPLETED,
    ),
)
