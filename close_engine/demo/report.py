"""The results of the demo.

>>> end = Handover(5, "SEND_PREVIEW", attempts=2, asked=2, texts=1, exit_code=0, killed="worker-1", survivor="worker-2")
>>> str(end).partition(". ")[0]
'The last 5 messages were left to two worker processes'
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

from close_engine.demo.mistakes import Mistake
from close_engine.stages import ActionStatus, ActionType, AutonomyLevel, MessageStatus, Stage

__all__ = ["Handover", "LevelLine", "Report", "StageLine"]


@dataclass(frozen=True)
class StageLine:
    """One stage at the end of the run.

    Attributes:
        stage: Stage.
        now: number of conversations in it.
        entered: number of times it was entered.
        stay: timedelta, the median time that conversations spent in it before leaving; None if none left.
    """

    stage: Stage
    now: int
    entered: int
    stay: timedelta | None


@dataclass(frozen=True)
class LevelLine:
    """One autonomy level.

    Attributes:
        level: AutonomyLevel.
        conversations: number of conversations.
        paid: number of those that are COMPLETED.
        unapproved: number of messages sent without approval.
        approved: number of messages sent after a human approved them.
    """

    level: AutonomyLevel
    conversations: int
    paid: int
    unapproved: int
    approved: int


@dataclass(frozen=True)
class Handover:
    """The end of the run, left to two worker processes.

    Attributes:
        messages: number of messages left to them.
        topic: str, the topic of the message during whose send a worker was killed.
        attempts: number of times that message was claimed.
        asked: number of times the provider was asked to send it; the second worker finds that it has left.
        texts: number of times the lead received it.
        exit_code: int, the survivor's exit status after it was asked to stop.
        killed: str, the name of the killed worker.
        survivor: str, the name of the other worker.
    """

    messages: int
    topic: str
    attempts: int
    asked: int
    texts: int
    exit_code: int
    killed: str = field(compare=False)
    survivor: str | None = field(compare=False)

    def __str__(self) -> str:
        return (
            f"The last {self.messages} messages were left to two worker processes. {self.killed} was killed (SIGKILL) "
            f"in the middle of sending a {self.topic}. Its lease ran out, and {self.survivor} claimed the message, "
            f"asked the provider and found that it had left, so it was not sent again: {self.attempts} attempts, sent "
            f"{_times(self.asked)}, recorded once, and the lead got {self.texts} text. When asked to stop, "
            f"{self.survivor} exited with status {self.exit_code}."
        )


@dataclass(frozen=True)
class Report:
    """The results of a run.

    Attributes:
        conversations: number of conversations.
        stages: list of StageLine, one per Stage, in order.
        levels: list of LevelLine, one per AutonomyLevel.
        triggers: dict of trigger to the number of times it was fired.
        approvals: dict of (ActionType, ActionStatus) to the number of actions.
        corrected: number of drafts that a human changed while approving them.
        outbox: dict of (topic, MessageStatus) to the number of messages.
        refused: dict of Mistake to the number of times it was made and refused.
        repeated: dict of event to the number of times it was reported again and changed nothing.
        unanswered: number of times the provider did not answer, so that the message was tried again.
        superseded: number of drafts that were not sent, because the lead wrote after they were drafted.
        our_turn: number of active conversations in which the lead wrote last and waits for us.
        their_turn: number of active conversations in which it is the lead's turn.
        handover: Handover.
        closing: timedelta, the median time from opening to payment.
        problems: list of str, one sentence for everything that is wrong.
    """

    conversations: int
    stages: list[StageLine]
    levels: list[LevelLine]
    triggers: dict[str, int]
    approvals: dict[tuple[ActionType, ActionStatus], int]
    corrected: int
    outbox: dict[tuple[str, MessageStatus], int]
    refused: dict[Mistake, int]
    repeated: dict[str, int]
    unanswered: int
    superseded: int
    our_turn: int
    their_turn: int
    handover: Handover
    closing: timedelta
    problems: list[str]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
