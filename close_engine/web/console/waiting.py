"""What waits for us: what needs somebody now."""

from __future__ import annotations

from starlette.responses import Response

from close_engine import outbox
from close_engine.conversations import CloseEngineConversation, Takeover, waiting_for_us
from close_engine.database.binding import current
from close_engine.finding import described
from close_engine.inbox import surplus_payments
from close_engine.web.console.page import Ask, endpoint

__all__ = ["ROUTES"]

#: So many of each are shown.
MOST = 20


def waiting(ask: Ask) -> Response:
    """Show it."""
    owed, surplus = waiting_for_us(), surplus_payments()
    taken = list(Takeover.lasting().order_by(Takeover.id.desc()).limit(MOST))
    model = CloseEngineConversation
    led = model.select().readable().where(model.id.in_([each.conversation_id for each in taken]))
    return ask.show(
        "waiting.html",
        replies=described(list(owed.limit(MOST))),
        taken=taken,
        led={line.conversation.id: line for line in described(list(led))} if taken else {},
        owed=current().count(owed.order_by()),
        dead=outbox.dead_lines(),
        undelivered=outbox.undelivered_lines(),
        surplus=list(surplus.limit(MOST)),
        surpluses=current().count(surplus.order_by()),
        failing=list(outbox.waiting(failed=True, texts=False).limit(MOST)),
        most=MOST,
    )


ROUTES = [endpoint("/waiting", waiting)]
