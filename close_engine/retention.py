"""Retention and erasure: words are emptied, and rows stay, because keys, `resume` and the counts need them.

    prune(older_than=timedelta(days=365))               # from a timer: what is over and older than that
    forget(lead)                                        # what this lead and we said to each other

Nothing that comes again is taken for new afterwards: keys, providers' ids and the order of the rows stay. Neither can
be undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

from close_engine.database.binding import current, moment
from close_engine.database.fields import LONGEST_SPAN, clean_words, stored_time
from close_engine.database.provenance import Provenance, Write
from close_engine.database.transaction import atomic
from close_engine.errors import InvalidValue, LeadNotFound
from close_engine.models import Lead

__all__ = ["Forgotten", "Pruned", "forget", "prune"]

#: A statement names the rows of a batch one by one, and SQLite takes only so many values.
LARGEST_BATCH = 10_000

#: What is said of the messages that are not sent because their lead is forgotten.
_FORGOTTEN = "the lead is forgotten"


@dataclass(frozen=True)
class Pruned:
    """How many rows one `prune` has emptied.

    Attributes:
        messages: int, messages of the outbox that were sent or withdrawn.
        received: int, texts and payments of the inbox.
        recorded: int, texts that others sent, or that were taken over from the CRM.
        decided: int, drafts that were approved, rejected or expired.
        deliveries: int, errors of deliveries.
    """

    messages: int
    received: int
    recorded: int
    decided: int
    deliveries: int


class _Words(NamedTuple):
    """Where words are stored, in SQL.

    Attributes:
        table: the table.
        over: the condition on a row `o`: it was over before the moment that is the last value.
        emptied: what is assigned.
        full: whether there is anything to empty.
    """

    table: str
    over: str
    emptied: str
    full: str


# A payment keeps its amount and currency. One that somebody has yet to look at waits: whose it is may stand in its
# metadata only.
_PRUNED = {
    "messages": _Words(
        "{outbox}",
        "o.status IN ('SENT', 'WITHDRAWN') AND COALESCE(o.sent_at, o.created_at) < %s",
        "body = NULL, payload = NULL, last_error = NULL, refusal = NULL",
        "o.body IS NOT NULL OR o.payload IS NOT NULL OR o.last_error IS NOT NULL OR o.refusal IS NOT NULL",
    ),
    "received": _Words(
        "{inbox}",
        "o.received_at < %s AND (o.issue IS NULL OR o.resolved_at IS NOT NULL)",
        "body = NULL, metadata = NULL, no_reply_reason = NULL, resolution = NULL",
        "o.body IS NOT NULL OR o.metadata IS NOT NULL OR o.no_reply_reason IS NOT NULL OR o.resolution IS NOT NULL",
    ),
    "recorded": _Words("{texts}", "o.at < %s", "body = '', metadata = NULL", "o.body <> '' OR o.metadata IS NOT NULL"),
    "deliveries": _Words("{deliveries}", "o.at < %s", "error = NULL", "o.error IS NOT NULL"),
    "decided": _Words(
        "pending_actions",
        "o.status IN ('APPROVED', 'REJECTED', 'EXPIRED') AND COALESCE(o.approved_at, o.created_at) < %s",
        "draft_message = '', metadata = NULL",
        "o.draft_message <> '' OR o.metadata IS NOT NULL",
    ),
}

# What serves nobody any more when it is old: which events the effects of bursts have carried, except that each sweep
# tells again of a draft that is about to expire; and what a provider said of messages that are not ours.
_DELETED = (
    "DELETE FROM {carried} WHERE at < %s "
    "AND conversation_id NOT IN (SELECT conversation_id FROM pending_actions WHERE status = 'PENDING')",
    "DELETE FROM {deliveries} WHERE at < %s AND message_id IS NULL",
)


def prune(older_than: timedelta, *, batch: int = 1000) -> Pruned:
    """Empty what is over and older than this: what was sent, withdrawn, received, recorded and decided.

    What waits stays as it is, also a payment to look at, and so do DEAD messages, the history, opt-outs and takeovers.
    Of what is emptied, the row stays, with its keys, ids and times. So nothing that is repeated is sent again. What
    serves nobody any more is deleted: which events the messages of bursts have carried, and what a provider said of
    messages that are not ours.

    Args:
        older_than: how long ago it was sent, received or approved; or put in, if it was not sent or approved since.
        batch: how many rows to empty in one transaction.

    Returns:
        Pruned.

    Raises:
        InvalidValue: `older_than` is not greater than zero or too long, or the batch is too small or too large.
    """
    if not timedelta(0) < older_than <= LONGEST_SPAN:
        raise InvalidValue(
            "older_than", str(older_than), f"it must be more than 0 and at most {LONGEST_SPAN.days} days"
        )
    if not 1 <= batch <= LARGEST_BATCH:
        raise InvalidValue("batch", batch, f"it must be from 1 to {LARGEST_BATCH}")
    before = stored_time(moment() - older_than)
    pruned = Pruned(**{kind: _emptied(words, before, batch) for kind, words in _PRUNED.items()})
    for delete in _DELETED:
        with atomic():
            current().execute(delete, (before,))
    return pruned


def _emptied(words: _Words, before: str, batch: int) -> int:
    """Empty what is over, and return how many rows that were. What somebody holds is left for the next run."""
    # Each batch goes on after the last row of the one before it, so a run reads a table once.
    count, last = 0, "" if words.table == "pending_actions" else 0
    find = (
        f"SELECT o.id FROM {words.table} o WHERE o.id > %s AND {words.over} AND ({words.full}) ORDER BY o.id LIMIT %s"
    )
    while True:
        with atomic():
            held = f"{find} {current().dialect.skip_locked('o')}"
            ids = [row[0] for row in current().execute(held, (last, before, batch)).fetchall()]
            if ids:
                marks = ", ".join(["%s"] * len(ids))
                current().execute(f"UPDATE {words.table} SET {words.emptied} WHERE id IN ({marks})", ids)
        count += len(ids)
        if len(ids) < batch:
            return count
        last = ids[-1]


@dataclass(frozen=True)
class Forgotten:
    """What one `forget` has emptied.

    Attributes:
        messages: int, messages of the outbox.
        received: int, texts and payments of the inbox.
        recorded: int, texts that others sent, or that were taken over from the CRM.
        drafts: int, pending actions, decided or not.
        changes: int, rows of the history that had a reason or metadata.
        withdrawn: list of int, ids of the messages that waited or were DEAD, and are not sent.
        in_flight: list of int, ids of the messages that a worker is sending at this moment. They are left as they are:
            forget the lead again when they have left.
    """

    messages: int
    received: int
    recorded: int
    drafts: int
    changes: int
    withdrawn: list[int]
    in_flight: list[int]


def forget(lead: Lead | str, *, by: str = "owner") -> Forgotten:
    """Empty what a lead and we said to each other, and withdraw what waits. The rows stay, so every count does.

    Emptied are the texts, payloads and errors of messages; the texts and metadata of what came in, or was recorded;
    drafts and their metadata; reasons of takeovers; reasons and metadata in the history; and what the conversation has
    collected, with the lead's copy of it and its payment link. The number that was read from the CRM's is deleted.
    Stages, keys, ids, times, amounts and the names of your own people stay. So do opt-outs: they say that somebody must
    be left alone. The CRM's own columns are up to the CRM.

    Forgetting a lead again changes nothing. It may be deleted already, or have no conversation.

    Args:
        lead: the lead, or its id.
        by: who forgets it, for the history, if a payment link that waits is withdrawn.

    Returns:
        Forgotten.

    Raises:
        LeadNotFound: there is no such lead, and nothing of it.
        InvalidValue: `by` says nothing.
    """
    lead_id = lead.id if isinstance(lead, Lead) else lead
    clean_words("by", by, "it must say who forgets the lead")
    with atomic():
        ids = [row[0] for row in current().execute(_CONVERSATIONS, (lead_id, lead_id, lead_id)).fetchall()]
        leads = [lead_id, *(row[0] for row in _of([], ids, _MERGED))]
        # In the order in which everybody locks: actions, conversation, messages.
        waiting = [row[0] for row in _of(leads, ids, _HOLD_ACTIONS) if row[1] == "PENDING"]
        _of([], ids, _HOLD_CONVERSATIONS)
        drafts = len(_expired(waiting, by)) + len(_of(leads, ids, _DRAFTS))
        withdrawn = sorted(row[0] for row in _of([], ids, _WITHDRAW))
        forgotten = Forgotten(
            messages=len(withdrawn) + len(_of([], ids, _MESSAGES)),
            received=len(_of(leads, ids, _RECEIVED)),
            recorded=len(_of([], leads, _RECORDED)),
            drafts=drafts,
            changes=len(_of([], ids, _CHANGES)),
            withdrawn=withdrawn,
            in_flight=sorted(row[0] for row in _of([], ids, _IN_FLIGHT)),
        )
        _of([], ids, _DELIVERIES)
        _of([], ids, _TAKEOVERS)
        _of([], ids, _COLLECTED)
        current().execute(_COPY, (lead_id,))
        number = _of([], leads, _NUMBER)
        if not ids and not number and not current().execute(_ANYTHING, [lead_id] * 4).fetchall():
            raise LeadNotFound(lead_id)
    return forgotten


# The lead's conversation, and those that were deleted. One that belongs to another lead by now, after a merge, is left
# to that lead.
_CONVERSATIONS = """
    SELECT c.id FROM close_engine_conversations c WHERE c.lead_id = %s
    UNION SELECT h.conversation_id FROM {history} h WHERE h.lead_id = %s
        AND NOT EXISTS (SELECT 1 FROM close_engine_conversations c WHERE c.id = h.conversation_id AND c.lead_id <> %s)
    ORDER BY 1
"""
# Leads that were merged into this one, and are gone: what they wrote is in its transcript.
_MERGED = """SELECT DISTINCT h.lead_id FROM {history} h WHERE h.conversation_id IN {ids}
    AND NOT EXISTS (SELECT 1 FROM {leads} l WHERE l.id = h.lead_id)"""
_HOLD_ACTIONS = "SELECT id, status FROM pending_actions WHERE {these} ORDER BY id {lock}"
_HOLD_CONVERSATIONS = "SELECT id FROM close_engine_conversations WHERE id IN {ids} ORDER BY id {lock}"
_EXPIRE = """UPDATE pending_actions SET status = 'EXPIRED', draft_message = '', metadata = NULL
    WHERE id IN {ids} RETURNING id"""
_DRAFTS = """UPDATE pending_actions SET draft_message = '', metadata = NULL
    WHERE {these} AND (draft_message <> '' OR metadata IS NOT NULL) RETURNING id"""
# A lease that has ended protects nobody: its worker is gone, or has lost it.
_WITHDRAW = f"""UPDATE {{outbox}} SET status = 'WITHDRAWN', body = NULL, payload = NULL, last_error = '{_FORGOTTEN}',
        refusal = NULL, leased_by = NULL, leased_at = NULL
    WHERE conversation_id IN {{ids}} AND (status = 'DEAD' OR status = 'PENDING'
        AND (leased_by IS NULL OR available_at <= {{moment}})) RETURNING id"""
_MESSAGES = f"""UPDATE {{outbox}} SET body = NULL, payload = NULL, refusal = NULL,
        last_error = CASE status WHEN 'WITHDRAWN' THEN '{_FORGOTTEN}' END
    WHERE conversation_id IN {{ids}} AND status IN ('SENT', 'WITHDRAWN') AND (body IS NOT NULL OR payload IS NOT NULL
        OR refusal IS NOT NULL OR COALESCE(last_error, '{_FORGOTTEN}') <> '{_FORGOTTEN}') RETURNING id"""
_IN_FLIGHT = "SELECT id FROM {outbox} WHERE conversation_id IN {ids} AND status = 'PENDING'"
_RECEIVED = """UPDATE {inbox} SET body = NULL, metadata = NULL, no_reply_reason = NULL, resolution = NULL
    WHERE {these} AND (body IS NOT NULL OR metadata IS NOT NULL OR no_reply_reason IS NOT NULL
        OR resolution IS NOT NULL) RETURNING id"""
_RECORDED = """UPDATE {texts} SET body = '', metadata = NULL
    WHERE lead_id IN {ids} AND (body <> '' OR metadata IS NOT NULL) RETURNING id"""
_DELIVERIES = """UPDATE {deliveries} SET error = NULL WHERE error IS NOT NULL
    AND message_id IN (SELECT o.id FROM {outbox} o WHERE o.conversation_id IN {ids})"""
_TAKEOVERS = "UPDATE {takeovers} SET reason = NULL WHERE conversation_id IN {ids} AND reason IS NOT NULL"
_CHANGES = """UPDATE {history} SET reason = NULL, metadata = NULL
    WHERE conversation_id IN {ids} AND (reason IS NOT NULL OR metadata IS NOT NULL) RETURNING id"""
# It is written even if it is empty: a draft that is being written at this moment is a conflict.
_COLLECTED = """UPDATE close_engine_conversations SET questions_asked = NULL, collected_data = NULL,
        closed_lost_reason = NULL, payment_link_url = NULL WHERE id IN {ids}"""
_COPY = "UPDATE {leads} SET qualification_data = NULL WHERE id = %s AND qualification_data IS NOT NULL"
_NUMBER = "DELETE FROM {numbers} WHERE lead_id IN {ids} RETURNING lead_id"
_ANYTHING = """SELECT lead_id FROM {inbox} WHERE lead_id = %s UNION ALL SELECT lead_id FROM {optouts} WHERE lead_id = %s
    UNION ALL SELECT lead_id FROM {texts} WHERE lead_id = %s
    UNION ALL SELECT id FROM {leads} WHERE id = %s"""


def _of(leads: Sequence[str], ids: Sequence[str], query: str) -> list[tuple[Any, ...]]:
    """Run a statement on what belongs to these leads or conversations ({these}), or to those with these ids ({ids})."""

    def marks(values: Sequence[str]) -> str:
        return f"({', '.join(['%s'] * len(values)) or 'NULL'})"

    query = query.replace("{these}", f"(lead_id IN {marks(leads)} OR conversation_id IN {{ids}})")
    query = query.replace("{ids}", marks(ids)).replace("{lock}", current().dialect.row_lock)
    cursor = current().execute(query, (*leads, *ids))
    return list(cursor.fetchall()) if cursor.description else []


def _expired(action_ids: list[str], by: str) -> list[tuple[Any, ...]]:
    """Expire the drafts that wait, without their words: nobody is told what is to be forgotten."""
    if not action_ids:
        return []
    with current().attributed(Provenance(by, _FORGOTTEN), Write("expire", None, stored_time(moment()))):
        return _of([], action_ids, _EXPIRE)
