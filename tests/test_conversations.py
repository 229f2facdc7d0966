"""Opening a conversation: each lead has one, no matter how many callers ask, and how often."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    AutonomyLevel,
    CloseEngineConversation,
    ConversationCompleted,
    EntryPoint,
    InvalidValue,
    KeyReused,
    Lead,
    LeadHasNoPhone,
    LeadNotFound,
    Stage,
    StageChange,
    TransitionNotAllowed,
    User,
    UserNotFound,
    open_conversation,
)
from close_engine.models import BaseModel
from close_engine.testing import bring_to, new_lead
from tests.rows import copy_of, in_memory, stored, triggers
from tests.waiting import LIMIT, Running, until_they_wait

ConversationIn = Callable[..., CloseEngineConversation]


def everything() -> list[list[Any]]:
    """Return every row that an opening can touch."""
    models: tuple[type[BaseModel], ...] = (Lead, CloseEngineConversation, StageChange, User)
    return [list(model.select().order_by(model.id).dicts()) for model in models]


@pytest.fixture
def rep(database: peewee.Database) -> User:
    return User.create()


def test_an_opening_takes_the_leads_autonomy_level_and_notes_its_entry_point(
    database: peewee.Database, rep: User
) -> None:
    lead = new_lead(autonomy_level=AutonomyLevel.SEMI_AUTO)
    conversation = open_conversation(
        lead, EntryPoint.SMS_REPLY, rep, "SM1", actor="webhook", reason="replied", metadata={"from": "+15550100"}
    )
    assert in_memory(conversation) == (stored(conversation), set())
    assert (conversation.stage, conversation.entry_point) == (Stage.INITIATED, EntryPoint.SMS_REPLY)
    assert conversation.autonomy_level is AutonomyLevel.SEMI_AUTO
    assert (conversation.lead, conversation.rep) == (lead, rep)
    assert lead.close_entry_point is Lead.get_by_id(lead.id).close_entry_point is EntryPoint.SMS_REPLY
    assert not lead.is_dirty()
    assert lead.close_conversation == conversation
    assert list(rep.close_engine_conversations) == [conversation]
    (change,) = conversation.history()
    assert (change.trigger, change.source, change.dest) == ("open", None, Stage.INITIATED)
    assert (change.actor, change.reason, change.key) == ("webhook", "replied", "SM1")
    assert change.metadata == {"from": "+15550100"}
    assert change.created_at == conversation.created_at == conversation.updated_at


def test_a_lead_a_rep_and_an_entry_point_can_be_named(database: peewee.Database, rep: User) -> None:
    lead = new_lead()
    conversation = open_conversation(lead.id, "PREVIEW_CTA", rep=rep.id)  # type: ignore[arg-type]
    assert (conversation.lead_id, conversation.rep_id) == (lead.id, rep.id)
    assert conversation.entry_point is Lead.get_by_id(lead.id).close_entry_point is EntryPoint.PREVIEW_CTA


def test_unsaved_changes_of_the_lead_are_neither_written_nor_lost(database: peewee.Database) -> None:
    lead = new_lead()
    lead.qualification_data = {"unsaved": True}
    lead.autonomy_level = AutonomyLevel.MANUAL
    conversation = open_conversation(lead, EntryPoint.SMS_REPLY)
    assert lead.dirty_field_names == ["autonomy_level", "qualification_data"]
    assert Lead.get_by_id(lead.id).qualification_data is None
    assert conversation.autonomy_level is AutonomyLevel.FULL_AUTO, "the stored level counts"


REFUSED: dict[str, tuple[Callable[..., object], type[Exception], str]] = {
    "unknown lead": (
        lambda: open_conversation("nobody", EntryPoint.SMS_REPLY),
        LeadNotFound,
        "There is no lead 'nobody'.",
    ),
    "unsaved lead": (lambda: open_conversation(Lead(id="new"), EntryPoint.SMS_REPLY), LeadNotFound, "no lead 'new'"),
    "lead of None": (
        lambda: open_conversation(None, EntryPoint.SMS_REPLY),  # type: ignore[arg-type]
        LeadNotFound,
        "There is no lead None.",
    ),
    "unknown entry point": (
        lambda: open_conversation(new_lead("1", id="l"), "FAX"),  # type: ignore[arg-type]
        InvalidValue,
        "be one of INSTANTLY_REPLY",
    ),
    "unknown rep": (
        lambda: open_conversation(new_lead("1", id="l"), EntryPoint.REP_CLOSE, rep="nobody"),
        UserNotFound,
        "There is no user 'nobody'.",
    ),
    "empty key": (
        lambda: open_conversation(new_lead("1", id="l"), EntryPoint.REP_CLOSE, key=""),
        InvalidValue,
        "an idempotency key must not be empty",
    ),
    "NUL in the reason": (
        lambda: open_conversation(new_lead("1", id="l"), EntryPoint.REP_CLOSE, reason="a\x00b"),
        InvalidValue,
        "PostgreSQL cannot hold a NUL character",
    ),
    **{
        f"phone {phone!r}": (
            lambda phone=phone: open_conversation(new_lead(phone, id="l"), EntryPoint.SMS_REPLY),
            LeadHasNoPhone,
            "Lead 'l' has no phone number, so no conversation by text message can be opened: add one first.",
        )
        for phone in (None, "", "  \t\n")
    },
}


@pytest.mark.parametrize("why", REFUSED)
def test_an_opening_that_is_refused_says_why_and_writes_nothing(database: peewee.Database, why: str) -> None:
    opening, error, sentence = REFUSED[why]
    with pytest.raises(error) as caught:
        opening()
    assert sentence in str(caught.value)
    leads, *others = everything()
    assert others == [[], [], []]
    assert all(lead["close_entry_point"] is None for lead in leads)


def test_refusals_carry_what_they_are_about(database: peewee.Database) -> None:
    lead = new_lead(None)
    with pytest.raises(LeadHasNoPhone) as no_phone:
        open_conversation(lead, EntryPoint.SMS_REPLY)
    with pytest.raises(LeadNotFound) as no_lead:
        open_conversation("nobody", EntryPoint.SMS_REPLY)
    with pytest.raises(UserNotFound) as no_rep:
        open_conversation(new_lead(), EntryPoint.SMS_REPLY, rep="nobody")
    assert (no_phone.value.lead_id, no_lead.value.lead_id, no_rep.value.user_id) == (lead.id, "nobody", "nobody")


# -- a lead that has one -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", close_engine.ACTIVE_STAGES)
def test_an_active_conversation_is_returned_as_it_is(conversation_in: ConversationIn, rep: User, stage: Stage) -> None:
    conversation = conversation_in(stage)
    before = everything()
    again = open_conversation(conversation.lead_id, EntryPoint.REP_CLOSE, rep, "SM1", actor="somebody")
    assert in_memory(again) == in_memory(conversation)
    assert everything() == before


def test_an_active_conversation_is_returned_also_when_the_phone_is_gone(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.BUILDING)
    Lead.update(phone=None).execute()
    assert open_conversation(conversation.lead_id, EntryPoint.SMS_REPLY) == conversation


def test_a_stalled_conversation_is_resumed(conversation_in: ConversationIn, rep: User) -> None:
    conversation = bring_to(conversation_in(Stage.INITIATED), Stage.BUILDING)
    conversation.stall()
    again = open_conversation(conversation.lead_id, EntryPoint.SMS_REPLY, rep, "SM1", actor="webhook")
    assert again == conversation
    assert (again.stage, again.stalled_at) == (Stage.BUILDING, None)
    assert in_memory(again) == (stored(conversation), set())
    change = again.history()[-1]
    assert (change.trigger, change.actor, change.key) == ("resume", "webhook", "SM1")


def test_a_lost_conversation_is_reopened_with_its_history_kept(conversation_in: ConversationIn, rep: User) -> None:
    conversation = conversation_in(Stage.CLOSED_LOST)
    before = conversation.history()
    Lead.update(autonomy_level=AutonomyLevel.MANUAL).execute()
    lead = Lead.get_by_id(conversation.lead_id)
    again = open_conversation(lead, EntryPoint.REP_CLOSE, rep, "SM1", actor="webhook", reason="is back")
    assert again == conversation
    assert in_memory(again) == (stored(conversation), set())
    assert (again.stage, again.closed_lost_at, again.closed_lost_reason) == (Stage.INITIATED, None, None)
    assert (again.entry_point, again.autonomy_level, again.rep) == (EntryPoint.REP_CLOSE, AutonomyLevel.MANUAL, rep)
    assert lead.close_entry_point is Lead.get_by_id(lead.id).close_entry_point is EntryPoint.REP_CLOSE
    assert again.history()[:-1] == before
    change = again.history()[-1]
    assert (change.trigger, change.actor, change.reason, change.key) == ("reopen", "webhook", "is back", "SM1")


def test_reopening_keeps_the_rep_unless_another_is_named(database: peewee.Database, rep: User) -> None:
    lead = new_lead()
    conversation = open_conversation(lead, EntryPoint.SMS_REPLY, rep)
    conversation.close_lost("no answer")
    again = open_conversation(lead, EntryPoint.SMS_REPLY)
    assert again.rep == rep
    again.close_lost("no answer")
    other = User.create()
    assert open_conversation(lead, EntryPoint.SMS_REPLY, other).rep == other


def test_a_completed_conversation_is_refused(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.COMPLETED)
    before = everything()
    with pytest.raises(ConversationCompleted) as caught:
        open_conversation(conversation.lead_id, EntryPoint.SMS_REPLY, key="SM1")
    assert (caught.value.conversation_id, caught.value.lead_id) == (conversation.id, conversation.lead_id)
    assert str(caught.value).endswith("is COMPLETED, which is final; it cannot be opened again.")
    assert everything() == before


@pytest.mark.parametrize("stage", [Stage.STALLED, Stage.CLOSED_LOST])
def test_nothing_is_taken_up_again_with_a_lead_that_cannot_be_texted(
    conversation_in: ConversationIn, stage: Stage
) -> None:
    conversation = conversation_in(stage)
    Lead.update(phone=" ").execute()
    before = everything()
    with pytest.raises(LeadHasNoPhone):
        open_conversation(conversation.lead_id, EntryPoint.SMS_REPLY)
    assert everything() == before


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("now_in", [Stage.INITIATED, Stage.STALLED, Stage.CLOSED_LOST, Stage.COMPLETED])
def test_the_key_of_an_opening_returns_the_conversation_and_changes_nothing(
    database: peewee.Database, now_in: Stage
) -> None:
    lead = new_lead()
    conversation = bring_to(open_conversation(lead, EntryPoint.SMS_REPLY, key="SM1"), now_in)
    before = everything()
    again = open_conversation(lead, EntryPoint.REP_CLOSE, key="SM1")
    assert in_memory(again) == in_memory(conversation)
    assert everything() == before


@pytest.mark.parametrize("stage", [Stage.STALLED, Stage.CLOSED_LOST])
def test_the_key_of_a_return_returns_the_conversation_and_changes_nothing(
    conversation_in: ConversationIn, stage: Stage
) -> None:
    conversation = conversation_in(stage)
    open_conversation(conversation.lead_id, EntryPoint.SMS_REPLY, key="SM1").close_lost("no answer")
    before = everything()
    assert open_conversation(conversation.lead_id, EntryPoint.SMS_REPLY, key="SM1").stage is Stage.CLOSED_LOST
    assert everything() == before


@pytest.mark.parametrize("stage", [Stage.STALLED, Stage.CLOSED_LOST])
def test_the_key_of_another_trigger_does_not_open(conversation_in: ConversationIn, stage: Stage) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.collect_info(key="SM1")
    conversation.stall() if stage is Stage.STALLED else conversation.close_lost("no answer")
    before = everything()
    with pytest.raises(KeyReused) as caught:
        open_conversation(conversation.lead_id, EntryPoint.SMS_REPLY, key="SM1")
    assert caught.value.first == "collect_info"
    assert everything() == before


# -- others at once ----------------------------------------------------------------------------------------------------


def test_an_opening_waits_for_a_foreign_writer_who_inserts_and_returns_his_conversation(
    postgres: peewee.Database, postgres_url: str
) -> None:
    lead = new_lead()
    with postgres.atomic():
        postgres.execute_sql(
            "INSERT INTO close_engine_conversations (id, lead_id, entry_point, stage, updated_at) "
            "VALUES ('prisma', %s, 'PREVIEW_CTA', 'QUALIFYING', now())",
            (lead.id,),
        )
        opening = Running(lambda: open_conversation(lead.id, EntryPoint.SMS_REPLY))
        until_they_wait([opening])
    conversation = opening.result()
    assert (conversation.id, conversation.stage) == ("prisma", Stage.QUALIFYING)
    assert Lead.get_by_id(lead.id).close_entry_point is None


@pytest.mark.parametrize("stage", [Stage.STALLED, Stage.CLOSED_LOST])
def test_an_opening_waits_for_a_worker_who_takes_the_conversation_up_himself(
    postgres: peewee.Database, stage: Stage
) -> None:
    conversation = bring_to(open_conversation(new_lead(), EntryPoint.SMS_REPLY), stage)
    with close_engine.atomic():
        conversation.resume() if stage is Stage.STALLED else conversation.reopen()
        opening = Running(lambda: open_conversation(conversation.lead_id, EntryPoint.REP_CLOSE))
        until_they_wait([opening])
    assert in_memory(opening.result()) == in_memory(conversation)


def test_an_opening_does_not_wait_for_a_worker_who_holds_an_active_conversation(postgres: peewee.Database) -> None:
    conversation = bring_to(open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.BUILDING)
    with close_engine.locked(conversation.id):
        opening = Running(lambda: open_conversation(conversation.lead_id, EntryPoint.REP_CLOSE))
        assert opening.result() == conversation


def test_other_writers_wait_for_a_held_conversation_instead_of_changing_it(postgres: peewee.Database) -> None:
    conversation = bring_to(open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.QUALIFYING)

    def wait_and_fire() -> Stage | None:
        with close_engine.locked(conversation.id) as held:
            return held.start_building().source

    with close_engine.locked(conversation.id) as held:
        other = Running(wait_and_fire)
        until_they_wait([other])
        held.collect_info()
        until_they_wait([other])
    assert other.result() is Stage.COLLECTING_INFO, "who waited found what the holder left"
    assert triggers(conversation) == ["open", "start_qualifying", "collect_info", "start_building"]


@pytest.mark.parametrize(
    "write", ["UPDATE close_engine_conversations SET stage = 'BUILDING'", "DELETE FROM close_engine_conversations"]
)
def test_writers_past_the_library_wait_for_a_held_conversation_too(postgres: peewee.Database, write: str) -> None:
    conversation = bring_to(open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.QUALIFYING)
    with close_engine.locked(conversation.id) as held:
        writer = Running(lambda: postgres.execute_sql(write).rowcount)
        until_they_wait([writer])
        held.collect_info()
    assert writer.result() == 1
    assert triggers(conversation)[:3] == ["open", "start_qualifying", "collect_info"]


def test_a_held_lead_may_get_rows_that_refer_to_it(postgres: peewee.Database) -> None:
    """The CRM keeps adding messages to a lead while its conversation is opened."""
    postgres.execute_sql("CREATE TABLE messages (lead_id text REFERENCES leads)")
    lead = new_lead()
    with close_engine.atomic():
        open_conversation(lead, EntryPoint.SMS_REPLY)
        add = "INSERT INTO messages VALUES (%s)"
        assert Running(lambda: postgres.execute_sql(add, (lead.id,)).rowcount).result() == 1


def test_on_sqlite_others_wait_for_a_held_conversation_too(tmp_path: Path, sqlite_template: Path) -> None:
    path = tmp_path / "held.db"
    path.write_bytes(sqlite_template.read_bytes())
    database = close_engine.connect(f"sqlite:///{path}")
    conversation = bring_to(open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.QUALIFYING)
    begun = threading.Event()

    def wait_and_fire() -> StageChange:
        conversation = CloseEngineConversation.get()
        assert isinstance(database, peewee.SqliteDatabase)
        database.pragma("busy_timeout", 0)
        with pytest.raises(peewee.OperationalError, match="locked"):  # as long as it is held, and so it must wait
            conversation.start_building()
        database.pragma("busy_timeout", 60_000)
        # SQLite does not show who waits; this is called when the statement begins that has to.
        database.connection().set_trace_callback(lambda statement: begun.set())
        return conversation.start_building()

    with close_engine.locked(conversation.id) as held:
        other = Running(wait_and_fire)
        assert begun.wait(LIMIT)
        held.collect_info()
        assert not other.ended
    conflict = other.result()
    assert (conflict.expected, conflict.found) == (Stage.QUALIFYING, Stage.COLLECTING_INFO)
    database.close()


# -- questions ---------------------------------------------------------------------------------------------------------


def test_a_refused_question_has_the_sentence_that_firing_raises(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.BUILDING)
    answer = conversation.may("collect_info")
    with pytest.raises(TransitionNotAllowed) as caught:
        conversation.collect_info()
    assert not answer
    assert answer.reason == str(caught.value)
    assert conversation.may("send_preview") == close_engine.Answer(True)
    assert copy_of(conversation).allowed_triggers() == ["send_preview", "stall", "close_lost"]
