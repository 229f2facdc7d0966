"""The user's functions at a stage change: in its transaction, or after its commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
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
    StageChange,
    StageConflict,
    after_commit,
    atomic,
    on_enter,
    on_exit,
    open_conversation,
)
from close_engine.hooks import Hook
from close_engine.machine import Transition
from close_engine.testing import new_lead
from tests.rows import Stop, copy_of, in_memory, left_by_an_error, stored, triggers
from tests.waiting import Running

ConversationIn = Callable[..., CloseEngineConversation]
#: The type of the fixture `hook`, called as `hook(on_enter, Stage.BUILDING)`.
Register = Callable[..., Callable[[Callable[..., Any]], Hook]]


@pytest.fixture
def hook() -> Iterator[Register]:
    """Registers a function like the decorators, until the test ends: `@hook(on_enter, Stage.BUILDING)`."""
    registered = []

    def register(
        decorator: Callable[..., Callable[[Callable[..., Any]], Hook]], *stages: Any
    ) -> Callable[[Callable[..., Any]], Hook]:
        def decorate(function: Callable[..., Any]) -> Hook:
            registered.append(decorator(*stages)(function))
            return registered[-1]

        return decorate

    yield register
    for made in registered:
        made.remove()


@pytest.fixture
def told(hook: Register) -> list[StageChange]:
    """The changes that the after-commit hooks of all stages were called with, in order."""
    changes = []
    hook(after_commit, *Stage)(lambda conversation, change: changes.append(change))
    return changes


def fired(changes: list[StageChange]) -> list[str]:
    return [change.trigger for change in changes]


def fail(*arguments: object) -> None:
    raise Stop("no printer")


# -- in the transaction ------------------------------------------------------------------------------------------------


def test_hooks_run_around_the_change_in_its_transaction(
    database: peewee.Database, conversation_in: ConversationIn, hook: Register
) -> None:
    seen = []

    def note(name: str, conversation: CloseEngineConversation, event: StageChange | Transition) -> None:
        seen.append((name, event.trigger, conversation.stage, stored(conversation)["stage"], database.in_transaction()))

    hook(on_exit, Stage.QUALIFYING)(lambda conversation, transition: note("exit", conversation, transition))
    hook(on_enter, Stage.BUILDING)(lambda conversation, change: note("enter", conversation, change))
    hook(after_commit, Stage.BUILDING)(lambda conversation, change: note("commit", conversation, change))
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.start_building()
    assert seen == [
        ("exit", "start_building", Stage.QUALIFYING, Stage.QUALIFYING, True),
        ("enter", "start_building", Stage.BUILDING, Stage.BUILDING, True),
        ("commit", "start_building", Stage.BUILDING, Stage.BUILDING, False),
    ]


def test_hooks_get_the_change_that_the_history_holds(
    conversation_in: ConversationIn, hook: Register, told: list[StageChange]
) -> None:
    entered = []
    hook(on_enter, Stage.STALLED)(lambda conversation, change: entered.append(change))
    conversation = conversation_in(Stage.QUALIFYING)
    change = conversation.stall(actor="timer")
    assert entered == [change]
    assert told[-1] is change
    assert StageChange.get_by_id(change.id).__data__ == change.__data__


@pytest.mark.parametrize("where", ["exit", "enter"])
def test_a_hook_that_raises_undoes_everything(
    conversation_in: ConversationIn, hook: Register, told: list[StageChange], where: str
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.collected_data = {"unsaved": True}
    told.clear()
    hook(on_exit, Stage.QUALIFYING)(lambda conversation, transition: new_lead("+15550191"))
    hook(on_enter, Stage.BUILDING)(lambda conversation, change: (new_lead("+15550192"), conversation.save()))
    hook(on_exit, Stage.QUALIFYING)(fail) if where == "exit" else hook(on_enter, Stage.BUILDING)(fail)
    before, row = in_memory(conversation), stored(conversation)
    with pytest.raises(Stop):
        conversation.start_building()
    assert in_memory(conversation) == before
    assert (stored(conversation), triggers(conversation)) == (row, ["open", "start_qualifying"])
    assert Lead.select().count() == 1
    assert told == []


def test_a_hook_that_raises_leaves_the_transaction_around_it_usable(
    conversation_in: ConversationIn, hook: Register
) -> None:
    hook(on_enter, Stage.BUILDING)(fail)
    conversation = conversation_in(Stage.QUALIFYING)
    with atomic():
        conversation.collect_info()
        with pytest.raises(Stop):
            conversation.start_building()
        conversation.stall()
    assert triggers(conversation) == ["open", "start_qualifying", "collect_info", "stall"]
    assert in_memory(conversation) == (stored(conversation), set())


def test_hooks_run_wherever_resume_leads(conversation_in: ConversationIn, hook: Register) -> None:
    entered = []
    hook(on_enter, *Stage)(lambda conversation, change: entered.append(change.dest))
    conversation = conversation_in(Stage.STALLED)
    entered.clear()
    conversation.resume()
    assert entered == [Stage.QUALIFYING]


def test_opening_and_reopening_enter_a_stage_too(
    database: peewee.Database, hook: Register, told: list[StageChange]
) -> None:
    entered = []
    hook(on_enter, Stage.INITIATED)(lambda conversation, change: entered.append(change))
    lead = new_lead()
    open_conversation(lead, EntryPoint.SMS_REPLY, actor="webhook").close_lost("no answer")
    open_conversation(lead, EntryPoint.SMS_REPLY)
    open_conversation(lead, EntryPoint.SMS_REPLY)
    assert fired(entered) == ["open", "reopen"]
    assert fired(told) == ["open", "close_lost", "reopen"]
    assert (entered[0].actor, entered[0].source, entered[0].dest) == ("webhook", None, Stage.INITIATED)


def test_an_opening_whose_hook_raises_did_not_happen(
    database: peewee.Database, hook: Register, told: list[StageChange]
) -> None:
    hook(on_enter, Stage.INITIATED)(fail)
    lead = new_lead()
    with pytest.raises(Stop):
        open_conversation(lead, EntryPoint.SMS_REPLY)
    assert lead.close_conversation is None
    assert Lead.get_by_id(lead.id).close_entry_point is None
    assert StageChange.select().count() == 0
    assert told == []


def test_a_hook_may_fire_the_next_trigger(
    conversation_in: ConversationIn, hook: Register, told: list[StageChange]
) -> None:
    hook(on_enter, Stage.COLLECTING_INFO)(lambda conversation, change: conversation.start_building(actor="hook"))
    conversation = conversation_in(Stage.QUALIFYING)
    told.clear()
    change = conversation.collect_info()
    assert (change.trigger, change.dest) == ("collect_info", Stage.COLLECTING_INFO)
    assert in_memory(conversation) == (stored(conversation), set())
    assert triggers(conversation) == ["open", "start_qualifying", "collect_info", "start_building"]
    assert fired(told) == ["collect_info", "start_building"], "in the order in which they were made"


def test_a_hook_that_moves_the_stage_away_before_it_is_left_makes_a_conflict(
    conversation_in: ConversationIn, hook: Register
) -> None:
    def stall(conversation: CloseEngineConversation, transition: Transition) -> None:
        if transition.trigger != "stall":
            conversation.stall()

    hook(on_exit, Stage.QUALIFYING)(stall)
    conversation = conversation_in(Stage.QUALIFYING)
    before = in_memory(conversation)
    with pytest.raises(StageConflict) as caught:
        conversation.close_lost("no answer")
    assert (caught.value.expected, caught.value.found) == (Stage.QUALIFYING, Stage.STALLED)
    assert in_memory(conversation) == before
    assert triggers(conversation) == ["open", "start_qualifying"]


def test_a_hook_may_save_other_fields_before_the_stage_is_left(conversation_in: ConversationIn, hook: Register) -> None:
    @hook(on_exit, Stage.QUALIFYING)
    def close_questions(conversation: CloseEngineConversation, transition: Transition) -> None:
        conversation.questions_asked = ["hours"]
        conversation.save()

    conversation = conversation_in(Stage.QUALIFYING)
    conversation.start_building()
    assert in_memory(conversation) == (stored(conversation), set())
    assert stored(conversation)["questions_asked"] == ["hours"]


def test_a_conflict_undoes_what_the_hooks_did(conversation_in: ConversationIn, hook: Register) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    copy_of(conversation).stall()
    hook(on_exit, Stage.QUALIFYING)(lambda conversation, transition: new_lead())
    with pytest.raises(StageConflict):
        conversation.collect_info()
    assert Lead.select().count() == 1


def test_a_key_that_was_used_before_leaves_nothing_of_the_hooks(
    conversation_in: ConversationIn, hook: Register, told: list[StageChange]
) -> None:
    conversation = conversation_in(Stage.INITIATED)
    first = conversation.start_qualifying(key="SM1")
    conversation.close_lost("no answer")
    conversation.reopen()
    told.clear()
    entered = []
    hook(on_exit, Stage.INITIATED)(lambda conversation, transition: new_lead())
    hook(on_enter, Stage.QUALIFYING)(lambda conversation, change: entered.append(change))
    assert conversation.start_qualifying(key="SM1") == first
    assert Lead.select().count() == 1
    assert (entered, told) == ([], [])


# -- after the commit --------------------------------------------------------------------------------------------------


def test_after_commit_hooks_see_what_other_connections_see(
    postgres: peewee.Database, postgres_url: str, hook: Register
) -> None:
    seen = []

    @hook(after_commit, Stage.INITIATED)
    def look(conversation: CloseEngineConversation, change: StageChange) -> None:
        seen.append(Running(lambda: copy_of(conversation).stage).result())

    open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    assert seen == [Stage.INITIATED]


def test_after_commit_hooks_run_once_each_in_order_after_the_outermost_commit(
    database: peewee.Database, conversation_in: ConversationIn, told: list[StageChange]
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    told.clear()
    with database.atomic():
        conversation.collect_info()
        with atomic():
            conversation.start_building()
            with database.atomic():
                conversation.send_preview()
        assert told == []
    assert fired(told) == ["collect_info", "start_building", "send_preview"]


@pytest.mark.parametrize("undo", ["error", "rollback()"])
@pytest.mark.parametrize("outer", ["ours", "Peewee's"])
@pytest.mark.parametrize("inner", ["ours", "Peewee's"])
def test_after_commit_hooks_of_an_undone_savepoint_never_run(
    database: peewee.Database,
    conversation_in: ConversationIn,
    told: list[StageChange],
    undo: str,
    outer: str,
    inner: str,
) -> None:
    blocks: dict[str, Callable[[], AbstractContextManager[Any]]] = {"ours": atomic, "Peewee's": database.atomic}
    conversation = conversation_in(Stage.INITIATED)
    told.clear()
    with blocks[outer]():
        if undo == "error":
            with left_by_an_error(blocks[inner]()):
                conversation.start_qualifying()
        else:
            with blocks[inner]() as savepoint:
                conversation.start_qualifying()
                savepoint.rollback()
        conversation.reload()
        conversation.stall()
    assert fired(told) == ["stall"]


def test_a_change_that_is_made_again_after_it_was_undone_is_told_once(
    conversation_in: ConversationIn, told: list[StageChange]
) -> None:
    """The clock stands still, so the two changes look alike, and SQLite gives both the same id."""
    conversation = conversation_in(Stage.INITIATED)
    told.clear()
    with atomic():
        with left_by_an_error(atomic()):
            first = conversation.start_qualifying()
        second = conversation.start_qualifying()
    assert first is not second
    assert len(told) == 1
    assert told[0] is second


def test_an_undone_change_is_not_mistaken_for_one_without_hooks_that_got_its_id(
    conversation_in: ConversationIn, hook: Register
) -> None:
    told = []
    hook(after_commit, Stage.QUALIFYING)(lambda conversation, change: told.append(change))
    conversation, other = conversation_in(Stage.INITIATED), conversation_in(Stage.INITIATED)
    with atomic():
        with left_by_an_error(atomic()):
            conversation.start_qualifying()
        other.stall()
    assert told == []


def test_after_commit_hooks_of_an_undone_transaction_never_run(
    database: peewee.Database, conversation_in: ConversationIn, told: list[StageChange]
) -> None:
    conversation = conversation_in(Stage.INITIATED)
    told.clear()
    with left_by_an_error(atomic()):
        conversation.start_qualifying()
    with atomic() as transaction:
        conversation.start_qualifying()
        transaction.rollback()
    with left_by_an_error(database.atomic()):
        conversation.start_qualifying()
    assert told == []


def test_an_after_commit_hook_may_fire_the_next_trigger(
    conversation_in: ConversationIn, hook: Register, told: list[StageChange]
) -> None:
    hook(after_commit, Stage.COLLECTING_INFO)(lambda conversation, change: conversation.start_building())
    conversation = conversation_in(Stage.QUALIFYING)
    told.clear()
    with atomic():
        conversation.collect_info()
    assert conversation.stage is Stage.BUILDING
    assert in_memory(conversation) == (stored(conversation), set())
    assert fired(told) == ["collect_info", "start_building"]


@pytest.mark.parametrize("inside", [False, True], ids=["no transaction", "in atomic()"])
def test_an_after_commit_hook_that_fails_is_told_and_the_change_and_the_other_hooks_stand(
    conversation_in: ConversationIn, hook: Register, told: list[StageChange], inside: bool
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    told.clear()
    others = []
    hook(after_commit, Stage.STALLED)(fail)
    hook(after_commit, Stage.STALLED)(lambda conversation, change: others.append(change))
    stall = atomic()(conversation.stall) if inside else conversation.stall
    with pytest.raises(AfterCommitError) as caught:
        stall()
    assert [type(error) for error in caught.value.errors] == [Stop]
    assert str(caught.value).endswith("functions that ran after it failed: Stop: no printer")
    assert in_memory(conversation) == (stored(conversation), set())
    assert conversation.stage is Stage.STALLED
    assert (fired(told), fired(others)) == (["stall"], ["stall"])


# -- registering -------------------------------------------------------------------------------------------------------


def test_a_removed_hook_runs_no_more_and_removing_it_again_is_harmless(
    conversation_in: ConversationIn, hook: Register, told: list[StageChange]
) -> None:
    seen = []
    first = hook(on_enter, Stage.STALLED, Stage.CLOSED_LOST)(lambda conversation, change: seen.append("first"))
    hook(on_enter, Stage.STALLED)(lambda conversation, change: seen.append("second"))
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.stall()
    first.remove()
    first.remove()
    conversation.resume()
    conversation.stall()
    conversation.close_lost("no answer")
    assert seen == ["first", "second", "second"]


def test_a_registered_function_stays_itself(hook: Register) -> None:
    def order_site(conversation: Any, change: Any) -> tuple[Any, Any]:
        """Order it."""
        return conversation, change

    registered = hook(on_enter, "BUILDING", Stage.BUILDING)(order_site)
    assert registered(1, 2) == (1, 2)
    assert (registered.__name__, registered.__doc__) == ("order_site", "Order it.")  # type: ignore[attr-defined]
    assert registered.function is order_site


def test_a_stage_named_twice_runs_the_hook_once(conversation_in: ConversationIn, hook: Register) -> None:
    seen = []
    hook(on_enter, "STALLED", Stage.STALLED)(lambda conversation, change: seen.append(change))
    conversation_in(Stage.STALLED)
    assert len(seen) == 1


def test_a_hook_needs_a_stage_that_exists() -> None:
    with pytest.raises(TypeError, match=r"name at least one stage, as in @on_enter\(Stage\.BUILDING\)"):
        close_engine.on_enter()
    with pytest.raises(ValueError, match="'WON' is not a valid Stage"):
        close_engine.on_exit("WON")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"<function fail at .* is not a valid Stage"):
        close_engine.after_commit(fail)  # type: ignore[arg-type]  # the parentheses were forgotten
