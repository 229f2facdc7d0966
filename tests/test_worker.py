"""The built-in worker: what it does with a message, whatever becomes of the sender, the lease or the database."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import peewee
import psycopg2
import pytest

import close_engine
import tests.senders
from close_engine import (
    ActionType,
    CannotBeSent,
    CloseEngineConversation,
    ConfigurationError,
    EntryPoint,
    FindingSender,
    InvalidValue,
    MessageStatus,
    OutboxMessage,
    PendingAction,
    SchemaError,
    Snooze,
    Stage,
    Swept,
    Worker,
    after_commit,
    on_enter,
    open_conversation,
    outbox,
    submit,
)
from close_engine.database.binding import current
from close_engine.testing import FakeSender, MovableClock, new_lead
from close_engine.worker import load_sender
from tests.crm import query
from tests.servers import PrivateServer, execute
from tests.waiting import LIMIT, Running, until

ConversationIn = Callable[..., CloseEngineConversation]
NOTHING = Swept()


def worker_with(send: Callable[[OutboxMessage], Any] | FindingSender, **options: Any) -> Worker:
    """A worker that neither sweeps nor waits for long, unless told otherwise."""
    return Worker(
        send, **{"name": "worker-7", "concurrency": 1, "sweep": None, "idle": timedelta(milliseconds=10), **options}
    )


def nothing(message: OutboxMessage) -> None:
    """A sender that does nothing."""


def in_memory() -> bool:
    """Whether the database is one that a worker's threads cannot share."""
    return bool(current().database.database == ":memory:")


def reloaded(message: OutboxMessage | PendingAction) -> OutboxMessage:
    found: OutboxMessage = OutboxMessage.get_by_id(message.id)
    return found


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, str]]]:
    """What the worker logged: the level and the first word of each event."""
    caplog.set_level(logging.INFO, "close_engine.worker")

    def read() -> list[tuple[str, str]]:
        return [(record.levelname, record.getMessage().partition(" worker=")[0]) for record in caplog.records]

    return read


@contextmanager
def when_logged(event: str, act: Callable[[], object]) -> Iterator[None]:
    """Do something at the moment at which the worker logs this event, which it must."""
    logged = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith(event):
                logged.append(record)
                act()

    handler, logger = Handler(), logging.getLogger("close_engine.worker")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert logged, f"{event!r} was not logged"


# -- what becomes of a message ---------------------------------------------------------------------------------------


def test_what_is_sent_is_recorded_and_moves_the_conversation(
    conversation_in: ConversationIn, told: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    conversation = conversation_in(Stage.INITIATED)
    message = submit(conversation, ActionType.SEND_MESSAGE, "Hello!")

    assert worker_with(lambda message: f"SM-{message.body}").run_once() == 1

    message = reloaded(message)
    assert (message.status, message.provider_id, message.attempts) == (MessageStatus.SENT, "SM-Hello!", 1)
    assert message.leased_by == "worker-7"
    conversation.reload()
    change = conversation.history()[-1]
    assert (change.dest, change.actor, change.key) == (Stage.QUALIFYING, "worker-7", message.send_key)
    assert caplog.messages == [
        f"sent worker=worker-7 message={message.id} topic=SEND_MESSAGE conversation={conversation.id} attempt=1 "
        "provider_id=SM-Hello!"
    ]


def test_the_messages_of_a_conversation_leave_one_after_the_other(conversation_in: ConversationIn) -> None:
    conversations = [conversation_in(Stage.QUALIFYING) for _ in range(2)]
    for number in range(3):
        for conversation in conversations:
            outbox.enqueue(conversation, "SEND_MESSAGE", str(number))
    sender = FakeSender()

    assert worker_with(sender, concurrency=2).run_once() == (1 if in_memory() else 2)
    worker_with(sender, concurrency=3).run_until_empty()

    for conversation in conversations:
        sent = [message.body for message in sender.sent if message.conversation_id == conversation.id]
        assert sent == ["0", "1", "2"]


def test_until_empty_leaves_what_is_to_wait(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, fake_sender: FakeSender
) -> None:
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "later", send_after=timedelta(minutes=3))

    assert worker_with(fake_sender).run_until_empty() == 0
    close_engine_clock.move(timedelta(minutes=3))
    assert worker_with(fake_sender).run_until_empty() == 1

    assert [message.body for message in fake_sender.sent] == ["later"]


def test_what_fails_is_tried_again_later(
    conversation_in: ConversationIn,
    close_engine_clock: MovableClock,
    told: Callable[[], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    message = outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")
    sender = FakeSender()
    sender.failures.append(ConnectionError("503\nService Unavailable"))
    worker = worker_with(sender)

    assert worker.run_until_empty() == 1

    message = reloaded(message)
    assert (message.status, message.leased_by, message.attempts) == (MessageStatus.PENDING, None, 1)
    assert message.last_error == "ConnectionError: 503\nService Unavailable"
    assert message.available_at > close_engine_clock.now
    assert told() == [("WARNING", "failed")]
    assert caplog.messages[0].endswith(r" why='ConnectionError: 503\nService Unavailable'")
    assert "\n" not in caplog.messages[0]

    close_engine_clock.move(timedelta(minutes=1))
    assert worker.run_until_empty() == 1
    assert (reloaded(message).status, reloaded(message).attempts) == (MessageStatus.SENT, 2)


def test_for_whoever_looks_for_a_bug_in_his_sender_there_is_a_traceback(
    conversation_in: ConversationIn, fake_sender: FakeSender, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "close_engine.worker")
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")
    fake_sender.failures.append(KeyError("to"))

    worker_with(fake_sender).run_once()

    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [KeyError]


def test_what_fails_too_often_is_dead_and_those_behind_it_go_on(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, told: Callable[[], Any]
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    message = outbox.enqueue(conversation, "SEND_MESSAGE", "first", max_attempts=2)
    outbox.enqueue(conversation, "SEND_MESSAGE", "second")
    sender = FakeSender()
    sender.failures += [ConnectionError("503"), ConnectionError("504")]

    for _ in range(2):
        worker_with(sender).run_until_empty()
        close_engine_clock.move(timedelta(minutes=1))

    assert (reloaded(message).status, reloaded(message).last_error) == (MessageStatus.DEAD, "ConnectionError: 504")
    assert [message.body for message in sender.sent] == ["second"]
    assert told() == [("WARNING", "failed"), ("ERROR", "dead"), ("INFO", "sent")]


def test_what_cannot_be_sent_is_dead_at_once(conversation_in: ConversationIn, told: Callable[[], Any]) -> None:
    message = outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")
    sender = FakeSender()
    sender.failures.append(CannotBeSent("the number does not exist"))

    worker_with(sender).run_once()

    message = reloaded(message)
    assert (message.status, message.attempts) == (MessageStatus.DEAD, 1)
    assert message.last_error == "CannotBeSent: the number does not exist"
    assert told() == [("ERROR", "dead")]


def test_what_is_snoozed_is_sent_later_and_no_attempt_counts(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, told: Callable[[], Any]
) -> None:
    message = outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")
    sender = FakeSender()
    sender.failures += [Snooze(timedelta(hours=8)), Snooze(close_engine_clock.now + timedelta(hours=9))]

    for hour in (8, 1, 0):
        worker_with(sender).run_until_empty()
        assert (reloaded(message).attempts, len(sender.sent)) == (0, 0) if hour else (1, 1)
        close_engine_clock.move(timedelta(hours=hour))

    assert told() == [("INFO", "snoozed"), ("INFO", "snoozed"), ("INFO", "sent")]


def test_a_wrong_time_to_snooze_is_that_messages_own_trouble(
    conversation_in: ConversationIn, told: Callable[[], Any]
) -> None:
    message = outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")
    sender = FakeSender()
    sender.failures.append(Snooze(datetime(2026, 1, 2)))

    worker_with(sender).run_until_empty()

    assert reloaded(message).attempts == 1
    assert "it has no timezone" in str(reloaded(message).last_error)
    assert told() == [("WARNING", "failed"), ("INFO", "sent")]


class Provider:
    """A provider without idempotency keys, which can be asked what it has sent."""

    def __init__(self, found: Any) -> None:
        self.found = found
        self.sent: list[int] = []
        self.asked: list[int] = []

    def send(self, message: OutboxMessage) -> str:
        self.sent.append(message.id)
        return f"SM{message.id}"

    def find(self, message: OutboxMessage) -> Any:
        self.asked.append(message.id)
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.parametrize(
    ("found", "sent", "status", "provider_id"),
    [
        ("SM7", False, MessageStatus.SENT, "SM7"),
        (None, True, MessageStatus.SENT, "SM1"),
        ("of another", True, MessageStatus.SENT, "SM1"),
        (ConnectionError("503"), False, MessageStatus.PENDING, None),
    ],
)
def test_a_sender_is_asked_whether_a_message_has_left_before_it_is_sent_again(
    found: Any,
    sent: bool,
    status: MessageStatus,
    provider_id: str | None,
    conversation_in: ConversationIn,
    close_engine_clock: MovableClock,
) -> None:
    message = outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")
    outbox.claim(worker="dies")
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "effect")
    outbox.claim()[0].sent("of another")
    close_engine_clock.move(timedelta(minutes=1))
    provider = Provider(found)

    worker_with(provider).run_until_empty()

    assert provider.asked == [message.id]
    assert provider.sent == ([message.id] if sent else [])
    assert (reloaded(message).status, reloaded(message).provider_id) == (status, provider_id)


def test_it_is_not_asked_before_the_first_time(conversation_in: ConversationIn) -> None:
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")
    provider = Provider("SM7")

    worker_with(provider).run_until_empty()

    assert (provider.asked, len(provider.sent)) == ([], 1)


@pytest.mark.parametrize(
    ("returned", "why"),
    [("ok", "ProviderIdTaken: The provider's id 'ok' belongs to message"), (201, "InvalidValue: OutboxMessage.")],
)
def test_what_left_with_an_unusable_id_is_not_sent_again(
    returned: Any,
    why: str,
    conversation_in: ConversationIn,
    close_engine_clock: MovableClock,
    told: Callable[[], Any],
) -> None:
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "first")
    worker_with(lambda message: "ok").run_once()
    message = outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "second")
    sent = []

    def send(message: OutboxMessage) -> Any:
        sent.append(message.body)
        return returned

    for _ in range(3):
        worker_with(send, sweep=close_engine.sweep).run_until_empty()
        close_engine_clock.move(timedelta(hours=2))

    assert sent == ["second"]
    message = reloaded(message)
    assert message.status is MessageStatus.DEAD
    assert str(message.last_error).startswith(why)
    assert told() == [("INFO", "sent"), ("ERROR", "recording failed"), ("ERROR", "dead")]


def test_a_refusal_is_recorded_with_what_was_sent(
    conversation_in: ConversationIn, told: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    conversation = conversation_in(Stage.BUILDING)
    message = submit(conversation, ActionType.SEND_PREVIEW, "Here it is", metadata={"previewUrl": "https://x"})

    def send(message: OutboxMessage) -> str:
        conversation.close_lost("not interested")
        return "SM1"

    worker_with(send).run_once()

    message = reloaded(message)
    assert (message.status, message.provider_id) == (MessageStatus.SENT, "SM1")
    assert str(message.refusal) in caplog.messages[0]
    assert "is CLOSED_LOST" in str(message.refusal)
    assert told() == [("INFO", "sent")]


# -- hooks that fail -------------------------------------------------------------------------------------------------


def fail(*arguments: object) -> None:
    raise RuntimeError("no site builder")


@pytest.mark.parametrize(
    ("edge", "stage", "refusal"),
    [(on_enter, Stage.INITIATED, "RuntimeError: no site builder"), (after_commit, Stage.QUALIFYING, None)],
)
def test_a_hook_that_fails_does_not_make_it_unsent(
    edge: Any,
    stage: Stage,
    refusal: str | None,
    conversation_in: ConversationIn,
    told: Callable[[], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    conversation = conversation_in(Stage.INITIATED)
    message = submit(conversation, ActionType.SEND_MESSAGE, "first")
    outbox.enqueue(conversation, "SEND_MESSAGE", "second")
    sender = FakeSender()
    hook = edge(Stage.QUALIFYING)(fail)

    worker_with(sender).run_until_empty()
    hook.remove()

    assert [message.body for message in sender.sent] == ["first", "second"]
    message = reloaded(message)
    assert (message.status, message.refusal) == (MessageStatus.SENT, refusal)
    conversation.reload()
    assert conversation.stage is stage
    assert told() == [("ERROR", "recording failed"), ("INFO", "sent")]
    assert "no site builder" in caplog.text


# -- leases ----------------------------------------------------------------------------------------------------------


def test_a_lost_lease_changes_nothing(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, told: Callable[[], Any]
) -> None:
    message = outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")

    def send(message: OutboxMessage) -> None:
        close_engine_clock.move(timedelta(minutes=2))
        assert [other.id for other in outbox.claim(worker="worker-8")] == [message.id]

    worker_with(send).run_once()

    message = reloaded(message)
    assert (message.status, message.leased_by, message.attempts) == (MessageStatus.PENDING, "worker-8", 2)
    assert told() == [("ERROR", "lost")]


def test_a_message_that_is_gone_is_lost(conversation_in: ConversationIn, told: Callable[[], Any]) -> None:
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")

    worker_with(lambda message: OutboxMessage.delete().execute() and None).run_once()

    assert told() == [("ERROR", "lost")]


def test_a_report_that_was_committed_before_the_connection_broke_counts(
    conversation_in: ConversationIn, told: Callable[[], Any]
) -> None:
    message = outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")

    worker_with(lambda message: reloaded(message).sent() and None).run_once()

    assert reloaded(message).status is MessageStatus.SENT
    assert told() == [("INFO", "sent")]


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"])
def test_what_takes_long_to_send_stays_leased(
    kind: str, close_engine_clock: MovableClock, conversation_in: ConversationIn, told: Callable[[], Any]
) -> None:
    lease = timedelta(milliseconds=300)
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")

    def send(message: OutboxMessage) -> None:
        moved = close_engine_clock.move(lease)
        until(lambda: reloaded(message).available_at > moved, "the heart has beaten since")
        assert outbox.claim(worker="worker-8") == []

    worker_with(send, lease=lease).run_until_empty()

    assert told() == [("INFO", "sent")]
    assert not [thread for thread in threading.enumerate() if thread.name.endswith(" heartbeat")]


# -- stopping --------------------------------------------------------------------------------------------------------


def test_stopped_it_finishes_what_it_is_sending_and_has_claimed_nothing_else(
    conversation_in: ConversationIn, told: Callable[[], Any]
) -> None:
    messages = [outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!") for _ in range(3)]
    worker = worker_with(lambda message: worker.stop())

    worker.run()

    assert [reloaded(message).status for message in messages] == [MessageStatus.SENT, *2 * [MessageStatus.PENDING]]
    assert [(reloaded(message).attempts, reloaded(message).leased_by) for message in messages[1:]] == 2 * [(0, None)]
    assert told() == [("INFO", "started"), ("INFO", "sent"), ("INFO", "stopped")]


def test_stopped_it_does_not_go_on_until_empty(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    for _ in range(2):
        outbox.enqueue(conversation, "SEND_MESSAGE", "Hello!")
    worker = worker_with(lambda message: worker.stop())

    assert worker.run_until_empty() == 1
    assert worker.run_until_empty() == 0


def test_a_signal_stops_it_while_it_waits_for_work(database: peewee.Database, told: Callable[[], Any]) -> None:
    worker = worker_with(nothing, idle=timedelta(hours=1))
    found_at: set[int] = set()
    end = time.monotonic() + LIMIT

    def stop_once_it_waits(number: int, frame: FrameType | None) -> None:
        """The alarm goes off again and again: found twice at the same instruction, that instruction is the wait."""
        assert time.monotonic() < end, "It does not wait, or does not end."
        if frame is not None and frame.f_code is Worker.pause.__code__:
            if frame.f_lasti in found_at:
                worker.stop()
            found_at.add(frame.f_lasti)

    before = signal.signal(signal.SIGALRM, stop_once_it_waits)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        worker.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    assert told() == [("INFO", "started"), ("INFO", "stopped")]


def test_another_thread_stops_it_while_it_waits_for_work(postgres: peewee.Database) -> None:
    worker = worker_with(nothing, idle=timedelta(hours=1))
    running = Running(worker.run)

    def waits() -> bool:
        frame = sys._current_frames().get(running.thread.ident or 0)
        return frame is not None and frame.f_code is Worker.pause.__code__

    until(waits, "the worker waits")
    worker.stop()

    assert running.result() is None


def test_stopped_before_it_looks_for_work_it_waits_for_none(postgres: peewee.Database, told: Callable[[], Any]) -> None:
    worker = worker_with(nothing, idle=timedelta(hours=1))

    with when_logged("started", worker.stop):
        assert Running(worker.run).result() is None

    assert told() == [("INFO", "started"), ("INFO", "stopped")]


# -- sweeps ----------------------------------------------------------------------------------------------------------


def test_it_sweeps_at_the_start_and_then_on_a_timer(
    conversation_in: ConversationIn,
    close_engine_clock: MovableClock,
    told: Callable[[], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    worker = worker_with(nothing, sweep=close_engine.sweep, sweep_every=timedelta(hours=1))
    worker.run_once()
    close_engine_clock.move(timedelta(hours=73))
    swept_before = told()

    worker.run_once()
    worker.run_once()

    conversation.reload()
    assert conversation.stage is Stage.STALLED
    assert swept_before == []
    assert caplog.messages == [
        "swept worker=worker-7 stalled=1 lost=0 expired=0 released=0 superseded=0 withdrawn=0 failed=0"
    ]


def test_it_sweeps_as_often_as_it_is_told(database: peewee.Database, close_engine_clock: MovableClock) -> None:
    swept: list[object] = []

    def sweep() -> Swept:
        swept.append(close_engine_clock.now)
        return NOTHING

    worker = worker_with(nothing, sweep=sweep, sweep_every=timedelta(minutes=5))
    for _ in range(11):
        worker.run_once()
        close_engine_clock.move(timedelta(minutes=1))

    assert len(swept) == 3


def test_a_sweep_that_fails_stops_no_message(
    conversation_in: ConversationIn, fake_sender: FakeSender, told: Callable[[], Any]
) -> None:
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")

    worker_with(fake_sender, sweep=fail).run_once()

    assert told() == [("ERROR", "sweep failed"), ("INFO", "sent")]


def test_what_a_sweep_passed_over_is_logged(
    database: peewee.Database, told: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """B5: one line for each, and the worker goes on."""
    worker_with(nothing, sweep=lambda: Swept(stalled=["c1"], failed={"c2": "KeyError: 'phone'"})).run_once()

    assert caplog.messages == [
        "sweep passed over worker=worker-7 id=c2 error=KeyError: 'phone'",
        "swept worker=worker-7 stalled=1 lost=0 expired=0 released=0 superseded=0 withdrawn=0 failed=1",
    ]


def test_what_a_dead_worker_held_is_sent_by_the_next(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, fake_sender: FakeSender
) -> None:
    message = outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!", max_attempts=2)
    outbox.claim(lease=timedelta(minutes=1), worker="worker-6")

    assert worker_with(fake_sender).run_until_empty() == 0
    close_engine_clock.move(timedelta(minutes=1))
    assert worker_with(fake_sender).run_until_empty() == 1

    assert (reloaded(message).leased_by, reloaded(message).attempts) == ("worker-7", 2)


def test_what_kills_every_worker_is_dead_in_the_end(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    poison = outbox.enqueue(conversation, "SEND_MESSAGE", "poison", max_attempts=3)
    outbox.enqueue(conversation, "SEND_MESSAGE", "behind it")

    def die(message: OutboxMessage) -> None:
        if message.body == "poison":
            raise SystemExit

    deaths = 0
    for _ in range(10):
        try:
            worker_with(die, sweep=close_engine.sweep).run_until_empty()
        except SystemExit:
            deaths += 1
        close_engine_clock.move(timedelta(minutes=2))

    assert deaths == 3
    assert (reloaded(poison).status, reloaded(poison).last_error) == (
        MessageStatus.DEAD,
        "the lease of worker-7 ran out",
    )
    assert [message.body for message in OutboxMessage.select().where(OutboxMessage.status == "SENT")] == ["behind it"]


# -- the database goes away ------------------------------------------------------------------------------------------


@pytest.fixture(params=["postgresql", "postgresql+pool"])
def reached(request: pytest.FixtureRequest, postgres_url: str) -> Iterator[peewee.Database]:
    """A PostgreSQL database, by a connection of its own or from a pool."""
    database = close_engine.connect(postgres_url.replace("postgresql", request.param, 1))
    yield database
    database.close()
    if request.param.endswith("pool"):
        database.close_all()  # type: ignore[attr-defined]


def break_connection(database: peewee.Database, url: str) -> None:
    ((pid,),) = database.execute_sql("SELECT pg_backend_pid()").fetchall()
    assert query(url, "SELECT pg_terminate_backend(%s, %s)", (pid, 1000 * LIMIT)) == [(True,)]


def opened() -> CloseEngineConversation:
    return open_conversation(new_lead(), EntryPoint.SMS_REPLY)


def test_a_connection_that_breaks_after_the_claim_is_replaced(
    reached: peewee.Database, postgres_url: str, told: Callable[[], Any]
) -> None:
    messages = [submit(opened(), ActionType.SEND_MESSAGE, "Hello!") for _ in range(2)]

    worker_with(lambda message: break_connection(reached, postgres_url)).run_until_empty()

    assert [reloaded(message).status for message in messages] == 2 * [MessageStatus.SENT]
    assert told() == 2 * [("WARNING", "database unreachable"), ("INFO", "sent")]


def test_a_connection_that_breaks_within_a_transaction_leaves_nothing_half_done(
    reached: peewee.Database, postgres_url: str, told: Callable[[], Any]
) -> None:
    conversation = opened()
    message = submit(conversation, ActionType.SEND_MESSAGE, "Hello!")
    sender, breaks = FakeSender(), [1, 2]

    @on_enter(Stage.QUALIFYING)
    def break_it(conversation: CloseEngineConversation, change: object) -> None:
        outbox.enqueue(conversation, "SEND_MESSAGE", "within it")
        if breaks:
            breaks.pop()
            break_connection(reached, postgres_url)
            outbox.enqueue(conversation, "SEND_MESSAGE", "and after it")

    worker_with(sender).run_until_empty()
    break_it.remove()

    assert [message.body for message in sender.sent] == ["Hello!", "within it"]
    message = reloaded(message)
    assert (message.status, message.refusal) == (MessageStatus.SENT, None)
    conversation.reload()
    assert [change.dest for change in conversation.history()] == [Stage.INITIATED, Stage.QUALIFYING]
    assert told() == 2 * [("WARNING", "database unreachable")] + 2 * [("INFO", "sent")]


def test_a_hook_that_the_database_fails_is_tried_again(
    postgres: peewee.Database, postgres_url: str, told: Callable[[], Any]
) -> None:
    conversation, other = opened(), opened()
    message = submit(conversation, ActionType.SEND_MESSAGE, "Hello!")

    @on_enter(Stage.QUALIFYING)
    def touch_another(conversation: CloseEngineConversation, change: object) -> None:
        postgres.execute_sql("SET LOCAL lock_timeout = 1")
        with close_engine.locked(other.id):
            pass

    rival = psycopg2.connect(postgres_url)  # not Peewee's: the sender's thread gives up what it holds
    rival.cursor().execute("SELECT FROM close_engine_conversations WHERE id = %s FOR UPDATE", (other.id,))
    # Rolled back, it holds nothing any more; closed, it would until the server notices. With a lease that long, no
    # heartbeat is in the way within the millisecond.
    with when_logged("database unreachable", rival.rollback):
        worker_with(lambda message: None, lease=timedelta(days=1)).run_once()
    touch_another.remove()
    rival.close()

    assert (reloaded(message).status, reloaded(message).refusal) == (MessageStatus.SENT, None)
    conversation.reload()
    assert conversation.stage is Stage.QUALIFYING
    assert told() == [("WARNING", "database unreachable"), ("INFO", "sent")]


class Door:
    """Lets nobody into a database while it is shut, and throws out who is in it."""

    def __init__(self, server: str, url: str) -> None:
        self.server = server
        self.name = urlsplit(url).path[1:]

    def shut(self) -> None:
        execute(self.server, f"ALTER DATABASE {self.name} ALLOW_CONNECTIONS false")
        # Those who are in it now, because it may be opened again meanwhile. One that was refused may be gone by then.
        there = query(self.server, "SELECT pid FROM pg_stat_activity WHERE datname = %s", (self.name,))
        ended = "SELECT pg_terminate_backend(pid, %s) FROM pg_stat_activity WHERE pid = ANY (%s)"
        pids = [pid for (pid,) in there]
        until(lambda: not query(self.server, ended, (1000 * LIMIT, pids)), "they are out of the database")

    def open(self) -> None:
        execute(self.server, f"ALTER DATABASE {self.name} ALLOW_CONNECTIONS true")


@pytest.fixture
def door(server: str, postgres_url: str) -> Door:
    return Door(server, postgres_url)


def test_what_was_sent_is_recorded_once_the_database_is_back(
    postgres: peewee.Database, door: Door, told: Callable[[], Any]
) -> None:
    messages = [submit(opened(), ActionType.SEND_MESSAGE, "Hello!") for _ in range(2)]
    failures = iter([None, ConnectionError("503")])

    def send(message: OutboxMessage) -> None:
        door.shut()
        if failure := next(failures):
            raise failure

    postgres.close()
    with when_logged("database unreachable", door.open):
        worker_with(send).run_until_empty()

    assert [reloaded(message).status for message in messages] == [MessageStatus.SENT, MessageStatus.PENDING]
    assert reloaded(messages[1]).last_error == "ConnectionError: 503"
    events = [event for event in told() if event != ("WARNING", "database unreachable")]
    assert events == [("INFO", "sent"), ("WARNING", "failed")]
    assert len(events) < len(told())


def test_it_waits_for_the_database_to_start_with(
    postgres: peewee.Database, door: Door, told: Callable[[], Any]
) -> None:
    submit(opened(), ActionType.SEND_MESSAGE, "Hello!")
    door.shut()
    worker = worker_with(lambda message: worker.stop())

    with when_logged("database unreachable", door.open):
        worker.run()

    assert {event for _, event in told()} - {"changed"} == {"started", "database unreachable", "sent", "stopped"}


def test_a_sweep_that_the_database_fails_is_no_failure_of_the_sweep(
    postgres: peewee.Database, door: Door, told: Callable[[], Any]
) -> None:
    swept: list[int] = []

    def sweep() -> Swept:
        swept.append(len(swept))
        if len(swept) == 1:
            door.shut()
            return close_engine.sweep()
        worker.stop()
        return NOTHING

    worker = worker_with(nothing, sweep=sweep)
    with when_logged("database unreachable", door.open):
        worker.run()

    assert swept == [0, 1]
    assert {event for _, event in told()} - {"changed"} == {"started", "database unreachable", "stopped"}


def test_an_error_that_no_waiting_helps_against_ends_it(postgres: peewee.Database, told: Callable[[], Any]) -> None:
    submit(opened(), ActionType.SEND_MESSAGE, "Hello!")

    with pytest.raises(close_engine.GuardMissing):
        worker_with(lambda message: postgres.execute_sql("DROP TABLE close_engine.outbox") and None).run()

    assert told() == [("INFO", "started"), ("ERROR", "recording failed")]


def test_the_heartbeat_goes_on_when_the_database_is_back(
    postgres: peewee.Database, postgres_url: str, door: Door, told: Callable[[], Any]
) -> None:
    missed, lease = threading.Semaphore(0), timedelta(milliseconds=30)
    leased_until = "SELECT available_at AT TIME ZONE 'UTC' FROM close_engine.outbox"
    message = submit(opened(), ActionType.SEND_MESSAGE, "Hello!")

    def send(message: OutboxMessage) -> None:
        door.shut()
        for _ in range(2):
            assert missed.acquire(timeout=LIMIT)
        door.open()
        until(lambda: query(postgres_url, leased_until) > [(message.available_at,)], "the heart beats again")

    postgres.close()
    with when_logged("heartbeat failed", missed.release):
        worker_with(send, lease=lease).run_once()

    assert reloaded(message).status is MessageStatus.SENT
    assert ("WARNING", "heartbeat failed") in told()


def test_stopped_while_the_database_is_away_it_ends(
    postgres: peewee.Database, door: Door, told: Callable[[], Any]
) -> None:
    door.shut()
    worker = worker_with(nothing)

    with when_logged("database unreachable", worker.stop):
        worker.run()
    door.open()

    assert told() == [("INFO", "started"), ("WARNING", "database unreachable"), ("INFO", "stopped")]


def test_stopped_with_something_to_record_it_waits_as_long_as_the_lease_and_then_says_so(
    postgres: peewee.Database, door: Door, told: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    message = submit(opened(), ActionType.SEND_MESSAGE, "Hello!")

    def send(message: OutboxMessage) -> None:
        door.shut()
        worker.stop()

    worker = worker_with(send, lease=timedelta(milliseconds=50))
    with pytest.raises(peewee.OperationalError, match="not currently accepting connections"):
        worker.run()
    door.open()

    # The heartbeat fails in a thread of its own, until the worker has ended.
    assert [event for event in told() if event != ("WARNING", "heartbeat failed")][-1] == ("ERROR", "unrecorded")
    assert f"unrecorded worker=worker-7 message={message.id}" in caplog.text
    postgres.close()
    assert (reloaded(message).status, reloaded(message).leased_by) == (MessageStatus.PENDING, "worker-7")


def test_until_empty_does_not_wait_for_the_database(postgres: peewee.Database, door: Door) -> None:
    door.shut()
    with pytest.raises(peewee.OperationalError):
        worker_with(nothing).run_until_empty()
    door.open()


def test_a_server_that_restarts_between_send_and_report_is_waited_for(told: Callable[[], Any]) -> None:
    with PrivateServer("fsync = off") as server:
        database = close_engine.connect(server.url)
        close_engine.migrate(standalone=True)
        conversation = opened()
        message = submit(conversation, ActionType.SEND_MESSAGE, "Hello!")

        def restart() -> None:
            if server.crashed:
                server.start()

        database.close()
        with when_logged("database unreachable", restart):
            worker_with(lambda message: server.crash()).run_once()

        assert reloaded(message).status is MessageStatus.SENT
        conversation.reload()
        assert conversation.stage is Stage.QUALIFYING
        assert told()[0] == ("WARNING", "database unreachable")
        assert told()[-1] == ("INFO", "sent")
        database.close()


# -- setting it up ---------------------------------------------------------------------------------------------------


def run_until_empty(worker: Worker) -> None:
    worker.run_until_empty()


def run_once(worker: Worker) -> None:
    worker.run_once()


@pytest.mark.parametrize("way", [Worker.run, run_until_empty, run_once])
def test_a_database_that_is_not_migrated_is_refused(way: Callable[[Worker], None], empty_url: str) -> None:
    database = close_engine.connect(empty_url)

    with pytest.raises(
        SchemaError, match=r"not migrated \(0001_conversations, .* pending\): run close-engine migrate"
    ) as refusal:
        way(worker_with(nothing))
    database.close()

    assert refusal.value.problems == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"concurrency": 0}, "concurrency cannot be 0: it must be at least 1 and at most 1000."),
        ({"concurrency": 1001}, "concurrency cannot be 1001: it must be at least 1 and at most 1000."),
        ({"lease": timedelta(0)}, "lease cannot be '0:00:00': it must be greater than zero."),
        ({"idle": timedelta(seconds=-1)}, "idle cannot be '-1 day, 23:59:59': it must be greater than zero."),
        ({"sweep_every": timedelta(0)}, "sweep_every cannot be '0:00:00': it must be greater than zero."),
    ],
)
def test_a_worker_that_could_not_work_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidValue) as refusal:
        Worker(nothing, **options)

    assert (str(refusal.value), refusal.value.field) == (sentence, *options)


def test_every_worker_has_a_name_of_its_own() -> None:
    assert Worker(nothing).name != Worker(nothing).name


def test_a_sender_is_loaded_by_its_name_also_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "agency_sms.py").write_text("def send(message):\n    return 'SM1'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])

    assert load_sender("tests.senders:send") is tests.senders.send
    assert Worker(load_sender("agency_sms:send")).send(OutboxMessage()) == "SM1"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("agency", "The sender 'agency' must have the form module:name."),
        (":send", "The sender ':send' must have the form module:name."),
        ("agency:", "The sender 'agency:' must have the form module:name."),
        ("no.such:send", "The module 'no.such' cannot be imported: No module named 'no'."),
        (
            ".:send",
            "The module '.' cannot be imported: TypeError: the 'package' argument is required to perform a relative "
            "import for '.'.",
        ),
        ("json:send", "There is no sender 'json:send': json has no send."),
        ("json:__name__", "The sender 'json' cannot be called: pass a function of one OutboxMessage."),
    ],
)
def test_a_sender_that_does_not_exist_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        load_sender(name)

    assert str(refusal.value) == sentence
