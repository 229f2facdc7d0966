"""A stage change is one guarded write: it happens completely, or memory and database stay as they were."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any, ClassVar

import peewee
import psycopg2.extensions
import pytest
from playhouse.shortcuts import model_to_dict, update_model_from_dict

import close_engine
from close_engine import (
    AutonomyLevel,
    CloseEngineConversation,
    ConditionNotMet,
    ConversationNotFound,
    EntryPoint,
    InvalidValue,
    KeyReused,
    PartlyLoaded,
    Stage,
    StageAssignmentRefused,
    StageChange,
    StageConflict,
    TransitionNotAllowed,
    UnknownTrigger,
)
from close_engine.database.fields import milliseconds, stored_time
from close_engine.testing import MovableClock, new_lead
from tests.rows import copy_of, in_memory, replayed, stored, triggers
from tests.waiting import Running

ConversationIn = Callable[..., CloseEngineConversation]


def run(database: peewee.Database, sql: str) -> None:
    """Run a statement as a writer that does not use this library."""
    database.execute_sql(sql)


def test_a_trigger_changes_the_row_the_object_and_the_history_alike(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    moment = close_engine_clock.move(timedelta(minutes=5))
    change = conversation.collect_info(
        actor="worker-7", reason="gaps", metadata={"gaps": ["hours", "prices"]}, key="SM1"
    )
    assert conversation.stage is Stage.COLLECTING_INFO
    assert in_memory(conversation) == (stored(conversation), set())
    assert conversation.history()[-1].__data__ == change.__data__
    assert (change.source, change.dest, change.trigger) == (Stage.QUALIFYING, Stage.COLLECTING_INFO, "collect_info")
    assert (change.actor, change.reason, change.metadata, change.key) == (
        "worker-7",
        "gaps",
        {"gaps": ["hours", "prices"]},
        "SM1",
    )
    assert change.created_at == conversation.updated_at == milliseconds(moment)
    assert repr(change) == f"<StageChange {change.id}: QUALIFYING → COLLECTING_INFO by collect_info>"


def test_every_write_moves_the_version_also_where_the_clock_stands_still_or_goes_back(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.INITIATED)
    versions = [conversation.updated_at]
    for trigger in ("start_qualifying", "stall", "resume", "collect_info"):
        close_engine_clock.move(timedelta(seconds=-1))
        conversation.fire(trigger)
        versions.append(conversation.updated_at)
    assert versions == sorted(set(versions))
    assert in_memory(conversation) == (stored(conversation), set())


# -- conflicts ---------------------------------------------------------------------------------------------------------


def save_another_field(conversation: CloseEngineConversation) -> None:
    conversation.collected_data = {"a": 1}
    conversation.save()


def in_an_hour() -> str:
    return stored_time(datetime.now(timezone.utc) + timedelta(hours=1))


CHANGED_BY: dict[str, Callable[[peewee.Database, CloseEngineConversation], object]] = {
    "a stage change of this library": lambda database, other: other.collect_info(),
    "a stage change there and back": lambda database, other: (other.stall(), other.resume()),
    "a save of another field": lambda database, other: save_another_field(other),
    "an update query": lambda database, other: CloseEngineConversation.update(edit_rounds=3).execute(),
    "SQL that changes the stage": lambda database, other: run(
        database, "UPDATE close_engine_conversations SET stage = 'COLLECTING_INFO'"
    ),
    "SQL that leaves updated_at alone": lambda database, other: run(
        database, "UPDATE close_engine_conversations SET edit_rounds = 3"
    ),
    "SQL that sets updated_at": lambda database, other: run(
        database, f"UPDATE close_engine_conversations SET edit_rounds = 3, updated_at = '{in_an_hour()}'"
    ),
    "SQL that sets updated_at back": lambda database, other: run(
        database, "UPDATE close_engine_conversations SET edit_rounds = 3, updated_at = '2000-01-01 00:00:00'"
    ),
    "SQL that changes nothing": lambda database, other: run(
        database, "UPDATE close_engine_conversations SET stage = stage"
    ),
}


@pytest.mark.parametrize("changed_by", CHANGED_BY)
@pytest.mark.parametrize("write", ["close_lost", "save()"])
def test_whoever_changed_the_row_since_it_was_loaded_makes_a_conflict(
    database: peewee.Database, conversation_in: ConversationIn, changed_by: str, write: str
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.payment_link_url = "https://unsaved.example.com"
    before = in_memory(conversation)
    CHANGED_BY[changed_by](database, copy_of(conversation))
    row, history = stored(conversation), triggers(conversation)
    with pytest.raises(StageConflict) as caught:
        conversation.save() if write == "save()" else conversation.close_lost("no answer")
    error = caught.value
    assert (error.conversation_id, error.operation) == (conversation.id, write)
    assert (error.expected, error.found) == (Stage.QUALIFYING, row["stage"])
    assert f"expected QUALIFYING and found {row['stage']}" in str(error)
    assert ("again, but changed since it was loaded" in str(error)) == (row["stage"] is Stage.QUALIFYING)
    assert "reload it and decide again, or lock it with locked()." in str(error)
    assert in_memory(conversation) == before
    assert (stored(conversation), triggers(conversation)) == (row, history)


def test_after_a_conflict_a_reload_makes_the_object_current(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    copy_of(conversation).collect_info()
    with pytest.raises(StageConflict):
        conversation.start_building()
    conversation.reload()
    conversation.start_building()
    assert triggers(conversation) == ["open", "start_qualifying", "collect_info", "start_building"]


@pytest.mark.parametrize("use", ["fire", "save", "reload", "locked"])
def test_a_deleted_conversation_is_not_found_and_keeps_its_history(
    database: peewee.Database, conversation_in: ConversationIn, use: str
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.edit_rounds = 9
    before = in_memory(conversation)
    run(database, "DELETE FROM leads")  # cascades
    uses: dict[str, Callable[[], object]] = {
        "fire": conversation.collect_info,
        "save": conversation.save,
        "reload": conversation.reload,
        "locked": close_engine.locked(conversation.id).__enter__,
    }
    with pytest.raises(ConversationNotFound) as caught:
        uses[use]()
    assert caught.value.conversation_id == conversation.id
    assert str(caught.value).startswith(f"There is no conversation '{conversation.id}': it was deleted with its lead")
    assert in_memory(conversation) == before
    assert triggers(conversation) == ["open", "start_qualifying"]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "fire", "error", "sentence"),
    [
        (Stage.BUILDING, lambda c: c.collect_info(), TransitionNotAllowed, "is BUILDING, and collect_info is"),
        (
            Stage.COMPLETED,
            lambda c: c.stall(),
            TransitionNotAllowed,
            "stall is not allowed from there; COMPLETED is final.",
        ),
        (Stage.QUALIFYING, lambda c: c.complete(), ConditionNotMet, "complete is refused: no payment link was sent."),
        (
            Stage.QUALIFYING,
            lambda c: c.close_lost(" "),
            ConditionNotMet,
            "close_lost is refused: a reason must be given.",
        ),
        (
            Stage.QUALIFYING,
            lambda c: c.fire("win"),
            UnknownTrigger,
            "There is no trigger 'win'; the triggers are start",
        ),
        (Stage.QUALIFYING, lambda c: c.stall(actor="a\x00b"), InvalidValue, "PostgreSQL cannot hold a NUL character"),
        (Stage.QUALIFYING, lambda c: c.stall(actor=7), InvalidValue, "actor cannot be 7: it must be text"),
        (
            Stage.QUALIFYING,
            lambda c: c.stall(metadata=[1]),
            InvalidValue,
            "metadata cannot be [1]: it must be a mapping",
        ),
        (Stage.QUALIFYING, lambda c: c.stall(metadata={"a": {1}}), InvalidValue, "JSON cannot hold a set"),
        (Stage.QUALIFYING, lambda c: c.stall(key=""), InvalidValue, "an idempotency key must not be empty"),
        (Stage.QUALIFYING, lambda c: c.stall(key=" \t"), InvalidValue, "an idempotency key must not be empty"),
        (
            Stage.QUALIFYING,
            lambda c: c.stall(key="k" * 256),
            InvalidValue,
            "an idempotency key has at most 255 characters",
        ),
        (Stage.PREVIEW_SENT, lambda c: c.send_payment_link("a\x00b"), InvalidValue, "cannot hold a NUL character"),
    ],
)
def test_a_refusal_is_a_sentence_and_leaves_everything_as_it_was(
    conversation_in: ConversationIn,
    stage: Stage,
    fire: Callable[[CloseEngineConversation], object],
    error: type[Exception],
    sentence: str,
) -> None:
    conversation = conversation_in(stage)
    conversation.collected_data = {"unsaved": True}
    before, row, history = in_memory(conversation), stored(conversation), triggers(conversation)
    with pytest.raises(error) as caught:
        fire(conversation)
    assert sentence in str(caught.value)
    assert in_memory(conversation) == before
    assert (stored(conversation), triggers(conversation)) == (row, history)


def test_who_approved_the_payment_link_stands_in_the_history(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.MANUAL)
    with pytest.raises(ConditionNotMet, match="requires approval first"):
        conversation.send_payment_link("https://pay.example.com/1")
    change = conversation.send_payment_link("https://pay.example.com/1", approved_by="ann", metadata={"sum": 900})
    assert change.metadata == {"sum": 900, "approved_by": "ann"}
    assert conversation.history()[-1].metadata == change.metadata


# -- fields other than the stage ---------------------------------------------------------------------------------------


def test_unsaved_changes_of_other_fields_are_neither_written_nor_lost(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.collected_data = {"hours": "9-5"}
    conversation.payment_link_url = "https://pay.example.com/1"
    conversation.collect_info()
    assert conversation.dirty_field_names == ["collected_data", "payment_link_url"]
    assert conversation.collected_data == {"hours": "9-5"}
    assert stored(conversation)["collected_data"] is None
    assert stored(conversation)["payment_link_url"] is None
    conversation.save()
    assert in_memory(conversation) == (stored(conversation), set())
    assert triggers(conversation) == ["open", "start_qualifying", "collect_info"]


def test_save_writes_what_it_is_told_and_leaves_the_rest_unsaved(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    assert conversation.save() == 0
    conversation.collected_data = {"hours": "9-5"}
    conversation.questions_asked = ["hours"]
    assert conversation.save(only=[]) == 0
    assert conversation.save(only=["collected_data"]) == 1
    assert conversation.dirty_field_names == ["questions_asked"]
    assert stored(conversation)["questions_asked"] is None
    assert conversation.save(only=[CloseEngineConversation.questions_asked]) == 1
    assert in_memory(conversation) == (stored(conversation), set())


def test_a_conversation_created_without_open_conversation_begins_a_history_and_fires(database: peewee.Database) -> None:
    conversation = CloseEngineConversation.create(lead=new_lead(), entry_point=EntryPoint.REP_CLOSE)
    assert in_memory(conversation) == (stored(conversation), set())
    conversation.start_qualifying()
    assert [change.trigger for change in conversation.history()] == ["open", "start_qualifying"]
    assert conversation.history()[0].actor.startswith("database")


def test_a_conversation_that_is_no_row_yet_cannot_fire_or_be_updated(database: peewee.Database) -> None:
    conversation = CloseEngineConversation(lead=new_lead(), entry_point=EntryPoint.REP_CLOSE)
    for write in (conversation.start_qualifying, conversation.save):
        with pytest.raises(ConversationNotFound, match=r"or never opened with open_conversation\(\)\.$"):
            write()
    assert CloseEngineConversation.select().count() == 0


def test_an_object_that_was_loaded_in_part_is_not_decided_on(conversation_in: ConversationIn) -> None:
    conversation_in(Stage.PAYMENT_SENT)
    conversation = CloseEngineConversation.select(CloseEngineConversation.id, CloseEngineConversation.stage).get()
    for use in (lambda: conversation.complete(), lambda: conversation.may("complete"), lambda: conversation.save()):
        with pytest.raises(PartlyLoaded) as caught:
            use()
        assert caught.value.conversation_id == conversation.id
        assert caught.value.missing == ["autonomy_level", "lead", "payment_link_sent_at", "updated_at"]
    assert str(caught.value).endswith("updated_at: select all its columns, or reload() it.")
    conversation.reload()
    conversation.complete()
    assert conversation.stage is Stage.COMPLETED


# -- bypassing the machine ---------------------------------------------------------------------------------------------

Conversation = CloseEngineConversation


def a_row(**values: Any) -> dict[Any, Any]:
    return {"lead": new_lead().id, "entry_point": EntryPoint.SMS_REPLY, **values}


PAST_THE_MACHINE: dict[str, Callable[[CloseEngineConversation], object]] = {
    "assignment": lambda c: setattr(c, "stage", Stage.BUILDING),
    "update_model_from_dict": lambda c: update_model_from_dict(c, {"stage": "BUILDING"}),
    "constructor": lambda c: Conversation(stage="BUILDING"),
    "create": lambda c: Conversation.create(**a_row(stage=Stage.BUILDING)),
    "save": lambda c: c.save(only=["stage"]),
    "update, by keyword": lambda c: Conversation.update(stage=Stage.BUILDING),
    "update, by field": lambda c: Conversation.update({Conversation.stage: Stage.BUILDING}),
    "update, by name": lambda c: Conversation.update({"stage": "BUILDING", "edit_rounds": 1}),
    "update, by an expression": lambda c: Conversation.update(stage=peewee.Value("BUILDING")),
    "set_by_id": lambda c: Conversation.set_by_id(c.id, {"stage": Stage.BUILDING}),
    "item": lambda c: Conversation.__setitem__(c.id, {"stage": Stage.BUILDING}),
    "bulk_update": lambda c: Conversation.bulk_update([c], ["stage"]),
    "insert": lambda c: Conversation.insert(a_row(), stage=Stage.BUILDING),
    "insert, by field": lambda c: Conversation.insert({**a_row(), Conversation.stage: "BUILDING"}),
    "insert_many": lambda c: Conversation.insert_many([a_row(stage="INITIATED"), a_row(stage="BUILDING")]),
    "insert_many, of tuples": lambda c: Conversation.insert_many(
        ((row["lead"], row["entry_point"], "BUILDING") for row in [a_row()]), ["lead", "entry_point", "stage"]
    ),
    "insert_from": lambda c: Conversation.insert_from(Conversation.select(), ["id", Conversation.stage]),
    "replace": lambda c: Conversation.replace(a_row(id=c.id)),
    "replace_many": lambda c: Conversation.replace_many([a_row(id=c.id)]),
    "on_conflict_replace": lambda c: Conversation.insert(a_row(id=c.id)).on_conflict_replace(),
    "upsert": lambda c: Conversation.insert(a_row(id=c.id)).on_conflict(
        conflict_target=[Conversation.id], update={Conversation.stage: Stage.BUILDING}
    ),
    "upsert, preserving one": lambda c: Conversation.insert(a_row(id=c.id)).on_conflict(
        conflict_target=[Conversation.id], preserve=Conversation.stage
    ),
    "upsert, preserving several": lambda c: Conversation.insert(a_row(id=c.id)).on_conflict(
        conflict_target=[Conversation.id], preserve=["edit_rounds", "stage"]
    ),
}


@pytest.mark.parametrize("way", PAST_THE_MACHINE)
def test_writing_the_stage_past_the_machine_is_refused(conversation_in: ConversationIn, way: str) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    before, row = in_memory(conversation), stored(conversation)
    with pytest.raises(StageAssignmentRefused) as caught:
        PAST_THE_MACHINE[way](conversation)
    assert "start_building" in str(caught.value) or "open_conversation()" in str(caught.value)
    assert in_memory(conversation) == before
    assert (stored(conversation), Conversation.select().count()) == (row, 1)


@pytest.mark.parametrize(
    ("stage", "wanted", "sentence"),
    [
        (
            Stage.QUALIFYING,
            "BUILDING",
            "cannot be set to BUILDING, because only triggers change it; call start_building().",
        ),
        (Stage.QUALIFYING, "CLOSED_LOST", "only triggers change it; call close_lost()."),
        (Stage.STALLED, "BUILDING", "only triggers change it; call resume()."),
        (Stage.INITIATED, "BUILDING", "allowed from INITIATED: start_qualifying, complete, stall, close_lost."),
        (Stage.COMPLETED, "INITIATED", "only triggers change it; COMPLETED is final."),
    ],
)
def test_assigning_the_stage_names_the_trigger_to_use(
    conversation_in: ConversationIn, stage: Stage, wanted: str, sentence: str
) -> None:
    conversation = conversation_in(stage)
    with pytest.raises(StageAssignmentRefused) as caught:
        conversation.stage = wanted  # type: ignore[assignment]
    assert str(caught.value).startswith(f"The stage of conversation '{conversation.id}' ")
    assert str(caught.value).endswith(sentence)
    assert caught.value.stage is Stage(wanted)
    assert isinstance(caught.value, AttributeError)


def test_update_names_every_trigger_and_the_stage_it_was_given(conversation_in: ConversationIn) -> None:
    with pytest.raises(StageAssignmentRefused) as caught:
        CloseEngineConversation.update({"stage": "BUILDING"})
    assert str(caught.value) == (
        "update() cannot write the stage: load the conversation and fire a trigger, one of start_qualifying, "
        "collect_info, start_building, send_preview, request_edits, request_approval, withdraw_approval, "
        "send_payment_link, complete, stall, resume, close_lost, reopen."
    )
    assert caught.value.stage == "BUILDING"


def test_an_unknown_stage_is_refused_as_a_value(conversation_in: ConversationIn) -> None:
    with pytest.raises(
        InvalidValue, match=r"CloseEngineConversation\.stage cannot be 'WON': it must be one of INITIATED"
    ):
        conversation_in(Stage.QUALIFYING).stage = "WON"  # type: ignore[assignment]


def test_assigning_the_stage_and_version_that_it_has_changes_nothing(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    row = stored(conversation)
    update_model_from_dict(conversation, {**model_to_dict(conversation, recurse=False), "edit_rounds": 4})
    assert conversation.save() == 1
    assert in_memory(conversation) == (stored(conversation), set())
    assert stored(conversation) == {**row, "edit_rounds": 4, "updated_at": conversation.updated_at}


def test_assigning_the_version_is_refused_as_it_tells_whether_somebody_wrote(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    before = in_memory(conversation)
    with pytest.raises(InvalidValue, match="every write sets it; leave it out") as caught:
        conversation.updated_at = datetime(2030, 1, 1, tzinfo=timezone.utc)
    assert caught.value.field == "CloseEngineConversation.updated_at"
    assert in_memory(conversation) == before


def test_inserting_conversations_in_bulk_begins_each_of_them(database: peewee.Database) -> None:
    leads = [new_lead() for _ in range(4)]
    rows = ({"lead": lead, "entry_point": EntryPoint.SMS_REPLY} for lead in leads[:2])
    CloseEngineConversation.insert_many(rows).execute()
    CloseEngineConversation.bulk_create(
        [CloseEngineConversation(lead=lead, entry_point=EntryPoint.SMS_REPLY) for lead in leads[2:]]
    )
    for lead in leads:
        conversation = lead.close_conversation
        assert conversation is not None
        assert conversation.stage is Stage.INITIATED
        assert triggers(conversation) == ["open"]
    leads[3].close_conversation.start_qualifying()


def test_update_queries_of_other_columns_work_and_move_the_version(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    assert CloseEngineConversation.update({"edit_rounds": 4}, entry_point=EntryPoint.REP_CLOSE).execute() == 1
    assert (
        CloseEngineConversation.insert(a_row(lead=conversation.lead_id))
        .on_conflict(conflict_target=[CloseEngineConversation.lead], update={CloseEngineConversation.edit_rounds: 5})
        .execute()
    )
    row = stored(conversation)
    assert (row["edit_rounds"], row["entry_point"], row["stage"]) == (5, EntryPoint.REP_CLOSE, Stage.QUALIFYING)
    assert row["updated_at"] > conversation.updated_at


def test_a_conversation_can_be_deleted_by_hand(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    assert conversation.delete_instance() == 1
    assert triggers(conversation) == ["open", "start_qualifying"]


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["SM1", "wh_😀 ' \" % %s ? {} \\ \n", " padded ", "k" * 255, "€" * 255])
def test_the_same_key_again_returns_the_first_change_and_changes_nothing(
    conversation_in: ConversationIn, key: str
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    first = conversation.collect_info(actor="worker-1", metadata={"n": 1}, key=key)
    row = stored(conversation)
    again = conversation.collect_info(actor="worker-2", metadata={"n": 2}, key=key)
    assert again.__data__ == first.__data__
    assert in_memory(conversation) == (row, set())
    assert stored(conversation) == row
    assert triggers(conversation) == ["open", "start_qualifying", "collect_info"]


def test_a_key_is_remembered_over_further_changes_and_by_stale_objects(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.INITIATED)
    stale = copy_of(conversation)
    first = conversation.start_qualifying(key="SM1")
    assert stale.start_qualifying(key="SM1") == first
    assert stale.stage is Stage.INITIATED, "a change that did not happen is not copied into the object"
    conversation.close_lost("no answer")
    conversation.reopen()
    assert conversation.start_qualifying(key="SM1") == first, "although the trigger is allowed again"
    assert conversation.stage is Stage.INITIATED
    conversation.stall()
    assert conversation.start_qualifying(key="SM1") == first, "although the trigger is refused now"
    assert triggers(conversation) == ["open", "start_qualifying", "close_lost", "reopen", "stall"]


def test_a_key_outlives_its_conversation(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.INITIATED)
    stale = copy_of(conversation)
    first = conversation.start_qualifying(key="SM1")
    conversation.delete_instance()
    assert stale.start_qualifying(key="SM1") == first


def test_a_key_belongs_to_one_conversation(conversation_in: ConversationIn) -> None:
    one, other = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    assert one.stall(key="SM1") != other.stall(key="SM1")
    assert (one.stage, other.stage) == (Stage.STALLED, Stage.STALLED)


@pytest.mark.parametrize("trigger", ["start_building", "start_qualifying"], ids=["allowed now", "refused now"])
def test_a_key_of_another_trigger_is_refused(conversation_in: ConversationIn, trigger: str) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.collect_info(key="SM1")
    before = in_memory(conversation)
    with pytest.raises(KeyReused) as caught:
        conversation.fire(trigger, key="SM1")
    error = caught.value
    assert (error.conversation_id, error.key, error.first, error.trigger) == (
        conversation.id,
        "SM1",
        "collect_info",
        trigger,
    )
    assert str(error).endswith(f"cannot be used for {trigger}: give every event a key of its own.")
    assert in_memory(conversation) == before


def test_a_rolled_back_change_leaves_its_key_free(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    with close_engine.atomic() as transaction:
        conversation.collect_info(key="SM1")
        transaction.rollback()
    conversation.stall(key="SM1")
    assert triggers(conversation) == ["open", "start_qualifying", "stall"]


# -- PostgreSQL --------------------------------------------------------------------------------------------------------


class Counting(psycopg2.extensions.cursor):  # type: ignore[misc]
    """A cursor that records every statement it sends."""

    sent: ClassVar[list[str]] = []

    def execute(self, query: Any, vars: Any = None) -> Any:
        self.sent.append(query)
        return super().execute(query, vars)


@pytest.fixture
def sent(postgres: peewee.Database, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every statement that is sent to PostgreSQL, including BEGIN and COMMIT."""
    monkeypatch.setattr(Counting, "sent", [])
    postgres.connection().cursor_factory = Counting
    return Counting.sent


def test_on_postgresql_a_stage_change_is_one_statement(postgres: peewee.Database, sent: list[str]) -> None:
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    sent.clear()
    conversation.start_qualifying(actor="worker-7", key="SM1", metadata={"a": 1})
    conversation.stall()
    conversation.resume(key="SM2")
    assert [statement.split()[0] for statement in sent] == ["UPDATE"] * 3
    assert triggers(conversation) == ["open", "start_qualifying", "stall", "resume"]
    assert conversation.history()[1].actor == "worker-7"


def test_on_postgresql_a_refusal_sends_nothing_and_an_open_transaction_adds_nothing(
    postgres: peewee.Database, sent: list[str]
) -> None:
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    sent.clear()
    with pytest.raises(TransitionNotAllowed):
        conversation.collect_info()
    assert sent == []
    with close_engine.atomic():
        conversation.start_qualifying()
    assert [statement.split()[0] for statement in sent] == ["BEGIN", "UPDATE", "COMMIT"]


def test_a_pooled_connection_carries_nothing_over_to_its_next_user(postgres_url: str) -> None:
    database = close_engine.connect(postgres_url.replace("postgresql://", "postgresql+pool://") + "&max_connections=1")
    setting = "SELECT coalesce(current_setting('close_engine.context', true), '')"
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    stale = copy_of(conversation)
    conversation.start_qualifying(actor="first")
    with pytest.raises(StageConflict):
        stale.stall(actor="second")
    with close_engine.atomic() as transaction:
        conversation.stall(actor="third")
        transaction.rollback()
    assert database.execute_sql(setting).fetchone() == ("",)
    pid = database.execute_sql("SELECT pg_backend_pid()").fetchone()
    database.close()

    seen = []

    def next_user() -> None:
        seen.append(database.execute_sql("SELECT pg_backend_pid()").fetchone())
        database.execute_sql("UPDATE close_engine_conversations SET stage = 'STALLED'")

    assert Running(next_user).result() is None
    assert seen == [pid], "it is the same session"
    assert [change.actor for change in conversation.history()][:2] == [None, "first"]
    assert conversation.history()[-1].actor.startswith("database:")
    database.close()
    database.close_all()  # type: ignore[attr-defined]


def test_a_history_never_has_a_gap(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.COMPLETED)
    assert replayed(conversation.id) is Stage.COMPLETED
    assert StageChange.select().count() == 6
