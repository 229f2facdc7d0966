"""A worker, as `close-engine worker` runs it, whose provider and whose sweeps leave a record.

    python -m tests.cluster.worker RECORD NAME TOPIC

Nothing in it knows that the database may fail over. What has the topic, no other worker sends: if that leaves, this one
is at work.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import close_engine
from close_engine import OutboxMessage, Worker
from close_engine.sweeps import Swept
from tests.cluster.record import Record

#: How long the messages of a worker that was killed wait.
LEASE = timedelta(seconds=15)
SWEEP_EVERY = timedelta(seconds=2)


def main(path: str, name: str, topic: str) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("close_engine").setLevel(logging.INFO)
    record = Record(Path(path))
    close_engine.connect()

    def send(message: OutboxMessage) -> str:
        time.sleep(0.02)  # its latency
        record.note("delivered", f"{message.send_key} {message.body}")
        if message.topic == topic:
            record.note("pinged")
        return f"SM-{message.send_key}"  # by the same key, the same text

    def sweep() -> Swept:
        swept = close_engine.sweep()
        record.note("swept")
        return swept

    topics = ["SEND_MESSAGE", topic]
    worker = Worker(send, name=name, concurrency=2, topics=topics, lease=LEASE, sweep=sweep, sweep_every=SWEEP_EVERY)
    signal.signal(signal.SIGTERM, lambda *signalled: worker.stop())
    worker.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
