"""The demo: leads and their conversations, in a temporary database and simulated time.

    with temporary_database() as url:
        demo = Demo(url, leads=300, seed=1)
        for _ in demo.run():          # one item per step, `demo.total` in all
            ...
        report = demo.report()

Drafts are submitted at all three autonomy levels, then approved, corrected, rejected or left to expire. Messages go
through the outbox. Leads write, fall silent and pay. Sweeps run. Two worker processes send the last messages, and one
of them is killed in the middle of a send. With any number of leads, every stage and trigger occurs, and every mistake
in `MISTAKES` is made on purpose, to show that it is refused. The same seed tells the same stories. Here with forty
leads:

>>> from close_engine.demo.place import temporary_database
>>> with temporary_database() as url, Demo(url, leads=40, seed=1) as demo:
...     steps = sum(1 for _ in demo.run())
...     report = demo.report()
>>> steps == demo.total, report.conversations, report.problems
(True, 40, [])
>>> [line.stage for line in report.stages if not line.now or not line.entered]
[]
>>> report.handover.attempts, report.handover.texts
(2, 1)
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import partial
from random import Random
from typing import TypeVar

import peewee

from close_engine import outbox
from close_engine.approvals import PendingAction, submit
from close_engine.conversations import CloseEngineConversation, open_conversation
from close_engine.database.binding import current
from close_engine.database.fields import create_id, stored_time
from close_engine.database.url import connect
from close_engine.demo.audit import Tally, audit
from close_engine.demo.handover import hand_over
from close_engine.demo.mistakes import MISTAKES, Turn
from close_engine.demo.provider import Provider
from close_engine.demo.report import Report
from close_engine.demo.stories import CAST, HERO, STILL_ACTIVE, STORIES, Role
from close_engine.errors import CannotBeSent, ConfigurationError
from close_engine.inbox import receive
from close_engine.models import Lead, User
from close_engine.outbox import OutboxMessage
from close_engine.payments import record_payment
from close_engine.schema.migrations import migrate
from close_engine.stages import ActionStatus, ActionType, AutonomyLevel, EntryPoint, MessageStatus, Stage
from close_engine.sweeps import sweep

__all__ = ["MIN_LEADS", "VERBS", "Demo", "Verb"]

T = TypeVar("T")

MIN_LEADS = len(CAST)

#: How much time the demo simulates, and how often the sweeps run.
DURATION, SWEEP_EVERY = timedelta(days=60), timedelta(hours=6)

#: How often a step comes with a mistake, an event is reported twice, and the provider does not answer.
MISTAKE_PERCENT, REPEAT_PERCENT, UNANSWERED_PERCENT = 12, 8, 4

#: The maximum number of messages that are left to the two worker processes.
MAX_LAST_MESSAGES = 30


class Demo:
    """One run of the demo, in its own database.

    Args:
        url: str, the URL of an empty database.
        leads: number of leads, at least MIN_LEADS.
        seed: int; the same seed tells the same stories.

    Attributes:
        total: number of steps that `run` takes.

    Raises:
        ConfigurationError: there are too few leads.
    """

    def __init__(self, url: str, leads: int, seed: int) -> None:
        if leads < MIN_LEADS:
            raise ConfigurationError(f"The demo needs at least {MIN_LEADS} leads to show every stage and trigger.")
        self._url = url
        self._random = Random(seed)
        self._end = datetime.now(timezone.utc).replace(microsecond=0)
        self._simulated = self._end - DURATION
        self._roles = [self._role(number) for number in range(leads)]
        self._provider = Provider()
        self._role_of: dict[str, Role] = {}
        self._deliveries: list[datetime] = []
        self._tally = Tally()
        self._steps = sorted(self._plan(), key=lambda step: step[0])
        self.total = len(self._steps) + 1

    def __enter__(self) -> Demo:
        self._database = connect(self._url, clock=lambda: self._simulated)
        if isinstance(self._database, peewee.SqliteDatabase):  # the database is temporary, so a crash may lose it
            self._database.pragma("synchronous", "off", permanent=True)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._database.close()

    def run(self) -> Iterator[None]:
        """Run the demo.

        Yields:
            None, after each step.
        """
        migrate(standalone=True)
        self._now = self._simulated
        self._reps = [User.create() for _ in range(3)]
        for moment, take_step in self._steps:
            self._deliver_until(moment)
            self._now = moment
            take_step()
            yield
        self._deliver_until(self._end)
        self._now = self._end
        preview, *others = self._last_messages()
        self._handover = hand_over(self._url, self._provider, preview, others, self._now, self._set_clock)
        yield

    @property
    def hero(self) -> Role:
        """The lead whose conversation is told whole."""
        return next(role for role in self._roles if role.story is HERO)

    def report(self) -> Report:
        """Return the results, once `run` has ended."""
        current().dialect.set_clock(self._database, None)
        return audit(self._tally, self._provider, self._handover)

    @property
    def _now(self) -> datetime:
        """The simulated time, of Python and of the database."""
        return self._simulated

    @_now.setter
    def _now(self, moment: datetime) -> None:
        self._simulated = moment
        current().dialect.set_clock(self._database, stored_time(moment))

    def _set_clock(self, moment: datetime) -> None:
        self._now = moment

    # Events ---------------------------------------------------------------------------------------------------------

    def any_worker(self) -> str:
        """Return the name of one of the workers, for the history."""
        return f"worker-{self._random.randint(1, 4)}"

    def open(self, role: Role, entry_point: EntryPoint | None = None) -> None:
        """Open the lead's conversation; with an entry point, reopen it."""
        if entry_point is None:
            role.lead = Lead.create(phone=f"+1555{role.number:07}", autonomy_level=role.story.autonomy_level)
            self._role_of[role.lead.id] = role
        key = f"lead-{role.number}" if entry_point is None else f"back-{role.number}"
        entry_point = entry_point or self._random.choice(list(EntryPoint))
        rep = self._random.choice(self._reps)
        role.conversation = self._sometimes_twice(
            "opening", lambda: open_conversation(role.lead, entry_point, rep=rep, key=key, actor="inbox")
        )

    def submit(
        self, role: Role, type: ActionType, draft: str, wait: timedelta = timedelta(minutes=1), **metadata: str
    ) -> None:
        """Submit a draft, which is sent after a short wait, or waits for approval."""
        role.drafts += 1
        queued = self._sometimes_twice(
            "draft",
            lambda: submit(
                role.conversation,
                type,
                draft,
                metadata=metadata,
                send_after=wait,
                key=f"draft-{role.drafts}",
                actor="writer",
            ),
        )
        if isinstance(queued, PendingAction):
            role.action = queued
        else:
            heapq.heappush(self._deliveries, queued.available_at)

    def receive(self, role: Role, text: str) -> CloseEngineConversation:
        """Receive a text from the lead, and return the conversation."""
        key = create_id()
        received = self._sometimes_twice(
            "inbound text", lambda: receive(role.lead, key, text), lambda first, again: again.duplicate
        )
        self._tally.superseded += len(received.superseded)
        return received.conversation or role.conversation

    def approve(self, role: Role, message: str | None = None) -> None:
        """Approve the waiting draft as a human, perhaps with a corrected text."""
        by, action = self._random.choice(["ana", "dana"]), self._waiting_action(role)
        sent = self._sometimes_twice("approval", lambda: action.approve(by=by, message=message))
        heapq.heappush(self._deliveries, sent.available_at)
        self._tally.corrected += message is not None

    def correct(self, role: Role) -> None:
        """Approve the waiting draft as a human, in other words."""
        is_link = self._waiting_action(role).type is ActionType.SEND_PAYMENT_LINK
        self.approve(role, "Shall we put it online?" if is_link else "Hello! What is your business?")

    def reject(self, role: Role) -> None:
        """Reject the waiting draft as a human."""
        action = self._waiting_action(role)
        is_preview = action.type is ActionType.SEND_PREVIEW
        action.reject(by="dana", reason="the logo is missing" if is_preview else "too pushy")

    def check_expired(self, role: Role) -> None:
        """Check that the waiting draft has expired because nobody decided in time."""
        stored = self._waiting_action(role)
        if stored.status is not ActionStatus.EXPIRED or role.conversation.stage is not Stage.PREVIEW_SENT:
            self._tally.problems.append(f"{stored!r} has not expired, or {role.conversation!r} still waits for it.")

    def pay(self, role: Role) -> None:
        """Record a payment, as reported by the payment provider."""
        key = f"payment-{role.number}"
        self._sometimes_twice(
            "payment",
            lambda: record_payment(role.lead, key, amount=90000, currency="USD", actor="payments"),
            lambda first, again: again.duplicate and not again.surplus,
        )

    def _waiting_action(self, role: Role) -> PendingAction:
        """Load the newest action, as the screen of the person who decides would."""
        role.action = PendingAction.get(PendingAction.id == (role.action and role.action.id))
        return role.action

    def _sometimes_twice(
        self,
        event: str,
        do: Callable[[], T],
        same: Callable[[T, T], bool] = operator.eq,
    ) -> T:
        """Do it, and sometimes again, like a webhook or an impatient human. The second time must change nothing."""
        first = do()
        if not self._tally.repeated[event] or self._random.randrange(100) < REPEAT_PERCENT:
            again = do()
            if not same(first, again):
                self._tally.problems.append(f"The same {event} was processed twice: {first!r}, {again!r}.")
            self._tally.repeated[event] += 1
        return first

    # The schedule --------------------------------------------------------------------------------------------------

    def _role(self, number: int) -> Role:
        """Choose a lead's story, and schedule its events backwards from the time at which the story must be over."""
        if number < MIN_LEADS:
            story = CAST[number]
        else:
            (story,) = self._random.choices(STORIES, [story.weight for story in STORIES])
        pauses = [self._pause(*VERBS[verb].hours) for verb in story.verbs]
        least, most = story.hours_left
        left = self._random.uniform(least, min(most, (DURATION - sum(pauses, timedelta())) / timedelta(hours=1)))
        moments = [self._end - timedelta(hours=left)]
        for pause in reversed(pauses[1:]):
            moments.append(moments[-1] - pause)
        return Role(number, story, moments[::-1])

    def _pause(self, least: float, most: float) -> timedelta:
        """Choose the time before an event on a logarithmic scale: often short, sometimes long."""
        return timedelta(hours=least and least * (most / least) ** self._random.random())

    def _plan(self) -> Iterator[tuple[datetime, Callable[[], object]]]:
        for role in self._roles:
            for moment, verb in zip(role.moments, role.story.verbs, strict=True):
                yield moment, partial(self._step, role, VERBS[verb])
        for number in range(DURATION // SWEEP_EVERY):
            yield self._end - number * SWEEP_EVERY, sweep

    def _step(self, role: Role, verb: Verb) -> None:
        """Let one event happen in a conversation, and perhaps make a mistake."""
        stale = getattr(role, "conversation", None)
        if stale is not None:
            role.conversation = CloseEngineConversation.get_by_id(stale.id)
        verb.play(self, role)
        role.conversation.reload()
        self._sometimes_make_mistake(Turn(self._random, role, role.conversation, stale or role.conversation))

    def _sometimes_make_mistake(self, turn: Turn) -> None:
        """Make a mistake that has not been made yet, or sometimes any other."""
        possible = [mistake for mistake in MISTAKES if mistake.is_possible(turn)]
        unmade = [mistake for mistake in possible if not self._tally.refused[mistake]]
        if not unmade and self._random.randrange(100) >= MISTAKE_PERCENT:
            return
        mistake = self._random.choice(unmade or possible)
        try:
            mistake.make(turn)
        except mistake.refusal:
            self._tally.refused[mistake] += 1
        else:
            self._tally.problems.append(f"This mistake was not refused: {mistake.description}.")

    def _deliver_until(self, moment: datetime) -> None:
        """Send all messages that are due before this moment, each at its own time."""
        while self._deliveries and self._deliveries[0] <= moment:
            self._now = max(self._now, heapq.heappop(self._deliveries))
            while messages := outbox.claim(worker=self.any_worker()):
                for message in messages:
                    self._deliver(message)

    def _deliver(self, message: OutboxMessage) -> None:
        role = self._role_of[str(message.lead_id)]
        if not role.story.reachable:
            message.give_up(CannotBeSent("this number cannot receive texts"))
        elif not self._tally.unanswered or self._random.randrange(100) < UNANSWERED_PERCENT:
            self._tally.unanswered += 1
            heapq.heappush(self._deliveries, message.retry("no answer", after=timedelta(minutes=2)).available_at)
        else:
            role.sent = message.sent(self._provider.send(message.send_key))

    def _last_messages(self) -> list[OutboxMessage]:
        """Write a preview and some other messages to leads that are still active, and return them unsent."""
        active = [role for role in self._roles if role.story.hours_left == STILL_ACTIVE]
        unattended = [role for role in active if role.story.autonomy_level is not AutonomyLevel.MANUAL]
        unattended.sort(key=lambda role: role.conversation.stage is not Stage.BUILDING)
        for role in unattended[:MAX_LAST_MESSAGES]:
            role.conversation.reload()
            if role is unattended[0]:
                VERBS["preview"].play(self, role)
            else:
                self.submit(role, ActionType.SEND_MESSAGE, "Is there anything else?")
        self._deliveries.clear()
        self._now += timedelta(minutes=2)
        due = (OutboxMessage.status == MessageStatus.PENDING) & (OutboxMessage.available_at <= self._now)
        return sorted(OutboxMessage.select().where(due), key=lambda message: message.topic != ActionType.SEND_PREVIEW)


# -- the events of a story -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verb:
    """An event in a story.

    Attributes:
        hours: the minimum and maximum number of hours before it happens.
        play: function that makes it happen in a conversation that was just loaded.
    """

    hours: tuple[float, float]
    play: Callable[[Demo, Role], None]


def _hello(demo: Demo, role: Role) -> None:
    demo.submit(role, ActionType.SEND_MESSAGE, "Hi! What do you do?")


def _answer(demo: Demo, role: Role) -> None:
    demo.receive(role, "We are a bakery.").record(questions=["business"], data={"business": "bakery"})


def _dig(demo: Demo, role: Role) -> None:
    role.conversation.collect_info(actor=demo.any_worker())
    demo.submit(role, ActionType.SEND_MESSAGE, "And where is it?")


def _build(demo: Demo, role: Role) -> None:
    role.conversation.start_building(actor=demo.any_worker())


def _preview(demo: Demo, role: Role) -> None:
    demo.submit(role, ActionType.SEND_PREVIEW, "Here is your site.", previewUrl="https://preview.example.com/1")


def _change(demo: Demo, role: Role) -> None:
    demo.receive(role, "Make it blue.").request_edits(actor="inbox")


def _link(demo: Demo, role: Role) -> None:
    demo.submit(
        role, ActionType.SEND_PAYMENT_LINK, "Pay here to go live today!", paymentUrl="https://pay.example.com/1"
    )


def _remind(demo: Demo, role: Role) -> None:
    demo.submit(role, ActionType.SEND_MESSAGE, "Any questions?", timedelta(hours=70))


def _write(demo: Demo, role: Role) -> None:
    demo.receive(role, "Sorry, I was away.")


def _refuse(demo: Demo, role: Role) -> None:
    demo.receive(role, "No, thanks.").close_lost("wants no site", actor="inbox")


VERBS = {
    "open": Verb((0, 0), lambda demo, role: demo.open(role)),
    "hello": Verb((0.02, 0.2), _hello),
    "answer": Verb((0.1, 8), _answer),
    "dig": Verb((0.02, 0.2), _dig),
    "build": Verb((0.2, 24), _build),
    "preview": Verb((0.3, 1.5), _preview),
    "change": Verb((0.5, 48), _change),
    "link": Verb((0.1, 6), _link),
    "remind": Verb((0.1, 0.2), _remind),
    "approve": Verb((0.2, 12), lambda demo, role: demo.approve(role)),
    "correct": Verb((0.2, 12), lambda demo, role: demo.correct(role)),
    "reject": Verb((0.2, 12), lambda demo, role: demo.reject(role)),
    "expire": Verb((31, 36), lambda demo, role: demo.check_expired(role)),
    "pay": Verb((0.2, 60), lambda demo, role: demo.pay(role)),
    "pay_late": Verb((80, 200), lambda demo, role: demo.pay(role)),
    "pay_when_lost": Verb((260, 400), lambda demo, role: demo.pay(role)),
    "write": Verb((80, 200), _write),
    "refuse": Verb((1, 60), _refuse),
    "return": Verb((100, 300), lambda demo, role: demo.open(role, EntryPoint.PREVIEW_CTA)),
}
