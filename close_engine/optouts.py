"""Opting out of texts, and in again: by the lead's own word, by the provider's, or by yours.

    opt_out(lead, source="phone call")                  # nothing more is sent to the lead, nor to its number
    opted_out(lead)                                     # the OptOut that is in force, or None
    opt_in(lead, source="web form")

An opt-out closes the lead's conversation as lost and withdraws what waits. It is about the lead and about its phone
number: another lead with that number cannot be texted either. `receive` does this for a text that is a keyword:

>>> from close_engine.database.url import connect
>>> database = connect("sqlite:///:memory:")
>>> word("Stop.")
<Keyword.OPT_OUT: 'OPT_OUT'>
>>> word("Stop by at five") is None
True
"""

from __future__ import annotations

from functools import partial
from typing import Any

import peewee

from close_engine import numbers
from close_engine.carriers import Keyword, spelling
from close_engine.conversations import CloseEngineConversation
from close_engine.database.binding import current, is_transient
from close_engine.database.fields import clean_words
from close_engine.database.provenance import Provenance
from close_engine.database.transaction import atomic, run_after_commit
from close_engine.firing import change_stage
from close_engine.models import Lead
from close_engine.numbers import OptOut
from close_engine.outbox import TEXT_TOPICS
from close_engine.stages import CLOSED_STAGES, Event
from close_engine.subscriptions import publish

__all__ = ["REASON", "heard", "heard_from", "hold", "opt_in", "opt_out", "opted_out", "word"]

#: What `closed_lost_reason` says of a conversation that an opt-out closed.
REASON = "opted out"


def opt_out(lead: Lead | str, *, source: str, key: str | None = None) -> OptOut:
    """Record that a lead opted out of texts: nothing more is sent to it, nor to its phone number.

    Its conversation, and those of other leads with its number, become CLOSED_LOST. What waits in them is withdrawn. All
    of it is one transaction. If the lead opted out before, what is missing of it is done. If a hook fails, its
    conversation stays open, and the hook's error is raised after the commit; nothing leaves that conversation.

    Args:
        lead: the lead, or its id.
        source: where it was said, in your own words; it is the actor in the history.
        key: idempotency key. Using it again for the lead changes nothing, even if the lead has opted in since.

    Returns:
        the OptOut of the lead.

    Raises:
        LeadNotFound: there is no such lead.
        AfterCommitError: the opt-out is committed, but a hook failed.
        InvalidValue: an argument cannot be stored.
    """
    return _opt_out(_id_of(lead), _said("source", source), Provenance(key=key).key, source)


def opt_in(lead: Lead | str, *, source: str, key: str | None = None) -> bool:
    """Record that a lead opted in again: the opt-outs of the lead and of its phone number are lifted.

    Nothing is opened: call `open_conversation` to begin again.

    Args:
        lead: the lead, or its id.
        source: where it was said, in your own words.
        key: idempotency key. Using it again for the lead changes nothing, even if the lead has opted out since.

    Returns:
        whether there was anything to lift.

    Raises:
        LeadNotFound: there is no such lead.
        InvalidValue: an argument cannot be stored.
    """
    return _opt_in(_id_of(lead), _said("source", source), Provenance(key=key).key)


def opted_out(lead: Lead | str) -> OptOut | None:
    """Return the opt-out that keeps a lead from being texted: its own, or that of its number; None if there is none.

    Args:
        lead: the lead, or its id.

    Raises:
        LeadNotFound: there is no such lead.
    """
    lead_id = _id_of(lead)
    return numbers.find(lead_id, numbers.number_of(numbers.phone_of(lead_id)))


def word(text: str) -> Keyword | None:
    """Return what a text asks for, if all of it is a keyword. `bind` takes other keywords than the carriers' own."""
    return current().words.get(spelling(text))


def hold(lead_id: str) -> list[CloseEngineConversation]:
    """Inside a transaction, lock the conversations of a lead and of all leads with its number, always in one order.

    A conversation that cannot be read is not among them.

    Raises:
        LeadNotFound: there is no such lead.
    """
    model, leads = CloseEngineConversation, numbers.sharing(lead_id, numbers.texted(lead_id))
    return list(current().for_update(model.select().readable().where(model.lead.in_(leads)).order_by(model.id)))


def heard(keyword: Keyword, lead_id: str, provenance: Provenance) -> bool:
    """Do what a lead's text asks for. Return whether that was all it says.

    START is a text like any other if there is no opt-out to lift. HELP needs no answer of ours: the carrier gives it.
    """
    if keyword is Keyword.OPT_OUT:
        _opt_out(lead_id, "text", provenance.key, provenance.actor)
        return True
    return keyword is Keyword.HELP or _opt_in(lead_id, "text", provenance.key)


def heard_from(number: str, keyword: Keyword, *, source: str, key: str) -> None:
    """Do what a text asks for whose number no lead has: a lead that gets this number later cannot be texted.

    The same key again changes nothing.
    """
    with atomic():
        mine = OptOut.number == number
        if OptOut.select().where(mine & ((OptOut.key == key) | (OptOut.lifted_key == key))).exists():
            return
        did = True
        if keyword is Keyword.OPT_OUT:
            did = _record(None, number, source, key) is not None
        elif keyword is Keyword.OPT_IN:
            did = bool(OptOut.update(_lifting(source, key)).where(mine & OptOut.lifted_at.is_null()).execute())
        if not did:
            current().execute(_REMEMBER, (None, number, source, source, key))


def _opt_out(lead_id: str, source: str, key: str | None, actor: str | None) -> OptOut:
    with atomic():
        conversations = hold(lead_id)
        if key is not None and (first := _recorded_under(key, lead_id)) is not None:
            return first
        for conversation in conversations:
            _close(conversation, actor)
        texted = numbers.texted(lead_id)
        numbers.renew(lead_id)
        recorded = [_record(lead_id, None, source, key), *(_record(None, number, source, None) for number in texted)]
        if new := [row_id for row_id in recorded if row_id is not None]:
            _publish(Event.LEAD_OPTED_OUT, lead_id, new[0], source)
        made = numbers.find(lead_id, None)
        assert made is not None
        return made


def _recorded_under(key: str, lead_id: str) -> OptOut | None:
    first: OptOut | None = OptOut.get_or_none((OptOut.lead_id == lead_id) & (OptOut.key == key))
    return first


_WITHDRAW = f"""UPDATE {{outbox}} SET status = 'WITHDRAWN', last_error = 'the lead opted out'
    WHERE conversation_id = %s AND status = 'PENDING' AND leased_by IS NULL
        AND topic IN ({TEXT_TOPICS})"""


def _close(conversation: CloseEngineConversation, actor: str | None) -> None:
    """Withdraw what waits in a conversation, and close it."""
    current().execute(_WITHDRAW, (conversation.id,))
    if conversation.stage in CLOSED_STAGES:
        return
    try:
        with atomic():
            change_stage(conversation, "close_lost", {"closed_lost_reason": REASON}, Provenance(actor, REASON))
    except Exception as error:
        if is_transient(error):
            raise
        # A hook of the user's failed. The opt-out must hold all the same.
        run_after_commit(partial(_raise, error))


def _raise(error: Exception) -> None:
    raise error


def _record(lead_id: str | None, number: str | None, source: str, key: str | None) -> int | None:
    """Record an opt-out of a lead or of a number, and return the row's id; None if it has opted out."""
    insert = 'INSERT INTO {optouts} (lead_id, number, source, "key", created_at) VALUES (%s, %s, %s, %s, {moment}) '
    values = (lead_id, number, source, key)
    made = current().execute(f"{insert} ON CONFLICT DO NOTHING RETURNING id", values).fetchone()
    return None if made is None else int(made[0])


#: A row that bans nothing: it remembers the key of an opt-in or opt-out that had nothing to do.
_REMEMBER = """INSERT INTO {optouts} (lead_id, number, source, created_at, lifted_at, lifted_by, lifted_key)
    VALUES (%s, %s, %s, {moment}, {moment}, %s, %s)"""


def _opt_in(lead_id: str, source: str, key: str | None) -> bool:
    with atomic():
        number = numbers.number_of(numbers.phone_of(lead_id))
        about = OptOut.lead_id.in_(numbers.sharing(lead_id, [number] if number is not None else []))
        if number is not None:
            about |= OptOut.number == number
        if key is not None and OptOut.select().where(about & (OptOut.lifted_key == key)).exists():
            return False
        update = OptOut.update(_lifting(source, key)).where(about & OptOut.lifted_at.is_null())
        lifted = sorted(row_id for (row_id,) in update.returning(OptOut.id).tuples().execute())
        if lifted:
            _publish(Event.LEAD_OPTED_IN, lead_id, lifted[0], source)
        if key is not None and not lifted:
            current().execute(_REMEMBER, (lead_id, None, source, source, key))
        return bool(lifted)


def _lifting(source: str, key: str | None) -> dict[str, Any]:
    return {"lifted_at": peewee.SQL(current().sql("{moment}")), "lifted_by": source, "lifted_key": key}


def _publish(event: Event, lead_id: str, row_id: int, source: str) -> None:
    """Say that a lead opted out or in. The effect stands in its conversation: without one, nothing follows."""
    model = CloseEngineConversation
    conversation_id = model.select(model.id).where(model.lead == lead_id).scalar()
    if conversation_id is not None:
        publish(event, conversation_id, str(row_id), {"lead_id": lead_id, "source": source})


def _id_of(lead: Lead | str) -> str:
    return str(lead.id) if isinstance(lead, Lead) else lead


def _said(label: str, value: Any) -> str:
    return clean_words(label, value, "it must say where it was said")
