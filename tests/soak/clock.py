"""The days of a run: the database's clock begins in the past, runs like any other, and jumps until it is right."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import peewee

from close_engine.database.binding import utc_now

_OWN = "SELECT prosrc FROM pg_catalog.pg_proc WHERE oid = 'close_engine.moment()'::pg_catalog.regprocedure"
_REPLACE = """
    CREATE OR REPLACE FUNCTION close_engine.moment() RETURNS timestamp without time zone
    LANGUAGE sql VOLATILE PARALLEL SAFE AS $body${body}$body$
"""


class Calendar:
    """The clock of the processes: as far behind as the database's own.

    Args:
        behind: a number that all processes share: by how many seconds.
    """

    def __init__(self, behind: Any) -> None:
        self._behind = behind

    @property
    def behind(self) -> timedelta:
        return timedelta(seconds=self._behind.value)

    def __call__(self) -> datetime:
        return utc_now() - self.behind


class DatabaseClock:
    """What moves the database's clock, and so what every trigger and every SQL of the library takes for the time.

    The offset is a constant in the function's body, so that the function costs what it costs in production. Leases are
    by this clock, too: let it jump only while nothing is in flight.
    """

    def __init__(self, database: peewee.Database, calendar: Calendar) -> None:
        self.database = database
        self.calendar = calendar
        (self._own,) = database.execute_sql(_OWN).fetchone()

    def be_behind(self, behind: timedelta) -> None:
        """Show a time that is this far behind; with zero, the function is the library's own again."""
        seconds = behind.total_seconds()
        body = f"{self._own.rstrip()} - interval '{seconds} seconds'" if seconds else self._own
        self.database.execute_sql(_REPLACE.format(body=body))
        self.calendar._behind.value = seconds
