"""close_engine.atomic(): what is rolled back in the database is rolled back in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    AfterCommitError,
    CloseEngineConversation,
    EntryPoint,
    Lead,
    Stage,
    StageConflict,
    TransactionFailed,
    after_commit,
    atomic,
    locked,
    open_conversation,
)
from close_engine.database.transaction import run_after_commit
from close_engine.testing import new_lead
from tests.rows import Stop, copy_of, in_memory, left_by_an_error, stored, triggers
from tests.waiting import Running

ConversationIn = Callable[..., CloseEngineConversation]


def change_much(conversation: CloseEngineConversation) -> None:
    """Call everything that writes into an object."""
    conversation.collect_info()
    conversation.save()
    conversation.collected_data = {"later": True}
    conversation.save()
    copy_of(conversation).stall()
    conversation.reload()
    conversation.resume()


@pytest.fixture
def conversation(conversation_in: ConversationIn) -> CloseEngineConversation:
    """A conversation with an unsaved change."""
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.collected_data = {"unsaved": True}
    return conversation


def everything(conversation: CloseEngineConversation) -> tuple[Any, Any, list[str]]:
    return in_memory(conversation), stored(conversation), triggers(conversation)


def test_an_error_in_the_block_undoes_it_in_the_database_and_in_memory(conversation: CloseEngineConversation) -> None:
    before = everything(conversation)
    with left_by_an_error(atomic()):
        change_much(conversation)
    assert everything(conversation) == before


def test_rollback_undoes_what_was_done_so_far_and_the_block_goes_on(conversation: CloseEngineConversation) -> None:
    before = everything(conversation)
    with atomic() as transaction:
        change_much(conversation)
        transaction.rollback()
        assert everything(conversation) == before
        conversation.start_building()
        transaction.rollback()
        conversation.stall()
    assert conversation.stage is Stage.STALLED
    assert triggers(conversation) == ["open", "start_qualifying", "stall"]
    conversation.save()
    assert in_memory(conversation) == (stored(conversation), set())


@pytest.mark.parametrize("undo", ["error", "rollback()"])
def test_a_savepoint_is_undone_by_itself(conversation: CloseEngineConversation, undo: str) -> None:
    with atomic():
        conversation.collect_info()
        before = everything(conversation)
        try:
            with atomic() as savepoint:
                conversation.start_building()
                with atomic():
                    conversation.save()
                if undo == "error":
                    raise Stop
                savepoint.rollback()
        except Stop:
            pass
        assert everything(conversation) == before
    assert everything(conversation) == before
    assert conversation.stage is Stage.COLLECTING_INFO


def test_what_a_savepoint_kept_is_undone_with_the_block_around_it(conversation: CloseEngineConversation) -> None:
    before = everything(conversation)
    with left_by_an_error(atomic()):
        with atomic():
            conversation.collect_info()
            with atomic() as inner:
                conversation.start_building()
                inner.rollback()
        with atomic():
            conversation.stall()
    assert everything(conversation) == before


def test_atomic_decorates_functions(conversation: CloseEngineConversation) -> None:
    @atomic()
    def fail() -> None:
        conversation.collect_info()
        raise Stop

    @atomic()
    def succeed() -> Stage:
        conversation.collect_info()
        return conversation.stage

    before = everything(conversation)
    with pytest.raises(Stop):
        fail()
    assert everything(conversation) == before
    assert succeed() is Stage.COLLECTING_INFO
    assert stored(conversation)["stage"] is Stage.COLLECTING_INFO


def test_a_refusal_inside_a_block_leaves_what_was_done_before_it(conversation: CloseEngineConversation) -> None:
    with atomic():
        conversation.collect_info()
        with pytest.raises(close_engine.TransitionNotAllowed):
            conversation.reopen()
        stale = copy_of(conversation)
        conversation.stall()
        with pytest.raises(StageConflict):
            stale.stall()
    assert triggers(conversation) == ["open", "start_qualifying", "collect_info", "stall"]
    assert conversation.stage is Stage.STALLED


def test_a_new_conversation_is_new_again_when_it_was_rolled_back(database: peewee.Database) -> None:
    conversation = CloseEngineConversation(lead=new_lead(), entry_point=EntryPoint.REP_CLOSE)
    before = in_memory(conversation)
    with left_by_an_error(atomic()):
        conversation.save(force_insert=True)
        conversation.start_qualifying()
    assert in_memory(conversation) == before
    conversation.save(force_insert=True)
    assert in_memory(conversation) == (stored(conversation), set())
    assert triggers(conversation) == ["open"]


def test_an_opening_that_is_rolled_back_leaves_the_lead_as_it_was(database: peewee.Database) -> None:
    lead = Lead.get_by_id(new_lead().id)
    lead.close_entry_point = EntryPoint.PREVIEW_CTA
    before = in_memory(lead)
    with left_by_an_error(atomic()):
        open_conversation(lead, EntryPoint.SMS_REPLY)
        assert lead.close_entry_point is EntryPoint.SMS_REPLY
    assert in_memory(lead) == before
    assert Lead.get_by_id(lead.id).close_entry_point is None
    assert lead.close_conversation is None


# -- Peewee's own transactions -----------------------------------------------------------------------------------------


def test_triggers_join_a_transaction_of_peewees_own(
    database: peewee.Database, conversation: CloseEngineConversation
) -> None:
    with database.atomic():
        conversation.collect_info()
        new_lead("+15550199")
    with left_by_an_error(database.atomic()):
        copy_of(conversation).start_building()
    assert stored(conversation)["stage"] is Stage.COLLECTING_INFO
    assert triggers(conversation) == ["open", "start_qualifying", "collect_info"]
    assert Lead.select().where(Lead.phone == "+15550199").exists()


def test_an_atomic_block_inside_peewees_own_is_a_savepoint_that_memory_follows(
    database: peewee.Database, conversation: CloseEngineConversation
) -> None:
    with database.atomic():
        conversation.collect_info()
        before = everything(conversation)
        with left_by_an_error(atomic()):
            conversation.stall()
        assert everything(conversation) == before
    assert everything(conversation) == before


def test_an_object_that_peewees_own_rollback_left_ahead_conflicts_until_it_is_reloaded(
    database: peewee.Database, conversation: CloseEngineConversation
) -> None:
    with database.atomic() as transaction:
        conversation.collect_info()
        transaction.rollback()
    with pytest.raises(StageConflict, match="expected COLLECTING_INFO and found QUALIFYING"):
        conversation.start_building()
    conversation.reload()
    assert in_memory(conversation) == (stored(conversation), set())


def test_peewees_blocks_work_inside_ours(database: peewee.Database, conversation: CloseEngineConversation) -> None:
    before = everything(conversation)
    with left_by_an_error(atomic()):
        with database.atomic():
            conversation.collect_info()
        with database.atomic():
            conversation.stall()
    assert everything(conversation) == before


# -- failures at the end -----------------------------------------------------------------------------------------------


@pytest.fixture
def fails_at_commit(postgres: peewee.Database) -> Callable[[], object]:
    """A PostgreSQL table with a constraint that is checked when the transaction commits."""
    postgres.execute_sql(
        "CREATE TABLE late (id int PRIMARY KEY, other int REFERENCES late DEFERRABLE INITIALLY DEFERRED)"
    )
    return lambda: postgres.execute_sql("INSERT INTO late VALUES (1, 2)")


def test_a_commit_that_fails_undoes_memory_too(fails_at_commit: Callable[[], object]) -> None:
    conversation = open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    before = everything(conversation)

    @atomic()
    def block() -> None:
        conversation.start_qualifying()
        fails_at_commit()

    with pytest.raises(peewee.IntegrityError):
        block()
    assert everything(conversation) == before


@pytest.mark.parametrize("depth", [1, 2])
def test_on_postgresql_a_swallowed_error_undoes_the_block_and_says_so(postgres: peewee.Database, depth: int) -> None:
    conversation = open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    before = everything(conversation)

    def block() -> None:
        with atomic():
            conversation.start_qualifying()
            with pytest.raises(peewee.DataError):
                postgres.execute_sql("SELECT 1 / 0")

    with pytest.raises(TransactionFailed, match="PostgreSQL undoes all of it: nothing is written"):
        block() if depth == 1 else atomic()(block)()
    assert everything(conversation) == before
    assert not postgres.in_transaction()
    conversation.start_qualifying()


def test_on_postgresql_what_may_fail_can_have_a_block_of_its_own(postgres: peewee.Database) -> None:
    conversation = open_conversation(new_lead(), EntryPoint.SMS_REPLY)

    @atomic()
    def what_may_fail() -> None:
        conversation.stall()
        postgres.execute_sql("SELECT 1 / 0")

    with atomic():
        conversation.start_qualifying()
        with pytest.raises(peewee.DataError):
            what_may_fail()
        conversation.collect_info()
    assert triggers(conversation) == ["open", "start_qualifying", "collect_info"]
    assert in_memory(conversation) == (stored(conversation), set())


def test_on_postgresql_a_lost_connection_undoes_memory_too(postgres: peewee.Database) -> None:
    conversation = open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    before = in_memory(conversation)

    @atomic()
    def block() -> None:
        conversation.start_qualifying()
        postgres.execute_sql("SELECT pg_terminate_backend(pg_backend_pid())")

    with pytest.raises((peewee.OperationalError, peewee.InterfaceError)):
        block()
    assert in_memory(conversation) == before
    postgres.close()
    assert in_memory(conversation) == (stored(conversation), set())


# -- after the commit --------------------------------------------------------------------------------------------------


def test_functions_run_after_the_outermost_commit_and_in_order(database: peewee.Database) -> None:
    told = []
    with atomic():
        run_after_commit(lambda: told.append("first"))
        with atomic():
            run_after_commit(lambda: told.append("second"), lambda: told.append("third"))
        run_after_commit()
        assert told == []
    assert told == ["first", "second", "third"]
    run_after_commit(lambda: told.append("at once"))
    assert told[-1] == "at once"


def test_a_failing_function_is_told_and_the_commit_and_the_others_stand(conversation: CloseEngineConversation) -> None:
    told = []

    def fail() -> None:
        raise Stop("no printer")

    @atomic()
    def block() -> None:
        run_after_commit(fail, lambda: told.append("same call"))
        with atomic():
            conversation.collect_info()
            run_after_commit(fail)
        run_after_commit(lambda: told.append("other call"))

    with pytest.raises(AfterCommitError) as caught:
        block()
    assert [str(error) for error in caught.value.errors] == ["no printer", "no printer"]
    assert isinstance(caught.value.__cause__, Stop)
    assert str(caught.value) == (
        "The change is committed, but functions that ran after it failed: Stop: no printer; Stop: no printer"
    )
    assert told == ["same call", "other call"]
    assert conversation.stage is stored(conversation)["stage"] is Stage.COLLECTING_INFO


def test_memory_keeps_what_is_committed_whatever_happens_after_the_commit(
    database: peewee.Database, conversation: CloseEngineConversation
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    @atomic()
    def block() -> None:
        conversation.collect_info()
        database.after_commit(interrupt)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert conversation.stage is stored(conversation)["stage"] is Stage.COLLECTING_INFO
    assert not database.in_transaction()


def test_what_runs_after_the_commit_is_outside_of_it(conversation: CloseEngineConversation) -> None:
    """It has its own transaction, and may roll that back."""

    def go_on() -> None:
        with left_by_an_error(atomic()):
            conversation.start_building()
        conversation.stall()

    with atomic():
        conversation.collect_info()
        run_after_commit(go_on)
    assert triggers(conversation) == ["open", "start_qualifying", "collect_info", "stall"]
    assert conversation.stage is Stage.STALLED


@pytest.mark.parametrize("ours_inside", [False, True])
def test_a_failure_after_a_commit_of_peewees_own_is_not_swallowed(
    database: peewee.Database, conversation: CloseEngineConversation, ours_inside: bool
) -> None:
    def fail() -> None:
        raise Stop("no printer")

    @database.atomic()  # type: ignore[untyped-decorator]
    def block() -> None:
        (atomic()(run_after_commit) if ours_inside else run_after_commit)(fail)
        conversation.collect_info()

    with pytest.raises((AfterCommitError, peewee.OperationalError)) as caught:
        block()
    # Peewee rolls back if a function fails. On SQLite there is nothing left to roll back, which is another error.
    told = caught.value if isinstance(caught.value, AfterCommitError) else caught.value.__context__.__context__
    assert [str(error) for error in told.errors] == ["no printer"]
    assert stored(conversation)["stage"] is Stage.COLLECTING_INFO


def test_nothing_runs_after_a_rollback(database: peewee.Database, conversation: CloseEngineConversation) -> None:
    told = []
    with left_by_an_error(atomic()):
        run_after_commit(lambda: told.append("never"))
    with left_by_an_error(database.atomic()):
        run_after_commit(lambda: told.append("never"))
    with atomic() as transaction:
        run_after_commit(lambda: told.append("never"))
        transaction.rollback()
        run_after_commit(lambda: told.append("after the rollback"))
    assert told == ["after the rollback"]


def test_each_thread_has_transactions_of_its_own(database: peewee.Database) -> None:
    told = []

    def other() -> None:
        run_after_commit(lambda: told.append("other"))

    with left_by_an_error(atomic()):
        assert Running(other).result() is None
    assert told == ["other"]


# -- holding -----------------------------------------------------------------------------------------------------------


def test_locked_gives_the_conversation_as_it_is_now_and_commits_what_is_done_to_it(
    conversation: CloseEngineConversation,
) -> None:
    copy_of(conversation).collect_info()
    with locked(conversation.id) as held:
        assert held.stage is Stage.COLLECTING_INFO
        held.start_building()
        held.collected_data = {"hours": "9-5"}
        held.save()
    assert in_memory(held) == (stored(conversation), set())
    assert triggers(conversation) == ["open", "start_qualifying", "collect_info", "start_building"]


def test_locked_undoes_everything_when_the_block_fails(conversation: CloseEngineConversation) -> None:
    before = everything(conversation)
    with left_by_an_error(locked(conversation.id)) as held:
        held.collect_info()
    assert held.stage is Stage.QUALIFYING
    assert everything(conversation) == before


def test_locked_works_inside_a_transaction(database: peewee.Database, conversation: CloseEngineConversation) -> None:
    with atomic(), locked(conversation.id) as held:
        held.collect_info()
    with database.atomic(), locked(conversation.id) as held:
        held.start_building()
    assert stored(conversation)["stage"] is Stage.BUILDING


def test_after_commit_hooks_of_a_held_conversation_wait_for_its_end(conversation: CloseEngineConversation) -> None:
    told = []
    hook = after_commit(Stage.COLLECTING_INFO)(lambda held, change: told.append(change.dest))
    try:
        with locked(conversation.id) as held:
            held.collect_info()
            assert told == []
    finally:
        hook.remove()
    assert told == [Stage.COLLECTING_INFO]
