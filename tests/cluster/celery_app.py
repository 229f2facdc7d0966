"""The Celery app of the play in `queues`: it connects when it is imported, before Celery forks.

The environment names the broker, the database, and the file in which its provider notes what it delivers.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

from celery import Celery

import close_engine
from close_engine import OutboxMessage
from close_engine.integrations.celery import add_tasks
from tests.cluster.record import Record

#: How long the messages of a machine that was killed wait.
LEASE = timedelta(seconds=10)

app = Celery("agency", broker=os.environ["BROKER"], set_as_current=False)
app.conf.update(
    broker_connection_retry_on_startup=True,
    beat_schedule_filename=os.environ["RECORD"] + ".beat",
)
record = Record(Path(os.environ["RECORD"]))
close_engine.connect()


def send(message: OutboxMessage) -> str:
    record.note("delivered", f"{message.body} {message.send_key}")
    time.sleep(0.05)  # its latency
    return f"SM-{message.send_key}"  # by the same key, the same text


add_tasks(app, send, concurrency=4, lease=LEASE, sweep_every=timedelta(seconds=10))
