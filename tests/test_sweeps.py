"""What time alone brings about, to the millisecond, by any number of workers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import peewee
import psycopg2
import pytest

import close_engine
from close_engine import (
    ACTIVE_STAGES,
    ActionStatus,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    EntryPoint,
    InvalidValue,
    MessageStatus,
    OutboxMessage,
    PendingAction,
    Received,
    Stage,
    StageChange,
    StageConflict,
    Swept,
    after_commit,
    expire_actions,
    lose_stalled,
    on_enter,
    on_exit,
    outbox,
    pending_actions,
    receive,
    release_leases,
    stall_silent,
    submit,
    subscribe,
    sweep,
    withdraw_approvals,
)
from close_engine.database.binding import current
from close_engine.database.fields import milliseconds
from close_engine.testing import MovableClock, bring_to, new_lead
from tests.rows import copy_of, triggers
from tests.waiting import Running, until_they_wait
from tests.workers import LINK, assert_consistent, claimed, messages, race, sql, values

ConversationIn = Callable[..., CloseEngineConversation]

MILLISECOND = timedelta(milliseconds=1)
SECOND = timedelta(seconds=1)  # more than the versions of some writes at one moment are ahead of the clock
HOUR = timedelta(hours=1)
THREE_DAYS = timedelta(hours=72)
WEEK = timedelta(days=7)


def ids(rows: Iterable[Any]) -> list[Any]:
    return [row.id for row in rows]


# -- silent leads ------------------------------------------------------------------------------------------------------


def test_a_lead_is_silent_after_72_hours_to_the_millisecond(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    close_engine_clock.now = conversation.created_at + THREE_DAYS - MILLISECOND
    assert stall_silent() == []
    assert copy_of(conversation).stage is Stage.QUALIFYING
    moment = milliseconds(close_engine_clock.move(MILLISECOND))
    stale = copy_of(conversation)
    assert stall_silent() == [conversation.id]
    row = copy_of(conversation)
    assert (row.stage, row.stalled_at, row.updated_at) == (Stage.STALLED, moment, moment)
    change = row.history()[-1]
    assert (change.trigger, change.source, change.dest) == ("stall", Stage.QUALIFYING, Stage.STALLED)
    assert (change.actor, change.reason, change.key, change.created_at) == ("sweep", None, None, moment)
    assert stall_silent() == []
    with pytest.raises(StageConflict):
        stale.collect_info()


def test_every_active_stage_can_stall_and_no_other(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversations = [conversation_in(stage) for stage in Stage]
    close_engine_clock.move(THREE_DAYS + SECOND)
    assert sorted(stall_silent()) == sorted(c.id for c in conversations if c.stage in ACTIVE_STAGES)
    for conversation in conversations:
        stalled = conversation.stage in ACTIVE_STAGES
        assert copy_of(conversation).stage is (Stage.STALLED if stalled else conversation.stage)
        if stalled:
            copy = copy_of(conversation)
            copy.resume()
            waits_for_nothing = conversation.stage is Stage.PENDING_APPROVAL
            assert copy.stage is (Stage.PREVIEW_SENT if waits_for_nothing else conversation.stage)
    assert_consistent()


@pytest.mark.parametrize("begun_by", ["a text of ours", "a resuming", "a reopening"])
def test_silence_counts_from_where_it_became_the_leads_turn(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, begun_by: str
) -> None:
    stage = {"a resuming": Stage.STALLED, "a reopening": Stage.CLOSED_LOST}.get(begun_by, Stage.QUALIFYING)
    conversation = conversation_in(stage)
    close_engine_clock.move(HOUR)
    if begun_by == "a text of ours":
        outbox.enqueue(conversation, "SEND_MESSAGE", "hello")
        claimed().sent("p1")
    else:
        conversation.fire("resume" if begun_by == "a resuming" else "reopen")
    close_engine_clock.move(THREE_DAYS - MILLISECOND)
    assert stall_silent() == []
    close_engine_clock.move(MILLISECOND)
    assert stall_silent() == [conversation.id]


def test_silence_does_not_begin_anew_with_what_is_no_sign_of_the_lead(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    receive(conversation.lead_id, "SM1", "hello")
    close_engine_clock.move(timedelta(seconds=1))
    outbox.enqueue(conversation.id, "SEND_MESSAGE", "hello")
    claimed().sent("p1")
    close_engine_clock.move(THREE_DAYS - HOUR)
    conversation = copy_of(conversation)
    conversation.record(data={"name": "Ada"})
    conversation.collected_data = {"name": "Ada L."}
    conversation.save()
    conversation.collect_info()
    submit(conversation, ActionType.SEND_MESSAGE, "still there?", send_after=timedelta(days=1))
    outbox.enqueue(conversation, "tell_the_rep")
    claimed().sent("p2")
    receive(conversation.lead_id, "SM1", "hello")
    sql("UPDATE close_engine_conversations SET edit_rounds = 3 WHERE id = %s", conversation.id)
    sql("UPDATE close_engine_conversations SET updated_at = %s", str(close_engine_clock.now)[:23])
    close_engine_clock.move(HOUR)
    assert stall_silent() == [conversation.id]


def test_another_time_can_be_asked_for(conversation_in: ConversationIn, close_engine_clock: MovableClock) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    close_engine_clock.now = conversation.created_at + HOUR
    assert stall_silent(after=HOUR + MILLISECOND) == []
    assert stall_silent(after=HOUR) == [conversation.id]


def test_they_are_moved_in_batches_of_any_size(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversations = [conversation_in(Stage.QUALIFYING) for _ in range(4)]
    for batch in (1, 2, 3, 4, 5):
        close_engine_clock.move(THREE_DAYS + SECOND)
        assert sorted(stall_silent(batch=batch)) == sorted(ids(conversations))
        for conversation in conversations:
            copy_of(conversation).resume()
    assert_consistent()


# -- stalled for long --------------------------------------------------------------------------------------------------


def test_a_stalled_conversation_is_lost_after_a_week_to_the_millisecond(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.STALLED)
    assert conversation.stalled_at is not None
    close_engine_clock.now = conversation.stalled_at + WEEK - MILLISECOND
    assert lose_stalled() == []
    moment = milliseconds(close_engine_clock.move(MILLISECOND))
    assert lose_stalled() == [conversation.id]
    row = copy_of(conversation)
    assert (row.stage, row.closed_lost_at, row.closed_lost_reason) == (
        Stage.CLOSED_LOST,
        moment,
        "silent since it stalled",
    )
    change = row.history()[-1]
    assert (change.trigger, change.actor, change.reason) == ("close_lost", "sweep", "silent since it stalled")
    assert change.created_at == row.updated_at == moment


def test_a_reason_and_a_time_of_the_callers_own(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.STALLED)
    assert conversation.stalled_at is not None
    close_engine_clock.now = conversation.stalled_at + HOUR
    assert lose_stalled(after=HOUR, reason="gone é") == [conversation.id]
    assert copy_of(conversation).closed_lost_reason == "gone é"
    assert copy_of(conversation).history()[-1].reason == "gone é"


def test_only_what_is_stalled_now_is_lost(conversation_in: ConversationIn, close_engine_clock: MovableClock) -> None:
    for stage in Stage:
        if stage is not Stage.STALLED:
            conversation_in(stage)
    resumed = conversation_in(Stage.STALLED)
    receive(resumed.lead_id, "SM1", "back")
    again = conversation_in(Stage.STALLED)
    close_engine_clock.move(WEEK - HOUR)
    again.resume()
    again.stall()
    close_engine_clock.move(HOUR)
    assert lose_stalled() == []


def test_what_is_lost_withdraws_its_messages_and_drafts(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.STALLED, autonomy_level=AutonomyLevel.MANUAL)
    action = submit(conversation, ActionType.SEND_MESSAGE, "still there?", expires_after=None)
    outbox.enqueue(conversation, "SEND_MESSAGE", "hello?", send_after=timedelta(days=30))
    close_engine_clock.move(WEEK + SECOND)
    assert lose_stalled() == [conversation.id]
    assert copy_of(action).status is ActionStatus.EXPIRED
    assert [message.status for message in messages()] == [MessageStatus.WITHDRAWN]


@pytest.mark.parametrize("given", [{"reason": ""}, {"reason": "  "}, {"reason": "a\x00"}, {"batch": 0}])
def test_a_reason_or_a_batch_that_is_none_is_refused(database: peewee.Database, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue):
        lose_stalled(**given)


@pytest.mark.parametrize("job", [stall_silent, lose_stalled, expire_actions, release_leases, withdraw_approvals])
def test_nothing_to_do_is_nothing_moved_and_no_batch_is_refused(
    database: peewee.Database, job: Callable[..., list[Any]]
) -> None:
    assert job() == []
    with pytest.raises(InvalidValue):
        job(batch=0)


# -- hooks -------------------------------------------------------------------------------------------------------------


def test_hooks_run_in_the_transaction_of_the_sweep_too(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversations = [conversation_in(Stage.BUILDING) for _ in range(3)]
    close_engine_clock.move(THREE_DAYS + SECOND)
    seen = []
    hooks = [
        on_exit(Stage.BUILDING)(lambda conversation, transition: seen.append(("left", conversation.id))),
        on_enter(Stage.STALLED)(lambda conversation, change: seen.append(("entered", conversation.id))),
        after_commit(Stage.STALLED)(lambda conversation, change: seen.append(("kept", conversation.id))),
    ]
    subscribe("tell_the_rep", stages=[Stage.STALLED])
    try:
        assert sorted(stall_silent(batch=2)) == sorted(ids(conversations))
    finally:
        for hook in hooks:
            hook.remove()
    assert sorted(seen) == sorted((what, c.id) for what in ("left", "entered", "kept") for c in conversations)
    assert [message.topic for message in messages()] == ["tell_the_rep"] * 3
    for conversation in conversations:
        change = conversation.history()[-1]
        assert (change.trigger, change.actor, change.created_at) == (
            "stall",
            "sweep",
            milliseconds(close_engine_clock.now),
        )
    assert_consistent()


def test_a_hook_that_fails_undoes_the_change(conversation_in: ConversationIn, close_engine_clock: MovableClock) -> None:
    conversation = conversation_in(Stage.STALLED)
    close_engine_clock.move(WEEK + SECOND)

    @on_enter(Stage.CLOSED_LOST)
    def fail(conversation: CloseEngineConversation, change: StageChange) -> None:
        raise RuntimeError("no disk")

    try:
        moved = lose_stalled()
        assert (moved, moved.failed) == ([], {conversation.id: "RuntimeError: no disk"})
        with pytest.raises(InvalidValue):
            lose_stalled(batch=0)
    finally:
        fail.remove()
    assert copy_of(conversation).stage is Stage.STALLED
    assert lose_stalled() == [conversation.id]


# -- actions and leases ------------------------------------------------------------------------------------------------


def test_actions_past_their_time_expire_and_payment_links_take_their_conversations_back(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.MANUAL)
    text = submit(conversation, ActionType.SEND_MESSAGE, "hello", expires_after=HOUR)
    link = submit(
        conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK}, expires_after=2 * HOUR
    )
    close_engine_clock.move(HOUR - MILLISECOND)
    assert expire_actions() == []
    close_engine_clock.move(MILLISECOND)
    assert expire_actions() == [text.id]
    assert copy_of(conversation).stage is Stage.PENDING_APPROVAL
    moment = milliseconds(close_engine_clock.move(HOUR))
    assert expire_actions() == [link.id]
    assert expire_actions() == []
    assert sql("SELECT DISTINCT status FROM pending_actions") == [("EXPIRED",)]
    row = copy_of(conversation)
    assert row.stage is Stage.PREVIEW_SENT
    change = row.history()[-1]
    assert (change.trigger, change.actor, change.reason) == (
        "withdraw_approval",
        "sweep",
        "it was not approved in time",
    )
    assert change.metadata == {"action_id": link.id, "status": "EXPIRED"}
    assert change.created_at == row.updated_at == moment
    assert messages() == []


def test_two_payment_links_that_expire_at_once_take_the_conversation_back_once(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.MANUAL)
    links = [submit(conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK}) for _ in range(2)]
    close_engine_clock.move(timedelta(hours=24))
    assert sorted(expire_actions()) == sorted(ids(links))
    assert triggers(conversation).count("withdraw_approval") == 1
    assert copy_of(conversation).stage is Stage.PREVIEW_SENT


def test_actions_expire_in_batches(conversation_in: ConversationIn, close_engine_clock: MovableClock) -> None:
    conversation = conversation_in(Stage.QUALIFYING, autonomy_level=AutonomyLevel.MANUAL)
    actions = [submit(conversation, ActionType.SEND_MESSAGE, "hello") for _ in range(5)]
    close_engine_clock.move(timedelta(hours=24))
    assert sorted(expire_actions(batch=2)) == sorted(ids(actions))
    assert list(pending_actions()) == []


def test_a_lease_that_ran_out_is_released(conversation_in: ConversationIn, close_engine_clock: MovableClock) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    outbox.enqueue(conversation, "SEND_MESSAGE", "hello", max_attempts=2)
    outbox.enqueue(conversation, "SEND_MESSAGE", "behind it")
    message = claimed("w1", HOUR)
    close_engine_clock.move(HOUR - MILLISECOND)
    assert release_leases() == []
    close_engine_clock.move(MILLISECOND)
    assert release_leases() == [message.id]
    assert release_leases() == []
    row = copy_of(message)
    assert (row.status, row.leased_by, row.attempts) == (MessageStatus.PENDING, None, 1)
    assert row.last_error == "the lease of w1 ran out"
    assert claimed("w2", HOUR).id == message.id
    close_engine_clock.move(HOUR)
    assert release_leases() == [message.id]
    row = copy_of(message)
    assert (row.status, row.leased_by, row.attempts) == (MessageStatus.DEAD, None, 2)
    assert row.last_error == "the lease of w2 ran out"
    assert claimed().body == "behind it"


# -- payment links that were approved and then withdrawn ---------------------------------------------------------------


def approved_link(conversation: CloseEngineConversation, **options: Any) -> OutboxMessage:
    """A payment link that somebody has approved: its conversation is in PENDING_APPROVAL until it is sent."""
    action = submit(conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK}, **options)
    assert isinstance(action, PendingAction)
    message = action.approve(by="dana")
    assert copy_of(conversation).stage is Stage.PENDING_APPROVAL
    return message


@pytest.fixture
def previewed(conversation_in: ConversationIn) -> CloseEngineConversation:
    return conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.SEMI_AUTO)


@pytest.mark.parametrize("why", ["too late", "by hand", "in flight", "taken over", "the lead wrote", "another writer"])
def test_a_conversation_does_not_wait_for_an_approved_link_that_was_withdrawn(
    previewed: CloseEngineConversation, close_engine_clock: MovableClock, why: str
) -> None:
    message = approved_link(previewed, if_lead_writes="withdraw", not_after=HOUR)
    assert withdraw_approvals() == []
    if why == "too late":
        close_engine_clock.move(HOUR + MILLISECOND)
        assert outbox.claim() == []
    elif why == "by hand":
        message.withdraw("the price has changed")
    elif why == "in flight":
        claimed().withdraw("the price has changed")
    elif why == "taken over":
        copy_of(previewed).take_over(by="owner")
    elif why == "the lead wrote":
        receive(previewed.lead_id, "SM1", "Too expensive.")
    else:
        sql("UPDATE {outbox} SET status = 'WITHDRAWN' WHERE id = %s", message.id)
    assert copy_of(message).status is MessageStatus.WITHDRAWN
    moment = milliseconds(close_engine_clock.move(SECOND))
    assert sweep() == Swept(withdrawn=[previewed.id])
    row = copy_of(previewed)
    assert (row.stage, row.updated_at) == (Stage.PREVIEW_SENT, moment)
    change = row.history()[-1]
    assert (change.trigger, change.actor, change.reason, change.created_at) == (
        "withdraw_approval",
        "sweep",
        "its payment link was withdrawn",
        moment,
    )
    assert sweep() == Swept()
    assert_consistent()


def test_a_conversation_that_still_waits_for_a_link_stays(
    previewed: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    """For one to be approved, to be sent, or to be put back."""
    links = [approved_link(copy_of(previewed)) for _ in range(3)]
    waits = submit(copy_of(previewed), ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK})
    assert isinstance(waits, PendingAction)
    links[0].withdraw("the price has changed")
    claimed().give_up("the number is unknown")
    close_engine_clock.move(SECOND)
    assert withdraw_approvals() == []
    sql("UPDATE pending_actions SET conversation_id = 'another' WHERE id = %s", waits.id)
    assert withdraw_approvals() == []
    links[2].withdraw("the price has changed")
    assert withdraw_approvals() == []
    outbox.requeue(links[1]).withdraw("the price has changed")
    assert withdraw_approvals() == [previewed.id]


def test_a_conversation_that_somebody_put_there_by_hand_stays(
    previewed: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    """Whatever was withdrawn before."""
    approved_link(previewed).withdraw("the price has changed")
    close_engine_clock.move(SECOND)
    assert withdraw_approvals() == [previewed.id]
    copy_of(previewed).request_approval(actor="dana")
    close_engine_clock.move(SECOND)
    assert withdraw_approvals() == []
    # Resuming is no new beginning: what waited before stalling still waits.
    message = approved_link(copy_of(previewed))
    copy_of(previewed).stall()
    copy_of(previewed).resume()
    message.withdraw("the price has changed")
    close_engine_clock.move(SECOND)
    assert withdraw_approvals() == [previewed.id]


def test_a_hook_of_the_stage_runs_then_too(
    previewed: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    approved_link(previewed).withdraw("the price has changed")
    close_engine_clock.move(SECOND)
    seen: list[str] = []
    hook = on_enter(Stage.PREVIEW_SENT)(lambda conversation, change: seen.append(conversation.id))
    try:
        assert withdraw_approvals() == [previewed.id]
    finally:
        hook.remove()
    assert seen == [previewed.id]


def test_one_sweep_does_all_of_it(conversation_in: ConversationIn, close_engine_clock: MovableClock) -> None:
    stalled = conversation_in(Stage.STALLED)
    silent = conversation_in(Stage.BUILDING, autonomy_level=AutonomyLevel.MANUAL)
    action = submit(silent, ActionType.SEND_MESSAGE, "hello")
    outbox.enqueue(silent, "tell_the_rep")
    message = claimed()
    assert sweep() == Swept()
    close_engine_clock.move(WEEK + SECOND)
    assert sweep() == Swept(stalled=[silent.id], lost=[stalled.id], expired=[action.id], released=[message.id])
    assert sweep() == Swept()
    assert copy_of(silent).stage is Stage.STALLED
    assert_consistent()


def test_a_sweep_that_is_rolled_back_moved_nothing(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.BUILDING)
    close_engine_clock.move(THREE_DAYS + SECOND)
    with close_engine.atomic() as transaction:
        assert stall_silent() == [conversation.id]
        transaction.rollback()
    assert values(copy_of(conversation)) == values(conversation)
    assert triggers(conversation)[-1] == "start_building"


def test_what_a_sweep_says_of_itself_is_not_said_of_what_follows_in_its_transaction(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, kind: str
) -> None:
    silent, other = conversation_in(Stage.BUILDING), conversation_in(Stage.BUILDING)
    close_engine_clock.move(THREE_DAYS + SECOND)
    with close_engine.atomic():
        receive(other.lead_id, "SM1", "hello")
        assert stall_silent() == [silent.id]
        sql("UPDATE close_engine_conversations SET stage = 'STALLED' WHERE id = %s", other.id)
    assert silent.history()[-1].actor == "sweep"
    assert other.history()[-1].actor.startswith("database")


# -- many at once ------------------------------------------------------------------------------------------------------


def opened(count: int, stage: Stage = Stage.QUALIFYING) -> list[CloseEngineConversation]:
    return [bring_to(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), stage) for _ in range(count)]


@pytest.fixture
def clock(postgres: peewee.Database, close_engine_clock: MovableClock) -> MovableClock:
    """The clock of `postgres`, which stands still until it is moved."""
    close_engine.bind(postgres, clock=close_engine_clock)
    close_engine_clock.rule()
    return close_engine_clock


# Sweeps pass over what others hold, so nothing can hold them up: what they do at once holds however they overlap.


@pytest.mark.parametrize("hooked", [False, True])
def test_many_workers_that_sweep_at_once_move_everything_once(clock: MovableClock, hooked: bool) -> None:
    conversations = opened(40)
    hooks = [on_enter(Stage.STALLED)(lambda conversation, change: None)] if hooked else []
    clock.move(HOUR + SECOND)
    try:
        results = race([lambda: stall_silent(after=HOUR, batch=7)] * 8)
    finally:
        for hook in hooks:
            hook.remove()
    moved = [moved for result in results for moved in result]
    assert sorted(moved) == sorted(ids(conversations))
    assert all(triggers(conversation)[-2:] == ["start_qualifying", "stall"] for conversation in conversations)
    clock.move(HOUR + SECOND)
    results = race([lambda: lose_stalled(after=HOUR, batch=7)] * 8)
    assert sorted(moved for result in results for moved in result) == sorted(ids(conversations))
    assert_consistent()


def test_many_workers_expire_and_release_everything_once(clock: MovableClock) -> None:
    conversations = opened(20, Stage.PREVIEW_SENT)
    CloseEngineConversation.update(autonomy_level=AutonomyLevel.SEMI_AUTO).execute()
    actions = [
        submit(
            copy_of(conversation),
            ActionType.SEND_PAYMENT_LINK,
            "pay",
            metadata={"paymentUrl": LINK},
            expires_after=HOUR,
        )
        for conversation in conversations
        for _ in range(2)
    ]
    for conversation in conversations:
        outbox.enqueue(conversation, "tell_the_rep")
    leased = outbox.claim(limit=50, lease=HOUR)
    assert len(leased) == 20
    clock.move(HOUR)
    results = race([lambda: (expire_actions(batch=3), release_leases(batch=3))] * 8)
    assert sorted(id for expired, _ in results for id in expired) == sorted(ids(actions))
    assert sorted(id for _, released in results for id in released) == sorted(ids(leased))
    for conversation in conversations:
        assert copy_of(conversation).stage is Stage.PREVIEW_SENT
        assert triggers(conversation).count("withdraw_approval") == 1
    assert_consistent()


def test_a_link_that_is_submitted_while_the_sweep_looks_keeps_its_conversation(
    clock: MovableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was not there yet when the sweep found the conversation, and is there once the sweep has its lock."""
    (conversation,) = opened(1, Stage.PREVIEW_SENT)
    CloseEngineConversation.update(autonomy_level=AutonomyLevel.SEMI_AUTO).execute()
    approved_link(copy_of(conversation)).withdraw("the price has changed")
    clock.move(SECOND)
    binding, asked = type(current()), set[str]()
    execute = binding.execute

    def ask(self: Any, statement: str, parameters: Any = ()) -> Any:
        found = execute(self, statement, parameters)
        if "'WITHDRAWN'" in statement and not asked:
            asked.add(statement)
            # Whoever submits writes the conversation, and has committed that already. A foreign writer adds no more.
            sql(
                "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message) "
                "VALUES ('a1', %s, 'lead', 'SEND_PAYMENT_LINK', 'pay')",
                conversation.id,
            )
        return found

    with monkeypatch.context() as patch:
        patch.setattr(binding, "execute", ask)
        assert withdraw_approvals() == []
    assert asked
    assert copy_of(conversation).stage is Stage.PENDING_APPROVAL
    assert sql("SELECT status FROM pending_actions WHERE id = 'a1'") == [("PENDING",)]


def test_many_workers_take_each_conversation_back_once(clock: MovableClock) -> None:
    conversations = opened(20, Stage.PREVIEW_SENT)
    CloseEngineConversation.update(autonomy_level=AutonomyLevel.SEMI_AUTO).execute()
    for conversation in conversations:
        approved_link(copy_of(conversation)).withdraw("the price has changed")
    clock.move(SECOND)
    results = race([lambda: withdraw_approvals(batch=3)] * 8)
    assert sorted(moved for result in results for moved in result) == sorted(ids(conversations))
    assert all(triggers(conversation).count("withdraw_approval") == 1 for conversation in conversations)
    assert_consistent()


def test_what_another_transaction_holds_is_passed_over(clock: MovableClock, postgres_url: str) -> None:
    held, free = opened(2)
    clock.move(HOUR + SECOND)
    other = psycopg2.connect(postgres_url)
    other.cursor().execute("SELECT 1 FROM close_engine_conversations WHERE id = %s FOR UPDATE", (held.id,))
    assert stall_silent(after=HOUR) == [free.id]
    other.rollback()
    other.close()
    assert stall_silent(after=HOUR) == [held.id]


def test_a_text_that_comes_while_a_sweep_goes_on_wins_or_resumes(clock: MovableClock) -> None:
    before, behind, *others = opened(52)
    clock.move(HOUR + SECOND)

    def text_in(conversation: CloseEngineConversation) -> Received:
        return receive(conversation.lead_id, f"SM {conversation.id}", "hello")

    with close_engine.atomic():
        assert text_in(before).resumed is None
        assert before.id not in Running(lambda: stall_silent(after=HOUR)).result()
    assert copy_of(before).stage is Stage.QUALIFYING
    assert copy_of(behind).stage is Stage.STALLED
    for conversation in (behind, *others):
        copy_of(conversation).resume()
    clock.move(HOUR + SECOND)

    with close_engine.atomic():
        assert behind.id in stall_silent(after=HOUR)
        late = Running(lambda: text_in(behind))
        until_they_wait([late])
    assert late.result().resumed is not None
    assert copy_of(behind).stage is Stage.QUALIFYING
    for conversation in others:
        copy_of(conversation).resume()
    clock.move(HOUR + SECOND)

    for conversations in (others[first : first + 10] for first in range(0, 50, 10)):  # whichever comes first
        receivers = [lambda c=conversation: text_in(c) for conversation in conversations]
        *received, stalled = race([*receivers, lambda: stall_silent(after=HOUR, batch=2)])
        for result in received:
            row = copy_of(result.conversation)
            assert (row.stage is Stage.STALLED) == (row.id in stalled and result.resumed is None)
            assert result.answer
    assert_consistent()


def disturb(when: str, body: str) -> None:
    """Add a trigger of somebody else's to the conversations."""
    sql(
        f"CREATE FUNCTION public.disturb() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NEW; END $$;"
        f"CREATE TRIGGER mm_disturb {when} UPDATE ON close_engine_conversations "
        "FOR EACH ROW WHEN (OLD.stage <> 'STALLED' AND NEW.stage = 'STALLED') EXECUTE FUNCTION public.disturb()"
    )


def test_a_stage_that_another_trigger_changes_during_a_sweep_is_in_the_history_once(clock: MovableClock) -> None:
    """PostgreSQL records a sweep's rows together, but not if triggers of others take part."""
    redirected, stalled = opened(2)
    disturb("BEFORE", f"IF NEW.id = '{redirected.id}' THEN NEW.stage := 'CLOSED_LOST'; END IF;")
    clock.move(HOUR + SECOND)
    assert sorted(stall_silent(after=HOUR)) == sorted(ids([redirected, stalled]))
    assert triggers(redirected)[-2:] == ["start_qualifying", "close_lost"]
    assert triggers(stalled)[-2:] == ["start_qualifying", "stall"]
    assert [copy_of(row).stage for row in (redirected, stalled)] == [Stage.CLOSED_LOST, Stage.STALLED]
    assert_consistent()


def test_a_stage_that_another_trigger_changes_after_a_sweep_is_in_the_history_too(clock: MovableClock) -> None:
    lost, dragged, untouched = opened(3)
    receive(dragged.lead_id, "SM1", "hello")  # it is our turn, so the sweep itself leaves it alone
    disturb(
        "AFTER",
        f"UPDATE close_engine_conversations SET stage = 'CLOSED_LOST' WHERE id = NEW.id AND id = '{lost.id}';"
        "UPDATE close_engine_conversations SET stage = 'STALLED', updated_at = NEW.updated_at "
        f"WHERE id = '{dragged.id}' AND NEW.id = '{untouched.id}';",
    )
    clock.move(HOUR + SECOND)
    assert sorted(stall_silent(after=HOUR)) == sorted(ids([lost, untouched]))
    assert triggers(lost)[-2:] == ["stall", "close_lost"]
    assert triggers(dragged)[-2:] == ["start_qualifying", "stall"]
    assert triggers(untouched)[-2:] == ["start_qualifying", "stall"]
    assert_consistent()


def test_triggers_and_policies_of_others_run_with_the_rights_of_who_sweeps(clock: MovableClock) -> None:
    def sweeps_at_once() -> bool:
        return current().dialect.sweeps_at_once(current().database)

    assert sweeps_at_once()
    for statement in (
        "CREATE TRIGGER mine BEFORE UPDATE ON close_engine_conversations "
        "FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "CREATE RULE mine AS ON DELETE TO close_engine_conversations DO ALSO NOTIFY mine",
        "ALTER TABLE close_engine_conversations ENABLE ROW LEVEL SECURITY",
    ):
        with close_engine.atomic() as transaction:
            sql(statement)
            assert not sweeps_at_once(), statement
            transaction.rollback()
    assert sweeps_at_once()


def test_a_deadline_that_was_left_behind_does_not_hinder_a_sweep(clock: MovableClock) -> None:
    left, other = opened(2)
    sql("INSERT INTO close_engine.deadlines VALUES ('close_lost', %s, '2026-01-01')", left.id)
    clock.move(HOUR + SECOND)
    assert sorted(stall_silent(after=HOUR)) == sorted(ids([left, other]))
    assert_consistent()
    clock.move(HOUR + SECOND)
    assert sorted(lose_stalled(after=HOUR)) == sorted(ids([left, other]))
    assert_consistent()


def test_policies_of_row_level_security_hold_for_sweeps(clock: MovableClock) -> None:
    (conversation,) = opened(1)
    sql("ALTER TABLE close_engine_conversations ENABLE ROW LEVEL SECURITY")
    clock.move(HOUR + SECOND)
    assert stall_silent(after=HOUR) == [conversation.id]
    assert conversation.history()[-1].actor == "sweep"


@pytest.mark.parametrize("after", [timedelta(seconds=-1), timedelta(days=400_000)])
@pytest.mark.parametrize("act", [close_engine.stall_silent, close_engine.lose_stalled])
def test_a_sweep_refuses_a_limit_that_makes_no_sense(
    database: peewee.Database, act: Callable[[timedelta], list[str]], after: timedelta
) -> None:
    with pytest.raises(close_engine.InvalidValue, match="it must be from 0 to 36500 days"):
        act(after)
