"""What `make cluster` is built of: it does as the page says, and its audit finds what it is there to find.

For the audit, each wrong is done to a database that was right before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peewee
import psycopg2
import pytest

from close_engine import ActionType, EntryPoint, Lead, OutboxMessage, Worker, open_conversation, receive, submit
from close_engine.database.url import database_from
from tests.cluster.audit import NOTING, audit
from tests.cluster.bouncer import TIMEOUTS
from tests.cluster.record import Record
from tests.cluster.run import DIRECT, OPTIONS
from tests.prose import ROOT
from tests.servers import execute

PAGE = ROOT / "docs" / "operations.md"

Wrong = Callable[[], list[str]]


def test_the_run_uses_what_the_page_tells_everybody_to_use() -> None:
    page = PAGE.read_text()

    assert f"@db1,db2/crm?{OPTIONS}\n" in page
    assert f"```ini\n{TIMEOUTS}```" in page


def test_a_url_passes_all_hosts_and_timeouts_on_to_the_driver() -> None:
    passed = database_from(DIRECT).connect_params

    assert passed["host"] == "db1,db2"
    assert {f"{name}={passed[name]}" for name in passed} >= set(OPTIONS.split("&"))


class _Server:
    def __init__(self, url: str) -> None:
        self._url = url

    def session(self) -> Any:
        return psycopg2.connect(self._url)


@pytest.fixture
def client(tmp_path: Path) -> Record:
    (tmp_path / "clients").mkdir()
    return Record(tmp_path / "clients" / "client.record")


@pytest.fixture
def provider(tmp_path: Path) -> Record:
    (tmp_path / "workers").mkdir()
    return Record(tmp_path / "workers" / "worker.record")


@pytest.fixture
def wrong(postgres: peewee.Database, postgres_url: str, client: Record, provider: Record, tmp_path: Path) -> Wrong:
    """A client that changed a stage twice, submitted a text and heard one; a worker that sent it. Returns the audit."""
    execute(postgres_url, *NOTING)
    conversation = open_conversation(Lead.create(id="lead", phone="+1"), EntryPoint.SMS_REPLY)
    tokens = ("one", "two", "three", "four")
    for token in tokens:
        client.note("try", token)
    conversation.start_qualifying(reason="one")
    conversation.start_building(reason="two")
    submit(conversation, ActionType.SEND_MESSAGE, "three", key="three", if_lead_writes="send")
    receive("lead", key="four", text="four")
    for token in tokens:
        client.note("done", token)

    def send(message: OutboxMessage) -> str:
        provider.note("delivered", f"{message.send_key} {message.body}")
        return f"SM-{message.send_key}"

    Worker(send).run_until_empty()
    (tmp_path / "workers" / "worker.log").write_text("12:00:00 sent worker=worker message=1 topic=SEND_MESSAGE\n")
    return lambda: audit(_Server(postgres_url), tmp_path / "clients", tmp_path / "workers").wrong


def test_nothing_is_wrong(wrong: Wrong) -> None:
    assert wrong() == []


def test_what_was_acknowledged_is_lost(wrong: Wrong, client: Record) -> None:
    client.note("try", "five")
    client.note("done", "five")

    assert wrong() == ["1 were acknowledged and are lost: five"]


def test_a_client_that_was_killed_knows_nothing_of_its_last_one(wrong: Wrong, client: Record) -> None:
    client.note("try", "five")

    assert wrong() == []


def test_what_was_refused_is_recorded(wrong: Wrong, client: Record) -> None:
    client.note("refused", "two")

    assert wrong() == ["1 were refused and are recorded: two"]


def test_a_worker_is_told_twice_that_a_text_is_recorded(wrong: Wrong, tmp_path: Path) -> None:
    (tmp_path / "workers" / "other.log").write_text("12:00:01 sent worker=other message=1 topic=SEND_MESSAGE\n")

    assert wrong() == ["1 texts were told to a worker as sent twice: 1"]


def test_a_text_leaves_under_another_key(wrong: Wrong, provider: Record) -> None:
    provider.note("delivered", "another three")

    assert wrong() == ["1 deliveries are of no text, or under another key than its own: another three"]


#: What nobody can do but the owner of the database, who turns the guards off.
_OFF = "ALTER TABLE {} DISABLE TRIGGER USER"


@pytest.mark.parametrize(
    ("statements", "sentence"),
    [
        (["UPDATE close_engine.history SET reason = 'one' WHERE reason = 'two'"], "1 are recorded twice: one"),
        (
            ["UPDATE close_engine.history SET reason = 'six' WHERE reason = 'two'"],
            "1 are recorded and nobody tried them: six",
        ),
        (["DELETE FROM close_engine.history WHERE reason = 'one'"], "1 histories do not replay: "),
        (
            [_OFF.format("close_engine_conversations"), "UPDATE close_engine_conversations SET stage = 'STALLED'"],
            "1 stages are not the last of their history: ",
        ),
        (
            [_OFF.format("close_engine.outbox"), "UPDATE close_engine.outbox SET status = 'DEAD'"],
            "1 texts are not recorded as sent: ",
        ),
        (["INSERT INTO noted SELECT * FROM noted"], "1 texts were recorded as sent twice: "),
        (
            [_OFF.format("close_engine.outbox"), "UPDATE close_engine.outbox SET provider_id = 'SM1'"],
            "1 texts have another provider id: ",
        ),
    ],
)
def test_the_database_is_wrong(wrong: Wrong, postgres_url: str, statements: list[str], sentence: str) -> None:
    execute(postgres_url, *statements)

    assert any(found.startswith(sentence) for found in wrong())
