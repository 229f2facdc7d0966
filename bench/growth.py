"""Does the cost stay flat from 10 thousand to 1 million conversations, with ten rows of history each?

The contenders are the sizes: the same operation runs on each in turn, and the result is the ratio to the smallest. For
comparison, one statement with the triggers off does a sweep by hand. What it grows by is due to the database itself.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import peewee

import close_engine
from bench.ground import conversation_id, fill, lead_id
from bench.report import Table, milliseconds, times
from bench.rounds import interleave, median, ratio
from bench.server import Server
from close_engine.board import pipeline

SWEPT = 500
CLAIMED = 50

PUT_BACK = """
    WITH swept AS (UPDATE close_engine_conversations SET stage = 'QUALIFYING', stalled_at = NULL
        WHERE stage = 'STALLED' AND stalled_at > localtimestamp - interval '5 minutes' RETURNING id)
    UPDATE close_engine.deadlines d SET trigger = 'stall', at = localtimestamp FROM swept
    WHERE d.trigger = 'close_lost' AND d.subject_id = swept.id
"""
MAKE_DUE = """
    WITH due AS (SELECT subject_id FROM close_engine.deadlines
        WHERE trigger = 'stall' ORDER BY md5(subject_id || %s) LIMIT %s),
    aged AS (UPDATE close_engine.history h SET created_at = h.created_at - interval '40 days' FROM due
        WHERE h.conversation_id = due.subject_id AND h.created_at > localtimestamp - interval '4 days')
    UPDATE close_engine.deadlines d SET at = localtimestamp - interval '4 days' FROM due
    WHERE d.trigger = 'stall' AND d.subject_id = due.subject_id
"""
BY_HAND = """
    WITH due AS (SELECT c.id, c.stage FROM close_engine.deadlines d
        JOIN close_engine_conversations c ON c.id = d.subject_id
        WHERE d.trigger = 'stall' AND d.at <= localtimestamp - interval '72 hours' FOR NO KEY UPDATE OF c),
    moved AS (UPDATE close_engine_conversations c
        SET stage = 'STALLED', stalled_at = localtimestamp, updated_at = localtimestamp
        FROM due WHERE c.id = due.id RETURNING c.id, c.lead_id, due.stage AS source),
    noted AS (UPDATE close_engine.deadlines d SET trigger = 'close_lost', at = localtimestamp FROM moved
        WHERE d.trigger = 'stall' AND d.subject_id = moved.id)
    INSERT INTO close_engine.history (conversation_id, lead_id, trigger, source, dest, actor, created_at)
    SELECT id, lead_id, 'stall', source, 'STALLED', 'sweep', localtimestamp FROM moved
"""


class Grown:
    """A database of one size, and the operations on it.

    The models must be bound before each operation, because the other sizes run in between. That is not timed.
    """

    def __init__(self, server: Server, count: int, operations: int) -> None:
        self.count = count
        self.name = server.migrated(f"growth_{count}")
        fill(
            server,
            self.name,
            count,
            history=10,
            spare_leads=operations,
            sent=2,
            pending=max(count // 10, operations * CLAIMED),
        )
        self.random = random.Random(count)
        self.leads = (lead_id(number) for number in itertools.count(count + 1))
        self.database: peewee.Database = close_engine.connect(server.url(self.name))

    def bind(self) -> None:
        close_engine.bind(self.database)

    def load(self) -> None:
        """Choose a conversation that can be changed. Only loading it again and firing the trigger is timed."""
        self.bind()
        while True:
            self.chosen = conversation_id(self.random.randint(1, self.count))
            conversation = close_engine.CloseEngineConversation.get_by_id(self.chosen)
            if conversation.may("request_edits") or conversation.may("send_preview"):
                return

    def change_stage(self) -> None:
        conversation = close_engine.CloseEngineConversation.get_by_id(self.chosen)
        conversation.fire("request_edits" if conversation.may("request_edits") else "send_preview")

    def claim(self) -> None:
        assert len(close_engine.outbox.claim(CLAIMED, timedelta(hours=1), "bench")) == CLAIMED

    def make_due(self) -> None:
        """Make conversations due, and put back those swept before: the smallest size has too few for every round."""
        self.bind()
        with self.without_triggers():
            self.database.execute_sql(PUT_BACK)
            self.database.execute_sql(MAKE_DUE, (str(self.random.random()), SWEPT))

    @contextmanager
    def without_triggers(self) -> Iterator[None]:
        with self.database.atomic():
            self.database.execute_sql("SET LOCAL session_replication_role = replica")
            yield

    def sweep(self) -> None:
        assert len(close_engine.stall_silent(timedelta(hours=72))) == SWEPT

    def sweep_by_hand(self) -> None:
        with self.without_triggers():
            assert self.database.execute_sql(BY_HAND).rowcount == SWEPT

    def open_conversation(self) -> None:
        close_engine.open_conversation(next(self.leads), close_engine.EntryPoint.SMS_REPLY)

    def board(self) -> None:
        pipeline()


def measure(server: Server, *, quick: bool) -> Iterator[Table]:
    sizes = (5_000, 10_000) if quick else (10_000, 100_000, 1_000_000)
    rounds = 1 if quick else 30
    operations: list[tuple[str, Callable[[Grown], None], Callable[[Grown], None], int]] = [
        ("stage change", Grown.change_stage, Grown.load, rounds * 10),
        (f"claim of {CLAIMED}", Grown.claim, Grown.bind, rounds),
        (f"sweep that finds {SWEPT}", Grown.sweep, Grown.make_due, min(rounds, 10)),
        ("the same by hand", Grown.sweep_by_hand, Grown.make_due, min(rounds, 10)),
        ("open_conversation", Grown.open_conversation, Grown.bind, rounds * 5),
        ("the board", Grown.board, Grown.bind, min(rounds, 10)),
    ]
    databases = {f"{size:,}": Grown(server, size, operations=rounds * 5 + 5) for size in sizes}
    smallest = next(iter(databases))
    rows = []
    for name, operation, before, count in operations:
        measured = interleave(
            {size: lambda grown=grown, operation=operation: operation(grown) for size, grown in databases.items()},
            rounds=count,
            before={size: lambda grown=grown, before=before: before(grown) for size, grown in databases.items()},
        )
        costs = [milliseconds(median(measured[size])) for size in databases]
        rows.append([name, *costs, times(ratio(measured[list(databases)[-1]], measured[smallest]))])
    yield Table(
        "Cost by the number of conversations",
        ["operation", *databases, "largest to smallest"],
        rows,
        "Each conversation has ten rows of history and two sent messages; one in ten has a waiting message",
    )
    for grown in databases.values():
        grown.database.close()
        server.drop(grown.name)
