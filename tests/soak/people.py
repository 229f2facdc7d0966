"""Those outside: leads who text and pay, a provider that calls back, humans who approve, and the CRM's own code."""

from __future__ import annotations

import heapq
import itertools
import random
import signal
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg2

import close_engine
from close_engine import (
    ActionStatus,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    CloseEngineError,
    EntryPoint,
    Lead,
    PaymentUnmatched,
    PendingAction,
    submit,
)
from tests.soak.agency import words
from tests.soak.clock import Calendar
from tests.soak.notes import Log
from tests.soak.processes import begin

#: How many leads come in a second. All else follows from it, so the load is the same all the time.
ARRIVALS = 2.2
#: How often a human of the agency does something, in a second.
DECISIONS = 4.0

#: How long people think, in seconds.
THINKING = (0.7, 4.0)
#: Hours after which somebody writes again who had fallen silent. Some were stalled by then.
SILENCE = (20, 110)

PRICE = (90000, "USD")
_LEVELS = {AutonomyLevel.FULL_AUTO: 45, AutonomyLevel.SEMI_AUTO: 40, AutonomyLevel.MANUAL: 15}


class Agenda:
    """What is to be done when: in seconds from now, or in hours of the simulated time."""

    def __init__(self, calendar: Calendar) -> None:
        self._calendar = calendar
        self._soon: list[tuple[float, int, Callable[[], None]]] = []
        self._later: list[tuple[datetime, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._soon, (time.monotonic() + seconds, next(self._numbers), act))

    def after_hours(self, hours: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._later, (self._calendar() + timedelta(hours=hours), next(self._numbers), act))

    def do_what_is_due(self) -> None:
        while self._soon and self._soon[0][0] <= time.monotonic():
            heapq.heappop(self._soon)[2]()
        # One at a time: a jump of the clock makes no crowd.
        if self._later and self._later[0][0] <= self._calendar():
            heapq.heappop(self._later)[2]()


class _Stopped:
    """Whether this process was asked to end."""

    def __init__(self) -> None:
        self.now = False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *signal: object) -> None:
        self.now = True


def lead_and_provide(name: str, url: str, place: Path, calendar: Calendar) -> None:
    """Be the webhooks until SIGTERM: of the leads and of their provider."""
    stopped, leads = _Stopped(), Leads(begin(name, url, place, calendar), Agenda(calendar))
    leads.arrive()
    while not stopped.now:
        for send_key, _, lead_id, topic, _ in leads.log.delivered.news():
            leads.get(send_key, lead_id, topic)
        leads.agenda.do_what_is_due()
        time.sleep(0.01)


class Leads:
    def __init__(self, log: Log, agenda: Agenda) -> None:
        self.log = log
        self.agenda = agenda

    def arrive(self) -> None:
        self.agenda.after(1 / ARRIVALS, self.arrive)
        lead_id = uuid4().hex
        (level,) = random.choices(list(_LEVELS), weights=list(_LEVELS.values()))
        phone = f"+1555{random.randrange(10**7):07}"
        Lead.create(id=lead_id, phone=phone, autonomy_level=level)
        self.write(lead_id, "I need a website")

    def get(self, send_key: str, lead_id: str, topic: str) -> None:
        """Get a text: it is delivered, mostly, and answered, mostly."""
        arrives = random.random() < 0.98
        say = partial(self.say_of_delivery, f"SM-{send_key}")
        self.agenda.after(0.1, partial(say, "sent"))
        self.agenda.after(random.uniform(0.2, 0.8), partial(say, "delivered" if arrives else "undelivered"))
        if not arrives:
            return
        think = random.uniform(*THINKING)
        answer, stop, no, human, twice = (random.random() for _ in range(5))
        if answer > 0.85:
            if random.random() < 0.5:
                hours = random.uniform(*SILENCE)
                self.agenda.after_hours(hours, partial(self.write, lead_id, "sorry, I was away"))
        elif stop < 0.01:
            self.agenda.after(think, partial(self.write, lead_id, "STOP"))
        elif no < 0.02:
            self.agenda.after(think, partial(self.refuse, lead_id))
        elif human < 0.02:
            self.agenda.after(think, partial(self.be_called, lead_id))
        elif topic == ActionType.SEND_PAYMENT_LINK:
            self.agenda.after(think, partial(self.pay, lead_id))
        else:
            text = "please change the colours" if random.random() < 0.35 else words(12)
            self.agenda.after(think, partial(self.write, lead_id, text))
            if twice < 0.1:
                self.agenda.after(think + 0.3, partial(self.write, lead_id, "and one more thing"))

    def write(self, lead_id: str, text: str) -> None:
        receive = partial(close_engine.receive, lead_id, f"in-{uuid4()}", text, open=EntryPoint.SMS_REPLY)
        with self.log.timing("receive"):
            receive()
        self.log.done.write("text", receive.args[1])
        if random.random() < 0.05:  # webhooks are sent again
            assert receive().duplicate

    def say_of_delivery(self, provider_id: str, status: str) -> None:
        with self.log.timing("record_delivery"):
            close_engine.record_delivery(status, provider_id=provider_id, error=None if status != "undelivered" else 1)

    def pay(self, lead_id: str) -> None:
        key, (amount, currency) = f"pi-{uuid4()}", PRICE
        pay = partial(close_engine.record_payment, lead_id, key, amount=amount, currency=currency, price=PRICE)
        try:
            with self.log.timing("record_payment"):
                pay()
        except PaymentUnmatched as error:
            self.log.refused.write(type(error).__name__)
            close_engine.note_payment("unmatched", key, str(error), amount=amount, currency=currency)
        else:
            self.log.done.write("payment", key)
            if random.random() < 0.1:
                assert pay().duplicate

    def refuse(self, lead_id: str) -> None:
        """Say no to a human, who closes the conversation."""
        conversation = CloseEngineConversation.get_or_none(CloseEngineConversation.lead == lead_id)
        try:
            with self.log.timing("stage change"):
                change = conversation.close_lost("not interested", actor="dana")
            self.log.done.write("change", change.id)
        except CloseEngineError as error:
            self.log.refused.write(type(error).__name__)

    def be_called(self, lead_id: str) -> None:
        """Be texted from a human's phone, which the CRM records."""
        close_engine.record_sent(lead_id, f"out-{uuid4()}", words(10), author="dana")


def decide(name: str, url: str, place: Path, calendar: Calendar) -> None:
    """Be the humans of the agency, on their screen and on the CRM's, until SIGTERM."""
    stopped = _Stopped()
    humans = Humans(begin(name, url, place, calendar), psycopg2.connect(url, user="crm_app"))
    due = time.monotonic()
    while not stopped.now:
        humans.act()
        due += 1 / DECISIONS
        time.sleep(max(0.0, due - time.monotonic()))


class Humans:
    """The agency's humans.

    Args:
        log: Log.
        crm: the connection of the CRM's own application, whose role has no rights on our schema.
    """

    def __init__(self, log: Log, crm: Any) -> None:
        self.log = log
        self.crm = crm
        self.crm.autocommit = True
        self.seen: list[str] = []  # what was decided, or is about to expire

    def act(self) -> None:
        actions = [action for action in close_engine.pending_actions().limit(20) if not self.is_left_alone(action)]
        ways: dict[Callable[[PendingAction], object], int] = {
            self.approve: 40,
            self.edit: 10,
            self.reject: 8,
            self.approve_in_sql: 20,
            self.take_over: 2,
        }
        if actions:
            (way,) = random.choices(list(ways), weights=list(ways.values()))
            self._try(lambda: way(actions[0]))
            self.seen.append(actions[0].id)
        if random.random() < 0.1:
            self.approve_many(actions[1:6])
        if self.seen and random.random() < 0.1:
            self.come_late(self.seen.pop(0))
        del self.seen[:-50]

    @staticmethod
    def is_left_alone(action: PendingAction) -> bool:
        """Nobody decides on one in twenty, so that it expires."""
        return sum(map(ord, action.id)) % 20 == 0

    def approve(self, action: PendingAction, message: str | None = None) -> None:
        with self.log.timing("approve"):
            approved = action.approve(by="dana", message=message)
        self.log.done.write("approved", action.id)
        self.log.done.write("message", approved.id)

    def edit(self, action: PendingAction) -> None:
        self.approve(action, "In other words: " + words(5))

    def reject(self, action: PendingAction) -> None:
        action.reject(by="dana", reason="too pushy")
        self.log.done.write("rejected", action.id)

    def approve_many(self, actions: list[PendingAction]) -> None:
        for action_id in close_engine.approve_all("dana", actions).done:
            self.log.done.write("approved", action_id)

    def approve_in_sql(self, action: PendingAction) -> None:
        statement = "UPDATE pending_actions SET status = 'APPROVED', approved_by = 'lee', approved_at = now()"
        with self.crm.cursor() as cursor:
            cursor.execute(f"{statement} WHERE id = %s AND status = 'PENDING'", (action.id,))
            if cursor.rowcount:
                self.log.done.write("approved", action.id)

    def come_late(self, action_id: str) -> None:
        """Decide on what was decided long ago: the first decision stands."""
        action = PendingAction.get_or_none(PendingAction.id == action_id)
        if action is not None and action.status is not ActionStatus.APPROVED:
            self._try(lambda: action.approve(by="lee"))
        elif action is not None:
            self._try(lambda: action.reject(by="lee"))

    def take_over(self, action: PendingAction) -> None:
        """Write instead of the AI, and hand back."""
        conversation = CloseEngineConversation.get_by_id(action.conversation_id)
        conversation.take_over(by="dana", until=timedelta(hours=2))
        submitted = submit(conversation, ActionType.SEND_MESSAGE, words(6), actor="dana")
        self.log.done.write("message", submitted.id)
        conversation.reload()
        if random.random() < 0.8:
            conversation.hand_back(by="dana")

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (CloseEngineError, psycopg2.errors.CheckViolation) as error:
            self.log.refused.write(type(error).__name__)
