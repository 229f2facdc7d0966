"""What the system that this one replaces got wrong, each of which is impossible here."""

from __future__ import annotations

import subprocess
import sys
import threading

import peewee
import pytest

from close_engine import (
    ACTIVE_STAGES,
    TRANSITIONS,
    AutonomyLevel,
    CloseEngineConversation,
    ConversationCompleted,
    EntryPoint,
    GuardRefused,
    KeyReused,
    Lead,
    LeadHasNoPhone,
    Stage,
    StageAssignmentRefused,
    StageChange,
    TransitionNotAllowed,
    open_conversation,
)
from close_engine.testing import bring_to, new_lead
from tests.rows import copy_of, in_memory, stored, triggers

ARGUMENTS = {
    "send_payment_link": {"payment_link_url": "https://pay.example.com/1"},
    "close_lost": {"reason": "no answer"},
}


def write_stage(database, conversation, stage):
    """What the stall job and the payment webhook did: past every rule."""
    write = f"UPDATE close_engine_conversations SET stage = {database.param} WHERE id = {database.param}"
    database.execute_sql(write, (stage.value, conversation.id))


def test_01_an_invalid_transition_cannot_be_overlooked(conversation_in):
    """It was logged and skipped: the caller went on as if it had happened."""
    conversation = conversation_in(Stage.QUALIFYING)
    before, went_on = in_memory(conversation), []

    def caller():
        conversation.send_preview()
        went_on.append("sent a preview link")

    with pytest.raises(TransitionNotAllowed, match="is QUALIFYING, from where send_preview is not allowed"):
        caller()
    assert went_on == []
    assert in_memory(conversation) == (stored(conversation), set()) == before


@pytest.mark.parametrize(
    ("stage", "leave_by"), [(Stage.COMPLETED, []), (Stage.CLOSED_LOST, ["complete", "reopen"])], ids=str
)
def test_02_a_terminal_stage_is_left_only_as_the_table_says(database, conversation_in, stage, leave_by):
    """Terminal stages were missing from the table, so any move out of them passed."""
    conversation = conversation_in(stage)
    for trigger in [transition.trigger for transition in TRANSITIONS if transition.trigger not in leave_by]:
        with pytest.raises(TransitionNotAllowed):
            conversation.fire(trigger, **ARGUMENTS.get(trigger, {}))
    allowed = {dest for transition in TRANSITIONS if transition.trigger in leave_by for dest in transition.dests}
    for dest in set(Stage) - allowed - {stage}:
        with pytest.raises(peewee.IntegrityError):
            write_stage(database, conversation, dest)
    assert stored(conversation)["stage"] is stage


def test_03_writing_the_stage_directly_is_refused_in_python_and_guarded_and_recorded_in_sql(database, conversation_in):
    """The stall job and the payment webhook wrote it: no validation, no history."""
    conversation = conversation_in(Stage.BUILDING)
    with pytest.raises(StageAssignmentRefused, match=r"call stall\(\)"):
        conversation.stage = Stage.STALLED
    with pytest.raises(StageAssignmentRefused, match="fire a trigger"):
        CloseEngineConversation.update(stage=Stage.STALLED)
    with pytest.raises(peewee.IntegrityError):
        write_stage(database, conversation, Stage.PAYMENT_SENT)
    assert triggers(conversation) == ["open", "start_qualifying", "start_building"]
    write_stage(database, conversation, Stage.STALLED)
    change = conversation.history()[-1]
    assert (change.trigger, change.source, change.dest) == ("stall", Stage.BUILDING, Stage.STALLED)
    assert change.actor.startswith("database")
    assert stored(conversation)["stalled_at"] is not None


@pytest.mark.parametrize("late_in", [Stage.STALLED, Stage.CLOSED_LOST, Stage.EDIT_LOOP])
def test_04_a_payment_is_taken_whatever_the_stage_is(conversation_in, late_in):
    """A payment that arrived while STALLED was ignored."""
    conversation = conversation_in(Stage.PREVIEW_SENT)
    with pytest.raises(GuardRefused, match="no payment link was sent"):
        conversation.complete()
    conversation.send_payment_link("https://pay.example.com/1")
    if late_in is Stage.EDIT_LOOP:  # lost, reopened, and at work again when the old link is paid
        conversation.close_lost("no answer")
        conversation.reopen()
        bring_to(conversation, late_in)
    else:
        conversation.fire("stall" if late_in is Stage.STALLED else "close_lost", reason="no answer")
    assert conversation.stage is late_in
    change = conversation.complete(actor="payments", key="evt_1")
    assert (change.source, change.dest) == (late_in, Stage.COMPLETED)
    assert conversation.completed_at is not None


@pytest.mark.parametrize("stage", ACTIVE_STAGES)
def test_08_every_active_stage_can_stall_and_is_resumed_where_it_was(conversation_in, stage):
    """STALLED could be left only to QUALIFYING; nothing triggered it; stalledAt was never cleared."""
    conversation = conversation_in(stage)
    conversation.stall(actor="timer")
    assert (conversation.stage, conversation.stalled_at) == (Stage.STALLED, conversation.updated_at)
    conversation.resume()
    assert (conversation.stage, conversation.stalled_at) == (stage, None)
    assert in_memory(conversation) == (stored(conversation), set())


OPEN_AND_HANG = """
import sys
import close_engine

close_engine.connect(sys.argv[1])

@close_engine.on_enter(close_engine.Stage.INITIATED)
def hang(conversation, change):
    assert conversation.history() == [change]
    print("opening", flush=True)
    sys.stdin.read()

close_engine.open_conversation(sys.argv[2], "SMS_REPLY")
"""


@pytest.mark.parametrize("kind", ["postgresql", "sqlite-file"])
def test_09_a_worker_killed_while_it_opens_a_conversation_leaves_nothing_behind(database, database_url):
    """Four rows were written without a transaction: a crash left INITIATED for ever, which could not stall."""
    lead = new_lead()
    database.close()
    worker = subprocess.Popen(
        [sys.executable, "-c", OPEN_AND_HANG, database_url, lead.id],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with worker:
        assert worker.stdout.readline() == "opening\n"
        worker.kill()
    assert worker.returncode == -9

    def left():
        return [
            CloseEngineConversation.select().count(),
            StageChange.select().count(),
            Lead.get_by_id(lead.id).close_entry_point,
        ]

    assert left() == [0, 0, None]
    conversation = open_conversation(lead, EntryPoint.SMS_REPLY)
    assert left() == [1, 1, EntryPoint.SMS_REPLY]
    conversation.stall()
    conversation.resume()
    assert conversation.stage is Stage.INITIATED


@pytest.mark.parametrize("kind", ["postgresql", "sqlite-file"])
def test_10_two_entry_points_at_once_open_one_conversation(database):
    """They opened two, or failed with a unique-key error."""
    lead = new_lead()
    barrier = threading.Barrier(2)
    opened = []

    def enter(entry_point):
        barrier.wait(60)
        opened.append(open_conversation(lead.id, entry_point))
        database.close()

    entering = [threading.Thread(target=enter, args=(point,)) for point in (EntryPoint.SMS_REPLY, EntryPoint.REP_CLOSE)]
    for thread in entering:
        thread.start()
    for thread in entering:
        thread.join()
    first, second = opened
    assert in_memory(first) == in_memory(second)
    assert triggers(first) == ["open"]
    assert Lead.get_by_id(lead.id).close_entry_point is first.entry_point


def test_11_reopening_a_lost_lead_keeps_its_conversation_and_its_past(conversation_in):
    """It deleted the old conversation and its past."""
    conversation = conversation_in(Stage.CLOSED_LOST)
    conversation.collected_data = {"hours": "9-5"}
    conversation.save()
    past = conversation.history()
    again = open_conversation(conversation.lead_id, EntryPoint.SMS_REPLY)
    assert (again.id, again.stage, again.collected_data) == (conversation.id, Stage.INITIATED, {"hours": "9-5"})
    assert [change.__data__ for change in again.history()[:-1]] == [change.__data__ for change in past]
    assert past[-1].reason == "no answer"


def test_15_a_webhook_that_is_delivered_again_changes_nothing(conversation_in):
    """Webhook retries (payment, inbound SMS) were processed again."""
    lead = new_lead(autonomy_level=AutonomyLevel.FULL_AUTO)

    def inbound_sms(sid):
        return open_conversation(lead.id, EntryPoint.SMS_REPLY, key=sid)

    def payment(event):
        return copy_of(conversation).complete(actor="payments", key=event)

    conversation = inbound_sms("SM1")
    conversation.close_lost("no answer")
    assert inbound_sms("SM1").stage is Stage.CLOSED_LOST, "an old message does not reopen it"
    assert inbound_sms("SM2").stage is Stage.INITIATED
    bring_to(copy_of(conversation), Stage.PAYMENT_SENT)
    paid = payment("evt_1")
    row, history = stored(conversation), triggers(conversation)
    assert payment("evt_1").__data__ == paid.__data__
    assert inbound_sms("SM2").stage is Stage.COMPLETED
    assert (stored(conversation), triggers(conversation)) == (row, history)
    with pytest.raises(TransitionNotAllowed, match="COMPLETED is final"):
        payment("evt_2")
    with pytest.raises(ConversationCompleted):
        inbound_sms("SM3")
    with pytest.raises(KeyReused):
        copy_of(conversation).fire("stall", key="evt_1")


@pytest.mark.parametrize("phone", [None, "", "   "])
def test_18_a_lead_without_a_phone_number_is_refused_with_a_sentence(database, phone):
    """It crashed the opening."""
    lead = new_lead(phone)
    with pytest.raises(LeadHasNoPhone, match=r"has no phone number, .* add one first"):
        open_conversation(lead, EntryPoint.SMS_REPLY)
    assert CloseEngineConversation.select().count() == StageChange.select().count() == 0
    Lead.update(phone="+15550100").execute()
    assert open_conversation(lead, EntryPoint.SMS_REPLY).stage is Stage.INITIATED
