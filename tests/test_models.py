"""The tables as the models see them: every column of the design, and none of the CRM's others."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    AutonomyLevel,
    Client,
    CloseEngineConversation,
    EntryPoint,
    Lead,
    Stage,
    StageChange,
    User,
)
from close_engine.approvals import PendingAction
from close_engine.stages import ActionStatus, ActionType
from tests.crm import AFTER, BEFORE, query, restore
from tests.servers import postgres_database

MOMENT = "timestamp(3) without time zone"

#: The tables of the design: (column, type, NOT NULL, default).
COLUMNS: dict[type[peewee.Model], list[tuple[str, str, bool, str | None]]] = {
    CloseEngineConversation: [
        ("id", "text", True, None),
        ("lead_id", "text", True, None),
        ("rep_id", "text", False, None),
        ("entry_point", "text", True, None),
        ("stage", "text", True, "'INITIATED'::text"),
        ("autonomy_level", "text", True, "'FULL_AUTO'::text"),
        ("questions_asked", "jsonb", False, None),
        ("collected_data", "jsonb", False, None),
        ("edit_rounds", "integer", True, "0"),
        ("payment_link_url", "text", False, None),
        ("payment_link_sent_at", MOMENT, False, None),
        ("stalled_at", MOMENT, False, None),
        ("completed_at", MOMENT, False, None),
        ("closed_lost_at", MOMENT, False, None),
        ("closed_lost_reason", "text", False, None),
        ("created_at", MOMENT, True, "CURRENT_TIMESTAMP"),
        ("updated_at", MOMENT, True, None),
    ],
    PendingAction: [
        ("id", "text", True, None),
        ("conversation_id", "text", True, None),
        ("lead_id", "text", True, None),
        ("type", "text", True, None),
        ("draft_message", "text", True, None),
        ("metadata", "jsonb", False, None),
        ("status", "text", True, "'PENDING'::text"),
        ("approved_by", "text", False, None),
        ("approved_at", MOMENT, False, None),
        ("expires_at", MOMENT, False, None),
        ("created_at", MOMENT, True, "CURRENT_TIMESTAMP"),
    ],
    Lead: [
        ("autonomy_level", "text", True, "'FULL_AUTO'::text"),
        ("close_entry_point", "text", False, None),
        ("qualification_data", "jsonb", False, None),
    ],
    Client: [("autonomy_level", "text", True, "'FULL_AUTO'::text")],
    User: [],
}

INDEXES = {
    "close_engine_conversations": {
        "close_engine_conversations_pkey": ("id", True),
        "close_engine_conversations_lead_id_key": ("lead_id", True),
        "close_engine_conversations_entry_point_idx": ("entry_point", False),
        "close_engine_conversations_stage_idx": ("stage", False),
        "close_engine_conversations_created_at_idx": ("created_at", False),
    },
    "pending_actions": {
        "pending_actions_pkey": ("id", True),
        "pending_actions_status_idx": ("status", False),
        "pending_actions_lead_id_idx": ("lead_id", False),
        "pending_actions_conversation_id_idx": ("conversation_id", False),
    },
}

FOREIGN_KEYS = {
    "close_engine_conversations_lead_id_fkey": (
        "FOREIGN KEY (lead_id) REFERENCES leads(id) ON UPDATE CASCADE ON DELETE CASCADE"
    ),
    "close_engine_conversations_rep_id_fkey": (
        "FOREIGN KEY (rep_id) REFERENCES users(id) ON UPDATE CASCADE ON DELETE SET NULL"
    ),
}

#: The columns of the CRM's own tables that the models have.
THEIRS: dict[type[peewee.Model], set[str]] = {Lead: {"id", "phone"}, Client: {"id"}, User: {"id"}}


@pytest.mark.parametrize("model", COLUMNS, ids=lambda model: model.__name__)
def test_every_column_of_the_design_is_in_the_database_and_in_the_model(
    postgres_url: str, postgres: peewee.Database, model: type[peewee.Model]
) -> None:
    found = query(
        postgres_url,
        """
        SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid)
        FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE a.attrelid = %s::regclass AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
        """,
        (model._meta.table_name,),
    )
    theirs = THEIRS.get(model, set())
    ours = [name for name, *_ in COLUMNS[model]]

    assert [column for column in found if column[0] in ours] == COLUMNS[model]
    assert {field.column_name for field in model._meta.sorted_fields} == {*ours, *theirs}
    if not theirs:
        assert [name for name, *_ in found] == ours
        # The model allows NULL exactly if the column does.
        for field in model._meta.sorted_fields:
            name, _, required, _ = next(column for column in COLUMNS[model] if column[0] == field.column_name)
            assert field.null is not required, name


@pytest.mark.parametrize("table", INDEXES)
def test_every_index_and_foreign_key_of_the_design_is_there_by_name(postgres_url: str, table: str) -> None:
    indexes = query(
        postgres_url,
        """
        SELECT c.relname, string_agg(a.attname, ',' ORDER BY a.attnum), i.indisunique
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE i.indrelid = %s::regclass AND i.indpred IS NULL GROUP BY c.relname, i.indisunique
        """,
        (table,),
    )
    keys = query(
        postgres_url,
        "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = %s::regclass AND contype = 'f'",
        (table,),
    )

    assert {name: (columns, unique) for name, columns, unique in indexes} == INDEXES[table]
    assert dict(keys) == (FOREIGN_KEYS if table == "close_engine_conversations" else {})


def test_sqlite_has_the_same_names_and_nullability(database: peewee.Database) -> None:
    for model, columns in COLUMNS.items():
        found = {column.name: column for column in database.get_columns(model._meta.table_name)}
        for name, _, required, _ in columns:
            assert found[name].null is not required, name
    for table, indexes in INDEXES.items():
        found_indexes = {index.name for index in database.get_indexes(table)}
        assert {name for name in indexes if not name.endswith("_pkey")} <= found_indexes
    keys = {
        (key.column, key.dest_table, key.dest_column) for key in database.get_foreign_keys("close_engine_conversations")
    }
    assert keys == {("lead_id", "leads", "id"), ("rep_id", "users", "id")}


def test_defaults_in_memory_are_the_databases_own(database: peewee.Database) -> None:
    Lead.create(id="lead_1")
    database.execute_sql(
        "INSERT INTO close_engine_conversations (id, lead_id, entry_point, updated_at) "
        "VALUES ('c1', 'lead_1', 'SMS_REPLY', '2026-01-01 00:00:00.000')"
    )
    database.execute_sql(
        "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message) "
        "VALUES ('a1', 'c1', 'lead_1', 'SEND_MESSAGE', 'Hi')"
    )
    for model, key in ((CloseEngineConversation, "c1"), (PendingAction, "a1"), (Lead, "lead_1")):
        row = model.get_by_id(key)
        made = model(lead="lead_1") if model is CloseEngineConversation else model()
        for name in {"stage", "autonomy_level", "edit_rounds", "status"} & set(model._meta.fields):
            assert getattr(row, name) == getattr(made, name)
            assert type(getattr(row, name)) is type(getattr(made, name))


@pytest.fixture
def crm(server: str) -> Iterator[str]:
    """The CRM's database after `prisma db push` with the library's tables: empty, and migrated."""
    with postgres_database(server) as url:
        restore(url, AFTER)
        database = close_engine.connect(url)
        close_engine.migrate()
        yield url
        database.close()


def test_rows_that_prisma_wrote_are_read_as_what_they_say(crm: str) -> None:
    query(
        crm,
        """
        INSERT INTO users (id, email, name, updated_at) VALUES ('rep_1', 'r@example.com', 'René', now());
        INSERT INTO leads (id, first_name, company_name, phone, updated_at, qualification_data) VALUES
            ('lead_1', 'Zoë', 'O''Neil''s', '+1555', now(), '{"budget": 1.50, "tags": ["a", null]}');
        INSERT INTO close_engine_conversations VALUES
            ('cmwtgnat50006t67dno5f7mbx', 'lead_1', 'rep_1', 'PREVIEW_CTA', 'PAYMENT_SENT', 'MANUAL',
             '["q1", "q2"]', '{"niche": "Dächer", "n": 12345678901234567890}', 2, 'https://pay.example.com/é',
             '2026-11-23 16:08:44.921', NULL, NULL, NULL, NULL, '2026-11-23 16:08:44.9', '2026-11-23 16:08:45');
        INSERT INTO pending_actions VALUES
            ('a1', 'cmwtgnat50006t67dno5f7mbx', 'lead_1', 'SEND_PREVIEW', 'Look: 🚀', 'null', 'PENDING', NULL, NULL,
             '2026-11-24 00:00:00', '2026-11-23 00:00:00.001');
        UPDATE pending_actions SET status = 'EXPIRED';
        """,
    )

    conversation = Lead.get_by_id("lead_1").close_conversation
    action = PendingAction.get_by_id("a1")

    assert conversation.__data__ == {
        "id": "cmwtgnat50006t67dno5f7mbx",
        "lead": "lead_1",
        "rep": "rep_1",
        "entry_point": EntryPoint.PREVIEW_CTA,
        "stage": Stage.PAYMENT_SENT,
        "autonomy_level": AutonomyLevel.MANUAL,
        "questions_asked": ["q1", "q2"],
        "collected_data": {"niche": "Dächer", "n": 12345678901234567890},
        "edit_rounds": 2,
        "payment_link_url": "https://pay.example.com/é",
        "payment_link_sent_at": datetime(2026, 11, 23, 16, 8, 44, 921000, tzinfo=timezone.utc),
        "stalled_at": None,
        "completed_at": None,
        "closed_lost_at": None,
        "closed_lost_reason": None,
        "created_at": datetime(2026, 11, 23, 16, 8, 44, 900000, tzinfo=timezone.utc),
        "updated_at": datetime(2026, 11, 23, 16, 8, 45, tzinfo=timezone.utc),
    }
    assert action.__data__ == {
        "id": "a1",
        "conversation_id": "cmwtgnat50006t67dno5f7mbx",
        "lead_id": "lead_1",
        "type": ActionType.SEND_PREVIEW,
        "draft_message": "Look: 🚀",
        "metadata": None,
        "status": ActionStatus.EXPIRED,
        "approved_by": None,
        "approved_at": None,
        "expires_at": datetime(2026, 11, 24, tzinfo=timezone.utc),
        "created_at": datetime(2026, 11, 23, 0, 0, 0, 1000, tzinfo=timezone.utc),
    }
    assert conversation.lead.qualification_data == {"budget": 1.5, "tags": ["a", None]}
    conversation.complete()
    assert CloseEngineConversation.get_by_id(conversation.id).__data__ == conversation.__data__


def test_a_lead_has_one_conversation_or_none_and_a_user_has_many(database: peewee.Database) -> None:
    rep = User.create(id="rep_1")
    leads = [Lead.create(id=f"lead_{number}", phone="+1555") for number in range(3)]
    conversations = [close_engine.open_conversation(lead, EntryPoint.REP_CLOSE, rep=rep) for lead in leads[:2]]

    assert [lead.close_conversation for lead in leads] == [*conversations, None]
    assert list(rep.close_engine_conversations.order_by(CloseEngineConversation.lead)) == conversations
    assert list(User.create(id="rep_2").close_engine_conversations) == []
    assert conversations[0].rep == rep
    assert conversations[0].rep_id == "rep_1"
    with pytest.raises(peewee.IntegrityError):
        CloseEngineConversation.create(lead=leads[0], entry_point=EntryPoint.SMS_REPLY)


def test_conversations_follow_their_lead_and_outlive_their_rep(database: peewee.Database) -> None:
    rep, lead = User.create(id="rep_1"), Lead.create(id="lead_1", phone="+1555")
    conversation = close_engine.open_conversation(lead, EntryPoint.REP_CLOSE, rep=rep)
    database.execute_sql("UPDATE users SET id = 'rep_2'")
    database.execute_sql("UPDATE leads SET id = 'lead_2'")
    conversation.reload()
    assert (conversation.lead_id, conversation.rep_id) == ("lead_2", "rep_2")

    User.delete().execute()
    conversation.reload()
    assert conversation.rep is None

    Lead.delete().execute()
    assert CloseEngineConversation.select().count() == 0
    assert [change.conversation_id for change in StageChange.select()] == [conversation.id]


def test_only_what_was_assigned_is_written_and_the_crms_other_columns_are_never_touched(server: str) -> None:
    with postgres_database(server) as url:
        restore(url, BEFORE)
        database = close_engine.connect(url)
        close_engine.migrate()
        before = query(url, "SELECT * FROM leads WHERE phone <> '' ORDER BY id LIMIT 1")
        lead, statements = Lead.get_by_id(before[0][0]), []
        database.query_hooks.append(lambda event: statements.append(event.sql))

        query(url, "UPDATE leads SET autonomy_level = 'MANUAL', status = 'PAID' WHERE id = %s", (lead.id,))
        lead.qualification_data = {"budget": 1}
        lead.save()
        client = Client.select().first()
        client.autonomy_level = AutonomyLevel.SEMI_AUTO
        client.save()
        close_engine.open_conversation(lead, EntryPoint.INSTANTLY_REPLY)
        User.select().first().save()

        written = [statement for statement in statements if statement.startswith("UPDATE")]
        assert written == [
            'UPDATE "leads" SET "qualification_data" = %s WHERE ("leads"."id" = %s)',
            'UPDATE "clients" SET "autonomy_level" = %s WHERE ("clients"."id" = %s)',
            'UPDATE "leads" SET "close_entry_point" = %s WHERE ("leads"."id" = %s)',
        ]
        read = {statement.partition(" FROM")[0] for statement in statements if 'FROM "leads"' in statement}
        assert all("first_name" not in statement and "*" not in statement for statement in read)
        status = query(url, "SELECT status::text, autonomy_level FROM leads WHERE id = %s", (lead.id,))
        assert status == [("PAID", "MANUAL")]
        database.close()


def test_the_models_follow_the_binding_from_one_database_to_another(server: str, postgres_template: str) -> None:
    renamed: dict[str, Any] = {"leads": "Lead", "users": 'The "Users"'}
    with postgres_database(server, postgres_template) as url:
        for attempt in range(2):
            for place, names in ((url, {}), ("sqlite:///:memory:", renamed)):
                database = close_engine.connect(place, **names)
                if place != url:
                    close_engine.migrate(standalone=True)
                rep = User.create()
                lead = Lead.create(phone="+1555", qualification_data={"attempt": attempt})
                conversation = close_engine.open_conversation(lead, EntryPoint.SMS_REPLY, rep=rep)
                conversation.start_qualifying()

                assert Lead.get(Lead.qualification_data["attempt"] == attempt) == lead
                assert [change.trigger for change in conversation.history()] == ["open", "start_qualifying"]
                assert lead.close_conversation == conversation
                assert close_engine.verify() == []
                database.close()


@pytest.mark.parametrize("configured", ["arguments", "environment"])
@pytest.mark.parametrize("names", [("Lead", "User", "Client"), ('a "lead"', "us'er", "order")])
def test_the_crms_tables_may_have_any_name(
    empty_url: str, monkeypatch: pytest.MonkeyPatch, configured: str, names: tuple[str, str, str]
) -> None:
    given: dict[str, Any] = dict(zip(("leads", "users", "clients"), names, strict=True))
    if configured == "environment":
        for table, name in given.items():
            monkeypatch.setenv(f"CLOSE_ENGINE_{table.upper()}_TABLE", name)
    database = close_engine.connect(empty_url, **(given if configured == "arguments" else {}))
    close_engine.migrate(standalone=True)

    assert set(names) <= set(database.get_tables())
    assert not {"leads", "users", "clients"} & set(database.get_tables())
    lead, rep = Lead.create(phone="+1555"), User.create()
    Client.create(autonomy_level=AutonomyLevel.MANUAL)
    conversation = close_engine.open_conversation(lead, EntryPoint.SMS_REPLY, rep=rep)
    assert rep.close_engine_conversations.get().lead == lead
    assert Lead.get_by_id(lead.id).close_entry_point is EntryPoint.SMS_REPLY
    assert close_engine.verify() == []
    close_engine.schema.downgrade("0001_conversations")
    assert set(database.get_tables()) == {*names, *(["sqlite_sequence"] if "sqlite" in empty_url else [])}
    assert conversation.stage is Stage.INITIATED
    database.close()


def test_a_stage_change_says_what_it_is(conversation_in: Any) -> None:
    opening, change = conversation_in(Stage.QUALIFYING).history()

    assert repr(opening) == f"<StageChange {opening.id}: None → INITIATED by open>"
    assert repr(change) == f"<StageChange {change.id}: INITIATED → QUALIFYING by start_qualifying>"
