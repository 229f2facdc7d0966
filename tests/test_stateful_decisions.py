"""Whoever decides, in any order: what leaves is what should, and a lead who is back finds things where they stand.

Python, a foreign writer in another timezone, sweeps, people who approve, and a worker act on the same conversations.
The worker has quiet hours and a cap, texts may come too late, sending is paused, and a provider says what arrived. A
model says what must come of it. It shares no code and no SQL with the library: its rules are written out here again,
in plain Python.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from operator import is_
from typing import Any

import peewee
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import close_engine
from close_engine import (
    ActionStatus,
    ActionType,
    CloseEngineConversation,
    CloseEngineError,
    DailyCap,
    EntryPoint,
    OutboxMessage,
    PendingAction,
    QuietHours,
    Worker,
    pause_sending,
    record_delivery,
    resume_sending,
    submit,
    subscribe,
)
from close_engine.testing import MovableClock, new_lead
from tests.foreign import REFUSED, ForeignWriter
from tests.rows import replayed

HOUR = timedelta(hours=1)
LINK = "https://pay.example.com/1"
CLOSED = ("COMPLETED", "CLOSED_LOST")
LEVELS = ("FULL_AUTO", "SEMI_AUTO", "MANUAL")

#: No text leaves in these hours of the day, in UTC, and not more than so many of the AI on a day.
QUIET, CAP = range(0, 12), 3

#: What a provider may say, from the least to the furthest.
SAID = ["queued", "sent", "undelivered", "delivered", "read"]

#: What a foreign writer may do to the stage of an active conversation.
MOVES = {
    "INITIATED": ["QUALIFYING"],
    "QUALIFYING": ["COLLECTING_INFO", "BUILDING"],
    "COLLECTING_INFO": ["BUILDING"],
    "BUILDING": ["PREVIEW_SENT"],
    "PREVIEW_SENT": ["EDIT_LOOP"],
    "EDIT_LOOP": ["PREVIEW_SENT"],
    "PENDING_APPROVAL": ["PREVIEW_SENT"],
    "PAYMENT_SENT": [],
}

#: The trigger behind a text that is sent: from which stages it leads where.
BEHIND = {
    "SEND_MESSAGE": (("INITIATED",), "QUALIFYING"),
    "SEND_PREVIEW": (("BUILDING", "EDIT_LOOP"), "PREVIEW_SENT"),
    "SEND_PAYMENT_LINK": (("PREVIEW_SENT", "EDIT_LOOP", "PENDING_APPROVAL"), "PAYMENT_SENT"),
}


@dataclass
class Draft:
    """What the model knows of a draft."""

    type: str
    by: str
    rule: str
    expires_at: datetime
    #: `waits` for a human, is `queued`, or `ended`: it was sent, refused or withdrawn.
    state: str
    #: The level at which it was judged; None if a human has seen it.
    level: str | None
    approved_by: str = ""
    action_id: str | None = None
    not_after: datetime | None = None
    #: Its place in the lane, once it is queued.
    place: int = 0
    #: When it is claimed again, after it was held back once.
    snoozed_until: datetime | None = None


@dataclass
class Side:
    """What the model knows of a conversation."""

    id: str
    lead_id: str
    stage: str = "INITIATED"
    stalled_in: str = "INITIATED"
    level: str = "FULL_AUTO"
    taken_by: str | None = None
    opted_out: bool = False
    drafts: dict[str, Draft] = field(default_factory=dict)
    #: How often each stage was entered.
    entered: list[str] = field(default_factory=lambda: ["INITIATED"])
    texts: int = 0
    #: When each text left that no human has seen.
    unseen: list[datetime] = field(default_factory=list)
    #: When it began to wait for an approval, in the order of the drafts, and whether a link was withdrawn since.
    asked_at: int = 0
    link_withdrawn: bool = False
    #: How often the cap was reached.
    capped: int = 0
    #: The furthest that the provider said of each text that was sent, by its words.
    said: dict[str, str] = field(default_factory=dict)
    #: The texts that did not arrive.
    lost: set[str] = field(default_factory=set)


#: What ends a conversation happens seldom, or little else would.
SELDOM = st.sampled_from([False, False, False, True])


def stricter(one: str, other: str) -> bool:
    return LEVELS.index(one) > LEVELS.index(other)


def asks(level: str, type: str) -> bool:
    return level == "MANUAL" or (level == "SEMI_AUTO" and type == "SEND_PAYMENT_LINK")


class Decisions(RuleBasedStateMachine):
    database: peewee.Database
    clock: MovableClock
    foreign: ForeignWriter
    #: No two runs share a phone number, a text or a draft: they share the database.
    numbers = itertools.count(1)

    @initialize()
    def open(self) -> None:
        tomorrow = (self.clock.now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
        self.clock.now = self.now = tomorrow + timedelta(hours=21, minutes=17)
        self.sides: list[Side] = []
        self.paused: set[str] = set()
        resume_sending()
        subscribe("see", events=["lead:wrote"])
        subscribe("capped", events=["cap:reached"])
        subscribe("lost", events=["message:undelivered"])
        subscribe("entered", stages=["QUALIFYING", "PREVIEW_SENT", "STALLED", "CLOSED_LOST"])
        for _ in range(2):
            lead = new_lead(f"+1555{next(self.numbers):07}")
            conversation = close_engine.open_conversation(lead, EntryPoint.SMS_REPLY)
            self.sides.append(Side(conversation.id, lead.id))

    def teardown(self) -> None:
        for table in (
            "close_engine.outbox",
            "close_engine.deliveries",
            "pending_actions",
            "close_engine_conversations",
        ):
            self.foreign.run(f"DELETE FROM {table}")

    # -- what the model does

    def enter(self, side: Side, stage: str) -> None:
        if stage == "STALLED":
            side.stalled_in = side.stage
        if stage == "PENDING_APPROVAL" and side.stage != "STALLED":
            side.asked_at, side.link_withdrawn = next(self.numbers), False
        side.stage = stage
        side.entered.append(stage)
        if stage in CLOSED:
            self.end(side, lambda draft: True)

    def end(self, side: Side, which: Callable[[Draft], bool]) -> None:
        """End the drafts that have not left. Once all payment links are decided against, nobody waits for one."""
        was_asked = self.waits_for_approval(side)
        for draft in side.drafts.values():
            if draft.state != "ended" and which(draft):
                if draft.state == "queued" and draft.type == "SEND_PAYMENT_LINK" and draft.place > side.asked_at:
                    side.link_withdrawn = True
                draft.state = "ended"
        if side.stage == "PENDING_APPROVAL" and was_asked and not self.waits_for_approval(side):
            self.enter(side, "PREVIEW_SENT")

    def waits_for_approval(self, side: Side) -> bool:
        return "waits" in self.links(side)

    def links(self, side: Side) -> set[str]:
        return {draft.state for draft in side.drafts.values() if draft.type == "SEND_PAYMENT_LINK"}

    def where_it_stands(self, side: Side) -> str:
        if side.stalled_in == "PENDING_APPROVAL":
            return "PENDING_APPROVAL" if self.links(side) - {"ended"} else "PREVIEW_SENT"
        return side.stalled_in

    def written(self, side: Side) -> None:
        side.texts += 1
        if side.stage in CLOSED:
            return
        if side.stage == "STALLED":
            self.enter(side, self.where_it_stands(side))
        self.end(side, lambda draft: draft.rule == "withdraw")

    def closed(self, side: Side) -> None:
        if side.stage not in CLOSED:
            self.enter(side, "CLOSED_LOST")

    def expire(self, side: Side) -> None:
        self.end(side, lambda draft: draft.state == "waits" and draft.expires_at <= self.now)

    def conversation(self, side: Side) -> CloseEngineConversation:
        return CloseEngineConversation.get_by_id(side.id)

    # -- what happens

    @rule(hours=st.sampled_from([1, 2, 5, 8, 30]), works=st.booleans())
    def time_passes(self, hours: int, works: bool) -> None:
        self.now = self.clock.move(hours * HOUR)
        if works:
            self.a_worker_sends()

    @rule(which=st.integers(0, 1), hours=st.lists(st.sampled_from([None, 1, 30]), min_size=1, max_size=4))
    def the_ai_writes(self, which: int, hours: list[int | None]) -> None:
        """Replies, of which some may come too late; then the worker sends what it may."""
        for limit in hours:
            self.submit(which, "SEND_MESSAGE", "ai", "send", limit)
        self.a_worker_sends()

    @rule(
        which=st.integers(0, 1),
        type=st.sampled_from(list(BEHIND)),
        by=st.sampled_from(["ai", "dana"]),
        rule_=st.sampled_from([None, "withdraw", "send"]),
        hours=st.sampled_from([None, 1, 6]),
    )
    def somebody_submits(self, which: int, type: str, by: str, rule_: Any, hours: int | None) -> None:
        self.submit(which, type, by, rule_, hours)

    def submit(self, which: int, type: str, by: str, rule_: Any, hours: int | None) -> None:
        side, name = self.sides[which], f"draft {next(self.numbers)}"
        conversation = self.conversation(side)
        metadata = {"paymentUrl": LINK} if type == "SEND_PAYMENT_LINK" else {}
        sources, dest = BEHIND[type]
        may = side.stage not in CLOSED and not side.opted_out and side.taken_by in (None, by)
        may = may and (type == "SEND_MESSAGE" or side.stage in (*sources, dest))
        options = {"metadata": metadata, "actor": by, "if_lead_writes": rule_, "key": name}
        options["not_after"] = None if hours is None else hours * HOUR
        if not may:
            with pytest.raises(CloseEngineError):
                submit(conversation, ActionType(type), name, **options)
            return
        made = submit(conversation, ActionType(type), name, **options)
        rule = rule_ or ("withdraw" if type == "SEND_MESSAGE" else "send")
        draft = Draft(type, by, rule, self.now + 24 * HOUR, "queued", side.level, place=next(self.numbers))
        if hours is not None:
            draft.not_after = self.now + hours * HOUR
            draft.expires_at = min(draft.expires_at, draft.not_after)
        if side.taken_by == by:
            draft.level, draft.approved_by = None, by
            assert isinstance(made, OutboxMessage)
        elif asks(side.level, type):
            assert isinstance(made, PendingAction)
            draft.state, draft.action_id = "waits", made.id
            if type == "SEND_PAYMENT_LINK" and side.stage in ("PREVIEW_SENT", "EDIT_LOOP"):
                self.enter(side, "PENDING_APPROVAL")
        else:
            assert isinstance(made, OutboxMessage)
        side.drafts[name] = draft

    @rule(which=st.integers(0, 1), opens=st.booleans())
    def the_lead_writes(self, which: int, opens: bool) -> None:
        side = self.sides[which]
        key = f"SM{next(self.numbers)}"
        received = close_engine.receive(side.lead_id, key, "words", open=EntryPoint.SMS_REPLY if opens else None)
        if side.stage == "CLOSED_LOST" and opens and not side.opted_out:
            self.enter(side, "INITIATED")
        self.written(side)
        assert received.answer == (side.stage not in CLOSED and side.taken_by is None)
        assert close_engine.receive(side.lead_id, key, "words").duplicate

    @rule(which=st.integers(0, 1), word=st.sampled_from(["STOP", " stop. ", "Unsubscribe!"]), really=SELDOM)
    def the_lead_opts_out(self, which: int, word: str, really: bool) -> None:
        if not really:
            return
        side = self.sides[which]
        received = close_engine.receive(side.lead_id, f"SM{next(self.numbers)}", word)
        assert not received.answer
        side.opted_out = True
        self.closed(side)
        self.end(side, lambda draft: True)

    @rule(which=st.integers(0, 1))
    def the_lead_opts_in(self, which: int) -> None:
        """START lifts the ban and opens nothing. Where there is no ban, it is a text like any other."""
        side = self.sides[which]
        close_engine.receive(side.lead_id, f"SM{next(self.numbers)}", "START")
        if not side.opted_out:
            self.written(side)
        side.opted_out = False

    @rule(data=st.data(), approves=st.booleans(), as_the_crm=st.booleans())
    def a_human_decides(self, data: st.DataObject, approves: bool, as_the_crm: bool) -> None:
        """Decide on any action, in whatever state it is; the CRM writes an `approved_at` of its own."""
        known = [(side, draft) for side in self.sides for draft in side.drafts.values() if draft.action_id]
        if not known:
            return
        side, draft = data.draw(st.sampled_from(known))
        may = draft.state == "waits" and draft.expires_at > self.now
        action = PendingAction.get_by_id(draft.action_id)
        before = action.status
        if as_the_crm:
            status = "APPROVED" if approves else "REJECTED"
            long_ago = (self.now - 48 * HOUR).strftime("%Y-%m-%d %H:%M:%S.000")
            write = "UPDATE pending_actions SET status = %s, approved_by = 'crm', approved_at = %s WHERE id = %s"
            try:
                self.foreign.run(write, status, long_ago, action.id)
            except REFUSED:
                assert not may or (draft.state == "waits" and not approves)
                return
        else:
            try:
                action.approve(by="dana") if approves else action.reject(by="dana")
            except CloseEngineError:
                assert not may
                return
        if draft.state != "waits":
            assert PendingAction.get_by_id(action.id).status is before
            return
        if approves:
            assert may
            draft.state, draft.level, draft.approved_by = "queued", None, "crm" if as_the_crm else "dana"
            draft.place, draft.snoozed_until = next(self.numbers), None
        else:
            self.end(side, partial(is_, draft))

    @rule(which=st.integers(0, 1), level=st.sampled_from(LEVELS))
    def the_owner_sets_the_level(self, which: int, level: str) -> None:
        side = self.sides[which]
        for table, of in (("leads", side.lead_id), ("close_engine_conversations", side.id)):
            self.foreign.run(f"UPDATE {table} SET autonomy_level = %s WHERE id = %s", level, of)
        side.level = level

    @rule(which=st.integers(0, 1))
    def a_human_takes_over(self, which: int) -> None:
        side = self.sides[which]
        if side.stage in CLOSED:
            return
        self.conversation(side).take_over(by="dana")
        if side.taken_by is None:
            self.end(side, lambda draft: draft.by != "dana" and draft.approved_by != "dana")
        side.taken_by = "dana"

    @rule(which=st.integers(0, 1))
    def the_human_hands_back(self, which: int) -> None:
        side = self.sides[which]
        self.conversation(side).hand_back(by="dana")
        side.taken_by = None

    @rule(which=st.integers(0, 1), data=st.data())
    def a_foreign_writer_moves_it(self, which: int, data: st.DataObject) -> None:
        """Write a stage, with an `updated_at` of another timezone: only what the rules allow is taken."""
        side = self.sides[which]
        stage = data.draw(st.sampled_from([*MOVES, "STALLED", "CLOSED_LOST"]))
        if stage == "CLOSED_LOST" and not data.draw(SELDOM):
            return
        may = stage in (*MOVES.get(side.stage, ()), "STALLED", "CLOSED_LOST") and side.stage not in CLOSED
        may = may and stage != side.stage
        if side.stage == "STALLED":
            may = stage in (self.where_it_stands(side), "CLOSED_LOST")
        if side.stage == "CLOSED_LOST":
            may = stage == "INITIATED"
        if stage == side.stage or (side.stage, stage) in UNTOLD:
            return
        there = (self.now - 5 * HOUR).strftime("%Y-%m-%dT%H:%M:%S-05:00")
        try:
            self.foreign.update(side.id, stage=stage, updated_at=there)
        except REFUSED:
            assert not may, (side.stage, stage)
            return
        assert may, (side.stage, stage)
        if (side.stage, stage) == ("PENDING_APPROVAL", "PREVIEW_SENT"):
            side.stage = stage
            side.entered.append(stage)
            self.end(side, lambda draft: draft.type == "SEND_PAYMENT_LINK" and draft.state == "waits")
        else:
            self.enter(side, stage)

    @rule()
    def sweep(self) -> None:
        # The version of what was written several times at one moment is ahead of the clock.
        self.now = self.clock.move(timedelta(seconds=1))
        close_engine.expire_actions(batch=1)
        close_engine.supersede_drafts()
        close_engine.release_leases()
        close_engine.withdraw_approvals()
        for side in self.sides:
            self.expire(side)
            if side.stage == "PENDING_APPROVAL" and side.link_withdrawn and not self.links(side) - {"ended"}:
                self.enter(side, "PREVIEW_SENT")

    @rule(topics=st.sampled_from([[], [*BEHIND], ["SEND_MESSAGE"], ["SEND_PREVIEW"]]))
    def sending_is_paused(self, topics: list[str]) -> None:
        pause_sending("a test", topics=topics or None, by="dana")
        self.paused |= set(topics or [*BEHIND, ""])

    @rule()
    def sending_is_resumed(self) -> None:
        resume_sending(by="dana")
        self.paused = set()

    @rule(data=st.data(), status=st.sampled_from(SAID), by_key=st.booleans())
    def the_provider_says_what_arrived(self, data: st.DataObject, status: str, by_key: bool) -> None:
        known = [(side, name) for side in self.sides for name in side.said]
        if not known:
            return
        side, name = data.draw(st.sampled_from(known))
        side.said[name] = max(side.said[name], status, key=["", *SAID].index)
        if status == "undelivered" == side.said[name]:
            side.lost.add(name)
        message = OutboxMessage.get(OutboxMessage.body == name)
        named = {"send_key": message.send_key} if by_key else {"provider_id": message.provider_id}
        assert record_delivery(status, **named).status == side.said[name]

    @rule()
    def a_worker_sends(self) -> None:
        """Send what can be sent: each text may leave, and each that may leave does."""
        left: list[tuple[str, str | None]] = []

        def send(message: OutboxMessage) -> str:
            if message.topic in BEHIND:
                left.append((message.conversation_id, message.body))
            return f"SM-{message.send_key}"

        quiet = QuietHours(f"{QUIET.start:02}:00", f"{QUIET.stop:02}:00", default="UTC")
        worker = Worker(send, concurrency=1, sweep=None, quiet_hours=quiet, daily_cap=DailyCap(CAP, default="UTC"))
        worker.run_until_empty()
        for side in self.sides:
            assert [body for conversation_id, body in left if conversation_id == side.id] == list(self.leaving(side))
            queued = [name for name, draft in side.drafts.items() if draft.state == "queued"]
            pending = self.foreign.run(
                "SELECT body FROM close_engine.outbox WHERE status = 'PENDING' AND conversation_id = %s "
                "AND body IS NOT NULL",
                side.id,
            )
            assert {body for (body,) in pending} == set(queued)
            for draft, name in ((draft, name) for name, draft in side.drafts.items()):
                if draft.state == "waits" and draft.action_id is None:
                    message = OutboxMessage.get(OutboxMessage.body == name)
                    draft.action_id = message.action_id
                    assert PendingAction.get_by_id(draft.action_id).status is ActionStatus.PENDING

    def leaving(self, side: Side) -> Iterator[str]:
        """Let the texts of a conversation leave, one after the other, until one is held back that others wait for."""
        lane = [(draft, name) for name, draft in side.drafts.items() if draft.state == "queued"]
        for draft, name in sorted(lane, key=lambda each: each[0].place):
            if draft.type in self.paused:
                return
            again, late = draft.snoozed_until, draft.not_after is not None and draft.not_after < self.now
            if again is not None and again > self.now and not late:
                return
            if late:
                self.end(side, partial(is_, draft))
            elif draft.level is not None and stricter(side.level, draft.level) and asks(side.level, draft.type):
                self.ask_human(draft)
            elif self.now.hour in QUIET:
                draft.snoozed_until = self.now.replace(hour=QUIET.stop, minute=0, second=0, microsecond=0)
                return
            elif draft.level is not None and [at.date() for at in side.unseen].count(self.now.date()) >= CAP:
                side.capped += 1
                self.ask_human(draft)
            else:
                self.sent(side, name)
                yield name

    def ask_human(self, draft: Draft) -> None:
        draft.state, draft.expires_at = "waits", self.now + 24 * HOUR
        if draft.not_after is not None:
            draft.expires_at = min(draft.expires_at, draft.not_after)

    def sent(self, side: Side, name: str) -> None:
        draft = side.drafts[name]
        assert draft.state == "queued", (name, draft)
        assert not side.opted_out
        assert side.taken_by in (None, draft.by, draft.approved_by)
        assert side.stage not in CLOSED
        draft.state = "ended"
        side.said[name] = ""
        if draft.level is not None:
            side.unseen.append(self.now)
        if side.stage == "STALLED":
            stage = self.where_it_stands(side)
            if draft.type == "SEND_PAYMENT_LINK" and side.stalled_in == "PENDING_APPROVAL":
                stage = side.stalled_in if self.waits_for_approval(side) else "PREVIEW_SENT"
            self.enter(side, stage)
        sources, dest = BEHIND[draft.type]
        if side.stage in sources:
            self.enter(side, dest)

    # -- what always holds

    @invariant()
    def the_stage_is_the_one_of_the_model_and_of_the_history(self) -> None:
        for side in self.sides:
            stage = CloseEngineConversation.get_by_id(side.id).stage
            assert stage == side.stage
            assert replayed(side.id) is stage

    @invariant()
    def each_subscription_is_put_in_once_an_event(self) -> None:
        for side in self.sides:
            texts = self.foreign.run(
                "SELECT count(*) FROM close_engine.outbox WHERE topic = 'see' AND conversation_id = %s", side.id
            )
            assert texts == [(side.texts,)]
            counted = self.foreign.run(
                "SELECT count(*) FROM close_engine.outbox WHERE topic = 'entered' AND conversation_id = %s", side.id
            )
            for topic, count in (("capped", side.capped), ("lost", len(side.lost))):
                told = self.foreign.run(
                    "SELECT count(*) FROM close_engine.outbox WHERE topic = %s AND conversation_id = %s", topic, side.id
                )
                assert told == [(count,)]
            watched = ("QUALIFYING", "PREVIEW_SENT", "STALLED", "CLOSED_LOST")
            assert counted == [(sum(stage in watched for stage in side.entered),)]


#: Stage changes of a foreign writer that the model leaves out: they are those of a trigger with arguments.
UNTOLD = {(stage, "PAYMENT_SENT") for stage in ("PREVIEW_SENT", "EDIT_LOOP", "PENDING_APPROVAL")} | {
    (stage, "PENDING_APPROVAL") for stage in ("PREVIEW_SENT", "EDIT_LOOP")
}


@pytest.fixture
def far_away(foreign: ForeignWriter) -> ForeignWriter:
    """A writer whose session is in another timezone."""
    if foreign.is_postgres:
        foreign.run("SET timezone = 'America/New_York'")
    return foreign


@pytest.mark.parametrize("kind", ["sqlite-memory", "postgresql"])  # in a file, SQLite only waits for the disk
def test_what_leaves_is_what_should_whoever_decides(
    database: peewee.Database, far_away: ForeignWriter, close_engine_clock: MovableClock
) -> None:
    close_engine_clock.rule()
    Decisions.database, Decisions.clock, Decisions.foreign = database, close_engine_clock, far_away
    run_state_machine_as_test(
        Decisions,
        settings=settings(
            max_examples=25 if isinstance(database, peewee.PostgresqlDatabase) else 50,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
