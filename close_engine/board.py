"""The board: how many conversations stand where and for how long, what waits for a human, what the outbox holds.

    board = pipeline()                                  # plain numbers, for a dashboard of your own

It answers within a second at a million conversations: it counts along indexes, and asks the history when its stage was
entered only of so many conversations. Where that makes a number an approximation, it says so.

>>> from close_engine.database.url import connect
>>> from close_engine.schema.migrations import migrate
>>> database = connect("sqlite:///:memory:")
>>> applied = migrate(standalone=True)
>>> board = pipeline()
>>> sum(line.count for line in board.stages), board.outbox.pending, board.outbox.lag
(0, 0, None)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median
from typing import Any

import peewee

from close_engine.approvals import PendingAction, pending_actions
from close_engine.conversations import CloseEngineConversation
from close_engine.database.binding import current, now
from close_engine.models import StageChange
from close_engine.outbox import OutboxMessage
from close_engine.stages import ACTIVE_STAGES, ActionType, MessageStatus, Stage

__all__ = ["ApprovalLine", "OutboxLine", "Pipeline", "StageLine", "outbox_line", "pipeline"]

#: As many conversations of an active stage are all looked at; where there are more, a sample is.
EXACT = 1000
#: About how many conversations are in that sample, of all active stages together.
SAMPLE = 5000


@dataclass(frozen=True)
class StageLine:
    """One stage.

    Attributes:
        count: number of conversations in it.
        median: how long half of them have been in it, as a timedelta; None where there are none, or it is an end.
        longest: how long one of them has been in it.
        sampled: whether these two come from a sample: the median is then an approximation, and others may have been
            in it for longer than the longest.
    """

    stage: Stage
    count: int
    median: timedelta | None = None
    longest: timedelta | None = None
    sampled: bool = False


@dataclass(frozen=True)
class ApprovalLine:
    """What waits for a human.

    Attributes:
        waiting: number of pending actions of this type that have not expired.
        oldest: how long the oldest has waited, as a timedelta.
    """

    type: ActionType
    waiting: int
    oldest: timedelta


@dataclass(frozen=True)
class OutboxLine:
    """What the outbox holds.

    Attributes:
        pending: number of messages that are still to be sent, now or later.
        in_flight: number of those among them that a worker has.
        dead: number of messages that were given up.
        lag: how long the oldest message that can be sent now has waited to be, as a timedelta; None where none can.
    """

    pending: int
    in_flight: int
    dead: int
    lag: timedelta | None


@dataclass(frozen=True)
class Pipeline:
    """The board at one moment.

    Attributes:
        at: the moment, in UTC.
        stages: list of StageLine, one for each Stage, in order.
        approvals: list of ApprovalLine, of the types that wait.
    """

    at: datetime
    stages: list[StageLine]
    approvals: list[ApprovalLine]
    outbox: OutboxLine


def pipeline() -> Pipeline:
    """Everything on the board, as plain numbers."""
    moment = now()
    return Pipeline(moment, _stage_lines(moment), _approval_lines(moment), outbox_line())


def outbox_line() -> OutboxLine:
    """What the outbox holds, as plain numbers."""
    message, ahead, moment = OutboxMessage, OutboxMessage.alias(), now()
    pending = message.status == MessageStatus.PENDING
    leased = message.leased_by.is_null(False)
    function = current().dialect.function
    in_flight = function("count", message.id).filter(leased & (message.available_at > moment))
    counted: Any = message.select(function("count", message.id), in_flight).where(pending).tuples()
    count, leased_now = counted.get()
    # As `claim` sees it: of each conversation the oldest is next, unless another of its messages is in flight.
    waits_behind = ahead.select(peewee.SQL("1")).where(
        (ahead.conversation_id == message.conversation_id)
        & (ahead.status == MessageStatus.PENDING)
        & (ahead.id != message.id)
        & ((ahead.id < message.id) | ahead.leased_by.is_null(False))
    )
    next_one = (
        message.select(message.available_at)
        .where(pending & (message.available_at <= moment) & (leased | ~peewee.fn.EXISTS(waits_behind)))
        .order_by(message.available_at, message.id)
        .first()
    )
    dead = current().count(message.select().where(message.status == MessageStatus.DEAD))
    return OutboxLine(count, leased_now, dead, next_one and moment - next_one.available_at)


def _approval_lines(moment: datetime) -> list[ApprovalLine]:
    action, function = PendingAction, current().dialect.function
    waiting: Any = (
        pending_actions()
        .select(action.type, function("count", action.id), function("min", action.created_at))
        .group_by(action.type)
        .order_by(action.type)
    )
    return [ApprovalLine(type, count, moment - oldest) for type, count, oldest in waiting.tuples()]


def _stage_lines(moment: datetime) -> list[StageLine]:
    model = CloseEngineConversation
    count = current().dialect.function("count", model.stage)
    counted: Any = model.select(model.stage, count).group_by(model.stage).tuples()
    counts: dict[Stage, int] = dict.fromkeys(Stage, 0) | dict(counted)
    many = [stage for stage in ACTIVE_STAGES if counts[stage] > EXACT]
    few = [stage for stage in ACTIVE_STAGES if 0 < counts[stage] <= EXACT]
    entered: dict[Stage, list[datetime]] = {stage: [] for stage in ACTIVE_STAGES}
    rows = _entered(few) if few else []
    if many:
        rows += _entered(many, math.ceil(sum(counts[stage] for stage in ACTIVE_STAGES) / SAMPLE))
    for stage, at in rows:
        entered[stage].append(at)
    lines = {stage: StageLine(stage, count) for stage, count in counts.items()}
    for stage, times in entered.items():
        if times:
            middle = timedelta(seconds=median((moment - at).total_seconds() for at in times))
            lines[stage] = StageLine(stage, counts[stage], middle, moment - min(times), stage in many)
    lines[Stage.STALLED] = _stalled_line(counts[Stage.STALLED], moment)
    return list(lines.values())


def _stalled_line(count: int, moment: datetime) -> StageLine:
    """The conversation says itself since when it is stalled, and a partial index has that in order."""
    model = CloseEngineConversation
    ordered = (
        model.select(model.stalled_at)
        .where((model.stage == Stage.STALLED) & model.stalled_at.is_null(False))
        .order_by(model.stalled_at)
    )
    first, middle = ordered.first(), ordered.offset(count // 2).first()
    if first is None or middle is None:
        return StageLine(Stage.STALLED, count)
    return StageLine(Stage.STALLED, count, moment - middle.stalled_at, moment - first.stalled_at)


def _entered(stages: Sequence[Stage], one_of: int = 1) -> list[tuple[Stage, datetime]]:
    """When conversations in these stages entered them: the newest row of the history of each says so."""
    model = CloseEngineConversation
    newest = (
        StageChange.select(StageChange.created_at)
        .where(StageChange.conversation_id == model.id)
        .order_by(StageChange.id.desc())
        .limit(1)
    )
    query: Any = model.select(model.stage, newest.alias("entered")).where(model.stage.in_(stages))
    if one_of > 1:
        # All active conversations stand in `silence`, which is narrow, and no others.
        dialect = current().dialect
        chosen = f"SELECT conversation_id FROM ({dialect.sample('silence', one_of)}) AS chosen"
        query = query.where(peewee.NodeList((model.id, peewee.SQL(dialect.ids_of(chosen)))))
    read: Any = StageChange.created_at.python_value
    return [(stage, read(at)) for stage, at in query.tuples() if at is not None]
