"""The history: complete for every writer, with the provenance of the library's writes and of no others."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import CloseEngineConversation, EntryPoint, Stage, StageChange, StageConflict
from close_engine.database.binding import moment
from close_engine.testing import MovableClock, bring_to, new_lead
from tests.design import ACTIVE, REASON, STAGES, TRIGGER_BETWEEN, URL
from tests.foreign import REFUSED, Change, ForeignWriter

Factory = Callable[..., CloseEngineConversation]

PROVENANCE: dict[str, Any] = {
    "actor": "worker-7 'of' \"many\"",
    "reason": "because: %s {history} \\ ü 🔑\n",
    "metadata": {"deep": [{"a": None, "b": [1.5, True, "§"]}], "'": '"', "empty": {}},
    "key": "SM'123",
}
TOLD = (PROVENANCE["actor"], PROVENANCE["reason"], PROVENANCE["metadata"], PROVENANCE["key"])


@pytest.fixture
def own(database: peewee.Database) -> ForeignWriter:
    """Raw SQL in the library's own session, like a caller's own statements in their transaction."""
    return ForeignWriter(database.connection())


# -- the library's provenance ------------------------------------------------------------------------------------------


def test_who_why_and_under_which_key_reaches_the_row(conversation_in: Factory, foreign: ForeignWriter) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    before = moment()
    change = conversation.collect_info(**PROVENANCE)
    assert foreign.history(conversation.id)[-1] == Change("collect_info", "QUALIFYING", "COLLECTING_INFO", *TOLD)
    assert before <= change.created_at <= moment()
    assert conversation.history()[-1].__data__ == change.__data__
    assert change.metadata == PROVENANCE["metadata"]
    assert repr(change) == f"<StageChange {change.id}: QUALIFYING → COLLECTING_INFO by collect_info>"


def test_what_is_not_given_is_not_recorded(conversation_in: Factory, foreign: ForeignWriter) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    change = conversation.collect_info()
    assert foreign.history(conversation.id)[-1] == Change("collect_info", "QUALIFYING", "COLLECTING_INFO", None)
    assert StageChange.get_by_id(change.id).__data__ == change.__data__
    conversation.start_building(metadata={})
    assert foreign.history(conversation.id)[-1].metadata == {}


def test_much_metadata_reaches_the_row(conversation_in: Factory) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    metadata = {"page": "x" * 900_000, "list": list(range(1000))}
    conversation.collect_info(metadata=metadata)
    assert conversation.history()[-1].metadata == metadata


def test_opening_and_reopening_carry_their_provenance(database: peewee.Database, foreign: ForeignWriter) -> None:
    lead = new_lead()
    conversation = close_engine.open_conversation(lead, EntryPoint.SMS_REPLY, **PROVENANCE)
    conversation.close_lost(REASON, actor="Ann")
    again = {**PROVENANCE, "key": "SM124"}
    reopened = close_engine.open_conversation(lead, EntryPoint.REP_CLOSE, **again)
    reopened.stall()
    close_engine.open_conversation(lead, EntryPoint.REP_CLOSE, actor="Bob")
    assert foreign.history(conversation.id) == [
        Change("open", None, "INITIATED", *TOLD),
        Change("close_lost", "INITIATED", "CLOSED_LOST", "Ann", REASON),
        Change("reopen", "CLOSED_LOST", "INITIATED", *TOLD[:3], "SM124"),
        Change("stall", "INITIATED", "STALLED", None),
        Change("resume", "STALLED", "INITIATED", "Bob"),
    ]


# -- and leaves nothing behind -----------------------------------------------------------------------------------------


@contextmanager
def undone() -> Iterator[None]:
    """Run a block and roll it back."""
    with close_engine.atomic() as transaction:
        yield
        transaction.rollback()


def after_a_change(conversation: CloseEngineConversation, own: ForeignWriter) -> None:
    conversation.collect_info(**PROVENANCE)


def after_a_conflict(conversation: CloseEngineConversation, own: ForeignWriter) -> None:
    own.update(conversation.id, edit_rounds=1)
    with pytest.raises(StageConflict):
        conversation.collect_info(**PROVENANCE)


def after_a_rollback(conversation: CloseEngineConversation, own: ForeignWriter) -> None:
    with undone():
        conversation.collect_info(**PROVENANCE)


def after_a_second_use_of_the_key(conversation: CloseEngineConversation, own: ForeignWriter) -> None:
    first = conversation.collect_info(**PROVENANCE)
    assert conversation.collect_info(**PROVENANCE).id == first.id


def after_a_refusal_by_the_database(conversation: CloseEngineConversation, own: ForeignWriter) -> None:
    with undone():
        own.run("DELETE FROM close_engine.transitions WHERE dest = 'COLLECTING_INFO'")
        with pytest.raises(peewee.IntegrityError), close_engine.atomic():
            conversation.collect_info(**PROVENANCE)
        own.update(conversation.id, stage="STALLED")
        assert own.history(conversation.id)[-1].actor == own.actor


def after_an_opening(conversation: CloseEngineConversation, own: ForeignWriter) -> None:
    close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY, **PROVENANCE)
    close_engine.open_conversation(conversation.lead_id, EntryPoint.SMS_REPLY, **PROVENANCE)


def after_a_failed_opening(conversation: CloseEngineConversation, own: ForeignWriter) -> None:
    with pytest.raises(close_engine.LeadHasNoPhone):
        close_engine.open_conversation(new_lead(phone=None), EntryPoint.SMS_REPLY, **PROVENANCE)


BEFOREHAND = [
    after_a_change,
    after_a_conflict,
    after_a_rollback,
    after_a_second_use_of_the_key,
    after_a_refusal_by_the_database,
    after_an_opening,
    after_a_failed_opening,
]


@pytest.mark.parametrize("beforehand", BEFOREHAND)
def test_a_foreign_write_inherits_nothing(
    beforehand: Callable[..., None], conversation_in: Factory, own: ForeignWriter
) -> None:
    for in_one_transaction in (True, False):
        conversation, other = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
        with close_engine.atomic() if in_one_transaction else nullcontext():
            beforehand(conversation, own)
            version = own.run("SELECT updated_at FROM close_engine_conversations WHERE id = %s", conversation.id)[0][0]
            own.update(conversation.id, stage="STALLED", updated_at=version)
            own.update(other.id, stage="STALLED", updated_at=version)
            inserted = own.insert("BUILDING", updated_at=version)
        for written in (conversation.id, other.id, inserted):
            assert own.history(written)[-1][3:] == (own.actor, None, None, None)


def test_a_row_that_is_written_again_inherits_nothing(conversation_in: Factory, own: ForeignWriter) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    with close_engine.atomic():
        conversation.collect_info(**PROVENANCE)
        own.run("CREATE TEMPORARY TABLE aside AS SELECT * FROM close_engine_conversations")
        own.run("DELETE FROM close_engine_conversations")
        own.run("INSERT INTO close_engine_conversations SELECT * FROM aside")
    assert own.history(conversation.id)[-2:] == [
        Change("collect_info", "QUALIFYING", "COLLECTING_INFO", *TOLD),
        Change("open", None, "COLLECTING_INFO", own.actor),
    ]


def test_a_pooled_session_hands_nothing_on(database_url: str) -> None:
    query = "&" if "?" in database_url else "?"
    pool = close_engine.connect(f"{database_url.replace('://', '+pool://', 1)}{query}max_connections=1")
    with pool.connection_context():
        if database_url.endswith(":memory:"):
            close_engine.migrate(standalone=True)
        session = pool.connection()
        conversation = bring_to(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.QUALIFYING)
        conversation.collect_info(**PROVENANCE)
        stale = CloseEngineConversation.get_by_id(conversation.id)
        stale.__data__["updated_at"] = conversation.created_at
        with pytest.raises(StageConflict):
            stale.start_building(**{**PROVENANCE, "key": "SM124"})
    with pool.connection_context():
        assert pool.connection() is session
        own = ForeignWriter(session)
        left = "SELECT current_setting('close_engine.context', true)" if own.is_postgres else LEFT_ON_SQLITE
        assert own.run(left) in ([], [("",)])
        own.update(conversation.id, stage="STALLED")
        assert own.history(conversation.id)[-1] == Change("stall", "COLLECTING_INFO", "STALLED", own.actor)
    pool.close_all()  # type: ignore[attr-defined]


LEFT_ON_SQLITE = "SELECT context FROM close_engine_context"


# -- completeness ------------------------------------------------------------------------------------------------------


def replay(changes: list[Change]) -> str | None:
    """Return the stage that a history leads to. Each change must start where the one before it ended."""
    stage = None
    for change in changes:
        assert change.source == stage
        stage = change.dest
    return stage


@pytest.mark.parametrize("seed", range(3))
def test_the_history_of_a_random_walk_leads_to_the_stored_stage(
    seed: int, conversation_in: Factory, foreign: ForeignWriter, close_engine_clock: MovableClock
) -> None:
    dice = random.Random(seed)
    conversations = [conversation_in(Stage.INITIATED) for _ in range(3)]
    moves = dict.fromkeys((conversation.id for conversation in conversations), 1)
    for _ in range(60):
        conversation = dice.choice(conversations)
        before = foreign.stage(conversation.id)
        if dice.random() < 0.5:
            dest = dice.choice(STAGES)
            allowed = (before, dest) in TRIGGER_BETWEEN
            if before == "STALLED" and dest in ACTIVE:
                source = next(
                    change.source for change in foreign.history(conversation.id)[::-1] if change.dest == before
                )
                allowed = dest == ("PREVIEW_SENT" if source == "PENDING_APPROVAL" else source)
            with pytest.raises(REFUSED) if not allowed and before != dest else nullcontext():
                foreign.update(conversation.id, stage=dest)
            moves[conversation.id] += allowed
        else:
            conversation.reload()
            trigger = dice.choice([t for t in conversation.allowed_triggers() or ["stall"]])
            given: dict[str, Any] = {"reason": REASON, "payment_link_url": URL, "approved_by": "Ann"}
            if conversation.may(trigger, **given):
                conversation.fire(trigger, **given)
                moves[conversation.id] += 1
        history = foreign.history(conversation.id)
        assert replay(history) == foreign.stage(conversation.id)
        assert len(history) == moves[conversation.id]
    ids = [change.id for change in StageChange.select().order_by(StageChange.id)]
    assert ids == sorted(set(ids))
    silent = {c.id for c in conversations if foreign.stage(c.id) in ACTIVE}
    assert set(foreign.silent_since()) == silent


def test_conversations_from_before_the_history_are_adopted_once(
    database: peewee.Database, foreign: ForeignWriter
) -> None:
    close_engine.schema.downgrade("0002_history")
    made = {stage: foreign.insert(stage) for stage in STAGES}
    rows = {stage: foreign.row(conversation) for stage, conversation in made.items()}

    assert {"0002_history", "0003_guard"} <= set(close_engine.migrate())

    for stage, conversation in made.items():
        assert foreign.history(conversation) == [Change("adopted", None, stage, None)]
        assert foreign.row(conversation) == rows[stage]
    silent = foreign.silent_since()
    assert set(silent) == {made[stage] for stage in ACTIVE}
    assert all(since >= foreign.recorded_at(conversation)[0] for conversation, since in silent.items())
    assert all("is empty: set it" in problem for problem in close_engine.verify())
    assert len(close_engine.schema.repair()) == 4
    assert close_engine.verify() == []
    stalled = CloseEngineConversation.get_by_id(made["STALLED"])
    assert stalled.resume().dest is Stage.QUALIFYING


def test_a_guard_that_is_installed_again_adopts_what_came_meanwhile(
    conversation_in: Factory, foreign: ForeignWriter
) -> None:
    known = conversation_in(Stage.BUILDING)
    past = foreign.history(known.id)
    close_engine.schema.downgrade("0003_guard")
    new = foreign.insert("EDIT_LOOP")
    close_engine.migrate()
    close_engine.migrate()
    assert foreign.history(known.id) == past
    assert foreign.history(new) == [Change("adopted", None, "EDIT_LOOP", None)]


def test_the_history_outlives_the_conversation_and_its_lead(conversation_in: Factory, foreign: ForeignWriter) -> None:
    conversation, lead = conversation_in(Stage.PREVIEW_SENT), new_lead()
    lost = bring_to(close_engine.open_conversation(lead, EntryPoint.PREVIEW_CTA), Stage.CLOSED_LOST)
    past = [foreign.history(conversation.id), foreign.history(lost.id)]
    conversation.delete_instance()
    lead.delete_instance()
    assert CloseEngineConversation.select().count() == 0
    assert [foreign.history(conversation.id), foreign.history(lost.id)] == past
    assert {change.lead_id for change in lost.history()} == {lead.id}
    anew = close_engine.open_conversation(conversation.lead_id, EntryPoint.SMS_REPLY)
    assert [change.trigger for change in anew.history()] == ["open"]
    assert len(foreign.history(conversation.id)) == len(past[0])
