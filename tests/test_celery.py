"""Celery sends and sweeps: in this process on a broker in memory, and in forked processes on one in files."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import peewee
import pytest
from celery import Celery, signals
from celery.beat import ScheduleEntry, Scheduler
from celery.contrib.testing.worker import start_worker
from celery.exceptions import SoftTimeLimitExceeded
from celery.worker import state

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    ConfigurationError,
    EntryPoint,
    InvalidValue,
    MessageStatus,
    OutboxMessage,
    PendingAction,
    SchemaError,
    Stage,
    open_conversation,
    outbox,
    submit,
)
from close_engine.database.binding import current
from close_engine.database.notices import LISTEN
from close_engine.integrations import celery as integration
from close_engine.integrations.celery import add_tasks
from close_engine.testing import FakeSender, MovableClock, new_lead
from tests.crm import query
from tests.prose import ROOT
from tests.servers import new_name, postgres_database
from tests.test_notices import LISTENING
from tests.waiting import LIMIT, until


def new_app(broker: str = "memory://", **settings: Any) -> Celery:
    """An app with a queue of its own, which looks often: the broker in memory is one for the whole process."""
    app = Celery(new_name(), broker=broker, set_as_current=False)
    options = {"polling_interval": 0.01} if broker == "memory://" else {}
    app.conf.update(
        task_default_queue=app.main,
        broker_transport_options=options,
        worker_hijack_root_logger=False,
        **settings,
    )
    return app


def opened(level: AutonomyLevel = AutonomyLevel.FULL_AUTO) -> CloseEngineConversation:
    return open_conversation(new_lead(autonomy_level=level), EntryPoint.SMS_REPLY)


def submitted(body: str = "Hello!") -> OutboxMessage:
    submit(opened(), ActionType.SEND_MESSAGE, body)
    return OutboxMessage.select().order_by(OutboxMessage.id.desc()).get()


def statuses() -> list[MessageStatus]:
    return [message.status for message in OutboxMessage.select().order_by(OutboxMessage.id)]


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What the integration logs."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger(integration.__name__), Handler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(before)


@contextmanager
def working(app: Celery, **options: Any) -> Iterator[None]:
    """Run a worker of the app in a thread."""

    def nudge() -> None:
        """It looks whether it is to end whenever something comes, or every two seconds."""
        until(lambda: state.should_terminate is not None, "it is to end")
        app.send_task("tests.nothing")

    with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=LIMIT, **options):
        yield
        nudging = threading.Thread(target=nudge)
        nudging.start()
    nudging.join()


@pytest.fixture(autouse=True)
def others_log_as_before() -> Iterator[None]:
    """A Celery worker sets the level of all loggers in the process, unless somebody else sets up logging."""

    def leave(**signal: object) -> None:
        """Do nothing."""

    signals.setup_logging.connect(leave)
    yield
    signals.setup_logging.disconnect(leave)


# -- the tasks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite-file", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    """A database in memory is there for one thread only."""
    return str(request.param)


@pytest.fixture
def connections(database: peewee.Database) -> Iterator[list[bool]]:
    """Whether the connection of the thread that ran a task is closed, after each task."""
    closed: list[bool] = []

    def look(**signal: object) -> None:
        closed.append(database.is_closed())

    signals.task_postrun.connect(look)
    yield closed
    signals.task_postrun.disconnect(look)


def test_tasks_send_each_message_once_and_leave_no_connection_open(
    database: peewee.Database, connections: list[bool]
) -> None:
    sender = FakeSender()
    app = new_app()
    tasks = add_tasks(app, sender)
    texts = [submitted(f"Text {n}") for n in range(5)]
    with working(app):
        for _ in range(3):
            tasks.deliver.delay()
        until(lambda: len(connections) >= 3, "three tasks have run")

    assert sorted(message.send_key for message in sender.sent) == sorted(text.send_key for text in texts)
    assert set(statuses()) == {MessageStatus.SENT}
    assert set(connections) == {True}


def test_a_task_sweeps_with_the_function_that_is_given(
    database: peewee.Database, close_engine_clock: MovableClock, connections: list[bool]
) -> None:
    app = new_app()
    tasks = add_tasks(app, FakeSender(), sweep=partial(close_engine.sweep, stall_after=timedelta(minutes=5)))
    conversation = opened()
    close_engine_clock.move(timedelta(minutes=6))
    with working(app):
        tasks.sweep.delay()
        until(lambda: connections, "the task has run")

    assert CloseEngineConversation.get_by_id(conversation.id).stage == Stage.STALLED
    assert set(connections) == {True}


def test_a_task_that_is_called_uses_the_callers_connection(close_engine_database: peewee.Database) -> None:
    """As in a test whose transaction is rolled back in the end, with `task_always_eager`."""
    sender = FakeSender()
    tasks = add_tasks(new_app(task_always_eager=True), sender)
    with close_engine.atomic():
        submitted()
        assert tasks.deliver.delay().get() == 1
        tasks.sweep.delay()
        tasks.sweep()
        assert statuses() == [MessageStatus.SENT]
    assert len(sender.sent) == 1


def test_the_beat_has_both_tasks_whatever_else_it_is_given(database: peewee.Database) -> None:
    app = new_app()
    add_tasks(app, FakeSender(), deliver_every=timedelta(seconds=7), sweep_every=timedelta(minutes=2))
    app.conf.beat_schedule = {"mine": {"task": "mine", "schedule": 60.0}}
    app.finalize()

    every = {name: (entry["task"], entry["schedule"]) for name, entry in app.conf.beat_schedule.items()}
    assert every == {
        "mine": ("mine", 60.0),
        "close_engine.deliver": ("close_engine.deliver", timedelta(seconds=7)),
        "close_engine.sweep": ("close_engine.sweep", timedelta(minutes=2)),
    }


def test_an_app_that_is_finalized_gets_them_as_well(database: peewee.Database) -> None:
    app = new_app()
    app.finalize()
    add_tasks(app, FakeSender())

    assert set(app.conf.beat_schedule) == {"close_engine.deliver", "close_engine.sweep"} <= set(app.tasks)


def test_what_the_beat_asks_for_expires_and_keeps_no_result(database: peewee.Database) -> None:
    app = new_app()
    add_tasks(app, FakeSender())
    app.finalize()
    beat = app.conf.beat_schedule
    scheduler = Scheduler(app=app, lazy=True)
    for name, entry in beat.items():
        scheduler.apply_async(ScheduleEntry(name=name, app=app, **entry), advance=False)

    with app.connection_for_read() as connection, connection.SimpleQueue(app.main) as waiting:
        headers = [waiting.get(timeout=LIMIT).headers for _ in beat]
    assert {header["task"] for header in headers} == {"close_engine.deliver", "close_engine.sweep"}
    for header in headers:
        left = datetime.fromisoformat(header["expires"]) - datetime.now(timezone.utc)
        assert timedelta(seconds=30) < left <= timedelta(minutes=1)
        assert header["ignore_result"] is True


def test_no_other_app_gets_the_tasks(database: peewee.Database) -> None:
    add_tasks(new_app(), FakeSender())
    other = new_app()
    other.finalize()

    assert not [name for name in other.tasks if name.startswith("close_engine.")]


async def waits(message: OutboxMessage) -> str:
    return ""


@pytest.mark.parametrize(
    ("send", "options", "error", "sentence"),
    [
        ("SM1", {}, ConfigurationError, "cannot be called"),
        (waits, {}, ConfigurationError, "coroutine function"),
        (FakeSender(), {"concurrency": 0}, InvalidValue, "concurrency"),
        (FakeSender(), {"sweep_every": timedelta(0)}, InvalidValue, "sweep_every"),
        (FakeSender(), {"deliver_every": timedelta(0)}, InvalidValue, "deliver_every"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    send: Any, options: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        add_tasks(new_app(), send, **options)


def test_an_app_gets_them_once() -> None:
    app = new_app()
    add_tasks(app, FakeSender())
    with pytest.raises(ConfigurationError, match="has these tasks already"):
        add_tasks(app, FakeSender())


def test_a_delivery_that_takes_long_lets_another_go_on(
    database: peewee.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shutdown waits for the task: it claims nothing more after a while, and asks for the next one."""
    monkeypatch.setattr(integration, "_LONGEST_DELIVERY", 0.01)
    runs: list[int] = []

    def send(message: OutboxMessage) -> None:
        runs.append(message.id)
        if len(runs) == 1:
            until(lambda: "Timer" not in str(threading.enumerate()), "it is time to end")

    app = new_app()
    tasks = add_tasks(app, send, concurrency=1)
    for number in range(3):
        submitted(f"Text {number}")
    with working(app):
        assert tasks.deliver() == 1
        until(lambda: len(runs) == 3, "the tasks that follow send the rest")
        until(lambda: set(statuses()) == {MessageStatus.SENT}, "it is recorded")


def test_a_soft_time_limit_ends_the_senders_too(database: peewee.Database) -> None:
    """They finish what they are sending, which is recorded, and claim nothing more."""
    limit_reached = threading.Event()

    def send(message: OutboxMessage) -> None:
        if not limit_reached.is_set():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert limit_reached.wait(LIMIT)

    def end(number: int, frame: object) -> None:
        raise SoftTimeLimitExceeded

    tasks = add_tasks(new_app(), send, concurrency=1)
    submitted("one")
    submitted("two")
    before = signal.signal(signal.SIGUSR1, end)
    try:
        with pytest.raises(SoftTimeLimitExceeded):
            tasks.deliver()
    finally:
        signal.signal(signal.SIGUSR1, before)
        senders = {thread for thread in threading.enumerate() if " sender " in thread.name}
        limit_reached.set()

    assert senders
    until(lambda: senders.isdisjoint(threading.enumerate()), "they have ended")  # join() was interrupted
    assert statuses() == [MessageStatus.SENT, MessageStatus.PENDING]


# -- the wake-up on commit ---------------------------------------------------------------------------------------------


def test_a_commit_wakes_a_worker_without_any_beat(postgres_url: str, postgres: peewee.Database, log: list[str]) -> None:
    app = new_app()
    add_tasks(app, FakeSender())
    submitted("from before")
    with working(app):
        until(lambda: statuses() == [MessageStatus.SENT], "what was there before is sent")
        submitted()
        until(lambda: statuses() == [MessageStatus.SENT] * 2, "a text is sent")
    assert log == ["listening task=close_engine.deliver wakes=notices"]
    until(lambda: query(postgres_url, LISTENING) == [], "it listens no more")


def test_the_crms_screen_that_approves_wakes_a_worker(postgres_url: str, postgres: peewee.Database) -> None:
    app = new_app()
    add_tasks(app, FakeSender())
    action = submit(opened(AutonomyLevel.MANUAL), ActionType.SEND_MESSAGE, "Hello!")
    assert isinstance(action, PendingAction)
    with working(app):
        until(lambda: query(postgres_url, LISTENING), "it listens")
        approve = f"UPDATE pending_actions SET status = 'APPROVED', approved_by = 'jane' WHERE id = '{action.id}'"
        query(postgres_url, f"{approve} RETURNING id")
        until(lambda: statuses() == [MessageStatus.SENT], "the approved text is sent")


def test_many_commits_ask_for_few_deliveries(postgres: peewee.Database) -> None:
    """While one waits in a worker, nobody asks for another: it will see everything."""
    begun, go_on = threading.Event(), threading.Event()

    def send(message: OutboxMessage) -> None:
        begun.set()
        assert go_on.wait(LIMIT)

    app = new_app()
    add_tasks(app, send, concurrency=1)
    received: list[str] = []

    def note(request: Any, **signal: object) -> None:
        received.append(request.id)

    signals.task_received.connect(note)
    try:
        with working(app):
            submitted()
            assert begun.wait(LIMIT)
            for number in range(20):
                submitted(f"Text {number}")
            go_on.set()
            until(lambda: set(statuses()) == {MessageStatus.SENT}, "all are sent")
    finally:
        signals.task_received.disconnect(note)
    assert len(received) < 10


def test_a_task_that_went_with_the_brokers_connection_is_not_waited_for(postgres: peewee.Database) -> None:
    """Celery forgets that it has reserved it, but not the task itself."""
    app = new_app()
    add_tasks(app, FakeSender())
    received: list[Any] = []

    def note(request: Any, **signal: object) -> None:
        received.append(request)

    signals.task_received.connect(note)
    try:
        with working(app):
            until(lambda: received and not state.requests, "the first one is done")
            state.requests["lost"] = received[0]
            submitted()
            until(lambda: statuses() == [MessageStatus.SENT], "another one is asked for")
    finally:
        signals.task_received.disconnect(note)
        state.requests.pop("lost", None)


def test_a_worker_that_lost_its_ear_listens_again(postgres_url: str, postgres: peewee.Database, log: list[str]) -> None:
    app = new_app()
    add_tasks(app, FakeSender())
    with working(app):
        until(lambda: log, "it listens and has said so")
        query(postgres_url, f"SELECT pg_terminate_backend(pid, 60000) FROM ({LISTENING}) listening")
        submitted()
        until(lambda: statuses() == [MessageStatus.SENT], "what came meanwhile is sent")
        until(lambda: len(log) == 3, "it says so")
    assert [line.split(" why=")[0] for line in log] == [
        "listening task=close_engine.deliver wakes=notices",
        "listening task=close_engine.deliver wakes=beat",
        "listening task=close_engine.deliver wakes=notices",
    ]


def test_on_sqlite_the_beat_wakes_and_the_log_says_so(tmp_path: Path, log: list[str]) -> None:
    close_engine.connect(f"sqlite:///{tmp_path}/close_engine.db")
    app = new_app()
    add_tasks(app, FakeSender())
    with working(app):
        until(lambda: log, "it says so")
    assert log == ["listening task=close_engine.deliver wakes=beat why='this database tells nobody of a new message'"]


def test_behind_pgbouncer_the_beat_wakes_and_the_log_says_what_to_do(
    server: str, postgres: peewee.Database, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in transaction mode: LISTEN succeeds and is silent. Here it is heard in another database."""
    with postgres_database(server) as elsewhere:
        monkeypatch.setenv(LISTEN, elsewhere)
        app = new_app()
        add_tasks(app, FakeSender())
        with working(app):
            until(lambda: log, "it says so")
    assert log[0].startswith("listening task=close_engine.deliver wakes=beat why='it does not hear its own notice")
    assert LISTEN in log[0]


@pytest.mark.parametrize("url", ["sqlite:///other.db", "nonsense"])
def test_a_wrong_place_to_listen_is_logged(
    url: str, postgres: peewee.Database, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LISTEN, url)
    app = new_app()
    tasks = add_tasks(app, FakeSender())
    submitted()
    with working(app):
        tasks.deliver.delay()
        until(lambda: statuses() == [MessageStatus.SENT], "it works all the same")
    assert [line.split(" why=")[0] for line in log] == ["listening task=close_engine.deliver wakes=beat"]


def test_a_worker_of_another_queue_does_not_listen(
    postgres_url: str, postgres: peewee.Database, log: list[str]
) -> None:
    app = new_app(task_routes={"close_engine.*": {"queue": new_name()}})
    add_tasks(app, FakeSender())
    with working(app):
        assert query(postgres_url, LISTENING) == []
    assert log == []


# -- the database is away, or the broker -------------------------------------------------------------------------------


def test_a_database_that_is_away_is_one_line_for_each_task(nobody_listens: str, log: list[str]) -> None:
    close_engine.connect(f"postgresql://worker:s3cret@{nobody_listens}/crm")
    app = new_app()
    tasks = add_tasks(app, FakeSender())

    def unreachable() -> set[str]:
        return {line.partition(": ")[0] for line in log if line.startswith("database unreachable")}

    with working(app):
        tasks.deliver.delay()
        tasks.sweep.delay()
        until(lambda: len(unreachable()) == 2, "both have failed")
    assert unreachable() == {
        "database unreachable task=close_engine.deliver",
        "database unreachable task=close_engine.sweep",
    }
    assert not [line for line in log if "s3cret" in line or "\n" in line]
    with pytest.raises(peewee.OperationalError):
        tasks.deliver()


def test_a_database_that_is_not_migrated_fails_the_task(tmp_path: Path) -> None:
    close_engine.connect(f"sqlite:///{tmp_path}/empty.db")
    tasks = add_tasks(new_app(), FakeSender())

    with pytest.raises(SchemaError, match="close-engine migrate"):
        tasks.deliver()


@pytest.fixture
def silent() -> Iterator[str]:
    """The host and port of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        yield f"{host}:{port}"


@pytest.mark.parametrize("answer", ["refused", "silent"])
def test_a_broker_that_is_away_is_not_waited_for(
    answer: str, request: pytest.FixtureRequest, database: peewee.Database, log: list[str]
) -> None:
    place = request.getfixturevalue("nobody_listens" if answer == "refused" else "silent")
    options = {"read_timeout": 0.2, "write_timeout": 0.2}
    app = new_app(f"amqp://{place}", broker_connection_timeout=0.2)
    app.conf.broker_transport_options = options
    tasks = add_tasks(app, FakeSender())

    integration._ask_for(tasks.deliver)

    assert len(log) == 1
    assert log[0].startswith("unasked task=close_engine.deliver: the next beat asks for it: ")


# -- G6: forks ---------------------------------------------------------------------------------------------------------


class Prefork:
    """`celery worker --pool prefork` in a process of its own."""

    def __init__(self, place: Path, url: str) -> None:
        self.place = place
        self.log = place / "log"
        environment = {**os.environ, "CLOSE_ENGINE_DATABASE": url, "CELERY_PLACE": str(place)}
        command = ["celery", "--app", "tests.celery_app", "worker", "--pool", "prefork", "--concurrency", "2"]
        quiet = ["--loglevel", "INFO", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", *command, *quiet],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )

    def has_said(self, words: str) -> bool:
        assert self.process.poll() is None or "ready" in self.log.read_text(), self.log.read_text()
        return words in self.log.read_text()

    def begun(self) -> list[list[str]]:
        """The process, the key and the words of each message that was begun to be sent."""
        record = self.place / "begun"
        return [line.split() for line in record.read_text().splitlines()] if record.exists() else []


@pytest.fixture
def prefork(postgres_url: str, tmp_path: Path) -> Iterator[Prefork]:
    close_engine.connect(postgres_url)
    worker = Prefork(tmp_path, postgres_url)
    try:
        until(lambda: worker.has_said("wakes=notices"), "it listens")
        yield worker
    finally:
        worker.process.kill()
        worker.process.wait(LIMIT)
        current().database.close()


def test_g6_forked_processes_deliver_what_is_committed_and_a_shutdown_waits(prefork: Prefork) -> None:
    """Connected and migrated at import, then forked. Another process commits, and they send. SIGTERM finishes."""
    texts = [submitted(f"text-{number}") for number in range(4)]
    until(lambda: set(statuses()) == {MessageStatus.SENT}, "all are sent")
    last = submitted("wait")
    until(lambda: len(prefork.begun()) == 5, "the last one is being sent")

    prefork.process.terminate()
    until(lambda: prefork.has_said("Warm shutdown"), "it shuts down")
    assert statuses()[-1] == MessageStatus.PENDING
    (prefork.place / "go on").touch()

    assert prefork.process.wait(LIMIT) == 0
    assert statuses() == [MessageStatus.SENT] * 5
    assert [key for _, key, _ in prefork.begun()] == [text.send_key for text in (*texts, last)]
    assert str(prefork.process.pid) not in {pid for pid, _, _ in prefork.begun()}


def test_g6_a_process_that_is_killed_is_replaced_and_its_message_sent_again(prefork: Prefork) -> None:
    """The new one is forked while the main process listens. The lease runs out, and the key is the same."""
    text = submitted("kill")
    until(lambda: prefork.has_said("signal 9"), "a process was killed in the middle of a call")
    until(lambda: prefork.begun() and outbox.due_in() is None, "its lease has run out")
    other = submitted("other")

    until(lambda: statuses() == [MessageStatus.SENT] * 2, "both are sent")
    begun = prefork.begun()
    assert sorted(key for _, key, _ in begun) == sorted([text.send_key, text.send_key, other.send_key])
    assert prefork.process.poll() is None
