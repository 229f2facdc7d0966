"""Inputs that once failed, one test per case, by its number: tasks, isolation levels, bindings and connections."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode, urlsplit

import greenlet
import peewee
import pytest
import uvicorn

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    EntryPoint,
    Lead,
    MessageStatus,
    OutboxMessage,
    Stage,
    StageChange,
    StageConflict,
    TransactionOfAnotherTask,
    atomic,
    locked,
    outbox,
    submit,
)
from close_engine.database.binding import current, is_transient
from close_engine.database.url import database_from
from close_engine.errors import sqlstate
from close_engine.schema import status
from close_engine.testing import FakeSender, bring_to, new_lead
from close_engine.worker import Worker
from tests.prose import ROOT, blocks
from tests.rows import Stop, copy_of, in_memory, left_by_an_error, stored, triggers
from tests.servers import execute, postgres_database
from tests.waiting import LIMIT, Running, until, until_they_wait
from tests.workers import LINK, held, messages, race, sql

ConversationIn = Callable[..., CloseEngineConversation]
Opened = Callable[[], AbstractContextManager[Any]]

# F1: two asyncio tasks, or two greenlets, in one thread.


def peewees_own() -> AbstractContextManager[Any]:
    block: AbstractContextManager[Any] = current().database.atomic()
    return block


def save(conversation: CloseEngineConversation) -> None:
    conversation.edit_rounds = 3
    conversation.save()


def enter_atomic(conversation: CloseEngineConversation) -> None:
    with atomic():
        raise AssertionError("this block belongs to somebody else's transaction")


#: Everything that a second task may try while the first has a transaction open.
WRITES: dict[str, Callable[[CloseEngineConversation], object]] = {
    "atomic": enter_atomic,
    "fire": lambda c: c.start_building(),
    "save": save,
    "submit": lambda c: submit(c, ActionType.SEND_MESSAGE, "Hello!"),
    "enqueue": lambda c: outbox.enqueue(c, "draft_reply", "Hello!"),
    "receive": lambda c: close_engine.receive(c.lead_id, "SM1", "Hello!"),
    "record": lambda c: c.record(questions=["budget"]),
    "locked": lambda c: locked(c.id).__enter__(),
    "open": lambda c: close_engine.open_conversation(c.lead_id, EntryPoint.SMS_REPLY),
    "create": lambda c: Lead.create(phone="+1"),
    "update": lambda c: Lead.update(phone="+1").execute(),
    "delete": lambda c: c.delete_instance(),
    "claim": lambda c: outbox.claim(),
    "take_over": lambda c: c.take_over(by="owner"),
    "opt_out": lambda c: close_engine.opt_out(c.lead_id, source="call"),
    "opt_in": lambda c: close_engine.opt_in(c.lead_id, source="call"),
    "subscribe": lambda c: close_engine.subscribe("build_site", stages=[Stage.BUILDING]),
    "pay": lambda c: close_engine.record_payment(c.lead_id, "pi_1"),
    "sweep": lambda c: close_engine.sweep(),
}


def everything() -> list[Any]:
    """What the tables hold that a task could have written."""
    models = (CloseEngineConversation, Lead, OutboxMessage, StageChange, close_engine.InboxEntry)
    return [sorted(map(repr, model.select().tuples())) for model in models]


def assert_refused(conversation: CloseEngineConversation) -> TransactionOfAnotherTask:
    """Try every write, and return the error of the last."""
    before = everything()
    for name, write in WRITES.items():
        tried = copy_of(conversation)
        with pytest.raises(TransactionOfAnotherTask) as refused:
            write(tried)
        assert (name, everything(), tried.stage) == (name, before, conversation.stage)
    return refused.value


@pytest.mark.parametrize("opened", [atomic, peewees_own])
def test_f1_a_task_does_not_write_in_the_transaction_of_another_task(
    opened: Opened, conversation_in: ConversationIn
) -> None:
    """The first task reported success, and both were rolled back."""
    first, second = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)

    async def main() -> TransactionOfAnotherTask:
        is_open, is_refused = asyncio.Event(), asyncio.Event()

        async def open_and_wait() -> None:
            with opened():
                is_open.set()
                await is_refused.wait()
                first.start_building()

        async def write_meanwhile() -> TransactionOfAnotherTask:
            await is_open.wait()
            try:
                return assert_refused(second)
            finally:
                is_refused.set()

        opening = asyncio.create_task(open_and_wait(), name="first")
        writing = asyncio.create_task(write_meanwhile(), name="second")
        return (await asyncio.gather(opening, writing))[1]

    refused = asyncio.run(main())

    assert (refused.opened_by, refused.task) == ("task 'first'", "task 'second'")
    assert stored(first)["stage"] is Stage.BUILDING
    assert triggers(second) == ["open", "start_qualifying"]
    second.start_building()


def test_f1_a_refused_task_takes_nothing_of_the_other_along(conversation_in: ConversationIn) -> None:
    """The case as it was found: each opens a transaction and waits in it, and the second fails."""
    first, second = conversation_in(Stage.INITIATED), conversation_in(Stage.INITIATED)

    async def main() -> Any:
        together = asyncio.Event()

        async def work(conversation: CloseEngineConversation, wait: bool) -> None:
            with atomic():
                conversation.start_qualifying()
                if wait:
                    await together.wait()
                submit(conversation, ActionType.SEND_MESSAGE, "Hello!")

        async def work_and_let_go() -> None:
            try:
                await work(second, wait=False)
            finally:
                together.set()

        return await asyncio.gather(work(first, wait=True), work_and_let_go(), return_exceptions=True)

    worked, refused = asyncio.run(main())

    assert worked is None
    assert isinstance(refused, TransactionOfAnotherTask)
    assert (first.stage, second.stage) == (Stage.QUALIFYING, Stage.INITIATED)
    assert stored(first)["stage"] is Stage.QUALIFYING
    assert stored(second)["stage"] is Stage.INITIATED
    assert [message.conversation_id for message in messages()] == [first.id]


def test_f1_a_task_may_read_and_do_all_once_the_other_has_ended(conversation_in: ConversationIn) -> None:
    """Reading mixes nothing, and the savepoints of the task that opened it are its own."""
    first, second = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)

    async def main() -> None:
        is_open, is_read = asyncio.Event(), asyncio.Event()

        async def write() -> None:
            with atomic():
                with atomic():
                    first.start_building()
                is_open.set()
                await is_read.wait()
                with left_by_an_error(atomic()):
                    first.send_preview()
            assert first.stage is Stage.BUILDING

        async def read() -> None:
            await is_open.wait()
            assert copy_of(second).stage is Stage.QUALIFYING
            assert len(list(close_engine.pending_actions())) == 0
            second.reload()
            is_read.set()

        await asyncio.gather(write(), read())
        with atomic():
            second.start_building()
        await asyncio.gather(asyncio.to_thread(lambda: None))

    asyncio.run(main())

    assert triggers(second)[-1] == triggers(first)[-1] == "start_building"


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"])
def test_f1_async_code_calls_it_in_threads(kind: str, conversation_in: ConversationIn) -> None:
    """The way that works: as many tasks as one likes, each with a transaction of its own, and half of them fail."""
    conversations = [conversation_in(Stage.QUALIFYING) for _ in range(12)]
    database = current().database

    def work(number: int) -> None:
        with database.connection_context(), atomic():
            conversations[number].start_building()
            submit(conversations[number], ActionType.SEND_MESSAGE, "Hello!")
            if number % 2:
                raise Stop

    async def main() -> Any:
        tasks = [asyncio.to_thread(work, number) for number in range(12)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    ended = asyncio.run(main())

    assert [isinstance(outcome, Stop) for outcome in ended] == [False, True] * 6
    assert [conversation.stage for conversation in conversations] == [Stage.BUILDING, Stage.QUALIFYING] * 6
    assert [stored(conversation)["stage"] for conversation in conversations] == [Stage.BUILDING, Stage.QUALIFYING] * 6
    assert {message.conversation_id for message in messages()} == {
        conversation.id for conversation in conversations[::2]
    }


def test_f1_an_event_loop_inside_a_transaction_is_part_of_it(conversation_in: ConversationIn) -> None:
    """A hook or a fixture opens a transaction and runs a loop in it: its tasks write there, but not in each other's."""
    first, second = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)

    async def main() -> None:
        is_open, is_refused = asyncio.Event(), asyncio.Event()
        first.start_building()

        async def hold() -> None:
            with atomic():
                is_open.set()
                await is_refused.wait()

        async def write() -> None:
            await is_open.wait()
            with pytest.raises(TransactionOfAnotherTask):
                second.start_building()
            is_refused.set()

        await asyncio.gather(hold(), write())
        await asyncio.gather(asyncio.create_task(write_after()))

    async def write_after() -> None:
        second.start_building()

    before = in_memory(first), in_memory(second)
    with left_by_an_error(atomic()):
        asyncio.run(main())
        assert (first.stage, second.stage) == (Stage.BUILDING, Stage.BUILDING)

    assert (in_memory(first), in_memory(second)) == before
    assert triggers(first) == triggers(second) == ["open", "start_qualifying"]


@pytest.mark.parametrize("opened", [atomic, peewees_own])
def test_f1_a_greenlet_does_not_write_in_the_transaction_of_another_greenlet(
    opened: Opened, conversation_in: ConversationIn
) -> None:
    """A variant: gevent and eventlet switch greenlets in one thread, as asyncio switches tasks."""
    first, second = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    main = greenlet.getcurrent()

    def open_and_wait() -> None:
        with opened():
            main.switch()
            first.start_building()

    one, other = greenlet.greenlet(open_and_wait), greenlet.greenlet(assert_refused)
    one.switch()
    refused = other.switch(second)
    assert refused.opened_by.startswith("greenlet ")
    assert refused.task.startswith("greenlet ")
    assert refused.task != refused.opened_by
    assert assert_refused(second).task == "the thread's own code"
    one.switch()

    assert stored(first)["stage"] is Stage.BUILDING
    assert triggers(second) == ["open", "start_qualifying"]


def test_f1_the_main_greenlet_owns_its_transaction_too(conversation_in: ConversationIn) -> None:
    """A variant: what the thread's own code opened is not a greenlet's."""
    conversation = conversation_in(Stage.QUALIFYING)
    with atomic():
        with pytest.raises(TransactionOfAnotherTask) as refused:
            greenlet.greenlet(conversation.start_building).switch()
        assert refused.value.opened_by == "the thread's own code"
        conversation.start_building()

    assert stored(conversation)["stage"] is Stage.BUILDING


#: Two greenlets, each in a transaction of its own while the other is in one; the second one fails.
GEVENT = """
from gevent import monkey

monkey.patch_all()

import sys
import threading

import gevent

import close_engine

database = close_engine.connect(sys.argv[1])
together = threading.Barrier(2)


@database.connection_context()
def work(conversation_id, fails):
    conversation = close_engine.CloseEngineConversation.get_by_id(conversation_id)
    with close_engine.atomic():
        conversation.start_building()
        together.wait()
        if fails:
            raise RuntimeError(conversation_id)


works, fails = [gevent.spawn(work, sys.argv[2], False), gevent.spawn(work, sys.argv[3], True)]
gevent.joinall([works, fails])
assert (works.exception, repr(fails.exception)) == (None, repr(RuntimeError(sys.argv[3])))
"""


def test_f1_gevents_greenlets_have_a_connection_each_if_it_is_patched_first(
    postgres: peewee.Database, postgres_url: str
) -> None:
    """A variant: the way that works with gevent, as documented."""
    kept, undone = opened(Stage.QUALIFYING), opened(Stage.QUALIFYING)

    program = [sys.executable, "-c", GEVENT, postgres_url, kept.id, undone.id]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=LIMIT)

    assert done.returncode == 0, done.stderr
    assert (copy_of(kept).stage, copy_of(undone).stage) == (Stage.BUILDING, Stage.QUALIFYING)


def test_f1_nothing_is_imported_to_tell_tasks_apart() -> None:
    """A program without tasks does not pay for them."""
    program = (
        "import sys; from close_engine.database.tasks import running; "
        "[sys.modules.pop(name) for name in list(sys.modules) if name.split('.')[0] in ('asyncio', 'greenlet')]; "
        "assert running() is None; assert not {'asyncio', 'greenlet'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=LIMIT)

    assert done.returncode == 0, done.stderr


# F6: databases whose default isolation level is stricter.

LEVELS = ("REPEATABLE READ", "SERIALIZABLE")
RACERS = 6


@pytest.fixture(params=LEVELS)
def strict(request: pytest.FixtureRequest, postgres_url: str) -> Iterator[peewee.Database]:
    """A PostgreSQL database whose transactions are strict, unless they say otherwise."""
    name = close_engine.connect(postgres_url).connect_params.get("dbname") or current().database.database
    execute(postgres_url, f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = '{request.param.lower()}'")
    database = close_engine.connect(postgres_url)
    assert sql("SHOW transaction_isolation") == [(request.param.lower(),)]
    yield database
    database.close()


def opened(stage: Stage, **lead: Any) -> CloseEngineConversation:
    return bring_to(close_engine.open_conversation(new_lead(**lead), EntryPoint.SMS_REPLY), stage)


def conflicts(outcomes: list[Any]) -> int:
    """How many lost the race as documented; nobody got another error."""
    lost = [outcome for outcome in outcomes if isinstance(outcome, StageConflict)]
    assert all(conflict.found is not None for conflict in lost)
    assert [outcome for outcome in outcomes if isinstance(outcome, Exception) and outcome not in lost] == []
    return len(lost)


def test_f6_a_transaction_that_we_begin_is_read_committed(strict: peewee.Database) -> None:
    """What another one commits meanwhile is seen, as everything in this library needs it."""
    lead = new_lead()
    with atomic():
        assert sql("SHOW transaction_isolation") == [("read committed",)]
        Running(lambda: Lead.update(phone="+1").where(Lead.id == lead.id).execute()).result()
        assert copy_of(lead).phone == "+1"
        with atomic():
            pass
    with strict.atomic():
        assert sql("SHOW transaction_isolation") != [("read committed",)]


def test_f6_the_guarded_write_loses_its_race_as_documented(strict: peewee.Database) -> None:
    """It leaked "could not serialize". One wins; the others are told what they found."""
    conversation = opened(Stage.QUALIFYING)
    for lose in (lambda c: c.start_building(), save):
        copies = [copy_of(conversation) for _ in range(RACERS)]
        outcomes = race([partial(lose, copy) for copy in copies], behind=held(conversation))
        assert conflicts(outcomes) == RACERS - 1
    assert triggers(conversation)[-1:] == ["start_building"]


def test_f6_a_key_that_came_twice_is_one_change(strict: peewee.Database) -> None:
    """A variant: every racer gets the first result."""
    conversation = opened(Stage.QUALIFYING)
    copies = [copy_of(conversation) for _ in range(RACERS)]

    changes = race([partial(copy.start_building, key="SM1") for copy in copies], behind=held(conversation))

    assert {change.id for change in changes} == {conversation.history()[-1].id}


def test_f6_whoever_waits_for_the_row_gets_it(strict: peewee.Database) -> None:
    """`locked()` failed in 24 of 32, `receive()` in 5 of 32: nobody may lose where nobody decides on a copy."""
    conversation = opened(Stage.QUALIFYING)

    def count() -> None:
        with locked(conversation.id) as found:
            found.edit_rounds += 1
            found.save()

    for work in (
        lambda number: count(),
        lambda number: close_engine.receive(conversation.lead_id, f"SM{number}", "Hello!"),
        lambda number: copy_of(conversation).record(questions=[f"question {number}"]),
        lambda number: outbox.enqueue(conversation.id, f"topic {number}", "Hello!"),
    ):
        outcomes = race([partial(work, number) for number in range(RACERS)], behind=held(conversation))
        assert conflicts(outcomes) == 0
    stored_now = copy_of(conversation)
    assert stored_now.edit_rounds == len(stored_now.questions_asked) == RACERS
    assert len(messages()) == close_engine.InboxEntry.select().count() == RACERS


def test_f6_two_openings_at_once_are_one(strict: peewee.Database) -> None:
    """`open_conversation()` failed in 19 of 32."""
    lead = new_lead()

    outcomes = race(
        [partial(close_engine.open_conversation, lead.id, EntryPoint.SMS_REPLY)] * RACERS, behind=held(lead)
    )

    assert len({conversation.id for conversation in outcomes}) == 1
    assert triggers(outcomes[0]) == ["open"]


def test_f6_claims_and_decisions_lose_nothing(strict: peewee.Database) -> None:
    """A variant: what the worker and the owner do, at once."""
    conversations = [opened(Stage.INITIATED, autonomy_level=AutonomyLevel.MANUAL) for _ in range(RACERS)]
    actions = [submit(conversation, ActionType.SEND_MESSAGE, "Hello!") for conversation in conversations]

    for decide in (lambda action: copy_of(action).approve(by="dana"), lambda action: copy_of(action).approve(by="eve")):
        outcomes = race([partial(decide, actions[0])] * RACERS)
        assert {message.id for message in outcomes} == {messages()[0].id}
    race([partial(action.approve, by="dana") for action in actions[1:]])

    def work() -> int:
        sent = 0
        while claimed := outbox.claim(worker=threading.current_thread().name):
            for message in claimed:
                message.sent(provider_id=f"SM{message.id}")
                sent += 1
        return sent

    assert sum(race([work] * RACERS)) == RACERS
    assert {copy_of(conversation).stage for conversation in conversations} == {Stage.QUALIFYING}


@pytest.mark.parametrize("level", LEVELS)
def test_f6_processes_that_migrate_at_once_take_turns(level: str, server: str) -> None:
    """A variant: whoever waits for the lock must see what was migrated meanwhile."""
    with postgres_database(server) as url:
        name = urlsplit(url).path.removeprefix("/")
        execute(url, f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = '{level.lower()}'")
        database = close_engine.connect(url)

        ran = race([partial(close_engine.migrate, standalone=True)] * 3)

        assert sorted(map(len, ran)) == [0, 0, len(status())]
        assert close_engine.verify() == []
        database.close()


def test_f6_workers_send_and_sweep(strict: peewee.Database, fake_sender: FakeSender) -> None:
    """A variant: several workers, each with several senders, have nothing to complain about."""
    conversations = [opened(Stage.INITIATED) for _ in range(RACERS)]
    for conversation in conversations:
        submit(conversation, ActionType.SEND_MESSAGE, "Hello!")
        outbox.enqueue(conversation, "draft_reply", "Hello!")

    sent = race([Worker(fake_sender, concurrency=2).run_until_empty] * 3)

    assert sum(sent) == len(fake_sender.sent) == 2 * RACERS
    assert {message.status for message in messages()} == {MessageStatus.SENT}
    assert {message.attempts for message in messages()} == {1}
    assert {copy_of(conversation).stage for conversation in conversations} == {Stage.QUALIFYING}


LOSING: dict[str, Callable[[CloseEngineConversation], object]] = {
    "fire": lambda c: c.start_building(),
    "save": save,
    "submit": lambda c: submit(c, ActionType.SEND_MESSAGE, "Hello!", key="reply"),
    "locked": lambda c: locked(c.id).__enter__(),
    "receive": lambda c: close_engine.receive(c.lead_id, "SM1", "Hello!"),
    "record": lambda c: c.record(questions=["budget"]),
    "enqueue": lambda c: outbox.enqueue(c, "draft_reply", "Hello!"),
    "approve": lambda c: close_engine.pending_actions(c).get().approve(by="dana"),
    "take_over": lambda c: c.take_over(by="owner"),
    "opt_out": lambda c: close_engine.opt_out(c.lead_id, source="call"),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("lose", LOSING.values(), ids=LOSING)
def test_f6_in_a_callers_stricter_transaction_a_lost_race_finds_nothing(
    level: str, lose: Callable[[CloseEngineConversation], object], postgres: peewee.Database
) -> None:
    """The transaction cannot see what the other one wrote: it is rolled back, and memory with it."""
    conversation = opened(Stage.QUALIFYING)
    submit(conversation, ActionType.SEND_MESSAGE, "A draft", policy=lambda level, type: True)
    copy = copy_of(conversation)

    def begin_and_lose() -> None:
        with postgres.atomic(level):
            assert copy_of(conversation).stage is Stage.QUALIFYING
            Running(copy_of(conversation).collect_info).result()
            lose(copy)

    with pytest.raises(StageConflict) as lost:
        begin_and_lose()

    assert lost.value.found is None
    assert "begin again" in str(lost.value)
    assert is_transient(lost.value)
    if lose is LOSING["fire"]:
        assert (lost.value.conversation_id, lost.value.operation) == (conversation.id, "start_building")
        assert lost.value.expected is Stage.QUALIFYING
    assert copy.stage is Stage.QUALIFYING
    assert triggers(conversation)[-1] == "collect_info"
    assert messages() == []


@pytest.mark.parametrize("level", ["READ COMMITTED", *LEVELS])
@pytest.mark.parametrize("end", ["REJECTED", "EXPIRED", "deleted"])
def test_f6_two_links_that_end_at_once_leave_nothing_behind(level: str, end: str, postgres: peewee.Database) -> None:
    """Both committed, and PENDING_APPROVAL stayed with nothing waiting. Now the second decides right, or fails."""
    conversation = opened(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.MANUAL)
    first, second = (
        submit(copy_of(conversation), ActionType.SEND_PAYMENT_LINK, "Pay!", metadata={"paymentUrl": LINK})
        for _ in range(2)
    )
    assert copy_of(conversation).stage is Stage.PENDING_APPROVAL

    def finish(action: Any) -> None:
        if end == "deleted":
            sql("DELETE FROM pending_actions WHERE id = %s", action.id)
        else:
            sql("UPDATE pending_actions SET status = %s WHERE id = %s", end, action.id)

    def finish_second() -> None:
        with postgres.atomic(level):
            sql("SELECT count(*) FROM pending_actions")  # from now on, a strict one sees nothing new
            seen.set()
            finish(second)

    seen = threading.Event()
    with postgres.atomic(level):
        finish(first)
        late = Running(finish_second)
        assert seen.wait(LIMIT)
        until_they_wait([late])
    outcome = late.result()

    if level == "READ COMMITTED":
        assert outcome is None
    else:
        assert sqlstate(outcome) == "40001"
        assert copy_of(conversation).stage is Stage.PENDING_APPROVAL
        finish(second)
    assert copy_of(conversation).stage is Stage.PREVIEW_SENT
    assert list(close_engine.pending_actions()) == []


def test_f6_a_decision_writes_the_conversation_even_if_another_link_waits(conversation_in: ConversationIn) -> None:
    """A variant, on every database: whoever decided on the conversation before has a conflict."""
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.MANUAL)
    actions = [
        submit(copy_of(conversation), ActionType.SEND_PAYMENT_LINK, "Pay!", metadata={"paymentUrl": LINK})
        for _ in range(3)
    ]
    for end in (lambda: actions[0].reject(by="dana"), actions[1].delete_instance):
        before = copy_of(conversation)
        end()
        with pytest.raises(StageConflict):
            before.stall()
        assert copy_of(conversation).stage is Stage.PENDING_APPROVAL
    actions[2].reject(by="dana", reason="too dear")

    assert triggers(conversation)[-2:] == ["request_approval", "withdraw_approval"]
    assert conversation.history()[-1].actor == "dana"


# F3: one object, one database.


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[peewee.Database]:
    """A second migrated database. What the test has bound stays bound."""
    bound = current()
    database = close_engine.connect(f"sqlite:///{tmp_path}/staging.db")
    close_engine.migrate(standalone=True)
    close_engine.bind(bound.database, clock=bound.clock)
    yield database
    database.close()


def counts(database: peewee.Database) -> list[Any]:
    tables = ("leads", "close_engine_conversations", "pending_actions")
    return [database.execute_sql(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables]


MOVES: dict[str, Callable[[peewee.Database], Any]] = {
    "bind_ctx of all": lambda staging: staging.bind_ctx([CloseEngineConversation, Lead, StageChange]),
    "bind_ctx of one": lambda staging: CloseEngineConversation.bind_ctx(staging),
    "bind": lambda staging: Lead.bind(staging),
    "bind to nothing": lambda staging: OutboxMessage.bind(cast(Any, None)),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_f3_the_models_are_not_moved_from_the_triggers(
    move: Callable[[peewee.Database], Any], conversation_in: ConversationIn, staging: peewee.Database
) -> None:
    """`save()` went to staging, and `start_building()` changed production."""
    conversation = conversation_in(Stage.QUALIFYING)
    database = current().database
    before = stored(conversation), counts(database), counts(staging)

    def work() -> None:
        moved = move(staging)
        with moved:
            conversation.save()
            conversation.start_building()

    with pytest.raises(close_engine.ConfigurationError, match=r"call close_engine\.bind\(database\)"):
        work()

    assert (stored(conversation), counts(database), counts(staging)) == before
    conversation.start_building()
    assert stored(conversation)["stage"] is Stage.BUILDING
    close_engine.bind(staging)
    assert CloseEngineConversation.select().count() == Lead.select().count() == 0
    close_engine.bind(database)


def test_f3_models_of_the_users_own_move_without_ours(
    conversation_in: ConversationIn, staging: peewee.Database
) -> None:
    """A variant: Peewee moves along what a model refers to, unless it is told not to."""

    class Invoice(peewee.Model):
        lead = peewee.ForeignKeyField(Lead)

        class Meta:
            database = current().database

    conversation, database = conversation_in(Stage.QUALIFYING), current().database
    with pytest.raises(close_engine.ConfigurationError, match="bind_refs=False"), staging.bind_ctx([Invoice]):
        raise AssertionError("Lead is not on staging")
    Invoice.bind(database)
    with staging.bind_ctx([Invoice], bind_refs=False, bind_backrefs=False):
        Invoice.create_table()
        staging.execute_sql("INSERT INTO leads (id) VALUES (?)", (conversation.lead_id,))
        Invoice.create(lead=conversation.lead_id)
        conversation.start_building()
    with database.bind_ctx([Invoice, Lead, CloseEngineConversation]):
        conversation.send_preview()

    assert stored(conversation)["stage"] is Stage.PREVIEW_SENT
    assert counts(staging) == [1, 0, 0]
    assert staging.execute_sql("SELECT lead_id FROM invoice").fetchall() == [(conversation.lead_id,)]


# F5: FastAPI.


@pytest.fixture(params=["sqlite", "postgresql", "postgresql+pool"])
def served(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a real server that runs the page's app."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "crm.db")
        url = f"sqlite:///{tmp_path}/crm.db"
    else:
        url = request.getfixturevalue("postgres_url").replace("postgresql", request.param, 1)
        url += f"{'&' if '?' in url else '?'}max_connections={POOL}" if "pool" in request.param else ""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", url)
    names: dict[str, Any] = {"__name__": "api"}
    for example in blocks(ROOT / "docs/fastapi.md"):
        if example.language == "python" and "FastAPI" not in names:
            exec(compile(example.text, "docs/fastapi.md", "exec"), names)
    current().database.close()

    server = uvicorn.Server(uvicorn.Config(names["app"], port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started, "the server is up")
    yield "{}:{}".format(*server.servers[0].sockets[0].getsockname())
    server.should_exit = True
    thread.join(LIMIT)
    current().database.close()


POOL, REQUESTS, THREADS = 5, 160, 40


def test_f5_every_request_succeeds_and_leaves_no_connection_behind(served: str) -> None:
    """Of 160, 111 left their connection open, and 88 failed because the pool was empty."""
    database: Any = current().database
    leads = [new_lead(phone=f"+1555{number:04}") for number in range(8)]
    for lead in leads:
        bring_to(close_engine.open_conversation(lead, EntryPoint.SMS_REPLY), Stage.PAYMENT_SENT)
    others = len(sessions())
    together = threading.Barrier(THREADS, timeout=LIMIT)

    def request(number: int) -> tuple[int, bytes]:
        if number < THREADS:
            together.wait()
        lead = leads[number % len(leads)]
        if number % 2:
            path, type = "/texts", "application/x-www-form-urlencoded"
            body = urlencode({"From": lead.phone, "MessageSid": f"SM{number}", "Body": "Hello!"})
        else:
            path, type, body = (
                "/payments",
                "application/json",
                json.dumps({"payment_intent": f"pi_{lead.id}", "lead": lead.id}),
            )
        connection = http.client.HTTPConnection(served, timeout=LIMIT)
        connection.request("POST", path, body, {"Content-Type": type})
        response = connection.getresponse()
        answer = response.status, response.read()
        connection.close()
        return answer

    with ThreadPoolExecutor(THREADS) as threads:
        answers = list(threads.map(request, range(REQUESTS)))

    assert {status for status, _ in answers} == {200}
    entries = close_engine.InboxEntry.select().where(close_engine.InboxEntry.lead_id.in_([lead.id for lead in leads]))
    kinds = Counter(entry.kind for entry in entries)
    assert kinds == {"text": REQUESTS // 2, "payment": len(leads) // 2}
    kept = POOL if hasattr(database, "_in_use") else 0
    until(lambda: len(sessions()) <= others + kept, "the server has no connection open that is not in the pool")
    database.close()
    assert not getattr(database, "_in_use", None)
    if isinstance(database, peewee.SqliteDatabase):
        # SQLite keeps this file as long as anybody has a connection.
        assert not Path(f"{database.database}-wal").exists()


def sessions() -> list[int]:
    """The sessions of this database on PostgreSQL."""
    if isinstance(current().database, peewee.SqliteDatabase):
        return []
    rows = sql("SELECT pid FROM pg_catalog.pg_stat_activity WHERE datname = pg_catalog.current_database()")
    return [pid for (pid,) in rows]


@pytest.mark.parametrize("scheme", ["sqlite+pool", "postgresql+pool"])
def test_f5_a_pool_that_is_full_is_waited_for(scheme: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A variant: a connection that comes back is enough, and a URL that says how long to wait is believed."""
    if scheme.startswith("sqlite"):
        url = f"sqlite+pool:///{tmp_path}/crm.db?max_connections=1"
    else:
        plain = request.getfixturevalue("postgres_url").replace("postgresql", scheme, 1)
        url = f"{plain}{'&' if '?' in plain else '?'}max_connections=1"
    pool: Any = close_engine.connect(url)
    pool.connect()
    waiting = Running(lambda: pool.execute_sql("SELECT 1").fetchone())
    until(lambda: pool._pool_available._waiters, "the other thread waits for the pool")
    pool.close()
    assert waiting.result() == (1,)
    pool.close_all()

    slow: Any = database_from(f"{url}&timeout=3")
    assert slow._wait_timeout == 3
