"""How long is it from the commit that puts a message in to the call of the sender, if a worker waits for it?

The comparison is procrastinate: from the commit of `defer` to the call of the task. Both workers wait in a process of
their own on the same server, with LISTEN and NOTIFY, and the messages take turns. A third worker goes through PgBouncer
in transaction mode, where nobody hears a notice: it polls.

The second table says what notices cost the writers, because all commits that notify share a lock: 1, 4 and 16 of them
put messages in, with the trigger that notifies and without it.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from shutil import which
from typing import Any

import close_engine
from bench.claims import procrastinate_app
from bench.contention import pgbouncer
from bench.ground import conversation_id, fill
from bench.processes import in_processes
from bench.report import Table, milliseconds, per_second
from bench.rounds import interleave, measured_itself, median, percentile
from bench.server import Server

#: Seconds after which a worker has recorded the last message and waits again.
REST = 0.02

#: The trigger that notifies.
TRIGGER = "ALTER TABLE close_engine.outbox {verb} TRIGGER close_engine_announce_insert"


def measure(server: Server, *, quick: bool) -> Iterator[Table]:
    messages, rounds = (10, 2) if quick else (50, 10)
    ours, polled = server.migrated("latency_ours"), server.migrated("latency_polled")
    jobs = server.copy("template0", "latency_jobs")
    for database in (ours, polled):
        fill(server, database, 50, stages=["QUALIFYING"])
    with procrastinate_app(server.url(jobs)).open() as app:
        app.schema_manager.apply_schema()
    yield from_commit_to_send(server, ours, jobs, polled, messages, rounds)
    yield writers(server, ours, *((100, 1) if quick else (800, 5)))
    server.drop(ours, polled, jobs)


# -- from the commit to the sender's call


def from_commit_to_send(server: Server, ours: str, jobs: str, polled: str, messages: int, rounds: int) -> Table:
    with ExitStack() as stack:
        waiting = {
            "procrastinate": stack.enter_context(procrastinate_waits(server.url(jobs))),
            "Close Engine": stack.enter_context(we_wait(server.url(ours))),
        }
        seconds = interleave(waiting, rounds=rounds, repeat=messages, timer=measured_itself)
        note = f"{rounds} rounds of {messages} messages, one at a time; synchronous_commit on, Unix socket."
        if which("pgbouncer"):
            polls = stack.enter_context(we_wait(stack.enter_context(pgbouncer(server, polled)), notices=False))
            name = "Close Engine through PgBouncer, which polls once a second"
            seconds |= interleave({name: polls}, rounds=1, repeat=messages, timer=measured_itself)
        else:
            note += " PgBouncer is not installed here."
    return Table(
        "From the commit to the call of the sender, by a worker that waits",
        ["contender", "median", "p99"],
        [[name, milliseconds(median(taken)), milliseconds(percentile(taken, 99))] for name, taken in seconds.items()],
        note,
    )


@contextmanager
def we_wait(url: str, *, notices: bool = True) -> Iterator[Callable[[], float]]:
    """Start a worker, and yield a function that submits a message and returns the seconds until it is sent."""
    database = close_engine.connect(url)
    conversation = close_engine.CloseEngineConversation.get_by_id(conversation_id(1))

    def submit() -> None:
        close_engine.bind(database)
        close_engine.submit(conversation, "SEND_MESSAGE", "Hello!")

    with waiting_process(our_worker, url) as calls:
        # A worker that polls is met at any moment of its pause.
        yield lambda: until_called(submit, calls, pause=REST if notices else random.random())
    database.close()


@contextmanager
def procrastinate_waits(url: str) -> Iterator[Callable[[], float]]:
    """Start procrastinate's worker, and yield a function that defers a job and returns the seconds until it runs."""
    with procrastinate_app(url).open() as app, waiting_process(their_worker, url) as calls:
        yield partial(until_called, app.configure_task("arrive").defer, calls)


def until_called(put_in: Callable[[], object], calls: Any, pause: float = REST) -> float:
    """Put a message in after a pause, and return the seconds from its commit to the call."""
    time.sleep(pause)
    put_in()
    committed = time.monotonic()
    called: float = calls.recv()
    return called - committed


@contextmanager
def waiting_process(work: Callable[[str, Any], None], url: str) -> Iterator[Any]:
    """Run a worker in a process, and yield the pipe on which it tells when it was called."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(url, there), daemon=True)
    process.start()
    assert here.recv() == "waits"
    try:
        yield here
    finally:
        process.kill()
        process.join()


def our_worker(url: str, pipe: Any) -> None:
    class WhenStarted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("started"):
                pipe.send("waits")

    logger = logging.getLogger("close_engine.worker")
    logger.addHandler(WhenStarted())
    logger.setLevel(logging.INFO)
    close_engine.connect(url)
    close_engine.Worker(lambda message: pipe.send(time.monotonic()), sweep=None).run()


def their_worker(url: str, pipe: Any) -> None:
    logging.disable()
    app = procrastinate_app(url)

    @app.task(name="arrive")
    async def arrive() -> None:
        pipe.send(time.monotonic())

    async def run() -> None:
        async with app.open_async():
            waits = asyncio.create_task(app.run_worker_async(concurrency=4, install_signal_handlers=False))
            await asyncio.sleep(1)  # it does not say when it listens
            pipe.send("waits")
            await waits

    asyncio.run(run())


# -- what notices cost the writers


def writers(server: Server, database: str, messages: int, rounds: int) -> Table:
    counts = (1, 4, 16)
    url, ways = server.url(database), {"with notices": "ENABLE", "without": "DISABLE"}
    seconds = {}
    for count in counts:
        seconds[count] = interleave(
            {name: partial(in_processes, partial(put_in, url, messages // count), count) for name in ways},
            rounds=rounds,
            before={
                name: partial(
                    server.execute, TRIGGER.format(verb=verb), "TRUNCATE close_engine.outbox", database=database
                )
                for name, verb in ways.items()
            },
            timer=measured_itself,
        )
    return Table(
        "Messages put in, each in a transaction of its own, by the number of writers",
        ["", *(f"{count} writer{'s' * (count > 1)}" for count in counts)],
        [[name, *(per_second(messages / median(seconds[count][name])) for count in counts)] for name in ways],
        f"median of {rounds} rounds of {messages} messages; synchronous_commit on, a worker listens.",
    )


def put_in(url: str, messages: int) -> None:
    database = close_engine.connect(url)
    for number in range(messages):
        close_engine.outbox.enqueue(conversation_id(1 + (os.getpid() + number) % 50), "other", "Hello!")
    database.close()
