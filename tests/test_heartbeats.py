"""Which workers run, and what the board says of it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import CloseEngineConversation, MessageStatus, OutboxMessage, Stage, Worker, heartbeats, outbox
from close_engine.board import WorkerLine, pipeline, worker_lines
from close_engine.heartbeats import Heartbeat, beat, end
from close_engine.testing import FakeSender, MovableClock
from tests.command_line import as_user, postgres_role
from tests.servers import execute
from tests.test_board import shown
from tests.test_roles import WORKER, granted
from tests.waiting import Running, until
from tests.workers import sql

ConversationIn = Callable[..., CloseEngineConversation]

SECOND = timedelta(seconds=1)
HERE = (socket.gethostname(), os.getpid())


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers say all the time that they run."""
    monkeypatch.setattr(heartbeats, "EVERY", timedelta(milliseconds=10))


@contextmanager
def running(send: Any = None, **options: Any) -> Iterator[Worker]:
    """A worker that runs beside the block, and is stopped after it."""
    worker = Worker(
        send or FakeSender(), **{"name": "worker-7", "idle": timedelta(milliseconds=10), "sweep": None, **options}
    )
    at_work = Running(worker.run)
    try:
        yield worker
    finally:
        worker.stop()
        assert at_work.result() is None


in_other_processes = pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"])


@in_other_processes
def test_a_worker_has_a_row_as_long_as_it_runs(database: peewee.Database) -> None:
    with running(concurrency=3, topics=["build_site", "tell"]):
        (line,) = until(worker_lines, "the worker is seen")
        assert (line.name, line.host, line.pid, line.concurrency) == ("worker-7", *HERE, 3)
        assert (line.topics, line.sending, line.seen, line.lost) == (["build_site", "tell"], 0, timedelta(0), False)

    assert worker_lines() == []


@in_other_processes
def test_it_says_so_again_by_the_databases_clock_with_what_it_is_sending(
    often: None, conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")
    sending: list[int] = []

    def send(message: OutboxMessage) -> None:
        until(worker_lines, "the worker is seen")
        close_engine_clock.move(timedelta(hours=1))
        until(lambda: worker_lines()[0].seen == timedelta(0), "it is seen an hour later")
        until(lambda: worker_lines()[0].sending, "it is seen that it sends")
        sending.append(worker_lines()[0].sending)

    with running(send):
        until(lambda: sending, "the message is sent")

    assert sending == [1]


@in_other_processes
def test_a_worker_takes_its_own_row_when_it_stops_and_those_nobody_remembers_when_it_starts(
    database: peewee.Database, close_engine_clock: MovableClock
) -> None:
    beat("long lost", 1, None, 0, timedelta(0))
    close_engine_clock.move(timedelta(days=7, seconds=1))
    beat("lost", 1, None, 0, timedelta(0))
    sql("UPDATE {workers} SET pid = pid + 1, name = 'of another process' WHERE name = 'lost'")
    with running():
        until(lambda: len(worker_lines()) == 2, "both are seen")
        assert "long lost" not in {row.id for row in Heartbeat.select()}, "many that are killed leave few rows"

    assert [row.id for row in Heartbeat.select()] == ["of another process"]


@in_other_processes
def test_a_worker_that_is_started_again_by_its_name_runs_since_then(
    database: peewee.Database, close_engine_clock: MovableClock
) -> None:
    beat("worker-7", 1, ["tell"], 1, timedelta(hours=3))
    assert worker_lines()[0].runs == timedelta(hours=3)
    close_engine_clock.move(timedelta(minutes=5))

    with running():
        until(lambda: not worker_lines()[0].lost, "it is seen")
        (line,) = worker_lines()
        assert line.runs < timedelta(minutes=1)
        assert (line.topics, line.sending) == (None, 0)


def test_a_worker_that_only_works_off_what_there_is_has_no_row(
    conversation_in: ConversationIn, database: peewee.Database
) -> None:
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")
    seen: list[Any] = []

    Worker(lambda message: seen.append(worker_lines()), sweep=None).run_until_empty()

    assert seen == [[]]


@in_other_processes
def test_a_worker_that_cannot_write_its_row_works_and_says_so_once(
    often: None, conversation_in: ConversationIn, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "close_engine.worker")

    def warnings() -> list[str]:
        return [one.getMessage() for one in caplog.records if one.getMessage().startswith("unseen worker=worker-7: ")]

    def sent(text: str) -> bool:
        return OutboxMessage.get(OutboxMessage.body == text).status is MessageStatus.SENT

    conversation = conversation_in(Stage.QUALIFYING)
    with running():
        until(worker_lines, "the worker is seen")
        sql("ALTER TABLE {workers} RENAME TO elsewhere")
        until(warnings, "it warns")
        for text in ("one", "two"):
            outbox.enqueue(conversation, "SEND_MESSAGE", text)
            until(lambda text=text: sent(text), "the message is sent")  # type: ignore[misc]
        assert len(warnings()) == 1
        back = "close_engine.elsewhere RENAME TO workers"
        if isinstance(close_engine.database.binding.current().database, peewee.SqliteDatabase):
            back = "elsewhere RENAME TO close_engine_workers"
        sql(f"ALTER TABLE {back}")
        sql("UPDATE {workers} SET pid = 0")
        until(lambda: worker_lines()[0].pid == os.getpid(), "the worker is seen again")


def test_a_role_without_the_right_works_all_the_same(
    postgres_url: str, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    with postgres_role(server) as (role, password):
        without = "REVOKE INSERT, UPDATE, DELETE ON close_engine.workers FROM {role}"
        granted(postgres_url, role, [*WORKER, without])
        database = close_engine.connect(as_user(postgres_url, role, password))
        try:
            with running():
                until(lambda: "unseen worker=worker-7: permission denied for table workers" in caplog.text, "it warns")
            assert worker_lines() == []
        finally:
            database.close()
            execute(postgres_url, f"DROP OWNED BY {role}")


# -- the board


def test_the_board_says_who_runs_and_who_was_lost(database: peewee.Database, close_engine_clock: MovableClock) -> None:
    assert "No worker runs." in shown()

    beat("w\x1b[2J", 4, None, 2, timedelta(hours=1))
    close_engine_clock.move(55 * SECOND)
    beat("w2", 8, ["tell"], 1, timedelta(hours=2))
    close_engine_clock.move(3 * SECOND)

    assert "2 workers, seen 3 s ago: sending 3 of at most 12 messages at once." in shown()
    assert pipeline().workers == [
        WorkerLine("w2", *HERE, timedelta(hours=2), 3 * SECOND, 8, ["tell"], 1),
        WorkerLine("w\x1b[2J", *HERE, timedelta(hours=1), 58 * SECOND, 4, None, 2),
    ]

    close_engine_clock.move(2 * SECOND)
    assert "1 worker, seen 5 s ago: sending 1 of at most 8 messages at once." in shown()
    assert f"Lost: w\\x1b[2J on {HERE[0]}, process {HERE[1]}, seen 1 min ago." in shown()

    end("w2")
    close_engine_clock.move(timedelta(days=8))
    assert worker_lines() == []
    assert "No worker runs." in shown()


def test_the_board_says_if_messages_wait_and_nobody_runs(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")
    close_engine_clock.move(timedelta(minutes=3))

    assert "No worker runs, and messages wait, the next one for 3 min." in shown()
    beat("w1", 1, None, 0, timedelta(0))
    assert "messages wait" not in shown()


def test_of_many_lost_workers_the_board_names_a_few(
    database: peewee.Database, close_engine_clock: MovableClock
) -> None:
    for number in range(8):
        beat(f"w{number}", 1, None, 0, timedelta(0))
    close_engine_clock.move(timedelta(minutes=1))

    assert shown().count("Lost: w") == 5
    assert "Lost, too: 3 more." in shown()


def test_a_row_that_cannot_be_read_hides_no_other(database: peewee.Database) -> None:
    for name in ("w1", "w2"):
        beat(name, 1, None, 0, timedelta(0))
    bad = "'infinity'" if isinstance(database, peewee.PostgresqlDatabase) else "'long ago'"
    sql(f"UPDATE {{workers}} SET started_at = {bad} WHERE name = 'w1'")

    assert [line.name for line in worker_lines()] == ["w2"]
    assert any("workers" in problem and "w1" in problem for problem in close_engine.verify())
