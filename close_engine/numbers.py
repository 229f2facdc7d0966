"""Which phone number each lead has that is texted, and which leads and numbers opted out.

A lead's number is kept with the text that it was read from. Where the CRM has another text by now, it is read again.
`close_engine.optouts` writes the opt-outs.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import peewee

from close_engine.carriers import e164
from close_engine.database.binding import current
from close_engine.database.fields import TextField, UtcDateTimeField
from close_engine.database.reading import is_unreadable
from close_engine.errors import LeadNotFound, LeadOptedOut, UnreadableRow
from close_engine.models import BaseModel, Lead

__all__ = [
    "LeadNumber",
    "OptOut",
    "anybody_with",
    "find",
    "has_opted_out",
    "is_like_a_number",
    "keep",
    "leads_with",
    "number_of",
    "phone_of",
    "refuse",
    "renew",
    "sharing",
    "texted",
]


class LeadNumber(BaseModel):
    """The phone number of a lead: a row of the table `numbers`.

    Attributes:
        id: the lead's id.
        phone: what stood in the CRM when the number was read from it.
        number: the number in E.164; None if there was none.
    """

    id = TextField[str](primary_key=True, column_name="lead_id")
    phone = TextField["str | None"](null=True)
    number = TextField["str | None"](null=True)

    class Meta:
        table_name = "numbers"
        own_table = "numbers"


LeadNumber.add_index(LeadNumber.number)


class OptOut(BaseModel):
    """An opt-out of a lead or of a phone number: a row of the table `optouts`. It is in force until it is lifted.

    Attributes:
        lead_id: the lead that opted out; None if the row is about a number.
        number: the number in E.164 that opted out; None if the row is about a lead.
        source: where it was said, as given: `text`, `provider`, or your own word.
        key: the idempotency key that was given.
        created_at: when it was recorded.
        lifted_at: when the lead opted in again; None while the opt-out is in force.
        lifted_by: where that was said, as given.
        lifted_key: the idempotency key that was given then.
    """

    id: Any = peewee.BigAutoField()
    lead_id = TextField["str | None"](null=True)
    number = TextField["str | None"](null=True)
    source = TextField[str]()
    key = TextField["str | None"](null=True)
    created_at = UtcDateTimeField[datetime]()
    lifted_at = UtcDateTimeField["datetime | None"](null=True)
    lifted_by = TextField["str | None"](null=True)
    lifted_key = TextField["str | None"](null=True)

    class Meta:
        table_name = "optouts"
        own_table = "optouts"


_IN_FORCE = OptOut.lifted_at.is_null()
OptOut.add_index(OptOut.lead_id, unique=True, where=_IN_FORCE)
OptOut.add_index(OptOut.number, unique=True, where=_IN_FORCE)
OptOut.add_index(OptOut.lead_id, OptOut.key, unique=True, where=OptOut.key.is_null(False))


def has_opted_out(lead: str) -> str:
    """Return the SQL that says whether a lead opted out, or the number that is kept for it.

    Args:
        lead: the lead's id in the statement.
    """
    # Subqueries of one value: PostgreSQL may turn EXISTS into a hash of the whole table.
    return f"""COALESCE((SELECT p.id FROM {{optouts}} p WHERE p.lead_id = {lead} AND p.lifted_at IS NULL),
                    (SELECT p.id FROM {{numbers}} n JOIN {{optouts}} p ON p.number = n.number
                    WHERE n.lead_id = {lead} AND p.lifted_at IS NULL)) IS NOT NULL"""


def phone_of(lead_id: str) -> str | None:
    """Read what the CRM has as a lead's phone number; None if there is nothing, or nothing that can be read.

    Raises:
        LeadNotFound: there is no such lead.
    """
    try:
        # As text, whatever the type of the CRM's column is.
        row = Lead.select(Lead.phone.cast("TEXT").alias("text")).where(Lead.id == lead_id).tuples().first()
    except Exception as error:
        if isinstance(error, UnreadableRow) or is_unreadable(error):
            return None
        raise
    if row is None:
        raise LeadNotFound(lead_id)
    phone: str | None = row[0]
    return phone


def number_of(phone: str | None) -> str | None:
    """Return a number in E.164, by the region that is bound."""
    return e164(phone, current().region)


def keep(lead_id: str, phone: str | None) -> str | None:
    """Keep the number of a lead, and return it."""
    number = number_of(phone)
    kept = "INSERT INTO {numbers} (lead_id, phone, number) VALUES (%s, %s, %s) ON CONFLICT (lead_id) DO UPDATE "
    current().execute(f"{kept} SET phone = EXCLUDED.phone, number = EXCLUDED.number", (lead_id, phone, number))
    return number


def renew(lead_id: str) -> str | None:
    """Read the number of a lead again, and keep it. Raises what `phone_of` raises."""
    return keep(lead_id, phone_of(lead_id))


def texted(lead_id: str) -> list[str]:
    """Return the numbers at which a lead may have been texted: the one of now, and the one that is kept.

    Raises:
        LeadNotFound: there is no such lead.
    """
    kept = LeadNumber.get_or_none(LeadNumber.id == lead_id)
    found = {number_of(phone_of(lead_id)), None if kept is None else kept.number}
    return sorted(number for number in found if number is not None)


def sharing(lead_id: str, numbers: Sequence[str]) -> list[str]:
    """Return the ids of a lead and of the other leads for which one of these numbers is kept."""
    others = LeadNumber.select(LeadNumber.id).where(LeadNumber.number.in_(numbers) & (LeadNumber.id != lead_id))
    return [lead_id, *(other.id for other in others)]


def is_like_a_number(text: str) -> bool:
    """Return whether a text may be a phone number, and not an id."""
    digits = sum(character.isdecimal() for character in text)
    return digits > 4 and not any(character.isalpha() for character in text.lower().removeprefix("tel:"))


#: So many of the last digits are the subscriber's own nearly everywhere: they are in any way to write a number.
_LAST_DIGITS = 7

#: Leads whose number in the CRM may be one that has these digits.
_ALIKE = """SELECT l.id, CAST(l.phone AS TEXT) AS phone FROM {leads} l
    WHERE CAST(l.phone AS TEXT) LIKE %s OR HAS_OTHER_DIGITS"""

#: Of those, the ones with a conversation whose number in the CRM is not the one that was read. They are few, so each is
#: looked up; without MATERIALIZED, PostgreSQL reckons with a look-up for every lead.
_UNREAD = f"""WITH alike AS MATERIALIZED ({_ALIKE}) SELECT a.id, a.phone FROM alike a
    WHERE a.phone <> COALESCE((SELECT n.phone FROM {{numbers}} n WHERE n.lead_id = a.id), '')
        AND (SELECT c.id FROM close_engine_conversations c WHERE c.lead_id = a.id) IS NOT NULL"""


def leads_with(phone: str) -> list[str]:
    """Return the ids of the leads that have a phone number, however it is written.

    They are those for which the number is kept. If there is none, every conversation's lead is looked at whose number
    was not read yet, for example because the conversation is older than this library.
    """
    number = number_of(phone)
    if number is None:
        return []
    kept = [lead.id for lead in LeadNumber.select(LeadNumber.id).where(LeadNumber.number == number)]
    current_phones: Any = Lead.select(Lead.id, Lead.phone.cast("TEXT").alias("text")).where(Lead.id.in_(kept)).tuples()
    found = sorted(lead_id for lead_id, text in current_phones if number_of(text) == number)
    return found or _having(number, _UNREAD)


def anybody_with(phone: str) -> list[str]:
    """Return the ids of the leads that have a phone number in the CRM, however it is written, by reading all leads.

    It is for a number that `leads_with` does not know, for example because its lead has no conversation yet.
    """
    number = number_of(phone)
    return [] if number is None else _having(number, _ALIKE)


def _having(number: str, query: str) -> list[str]:
    """Return the ids of those leads that have a number: the database compares digits, and Python reads what is left."""
    # In their order, whatever stands between them. There are other digits than those of ASCII.
    alike = f"%{'%'.join(number[-_LAST_DIGITS:].removeprefix('+'))}%"
    query = query.replace("HAS_OTHER_DIGITS", current().dialect.has_more_than_ascii("CAST(l.phone AS TEXT)"))
    found = current().execute(query, (alike,)).fetchall()
    return sorted(lead_id for lead_id, text in found if number_of(text) == number)


def find(lead_id: str, number: str | None) -> OptOut | None:
    """Return the opt-out of a lead or of a number that is in force, the lead's first; None if there is none."""
    about = OptOut.lead_id == lead_id
    if number is not None:
        about |= OptOut.number == number
    in_force = OptOut.select().where(_IN_FORCE & about).order_by(OptOut.lead_id.is_null(), OptOut.id)
    found: OptOut | None = in_force.first()
    return found


def refuse(lead_id: str) -> None:
    """Refuse a text to a lead that opted out.

    Raises:
        LeadOptedOut: it did.
    """
    # The cast says what type the value has.
    asked = f"SELECT {has_opted_out('CAST(%s AS TEXT)')}"
    (has,) = current().execute(asked, (lead_id, lead_id)).fetchone()
    if has:
        raise LeadOptedOut(lead_id)
