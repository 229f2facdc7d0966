"""A worker that waits is woken: by PostgreSQL at once, by a timer when something is due. Or it says that it polls."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    CannotBeSent,
    CloseEngineConversation,
    ConfigurationError,
    EntryPoint,
    OutboxMessage,
    PendingAction,
    Worker,
    open_conversation,
    outbox,
    submit,
)
from close_engine.database.notices import LISTEN
from close_engine.testing import MovableClock, new_lead
from tests.crm import query
from tests.servers import postgres_database
from tests.waiting import LIMIT, until

#: Nobody is woken by that within a test.
NEVER = timedelta(days=1)

#: The sessions that listen.
LISTENING = (
    "SELECT pid FROM pg_stat_activity WHERE query = 'LISTEN close_engine_outbox' AND datname = current_database()"
)


class Waiting:
    """A worker that waits in a thread, and what it sends and logs."""

    def __init__(self, idle: timedelta, send: Callable[[OutboxMessage], Any] | None = None, **options: Any) -> None:
        self.sent: list[str | None] = []
        self.log: list[str] = []
        self._send = send
        self.worker = Worker(self.send, sweep=None, idle=idle, **options)
        self.thread = threading.Thread(target=self.worker.run, daemon=True)

    def send(self, message: OutboxMessage) -> None:
        self.sent.append(message.body)
        if self._send is not None:
            self._send(message)

    def until_sent(self, *bodies: str) -> None:
        until(lambda: self.sent == list(bodies), f"{bodies} were sent, and not {self.sent}")


@contextmanager
def waiting(idle: timedelta = NEVER, **options: Any) -> Iterator[Waiting]:
    """Run a worker that has logged its first line, and looked once."""
    made = Waiting(idle, **options)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            made.log.append(record.getMessage())

    logger, handler = logging.getLogger("close_engine.worker"), Handler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    made.thread.start()
    try:
        until(lambda: made.log, "the worker has started")
        yield made
    finally:
        made.worker.stop()
        made.thread.join(LIMIT)
        logger.removeHandler(handler)
        logger.setLevel(before)
    assert not made.thread.is_alive()


def opened(level: AutonomyLevel = AutonomyLevel.FULL_AUTO) -> CloseEngineConversation:
    return open_conversation(new_lead(autonomy_level=level), EntryPoint.SMS_REPLY)


def psycopg3(url: str) -> peewee.Database:
    return close_engine.bind(peewee.PostgresqlDatabase(url, prefer_psycopg3=True))


def pooled(url: str) -> peewee.Database:
    url = url.replace("postgresql", "postgresql+pool", 1)
    return close_engine.connect(f"{url}{'&' if '?' in url else '?'}max_connections=8")


def by_hand(url: str) -> peewee.Database:
    """One that opens no connection by itself."""
    database = close_engine.bind(peewee.PostgresqlDatabase(url, autoconnect=False))
    database.connect()
    return database


@pytest.mark.parametrize("connect", [close_engine.connect, psycopg3, pooled, by_hand])
def test_what_is_put_in_wakes_a_worker_that_would_not_look_for_a_day(
    postgres_url: str, connect: Callable[[str], peewee.Database]
) -> None:
    database = connect(postgres_url)
    conversation = opened()
    with waiting() as it:
        assert it.log[0].endswith("concurrency=4 wakes=notices")
        submit(conversation, ActionType.SEND_MESSAGE, "one")
        it.until_sent("one")
        with close_engine.atomic():
            outbox.enqueue(conversation, "other", "two")
        it.until_sent("one", "two")
    assert query(postgres_url, LISTENING) == []
    database.close()


def test_an_approval_by_the_crm_wakes_it(postgres: peewee.Database, postgres_url: str) -> None:
    action = submit(opened(AutonomyLevel.MANUAL), ActionType.SEND_MESSAGE, "approved")
    assert isinstance(action, PendingAction)
    with waiting() as it:
        query(postgres_url, "UPDATE pending_actions SET status = 'APPROVED', approved_by = 'dana' RETURNING id")
        it.until_sent("approved")


def test_a_dead_message_that_is_put_back_wakes_it(postgres: peewee.Database) -> None:
    def refuse(message: OutboxMessage) -> None:
        if len(it.sent) == 1:
            raise CannotBeSent("no such number")

    with waiting(send=refuse) as it:
        message = outbox.enqueue(opened(), "other", "again")
        until(lambda: it.sent and outbox.dead_lines(), "the message is dead")
        outbox.requeue(message.id)
        it.until_sent("again", "again")


def test_a_timer_wakes_it_when_something_becomes_due(postgres: peewee.Database) -> None:
    """Also for what is put in with a delay so short that the next look would be too late for it."""
    conversation = opened()
    outbox.enqueue(conversation, "later", "two", send_after=timedelta(milliseconds=400))
    with waiting() as it:
        outbox.enqueue(conversation, "sooner", "one", send_after=timedelta(milliseconds=100))
        until(lambda: sorted(map(str, it.sent)) == ["one", "two"], "both were sent")


def test_what_is_due_much_later_notifies_nobody(postgres: peewee.Database, postgres_url: str) -> None:
    """A commit that notifies holds a lock that all such commits share."""
    listener = peewee.PostgresqlDatabase(postgres_url)
    connection = listener.connection()
    connection.cursor().execute("LISTEN close_engine_outbox")
    outbox.enqueue(opened(), "other", "tomorrow", send_after=timedelta(days=1))
    opened().start_qualifying()
    connection.poll()
    assert connection.notifies == []
    outbox.enqueue(opened(), "other", "now")
    connection.cursor().execute("SELECT 1")
    assert len(connection.notifies) == 1
    listener.close()


def test_if_its_connection_breaks_it_listens_again_and_misses_nothing(
    postgres: peewee.Database, postgres_url: str
) -> None:
    conversation = opened()
    with waiting() as it:
        for body in ("one", "two"):
            ended = query(postgres_url, f"SELECT pg_terminate_backend(pid, 60000) FROM ({LISTENING}) listening")
            assert ended == [(True,)]
            outbox.enqueue(conversation, body, body)
            until(lambda: query(postgres_url, LISTENING), "it listens again")
        until(lambda: sorted(map(str, it.sent)) == ["one", "two"], "both were sent")
    assert not [line for line in it.log if line.startswith("database unreachable")]


def test_where_it_hears_nothing_it_polls_and_says_so(
    postgres: peewee.Database, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As through PgBouncer in transaction mode: LISTEN succeeds and is silent. Here it is heard in another database."""
    with postgres_database(server) as elsewhere:
        monkeypatch.setenv(LISTEN, elsewhere)
        with waiting(idle=timedelta(milliseconds=50)) as it:
            assert "wakes=polling every=0.05s why='it does not hear its own notice" in it.log[0]
            assert LISTEN in it.log[0]
            outbox.enqueue(opened(), "other", "polled")
            it.until_sent("polled")
        assert query(elsewhere, LISTENING) == []


def test_the_environment_names_where_to_listen(
    postgres: peewee.Database, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = f"{postgres_url}{'&' if '?' in postgres_url else '?'}application_name=direct"
    monkeypatch.setenv(LISTEN, named)
    with waiting() as it:
        assert "wakes=notices" in it.log[0]
        assert query(postgres_url, LISTENING.replace("pid", "application_name")) == [("direct",)]


@pytest.mark.parametrize("url", ["sqlite:///other.db", "nonsense", "mysql://h/x"])
def test_a_wrong_place_to_listen_ends_the_worker_at_the_start(
    postgres: peewee.Database, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv(LISTEN, url)
    with pytest.raises(ConfigurationError):
        Worker(print).run()


def test_where_nobody_listens_the_worker_polls_until_somebody_does(
    postgres: peewee.Database, nobody_listens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LISTEN, f"postgresql://postgres@{nobody_listens}/crm")
    with waiting(idle=timedelta(milliseconds=50)) as it:
        assert "wakes=polling every=0.05s why=" in it.log[0]
        assert "refused" in it.log[0]
        outbox.enqueue(opened(), "other", "polled")
        it.until_sent("polled")


@pytest.mark.parametrize("kind", ["sqlite-file"], indirect=True)
def test_it_polls_where_a_database_tells_nobody(database: peewee.Database) -> None:
    conversation = opened()
    with waiting(idle=timedelta(milliseconds=50)) as it:
        assert "wakes=polling every=0.05s why='this database tells nobody" in it.log[0]
        outbox.enqueue(conversation, "other", "found")
        it.until_sent("found")


def test_how_long_until_something_becomes_due(database: peewee.Database, close_engine_clock: MovableClock) -> None:
    conversation = opened()
    assert outbox.due_in() is None
    outbox.enqueue(conversation, "now")
    assert outbox.due_in() is None
    outbox.enqueue(conversation, "tomorrow", send_after=timedelta(hours=30))
    outbox.enqueue(conversation, "soon", send_after=timedelta(seconds=90))
    assert outbox.due_in() == timedelta(seconds=90)
    close_engine_clock.move(timedelta(seconds=60))
    assert outbox.due_in() == timedelta(seconds=30)
    close_engine_clock.move(timedelta(seconds=30))
    assert outbox.due_in() is None
    assert outbox.due_in(timedelta(days=2)) == timedelta(hours=30) - timedelta(seconds=90)
    outbox.claim(lease=timedelta(seconds=10))
    assert outbox.due_in() == timedelta(seconds=10), "a lease ends then"
