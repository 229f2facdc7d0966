"""Whatever happens, in any order: an object equals its row or is known to be stale, and the history is complete."""

from __future__ import annotations

from typing import Any

import peewee
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from close_engine import (
    ACTIVE_STAGES,
    TRANSITIONS,
    CloseEngineConversation,
    ConversationNotFound,
    EntryPoint,
    Stage,
    StageChange,
    StageConflict,
    TransitionRefused,
    atomic,
    open_conversation,
)
from close_engine.machine import pairs
from close_engine.testing import new_lead
from tests.rows import Stop, copy_of, in_memory, replayed

ALLOWED = {(source, dest) for _, source, dest in pairs()}
TRIGGERS = st.sampled_from([transition.trigger for transition in TRANSITIONS])
ARGUMENTS: dict[str, dict[str, Any]] = {
    "send_payment_link": {"payment_link_url": "https://pay.example.com/1"},
    "close_lost": {"reason": "no answer"},
}
FIELDS = st.sampled_from(["collected_data", "questions_asked"])
VALUES = st.one_of(st.none(), st.lists(st.integers(0, 9), max_size=2), st.text("aé😀", max_size=2))


class Conversations(RuleBasedStateMachine):
    """One conversation, held by one worker while others write."""

    database: peewee.Database

    @initialize()
    def open(self) -> None:
        self.lead = new_lead()
        self.conversation = open_conversation(self.lead, EntryPoint.SMS_REPLY)
        self.stale = self.deleted = False
        self.keys: dict[str, StageChange] = {}

    def fire(self, trigger: str, key: str | None = None) -> StageChange | None:
        """Fire, and check that the outcome is the expected one."""
        conversation, arguments = self.conversation, ARGUMENTS.get(trigger, {})
        before = in_memory(conversation)
        error: type[Exception]
        if not conversation.may(trigger, **arguments):
            error = TransitionRefused
        elif self.stale:
            error = ConversationNotFound if self.deleted else StageConflict
        else:
            change = conversation.fire(trigger, key=key, **arguments)
            assert (change.source, change.dest, change.trigger) == (before[0]["stage"], conversation.stage, trigger)
            return change
        with pytest.raises(error):
            conversation.fire(trigger, key=key, **arguments)
        assert in_memory(conversation) == before
        return None

    @rule(trigger=TRIGGERS)
    def fire_a_trigger(self, trigger: str) -> None:
        self.fire(trigger)

    @rule(data=st.data())
    def fire_an_allowed_trigger(self, data: st.DataObject) -> None:
        if allowed := self.conversation.allowed_triggers():
            self.fire(data.draw(st.sampled_from(allowed)))

    @rule(trigger=TRIGGERS)
    def fire_with_a_key(self, trigger: str) -> None:
        if trigger not in self.keys:
            if change := self.fire(trigger, key=trigger):
                self.keys[trigger] = change
            return
        before = in_memory(self.conversation)
        again = self.conversation.fire(trigger, key=trigger, **ARGUMENTS.get(trigger, {}))
        assert again.__data__ == self.keys[trigger].__data__
        assert in_memory(self.conversation) == before

    @rule(
        before=st.lists(TRIGGERS, max_size=3),
        inside=st.lists(TRIGGERS, max_size=3),
        ways=st.tuples(*[st.booleans()] * 3),
    )
    def fire_in_blocks_that_are_undone(
        self, before: list[str], inside: list[str], ways: tuple[bool, bool, bool]
    ) -> None:
        """Fire in a savepoint in a transaction. Each is left by an error, rolled back or kept."""
        undo_all, undo_savepoint, by_error = ways
        unchanged = in_memory(self.conversation)
        keys = dict(self.keys)

        def undo(block: atomic) -> None:
            if by_error:
                raise Stop
            block.rollback()

        try:
            with atomic() as transaction:
                for trigger in before:
                    self.fire(trigger)
                at_savepoint = in_memory(self.conversation)
                try:
                    with atomic() as savepoint:
                        for trigger in inside:
                            self.fire_with_a_key(trigger)
                        if not self.stale:
                            self.save()
                        if undo_savepoint:
                            undo(savepoint)
                except Stop:
                    pass
                if undo_savepoint:
                    self.keys = dict(keys)
                    assert in_memory(self.conversation) == at_savepoint
                if undo_all:
                    undo(transaction)
        except Stop:
            pass
        if undo_all:
            self.keys = keys
            assert in_memory(self.conversation) == unchanged

    @rule(field=FIELDS, value=VALUES)
    def assign(self, field: str, value: object) -> None:
        setattr(self.conversation, field, value)

    @rule()
    def save(self) -> None:
        before = in_memory(self.conversation)
        if not self.conversation.is_dirty():
            assert self.conversation.save() == 0
        elif self.stale:
            with pytest.raises(ConversationNotFound if self.deleted else StageConflict):
                self.conversation.save()
            assert in_memory(self.conversation) == before
        else:
            assert self.conversation.save() == 1
            assert not self.conversation.is_dirty()

    @precondition(lambda self: not self.deleted)
    @rule()
    def reload(self) -> None:
        self.conversation.reload()
        self.stale = False

    @precondition(lambda self: not self.deleted)
    @rule(data=st.data())
    def another_worker_fires(self, data: st.DataObject) -> None:
        other = copy_of(self.conversation)
        allowed = other.allowed_triggers()
        if allowed:
            trigger = data.draw(st.sampled_from(allowed))
            other.fire(trigger, **ARGUMENTS.get(trigger, {}))
            self.stale = True

    @precondition(lambda self: not self.deleted)
    @rule(stage=st.sampled_from(Stage), aside=st.booleans())
    def somebody_writes_sql(self, stage: Stage, aside: bool) -> None:
        """Write with or without a stage; the guard allows what the table allows, and resuming only where it stalled."""
        found = copy_of(self.conversation).stage
        mark = self.database.param
        write = "UPDATE close_engine_conversations SET edit_rounds = 7 WHERE id = " + mark
        values = [self.conversation.id]
        if not aside:
            write = f"UPDATE close_engine_conversations SET stage = {mark} WHERE id = {mark}"
            values.insert(0, stage.value)
        is_allowed = (found, stage) in ALLOWED
        if found is Stage.STALLED and stage in ACTIVE_STAGES:
            is_allowed = stage is self.stalled_in()
        if aside or stage is found or is_allowed:
            self.database.execute_sql(write, values)
            self.stale = True
        else:
            with pytest.raises(peewee.IntegrityError):
                self.database.execute_sql(write, values)

    def stalled_in(self) -> Stage:
        """Return where it stalled. Nothing is sent here, and nothing waits for approval."""
        source = next(change.source for change in reversed(self.conversation.history()) if change.trigger == "stall")
        assert source is not None
        return Stage.PREVIEW_SENT if source is Stage.PENDING_APPROVAL else Stage(source)

    @precondition(lambda self: not self.deleted)
    @rule()
    def somebody_deletes(self) -> None:
        CloseEngineConversation.delete_by_id(self.conversation.id)
        self.stale = self.deleted = True

    @precondition(lambda self: self.deleted)
    @rule()
    def open_again(self) -> None:
        deleted = self.conversation.id
        self.conversation = open_conversation(self.lead, EntryPoint.REP_CLOSE)
        assert self.conversation.id != deleted
        self.stale = self.deleted = False
        self.keys = {}

    @invariant()
    def the_object_equals_its_row_or_is_stale(self) -> None:
        row = CloseEngineConversation.get_or_none(CloseEngineConversation.id == self.conversation.id)
        assert (row is None) == self.deleted
        if row is not None:
            unsaved = self.conversation._dirty
            assert unsaved <= {"collected_data", "questions_asked"}
            held = {name: value for name, value in self.conversation.__data__.items() if name not in unsaved}
            there = {name: value for name, value in row.__data__.items() if name not in unsaved}
            assert (held == there) is not self.stale
            assert (self.conversation.updated_at == row.updated_at) is not self.stale

    @invariant()
    def the_history_leads_to_the_stored_stage(self) -> None:
        stage = replayed(self.conversation.id)
        if not self.deleted:
            assert stage is copy_of(self.conversation).stage


def test_memory_the_row_and_the_history_agree_whatever_happens(database: peewee.Database) -> None:
    Conversations.database = database
    run_state_machine_as_test(
        Conversations,
        settings=settings(
            max_examples=30,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
