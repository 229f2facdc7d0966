"""The transition table as data, and the pure question it answers: where does this trigger lead?

One table serves Python, the database's guard (a test compares them), the diagram and the documentation.
It is run by one `transitions.Machine` for the whole process, never on a row:

>>> decide("collect_info", Draft(Stage.QUALIFYING)).dest
<Stage.COLLECTING_INFO: 'COLLECTING_INFO'>
>>> decide("close_lost", Draft(Stage.BUILDING))
Traceback (most recent call last):
close_engine.errors.GuardRefused: The conversation is BUILDING, and close_lost is refused: a reason must be given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

from transitions import Machine, MachineError

from close_engine.errors import ActionDecided, GuardRefused, TransitionNotAllowed, UnknownTrigger
from close_engine.stages import ACTIVE_STAGES, ActionStatus, AutonomyLevel, Stage

__all__ = [
    "ACTION_TRANSITIONS",
    "TRANSITIONS",
    "TRIGGERS",
    "Draft",
    "Stamp",
    "Transition",
    "decide",
    "decide_action",
    "mermaid",
    "pairs",
    "trigger_between",
]


class Stamp(Enum):
    """What a transition does to a column besides the stage."""

    NOW = "set to now"
    CLEARED = "cleared"
    INCREMENTED = "plus one"
    GIVEN = "set to the argument of the same name"


class Draft(NamedTuple):
    """What is decided on: a conversation's facts, and what the caller gives with the trigger."""

    stage: Stage
    conversation_id: str | None = None
    autonomy_level: AutonomyLevel = AutonomyLevel.FULL_AUTO
    payment_link_sent: bool = False
    given: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Guard:
    """A condition on top of the table.

    Attributes:
        sentence: what is missing where it fails.
        holds: whether it does; gets the draft.
        on_arguments: True where the caller can satisfy it with what he gives.
    """

    sentence: str
    holds: Callable[[Draft], bool]
    on_arguments: bool


@dataclass(frozen=True)
class Transition:
    """One row of the table.

    Attributes:
        trigger: its name.
        sources: the stages that it leads from.
        dest: where it leads; None is "the stage it stalled in", which the history knows.
        meaning: what the trigger says, for the documentation.
        guards: conditions on top of the stage.
        stamps: column name to what happens to it.
    """

    trigger: str
    sources: tuple[Stage, ...]
    dest: Stage | None
    meaning: str
    guards: tuple[Guard, ...] = ()
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    @property
    def dests(self) -> tuple[Stage, ...]:
        """Every stage it may lead to."""
        return ACTIVE_STAGES if self.dest is None else (self.dest,)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


LINK_GIVEN = Guard("a payment link URL must be given", lambda d: _is_text(d.given.get("payment_link_url")), True)
MAY_SEND_LINK = Guard(
    "its autonomy level asks for an approval first (give approved_by)",
    lambda d: d.autonomy_level is AutonomyLevel.FULL_AUTO or _is_text(d.given.get("approved_by")),
    True,
)
LINK_SENT = Guard("no payment link was sent", lambda d: d.payment_link_sent, False)
REASON_GIVEN = Guard("a reason must be given", lambda d: _is_text(d.given.get("closed_lost_reason")), True)

S = Stage

TRANSITIONS: tuple[Transition, ...] = (
    Transition("start_qualifying", (S.INITIATED,), S.QUALIFYING, "the first message is out, ask the core questions"),
    Transition("collect_info", (S.QUALIFYING,), S.COLLECTING_INFO, "follow up on gaps"),
    Transition("start_building", (S.QUALIFYING, S.COLLECTING_INFO), S.BUILDING, "enough is known, generate the site"),
    Transition("send_preview", (S.BUILDING, S.EDIT_LOOP), S.PREVIEW_SENT, "the preview link is out"),
    Transition(
        "request_edits",
        (S.PREVIEW_SENT,),
        S.EDIT_LOOP,
        "the lead asks for changes",
        stamps={"edit_rounds": Stamp.INCREMENTED},
    ),
    Transition(
        "request_approval", (S.PREVIEW_SENT, S.EDIT_LOOP), S.PENDING_APPROVAL, "a human must approve the next message"
    ),
    Transition("withdraw_approval", (S.PENDING_APPROVAL,), S.PREVIEW_SENT, "the approval is no longer asked for"),
    Transition(
        "send_payment_link",
        (S.PREVIEW_SENT, S.EDIT_LOOP, S.PENDING_APPROVAL),
        S.PAYMENT_SENT,
        "the payment link is out",
        (LINK_GIVEN, MAY_SEND_LINK),
        {"payment_link_url": Stamp.GIVEN, "payment_link_sent_at": Stamp.NOW},
    ),
    Transition(
        "complete",
        tuple(stage for stage in Stage if stage is not S.COMPLETED),
        S.COMPLETED,
        "the lead paid; money is never refused because of the stage",
        (LINK_SENT,),
        {"completed_at": Stamp.NOW},
    ),
    Transition("stall", ACTIVE_STAGES, S.STALLED, "the lead stopped responding", stamps={"stalled_at": Stamp.NOW}),
    Transition(
        "resume",
        (S.STALLED,),
        None,
        "the lead is back: on from the stage it stalled in (QUALIFYING where unknown)",
        stamps={"stalled_at": Stamp.CLEARED},
    ),
    Transition(
        "close_lost",
        (*ACTIVE_STAGES, S.STALLED),
        S.CLOSED_LOST,
        "the lead did not convert",
        (REASON_GIVEN,),
        {"closed_lost_at": Stamp.NOW, "closed_lost_reason": Stamp.GIVEN},
    ),
    Transition(
        "reopen",
        (S.CLOSED_LOST,),
        S.INITIATED,
        "a lost lead comes back",
        stamps={"closed_lost_at": Stamp.CLEARED, "closed_lost_reason": Stamp.CLEARED},
    ),
)

TRIGGERS: dict[str, Transition] = {transition.trigger: transition for transition in TRANSITIONS}


#: The second, small table: what becomes of a pending action, as (trigger, source, dest).
ACTION_TRANSITIONS: tuple[tuple[str, ActionStatus, ActionStatus], ...] = (
    ("approve", ActionStatus.PENDING, ActionStatus.APPROVED),
    ("reject", ActionStatus.PENDING, ActionStatus.REJECTED),
    ("expire", ActionStatus.PENDING, ActionStatus.EXPIRED),
)


@dataclass
class _Position:
    """What the machine moves: the stage of a draft, and whether the guards of the trigger hold for it."""

    stage: Stage
    guards_hold: bool


@dataclass
class ActionDraft:
    """What the machine of pending actions decides on."""

    status: ActionStatus


def _build_machine() -> Machine:
    machine = Machine(
        model=None,
        states=list(Stage),
        initial=S.INITIATED,
        auto_transitions=False,
        model_attribute="stage",
    )
    for transition in TRANSITIONS:
        # One internal transition: where `resume` leads is the history's to say.
        machine.add_transition(transition.trigger, list(transition.sources), transition.dest, conditions="guards_hold")
    return machine


_machine = _build_machine()
_action_machine = Machine(
    model=None,
    states=list(ActionStatus),
    initial=ActionStatus.PENDING,
    transitions=[list(row) for row in ACTION_TRANSITIONS],
    auto_transitions=False,
    model_attribute="status",
)


def decide(trigger: str, draft: Draft) -> Transition:
    """Where a trigger leads from a draft's stage.

    Args:
        trigger: its name.
        draft: the facts.

    Returns:
        the row of the table that applies.

    Raises:
        UnknownTrigger: the table has no such trigger.
        TransitionNotAllowed: not from this stage.
        GuardRefused: from this stage, but a guard fails.
    """
    transition = TRIGGERS.get(trigger)
    if transition is None:
        raise UnknownTrigger(trigger, list(TRIGGERS))
    failing = next((guard for guard in transition.guards if not guard.holds(draft)), None)
    stage = draft.stage
    try:
        fired = _fires(trigger, stage, failing is None)
    except MachineError:
        raise TransitionNotAllowed(draft.conversation_id, trigger, stage, triggers_from(stage)) from None
    if not fired:
        raise GuardRefused(draft.conversation_id, trigger, stage, failing.sentence if failing else "a guard fails")
    return transition


@cache
def _fires(trigger: str, stage: Stage, guards_hold: bool) -> bool:
    """The machine's answer, which never changes: it is asked once.

    Raises:
        MachineError: there is no such trigger from this stage.
    """
    return _machine.events[trigger].trigger(_Position(stage, guards_hold))


def decide_action(trigger: str, action_id: str, status: ActionStatus) -> ActionStatus:
    """The status that a decision leads to.

    Args:
        trigger: `approve`, `reject` or `expire`.
        action_id: the action, for the error.
        status: what it is now.

    Raises:
        ActionDecided: it is decided already.
    """
    draft = ActionDraft(status)
    try:
        _action_machine.events[trigger].trigger(draft)
    except MachineError:
        raise ActionDecided(action_id, trigger, status) from None
    return draft.status


def triggers_from(stage: Stage) -> list[str]:
    """The triggers that the table has from a stage, in the table's order."""
    return [transition.trigger for transition in TRANSITIONS if stage in transition.sources]


def pairs() -> Iterator[tuple[str, Stage, Stage]]:
    """Every (trigger, source, dest) that the database's guard allows."""
    for transition in TRANSITIONS:
        for source in transition.sources:
            for dest in transition.dests:
                yield transition.trigger, source, dest


def trigger_between(source: Stage, dest: Stage) -> str | None:
    """The trigger that leads from one stage to another; there is at most one."""
    return next((trigger for trigger, *ends in pairs() if ends == [source, dest]), None)


def mermaid() -> str:
    """The state diagram in Mermaid's words. What every active stage can do is drawn once, from the group of them."""
    inside: list[str] = []
    outside: list[str] = []
    for transition in TRANSITIONS:
        sources: tuple[str, ...] = transition.sources
        if set(ACTIVE_STAGES) <= set(sources):
            sources = ("ACTIVE", *(stage for stage in sources if stage not in ACTIVE_STAGES))
        for source in sources:
            within = source in ACTIVE_STAGES and transition.dest in ACTIVE_STAGES
            arrow = f"{source} --> {transition.dest or 'WHERE_IT_STALLED'}: {transition.trigger}"
            (inside if within else outside).append(arrow)
    group = [
        'state "any active stage" as ACTIVE {',
        '    state "the stage it stalled in" as WHERE_IT_STALLED',
        *(f"    {arrow}" for arrow in inside),
        "}",
    ]
    lines = [f"[*] --> {S.INITIATED}", *group, *outside, f"{S.COMPLETED} --> [*]"]
    return "\n".join(["stateDiagram-v2", *(f"    {line}" for line in lines)])
