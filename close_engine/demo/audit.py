"""Report the final state of the tables, and check that it matches the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from statistics import median

from close_engine.approvals import PendingAction
from close_engine.conversations import CloseEngineConversation, waiting_for_us
from close_engine.demo.mistakes import MISTAKES, Mistake
from close_engine.demo.provider import Provider
from close_engine.demo.report import Handover, LevelLine, Report, StageLine
from close_engine.machine import TRIGGERS
from close_engine.models import StageChange
from close_engine.outbox import OutboxMessage
from close_engine.schema.checks import verify
from close_engine.stages import ACTIVE_STAGES, AutonomyLevel, MessageStatus, Stage

__all__ = ["Tally", "audit"]


@dataclass
class Tally:
    """Counts that the tables do not hold.

    Attributes:
        refused: Mistake to the number of times it was made and refused.
        repeated: event to the number of times it was reported again and changed nothing.
        unanswered: number of times the provider did not answer.
        corrected: number of drafts that a human changed while approving them.
        superseded: number of drafts that the lead's words superseded.
        problems: list of str, one sentence each.
    """

    refused: Counter[Mistake] = field(default_factory=Counter)
    repeated: Counter[str] = field(default_factory=Counter)
    unanswered: int = 0
    corrected: int = 0
    superseded: int = 0
    problems: list[str] = field(default_factory=list)


def audit(tally: Tally, provider: Provider, handover: Handover) -> Report:
    """Report the final state of the tables, and every way in which it does not match the run.

    Args:
        tally: Tally of the run.
        provider: Provider that delivered the messages.
        handover: Handover, the result of leaving the last messages to worker processes.

    Returns:
        the Report, including its problems.
    """
    problems = list(tally.problems)
    stays: dict[Stage, list[float]] = {stage: [] for stage in Stage}
    opened: dict[str, datetime] = {}
    closing: list[float] = []
    replayed: dict[str, StageChange] = {}
    triggers: Counter[str] = Counter()
    entered: Counter[Stage] = Counter()
    for change in StageChange.select().order_by(StageChange.conversation_id, StageChange.id):
        before = replayed.get(change.conversation_id)
        if change.source != (before.dest if before else None):
            problems.append(f"The history of {change.conversation_id} has a gap before {change!r}.")
        if before:
            stays[before.dest].append((change.created_at - before.created_at).total_seconds())
        else:
            opened[change.conversation_id] = change.created_at
        if change.dest is Stage.COMPLETED:
            closing.append((change.created_at - opened[change.conversation_id]).total_seconds())
        replayed[change.conversation_id] = change
        triggers[change.trigger] += 1
        entered[change.dest] += 1
    stored = list(CloseEngineConversation.select())
    for conversation in stored:
        if replayed[conversation.id].dest is not conversation.stage:
            problems.append(f"The history of {conversation.id} does not lead to {conversation.stage}.")
    now = Counter(conversation.stage for conversation in stored)
    messages = list(OutboxMessage.select().order_by(OutboxMessage.id))
    problems += _message_problems(messages, provider)
    actions = list(PendingAction.select())
    our_turn = len(list(waiting_for_us()))
    return Report(
        conversations=len(stored),
        stages=[
            StageLine(stage, now[stage], entered[stage], _median(stays[stage]) if stays[stage] else None)
            for stage in Stage
        ],
        levels=[_level_line(level, stored, messages) for level in AutonomyLevel],
        triggers={trigger: triggers[trigger] for trigger in ("open", *TRIGGERS)},
        approvals=Counter((action.type, action.status) for action in actions),
        corrected=tally.corrected,
        outbox=Counter((message.topic, message.status) for message in messages),
        refused={mistake: tally.refused[mistake] for mistake in MISTAKES},
        repeated=dict(tally.repeated),
        unanswered=tally.unanswered,
        superseded=tally.superseded,
        our_turn=our_turn,
        their_turn=sum(now[stage] for stage in ACTIVE_STAGES) - our_turn,
        handover=handover,
        closing=_median(closing),
        problems=problems + verify(),
    )


def _message_problems(messages: list[OutboxMessage], provider: Provider) -> Iterator[str]:
    """Compare the outbox with what the provider delivered."""
    recorded = Counter(message.send_key for message in messages if message.status is MessageStatus.SENT)
    delivered = Counter(dict.fromkeys(provider.texts, 1))
    for key in recorded - delivered | delivered - recorded:
        yield f"{key} was delivered {delivered[key]} times, but recorded {recorded[key]} times."
    newest: dict[str, datetime] = {}
    for message in messages:
        sent_at = message.sent_at or newest.get(message.conversation_id)
        if sent_at and sent_at < newest.setdefault(message.conversation_id, sent_at):
            yield f"{message!r} was sent before an older message of its conversation."
        if message.status is MessageStatus.PENDING and message.leased_by:
            yield f"{message!r} is still leased by {message.leased_by}."
        if sent_at:
            newest[message.conversation_id] = sent_at


def _median(seconds: list[float]) -> timedelta:
    return timedelta(seconds=median(seconds))


def _level_line(
    level: AutonomyLevel, conversations: list[CloseEngineConversation], messages: list[OutboxMessage]
) -> LevelLine:
    ids = {one.id for one in conversations if one.autonomy_level is level}
    paid = sum(one.id in ids and one.stage is Stage.COMPLETED for one in conversations)
    sent = [one for one in messages if one.conversation_id in ids and one.status is MessageStatus.SENT]
    approved = sum(one.approved_by is not None for one in sent)
    return LevelLine(level, len(ids), paid, len(sent) - approved, approved)
