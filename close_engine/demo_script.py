"""What the demonstration is made of: the stories, what happens in them, and the mistakes that are made on purpose.

>>> [story.meaning for story in STORIES if "expire" in story.verbs]
['nobody approves the link in time']
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Any

import peewee

from close_engine.approvals import PendingAction, submit
from close_engine.backend import current
from close_engine.conversations import CloseEngineConversation, open_conversation
from close_engine.errors import (
    ActionDecided,
    ConversationClosed,
    ConversationCompleted,
    GuardRefused,
    KeyReused,
    LeadHasNoPhone,
    LeaseLost,
    PaymentUnmatched,
    StageAssignmentRefused,
    StageConflict,
    TransitionNotAllowed,
)
from close_engine.fields import create_id
from close_engine.inbox import record_payment
from close_engine.machine import TRIGGERS, trigger_between, triggers_from
from close_engine.models import Lead
from close_engine.outbox import OutboxMessage
from close_engine.stages import ACTIVE_STAGES, CLOSED_STAGES, ActionStatus, ActionType, AutonomyLevel, EntryPoint, Stage

if TYPE_CHECKING:
    from close_engine.demo import Demo

__all__ = ["CAST", "MISTAKES", "STILL_THERE", "STORIES", "VERBS", "Mistake", "Role", "Story", "Turn", "Verb"]


@dataclass(frozen=True)
class Story:
    """How a conversation goes.

    Attributes:
        weight: how often it happens, beside the others.
        verbs: what happens, in order; see `VERBS`.
        hours_left: how many hours before the demonstration ends the last of it happens: the least and the most.
        reachable: whether the lead has a number that can be texted.
    """

    meaning: str
    weight: int
    autonomy_level: AutonomyLevel
    verbs: tuple[str, ...]
    hours_left: tuple[float, float] = (1, math.inf)
    reachable: bool = True


def _story(meaning: str, weight: int, autonomy_level: AutonomyLevel, verbs: str, *how: Any) -> Story:
    return Story(meaning, weight, autonomy_level, ("open", *verbs.split()), *how)


_FULL, _SEMI, _MANUAL = AutonomyLevel
#: Long enough to be stalled, and to be lost as well.
_SILENT, _SILENT_FOR_GOOD = (80, 200), (260, math.inf)
#: Too short for anything to be stalled or expired.
STILL_THERE = (0.5, 20)

STORIES = (
    _story("pays at once", 20, _FULL, "hello answer build preview link pay"),
    _story("has gaps to fill", 14, _FULL, "hello answer dig answer build preview link pay"),
    _story("wants changes", 8, _FULL, "hello answer build preview change preview link pay"),
    _story(
        "wants changes twice and pays unseen", 5, _FULL, "hello answer build preview change preview change link pay"
    ),
    _story("goes silent and comes back", 8, _FULL, "hello answer dig write build preview link pay"),
    _story("pays while a reminder waits", 5, _FULL, "hello answer build preview link remind pay"),
    _story("pays when given up", 3, _FULL, "hello answer build preview link pay_when_lost"),
    _story("is silent for good", 8, _FULL, "hello", _SILENT_FOR_GOOD),
    _story("has no number for texts", 3, _FULL, "hello", _SILENT_FOR_GOOD, False),
    _story("says no", 6, _FULL, "hello answer build preview refuse"),
    _story("says no and comes back", 4, _FULL, "hello answer refuse return hello answer build preview link pay"),
    _story("a human approves the link", 10, _SEMI, "hello answer build preview link approve pay"),
    _story("nobody approves the link in time", 4, _SEMI, "hello answer build preview link expire link approve pay"),
    _story("pays after a silence", 5, _SEMI, "hello answer build preview link approve pay_late"),
    _story("a human sees it all", 8, _MANUAL, "hello approve answer build preview approve link approve pay"),
    _story(
        "a human corrects and says no",
        5,
        _MANUAL,
        "hello correct answer build preview reject preview approve link reject link correct pay",
    ),
    _story("is silent", 5, _MANUAL, "hello approve answer build preview approve", _SILENT),
    _story("waits for a first text", 4, _MANUAL, "hello", STILL_THERE),
    _story("is asked", 4, _FULL, "hello answer", STILL_THERE),
    _story("is asked more", 4, _FULL, "hello answer dig", STILL_THERE),
    _story("waits for the site", 6, _FULL, "hello answer build", STILL_THERE),
    _story("looks at the site", 5, _SEMI, "hello answer build preview", STILL_THERE),
    _story("waits for changes", 4, _MANUAL, "hello approve answer build preview approve change", STILL_THERE),
    _story("waits for a link", 5, _SEMI, "hello answer build preview link", STILL_THERE),
    _story("is about to pay", 5, _FULL, "hello answer build preview link", STILL_THERE),
)

#: Who is there even among few: every story, and a second who waits for the site when it is sent to the first.
CAST = [*STORIES, next(story for story in STORIES if story.meaning == "waits for the site")]


@dataclass
class Role:
    """What has become of one lead.

    Attributes:
        moments: when each verb of the story happens.
        drafts: how many were submitted.
        action: the newest that waits, or waited, for a human.
        sent: the newest message that was sent.
    """

    number: int
    story: Story
    moments: list[datetime]
    lead: Lead = field(init=False)
    conversation: CloseEngineConversation = field(init=False)
    drafts: int = 0
    action: PendingAction | None = None
    sent: OutboxMessage | None = None


@dataclass(frozen=True)
class Verb:
    """Something that happens in a conversation.

    Attributes:
        hours: that pass before it: the least and the most.
        play: lets it happen, in a conversation that was just loaded.
    """

    hours: tuple[float, float]
    play: Callable[[Demo, Role], None]


def _hello(demo: Demo, role: Role) -> None:
    demo.submit(role, ActionType.SEND_MESSAGE, "Hi! What do you do?")


def _answer(demo: Demo, role: Role) -> None:
    demo.receive(role, "We are a bakery.").record(questions=["business"], data={"business": "bakery"})


def _dig(demo: Demo, role: Role) -> None:
    role.conversation.collect_info(actor=demo.worker())
    demo.submit(role, ActionType.SEND_MESSAGE, "And where is it?")


def _build(demo: Demo, role: Role) -> None:
    role.conversation.start_building(actor=demo.worker())


def _preview(demo: Demo, role: Role) -> None:
    demo.submit(role, ActionType.SEND_PREVIEW, "Here is your site.", previewUrl="https://preview.example.com/1")


def _change(demo: Demo, role: Role) -> None:
    demo.receive(role, "Make it blue.").request_edits(actor="inbox")


def _link(demo: Demo, role: Role) -> None:
    demo.submit(role, ActionType.SEND_PAYMENT_LINK, "Shall we?", paymentUrl="https://pay.example.com/1")


def _remind(demo: Demo, role: Role) -> None:
    demo.submit(role, ActionType.SEND_MESSAGE, "Any questions?", timedelta(hours=70))


def _write(demo: Demo, role: Role) -> None:
    demo.receive(role, "Sorry, I was away.")


def _refuse(demo: Demo, role: Role) -> None:
    demo.receive(role, "No, thanks.").close_lost("wants no site", actor="inbox")


VERBS = {
    "open": Verb((0, 0), lambda demo, role: demo.open(role)),
    "hello": Verb((0.02, 0.2), _hello),
    "answer": Verb((0.1, 8), _answer),
    "dig": Verb((0.02, 0.2), _dig),
    "build": Verb((0.2, 24), _build),
    "preview": Verb((0.3, 1.5), _preview),
    "change": Verb((0.5, 48), _change),
    "link": Verb((0.1, 6), _link),
    "remind": Verb((0.1, 0.2), _remind),
    "approve": Verb((0.2, 12), lambda demo, role: demo.approve(role)),
    "correct": Verb((0.2, 12), lambda demo, role: demo.approve(role, "In better words.")),
    "reject": Verb((0.2, 12), lambda demo, role: demo.reject(role)),
    "expire": Verb((31, 36), lambda demo, role: demo.expired(role)),
    "pay": Verb((0.2, 60), lambda demo, role: demo.pay(role)),
    "pay_late": Verb((80, 200), lambda demo, role: demo.pay(role)),
    "pay_when_lost": Verb((260, 400), lambda demo, role: demo.pay(role)),
    "write": Verb((80, 200), _write),
    "refuse": Verb((1, 60), _refuse),
    "return": Verb((100, 300), lambda demo, role: demo.open(role, EntryPoint.PREVIEW_CTA)),
}


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
        GuardRefused,
        lambda turn: turn.conversation.fire("close_lost"),
        lambda turn: "close_lost" in triggers_from(turn.conversation.stage),
    ),
    Mistake(
        "sends a payment link without the approval it needs",
        GuardRefused,
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
