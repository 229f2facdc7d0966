"""Inputs that once failed, one test per case, by its number."""

from __future__ import annotations

import copy
import importlib.util
import multiprocessing
import os
import pickle
import pkgutil
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import peewee
import playhouse
import psycopg2
import pytest
from celery import Celery
from hypothesis import HealthCheck, reject, settings
from hypothesis import given as given_any
from hypothesis import strategies as st
from playhouse import db_url
from playhouse.cysqlite_ext import CySqliteDatabase, PooledCySqliteDatabase
from playhouse.migrate import PostgresqlMigrator, SqliteMigrator, migrate
from playhouse.migrations import MigrationError, Runner
from playhouse.pool import PooledPostgresqlDatabase, PooledSqliteDatabase
from playhouse.postgres_ext import PooledPostgresqlExtDatabase, PostgresqlExtDatabase, Psycopg3Database
from playhouse.shortcuts import ReconnectMixin

import close_engine
from close_engine import (
    ActionStatus,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    ConfigurationError,
    EntryPoint,
    GuardMissing,
    InvalidValue,
    Lead,
    MessageStatus,
    OutboxMessage,
    PendingAction,
    SchemaError,
    Stage,
    StageConflict,
    TransactionFailed,
    User,
    errors,
    outbox,
    submit,
)
from close_engine.board import pipeline
from close_engine.database.binding import current
from close_engine.database.postgresql import POSTGRES
from close_engine.schema import directory, downgrade, migration_sql, repair, rows_at_stake, scripts, status
from close_engine.sweeps import Swept
from close_engine.testing import MovableClock, bring_to, new_lead
from close_engine.worker import Worker
from tests.calls import unqualified
from tests.crm import AFTER, everything, query, restore
from tests.foreign import REFUSED as TURNED_DOWN
from tests.foreign import Change, ForeignWriter, moment
from tests.prose import ROOT, block
from tests.servers import execute, new_name, postgres_database
from tests.workers import LINK, claimed, sql

ConversationIn = Callable[..., CloseEngineConversation]

ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]

EXAMPLES: list[errors.CloseEngineError] = [
    errors.CloseEngineError("Something is wrong.", 7),
    errors.ConfigurationError("No database is bound."),
    errors.SchemaError("Two problems:", ["one", "two"]),
    errors.GuardMissing("pending_actions"),
    errors.InvalidValue("batch", 0, "it must be at least 1"),
    errors.UnreadableRow("pending_actions", "a1", "metadata", "it is nested too deep"),
    errors.UnknownTrigger("win", ["complete", "stall"]),
    errors.TransitionRefused("Not now.", "c1", "stall", Stage.STALLED),
    errors.TransitionNotAllowed(None, "stall", Stage.STALLED, ["resume"]),
    errors.ConditionNotMet("c1", "close_lost", Stage.BUILDING, "a reason must be given"),
    errors.StageAssignmentRefused("Fire start_building().", Stage.BUILDING),
    errors.StageConflict("c1", "save()", Stage.BUILDING, Stage.STALLED),
    errors.StageConflict(None, None, None, None),
    errors.KeyReused("c1", "SM1", "stall", "resume"),
    errors.PartlyLoaded("c1", ["stage", "updated_at"]),
    errors.NotFound("There is no such row."),
    errors.ConversationNotFound("c1"),
    errors.LeadNotFound("lead_1"),
    errors.UserNotFound("user_1"),
    errors.ActionNotFound("a1"),
    errors.MessageNotFound(7),
    errors.PaymentNotFound(7),
    errors.LeadHasNoPhone("lead_1"),
    errors.ConversationCompleted("c1", "lead_1"),
    errors.ConversationClosed("c1", Stage.CLOSED_LOST),
    errors.ActionDecided("a1", "approve", ActionStatus.EXPIRED),
    errors.DraftFailed("c1", "the model was asked 6 times and came to no end"),
    errors.CannotBeSent("The number does not exist.", 21211),
    errors.Snooze(timedelta(hours=1)),
    errors.LeaseLost(7, "worker-7", MessageStatus.SENT, None),
    errors.MessageNotDead(7, MessageStatus.PENDING),
    errors.ProviderIdTaken("SM1", 7, 3),
    errors.LeadOptedOut("lead_1"),
    errors.RecipientOptedOut("21610"),
    errors.ConversationTakenOver("c1", "dana"),
    errors.ActionSuperseded("a1"),
    errors.MessageCleared("a1"),
    errors.TextOfAnotherLead("SM1", "lead_2", "lead_1"),
    errors.PaymentUnmatched("lead_1", "evt_1", "no payment link was sent to the lead"),
    errors.TransactionFailed(),
    errors.TransactionOfAnotherTask("task 'Task-1'", "task 'Task-2'"),
    errors.AfterCommitError([ValueError("no printer"), errors.LeadNotFound("lead_1")]),
]


class Bounced(errors.CannotBeSent):
    """A user's own error, whose arguments are not those of its base."""

    def __init__(self, number: str, *, code: int) -> None:
        self.number = number
        self.code = code
        super().__init__(f"{number} bounced")


class Unreachable(Exception):
    """An error that can be pickled, but not unpickled."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"{host}:{port} is down")


def ways() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Every way in which an error is copied or sent to another process."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield f"protocol {protocol}", partial(pickled, protocol=protocol)
    yield "copy", copy.copy
    yield "deepcopy", copy.deepcopy


def pickled(error: Exception, protocol: int | None = None) -> Any:
    return pickle.loads(pickle.dumps(error, protocol))


def content(value: Any) -> Any:
    """All that an error holds, in a form that can be compared."""
    if isinstance(value, list):
        return [content(item) for item in value]
    if isinstance(value, BaseException):
        return type(value), str(value), value.args, {name: content(held) for name, held in vars(value).items()}
    return value


def lose() -> None:
    raise errors.StageConflict("c1", "stall", Stage.BUILDING, Stage.COMPLETED)


def test_f7_every_error_is_among_the_examples() -> None:
    """A new error class must have an example here, or nobody knows whether it can be pickled."""
    assert {type(error) for error in EXAMPLES} == set(ERRORS)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_f7_an_error_arrives_as_it_left(error: errors.CloseEngineError) -> None:
    """Most errors could not be unpickled, and some came back with their text wrapped in their text."""
    for way, travel in ways():
        assert content(travel(error)) == content(error), way


def test_f7_an_error_crosses_a_process_pool() -> None:
    """A StageConflict in a pool's process broke the pool, for this task and for every later one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(errors.StageConflict, match="expected BUILDING and found COMPLETED") as caught:
            pool.submit(lose).result()
        assert (caught.value.operation, caught.value.found) == ("stall", Stage.COMPLETED)
        assert pool.submit(abs, -1).result() == 1


def test_f7_an_error_crosses_celerys_results() -> None:
    """Celery handed a StageConflict over as a bare CloseEngineError without attributes: no caller could catch it."""
    conflict = errors.StageConflict("c1", "stall", Stage.BUILDING, Stage.COMPLETED)
    app = Celery(backend="cache+memory://", broker="memory://", set_as_current=False)
    app.conf.update(result_serializer="pickle", accept_content=["pickle"])
    app.backend.mark_as_failure("task-1", conflict)
    with pytest.raises(errors.StageConflict) as caught:
        app.AsyncResult("task-1").get()
    assert content(caught.value) == content(conflict)


def test_f7_a_users_own_error_keeps_all_it_holds() -> None:
    """A user's subclass, with other arguments than its base and attributes set later, came back as neither."""
    error = Bounced("+15550100", code=30003)
    error.attempt = 3  # type: ignore[attr-defined]
    for way, travel in ways():
        assert content(travel(error)) == content(error), way


def test_f7_notes_arrive_with_the_error() -> None:
    """A note explains where the error came from, so it must not stay behind."""
    error = errors.LeadNotFound("lead_1")
    error.__notes__ = ["while importing row 7"]  # type: ignore[attr-defined] # as add_note() does, since Python 3.11
    for way, travel in ways():
        arrived = travel(error)
        assert (str(arrived), arrived.__notes__) == (str(error), ["while importing row 7"]), way


@pytest.mark.parametrize(
    "value",
    [threading.Lock(), lambda: None, (number for number in (1, 2)), {"lock": [threading.Lock()]}],
    ids=["lock", "lambda", "generator", "nested"],
)
def test_f7_a_value_that_cannot_be_pickled_arrives_as_text(value: Any) -> None:
    """The refused value may be anything; the error that refuses it must arrive all the same."""
    error = errors.InvalidValue("lease", value, "it must be greater than zero")
    for way, travel in ways():
        arrived = travel(error)
        assert (str(arrived), arrived.field) == (str(error), "lease"), way
        assert arrived.value is value if way == "copy" else arrived.value == repr(value), way


@pytest.mark.parametrize(
    "arguments",
    [(threading.Lock(),), ("The line is dead.", threading.Lock()), (Unreachable("sms", 443),)],
    ids=["lock", "text and lock", "error"],
)
def test_f7_cannot_be_sent_arrives_whatever_it_was_raised_with(arguments: tuple[Any, ...]) -> None:
    """A sender raises CannotBeSent with what it has, for instance the provider's error; its text must arrive."""
    error = errors.CannotBeSent(*arguments)
    for way, travel in ways():
        arrived = travel(error)
        assert (type(arrived), str(arrived)) == (errors.CannotBeSent, str(error)), way
        assert arrived.args == (arguments if way == "copy" else (str(error),)), way


def test_f7_what_failed_after_the_commit_arrives() -> None:
    """Other people's exceptions may not unpickle: such a one arrives as a RuntimeError, the others as they are."""
    kept, lost = errors.LeadNotFound("lead_1"), Unreachable("printer", 9100)
    error = errors.AfterCommitError([kept, lost])
    expected = [content(kept), content(RuntimeError("Unreachable: printer:9100 is down"))]
    for way, travel in ways():
        arrived = travel(error)
        assert str(arrived) == str(error), way
        assert content(arrived.errors) == (content([kept, lost]) if way == "copy" else expected), way


def test_f7_a_copy_holds_the_very_same_objects() -> None:
    """`copy.copy` is shallow, so that `is` still works on what the copy holds."""
    error = errors.AfterCommitError([Unreachable("printer", 9100)])
    error.__cause__ = error.errors[0]
    copied = copy.copy(error)
    assert copied is not error
    assert copied.errors is error.errors


def test_f7_an_error_that_holds_itself_arrives() -> None:
    """A user may hang anything on an error, even the error."""
    error = errors.LeadNotFound("lead_1")
    error.origin = error  # type: ignore[attr-defined]
    arrived = pickled(error)
    assert (arrived.lead_id, str(arrived)) == ("lead_1", str(error))


Factory = Callable[..., CloseEngineConversation]

# -- E8: a table that is made again ----------------------------------------------------------------------------------

OPERATIONS = ROOT / "docs/operations.md"


@pytest.fixture
def with_a_crm(tmp_path: Path) -> Iterator[peewee.SqliteDatabase]:
    """A SQLite file with a conversation that has a rep, and an action that waits."""
    database = close_engine.connect(f"sqlite:///{tmp_path}/crm.db")
    assert isinstance(database, peewee.SqliteDatabase)
    close_engine.migrate(standalone=True)
    lead = new_lead(autonomy_level=AutonomyLevel.MANUAL)
    conversation = close_engine.open_conversation(lead, EntryPoint.SMS_REPLY, rep=User.create())
    submit(conversation, ActionType.SEND_MESSAGE, "Hello!")
    yield database
    current().database.close()
    database.close()


def left() -> dict[str, int]:
    """What is left: conversations, those with a rep, and actions."""
    conversations = CloseEngineConversation.select()
    return {
        "conversations": len(conversations),
        "reps": len(conversations.where(CloseEngineConversation.rep.is_null(False))),
        "actions": len(PendingAction.select()),
    }


EVERYTHING = {"conversations": 1, "reps": 1, "actions": 1}


def rebuilt(migrator: SqliteMigrator, table: str) -> Any:
    """The operation that makes a table again, whatever this SQLite can do without."""
    columns = {"leads": "phone", "users": "id", "clients": "lead_id", "pending_actions": "metadata"}
    return migrator.drop_not_null(table, columns.get(table, "rep_id"), legacy=True)


def test_e8_the_documented_way_keeps_every_conversation(
    with_a_crm: peewee.SqliteDatabase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example in the documentation, as it stands there, on a file with conversations in it."""
    url, everything = f"sqlite:///{with_a_crm.database}", "SELECT type, name, tbl_name FROM sqlite_master ORDER BY 1, 2"
    before = query(url, everything)
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", url)
    exec(block(OPERATIONS, "python", "SqliteMigrator"), {"close_engine": close_engine})

    assert capsys.readouterr().out == "[]\n[]\n"
    assert left() == EVERYTHING
    assert query(url, everything) == before
    with pytest.raises(peewee.IntegrityError, match=r"NOT NULL constraint failed: leads\.phone"):
        new_lead(phone=None)
    (conversation,) = CloseEngineConversation.select()
    assert bring_to(conversation, Stage.COMPLETED).history()[-1].dest is Stage.COMPLETED
    Lead.delete().where(Lead.id == conversation.lead_id).execute()
    assert left()["conversations"] == 0


@pytest.mark.parametrize(
    ("table", "lost"), [("leads", {"conversations": 0, "reps": 0}), ("users", {"reps": 0}), ("clients", {})]
)
@pytest.mark.parametrize("way", ["nothing", "a transaction", "migration_context() in a transaction"])
def test_e8_with_foreign_keys_on_a_rebuilt_table_takes_conversations_along(
    with_a_crm: peewee.SqliteDatabase, table: str, lost: dict[str, int], way: str
) -> None:
    """The danger that the documentation speaks of: nothing warns, and `verify` finds nothing wrong."""
    migrator = SqliteMigrator(with_a_crm)
    with ExitStack() as open_around:
        if "a transaction" in way:
            open_around.enter_context(with_a_crm.atomic())
        if "migration_context()" in way:
            open_around.enter_context(migrator.migration_context())
        migrate(rebuilt(migrator, table))

    assert left() == {**EVERYTHING, **lost}
    assert close_engine.verify() == []


@pytest.mark.parametrize("table", ["close_engine_conversations", "pending_actions"])
def test_e8_the_librarys_own_tables_cannot_be_rebuilt(with_a_crm: peewee.SqliteDatabase, table: str) -> None:
    """SQLite refuses it because of our triggers and a view. Told to look away, it drops them: `migrate` makes them."""
    migrator = SqliteMigrator(with_a_crm)
    refused = pytest.raises(peewee.OperationalError, match=r"error in (trigger|view) close_engine_")
    with refused, migrator.migration_context():
        migrate(rebuilt(migrator, table))
    assert left() == EVERYTHING
    assert close_engine.verify() == []

    with_a_crm.pragma("legacy_alter_table", 1)
    with migrator.migration_context():
        migrate(rebuilt(migrator, table))
    with_a_crm.pragma("legacy_alter_table", 0)
    assert left() == EVERYTHING
    assert any("is missing, so the table is not guarded" in problem for problem in close_engine.verify())
    assert close_engine.migrate()
    assert close_engine.verify() == []


def test_e8_postgresql_changes_the_column_in_place(postgres: peewee.Database) -> None:
    """The same change by Peewee's migrator for PostgreSQL keeps what refers to the table."""
    close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY, rep=User.create())
    migrator = PostgresqlMigrator(postgres)
    migrate(migrator.add_not_null("leads", "phone"))

    assert left() == {**EVERYTHING, "actions": 0}
    assert close_engine.verify() == []


# -- F9: what is given for the history ------------------------------------------------------------------------------

SENT_FROM: dict[str, tuple[Stage, dict[str, Any]]] = {
    "SEND_MESSAGE": (Stage.INITIATED, {}),
    "SEND_PREVIEW": (Stage.BUILDING, {"previewUrl": "https://preview.example.com"}),
    "SEND_PAYMENT_LINK": (Stage.PREVIEW_SENT, {"paymentUrl": LINK}),
}


@pytest.mark.parametrize("level", list(AutonomyLevel))
@pytest.mark.parametrize("type", SENT_FROM)
def test_f9_who_drafted_a_message_reaches_the_history(conversation_in: Factory, type: str, level: str) -> None:
    """`submit(actor=…)` was documented "for the history", and for most messages was stored nowhere."""
    stage, metadata = SENT_FROM[type]
    conversation = conversation_in(stage, autonomy_level=AutonomyLevel(level))
    submitted = submit(conversation, ActionType(type), "Hello!", metadata=metadata, actor="writer-3")
    if isinstance(submitted, PendingAction):
        submitted.approve(by="dana")

    message = claimed()
    assert message.submitted_by == "writer-3"
    message.sent("p1")

    sent = conversation.history()[-1]
    assert (sent.actor, sent.metadata["submitted_by"]) == (message.leased_by, "writer-3")


def test_f9_a_message_that_moves_no_stage_keeps_who_drafted_it(conversation_in: Factory) -> None:
    """A further text has no history row of its own, so the outbox itself says who drafted it."""
    conversation = conversation_in(Stage.QUALIFYING)
    submit(conversation, ActionType.SEND_MESSAGE, "And where are you?", actor="writer-3")
    claimed().sent("p1")

    assert [message.submitted_by for message in OutboxMessage.select()] == ["writer-3"]


def test_f9_an_approval_asked_for_by_the_crm_names_its_own_author(
    conversation_in: Factory, foreign: ForeignWriter, close_engine_clock: MovableClock
) -> None:
    """A foreign writer's action names its author in its metadata, as the library's own does."""
    conversation = conversation_in(Stage.QUALIFYING)
    foreign.run(
        "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message, metadata, status) "
        "VALUES ('a1', %s, %s, 'SEND_MESSAGE', 'Hello!', '{\"submittedBy\": \"the CRM\"}', 'PENDING')",
        conversation.id,
        conversation.lead_id,
    )
    foreign.run("UPDATE pending_actions SET status = 'APPROVED', approved_by = 'dana' WHERE id = 'a1'")
    close_engine_clock.move(timedelta(minutes=1))

    assert claimed().submitted_by == "the CRM"


# -- F2: databases of every kind -------------------------------------------------------------------------------------


class ReconnectingPostgres(ReconnectMixin, peewee.PostgresqlDatabase):  # type: ignore[misc]
    """As Peewee's documentation shows it."""


class ReconnectingSqlite(ReconnectMixin, peewee.SqliteDatabase):  # type: ignore[misc]
    """As Peewee's documentation shows it."""


#: Every database class of Peewee's that the library works with. SqlCipherDatabase is one as well: its driver cannot be
#: installed everywhere, so the suite does not run it.
WORKING: dict[str, Callable[[str], Any]] = {
    "PostgresqlDatabase": peewee.PostgresqlDatabase,
    "PostgresqlDatabase with psycopg 3": partial(peewee.PostgresqlDatabase, prefer_psycopg3=True),
    "PooledPostgresqlDatabase": PooledPostgresqlDatabase,
    "PostgresqlExtDatabase": PostgresqlExtDatabase,
    "PooledPostgresqlExtDatabase": PooledPostgresqlExtDatabase,
    "Psycopg3Database": Psycopg3Database,
    "PooledPsycopg3Database": lambda url: db_url.connect(url.replace("postgresql", "psycopg3+pool", 1)),
    "ReconnectingPostgres": ReconnectingPostgres,
    "SqliteDatabase": peewee.SqliteDatabase,
    "PooledSqliteDatabase": PooledSqliteDatabase,
    "CySqliteDatabase": CySqliteDatabase,
    "PooledCySqliteDatabase": PooledCySqliteDatabase,
    "ReconnectingSqlite": ReconnectingSqlite,
}

LIKE_POSTGRES = "bind a PostgresqlDatabase."
NOT_ASYNC = "bind a PostgresqlDatabase or SqliteDatabase, and call this library with asyncio.to_thread()."
NEITHER = "is not supported: bind a PostgreSQL or SQLite database."
ITS_OWN = "because the stages are guarded by triggers and locks of PostgreSQL's own"

#: Every other class of Peewee's, with the sentence that refuses it.
REFUSED: dict[str, str] = {
    **{f"{name}Database": f"{name}Database {NEITHER}" for name in ("MySQL", "PooledMySQL")},
    **{
        f"{name}Database": f"{name}Database cannot be bound, because its queries must be awaited: {NOT_ASYNC}"
        for name in ("AsyncPostgresql", "AsyncSqlite", "AsyncMySQL")
    },
    **{
        name: f"{name} cannot be bound, {ITS_OWN}: {LIKE_POSTGRES}"
        for name in ("CockroachDatabase", "PooledCockroachDatabase")
    },
    "SqliteQueueDatabase": "SqliteQueueDatabase cannot be bound, because it has no transactions: "
    "bind a SqliteDatabase with a timeout, to wait for other writers.",
    "APSWDatabase": "APSWDatabase cannot be bound, because its driver takes no datetimes: "
    "bind a SqliteDatabase, CySqliteDatabase or SqlCipherDatabase.",
}

#: Those that need a driver which is not installed here.
NOT_INSTALLED = {
    *("SqlCipherDatabase", "APSWDatabase", "MySQLConnectorDatabase", "PooledMySQLConnectorDatabase"),
    *("MariaDBConnectorDatabase", "PooledMariaDBConnectorDatabase"),
}


def offered() -> dict[str, str]:
    """Every class for a database that Peewee offers, and the module it is in."""
    modules = ["peewee", *(f"playhouse.{module.name}" for module in pkgutil.iter_modules(playhouse.__path__))]
    return {
        name: module
        for module in modules
        for name in re.findall(
            r"^class ([A-Z]\w*Database)\([^)]*Database\b",
            Path(str(importlib.util.find_spec(module).origin)).read_text(),
            re.MULTILINE,
        )
    }


def test_f2_every_class_that_peewee_offers_is_known() -> None:
    """A class that Peewee adds must be tried, and stand in one of the two lists above."""
    assert set(offered()) - NOT_INSTALLED == {*WORKING, *REFUSED} - NOT_INSTALLED - {
        *("PostgresqlDatabase with psycopg 3", "ReconnectingPostgres", "ReconnectingSqlite")
    }
    assert set(offered()) >= NOT_INSTALLED


@pytest.mark.parametrize("name", WORKING)
def test_f2_what_is_accepted_works(name: str, server: str, tmp_path: Path) -> None:
    """About all that this library does, with each class of database, from migrating to downgrading."""
    with postgres_database(server) as url:
        database = WORKING[name](url if "ostgres" in name or "sycopg" in name else f"{tmp_path}/crm.db")
        assert close_engine.bind(database) is database
        work()
        getattr(database, "close_all", database.close)()


@pytest.mark.parametrize("name", sorted(set(REFUSED) - NOT_INSTALLED))
def test_f2_what_does_not_work_is_refused_when_it_is_bound(name: str, tmp_path: Path) -> None:
    """`bind()` accepted these, and the first trigger failed with an AttributeError, or waited for nothing."""
    bound = close_engine.connect("sqlite:///:memory:", leads="Lead")
    kind = getattr(importlib.import_module(offered()[name]), name)
    database = kind(f"{tmp_path}/crm.db", **({"autostart": False} if name == "SqliteQueueDatabase" else {}))
    for kinds in (kind, type("Measured", (kind,), {})):
        database.__class__ = kinds
        with pytest.raises(ConfigurationError) as caught:
            close_engine.bind(database, leads="customers")
        assert str(caught.value) == REFUSED[name].replace(name, kinds.__name__)
    assert not hasattr(database, "close_engine_tables")
    assert current().database is bound
    assert Lead._meta.table_name == "Lead"


def test_f2_apsw_is_refused_by_its_name() -> None:
    """Its driver is not installed here; a class of this name is refused as the real one is."""
    with pytest.raises(ConfigurationError) as caught:
        close_engine.bind(type("APSWDatabase", (peewee.SqliteDatabase,), {})(":memory:"))
    assert str(caught.value) == REFUSED["APSWDatabase"]


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (None, "None"),
        ("postgresql://u:s3cr3t@h/crm", "an object of the type str"),
        (peewee.PostgresqlDatabase, "the class PostgresqlDatabase"),
        (peewee.DatabaseProxy(), "a DatabaseProxy that is not initialized"),
        (Lead, "the class Lead"),
        (7, "an object of the type int"),
    ],
    ids=["None", "URL", "class", "proxy", "model", "number"],
)
def test_f2_what_is_no_database_is_refused(given: Any, what: str) -> None:
    """The sentence says what was given, and does not show a URL's password."""
    with pytest.raises(ConfigurationError) as caught:
        close_engine.bind(given)
    assert str(caught.value) == (
        f"bind() takes a Peewee database, not {what}: bind peewee.PostgresqlDatabase(…), or connect() to a URL."
    )


@pytest.mark.parametrize(
    ("database", "why"),
    [
        (PostgresqlExtDatabase("crm", server_side_cursors=True), "a server-side cursor cannot lock rows"),
        (Psycopg3Database("crm", server_side_cursors=True), "a server-side cursor cannot lock rows"),
        (peewee.PostgresqlDatabase("crm", thread_safe=False), "its threads would share one transaction"),
        (peewee.SqliteDatabase(":memory:", thread_safe=False), "its threads would share one transaction"),
    ],
)
def test_f2_an_option_that_cannot_work_is_refused(database: Any, why: str) -> None:
    """The class would do, but with this option a lock fails, or two threads write in one transaction."""
    with pytest.raises(ConfigurationError, match=f"^This {type(database).__name__} cannot be bound, because {why}: "):
        close_engine.bind(database)


def test_f2_a_proxy_stands_for_the_database_in_it(tmp_path: Path) -> None:
    """An application that binds its own models to a DatabaseProxy can hand over the proxy."""
    proxy, inner = peewee.DatabaseProxy(), peewee.DatabaseProxy()
    database = peewee.SqliteDatabase(f"{tmp_path}/crm.db")
    proxy.initialize(inner)
    with pytest.raises(ConfigurationError, match="a DatabaseProxy that is not initialized"):
        close_engine.bind(proxy)
    inner.initialize(database)
    assert close_engine.bind(proxy) is database
    work()
    database.close()


def test_f2_psycopg_3_says_who_holds_the_lock_and_that_a_transaction_failed(postgres_url: str) -> None:
    """psycopg 3 calls the code of an error `sqlstate`; the state of a transaction it tells as psycopg 2 does."""
    database = Psycopg3Database(postgres_url)
    close_engine.bind(database)
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    holder = psycopg2.connect(postgres_url)
    holder.cursor().execute("SELECT pg_advisory_xact_lock(hashtext('close_engine.migrate')::bigint)")
    with pytest.raises(SchemaError, match=f"held by process {holder.info.backend_pid} of the role"):
        downgrade(lock_timeout=timedelta(milliseconds=20))
    holder.close()

    with pytest.raises(TransactionFailed), close_engine.atomic():  # noqa: PT012
        conversation.start_qualifying()
        with pytest.raises(peewee.IntegrityError):
            database.execute_sql("UPDATE close_engine_conversations SET stage = 'INITIATED'")
    assert conversation.stage is Stage.INITIATED
    stale = CloseEngineConversation.get_by_id(conversation.id)
    conversation.start_qualifying(metadata={"text": "50% of %s {x}"})
    with pytest.raises(StageConflict):
        stale.start_qualifying()
    assert conversation.history()[-1].metadata == {"text": "50% of %s {x}"}
    database.close()


# -- F4: one row, and no list of one --------------------------------------------------------------------------------


class MeasuredLead(Lead):
    """A user's own subclass of the model."""

    class Meta:
        table_name = "leads"


def leads_and_a_rep(conversation_in: Factory) -> tuple[list[CloseEngineConversation], User]:
    """Two leads with a conversation, a third without; a rep with both, and one with none."""
    rep = User.create()
    User.create()
    conversations = [conversation_in(Stage.BUILDING), conversation_in(Stage.QUALIFYING)]
    for conversation in conversations:
        conversation.rep = rep
        conversation.save()
    new_lead()
    return conversations, rep


def conversations_of(leads: Any) -> dict[Any, int]:
    return Counter(lead.close_conversation for lead in leads)


def test_f4_prefetch_loads_the_conversation_or_none(conversation_in: Factory) -> None:
    """After `prefetch()`, `lead.close_conversation` was a list, and an empty list for a lead without one."""
    conversations, _ = leads_and_a_rep(conversation_in)
    expected = Counter([*conversations, None])

    assert conversations_of(Lead.select()) == expected
    for kind in (peewee.PREFETCH_TYPE.WHERE, peewee.PREFETCH_TYPE.JOIN):
        leads = peewee.prefetch(Lead.select(), CloseEngineConversation.select(), prefetch_type=kind)
        with overheard() as statements:
            assert conversations_of(leads) == expected
            assert all(lead.close_conversation.lead is lead for lead in leads if lead.close_conversation)
        assert statements == []
        loaded = next(lead.close_conversation for lead in leads if lead.close_conversation == conversations[0])
        assert loaded.send_preview().dest is Stage.PREVIEW_SENT
        loaded.request_edits()

    reference: Any = Lead.close_conversation
    leads = list(Lead.select().with_related(peewee.Load(reference)))
    with overheard() as statements:
        assert conversations_of(leads) == expected
    assert statements == []


def test_f4_a_join_loads_the_conversation_or_none(conversation_in: Factory) -> None:
    """What a join names `close_conversation` is read back under that name, with or without a query."""
    conversations, _ = leads_and_a_rep(conversation_in)

    both = Lead.select(Lead, CloseEngineConversation)
    leads = list(both.join(CloseEngineConversation, peewee.JOIN.LEFT_OUTER, attr="close_conversation"))
    with overheard() as statements:
        assert conversations_of(leads) == Counter([*conversations, None])
    assert statements == []

    leads = list(both.join(CloseEngineConversation))
    assert conversations_of(leads) == Counter(conversations)
    stages = Lead.select(Lead.id, CloseEngineConversation.stage)
    (lead,) = stages.join(CloseEngineConversation, attr="close_conversation").where(Lead.id == conversations[0].lead_id)
    assert lead.close_conversation.stage is Stage.BUILDING


def test_f4_prefetch_through_the_rep_and_of_a_subclass(conversation_in: Factory) -> None:
    """A user has many conversations, so theirs stay a list; a subclass of Lead reads its one as Lead does."""
    conversations, rep = leads_and_a_rep(conversation_in)

    users = peewee.prefetch(User.select(), CloseEngineConversation.select(), Lead.select())
    with overheard() as statements:
        found = {user.id: sorted(row.id for row in user.close_engine_conversations) for user in users}
        assert found.pop(rep.id) == sorted(conversation.id for conversation in conversations)
        assert list(found.values()) == [[]]
        assert all(row.lead.phone for user in users for row in user.close_engine_conversations)
    assert statements == []

    assert conversations_of(MeasuredLead.select()) == Counter([*conversations, None])


def test_f4_what_was_loaded_is_forgotten_when_a_conversation_opens(conversation_in: Factory) -> None:
    """A lead that was loaded without a conversation knows of it once it is opened, and after `del`."""
    (lead,) = peewee.prefetch(Lead.select().where(Lead.id == new_lead().id), CloseEngineConversation.select())
    assert lead.close_conversation is None
    conversation = close_engine.open_conversation(lead, EntryPoint.SMS_REPLY)
    assert lead.close_conversation == conversation

    (lead,) = peewee.prefetch(Lead.select().where(Lead.id == lead.id), CloseEngineConversation.select())
    conversation.start_qualifying()
    assert str(lead.close_conversation.stage) == "INITIATED"
    del lead.close_conversation
    assert str(lead.close_conversation.stage) == "QUALIFYING"
    assert pickled(lead).close_conversation == conversation


def test_f4_only_a_leads_own_conversation_can_be_assigned(conversation_in: Factory) -> None:
    """Anything could be assigned: it was believed, and nothing was written."""
    own, other = conversation_in(Stage.BUILDING), conversation_in(Stage.QUALIFYING)
    lead = Lead.get_by_id(own.lead_id)
    for wrong in (other, "c1", {"id": own.id}, [other], lead):
        with pytest.raises(
            InvalidValue, match=r"^Lead.close_conversation cannot be .*: it must be this row's own Close"
        ):
            lead.close_conversation = wrong  # type: ignore[assignment]
    assert lead.close_conversation == own

    lead.close_conversation = own
    assert lead.close_conversation is own
    assert Lead(id=own.lead_id, close_conversation=own).close_conversation is own
    assert lead.save() == 0


# -- D13: rounded moments ------------------------------------------------------------------------------------------

#: Refuse a row with a stamp that has not been yet. What names a moment to come is left out, and so is a version that is
#: one millisecond later than the last.
REFUSE_THE_FUTURE = """
CREATE FUNCTION refuse_the_future() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE stamp record;
BEGIN
    FOR stamp IN SELECT key, value::timestamp AS at FROM jsonb_each_text(to_jsonb(NEW))
        WHERE key ~ '(_at|^at)$' AND key NOT IN ('expires_at', 'available_at') AND value IS NOT NULL
            AND to_jsonb(NEW) ->> 'trigger' IS DISTINCT FROM 'expire'
    LOOP
        IF stamp.at > clock_timestamp() AT TIME ZONE 'UTC' AND NOT (stamp.key = 'updated_at' AND TG_OP = 'UPDATE'
            AND stamp.at = (to_jsonb(OLD) ->> 'updated_at')::timestamp + interval '1 millisecond') THEN
            RAISE 'in the future: %% of %%: %%', stamp.key, TG_TABLE_NAME, stamp.at;
        END IF;
    END LOOP;
    RETURN NEW;
END
$$;
"""
STAMPED = [
    *("close_engine_conversations", "pending_actions"),
    *("close_engine.history", "close_engine.deadlines", "close_engine.outbox"),
]


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/Los_Angeles"])
def test_d13_no_stamp_lies_in_the_future(zone: str, foreign_postgres: ForeignWriter) -> None:
    """A cast to timestamp(3) rounds, so that every second stamp was up to half a millisecond ahead of the clock. Here a
    trigger that fires after ours compares each stamp with the clock, a hundred times each."""
    writer = foreign_postgres
    writer.run(REFUSE_THE_FUTURE)
    for table in STAMPED:
        writer.run(
            f"CREATE TRIGGER zzz_refuse_the_future BEFORE INSERT OR UPDATE ON {table} "
            "FOR EACH ROW EXECUTE FUNCTION refuse_the_future()"
        )
    writer.run(f"SET timezone = '{zone}'")
    updated_at = ", updated_at = now()" if zone != "UTC" else ""
    for number in range(100):
        conversation = writer.insert(("STALLED", "COMPLETED", "CLOSED_LOST", "PAYMENT_SENT")[number % 4])
        conversation = writer.insert("QUALIFYING")
        for stage in (
            *("STALLED", "QUALIFYING", "BUILDING", "PREVIEW_SENT", "PAYMENT_SENT"),
            *("CLOSED_LOST", "INITIATED", "QUALIFYING"),
        ):
            writer.run(
                f"UPDATE close_engine_conversations SET stage = %s{updated_at} WHERE id = %s", stage, conversation
            )
        for decided in ("status = 'APPROVED'", "status = 'APPROVED', approved_at = now()", "status = 'REJECTED'"):
            writer.run(
                "INSERT INTO pending_actions "
                "(id, conversation_id, lead_id, type, draft_message, metadata, approved_by) "
                "VALUES (%s, %s, 'l', 'SEND_PAYMENT_LINK', 'Hi', '{\"paymentUrl\": \"https://pay\"}', 'dana')",
                f"{conversation} {decided}",
                conversation,
            )
            writer.run(f"UPDATE pending_actions SET {decided} WHERE id = %s", f"{conversation} {decided}")
        writer.update(conversation, stage="COMPLETED")
    assert len(writer.run("SELECT id FROM close_engine.outbox")) == 200


def test_d13_the_moment_is_cut(foreign_postgres: ForeignWriter) -> None:
    """close_engine.moment() is what everything is stamped by: never later than the clock, in whole milliseconds."""
    foreign_postgres.run("SET timezone = 'Asia/Tokyo'")
    assert foreign_postgres.run(
        "SELECT count(*), bool_and(ours <= clock AND ours = ours::timestamp(3) AND clock < ours + interval '1 minute') "
        "FROM (SELECT close_engine.moment() AS ours, clock_timestamp() AT TIME ZONE 'UTC' AS clock "
        "FROM generate_series(1, 10000) OFFSET 0) AS moments"
    ) == [(10000, True)]


def test_d13_the_default_of_an_action_means_now_in_every_timezone(foreign_postgres: ForeignWriter) -> None:
    """CURRENT_TIMESTAMP in a session elsewhere than in UTC is local time: it made an action hours too old or young."""
    for zone in ("UTC", "Asia/Tokyo", "America/Los_Angeles"):
        foreign_postgres.run(f"SET timezone = '{zone}'")
        foreign_postgres.run(
            "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message) "
            "VALUES (%s, 'c', 'l', 'SEND_MESSAGE', 'Hi')",
            zone,
        )
        ((age,),) = foreign_postgres.run(
            "SELECT close_engine.moment() - created_at FROM pending_actions WHERE id = %s", zone
        )
        assert timedelta(0) <= age < timedelta(minutes=1), zone


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("2999-01-01 10:00:00.123999", "2999-01-01 10:00:00.123"),
        ("2999-01-01T10:00:00.9999", "2999-01-01 10:00:00.999"),
        ("2999-01-01 10:00:00.5", "2999-01-01 10:00:00.500"),
        ("2999-01-01 10:00:00", "2999-01-01 10:00:00.000"),
    ],
)
def test_d13_send_after_is_cut(foreign: ForeignWriter, given: str, stored: str) -> None:
    """`sendAfter` with more than three digits was rounded up, on SQLite as well."""
    conversation = foreign.insert("QUALIFYING")
    foreign.run(
        "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message, metadata) "
        "VALUES ('a', %s, 'l', 'SEND_MESSAGE', 'Hi', %s)",
        conversation,
        f'{{"sendAfter": "{given}"}}',
    )
    foreign.run("UPDATE pending_actions SET status = 'APPROVED' WHERE id = 'a'")
    ((available_at,),) = foreign.run("SELECT available_at FROM close_engine.outbox")
    assert moment(available_at) == moment(stored)


def test_d13_send_after_is_understood_whatever_a_session_makes_of_backslashes(foreign_postgres: ForeignWriter) -> None:
    """With standard_conforming_strings off the pattern for `sendAfter` lost its backslashes: nothing was delayed."""
    conversation = foreign_postgres.insert("QUALIFYING")
    foreign_postgres.run("SET standard_conforming_strings = off; SET escape_string_warning = off")
    foreign_postgres.run(
        "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message, metadata) "
        "VALUES ('a', %s, 'l', 'SEND_MESSAGE', 'Hi', %s)",
        conversation,
        '{"sendAfter": "2999-01-01 10:00:00.500"}',
    )
    foreign_postgres.run("UPDATE pending_actions SET status = 'APPROVED' WHERE id = 'a'")
    assert foreign_postgres.run("SELECT available_at::text FROM close_engine.outbox") == [("2999-01-01 10:00:00.5",)]


# -- E2: indexes on Prisma's tables ----------------------------------------------------------------------------------

PRISMA_INDEXES = {
    "close_engine_conversations": {
        *("close_engine_conversations_pkey", "close_engine_conversations_lead_id_key"),
        *("close_engine_conversations_entry_point_idx", "close_engine_conversations_stage_idx"),
        "close_engine_conversations_created_at_idx",
    },
    "pending_actions": {
        *("pending_actions_pkey", "pending_actions_status_idx", "pending_actions_lead_id_idx"),
        "pending_actions_conversation_id_idx",
    },
}


def without_triggers(foreign: ForeignWriter, *statements: str) -> None:
    """Run statements with our triggers off. On SQLite, where they cannot be turned off, those on Prisma's tables go."""
    if foreign.is_postgres:
        foreign.run("SET session_replication_role = replica")
    else:
        for name, table in foreign.run("SELECT name, tbl_name FROM sqlite_master WHERE type = 'trigger'"):
            if table in PRISMA_INDEXES:
                foreign.run(f"DROP TRIGGER {name}")
    for statement in statements:
        foreign.run(statement)
    if foreign.is_postgres:
        foreign.run("RESET session_replication_role")


def migrated_again(foreign: ForeignWriter) -> None:
    """Run the migrations again that make triggers."""
    foreign.run("DELETE FROM close_engine.migrations WHERE name > '0002'")
    assert close_engine.migrate() == ["0002_history", "0003_guard", "0004_outbox", "0005_decisions"]
    """Run the migrations that make triggers again."""
    with_triggers = ["0003_guard", "0004_outbox", "0005_decisions"]
    foreign.run("DELETE FROM close_engine.migrations WHERE name IN (%s, %s, %s)", *with_triggers)
    assert close_engine.migrate() == with_triggers


def test_e2_prismas_tables_have_prismas_indexes_and_no_other(database: peewee.Database) -> None:
    """Some versions of Prisma drop partial indexes on its tables without a word."""
    for table, expected in PRISMA_INDEXES.items():
        found = set(current().dialect.catalog(database).indexes(table))
        assert {name for name in found if not name.startswith("sqlite_autoindex")} | {f"{table}_pkey"} == expected


def test_e2_our_triggers_keep_no_column_from_changing(foreign: ForeignWriter) -> None:
    """A trigger that names a column keeps the CRM from altering it, and misses what other triggers change."""
    if foreign.is_postgres:
        ours = "FROM pg_trigger WHERE tgname LIKE '%%close_engine%%' AND tgrelid = %s::regclass"
        for table in PRISMA_INDEXES:
            assert len(foreign.run(f"SELECT 1 {ours}", table)) >= 4
            assert foreign.run(f"SELECT tgname {ours} AND tgattr <> ''", table) == []
        assert foreign.run(f"SELECT tgname {ours} AND tgqual IS NOT NULL", "pending_actions") == []
        for column in ("status", "type", "expires_at"):
            foreign.run(f"ALTER TABLE pending_actions ALTER {column} TYPE text")
        foreign.run("ALTER TABLE pending_actions DROP approved_by")
    else:
        sql = foreign.run("SELECT sql FROM sqlite_master WHERE type = 'trigger'")
        assert [text for (text,) in sql if "UPDATE OF" in text] == []


def test_e2_a_conversation_has_one_deadline_or_none_whoever_writes(foreign: ForeignWriter) -> None:
    """Sweeps find by it what is due, so it must follow every write."""
    early, late = "2026-01-02 03:04:05.678", "2026-02-03 04:05:06.789"

    def deadlines() -> tuple[set[str], dict[str, Any]]:
        return set(foreign.deadlines("stall")), foreign.deadlines("close_lost")

    active, stalled = foreign.insert("QUALIFYING"), foreign.insert("STALLED")
    given = foreign.insert("STALLED", stalled_at=early)
    closed = foreign.insert("COMPLETED")
    since = foreign.row(stalled)["stalled_at"]
    assert deadlines() == ({active}, {stalled: since, given: moment(early)})
    foreign.update(given, stalled_at=late)
    assert deadlines() == ({active}, {stalled: since, given: moment(late)})
    foreign.update(given, stalled_at=None)
    assert deadlines() == ({active}, {stalled: since})
    foreign.update(given, stalled_at=early, edit_rounds=1)
    foreign.update(active, stalled_at=late)
    foreign.update(closed, stalled_at=late)
    assert deadlines() == ({active}, {stalled: since, given: moment(early)})
    foreign.update(active, stage="BUILDING")
    foreign.update(given, stage="QUALIFYING")
    assert deadlines() == ({active, given}, {stalled: since})
    foreign.update(given, stage="STALLED", stalled_at=late)
    foreign.update(active, stage="STALLED")
    assert deadlines() == (
        set(),
        {stalled: since, given: moment(late), active: foreign.row(active)["stalled_at"]},
    )
    foreign.update(stalled, stage="CLOSED_LOST")
    foreign.update(active, stage="COMPLETED")
    assert deadlines() == (set(), {given: moment(late)})
    foreign.update(stalled, stage="INITIATED")
    assert deadlines() == ({stalled}, {given: moment(late)})
    foreign.run("DELETE FROM close_engine_conversations")
    assert deadlines() == (set(), {})
    if foreign.is_postgres:
        foreign.insert("STALLED")
        foreign.run("TRUNCATE close_engine_conversations")
        assert deadlines() == (set(), {})


def test_e2_a_pending_action_that_expires_has_a_deadline_whoever_writes(foreign: ForeignWriter) -> None:
    """As above, for the approval queue."""
    conversation = foreign.insert("QUALIFYING")
    early, late = "2026-01-02 03:04:05.678", "2099-02-03 04:05:06.789"

    def insert(action: str, expires_at: str | None) -> None:
        foreign.run(
            "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message, status, expires_at) "
            "VALUES (%s, %s, 'l', 'SEND_MESSAGE', 'Hello', 'PENDING', %s)",
            *(action, conversation, expires_at),
        )

    def update(action: str, **columns: Any) -> None:
        assignments = ", ".join(f"{name} = %s" for name in columns)
        foreign.run(f"UPDATE pending_actions SET {assignments} WHERE id = %s", *columns.values(), action)

    for action in ("a1", "a2", "a3", "a4", "a5"):
        insert(action, late)
    insert("for ever", None)
    insert("over", late)
    update("over", status="EXPIRED")
    assert foreign.deadlines("expire") == dict.fromkeys(["a1", "a2", "a3", "a4", "a5"], moment(late))
    update("a1", expires_at=early)
    update("a2", expires_at=None)
    update("for ever", expires_at=late)
    update("a4", status="APPROVED", approved_by="dana")
    update("a5", id="a6", draft_message="Hi")
    expected = {"a1": moment(early), "a3": moment(late), "for ever": moment(late), "a6": moment(late)}
    assert foreign.deadlines("expire") == expected
    update("a4", expires_at=early)
    update("a3", status="REJECTED")
    foreign.run("DELETE FROM pending_actions WHERE id = 'for ever'")
    assert foreign.deadlines("expire") == {"a1": moment(early), "a6": moment(late)}
    foreign.update(conversation, stage="CLOSED_LOST")
    assert foreign.deadlines("expire") == {}
    if foreign.is_postgres:
        insert("a7", late)
        foreign.run("TRUNCATE pending_actions")
        assert foreign.deadlines("expire") == {}


def test_e2_a_deadline_that_was_left_behind_holds_nobody_up(
    foreign: ForeignWriter, conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    """The oldest deadlines are those of rows that are gone, closed, decided or not yet due: they take no place."""
    active, stalled = conversation_in(Stage.QUALIFYING), conversation_in(Stage.STALLED)
    other, closed = conversation_in(Stage.STALLED), conversation_in(Stage.COMPLETED)
    asked = conversation_in(Stage.BUILDING, autonomy_level=AutonomyLevel.MANUAL)
    action, later = (
        submit(asked, ActionType.SEND_MESSAGE, "hello", expires_after=timedelta(days=days)) for days in (8, 40)
    )
    close_engine_clock.move(timedelta(days=9))
    foreign.update(other.id, stalled_at=close_engine_clock.now.strftime("%Y-%m-%d %H:%M:%S.000"))
    foreign.run(
        "DELETE FROM close_engine.deadlines WHERE \"trigger\" IN ('close_lost', 'expire') AND subject_id IN (%s, %s)",
        *(other.id, later.id),
    )
    left = [
        *((trigger, subject) for trigger in ("stall", "close_lost", "expire") for subject in ("gone", closed.id)),
        *(("stall", stalled.id), ("close_lost", active.id), ("close_lost", other.id), ("expire", later.id)),
    ]
    for trigger, subject in left:
        foreign.run(
            "INSERT INTO close_engine.deadlines VALUES (%s, %s, %s)", trigger, subject, "2020-01-01 00:00:00.000"
        )
    assert close_engine.stall_silent(batch=1) == [active.id, asked.id]
    assert close_engine.lose_stalled(batch=1) == [stalled.id]
    assert close_engine.expire_actions(batch=1) == [action.id]


def test_e2_migrating_again_makes_a_damaged_database_whole(
    foreign: ForeignWriter, conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    """What was written while the triggers were gone is adopted, and the deadlines are those of the rows."""
    kept, moved, gone = (conversation_in(Stage.BUILDING) for _ in range(3))
    stalled, closed = conversation_in(Stage.STALLED), conversation_in(Stage.CLOSED_LOST)
    asked = conversation_in(Stage.QUALIFYING, autonomy_level=AutonomyLevel.MANUAL)
    waits, decided, deleted = (submit(asked, ActionType.SEND_MESSAGE, f"draft {n}") for n in range(3))
    waiting, leased = outbox.enqueue(gone, "SEND_MESSAGE", "Hi"), outbox.enqueue(gone, "SEND_MESSAGE", "Hello")
    outbox.enqueue(kept, "SEND_MESSAGE", "Hi")
    expected = foreign.deadlines("stall")
    without_triggers(
        foreign,
        f"UPDATE close_engine.outbox SET leased_by = 'w' WHERE id = {leased.id}",
        f"DELETE FROM close_engine_conversations WHERE id = '{gone.id}'",
        f"UPDATE close_engine_conversations SET stage = 'STALLED', stalled_at = '2026-01-01 00:00:00.000' "
        f"WHERE id = '{moved.id}'",
        f"UPDATE close_engine_conversations SET stalled_at = '2026-02-02 00:00:00.000' WHERE id = '{stalled.id}'",
        f"UPDATE close_engine_conversations SET stage = 'STALLED', stalled_at = '2026-03-03 00:00:00.000' "
        f"WHERE id = '{closed.id}'",
        "INSERT INTO leads (id, phone) VALUES ('l', '+1')",
        "INSERT INTO close_engine_conversations (id, lead_id, entry_point, stage, updated_at) "
        "VALUES ('new', 'l', 'SMS_REPLY', 'EDIT_LOOP', '2026-01-01 00:00:00.000')",
        f"UPDATE pending_actions SET status = 'REJECTED' WHERE id = '{decided.id}'",
        f"UPDATE pending_actions SET expires_at = '2026-04-04 00:00:00.000' WHERE id = '{waits.id}'",
        f"DELETE FROM pending_actions WHERE id = '{deleted.id}'",
        "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message, expires_at) "
        "VALUES ('a', 'new', 'l', 'SEND_MESSAGE', 'Hello', '2026-05-05 00:00:00.000')",
    )
    for _ in range(2):
        migrated_again(foreign)
        assert foreign.history("new") == [Change("adopted", None, "EDIT_LOOP", None)]
        assert foreign.history(moved.id)[-1] == Change("adopted", "BUILDING", "STALLED", None)
        assert foreign.history(closed.id)[-1] == Change("adopted", "CLOSED_LOST", "STALLED", None)
        assert len(foreign.history(moved.id)) == 4
        assert {change.trigger for change in kept.history()} == {"open", "start_qualifying", "start_building"}
        silent = foreign.deadlines("stall")
        assert silent.pop("new") >= foreign.recorded_at("new")[0]
        assert silent == {each.id: expected[each.id] for each in (kept, asked)}
        assert foreign.deadlines("close_lost") == {
            moved.id: moment("2026-01-01 00:00:00.000"),
            stalled.id: moment("2026-02-02 00:00:00.000"),
            closed.id: moment("2026-03-03 00:00:00.000"),
        }
        assert foreign.deadlines("expire") == {
            waits.id: moment("2026-04-04 00:00:00.000"),
            "a": moment("2026-05-05 00:00:00.000"),
        }
        rows = foreign.run("SELECT id, status, last_error FROM close_engine.outbox ORDER BY id")
        assert [row[1:] for row in rows] == [
            ("WITHDRAWN", "the conversation is deleted"),
            ("PENDING", None),
            ("PENDING", None),
        ]
        assert rows[0][0] == waiting.id
    for each, stage in ((moved, Stage.BUILDING), (closed, Stage.QUALIFYING)):
        each.reload()
        assert each.resume().dest is stage


# -- E4: a dump without rights ---------------------------------------------------------------------------------------


@pytest.fixture
def forger(role: str, foreign_postgres: ForeignWriter) -> ForeignWriter:
    """A worker's role in a database that was restored without its rights: it may execute our functions."""
    foreign_postgres.run("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA close_engine TO PUBLIC")
    foreign_postgres.run(f"GRANT USAGE ON SCHEMA close_engine TO {role}")
    foreign_postgres.run(f"CREATE SCHEMA mine AUTHORIZATION {role}")
    return foreign_postgres


TRIGGER_FUNCTIONS = (
    "SELECT proname FROM pg_proc WHERE pronamespace = 'close_engine'::regnamespace "
    "AND prorettype = 'trigger'::regtype ORDER BY proname"
)


def test_e4_no_function_of_ours_works_for_another_table(forger: ForeignWriter, role: str) -> None:
    """`pg_dump --no-acl` loses the REVOKE. A worker's role attached a function to its own table and forged history."""
    functions = [name for (name,) in forger.run(TRIGGER_FUNCTIONS)]
    assert len(functions) == 13
    conversation = forger.insert("QUALIFYING", "c1")
    before = all_rows(forger)
    forger.run(f"SET SESSION AUTHORIZATION {role}")
    for number, function in enumerate(functions):
        for like in ("close_engine_conversations", "pending_actions"):
            forged = f"mine.{like}" if number % 2 else f"mine.forged_{like}"
            columns = "id text, lead_id text, stage text, conversation_id text, status text, expires_at timestamp(3), "
            columns += "type text, stalled_at timestamp(3), created_at timestamp(3), updated_at timestamp(3)"
            forger.run(f"CREATE TABLE {forged} ({columns})")
            forger.run(f"INSERT INTO {forged} (id, stage, status) VALUES ('{conversation}', 'QUALIFYING', 'PENDING')")
            for name, event in (("r", "INSERT OR UPDATE OR DELETE"), ("t", "TRUNCATE")):
                each = "ROW" if name == "r" else "STATEMENT"
                forger.run(
                    f"CREATE TRIGGER {name} AFTER {event} ON {forged} FOR EACH {each} "
                    f"EXECUTE FUNCTION close_engine.{function}()"
                )
            for statement in (
                f"INSERT INTO {forged} (id, lead_id, stage) VALUES ('c2', 'l', 'COMPLETED')",
                f"UPDATE {forged} SET stage = 'STALLED', status = 'APPROVED'",
                f"DELETE FROM {forged}",
                f"TRUNCATE {forged}",
            ):
                with pytest.raises(
                    psycopg2.errors.ObjectNotInPrerequisiteState,
                    match=rf"close_engine: this trigger is for \w+\.\w+ and not for {forged}: .*drop the trigger",
                ):
                    forger.run(statement)
            forger.run(f"DROP TABLE {forged}")
    forger.run("RESET SESSION AUTHORIZATION")
    assert all_rows(forger) == before


def test_e4_nor_for_the_other_of_the_two(foreign_postgres: ForeignWriter) -> None:
    """The functions of the conversations are not those of the actions."""
    foreign_postgres.insert("QUALIFYING", "c1")
    foreign_postgres.run(
        f"CREATE TRIGGER wrong BEFORE UPDATE {ON_CONVERSATIONS} "
        "FOR EACH ROW EXECUTE FUNCTION close_engine.guard_action()"
    )
    with pytest.raises(
        psycopg2.errors.ObjectNotInPrerequisiteState,
        match=r"for public\.pending_actions and not for public\.close_engine_conversations",
    ):
        foreign_postgres.update("c1", stage="STALLED")


@pytest.mark.parametrize("kind", ["postgresql"], indirect=True)
def test_e4_in_a_renamed_schema_they_say_what_to_do(
    kind: str, database: peewee.Database, foreign: ForeignWriter, conversation_in: ConversationIn
) -> None:
    """They speak of the schema that they were made for. Going on would fail half-way, at the first table they name."""
    conversation = conversation_in(Stage.QUALIFYING)
    sql("ALTER SCHEMA public RENAME TO crm")
    for writer in (sql, foreign.run):
        writer("SET search_path = crm")
        with pytest.raises(
            (psycopg2.errors.ObjectNotInPrerequisiteState, peewee.OperationalError),
            match=r"close_engine: this trigger is for public\..* if the schema was renamed, run close-engine migrate",
        ):
            writer("UPDATE close_engine_conversations SET stage = 'STALLED'")
    with nothing_is_written(foreign):
        conversation.stall()


# -- E7: the guard is gone --------------------------------------------------------------------------------------------

ON_CONVERSATIONS, ON_ACTIONS = "ON close_engine_conversations", "ON pending_actions"

#: Ways to lose what records a stage change, on each kind of database.
GUARD_LOST = {
    "postgresql": {
        "dropped": f"DROP TRIGGER zz_close_engine_guard {ON_CONVERSATIONS}",
        "disabled": "ALTER TABLE close_engine_conversations DISABLE TRIGGER zz_close_engine_guard",
        "replica": "SET session_replication_role = replica",
        "gone": "DROP SCHEMA close_engine CASCADE",
    },
    "sqlite": {
        "dropped": "DROP TRIGGER close_engine_record",
        "gone": "DROP TABLE close_engine_context; DROP TABLE close_engine_history; DROP TABLE close_engine_deadlines",
    },
}

#: Ways to lose what follows a decision.
DECISIONS_LOST = {
    "postgresql": {
        "unfollowed": f"DROP TRIGGER zz_close_engine_decision {ON_ACTIONS}",
        "unguarded": f"DROP TRIGGER zz_close_engine_guard {ON_ACTIONS}",
        "disabled": "ALTER TABLE pending_actions DISABLE TRIGGER USER",
        "for replicas only": "ALTER TABLE pending_actions ENABLE REPLICA TRIGGER zz_close_engine_decision",
    },
    "sqlite": {
        "unfollowed": "DROP TRIGGER close_engine_action_approved",
        "unguarded": "DROP TRIGGER close_engine_action_withdrawn",
    },
}


def each_way(ways: dict[str, dict[str, str]], *left_out: str) -> pytest.MarkDecorator:
    """Run the test on each kind of database, for each way that there is on it."""
    pairs = [
        (kind, lost)
        for kind in ("sqlite-file", "sqlite-memory", "postgresql")
        for lost in ways[kind.partition("-")[0]]
        if lost not in left_out
    ]
    return pytest.mark.parametrize(("kind", "lost"), pairs, indirect=["kind"])


def take_away(ways: dict[str, dict[str, str]], lost: str, kind: str) -> None:
    """Lose it, in the library's own session."""
    for statement in ways[kind.partition("-")[0]][lost].split("; "):
        sql(statement)


def bring_back(foreign: ForeignWriter) -> None:
    """Have it again, as an operator does."""
    if foreign.is_postgres:
        sql("RESET session_replication_role")
        for table in PRISMA_INDEXES:
            foreign.run(f"ALTER TABLE {table} ENABLE TRIGGER USER")
    migrated_again(foreign)


def all_rows(foreign: ForeignWriter) -> dict[str, list[Any]]:
    """Read every table that a stage change or a decision writes, as far as it is still there."""
    if foreign.is_postgres:
        there = foreign.run(
            "SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace "
            "WHERE relkind = 'r' AND nspname IN ('public', 'close_engine')"
        )
    else:
        there = foreign.run("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%%'")
    return {table: sorted(foreign.run(f"SELECT * FROM {table}"), key=repr) for (table,) in there}


@contextmanager
def nothing_is_written(foreign: ForeignWriter, table: str = "close_engine_conversations") -> Iterator[None]:
    """The block raises that the guard on this table is missing, and leaves every table as it is."""
    before = all_rows(foreign)
    with pytest.raises(GuardMissing, match="close-engine migrate") as caught:
        yield
    assert caught.value.table == table
    assert all_rows(foreign) == before


@pytest.mark.parametrize("key", [None, "SM1"])
@pytest.mark.parametrize("within", [False, True], ids=["alone", "in a transaction"])
@each_way(GUARD_LOST)
def test_e7_a_change_that_nobody_would_record_is_an_error(
    kind: str, lost: str, within: bool, key: str | None, foreign: ForeignWriter, conversation_in: ConversationIn
) -> None:
    """It returned a StageChange with the id of another row, and forgot the key."""
    conversation, stalled = conversation_in(Stage.QUALIFYING), conversation_in(Stage.STALLED)
    before = conversation.__data__.copy()
    take_away(GUARD_LOST, lost, kind)
    for fire in (lambda: conversation.collect_info(key=key, actor="w"), lambda: stalled.resume(key=key)):
        with nothing_is_written(foreign), close_engine.atomic() if within else nullcontext():
            fire()
    assert conversation.__data__ == before

    if lost != "gone":
        bring_back(foreign)
        change = conversation.collect_info(key=key, actor="w")
        assert conversation.history()[-1].id == change.id
        assert foreign.history(conversation.id)[-1] == Change(
            "collect_info", "QUALIFYING", "COLLECTING_INFO", "w", key=key
        )


@each_way(GUARD_LOST)
def test_e7_nor_is_a_conversation_opened_stalled_or_lost(
    kind: str, lost: str, foreign: ForeignWriter, conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    """An opening, and the sweeps, which write many rows in a statement."""
    lead = new_lead()
    conversation_in(Stage.QUALIFYING), conversation_in(Stage.STALLED)
    close_engine_clock.move(timedelta(days=9))
    take_away(GUARD_LOST, lost, kind)
    writes: list[Callable[[], object]] = [
        lambda: close_engine.open_conversation(lead, EntryPoint.SMS_REPLY),
        close_engine.stall_silent,
        close_engine.lose_stalled,
        close_engine.expire_actions,
    ]
    for write in writes:
        with nothing_is_written(foreign):
            write()
        with nothing_is_written(foreign), close_engine.atomic():
            write()


def test_e7_nor_what_a_trigger_of_its_own_records(foreign: ForeignWriter, database: peewee.Database) -> None:
    """An opening is recorded by a trigger of its own."""
    lead = new_lead()
    name = f"aa_close_engine_opening {ON_CONVERSATIONS}" if foreign.is_postgres else "close_engine_opening"
    sql(f"DROP TRIGGER {name}")
    with nothing_is_written(foreign):
        close_engine.open_conversation(lead, EntryPoint.SMS_REPLY, key="SM1")
    migrated_again(foreign)
    opened = close_engine.open_conversation(lead, EntryPoint.SMS_REPLY, key="SM1")
    assert [change.key for change in opened.history()] == ["SM1"]


@each_way(GUARD_LOST, "gone")
def test_e7_nor_does_a_text_resume_or_a_payment_complete(
    kind: str, lost: str, foreign: ForeignWriter, conversation_in: ConversationIn
) -> None:
    """Both go back with all that they had written, so that the provider's next try finds the key unused."""
    stalled, asked = conversation_in(Stage.STALLED), conversation_in(Stage.PAYMENT_SENT)
    take_away(GUARD_LOST, lost, kind)
    with nothing_is_written(foreign):
        close_engine.receive(stalled.lead_id, "SM1", "Hello")
    with nothing_is_written(foreign):
        close_engine.record_payment(asked.lead_id, "evt_1")
    bring_back(foreign)
    assert close_engine.receive(stalled.lead_id, "SM1", "Hello").resumed
    assert close_engine.record_payment(asked.lead_id, "evt_1").completed.dest is Stage.COMPLETED


@pytest.mark.parametrize("within", [False, True], ids=["alone", "in a transaction"])
@each_way(DECISIONS_LOST)
def test_e7_a_decision_that_nothing_would_follow_is_an_error(
    kind: str,
    lost: str,
    within: bool,
    foreign: ForeignWriter,
    conversation_in: ConversationIn,
    close_engine_clock: MovableClock,
) -> None:
    """An approval was committed, with nothing in the outbox, and then failed with a DoesNotExist."""
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.MANUAL)
    action = submit(conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK})
    assert isinstance(action, PendingAction)
    take_away(DECISIONS_LOST, lost, kind)
    for decide in (lambda: action.approve(by="dana"), lambda: action.reject(by="dana"), close_engine.expire_actions):
        with (
            nothing_is_written(foreign, "pending_actions"),
            close_engine.atomic() if within else nullcontext(),
        ):
            decide()
    assert action.status is ActionStatus.PENDING
    bring_back(foreign)
    assert action.approve(by="dana").body == "pay"


def test_e7_a_decision_needs_the_conversations_guard_too(
    kind: str, foreign: ForeignWriter, conversation_in: ConversationIn
) -> None:
    """Rejecting the last payment link moves the conversation, and nobody would have recorded it."""
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.MANUAL)
    action = submit(conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK})
    assert isinstance(action, PendingAction)
    take_away(GUARD_LOST, "dropped", kind)
    with nothing_is_written(foreign):
        action.reject(by="dana")


def test_e7_as_many_triggers_are_asked_for_as_the_migrations_make(database: peewee.Database) -> None:
    """Or a trigger that is missing would not be noticed, or every decision refused."""
    made: dict[str, int] = {}
    for trigger in scripts.triggers():
        if trigger.table in dict(current().dialect.guards):
            made[trigger.table] = made.get(trigger.table, 0) + 1
    assert dict(current().dialect.guards) == made


def test_e7_what_is_left_of_a_write_speaks_for_nobody_else(conversation_in: ConversationIn, kind: str) -> None:
    """The guard leaves the id of the history row in the setting. A foreign write in the same transaction is its own."""
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.MANUAL)
    other = conversation_in(Stage.QUALIFYING)
    action = submit(conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK})
    with close_engine.atomic():
        changes = [other.collect_info(actor="w", key="SM1")]
        sql("UPDATE pending_actions SET status = 'REJECTED' WHERE id = %s", action.id)
        sql("UPDATE close_engine_conversations SET stage = 'BUILDING' WHERE id = %s", other.id)
        other.reload()
        changes.append(other.send_preview(actor="v"))
    assert [change.actor for change in other.history()][-3:-1] == ["w", conversation.history()[-1].actor]
    assert str(conversation.history()[-1].actor).startswith("database")
    assert changes == [change for change in other.history() if change.actor in ("w", "v")]


@each_way(GUARD_LOST, "gone")
def test_e7_a_worker_does_not_take_it_for_an_outage(
    kind: str,
    lost: str,
    foreign: ForeignWriter,
    conversation_in: ConversationIn,
    close_engine_clock: MovableClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What left is recorded as sent, once, and says why its trigger was not fired."""
    conversation_in(Stage.STALLED)
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    submit(conversation, ActionType.SEND_MESSAGE, "Hello")
    close_engine_clock.move(timedelta(days=9))
    sent: list[str] = []

    def send(message: OutboxMessage) -> None:
        sent.append(message.body or "")

    take_away(GUARD_LOST, lost, kind)
    if lost == "replica":  # for the worker's own connections, too
        sql(f'ALTER DATABASE "{current().database.database}" SET session_replication_role = replica')
    assert Worker(send).run_until_empty() == 1
    assert sent == ["Hello"]
    (message,) = OutboxMessage.select()
    assert message.status is MessageStatus.SENT
    assert message.refusal.startswith("GuardMissing: Nothing was written: the guard on close_engine_conversations")
    assert "database unreachable" not in caplog.text
    assert "sweep failed" in caplog.text
    assert {each.stage for each in CloseEngineConversation.select()} == {Stage.STALLED, Stage.INITIATED}


# -- G3: calls that somebody else can answer ------------------------------------------------------------------------


@contextmanager
def overheard() -> Iterator[list[str]]:
    """Collect every statement that the library sends."""
    statements: list[str] = []
    execute_sql = peewee.Database.execute_sql

    def note_and_execute(database: peewee.Database, sql: str, params: Any = None) -> Any:
        statements.append(sql)
        return execute_sql(database, sql, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peewee.Database, "execute_sql", note_and_execute)
        yield statements


def work() -> None:
    """About all that this library does."""
    assert close_engine.migrate(standalone=True)
    assert close_engine.verify() == []
    for stage in Stage:
        conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY, key="k", actor="worker-7")
        bring_to(conversation, stage)
        conversation.record(questions=["budget"], data={"budget": 900})
        conversation.history()
    stalled = close_engine.open_conversation(new_lead(), EntryPoint.REP_CLOSE)
    stalled.stall()
    assert close_engine.receive(stalled.lead_id, "SM1", "Hi").resumed
    assert close_engine.receive(stalled.lead_id, "SM1", "Hi").duplicate
    stalled.reload()
    asked = close_engine.open_conversation(new_lead(autonomy_level=AutonomyLevel.MANUAL), EntryPoint.SMS_REPLY)
    for decide in (PendingAction.approve, PendingAction.reject):
        action = close_engine.submit(asked, ActionType.SEND_MESSAGE, "Hello", key=decide.__name__, actor="worker-7")
        assert isinstance(action, PendingAction)
        assert len(close_engine.pending_actions(asked)) == 1
        decide(action, by="dana")
        asked.reload()
    pipeline()
    for message in outbox.claim(limit=10):
        message.sent(f"provider {message.id}")
    outbox.enqueue(stalled, "build_site", payload={"a": 1}, key="k")
    for message in outbox.claim(limit=10):
        message.extend(timedelta(minutes=1))
        message.give_up("no such number")
        outbox.requeue(message)
    for message in outbox.claim(limit=10):
        message.retry("later")
    paid = close_engine.open_conversation(new_lead(), EntryPoint.PREVIEW_CTA)
    bring_to(paid, Stage.PAYMENT_SENT)
    close_engine.record_payment(paid.lead_id, "pay_1")
    close_engine.sweep()
    close_engine.stall_silent(after=timedelta(0))
    close_engine.lose_stalled(after=timedelta(0))
    list(close_engine.CloseEngineConversation.in_stage_longer_than(Stage.BUILDING, timedelta(0)))
    assert all(migration.applied_at for migration in status())
    assert rows_at_stake("0001_conversations")
    assert downgrade("0001_conversations")
    assert migration_sql()


def test_g3_every_function_that_the_library_calls_is_named_with_its_schema(server: str) -> None:
    """Where anybody may create in `public`, a function there with better matching arguments ran with the rights of
    whoever worked or migrated."""
    with postgres_database(server) as url, overheard() as statements:
        database = close_engine.connect(url)
        work()
        database.close()
    called = {name for sql in statements for name in unqualified(sql)}
    assert called == set()
    assert len(statements) > 300


@pytest.mark.parametrize(
    "text",
    [
        POSTGRES.sample("deadlines", 5),
        POSTGRES.merged_list("a"),
        POSTGRES.merged_mapping("a"),
        *(path.read_text() for path in sorted(directory().glob("*.postgresql.sql"))),
    ],
)
def test_g3_every_function_in_our_sql_is_named_with_its_schema(text: str) -> None:
    """As above, for what no walk is sure to run."""
    assert unqualified(text) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("SELECT currval('s')", ["currval"]),
        ("SELECT COUNT(1) FROM (SELECT 1) AS q", ["COUNT"]),
        ("SELECT pg_catalog.count(*), min (id) FROM t", ["min"]),
        ('SELECT "count"(1)', ["quoted"]),
        ("SELECT 1 WHERE x IN (SELECT now()) AND (y) -- and(z)", ["now"]),
        ("CREATE INDEX i ON t (lower(x))", ["lower"]),
        ("SELECT 1 FROM a JOIN b ON fits(a.x, b.x)", ["fits"]),
        ("INSERT INTO t (a) VALUES (pg_catalog.upper('f(x)')) ON CONFLICT (a) DO NOTHING", []),
        ("CREATE TABLE IF NOT EXISTS t (a timestamp(3), UNIQUE (a))", []),
        ("BEGIN IF EXISTS (SELECT) THEN PERFORM set_config('a', 'b', true); END IF; END", ["set_config"]),
        ("SELECT coalesce(nullif(a, ''), greatest(b, c)) FROM pg_catalog.unnest(x) AS k (number)", []),
    ],
)
def test_g3_an_unqualified_call_is_found(text: str, found: list[str]) -> None:
    """What finds them must be seen to find them."""
    assert unqualified(text) == found


#: Signatures that match our arguments better than PostgreSQL's own, or as well.
HOSTILE = [
    *("currval(text)", "pg_advisory_xact_lock(integer)", "hashtext(name)", "set_config(text, text, boolean)"),
    *("count(integer)", "count(text)", "count(bigint)", "min(text)", "min(bigint)", "min(timestamp)"),
    *("array_agg(name)", "unnest(int2vector)", "quote_ident(name)", "quote_ident(text)", "format_type(oid, integer)"),
    *("obj_description(oid, text)", "obj_description(oid, name)", "current_setting(name)", "current_setting(text)"),
    *("jsonb_typeof(jsonb)", "jsonb_agg(jsonb)", "jsonb_array_elements(jsonb)", "date_trunc(text, timestamp)"),
    *("jsonb_build_object(text, text, text, text)", "pg_get_indexdef(oid, integer, boolean)", "clock_timestamp()"),
    *("generate_subscripts(int2vector, integer)", "current_schema()", "to_char(timestamp, text)", "now()"),
]


def test_g3_what_anybody_made_in_public_is_never_called(server: str, role: str) -> None:
    """A role with no right but to create in `public` makes functions that answer in place of PostgreSQL's."""
    with postgres_database(server) as url:
        execute(url, f"GRANT CREATE ON SCHEMA public TO {role}")
        made = [
            f"CREATE FUNCTION public.{signature} RETURNS bigint LANGUAGE plpgsql AS "
            f"$$BEGIN RAISE 'called by %: {signature}', current_user; END$$"
            for signature in HOSTILE
        ]
        execute(url, *(f"SET SESSION AUTHORIZATION {role}; {function}" for function in made))
        with pytest.raises(psycopg2.errors.RaiseException, match=r"called by \w+: count\(integer\)"):
            query(url, "SELECT count(1)")

        database = close_engine.connect(url)
        work()  # each of them raises
        database.close()
        execute(url, f"DROP OWNED BY {role}")


@pytest.fixture
def role(server: str) -> Iterator[str]:
    """A new role that can do nothing; given up after the databases it has rights in."""
    name = new_name()
    execute(server, f"CREATE ROLE {name} LOGIN")
    yield name
    execute(server, f"DROP ROLE {name}")


# -- G9: names -----------------------------------------------------------------------------------------------------

ODD: dict[str, Any] = {
    "leads": "50% of {leads}",
    "users": "it's \"users\" \\ %s 'public.'",
    "clients": "%(clients)s $body$ -- public.x\n;",
}


@pytest.mark.parametrize("schema", ["public", '100% "{crm}" \\ -- public.'])
def test_g9_odd_names_survive_migrating(server: str, schema: str) -> None:
    """A `%` in the name of a table or a schema was an IndexError: the driver took it for a placeholder."""
    with postgres_database(server) as url, postgres_database(server) as other:
        for each in (url, other):
            quoted = schema.replace('"', '""')
            query(each, f'CREATE SCHEMA IF NOT EXISTS "{quoted}"')
        close_engine.connect(f"{url}&schema={quote(schema)}", **ODD)
        script = ";\n".join(migration_sql(standalone=True))
        assert close_engine.migrate(standalone=True)
        assert migration_sql() == []
        writer = ForeignWriter(psycopg2.connect(url))
        writer.run('SET search_path = "' + quoted.replace("%", "%%") + '"')
        leads = '"50% of {leads}"'.replace("%", "%%")
        writer.run(f"INSERT INTO {leads} (id) VALUES (%s)", "l")
        writer.run(
            "INSERT INTO close_engine_conversations (id, lead_id, entry_point, stage, updated_at) "
            "VALUES ('c', 'l', 'SMS_REPLY', 'PREVIEW_SENT', now())"
        )
        writer.run(
            "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message) "
            "VALUES ('a', 'c', 'l', 'SEND_MESSAGE', 'Hi')"
        )
        writer.run("UPDATE pending_actions SET status = 'APPROVED'")
        writer.run("UPDATE close_engine_conversations SET stage = 'CLOSED_LOST'")
        assert writer.run("SELECT status FROM close_engine.outbox") == [("WITHDRAWN",)]
        writer.connection.commit()
        writer.connection.close()
        assert downgrade("0001_conversations")

        query(other, f'SET search_path = "{quoted}"; {script}')
        database = close_engine.connect(f"{other}&schema={quote(schema)}", **ODD)
        assert close_engine.migrate() == []
        assert len(downgrade("0001_conversations")) == 5
        database.close()


#: What a table or a schema may be called.
NAMES = {
    "percent": "50% of %s, %(leads)s, %%s and 100%",
    "braces": "{leads} {history} {} }{",
    "quotes": 'it\'s "leads" \'\'""',
    "backslash": "a\\b \\n \\",
    "newline": "two\nlines\r\n\t\v;\n",
    "dollars": "$body$ $$ $1 -- x /* ?",
    "dot": "crm.leads",
    "space": " ",
    "keyword": "select",
    "question": "? :name <table> @x",
    "unicode": "Größe 名前 \U0001f600 \x85\u2028",
    "control": "bell \x07 escape \x1b",
    "letters": "x" * 63,
    "bytes": "é" * 31 + "x",
}


def three_like(name: str) -> dict[str, Any]:
    """Such a name for each of the CRM's tables, no longer than this one."""
    return {"leads": name, "users": name[:-1] + "2", "clients": name[:-1] + "3"}


@pytest.mark.parametrize("name", NAMES)
def test_g9_a_table_of_any_name_works(name: str, empty_url: str) -> None:
    """A `%` was an IndexError in Peewee's own queries, and braces in the name of a table broke `verify`."""
    database = close_engine.connect(empty_url, **three_like(NAMES[name]))
    work()
    database.close()


@pytest.mark.parametrize("name", ["percent", "braces", "quotes"])
def test_g9_a_table_of_any_name_works_with_psycopg_3(name: str, server: str) -> None:
    """psycopg 3 reads placeholders in its own way."""
    with postgres_database(server) as url:
        database = Psycopg3Database(url)
        close_engine.bind(database, **three_like(NAMES[name]))
        work()
        database.close()


def test_g9_a_percent_sign_survives_joins_aliases_and_a_rebinding(empty_url: str) -> None:
    """Peewee builds its tables anew for an alias, and the next binding has other names."""
    names = three_like(NAMES["percent"])
    for given, other in (({}, names), (names, {})):
        close_engine.connect("sqlite:///:memory:", **other)
        database = close_engine.connect(empty_url, **given)
        close_engine.migrate(standalone=True)
        rep = User.create()
        conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY, rep=rep)
        lead: Any = Lead.alias()
        query = CloseEngineConversation.select().join(lead, on=CloseEngineConversation.lead == lead.id).switch()
        assert list(query.join(User).where(lead.phone.is_null(False), User.id == rep)) == [conversation]
        (loaded,) = peewee.prefetch(Lead.select(), CloseEngineConversation.select(), User.select())
        assert loaded.close_conversation.rep == rep
        assert Lead._meta.table_name == given.get("leads", "leads")
        Lead.update(phone="+1555").where(Lead.id == loaded).execute()
        assert Lead.delete().where(Lead.phone == "+1555").execute() == 1
        assert downgrade("0001_conversations")
        database.close()


@pytest.mark.parametrize("name", ["percent", "braces", "quotes", "backslash", "newline", "dollars", "control", "long"])
def test_g9_a_schema_of_any_name_works(name: str, server: str) -> None:
    """The server refused `?schema=` with a newline. A name that is too long PostgreSQL cuts wherever it stands."""
    schema = {**NAMES, "dollars": "$$ $1 -- x /* ?", "long": "é" * 40}[name]
    with postgres_database(server) as url:
        quoted = schema.replace('"', '""').replace("%", "%%")
        execute(url, f'CREATE SCHEMA "{quoted}"'.replace("%%", "%"))
        database = close_engine.connect(f"{url}&schema={quote(schema, safe='')}")
        work()
        assert query(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == []
        database.close()


TAKEN = "this library's own table has that name"
LIKE_OURS = "names that begin with close_engine_ are this library's own"
CUT = "PostgreSQL cuts it off after 63 bytes; give what is left, "


@pytest.mark.parametrize(
    ("url", "names", "why"),
    [
        (url, names, f"The name of the CRM's {[*names][-1]} table cannot be {[*names.values()][-1]!r}: {why}.")
        for url, names, why in [
            *[
                case
                for url in ("sqlite:///:memory:", "postgresql://h/crm")
                for case in (
                    (url, {"leads": ""}, "it is empty"),
                    (url, {"leads": "a\0b"}, "PostgreSQL cannot hold a NUL character"),
                    (url, {"users": "\udcff"}, "it contains half of a surrogate pair, which is not a character"),
                    (url, {"clients": 7}, "it must be text"),
                    (url, {"leads": "pending_actions"}, TAKEN),
                    (url, {"users": "close_engine_conversations"}, TAKEN),
                    (url, {"leads": "x", "users": "x"}, "its leads table has that name, and they must be two tables"),
                    (url, {"clients": "leads"}, "its leads table has that name, and they must be two tables"),
                )
            ],
            ("sqlite:///:memory:", {"leads": "Pending_ACTIONS"}, TAKEN),
            ("sqlite:///:memory:", {"leads": "Close_Engine_history"}, LIKE_OURS),
            (
                "sqlite:///:memory:",
                {"leads": "x", "users": "X"},
                "its leads table has that name, and they must be two tables",
            ),
            ("postgresql://h/crm", {"leads": "x" * 64}, f"{CUT}{'x' * 63!r}"),
            ("postgresql://h/crm", {"leads": "é" * 32}, f"{CUT}{'é' * 31!r}"),
        ]
    ],
)
def test_g9_a_name_that_no_table_can_have_is_refused(url: str, names: dict[str, Any], why: str) -> None:
    """At `connect()`, by a sentence; the earlier binding stays."""
    bound = close_engine.connect("sqlite:///:memory:", leads="Lead")
    with pytest.raises(ConfigurationError) as caught:
        close_engine.connect(url, **names)
    assert str(caught.value) == why
    assert current().database is bound
    assert Lead._meta.table_name == "Lead"


def test_g9_a_name_from_the_environment_is_checked_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python cannot read as text comes from the environment as halves of surrogate pairs. Empty means: not set."""
    monkeypatch.setenv("CLOSE_ENGINE_LEADS_TABLE", "")
    close_engine.connect("sqlite:///:memory:")
    assert Lead._meta.table_name == "leads"
    monkeypatch.setitem(os.environ, "CLOSE_ENGINE_LEADS_TABLE", os.fsdecode(b"\xff"))
    with pytest.raises(
        ConfigurationError, match=r"^The name of the CRM's leads table cannot be '.udcff': it contains half"
    ):
        close_engine.connect("sqlite:///:memory:")


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ("", "its schema is empty"),
        ("a%00b", "its schema has a NUL character"),
        ("a%ffb", "its schema is not UTF-8"),
        ("%ed%b3%bf", "its schema is not UTF-8"),
        ("$body$", "its schema has $body$ in its name, which ends the text of a function"),
        ("close_engine", "the schema close_engine is for this library's own tables; name the one of the CRM's"),
    ],
)
def test_g9_a_schema_that_cannot_be_is_refused(schema: str, why: str) -> None:
    """A byte that is no text became another character, and the tables of another schema were used."""
    with pytest.raises(ConfigurationError) as caught:
        close_engine.connect(f"postgresql://u:s3cr3t@h/crm?schema={schema}")
    shown = f"postgresql://u:***@h/crm?schema={schema}"
    assert str(caught.value) == f"The database URL {shown!r} cannot be used: {why}."


def test_g9_what_only_the_database_knows_is_said_when_migrating(server: str) -> None:
    """A schema that is not there, and a name with a dot that was meant as schema and table."""
    with postgres_database(server) as url:
        execute(url, "CREATE SCHEMA crm", "CREATE TABLE crm.leads (id text PRIMARY KEY, phone text)")
        cases: list[tuple[str, dict[str, Any], str]] = [
            (f"{url}&schema=nowhere", {}, "the CRM's leads table was not found as 'leads'"),
            (url, {"leads": "crm.leads"}, "the CRM's leads table was not found as 'crm.leads' in schema public"),
        ]
        for address, names, why in cases:
            database = close_engine.connect(address, **names)
            for run in (close_engine.migrate, migration_sql):
                with pytest.raises(SchemaError) as caught:
                    run()
                assert why in str(caught.value)
            database.close()


# -- E1: the CRM's schema is dropped and made again -----------------------------------------------------------------


def reset_by_prisma(url: str) -> None:
    """Do what `prisma migrate reset` does: only `public` is dropped, and made again with the models in it."""
    query(url, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    restore(url, AFTER)


def refill(leads: list[str]) -> None:
    """Seed the CRM anew, past the library: in stages that nobody has watched."""
    for number, lead in enumerate(leads):
        current().execute(
            "INSERT INTO leads (id, first_name, company_name, phone, updated_at) VALUES (%s, 'A', 'B', '+1555', now())",
            (lead,),
        )
        current().execute(
            "INSERT INTO close_engine_conversations (id, lead_id, entry_point, stage, updated_at) "
            "VALUES (%s, %s, 'SMS_REPLY', %s, now())",
            (f"seed {lead}", lead, ["BUILDING", "QUALIFYING"][number % 2]),
        )


@pytest.fixture
def reset_url(server: str) -> Iterator[str]:
    """A CRM that was migrated, worked in, and reset by Prisma; the library's schema was left standing."""
    with postgres_database(server) as url:
        restore(url, AFTER)
        database = close_engine.connect(url)
        close_engine.migrate()
        refill(["old"])
        conversation = CloseEngineConversation.get()
        submit(conversation, ActionType.SEND_MESSAGE, "Still there?")
        outbox.enqueue(conversation, "build_site")
        assert not close_engine.pending_actions()
        submit(conversation, ActionType.SEND_PREVIEW, "Look", policy=lambda level, type: True)
        reset_by_prisma(url)
        yield url
        database.close()


def test_e1_after_a_reset_migrate_makes_the_guard_again(reset_url: str) -> None:
    """`migrate()` said that there was nothing to do, and any word passed as a stage."""
    refill(["new", "newer"])
    assert len(close_engine.verify()) > 10

    assert close_engine.migrate() == [migration.name for migration in status()]

    assert close_engine.verify() == []
    assert close_engine.migrate() == []
    with pytest.raises(peewee.IntegrityError, match="NONSENSE"):
        current().execute("UPDATE close_engine_conversations SET stage = 'NONSENSE'")
    for conversation in CloseEngineConversation.select():
        (adopted,) = conversation.history()
        assert (adopted.trigger, adopted.source, adopted.dest) == ("adopted", None, conversation.stage)
        assert conversation.stall().source == adopted.dest


def test_e1_after_a_reset_nothing_of_the_old_life_leaves(reset_url: str) -> None:
    """The texts of the leads before the reset were claimed and sent."""
    assert close_engine.migrate()

    assert outbox.claim(limit=10) == []
    assert [message.status for message in OutboxMessage.select()] == [MessageStatus.WITHDRAWN] * 2
    assert close_engine.sweep() == Swept()
    assert query(reset_url, "SELECT * FROM close_engine.deadlines") == []


def test_e1_after_a_reset_downgrading_leaves_what_prisma_made(reset_url: str) -> None:
    """The library had made these tables once, so taking the migrations back dropped Prisma's new ones."""
    close_engine.migrate()
    refill(["new"])
    before = query(reset_url, "SELECT id, stage FROM close_engine_conversations")
    assert not any("public" in name or "." not in name for name in rows_at_stake("0001_conversations"))

    downgrade("0001_conversations")

    assert query(reset_url, "SELECT id, stage FROM close_engine_conversations") == before
    assert query(reset_url, "SELECT autonomy_level, close_entry_point, qualification_data FROM leads") == [
        ("FULL_AUTO", None, None)
    ]


@pytest.mark.parametrize("change", ["DROP autonomy_level", "DROP close_entry_point, DROP qualification_data"])
def test_e1_a_column_that_prisma_dropped_and_made_again_is_prismas(postgres_url: str, change: str) -> None:
    """The same without a reset: a push without our models, and later one with them."""
    database = close_engine.connect(postgres_url)
    names = change.replace("DROP ", "").split(", ")
    query(postgres_url, f"ALTER TABLE leads {change}")
    types = {"autonomy_level": "text NOT NULL DEFAULT 'FULL_AUTO'", "qualification_data": "jsonb"}
    query(postgres_url, "ALTER TABLE leads " + ", ".join(f"ADD {name} {types.get(name, 'text')}" for name in names))
    assert close_engine.verify() == []

    downgrade("0001_conversations")

    left = {name for (name,) in query(postgres_url, "SELECT attname::text FROM pg_attribute WHERE attnum > 0 "
                                      "AND NOT attisdropped AND attrelid = 'leads'::regclass")}  # fmt: skip
    assert left == {"id", "phone", "name", *names}
    database.close()


def test_e1_a_push_that_dropped_our_tables_is_made_good(database: peewee.Database) -> None:
    """As when the models are not declared yet: Prisma drops the tables, and the triggers with them."""
    lead = new_lead()
    close_engine.submit(close_engine.open_conversation(lead, EntryPoint.SMS_REPLY), ActionType.SEND_MESSAGE, "Hi")
    for table in ("pending_actions", "close_engine_conversations"):
        database.execute_sql(f"DROP TABLE {table}")

    assert len(close_engine.migrate()) == 5

    assert close_engine.verify() == []
    assert outbox.claim(10) == []
    conversation = close_engine.open_conversation(lead, EntryPoint.SMS_REPLY)
    assert bring_to(conversation, Stage.COMPLETED).stage is Stage.COMPLETED


def test_e1_the_whole_script_makes_it_whole_after_every_reset(reset_url: str) -> None:
    """As a migration of Prisma's own it runs after a reset without anybody thinking of it, and on a new database."""
    script = ";\n".join(migration_sql(whole=True))
    for _ in range(2):
        query(reset_url, script)
        assert close_engine.verify() == []
        query(reset_url, script)
        assert close_engine.verify() == []
        reset_by_prisma(reset_url)
    query(reset_url, "DROP SCHEMA close_engine CASCADE")
    query(reset_url, script)
    assert close_engine.verify() == []
    downgrade("0001_conversations")
    assert query(reset_url, "SELECT nspname FROM pg_namespace WHERE nspname = 'close_engine'") == []
    assert query(reset_url, "SELECT count(*) FROM close_engine_conversations") == [(0,)]


def test_e1_an_older_version_does_not_undo_what_a_newer_one_made(postgres: peewee.Database) -> None:
    """A worker that was not upgraded yet calls migrate() when it starts."""
    current().execute("INSERT INTO {migrations} (name, applied) VALUES ('0999_later', now())")
    postgres.execute_sql(
        "CREATE OR REPLACE FUNCTION close_engine.forget_deadlines() RETURNS trigger LANGUAGE plpgsql "
        "SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS 'BEGIN RETURN NULL; /* better */ END'"
    )
    body = "SELECT prosrc FROM pg_proc WHERE proname = 'forget_deadlines'"
    (before,) = postgres.execute_sql(body).fetchall()

    assert close_engine.migrate() == []

    assert postgres.execute_sql(body).fetchall() == [before]
    assert close_engine.verify() == ["The migration 0999_later is unknown to this version: upgrade close-engine."]
    refused: list[Callable[[], list[str]]] = [repair, partial(migration_sql, whole=True)]
    for verb in refused:
        with pytest.raises(SchemaError, match=r"a newer version has applied 0999_later.* Upgrade close-engine\."):
            verb()
    assert postgres.execute_sql(body).fetchall() == [before]


# -- E3: the schema is renamed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mend", [close_engine.migrate, repair])
def test_e3_a_renamed_schema_is_told_and_mended(postgres_url: str, mend: Callable[[], list[str]]) -> None:
    """Approving, closing and deleting failed with `relation "public.…" does not exist`, and verify found nothing."""
    database = close_engine.connect(postgres_url)
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    action = submit(conversation, ActionType.SEND_MESSAGE, "Hi", policy=lambda level, type: True)
    assert isinstance(action, PendingAction)
    database.close()
    query(postgres_url, 'ALTER SCHEMA public RENAME TO "the crm\'s"')
    database = close_engine.connect(postgres_url + "&schema=" + quote("the crm's"))

    found = close_engine.verify()
    assert found
    assert all(
        problem.endswith(
            "() speaks of the schema public, and the CRM's tables are in \"the crm's\": "
            "run close-engine migrate, which makes it again."
        )
        for problem in found
    )
    assert mend()
    assert close_engine.verify() == []

    action.approve(by="dana")
    conversation = CloseEngineConversation.get()
    conversation.close_lost(reason="too dear")
    assert close_engine.Lead.delete().execute() == 1
    database.close()


# -- E4, E5: a dump that was restored ----------------------------------------------------------------------------------


def test_e4_a_dump_without_rights_is_told_and_mended(postgres: peewee.Database, postgres_url: str) -> None:
    """`pg_dump --no-acl` loses the REVOKE: whoever has USAGE on the schema could attach our functions to another table.
    In the restored database every table has another number."""
    bring_to(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.BUILDING)
    query(postgres_url, "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA close_engine TO PUBLIC")
    query(postgres_url, "UPDATE close_engine.created SET identity = '1/2/3'")
    found = close_engine.verify()
    assert len(found) > 5
    assert all(problem.startswith("Everybody may execute close_engine.") for problem in found)

    assert len(close_engine.migrate()) == 5

    assert close_engine.verify() == []
    downgrade("0001_conversations")
    assert query(postgres_url, "SELECT 1 FROM pg_class WHERE relname = 'close_engine_conversations'") == []


def test_e5_sequences_that_are_behind_are_told_and_set(
    postgres: peewee.Database, postgres_url: str, server: str
) -> None:
    """After logical replication, or a dump of the data alone, the next change failed with `history_pkey`."""
    conversation = bring_to(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.BUILDING)
    submit(conversation, ActionType.SEND_MESSAGE, "Hi")
    close_engine.receive(conversation.lead_id, "SM1", "Hello")
    with postgres_database(server) as url:
        database = close_engine.connect(url)
        close_engine.migrate(standalone=True)
        for table in ("history", "outbox", "inbox"):
            rows = postgres.execute_sql(f"SELECT row_to_json(t)::text FROM close_engine.{table} t").fetchall()
            for (row,) in rows:
                current().execute(
                    f"INSERT INTO {{{table}}} SELECT * FROM json_populate_record(NULL::{{{table}}}, %s::json)", (row,)
                )
        found = [problem for problem in close_engine.verify() if "sequence" in problem]
        assert [problem.split()[2] for problem in found] == [
            f"close_engine.{table}_id_seq" for table in ("history", "outbox", "inbox")
        ]

        assert len(repair()) == 3

        assert close_engine.verify() == []
        bring_to(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.COMPLETED)
        database.close()


# -- E6: two CRMs in one database -----------------------------------------------------------------------------------


def test_e6_a_second_crm_in_one_database_is_refused(server: str) -> None:
    """migrate() for the second said nothing and left it unguarded, and what verify said to do broke the first."""
    with postgres_database(server) as url:
        query(url, "CREATE SCHEMA one; CREATE SCHEMA two")
        close_engine.connect(f"{url}&schema=one")
        close_engine.migrate(standalone=True)
        database = close_engine.connect(f"{url}&schema=two")
        before = everything(url)
        sentence = (
            "This database serves the CRM in the schema one already, so it cannot serve the one in two: close_engine "
            "serves one CRM per database; give this one a database of its own."
        )
        refusing: list[Callable[[], Any]] = [
            close_engine.migrate,
            partial(close_engine.migrate, standalone=True),
            migration_sql,
            repair,
            downgrade,
            partial(rows_at_stake, "0001_conversations"),
        ]
        for verb in refusing:
            with pytest.raises(errors.SchemaError) as caught:
                verb()
            assert str(caught.value) == f"Nothing was changed. {sentence}"
        assert close_engine.verify() == [sentence]
        assert everything(url) == before
        database.close()

        close_engine.connect(f"{url}&schema=one")
        assert close_engine.verify() == []
        bring_to(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.COMPLETED)
        downgrade("0001_conversations")
        database = close_engine.connect(f"{url}&schema=two")
        assert len(close_engine.migrate(standalone=True)) == 5
        database.close()


def test_e6_peewees_own_command_refuses_it_too(server: str) -> None:
    """pwmigrate keeps a log of its own for each schema, so that every script is pending there."""
    with postgres_database(server) as url:
        query(url, "CREATE SCHEMA two")
        database = close_engine.connect(url)
        close_engine.migrate(standalone=True)
        before = everything(url)
        second = close_engine.connect(f"{url}&schema=two")
        with pytest.raises(MigrationError, match="serves the CRM in the schema public already"):
            Runner(second, str(directory())).up()
        query(url, "DROP TABLE two.schema_migration")
        assert everything(url) == before
        database.close()


# -- G5: the owner changes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tables", [["pending_actions"], ["close_engine_conversations", "pending_actions"]])
def test_g5_another_owner_of_the_crms_tables_is_told_and_mended(server: str, role: str, tables: list[str]) -> None:
    """Approving and closing failed with "permission denied", and verify found nothing."""
    with postgres_database(server) as url:
        execute(url, f"GRANT ALL ON SCHEMA public TO {role}", f"GRANT CREATE ON DATABASE {url_name(url)} TO {role}")
        as_role = url.replace("//postgres:@", f"//{role}:@")
        database = close_engine.connect(as_role)
        close_engine.migrate(standalone=True)
        conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
        action = submit(conversation, ActionType.SEND_MESSAGE, "Hi", policy=lambda level, type: True)
        assert isinstance(action, PendingAction)
        database.close()
        database = close_engine.connect(url)
        for table in tables:
            query(url, f"ALTER TABLE {table} OWNER TO postgres")
        assert close_engine.verify() == [
            f"The functions of close_engine run with the rights of {role}, who lacks {right} on public.{table}: grant "
            f"it (GRANT {right} ON public.{table} TO {role}), or run close-engine verify --repair as the table's owner."
            for table in tables
            for right in ("SELECT", "UPDATE")
        ]

        assert len(repair()) == 2 * len(tables)

        assert close_engine.verify() == []
        action.approve(by="dana")
        CloseEngineConversation.get().close_lost(reason="too dear")
        database.close()


def test_g5_a_schema_that_our_functions_may_not_use_is_told_and_mended(server: str, role: str) -> None:
    """The owner of the functions keeps the tables, and loses the schema that they are in."""
    with postgres_database(server) as url:
        execute(url, f"GRANT ALL ON SCHEMA public TO {role}", f"GRANT CREATE ON DATABASE {url_name(url)} TO {role}")
        database = close_engine.connect(url.replace("//postgres:@", f"//{role}:@"))
        close_engine.migrate(standalone=True)
        database.close()
        database = close_engine.connect(url)
        execute(url, f"REVOKE ALL ON SCHEMA public FROM {role}, PUBLIC")
        assert close_engine.verify() == [
            f"The functions of close_engine run with the rights of {role}, who lacks USAGE on SCHEMA public: grant "
            f"it (GRANT USAGE ON SCHEMA public TO {role}), or run close-engine verify --repair as the table's owner."
        ]
        with pytest.raises(peewee.DatabaseError):
            close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)

        assert len(repair()) == 1

        assert close_engine.verify() == []
        bring_to(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.COMPLETED)
        database.close()


def test_g5_row_level_security_that_hides_rows_from_our_functions_is_told(server: str, role: str) -> None:
    """As with another owner: the functions see no conversation, and refuse every approval."""
    with postgres_database(server) as url:
        execute(url, f"GRANT ALL ON SCHEMA public TO {role}", f"GRANT CREATE ON DATABASE {url_name(url)} TO {role}")
        database = close_engine.connect(url.replace("//postgres:@", f"//{role}:@"))
        close_engine.migrate(standalone=True)
        database.execute_sql("ALTER TABLE close_engine_conversations ENABLE ROW LEVEL SECURITY")
        assert close_engine.verify() == []  # the owner of a table sees all of it
        database.execute_sql("ALTER TABLE close_engine_conversations FORCE ROW LEVEL SECURITY")
        assert close_engine.verify() == [
            "Row-level security hides rows of public.close_engine_conversations from the functions of close_engine, "
            f"which run with the rights of {role}: give that role BYPASSRLS, or a policy (CREATE POLICY close_engine "
            f"ON public.close_engine_conversations TO {role} USING (true))."
        ]
        database.execute_sql(f"CREATE POLICY close_engine ON public.close_engine_conversations TO {role} USING (true)")
        assert close_engine.verify() == []
        database.close()


def url_name(url: str) -> str:
    """The name of the database in a URL."""
    return urlsplit(url).path.removeprefix("/")


# -- G1: one unreadable row stops nobody ------------------------------------------------------------------------------

#: A document that some reader cannot read, and one at the bound.
UNREADABLE = {
    "deep lists": ("[" * 101 + "1" + "]" * 101, "[" * 100 + "1" + "]" * 100),
    "deep objects": ('{"[": ' * 101 + "1" + "}" * 101, '{"[": ' * 100 + "1" + "}" * 100),
    "a long number": ('{"n": 1' + "0" * 4000 + "}", '{"n": 1' + "0" * 3999 + "}"),
    "long": (f'["{"x" * 2_000_000}"]', f'["{"x" * 990_000}"]'),
}

#: What looks like a bad document, and is none: brackets and digits in strings, quotes that are escaped.
READABLE = [
    '["' + "[" * 500 + '"]',
    '["' + "1" * 5000 + '"]',
    '["\\"' + "[" * 500 + '\\\\", 1]',
    "[" + "[1]," * 500 + "2]",
]


@pytest.mark.parametrize(("bad", "good"), UNREADABLE.values(), ids=UNREADABLE)
def test_g1_json_that_a_reader_could_not_read_is_not_let_in(
    bad: str, good: str, foreign: ForeignWriter, conversation_in: ConversationIn
) -> None:
    """An action approved with metadata nested 990 deep stopped every start of the worker."""
    conversation = conversation_in(Stage.QUALIFYING, autonomy_level=AutonomyLevel.MANUAL)
    action = submit(conversation, ActionType.SEND_MESSAGE, "Hi")
    assert isinstance(action, PendingAction)
    writes = {
        f"UPDATE close_engine_conversations SET {column} = %s WHERE id = %s": conversation.id
        for column in ("questions_asked", "collected_data")
    }
    for statement, row in {"UPDATE pending_actions SET metadata = %s WHERE id = %s": action.id, **writes}.items():
        with pytest.raises(TURNED_DOWN, match=r"close_engine: .*(reader|JSON)"):
            foreign.run(statement, bad, row)
        for document in (good, *READABLE, None):
            foreign.run(statement, document, row)
    with pytest.raises(TURNED_DOWN, match="close_engine: "):
        foreign.insert("QUALIFYING", collected_data=bad)
    assert PendingAction.get_by_id(action.id).approve(by="dana").body == "Hi"


@pytest.mark.parametrize("at", ["9999-01-01 00:00:00.000", "infinity", "10000-01-01 00:00:00", "0001-01-01 BC"])
@pytest.mark.parametrize("column", ["created_at", "updated_at", "stalled_at", "completed_at", "closed_lost_at"])
def test_g1_a_time_that_python_cannot_hold_is_not_let_in(
    column: str, at: str, kind: str, foreign: ForeignWriter
) -> None:
    """`updated_at = 'infinity'` broke every list of that stage, and could only grow."""
    conversation = foreign.insert("QUALIFYING")
    if kind != "postgresql" and column == "updated_at" and not at.startswith("9999"):
        foreign.update(conversation, updated_at=at)  # SQLite's guard puts now into what is no time
        (row,) = CloseEngineConversation.select()
        assert row.updated_at < datetime.now(timezone.utc) + timedelta(days=1)
        return
    with pytest.raises(TURNED_DOWN, match="close_engine: "):
        foreign.update(conversation, **{column: at})
    with pytest.raises(TURNED_DOWN, match="close_engine: "):
        foreign.insert("QUALIFYING", **{column: at})
    assert [each.id for each in CloseEngineConversation.select()] == [conversation]


@pytest.mark.parametrize("column", ["created_at", "expires_at", "approved_at"])
def test_g1_nor_in_an_action(column: str, foreign: ForeignWriter, conversation_in: ConversationIn) -> None:
    """The same for the other table."""
    conversation = conversation_in(Stage.QUALIFYING, autonomy_level=AutonomyLevel.MANUAL)
    action = submit(conversation, ActionType.SEND_MESSAGE, "Hi")
    assert isinstance(action, PendingAction)
    for at in ("infinity", "9999-01-01 00:00:00.000"):
        with pytest.raises(TURNED_DOWN, match="close_engine: "):
            foreign.run(f"UPDATE pending_actions SET {column} = %s WHERE id = %s", at, action.id)
    foreign.run(f"UPDATE pending_actions SET {column} = %s WHERE id = %s", "9998-12-31 23:59:59.999", action.id)


@pytest.mark.parametrize("column", ["updated_at", "stalled_at", "payment_link_sent_at"])
def test_g1_a_stamp_is_at_most_a_day_ahead(
    column: str, foreign: ForeignWriter, close_engine_clock: MovableClock
) -> None:
    """A clock that is wrong by years would keep a conversation from ever stalling."""
    conversation = foreign.insert("STALLED")
    now = close_engine_clock()
    with pytest.raises(TURNED_DOWN, match="more than a day after now; check the clock of the writer"):
        foreign.update(conversation, **{column: f"{now + timedelta(hours=25):%Y-%m-%d %H:%M:%S}"})
    foreign.update(conversation, **{column: f"{now + timedelta(hours=23):%Y-%m-%d %H:%M:%S}"})


def test_g1_what_stands_there_already_hinders_no_other_change(kind: str, foreign: ForeignWriter) -> None:
    """A row from before the guard moves on, as long as nobody writes its bad column."""
    guard = ["zz_close_engine_guard"] if kind == "postgresql" else ["close_engine_guard_update_readable"]
    conversation = foreign.insert("QUALIFYING")
    with before_the_guard(foreign, guard):
        foreign.update(conversation, collected_data="[" * 200 + "]" * 200, created_at="9999-06-01 00:00:00.000")
    foreign.update(conversation, stage="STALLED")
    assert foreign.stage(conversation) == "STALLED"
    with pytest.raises(TURNED_DOWN, match="close_engine: "):
        foreign.update(conversation, collected_data="[" * 201 + "]" * 201)


@contextmanager
def before_the_guard(writer: ForeignWriter, names: list[str]) -> Iterator[None]:
    """Take triggers of the conversations away for a while, as a row from before the guard needs."""
    made = []
    for name in names:
        if writer.is_postgres:
            writer.run(f"ALTER TABLE close_engine_conversations DISABLE TRIGGER {name}")
        else:
            made += writer.run("SELECT sql FROM sqlite_master WHERE name = %s", name)
            writer.run(f"DROP TRIGGER {name}")
    yield
    for name in names if writer.is_postgres else ():
        writer.run(f"ALTER TABLE close_engine_conversations ENABLE TRIGGER {name}")
    for (statement,) in made:
        writer.connection.execute(statement)


def test_g1_an_updated_at_out_of_reach_can_be_set_back(foreign_postgres: ForeignWriter) -> None:
    """It could only grow, so no writer could mend the row."""
    conversation = foreign_postgres.insert("QUALIFYING")
    with before_the_guard(foreign_postgres, ["zz_close_engine_guard"]):
        foreign_postgres.update(conversation, updated_at="infinity")
    foreign_postgres.update(conversation, updated_at="2026-01-02 00:00:00.000")
    assert CloseEngineConversation.get_by_id(conversation).stage == Stage.QUALIFYING


def test_g1_verify_names_a_row_whose_time_no_reader_can_read(kind: str, foreign: ForeignWriter) -> None:
    """It stood there before the guard."""
    guard = "zz_close_engine_guard" if kind == "postgresql" else "close_engine_guard_update_readable"
    conversation = foreign.insert("QUALIFYING", "c1")
    with before_the_guard(foreign, [guard]):
        foreign.update(conversation, created_at="infinity")
    assert (
        "In 1 row of close_engine_conversations ('c1'), created_at is not between the years 1 and 9998: set it to a "
        "time that Python can read."
    ) in [found.replace("public.", "") for found in close_engine.verify()]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), inner)
    ),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given_any(value=JSON.filter(lambda value: value is not None), levels=st.integers(0, 90))
def test_g1_what_is_accepted_is_let_in_and_comes_back(value: Any, levels: int, conversation_in: ConversationIn) -> None:
    """The guards take whatever the library takes, on every database."""
    conversation = conversation_in(Stage.QUALIFYING)
    for _ in range(levels):
        value = [value]
    try:
        conversation.collected_data = value
    except InvalidValue:
        reject()
    conversation.save()
    assert CloseEngineConversation.get_by_id(conversation.id).collected_data == conversation.collected_data


@pytest.mark.parametrize("length", [timedelta.max, timedelta(days=40_000)])
def test_g8_a_length_of_time_that_no_date_holds(length: timedelta, conversation_in: ConversationIn) -> None:
    """G8: `--hanging-after 1e12` raised an OverflowError, and `send_after` stored no time."""
    conversation = conversation_in(Stage.QUALIFYING)
    for asked in (
        lambda: pipeline(length),
        lambda: CloseEngineConversation.in_stage_longer_than(Stage.QUALIFYING, length),
        lambda: submit(conversation, ActionType.SEND_MESSAGE, "Hi!", send_after=length),
        lambda: outbox.enqueue(conversation, "build_site", send_after=length),
    ):
        with pytest.raises(InvalidValue, match="36500 days"):
            asked()
    assert OutboxMessage.select().count() == 0
