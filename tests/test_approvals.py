"""Drafts are sent at once or wait for a human, who decides once; what follows from a decision follows at once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from datetime import timedelta, timezone
from typing import Any

import peewee
import psycopg2
import pytest

import close_engine
from close_engine import (
    ActionDecided,
    ActionNotFound,
    ActionStatus,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    ConditionNotMet,
    ConversationClosed,
    ConversationNotFound,
    EntryPoint,
    InvalidValue,
    MessageStatus,
    OutboxMessage,
    PendingAction,
    Stage,
    StageConflict,
    TransitionNotAllowed,
    needs_approval,
    outbox,
    pending_actions,
    submit,
)
from close_engine.database.fields import milliseconds
from close_engine.testing import FakeSender, MovableClock, bring_to, new_lead
from tests.rows import copy_of, triggers
from tests.waiting import Running, until_they_wait
from tests.workers import LINK, assert_consistent, claimed, held, messages, race, sql, values

ConversationIn = Callable[..., CloseEngineConversation]
Waiting = Callable[..., PendingAction]

# The table of the design, written down a second time.
SEND, APPROVE = False, True
AUTONOMY = {
    "FULL_AUTO": {"SEND_MESSAGE": SEND, "SEND_PREVIEW": SEND, "SEND_PAYMENT_LINK": SEND},
    "SEMI_AUTO": {"SEND_MESSAGE": SEND, "SEND_PREVIEW": SEND, "SEND_PAYMENT_LINK": APPROVE},
    "MANUAL": {"SEND_MESSAGE": APPROVE, "SEND_PREVIEW": APPROVE, "SEND_PAYMENT_LINK": APPROVE},
}
CELLS = [(level, type, asks) for level, row in AUTONOMY.items() for type, asks in row.items()]

# A stage that the message of each type is sent from, what it needs, and the stage once it is sent.
FROM = {"SEND_MESSAGE": Stage.INITIATED, "SEND_PREVIEW": Stage.BUILDING, "SEND_PAYMENT_LINK": Stage.PREVIEW_SENT}
NEEDS = {
    "SEND_MESSAGE": {},
    "SEND_PREVIEW": {"previewUrl": "https://p.example.com"},
    "SEND_PAYMENT_LINK": {"paymentUrl": LINK},
}
SENT = {"SEND_MESSAGE": Stage.QUALIFYING, "SEND_PREVIEW": Stage.PREVIEW_SENT, "SEND_PAYMENT_LINK": Stage.PAYMENT_SENT}


@pytest.fixture
def waiting(conversation_in: ConversationIn) -> Waiting:
    """A factory: an action that waits for approval."""

    def make(
        type: str = "SEND_PAYMENT_LINK", level: AutonomyLevel = AutonomyLevel.MANUAL, **options: Any
    ) -> PendingAction:
        conversation = conversation_in(FROM[type], autonomy_level=level)
        action = submit(conversation, ActionType(type), "the draft", metadata=NEEDS[type], **options)
        assert isinstance(action, PendingAction)
        return action

    return make


def conversation_of(action: PendingAction) -> CloseEngineConversation:
    return CloseEngineConversation.get_by_id(action.conversation_id)


# -- autonomy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "type", "asks"), CELLS)
def test_the_table_says_what_a_human_sees_first(level: str, type: str, asks: bool) -> None:
    assert needs_approval(AutonomyLevel(level), ActionType(type)) is asks


@pytest.mark.parametrize(("level", "type", "asks"), CELLS)
def test_a_draft_goes_to_the_outbox_or_waits_and_moves_the_stage_once_it_is_sent(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, level: str, type: str, asks: bool
) -> None:
    conversation = conversation_in(FROM[type], autonomy_level=level)
    result = submit(conversation, ActionType(type), "the draft", metadata=NEEDS[type], actor="worker-7")
    if asks:
        assert isinstance(result, PendingAction)
        assert values(result) == values(copy_of(result))
        assert (result.status, result.type, result.draft_message) == (ActionStatus.PENDING, type, "the draft")
        assert (result.conversation_id, result.lead_id) == (conversation.id, conversation.lead_id)
        assert result.metadata == {**NEEDS[type], "submittedBy": "worker-7"}
        assert result.created_at == milliseconds(close_engine_clock.now)
        assert result.expires_at is not None
        assert result.expires_at - result.created_at == timedelta(hours=24)
        assert messages() == []
        links = type == "SEND_PAYMENT_LINK"
        assert copy_of(conversation).stage is (Stage.PENDING_APPROVAL if links else FROM[type])
        if links:
            change = conversation.history()[-1]
            assert (change.actor, change.metadata) == ("worker-7", {"action_id": result.id})
        result = result.approve(by="dana")
    assert values(conversation) == values(copy_of(conversation))
    (message,) = messages()
    assert values(message) == values(result)
    payload = {**NEEDS[type], "submittedBy": "worker-7"} if asks else NEEDS[type]
    assert (message.topic, message.body, message.payload) == (type, "the draft", payload)
    assert (message.conversation_id, message.lead_id) == (conversation.id, conversation.lead_id)
    assert (message.approved_by, message.submitted_by) == ("dana" if asks else None, "worker-7")
    claimed().sent("p1")
    assert copy_of(conversation).stage is SENT[type]
    assert conversation.history()[-1].metadata["submitted_by"] == "worker-7"
    assert_consistent()


def test_a_stricter_policy_has_every_payment_link_approved(conversation_in: ConversationIn) -> None:
    def strict(level: AutonomyLevel, type: ActionType) -> bool:
        return type is ActionType.SEND_PAYMENT_LINK or needs_approval(level, type)

    conversation = conversation_in(Stage.PREVIEW_SENT)
    assert isinstance(submit(conversation, ActionType.SEND_MESSAGE, "hello", policy=strict), OutboxMessage)
    action = submit(conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK}, policy=strict)
    assert isinstance(action, PendingAction)
    assert conversation.stage is Stage.PENDING_APPROVAL


def test_a_looser_policy_lets_a_payment_link_through_and_says_so(
    conversation_in: ConversationIn, fake_sender: FakeSender
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.SEMI_AUTO)
    message = submit(
        conversation,
        ActionType.SEND_PAYMENT_LINK,
        "pay",
        metadata={"paymentUrl": LINK},
        policy=lambda level, type: False,
    )
    assert message.approved_by == "policy"
    fake_sender.deliver()
    conversation.reload()
    assert (conversation.stage, conversation.payment_link_url) == (Stage.PAYMENT_SENT, LINK)
    assert conversation.history()[-1].metadata["approved_by"] == "policy"


# -- submit ------------------------------------------------------------------------------------------------------------


def test_only_the_first_message_of_a_conversation_starts_qualifying(conversation_in: ConversationIn) -> None:
    behind = {
        stage: submit(conversation_in(stage), ActionType.SEND_MESSAGE, "hello").trigger
        for stage in Stage
        if stage not in (Stage.COMPLETED, Stage.CLOSED_LOST)
    }
    assert {stage for stage, trigger in behind.items() if trigger} == {Stage.INITIATED}
    assert behind[Stage.INITIATED] == "start_qualifying"


@pytest.mark.parametrize("stage", [Stage.COMPLETED, Stage.CLOSED_LOST])
def test_nothing_is_submitted_for_a_closed_conversation(conversation_in: ConversationIn, stage: Stage) -> None:
    for type, level in itertools.product(ActionType, AutonomyLevel):
        conversation = conversation_in(stage, autonomy_level=level)
        with pytest.raises(ConversationClosed) as closed:
            submit(conversation, type, "hello", metadata=NEEDS[type])
        assert (closed.value.conversation_id, closed.value.stage) == (conversation.id, stage)
        assert f"is {stage}, so nothing can be submitted" in str(closed.value)
    assert (messages(), PendingAction.select().count()) == ([], 0)


#: The stages that each link can be sent from; sending it again in the stage it leads to is allowed as well.
SENDABLE = {
    "SEND_PREVIEW": {"BUILDING", "EDIT_LOOP", "PREVIEW_SENT"},
    "SEND_PAYMENT_LINK": {"PREVIEW_SENT", "EDIT_LOOP", "PENDING_APPROVAL", "PAYMENT_SENT"},
}


@pytest.mark.parametrize("level", [AutonomyLevel.FULL_AUTO, AutonomyLevel.MANUAL])
@pytest.mark.parametrize("type", list(SENDABLE))
def test_a_link_is_submitted_only_where_it_can_be_sent_from(
    conversation_in: ConversationIn, type: str, level: AutonomyLevel
) -> None:
    for stage in Stage:
        if stage in ("COMPLETED", "CLOSED_LOST"):
            continue
        conversation = conversation_in(stage, autonomy_level=level)
        if stage in SENDABLE[type]:
            submit(conversation, ActionType(type), "look", metadata=NEEDS[type])
        else:
            with pytest.raises(TransitionNotAllowed) as refused:
                submit(conversation, ActionType(type), "look", metadata=NEEDS[type])
            assert refused.value.stage is stage
            assert values(copy_of(conversation)) == values(conversation)
    results = [*messages(), *PendingAction.select()]
    assert len(results) == len(SENDABLE[type])


def test_a_payment_link_without_a_link_is_refused_at_once(conversation_in: ConversationIn) -> None:
    for level in AutonomyLevel:
        for stage in SENDABLE["SEND_PAYMENT_LINK"]:
            conversation = conversation_in(Stage(stage), autonomy_level=level)
            for metadata in (None, {"paymentUrl": " "}, {"paymentUrl": 7}):
                with pytest.raises(ConditionNotMet, match="a payment link URL must be given"):
                    submit(conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata=metadata)
            assert values(copy_of(conversation)) == values(conversation)
    assert (messages(), PendingAction.select().count()) == ([], 0)


def test_a_second_payment_link_waits_beside_the_first_and_leaves_the_stage(
    waiting: Waiting, close_engine_clock: MovableClock
) -> None:
    first = waiting()
    conversation = conversation_of(first)
    close_engine_clock.move(timedelta(minutes=1))
    second = submit(conversation, ActionType.SEND_PAYMENT_LINK, "cheaper", metadata={"paymentUrl": LINK})
    assert conversation.stage is Stage.PENDING_APPROVAL
    assert list(pending_actions()) == [first, second]


@pytest.mark.parametrize("level", [AutonomyLevel.FULL_AUTO, AutonomyLevel.MANUAL])
def test_what_cannot_be_stored_is_refused_and_nothing_is_written(
    conversation_in: ConversationIn, level: AutonomyLevel
) -> None:
    conversation = conversation_in(Stage.QUALIFYING, autonomy_level=level)
    for given in (
        {"draft": None},
        {"draft": "a\x00"},
        {"type": "SEND_FAX"},
        {"metadata": {"a": object()}},
        {"key": "a\x00"},
        {"key": " "},
        {"actor": "a\x00"},
        {"send_after": "tomorrow"},
    ):
        options: dict[str, Any] = {"type": ActionType.SEND_MESSAGE, "draft": "hello", **given}
        with pytest.raises(InvalidValue):
            submit(conversation, **options)
    assert (messages(), PendingAction.select().count()) == ([], 0)
    assert values(copy_of(conversation)) == values(conversation)


def test_a_delay_counts_from_the_submission_also_through_an_approval(
    waiting: Waiting, close_engine_clock: MovableClock
) -> None:
    for approved_after in (timedelta(0), timedelta(hours=3)):
        for as_moment in (True, False):
            moment = close_engine_clock.now + timedelta(hours=2)
            abroad = moment.astimezone(timezone(timedelta(hours=-7)))
            action = waiting("SEND_MESSAGE", send_after=abroad if as_moment else timedelta(hours=2))
            close_engine_clock.move(approved_after)
            expected = milliseconds(max(moment, close_engine_clock.now))
            assert action.approve(by="dana").available_at == expected


def test_a_delay_of_null_is_none(waiting: Waiting) -> None:
    action = waiting("SEND_MESSAGE")
    PendingAction.update(metadata={"sendAfter": None}).where(PendingAction.id == action.id).execute()
    assert action.approve(by="dana").available_at == action.approved_at


@pytest.mark.parametrize("level", [AutonomyLevel.FULL_AUTO, AutonomyLevel.SEMI_AUTO])
def test_the_same_key_again_returns_the_first_result(conversation_in: ConversationIn, level: AutonomyLevel) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=level)
    stale = copy_of(conversation)

    def again(conversation: CloseEngineConversation) -> OutboxMessage | PendingAction:
        return submit(
            conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK}, key="reply to SM1"
        )

    first = again(conversation)
    before = values(copy_of(conversation))
    assert again(conversation) == again(stale) == again(copy_of(conversation)) == first
    if isinstance(first, PendingAction):
        first.approve(by="dana")
        assert again(conversation).status is ActionStatus.APPROVED
    assert values(copy_of(conversation)) == before
    assert len(messages()) == 1


def test_a_key_belongs_to_its_conversation(conversation_in: ConversationIn) -> None:
    for level in AutonomyLevel:
        results = [
            submit(conversation_in(Stage.QUALIFYING, autonomy_level=level), ActionType.SEND_MESSAGE, "hi", key="k")
            for _ in range(2)
        ]
        assert results[0] != results[1]


def test_of_two_drafts_from_one_state_one_is_submitted_and_the_other_is_a_conflict(
    conversation_in: ConversationIn,
) -> None:
    for type, level in itertools.product(NEEDS, AutonomyLevel):
        conversation = conversation_in(FROM[type], autonomy_level=level)
        stale = copy_of(conversation)
        submit(conversation, ActionType(type), "the first", metadata=NEEDS[type])
        before = values(stale)
        with pytest.raises(StageConflict) as conflict:
            submit(stale, ActionType(type), "the second", metadata=NEEDS[type])
        assert conflict.value.conversation_id == stale.id
        assert values(stale) == before
        drafts = [message.body for message in messages(conversation)]
        assert drafts + [action.draft_message for action in pending_actions(conversation)] == ["the first"]


def test_rolled_back_nothing_was_submitted_and_the_object_can_be_used_again(conversation_in: ConversationIn) -> None:
    for level in AutonomyLevel:
        conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=level)
        before = values(conversation)
        with close_engine.atomic() as transaction:
            submit(conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK})
            transaction.rollback()
        assert values(conversation) == before == values(copy_of(conversation))
        assert (messages(), PendingAction.select().count()) == ([], 0)


def test_a_deleted_conversation_cannot_be_submitted_for(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    sql("DELETE FROM close_engine_conversations WHERE id = %s", conversation.id)
    with pytest.raises(ConversationNotFound):
        submit(conversation, ActionType.SEND_MESSAGE, "hello")


# -- deciding ----------------------------------------------------------------------------------------------------------


def test_approving_records_who_and_when_and_returns_the_message(
    waiting: Waiting, close_engine_clock: MovableClock
) -> None:
    action = waiting()
    close_engine_clock.move(timedelta(minutes=3))
    message = action.approve(by="dana")
    assert values(action) == values(copy_of(action))
    assert (action.status, action.approved_by) == (ActionStatus.APPROVED, "dana")
    assert action.approved_at == message.created_at == message.available_at
    assert (message.approved_by, message.trigger, message.body) == ("dana", "send_payment_link", "the draft")
    assert conversation_of(action).stage is Stage.PENDING_APPROVAL
    assert repr(action) == f"<PendingAction {action.id}: SEND_PAYMENT_LINK of {action.conversation_id}, APPROVED>"


def test_approving_twice_returns_the_first_result_whoever_approves_and_however_old_the_object_is(
    waiting: Waiting, close_engine_clock: MovableClock
) -> None:
    action = waiting()
    stale, late = copy_of(action), copy_of(action)
    first = action.approve(by="dana")
    assert action.approve(by="eve", message="another") == first
    assert stale.approve(by="eve", message="another") == first
    close_engine_clock.move(timedelta(hours=25))
    assert late.approve(by="eve") == first
    assert copy_of(action).approve(by="eve") == first
    assert (late.status, late.approved_by, late.draft_message) == (ActionStatus.APPROVED, "dana", "the draft")
    assert len(messages()) == 1


def test_an_edited_message_is_sent_instead_of_the_draft(waiting: Waiting) -> None:
    action = waiting()
    message = action.approve(by="dana", message="Kinder words")
    assert message.body == copy_of(action).draft_message == action.draft_message == "Kinder words"


def test_a_rejected_message_is_not_sent_and_says_why(waiting: Waiting) -> None:
    action = waiting("SEND_MESSAGE")
    action.reject(by="dana", reason="too pushy")
    assert (action.status, action.approved_by, action.approved_at) == (ActionStatus.REJECTED, "dana", None)
    assert action.metadata == {"rejectionReason": "too pushy"}
    assert values(action) == values(copy_of(action))
    assert messages() == []
    assert conversation_of(action).stage is Stage.INITIATED


def test_rejecting_a_payment_link_takes_the_conversation_back_with_history(
    waiting: Waiting, close_engine_clock: MovableClock
) -> None:
    action = waiting()
    before = conversation_of(action)
    close_engine_clock.move(timedelta(minutes=3))
    action.reject(by="dana", reason="too early")
    conversation = conversation_of(action)
    assert conversation.stage is Stage.PREVIEW_SENT
    change = conversation.history()[-1]
    assert (change.trigger, change.source, change.dest) == (
        "withdraw_approval",
        Stage.PENDING_APPROVAL,
        Stage.PREVIEW_SENT,
    )
    assert (change.actor, change.reason) == ("dana", "too early")
    assert change.metadata == {"action_id": action.id, "status": "REJECTED"}
    assert change.created_at == conversation.updated_at > before.updated_at
    assert action.metadata == {"paymentUrl": LINK, "rejectionReason": "too early"}
    with pytest.raises(StageConflict):
        before.withdraw_approval()
    assert_consistent()


@pytest.mark.parametrize(
    "withdraw",
    [
        lambda conversation: conversation.withdraw_approval(),
        lambda conversation: sql("UPDATE close_engine_conversations SET stage = 'PREVIEW_SENT'"),
    ],
    ids=["by the trigger", "by the CRM"],
)
def test_a_link_whose_approval_is_no_longer_asked_for_cannot_be_approved(
    waiting: Waiting, withdraw: Callable[[CloseEngineConversation], object]
) -> None:
    link = waiting()
    conversation = conversation_of(link)
    text = PendingAction.create(
        conversation_id=conversation.id,
        lead_id=conversation.lead_id,
        type=ActionType.SEND_MESSAGE,
        draft_message="still there?",
    )
    withdraw(conversation)
    with pytest.raises(ActionDecided, match="EXPIRED"):
        link.approve(by="dana")
    assert list(pending_actions()) == [text]
    assert triggers(conversation)[-1] == "withdraw_approval"


def test_rejecting_twice_changes_nothing(waiting: Waiting) -> None:
    action = waiting()
    stale = copy_of(action)
    action.reject(by="dana", reason="first")
    before = values(copy_of(action))
    action.reject(by="eve", reason="second")
    stale.reject(by="eve", reason="second")
    assert values(copy_of(action)) == before == values(stale)
    assert triggers(conversation_of(action))[-2:] == ["request_approval", "withdraw_approval"]


def test_a_rejection_keeps_what_others_wrote_into_the_metadata(waiting: Waiting) -> None:
    action = waiting()
    sql("UPDATE pending_actions SET metadata = %s WHERE id = %s", '{"seenBy": "eve"}', action.id)
    action.reject(by="dana", reason="no")
    assert copy_of(action).metadata == {"seenBy": "eve", "rejectionReason": "no"}


def test_metadata_of_another_shape_does_not_keep_a_draft_from_being_decided(waiting: Waiting) -> None:
    for metadata in ("[1]", '"text"', "null", None):
        approved, rejected = waiting("SEND_MESSAGE"), waiting("SEND_MESSAGE")
        sql("UPDATE pending_actions SET metadata = %s", metadata)
        assert copy_of(approved).approve(by="dana").payload == (metadata and json.loads(metadata))
        copy_of(rejected).reject(by="dana", reason="no")
        assert copy_of(rejected).metadata == {"rejectionReason": "no"}


DECIDE = {
    "approve": lambda action: action.approve(by="eve"),
    "reject": lambda action: action.reject(by="eve"),
}


@pytest.mark.parametrize(("first", "second"), [("approve", "reject"), ("reject", "approve")])
def test_a_decision_stands_against_the_other_one(waiting: Waiting, first: str, second: str) -> None:
    action = waiting()
    stale = copy_of(action)
    DECIDE[first](action)
    before = values(copy_of(action))
    for object in (action, stale, copy_of(action)):
        with pytest.raises(ActionDecided) as decided:
            DECIDE[second](object)
        assert (decided.value.action_id, decided.value.trigger) == (action.id, second)
        assert decided.value.status is action.status is object.status
        assert "that decision stands" in str(decided.value)
    assert values(copy_of(action)) == before
    assert_consistent()


@pytest.mark.parametrize("decide", list(DECIDE))
def test_an_expired_action_cannot_be_decided_whether_or_not_a_sweep_has_been_by(
    waiting: Waiting, close_engine_clock: MovableClock, decide: str
) -> None:
    action = waiting(expires_after=timedelta(hours=1))
    close_engine_clock.move(timedelta(hours=1) - timedelta(milliseconds=1))
    assert action.status is copy_of(action).status is ActionStatus.PENDING
    assert list(pending_actions()) == [action]
    close_engine_clock.move(timedelta(milliseconds=1))
    assert action.status is copy_of(action).status is ActionStatus.EXPIRED
    assert list(pending_actions()) == []
    for swept in (False, True):
        if swept:
            assert close_engine.expire_actions() == [action.id]
        for object in (action, copy_of(action)):
            with pytest.raises(ActionDecided) as decided:
                DECIDE[decide](object)
            assert decided.value.status is ActionStatus.EXPIRED
            assert "EXPIRED, so it is too late" in str(decided.value)
            assert "submit a new draft" in str(decided.value)
    assert messages() == []
    assert conversation_of(action).stage is Stage.PREVIEW_SENT


def test_an_action_can_be_approved_up_to_its_last_moment(waiting: Waiting, close_engine_clock: MovableClock) -> None:
    action = waiting()
    close_engine_clock.move(timedelta(hours=24) - timedelta(milliseconds=1))
    action.approve(by="dana")


def test_without_an_expiry_it_can_be_approved_for_ever(waiting: Waiting, close_engine_clock: MovableClock) -> None:
    action = waiting(expires_after=None)
    close_engine_clock.move(timedelta(days=3650))
    assert close_engine.expire_actions() == []
    assert action.expires_at is None
    assert list(pending_actions()) == [action]
    action.approve(by="dana")


@pytest.mark.parametrize("close", ["complete", "close_lost"])
@pytest.mark.parametrize("type", list(NEEDS))
def test_a_draft_of_a_conversation_that_has_closed_cannot_be_approved(waiting: Waiting, type: str, close: str) -> None:
    action = waiting(type)
    stale = copy_of(action)
    conversation = conversation_of(action)
    if close == "complete":
        sql("UPDATE close_engine_conversations SET stage = 'COMPLETED' WHERE id = %s", conversation.id)
    else:
        conversation.close_lost("they said no")
    assert copy_of(action).status is ActionStatus.EXPIRED
    assert list(pending_actions()) == []
    with pytest.raises(ActionDecided) as decided:
        stale.approve(by="dana")
    assert decided.value.status is ActionStatus.EXPIRED
    assert messages() == []
    assert_consistent()


def test_a_draft_that_was_put_into_a_closed_conversation_cannot_be_approved(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.CLOSED_LOST)
    action = foreign_action(conversation)
    with pytest.raises(ConversationClosed) as closed:
        action.approve(by="dana")
    assert (closed.value.conversation_id, closed.value.stage) == (conversation.id, Stage.CLOSED_LOST)
    with pytest.raises(peewee.IntegrityError, match=r"closed|CLOSED_LOST"):
        sql("UPDATE pending_actions SET status = 'APPROVED', approved_by = 'dana' WHERE id = %s", action.id)
    assert copy_of(action).status is ActionStatus.PENDING
    action.reject(by="dana")
    assert copy_of(conversation).stage is Stage.CLOSED_LOST


def test_a_draft_of_a_deleted_conversation_expires(waiting: Waiting) -> None:
    action = waiting()
    sql("DELETE FROM close_engine_conversations WHERE id = %s", action.conversation_id)
    assert list(pending_actions()) == []
    with pytest.raises(ActionDecided) as decided:
        action.approve(by="dana")
    assert decided.value.status is ActionStatus.EXPIRED
    assert messages() == []


def test_a_draft_for_a_conversation_that_is_not_there_can_be_rejected_but_not_approved(
    conversation_in: ConversationIn,
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    action = foreign_action(conversation, conversation_id="nobody")
    with pytest.raises(ConversationNotFound, match="nobody"):
        action.approve(by="dana")
    assert messages() == []
    action.reject(by="dana")
    assert copy_of(action).status is ActionStatus.REJECTED


@pytest.mark.parametrize("decide", list(DECIDE))
def test_a_deleted_action_is_named_in_the_error(waiting: Waiting, decide: str) -> None:
    action = waiting()
    sql("DELETE FROM pending_actions WHERE id = %s", action.id)
    with pytest.raises(ActionNotFound) as missing:
        DECIDE[decide](action)
    assert missing.value.action_id == action.id


@pytest.mark.parametrize("decide", [PendingAction.approve, PendingAction.reject])
def test_whoever_decides_must_have_a_name(waiting: Waiting, decide: Callable[..., object]) -> None:
    action = waiting()
    for by in ("", "  ", None, 7, "a\x00"):
        with pytest.raises(InvalidValue):
            decide(action, by=by)
    assert values(copy_of(action)) == values(action)


def test_words_that_cannot_be_stored_are_refused_and_the_action_still_waits(waiting: Waiting) -> None:
    action = waiting()
    words: Any
    for words in ("a\x00", "\ud800", 7):
        with pytest.raises(InvalidValue):
            action.approve(by="dana", message=words)
        with pytest.raises(InvalidValue):
            action.reject(by="dana", reason=words)
    assert values(copy_of(action)) == values(action)


@pytest.mark.parametrize("decide", list(DECIDE))
def test_a_decision_that_is_rolled_back_was_never_made(waiting: Waiting, decide: str) -> None:
    action = waiting()
    before, conversation = values(action), conversation_of(action)
    with close_engine.atomic() as transaction:
        DECIDE[decide](action)
        transaction.rollback()
    assert values(action) == before == values(copy_of(action))
    assert values(conversation_of(action)) == values(conversation)
    assert messages() == []


def test_of_two_payment_links_the_last_to_be_rejected_takes_the_conversation_back(waiting: Waiting) -> None:
    first = waiting()
    conversation = conversation_of(first)
    second = submit(conversation, ActionType.SEND_PAYMENT_LINK, "cheaper", metadata={"paymentUrl": LINK})
    first.reject(by="dana")
    assert copy_of(conversation).stage is Stage.PENDING_APPROVAL
    second.reject(by="dana")
    assert copy_of(conversation).stage is Stage.PREVIEW_SENT
    assert triggers(conversation).count("withdraw_approval") == 1


def test_rejecting_a_text_leaves_a_payment_link_waiting(waiting: Waiting) -> None:
    link = waiting()
    text = submit(conversation_of(link), ActionType.SEND_MESSAGE, "still there?")
    text.reject(by="dana")
    assert conversation_of(link).stage is Stage.PENDING_APPROVAL


def test_an_approved_message_keeps_its_place_behind_those_before_it(waiting: Waiting) -> None:
    action = waiting("SEND_MESSAGE")
    earlier = outbox.enqueue(action.conversation_id, "SEND_MESSAGE", "earlier")
    later = action.approve(by="dana")
    assert later.id > earlier.id
    assert [message.id for message in outbox.claim(10)] == [earlier.id]


# -- the queue ---------------------------------------------------------------------------------------------------------


def test_the_queue_is_oldest_first_and_can_be_narrowed_down(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    actions = []
    conversations = [conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.MANUAL) for _ in range(2)]
    for number in range(4):
        close_engine_clock.move(timedelta(minutes=1))
        conversation = conversations[number % 2]
        actions.append(submit(conversation, ActionType.SEND_MESSAGE, str(number)))
    close_engine_clock.move(timedelta(minutes=1))
    link = submit(conversations[0], ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK})
    assert list(pending_actions()) == [*actions, link]
    assert list(pending_actions(conversations[1])) == actions[1::2]
    assert list(pending_actions(conversations[1].id)) == actions[1::2]
    assert list(pending_actions(type=ActionType.SEND_PAYMENT_LINK)) == [link]
    assert list(pending_actions(conversations[0], ActionType.SEND_MESSAGE).limit(1)) == [actions[0]]
    actions[0].approve(by="dana")
    actions[1].reject(by="dana")
    assert list(pending_actions()) == [*actions[2:], link]


# -- other writers -----------------------------------------------------------------------------------------------------


def foreign_action(
    conversation: CloseEngineConversation, type: str = "SEND_PAYMENT_LINK", **columns: Any
) -> PendingAction:
    """An action as the CRM writes one."""
    columns = {
        "id": f"crm {PendingAction.select().count()}",
        "conversation_id": conversation.id,
        "lead_id": conversation.lead_id,
        "type": type,
        "draft_message": "from the CRM",
        "metadata": f'{{"paymentUrl": "{LINK}"}}',
        **columns,
    }
    marks = ", ".join(["%s"] * len(columns))
    sql(f"INSERT INTO pending_actions ({', '.join(columns)}) VALUES ({marks})", *columns.values())
    return PendingAction.get_by_id(columns["id"])


@pytest.fixture
def foreign_actor(kind: str) -> str:
    """Whom the history names for what somebody writes past this library."""
    return f"database:{sql('SELECT session_user')[0][0]}" if kind == "postgresql" else "database"


def test_an_approval_by_the_crm_itself_puts_the_message_into_the_outbox_once(
    waiting: Waiting, fake_sender: FakeSender, close_engine_clock: MovableClock
) -> None:
    action = waiting()
    for _ in range(2):
        sql("UPDATE pending_actions SET status = 'APPROVED', approved_by = 'crm user' WHERE id = %s", action.id)
    (message,) = messages()
    assert (message.topic, message.body, message.approved_by) == ("SEND_PAYMENT_LINK", "the draft", "crm user")
    assert copy_of(action).approved_at is not None
    assert action.approve(by="dana") == message
    close_engine_clock.move(timedelta(minutes=1))
    fake_sender.deliver()
    assert conversation_of(action).stage is Stage.PAYMENT_SENT
    assert_consistent()


def test_an_approval_by_the_crm_with_another_text_sends_that_text(waiting: Waiting) -> None:
    action = waiting()
    sql(
        "UPDATE pending_actions SET draft_message = 'kinder', status = 'APPROVED', approved_by = 'x' WHERE id = %s",
        action.id,
    )
    assert [message.body for message in messages()] == ["kinder"]


@pytest.mark.parametrize("status", ["REJECTED", "EXPIRED"])
def test_what_the_crm_rejects_or_expires_takes_the_conversation_back_with_history(
    waiting: Waiting, foreign_actor: str, status: str
) -> None:
    action = waiting()
    version = conversation_of(action).updated_at
    sql("UPDATE pending_actions SET status = %s WHERE id = %s", status, action.id)
    conversation = conversation_of(action)
    assert (conversation.stage, messages()) == (Stage.PREVIEW_SENT, [])
    assert conversation.updated_at > version
    change = conversation.history()[-1]
    assert (change.trigger, change.actor, change.reason) == ("withdraw_approval", foreign_actor, None)
    assert change.metadata == {"action_id": action.id, "status": status}
    assert_consistent()


def test_what_the_crm_does_in_a_transaction_of_ours_is_not_taken_for_ours(waiting: Waiting, foreign_actor: str) -> None:
    ours, theirs = waiting(), waiting()
    with close_engine.atomic():
        ours.reject(by="dana", reason="ours")
        sql("UPDATE pending_actions SET status = 'REJECTED' WHERE id = %s", theirs.id)
    actors = [(c.actor, c.reason) for c in (conversation_of(a).history()[-1] for a in (ours, theirs))]
    assert actors == [("dana", "ours"), (foreign_actor, None)]


def test_a_draft_of_the_crm_is_in_the_queue_and_can_be_approved(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    action = foreign_action(conversation, "SEND_MESSAGE")
    assert list(pending_actions()) == [action]
    assert action.approve(by="dana").body == "from the CRM"


def test_an_expired_action_is_not_approved_by_the_crm_either(conversation_in: ConversationIn) -> None:
    action = foreign_action(conversation_in(Stage.PREVIEW_SENT), expires_at="2020-01-01 00:00:00.000")
    with pytest.raises(peewee.IntegrityError, match="has expired"):
        sql("UPDATE pending_actions SET status = 'APPROVED', approved_by = 'dana' WHERE id = %s", action.id)
    assert messages() == []


ALLOWED = {("PENDING", "APPROVED"), ("PENDING", "REJECTED"), ("PENDING", "EXPIRED")}


def test_the_database_refuses_every_other_change_of_status(conversation_in: ConversationIn) -> None:
    statuses = [str(status) for status in ActionStatus]
    for source in statuses:
        for dest in [*statuses, "approved", "", None, "UNKNOWN"]:
            action = foreign_action(conversation_in(Stage.PREVIEW_SENT), "SEND_MESSAGE")
            if source != "PENDING":
                sql("UPDATE pending_actions SET status = %s WHERE id = %s", source, action.id)
            if (source, dest) in ALLOWED or source == dest:
                sql("UPDATE pending_actions SET status = %s WHERE id = %s", dest, action.id)
            else:
                with pytest.raises(peewee.IntegrityError):
                    sql("UPDATE pending_actions SET status = %s WHERE id = %s", dest, action.id)
                dest = source
            assert sql("SELECT status FROM pending_actions WHERE id = %s", action.id) == [(dest,)]
    assert_consistent()


def test_the_database_refuses_an_unknown_status_from_the_start(conversation_in: ConversationIn) -> None:
    for status in ("pending", "", "UNKNOWN"):
        with pytest.raises(peewee.IntegrityError, match="status"):
            foreign_action(conversation_in(Stage.PREVIEW_SENT), status=status)


# -- races -------------------------------------------------------------------------------------------------------------


def waiting_link(level: AutonomyLevel = AutonomyLevel.MANUAL, **options: Any) -> PendingAction:
    conversation = close_engine.open_conversation(new_lead(autonomy_level=level), EntryPoint.SMS_REPLY)
    bring_to(conversation, Stage.PREVIEW_SENT)
    link = submit(conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK}, **options)
    assert isinstance(link, PendingAction)
    return link


def test_two_hundred_concurrent_approvals_of_one_action_produce_one_outbox_row(postgres: peewee.Database) -> None:
    action = waiting_link()

    def approve_ten_copies() -> set[int]:
        return {copy_of(action).approve(by=f"somebody {number}").id for number in range(10)}

    (message,) = set.union(*race([approve_ten_copies] * 20, behind=held(action)))
    assert [m.id for m in messages()] == [message]
    assert_consistent()


def test_a_message_that_is_approved_is_withdrawn_when_the_conversation_closes(postgres: peewee.Database) -> None:
    message = waiting_link().approve(by="dana")
    CloseEngineConversation.get_by_id(message.conversation_id).close_lost("they said no")
    assert copy_of(message).status is MessageStatus.WITHDRAWN


def test_an_action_that_is_approved_and_rejected_at_once_is_one_of_both(postgres: peewee.Database) -> None:
    for _ in range(10):
        action = waiting_link()
        copies = [copy_of(action) for _ in range(4)]
        results = race(
            [lambda c=c: c.approve(by="dana") for c in copies[:2]]
            + [lambda c=c: c.reject(by="eve") for c in copies[2:]],
            behind=held(action),
        )
        approved = copy_of(action).status is ActionStatus.APPROVED
        refused = results[2:] if approved else results[:2]
        assert all(isinstance(result, ActionDecided) for result in refused)
        assert not any(isinstance(result, Exception) for result in results if result not in refused)
        assert conversation_of(action).stage is (Stage.PENDING_APPROVAL if approved else Stage.PREVIEW_SENT)
        assert len(messages(conversation_of(action))) == approved
    assert_consistent()


HOUR = timedelta(hours=1)


@pytest.fixture
def expiring(postgres: peewee.Database, close_engine_clock: MovableClock) -> PendingAction:
    """An action that can be approved for an hour, by a clock that stands still until it is moved."""
    close_engine.bind(postgres, clock=close_engine_clock)
    close_engine_clock.rule()
    return waiting_link(expires_after=HOUR)


def click(action: PendingAction) -> Running:
    return Running(lambda: copy_of(action).approve(by="dana"))


def assert_approved(action: PendingAction, results: list[Any]) -> None:
    (message,) = messages(conversation_of(action))
    assert results == [message] * len(results)
    assert sql("SELECT status FROM pending_actions WHERE id = %s", action.id) == [("APPROVED",)]
    assert conversation_of(action).stage is Stage.PENDING_APPROVAL


def assert_expired(action: PendingAction, results: list[Any]) -> None:
    assert messages(conversation_of(action)) == []
    assert [type(result) for result in results] == [ActionDecided] * len(results)
    assert {result.status for result in results} <= {ActionStatus.EXPIRED}
    assert sql("SELECT status FROM pending_actions WHERE id = %s", action.id) == [("EXPIRED",)]
    assert conversation_of(action).stage is Stage.PREVIEW_SENT


def test_an_action_that_expires_before_its_approval_is_committed_is_approved(
    expiring: PendingAction, close_engine_clock: MovableClock
) -> None:
    with close_engine.atomic():
        first = copy_of(expiring).approve(by="dana")
        close_engine_clock.move(HOUR)
        assert Running(close_engine.expire_actions).result() == [], "the sweep passes over it"
        late = click(expiring)
        until_they_wait([late])
    assert_approved(expiring, [first, late.result()])
    assert close_engine.expire_actions() == []
    assert_consistent()


def test_an_action_that_expires_while_its_approval_waits_for_it_is_not_approved(
    expiring: PendingAction, close_engine_clock: MovableClock
) -> None:
    with close_engine.atomic():
        held(expiring)()
        in_time = click(expiring)
        until_they_wait([in_time])
        close_engine_clock.move(HOUR)
        assert Running(close_engine.expire_actions).result() == [], "the sweep passes over it"
        late = click(expiring)
        until_they_wait([in_time, late])
    results = [in_time.result(), late.result()]
    assert sql("SELECT status FROM pending_actions") == [("PENDING",)]
    assert close_engine.expire_actions() == [expiring.id]
    assert_expired(expiring, results)
    assert_consistent()


def test_an_action_that_a_sweep_expires_while_its_approval_waits_for_it_is_expired(
    expiring: PendingAction, close_engine_clock: MovableClock
) -> None:
    with close_engine.atomic():
        held(expiring)()
        in_time = click(expiring)
        until_they_wait([in_time])
        close_engine_clock.move(HOUR)
        assert close_engine.expire_actions() == [expiring.id]
        late = click(expiring)
        until_they_wait([in_time, late])
        assert Running(close_engine.expire_actions).result() == [], "another sweep passes over it"
    assert_expired(expiring, [in_time.result(), late.result()])
    assert_consistent()


def test_an_action_whose_time_is_over_is_not_approved_although_no_sweep_has_been_by(
    expiring: PendingAction, close_engine_clock: MovableClock
) -> None:
    close_engine_clock.move(HOUR)
    late = click(expiring).result()
    assert sql("SELECT status FROM pending_actions") == [("PENDING",)]
    assert close_engine.expire_actions() == [expiring.id]
    assert_expired(expiring, [late])
    assert_consistent()


def test_an_action_that_expires_while_it_is_approved_ends_in_exactly_one_of_the_two_states(
    expiring: PendingAction, close_engine_clock: MovableClock
) -> None:
    """The tests before this one force what can come of it; this holds whoever of them all comes first."""
    actions = [expiring, *(waiting_link(expires_after=HOUR) for _ in range(9))]

    def approve_each() -> list[Any]:
        results: list[Any] = []
        for action in actions:
            try:
                results.append(copy_of(action).approve(by="dana"))
            except ActionDecided as refused:
                results.append(refused)
        return results

    def let_them_expire() -> list[str]:
        close_engine_clock.move(HOUR)
        return close_engine.expire_actions(batch=1)

    *approved, _, _ = race([approve_each, approve_each, let_them_expire, close_engine.expire_actions])
    close_engine.expire_actions()  # what the sweeps passed over, and nobody approved
    statuses = dict(sql("SELECT id, status FROM pending_actions"))
    for action, *results in zip(actions, *approved, strict=True):
        (assert_approved if statuses[action.id] == "APPROVED" else assert_expired)(action, results)
    assert_consistent()


def test_two_payment_links_rejected_at_once_take_the_conversation_back_once(postgres: peewee.Database) -> None:
    for _ in range(10):
        first = waiting_link()
        conversation = conversation_of(first)
        second = submit(conversation, ActionType.SEND_PAYMENT_LINK, "again", metadata={"paymentUrl": LINK})
        rejections = [lambda a=a: a.reject(by="dana") for a in (first, second)]
        assert race(rejections, behind=held(conversation)) == [None, None]
        assert triggers(conversation)[-2:] == ["request_approval", "withdraw_approval"]
    assert_consistent()


def test_of_many_drafts_from_one_state_one_is_submitted(postgres: peewee.Database) -> None:
    for level in AutonomyLevel:
        conversation = close_engine.open_conversation(new_lead(autonomy_level=level), EntryPoint.SMS_REPLY)
        bring_to(conversation, Stage.PREVIEW_SENT)
        copies = [copy_of(conversation) for _ in range(8)]
        results = race(
            [lambda c=c: submit(c, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK}) for c in copies],
            behind=held(conversation),
        )
        assert sorted(type(result) is StageConflict for result in results) == [False] + [True] * 7


def test_of_many_submissions_under_one_key_all_return_the_one_result(postgres: peewee.Database) -> None:
    for level in AutonomyLevel:
        conversation = close_engine.open_conversation(new_lead(autonomy_level=level), EntryPoint.SMS_REPLY)
        copies = [copy_of(conversation) for _ in range(8)]
        submissions = [lambda c=c: submit(c, ActionType.SEND_MESSAGE, "hello", key="k") for c in copies]
        results = race(submissions, behind=held(conversation))
        assert len({result.id for result in results}) == 1


def test_a_conversation_that_closes_while_its_draft_is_approved_sends_nothing(
    postgres: peewee.Database, postgres_url: str
) -> None:
    action = waiting_link()
    closing = psycopg2.connect(postgres_url)
    closing.cursor().execute(
        "UPDATE close_engine_conversations SET stage = 'CLOSED_LOST' WHERE id = %s", (action.conversation_id,)
    )
    approval = click(action)
    until_they_wait([approval], closing.info.backend_pid)
    closing.commit()
    refused = approval.result()
    closing.close()
    assert isinstance(refused, ActionDecided)
    assert (refused.status, copy_of(action).status) == (ActionStatus.EXPIRED, ActionStatus.EXPIRED)
    assert messages() == []
    assert conversation_of(action).stage is Stage.CLOSED_LOST


def test_a_draft_that_is_being_approved_while_its_conversation_closes_is_refused(
    postgres: peewee.Database, postgres_url: str
) -> None:
    """The approver holds the action, and the closing one passes over it."""
    action = waiting_link()
    closing, holding = psycopg2.connect(postgres_url), psycopg2.connect(postgres_url)
    holding.cursor().execute("SELECT 1 FROM pending_actions WHERE id = %s FOR UPDATE", (action.id,))
    closing.cursor().execute(
        "UPDATE close_engine_conversations SET stage = 'CLOSED_LOST' WHERE id = %s", (action.conversation_id,)
    )
    holding.commit()
    approval = click(action)
    until_they_wait([approval], closing.info.backend_pid)
    closing.commit()
    refused = approval.result()
    for connection in (closing, holding):
        connection.close()
    assert isinstance(refused, ConversationClosed)
    assert refused.stage is Stage.CLOSED_LOST
    assert messages() == []
