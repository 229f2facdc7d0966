"""Nothing that runs all the time reads a table: each statement finds its rows by an index, however many there are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import peewee
import pytest

import close_engine
from close_engine import ActionType, CloseEngineConversation, EntryPoint, OutboxMessage, PendingAction, outbox
from close_engine.database.binding import current
from close_engine.schema import scripts
from close_engine.testing import new_lead
from tests.servers import postgres_database

#: A pipeline of some size: what is closed, sent and decided is the most of it.
FILL = [
    "INSERT INTO leads (id, phone) SELECT 'lead ' || n, '+1555' FROM generate_series(1, 20000) n",
    """
    INSERT INTO close_engine_conversations (id, lead_id, entry_point, stage, stalled_at, updated_at)
    SELECT 'conversation ' || n, 'lead ' || n, 'SMS_REPLY',
        (ARRAY['QUALIFYING', 'STALLED', 'COMPLETED', 'CLOSED_LOST'])[1 + n %% 4],
        CASE WHEN n %% 4 = 1 THEN now() END, now()
    FROM generate_series(1, 20000) n
    """,
    # An action begins PENDING, and deciding 20,000 of them would take long.
    "ALTER TABLE pending_actions DISABLE TRIGGER zz_close_engine_guard",
    """
    INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message, status, expires_at)
    SELECT 'action ' || n, 'conversation ' || n, 'lead ' || n, 'SEND_MESSAGE', 'hello',
        (ARRAY['PENDING', 'APPROVED', 'APPROVED', 'REJECTED', 'EXPIRED'])[1 + n %% 5], now() + interval '1 day'
    FROM generate_series(1, 20000) n
    """,
    "ALTER TABLE pending_actions ENABLE TRIGGER zz_close_engine_guard",
    """
    INSERT INTO close_engine.outbox
        (conversation_id, topic, body, status, created_at, available_at, leased_by, key, provider_id, priority)
    SELECT 'conversation ' || n, 'SEND_MESSAGE', 'hello',
        CASE WHEN n %% 20 = 0 THEN 'PENDING' WHEN n %% 20 = 1 THEN 'DEAD' ELSE 'SENT' END, now(),
        now() + interval '1 minute' * (n %% 100 - 5), CASE WHEN n %% 40 <> 20 THEN 'w1' END, 'key ' || n, 'p' || n,
        CASE WHEN n %% 60 = 0 THEN n %% 3 + 1 ELSE 0 END
    FROM generate_series(1, 20000) n
    """,
    """
    INSERT INTO close_engine.inbox (kind, key, lead_id, conversation_id, body, received_at)
    SELECT (ARRAY['text', 'payment'])[1 + n %% 2], 'key ' || n, 'lead ' || n, 'conversation ' || n, 'hello', now()
    FROM generate_series(1, 20000) n
    """,
    """
    INSERT INTO close_engine.texts (lead_id, key, direction, author, body, at)
    SELECT 'lead ' || n, 'past ' || n, 'outbound', 'human', 'hello', now() FROM generate_series(1, 20000) n
    """,
    """
    INSERT INTO close_engine.takeovers (conversation_id, taken_by, taken_at, handed_back_at)
    SELECT 'taken over ' || n, 'owner', now(), CASE WHEN n %% 2 = 0 THEN now() END
    FROM generate_series(1, 20000) n
    """,
    """
    INSERT INTO close_engine.numbers (lead_id, phone, number)
    SELECT 'lead ' || n, '+1555', '+1555' || n FROM generate_series(1, 20000) n
    """,
    """
    INSERT INTO close_engine.optouts (lead_id, number, source, key, created_at, lifted_at)
    SELECT CASE WHEN n %% 2 = 0 THEN 'gone ' || n END, CASE WHEN n %% 2 = 1 THEN '+1556' || n END, 'text', 'key ' || n,
        now(), CASE WHEN n %% 3 = 0 THEN now() END
    FROM generate_series(1, 20000) n
    """,
    """
    INSERT INTO close_engine.deliveries (provider_id, send_key, message_id, status, at)
    SELECT 'p' || n, 'send key ' || n, CASE WHEN n %% 10 > 0 THEN n END,
        CASE WHEN n %% 50 = 1 THEN 'undelivered' ELSE 'sent' END, now()
    FROM generate_series(1, 20000) n
    """,
    """
    INSERT INTO close_engine.pauses (topic, reason, paused_at, resumed_at)
    SELECT 'SEND_PREVIEW', 'lunch', now(), now() FROM generate_series(1, 20000) n
    """,
    "ANALYZE",
]


@pytest.fixture(scope="module")
def filled_template(server: str, postgres_template: str) -> Iterator[str]:
    """The name of a PostgreSQL database with 20,000 of everything, to copy."""
    with postgres_database(server, postgres_template) as url:
        database = close_engine.connect(url)
        for statement in FILL:
            database.execute_sql(statement)
        database.close()
        yield urlsplit(url).path.removeprefix("/")


@pytest.fixture
def filled(server: str, filled_template: str) -> Iterator[str]:
    """A PostgreSQL database with 20,000 of everything, of the test's own: no other has changed anything in it."""
    with postgres_database(server, filled_template) as url:
        yield url


#: What the stages and statuses there are chosen from, to what they are where nothing waits.
SETTLED = {
    r"\(ARRAY\['QUALIFYING'.*\]": "'COMPLETED'",
    r"\(ARRAY\['PENDING'.*\]": "'APPROVED'",
    r"CASE WHEN n %% 20 .*END,": "'SENT',",
}


@pytest.fixture
def calm(server: str, postgres_template: str) -> Iterator[str]:
    """A PostgreSQL database of the same size, on which nothing waits, and whose planner knows it."""
    with postgres_database(server, postgres_template) as url:
        database = close_engine.connect(url)
        for statement in FILL:
            for chosen, settled in SETTLED.items():
                statement = re.sub(chosen, settled, statement)
            database.execute_sql(statement)
        yield url
        database.close()


@contextmanager
def explained(monkeypatch: pytest.MonkeyPatch, explain: str) -> Iterator[dict[str, str]]:
    """Collect the plan of every statement that is run."""
    plans, execute = {}, peewee.Database.execute_sql

    def execute_and_explain(database: peewee.Database, sql: str, params: Any = None) -> Any:
        if re.match(r"\s*(WITH|SELECT|UPDATE|INSERT|DELETE)\b", sql) and not re.search(
            r"(FROM|JOIN) (pg_catalog\.pg_|sqlite_master)", sql
        ):
            plan = execute(database, f"{explain} {sql}", params).fetchall()
            plans[sql] = "\n".join(str(row[-1]) for row in plan)
        return execute(database, sql, params)

    with monkeypatch.context() as patch:
        patch.setattr(peewee.Database, "execute_sql", execute_and_explain)
        yield plans


def fire_a_trigger() -> None:
    CloseEngineConversation.get_by_id("conversation 4").collect_info(key="k")


def submitted(conversation: CloseEngineConversation, key: str) -> PendingAction:
    action = close_engine.submit(conversation, ActionType.SEND_MESSAGE, "hello", key=key)
    assert isinstance(action, PendingAction)
    return action


def submit_and_decide() -> None:
    conversation = CloseEngineConversation.get_by_id("conversation 8")
    CloseEngineConversation.update(autonomy_level="MANUAL").where(
        CloseEngineConversation.id == conversation.id
    ).execute()
    conversation.reload()
    for decide in (PendingAction.approve, PendingAction.reject):
        decide(submitted(conversation, key=decide.__name__), by="dana")


def claim_and_report() -> None:
    for message in outbox.claim(limit=10):
        message.sent(f"provider {message.id}")
    outbox.OutboxMessage.with_provider_id("p7")


def record_deliveries() -> None:
    close_engine.record_delivery("delivered", provider_id="p7")
    close_engine.record_delivery("sent", provider_id="theirs")
    close_engine.record_delivery("sent", send_key="send key 8")
    close_engine.record_delivery("sent", send_key="theirs", provider_id="also theirs")
    OutboxMessage.get_by_id(7).delivery  # noqa: B018 - it is read


def take_payments() -> None:
    unsent = CloseEngineConversation.get_by_id("conversation 4")
    with suppress(close_engine.PaymentUnmatched):
        close_engine.record_payment(unsent.lead_id, "pi_1", amount=1, currency="USD", price=(2, "USD"))
    close_engine.note_payment("unmatched", "pi_1", "No link.", lead=unsent.lead_id)
    close_engine.record_payment("lead 6", "pi_2", amount=2, currency="USD", price=(2, "USD"))
    close_engine.record_refund("pi_2", 1, "USD")
    for entry in close_engine.payment_issues().limit(20):
        close_engine.resolve_payment(entry, by="dana")


def look_at_the_queue() -> None:
    list(close_engine.pending_actions().limit(20))
    list(close_engine.pending_actions("conversation 5"))


CONVERSATIONS = '"?close_engine_conversations"?'
OUTBOX = '"?close_engine"?."?outbox"?'
ACTIONS = '"?pending_actions"?'

#: What is run, and the beginnings of the statements without which it has not done what it is about.
RUNS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "fire": (fire_a_trigger, [f"UPDATE {CONVERSATIONS} SET"]),
    "open": (
        lambda: close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY),
        [f"INSERT INTO {CONVERSATIONS}", 'UPDATE "?leads'],
    ),
    "record": (
        lambda: CloseEngineConversation.get_by_id("conversation 4").record(questions=["q"], data={"a": 1}),
        [f"UPDATE {CONVERSATIONS} SET", 'UPDATE "?leads'],
    ),
    "submit and decide": (submit_and_decide, [f"INSERT INTO {ACTIONS}", f"UPDATE {ACTIONS} SET"]),
    "pending_actions": (look_at_the_queue, [f"SELECT .* FROM {ACTIONS}"]),
    "enqueue": (
        lambda: outbox.enqueue("conversation 12", "SEND_MESSAGE", "hello", key="k"),
        [f"INSERT INTO {OUTBOX}"],
    ),
    "claim and report": (claim_and_report, ["SELECT .* FROM close_engine.claim", "SELECT close_engine.mark_sent"]),
    "receive": (
        lambda: close_engine.receive("lead 16", "SM1", "hello"),
        ["INSERT INTO .*inbox", "UPDATE .*deadlines"],
    ),
    "receive, stalled": (
        lambda: close_engine.receive("lead 17", "SM2", "hello"),
        ["INSERT INTO .*inbox", f"UPDATE {CONVERSATIONS} SET"],
    ),
    "messages": (
        lambda: CloseEngineConversation.get_by_id("conversation 8").messages(),
        ["SELECT .*outbox.*inbox.*texts.*pending_actions"],
    ),
    "record_sent": (
        lambda: close_engine.record_sent("lead 16", "SM1", "hello"),
        ["INSERT INTO .*texts", "UPDATE .*deadlines"],
    ),
    "import_texts": (
        lambda: close_engine.import_texts(
            [close_engine.PastText("lead 16", "inbound", "hi", "SM1", "2026-01-01T00:00Z")]
        ),
        ["INSERT INTO .*texts"],
    ),
    "payments": (
        take_payments,
        ["SELECT .*outbox", "UPDATE .*inbox", "INSERT INTO .*inbox"],
    ),
    "stall_silent": (lambda: close_engine.stall_silent(batch=100), ["SELECT c.id FROM .*deadlines.*'stall'"]),
    "lose_stalled": (lambda: close_engine.lose_stalled(batch=100), ["SELECT c.id FROM .*deadlines.*'close_lost'"]),
    "expire_actions": (lambda: close_engine.expire_actions(batch=100), ["SELECT a.id FROM .*deadlines.*'expire'"]),
    "withdraw_approvals": (
        lambda: close_engine.withdraw_approvals(batch=100),
        ["SELECT c.id FROM .*'PENDING_APPROVAL'.*'WITHDRAWN'"],
    ),
    "record_delivery": (record_deliveries, ["INSERT INTO .*deliveries", "UPDATE .*deliveries"]),
    "release_leases": (
        lambda: close_engine.release_leases(batch=100),
        ["SELECT o.id FROM .*outbox", "UPDATE .*outbox SET leased_by = NULL"],
    ),
}


def assert_among(plans: dict[str, str], beginnings: list[str]) -> None:
    """That a statement was explained that begins like this, for each of them."""
    for beginning in beginnings:
        assert any(re.match(rf"\s*{beginning}", sql, re.DOTALL) for sql in plans), (beginning, list(plans))


@pytest.mark.parametrize("run", list(RUNS))
def test_no_statement_reads_a_table_on_postgresql(filled: str, monkeypatch: pytest.MonkeyPatch, run: str) -> None:
    database, (act, beginnings) = close_engine.connect(filled), RUNS[run]
    try:
        with explained(monkeypatch, "EXPLAIN") as plans:
            act()
        assert_among(plans, beginnings)
        for sql, plan in plans.items():
            assert not re.search(r"Seq Scan on (?!next|due)", plan), f"{sql}\n{plan}"
    finally:
        database.close()


def test_a_phone_number_is_looked_for_by_an_index_on_postgresql(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database = close_engine.connect(filled)
    try:
        close_engine.Lead.update(phone="+12125550142").where(close_engine.Lead.id == "lead 42").execute()
        database.execute_sql("UPDATE close_engine.numbers SET number = '+12125550142' WHERE lead_id = 'lead 42'")
        with explained(monkeypatch, "EXPLAIN") as plans:
            (line,) = close_engine.find_conversations(text="+1 212 555-0142")
        assert line.conversation.lead_id == "lead 42"
        assert_among(plans, ["SELECT .*numbers", f"SELECT .* FROM {CONVERSATIONS}"])
        for sql, plan in plans.items():
            assert "LIMIT 0" in sql or "Seq Scan" not in plan, f"{sql}\n{plan}"
    finally:
        database.close()


#: The two statements that claim, as the function has them: of what is urgent, and of the rest.
CLAIMS = ({"anyway": "pass = 2"}, {"urgency": "urgency"})


def claiming(kind: dict[str, str]) -> str:
    """A statement that claims, as the function has it."""
    only = "\n        AND (topics IS NULL OR o.topic = ANY (topics)) AND (suspects OR NOT " + outbox.SUSPECT + ")"
    return current().sql(outbox.claiming(current().dialect, "most", "worker", only, outbox.COLUMNS_OF_FUNCTION, **kind))


def test_the_function_that_claims_has_the_statement_that_claims(postgres: peewee.Database) -> None:
    """SQLite runs the statement, PostgreSQL the function."""
    (function,) = [each for each in scripts.functions() if each.name == "claim"]
    for kind in CLAIMS:
        statement = claiming(kind).replace(current().dialect.later, "until").replace(current().dialect.moment, "at")
        assert statement in function.body.replace("public.", "")


def test_the_function_that_marks_as_sent_has_the_statement_that_does(postgres: peewee.Database) -> None:
    """SQLite runs the statement, PostgreSQL the function."""
    (function,) = [each for each in scripts.functions() if each.name == "mark_sent"]
    statement = current().sql(outbox.marking_sent("message", "worker", "claim", "provider"))
    assert statement.replace(current().dialect.moment, "at") in function.body.replace("public.", "")


def test_marking_as_sent_reads_no_table_on_postgresql(filled: str) -> None:
    """The function's plan is made once, whatever it is called with."""
    database = close_engine.connect(filled)
    try:
        statement = current().sql(outbox.marking_sent("$1", "$2", "$3", "$4"))
        database.execute_sql("SET plan_cache_mode = force_generic_plan")
        database.execute_sql(f"PREPARE marking (bigint, text, integer, text) AS {statement}")
        found = database.execute_sql("EXPLAIN EXECUTE marking (1, 'w', 1, NULL)").fetchall()
        plan = "\n".join(row for (row,) in found)
        assert "outbox_pkey" in plan
        assert "Seq Scan" not in plan, plan
    finally:
        database.close()


@pytest.mark.parametrize("kind", CLAIMS, ids=lambda kind: next(iter(kind)))
def test_claiming_reads_no_table_and_sorts_no_backlog_on_postgresql(filled: str, kind: dict[str, str]) -> None:
    """The function's plan is made once, whatever it is called with."""
    database = close_engine.connect(filled)
    try:
        statement = claiming(kind).replace(current().dialect.later, "'2026-01-01'::timestamp")
        variable = "pass" if kind == CLAIMS[0] else "urgency"
        for number, name in enumerate(("most", "worker", "topics", "suspects", variable), 1):
            statement = re.sub(rf"(?<![.\w]){name}\b", f"${number}", statement)
        database.execute_sql("SET plan_cache_mode = force_generic_plan")
        database.execute_sql(f"PREPARE claiming (integer, text, text[], boolean, integer) AS {statement}")
        found = database.execute_sql("EXPLAIN EXECUTE claiming (1, 'w', NULL, true, 2)").fetchall()
        plan = "\n".join(row for (row,) in found)
        assert not re.search(r"Seq Scan on (?!next)", plan), plan
        # In the order of an index: what is claimed is found at its beginning.
        assert "Sort" not in plan.partition("LockRows")[2].partition("SubPlan")[0], plan
        index = "outbox_available_at_idx on outbox o" if kind == CLAIMS[0] else "outbox_priority_idx on outbox u"
        assert f"Index Scan using {index}" in plan, plan
    finally:
        database.close()


def test_recording_a_payment_reads_no_table_on_postgresql(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database = close_engine.connect(filled)
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    try:
        for trigger in ("start_qualifying", "start_building", "send_preview"):
            conversation.fire(trigger)
        conversation.send_payment_link("https://pay.example.com/1")
        with explained(monkeypatch, "EXPLAIN") as plans:
            for _ in range(2):
                close_engine.record_payment(conversation.lead_id, "evt_1")
        assert_among(plans, ["INSERT INTO .*inbox", f"UPDATE {CONVERSATIONS} SET"])
        for sql, plan in plans.items():
            assert "Seq Scan" not in plan, f"{sql}\n{plan}"
    finally:
        database.close()


def test_a_row_is_found_by_its_key_whatever_the_planner_believes_of_its_stage(
    calm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a stage that nobody was in when the table was last analyzed has everybody read who is in it by now."""
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    with explained(monkeypatch, "EXPLAIN") as plans:
        conversation.start_qualifying()
        conversation.payment_link_url = "https://pay.example.com/1"
        conversation.save()
        CloseEngineConversation.update(autonomy_level="MANUAL").execute()
        conversation.reload()
        for decide in (PendingAction.approve, PendingAction.reject):
            decide(submitted(conversation, key=decide.__name__), by="dana")
        outbox.enqueue(conversation, "SEND_MESSAGE", "hello")
        claim_and_report()
        for message in outbox.claim(10):
            message.extend(timedelta(minutes=1))
            message.give_up("the number is unknown")
            outbox.requeue(message)
    by_key = {sql: plan for sql, plan in plans.items() if re.match(r'UPDATE.* WHERE .*"id"\W+= %s', sql, re.DOTALL)}
    assert len(by_key) >= 8
    for sql, plan in by_key.items():
        found = re.search(r"Index Scan using (\w+)", plan)
        assert found is not None, f"{sql}\n{plan}"
        assert found[1].endswith("_pkey"), f"{sql}\n{plan}"


@pytest.mark.parametrize("kind", ["sqlite-memory"], indirect=True)
def test_no_statement_of_a_sweep_or_a_claim_reads_a_table_on_sqlite(
    database: peewee.Database, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    outbox.enqueue(conversation, "build_site", priority=3)
    with explained(monkeypatch, "EXPLAIN QUERY PLAN") as plans:
        close_engine.sweep()
        outbox.claim(10)
        list(close_engine.pending_actions())
        conversation.messages()
        conversation.fire("start_qualifying", key="k")
        close_engine.record_delivery("sent", provider_id="SM1")
        close_engine.record_delivery("sent", send_key="key 1")
        close_engine.receive(conversation.lead_id, "SM1", "hello")
    assert any("SEARCH u USING INDEX close_engine_outbox_priority_idx" in plan for plan in plans.values())
    for sql, plan in plans.items():
        scans = [line for line in plan.splitlines() if re.match(r"SCAN (?!next|due|CONSTANT|close_engine_clock)", line)]
        assert not [line for line in scans if "USING" not in line], f"{sql}\n{plan}"


@pytest.mark.parametrize("kind", ["sqlite-memory"], indirect=True)
def test_what_was_sent_in_a_conversation_is_found_by_its_index_on_sqlite(
    database: peewee.Database, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """SQLite takes a partial index only if its condition stands in the query, and else reads what all were sent."""
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    close_engine.submit(conversation, ActionType.SEND_MESSAGE, "hello")
    cap = close_engine.DailyCap(5, default="UTC")
    with explained(monkeypatch, "EXPLAIN QUERY PLAN") as plans:
        conversation.messages()
        close_engine.Worker(lambda message: None, daily_cap=cap, sweep=None, concurrency=1).run_until_empty()
    resuming = database.execute_sql(
        "EXPLAIN QUERY PLAN SELECT * FROM close_engine_resumes_to WHERE conversation_id = ''"
    )
    plans["resumes_to"] = "\n".join(row[-1] for row in resuming.fetchall())
    found = [
        sql for sql, plan in plans.items() if "USING INDEX close_engine_outbox_settled_idx (conversation_id=" in plan
    ]
    assert len(found) >= 3, list(plans)
    assert not [plan for plan in plans.values() if re.search("SCAN o ", plan)]
