"""How many messages a second do 1, 2 and 4 worker processes claim and mark sent, if sending does nothing?

The comparison is procrastinate, which runs jobs that do nothing on the same server. Both keep the order within a
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
    conversations = 20 if quick else 400
    workers, rounds = ((1, 2), 1) if quick else ((1, 2, 4), 5)
    ours_database, jobs = server.migrated("claims_ours"), server.copy("template0", "claims_procrastinate")
    fill(server, ours_database, conversations)
    with procrastinate_app(server.url(jobs)).open() as app:
        app.schema_manager.apply_schema()
    yield beside_procrastinate(server, ours_database, jobs, conversations, workers, rounds)
    yield batches(server, ours_database, conversations, workers[-1], rounds, (1, 10) if quick else (1, 5, 10, 50, 200))
    server.drop(ours_database, jobs)


def beside_procrastinate(
    server: Server, ours_database: str, jobs: str, conversations: int, workers: tuple[int, ...], rounds: int
) -> Table:
    ours_url, jobs_url = server.url(ours_database), server.url(jobs)
    contenders: dict[str, Callable[[], object]] = {
        "Close Engine, claim and sent": partial(claim_and_send, ours_url, 10),
        "Close Engine, Worker, concurrency=4": partial(run_worker, ours_url, 4),
        "procrastinate, a lock per conversation": partial(run_procrastinate, jobs_url, 1),
        "procrastinate, a lock per conversation, concurrency=10": partial(run_procrastinate, jobs_url, 10),
        "procrastinate, no locks": partial(run_procrastinate, jobs_url, 1),
    }

    def refill(name: str) -> None:
        if name.startswith("Close Engine"):
            refill_outbox(server, ours_database, conversations)
        else:
            lock = "NULL" if name.endswith("no locks") else "'conversation ' || conversation"
            text = REFILL_JOBS.format(lock=lock, each=EACH, conversations=conversations)
            server.execute(text, database=jobs)

    rates = {count: throughput(contenders, refill, count, conversations * EACH, rounds) for count in workers}
    return Table(
        "Messages claimed and marked sent, and procrastinate's jobs done",
        ["contender", *(f"{count} worker{'s' * (count > 1)}" for count in workers)],
        [[name, *(per_second(rates[count][name]) for count in workers)] for name in contenders],
        f"{conversations * EACH:,} messages of {conversations:,} conversations, claimed by 10; synchronous_commit on",
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
