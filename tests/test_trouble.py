"""Real trouble with the database, beside a real worker: nothing is lost, and nothing is sent twice (B2, G2)."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import peewee
import psycopg2
import pytest
from playhouse.pool import PooledPostgresqlDatabase
from playhouse.postgres_ext import Psycopg3Database

import close_engine
from close_engine import (
    ActionType,
    CloseEngineConversation,
    EntryPoint,
    MessageStatus,
    OutboxMessage,
    Stage,
    Worker,
    on_enter,
    open_conversation,
    outbox,
    submit,
)
from close_engine.database.binding import current
from close_engine.testing import new_lead
from tests.command_line import as_user
from tests.crm import query
from tests.servers import PrivateServer, database_url, execute, new_name
from tests.waiting import LIMIT, Running, until
from tests.workers import messages

DRIVERS: dict[str, Callable[[str], peewee.Database]] = {
    "psycopg2": peewee.PostgresqlDatabase,
    "psycopg3": Psycopg3Database,
    "pool": PooledPostgresqlDatabase,
}


class Crm:
    """A database on a server of this module's own, which an ordinary role owns and works on."""

    def __init__(self, server: PrivateServer, url: str) -> None:
        self.server = server
        self.url = url
        self.own_url = as_user(url, "crm", "")
        self.name = urlsplit(url).path[1:]

    def alter(self, change: str) -> None:
        """Change a setting of the database, and end the sessions that have the old one, as a failover does."""
        execute(self.server.url, f"ALTER DATABASE {self.name} {change}")
        self.terminate()

    def terminate(self) -> None:
        """End every session in it; one may have ended by itself meanwhile."""
        ended = "SELECT pg_terminate_backend(pid, %s) FROM pg_stat_activity WHERE datname = %s"
        query(self.server.url, ended, (1000 * LIMIT, self.name))


@pytest.fixture(scope="module")
def own_server() -> Iterator[PrivateServer]:
    """A server that may be stopped, with a migrated database to copy."""
    with PrivateServer("fsync = off") as server:
        execute(server.url, "CREATE ROLE crm LOGIN", "CREATE DATABASE template OWNER crm")
        database = close_engine.connect(as_user(database_url(server.url, "template"), "crm", ""))
        close_engine.migrate(standalone=True)
        database.close()
        yield server


@pytest.fixture
def crm(own_server: PrivateServer) -> Iterator[Crm]:
    name = new_name()
    execute(own_server.url, f"CREATE DATABASE {name} OWNER crm TEMPLATE template")
    yield Crm(own_server, database_url(own_server.url, name))
    execute(own_server.url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=list(DRIVERS))
def bound(crm: Crm, request: pytest.FixtureRequest) -> Iterator[peewee.Database]:
    """The same database, bound with each driver."""
    database = DRIVERS[request.param](crm.own_url)
    yield close_engine.bind(database)
    database.close()
    if request.param == "pool":
        database.close_all()  # type: ignore[attr-defined]


def four_texts() -> list[CloseEngineConversation]:
    conversations = [open_conversation(new_lead(), EntryPoint.SMS_REPLY) for _ in range(2)]
    for conversation in conversations:
        for text in ("Hello!", "Still there?"):
            submit(conversation, ActionType.SEND_MESSAGE, text)
            conversation.reload()
    return conversations


def assert_waited_for(
    trouble: Callable[[OutboxMessage], object],
    mend: Callable[[], object],
    caplog: pytest.LogCaptureFixture,
    **options: Any,
) -> None:
    """Four texts; trouble begins while the first one is sent, and is mended once the worker has met it.

    Each is sent once and recorded, and the worker ends in peace.
    """
    conversations = four_texts()
    current().database.close()
    sent: list[int] = []
    begun, all_sent = threading.Event(), threading.Event()

    def send(message: OutboxMessage) -> str:
        sent.append(message.id)
        if len(sent) == 1:
            try:
                trouble(message)
            finally:
                begun.set()
        if len(sent) == 4:
            all_sent.set()
            worker.stop()
        return f"SM{message.id}"

    worker = Worker(send, **{"concurrency": 2, "sweep": None, "idle": timedelta(milliseconds=10), **options})
    running = Running(worker.run)
    met = until(lambda: running.ended or "database unreachable" in caplog.text, "the worker meets the trouble")
    assert met
    assert not running.ended, running.result()
    assert begun.wait(LIMIT)
    mend()
    assert all_sent.wait(LIMIT), caplog.text
    assert running.result() is None

    assert Counter(sent) == {message.id: 1 for message in messages()}
    assert [message.status for message in messages()] == 4 * [MessageStatus.SENT]
    assert [message.refusal for message in messages()] == 4 * [None]
    assert len(sent) == 4
    for conversation in conversations:
        conversation.reload()
        assert conversation.stage is Stage.QUALIFYING
    current().database.close()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_b2_a_server_that_is_shut_down_and_comes_back(
    bound: peewee.Database, crm: Crm, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It says goodbye (57P01), or it does not."""
    assert_waited_for(lambda message: crm.server.stop(mode), crm.server.start, caplog)


def test_b2_sessions_that_somebody_terminates(
    bound: peewee.Database, crm: Crm, caplog: pytest.LogCaptureFixture
) -> None:
    """All connections of the worker are gone at once; the next ones work."""
    assert_waited_for(lambda message: crm.terminate(), lambda: None, caplog)


@pytest.mark.parametrize(
    ("change", "back"),
    [
        ("CONNECTION LIMIT 0", "CONNECTION LIMIT -1"),
        ("ALLOW_CONNECTIONS false", "ALLOW_CONNECTIONS true"),
        ("SET default_transaction_read_only = on", "RESET default_transaction_read_only"),
    ],
)
def test_b2_a_database_that_lets_nobody_in_or_nobody_write(
    bound: peewee.Database, crm: Crm, change: str, back: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Too many connections (53300), maintenance (55000, while connecting), a failover to a replica (25006)."""

    def mend() -> None:
        # Nobody's session is ended: whoever is in with the old setting must leave it by himself.
        execute(crm.server.url, f"ALTER DATABASE {crm.name} {back}")

    assert_waited_for(lambda message: crm.alter(change), mend, caplog)


def test_b2_a_role_with_too_many_connections(
    bound: peewee.Database, crm: Crm, caplog: pytest.LogCaptureFixture
) -> None:
    """Others of the same role have taken all that it may have."""

    def fill(message: OutboxMessage) -> None:
        execute(crm.server.url, "ALTER ROLE crm CONNECTION LIMIT 0")
        crm.terminate()

    assert_waited_for(fill, lambda: execute(crm.server.url, "ALTER ROLE crm CONNECTION LIMIT -1"), caplog)


def test_b2_a_lock_that_is_not_free_in_time(bound: peewee.Database, crm: Crm, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody holds the outbox for longer than lock_timeout (55P03)."""
    crm.alter("SET lock_timeout = '20ms'")
    with closing(psycopg2.connect(crm.url)) as rival:
        lock = "SET lock_timeout = 0; LOCK TABLE close_engine.outbox"
        assert_waited_for(lambda message: rival.cursor().execute(lock), rival.rollback, caplog)


BLOCKED = "SELECT count(*) FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))"


def test_b2_a_transaction_that_cannot_be_serialized(
    bound: peewee.Database, crm: Crm, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody writes the row that is recorded, and the database's default is REPEATABLE READ (40001).

    The statement is repeated at once: there is nothing to wait for.
    """
    crm.alter("SET default_transaction_isolation = 'repeatable read'")
    with closing(psycopg2.connect(crm.url)) as rival:
        pid = rival.info.backend_pid

        def write(message: OutboxMessage) -> None:
            rival.cursor().execute("UPDATE close_engine.outbox SET body = body WHERE id = %s", (message.id,))
            threading.Thread(target=commit_once_somebody_waits).start()

        def commit_once_somebody_waits() -> None:
            until(lambda: query(crm.url, BLOCKED, (pid,)) != [(0,)], "the worker waits for the row")
            rival.commit()

        four_texts()
        sent: list[int] = []

        def send(message: OutboxMessage) -> None:
            sent.append(message.id)
            if len(sent) == 1:
                write(message)

        assert Worker(send, concurrency=1, sweep=None).run_until_empty() == 4
    assert "unreachable" not in caplog.text
    assert [message.status for message in messages()] == [MessageStatus.SENT] * 4
    assert len(set(sent)) == len(sent) == 4


def test_b2_a_deadlock(bound: peewee.Database, crm: Crm, caplog: pytest.LogCaptureFixture) -> None:
    """A hook and somebody else wait for each other, and the worker's side loses (40P01)."""
    crm.alter("SET deadlock_timeout = '1ms'")
    lead = new_lead().id
    bound.close()
    began = threading.Event()
    with closing(psycopg2.connect(crm.url, options="-c deadlock_timeout=1h")) as rival:
        pid = rival.info.backend_pid

        @on_enter(Stage.QUALIFYING)
        def lock_each_other(conversation: CloseEngineConversation, change: object) -> None:
            if not began.is_set():
                began.set()
                rival.cursor().execute("SELECT FROM leads WHERE id = %s FOR UPDATE", (lead,))
                ours = "SELECT FROM close_engine_conversations WHERE id = %s FOR UPDATE"
                waiting.append(Running(lambda: rival.cursor().execute(ours, (conversation.id,))))
                waits = "SELECT pg_blocking_pids(%s) <> '{}'"
                until(lambda: query(crm.url, waits, (pid,)) == [(True,)], "the other one waits")
                current().database.execute_sql("SELECT FROM leads WHERE id = %s FOR UPDATE", (lead,))

        waiting: list[Running] = []
        try:
            assert_waited_for(lambda message: None, lambda: (waiting[0].result(), rival.rollback()), caplog)
        finally:
            lock_each_other.remove()
    assert "deadlock detected" in caplog.text


# -- SQLite ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(sqlite_template: Path, tmp_path: Path) -> Path:
    file = tmp_path / "crm.db"
    file.write_bytes(sqlite_template.read_bytes())
    return file


def test_b2_a_file_that_somebody_else_is_writing(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another process holds the write lock for longer than the connection waits."""
    database = close_engine.bind(peewee.SqliteDatabase(str(file), timeout=0.02))
    rival = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    assert_waited_for(lambda message: rival.execute("BEGIN IMMEDIATE"), rival.rollback, caplog)
    assert "database is locked" in caplog.text
    rival.close()
    database.close()


def test_b2_a_disk_that_is_full(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is recorded does not fit any more, until somebody makes room."""
    database = peewee.SqliteDatabase(str(file), timeout=5)
    close_engine.bind(database)
    pages = database.pragma("page_count")

    @on_enter(Stage.QUALIFYING)
    def write_much(conversation: CloseEngineConversation, change: object) -> None:
        current().database.execute_sql("INSERT INTO notes VALUES (hex(randomblob(500000)))")

    database.execute_sql("CREATE TABLE notes (note)")

    def fill(message: OutboxMessage) -> None:
        database.close()
        database.pragma("max_page_count", pages + 50, permanent=True)

    try:
        assert_waited_for(
            fill, lambda: database.pragma("max_page_count", 1_000_000, permanent=True), caplog, concurrency=1
        )
    finally:
        write_much.remove()
    assert "is full" in caplog.text
    assert database.execute_sql("SELECT count(*) FROM notes").fetchone() == (2,)
    assert outbox.claimable() == []
    database.close()
