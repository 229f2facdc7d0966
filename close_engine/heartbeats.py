"""Which workers run: each says so every 15 seconds, in a row of its own, and takes the row away when it stops.

Nothing depends on these rows. They are for people: the board shows them. The row of a worker that was lost is shown for
a week, and taken away by the next worker that starts after that.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import peewee

from close_engine.database.binding import current
from close_engine.database.fields import JsonField, TextField, UtcDateTimeField, dump_json
from close_engine.models import BaseModel

__all__ = ["EVERY", "LOST_AFTER", "Heartbeat", "beat", "clear", "end", "lasting"]

#: How often a worker says that it runs.
EVERY = timedelta(seconds=15)

#: A worker that was not seen for so long is lost.
LOST_AFTER = timedelta(minutes=1)

#: A worker that was lost so long ago is nobody's worry any more.
FORGOTTEN_AFTER = timedelta(days=7)


class Heartbeat(BaseModel):
    """A worker that runs, or was lost: a row of the table `workers`.

    Attributes:
        id: the worker's name.
        host: the machine it runs on.
        pid: int, the id of its process there.
        started_at: datetime, since when it runs.
        seen_at: datetime, when it last said so.
        concurrency: int, how many messages it sends at once.
        topics: list of str, the topics that it sends; None of all.
        sending: int, how many it was sending then.
    """

    id = TextField[str](primary_key=True, column_name="name")
    host = TextField[str]()
    pid = peewee.IntegerField()
    started_at = UtcDateTimeField[datetime]()
    seen_at = UtcDateTimeField[datetime]()
    concurrency = peewee.IntegerField()
    topics = JsonField(null=True)
    sending = peewee.IntegerField()

    class Meta:
        table_name = "workers"
        own_table = "workers"


_BEAT = """
    INSERT INTO {workers} (name, host, pid, started_at, seen_at, concurrency, topics, sending)
    VALUES (%s, %s, %s, {later}, {moment}, %s, %s, %s)
    ON CONFLICT (name) DO UPDATE SET host = EXCLUDED.host, pid = EXCLUDED.pid, started_at = EXCLUDED.started_at,
        seen_at = EXCLUDED.seen_at, concurrency = EXCLUDED.concurrency, topics = EXCLUDED.topics,
        sending = EXCLUDED.sending
"""

_END = "DELETE FROM {workers} WHERE name = %s AND host = %s AND pid = %s"
_CLEAR = "DELETE FROM {workers} WHERE seen_at < {later}"


def beat(name: str, concurrency: int, topics: Sequence[str] | None, sending: int, runs: timedelta) -> None:
    """Say that a worker of this process runs.

    Args:
        name: the worker's.
        concurrency, topics, sending: as in its row.
        runs: for how long it has run.
    """
    stored = None if topics is None else dump_json(list(topics))
    here = (name, socket.gethostname(), os.getpid())
    current().execute(_BEAT, [*here, -runs.total_seconds(), concurrency, stored, sending])


def end(name: str) -> None:
    """Say that a worker of this process has stopped."""
    current().execute(_END, [name, socket.gethostname(), os.getpid()])


def clear() -> None:
    """Take away the rows of workers that were lost long ago. Every worker does that when it starts."""
    current().execute(_CLEAR, [-FORGOTTEN_AFTER.total_seconds()])


def lasting() -> list[Heartbeat]:
    """Read the workers that run, and those that were lost lately, the one that was seen last first."""
    since = peewee.SQL(current().sql("{later}"), [-FORGOTTEN_AFTER.total_seconds()])
    found: Any = Heartbeat.select().readable().where(Heartbeat.seen_at >= since)
    return list(found.order_by(Heartbeat.seen_at.desc(), Heartbeat.id))
