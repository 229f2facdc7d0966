"""Inputs that once failed, one test per case, by its number: how things end, and which words are let in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    EntryPoint,
    PendingAction,
    Stage,
    submit,
)
from tests.foreign import REFUSED, ForeignWriter, spoil
from tests.workers import LINK, messages

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
