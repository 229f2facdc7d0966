"""The board: conversations and time in each stage, what waits for us, the state of the outbox, which workers run.

    board = pipeline()                                  # plain numbers, for your own dashboard

It takes less than a second with a million conversations: counts use indexes, and the history is read for a limited
number of conversations only. Numbers that are therefore approximate are marked as such.

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
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from statistics import median
from typing import Any

import peewee

from close_engine.approvals import PendingAction, pending_actions
from close_engine.conversations import CloseEngineConversation, Takeover
from close_engine.database.binding import current, moment
from close_engine.database.fields import LONGEST_SPAN, stored_time
from close_engine.deliveries import undelivered
from close_engine.errors import InvalidValue
from close_engine.heartbeats import LOST_AFTER, lasting
from close_engine.models import StageChange
from close_engine.outbox import OutboxMessage, claimable_now
from close_engine.pauses import Pause, paused
from close_engine.payments import payment_issues
from close_engine.stages import ACTIVE_STAGES, ActionType, MessageStatus, Stage

__all__ = [
    "ApprovalLine",
    "DayLine",
    "OutboxLine",
    "Pipeline",
    "StageLine",
    "WaitingLine",
    "WorkerLine",
    "days",
    "outbox_line",
    "pipeline",
    "pulse",
    "turns",
    "worker_lines",
]

#: How long a message is in flight before the board calls it hanging.
HANGING_AFTER = timedelta(minutes=5)

#: An active stage with more conversations than this is sampled.
EXACT = 1000
#: The approximate size of that sample, for all active stages together.
SAMPLE = 5000


@dataclass(frozen=True)
class StageLine:
    """One stage.

    Attributes:
        stage: Stage.
        count: int, number of conversations in it.
        median: timedelta, the median time that they have been in it; None if there are none, or if the stage is
            COMPLETED or CLOSED_LOST.
        longest: timedelta, the longest time that one of them has been in it; None as for `median`.
        sampled: bool, whether these times come from a sample. If so, `median` is an approximation and `longest` a
            lower bound.
    """

    stage: Stage
    count: int
    median: timedelta | None = None
    longest: timedelta | None = None
    sampled: bool = False


@dataclass(frozen=True)
class ApprovalLine:
    """The drafts of one type that wait for approval.

    Attributes:
        type: ActionType.
        waiting: int, number of pending actions that have not expired.
        oldest: timedelta, how long the oldest has been waiting.
    """

    type: ActionType
    waiting: int
    oldest: timedelta


@dataclass(frozen=True)
class WaitingLine:
    """The conversations in which it is our turn: the lead waits for an answer.

    Attributes:
        count: int, how many there are.
        longest: timedelta, how long the lead has been waiting in one of them; None if there is none.
    """

    count: int
    longest: timedelta | None


@dataclass(frozen=True)
class OutboxLine:
    """The state of the outbox.

    Attributes:
        pending: int, number of messages that still have to be sent, now or later.
        in_flight: int, number of those that a worker has leased now.
        hanging: int, number of those that have been in flight for long: their sender may never return.
        dead: int, number of messages that were given up.
        lag: timedelta, how long the oldest message that can be sent now has been due; None if there is none.
        undelivered: int, number of messages that were sent and not delivered, and not put back since.
        paused: list of Pause, why sending is paused; empty if it is not.
    """

    pending: int
    in_flight: int
    hanging: int
    dead: int
    lag: timedelta | None
    undelivered: int = 0
    paused: list[Pause] = field(default_factory=list)


@dataclass(frozen=True)
class WorkerLine:
    """A worker that runs until it is stopped, or was lost: it was not seen for a minute, and took no leave.

    Attributes:
        name: str.
        host: str, the machine it runs on.
        pid: int, the id of its process there.
        runs: timedelta, for how long it had run when it was last seen.
        seen: timedelta, how long ago that was.
        concurrency: int, how many messages it sends at once.
        topics: list of str, the topics that it sends; None of all.
        sending: int, how many it was sending then.
    """

    name: str
    host: str
    pid: int
    runs: timedelta
    seen: timedelta
    concurrency: int
    topics: list[str] | None
    sending: int

    @property
    def lost(self) -> bool:
        """Whether it was not seen for a minute."""
        return self.seen >= LOST_AFTER


@dataclass(frozen=True)
class Pipeline:
    """The board at one moment.

    Attributes:
        at: datetime, in UTC.
        stages: list of StageLine, one per Stage, in order.
        approvals: list of ApprovalLine, one per type that has drafts waiting.
        outbox: OutboxLine.
        waiting_for_us: WaitingLine; `close_engine.waiting_for_us()` returns the conversations.
        unreadable: int, number of conversations and drafts that are left out, because Python does not know their stage
            or type, or cannot read their times; `close_engine.verify` lists them.
        taken_over: int, number of conversations that a human has taken over.
        payment_issues: int, number of payments that somebody should look at: `close_engine.payment_issues` lists them.
        workers: list of WorkerLine, the one that was seen last first. What was lost a week ago is left out.
    """

    at: datetime
    stages: list[StageLine]
    approvals: list[ApprovalLine]
    outbox: OutboxLine
    waiting_for_us: WaitingLine
    unreadable: int
    taken_over: int
    payment_issues: int
    workers: list[WorkerLine]


def pipeline(hanging_after: timedelta = HANGING_AFTER) -> Pipeline:
    """Read the whole board.

    Args:
        hanging_after: timedelta, as for `outbox_line`.

    Returns:
        the Pipeline, as plain numbers.
    """
    at = moment()
    stages, strange = stage_lines(at)
    approvals, unreadable = _approval_lines(at)
    taken_over, issues = current().count(Takeover.lasting()), current().count(payment_issues().order_by())
    return Pipeline(
        at,
        stages,
        approvals,
        outbox_line(hanging_after),
        _waiting_line(at),
        strange + unreadable,
        taken_over,
        issues,
        worker_lines(),
    )


@dataclass(frozen=True)
class DayLine:
    """What happened on one day, by UTC.

    Attributes:
        day: datetime, when the day began.
        entered: dict of Stage to int, how often conversations entered it that day; without the stages that none did.
    """

    day: datetime
    entered: dict[Stage, int]


#: How much of the history `days` reads at most.
NEWEST = 20_000


def days(count: int = 14) -> tuple[list[DayLine], bool]:
    """Count the stage changes of the last days, from the newest rows of the history.

    Args:
        count: int, how many days, with today.

    Returns:
        the days, oldest first; and whether that is all of them. If not, the history has too many rows for a page, and
        the oldest days are left out or incomplete.
    """
    today = moment().replace(hour=0, minute=0, second=0, microsecond=0)
    begins = [today - timedelta(days=ago) for ago in range(count - 1, -1, -1)]
    builtin = current().dialect.builtin
    counted = ", ".join(f"{builtin}count(CASE WHEN at >= %s AND at < %s THEN 1 END)" for _ in begins)
    newest = f"SELECT id, dest, created_at AS at FROM {{history}} ORDER BY id DESC LIMIT {NEWEST}"
    bounds = [stored_time(at) for begin in begins for at in (begin, begin + timedelta(days=1))]
    read = f"SELECT dest, {counted}, {builtin}count(id), {builtin}min(at) FROM ({newest}) AS newest GROUP BY dest"
    rows = current().execute(read, bounds).fetchall()
    lines = [DayLine(begin, {}) for begin in begins]
    for dest, *counts, _, _ in rows:
        for line, entered in zip(lines, counts, strict=True):
            if entered and dest in set(Stage):
                line.entered[Stage(dest)] = entered
    reads_all = sum(row[-2] for row in rows) < NEWEST
    return lines, reads_all or any(_began_before(row[-1], begins[0]) for row in rows)


def _began_before(at: Any, begin: datetime) -> bool:
    try:
        return bool(StageChange.created_at.python_value(at) < begin)
    except ValueError:
        return False


def turns() -> tuple[int, int]:
    """Count the conversations in which the lead waits for us, and those in which we wait for the lead."""
    counted = f'SELECT "trigger", {current().dialect.builtin}count(subject_id) FROM {{deadlines}}'
    rows = current().execute(f"{counted} WHERE \"trigger\" IN ('answer', 'stall') GROUP BY \"trigger\"").fetchall()
    found = dict(rows)
    return found.get("answer", 0), found.get("stall", 0)


def pulse() -> str:
    """Return a word that is another one whenever something has happened that the board or the queues would show.

    It is one short statement, to be asked every other second.
    """
    count, most = (f"{current().dialect.builtin}{name}" for name in ("count", "max"))
    parts = [
        *(f"{most}(id) FROM {{{table}}}" for table in ("history", "inbox", "outbox", "takeovers", "optouts")),
        f"{count}(id) FROM {{takeovers}} WHERE handed_back_at IS NULL",
        f"{count}(id) FROM {{pauses}} WHERE resumed_at IS NULL",
        f"{count}(id) FROM {{outbox}} WHERE status = 'DEAD'",
        f"{count}(id) FROM {{outbox}} WHERE status = 'PENDING'",
        f"{count}(id) FROM pending_actions WHERE status = 'PENDING'",
    ]
    row = current().execute("SELECT " + ", ".join(f"(SELECT {part})" for part in parts)).fetchone()
    return "-".join(str(value or 0) for value in row)


def worker_lines() -> list[WorkerLine]:
    """Read which workers run, and which were lost, the one that was seen last first."""
    found, at = lasting(), moment()
    return [
        WorkerLine(
            one.id,
            one.host,
            one.pid,
            one.seen_at - one.started_at,
            max(at - one.seen_at, timedelta(0)),
            one.concurrency,
            one.topics,
            one.sending,
        )
        for one in found
    ]


def _waiting_line(at: datetime) -> WaitingLine:
    ours = f"FROM {{deadlines}} WHERE \"trigger\" = 'answer' AND {_is_readable('at')}"
    ((count,),) = current().execute(f"SELECT {current().dialect.builtin}count(*) {ours}").fetchall()
    first = current().execute(f"SELECT at {ours} ORDER BY at LIMIT 1").fetchone()
    return WaitingLine(count, None if first is None else at - StageChange.created_at.python_value(first[0]))


def outbox_line(hanging_after: timedelta = HANGING_AFTER) -> OutboxLine:
    """Read the state of the outbox.

    Args:
        hanging_after: timedelta, how long a message must have been in flight to count as hanging.

    Returns:
        the OutboxLine, as plain numbers.

    Raises:
        InvalidValue: `hanging_after` is less than zero or longer than a hundred years.
    """
    if not timedelta(0) <= hanging_after <= LONGEST_SPAN:
        raise InvalidValue("hanging_after", str(hanging_after), f"it must be from 0 to {LONGEST_SPAN.days} days")
    message, function, at = OutboxMessage, current().dialect.function, moment()
    leased = message.leased_by.is_null(False)
    leased &= message.available_at > at
    in_flight = function("count", message.id).filter(leased)
    hanging = function("count", message.id).filter(leased & (message.leased_at <= at - hanging_after))
    pending = message.status == MessageStatus.PENDING
    counted: Any = message.select(function("count", message.id), in_flight, hanging).where(pending).tuples()
    count, leased_now, hangs = counted.get()
    claimable = f"{claimable_now(current().dialect)} AND {_is_readable('o.available_at')}"
    oldest = f"SELECT o.available_at FROM {{outbox}} o WHERE {claimable}"
    found = current().execute(f"{oldest} ORDER BY o.available_at, o.id LIMIT 1").fetchone()
    dead = current().count(message.select().where(message.status == MessageStatus.DEAD))
    lag = None if found is None else at - message.available_at.python_value(found[0])
    return OutboxLine(count, leased_now, hangs, dead, lag, current().count(undelivered().order_by()), paused())


def _is_readable(*columns: str) -> str:
    """Return the SQL that says whether Python can read the times in all of these columns."""
    return f"({' OR '.join(map(current().dialect.unreadable_time, columns))}) IS NOT TRUE"


def _approval_lines(at: datetime) -> tuple[list[ApprovalLine], int]:
    """Return a line for each type, and the number of drafts that are in none."""
    action, function = PendingAction, current().dialect.function
    readable = peewee.SQL(_is_readable('"created_at"', '"expires_at"', '"approved_at"'))
    count = function("count", action.id)
    # By another name, so that Peewee does not convert the words.
    word = action.type.cast("TEXT").alias("word")
    waiting: Any = (
        pending_actions()
        .select(word, count, count.filter(readable), function("min", action.created_at).filter(readable))
        .group_by(action.type)
        .order_by(action.type)
    )
    lines, unreadable = [], 0
    for word, all_of_them, readable_ones, oldest in waiting.tuples():
        if word not in set(ActionType):
            readable_ones = 0
        if readable_ones:
            lines.append(ApprovalLine(ActionType(word), readable_ones, at - oldest))
        unreadable += all_of_them - readable_ones
    return lines, unreadable


def stage_lines(now: datetime) -> tuple[list[StageLine], int]:
    """Return a line for each stage, and the number of conversations that are in none."""
    builtin = current().dialect.builtin
    counted = f"SELECT stage, {builtin}count(stage) FROM close_engine_conversations GROUP BY stage"
    found = dict(current().execute(counted).fetchall())
    counts: dict[Stage, int] = {stage: found.pop(stage.value, 0) for stage in Stage}
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
            middle = timedelta(seconds=median((now - at).total_seconds() for at in times))
            lines[stage] = StageLine(stage, counts[stage], middle, now - min(times), stage in many)
    lines[Stage.STALLED] = _stalled_line(counts[Stage.STALLED], now)
    return list(lines.values()), sum(found.values())


def _stalled_line(count: int, now: datetime) -> StageLine:
    """Read the times in STALLED from the deadlines, which an index keeps in order, instead of the history."""
    readable = f"\"trigger\" = 'close_lost' AND {_is_readable('at')}"
    ordered = f"SELECT at FROM {{deadlines}} WHERE {readable} ORDER BY at LIMIT 1 OFFSET %s"
    times = [current().execute(ordered, (place,)).fetchone() for place in (0, count // 2)]
    if None in times:
        return StageLine(Stage.STALLED, count)
    first, middle = (CloseEngineConversation.stalled_at.python_value(at) for (at,) in times)
    return StageLine(Stage.STALLED, count, now - middle, now - first)


def _entered(stages: Sequence[Stage], one_of: int = 1) -> list[tuple[Stage, datetime]]:
    """Return when conversations entered these stages: the time of each one's newest history row."""
    model = CloseEngineConversation
    newest = (
        StageChange.select(StageChange.created_at)
        .where((StageChange.conversation_id == model.id) & peewee.SQL(_is_readable('"created_at"')))
        .order_by(StageChange.id.desc())
        .limit(1)
    )
    query: Any = model.select(model.stage, newest.alias("entered")).where(model.stage.in_(stages))
    if one_of > 1:
        # Sample from the deadlines: each active conversation has one, and its rows are small.
        dialect = current().dialect
        chosen = dialect.sample("deadlines", one_of)
        chosen = f"SELECT subject_id FROM ({chosen}) AS chosen WHERE \"trigger\" IN ('stall', 'answer')"
        query = query.where(peewee.NodeList((model.id, peewee.SQL(dialect.in_subquery(chosen)))))
    read: Any = StageChange.created_at.python_value
    return [(stage, read(at)) for stage, at in query.tuples() if at is not None]
