"""Inputs that once failed, one test per case, by its number: whose clock and whose word the history takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    ActionType,
    CloseEngineConversation,
    EntryPoint,
    PendingAction,
    Stage,
    StageChange,
    outbox,
    submit,
)
from close_engine.database.binding import current, moment
from close_engine.database.provenance import Provenance, Write
from close_engine.testing import bring_to, new_lead
from tests.foreign import Change, ForeignWriter
from tests.servers import execute, new_name
from tests.workers import LINK

ConversationIn = Callable[..., CloseEngineConversation]

HOUR = timedelta(hours=1)


def waiting_link(conversation: CloseEngineConversation) -> PendingAction:
    """Submit a payment link that waits for a human."""
    action = submit(
        conversation,
        ActionType.SEND_PAYMENT_LINK,
        "Pay here",
        metadata={"paymentUrl": LINK},
        policy=lambda level, type: True,
    )
    assert isinstance(action, PendingAction)
    return action


# D10: a writer whose clock is an hour ahead.


@pytest.mark.parametrize("trigger", ["collect_info", "stall", "close_lost"])
def test_d10_a_writer_whose_clock_is_ahead_moves_no_later_change(
    trigger: str, conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    """The next change by Python was recorded, and stamped, an hour in the future."""
    conversation = conversation_in(Stage.INITIATED)
    begun = moment()
    ahead = stored(begun + HOUR)
    foreign.update(conversation.id, stage="QUALIFYING", updated_at=ahead)
    conversation = CloseEngineConversation.get_by_id(conversation.id)
    change = conversation.fire(trigger, reason="no budget")
    foreign.update(conversation.id, stage="COMPLETED")
    done = moment()

    assert change.created_at == StageChange.get_by_id(change.id).created_at
    recorded = [row.created_at for row in conversation.history()]
    assert recorded == sorted(recorded)
    assert all(begun <= at <= done for at in recorded[1:])
    for stamp in (conversation.stalled_at, conversation.closed_lost_at):
        assert stamp is None or begun <= stamp <= done
    # Its version grows with every write all the same.
    assert stored(conversation.updated_at) > ahead
    assert foreign.row(conversation.id)["updated_at"] > conversation.updated_at.replace(tzinfo=None)


def test_d10_a_worker_whose_clock_is_ahead_records_real_time(database: peewee.Database, foreign: ForeignWriter) -> None:
    """The database's clock stamps what the library writes, and what follows from it."""
    close_engine.bind(database, clock=lambda: datetime.now(timezone.utc) + HOUR)
    begun = moment()
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    bring_to(conversation, Stage.PREVIEW_SENT)
    waiting_link(conversation).reject(by="dana")
    conversation.reload()
    conversation.send_payment_link(LINK, approved_by="dana")
    sent_at = conversation.payment_link_sent_at
    conversation.stall()
    stalled_at = conversation.stalled_at
    conversation.resume()
    conversation.complete()
    done = moment()

    recorded = [row.created_at for row in conversation.history()]
    assert recorded == sorted(recorded)
    for at in (*recorded, sent_at, stalled_at, conversation.completed_at):
        assert at is not None
        assert begun <= at <= done
    assert CloseEngineConversation.get_by_id(conversation.id).completed_at == conversation.completed_at


def test_d10_nor_does_the_link_that_reached_the_lead_in_the_wrong_stage(
    database: peewee.Database, conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    """The trigger is refused, and that the lead can pay is recorded all the same."""
    conversation = conversation_in(Stage.BUILDING)
    outbox.enqueue(conversation, "SEND_PAYMENT_LINK", "Pay", payload={"paymentUrl": LINK}, trigger="send_payment_link")
    close_engine.bind(database, clock=lambda: datetime.now(timezone.utc) + HOUR)
    (message,) = outbox.claim()
    assert message.sent().refusal is not None
    sent_at = CloseEngineConversation.get_by_id(conversation.id).payment_link_sent_at
    assert sent_at is not None
    assert sent_at <= moment()


def test_d10_a_conversation_waits_in_its_stage_by_the_clock_of_the_history(
    database: peewee.Database, conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    conversation = conversation_in(Stage.BUILDING)
    close_engine.bind(database, clock=lambda: datetime.now(timezone.utc) + HOUR)
    waiting = CloseEngineConversation.in_stage_longer_than
    assert list(waiting(Stage.BUILDING, HOUR / 2)) == []
    assert list(waiting(Stage.BUILDING, -HOUR / 2)) == [conversation]


def stored(at: datetime) -> str:
    return str(at.replace(tzinfo=None))[:23]


# D13: no stamp lies in the future.

#: Writes every stamp, and asks at once whether it has been yet.
EVERY_STAMP = """
DO $do$
DECLARE
    dest text;
    at timestamp;
BEGIN
    FOR turn IN 1 .. 100 LOOP
        INSERT INTO leads (id, phone) VALUES ('l' || turn, '+15550100');
        INSERT INTO close_engine_conversations (id, lead_id, entry_point, stage, updated_at)
        VALUES ('c' || turn, 'l' || turn, 'SMS_REPLY', 'PREVIEW_SENT', '2026-01-01')
        RETURNING created_at INTO at;
        ASSERT at <= clock_timestamp() AT TIME ZONE 'UTC', 'created_at';
        FOREACH dest IN ARRAY ARRAY['PAYMENT_SENT', 'STALLED', 'CLOSED_LOST', 'COMPLETED'] LOOP
            UPDATE close_engine_conversations SET stage = dest WHERE id = 'c' || turn
            RETURNING greatest(payment_link_sent_at, stalled_at, closed_lost_at, completed_at) INTO at;
            ASSERT at <= clock_timestamp() AT TIME ZONE 'UTC', dest;
            SELECT max(created_at) INTO at FROM close_engine.history;
            ASSERT at <= clock_timestamp() AT TIME ZONE 'UTC', 'history';
            SELECT max(d.at) INTO at FROM close_engine.deadlines d;
            ASSERT at <= clock_timestamp() AT TIME ZONE 'UTC', 'deadlines';
        END LOOP;
        UPDATE pending_actions SET status = 'APPROVED' WHERE id = 'a' || turn
        RETURNING greatest(created_at, approved_at) INTO at;
        ASSERT at <= clock_timestamp() AT TIME ZONE 'UTC', 'approved_at';
        SELECT max(greatest(created_at, available_at)) INTO at FROM close_engine.outbox;
        ASSERT at <= clock_timestamp() AT TIME ZONE 'UTC', 'outbox';
    END LOOP;
END $do$
"""


def test_d13_no_stamp_lies_in_the_future_not_even_for_half_a_millisecond(foreign_postgres: ForeignWriter) -> None:
    """A moment that is rounded up is half a millisecond ahead, every other time: a hundred turns show it."""
    waiting = foreign_postgres.insert("QUALIFYING")
    for turn in range(1, 101):
        foreign_postgres.run(
            "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message) "
            "VALUES (%s, %s, 'l', 'SEND_MESSAGE', 'hello')",
            f"a{turn}",
            waiting,
        )
    foreign_postgres.run(EVERY_STAMP)


def test_d13_nor_does_one_of_python_or_sqlite(
    database: peewee.Database, conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    for _ in range(50):
        stalled = conversation.stall()
        assert stalled.created_at <= datetime.now(timezone.utc)
        assert conversation.stalled_at is not None
        assert conversation.stalled_at <= datetime.now(timezone.utc)
        foreign.update(conversation.id, stage="QUALIFYING")
        assert foreign.recorded_at(conversation.id)[-1] <= datetime.now(timezone.utc).replace(tzinfo=None)
        conversation.reload()


# D11, G4: who may speak for others, and for which write.


@pytest.fixture
def role(server: str) -> Iterator[str]:
    """A role that the foreign writer can take on, dropped after the databases in which it has rights."""
    name = new_name()
    execute(server, f"CREATE ROLE {name} NOLOGIN")
    yield name
    execute(server, f"DROP ROLE {name}")


@pytest.fixture
def crm(role: str, foreign_postgres: ForeignWriter) -> ForeignWriter:
    """A writer with rights on the CRM's tables alone."""
    foreign_postgres.run(f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
    foreign_postgres.run(f"SET ROLE {role}")
    return foreign_postgres


def forge(writer: ForeignWriter, whole_session: bool = False, **context: Any) -> None:
    """Set a context as the library does."""
    said = {"actor": "owner", "reason": "forged", "metadata": {"forged": True}, "key": "forged", **context}
    writer.run("SELECT set_config('close_engine.context', %s, %s)", json.dumps(said), not whole_session)


def transaction(writer: ForeignWriter) -> str:
    return str(writer.run("SELECT pg_current_xact_id()")[0][0])


def soon(writer: ForeignWriter) -> str:
    return stored(writer.run("SELECT clock_timestamp() AT TIME ZONE 'UTC' + interval '1 minute'")[0][0])


@pytest.mark.parametrize("how", ["a stage", "an opening", "a rejection", "a deletion"])
def test_d11_a_role_without_rights_on_our_schema_speaks_only_for_itself(
    how: str, crm: ForeignWriter, role: str
) -> None:
    """It set the library's context, and its write was recorded under the owner's name."""
    conversation = bring_to(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.PREVIEW_SENT)
    subject, metadata = conversation.id, None
    crm.run("BEGIN")
    at = soon(crm)
    if how == "a stage":
        forge(crm, trigger="stall", id=subject, at=at, transaction=transaction(crm))
        crm.update(subject, stage="STALLED", updated_at=at)
    elif how == "an opening":
        lead, subject = crm.lead(), "opened"
        forge(crm, trigger="open", id=subject, at=at, transaction=transaction(crm))
        crm.run(
            "INSERT INTO close_engine_conversations (id, lead_id, entry_point, updated_at) "
            "VALUES (%s, %s, 'SMS_REPLY', %s)",
            *(subject, lead, at),
        )
    else:
        crm.run("COMMIT")
        action = waiting_link(conversation)
        crm.run("BEGIN")
        forge(crm, trigger="reject", id=action.id, at=at, transaction=transaction(crm))
        if how == "a rejection":
            crm.run("UPDATE pending_actions SET status = 'REJECTED' WHERE id = %s", action.id)
        else:
            crm.run("DELETE FROM pending_actions WHERE id = %s", action.id)
        metadata = {"action_id": action.id, "status": "REJECTED" if how == "a rejection" else "DELETED"}
    crm.run("COMMIT")
    crm.run("RESET ROLE")
    written = crm.history(subject)[-1]
    assert written[3:] == (f"database:{role} (login {login(crm)})", None, metadata, None)


def login(writer: ForeignWriter) -> str:
    return str(writer.run("SELECT session_user")[0][0])


def test_d11_what_such_a_role_sets_hinders_no_write(crm: ForeignWriter, role: str) -> None:
    """It was read as JSON, whatever it was."""
    conversation = crm.insert("QUALIFYING")
    crm.run("SET close_engine.context = 'no { JSON'")
    crm.update(conversation, stage="STALLED")
    crm.run("RESET ROLE")
    assert [change.actor for change in crm.history(conversation)] == [f"database:{role} (login {login(crm)})"] * 2


def test_d11_a_role_that_may_use_our_schema_speaks_for_others(crm: ForeignWriter, role: str) -> None:
    """A worker's role is one: what its code says is recorded."""
    conversation = crm.insert("QUALIFYING")
    crm.run("RESET ROLE")
    crm.run(f"GRANT USAGE ON SCHEMA close_engine TO {role}")
    crm.run(f"SET ROLE {role}")
    crm.run("BEGIN")
    at = soon(crm)
    forge(crm, trigger="stall", id=conversation, at=at)
    crm.update(conversation, stage="STALLED", updated_at=at)
    crm.run("COMMIT")
    crm.run("RESET ROLE")
    assert crm.history(conversation)[-1][3:] == ("owner", "forged", {"forged": True}, "forged")


def test_d12_the_actor_is_the_role_that_was_set(crm: ForeignWriter, role: str) -> None:
    """It was the login role, which every client of a pooler shares."""
    conversation = crm.insert("QUALIFYING")
    crm.run("RESET ROLE")
    crm.update(conversation, stage="STALLED")
    crm.run(f"SET SESSION AUTHORIZATION {role}")
    crm.update(conversation, stage="QUALIFYING")
    crm.run("RESET SESSION AUTHORIZATION")
    owner = login(crm)
    assert [change.actor for change in crm.history(conversation)] == [
        f"database:{role} (login {owner})",
        f"database:{owner}",
        f"database:{role}",
    ]


def test_d12_also_of_what_follows_from_its_write(crm: ForeignWriter, role: str) -> None:
    conversation = bring_to(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.PREVIEW_SENT)
    action = waiting_link(conversation)
    crm.run("UPDATE pending_actions SET status = 'REJECTED', approved_by = 'dana' WHERE id = %s", action.id)
    crm.run("RESET ROLE")
    assert crm.history(conversation.id)[-1] == Change(
        "withdraw_approval",
        "PENDING_APPROVAL",
        "PREVIEW_SENT",
        f"database:{role} (login {login(crm)})",
        None,
        {"action_id": action.id, "status": "REJECTED"},
    )


@pytest.mark.parametrize("left", ["no row", "no row, but this trigger", "this row", "a transaction that is over"])
@pytest.mark.parametrize("how", ["a stage", "a rejection", "an expiry"])
def test_g4_a_context_that_is_left_in_a_session_names_nobody(
    left: str, how: str, postgres: peewee.Database, foreign_postgres: ForeignWriter
) -> None:
    """In a pooled session it put somebody's name on the next client's rejection."""
    conversation = bring_to(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.PREVIEW_SENT)
    action = waiting_link(conversation)
    trigger = {"a stage": "stall", "a rejection": "reject", "an expiry": "expire"}[how]
    context: dict[str, Any] = {}
    if left != "no row":
        context = {"trigger": trigger, "at": soon(foreign_postgres)}
    if left == "this row":
        context["id"] = conversation.id if how == "a stage" else action.id
    elif left == "a transaction that is over":
        context |= {"id": None, "transaction": transaction(foreign_postgres)}
    forge(foreign_postgres, whole_session=True, **context)

    if how == "a stage":
        # The moment of the context, unless it names the row: then that would be the library's own write.
        named = {"updated_at": context["at"]} if "at" in context and left != "this row" else {}
        foreign_postgres.update(conversation.id, stage="STALLED", **named)
    else:
        status = "REJECTED" if how == "a rejection" else "EXPIRED"
        foreign_postgres.run("UPDATE pending_actions SET status = %s WHERE id = %s", status, action.id)
    change = foreign_postgres.history(conversation.id)[-1]
    assert (change.actor, change.reason, change.key) == (f"database:{login(foreign_postgres)}", None, None)


def test_g4_a_sweep_names_no_row_and_only_its_own_transaction(
    database: peewee.Database, conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    """What the sweep writes is under its name, what others write under theirs."""
    conversation = conversation_in(Stage.QUALIFYING)
    at = stored(moment() + timedelta(seconds=1))
    binding = current()
    with close_engine.atomic(), binding.attributed(Provenance("sweep", "silent"), Write("stall", None, at)):
        binding.execute(
            "UPDATE close_engine_conversations SET stage = 'STALLED', updated_at = %s WHERE id = %s",
            (at, conversation.id),
        )
    assert foreign.history(conversation.id)[-1] == Change("stall", "QUALIFYING", "STALLED", "sweep", "silent")
    foreign.update(conversation.id, stage="QUALIFYING")
    assert foreign.history(conversation.id)[-1].actor == foreign.actor
