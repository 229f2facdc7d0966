"""Inputs that once failed, one test per case, by its number: how things end, and which words are let in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    ActionStatus,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    EntryPoint,
    MessageStatus,
    PendingAction,
    Stage,
    outbox,
    submit,
)
from close_engine.testing import bring_to, new_lead
from tests.foreign import REFUSED, Change, ForeignWriter, spoil
from tests.workers import LINK, held, messages, race

ConversationIn = Callable[..., CloseEngineConversation]

CONVERSATIONS, ACTIONS = "close_engine_conversations", "pending_actions"


def waiting_action(
    conversation: CloseEngineConversation, type: ActionType = ActionType.SEND_MESSAGE, draft: str = "hello"
) -> PendingAction:
    """Submit a draft that waits for a human."""
    action = submit(
        conversation, type, draft, metadata={"paymentUrl": LINK}, expires_after=None, policy=lambda level, type: True
    )
    assert isinstance(action, PendingAction)
    return action


def insert_action(writer: ForeignWriter, conversation_id: str, action_id: str, **columns: Any) -> None:
    """Insert an action as the CRM does."""
    columns = {
        "id": action_id,
        "conversation_id": conversation_id,
        "lead_id": writer.row(conversation_id)["lead_id"],
        "type": "SEND_MESSAGE",
        "draft_message": "hello",
        **columns,
    }
    marks = ", ".join(["%s"] * len(columns))
    writer.run(f"INSERT INTO pending_actions ({', '.join(columns)}) VALUES ({marks})", *columns.values())


# D7: words that nobody knows.

#: Where a word stands, one that nobody knows, and those that are known.
WORDS: list[tuple[str, str, str, list[str]]] = [
    (CONVERSATIONS, "entry_point", "WEB_FORM", [*EntryPoint]),
    (CONVERSATIONS, "autonomy_level", "SOMETIMES", [*AutonomyLevel]),
    (ACTIONS, "type", "SEND_SMS", [*ActionType]),
]


@pytest.mark.parametrize(("table", "column", "unknown", "known"), WORDS, ids=[column for _, column, *_ in WORDS])
def test_d7_a_word_that_nobody_knows_is_refused_for_every_writer(
    table: str, column: str, unknown: str, known: list[str], foreign: ForeignWriter
) -> None:
    """It was accepted, and every list that met the row failed. The refusal says which words there are."""
    conversation_id = foreign.insert("QUALIFYING")
    insert_action(foreign, conversation_id, "first")
    row_id = conversation_id if table == CONVERSATIONS else "first"

    def insert(new_id: str, word: str) -> None:
        if table == CONVERSATIONS:
            foreign.insert("QUALIFYING", new_id, **{column: word})
        else:
            insert_action(foreign, conversation_id, new_id, **{column: word})

    for word in (unknown, known[0].lower(), f"{known[0]} ", ""):
        with pytest.raises(REFUSED, match=rf"close_engine: .*{column}.* must be one of {', '.join(known)}"):
            foreign.run(f"UPDATE {table} SET {column} = %s WHERE id = %s", word, row_id)
        with pytest.raises(REFUSED, match=rf"close_engine: .*{column}.* must be one of {', '.join(known)}"):
            insert("refused", word)

    for number, word in enumerate(known):
        foreign.run(f"UPDATE {table} SET {column} = %s WHERE id = %s", word, row_id)
        insert(f"taken {number}", word)
    assert close_engine.verify() == []
    assert len(list(CloseEngineConversation.in_stages(Stage.QUALIFYING))) == 1 + len(known) * (table == CONVERSATIONS)
    assert len(list(close_engine.pending_actions())) == 1 + len(known) * (table == ACTIONS)


@pytest.mark.parametrize(("table", "column", "unknown", "known"), WORDS, ids=[column for _, column, *_ in WORDS])
def test_d7_what_stood_there_before_is_named_hinders_nobody_and_can_be_corrected(
    table: str, column: str, unknown: str, known: list[str], foreign: ForeignWriter
) -> None:
    """A CHECK would refuse each of these writes: they leave the old word alone."""
    conversation_id = foreign.insert("QUALIFYING")
    insert_action(foreign, conversation_id, "first")
    row_id = conversation_id if table == CONVERSATIONS else "first"
    spoil(foreign, table, column, unknown, row_id)
    (named,) = close_engine.verify()
    assert f"('{row_id}'), {column} has the unknown value '{unknown}'" in named

    foreign.run(f"UPDATE {table} SET {column} = {column} WHERE id = %s", row_id)
    foreign.update(conversation_id, stage="COLLECTING_INFO", edit_rounds=1)
    foreign.run("UPDATE pending_actions SET draft_message = 'better' WHERE id = 'first'")
    foreign.run("UPDATE pending_actions SET status = 'REJECTED' WHERE id = 'first'")
    with pytest.raises(REFUSED, match="close_engine: "):
        foreign.run(f"UPDATE {table} SET {column} = 'ANOTHER' WHERE id = %s", row_id)
    foreign.run(f"UPDATE {table} SET {column} = %s WHERE id = %s", known[-1], row_id)

    assert close_engine.verify() == []
    assert [change.dest for change in foreign.history(conversation_id)] == ["QUALIFYING", "COLLECTING_INFO"]
    assert PendingAction.get_by_id("first").draft_message == "better"


def test_d7_what_nobody_can_send_is_not_approved(conversation_in: ConversationIn, foreign: ForeignWriter) -> None:
    """An old type that nobody knows would make a message that no worker sends; whoever approved it would not know."""
    action = waiting_action(conversation_in(Stage.QUALIFYING))
    spoil(foreign, ACTIONS, "type", "SEND_SMS", action.id)
    approve = "UPDATE pending_actions SET status = 'APPROVED', approved_by = 'dana' WHERE id = %s"
    with pytest.raises(REFUSED, match=r"close_engine: .*type.* must be one of"):
        foreign.run(approve, action.id)
    assert messages() == []

    foreign.run("UPDATE pending_actions SET type = 'SEND_MESSAGE' WHERE id = %s", action.id)
    foreign.run(approve, action.id)

    assert [(message.topic, message.body) for message in messages()] == [("SEND_MESSAGE", "hello")]


def test_d7_a_status_that_nobody_knows_can_be_edited_around_and_corrected(
    conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    """It passed adoption, and then no correction was accepted."""
    action = waiting_action(conversation_in(Stage.QUALIFYING))
    spoil(foreign, ACTIONS, "status", "WAITING", action.id)
    (named,) = close_engine.verify()
    assert "status has the unknown value 'WAITING': change it to PENDING" in named
    foreign.run("UPDATE pending_actions SET draft_message = 'better' WHERE id = %s", action.id)
    with pytest.raises(REFUSED, match="close_engine: "):
        foreign.run("UPDATE pending_actions SET status = 'OPEN' WHERE id = %s", action.id)

    foreign.run("UPDATE pending_actions SET status = 'PENDING' WHERE id = %s", action.id)

    assert close_engine.verify() == []
    assert PendingAction.get_by_id(action.id).approve(by="dana").body == "better"


def test_d7_a_leads_word_goes_no_further(conversation_in: ConversationIn, foreign: ForeignWriter) -> None:
    """There is no trigger on the CRM's leads: the word stands there, is named, and is not taken over."""
    lead_id = foreign.lead()
    foreign.run("UPDATE leads SET autonomy_level = 'SOMETIMES', close_entry_point = 'WEB_FORM' WHERE id = %s", lead_id)
    assert len(close_engine.verify()) == 2
    for column, source in (("autonomy_level", "autonomy_level"), ("entry_point", "close_entry_point")):
        ((word,),) = foreign.run(f"SELECT {source} FROM leads WHERE id = %s", lead_id)
        with pytest.raises(REFUSED, match=f"close_engine: .*{column}"):
            foreign.insert("QUALIFYING", "copied", lead_id=lead_id, **{column: word})
    with pytest.raises(close_engine.UnreadableRow, match="autonomy_level"):
        close_engine.open_conversation(lead_id, EntryPoint.SMS_REPLY)

    others = conversation_in(Stage.QUALIFYING)

    assert [conversation.id for conversation in CloseEngineConversation.in_stages(*Stage)] == [others.id]


# D6: deleting what waits.


def waiting_link(conversation_in: ConversationIn) -> tuple[CloseEngineConversation, PendingAction]:
    """A conversation in PENDING_APPROVAL, and the payment link that waits in it."""
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.SEMI_AUTO)
    action = waiting_action(conversation, ActionType.SEND_PAYMENT_LINK, "pay")
    assert conversation.stage is Stage.PENDING_APPROVAL
    return conversation, action


def test_d6_deleting_the_waiting_payment_link_ends_as_its_rejection(
    conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    """The conversation stayed in PENDING_APPROVAL, with nothing to approve in it."""
    conversation, action = waiting_link(conversation_in)
    another = waiting_action(conversation, ActionType.SEND_PAYMENT_LINK, "pay again")
    text = waiting_action(conversation, draft="a text")

    foreign.run("DELETE FROM pending_actions WHERE id = %s", action.id)
    assert foreign.stage(conversation.id) == "PENDING_APPROVAL", "another link still waits"
    foreign.run("DELETE FROM pending_actions WHERE id = %s", another.id)

    assert foreign.stage(conversation.id) == "PREVIEW_SENT"
    assert foreign.history(conversation.id)[-1] == Change(
        *("withdraw_approval", "PENDING_APPROVAL", "PREVIEW_SENT", foreign.actor),
        metadata={"action_id": another.id, "status": "DELETED"},
    )
    assert [waiting.id for waiting in close_engine.pending_actions()] == [text.id]
    conversation.reload()
    assert waiting_action(conversation, ActionType.SEND_PAYMENT_LINK, "pay after all").approve(by="dana").body
    assert close_engine.verify() == []


def test_d6_several_are_deleted_at_once(conversation_in: ConversationIn, foreign: ForeignWriter) -> None:
    """Each conversation goes back once, whoever has how many links; without a WHERE as well."""
    conversations = [waiting_link(conversation_in)[0] for _ in range(3)]
    waiting_action(conversations[0], ActionType.SEND_PAYMENT_LINK, "pay again")

    foreign.run("DELETE FROM pending_actions")

    for conversation in conversations:
        changes = [change.trigger for change in foreign.history(conversation.id)]
        assert changes[-2:] == ["request_approval", "withdraw_approval"]
    assert foreign.deadlines("expire") == {}


def test_d6_python_deletes_it_too(conversation_in: ConversationIn) -> None:
    """A worker that deletes the row is no exception."""
    conversation, action = waiting_link(conversation_in)
    with close_engine.atomic():
        action.delete_instance()
    conversation.reload()
    assert conversation.stage is Stage.PREVIEW_SENT
    assert conversation.history()[-1].trigger == "withdraw_approval"


@pytest.mark.parametrize("stage", [Stage.STALLED, Stage.CLOSED_LOST, Stage.PREVIEW_SENT])
def test_d6_a_conversation_that_went_on_stays_where_it_is(
    stage: Stage, conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    """Only what waits for the approval of a link waits no more."""
    conversation, action = waiting_link(conversation_in)
    foreign.update(conversation.id, stage=stage.value)
    foreign.run("DELETE FROM pending_actions WHERE id = %s", action.id)
    assert foreign.stage(conversation.id) == stage


def test_d6_deleting_a_decided_action_takes_no_decision_back(
    conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    """A script that clears away what was decided must not swallow what was approved: it is withdrawn by its message."""
    conversation, action = waiting_link(conversation_in)
    action.approve(by="dana")
    foreign.run("DELETE FROM pending_actions WHERE status <> 'PENDING'")
    assert foreign.stage(conversation.id) == "PENDING_APPROVAL"

    (message,) = outbox.claim()
    message.sent()

    assert (message.body, message.approved_by) == ("pay", "dana")
    assert foreign.stage(conversation.id) == "PAYMENT_SENT"


def test_d6_a_link_that_is_deleted_while_its_conversation_is_changed(
    postgres: peewee.Database, foreign_postgres: ForeignWriter
) -> None:
    """Two writers delete the last two links at once: the second sees that nothing waits any more."""
    lead = new_lead(autonomy_level=AutonomyLevel.SEMI_AUTO)
    conversation = bring_to(close_engine.open_conversation(lead, EntryPoint.SMS_REPLY), Stage.PREVIEW_SENT)
    actions = [waiting_action(conversation, ActionType.SEND_PAYMENT_LINK, draft) for draft in ("one", "two")]

    race([action.delete_instance for action in actions], behind=held(conversation))

    assert foreign_postgres.stage(conversation.id) == "PREVIEW_SENT"
    assert [change.trigger for change in foreign_postgres.history(conversation.id)].count("withdraw_approval") == 1


def test_d6_emptying_the_queue(foreign_postgres: ForeignWriter, postgres: peewee.Database) -> None:
    """TRUNCATE fires no trigger for a row."""
    lead = new_lead(autonomy_level=AutonomyLevel.SEMI_AUTO)
    conversation = bring_to(close_engine.open_conversation(lead, EntryPoint.SMS_REPLY), Stage.PREVIEW_SENT)
    waiting_action(conversation, ActionType.SEND_PAYMENT_LINK, "pay")
    other = bring_to(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.BUILDING)

    foreign_postgres.run("TRUNCATE pending_actions")

    assert foreign_postgres.history(conversation.id)[-1] == Change(
        "withdraw_approval", "PENDING_APPROVAL", "PREVIEW_SENT", foreign_postgres.actor
    )
    assert foreign_postgres.stage(other.id) == "BUILDING"
    assert close_engine.verify() == []


# D8: conversations that are deleted all at once.


def test_d8_truncating_ends_as_deleting(postgres: peewee.Database, foreign_postgres: ForeignWriter) -> None:
    """The texts stayed PENDING, and the drafts too. What follows from an event, as a refund, does not depend on it."""
    ends = []
    for statement in (
        "DELETE FROM close_engine_conversations",
        "TRUNCATE close_engine_conversations CASCADE",
        "TRUNCATE leads CASCADE",
    ):
        conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
        outbox.enqueue(conversation, ActionType.SEND_MESSAGE, "hello")
        outbox.enqueue(conversation, "refund")
        in_flight = outbox.enqueue(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), "SEND_PREVIEW")
        outbox.claim(topics=["SEND_PREVIEW"])
        action = waiting_action(conversation)
        foreign_postgres.run("UPDATE pending_actions SET expires_at = '2099-01-01 00:00:00' WHERE id = %s", action.id)

        foreign_postgres.run(statement)

        ends.append(
            (
                [(message.topic, message.status, message.last_error) for message in messages(conversation)],
                outbox.OutboxMessage.get_by_id(in_flight.id).status,
                PendingAction.get_by_id(action.id).status,
                foreign_postgres.run("SELECT count(*) FROM close_engine.deadlines"),
                [change.trigger for change in foreign_postgres.history(conversation.id)],
            )
        )
        assert close_engine.verify() == []
    texts, refund = (
        ("SEND_MESSAGE", MessageStatus.WITHDRAWN, "the conversation is deleted"),
        ("refund", MessageStatus.PENDING, None),
    )
    assert ends == [([texts, refund], MessageStatus.PENDING, ActionStatus.EXPIRED, [(0,)], ["open"])] * 3


def test_d8_truncating_both_tables_leaves_nothing_behind(
    postgres: peewee.Database, foreign_postgres: ForeignWriter
) -> None:
    """Whatever the order in which the tables are named."""
    for tables in ("close_engine_conversations, pending_actions", "pending_actions, close_engine_conversations"):
        conversation = close_engine.open_conversation(
            new_lead(autonomy_level=AutonomyLevel.SEMI_AUTO), EntryPoint.SMS_REPLY
        )
        outbox.enqueue(conversation, ActionType.SEND_MESSAGE, "hello")
        waiting_action(bring_to(conversation, Stage.PREVIEW_SENT), ActionType.SEND_PAYMENT_LINK, "pay")

        foreign_postgres.run(f"TRUNCATE {tables}")

        assert [message.status for message in messages(conversation)] == [MessageStatus.WITHDRAWN]
        assert foreign_postgres.run("SELECT count(*) FROM close_engine.deadlines") == [(0,)]
        assert outbox.claim(10) == []


def test_d8_truncating_does_not_wait_for_whoever_decides(
    postgres: peewee.Database, postgres_url: str, foreign_postgres: ForeignWriter
) -> None:
    """A decision holds its action and then asks for the conversation, so whoever waited here would wait for ever."""
    action = waiting_action(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY))
    decider = ForeignWriter.beside(postgres, postgres_url)
    try:
        decider.run("BEGIN")
        decider.run("SELECT FROM pending_actions WHERE id = %s FOR UPDATE", action.id)
        foreign_postgres.run("SET statement_timeout = '60s'")

        foreign_postgres.run("TRUNCATE close_engine_conversations CASCADE")

        with pytest.raises(REFUSED, match="its conversation is deleted"):
            decider.run("UPDATE pending_actions SET status = 'APPROVED', approved_by = 'dana' WHERE id = %s", action.id)
    finally:
        decider.connection.close()
    assert messages() == []


# D9: merged leads.


def merge(writer: ForeignWriter, conversation: CloseEngineConversation, how: str) -> str:
    """Merge a conversation's lead into another one, as CRMs do; return the id of the one that is kept."""
    old = conversation.lead_id
    if how == "by its key":
        writer.run("UPDATE leads SET id = 'kept' WHERE id = %s", old)
        return "kept"
    kept = writer.lead()
    writer.update(conversation.id, lead_id=kept)
    writer.run("DELETE FROM leads WHERE id = %s", old)
    return kept


MERGES = pytest.mark.parametrize("how", ["by the conversation", "by its key"])


@MERGES
def test_d9_a_waiting_text_goes_to_the_lead_that_was_kept(
    how: str, conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    """It went to the old lead, or failed for ever. Whoever holds the message already is told as well."""
    conversation = conversation_in(Stage.QUALIFYING)
    first = outbox.enqueue(conversation, ActionType.SEND_MESSAGE, "first")
    outbox.enqueue(conversation, "refund")

    kept = merge(foreign, conversation, how)

    assert first.lead_id == kept
    claimed = outbox.claim(10)
    assert [(message.topic, message.lead_id) for message in claimed] == [("SEND_MESSAGE", kept), ("refund", kept)]
    claimed[0].sent()
    assert foreign.row(conversation.id)["lead_id"] == kept
    assert [change.trigger for change in foreign.history(conversation.id)] == ["open", "start_qualifying"]
    assert close_engine.verify() == []


@MERGES
def test_d9_an_approval_after_the_merge_reaches_the_lead_that_was_kept(
    how: str, conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    """`pending_actions.lead_id` is the CRM's copy, in the row of the draft: it still names the old lead."""
    conversation, action = waiting_link(conversation_in)
    text = waiting_action(conversation, draft="a text")

    kept = merge(foreign, conversation, how)
    action.approve(by="dana")
    foreign.run("UPDATE pending_actions SET status = 'APPROVED', approved_by = 'dana' WHERE id = %s", text.id)

    for body in ("pay", "a text"):
        (message,) = outbox.claim()
        assert (message.body, message.lead_id) == (body, kept)
        message.sent()
    assert foreign.stage(conversation.id) == "PAYMENT_SENT"


@MERGES
def test_d9_what_comes_in_from_the_kept_lead_finds_the_conversation(
    how: str, conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    """A payment as well, and a rejection: what is keyed by the conversation does not ask for the lead."""
    conversation, action = waiting_link(conversation_in)

    kept = merge(foreign, conversation, how)
    received = close_engine.receive(kept, "SM1", "hello again")
    action.reject(by="dana")

    assert received.conversation is not None
    assert received.conversation.id == conversation.id
    assert foreign.stage(conversation.id) == "PREVIEW_SENT"
    with pytest.raises(close_engine.LeadNotFound):
        close_engine.receive(conversation.lead_id, "SM2", "from the lead that is gone")


# D2: the column that changed, not the column that was named.

#: Triggers of the CRM's own. On PostgreSQL they change the row that is being written, on SQLite they write it again.
LOSES = {
    True: """
    CREATE FUNCTION crm_loses() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.closed_lost_reason IS NOT NULL THEN
            NEW.stage := 'CLOSED_LOST';
        END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER crm_loses BEFORE UPDATE ON close_engine_conversations
        FOR EACH ROW EXECUTE FUNCTION crm_loses();
    """,
    False: """
    CREATE TRIGGER crm_loses AFTER UPDATE OF closed_lost_reason ON close_engine_conversations
    WHEN NEW.closed_lost_reason IS NOT NULL AND NEW.stage <> 'CLOSED_LOST'
    BEGIN
        UPDATE close_engine_conversations SET stage = 'CLOSED_LOST' WHERE id = NEW.id;
    END
    """,
}
APPROVES = {
    True: """
    CREATE FUNCTION crm_approves() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.approved_by IS NOT NULL AND NEW.status = 'PENDING' THEN
            NEW.status := 'APPROVED';
        END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER crm_approves BEFORE UPDATE ON pending_actions FOR EACH ROW EXECUTE FUNCTION crm_approves();
    """,
    False: """
    CREATE TRIGGER crm_approves AFTER UPDATE OF approved_by ON pending_actions
    WHEN NEW.approved_by IS NOT NULL AND NEW.status = 'PENDING'
    BEGIN
        UPDATE pending_actions SET status = 'APPROVED' WHERE id = NEW.id;
    END
    """,
}


def test_d2_a_stage_that_another_trigger_changes_counts_as_if_it_had_been_named(
    conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    """It was recorded, but the waiting text was not withdrawn, and was sent."""
    conversation = conversation_in(Stage.QUALIFYING)
    outbox.enqueue(conversation, ActionType.SEND_MESSAGE, "hello")
    action = waiting_action(conversation)
    foreign.run(LOSES[foreign.is_postgres])

    foreign.update(conversation.id, closed_lost_reason="too expensive")

    row = foreign.row(conversation.id)
    assert (row["stage"], row["closed_lost_reason"]) == ("CLOSED_LOST", "too expensive")
    assert row["closed_lost_at"] is not None
    assert foreign.history(conversation.id)[-1] == Change("close_lost", "QUALIFYING", "CLOSED_LOST", foreign.actor)
    assert [(message.status, message.last_error) for message in messages()] == [
        (MessageStatus.WITHDRAWN, "the conversation is CLOSED_LOST")
    ]
    assert PendingAction.get_by_id(action.id).status is ActionStatus.EXPIRED
    assert foreign.silent_since() == {}
    assert outbox.claim() == []


def test_d2_what_another_trigger_approves_is_approved(conversation_in: ConversationIn, foreign: ForeignWriter) -> None:
    """The CRM writes only who decides. What is expired is refused all the same."""
    conversation, link = waiting_link(conversation_in)
    late = waiting_action(conversation, draft="too late")
    foreign.run("UPDATE pending_actions SET expires_at = '2026-01-01 00:00:00.000' WHERE id = %s", late.id)
    foreign.run(APPROVES[foreign.is_postgres])

    foreign.run("UPDATE pending_actions SET approved_by = 'dana' WHERE id = %s", link.id)
    with pytest.raises(REFUSED, match="expired"):
        foreign.run("UPDATE pending_actions SET approved_by = 'dana' WHERE id = %s", late.id)

    approved = PendingAction.get_by_id(link.id)
    assert (approved.status, approved.approved_by) == (ActionStatus.APPROVED, "dana")
    assert approved.approved_at is not None
    (message,) = messages()
    assert (message.body, message.approved_by) == ("pay", "dana")
    message = outbox.claim()[0]
    message.sent()
    assert foreign.stage(conversation.id) == "PAYMENT_SENT"
