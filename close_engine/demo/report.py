"""What came out of the demonstration, and how it is told.

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
    """One stage in the end.

    Attributes:
        now: number of conversations in it.
        entered: how often it was entered.
        stay: median of the times that conversations stayed in it before they left it; None where none left it.
    """

    stage: Stage
    now: int
    entered: int
    stay: timedelta | None


@dataclass(frozen=True)
class LevelLine:
    """One autonomy level.

    Attributes:
        conversations: number of them.
        paid: how many of them are COMPLETED.
        at_once: number of messages that were sent without a human's look.
        approved: number of those that a human had approved.
    """

    level: AutonomyLevel
    conversations: int
    paid: int
    at_once: int
    approved: int


@dataclass(frozen=True)
class Handover:
    """The end, with two worker processes.

    Attributes:
        messages: how many they were left.
        topic: what the message was in whose sending one was killed.
        killed, survivor: the workers' names.
        attempts: how often that message was claimed.
        asked: how often the provider was asked to send it.
        texts: how often the lead got it.
        exit_code: of the survivor, who was told to stop when all was sent.
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
            f"in the middle of sending one, a {self.topic}; its lease ran out, and {self.survivor} sent it: "
            f"{self.attempts} attempts, recorded once. The provider was asked {self.asked} times, under the same key, "
            f"and the lead got {self.texts} text. Told to stop, {self.survivor} ended with {self.exit_code}."
        )


@dataclass(frozen=True)
class Report:
    """What came out of it.

    Attributes:
        conversations: number of them.
        stages: list of StageLine, one for each Stage, in order.
        levels: list of LevelLine, one for each AutonomyLevel.
        triggers: trigger to how often it was fired.
        approvals: (ActionType, ActionStatus) to number of actions.
        corrected: how many of those that were approved a human had changed.
        outbox: (topic, MessageStatus) to number of messages.
        refused: Mistake to how often it was made and refused.
        repeated: what was reported again and changed nothing, to how often.
        unanswered: how often the provider did not answer, so that the message was tried again.
        closing: median of the time from the opening to the payment.
        problems: list of str, a sentence each: what is not as it must be.
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
    handover: Handover
    closing: timedelta
    problems: list[str]
