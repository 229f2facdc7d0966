"""What does a transcript cost, beside one query by hand for the same texts?

The floor is psycopg2 with one query of the lead's and our texts, in order, as tuples. It knows nothing of texts that
others sent, of drafts that wait, or of who wrote them, and reads no payload.
"""

from __future__ import annotations

from collections.abc import Iterator

import psycopg2

import close_engine
from bench.ground import conversation_id, fill, lead_id
from bench.report import Table, milliseconds, times
from bench.rounds import interleave, median, ratio
from bench.server import Server

FLOOR, OURS = "floor: psycopg2 by hand", "Close Engine"

BY_HAND = """
    SELECT received_at AS at, 'lead', body, key, 'received' FROM close_engine.inbox
    WHERE kind = 'text' AND conversation_id = %(id)s
    UNION ALL SELECT sent_at, 'us', body, provider_id, status FROM close_engine.outbox
    WHERE conversation_id = %(id)s AND status <> 'PENDING'
        AND topic IN ('SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK')
    ORDER BY at
"""
#: Half of the texts are the lead's. Words of a text's usual length.
RECEIVED = """
    INSERT INTO close_engine.inbox (kind, key, lead_id, conversation_id, body, received_at)
    SELECT 'text', '{id}:' || n, '{lead}', '{id}', repeat('All is well. ', 6), localtimestamp - n * interval '2 minutes'
    FROM generate_series(1, {count}) n
"""
SENT = """
    INSERT INTO close_engine.outbox (conversation_id, topic, body, payload, status, created_at, available_at, sent_at,
        submitted_by, provider_id)
    SELECT '{id}', 'SEND_MESSAGE', repeat('All is well. ', 6), '{{}}', 'SENT', at, at, at, 'writer', 'sent:{id}:' || n
    FROM (SELECT n, localtimestamp - n * interval '2 minutes' + interval '1 minute' AS at
        FROM generate_series(1, {count}) n) AS numbered
"""


def measure(server: Server, *, quick: bool) -> Iterator[Table]:
    sizes, rounds = ((10, 100), 2) if quick else ((10, 100, 1_000, 10_000), 40)
    name = server.migrated("transcript")
    fill(server, name, 1_000 if quick else 100_000, history=5, sent=2)
    for number, size in enumerate(sizes, 1):
        values = {"id": conversation_id(number), "lead": lead_id(number), "count": size // 2}
        server.execute(RECEIVED.format(**values), SENT.format(**values), database=name)
    server.execute("VACUUM ANALYZE", database=name)
    database = close_engine.connect(server.url(name))
    connection = psycopg2.connect(server.url(name))
    connection.autocommit = True
    cursor = connection.cursor()
    rows: dict[str, list[str]] = {FLOOR: [], OURS: [], "to the floor": []}
    for number, size in enumerate(sizes, 1):
        conversation = close_engine.CloseEngineConversation.get_by_id(conversation_id(number))

        def by_hand(of: str = conversation.id) -> list[tuple[object, ...]]:
            cursor.execute(BY_HAND, {"id": of})
            return cursor.fetchall()

        assert len(by_hand()) == len(conversation.messages()) >= size
        measured = interleave({FLOOR: by_hand, OURS: conversation.messages}, rounds=rounds, repeat=5)
        rows[FLOOR].append(milliseconds(median(measured[FLOOR])))
        rows[OURS].append(milliseconds(median(measured[OURS])))
        rows["to the floor"].append(times(ratio(measured[OURS], measured[FLOOR])))
    yield Table(
        "The transcript of a conversation, by the number of its texts",
        ["", *(f"{size:,} texts" for size in sizes)],
        [[contender, *costs] for contender, costs in rows.items()],
        f"Among {1_000 if quick else 100_000:,} conversations; {rounds} rounds of 5 each",
    )
    connection.close()
    database.close()
    server.drop(name)
