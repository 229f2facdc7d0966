"""What does a sweep cost that stalls 100,000 of 1,000,000 conversations, with stamps and history?

By hand, it is one set-based statement. It scans the whole table, because there is no index on `updated_at`. It has no
guard and keeps no deadlines; "by hand, deadlines kept" does the latter. Each contender gets a fresh copy of the same
database in every round.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta

import psycopg2

import close_engine
from bench.ground import WITHOUT_TRIGGERS, conversation_id, fill
from bench.report import Table, milliseconds, times
from bench.rounds import interleave, median, ratio, timed
from bench.server import Server, private_memory

ACTIVE = ["QUALIFYING", "COLLECTING_INFO", "BUILDING", "PREVIEW_SENT", "EDIT_LOOP"]

MAKE_DUE = (
    """
    UPDATE close_engine_conversations SET updated_at = updated_at - interval '4 days'
    WHERE id IN (SELECT id FROM close_engine_conversations ORDER BY id LIMIT {due})
    """,
    """
    UPDATE close_engine.history SET created_at = created_at - interval '4 days'
    WHERE conversation_id IN (SELECT id FROM close_engine_conversations ORDER BY id LIMIT {due})
    """,
    """
    UPDATE close_engine.deadlines SET at = c.updated_at FROM close_engine_conversations c
    WHERE trigger = 'stall' AND subject_id = c.id AND c.updated_at < localtimestamp - interval '3 days'
    """,
)
BY_HAND = """
    WITH moment AS (SELECT date_trunc('milliseconds', localtimestamp) AS now),
    due AS (SELECT id, stage FROM close_engine_conversations, moment
        WHERE stage NOT IN ('COMPLETED', 'STALLED', 'CLOSED_LOST') AND updated_at <= now - interval '72 hours'
        FOR NO KEY UPDATE),
    moved AS (UPDATE close_engine_conversations c SET stage = 'STALLED', stalled_at = now, updated_at = now
        FROM due, moment WHERE c.id = due.id RETURNING c.id, c.lead_id, due.stage AS source, now)
    INSERT INTO history (conversation_id, lead_id, trigger, source, dest, actor, created_at)
    SELECT id, lead_id, 'stall', source, 'STALLED', 'sweep', now FROM moved
"""
BY_HAND_WITH_DEADLINES = BY_HAND.replace(
    "INSERT INTO history",
    ", noted AS (UPDATE deadlines SET trigger = 'close_lost', at = now FROM moved\n"
    "    WHERE trigger = 'stall' AND subject_id = moved.id)\nINSERT INTO history",
)
AFTER = timedelta(hours=72)
FLOOR, DEADLINES_KEPT = "one statement by hand", "one statement by hand, deadlines kept"


def measure(server: Server, *, quick: bool) -> Iterator[Table]:
    count, due = (5_000, 500) if quick else (1_000_000, 100_000)
    ours_template = server.migrated("sweep_ours")
    fill(server, ours_template, count, stages=ACTIVE, history=2)
    make_due = [statement.format(due=due) for statement in MAKE_DUE]
    server.execute(WITHOUT_TRIGGERS, *make_due, "VACUUM ANALYZE", database=ours_template)
    plain_template = server.plain(ours_template, "sweep_plain")
    batches = (500,) if quick else (1000, 10_000, 100_000)
    contenders = {
        FLOOR: lambda: by_hand(server, BY_HAND),
        DEADLINES_KEPT: lambda: by_hand(server, BY_HAND_WITH_DEADLINES),
        **{f"Close Engine, batch={batch}": lambda batch=batch: ours(server, batch, due) for batch in batches},
    }

    def restore(name: str) -> None:
        server.copy(plain_template if name in (FLOOR, DEADLINES_KEPT) else ours_template, "sweep")
        server.execute("ALTER DATABASE sweep SET search_path = public, close_engine")
        server.execute(
            "SELECT sum(hashtext(t::text)) FROM close_engine_conversations t",
            "SELECT sum(hashtext(t::text)) FROM deadlines t",
            database="sweep",
        )

    measured = interleave(
        contenders,
        rounds=2 if quick else 5,
        before={name: lambda name=name: restore(name) for name in contenders},
        warm_up=False,
    )
    restore("Close Engine")
    some = 50 if quick else 2000
    each = timed(lambda: row_by_row(server, some)) / some
    yield Table(
        f"A sweep that stalls {due:,} of {count:,} conversations",
        ["contender", "to the floor", "median"],
        [
            *(
                [name, times(ratio(measured[name], measured[FLOOR])), milliseconds(median(measured[name]))]
                for name in contenders
            ),
            [
                f"row by row: load and stall() each ({some:,} measured)",
                times(each * due / median(measured[FLOOR])),
                milliseconds(each * due),
            ],
        ],
    )
    rows = []
    for name in contenders:
        restore(name)
        with watched(server) as peak:
            contenders[name]()
        first, highest = peak()
        rows.append([name, f"{first / 1e6:.1f} MB", f"{highest / 1e6:.1f} MB"])
    yield Table("Private memory of the sweeping backend", ["contender", "at first", "at most"], rows)
    server.drop("sweep", ours_template, plain_template)


def by_hand(server: Server, statement: str) -> None:
    with closing(psycopg2.connect(server.url("sweep"))) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)


def ours(server: Server, batch: int, due: int) -> None:
    database = close_engine.connect(server.url("sweep"))
    moved = close_engine.stall_silent(AFTER, batch=batch)
    database.close()
    assert len(moved) == due


def row_by_row(server: Server, some: int) -> None:
    """Stall some conversations one by one. Whether they are due does not change the cost."""
    database = close_engine.connect(server.url("sweep"))
    for number in range(1, some + 1):
        close_engine.CloseEngineConversation.get_by_id(conversation_id(number)).stall(actor="sweep")
    database.close()


@contextmanager
def watched(server: Server) -> Iterator[Callable[[], tuple[int, int]]]:
    """Watch the private memory of the database's backends, and yield a function for its first and highest value."""
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            for process in server.backends("sweep"):
                try:
                    seen.append(private_memory(process))
                except (FileNotFoundError, ProcessLookupError, IndexError):
                    continue  # it ended in the meantime

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: (seen[0], max(seen))
    finally:
        done.set()
        thread.join()
