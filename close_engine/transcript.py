"""The transcript: every text of a conversation, in both directions, as one list and by one query.

    for text in conversation.messages():
        print(text.at, text.author, text.status, text.body)

    prompt = conversation.messages().as_prompt(budget=20_000)        # what a language model takes

It has what the lead wrote, also before the conversation was opened, what the outbox holds, drafts that wait for
approval, and the texts that others sent (`record_sent`) or that were taken over from the CRM (`import_texts`).

A text of ours is a human's if whoever submitted it has ever taken the conversation over, or approved it themselves, or
if somebody changed its words while approving it. Every other text of the outbox is the AI's.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from typing import Any, NamedTuple, TypeVar

from close_engine.database.binding import current
from close_engine.database.dialect import Dialect
from close_engine.database.fields import UtcDateTimeField
from close_engine.database.reading import is_unreadable
from close_engine.errors import InvalidValue, UnreadableRow, one_line
from close_engine.stages import INDEXED_TEXTS, ActionType, Author, DeliveryStatus, Direction, MessageStatus, Word

__all__ = ["Text", "TextKind", "TextStatus", "Transcript", "transcript_of"]

Known = TypeVar("Known")


class TextKind(Word):
    """What a text is: a message like any other, or one with the link to a preview or to a payment."""

    MESSAGE = "message"
    PREVIEW = "preview"
    LINK = "link"


class TextStatus(Word):
    """What has become of a text. A withdrawn or dead one was never sent."""

    RECEIVED = "received"
    AWAITING_APPROVAL = "awaiting approval"
    WAITING = "waiting"
    SENT = "sent"
    DELIVERED = "delivered"
    UNDELIVERED = "undelivered"
    WITHDRAWN = "withdrawn"
    DEAD = "dead"


@dataclass(frozen=True)
class Text:
    """One text.

    Attributes:
        at: datetime, when it was received or sent; of a text that was not sent, when it was put in. None if the row
            holds no time that Python can read.
        direction: Direction.
        author: Author, who wrote it.
        by: str, the name of whoever submitted or sent it, as given; None if nobody was named.
        kind: TextKind.
        status: TextStatus.
        body: str, what it says.
        payload: JSON, what else was given with it: `metadata` of what came in or was recorded, `payload` of a message.
        provider_id: str, the provider's id of it; None if it has none yet.
        reason: str, why it was withdrawn, is dead or was not delivered, or what went wrong when it was last tried.
        message_id: int, its id in the outbox; None if it is not there.
        action_id: str, the id of the PendingAction that waits for approval; None otherwise.
    """

    at: datetime | None
    direction: Direction
    author: Author
    by: str | None
    kind: TextKind
    status: TextStatus
    body: str
    payload: Any = None
    provider_id: str | None = None
    reason: str | None = None
    message_id: int | None = None
    action_id: str | None = None

    @property
    def is_said(self) -> bool:
        """Whether it was really said: received from the lead, or sent to it and not known to be undelivered."""
        return self.status in _SAID


_SAID = (TextStatus.RECEIVED, TextStatus.SENT, TextStatus.DELIVERED)


class Transcript(list[Text]):
    """The texts of a conversation, in the order of time.

    Attributes:
        unreadable: list of UnreadableRow: what could not be read of some rows. Such a text is in the list all the same,
            without its payload or, before all others, without its time. Only one with an unknown word is left out.
    """

    def __init__(self, texts: Sequence[Text] = (), unreadable: Sequence[UnreadableRow] = ()) -> None:
        super().__init__(texts)
        self.unreadable = list(unreadable)

    def as_prompt(
        self, budget: int | None = None, *, opening: str | None = "(We wrote first.)"
    ) -> list[dict[str, str]]:
        """Return what was really said as alternating turns for a language model, oldest first.

        Neighbours of one role are one turn, a line each. What waits, was withdrawn or did not arrive is left out, and
        so are the spaces around a text. The last turn is ours if the lead has not answered.

        Args:
            budget: int, the most characters of all turns together; None for no limit. The oldest texts are left out
                first; if even the newest is too long, its end stays.
            opening: str, what the user says first if the first text is ours, because most models want a user's turn
                first. It does not count. None to begin with our text.

        Returns:
            list of dict with `role`, which is `user` for the lead and `assistant` for us, and `content`.

        Raises:
            InvalidValue: the budget is less than 1.
        """
        if budget is not None and budget < 1:
            raise InvalidValue("budget", budget, "it must be at least 1")
        turns: list[dict[str, str]] = []  # newest first
        left = budget
        for text in reversed(self):
            body = text.body.strip()  # models refuse what is blank, or a last turn of ours that ends with a space
            if not text.is_said or not body:
                continue
            role = "user" if text.direction is Direction.INBOUND else "assistant"
            joins = bool(turns) and turns[-1]["role"] == role
            if left is not None:
                if len(body) + joins > left:
                    if not turns:
                        turns.append({"role": role, "content": body[-left:].lstrip()})
                    break
                left -= len(body) + joins
            if joins:
                turns[-1]["content"] = f"{body}\n{turns[-1]['content']}"
            else:
                turns.append({"role": role, "content": body})
        if opening is not None and turns and turns[-1]["role"] == "assistant":
            turns.append({"role": "user", "content": opening})
        return turns[::-1]


def transcript_of(conversation_id: str) -> Transcript:
    """Read the texts of a conversation, by one query.

    Args:
        conversation_id: str. Of a conversation that was deleted, what belonged to it is found.

    Returns:
        the Transcript.
    """
    binding = current()
    query = _query(binding.dialect)
    found = binding.execute(query, [conversation_id] * query.count("%s")).fetchall()
    rows = sorted(map(_Row._make, found), key=_place)
    humans = {row.person for row in rows if row.source == _TAKEOVER}
    # What others logged of a text that is in the outbox or in the inbox is the same text.
    known = {row.key for row in rows if row.source in (_INBOX, _OUTBOX)}
    texts: list[Text] = []
    unreadable: list[UnreadableRow] = []
    for row in rows:
        if row.source == _TAKEOVER or (row.source == _RECORDED and row.key in known):
            continue
        try:
            texts.append(_text(row, humans, unreadable))
        except InvalidValue as error:  # a word that is none of ours
            unreadable.append(_unreadable(row, None, error))
    texts.sort(key=lambda text: text.at or _BEFORE_ALL)
    return Transcript(texts, unreadable)


class _Row(NamedTuple):
    """A row of the query."""

    source: int
    id: int
    at: Any
    key: str | None
    body: str | None
    payload: str | None
    status: str | None
    word: str | None
    person: str | None
    approved_by: str | None
    reason: str | None
    delivery: str | None


#: Where a row comes from.
_TAKEOVER, _RECORDED, _INBOX, _OUTBOX, _ACTION = range(5)


def _place(row: _Row) -> tuple[bool, int, int, str]:
    """Return what decides between texts with the same time: the lead's come first."""
    is_ours = row.source >= _OUTBOX or row.word == Direction.OUTBOUND
    return is_ours, row.source, row.id, row.key or ""


#: The table of each, and its columns of time and of JSON.
_COLUMNS = {
    _RECORDED: ("texts", "at", "metadata"),
    _INBOX: ("inbox", "received_at", "metadata"),
    _OUTBOX: ("outbox", "sent_at", "payload"),
    _ACTION: (None, "created_at", "metadata"),
}

_BEFORE_ALL = datetime.min.replace(tzinfo=timezone.utc)
_TIME = UtcDateTimeField[datetime]()

_KINDS = {
    ActionType.SEND_MESSAGE.value: TextKind.MESSAGE,
    ActionType.SEND_PREVIEW.value: TextKind.PREVIEW,
    ActionType.SEND_PAYMENT_LINK.value: TextKind.LINK,
}
_STATUSES = {
    MessageStatus.PENDING.value: TextStatus.WAITING,
    MessageStatus.SENT.value: TextStatus.SENT,
    MessageStatus.DEAD.value: TextStatus.DEAD,
    MessageStatus.WITHDRAWN.value: TextStatus.WITHDRAWN,
}
_DIRECTIONS = {str(direction): direction for direction in Direction}
_AUTHORS = {str(author): author for author in Author}
#: What the provider says of a text that was sent, where that is more.
_DELIVERIES = {
    DeliveryStatus.UNDELIVERED.value: TextStatus.UNDELIVERED,
    DeliveryStatus.DELIVERED.value: TextStatus.DELIVERED,
    DeliveryStatus.READ.value: TextStatus.DELIVERED,
}


def _text(row: _Row, humans: Collection[str | None], unreadable: list[UnreadableRow]) -> Text:
    """Make the text of a row. What cannot be read of it is named, and left out.

    Raises:
        InvalidValue: one of its words is unknown.
    """
    at, payload = _read(row, unreadable)
    body = row.body or ""
    word, _, why = (row.delivery or "").partition(" ")
    delivered = _DELIVERIES.get(word)
    reason = (why or None) if delivered is TextStatus.UNDELIVERED else row.reason
    if row.source == _INBOX:
        return Text(at, *_FROM_LEAD, body, payload, row.key)
    if row.source == _RECORDED:
        if _known(row.word, _DIRECTIONS) is Direction.INBOUND:
            return Text(at, *_FROM_LEAD, body, payload, row.key)
        author = _AUTHORS.get(row.person or "")
        by = row.person if author is None else None
        author, status = author or Author.HUMAN, delivered or TextStatus.SENT
        return Text(at, Direction.OUTBOUND, author, by, TextKind.MESSAGE, status, body, payload, row.key, reason)
    kind, details = _known(row.word, _KINDS), payload if isinstance(payload, dict) else {}
    by = details.get("submittedBy") if row.source == _ACTION else row.person
    is_humans = by is not None and (by in humans or by == row.approved_by)
    if "editedBy" in details:
        by, is_humans = details["editedBy"], True
    author = Author.HUMAN if is_humans else Author.AI
    if row.source == _ACTION:
        status = TextStatus.AWAITING_APPROVAL
        return Text(at, Direction.OUTBOUND, author, by, kind, status, body, payload, action_id=row.key)
    status = delivered or _known(row.status, _STATUSES)
    return Text(at, Direction.OUTBOUND, author, by, kind, status, body, payload, row.key, reason, row.id)


#: What every text of the lead's is, in the order of the fields of a Text.
_FROM_LEAD = (Direction.INBOUND, Author.LEAD, None, TextKind.MESSAGE, TextStatus.RECEIVED)


def _known(word: str | None, words: Mapping[str, Known]) -> Known:
    """Return what a word stands for.

    Raises:
        InvalidValue: nobody knows it.
    """
    found = words.get(word or "")
    if found is None:
        raise InvalidValue("a word", word, f"it must be one of {', '.join(words)}")
    return found


def _read(row: _Row, unreadable: list[UnreadableRow]) -> tuple[datetime | None, Any]:
    at, payload = None, None
    _, time, document = _COLUMNS[row.source]
    try:
        at = _TIME.python_value(row.at)
        if at is None:
            raise InvalidValue(time, None, "it is no time that Python can read")
    except Exception as error:
        if not is_unreadable(error):
            raise
        unreadable.append(_unreadable(row, time, error))
    try:
        payload = row.payload and json.loads(row.payload)
    except (ValueError, RecursionError) as error:
        unreadable.append(_unreadable(row, document, error))
    return at, payload


def _unreadable(row: _Row, column: str | None, error: Exception) -> UnreadableRow:
    table = _COLUMNS[row.source][0]
    name = "pending_actions" if table is None else ".".join(filter(None, current().dialect.own_table(table)))
    why = "it is nested too deep" if isinstance(error, RecursionError) else one_line(error)
    return UnreadableRow(name, row.key if table is None else row.id, column, why)


def _readable(*columns: str) -> str:
    """Return the SQL of the first of these times that Python can read."""
    read = [f"CASE WHEN {column} >= '0001-01-01' AND {column} < '9999-01-01' THEN {column} END" for column in columns]
    return f"COALESCE({', '.join([*read, 'NULL'])})"


#: The leads that a conversation belongs to: its own, and those that were merged into it and are gone.
_LEADS = """SELECT CAST(c.lead_id AS TEXT) FROM close_engine_conversations c WHERE c.id = %s
        UNION SELECT h.lead_id FROM {history} h WHERE h.conversation_id = %s
            AND NOT EXISTS (SELECT 1 FROM {leads} l WHERE l.id = h.lead_id)"""

#: What the provider says of a text that was sent: a word, and its error. As one value, to look it up once.
_DELIVERY = "(SELECT d.status || ' ' || COALESCE(d.error, '') FROM {deliveries} d WHERE d."
_DELIVERY_OF_MESSAGE, _DELIVERY_OF_TEXT = f"{_DELIVERY}send_key = o.send_key)", f"{_DELIVERY}provider_id = t.key)"

# One query for each index that serves it: of what waits, and of what does not.
_OF_OUTBOX = f"""SELECT {_OUTBOX} AS source, o.id, {_readable("o.sent_at", "o.created_at")}, o.provider_id, o.body,
        CAST(o.payload AS TEXT), o.status, o.topic, o.submitted_by, o.approved_by,
        CASE WHEN o.status <> 'SENT' THEN o.last_error END, CASE o.status WHEN 'SENT' THEN {_DELIVERY_OF_MESSAGE} END
    FROM {{outbox}} o WHERE o.conversation_id = %s
        AND o.topic IN ({INDEXED_TEXTS})"""
_OF_INBOX = f"""SELECT {_INBOX}, i.id, {_readable("i.received_at")}, i.key, i.body, CAST(i.metadata AS TEXT),
        NULL, NULL, NULL, NULL, NULL, NULL
    FROM {{inbox}} i WHERE i.kind = 'text'"""


@cache
def _query(dialect: Dialect) -> str:
    of_leads = dialect.in_subquery(_LEADS)
    return f"""{_OF_OUTBOX} AND o.status = 'PENDING'
    UNION ALL {_OF_OUTBOX} AND o.status <> 'PENDING'
        -- One that became an action stands there as an action.
        AND NOT (o.status = 'WITHDRAWN' AND COALESCE(o.action_id, '') = 'message:' || o.send_key)
    UNION ALL {_OF_INBOX} AND i.conversation_id = %s
    UNION ALL {_OF_INBOX} AND i.conversation_id IS NULL AND i.lead_id {of_leads}
    UNION ALL SELECT {_RECORDED}, t.id, {_readable("t.at")}, t.key, t.body, CAST(t.metadata AS TEXT),
        NULL, t.direction, t.author, NULL, NULL, {_DELIVERY_OF_TEXT}
    FROM {{texts}} t WHERE t.lead_id {of_leads}
    UNION ALL SELECT {_ACTION}, 0, {_readable("a.created_at")}, a.id, a.draft_message, CAST(a.metadata AS TEXT),
        a.status, a.type, NULL, NULL, NULL, NULL
    FROM pending_actions a WHERE a.conversation_id = %s AND a.status = 'PENDING'
        AND (a.expires_at IS NULL OR a.expires_at > {{moment}})
    UNION ALL SELECT {_TAKEOVER}, k.id, NULL, NULL, NULL, NULL, NULL, NULL, k.taken_by, NULL, NULL, NULL
    FROM {{takeovers}} k WHERE k.conversation_id = %s"""
