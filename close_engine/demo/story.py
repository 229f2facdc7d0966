"""One conversation told whole: its texts, the decisions on its drafts, its stages, its payment, as a person reads it.

>>> from close_engine.demo.place import temporary_database
>>> from close_engine.demo.play import Demo
>>> with temporary_database() as url, Demo(url, leads=40, seed=1) as demo:
...     steps = sum(1 for _ in demo.run())
...     lines = tell(demo.hero.conversation)
>>> print(lines[0].what, "…", lines[-1].what)
opens the conversation as INITIATED … PAYMENT_SENT → COMPLETED
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from close_engine.approvals import PendingAction
from close_engine.conversations import CloseEngineConversation
from close_engine.inbox import InboxEntry
from close_engine.stages import ActionStatus, ActionType, Author, Direction
from close_engine.transcript import Text

__all__ = ["Line", "tell"]

_DRAFTS = {
    ActionType.SEND_MESSAGE: "a message",
    ActionType.SEND_PREVIEW: "a preview",
    ActionType.SEND_PAYMENT_LINK: "a payment link",
}


@dataclass(frozen=True)
class Line:
    """One thing that happened.

    Attributes:
        at: datetime, when.
        who: str, who did it; empty if it followed by itself.
        what: str, what it was.
    """

    at: datetime
    who: str
    what: str


def tell(conversation: CloseEngineConversation) -> list[Line]:
    """Tell a conversation from its opening to where it stands now.

    Args:
        conversation: CloseEngineConversation.

    Returns:
        list of Line, in the order of time.
    """
    # Of the same moment, a decision comes before the text, and the text before the stage that it leads to.
    told = [*_opening(conversation), *_drafts(conversation), *_texts(conversation), *_payments(conversation)]
    return sorted([*told, *_stages(conversation)], key=lambda line: line.at)


def _opening(conversation: CloseEngineConversation) -> Iterator[Line]:
    first = conversation.history()[0]
    yield Line(first.created_at, first.actor or "", f"opens the conversation as {first.dest}")


def _drafts(conversation: CloseEngineConversation) -> Iterator[Line]:
    of_it = PendingAction.conversation_id == conversation.id
    # When an action was rejected is known only of the last payment link that waited: the history has it.
    ended = {(change.metadata or {}).get("action_id"): change.created_at for change in conversation.history()}
    edited = {text.body for text in conversation.messages() if _details(text).get("editedBy")}
    for action in PendingAction.select().where(of_it).order_by(PendingAction.created_at, PendingAction.id):
        is_edited = action.draft_message in edited
        words = "" if is_edited else f": “{action.draft_message}”"
        yield Line(action.created_at, "AI", f"drafts {_DRAFTS[action.type]}, which waits for approval{words}")
        who = action.approved_by or ""
        if action.status is ActionStatus.APPROVED:
            how = "approves it, in other words" if is_edited else "approves it"
            yield Line(action.approved_at or action.created_at, who, how)
        elif action.status is ActionStatus.REJECTED:
            at, why = ended.get(action.id), action.metadata.get("rejectionReason", "for no reason")
            yield Line(at or action.created_at, who, f"rejects it{'' if at else ' later'}: {why}")
        elif action.status is ActionStatus.EXPIRED:
            yield Line(action.expires_at or action.created_at, "", "nobody has decided in time: the draft expires")


def _texts(conversation: CloseEngineConversation) -> Iterator[Line]:
    for text in conversation.messages():
        if text.action_id is not None or text.at is None:
            continue  # a draft
        links = [str(link) for name, link in _details(text).items() if name in ("previewUrl", "paymentUrl")]
        words = " ".join([f"“{text.body}”", *links])
        if text.direction is Direction.INBOUND:
            yield Line(text.at, "lead", f"writes: {words}")
        elif text.is_said:
            who = text.by if text.author is Author.HUMAN and text.by else str(text.author)
            yield Line(text.at, who, f"texts: {words}")
        else:
            why = f", because {text.reason}" if text.reason else ""
            yield Line(text.at, str(text.author), f"would have texted: {words} ({text.status}{why})")


def _details(text: Text) -> dict[str, Any]:
    return text.payload if isinstance(text.payload, dict) else {}


def _payments(conversation: CloseEngineConversation) -> Iterator[Line]:
    of_it = (InboxEntry.conversation_id == conversation.id) & (InboxEntry.kind == "payment")
    for payment in InboxEntry.select().where(of_it).order_by(InboxEntry.id):
        yield Line(payment.received_at, "lead", f"pays {payment.amount / 100:,.2f} {payment.currency}")


def _stages(conversation: CloseEngineConversation) -> Iterator[Line]:
    for change in conversation.history()[1:]:
        why = f" ({change.reason})" if change.reason else ""
        yield Line(change.created_at, "", f"{change.source} → {change.dest}{why}")
