"""Database roles: the CRM's, without rights on the library's schema, and a worker's, with only the rights it needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from urllib.parse import urlsplit, urlunsplit

import peewee
import psycopg2
import pytest

import close_engine
from close_engine import ActionType, CloseEngineConversation, EntryPoint, Lead, Stage, heartbeats
from close_engine.testing import bring_to, new_lead
from tests.foreign import REFUSED, Change, ForeignWriter
from tests.prose import PRISMA, grants
from tests.servers import execute, new_name

PASSWORD = "secret"

PAST = datetime(2025, 1, 1, tzinfo=timezone.utc)

#: The rights of the CRM's own application and of a worker, as the page grants them.
CRM, WORKER = grants(PRISMA, "crm_app"), grants(PRISMA, "close_worker")

#: What a worker needs of the leads, in place of all that they hold.
LEAST = [
    "REVOKE SELECT ON leads FROM {role}",
    "GRANT SELECT (id, phone, autonomy_level, close_entry_point, qualification_data) ON leads TO {role}",
]

#: What it needs only to verify the installation, and is therefore granted apart: of users and clients, less will do.
VERIFIER = [
    "GRANT SELECT (id) ON users TO {role}",
    "GRANT SELECT (id, autonomy_level) ON clients TO {role}",
    "GRANT SELECT ON ALL SEQUENCES IN SCHEMA close_engine TO {role}",
]
FOR_VERIFYING = {f"SELECT ON {name}" for name in ("users", "clients", "ALL SEQUENCES IN SCHEMA close_engine")}


def rights_of(statements: list[str]) -> list[str]:
    """Return the rights that these statements grant, one by one."""
    rights = []
    for statement in statements:
        verbs, objects = re.fullmatch(r"GRANT (.+) ON (.+) TO \{role\}", statement).groups()
        each = re.findall(r"\w+(?: \([^)]*\))?", verbs)
        rights += [f"{verb} ON {name}" for verb in each for name in objects.split(", ")]
    return rights


@pytest.fixture
def role(server: str) -> Iterator[str]:
    """A new role that can only log in; dropped after the databases in which it has rights."""
    role = new_name()
    execute(server, f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'")
    yield role
    execute(server, f"DROP ROLE {role}")


def url_as(url: str, role: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{role}:{PASSWORD}@{host}"))


def granted(url: str, role: str, statements: list[str]) -> None:
    execute(url, *(statement.format(role=role) for statement in statements))


def test_the_page_grants_what_these_tests_run_with() -> None:
    assert CRM == ["GRANT SELECT, INSERT, UPDATE, DELETE ON close_engine_conversations, pending_actions TO {role}"]
    assert len(WORKER) > 10
    assert set(rights_of(WORKER)) > FOR_VERIFYING
    assert not any(right.startswith(("ALL", "TRIGGER", "TRUNCATE")) for right in rights_of(WORKER))


@pytest.fixture
def crm(role: str, postgres_url: str) -> Iterator[ForeignWriter]:
    """The CRM's application: it has rights on its tables, none on the library's schema."""
    granted(postgres_url, role, [*CRM, "GRANT SELECT, INSERT ON leads TO {role}"])  # the leads are its own
    writer = ForeignWriter(psycopg2.connect(url_as(postgres_url, role)))
    writer.connection.autocommit = True
    yield writer
    writer.connection.close()


@pytest.fixture
def owner(crm: ForeignWriter, postgres_url: str) -> Iterator[ForeignWriter]:
    """A writer that may read the library's schema."""
    writer = ForeignWriter(psycopg2.connect(postgres_url))
    writer.connection.autocommit = True
    yield writer
    writer.connection.close()


def test_a_role_without_rights_on_our_schema_writes_and_is_guarded(
    crm: ForeignWriter, owner: ForeignWriter, role: str
) -> None:
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        crm.run("SELECT * FROM close_engine.history")
    conversation = crm.insert("QUALIFYING")
    crm.update(conversation, stage="STALLED")
    with pytest.raises(REFUSED, match="cannot go from STALLED to CLOSED"):
        crm.update(conversation, stage="CLOSED")
    with pytest.raises(REFUSED, match="LIMBO is not a stage"):
        crm.insert("LIMBO")
    assert crm.row(conversation)["stalled_at"] is not None
    crm.run("DELETE FROM close_engine_conversations")
    assert owner.history(conversation) == [
        Change("open", None, "QUALIFYING", f"database:{role}"),
        Change("stall", "QUALIFYING", "STALLED", f"database:{role}"),
    ]
    assert owner.silent_since() == {}


TRICKS = """
CREATE TEMPORARY TABLE transitions (machine text, trigger text, source text, dest text);
INSERT INTO transitions VALUES ('conversation', 'hop', 'COMPLETED', 'INITIATED');
CREATE TEMPORARY TABLE history (LIKE transitions);
CREATE TEMPORARY TABLE deadlines (LIKE transitions);
CREATE FUNCTION pg_temp.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS $$SELECT 'epoch'::timestamptz$$;
CREATE FUNCTION pg_temp.current_setting(text, boolean) RETURNS text LANGUAGE sql AS $$SELECT '{"actor": "x"}'$$;
CREATE FUNCTION pg_temp.differ(text, text) RETURNS boolean LANGUAGE sql AS $$SELECT true$$;
CREATE OPERATOR pg_temp.= (LEFTARG = text, RIGHTARG = text, FUNCTION = pg_temp.differ);
CREATE OPERATOR pg_temp.<= (LEFTARG = text, RIGHTARG = text, FUNCTION = pg_temp.differ);
CREATE DOMAIN pg_temp.jsonb AS text;
"""


@pytest.mark.parametrize("path", ["pg_temp, public, pg_catalog", "public, pg_temp, pg_catalog", "public", "pg_temp"])
def test_the_guard_looks_nothing_up_where_a_writer_can_put_things(
    path: str, crm: ForeignWriter, owner: ForeignWriter, role: str
) -> None:
    conversation, building = crm.insert("COMPLETED"), crm.insert("BUILDING")
    crm.run(TRICKS)
    crm.run(f"SET search_path = {path}")
    table = "public.close_engine_conversations"
    with pytest.raises(REFUSED, match="cannot go from COMPLETED to INITIATED"):
        crm.run(f"UPDATE {table} SET stage = 'INITIATED' WHERE id OPERATOR(pg_catalog.=) %s", conversation)
    crm.run(f"UPDATE {table} SET stage = 'STALLED' WHERE id OPERATOR(pg_catalog.=) %s", building)
    assert owner.history(building)[1:] == [Change("stall", "BUILDING", "STALLED", f"database:{role}")]
    assert owner.row(building)["stalled_at"].year > 2000
    assert crm.run("SELECT count(*) FROM pg_temp.history") == [(0,)]


def test_nobody_can_make_our_functions_write_for_a_table_of_his_own(owner: ForeignWriter, role: str) -> None:
    owner.run(f"GRANT USAGE ON SCHEMA close_engine TO {role}")
    owner.run(f"SET SESSION AUTHORIZATION {role}")
    owner.run("CREATE TEMPORARY TABLE forged (id text, lead_id text, stage text, updated_at timestamp(3))")
    functions = owner.run(
        "SELECT proname FROM pg_proc "
        "WHERE pronamespace = 'close_engine'::regnamespace AND prorettype = 'trigger'::regtype"
    )
    assert len(functions) >= 6
    for (function,) in functions:
        with pytest.raises(psycopg2.errors.InsufficientPrivilege, match=function):
            owner.run(
                f"CREATE TRIGGER forge AFTER INSERT ON forged FOR EACH ROW EXECUTE FUNCTION close_engine.{function}()"
            )


@pytest.fixture
def worker(role: str, postgres: peewee.Database, postgres_url: str) -> Iterator[peewee.Database]:
    """The library, bound as a worker with the least rights, and leads to work on."""
    granted(postgres_url, role, [*WORKER, *LEAST])
    execute(postgres_url, *(f"REVOKE {right} FROM {role}" for right in FOR_VERIFYING))
    for stage in Stage:
        new_lead(id=f"lead {stage}")
    close_engine.subscribe("draft", events=["lead:wrote"], debounce=timedelta(minutes=1))
    database = close_engine.connect(url_as(postgres_url, role))
    yield database
    database.close()


def work() -> None:
    """Do everything that this library does with a conversation."""
    assert close_engine.migrate() == []
    for stage in Stage:
        conversation = close_engine.open_conversation(
            f"lead {stage}", EntryPoint.SMS_REPLY, key="SM1", actor="worker-7"
        )
        bring_to(conversation, stage)
        assert [change.actor for change in conversation.history()][:1] == ["worker-7"]
    stalled = Lead.get_by_id("lead STALLED").close_conversation
    assert stalled.resume(key="SM2").id == stalled.resume(key="SM2").id
    with close_engine.locked(stalled.id) as held:
        held.close_lost("no budget")
    reopened = close_engine.open_conversation("lead STALLED", EntryPoint.REP_CLOSE)
    reopened.payment_link_url = "https://pay.example.com/7"
    reopened.save()
    assert [change.trigger for change in reopened.history()][-3:] == ["resume", "close_lost", "reopen"]
    assert CloseEngineConversation.in_stage_longer_than(Stage.BUILDING, timedelta(0)).count() == 1

    reopened.record(questions=["budget"], data={"budget": 900})
    close_engine.submit(reopened, ActionType.SEND_MESSAGE, "Hello", policy=lambda level, type: True).approve(by="Ann")
    (message,) = close_engine.outbox.claim(10)
    message.sent("provider-1")
    reopened.reload()
    assert reopened.stage is Stage.QUALIFYING
    close_engine.submit(reopened, ActionType.SEND_MESSAGE, "Are you there?")
    reopened.take_over(by="Ann")
    reopened.hand_back(by="Ann")
    reopened.stall()
    assert close_engine.receive("lead STALLED", "SM3", "Hi").resumed
    assert close_engine.record_sent("lead STALLED", "SM5", "Ann here.", author="Ann")
    assert close_engine.import_texts([close_engine.PastText("lead STALLED", "inbound", "Hi", "SM6", PAST)]).added == 1
    assert len(reopened.messages()) == 5
    assert close_engine.record_payment("lead PAYMENT_SENT", "pay 1")
    close_engine.record_refund("pay 1", 1, "USD")
    close_engine.note_payment("unmatched", "pay 2", "Whose is it?")
    for entry in close_engine.payment_issues():
        close_engine.resolve_payment(entry, by="Ann")
    assert close_engine.receive("lead STALLED", "SM4", "STOP").keyword
    assert close_engine.opt_in("lead STALLED", source="web form")
    close_engine.sweep()
    close_engine.pause_sending("lunch", by="Ann")
    assert close_engine.resume_sending(by="Ann")
    close_engine.record_delivery("sent", provider_id="provider-1")
    close_engine.record_delivery("queued", send_key="key 2")
    close_engine.record_delivery("sent", provider_id="provider-2")
    assert close_engine.record_delivery("read", provider_id="provider-2", send_key="key 2").message_id is None
    assert message.delivery
    close_engine.subscribe("build_site", stages=[Stage.BUILDING])
    close_engine.subscribe("build_site", stages=[Stage.BUILDING], payload={"of": "ours"})
    assert close_engine.unsubscribe("build_site") == 1
    heartbeats.beat("worker-7", 4, None, 0, timedelta(0))
    heartbeats.beat("worker-7", 4, None, 1, timedelta(minutes=1))
    heartbeats.end("worker-7")


def test_a_worker_needs_no_more_than_this(worker: peewee.Database, role: str, postgres_url: str) -> None:
    work()
    for table in ("history", "deadlines", "transitions", "sweeping"):
        with pytest.raises(peewee.ProgrammingError, match="permission denied"):
            worker.execute_sql(f"DELETE FROM close_engine.{table}")
    granted(postgres_url, role, VERIFIER)
    assert close_engine.verify() == []


def test_a_worker_cannot_say_that_a_sweep_records_what_it_writes(worker: peewee.Database, postgres_url: str) -> None:
    """Only the function that sweeps can, and it is of use only in a sweep, to a role that may change stages."""
    conversation = bring_to(close_engine.open_conversation("lead BUILDING", EntryPoint.SMS_REPLY), Stage.BUILDING)
    with close_engine.atomic():
        worker.execute_sql("SET LOCAL close_engine.sweeping = 'on'")
        worker.execute_sql("UPDATE close_engine_conversations SET stage = 'STALLED' WHERE id = %s", (conversation.id,))
    assert conversation.history()[-1].trigger == "stall"
    assert conversation.history()[-1].actor.startswith("database:")
    with pytest.raises(peewee.ProgrammingError, match="cannot sweep"):
        worker.execute_sql("SELECT close_engine.sweep(%s, 'close_lost')", ([conversation.id],))


def test_a_role_that_may_not_change_stages_cannot_sweep(worker: peewee.Database, role: str, postgres_url: str) -> None:
    conversation = bring_to(close_engine.open_conversation("lead BUILDING", EntryPoint.SMS_REPLY), Stage.BUILDING)
    execute(postgres_url, f"REVOKE UPDATE ON close_engine_conversations FROM {role}")
    execute(postgres_url, f"GRANT UPDATE (updated_at) ON close_engine_conversations TO {role}")
    with pytest.raises(peewee.ProgrammingError, match="cannot sweep"):
        close_engine.stall_silent(timedelta(0))
    assert CloseEngineConversation.get_by_id(conversation.id).stage is Stage.BUILDING


#: Each right that the page grants for work: those on all tables and on columns one by one, as far as work reads them.
RIGHTS = [
    *(
        right
        for right in rights_of(WORKER)
        if right not in FOR_VERIFYING and " ALL " not in right and "leads" not in right
    ),
    *(f"SELECT ({column}) ON leads" for column in ("id", "phone", "autonomy_level", "close_entry_point")),
    *(f"UPDATE ({column}) ON leads" for column in ("close_entry_point", "qualification_data")),
    *(f"SELECT ON close_engine.{name}" for name in ("migrations", "history", "texts", "outbox", "inbox", "takeovers")),
    *(f"SELECT ON close_engine.{name}" for name in ("numbers", "optouts", "pauses", "deliveries", "subscriptions")),
    "SELECT ON close_engine.workers",
]


def works_without(right: str, role: str, url: str) -> bool:
    execute(url, f"REVOKE {right} FROM {role}")
    try:
        with close_engine.atomic() as transaction:
            work()
            transaction.rollback()
    except (peewee.ProgrammingError, close_engine.SchemaError) as error:
        return "permission denied" not in str(error)
    finally:
        execute(url, f"GRANT {right} TO {role}")
    return True


def test_a_worker_needs_all_of_this(worker: peewee.Database, role: str, postgres_url: str) -> None:
    assert [right for right in RIGHTS if works_without(right, role, postgres_url)] == []
    work()
