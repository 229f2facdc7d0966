"""The outbox: what waits and why, what hangs, what is dead, and pausing."""

from __future__ import annotations

from datetime import datetime

from starlette.responses import Response

from close_engine import outbox as queue
from close_engine.board import HANGING_AFTER, outbox_line
from close_engine.database.binding import now
from close_engine.outbox import OutboxMessage
from close_engine.pauses import Pause, pause_sending, resume_sending
from close_engine.web.console.accounts import Role
from close_engine.web.console.page import Ask, Refused, endpoint
from close_engine.web.console.rendering import ago

__all__ = ["ROUTES"]

#: So many messages are listed.
MOST = 50


def outbox(ask: Ask) -> Response:
    """Show it."""
    line, at = outbox_line(), now()
    return ask.show(
        "outbox.html",
        line=line,
        waiting=[(message, *_why(message, line.paused, at)) for message in queue.waiting().limit(MOST)],
        dead=queue.dead_lines(),
        undelivered=queue.undelivered_lines(),
        most=MOST,
    )


def _why(message: OutboxMessage, pauses: list[Pause], at: datetime) -> tuple[str, bool]:
    """Say why a message waits, and whether that should worry somebody."""
    if message.leased_by is not None and message.available_at > at:
        hangs = message.leased_at is not None and message.leased_at <= at - HANGING_AFTER
        return f"{'hangs' if hangs else 'is being sent'} at {message.leased_by}, begun {ago(message.leased_at)}", hangs
    if any(pause.topic in ("", message.topic) for pause in pauses):
        return "is paused", False
    if message.last_error:
        return f"attempt {message.attempts} failed, again {ago(message.available_at)}: {message.last_error}", True
    if message.available_at > at:
        return f"is due {ago(message.available_at)}", False
    return f"is due since {ago(message.available_at)}", False


def requeue(ask: Ask) -> Response:
    """Put dead or undelivered messages back: one, or all with one kind of error."""
    message, error = ask.given("message"), ask.given("error")
    if message.isdecimal() and int(message) < 2**63:
        return ask.go("outbox", f"Message {queue.requeue(int(message)).id} will be sent again.")
    if "error" not in ask.form:
        raise Refused(400, "Say which messages to send again.")
    return ask.go("outbox", f"Messages that will be sent again: {len(queue.requeue_all(error=error))}.")


def pause(ask: Ask) -> Response:
    """Pause sending, or go on."""
    topic = ask.given("topic")
    topics = [topic] if topic else None
    if ask.given("verb") == "resume":
        ended = resume_sending(topics, ask.by)
        return ask.go("outbox", "Sending goes on." if ended else "Nothing was paused.")
    lasting = pause_sending(ask.given("reason"), topics, ask.by)
    return ask.go("outbox", *(f"Paused: {each}" for each in lasting))


ROUTES = [
    endpoint("/outbox", outbox),
    endpoint("/outbox/requeue", requeue, post=True, role=Role.ADMIN),
    endpoint("/outbox/pause", pause, post=True, role=Role.ADMIN),
]
