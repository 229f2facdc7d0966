"""The vocabulary: every word that the library stores in a column.

Each member is a string, equal to what the database holds:

>>> Stage.PREVIEW_SENT == "PREVIEW_SENT"
True
>>> Stage.STALLED in ACTIVE_STAGES
False
"""

from __future__ import annotations

from enum import Enum

__all__ = [
    "ACTIVE_STAGES",
    "CLOSED_STAGES",
    "INDEXED_TEXTS",
    "ActionStatus",
    "ActionType",
    "Author",
    "AutonomyLevel",
    "DeliveryStatus",
    "Direction",
    "EntryPoint",
    "Event",
    "IfLeadWrites",
    "MessageStatus",
    "PaymentIssue",
    "Stage",
]


class Word(str, Enum):
    """An enum that is stored as text: the value of each member, which is what `str()` returns."""

    def __str__(self) -> str:
        return str(self.value)


class Stage(Word):
    """The stage of a close conversation."""

    INITIATED = "INITIATED"
    QUALIFYING = "QUALIFYING"
    COLLECTING_INFO = "COLLECTING_INFO"
    BUILDING = "BUILDING"
    PREVIEW_SENT = "PREVIEW_SENT"
    EDIT_LOOP = "EDIT_LOOP"
    PENDING_APPROVAL = "PENDING_APPROVAL"
    PAYMENT_SENT = "PAYMENT_SENT"
    COMPLETED = "COMPLETED"
    STALLED = "STALLED"
    CLOSED_LOST = "CLOSED_LOST"


ACTIVE_STAGES: tuple[Stage, ...] = (
    Stage.INITIATED,
    Stage.QUALIFYING,
    Stage.COLLECTING_INFO,
    Stage.BUILDING,
    Stage.PREVIEW_SENT,
    Stage.EDIT_LOOP,
    Stage.PENDING_APPROVAL,
    Stage.PAYMENT_SENT,
)

#: The conversation is over, won or lost, and nothing more is sent in it.
CLOSED_STAGES: tuple[Stage, ...] = (Stage.COMPLETED, Stage.CLOSED_LOST)


class EntryPoint(Word):
    """What brought the lead into a close conversation."""

    INSTANTLY_REPLY = "INSTANTLY_REPLY"
    SMS_REPLY = "SMS_REPLY"
    REP_CLOSE = "REP_CLOSE"
    PREVIEW_CTA = "PREVIEW_CTA"


class AutonomyLevel(Word):
    """How much the AI may send without asking a human."""

    FULL_AUTO = "FULL_AUTO"
    SEMI_AUTO = "SEMI_AUTO"
    MANUAL = "MANUAL"


class ActionType(Word):
    """What a message to the lead is for."""

    SEND_PAYMENT_LINK = "SEND_PAYMENT_LINK"
    SEND_MESSAGE = "SEND_MESSAGE"
    SEND_PREVIEW = "SEND_PREVIEW"


#: The values of ActionType in SQL, to stand in IN (…), as the index of the texts that do not wait has them: in another
#: order, SQLite would not use it.
INDEXED_TEXTS = "'SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK'"


class IfLeadWrites(Word):
    """What becomes of a draft if the lead writes before it leaves."""

    WITHDRAW = "withdraw"
    SEND = "send"


class Direction(Word):
    """Which way a text went: inbound from the lead, outbound to it."""

    INBOUND = "inbound"
    OUTBOUND = "outbound"


class Author(Word):
    """Who wrote a text."""

    AI = "AI"
    HUMAN = "human"
    LEAD = "lead"


class ActionStatus(Word):
    """The status of a pending action in the approval queue."""

    PENDING = "PENDING"
    APPROVED = "APPROVED"
    REJECTED = "REJECTED"
    EXPIRED = "EXPIRED"


class MessageStatus(Word):
    """The status of a message in the outbox."""

    PENDING = "PENDING"
    SENT = "SENT"
    DEAD = "DEAD"
    WITHDRAWN = "WITHDRAWN"


class DeliveryStatus(Word):
    """How far a message came that was sent, as its provider says it. It only goes forward, in this order."""

    QUEUED = "queued"
    SENT = "sent"
    UNDELIVERED = "undelivered"
    DELIVERED = "delivered"
    READ = "read"


class PaymentIssue(Word):
    """Why somebody should look at a payment.

    It was paid for already, it is less than the price, it was paid back, it belongs to no conversation that a payment
    link was sent in, or it was made in the provider's test mode while real money is expected, or the other way round.
    """

    SURPLUS = "surplus"
    PARTIAL = "partial"
    REFUNDED = "refunded"
    UNMATCHED = "unmatched"
    TEST = "test"


class Event(Word):
    """What can be subscribed to besides entering a stage, which is `stage:entered`.

    An action is superseded if the lead wrote after it was drafted. A message is dead if it was given up. It is
    undelivered if its provider says so after it was sent. A cap is reached if a text of the AI is beyond it.
    """

    STAGE_ENTERED = "stage:entered"
    ACTION_PENDING = "action:pending"
    ACTION_APPROVED = "action:approved"
    ACTION_REJECTED = "action:rejected"
    ACTION_EXPIRED = "action:expired"
    ACTION_SUPERSEDED = "action:superseded"
    ACTION_EXPIRING = "action:expiring"
    MESSAGE_DEAD = "message:dead"
    MESSAGE_UNDELIVERED = "message:undelivered"
    LEAD_WROTE = "lead:wrote"
    LEAD_OPTED_OUT = "lead:opted_out"
    LEAD_OPTED_IN = "lead:opted_in"
    PAYMENT_RECORDED = "payment:recorded"
    PAYMENT_SURPLUS = "payment:surplus"
    PAYMENT_PARTIAL = "payment:partial"
    PAYMENT_REFUNDED = "payment:refunded"
    CONVERSATION_TAKEN_OVER = "conversation:taken_over"
    CONVERSATION_HANDED_BACK = "conversation:handed_back"
    CAP_REACHED = "cap:reached"
