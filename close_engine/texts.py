"""Texts that others sent: a human by phone or on the CRM's screen, and what the CRM's own table holds of the past.

    record_sent(lead, key="SM7", text="I called you, Dana here.", author="dana")
    import_texts(PastText(row.lead_id, row.direction, row.body, row.sid, row.sent_at) for row in rows_of_the_crm)

They are part of the transcript. A text that was sent ends our turn, as one of the outbox does. What is taken over is
the past: it changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from itertools import islice
from typing import Any

import peewee

from close_engine.conversations import CloseEngineConversation
from close_engine.database.binding import current, moment
from close_engine.database.fields import (
    EnumField,
    JsonField,
    TextField,
    UtcDateTimeField,
    clean_text,
    clean_words,
    stored_time,
)
from close_engine.database.provenance import Provenance
from close_engine.database.transaction import atomic
from close_engine.errors import InvalidValue, LeadNotFound, TextOfAnotherLead, UnreadableRow, first_line
from close_engine.firing import change_stage, write_fields
from close_engine.inbox import InboxEntry, lock_conversation
from close_engine.models import BaseModel, Lead, StageChange
from close_engine.outbox import OutboxMessage
from close_engine.stages import ACTIVE_STAGES, Author, Direction, Stage

__all__ = ["Imported", "PastText", "TextEntry", "import_texts", "record_sent"]

#: A statement holds all values of a batch, and SQLite takes only so many.
LARGEST_BATCH = 1000


class TextEntry(BaseModel):
    """A text that somebody else sent, or that was taken over from the CRM: a row of the table `texts`.

    Attributes:
        lead_id: id of its lead.
        key: the provider's id of it.
        direction: Direction.
        author: an Author's value, or the name of the human who wrote it.
        body: what it says.
        metadata: what else was given with it.
        at: datetime, when it was sent or received.
    """

    id: Any = peewee.BigAutoField()
    lead_id = TextField[str]()
    key = TextField[str](unique=True)
    direction = EnumField[Direction](Direction)
    author = TextField[str]()
    body = TextField[str]()
    metadata = JsonField(null=True)
    at = UtcDateTimeField[datetime]()

    class Meta:
        table_name = "texts"
        own_table = "texts"


TextEntry.add_index(TextEntry.lead_id, TextEntry.id)


def record_sent(
    lead: Lead | str,
    key: str,
    text: str,
    *,
    author: Author | str = Author.HUMAN,
    at: datetime | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> bool:
    """Record a text that somebody else sent to a lead: from the CRM's screen, or from a human's phone.

    As with a text of the outbox, it is the lead's turn then, and a stalled conversation is resumed. A draft that is
    being written meanwhile is a conflict when it is submitted. The stage is left alone otherwise. A text that was sent
    before the lead's last words, or before the conversation stalled, is only recorded.

    Args:
        lead: the lead, or its id. It need have no conversation.
        key: the provider's id of the text. If a text with this id is known, sent by whomever, nothing changes.
        text: what it says.
        author: the name of the human who wrote it, or an Author.
        at: datetime with a timezone, when it was sent; now by default, and never later than now.
        metadata: whatever else is to be stored with it.

    Returns:
        whether it was new.

    Raises:
        LeadNotFound: there is no such lead.
        TextOfAnotherLead: the key belongs to a text of another lead. Nothing is recorded.
        UnreadableRow: Python cannot read the lead's conversation. The text is recorded all the same, but a stalled
            conversation is not resumed.
        InvalidValue: an argument cannot be stored.
    """
    now = moment()
    sent = _values(PastText(lead, Direction.OUTBOUND, text, key, now if at is None else at, author, metadata))
    sent["at"] = min(sent["at"], now)
    try:
        with atomic():
            conversation = lock_conversation(sent["lead_id"])
            is_new = _add_one(sent)
            if is_new and conversation is not None and _end_turn(conversation.id, sent["at"]):
                _bring_back(conversation, sent)
            return is_new
    except UnreadableRow:
        model = CloseEngineConversation
        with atomic():
            conversation_id = model.select(model.id).where(model.lead == sent["lead_id"]).scalar()
            if _add_one(sent):
                _end_turn(conversation_id, sent["at"])
        raise


def _add_one(sent: dict[str, Any]) -> bool:
    """Add a text; return whether it was new."""
    lead_id, key = sent["lead_id"], sent["key"]
    if not Lead.select().where(Lead.id == lead_id).exists():
        raise LeadNotFound(lead_id)
    owners = _owners([key])
    added = not owners and _insert([sent])
    if not added:
        _refuse_other(lead_id, key, (owners or _owners([key]))[key])
    return bool(added)


#: After a text of ours it is the lead's turn, unless the lead has written since.
_LEADS_TURN = """UPDATE {deadlines} SET "trigger" = 'stall',
        at = CASE WHEN "trigger" = 'stall' AND at > %s THEN at ELSE %s END
    WHERE "trigger" IN ('stall', 'answer') AND subject_id = %s"""


def _end_turn(conversation_id: str, at: datetime) -> bool:
    """Note that it is the lead's turn since then; return whether that is so, because the lead has not written since."""
    last = InboxEntry.select(InboxEntry.received_at).order_by(InboxEntry.id.desc()).limit(1)
    last = last.where((InboxEntry.kind == "text") & (InboxEntry.conversation_id == conversation_id))
    try:
        heard = last.scalar()
    except UnreadableRow:
        heard = None
    if heard is not None and heard > at:
        return False
    stored = stored_time(at)
    current().execute(_LEADS_TURN, (stored, stored, conversation_id))
    return True


def _bring_back(conversation: CloseEngineConversation, sent: dict[str, Any]) -> None:
    """Resume the conversation if the text was sent since it stalled."""
    if conversation.stage in ACTIVE_STAGES:
        write_fields(conversation, {}, "record_sent()")
    elif conversation.stage is Stage.STALLED and (conversation.stalled_at or sent["at"]) <= sent["at"]:
        change_stage(conversation, "resume", {}, Provenance(sent["author"], "a text was sent", {"key": sent["key"]}))


@dataclass(frozen=True)
class PastText:
    """A text of the past, as `import_texts` takes it.

    Attributes:
        lead: the lead, or its id.
        direction: Direction, or `inbound` or `outbound`.
        text: str, what it says.
        key: str, the provider's id of it; if there is none, the id that your own table has.
        at: datetime with a timezone, when it was sent or received; or such a time as ISO 8601.
        author: of an outbound text, the name of the human who wrote it, or an Author; a human's by default.
        metadata: mapping, whatever else is to be stored with it.
    """

    lead: Lead | str
    direction: Direction | str
    text: str
    key: str
    at: datetime | str
    author: Author | str | None = None
    metadata: Mapping[str, Any] | None = None


@dataclass
class Imported:
    """What `import_texts` has done.

    Attributes:
        added: int, how many texts are new.
        known: int, how many were known: imported before, received, or sent from the outbox.
        refused: dict of the number of a row, counted from 1, to the sentence that says why it was left out.
    """

    added: int = 0
    known: int = 0
    refused: dict[int, str] = field(default_factory=dict)


def import_texts(rows: Iterable[object], *, batch: int = 500) -> Imported:
    """Take over the texts of the past, so that the first prompt knows what was said before.

    They are not the lead's last words: they supersede nothing, and change nobody's turn. It can be repeated, also with
    rows that came since: what is known is not added again. Each batch is a transaction of its own. A row that cannot be
    stored holds up no other.

    Args:
        rows: any iterable of PastText, of other dataclasses with its attributes, or of mappings with their names.
        batch: int, how many are stored at once.

    Returns:
        Imported: how many were added, and what was left out.

    Raises:
        InvalidValue: the batch is too small or too large.
    """
    if not 1 <= batch <= LARGEST_BATCH:
        raise InvalidValue("batch", batch, f"it must be from 1 to {LARGEST_BATCH}")
    done, numbered = Imported(), enumerate(rows, 1)
    while part := list(islice(numbered, batch)):
        fresh: dict[int, dict[str, Any]] = {}
        for number, row in part:
            try:
                fresh[number] = _values(_as_past_text(row))
            except InvalidValue as error:
                done.refused[number] = str(error)
        with atomic():
            _import(fresh, done)
    done.refused = dict(sorted(done.refused.items()))
    return done


def _import(fresh: dict[int, dict[str, Any]], done: Imported) -> None:
    """Add the rows of a batch, by their numbers. Of two imports, one waits: in another order, they would deadlock."""
    current().dialect.hold(current().database, "close_engine.texts", "import")
    found: Any = Lead.select(Lead.id).where(Lead.id.in_(_each(fresh, "lead_id"))).tuples()
    leads = {lead_id for (lead_id,) in found}
    owners = _owners(_each(fresh, "key"))
    new: dict[int, dict[str, Any]] = {}
    for number, row in fresh.items():
        lead_id, key = row["lead_id"], row["key"]
        try:
            if lead_id not in leads:
                raise LeadNotFound(lead_id)
            if key in owners:
                _refuse_other(lead_id, key, owners[key])
                done.known += 1
            else:
                owners[key] = lead_id
                new[number] = row
        except (LeadNotFound, TextOfAnotherLead) as error:
            done.refused[number] = str(error)
    try:
        with atomic():
            added = _insert(list(new.values()))
    except _CANNOT_HOLD:
        added = 0
        for number, row in list(new.items()):
            try:
                with atomic():
                    added += _insert([row])
            except _CANNOT_HOLD as error:
                del new[number]
                done.refused[number] = f"The database cannot hold this text: {first_line(error)}."
    done.added += added
    done.known += len(new) - added  # somebody else has added it at this moment


#: What databases raise about a value: as of a character that the database's encoding does not have.
_CANNOT_HOLD = (peewee.DataError, peewee.IntegrityError)


def _each(rows: dict[int, dict[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows.values()))


def _insert(rows: list[dict[str, Any]]) -> int:
    """Add texts in one statement, and return how many are new."""
    if not rows:
        return 0
    insert = TextEntry.insert_many(rows).on_conflict(action="nothing", conflict_target=[TextEntry.key])
    return len(list(insert.returning(TextEntry.id).tuples().execute()))


def _owners(keys: list[str]) -> dict[str, str | None]:
    """Return, of the keys that are known, whose texts they are; None if the conversation was deleted."""
    sent, model = OutboxMessage, CloseEngineConversation
    lead = model.select(model.lead).where(model.id == sent.conversation_id)
    received = InboxEntry.select(InboxEntry.key, InboxEntry.lead_id)
    queries: list[Any] = [
        TextEntry.select(TextEntry.key, TextEntry.lead_id).where(TextEntry.key.in_(keys)),
        received.where((InboxEntry.kind == "text") & InboxEntry.key.in_(keys)),
        sent.select(sent.provider_id, lead).where(sent.provider_id.in_(keys)),
    ]
    return {key: owner for query in queries for key, owner in query.tuples()}


def _refuse_other(lead_id: str, key: str, owner: str | None) -> None:
    """Refuse a text whose key belongs to a text of another lead.

    Raises:
        TextOfAnotherLead: it does, and this lead's conversation was never that lead's, as it is after a merge.
    """
    if owner in (None, lead_id):
        return
    mine = CloseEngineConversation.select(CloseEngineConversation.id).where(CloseEngineConversation.lead == lead_id)
    was_its = StageChange.select().where((StageChange.lead_id == owner) & StageChange.conversation_id.in_(mine))
    if not was_its.exists():
        raise TextOfAnotherLead(key, lead_id, str(owner))


_NAMES = [each.name for each in fields(PastText)]


def _as_past_text(row: Any) -> PastText:
    if isinstance(row, PastText):
        return row
    if is_dataclass(row) and not isinstance(row, type):
        row = {name: getattr(row, name) for name in _NAMES if hasattr(row, name)}
    if not isinstance(row, Mapping):
        raise InvalidValue(
            "row", row, f"it must be a PastText, or a mapping such as a JSON object, with {', '.join(_NAMES)}"
        )
    if strange := [name for name in row if name not in _NAMES]:
        raise InvalidValue("row", strange[0], f"the names are {', '.join(_NAMES)}")
    if missing := [name for name in _NAMES[:5] if name not in row]:
        raise InvalidValue("row", dict(row), f"it has no {missing[0]}")
    return PastText(**row)


def _values(text: PastText) -> dict[str, Any]:
    """Return the fields of a text's row.

    Raises:
        InvalidValue: something cannot be stored.
    """
    lead_id = text.lead.id if isinstance(text.lead, Lead) else text.lead
    direction = _direction(text.direction)
    # None is what a table has where there is no id.
    key = "" if text.key is None else text.key
    clean_words("key", key, "give the provider's id of the text, or the id that your own table has")
    return {
        "lead_id": clean_words("lead", lead_id, "it must be a lead or its id"),
        "key": Provenance(key=text.key).key,
        "direction": direction,
        "author": _author(direction, text.author),
        "body": clean_text("text", text.text),
        "metadata": Provenance(metadata=text.metadata).metadata,
        "at": _moment(text.at),
    }


def _direction(given: Any) -> Direction:
    word = given.lower() if isinstance(given, str) else given
    if word not in list(Direction):
        raise InvalidValue("direction", given, f"it must be one of {', '.join(Direction)}")
    return Direction(word)


def _author(direction: Direction, given: Any) -> str:
    """Return an Author's value, or the name of a human."""
    if given is None:
        return str(Author.LEAD if direction is Direction.INBOUND else Author.HUMAN)
    name = clean_words("author", given, "it must say who wrote the text")
    known = {str(word).lower(): word for word in Author}.get(name.lower())
    if (known is Author.LEAD) is not (direction is Direction.INBOUND):
        raise InvalidValue("author", name, "the lead writes what is inbound, and nothing else")
    return name if known is None else str(known)


def _moment(given: Any) -> datetime:
    if isinstance(given, str):
        # Python 3.10 reads fractions of three or six digits, and PostgreSQL's JSON has as many as there are.
        written = re.sub(r"\.(\d+)", lambda fraction: f".{fraction[1]:0<6.6}", given.strip().replace("Z", "+00:00"))
        with suppress(ValueError):
            given = datetime.fromisoformat(written)
    if not isinstance(given, datetime) or given.utcoffset() is None:
        raise InvalidValue("at", given, "it must be a time with a timezone, such as 2026-01-31T08:00:00Z")
    at: datetime = TextEntry.at.clean(given)
    return at
