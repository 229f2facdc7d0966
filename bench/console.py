"""How long does each page of the console take, at 100,000 conversations and 1,000 drafts that wait?

A page is asked for as a browser asks, through the whole application but without a network. The median counts, and the
page must take less than 200 ms. Live pages ask for the pulse of the board every other second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median

from starlette.testclient import TestClient

import close_engine
from bench.ground import ID, LEAD_ID, WITHOUT_TRIGGERS, conversation_id, fill
from bench.report import Table, milliseconds
from bench.server import Server
from close_engine.board import pulse
from close_engine.web.console import console

#: Each lead has a number of its own, which was read, and a name.
LEADS = (
    f"UPDATE leads SET phone = '+1212' || lpad(n::text, 7, '0'), name = 'Lead ' || n "
    f"FROM generate_series(1, {{count}}) n WHERE id = {LEAD_ID}",
    "INSERT INTO close_engine.numbers (lead_id, phone, number) SELECT id, phone, phone FROM leads",
)
#: Every conversation that waits for a human, or for us, was begun by the lead.
WAITING = """
    WITH chosen AS (SELECT id, lead_id, row_number() OVER (ORDER BY id) AS number FROM close_engine_conversations
        WHERE stage IN ('QUALIFYING', 'BUILDING') ORDER BY id LIMIT {drafts}),
    wrote AS (INSERT INTO close_engine.inbox (kind, key, lead_id, conversation_id, body, received_at)
        SELECT 'text', id || ':' || n, lead_id, id, repeat('All is well. ', 6), localtimestamp - n * interval '1 hour'
        FROM chosen, generate_series(1, 10) n),
    ours AS (UPDATE close_engine.deadlines SET trigger = 'answer' FROM chosen
        WHERE subject_id = id AND trigger = 'stall' AND number % 3 = 0)
    INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message, metadata, expires_at)
    SELECT 'a' || id, id, lead_id, 'SEND_MESSAGE', repeat('Shall we begin? ', 5), '{{}}',
        localtimestamp + number * interval '1 minute' + interval '1 day' FROM chosen
"""
DEAD = f"""
    INSERT INTO close_engine.outbox (conversation_id, topic, status, last_error, created_at, available_at)
    SELECT {ID}, 'build_site', 'DEAD', 'Kind ' || n % 5 || ': it failed', localtimestamp, localtimestamp
    FROM generate_series(1, {{dead}}) n
"""


def measure(server: Server, *, quick: bool) -> Iterator[Table]:
    count, drafts, rounds = (2_000, 100, 3) if quick else (100_000, 1_000, 30)
    name = server.migrated("console")
    fill(server, name, count, history=6, sent=2, pending=count // 100)
    statements = (*LEADS, WAITING, DEAD)
    filled = (each.format(count=count, drafts=drafts, dead=drafts // 10) for each in statements)
    server.execute(WITHOUT_TRIGGERS, *filled, "VACUUM ANALYZE", database=name)
    database = close_engine.connect(server.url(name))
    rows = []
    with browser() as visitor:
        for page, path in pages(conversation_id(1)).items():
            times = _times(lambda path=path: ask(visitor, path), rounds)  # type: ignore[misc]
            rows.append([page, milliseconds(median(times)), milliseconds(max(times))])
    beats = _times(pulse, rounds)
    rows.append(["the pulse of the board", milliseconds(median(beats)), milliseconds(max(beats))])
    yield Table(
        f"The pages of the console, at {count:,} conversations and {drafts:,} drafts that wait",
        ["page", "median", "slowest"],
        rows,
        f"{rounds} times each; the database and the browser's part are on the same machine",
    )
    database.close()
    server.drop(name)


def pages(conversation: str) -> dict[str, str]:
    """Return the path of each page, by what to call it."""
    return {
        "approvals": "/",
        "waiting for us": "/waiting",
        "pipeline": "/pipeline",
        "conversations": "/conversations",
        "… in a stage": "/conversations?stage=COMPLETED",
        "… of a phone number": "/conversations?text=%2B12120000042",
        "… of a name": "/conversations?text=lead 42",
        "… of a name that nobody has": "/conversations?text=nobody",
        "… in which a lead is waited for": "/conversations?waiting_for=lead",
        "one conversation": f"/conversations/{conversation}",
        "outbox": "/outbox",
        "health": "/health",
    }


def browser() -> TestClient:
    """Return what asks the console for its pages, to be entered. It shows the database that is bound then."""
    return TestClient(console(), base_url="http://127.0.0.1", client=("127.0.0.1", 50000))


def ask(visitor: TestClient, path: str) -> None:
    response = visitor.get(path)
    assert response.status_code == 200, path


def _times(ask: Callable[[], object], rounds: int) -> list[float]:
    ask()  # the first time, templates are read
    measured = []
    for _ in range(rounds):
        before = time.perf_counter()
        ask()
        measured.append(time.perf_counter() - before)
    return measured
