"""What the system that this one replaces got wrong about drafts, messages and webhooks, each impossible here."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta

import pytest

import close_engine
from close_engine import (
    ActionDecided,
    ActionStatus,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    EntryPoint,
    Lead,
    MessageStatus,
    Stage,
    StageConflict,
    expire_actions,
    outbox,
    pending_actions,
    receive,
    record_payment,
    submit,
)
from close_engine.testing import new_lead
from tests.rows import triggers
from tests.workers import LINK, assert_consistent, copy_of, messages, race, sql, values

on_disk = pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"], indirect=True)

REJECT = {
    "by a human": lambda action: action.reject(by="dana", reason="too early"),
    "by the CRM's own screen": lambda action: sql(
        "UPDATE pending_actions SET status = 'REJECTED', approved_by = 'dana' WHERE id = %s", action.id
    ),
}


@pytest.fixture
def waiting_link(conversation_in):
    """A payment link that waits for approval."""
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.SEMI_AUTO)
    return submit(conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK})


def conversation_of(action):
    return CloseEngineConversation.get_by_id(action.conversation_id)


def in_a_process_that_dies(url, *lines):
    """Run lines of Python in a process of their own, which is killed at their end as by a power cut."""
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
    died = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert died.returncode == -9, died.stderr


@pytest.mark.parametrize("by", list(REJECT))
def test_05_a_rejected_approval_takes_the_conversation_on(waiting_link, by):
    """It left the conversation in PENDING_APPROVAL for good."""
    assert conversation_of(waiting_link).stage is Stage.PENDING_APPROVAL
    REJECT[by](waiting_link)
    conversation = conversation_of(waiting_link)
    assert conversation.stage is Stage.PREVIEW_SENT
    assert triggers(conversation)[-2:] == ["request_approval", "withdraw_approval"]
    again = submit(conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK})
    assert again.status is ActionStatus.PENDING
    assert conversation.stage is Stage.PENDING_APPROVAL


def test_06_an_expired_draft_cannot_be_approved(waiting_link, close_engine_clock):
    """`expiresAt` existed and nobody read it: expired drafts could be approved for ever."""
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


def test_07_two_clicks_on_approve_send_one_payment_link(waiting_link, fake_sender, close_engine_clock):
    """They sent two."""
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


@on_disk
def test_12_a_delayed_message_outlives_the_process_that_delayed_it(
    database, database_url, fake_sender, close_engine_clock
):
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
def test_13_a_message_is_recorded_before_it_is_sent(database, database_url, fake_sender, close_engine_clock):
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
    conversation_in, fake_sender, close_engine_clock
):
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
    outbox.requeue(message)
    fake_sender.deliver()
    close_engine_clock.move(timedelta(hours=2))
    fake_sender.deliver()
    assert [sent.body for sent in fake_sender.sent] == ["Hello!"]
    assert copy_of(conversation).stage is Stage.QUALIFYING


def test_15_a_webhook_of_a_text_or_a_payment_that_comes_again_changes_nothing(conversation_in, close_engine_clock):
    """Webhook retries (payment, inbound SMS) were processed again."""
    conversation = conversation_in(Stage.PAYMENT_SENT)
    conversation.stall()
    assert receive(conversation.lead_id, "SM1", "I'm back").answer
    copy_of(conversation).stall()
    assert not receive(conversation.lead_id, "SM1", "I'm back").answer
    assert copy_of(conversation).stage is Stage.STALLED, "an old text does not resume it"
    paid = record_payment(conversation.lead_id, "evt_1")
    before = values(copy_of(conversation)), triggers(conversation)
    close_engine_clock.move(timedelta(days=1))
    assert values(record_payment(conversation.lead_id, "evt_1")) == values(paid)
    assert receive(conversation.lead_id, "SM1", "I'm back").duplicate
    assert (values(copy_of(conversation)), triggers(conversation)) == before


@on_disk
def test_16_of_two_replies_to_one_state_one_is_submitted_and_one_message_is_in_flight(database):
    """Two replies for one conversation were produced and sent at the same time."""
    for level in (AutonomyLevel.FULL_AUTO, AutonomyLevel.MANUAL):
        conversation = close_engine.open_conversation(new_lead(autonomy_level=level), EntryPoint.SMS_REPLY)
        replies = [copy_of(conversation) for _ in range(4)]
        results = race(
            [lambda r=reply: submit(r, ActionType.SEND_MESSAGE, f"reply {id(r)}") for reply in replies],
        )
        assert sorted(type(result) is StageConflict for result in results) == [False, True, True, True]
        assert len(messages(conversation)) + pending_actions(conversation).count() == 1
    for text in ("second", "third"):
        outbox.enqueue(messages()[0].conversation_id, "SEND_MESSAGE", text)
    claims = race([outbox.claim] * 4)
    assert sorted(len(claim) for claim in claims) == [0, 0, 0, 1]
    assert_consistent()


@on_disk
def test_17_concurrent_answers_are_all_kept(database):
    """`questionsAsked` and `collectedData` were read, changed and written back: answers overwrote each other."""
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    answers = [(copy_of(conversation), f"question {number}") for number in range(6)]
    assert race([lambda c=c, q=q: c.record(questions=[q], data={q: "answer"}) for c, q in answers]) == [None] * 6
    row = copy_of(conversation)
    asked = [question for _, question in answers]
    assert sorted(row.questions_asked) == asked
    assert row.collected_data == Lead.get_by_id(row.lead_id).qualification_data == dict.fromkeys(asked, "answer")
