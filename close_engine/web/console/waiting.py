"""What waits for us: what needs somebody now."""

from __future__ import annotations

from starlette.responses import Response

from close_engine import outbox
from close_engine.conversations import CloseEngineConversation, Takeover, waiting_for_us
from close_engine.database.binding import current
from close_engine.finding import described
from close_engine.inbox import InboxEntry
from close_engine.payments import Money, payment_issues, resolve_payment
from close_engine.web.console.accounts import Role
from close_engine.web.console.page import Ask, Refused, endpoint

__all__ = ["ROUTES"]

#: So many of each are shown.
MOST = 20


def waiting(ask: Ask) -> Response:
    """Show it."""
    owed, payments = waiting_for_us(), payment_issues()
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
        payments=[(entry, _money(entry)) for entry in payments.limit(MOST)],
        issues=current().count(payments.order_by()),
        failing=list(outbox.waiting(failed=True, texts=False).limit(MOST)),
        most=MOST,
    )


def _money(entry: InboxEntry) -> str:
    return "" if entry.amount is None or entry.currency is None else str(Money(entry.amount, entry.currency))


def resolve(ask: Ask) -> Response:
    """Say that somebody has looked at a payment."""
    entry = ask.given("payment")
    if not entry.isdecimal() or int(entry) >= 2**63:
        raise Refused(400, "Say which payment was looked at.")
    found = resolve_payment(int(entry), by=ask.by, resolution=ask.given("resolution") or None)
    said = (
        "Noted." if found.resolved_by == ask.by else f"{found.resolved_by} was first: {found.resolution or 'no words'}."
    )
    return ask.go("waiting", said)


ROUTES = [endpoint("/waiting", waiting), endpoint("/waiting/payments", resolve, post=True, role=Role.APPROVER)]
