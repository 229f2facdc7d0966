"""A Celery app as an agency has one: it connects and migrates when it is imported, before Celery forks.

It is run as `celery --app tests.celery_app worker`. The environment names the database and a directory, in which the
queue and the record of what was sent are.
"""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

from celery import Celery

import close_engine
from close_engine import OutboxMessage
from close_engine.integrations.celery import add_tasks

PLACE = Path(os.environ["CELERY_PLACE"])
QUEUE = PLACE / "queue"

QUEUE.mkdir(exist_ok=True)
app = Celery("agency", broker="filesystem://", set_as_current=False)
app.conf.broker_transport_options = {
    "data_folder_in": str(QUEUE),
    "data_folder_out": str(QUEUE),
    "control_folder": str(PLACE / "control"),
    "polling_interval": 0.02,
}

database = close_engine.connect()
close_engine.migrate(standalone=True)


def send(message: OutboxMessage) -> str:
    """Deliver what the body says, in the process that this is: `kill` ends it, `wait` goes on when there is a file."""
    with (PLACE / "begun").open("a") as record:
        record.write(f"{os.getpid()} {message.send_key} {message.body}\n")
    if message.body == "kill" and message.claims == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while message.body == "wait" and not (PLACE / "go on").exists():
        time.sleep(0.01)
    return f"SM-{message.send_key}"


add_tasks(app, send, concurrency=2, lease=timedelta(seconds=1))
