"""Generate conversations, history and messages by the million, in the server, with the triggers off.

The id of the n-th conversation is `conversation_id(n)`, in PostgreSQL and in Python. It is as long and as random as a
cuid, so that an index on it behaves as in production.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone

from bench.server import Server

#: Two stages to go back and forth between: the trigger, the next stage, and by how much `edit_rounds` grows.
TRIGGER = {"PREVIEW_SENT": "request_edits", "EDIT_LOOP": "send_preview"}
DEST = {"PREVIEW_SENT": "EDIT_LOOP", "EDIT_LOOP": "PREVIEW_SENT"}
EDITS = {"PREVIEW_SENT": 1, "EDIT_LOOP": 0}

# n is the number of a conversation.
ID = "('c' || left(md5(n::text), 24))"
LEAD_ID = "('l' || left(md5(n::text), 24))"

#: Stages by n % 20. Half of the conversations are closed.
STAGES = (
    ["QUALIFYING"] * 3
    + ["COLLECTING_INFO", "BUILDING", "PREVIEW_SENT", "EDIT_LOOP", "PAYMENT_SENT"]
    + ["COMPLETED"] * 5
    + ["STALLED"] * 2
    + ["CLOSED_LOST"] * 5
)
CLOSED = ["COMPLETED", "CLOSED_LOST"]

LEADS = f"INSERT INTO leads (id, phone) SELECT {LEAD_ID}, '+15550100' FROM generate_series(1, {{count}}) n"
CONVERSATIONS = f"""
    INSERT INTO close_engine_conversations (id, lead_id, entry_point, stage, created_at, updated_at,
        payment_link_sent_at, completed_at, stalled_at, closed_lost_at, closed_lost_reason)
    SELECT {ID}, {LEAD_ID}, 'SMS_REPLY', stage, moment - interval '30 days', moment,
        CASE WHEN stage IN ('PAYMENT_SENT', 'COMPLETED') THEN moment END, CASE stage WHEN 'COMPLETED' THEN moment END,
        CASE stage WHEN 'STALLED' THEN moment END, CASE stage WHEN 'CLOSED_LOST' THEN moment END,
        CASE stage WHEN 'CLOSED_LOST' THEN 'generated' END
    FROM (SELECT n, CASE WHEN n <= {{past}} THEN ({{closed}})[n % 2 + 1]
                ELSE ({{stages}})[n % array_length({{stages}}, 1) + 1] END AS stage,
            date_trunc('milliseconds', localtimestamp - CASE WHEN {{past}} > 0
                THEN ({{count}} - n) * interval '2 minutes' ELSE (n % 86400) * interval '1 second' END) AS moment
        FROM generate_series(1, {{count}}) n) AS numbered
"""
HISTORY = f"""
    INSERT INTO close_engine.history (conversation_id, lead_id, trigger, source, dest, actor, created_at)
    SELECT {ID}, {LEAD_ID}, 'request_edits', 'PREVIEW_SENT', 'EDIT_LOOP', 'generated',
        localtimestamp - interval '30 days' + step * interval '1 hour'
    FROM generate_series(1, {{steps}}) step, generate_series(1, {{count}}) n
"""
LAST_CHANGE = """
    INSERT INTO close_engine.history (conversation_id, lead_id, trigger, source, dest, actor, created_at)
    SELECT id, lead_id, 'open', NULL, stage, 'generated', updated_at FROM close_engine_conversations
"""
# Older versions, which `bench.against` measures too, have no such table.
DEADLINES = """
    DO $$ BEGIN
        IF to_regclass('close_engine.deadlines') IS NOT NULL THEN
            INSERT INTO close_engine.deadlines (trigger, subject_id, at)
            SELECT 'stall', id, updated_at FROM close_engine_conversations
            WHERE stage NOT IN ('COMPLETED', 'STALLED', 'CLOSED_LOST')
            UNION ALL SELECT 'close_lost', id, stalled_at FROM close_engine_conversations WHERE stage = 'STALLED';
        END IF;
    END $$
"""
MESSAGES = f"""
    INSERT INTO close_engine.outbox (conversation_id, topic, body, status, created_at, available_at)
    SELECT {ID}, 'SEND_MESSAGE', 'Hello!', '{{status}}', moment, moment
    FROM (SELECT n, date_trunc('milliseconds', localtimestamp - interval '1 hour' + step * interval '1 ms') AS moment
        FROM generate_series(1, {{each}}) step, generate_series(1, {{count}}) n) AS numbered
"""
#: Turns off all triggers in the session, even those of foreign keys.
WITHOUT_TRIGGERS = "SET session_replication_role = replica"
SECONDARY_INDEXES = """
    SELECT i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid) FROM pg_index i
    JOIN pg_class c ON c.oid = i.indrelid
    WHERE c.relnamespace IN ('public'::regnamespace, 'close_engine'::regnamespace) AND NOT i.indisprimary
"""


def utc_now() -> datetime:
    """Return the current moment as naive UTC, for a `timestamp` without time zone."""
    return datetime.now(timezone.utc).replace(tzinfo=None)


def conversation_id(number: int) -> str:
    """Return the id of the n-th conversation, counted from 1."""
    return "c" + hashlib.md5(str(number).encode()).hexdigest()[:24]


def lead_id(number: int) -> str:
    """Return the id of the n-th conversation's lead."""
    return "l" + conversation_id(number)[1:]


def fill(
    server: Server,
    database: str,
    count: int,
    *,
    stages: list[str] | None = None,
    history: int = 1,
    spare_leads: int = 0,
    sent: int = 0,
    pending: int = 0,
    past: int = 0,
    more: Sequence[str] = (),
) -> None:
    """Fill an empty database.

    Args:
        count: int, number of conversations.
        stages: list of str, their stages, in turn; the default is `STAGES`.
        history: int, history rows per conversation.
        spare_leads: int, additional leads without a conversation, with the next numbers.
        sent: int, sent messages per conversation.
        pending: int, number of conversations, from the first, that have one waiting message.
        past: int, number of conversations, from the first, that are closed; the others are the newest then, and there
            is one every two minutes.
        more: what else to insert; it may name `{count}`.
    """
    array, closed = ("ARRAY[" + ", ".join(f"'{stage}'" for stage in each) + "]" for each in (stages or STAGES, CLOSED))
    statements = [
        LEADS.format(count=count + spare_leads),
        CONVERSATIONS.format(count=count, stages=array, past=past, closed=closed),
        HISTORY.format(count=count, steps=history - 1),
        LAST_CHANGE,
        DEADLINES,
        MESSAGES.format(count=count, each=sent, status="SENT"),
        MESSAGES.format(count=pending, each=1, status="PENDING"),
        *(statement.format(count=count) for statement in more),
    ]
    indexes = server.rows(SECONDARY_INDEXES, database=database)
    server.execute(
        *(f"DROP INDEX {name}" for name, _ in indexes),
        WITHOUT_TRIGGERS,
        *statements,
        "SET maintenance_work_mem = '512MB'",
        *(definition for _, definition in indexes),
        "VACUUM ANALYZE",
        "CHECKPOINT",
        database=database,
    )
