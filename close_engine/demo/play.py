"""The demonstration: leads of a temporary database taken through conversations as they happen, in simulated time.

    with temporary_database() as url:
        demo = Demo(url, leads=300, seed=1)
        for _ in demo.run():          # one item a step, `demo.total` of them
            ...
        report = demo.report()

Drafts are submitted at all three autonomy levels, and approved, changed, rejected or left to expire; messages go out
through the outbox; leads write, fall silent and pay, and sweeps do what time brings about. The last messages are sent
by two worker processes, one of which is killed in mid-send. Whatever the number of leads, every stage and every trigger
occurs, and every mistake of `MISTAKES` is made on purpose, to be refused. The same seed tells the same stories. It runs
here on forty leads:

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
from close_engine.database.fields import create_id
from close_engine.database.url import connect
from close_engine.demo.audit import Played, audit
from close_engine.demo.handover import hand_over
from close_engine.demo.mistakes import MISTAKES, Turn
from close_engine.demo.provider import Provider
from close_engine.demo.report import Report
from close_engine.demo.stories import CAST, STILL_THERE, STORIES, Role
from close_engine.errors import CannotBeSent, ConfigurationError
from close_engine.inbox import receive, record_payment
from close_engine.models import Lead, User
from close_engine.outbox import OutboxMessage
from close_engine.schema.migrations import migrate
from close_engine.stages import ActionStatus, ActionType, AutonomyLevel, EntryPoint, MessageStatus, Stage
from close_engine.sweeps import sweep

__all__ = ["LEAST_LEADS", "VERBS", "Demo", "Verb"]

T = TypeVar("T")

LEAST_LEADS = len(CAST)

#: How long it lasts, and how often the sweeps run.
LENGTH, SWEEP_EVERY = timedelta(days=60), timedelta(hours=6)

#: How many of a hundred steps come with a mistake, are reported twice, or meet a provider that does not answer.
MISTAKEN, REPEATED, UNANSWERED = 12, 8, 4

#: How many of the last messages, at most, the two worker processes are left to send.
LAST_MESSAGES = 30


class Demo:
    """One performance in a database of its own.

    Args:
        url: the database, without any tables.
        leads: how many; at least LEAST_LEADS.
        seed: the same seed tells the same stories.

    Attributes:
        total: number of the steps of `run`.
    """

    def __init__(self, url: str, leads: int, seed: int) -> None:
        if leads < LEAST_LEADS:
            raise ConfigurationError(f"The demo needs at least {LEAST_LEADS} leads to show every stage and trigger.")
        self._url = url
        self._random = Random(seed)
        self._end = datetime.now(timezone.utc).replace(microsecond=0)
        self._now = self._end - LENGTH
        self._roles = [self._role(number) for number in range(leads)]
        self._provider = Provider()
        self._role_of: dict[str, Role] = {}
        self._deliveries: list[datetime] = []
        self._played = Played()
        self._steps = sorted(self._plan(), key=lambda step: step[0])
        self.total = len(self._steps) + 1

    def __enter__(self) -> Demo:
        self._database = connect(self._url, clock=lambda: self._now)
        if isinstance(self._database, peewee.SqliteDatabase):  # nothing here has to outlive a crash
            self._database.pragma("synchronous", "off", permanent=True)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._database.close()

    def run(self) -> Iterator[None]:
        """Play it: one item for each step that is done."""
        migrate(standalone=True)
        self._reps = [User.create() for _ in range(3)]
        for moment, play in self._steps:
            self._deliver_until(moment)
            self._now = moment
            play()
            yield
        self._deliver_until(self._end)
        self._now = self._end
        preview, *others = self._last_messages()
        self._handover = hand_over(self._url, self._provider, preview, others, self._now, self._set_clock)
        yield

    def report(self) -> Report:
        """What the tables say in the end."""
        return audit(self._played, self._provider, self._handover)

    def _set_clock(self, moment: datetime) -> None:
        self._now = moment

    # What happens ---------------------------------------------------------------------------------------------------

    def worker(self) -> str:
        """Any of the workers, for the history."""
        return f"worker-{self._random.randint(1, 4)}"

    def open(self, role: Role, entry_point: EntryPoint | None = None) -> None:
        """Open the conversation, or open it again."""
        if entry_point is None:
            role.lead = Lead.create(phone=f"+1555{role.number:07}", autonomy_level=role.story.autonomy_level)
            self._role_of[role.lead.id] = role
        key = f"lead-{role.number}" if entry_point is None else f"back-{role.number}"
        entry_point = entry_point or self._random.choice(list(EntryPoint))
        rep = self._random.choice(self._reps)
        role.conversation = self._twice(
            "opening", lambda: open_conversation(role.lead, entry_point, rep=rep, key=key, actor="inbox")
        )

    def submit(
        self, role: Role, type: ActionType, draft: str, wait: timedelta = timedelta(minutes=1), **metadata: str
    ) -> None:
        """Submit a draft: it is sent a little later, or waits for a human."""
        role.drafts += 1
        made = self._twice(
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
        if isinstance(made, PendingAction):
            role.action = made
        else:
            heapq.heappush(self._deliveries, made.available_at)

    def receive(self, role: Role, text: str) -> CloseEngineConversation:
        """The lead writes."""
        key = create_id()
        received = self._twice(
            "inbound text", lambda: receive(role.lead, key, text), lambda first, again: again.duplicate
        )
        return received.conversation or role.conversation

    def approve(self, role: Role, message: str | None = None) -> None:
        """A human approves what waits, in other words perhaps."""
        by, action = self._random.choice(["ana", "dana"]), self._waiting(role)
        sent = self._twice("approval", lambda: action.approve(by=by, message=message))
        heapq.heappush(self._deliveries, sent.available_at)
        self._played.corrected += message is not None

    def reject(self, role: Role) -> None:
        """A human says no to what waits."""
        self._waiting(role).reject(by="dana", reason="too pushy")

    def expired(self, role: Role) -> None:
        """Nobody has decided in time."""
        stored = self._waiting(role)
        if stored.status is not ActionStatus.EXPIRED or role.conversation.stage is not Stage.PREVIEW_SENT:
            self._played.problems.append(f"{stored!r} has not expired, or {role.conversation!r} still waits for it.")

    def pay(self, role: Role) -> None:
        """The payment provider reports a payment."""
        self._twice("payment", lambda: record_payment(role.lead, key=f"payment-{role.number}", actor="payments"))

    def _waiting(self, role: Role) -> PendingAction:
        """What the story's human decides on, as his screen has loaded it."""
        role.action = PendingAction.get(PendingAction.id == (role.action and role.action.id))
        return role.action

    def _twice(
        self,
        what: str,
        do: Callable[[], T],
        same: Callable[[T, T], bool] = operator.eq,
    ) -> T:
        """Do it, and now and then once more, as a webhook or an impatient human does; that must change nothing."""
        first = do()
        if not self._played.repeated[what] or self._random.randrange(100) < REPEATED:
            again = do()
            if not same(first, again):
                self._played.problems.append(f"The same {what} was processed again: {first!r}, {again!r}.")
            self._played.repeated[what] += 1
        return first

    # When, and to whom ----------------------------------------------------------------------------------------------

    def _role(self, number: int) -> Role:
        """Who plays what, and when: each in a time of his own, so that the story is over when it must be."""
        if number < LEAST_LEADS:
            story = CAST[number]
        else:
            (story,) = self._random.choices(STORIES, [story.weight for story in STORIES])
        pauses = [self._pause(*VERBS[verb].hours) for verb in story.verbs]
        least, most = story.hours_left
        left = self._random.uniform(least, min(most, (LENGTH - sum(pauses, timedelta())) / timedelta(hours=1)))
        moments = [self._end - timedelta(hours=left)]
        for pause in reversed(pauses[1:]):
            moments.append(moments[-1] - pause)
        return Role(number, story, moments[::-1])

    def _pause(self, least: float, most: float) -> timedelta:
        """The time before something happens: short ones are frequent, long ones are not rare."""
        return timedelta(hours=least and least * (most / least) ** self._random.random())

    def _plan(self) -> Iterator[tuple[datetime, Callable[[], object]]]:
        for role in self._roles:
            for moment, verb in zip(role.moments, role.story.verbs, strict=True):
                yield moment, partial(self._step, role, VERBS[verb])
        for number in range(LENGTH // SWEEP_EVERY):
            yield self._end - number * SWEEP_EVERY, sweep

    def _step(self, role: Role, verb: Verb) -> None:
        """Let one thing happen in a conversation; and perhaps make a mistake."""
        outdated = getattr(role, "conversation", None)
        if outdated is not None:
            role.conversation = CloseEngineConversation.get_by_id(outdated.id)
        verb.play(self, role)
        role.conversation.reload()
        self._err(Turn(self._random, role, role.conversation, outdated or role.conversation))

    def _err(self, turn: Turn) -> None:
        """Make a mistake that nobody has made yet, or now and then any."""
        possible = [mistake for mistake in MISTAKES if mistake.possible(turn)]
        unmade = [mistake for mistake in possible if not self._played.refused[mistake]]
        if not unmade and self._random.randrange(100) >= MISTAKEN:
            return
        mistake = self._random.choice(unmade or possible)
        try:
            mistake.make(turn)
        except mistake.refusal:
            self._played.refused[mistake] += 1
        else:
            self._played.problems.append(f"It was not refused that somebody {mistake.what}.")

    def _deliver_until(self, moment: datetime) -> None:
        """Send what is due before this moment, each when it is due."""
        while self._deliveries and self._deliveries[0] <= moment:
            self._now = max(self._now, heapq.heappop(self._deliveries))
            while messages := outbox.claim(worker=self.worker()):
                for message in messages:
                    self._deliver(message)

    def _deliver(self, message: OutboxMessage) -> None:
        role = self._role_of[message.lead_id]
        if not role.story.reachable:
            message.give_up(CannotBeSent("this number takes no texts"))
        elif not self._played.unanswered or self._random.randrange(100) < UNANSWERED:
            self._played.unanswered += 1
            heapq.heappush(self._deliveries, message.retry("no answer", after=timedelta(minutes=2)).available_at)
        else:
            role.sent = message.sent(self._provider.send(message.send_key))

    def _last_messages(self) -> list[OutboxMessage]:
        """A preview, and what is written to others who are still there."""
        there = [role for role in self._roles if role.story.hours_left == STILL_THERE]
        free = [role for role in there if role.story.autonomy_level is not AutonomyLevel.MANUAL]
        free.sort(key=lambda role: role.conversation.stage is not Stage.BUILDING)
        for role in free[:LAST_MESSAGES]:
            role.conversation.reload()
            if role is free[0]:
                VERBS["preview"].play(self, role)
            else:
                self.submit(role, ActionType.SEND_MESSAGE, "Is there anything else?")
        self._deliveries.clear()
        self._now += timedelta(minutes=2)
        due = (OutboxMessage.status == MessageStatus.PENDING) & (OutboxMessage.available_at <= self._now)
        return sorted(OutboxMessage.select().where(due), key=lambda message: message.topic != ActionType.SEND_PREVIEW)


# -- what happens in a story -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verb:
    """Something that happens in a conversation.

    Attributes:
        hours: that pass before it: the least and the most.
        play: lets it happen, in a conversation that was just loaded.
    """

    hours: tuple[float, float]
    play: Callable[[Demo, Role], None]


def _hello(demo: Demo, role: Role) -> None:
    demo.submit(role, ActionType.SEND_MESSAGE, "Hi! What do you do?")


def _answer(demo: Demo, role: Role) -> None:
    demo.receive(role, "We are a bakery.").record(questions=["business"], data={"business": "bakery"})


def _dig(demo: Demo, role: Role) -> None:
    role.conversation.collect_info(actor=demo.worker())
    demo.submit(role, ActionType.SEND_MESSAGE, "And where is it?")


def _build(demo: Demo, role: Role) -> None:
    role.conversation.start_building(actor=demo.worker())


def _preview(demo: Demo, role: Role) -> None:
    demo.submit(role, ActionType.SEND_PREVIEW, "Here is your site.", previewUrl="https://preview.example.com/1")


def _change(demo: Demo, role: Role) -> None:
    demo.receive(role, "Make it blue.").request_edits(actor="inbox")


def _link(demo: Demo, role: Role) -> None:
    demo.submit(role, ActionType.SEND_PAYMENT_LINK, "Shall we?", paymentUrl="https://pay.example.com/1")


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
    "correct": Verb((0.2, 12), lambda demo, role: demo.approve(role, "In better words.")),
    "reject": Verb((0.2, 12), lambda demo, role: demo.reject(role)),
    "expire": Verb((31, 36), lambda demo, role: demo.expired(role)),
    "pay": Verb((0.2, 60), lambda demo, role: demo.pay(role)),
    "pay_late": Verb((80, 200), lambda demo, role: demo.pay(role)),
    "pay_when_lost": Verb((260, 400), lambda demo, role: demo.pay(role)),
    "write": Verb((80, 200), _write),
    "refuse": Verb((1, 60), _refuse),
    "return": Verb((100, 300), lambda demo, role: demo.open(role, EntryPoint.PREVIEW_CTA)),
}
