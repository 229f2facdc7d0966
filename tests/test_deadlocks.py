"""Everything at once on a few conversations: nobody waits for ever, and what must hold holds."""

from __future__ import annotations

import itertools
import random
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import peewee

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    CloseEngineError,
    EntryPoint,
    PastText,
    PendingAction,
    outbox,
    pending_actions,
    receive,
    record_payment,
    submit,
)
from close_engine.database.binding import moment, utc_now
from close_engine.testing import new_lead
from tests.waiting import until
from tests.workers import LINK, assert_consistent, messages, race, sql

DEEDS_EACH = 100
FEW = len(AutonomyLevel) + 1


class TickingClock:
    """A millisecond later each time that somebody looks: a slow machine's hour is as long as a fast one's."""

    def __init__(self) -> None:
        self.start, self.looks = utc_now(), itertools.count()

    def __call__(self) -> datetime:
        return self.start + timedelta(milliseconds=next(self.looks))


class Worker:
    """Does one thing after another to conversations taken at random, as any of many workers may at any time."""

    def __init__(self, number: int) -> None:
        self.name, self.random, self.keys = f"w{number}", random.Random(number), 0

    def some(self, query: peewee.ModelSelect[Any]) -> Any:
        """One of what is found, None where nothing is."""
        found = list(query)
        return self.random.choice(found) if found else None

    def conversation(self) -> CloseEngineConversation:
        taken: CloseEngineConversation = self.some(
            CloseEngineConversation.select().order_by(CloseEngineConversation.created_at.desc()).limit(FEW)
        )
        return taken

    def key(self) -> str:
        self.keys += 1
        return f"{self.name} {self.keys}"

    def submit(self) -> None:
        conversation = self.conversation()
        submit(conversation, self.random.choice(list(ActionType)), "hello", metadata={"paymentUrl": LINK})

    def submit_soon_expired(self) -> None:
        conversation = self.conversation()
        after = timedelta(milliseconds=self.random.randrange(30))
        submit(conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK}, expires_after=after)

    def approve(self) -> None:
        if action := self.some(pending_actions()):
            action.approve(by=self.name)

    def reject(self) -> None:
        if action := self.some(pending_actions()):
            action.reject(by=self.name, reason="no")

    def decide_as_the_crm(self) -> None:
        if action := self.some(pending_actions()):
            status = self.random.choice(["REJECTED", "EXPIRED"])
            sql("UPDATE pending_actions SET status = %s WHERE id = %s AND status = 'PENDING'", status, action.id)

    def send(self) -> None:
        for message in outbox.claim(limit=3, worker=self.name, lease=timedelta(milliseconds=200)):
            message.retry("busy", after=timedelta(0)) if self.random.random() < 0.3 else message.sent()

    def give_up_and_requeue(self) -> None:
        for message in outbox.claim(limit=1, worker=self.name):
            outbox.requeue(message.give_up("no"))

    def receive(self) -> None:
        receive(self.conversation().lead_id, self.key(), "hello", open=self.random.choice([None, EntryPoint.SMS_REPLY]))

    def tell_of_a_text(self) -> None:
        ago = timedelta(milliseconds=self.random.randrange(200))
        close_engine.record_sent(self.conversation().lead_id, self.key(), "hello", author=self.name, at=moment() - ago)

    def take_over_the_past(self) -> None:
        lead_id, at = self.conversation().lead_id, moment()
        keys = self.random.sample([f"{lead_id} {number}" for number in range(20)], 8)
        close_engine.import_texts([PastText(lead_id, "inbound", "hello", key, at) for key in keys], batch=4)

    def take_over(self) -> None:
        until = timedelta(milliseconds=self.random.randrange(100))
        self.conversation().take_over(by=self.name, until=until)

    def hand_back(self) -> None:
        self.conversation().hand_back(by=self.name)

    def change_the_level(self) -> None:
        level = self.random.choice(list(AutonomyLevel))
        sql("UPDATE leads SET autonomy_level = %s WHERE id = %s", level.value, self.conversation().lead_id)

    def pay(self) -> None:
        record_payment(self.conversation().lead_id, self.key())

    def fire(self) -> None:
        conversation = self.conversation()
        if triggers := [trigger for trigger in conversation.allowed_triggers() if trigger not in RARE]:
            conversation.fire(self.random.choice(triggers), payment_link_url=LINK, approved_by="dana")

    def close_lost(self) -> None:
        self.conversation().close_lost("no answer")

    def record(self) -> None:
        self.conversation().record(questions=["q"], data={self.key(): 1})

    def open(self) -> None:
        close_engine.open_conversation(self.conversation().lead_id, EntryPoint.SMS_REPLY)

    def do_several_things_at_once(self) -> None:
        deeds = [Worker.fire, Worker.receive, Worker.record, Worker.open]
        conversation = self.conversation()
        before = self.conversation
        self.conversation = lambda: CloseEngineConversation.get_by_id(conversation.id)  # type: ignore[method-assign]
        try:
            with close_engine.atomic():
                for deed in self.random.sample(deeds, 2):
                    deed(self)
        finally:
            self.conversation = before  # type: ignore[method-assign]

    def sweep(self) -> None:
        close_engine.stall_silent(after=timedelta(milliseconds=self.random.randrange(200)), batch=2)
        close_engine.lose_stalled(after=timedelta(milliseconds=self.random.randrange(500)), batch=2)
        close_engine.expire_actions(batch=2)
        close_engine.release_leases(batch=2)
        close_engine.supersede_drafts(batch=2)
        close_engine.withdraw_approvals(batch=2)

    def work(self) -> None:
        for _ in range(DEEDS_EACH):
            (deed,) = self.random.choices(list(DEEDS), list(DEEDS.values()))
            # Refused, in conflict, too late: all but a deadlock is as it should be.
            with suppress(CloseEngineError):
                deed(self)


#: How often each is done.
DEEDS = {
    Worker.submit: 10,
    Worker.submit_soon_expired: 5,
    Worker.approve: 5,
    Worker.reject: 5,
    Worker.decide_as_the_crm: 3,
    Worker.send: 8,
    Worker.give_up_and_requeue: 2,
    Worker.receive: 8,
    Worker.tell_of_a_text: 4,
    Worker.take_over_the_past: 3,
    Worker.fire: 10,
    Worker.record: 8,
    Worker.open: 8,
    Worker.do_several_things_at_once: 15,
    Worker.sweep: 3,
    Worker.take_over: 2,
    Worker.hand_back: 1,
    Worker.change_the_level: 1,
    Worker.close_lost: 1,
    Worker.pay: 0.2,
}
RARE = ("stall", "close_lost", "complete")


def test_everything_at_once_on_a_few_conversations_never_deadlocks(postgres: peewee.Database) -> None:
    close_engine.bind(postgres, clock=TickingClock())
    workers = [Worker(number) for number in range(10)]

    def all_of_it_happened() -> bool:
        for level in [*AutonomyLevel, AutonomyLevel.MANUAL]:
            close_engine.open_conversation(new_lead(autonomy_level=level), EntryPoint.SMS_REPLY)
        assert race([worker.work for worker in workers]) == [None] * 10
        assert_consistent()
        statuses = {action.status for action in PendingAction.select()} | {message.status for message in messages()}
        return {"APPROVED", "REJECTED", "EXPIRED", "SENT"} <= statuses

    # Which deeds come in time is chance, however the dice fall, so it cannot be certain that each succeeds. Once is
    # nearly always enough; if not, it begins again with new conversations, for as long as anything is waited for.
    until(all_of_it_happened, "drafts were approved, rejected and expired, and messages sent")
