"""How long a provider asks to wait, in the header Retry-After of its answer."""

from __future__ import annotations

import re
from datetime import timedelta, timezone
from email.utils import parsedate_to_datetime

from close_engine.database.binding import moment

__all__ = ["retry_after"]

#: Servers send fractions of a second too, which RFC 9110 does not know.
_SECONDS = re.compile(r"[0-9]+(\.[0-9]+)?", re.ASCII)


def retry_after(header: str | None, *, most: timedelta) -> timedelta | None:
    """Read the header: seconds, or a date by the clock of the database.

    Args:
        header: str, what the answer has; None if it has none.
        most: timedelta, the longest that is believed.

    Returns:
        timedelta from a second to `most`, or None if it does not say.
    """
    said = (header or "").strip()
    try:
        if _SECONDS.fullmatch(said):
            wait = timedelta(seconds=min(float(said), most.total_seconds()))
        else:
            date = parsedate_to_datetime(said)
            wait = (date if date.tzinfo is not None else date.replace(tzinfo=timezone.utc)) - moment()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(wait, timedelta(seconds=1)), most)
