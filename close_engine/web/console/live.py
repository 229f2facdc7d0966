"""Live pages: a stream of server-sent events that says when there is something new to see.

The database is asked every other second, once for all who look. A stream ends after ten seconds, so that a server
that stops does not wait for long; the browser then asks for the next one, and says what it saw last.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import anyio
import peewee
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from close_engine.web.console.page import asked, beat

__all__ = ["ROUTES", "Pulse", "events"]

#: Seconds between two looks at the database, and seconds that a stream lasts.
EVERY, LASTS = 2.0, 10.0


class Pulse:
    """Asks for the pulse of the board, and remembers it for a moment."""

    def __init__(self) -> None:
        self._lock, self._asked, self._last = anyio.Lock(), float("-inf"), ""

    async def now(self, oldest: float = EVERY) -> str:
        """Return the pulse, at most so many seconds old. A database that is away has none."""
        asked_at = time.monotonic()
        async with self._lock:
            if asked_at - self._asked >= oldest:
                try:
                    self._last = await run_in_threadpool(beat)
                except peewee.PeeweeException:
                    self._last = ""
                self._asked = time.monotonic()
            return self._last


async def events(pulse: Pulse, seen: str, lasts: float = LASTS) -> AsyncIterator[str]:
    """Yield an event whenever the pulse is another one than was seen.

    Args:
        pulse: the pulse.
        seen: the pulse that the browser's page was made at, or that it heard of last.
        lasts: for how many seconds.
    """
    end = time.monotonic() + lasts
    yield "retry: 1000\n\n"
    # What is remembered may be older than the page.
    now = await pulse.now(oldest=0)
    while True:
        if now and now != seen:
            yield f"id: {now}\nevent: changed\ndata: \n\n"
            seen = now
        if time.monotonic() >= end:
            return
        await anyio.sleep(EVERY)
        now = await pulse.now()


async def stream(request: Request) -> Response:
    """Answer with the stream of events."""
    ask = await asked(request)
    if isinstance(ask, Response):
        return Response(status_code=204)  # which tells a browser to ask no more
    pulse: Pulse = request.app.state.pulse
    left = min(LASTS, ask.session.until - ask.site.sessions.clock())
    seen = request.headers.get("last-event-id") or ask.given("seen")
    found = events(pulse, seen, left)
    return StreamingResponse(found, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


ROUTES = [Route("/events", stream, name="events")]
