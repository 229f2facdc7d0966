"""Prisma Client itself writes, as the CRM's own code does; Python reads what it wrote, and `verify` finds nothing.

Two versions of the client, generated from the models in docs/prisma.md, run the code that stands here: TypeScript, as a
developer of the CRM writes it. The TypeScript of docs/prisma.md runs as it stands there.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import peewee
import pytest

import close_engine
from close_engine import (
    ActionStatus,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    EntryPoint,
    Lead,
    MessageStatus,
    OutboxMessage,
    PendingAction,
    Stage,
    StageChange,
    StageConflict,
    submit,
)
from close_engine.testing import FakeSender, bring_to
from tests.crm import BEFORE, query, restore
from tests.design import TRIGGER_BETWEEN
from tests.foreign import Change
from tests.judge import find_node
from tests.prose import PRISMA, block, blocks, grants, section
from tests.rows import copy_of, replayed, triggers
from tests.servers import execute, new_name, postgres_database
from tests.waiting import LIMIT, until
from tests.writer import PLACE, VERSIONS, Client, Refused, Writer, client, page, what_is_missing

APPROVE = block(PRISMA, "ts", "status: 'PENDING' }")
CATCH = block(PRISMA, "ts", "const sentence = refusal(error)")
SAVEPOINT = block(PRISMA, "ts", "SAVEPOINT")
ASK = block(PRISMA, "ts", "const { count }")

LINK = {"paymentUrl": "https://pay.example.com/1"}
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
#: Longer than any test takes between two looks at a clock, and shorter than any offset.
SOON = timedelta(minutes=5)


@pytest.fixture(scope="session", params=VERSIONS)
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A version of Prisma Client. Without it, the tests are left out, unless the run insists (`--prisma`)."""
    missing = what_is_missing()
    if missing and not request.config.getoption("--prisma"):
        pytest.skip(missing)
    with client(request.param, tmp_path_factory.mktemp("prisma")) as running:
        yield running


@pytest.fixture(scope="session")
def crm_template(server: str) -> Iterator[str]:
    """The name of a CRM's database that Prisma made and filled, migrated, to copy."""
    with postgres_database(server) as url:
        restore(url, BEFORE)
        database = close_engine.connect(url)
        close_engine.migrate()
        database.close()
        yield urlsplit(url).path.removeprefix("/")


@pytest.fixture
def url(server: str, crm_template: str) -> Iterator[str]:
    with postgres_database(server, crm_template) as url:
        yield url


@pytest.fixture
def prisma(node: Client, url: str) -> Iterator[Writer]:
    """Prisma Client and Python beside each other; at the end, `verify` finds nothing, and the history is complete."""
    database = close_engine.connect(url)
    writer = node.on(url)
    yield writer
    writer.close()
    assert close_engine.verify() == []
    for conversation in CloseEngineConversation.select():
        assert replayed(conversation.id) == conversation.stage
    for rows in (PendingAction, OutboxMessage, StageChange, Lead):
        list(rows.select())  # Python can read each of them
    database.close()


@pytest.fixture
def actor(url: str) -> str:
    """Whom the history names for what Prisma wrote."""
    return f"database:{query(url, 'SELECT current_user')[0][0]}"


def new_lead(prisma: Writer) -> str:
    """Create a lead as the CRM does, and return its id."""
    code = "return (await prisma.lead.create({ data: { firstName: 'Ana', companyName: 'Bakery', phone } })).id"
    return str(prisma.run(code, phone=f"+1555{Lead.select().count():07}"))


def opened(prisma: Writer, stage: Stage = Stage.INITIATED, **data: Any) -> CloseEngineConversation:
    """Let Prisma open a conversation in a stage, and return what Python reads."""
    values = {"leadId": new_lead(prisma), "entryPoint": "SMS_REPLY", "stage": stage, **data}
    row = prisma.run("return await prisma.closeEngineConversation.create({ data })", data=values)
    return CloseEngineConversation.get_by_id(row["id"])


def drafted(
    prisma: Writer, stage: Stage = Stage.BUILDING, type: str = "SEND_MESSAGE", **data: Any
) -> tuple[CloseEngineConversation, PendingAction]:
    """Let Prisma open a conversation and write a draft that waits for a human."""
    conversation = opened(prisma, stage, autonomyLevel="MANUAL")
    values = {"conversationId": conversation.id, "leadId": conversation.lead_id, "type": type, "draftMessage": "Hi"}
    row = prisma.run("return await prisma.pendingAction.create({ data })", data={**values, **data})
    return conversation, PendingAction.get_by_id(row["id"])


def changes(conversation: CloseEngineConversation) -> list[Change]:
    return [Change(change.trigger, change.source, change.dest, change.actor) for change in conversation.history()]


def as_prisma(at: datetime | None) -> str:
    """Return a time as JavaScript writes it."""
    assert at
    return at.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03}Z"


def now() -> datetime:
    return datetime.now(timezone.utc)


def near(at: datetime | None, other: datetime) -> bool:
    """Say whether two times are those of the same test."""
    return at is not None and abs(at - other) < SOON


# -- writing conversations -------------------------------------------------------------------------------------------


def test_a_conversation_that_prisma_creates_has_a_history(prisma: Writer, actor: str) -> None:
    lead = new_lead(prisma)
    row = prisma.run(
        "return await prisma.closeEngineConversation.create({"
        "  data: { lead: { connect: { id: lead } }, rep: { connect: { id: rep } }, entryPoint: 'REP_CLOSE' } })",
        lead=lead,
        rep=query(prisma.url, "SELECT id FROM users ORDER BY id LIMIT 1")[0][0],
    )
    conversation = CloseEngineConversation.get(lead=lead)
    assert (conversation.id, conversation.rep_id, conversation.stage) == (row["id"], row["repId"], "INITIATED")
    assert changes(conversation) == [Change("open", None, "INITIATED", actor)]
    assert as_prisma(conversation.updated_at) == row["updatedAt"]
    assert near(conversation.history()[0].created_at, now())


def test_prisma_returns_the_stamps_that_the_database_wrote(prisma: Writer) -> None:
    row = prisma.run(
        "return await prisma.closeEngineConversation.create({"
        "  data: { leadId, entryPoint: 'SMS_REPLY', stage: 'PREVIEW_SENT' } })",
        leadId=new_lead(prisma),
    )
    conversation = CloseEngineConversation.get_by_id(row["id"])
    for stage, stamp in (
        ("PAYMENT_SENT", "paymentLinkSentAt"),
        ("STALLED", "stalledAt"),
        ("CLOSED_LOST", "closedLostAt"),
    ):
        row = prisma.run(
            "return await prisma.closeEngineConversation.update({ where: { id }, data: { stage } })",
            id=conversation.id,
            stage=stage,
        )
        conversation.reload()
        assert (row["stage"], row["updatedAt"]) == (stage, as_prisma(conversation.updated_at))
        assert near(datetime.fromisoformat(row[stamp].replace("Z", "+00:00")), now())
    assert triggers(conversation) == ["open", "send_payment_link", "stall", "close_lost"]


def test_create_many_writes_all_or_nothing(prisma: Writer, actor: str) -> None:
    rows = [
        {"leadId": new_lead(prisma), "entryPoint": "SMS_REPLY", "stage": stage, "autonomyLevel": "MANUAL"}
        for stage in Stage
    ]
    create = "return await prisma.closeEngineConversation.createMany({ data: rows })"
    with pytest.raises(Refused) as refused:
        prisma.run(create, rows=[*rows, {**rows[0], "leadId": new_lead(prisma), "stage": "SOLD"}])
    assert refused.value.sentence == "close_engine: SOLD is not a stage"
    assert CloseEngineConversation.select().count() == 0
    assert StageChange.select().count() == 0

    assert prisma.run(create, rows=rows) == {"count": len(Stage)}

    assert {conversation.stage for conversation in CloseEngineConversation.select()} == set(Stage)
    for conversation in CloseEngineConversation.select():
        assert changes(conversation) == [Change("open", None, conversation.stage, actor)]


def test_create_many_writes_all_or_nothing_where_prisma_cuts_it_in_pieces(prisma: Writer) -> None:
    """PostgreSQL takes 65,535 parameters of a statement, and Prisma half of them: these rows have 34,000."""
    rows = 2000
    query(
        prisma.url,
        "INSERT INTO leads (id, first_name, company_name, phone, updated_at)"
        f" SELECT 'lead ' || n, 'Ana', 'Bakery', '+15550100', now() FROM generate_series(1, {rows}) n",
    )
    create = """
        const columns = { repId: null, questionsAsked: {}, collectedData: {}, paymentLinkUrl: null, editRounds: 0,
          paymentLinkSentAt: null, stalledAt: null, completedAt: null, closedLostAt: null, closedLostReason: null,
          createdAt: new Date(), updatedAt: new Date(), autonomyLevel: 'MANUAL', entryPoint: 'SMS_REPLY' }
        const data = Array.from({ length: rows }, (_, n) => ({
          ...columns, leadId: `lead ${n + 1}`, stage: n + 1 < rows ? 'BUILDING' : 'SOLD' }))
        return await prisma.closeEngineConversation.createMany({ data })
    """
    with pytest.raises(Refused) as refused:
        prisma.run(create, rows=rows)
    assert refused.value.sentence == "close_engine: SOLD is not a stage"
    assert CloseEngineConversation.select().count() == StageChange.select().count() == 0


def test_what_create_many_skips_has_no_history(prisma: Writer) -> None:
    conversation, other = opened(prisma, Stage.BUILDING), new_lead(prisma)
    rows = [{"leadId": lead, "entryPoint": "REP_CLOSE"} for lead in (conversation.lead_id, other)]
    create = "return await prisma.closeEngineConversation.createMany({ data: rows, skipDuplicates: true })"
    assert prisma.run(create, rows=rows) == {"count": 1}
    assert triggers(conversation) == triggers(CloseEngineConversation.get(lead=other)) == ["open"]
    assert copy_of(conversation).updated_at == conversation.updated_at


def test_a_lead_and_its_conversation_are_created_together(prisma: Writer, actor: str) -> None:
    create = """
        return await prisma.lead.create({
          data: { firstName: 'Ana', companyName: 'Bakery', phone: '+15550199',
                  closeConversation: { create: { entryPoint, rep: { connect: { email } } } } },
          include: { closeConversation: { include: { rep: true } } },
        })
    """
    email = query(prisma.url, "SELECT email FROM users ORDER BY id LIMIT 1")[0][0]
    leads = Lead.select().count()
    with pytest.raises(Refused, match=r"entry_point of conversation \w+ cannot be WEB"):
        prisma.run(create, entryPoint="WEB", email=email)
    assert Lead.select().count() == leads

    row = prisma.run(create, entryPoint="PREVIEW_CTA", email=email)

    conversation = CloseEngineConversation.get(lead=row["id"])
    assert row["closeConversation"]["rep"]["id"] == conversation.rep_id
    assert changes(conversation) == [Change("open", None, "INITIATED", actor)]


def test_a_rep_and_his_conversations_are_created_together(prisma: Writer) -> None:
    first, second = new_lead(prisma), new_lead(prisma)
    row = prisma.run(
        """
        return await prisma.user.create({
          data: { email: 'eve@example.com', name: 'Eve', closeEngineConversations: { create: [
            { entryPoint: 'REP_CLOSE', lead: { connect: { id: first } } },
            { entryPoint: 'REP_CLOSE', stage: 'QUALIFYING', lead: { connect: { id: second } } } ] } } })
        """,
        first=first,
        second=second,
    )
    conversations = close_engine.User.get_by_id(row["id"]).close_engine_conversations
    assert {conversation.lead_id: triggers(conversation) for conversation in conversations} == {
        first: ["open"],
        second: ["open"],
    }


def test_prisma_makes_every_stage_change_of_the_table_and_no_other(prisma: Writer, actor: str) -> None:
    pairs = [(source, dest) for source in Stage for dest in Stage if source != dest]
    ids = [f"{source} to {dest}" for source, dest in pairs]
    leads = [{"id": id, "firstName": "Ana", "companyName": "Bakery", "phone": "+15550100"} for id in ids]
    rows = [
        {"id": id, "leadId": id, "entryPoint": "SMS_REPLY", "stage": source}
        for id, (source, _) in zip(ids, pairs, strict=True)
    ]
    refused = prisma.run(
        """
        await prisma.lead.createMany({ data: leads })
        await prisma.closeEngineConversation.createMany({ data: rows })
        const refused = {}
        for (const [source, stage] of pairs) {
          const id = `${source} to ${stage}`
          try {
            await prisma.closeEngineConversation.update({ where: { id }, data: { stage } })
          } catch (error) {
            refused[id] = refusal(error)
          }
        }
        return refused
        """,
        leads=leads,
        rows=rows,
        pairs=pairs,
    )
    for source, dest in pairs:
        conversation = CloseEngineConversation.get_by_id(f"{source} to {dest}")
        trigger = TRIGGER_BETWEEN.get((source, dest))
        if trigger == "resume" and dest != "QUALIFYING":  # where things stand, as far as anybody knows
            trigger = None
        if trigger:
            assert conversation.id not in refused
            assert changes(conversation)[1:] == [Change(trigger, source, dest, actor)]
        else:
            assert refused[conversation.id].startswith(f"close_engine: conversation {conversation.id} can")
            assert changes(conversation)[1:] == []
            assert conversation.stage is source


def test_update_many_changes_several_stages_or_none(prisma: Writer, actor: str) -> None:
    conversations = [opened(prisma, stage) for stage in (Stage.QUALIFYING, Stage.BUILDING, Stage.EDIT_LOOP)]
    closed = opened(prisma, Stage.COMPLETED)
    update = "return await prisma.closeEngineConversation.updateMany({ where: { id: { in: ids } }, data: { stage } })"
    ids = [conversation.id for conversation in conversations]
    with pytest.raises(Refused) as refused:
        prisma.run(update, ids=[*ids, closed.id], stage="STALLED")
    assert refused.value.sentence == f"close_engine: conversation {closed.id} cannot go from COMPLETED to STALLED"
    for conversation in (*conversations, closed):
        assert copy_of(conversation).updated_at == conversation.updated_at
        assert triggers(conversation) == ["open"]

    assert prisma.run(update, ids=ids, stage="STALLED") == {"count": 3}

    for conversation in conversations:
        change = conversation.history()[-1]
        assert (change.trigger, change.source, change.actor) == ("stall", conversation.stage, actor)
        assert near(copy_of(conversation).stalled_at, change.created_at)


def test_one_update_many_may_write_more_than_the_stage(prisma: Writer) -> None:
    conversation = opened(prisma, Stage.BUILDING)
    prisma.run(
        "await prisma.closeEngineConversation.updateMany({ where: { stage: 'BUILDING' },"
        "  data: { stage: 'CLOSED_LOST', closedLostReason: 'no budget', editRounds: { increment: 2 } } })"
    )
    conversation.reload()
    assert (conversation.closed_lost_reason, conversation.edit_rounds) == ("no budget", 2)
    assert triggers(conversation) == ["open", "close_lost"]


def test_an_upsert_creates_once_and_then_updates(prisma: Writer, actor: str) -> None:
    upsert = """
        return await prisma.closeEngineConversation.upsert({
          where: { leadId },
          create: { leadId, entryPoint: 'SMS_REPLY', stage: 'QUALIFYING' },
          update: { stage },
        })
    """
    lead = new_lead(prisma)
    assert prisma.run(upsert, leadId=lead, stage="BUILDING")["stage"] == "QUALIFYING"
    assert prisma.run(upsert, leadId=lead, stage="BUILDING")["stage"] == "BUILDING"
    with pytest.raises(Refused) as refused:
        prisma.run(upsert, leadId=lead, stage="INITIATED")
    conversation = CloseEngineConversation.get(lead=lead)
    assert refused.value.sentence.endswith("cannot go from BUILDING to INITIATED")
    assert changes(conversation) == [
        Change("open", None, "QUALIFYING", actor),
        Change("start_building", "QUALIFYING", "BUILDING", actor),
    ]


def test_eight_upserts_at_once_open_one_conversation(prisma: Writer) -> None:
    lead = new_lead(prisma)
    opened_by = prisma.run(
        """
        return (await Promise.allSettled(Array.from({ length: 8 }, () => prisma.closeEngineConversation.upsert({
          where: { leadId }, create: { leadId, entryPoint: 'SMS_REPLY' }, update: { entryPoint: 'REP_CLOSE' },
        })))).filter((upsert) => upsert.status === 'fulfilled').map((upsert) => upsert.value.id)
        """,
        leadId=lead,
    )
    conversation = CloseEngineConversation.get(lead=lead)
    assert set(opened_by) == {conversation.id}
    assert triggers(conversation) == ["open"]


@pytest.mark.parametrize(
    "delete",
    [
        "await prisma.closeEngineConversation.delete({ where: { leadId } })",
        "await prisma.closeEngineConversation.deleteMany({ where: { leadId } })",
        "await prisma.lead.update({ where: { id: leadId }, data: { closeConversation: { delete: true } } })",
        "await prisma.lead.delete({ where: { id: leadId } })",
        "await prisma.lead.deleteMany({ where: { closeConversation: { stage: 'BUILDING' } } })",
        "await prisma.$executeRaw`DELETE FROM leads WHERE id = ${leadId}`",
    ],
)
def test_what_is_deleted_withdraws_what_waits_and_keeps_its_history(delete: str, prisma: Writer) -> None:
    conversation, approved = drafted(prisma)
    waiting = submit(conversation, ActionType.SEND_MESSAGE, "Are you there?", policy=lambda *_: True)
    prisma.run(APPROVE, id=approved.id, user={"id": "ann"})
    history = changes(conversation)

    prisma.run(delete, leadId=conversation.lead_id)

    assert CloseEngineConversation.select().count() == 0
    assert (Lead.get_or_none(id=conversation.lead_id) is None) == ("lead.delete" in delete or "leads" in delete)
    assert [message.status for message in OutboxMessage.select()] == [MessageStatus.WITHDRAWN]
    assert copy_of(waiting).status is ActionStatus.EXPIRED
    assert copy_of(approved).status is ActionStatus.APPROVED
    assert changes(conversation) == history


def test_a_rep_who_is_deleted_leaves_his_conversations(prisma: Writer) -> None:
    rep = prisma.run("return (await prisma.user.create({ data: { email: 'eve@example.com', name: 'Eve' } })).id")
    conversation = opened(prisma, Stage.BUILDING, repId=rep)
    prisma.run("await prisma.user.delete({ where: { id: rep } })", rep=rep)
    assert copy_of(conversation).rep_id is None
    assert triggers(conversation) == ["open"]
    conversation = copy_of(conversation)
    conversation.send_preview()
    assert conversation.stage is Stage.PREVIEW_SENT


def test_a_lead_that_is_merged_keeps_the_conversation(prisma: Writer, fake_sender: FakeSender) -> None:
    conversation, action = drafted(prisma)
    prisma.run(APPROVE, id=action.id, user={"id": "ann"})
    kept = new_lead(prisma)
    prisma.run(
        """
        await prisma.$transaction([
          prisma.closeEngineConversation.update({ where: { leadId }, data: { lead: { connect: { id: kept } } } }),
          prisma.lead.delete({ where: { id: leadId } }),
        ])
        """,
        leadId=conversation.lead_id,
        kept=kept,
    )
    assert Lead.get_by_id(kept).close_conversation.id == conversation.id
    assert fake_sender.deliver() == 1
    assert [message.lead_id for message in fake_sender.sent] == [kept]


# -- transactions ----------------------------------------------------------------------------------------------------


def test_an_interactive_transaction_is_one_with_its_history(prisma: Writer, actor: str) -> None:
    lead = new_lead(prisma)
    walk = """
        return await prisma.$transaction(async (tx) => {
          const { id } = await tx.closeEngineConversation.create({ data: { leadId: lead, entryPoint: 'SMS_REPLY' } })
          for (const stage of stages) await tx.closeEngineConversation.update({ where: { id }, data: { stage } })
          if (fails) throw new Error('the CRM thinks better of it')
          return id
        })
    """
    stages = ["QUALIFYING", "BUILDING", "PREVIEW_SENT", "EDIT_LOOP", "PREVIEW_SENT", "PAYMENT_SENT", "COMPLETED"]
    with pytest.raises(Refused, match="thinks better of it"):
        prisma.run(walk, lead=lead, stages=stages, fails=True)
    assert Lead.get_by_id(lead).close_conversation is None
    assert StageChange.select().count() == 0

    conversation = CloseEngineConversation.get_by_id(prisma.run(walk, lead=lead, stages=stages, fails=False))

    assert [change.dest for change in conversation.history()] == ["INITIATED", *stages]
    assert {change.actor for change in conversation.history()} == {actor}
    assert conversation.edit_rounds == 1
    assert near(conversation.completed_at, conversation.history()[-1].created_at)


def test_a_batch_is_written_whole_or_not_at_all(prisma: Writer) -> None:
    first, second = opened(prisma, Stage.QUALIFYING), opened(prisma, Stage.COMPLETED)
    batch = """
        await prisma.$transaction([
          prisma.closeEngineConversation.update({ where: { id: first }, data: { stage: 'BUILDING' } }),
          prisma.closeEngineConversation.update({ where: { id: first }, data: { stage: 'PREVIEW_SENT' } }),
          prisma.closeEngineConversation.updateMany({ where: { id: second }, data: { stage } }),
        ])
    """
    with pytest.raises(Refused) as refused:
        prisma.run(batch, first=first.id, second=second.id, stage="STALLED")
    assert refused.value.sentence.endswith("cannot go from COMPLETED to STALLED")
    assert triggers(first) == triggers(second) == ["open"]

    prisma.run(batch, first=first.id, second=second.id, stage="COMPLETED")

    assert triggers(first) == ["open", "start_building", "send_preview"]
    assert triggers(second) == ["open"]


def test_to_catch_a_refusal_inside_a_transaction_saves_nothing(prisma: Writer) -> None:
    """Prisma reports success, and PostgreSQL rolls back: docs/prisma.md warns of it."""
    conversation = opened(prisma, Stage.COMPLETED)
    caught = """
        return await prisma.$transaction(async (tx) => {
          await tx.lead.update({ where: { id: leadId }, data: { autonomyLevel: 'MANUAL' } })
          const refused = await tx.closeEngineConversation
            .update({ where: { leadId }, data: { stage: 'STALLED' } }).catch(refusal)
          if (goesOn) await tx.lead.count()
          return refused
        })
    """
    said = prisma.run(caught, leadId=conversation.lead_id, goesOn=False)
    assert said.endswith("cannot go from COMPLETED to STALLED")
    assert Lead.get_by_id(conversation.lead_id).autonomy_level is AutonomyLevel.FULL_AUTO
    with pytest.raises(Refused, match="current transaction is aborted") as aborted:
        prisma.run(caught, leadId=conversation.lead_id, goesOn=True)
    assert aborted.value.sentence == ""
    assert Lead.get_by_id(conversation.lead_id).autonomy_level is AutonomyLevel.FULL_AUTO


@pytest.mark.parametrize(("stage", "becomes"), [(Stage.COMPLETED, Stage.COMPLETED), (Stage.BUILDING, Stage.STALLED)])
def test_with_a_savepoint_the_rest_of_the_transaction_stays(stage: Stage, becomes: Stage, prisma: Writer) -> None:
    conversation = opened(prisma, stage)
    prisma.run(SAVEPOINT, leadId=conversation.lead_id)
    conversation = copy_of(conversation)
    assert conversation.stage is becomes
    assert conversation.autonomy_level is conversation.lead.autonomy_level is AutonomyLevel.MANUAL


def test_a_where_that_names_the_stages_is_no_error(prisma: Writer) -> None:
    building, paid = opened(prisma, Stage.BUILDING), opened(prisma, Stage.COMPLETED)
    assert prisma.run(ASK, leadId=building.lead_id) == 1
    assert prisma.run(ASK, leadId=paid.lead_id) == 0
    assert triggers(building) == ["open", "stall"]
    assert triggers(paid) == ["open"]


@pytest.mark.parametrize("level", ["ReadCommitted", "RepeatableRead", "Serializable"])
def test_every_isolation_level(level: str, prisma: Writer) -> None:
    conversation, action = drafted(prisma)
    prisma.run(
        """
        await prisma.$transaction(async (tx) => {
          await tx.pendingAction.update({ where: { id }, data: { status: 'APPROVED', approvedBy: 'ann' } })
          await tx.closeEngineConversation.update({ where: { leadId }, data: { stage: 'PREVIEW_SENT' } })
        }, { isolationLevel })
        """,
        id=action.id,
        leadId=conversation.lead_id,
        isolationLevel=level,
    )
    assert triggers(conversation) == ["open", "send_preview"]
    assert OutboxMessage.get().approved_by == "ann"


@pytest.mark.parametrize("level", ["RepeatableRead", "Serializable"])
def test_whoever_comes_second_in_a_strict_transaction_begins_again(level: str, prisma: Writer) -> None:
    conversation = opened(prisma, Stage.BUILDING)
    with pytest.raises(Refused) as conflict:
        prisma.run(
            """
            await prisma.$transaction(async (tx) => {
              await tx.closeEngineConversation.count()
              await prisma.closeEngineConversation.update({ where: { id }, data: { stage: 'STALLED' } })
              await tx.closeEngineConversation.update({ where: { id }, data: { stage: 'PREVIEW_SENT' } })
            }, { isolationLevel })
            """,
            id=conversation.id,
            isolationLevel=level,
        )
    assert (conflict.value.code, conflict.value.sentence) == ("P2034", "")
    assert triggers(conversation) == ["open", "stall"]


def test_of_two_who_lock_in_different_orders_one_begins_again(prisma: Writer) -> None:
    """The library locks the conversation before its lead; docs/prisma.md asks Prisma to do so, too."""
    conversation = opened(prisma, Stage.BUILDING)
    theirs = """
        await prisma.$transaction(async (tx) => {
          await tx.lead.update({ where: { id: leadId }, data: { autonomyLevel: 'MANUAL' } })
          await tx.closeEngineConversation.update({ where: { leadId }, data: { stage: 'PREVIEW_SENT' } })
        })
    """
    waiting = (
        "SELECT 1 FROM pg_locks WHERE NOT granted AND pid IN (SELECT pid FROM pg_stat_activity WHERE datname = %s)"
    )
    name = urlsplit(prisma.url).path.removeprefix("/")
    lost = None
    with ThreadPoolExecutor(1) as pool:
        try:
            with close_engine.locked(conversation.id) as held:
                running = pool.submit(prisma.run, theirs, leadId=conversation.lead_id)
                until(lambda: query(prisma.url, waiting, (name,)), "Prisma waits for the conversation")
                held.record(data={"budget": 900})
        except peewee.OperationalError as error:
            lost = error
        refused = running.exception()
    # PostgreSQL chooses who of the two begins again.
    if lost:
        assert "deadlock detected" in str(lost)
        assert refused is None
        copy_of(conversation).record(data={"budget": 900})
    else:
        assert isinstance(refused, Refused)
        if prisma.version.startswith("6."):
            assert (refused.code, str(refused)) == (None, "deadlock detected")
        else:
            assert refused.code == "P2034"
        prisma.run(theirs, leadId=conversation.lead_id)
    conversation.reload()
    assert (conversation.stage, conversation.collected_data) == (Stage.PREVIEW_SENT, {"budget": 900})
    assert (conversation.lead.autonomy_level, conversation.lead.qualification_data) == ("MANUAL", {"budget": 900})


# -- what is refused -------------------------------------------------------------------------------------------------

WRITES = {
    "update": "await prisma.closeEngineConversation.update({ where: { id }, data: { stage } })",
    "updateMany": "await prisma.closeEngineConversation.updateMany({ where: { id }, data: { stage } })",
    "updateManyAndReturn": (
        "await prisma.closeEngineConversation.updateManyAndReturn({ where: { id }, data: { stage } })"
    ),
    "upsert": (
        "await prisma.closeEngineConversation.upsert({ where: { id }, update: { stage },"
        " create: { leadId, entryPoint: 'SMS_REPLY' } })"
    ),
    "nested": (
        "await prisma.lead.update({ where: { id: leadId }, data: { closeConversation: { update: { stage } } } })"
    ),
    "nested upsert": (
        "await prisma.lead.update({ where: { id: leadId }, data: { closeConversation: { upsert: {"
        " update: { stage }, create: { entryPoint: 'SMS_REPLY' } } } } })"
    ),
    "$executeRaw": "await prisma.$executeRaw`UPDATE close_engine_conversations SET stage = ${stage} WHERE id = ${id}`",
    "$executeRawUnsafe": (
        "await prisma.$executeRawUnsafe('UPDATE close_engine_conversations SET stage = $1 WHERE id = $2', stage, id)"
    ),
    "$queryRaw": (
        "await prisma.$queryRaw`UPDATE close_engine_conversations SET stage = ${stage} WHERE id = ${id} RETURNING id`"
    ),
    "batch": (
        "await prisma.$transaction([prisma.lead.count(),"
        " prisma.closeEngineConversation.update({ where: { id }, data: { stage } })])"
    ),
    "raw batch": (
        "await prisma.$transaction(["
        "prisma.$executeRaw`UPDATE close_engine_conversations SET stage = ${stage} WHERE id = ${id}`])"
    ),
    "interactive": (
        "await prisma.$transaction(async (tx) => {"
        " await tx.closeEngineConversation.update({ where: { id }, data: { stage } }) })"
    ),
    "raw interactive": (
        "await prisma.$transaction(async (tx) => {"
        " await tx.$executeRaw`UPDATE close_engine_conversations SET stage = ${stage} WHERE id = ${id}` })"
    ),
    "extended": (
        "await prisma.$extends({ query: { $allModels: { $allOperations: ({ args, query }) => query(args) } } })"
        ".closeEngineConversation.update({ where: { id }, data: { stage } })"
    ),
}


SOLD = "{ leadId: lead, entryPoint: 'SMS_REPLY', stage: 'SOLD' }"
CREATES = {
    "create": f"await prisma.closeEngineConversation.create({{ data: {SOLD} }})",
    "createMany": f"await prisma.closeEngineConversation.createMany({{ data: [{SOLD}] }})",
    "createManyAndReturn": f"await prisma.closeEngineConversation.createManyAndReturn({{ data: [{SOLD}] }})",
    "upsert that creates": (
        f"await prisma.closeEngineConversation.upsert({{ where: {{ leadId: lead }}, update: {{}}, create: {SOLD} }})"
    ),
    "nested create": (
        "await prisma.lead.create({ data: { firstName: 'Ana', companyName: 'Bakery', phone: '+15550100',"
        " closeConversation: { create: { entryPoint: 'SMS_REPLY', stage: 'SOLD' } } } })"
    ),
}


def test_the_page_finds_the_sentence_in_each_refusal(prisma: Writer) -> None:
    conversation, lead = opened(prisma, Stage.COMPLETED), new_lead(prisma)
    sentence = f"close_engine: conversation {conversation.id} cannot go from COMPLETED to STALLED"
    for name, write in {**WRITES, **CREATES}.items():
        with pytest.raises(Refused) as refused:
            prisma.run(write, id=conversation.id, leadId=conversation.lead_id, lead=lead, stage="STALLED")
        assert refused.value.sentence == (sentence if name in WRITES else "close_engine: SOLD is not a stage"), name
        raised = (refused.value.name, refused.value.code)
        if "Raw" in write:
            assert raised == ("PrismaClientKnownRequestError", "P2010"), name
        elif prisma.version.startswith("6."):
            assert raised == ("DriverAdapterError", None), name
        else:
            assert raised == ("PrismaClientKnownRequestError", "P2039"), name
    assert prisma.run(CATCH, leadId=conversation.lead_id) == sentence
    assert triggers(conversation) == ["open"]


def test_what_is_no_refusal_of_ours_has_no_sentence(prisma: Writer) -> None:
    conversation = opened(prisma)
    for code, write in {
        "P2002": "await prisma.closeEngineConversation.create({ data: { leadId, entryPoint: 'SMS_REPLY' } })",
        "P2003": "await prisma.closeEngineConversation.create({ data: { leadId: 'nobody', entryPoint: 'REP_CLOSE' } })",
        "P2025": "await prisma.closeEngineConversation.update({ where: { leadId: 'nobody' }, data: {} })",
    }.items():
        with pytest.raises(Refused) as refused:
            prisma.run(write, leadId=conversation.lead_id)
        assert (refused.value.code, refused.value.sentence) == (code, "")
    with pytest.raises(Refused) as refused:
        prisma.run(CATCH, leadId="nobody")
    assert refused.value.code == "P2025"


def test_the_typescript_of_the_page_is_correct(node: Client, tmp_path: Path) -> None:
    file = tmp_path / "page.ts"
    known = "prisma: PrismaClient, id: string, leadId: string, user: { id: string }"
    code = [f"import type {{ PrismaClient }} from '{PLACE}/{node.version}/generated/client'", page()]
    for number, (language, _, text) in enumerate(blocks(PRISMA)):
        if language == "ts" and "export " not in text:
            code.append(f"export async function block{number}({known}) {{\n{text}}}")
    file.write_text("\n".join(code))
    compiler = [
        str(find_node()),
        str(PLACE / "node_modules/typescript/bin/tsc"),
        "--noEmit",
        "--strict",
        "--skipLibCheck",
    ]
    options = ["--target", "es2022", "--module", "esnext", "--moduleResolution", "bundler"]
    done = subprocess.run([*compiler, *options, str(file)], capture_output=True, text=True, check=False, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_page_names_the_versions_that_write_here() -> None:
    assert f"Prisma Client {' and '.join(VERSIONS)}" in section(PRISMA, "What your code may do")


CONVERSATION = "await prisma.closeEngineConversation.update({ where: { id }, data: %s })"
ACTION = "await prisma.pendingAction.update({ where: { id: action }, data: %s })"
CREATE = (
    "await prisma.pendingAction.create({ data: { conversationId: id, leadId, type: 'SEND_MESSAGE', draftMessage: 'Hi',"
    " ...%s } })"
)
DEEP = "JSON.parse('['.repeat(101) + ']'.repeat(101))"

#: What the guards refuse, and a part of the sentence.
REFUSALS = {
    CONVERSATION % "{ stage: 'SOLD' }": "cannot go from BUILDING to SOLD",
    CONVERSATION % "{ stage: '' }": "cannot go from BUILDING to ",
    CONVERSATION % "{ autonomyLevel: 'AUTO' }": "autonomy_level of conversation .* cannot be AUTO",
    CONVERSATION % "{ entryPoint: 'WEB' }": "entry_point of conversation .* cannot be WEB",
    CONVERSATION % f"{{ collectedData: {{ deep: {DEEP} }} }}": "collected_data of conversation",
    CONVERSATION % f"{{ questionsAsked: {DEEP} }}": "questions_asked of conversation",
    CONVERSATION % "{ collectedData: 'x'.repeat(2000001) }": "collected_data of conversation",
    CONVERSATION % "{ completedAt: new Date('9999-01-01') }": "completed_at of conversation",
    CONVERSATION % "{ updatedAt: new Date(Date.now() + 90000000) }": "updated_at of conversation",
    CONVERSATION % "{ stalledAt: new Date(Date.now() + 90000000) }": "stalled_at of conversation",
    CREATE % "{ status: 'APPROVED' }": "cannot begin as APPROVED",
    CREATE % "{ type: 'SEND_FAX' }": "type of action .* cannot be SEND_FAX",
    CREATE % f"{{ metadata: {DEEP} }}": "metadata of action",
    CREATE % "{ expiresAt: new Date(253370764800000) }": "expires_at of action",
    ACTION % "{ status: 'MAYBE' }": "MAYBE is not an action status",
    ACTION % "{ type: 'SEND_FAX' }": "type of action .* cannot be SEND_FAX",
    ACTION % "{ status: 'APPROVED', approvedBy: 'ann', metadata: { sendAfter: 'tomorrow' } }": "cannot be approved",
}


def test_what_python_could_not_read_is_refused_with_a_sentence(prisma: Writer) -> None:
    conversation, action = drafted(prisma)
    for write, sentence in REFUSALS.items():
        with pytest.raises(Refused) as refused:
            prisma.run(write, id=conversation.id, leadId=conversation.lead_id, action=action.id)
        assert re.match(f"close_engine: .*{sentence}", refused.value.sentence), write
    assert copy_of(conversation).updated_at == conversation.updated_at
    assert copy_of(action).status is ActionStatus.PENDING
    assert PendingAction.select().count() == 1


# -- what Prisma can write and Python must read ----------------------------------------------------------------------

#: What Prisma writes into a JSON column, and what Python reads there.
JSON = {
    "Prisma.JsonNull": None,
    "Prisma.DbNull": None,
    "undefined": None,
    "{}": {},
    "[]": [],
    "0": 0,
    "false": False,
    "'text'": "text",
    "[1, null, [2.5, -0.0, 1e21], 'x']": [1, None, [2.5, 0.0, 1e21], "x"],
    r"""{ a: { b: null }, 'ключ': '☎️ \u2028 \\ \' "' }""": {"a": {"b": None}, "ключ": "☎️ \u2028 \\ ' \""},
    "{ at: new Date(0), big: 9007199254740993 }": {"at": "1970-01-01T00:00:00.000Z", "big": 9007199254740992},
    "JSON.parse('['.repeat(99) + ']'.repeat(99))": None,
}


@pytest.mark.parametrize("value", JSON)
def test_python_reads_every_json_that_prisma_writes(value: str, prisma: Writer, fake_sender: FakeSender) -> None:
    expected: Any = JSON[value]
    if "repeat" in value:
        for _ in range(99):
            expected = [expected] if expected is not None else []
    row = prisma.run(
        f"""
        const value = {value}
        const {{ id }} = await prisma.closeEngineConversation.create({{
          data: {{ leadId, entryPoint: 'SMS_REPLY', collectedData: value, questionsAsked: value }} }})
        await prisma.lead.update({{ where: {{ id: leadId }}, data: {{ qualificationData: value }} }})
        return await prisma.pendingAction.create({{
          data: {{ leadId, conversationId: id, type: 'SEND_MESSAGE', draftMessage: 'Hi', metadata: value }} }})
        """,
        leadId=new_lead(prisma),
    )
    conversation = CloseEngineConversation.get_by_id(row["conversationId"])
    action = PendingAction.get_by_id(row["id"])
    for read in (
        *(conversation.collected_data, conversation.questions_asked, conversation.lead.qualification_data),
        action.metadata,
    ):
        assert read == expected

    prisma.run(APPROVE, id=action.id, user={"id": "ann"})

    assert fake_sender.deliver() == 1
    assert fake_sender.sent[0].payload == expected
    conversation.record(questions=["budget"], data={"budget": 900})
    assert "budget" in copy_of(conversation).questions_asked
    assert copy_of(conversation).collected_data["budget"] == 900
    assert prisma.run("return await prisma.lead.findUnique({ where: { id } })", id=row["leadId"])[
        "qualificationData"
    ] == (copy_of(conversation).collected_data)


def test_prisma_finds_by_json_that_python_wrote(prisma: Writer) -> None:
    conversation = opened(prisma)
    conversation.record(data={"budget": {"amount": 900}})
    find = "return await prisma.closeEngineConversation.findMany({ where: { collectedData: filter } })"
    (row,) = prisma.run(find, filter={"path": ["budget", "amount"], "gte": 900})
    assert row["collectedData"] == {"budget": {"amount": 900}}
    assert prisma.run(find, filter={"path": ["budget", "amount"], "gt": 900}) == []


# -- clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clock", [23 * HOUR, 2 * HOUR, -2 * HOUR, -400 * DAY])
def test_a_client_whose_clock_is_wrong(clock: timedelta, prisma: Writer, fake_sender: FakeSender) -> None:
    """`updatedAt` is the client's, and only grows; history, stamps and decisions take the database's clock."""
    lead = new_lead(prisma)
    row = prisma.run(
        "return await prisma.closeEngineConversation.create({ data: { leadId, entryPoint: 'SMS_REPLY' } })",
        clock=clock,
        leadId=lead,
    )
    conversation = CloseEngineConversation.get_by_id(row["id"])
    assert near(conversation.updated_at, now() + clock)
    seen = [conversation.updated_at]
    right = timedelta(0)
    for stage, ahead in (("QUALIFYING", right), ("BUILDING", clock), ("STALLED", right), ("BUILDING", clock)):
        stale = copy_of(conversation)
        row = prisma.run("return " + CONVERSATION % "{ stage }", clock=ahead, id=conversation.id, stage=stage)
        conversation.reload()
        assert row["updatedAt"] == as_prisma(conversation.updated_at)
        seen.append(conversation.updated_at)
        with pytest.raises(StageConflict):
            stale.close_lost("no budget")
    assert seen == sorted(set(seen))
    conversation.stall()
    assert all(near(change.created_at, now()) for change in conversation.history())
    assert near(conversation.stalled_at, now())

    action = submit(conversation, ActionType.SEND_MESSAGE, "Still there?", policy=lambda *_: True)
    prisma.run(APPROVE, clock=clock, id=action.id, user={"id": "ann"})
    assert near(copy_of(action).approved_at, now())
    assert fake_sender.deliver() == 1


def test_a_clock_that_is_more_than_a_day_ahead_is_refused(prisma: Writer) -> None:
    conversation = opened(prisma, Stage.BUILDING)
    for write in (
        "await prisma.closeEngineConversation.update({ where: { id }, data: { editRounds: 1 } })",
        "await prisma.closeEngineConversation.updateMany({ data: { stage: 'STALLED' } })",
        "await prisma.closeEngineConversation.create({ data: { leadId: other, entryPoint: 'SMS_REPLY' } })",
    ):
        with pytest.raises(Refused) as refused:
            prisma.run(write, clock=2 * DAY, id=conversation.id, other=new_lead(prisma))
        assert re.match(r"close_engine: updated_at of conversation \w+ cannot be .* a day", refused.value.sentence)
    assert copy_of(conversation).updated_at == conversation.updated_at


@pytest.mark.parametrize("zone", ["Pacific/Auckland", "America/New_York", "Asia/Kathmandu"])
def test_a_database_in_another_timezone(zone: str, prisma: Writer, fake_sender: FakeSender) -> None:
    name = urlsplit(prisma.url).path.removeprefix("/")
    execute(prisma.url, f"ALTER DATABASE {name} SET timezone = '{zone}'")
    close_engine.connect(prisma.url)
    assert query(prisma.url, "SHOW timezone") == [(zone,)]
    assert prisma.run("return await prisma.$queryRaw`SELECT current_setting('TimeZone') AS zone`") == [{"zone": zone}]
    conversation, action = drafted(
        prisma,
        expiresAt=as_prisma(now() + HOUR),
        metadata={"sendAfter": as_prisma(now() - HOUR), "notAfter": as_prisma(now() + HOUR)},
    )
    for at in (conversation.created_at, conversation.updated_at, action.created_at):
        assert near(at, now())
    assert near(action.expires_at, now() + HOUR)

    prisma.run(APPROVE, id=action.id, user={"id": "ann"})
    prisma.run(
        "await prisma.closeEngineConversation.update({ where: { id }, data: { stage: 'PREVIEW_SENT' } })",
        id=conversation.id,
    )

    assert near(copy_of(action).approved_at, now())
    assert near(conversation.history()[-1].created_at, now())
    assert fake_sender.deliver() == 1
    assert near(OutboxMessage.get().not_after, now() + HOUR)
    raw = """
        await prisma.$executeRaw`INSERT INTO close_engine_conversations (id, lead_id, entry_point, updated_at)
          VALUES ('raw', ${lead}, 'SMS_REPLY', now())`
    """
    prisma.run(raw, lead=new_lead(prisma))
    conversation = CloseEngineConversation.get_by_id("raw")
    assert near(conversation.created_at, now())
    assert near(conversation.updated_at, now())
    _, late = drafted(prisma, expiresAt=as_prisma(now() - timedelta(minutes=1)))
    with pytest.raises(Refused) as refused:
        prisma.run(APPROVE, id=late.id, user={"id": "ann"})
    assert "expired" in refused.value.sentence


# -- rights ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def crm_app(node: Client, server: str, url: str, prisma: Writer) -> Iterator[Writer]:
    """Prisma as a role with the grant that docs/prisma.md gives it, and rights on the CRM's own tables."""
    role = new_name()
    own = "GRANT SELECT, INSERT, UPDATE, DELETE ON leads, users, clients, messages, lead_events TO {role}"
    execute(server, f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
    execute(url, *(statement.format(role=role) for statement in (*grants(PRISMA, "crm_app"), own)))
    parts = urlsplit(url)
    writer = node.on(parts._replace(netloc=f"{role}:secret@{parts.netloc.rpartition('@')[2]}").geturl())
    yield writer
    writer.close()
    execute(url, f"DROP OWNED BY {role}")
    execute(server, f"DROP ROLE {role}")


def test_a_role_with_few_rights_does_all_that_a_crm_does(crm_app: Writer, fake_sender: FakeSender) -> None:
    actor = "database:" + (urlsplit(crm_app.url).username or "")
    conversation, action = drafted(crm_app)
    crm_app.run(APPROVE, id=action.id, user={"id": "ann"})
    assert fake_sender.deliver() == 1
    crm_app.run(
        "await prisma.closeEngineConversation.updateMany({ where: { stage: 'BUILDING' }, data: { stage: 'STALLED' } })"
    )
    assert changes(conversation) == [
        Change("open", None, "BUILDING", actor),
        Change("stall", "BUILDING", "STALLED", actor),
    ]
    with pytest.raises(Refused) as refused:
        crm_app.run(CONVERSATION % "{ stage: 'SOLD' }", id=conversation.id)
    assert refused.value.sentence.endswith("cannot go from STALLED to SOLD")
    for forbidden in (
        "await prisma.$queryRaw`SELECT id FROM close_engine.history`",
        "await prisma.$executeRaw`DELETE FROM close_engine.outbox`",
        "await prisma.$executeRaw`ALTER TABLE close_engine_conversations DISABLE TRIGGER ALL`",
        "await prisma.$executeRaw`TRUNCATE pending_actions`",
        "await prisma.$executeRaw`SET session_replication_role = replica`",
    ):
        with pytest.raises(Refused, match=r"permission denied|must be owner"):
            crm_app.run(forbidden)
    forged = """
        await prisma.$transaction([
          prisma.$executeRaw`SELECT set_config('close_engine.context', ${context}, true)`,
          prisma.closeEngineConversation.update({ where: { id }, data: { stage: 'CLOSED_LOST' } }),
        ])
    """
    crm_app.run(forged, id=conversation.id, context=json.dumps({"actor": "the boss", "id": conversation.id}))
    assert conversation.history()[-1].actor == actor
    crm_app.run("await prisma.lead.delete({ where: { id } })", id=conversation.lead_id)
    assert CloseEngineConversation.select().count() == 0


# -- decisions on the CRM's own screen -------------------------------------------------------------------------------


def test_the_words_of_a_draft_that_prisma_approved_are_sent(prisma: Writer, fake_sender: FakeSender) -> None:
    conversation, action = drafted(prisma, Stage.INITIATED)
    row = prisma.run("return " + APPROVE, id=action.id, user={"id": "ann"})
    action = copy_of(action)
    assert (action.status, action.approved_by) == (ActionStatus.APPROVED, "ann")
    assert row["approvedAt"] == as_prisma(action.approved_at)
    assert fake_sender.deliver() == 1
    (message,) = fake_sender.sent
    assert (message.body, message.approved_by, message.action_id) == ("Hi", "ann", action.id)
    assert copy_of(conversation).stage is Stage.QUALIFYING


def test_a_second_click_decides_nothing(prisma: Writer) -> None:
    _, action = drafted(prisma)
    prisma.run(APPROVE, id=action.id, user={"id": "ann"})
    decided = copy_of(action)
    with pytest.raises(Refused) as second:
        prisma.run(APPROVE, id=action.id, user={"id": "bob"})
    assert second.value.code == "P2025"
    careless = ACTION % "{ status: 'APPROVED', approvedBy: 'bob' }"
    prisma.run(careless, action=action.id)
    with pytest.raises(Refused) as different:
        prisma.run(ACTION % "{ status: 'REJECTED', approvedBy: 'bob' }", action=action.id)
    assert different.value.sentence.startswith(f"close_engine: action {action.id} ")
    assert copy_of(action).__data__ == decided.__data__
    assert OutboxMessage.select().count() == 1


@pytest.mark.parametrize("careful", [True, False], ids=["where it is pending", "whatever it is"])
def test_of_eight_clicks_at_once_one_decides(careful: bool, prisma: Writer) -> None:
    _, action = drafted(prisma)
    approve = APPROVE if careful else APPROVE.replace(", status: 'PENDING' }", " }")
    assert careful or approve != APPROVE
    outcomes = prisma.run(
        """
        const approve = new (async () => {}).constructor('prisma', 'id', 'user', code)
        const clicks = Array.from({ length: 8 }, (_, user) => approve(prisma, id, { id: `user ${user}` }))
        return (await Promise.allSettled(clicks)).map(({ value, reason }) => [value?.approvedBy, reason?.code])
        """,
        code="return " + approve,
        id=action.id,
    )
    decided = copy_of(action)
    assert [message.approved_by for message in OutboxMessage.select()] == [decided.approved_by]
    if careful:
        assert sorted(outcomes, key=str) == sorted([[decided.approved_by, None], *[[None, "P2025"]] * 7], key=str)
    else:
        assert outcomes == [[decided.approved_by, None]] * 8


def test_prisma_and_python_decide_at_once(prisma: Writer) -> None:
    _, action = drafted(prisma)
    copy_of(action).reject(by="bob")
    with pytest.raises(Refused) as late:
        prisma.run(APPROVE, id=action.id, user={"id": "ann"})
    assert late.value.code == "P2025"
    _, action = drafted(prisma)
    mine = copy_of(action)
    prisma.run(APPROVE, id=action.id, user={"id": "ann"})
    with pytest.raises(close_engine.ActionDecided, match="that decision stands"):
        mine.reject(by="bob")
    assert [message.approved_by for message in OutboxMessage.select()] == ["ann"]


def test_what_has_expired_cannot_be_approved(prisma: Writer) -> None:
    _, action = drafted(prisma, expiresAt=as_prisma(now() - timedelta(seconds=1)))
    for clock in (timedelta(0), -HOUR):
        with pytest.raises(Refused) as late:
            prisma.run(APPROVE, clock=clock, id=action.id, user={"id": "ann"})
        assert "expired" in late.value.sentence
    assert OutboxMessage.select().count() == 0
    read = "return (await prisma.pendingAction.findUnique({ where: { id } })).status"
    assert prisma.run(read, id=action.id) == "PENDING"
    close_engine.sweep()
    assert prisma.run(read, id=action.id) == "EXPIRED"


def test_a_draft_is_edited_as_it_is_approved(prisma: Writer, fake_sender: FakeSender) -> None:
    _, action = drafted(prisma)
    prisma.run(
        ACTION
        % "{ status: 'APPROVED', approvedBy: 'ann', draftMessage: 'Good morning ☀️', metadata: { tone: 'warm' } }",
        action=action.id,
    )
    assert fake_sender.deliver() == 1
    (message,) = fake_sender.sent
    assert (message.body, message.payload) == ("Good morning ☀️", {"tone": "warm", "editedBy": "ann"})


def test_a_payment_link_needs_somebody_who_answers_for_it_and_its_url(prisma: Writer, fake_sender: FakeSender) -> None:
    conversation, action = drafted(prisma, Stage.PENDING_APPROVAL, "SEND_PAYMENT_LINK", metadata=LINK)
    for data in (
        "{ status: 'APPROVED' }",
        "{ status: 'APPROVED', approvedBy: null }",
        "{ status: 'APPROVED', approvedBy: '' }",
    ):
        with pytest.raises(Refused) as refused:
            prisma.run(ACTION % data, action=action.id)
        assert "approved_by" in refused.value.sentence
    with pytest.raises(Refused) as refused:
        prisma.run(ACTION % "{ status: 'APPROVED', approvedBy: 'ann', metadata: Prisma.JsonNull }", action=action.id)
    assert refused.value.sentence.endswith("a payment link needs its URL; write it in metadata.paymentUrl")
    assert OutboxMessage.select().count() == 0

    prisma.run(APPROVE, id=action.id, user={"id": "ann"})

    assert fake_sender.deliver() == 1
    conversation = copy_of(conversation)
    assert (conversation.stage, conversation.payment_link_url) == (Stage.PAYMENT_SENT, LINK["paymentUrl"])
    assert conversation.history()[-1].metadata["approved_by"] == "ann"


def test_the_database_writes_when_it_was_decided(prisma: Writer) -> None:
    _, action = drafted(prisma)
    row = prisma.run(
        "return " + ACTION % "{ status: 'APPROVED', approvedBy: 'ann', approvedAt: new Date(0) }", action=action.id
    )
    assert near(copy_of(action).approved_at, now())
    assert row["approvedAt"] == as_prisma(copy_of(action).approved_at)


def test_what_prisma_rejects_is_not_sent(prisma: Writer, actor: str) -> None:
    conversation = opened(prisma, Stage.PREVIEW_SENT)
    link = submit(
        conversation, ActionType.SEND_PAYMENT_LINK, "Here you can pay.", metadata=LINK, policy=lambda *_: True
    )
    assert conversation.stage is Stage.PENDING_APPROVAL
    prisma.run(ACTION % "{ status: 'REJECTED', approvedBy: 'ann' }", action=link.id)
    assert copy_of(link).status is ActionStatus.REJECTED
    assert copy_of(conversation).stage is Stage.PREVIEW_SENT
    assert conversation.history()[-1].trigger == "withdraw_approval"
    assert OutboxMessage.select().count() == 0


def test_many_drafts_are_decided_with_one_update(prisma: Writer, fake_sender: FakeSender) -> None:
    drafts = [drafted(prisma) for _ in range(5)]
    approve = """
        return await prisma.pendingAction.updateMany({
          where: { id: { in: ids }, status: 'PENDING' }, data: { status: 'APPROVED', approvedBy: 'ann' } })
    """
    link = drafted(prisma, Stage.PENDING_APPROVAL, "SEND_PAYMENT_LINK")
    ids = [action.id for _, action in drafts]
    with pytest.raises(Refused, match="a payment link needs its URL"):
        prisma.run(approve, ids=[*ids, link[1].id])
    assert OutboxMessage.select().count() == 0
    assert prisma.run(approve, ids=ids) == {"count": 5}
    assert prisma.run(approve, ids=ids) == {"count": 0}
    assert fake_sender.deliver() == 5


def test_a_text_may_wait_and_be_urgent(prisma: Writer, fake_sender: FakeSender) -> None:
    at = now() + HOUR
    metadata = {"sendAfter": as_prisma(at), "sendPriority": 7}
    _, action = drafted(prisma, metadata=metadata)
    prisma.run(APPROVE, id=action.id, user={"id": "ann"})
    message = OutboxMessage.get()
    assert (as_prisma(message.available_at), message.priority) == (metadata["sendAfter"], 7)
    assert fake_sender.deliver() == 0


# -- beside each other -----------------------------------------------------------------------------------------------


def test_python_goes_on_with_what_prisma_opened_and_prisma_with_what_python_did(prisma: Writer, actor: str) -> None:
    conversation = opened(prisma)
    update = "return await prisma.closeEngineConversation.update({ where: { id, updatedAt }, data: { stage } })"
    turns = {"start_qualifying": "BUILDING", "send_preview": "EDIT_LOOP", "request_approval": "PREVIEW_SENT"}
    for trigger, stage in turns.items():
        conversation.fire(trigger, actor="worker")
        version = as_prisma(conversation.updated_at)
        row = prisma.run(update, id=conversation.id, updatedAt=version, stage=stage)
        with pytest.raises(Refused) as stale:
            prisma.run(update, id=conversation.id, updatedAt=version, stage="STALLED")
        assert stale.value.code == "P2025"
        with pytest.raises(StageConflict) as conflict:
            conversation.stall()
        assert conflict.value.found is Stage(stage)
        conversation.reload()
        assert row["updatedAt"] == as_prisma(conversation.updated_at)
    assert [(change.dest, change.actor) for change in conversation.history()] == [
        *[("INITIATED", actor), ("QUALIFYING", "worker"), ("BUILDING", actor), ("PREVIEW_SENT", "worker")],
        *[("EDIT_LOOP", actor), ("PENDING_APPROVAL", "worker"), ("PREVIEW_SENT", actor)],
    ]


def test_prisma_changes_fields_and_python_notices(prisma: Writer) -> None:
    conversation = opened(prisma, Stage.BUILDING)
    prisma.run(
        "await prisma.closeEngineConversation.update({ where: { id }, data: { autonomyLevel: 'MANUAL' } })",
        id=conversation.id,
    )
    with pytest.raises(StageConflict):
        conversation.send_preview()
    conversation.reload()
    assert isinstance(submit(conversation, ActionType.SEND_MESSAGE, "Hi"), PendingAction)
    assert triggers(conversation) == ["open"]


def test_two_writes_in_one_millisecond_are_two_versions(prisma: Writer) -> None:
    conversation = opened(prisma)
    rows = prisma.run(
        """
        const RealDate = Date
        const at = Date.now()
        globalThis.Date = class extends RealDate {
          constructor(...given) { super(...(given.length ? given : [at])) }
          static now() { return at }
        }
        try {
          return [await prisma.closeEngineConversation.update({ where: { id }, data: { editRounds: 1 } }),
                  await prisma.closeEngineConversation.update({ where: { id }, data: { editRounds: 2 } })]
        } finally { globalThis.Date = RealDate }
        """,
        id=conversation.id,
    )
    versions = [row["updatedAt"] for row in rows]
    assert versions == sorted(set(versions))
    assert as_prisma(copy_of(conversation).updated_at) == versions[-1]


def test_what_prisma_opened_stalls_and_resumes(prisma: Writer, actor: str) -> None:
    conversation = opened(prisma, Stage.QUALIFYING)
    assert list(close_engine.stall_silent(timedelta(0))) == [conversation.id]
    assert close_engine.receive(conversation.lead_id, "SM1", "Sorry, I was away.").resumed
    prisma.run(CONVERSATION % "{ stage: 'BUILDING' }", id=conversation.id)
    assert [(change.trigger, change.actor) for change in conversation.history()] == [
        *[("open", actor), ("stall", "sweep"), ("resume", f"lead:{conversation.lead_id}"), ("start_building", actor)],
    ]


@pytest.mark.parametrize("text", ["STOP", "In blue, please."])
def test_prisma_approves_nothing_that_the_lead_has_overtaken(
    text: str, prisma: Writer, fake_sender: FakeSender
) -> None:
    conversation, action = drafted(prisma)
    close_engine.receive(conversation.lead_id, "SM1", text)
    with pytest.raises(Refused) as late:
        prisma.run(APPROVE, id=action.id, user={"id": "ann"})
    assert late.value.code == "P2025"
    with pytest.raises(Refused) as careless:
        prisma.run(ACTION % "{ status: 'APPROVED', approvedBy: 'ann' }", action=action.id)
    assert careless.value.sentence == f"close_engine: action {action.id} cannot go from EXPIRED to APPROVED"
    assert fake_sender.deliver() == 0
    assert OutboxMessage.select().count() == 0


def test_prisma_drafts_nothing_for_a_conversation_that_is_over(prisma: Writer) -> None:
    conversation, _ = drafted(prisma)
    close_engine.receive(conversation.lead_id, "SM1", "STOP")
    draft = "return (await prisma.pendingAction.create({ data })).id"
    data = {"conversationId": conversation.id, "leadId": conversation.lead_id, "draftMessage": "Hi"}
    id = prisma.run(draft, data={**data, "type": "SEND_MESSAGE"})
    with pytest.raises(Refused) as refused:
        prisma.run(APPROVE, id=id, user={"id": "ann"})
    assert refused.value.sentence == (f"close_engine: action {id} cannot be approved: its conversation is CLOSED_LOST")


# -- reading ---------------------------------------------------------------------------------------------------------


def test_prisma_reads_what_python_wrote(prisma: Writer) -> None:
    lead = Lead.get_by_id(new_lead(prisma))
    rep = close_engine.User.select().order_by(close_engine.User.id).first()
    conversation = close_engine.open_conversation(lead, EntryPoint.REP_CLOSE, rep=rep, actor="worker")
    conversation.record(questions=["budget"], data={"budget": 900.5, "naïve": ["☎️", None]})
    bring_to(conversation, Stage.PAYMENT_SENT)
    action = submit(conversation, ActionType.SEND_MESSAGE, "Paid?", metadata={"tone": "warm"}, policy=lambda *_: True)
    found = prisma.run(
        """
        return await prisma.lead.findMany({
          where: { closeConversation: { is: { stage: { in: ['PAYMENT_SENT'] }, rep: { id: rep } } } },
          include: { closeConversation: { include: { rep: true } } },
        })
        """,
        rep=rep.id,
    )
    (row,) = found
    read = row["closeConversation"]
    conversation.reload()
    assert (row["closeEntryPoint"], row["qualificationData"]) == ("REP_CLOSE", conversation.collected_data)
    assert (read["questionsAsked"], read["collectedData"]) == (["budget"], conversation.collected_data)
    assert (read["stage"], read["paymentLinkUrl"]) == ("PAYMENT_SENT", conversation.payment_link_url)
    for name in ("created_at", "updated_at", "payment_link_sent_at"):
        camel = re.sub("_(.)", lambda found: found[1].upper(), name)
        assert read[camel] == as_prisma(getattr(conversation, name))
    selected = prisma.run(
        """
        return await prisma.pendingAction.findMany({
          where: { leadId, status: 'PENDING', createdAt: { lte: createdAt, gte: createdAt } },
          select: { id: true, draftMessage: true, metadata: true, createdAt: true } })
        """,
        leadId=lead.id,
        createdAt=as_prisma(action.created_at),
    )
    assert selected == [
        {
            "id": action.id,
            "draftMessage": "Paid?",
            "metadata": action.metadata,
            "createdAt": as_prisma(action.created_at),
        }
    ]
    count = "select: { _count: { select: { closeEngineConversations: true } } }"
    counted = prisma.run(f"return await prisma.user.findUnique({{ where: {{ id }}, {count} }})", id=rep.id)
    assert counted == {"_count": {"closeEngineConversations": 1}}
    grouped = prisma.run("return await prisma.closeEngineConversation.groupBy({ by: ['stage'], _count: true })")
    assert grouped == [{"stage": "PAYMENT_SENT", "_count": 1}]
