"""The known failures of the system that this library replaces, in the order of its audits: none can happen here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    ACTIVE_STAGES,
    TRANSITIONS,
    ActionDecided,
    ActionStatus,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    ConditionNotMet,
    ConversationCompleted,
    EntryPoint,
    KeyReused,
    Lead,
    LeadHasNoPhone,
    MessageStatus,
    OutboxMessage,
    PendingAction,
    Stage,
    StageAssignmentRefused,
    StageChange,
    StageConflict,
    TransitionNotAllowed,
    expire_actions,
    open_conversation,
    outbox,
    pending_actions,
    receive,
    record_payment,
    submit,
)
from close_engine.testing import FakeSender, MovableClock, bring_to, new_lead
from tests.command_line import background
from tests.rows import copy_of, in_memory, stored, triggers
from tests.waiting import LIMIT
from tests.workers import LINK, assert_consistent, held, messages, race, sql, values

ConversationIn = Callable[..., CloseEngineConversation]

ARGUMENTS: dict[str, dict[str, Any]] = {
    "send_payment_link": {"payment_link_url": "https://pay.example.com/1"},
    "close_lost": {"reason": "no answer"},
}


def write_stage(database: peewee.Database, conversation: CloseEngineConversation, stage: Stage) -> None:
    """Write the stage as the stall job and the payment webhook did, bypassing every rule."""
    write = f"UPDATE close_engine_conversations SET stage = {database.param} WHERE id = {database.param}"
    database.execute_sql(write, (stage.value, conversation.id))


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


on_disk = pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"], indirect=True)


REJECT = {
    "by a human": lambda action: action.reject(by="dana", reason="too early"),
    "by the CRM's own screen": lambda action: sql(
        "UPDATE pending_actions SET status = 'REJECTED', approved_by = 'dana' WHERE id = %s", action.id
    ),
}


@pytest.fixture
def waiting_link(conversation_in: ConversationIn) -> PendingAction:
    """A payment link that waits for approval."""
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.SEMI_AUTO)
    link = submit(conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK})
    assert isinstance(link, PendingAction)
    return link


def conversation_of(action: PendingAction) -> CloseEngineConversation:
    return CloseEngineConversation.get_by_id(action.conversation_id)


def in_a_process_that_dies(url: str, *lines: str) -> None:
    """Run lines of Python in their own process, and kill it when they end, like a power failure."""
    code = "\n".join(
        [
            "import os, signal",
            "from datetime import timedelta",
            "from close_engine import *",
            f"connect({url!r})",
            *lines,
            "os.kill(os.getpid(), signal.SIGKILL)",
        ]
    )
    died = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert died.returncode == -9, died.stderr


def test_01_an_invalid_transition_cannot_be_overlooked(conversation_in: ConversationIn) -> None:
    """It was logged and skipped, so the caller went on as if it had happened."""
    conversation = conversation_in(Stage.QUALIFYING)
    before, went_on = in_memory(conversation), []

    def caller() -> None:
        conversation.send_preview()
        went_on.append("sent a preview link")

    with pytest.raises(TransitionNotAllowed, match="is QUALIFYING, and send_preview is not allowed from there"):
        caller()
    assert went_on == []
    assert in_memory(conversation) == (stored(conversation), set()) == before


@pytest.mark.parametrize(
    ("stage", "leave_by"), [(Stage.COMPLETED, []), (Stage.CLOSED_LOST, ["complete", "reopen"])], ids=str
)
def test_02_a_terminal_stage_is_left_only_as_the_table_says(
    database: peewee.Database, conversation_in: ConversationIn, stage: Stage, leave_by: list[str]
) -> None:
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


def test_03_writing_the_stage_directly_is_refused_in_python_and_guarded_and_recorded_in_sql(
    database: peewee.Database, conversation_in: ConversationIn
) -> None:
    """The stall job and the payment webhook wrote the stage directly, without validation or history."""
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
def test_04_a_payment_is_taken_whatever_the_stage_is(conversation_in: ConversationIn, late_in: Stage) -> None:
    """A payment that arrived while STALLED was ignored."""
    conversation = conversation_in(Stage.PREVIEW_SENT)
    with pytest.raises(ConditionNotMet, match="no payment link was sent"):
        conversation.complete()
    conversation.send_payment_link("https://pay.example.com/1")
    if late_in is Stage.EDIT_LOOP:  # lost, reopened and in progress again when the old link is paid
        conversation.close_lost("no answer")
        conversation.reopen()
        bring_to(conversation, late_in)
    else:
        conversation.fire("stall" if late_in is Stage.STALLED else "close_lost", reason="no answer")
    assert conversation.stage is late_in
    change = conversation.complete(actor="payments", key="evt_1")
    assert (change.source, change.dest) == (late_in, Stage.COMPLETED)
    assert conversation.completed_at is not None


@pytest.mark.parametrize("by", list(REJECT))
def test_05_a_rejected_approval_takes_the_conversation_on(waiting_link: PendingAction, by: str) -> None:
    """A rejection left the conversation in PENDING_APPROVAL for good."""
    assert conversation_of(waiting_link).stage is Stage.PENDING_APPROVAL
    REJECT[by](waiting_link)
    conversation = conversation_of(waiting_link)
    assert conversation.stage is Stage.PREVIEW_SENT
    assert triggers(conversation)[-2:] == ["request_approval", "withdraw_approval"]
    again = submit(conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK})
    assert again.status is ActionStatus.PENDING
    assert conversation.stage is Stage.PENDING_APPROVAL  # type: ignore[comparison-overlap]


def test_06_an_expired_draft_cannot_be_approved(waiting_link: PendingAction, close_engine_clock: MovableClock) -> None:
    """`expiresAt` existed but nothing read it: expired drafts could be approved for ever."""
    assert waiting_link.expires_at is not None
    close_engine_clock.now = waiting_link.expires_at
    assert waiting_link.status is ActionStatus.EXPIRED
    assert list(pending_actions()) == []
    with pytest.raises(ActionDecided, match="is EXPIRED, so it is too late to approve it"):
        waiting_link.approve(by="dana")
    assert expire_actions() == [waiting_link.id]
    with pytest.raises(ActionDecided, match="is EXPIRED, so it is too late to approve it"):
        copy_of(waiting_link).approve(by="dana")
    assert messages() == []
    assert conversation_of(waiting_link).stage is Stage.PREVIEW_SENT


def test_07_two_clicks_on_approve_send_one_payment_link(
    waiting_link: PendingAction, fake_sender: FakeSender, close_engine_clock: MovableClock
) -> None:
    """Two payment links were sent."""
    clicks = [copy_of(waiting_link), copy_of(waiting_link)]
    first, second = (click.approve(by="dana") for click in clicks)
    sql("UPDATE pending_actions SET status = 'APPROVED' WHERE id = %s", waiting_link.id)
    assert values(first) == values(second)
    fake_sender.deliver()
    assert copy_of(waiting_link).approve(by="dana").status is MessageStatus.SENT
    close_engine_clock.move(timedelta(days=1))
    fake_sender.deliver()
    assert [message.body for message in fake_sender.sent] == ["pay"]
    assert conversation_of(waiting_link).stage is Stage.PAYMENT_SENT


@pytest.mark.parametrize("stage", ACTIVE_STAGES)
def test_08_every_active_stage_can_stall_and_is_resumed_where_it_was(
    conversation_in: ConversationIn, stage: Stage
) -> None:
    """STALLED could be left only to QUALIFYING; nothing triggered it; stalledAt was never cleared."""
    conversation = conversation_in(stage)
    conversation.stall(actor="timer")
    assert (conversation.stage, conversation.stalled_at) == (Stage.STALLED, conversation.history()[-1].created_at)
    conversation.resume()
    # Nothing waits for approval.
    expected = Stage.PREVIEW_SENT if stage is Stage.PENDING_APPROVAL else stage
    assert (conversation.stage, conversation.stalled_at) == (expected, None)
    assert in_memory(conversation) == (stored(conversation), set())


@pytest.mark.parametrize("kind", ["postgresql", "sqlite-file"])
def test_09_a_worker_killed_while_it_opens_a_conversation_leaves_nothing_behind(
    database: peewee.Database, database_url: str
) -> None:
    """Four rows were written without a transaction: a crash left INITIATED for ever, which could not stall."""
    lead = new_lead()
    database.close()
    command = [sys.executable, "-c", OPEN_AND_HANG, database_url, lead.id]
    with background(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout.readline() == "opening\n"
        worker.kill()
    assert worker.returncode == -9

    def left() -> list[Any]:
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
def test_10_two_entry_points_at_once_open_one_conversation(database: peewee.Database) -> None:
    """Two conversations were opened, or the second attempt failed with a unique-key error."""
    lead = new_lead()
    first, second = race(
        [
            lambda point=point: open_conversation(lead.id, point)
            for point in (EntryPoint.SMS_REPLY, EntryPoint.REP_CLOSE)
        ],
        behind=held(lead),
    )
    assert in_memory(first) == in_memory(second)
    assert triggers(first) == ["open"]
    assert Lead.get_by_id(lead.id).close_entry_point is first.entry_point


def test_11_reopening_a_lost_lead_keeps_its_conversation_and_its_past(conversation_in: ConversationIn) -> None:
    """Reopening deleted the old conversation and its history."""
    conversation = conversation_in(Stage.CLOSED_LOST)
    conversation.collected_data = {"hours": "9-5"}
    conversation.save()
    past = conversation.history()
    again = open_conversation(conversation.lead_id, EntryPoint.SMS_REPLY)
    assert (again.id, again.stage, again.collected_data) == (conversation.id, Stage.INITIATED, {"hours": "9-5"})
    assert [change.__data__ for change in again.history()[:-1]] == [change.__data__ for change in past]
    assert past[-1].reason == "no answer"


@on_disk
def test_12_a_delayed_message_outlives_the_process_that_delayed_it(
    database: peewee.Database, database_url: str, fake_sender: FakeSender, close_engine_clock: MovableClock
) -> None:
    """Delayed messages lived in process memory (`setTimeout`): a restart lost them."""
    lead = new_lead()
    in_a_process_that_dies(
        database_url,
        f"conversation = open_conversation({lead.id!r}, EntryPoint.SMS_REPLY)",
        "submit(conversation, ActionType.SEND_MESSAGE, 'Hello!', send_after=timedelta(hours=1))",
    )
    assert fake_sender.deliver() == 0
    close_engine_clock.now = messages()[0].available_at
    fake_sender.deliver()
    assert [message.body for message in fake_sender.sent] == ["Hello!"]
    assert Lead.get_by_id(lead.id).close_conversation.stage is Stage.QUALIFYING


@on_disk
def test_13_a_message_is_recorded_before_it_is_sent(
    database: peewee.Database, database_url: str, fake_sender: FakeSender, close_engine_clock: MovableClock
) -> None:
    """Messages were recorded after they were sent: a database error after the send lost them."""
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    message = submit(conversation, ActionType.SEND_MESSAGE, "Hello!")
    in_a_process_that_dies(
        database_url,
        "(message,) = outbox.claim(lease=timedelta(minutes=1), worker='doomed')",
        "sent_by_the_provider_under = message.send_key",
    )
    assert (copy_of(message).status, copy_of(message).leased_by) == (MessageStatus.PENDING, "doomed")
    close_engine_clock.now = copy_of(message).available_at
    fake_sender.deliver()
    (again,) = fake_sender.sent
    assert (again.id, again.send_key, again.attempts) == (message.id, message.send_key, 2)
    assert copy_of(message).status is MessageStatus.SENT
    assert copy_of(conversation).stage is Stage.QUALIFYING


def test_14_a_message_that_cannot_be_sent_now_is_kept_and_one_that_never_can_be_is_shown(
    conversation_in: ConversationIn, fake_sender: FakeSender, close_engine_clock: MovableClock
) -> None:
    """With the queue's server down, messages were dropped silently."""
    conversation = conversation_in(Stage.INITIATED)
    message = submit(conversation, ActionType.SEND_MESSAGE, "Hello!")
    fake_sender.failures = [ConnectionError("the server is down")] * (message.max_attempts + 1)
    for _ in range(message.max_attempts):
        fake_sender.deliver()
        assert copy_of(message).last_error == "ConnectionError: the server is down"
        close_engine_clock.move(timedelta(hours=2))
    assert copy_of(message).status is MessageStatus.DEAD
    assert copy_of(conversation).stage is Stage.INITIATED
    assert isinstance(message, OutboxMessage)
    outbox.requeue(message)
    fake_sender.deliver()
    close_engine_clock.move(timedelta(hours=2))
    fake_sender.deliver()
    assert [sent.body for sent in fake_sender.sent] == ["Hello!"]
    assert copy_of(conversation).stage is Stage.QUALIFYING


def test_15_a_webhook_of_a_text_or_a_payment_that_comes_again_changes_nothing(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    """Webhook retries (payment, inbound SMS) were processed again."""
    conversation = conversation_in(Stage.PAYMENT_SENT)
    conversation.stall()
    assert receive(conversation.lead_id, "SM1", "I'm back").answer
    copy_of(conversation).stall()
    assert not receive(conversation.lead_id, "SM1", "I'm back").answer
    assert copy_of(conversation).stage is Stage.STALLED, "an old text does not resume it"
    paid = record_payment(conversation.lead_id, "evt_1").completed
    before = values(copy_of(conversation)), triggers(conversation)
    close_engine_clock.move(timedelta(days=1))
    assert values(record_payment(conversation.lead_id, "evt_1").completed) == values(paid)
    assert receive(conversation.lead_id, "SM1", "I'm back").duplicate
    assert (values(copy_of(conversation)), triggers(conversation)) == before


def test_15_a_webhook_that_is_delivered_again_changes_nothing(conversation_in: ConversationIn) -> None:
    """Webhook retries (payment, inbound SMS) were processed again."""
    lead = new_lead(autonomy_level=AutonomyLevel.FULL_AUTO)

    def inbound_sms(sid: str) -> CloseEngineConversation:
        return open_conversation(lead.id, EntryPoint.SMS_REPLY, key=sid)

    def payment(event: str) -> StageChange:
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


@on_disk
def test_16_of_two_replies_to_one_state_one_is_submitted_and_one_message_is_in_flight(
    database: peewee.Database,
) -> None:
    """Two replies for one conversation were produced and sent at the same time."""
    for level in (AutonomyLevel.FULL_AUTO, AutonomyLevel.MANUAL):
        conversation = close_engine.open_conversation(new_lead(autonomy_level=level), EntryPoint.SMS_REPLY)
        replies = [copy_of(conversation) for _ in range(4)]
        results = race(
            [lambda r=reply: submit(r, ActionType.SEND_MESSAGE, f"reply {id(r)}") for reply in replies],
            behind=held(conversation),
        )
        assert sorted(type(result) is StageConflict for result in results) == [False, True, True, True]
        assert len(messages(conversation)) + pending_actions(conversation).count() == 1
    for text in ("second", "third"):
        outbox.enqueue(messages()[0].conversation_id, "SEND_MESSAGE", text)
    claims = race([outbox.claim] * 4)  # which wait for nobody: this holds however they overlap
    assert sorted(len(claim) for claim in claims) == [0, 0, 0, 1]
    assert_consistent()


@on_disk
def test_17_concurrent_answers_are_all_kept(database: peewee.Database) -> None:
    """`questionsAsked` and `collectedData` were read, changed and written back: answers overwrote each other."""
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    answers = [(copy_of(conversation), f"question {number}") for number in range(6)]
    recorders = [lambda c=c, q=q: c.record(questions=[q], data={q: "answer"}) for c, q in answers]
    assert race(recorders, behind=held(conversation)) == [None] * 6
    row = copy_of(conversation)
    asked = [question for _, question in answers]
    assert sorted(row.questions_asked) == asked
    assert row.collected_data == Lead.get_by_id(row.lead_id).qualification_data == dict.fromkeys(asked, "answer")


@pytest.mark.parametrize("phone", [None, "", "   "])
def test_18_a_lead_without_a_phone_number_is_refused_with_a_sentence(
    database: peewee.Database, phone: str | None
) -> None:
    """Opening a conversation for such a lead crashed."""
    lead = new_lead(phone)
    with pytest.raises(LeadHasNoPhone, match=r"has no phone number, .* add one first"):
        open_conversation(lead, EntryPoint.SMS_REPLY)
    assert CloseEngineConversation.select().count() == StageChange.select().count() == 0
    Lead.update(phone="+15550100").execute()
    assert open_conversation(lead, EntryPoint.SMS_REPLY).stage is Stage.INITIATED
