"""One side of `bench.against`: run the close_engine in a given directory and measure it.

It reads one JSON array per line, [verb, argument, …], and answers each with one line of JSON.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import cycle
from typing import Any


def main(directory: str, url: str) -> None:
    sys.path.insert(0, directory)
    import close_engine
    from bench.driver import replayed
    from bench.ground import TRIGGER, conversation_id
    from bench.rounds import percentile, timed

    ids = cycle(conversation_id(number) for number in range(1, 201))

    def change() -> None:
        conversation = close_engine.CloseEngineConversation.get_by_id(next(ids))
        conversation.fire(TRIGGER[conversation.stage.value], actor="bench")

    def claim() -> None:
        messages = close_engine.outbox.claim(10, timedelta(minutes=1), "bench")
        assert len(messages) == 10
        for message in messages:
            message.sent()

    operations: dict[str, Callable[[], None]] = {"stage change": change, "claim": claim}

    def migrate() -> str:
        close_engine.migrate(standalone=True)
        return str(close_engine.__file__)

    def backend() -> int:
        ((pid,),) = database.execute_sql("SELECT pg_catalog.pg_backend_pid()").fetchall()
        return int(pid)

    def run(operation: str, count: int) -> float:
        """Return the CPU time in seconds."""
        started = time.process_time()
        for _ in range(count):
            operations[operation]()
        return time.process_time() - started

    def drain(concurrency: int) -> float:
        """Return the seconds in which a worker sends all that waits. At older commits it sends one at a time."""
        options: dict[str, Any] = {"concurrency": concurrency}
        if "concurrency" not in inspect.signature(close_engine.Worker).parameters:
            options = {}
        worker = close_engine.Worker(lambda message: None, sweep=None, **options)
        logging.disable()
        return timed(worker.run_until_empty)

    def alone(count: int) -> float:
        """Return the CPU time in seconds of one stage change with the server's answers replayed."""
        nonlocal ids, database
        with replayed() as tape:
            database = close_engine.connect(url)
            ids = cycle([conversation_id(1)])
            change()
            with tape.recording():  # there and back again
                change()
                change()
            with tape.playing():
                seconds = [timed(change, time.thread_time) for _ in range(count)]
            database.close()
        return percentile([seconds], 10)

    database = close_engine.connect(url)
    verbs: dict[str, Callable[..., Any]] = {"migrate": migrate, "backend": backend, "run": run}
    verbs |= {"drain": drain, "alone": alone}
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        print(json.dumps(verbs[verb](*arguments)), flush=True)
    database.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
