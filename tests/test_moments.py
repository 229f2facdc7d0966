"""The moments that the database counts by its own clock."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import peewee
import pytest

from close_engine.database.binding import current
from close_engine.testing import MovableClock


@pytest.mark.parametrize(
    ("seconds", "milliseconds"),
    [(0, 0), (0.0009, 0), (1.001, 1001), (1.2345, 1234), (60, 60_000), (-0.0004, -1), (-1.2346, -1235)],
)
def test_a_later_moment_is_cut_and_never_rounded_up(
    database: peewee.Database, close_engine_clock: MovableClock, seconds: float, milliseconds: int
) -> None:
    """A moment that is rounded up has not been yet."""
    close_engine_clock.now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    (found,) = current().execute("SELECT {later}", (seconds,)).fetchone()
    later = datetime.fromisoformat(found) if isinstance(found, str) else found
    assert later == datetime(2026, 1, 1) + timedelta(milliseconds=milliseconds)
