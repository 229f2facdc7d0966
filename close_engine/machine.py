"""The transition table as data, and the function that answers: where does this trigger lead?

Python, the database's guard, the diagram and the documentation all follow this one table; tests compare them with it.
One `transitions.Machine` runs it for the whole process, and never touches a row:

>>> decide("collect_info", Facts(Stage.QUALIFYING)).dest
<Stage.COLLECTING_INFO: 'COLLECTING_INFO'>
>>> decide("close_lost", Facts(Stage.BUILDING))
Traceback (most recent call last):
close_engine.ConditionNotMet: The conversation is BUILDING, and close_lost is refused: a reason must be given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

from transitions import Machine, MachineError

from close_engine.errors import ActionDecided, ConditionNotMet, TransitionNotAllowed, UnknownTrigger
from close_engine.stages import ACTIVE_STAGES, ActionStatus, AutonomyLevel, Stage

__all__ = [
    "ACTION_TRANSITIONS",
    "TRANSITIONS",
    "TRIGGERS",
    "Condition",
    "Facts",
    "Stamp",
    "Transition",
    "allowed_triggers",
    "decide",
    "decide_action",
    "pairs",
    "trigger_between",
]


class Stamp(Enum):
    """What a transition does to a column other than the stage."""

    NOW = "set to now"
    CLEARED = "cleared"
    INCREMENTED = "plus one"
    GIVEN = "set to the argument of the same name"


class Facts(NamedTuple):
    """What a decision rests on: the state of a conversation, and the arguments that the caller passes (`given`)."""

    stage: Stage
    conversation_id: str | None = None
    autonomy_level: AutonomyLevel = AutonomyLevel.FULL_AUTO
    payment_link_sent: bool = False
    given: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Condition:
    """A condition of the table, on top of the stage.

    Attributes:
        sentence: says what is missing if the condition is not met.
        is_met: tells from the Facts whether it is met.
        is_about_arguments: whether the caller can meet it by passing arguments to the trigger.
    """

    sentence: str
    is_met: Callable[[Facts], bool]
    is_about_arguments: bool

    def is_among(self, met: tuple[Condition, ...]) -> bool:
        """Return whether the condition is among those that are met. The machine calls this."""
        return self in met


@dataclass(frozen=True)
class Transition:
    """One row of the table.

    Attributes:
        trigger: the trigger's name.
        sources: the stages that it can be fired from.
        dest: the stage that it leads to; None is "where things stand", which only the database knows.
        meaning: what the trigger means, for the documentation.
        conditions: what must be met besides the stage, in the order in which it is checked.
        stamps: column name to what happens to that column.
    """

    trigger: str
    sources: tuple[Stage, ...]
    dest: Stage | None
    meaning: str
    conditions: tuple[Condition, ...] = ()
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    @property
    def dests(self) -> tuple[Stage, ...]:
        """Every stage that the trigger can lead to."""
        return ACTIVE_STAGES if self.dest is None else (self.dest,)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


LINK_GIVEN = Condition("a payment link URL must be given", lambda f: _is_text(f.given.get("payment_link_url")), True)
MAY_SEND_LINK = Condition(
    "its autonomy level requires approval first (pass approved_by)",
    lambda f: f.autonomy_level is AutonomyLevel.FULL_AUTO or _is_text(f.given.get("approved_by")),
    True,
)
LINK_SENT = Condition("no payment link was sent", lambda f: f.payment_link_sent, False)
REASON_GIVEN = Condition("a reason must be given", lambda f: _is_text(f.given.get("closed_lost_reason")), True)

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
    Transition("withdraw_approval", (S.PENDING_APPROVAL,), S.PREVIEW_SENT, "the approval is no longer needed"),
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
        "the lead is back: go on from where things stand, the stage it stalled in and what was sent since",
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


#: The transition table of pending actions: (trigger, source, dest).
ACTION_TRANSITIONS: tuple[tuple[str, ActionStatus, ActionStatus], ...] = (
    ("approve", ActionStatus.PENDING, ActionStatus.APPROVED),
    ("reject", ActionStatus.PENDING, ActionStatus.REJECTED),
    ("expire", ActionStatus.PENDING, ActionStatus.EXPIRED),
)


@dataclass
class _Position:
    """The object that the machine moves, instead of a row."""

    stage: Stage


def _build_machine() -> Machine:
    machine = Machine(
        model=None, states=list(Stage), initial=S.INITIATED, auto_transitions=False, model_attribute="stage"
    )
    for row in TRANSITIONS:
        # `resume` has no dest here, because only the database knows where it leads. To the machine it is internal.
        conditions: list[str | Callable[..., bool | None]] = [condition.is_among for condition in row.conditions]
        machine.add_transition(row.trigger, list(row.sources), row.dest, conditions=conditions)
    return machine


_machine = _build_machine()


def decide(trigger: str, facts: Facts) -> Transition:
    """Decide where a trigger leads from a stage.

    Args:
        trigger: the trigger's name.
        facts: the stage, and whatever the conditions need.

    Returns:
        the row of the table that applies.

    Raises:
        UnknownTrigger: the table has no trigger of this name.
        TransitionNotAllowed: the table does not allow the trigger from this stage.
        ConditionNotMet: the table allows it, but a condition is not met.
    """
    transition = TRIGGERS.get(trigger)
    if transition is None:
        raise UnknownTrigger(trigger, list(TRIGGERS))
    met = tuple(condition for condition in transition.conditions if condition.is_met(facts))
    fires = _fires(trigger, facts.stage, met)
    if fires is None:
        raise TransitionNotAllowed(facts.conversation_id, trigger, facts.stage, triggers_from(facts.stage))
    if not fires:
        unmet = next(condition for condition in transition.conditions if condition not in met)
        raise ConditionNotMet(facts.conversation_id, trigger, facts.stage, unmet.sentence)
    return transition


def allowed_triggers(facts: Facts) -> list[str]:
    """List the triggers that can be fired, provided their arguments are passed; in the table's order."""
    return [
        trigger for trigger, row in TRIGGERS.items() if _fires(trigger, facts.stage, _met_with_arguments(row, facts))
    ]


def _met_with_arguments(transition: Transition, facts: Facts) -> tuple[Condition, ...]:
    return tuple(each for each in transition.conditions if each.is_about_arguments or each.is_met(facts))


@cache
def _fires(trigger: str, stage: Stage, met: tuple[Condition, ...]) -> bool | None:
    """Ask the machine. The answer depends on the arguments alone, so it is cached.

    Returns:
        whether the trigger fires if exactly these conditions are met; None if the stage does not have the trigger.
    """
    try:
        return bool(_machine.events[trigger].trigger(_Position(stage), met))
    except MachineError:
        return None


def decide_action(trigger: str, action_id: str, status: ActionStatus) -> ActionStatus:
    """Return the status that a decision on a pending action leads to.

    Args:
        trigger: `approve`, `reject` or `expire`.
        action_id: the action's id, for the error.
        status: the action's status now.

    Raises:
        ActionDecided: somebody already decided, or the action expired.
    """
    for name, source, dest in ACTION_TRANSITIONS:
        if (name, source) == (trigger, status):
            return dest
    raise ActionDecided(action_id, trigger, status)


def triggers_from(stage: Stage) -> list[str]:
    """List the triggers that the table allows from a stage, in the table's order."""
    return [transition.trigger for transition in TRANSITIONS if stage in transition.sources]


def pairs() -> Iterator[tuple[str, Stage, Stage]]:
    """Yield every (trigger, source, dest) that the database's guard allows."""
    for transition in TRANSITIONS:
        for source in transition.sources:
            for dest in transition.dests:
                yield transition.trigger, source, dest


def trigger_between(source: Stage, dest: Stage) -> str | None:
    """Return the trigger that leads from one stage to another, or None; there is at most one."""
    return next((trigger for trigger, *ends in pairs() if ends == [source, dest]), None)
