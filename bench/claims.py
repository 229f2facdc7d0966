"""How many messages a second does a worker claim and mark sent, if sending does nothing?

It sends 1, 4 and 16 at once in one process, and 4 at once in each of 1, 2 and 4 processes. The comparison is
procrastinate, which runs as many jobs at once that do nothing, on the same server. Both keep the order within a
conversation; procrastinate does it with a `lock` per conversation. It also runs without locks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

import peewee
import procrastinate

import close_engine
from bench.ground import fill
from bench.processes import in_processes
from bench.report import Table, per_second
from bench.rounds import interleave, measured_itself, median
from bench.server import Server

OURS = "Close Engine, a worker"
WITH_LOCKS, WITHOUT_LOCKS = "procrastinate, a lock per conversation", "procrastinate, no locks"

#: How many messages each conversation has.
EACH = 5

REFILL = """
    TRUNCATE close_engine.outbox;
    INSERT INTO close_engine.outbox (conversation_id, topic, body, created_at, available_at)
    SELECT id, 'SEND_MESSAGE', 'Hello!', localtimestamp - interval '1 hour', localtimestamp - interval '1 hour'
    FROM generate_series(1, {each}) step, (SELECT * FROM close_engine_conversations LIMIT {conversations}) c;
    ANALYZE close_engine.outbox
"""
REFILL_JOBS = """
    TRUNCATE procrastinate_jobs CASCADE;
    INSERT INTO procrastinate_jobs (queue_name, task_name, lock, args)
    SELECT 'default', 'nothing', {lock}, '{{}}'
    FROM generate_series(1, {each}) step, generate_series(1, {conversations}) conversation;
    ANALYZE procrastinate_jobs
"""


def measure(server: Server, *, quick: bool) -> Iterator[Table]:
    conversations, rounds = (20, 1) if quick else (400, 3)
    workers = (1, 2) if quick else (1, 2, 4)
    ours_database, jobs = server.migrated("claims_ours"), server.copy("template0", "claims_procrastinate")
    fill(server, ours_database, conversations, stages=["QUALIFYING"])
    with procrastinate_app(server.url(jobs)).open() as app:
        app.schema_manager.apply_schema()
    at_once = [(count, 1) for count in (1, 4, 16)]
    yield beside_procrastinate(
        server, ours_database, jobs, conversations, rounds, at_once, [f"concurrency {count}" for count, _ in at_once]
    )
    yield beside_procrastinate(
        server,
        ours_database,
        jobs,
        conversations,
        rounds,
        [(4, count) for count in workers],
        [f"concurrency 4, {count} worker{'s' * (count > 1)}" for count in workers],
    )
    yield batches(server, ours_database, conversations, workers[-1], rounds, (1, 10) if quick else (1, 5, 10, 50, 200))
    server.drop(ours_database, jobs)


def beside_procrastinate(
    server: Server,
    ours_database: str,
    jobs: str,
    conversations: int,
    rounds: int,
    sizes: list[tuple[int, int]],
    headings: list[str],
) -> Table:
    """Compare workers of several sizes: how many they send at once, and how many processes there are."""

    def refill(name: str) -> None:
        if name == OURS:
            refill_outbox(server, ours_database, conversations)
        else:
            lock = "NULL" if name == WITHOUT_LOCKS else "'conversation ' || conversation"
            text = REFILL_JOBS.format(lock=lock, each=EACH, conversations=conversations)
            server.execute(text, database=jobs)

    rates = []
    for concurrency, workers in sizes:
        contenders: dict[str, Callable[[], object]] = {
            OURS: partial(run_worker, server.url(ours_database), concurrency),
            **{name: partial(run_procrastinate, server.url(jobs), concurrency) for name in (WITH_LOCKS, WITHOUT_LOCKS)},
        }
        rates.append(throughput(contenders, refill, workers, conversations * EACH, rounds))
    return Table(
        "Messages claimed and marked sent, and procrastinate's jobs done",
        ["contender", *headings],
        [[name, *(per_second(rate[name]) for rate in rates)] for name in (OURS, WITH_LOCKS, WITHOUT_LOCKS)],
        f"{conversations * EACH:,} messages of {conversations:,} conversations; synchronous_commit on",
    )


def batches(
    server: Server, database: str, conversations: int, workers: int, rounds: int, sizes: tuple[int, ...]
) -> Table:
    contenders = {str(size): partial(claim_and_send, server.url(database), size) for size in sizes}

    def refill(_: str) -> None:
        refill_outbox(server, database, conversations)

    columns = (1, workers)
    rates = {count: throughput(contenders, refill, count, conversations * EACH, rounds) for count in columns}
    return Table(
        "Messages claimed and marked sent, by how many are claimed at once",
        ["limit", *(f"{count} worker{'s' * (count > 1)}" for count in columns)],
        [[name, *(per_second(rates[count][name]) for count in columns)] for name in contenders],
    )


def refill_outbox(server: Server, database: str, conversations: int) -> None:
    server.execute(REFILL.format(each=EACH, conversations=conversations), database=database)


def throughput(
    contenders: dict[str, Callable[[], object]],
    refill: Callable[[str], None],
    workers: int,
    messages: int,
    rounds: int,
) -> dict[str, float]:
    """Return the median of messages per second, from when all processes are ready until the last one finds no more."""
    seconds = interleave(
        {name: partial(in_processes, work, workers) for name, work in contenders.items()},
        rounds=rounds,
        before={name: partial(refill, name) for name in contenders},
        warm_up=False,
        timer=measured_itself,
    )
    return {name: messages / median(taken) for name, taken in seconds.items()}


def claim_and_send(url: str, limit: int) -> None:
    database = close_engine.connect(url)
    while (messages := close_engine.outbox.claim(limit, timedelta(minutes=1), "bench")) or waiting(database):
        for message in messages:
            message.sent()
    database.close()


def run_worker(url: str, limit: int) -> None:
    database = close_engine.connect(url)
    worker = close_engine.Worker(lambda message: None, concurrency=limit, sweep=None)
    while worker.run_until_empty() or waiting(database):
        pass
    database.close()


def waiting(database: peewee.Database) -> int:
    """Count waiting messages: some cannot be claimed yet, because another process has an older one in flight."""
    ((count,),) = database.execute_sql("SELECT count(*) FROM close_engine.outbox WHERE status = 'PENDING'").fetchall()
    found: int = count
    return found


def procrastinate_app(url: str) -> procrastinate.App:
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url))

    @app.task(name="nothing")
    async def nothing() -> None:
        pass

    return app


def run_procrastinate(url: str, concurrency: int) -> None:
    procrastinate_app(url).run_worker(
        wait=False, concurrency=concurrency, listen_notify=False, install_signal_handlers=False
    )
