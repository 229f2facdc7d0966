"""Finding conversations: by stage, number or who is waited for; by any name; on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    InvalidValue,
    Lead,
    Stage,
    conversations_of,
    find_conversations,
    numbers,
    outbox,
    receive,
    record_sent,
    submit,
)
from close_engine.testing import MovableClock
from tests.command_line import refused, run
from tests.foreign import ForeignWriter, spoil

ConversationIn = Callable[..., CloseEngineConversation]


@pytest.fixture(params=["sqlite-file", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    """Only these two: a command cannot open a database in memory."""
    return str(request.param)


def found(**options: Any) -> list[str]:
    return [line.conversation.id for line in find_conversations(**options)]


# -- in a list -------------------------------------------------------------------------------------------------------


def test_the_newest_come_first(conversation_in: ConversationIn, close_engine_clock: MovableClock) -> None:
    first = conversation_in(Stage.QUALIFYING, phone="+12125550100")
    close_engine_clock.move(timedelta(hours=2))
    second = conversation_in(Stage.CLOSED_LOST)
    third = conversation_in(Stage.BUILDING)

    newest = sorted([second.id, third.id])
    assert found() == [*newest, first.id]
    assert found(limit=1) == newest[:1]
    assert found(since=close_engine_clock.now - timedelta(hours=1)) == newest
    assert found(stages=["QUALIFYING", Stage.BUILDING]) == [third.id, first.id]
    assert found(phone="(+1) 212 555-0100") == [first.id]
    assert found(phone="no number") == []
    assert [(line.phone, line.waiting_for) for line in find_conversations(stages=[Stage.QUALIFYING])] == [
        ("+12125550100", ("lead",))
    ]


def test_who_is_waited_for(conversation_in: ConversationIn, close_engine_clock: MovableClock) -> None:
    lead, us, draft, taken = (conversation_in(Stage.QUALIFYING) for _ in range(4))
    conversation_in(Stage.COMPLETED)
    receive(us.lead_id, "SM1", "Hello?")
    receive(draft.lead_id, "SM2", "Hello?")
    draft.reload()
    submit(draft, ActionType.SEND_MESSAGE, "Hi!", policy=lambda level, type: True)
    taken.take_over("ana")

    assert {line.conversation.id: line.waiting_for for line in find_conversations() if line.waiting_for} == {
        lead.id: ("lead",),
        us.id: ("us",),
        draft.id: ("us", "human"),
        taken.id: ("lead", "human"),
    }
    assert set(found(waiting_for="lead")) == {lead.id, taken.id}
    assert set(found(waiting_for="us")) == {us.id, draft.id}
    assert set(found(waiting_for="human")) == {draft.id, taken.id}
    taken.hand_back("ana")
    close_engine_clock.move(timedelta(days=2))
    assert found(waiting_for="human") == []


def test_nobody_is_waited_for_where_the_turn_was_taken_while_it_was_stalled(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    receive(conversation.lead_id, "SM1", "Hello?")
    close_engine_clock.move(timedelta(minutes=1))
    between = close_engine_clock.now
    close_engine_clock.move(timedelta(minutes=1))
    conversation.reload()
    conversation.stall()
    assert [line.waiting_for for line in find_conversations()] == [("us",)]

    record_sent(conversation.lead_id, "SM2", "Hi!", at=between)

    assert [line.waiting_for for line in find_conversations()] == [()]
    assert found(waiting_for="lead") == found(waiting_for="us") == []


def test_what_makes_no_sense_is_a_sentence(database: peewee.Database) -> None:
    wrong: list[dict[str, Any]] = [
        {"limit": 0},
        {"waiting_for": "godot"},
        {"stages": ["WON"]},
        {"since": datetime(2026, 1, 1)},
    ]
    for options in wrong:
        with pytest.raises(InvalidValue):
            find_conversations(**options)


def test_what_cannot_be_read_is_passed_over(conversation_in: ConversationIn, foreign: ForeignWriter) -> None:
    good, bad = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    spoil(foreign, "close_engine_conversations", "entry_point", "WEB_FORM", bad.id)

    assert found() == [good.id]


# -- by any name -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["+12125550100", "(+1) 212 555-0100", "001 212.555.0100", "tel:+1-212-555-0100"])
def test_a_phone_number_is_found_however_it_is_written(conversation_in: ConversationIn, written: str) -> None:
    conversation = conversation_in(Stage.QUALIFYING, phone="+1 212 555 0100")
    conversation_in(Stage.QUALIFYING, phone="+1 212 555 0111")

    assert [each.id for each in conversations_of(written)] == [conversation.id]
    assert conversations_of("+1 212 555 0199") == []


@pytest.mark.parametrize(
    "phone", ["001 (212) 555 0100", "tel:+1-212-555-0100", "+1 ٢١٢ ٥٥٥ ٠١٠٠", "+１ ２１２ ５５５ ０１００"]
)
def test_a_number_that_was_never_read_is_found(
    conversation_in: ConversationIn, foreign: ForeignWriter, phone: str
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation_in(Stage.QUALIFYING, phone="+12125550101")
    foreign.run("DELETE FROM close_engine.numbers")
    foreign.run("UPDATE leads SET phone = %s WHERE id = %s", phone, conversation.lead_id)

    assert [each.id for each in conversations_of("+12125550100")] == [conversation.id]
    assert numbers.anybody_with("+12125550100") == [conversation.lead_id]
    assert conversations_of("+12125550109") == []


def test_a_number_that_the_lead_has_no_more_is_not(conversation_in: ConversationIn, foreign: ForeignWriter) -> None:
    conversation = conversation_in(Stage.QUALIFYING, phone="+12125550100")
    foreign.run("UPDATE leads SET phone = '+12125550111' WHERE id = %s", conversation.lead_id)

    assert conversations_of("+12125550100") == []
    assert [each.id for each in conversations_of("+12125550111")] == [conversation.id]


def test_an_id_comes_before_a_number(conversation_in: ConversationIn) -> None:
    conversation_in(Stage.QUALIFYING, phone="12125550100")
    other = conversation_in(Stage.QUALIFYING, id="12125550100", phone="+12125550199")

    assert [each.id for each in conversations_of("12125550100")] == [other.id]
    assert conversations_of("nobody") == []


# -- on the command line ---------------------------------------------------------------------------------------------


def test_list_has_a_line_for_each(conversation_in: ConversationIn, database_url: str) -> None:
    conversation = conversation_in(Stage.QUALIFYING, phone="+12125550100")
    conversation_in(Stage.CLOSED_LOST)
    receive(conversation.lead_id, "SM1", "Hello?")
    here = ("--database", database_url)

    every = run("list", *here)
    ours = run("list", "--waiting-for", "us", "--stage", "QUALIFYING", "--since", "1d", *here)
    one = run("list", "--limit", "1", *here)
    by_phone = run("list", "--phone", "+1 212 555 0100", *here)
    none = run("list", "--stage", "BUILDING", *here)

    assert [every.code, ours.code, one.code, by_phone.code] == [0] * 4
    assert len(every.lines) == 4
    (line,) = ours.lines[2:]
    assert line[:4] == [conversation.id, conversation.lead_id, "+12125550100", "QUALIFYING"]
    assert line[-1] == "us"
    assert by_phone.out == ours.out
    assert one.out.endswith("These are the newest 1. Give --limit for more.\n")
    assert none.out == "There is no such conversation.\n"


@pytest.mark.parametrize(
    "wrong",
    [["--stage", "WON"], ["--waiting-for", "godot"], ["--since", "lately"], ["--limit", "0"], ["--limit", "9" * 19]],
)
def test_list_refuses_what_makes_no_sense(database_url: str, wrong: list[str]) -> None:
    assert run("list", *wrong, "--database", database_url).code == 2


def test_show_has_the_texts_and_takes_a_number(
    conversation_in: ConversationIn, database_url: str, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING, phone="+12125550100")
    close_engine_clock.move(timedelta(seconds=1))
    receive(conversation.lead_id, "SM1", "Hello?\x1b[2J")
    close_engine_clock.move(timedelta(seconds=1))
    record_sent(conversation.lead_id, "SM2", "Dana\nhere.", author="dana")
    close_engine_clock.move(timedelta(seconds=1))
    message = outbox.enqueue(conversation, ActionType.SEND_MESSAGE, "Hi!")
    message.withdraw("too late")

    result = run("show", "(+1) 212 555-0100", "--database", database_url)

    assert (result.code, result.err) == (0, "")
    assert ["id", conversation.id] in result.lines
    texts = [line[3:] for line in result.lines if line[-1:] in (["Hi!"], ["here."], ["Hello?\\x1b[2J"])]
    assert texts == [
        ["lead", "message", "received", "Hello?\\x1b[2J"],
        ["human", "(dana)", "message", "sent", "Dana", "here."],
        ["AI", "message", "withdrawn:", "too", "late", "Hi!"],
    ]
    assert "start_qualifying" in result.out


def test_show_of_a_number_that_several_leads_have_names_them(
    conversation_in: ConversationIn, database_url: str
) -> None:
    for name in ("lead-1", "lead-2"):
        conversation_in(Stage.QUALIFYING, phone="+12125550100", id=name)

    told = refused("show", "+12125550100", "--database", database_url)

    assert told == (
        "CONVERSATION cannot be '+12125550100': several leads have this number: name one of "
        + ", ".join(f"{each.lead_id} (QUALIFYING)" for each in conversations_of("+12125550100"))
        + ".\n"
    )


def test_show_names_what_cannot_be_read_of_a_text(
    conversation_in: ConversationIn, foreign: ForeignWriter, database_url: str
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    record_sent(conversation.lead_id, "SM1", "Hi!")
    spoil(foreign, "close_engine.texts", "at", "0001-01-01 00:00:00 BC", 1)

    result = run("show", conversation.id, "--database", database_url)

    assert result.code == 0
    assert ["-", "human", "message", "sent", "Hi!"] in result.lines
    assert "cannot be read, because of its at" in result.out


def test_show_of_a_deleted_conversation_has_the_texts_that_are_left(
    conversation_in: ConversationIn, database_url: str
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    receive(conversation.lead_id, "SM1", "Hello?")
    conversation.delete_instance()

    result = run("show", conversation.id, "--database", database_url)

    assert result.code == 0
    assert "Hello?" in result.out


def line(lead: Any, key: str, **other: Any) -> str:
    at = datetime(2025, 1, 1, tzinfo=timezone.utc).isoformat()
    return json.dumps({"lead": lead, "direction": "inbound", "text": f"of {key}", "key": key, "at": at, **other})


@pytest.mark.parametrize("through", ["file", "standard input"])
def test_import_texts_reads_a_line_for_each(
    conversation_in: ConversationIn, database_url: str, tmp_path: Path, through: str
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    lead = conversation.lead_id
    rows = [line(lead, "1"), "{", line(lead, "2", direction="up"), line("nobody", "3"), "", line(lead, "4"), '"\udcff"']
    text, file = "\n".join(rows), tmp_path / "texts.jsonl"
    file.write_text(text, "utf-8", "surrogateescape")
    here = ("--batch", "2", "--database", database_url)

    result = run("import-texts", "-" if through == "standard input" else str(file), *here, input=text)

    assert (result.code, result.out) == (1, "Texts added: 2, known before: 0, refused: 5.\n")
    assert [told.partition(":")[0] for told in result.err.splitlines()] == [f"Line {n}" for n in (2, 3, 4, 5, 7)]
    assert [each.body for each in conversation.messages()] == ["of 1", "of 4"]
    file.write_text(line(lead, "1"), "utf-8-sig")  # as Windows writes it
    again = run("import-texts", str(file), *here)
    assert (again.code, again.out, again.err) == (0, "Texts added: 0, known before: 1, refused: 0.\n", "")


def test_import_texts_of_a_file_that_is_not_there_is_a_sentence(database_url: str, database: peewee.Database) -> None:
    assert "No such file" in refused("import-texts", "/no/such/file", "--database", database_url)
    assert close_engine.TextEntry.select().count() == 0
    assert Lead.select().where(Lead.autonomy_level == AutonomyLevel.MANUAL).count() == 0
