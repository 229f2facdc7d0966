"""Everything at once on a few conversations: nobody waits for ever, and what must hold holds."""

from __future__ import annotations

import random
from contextlib import suppress
from datetime import timedelta
from typing import Any

import peewee

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    CloseEngineError,
    EntryPoint,
    PendingAction,
    outbox,
    pending_actions,
    receive,
    record_payment,
    submit,
)
from close_engine.testing import new_lead
from tests.workers import LINK, assert_consistent, messages, race, sql

ROUNDS = 100


def some(query: peewee.ModelSelect[Any]) -> Any:
    return query.order_by(peewee.fn.random()).first()


class Worker:
    """Does one thing after another to conversations taken at random, as any of many workers may at any time."""

    def __init__(self, number: int) -> None:
        self.name, self.random, self.keys = f"w{number}", random.Random(number), 0

    def conversation(self) -> CloseEngineConversation:
        taken: CloseEngineConversation = some(CloseEngineConversation.select())
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
        if action := some(pending_actions()):
            action.approve(by=self.name)

    def reject(self) -> None:
        if action := some(pending_actions()):
            action.reject(by=self.name, reason="no")

    def decide_as_the_crm(self) -> None:
        if action := some(pending_actions()):
            status = self.random.choice(["REJECTED", "EXPIRED"])
            sql("UPDATE pending_actions SET status = %s WHERE id = %s AND status = 'PENDING'", status, action.id)

    def send(self) -> None:
        for message in outbox.claim(limit=3, worker=self.name, lease=timedelta(milliseconds=200)):
            message.retry("busy", after=timedelta(0)) if self.random.random() < 0.3 else message.sent()

    def give_up_and_requeue(self) -> None:
        for message in outbox.claim(limit=1, worker=self.name):
            outbox.requeue(message.give_up("no"))

    def receive(self) -> None:
        receive(self.conversation().lead_id, self.key(), "hello")

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

    def work(self) -> None:
        for _ in range(ROUNDS):
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
    Worker.fire: 10,
    Worker.record: 8,
    Worker.open: 8,
    Worker.do_several_things_at_once: 15,
    Worker.sweep: 3,
    Worker.close_lost: 1,
    Worker.pay: 0.2,
}
RARE = ("stall", "close_lost", "complete")


def test_everything_at_once_on_a_few_conversations_never_deadlocks(postgres: peewee.Database) -> None:
    for level in [*AutonomyLevel, AutonomyLevel.MANUAL]:
        close_engine.open_conversation(new_lead(autonomy_level=level), EntryPoint.SMS_REPLY)
    workers = [Worker(number) for number in range(10)]
    wanted, statuses = {"APPROVED", "REJECTED", "EXPIRED", "SENT"}, set()
    for _ in range(10):  # until all of it has happened, for which once is nearly always enough
        assert race([worker.work for worker in workers]) == [None] * 10
        assert_consistent()
        statuses = {action.status for action in PendingAction.select()} | {message.status for message in messages()}
        if wanted <= statuses:
            break
    assert wanted <= statuses
