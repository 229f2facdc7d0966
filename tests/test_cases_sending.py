"""Inputs that once failed, one test per case, by its number: what leaves, and when, and the worker's bad days."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import peewee
import psycopg2
import pytest
from playhouse.pool import MaxConnectionsExceeded, PooledPostgresqlDatabase

import close_engine
from close_engine import (
    ActionDecided,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    ConfigurationError,
    ConversationClosed,
    EntryPoint,
    InvalidValue,
    KeyReused,
    MessageStatus,
    OutboxMessage,
    PendingAction,
    Stage,
    Worker,
    on_enter,
    open_conversation,
    outbox,
    record_payment,
    submit,
)
from close_engine.database.binding import current, is_transient
from close_engine.database.fields import stored_time
from close_engine.testing import FakeSender, MovableClock, new_lead
from tests.command_line import run
from tests.crm import query
from tests.waiting import LIMIT, Running, until
from tests.workers import claimed, messages, sql

ConversationIn = Callable[..., CloseEngineConversation]
MINUTE = timedelta(minutes=1)


def send_all(send: Any, **options: Any) -> int:
    return Worker(send, **{"sweep": None, "idle": timedelta(milliseconds=10), **options}).run_until_empty()


def opened() -> CloseEngineConversation:
    return open_conversation(new_lead(), EntryPoint.SMS_REPLY)


def statuses(these: Sequence[OutboxMessage] | None = None) -> list[MessageStatus]:
    return [message.status for message in (messages() if these is None else these)]


# -- A1: an attempt is charged for waiting ---------------------------------------------------------------------------


@pytest.mark.parametrize("topic", ["SEND_MESSAGE", "build_site"])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a1_a_poison_dies_alone(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, topic: str, concurrency: int
) -> None:
    """Of ten messages one ends each worker that sends it: nine are sent, and that one is dead."""
    for number in range(10):
        outbox.enqueue(conversation_in(Stage.QUALIFYING), topic, "poison" if number == 4 else "text")

    def send(message: OutboxMessage) -> str:
        if message.body == "poison":
            raise SystemExit(137)
        return f"SM{message.id}"

    for _ in range(15):
        try:
            send_all(send, concurrency=concurrency)
        except SystemExit:
            close_engine_clock.move(2 * MINUTE)

    assert Counter(statuses()) == {MessageStatus.SENT: 9, MessageStatus.DEAD: 1}
    assert [message.body for message in messages() if message.status is MessageStatus.DEAD] == ["poison"]
    assert max(message.attempts for message in messages() if message.body == "text") <= 2


KILLED = """
import os, sys
from datetime import timedelta
import close_engine
from close_engine import Worker

def send(message):
    if message.body == "poison":
        os._exit(137)
    return f"SM{message.id}"

close_engine.connect(sys.argv[1])
Worker(send, lease=timedelta(milliseconds=200), sweep=None).run_until_empty()
"""


def test_a1_neighbours_in_flight_are_not_charged_for_a_poison(postgres: peewee.Database, postgres_url: str) -> None:
    """The process itself is gone, with four messages in flight, again and again."""
    for number in range(8):
        outbox.enqueue(opened(), "SEND_MESSAGE", "poison" if number == 1 else "text", max_attempts=3)
    leased = (
        "SELECT count(*) FROM close_engine.outbox WHERE leased_by IS NOT NULL AND available_at > close_engine.moment()"
    )
    for _ in range(15):
        subprocess.run([sys.executable, "-c", KILLED, postgres_url], check=False, timeout=LIMIT)
        until(lambda: query(postgres_url, leased) == [(0,)], "the leases are over")

    assert Counter(statuses()) == {MessageStatus.SENT: 7, MessageStatus.DEAD: 1}


# -- A2: a suspended worker sends what it no longer holds ------------------------------------------------------------

SUSPENDED = """
import sys
from datetime import timedelta
import close_engine
from close_engine import Worker

def send(message):
    with open(sys.argv[2], "a") as file:
        file.write(f"{message.id}\\n")
    if message.body == "wait":
        print("sending", flush=True)
        sys.stdin.readline()
    return f"SM{message.id}"

close_engine.connect(sys.argv[1])
Worker(send, concurrency=int(sys.argv[3]), lease=timedelta(seconds=1), sweep=None).run_until_empty()
"""


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a2_a_suspended_worker_sends_at_most_what_it_was_sending(
    postgres: peewee.Database, postgres_url: str, tmp_path: Path, concurrency: int
) -> None:
    """Ten texts; a worker is suspended in its first send, another one sends all, and the first one goes on."""
    for number in range(10):
        outbox.enqueue(opened(), "SEND_MESSAGE", "text" if number else "wait")
    command = [sys.executable, "-c", SUSPENDED, postgres_url, str(tmp_path / "sent"), str(concurrency)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "sending\n"
        os.kill(worker.pid, signal.SIGSTOP)
        sender = FakeSender()

        def all_sent() -> bool:
            send_all(sender)
            return set(statuses()) == {MessageStatus.SENT}

        until(all_sent, "the other worker has sent everything that was left")
        os.kill(worker.pid, signal.SIGCONT)
        worker.communicate("go on\n", timeout=LIMIT)
    finally:
        worker.kill()

    sends = Counter([int(line) for line in (tmp_path / "sent").read_text().split()])
    sends.update(message.id for message in sender.sent)
    assert sum(sends.values()) <= 10 + concurrency
    assert len(sends) == 10


def test_a2_a_lease_that_was_lost_before_sending_is_not_sent(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    """The lease is over by the time at which sending would begin: nothing leaves, and no attempt is counted."""
    message = outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")
    outbox.claim(worker="dead")
    close_engine_clock.move(MINUTE)
    sent: list[int] = []

    class Slow:
        def find(self, message: OutboxMessage) -> None:
            message._held_until = 0.0  # as it is after a suspension

        def send(self, message: OutboxMessage) -> None:
            sent.append(message.id)

    Worker(Slow(), concurrency=1, sweep=None).run_once()

    assert sent == []
    (found,) = messages()
    assert (found.id, found.status, found.leased_by, found.attempts) == (message.id, MessageStatus.PENDING, None, 1)


# -- A3, A7, A8: texts into a conversation that has closed -----------------------------------------------------------


@pytest.mark.parametrize("closing", ["payment", "loss", "CRM", "deletion"])
def test_a3_a_text_behind_something_slow_is_withdrawn_when_the_lead_pays(
    conversation_in: ConversationIn, closing: str
) -> None:
    """While an effect runs, the conversation of a text closes: the text does not leave."""
    conversation = conversation_in(Stage.PAYMENT_SENT)
    outbox.enqueue(conversation, "slow_effect")
    text = outbox.enqueue(conversation, "SEND_MESSAGE", "Pay today!")
    sent = []

    def send(message: OutboxMessage) -> None:
        sent.append(message.topic)
        if closing == "payment":
            record_payment(conversation.lead_id, "evt_1")
        elif closing == "loss":
            close_engine.CloseEngineConversation.get_by_id(conversation.id).close_lost(reason="not interested")
        elif closing == "CRM":
            sql("UPDATE close_engine_conversations SET stage = 'CLOSED_LOST' WHERE id = %s", conversation.id)
        else:
            sql("DELETE FROM close_engine_conversations WHERE id = %s", conversation.id)

    send_all(send, concurrency=1)

    assert sent == ["slow_effect"]
    assert OutboxMessage.get_by_id(text.id).status is MessageStatus.WITHDRAWN


@pytest.mark.parametrize("report", ["retry", "release", "snooze", "the worker dies"])
def test_a7_a_text_of_the_old_life_does_not_leave_after_reopening(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, report: str
) -> None:
    """A text is in flight when the conversation closes, comes back, and the conversation is opened again."""
    conversation = conversation_in(Stage.QUALIFYING)
    outbox.enqueue(conversation, "SEND_MESSAGE", "of the old life")
    message = claimed()
    conversation.close_lost(reason="no answer")
    if report == "retry":
        message.retry("503")
    elif report == "release":
        message.release()
    elif report == "snooze":
        message.snooze(MINUTE)
    close_engine_clock.move(timedelta(hours=1))
    again = open_conversation(conversation.lead_id, EntryPoint.REP_CLOSE)
    outbox.enqueue(again, "SEND_MESSAGE", "of the new life")

    assert [message.body for message in outbox.claim(10)] == ["of the new life"]

    withdrawn = OutboxMessage.get_by_id(message.id)
    assert withdrawn.status is MessageStatus.WITHDRAWN
    assert withdrawn.last_error == "the conversation closed, and was opened again, after this was put in"


@pytest.mark.parametrize("stage", [Stage.COMPLETED, Stage.CLOSED_LOST])
@pytest.mark.parametrize("topic", list(ActionType))
def test_a8_nothing_is_put_into_a_conversation_that_has_closed(
    conversation_in: ConversationIn, stage: Stage, topic: ActionType
) -> None:
    """`enqueue` refuses a text as `submit` does; other effects still go in."""
    conversation = conversation_in(stage)
    for put_in in (submit, outbox.enqueue):
        with pytest.raises(ConversationClosed):
            put_in(conversation, topic, "One more thing")
    outbox.enqueue(conversation, "tell_the_boss")
    assert [message.topic for message in outbox.claim(10)] == ["tell_the_boss"]


# -- A4: one slow effect holds up everybody --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"])
def test_a4_slow_effects_do_not_hold_up_texts(kind: str, conversation_in: ConversationIn) -> None:
    """Effects that do not end occupy some senders, and all texts leave through the others at once."""
    for _ in range(3):
        outbox.enqueue(conversation_in(Stage.QUALIFYING), "slow_effect")
    for _ in range(5):
        outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "text")
    all_texts_left, texts = threading.Event(), []

    def send(message: OutboxMessage) -> None:
        if message.topic == "slow_effect":
            assert all_texts_left.wait(LIMIT)
            return
        texts.append(message.id)
        if len(texts) == 5:
            all_texts_left.set()

    assert send_all(send, concurrency=4) == 8
    assert set(statuses()) == {MessageStatus.SENT}


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"])
def test_a4_what_is_slow_is_claimed_by_whoever_is_free(kind: str, conversation_in: ConversationIn) -> None:
    """Two workers: while one of them is busy, the other one does the rest."""
    for _ in range(6):
        outbox.enqueue(conversation_in(Stage.QUALIFYING), "effect")
    busy, done = threading.Event(), threading.Event()

    def never_ends(message: OutboxMessage) -> None:
        busy.set()
        assert done.wait(LIMIT)

    first = Running(lambda: send_all(never_ends, concurrency=1, name="first"))
    assert busy.wait(LIMIT)
    assert send_all(lambda message: None, concurrency=1, name="second") == 5
    done.set()
    assert first.result() == 1


# -- A5: the lanes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topic", ["SEND_MESSAGE", "nudge"])
def test_a5_what_is_scheduled_does_not_hold_up_what_is_due(conversation_in: ConversationIn, topic: str) -> None:
    """A nudge is scheduled for the day after tomorrow, and then a draft is ordered: the draft begins at once."""
    conversation = conversation_in(Stage.QUALIFYING)
    outbox.enqueue(conversation, topic, "Still there?", send_after=timedelta(days=2))
    outbox.enqueue(conversation, "draft_reply")
    outbox.enqueue(conversation, topic, "Hello!")
    assert sorted(str(message.body) for message in outbox.claim(10)) == ["Hello!", "None"]


# -- A9, A10: keys ---------------------------------------------------------------------------------------------------


def test_a9_no_two_messages_have_one_send_key(tmp_path: Path, database: peewee.Database) -> None:
    """Two databases number their messages alike, and the provider knows both: no key is in both of them."""
    keys = []
    submit(opened(), ActionType.SEND_MESSAGE, "Hello!")
    waits = open_conversation(new_lead(autonomy_level=AutonomyLevel.MANUAL), EntryPoint.SMS_REPLY)
    submit(waits, ActionType.SEND_MESSAGE, "Hello!").approve(by="dana")
    keys += [message.send_key for message in messages()]
    other = close_engine.connect(f"sqlite:///{tmp_path}/other.db")
    close_engine.migrate(standalone=True)
    submit(opened(), ActionType.SEND_MESSAGE, "Hello!")
    keys += [message.send_key for message in messages()]
    other.close()
    assert len(set(keys)) == 3
    assert all(len(key) >= 32 for key in keys)


def test_a10_a_key_of_one_thing_does_not_swallow_another(conversation_in: ConversationIn) -> None:
    """The key of an effect comes back with a text, and the other way round: an error, and nothing is lost silently."""
    conversation = conversation_in(Stage.QUALIFYING)
    outbox.enqueue(conversation, "draft_reply", "hi", key="reply:SM1")
    with pytest.raises(KeyReused):
        submit(conversation, ActionType.SEND_MESSAGE, "Hello!", key="reply:SM1")
    text = submit(conversation, ActionType.SEND_MESSAGE, "Hello!", key="SM2")
    assert submit(conversation, ActionType.SEND_MESSAGE, "Hello!", key="SM2").id == text.id
    with pytest.raises(KeyReused):
        outbox.enqueue(conversation, "draft_reply", "hi", key="SM2")


def test_a10_a_key_of_a_draft_belongs_to_its_type(conversation_in: ConversationIn) -> None:
    """The same, where both wait for approval."""
    conversation = conversation_in(Stage.PREVIEW_SENT, AutonomyLevel.MANUAL)
    submit(conversation, ActionType.SEND_MESSAGE, "Hello!", key="k")
    with pytest.raises(KeyReused):
        submit(conversation, ActionType.SEND_PREVIEW, "Here it is.", key="k", metadata={"previewUrl": "https://x"})


def test_a10_keys_of_the_library_are_out_of_reach(conversation_in: ConversationIn) -> None:
    """Nobody can take the key of an approval, an effect or an inbound text before the library does."""
    conversation = conversation_in(Stage.INITIATED)
    for use in (
        lambda key: outbox.enqueue(conversation, "effect", key=key),
        lambda key: submit(conversation, ActionType.SEND_MESSAGE, "Hello!", key=key),
        lambda key: conversation.start_qualifying(key=key),
    ):
        with pytest.raises(InvalidValue, match="this library's own"):
            use("close_engine:action:1")
    assert messages() == []


# -- A11: empty texts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
def test_a11_a_text_has_words(conversation_in: ConversationIn, text: str) -> None:
    """An empty text is refused wherever one comes in, and moves nothing."""
    conversation = conversation_in(Stage.INITIATED, AutonomyLevel.MANUAL)
    action = submit(conversation, ActionType.SEND_MESSAGE, "Hello!")
    assert isinstance(action, PendingAction)
    for use in (
        lambda: submit(conversation, ActionType.SEND_MESSAGE, text),
        lambda: outbox.enqueue(conversation, "SEND_MESSAGE", text),
        lambda: action.approve(by="dana", message=text),
    ):
        with pytest.raises(InvalidValue, match="a text must have words"):
            use()
    message = action.approve(by="dana")
    claimed().give_up("no")
    with pytest.raises(InvalidValue, match="a text must have words"):
        outbox.requeue(message, body=text)


# -- A12, A13: the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"])
def test_a12_the_worker_asks_for_a_sender(kind: str, database_url: str, conversation_in: ConversationIn) -> None:
    """Without a sender it does nothing; printing has to be named, and marks nothing."""
    message = outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!\x1b[2J")

    refused = run("--database", database_url, "worker", "--until-empty")
    assert (refused.code, refused.out) == (2, "")
    assert "--sender" in refused.err
    printed = run("--database", database_url, "worker", "--print")

    assert (printed.code, printed.err) == (0, "")
    assert printed.out.startswith(f"SEND_MESSAGE to lead {message.lead_id}: Hello!")
    assert "\x1b" not in printed.out
    close_engine.connect(database_url)
    (found,) = messages()
    assert (found.status, found.attempts, found.leased_by) == (MessageStatus.PENDING, 0, None)


async def send_later(message: OutboxMessage) -> str:
    return "SM1"


class Later:
    async def __call__(self, message: OutboxMessage) -> str:
        return "SM1"


class LaterByName:
    async def send(self, message: OutboxMessage) -> str:
        return "SM1"


@pytest.mark.parametrize("sender", [send_later, Later(), LaterByName()])
def test_a12_a_coroutine_function_is_no_sender(sender: Any) -> None:
    """Nobody would await it: refused when the worker is made, before anything is claimed."""
    with pytest.raises(ConfigurationError, match="coroutine function"):
        Worker(sender)


def test_a13_the_same_database_may_be_named_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender's module connects to the very database that the command line names."""
    url = f"sqlite:///{tmp_path}/prod.db"
    close_engine.connect(url)
    close_engine.migrate(standalone=True)
    submit(opened(), ActionType.SEND_MESSAGE, "Hello!")
    (tmp_path / "connecting_too.py").write_text(
        f"import close_engine\nclose_engine.connect({url!r})\ndef send(message):\n    return 'SM1'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    result = run("--database", url, "worker", "--sender", "connecting_too:send", "--until-empty", "--no-sweep")

    assert (result.code, result.err) == (0, "")
    close_engine.connect(url)
    assert statuses() == [MessageStatus.SENT]


@pytest.mark.parametrize("named", [True, False])
def test_a13_what_the_command_line_says_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    """The sender's module connects to another database when it is imported."""
    for name in ("prod", "other"):
        close_engine.connect(f"sqlite:///{tmp_path}/{name}.db")
        close_engine.migrate(standalone=True)
        submit(opened(), ActionType.SEND_MESSAGE, name)
        current().database.close()
    module = f"connecting_{named}"
    (tmp_path / f"{module}.py").write_text(
        f"import close_engine\nclose_engine.connect('sqlite:///{tmp_path}/other.db')\n"
        "def send(message):\n    return 'SM1'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    database = ["--database", f"sqlite:///{tmp_path}/prod.db"] if named else []
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", f"sqlite:///{tmp_path}/prod.db")

    result = run(*database, "worker", "--sender", f"{module}:send", "--until-empty", "--no-sweep")

    assert result.code == (1 if named else 0), result.err
    assert ("--database" in result.err) is named
    sent = []
    for name in ("prod", "other"):
        close_engine.connect(f"sqlite:///{tmp_path}/{name}.db")
        sent += [message.body for message in messages() if message.status is MessageStatus.SENT]
        current().database.close()
    assert sent == ([] if named else ["other"])


# -- B1, B3: pools, and connections that are not the worker's --------------------------------------------------------


def test_b1_a_pool_that_is_full_for_a_moment_is_waited_for(postgres_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """All connections but one are borrowed when the worker begins; it sends once one comes back."""
    url = postgres_url.replace("postgresql", "postgresql+pool", 1)
    pool = close_engine.connect(f"{url}{'&' if '?' in url else '?'}max_connections=4&timeout=1")
    submit(opened(), ActionType.SEND_MESSAGE, "Hello!")
    pool.close()
    release, borrowed = threading.Event(), threading.Semaphore(0)

    def borrow() -> None:
        pool.execute_sql("SELECT 1")
        borrowed.release()
        assert release.wait(LIMIT)

    borrowers = [Running(borrow) for _ in range(4)]
    for _ in borrowers:
        assert borrowed.acquire(timeout=LIMIT)
    worker = Worker(lambda message: worker.stop(), concurrency=1, sweep=None, idle=timedelta(milliseconds=10))
    running = threading.Thread(target=worker.run)
    running.start()
    until(lambda: "database unreachable" in caplog.text, "the worker waits for a connection")
    release.set()
    running.join(LIMIT)
    for borrower in borrowers:
        borrower.result()

    assert statuses() == [MessageStatus.SENT]
    pool.close()
    pool.close_all()  # type: ignore[attr-defined]


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+pool"])
def test_b3_a_worker_within_somebody_elses_connection(postgres_url: str, scheme: str) -> None:
    """The connection breaks while a message is sent: it is recorded, and the caller's connection is as it was."""
    database = close_engine.connect(postgres_url.replace("postgresql", scheme, 1))
    submit(opened(), ActionType.SEND_MESSAGE, "Hello!")
    database.close()

    def send(message: OutboxMessage) -> None:
        (pid,) = database.execute_sql("SELECT pg_backend_pid()").fetchone()
        query(postgres_url, "SELECT pg_terminate_backend(%s, 60000)", (pid,))

    with database.connection_context():
        assert send_all(send) == 1
        assert statuses() == [MessageStatus.SENT]
    if scheme.endswith("pool"):
        database.close_all()  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"])
def test_b3_a_worker_opens_its_own_connections(kind: str, database: peewee.Database, database_url: str) -> None:
    """With autoconnect=False, nobody else opens them."""
    submit(opened(), ActionType.SEND_MESSAGE, "Hello!")
    database.close()
    database.autoconnect = False
    try:
        assert send_all(FakeSender()) == 1
        with database.connection_context():
            assert statuses() == [MessageStatus.SENT]
    finally:
        database.autoconnect = True


# -- G6: forks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("scheme", ["sqlite", "postgresql", "postgresql+pool"])
def test_g6_a_forked_process_has_connections_of_its_own(
    scheme: str, inside: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Connected and migrated at import, then forked, as Celery and gunicorn --preload do it."""
    url = f"sqlite:///{tmp_path}/forked.db"
    if scheme != "sqlite":
        url = request.getfixturevalue("postgres_url").replace("postgresql", scheme, 1)
    database = close_engine.connect(url)
    close_engine.migrate(standalone=True)
    conversation = opened()

    def fork_two() -> list[int]:
        children = []
        for number in range(2):
            child = os.fork()
            if not child:
                try:
                    outbox.enqueue(conversation.id, "effect", key=str(number))
                    os._exit(0 if str(number) in {message.key for message in messages()} else 2)
                except BaseException:
                    os._exit(1)
            children.append(child)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    if inside:
        with database.atomic("DEFERRED") if scheme == "sqlite" else database.atomic():
            assert messages() == []
            assert fork_two() == [0, 0]
            assert database.in_transaction()
    else:
        assert fork_two() == [0, 0]

    assert sorted(str(message.key) for message in messages()) == ["0", "1"]
    database.close()
    if scheme.endswith("pool"):
        database.close_all()  # type: ignore[attr-defined]


def child_exits_with(work: Callable[[], int]) -> int:
    """The exit code of a forked process that does this, or 1 if it fails."""
    child = os.fork()
    if not child:
        try:
            os._exit(work())
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+pool"])
def test_g6_a_database_that_was_bound_before_is_not_shared_either(
    scheme: str, postgres_url: str, tmp_path: Path
) -> None:
    """Another database was bound since; who asks the first one in a forked process is not heard by its parent."""
    first = close_engine.connect(postgres_url.replace("postgresql", scheme, 1))
    mine = first.execute_sql("SELECT pg_backend_pid()").fetchone()
    close_engine.connect(f"sqlite:///{tmp_path}/second.db")

    def ask() -> int:
        return 0 if first.execute_sql("SELECT pg_backend_pid()").fetchone() != mine else 2

    assert [child_exits_with(ask) for _ in range(2)] == [0, 0]
    assert first.execute_sql("SELECT pg_backend_pid()").fetchone() == mine
    first.close()
    if scheme.endswith("pool"):
        first.close_all()  # type: ignore[attr-defined]


def test_g6_a_fork_within_a_transaction_on_sqlite(tmp_path: Path) -> None:
    """The parent holds the write lock: the child is no part of its transaction, and ends nothing."""
    file = tmp_path / "crm.db"
    database = close_engine.bind(peewee.SqliteDatabase(str(file), timeout=0.05, pragmas={"journal_mode": "wal"}))
    close_engine.migrate(standalone=True)
    conversation = opened()

    def look() -> int:
        assert not database.in_transaction()
        assert messages() == []
        with pytest.raises(peewee.OperationalError, match="database is locked"):
            outbox.enqueue(conversation.id, "of the child")
        return 0

    with close_engine.atomic():
        outbox.enqueue(conversation, "of the parent")
        assert child_exits_with(look) == 0
        assert database.in_transaction()

    assert [message.topic for message in messages()] == ["of the parent"]
    assert database.execute_sql("PRAGMA integrity_check").fetchone() == ("ok",)
    assert close_engine.verify() == []
    database.close()


@pytest.mark.parametrize("kind", [peewee.PostgresqlDatabase, PooledPostgresqlDatabase])
def test_g6_a_fork_while_another_thread_connects(kind: type[peewee.PostgresqlDatabase]) -> None:
    """Celery replaces a process of its pool while a thread waits for a database that is away: that one can connect."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(LIMIT)
        host, port = silent.getsockname()
        database = close_engine.bind(kind("crm", host=host, port=port, user="nobody", sslmode="disable"))

        def try_to_connect() -> None:
            with pytest.raises(peewee.OperationalError):
                database.connect()

        first = threading.Thread(target=try_to_connect)
        first.start()
        of_the_thread, _ = silent.accept()
        child = os.fork()
        if not child:
            try:
                silent.close()
                of_the_thread.close()
                signal.alarm(10)  # it ends one that hangs
                try_to_connect()
                os._exit(0)
            except BaseException:
                os._exit(1)
        try:
            silent.settimeout(15)
            of_the_child, _ = silent.accept()
            of_the_child.close()
        finally:
            of_the_thread.close()
            first.join(LIMIT)
            status = os.waitpid(child, 0)[1]
        assert os.waitstatus_to_exitcode(status) == 0


# -- B2, G2: trouble is told apart by its code -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "code", "passes"),
    [
        ("SET TRANSACTION READ ONLY; CREATE TABLE one (id int)", "25006", True),
        ("SET LOCAL lock_timeout = 1; LOCK TABLE leads", "55P03", True),
        ("SET LOCAL statement_timeout = 1; SELECT pg_sleep(60)", "57014", False),
        ("SELECT currval('close_engine.history_id_seq')", "55000", False),
        ("SELECT * FROM no_such_table", "42P01", False),
        ("SELEC", "42601", False),
        ("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$", "40001", True),
        ("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '53300'; END $$", "53300", True),
        ("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '57P01'; END $$", "57P01", True),
        ("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '08006'; END $$", "08006", True),
    ],
)
def test_b2_whether_an_error_passes_is_told_by_its_code(
    postgres: peewee.Database, postgres_url: str, statement: str, code: str, passes: bool
) -> None:
    """A read-only server, a lock or a full server pass; a wrong statement or its time limit do not."""
    rival = psycopg2.connect(postgres_url)
    rival.cursor().execute("LOCK TABLE leads")
    with pytest.raises(peewee.PeeweeException) as failed, postgres.atomic():
        postgres.execute_sql(statement)
    rival.close()
    assert close_engine.errors.sqlstate(failed.value) == code
    assert is_transient(failed.value) is passes


def test_b2_what_has_no_code(postgres: peewee.Database) -> None:
    """No connection passes, and a pool that is full does; an error of Python's own does not."""
    assert is_transient(peewee.OperationalError("connection refused"))
    assert is_transient(peewee.InterfaceError("connection already closed"))
    assert is_transient(MaxConnectionsExceeded("Exceeded maximum connections."))
    assert not is_transient(ValueError("no"))


def test_b2_a_server_that_turns_read_only_is_waited_for(
    postgres: peewee.Database, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The text left, and the server is read-only when it is recorded: it is recorded later, and sent once."""
    submit(opened(), ActionType.SEND_MESSAGE, "Hello!")
    name = current().database.database
    sent = []

    def send(message: OutboxMessage) -> str:
        sent.append(message.id)
        query(postgres_url, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
        postgres.close()  # the next connection is read-only
        return "SM1"

    running = Running(lambda: send_all(send, concurrency=1))
    until(lambda: "database unreachable" in caplog.text, "the worker waits")
    with psycopg2.connect(postgres_url) as connection, connection.cursor() as cursor:
        cursor.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE")
        connection.commit()
        connection.autocommit = True
        cursor.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')
    connection.close()

    assert running.result() == 1
    assert len(sent) == 1
    assert statuses() == [MessageStatus.SENT]


@pytest.mark.parametrize("failure", ["SELECT * FROM no_such_table", "SELEC", "SET LOCAL statement_timeout = 1"])
def test_g2_an_error_in_recording_is_no_outage(database: peewee.Database, failure: str) -> None:
    """A hook meets an error of the database's that no waiting helps against: the text is recorded, with its refusal."""
    if failure.startswith("SET") and isinstance(database, peewee.SqliteDatabase):
        failure = "SELECT no_such_function()"
    message = submit(opened(), ActionType.SEND_MESSAGE, "Hello!")

    @on_enter(Stage.QUALIFYING)
    def fail(conversation: CloseEngineConversation, change: object) -> None:
        current().database.execute_sql(failure)
        current().database.execute_sql("SELECT pg_sleep(60)")

    sender = FakeSender()
    try:
        send_all(sender, concurrency=1)
        send_all(sender, concurrency=1)
    finally:
        fail.remove()

    (found,) = messages()
    assert (found.id, found.status, len(sender.sent)) == (message.id, MessageStatus.SENT, 1)
    assert found.refusal is not None


# -- B4: clocks that differ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minutes", [-10, 2, 10])
def test_b4_a_worker_whose_clock_is_wrong_takes_nothing_from_others(
    database: peewee.Database, close_engine_clock: MovableClock, minutes: int
) -> None:
    """What is leased, due or silent is judged by the database's clock."""
    conversation = opened()
    submit(conversation, ActionType.SEND_MESSAGE, "Hello!")
    outbox.enqueue(conversation, "later", send_after=timedelta(minutes=1))
    first = claimed("first")
    wrong = close_engine_clock.now + timedelta(minutes=minutes)
    close_engine.bind(database, clock=lambda: wrong)

    close_engine.sweep()
    assert outbox.claim(10, worker="second") == []
    second = outbox.enqueue(conversation, "now")
    assert [message.topic for message in outbox.claim(10, worker="second")] == ["now"]

    close_engine.bind(database, clock=close_engine_clock)
    first.sent("SM1")
    assert OutboxMessage.get_by_id(second.id).leased_by == "second"
    close_engine_clock.move(MINUTE)
    assert [message.topic for message in outbox.claim(10, topics=["later"])] == ["later"]


@pytest.mark.parametrize("minutes", [-10, 10])
def test_b4_an_approver_whose_clock_is_wrong_expires_nothing(
    database: peewee.Database, close_engine_clock: MovableClock, minutes: int
) -> None:
    """A draft can be approved for a minute: until that is over by the database's clock."""
    conversation = open_conversation(new_lead(autonomy_level=AutonomyLevel.MANUAL), EntryPoint.SMS_REPLY)
    wrong = close_engine_clock.now + timedelta(minutes=minutes)
    close_engine.bind(database, clock=lambda: wrong)
    action = submit(conversation, ActionType.SEND_MESSAGE, "Hello!", expires_after=MINUTE)
    assert isinstance(action, PendingAction)
    assert [waiting.id for waiting in close_engine.pending_actions()] == [action.id]
    assert close_engine.expire_actions() == []
    other = submit(conversation, ActionType.SEND_MESSAGE, "Hello again!", expires_after=MINUTE)
    assert isinstance(other, PendingAction)
    assert action.approve(by="dana").status is MessageStatus.PENDING

    current().dialect.set_clock(database, stored_time(close_engine_clock.now + MINUTE))
    assert list(close_engine.pending_actions()) == []
    with pytest.raises(ActionDecided):
        other.approve(by="dana")
    assert close_engine.expire_actions() == [other.id]


# -- B6: retries end too early ---------------------------------------------------------------------------------------


def test_b6_a_provider_that_is_away_for_three_hours(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    """Every opener leaves once the provider is back, and no second text before its first."""
    conversations = [conversation_in(Stage.QUALIFYING) for _ in range(3)]
    for text in ("first", "second"):
        for conversation in conversations:
            outbox.enqueue(conversation, "SEND_MESSAGE", text)
    back, sent = close_engine_clock.now + timedelta(hours=3), []

    def send(message: OutboxMessage) -> None:
        if close_engine_clock.now < back:
            raise ConnectionError("503")
        sent.append((message.conversation_id, message.body))

    while len(sent) < 6:
        send_all(send, concurrency=1)
        close_engine_clock.move(timedelta(minutes=5))
        assert close_engine_clock.now < back + timedelta(hours=2)

    assert [body for _, body in sorted(sent, key=lambda one: one[0])] == ["first", "second"] * 3
