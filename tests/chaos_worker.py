"""A worker that the chaos test kills: `python -m tests.chaos_worker URL FILE`.

It sends a message by writing a line to the file. The line stays, even if the process or the database crashes.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from datetime import timedelta

import close_engine
from close_engine import OutboxMessage, Stage, Worker, outbox


def main(url: str, path: str) -> None:
    file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY)

    def send(message: OutboxMessage) -> str:
        os.write(file, f"{time.monotonic_ns()} {message.conversation_id} {message.id}\n".encode())
        return message.send_key

    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("close_engine").setLevel(logging.INFO)
    close_engine.connect(url)
    outbox.effect(Stage.QUALIFYING, topic="look_up_business")
    worker = Worker(
        send,
        concurrency=4,
        lease=timedelta(seconds=2),
        idle=timedelta(seconds=0.1),
        sweep_every=timedelta(seconds=0.5),
    )
    signal.signal(signal.SIGTERM, lambda number, frame: worker.stop())
    worker.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
