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
import multiprocessing
import operator
import os
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, TypeVar
from urllib.parse import urlsplit

import peewee

from close_engine import outbox
from close_engine.approvals import PendingAction, submit
from close_engine.backend import connect, without_password
from close_engine.conversations import CloseEngineConversation, open_conversation
from close_engine.demo_report import Handover, LevelLine, Report, StageLine
from close_engine.demo_script import CAST, MISTAKES, STILL_THERE, STORIES, VERBS, Mistake, Role, Turn, Verb
from close_engine.errors import CannotBeSent, CloseEngineError, ConfigurationError, one_line
from close_engine.fields import create_id
from close_engine.inbox import receive, record_payment
from close_engine.machine import TRIGGERS
from close_engine.models import Lead, StageChange, User
from close_engine.outbox import OutboxMessage
from close_engine.schema import migrate
from close_engine.stages import ActionStatus, ActionType, AutonomyLevel, EntryPoint, MessageStatus, Stage
from close_engine.sweeps import sweep
from close_engine.verify import verify
from close_engine.worker import Worker

__all__ = ["LEAST_LEADS", "Demo", "temporary_database"]

T = TypeVar("T")

LEAST_LEADS = len(CAST)

#: How long it lasts, and how often the sweeps run.
LENGTH, SWEEP_EVERY = timedelta(days=60), timedelta(hours=6)

#: For how long the worker processes have a message.
LEASE = timedelta(minutes=1)

#: How many of a hundred steps come with a mistake, are reported twice, or meet a provider that does not answer.
MISTAKEN, REPEATED, UNANSWERED = 12, 8, 4

#: How many of the last messages, at most, the two worker processes are left to send.
LAST_MESSAGES = 30


class Provider:
    """Delivers texts: one for each key, however often it is asked under the same.

    Attributes:
        texts: key to the id of the one text.
        asked: key to how often it was asked.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.asked: Counter[str] = Counter()

    def send(self, key: str) -> str:
        """Deliver a text, and return its id."""
        self.asked[key] += 1
        return self.texts.setdefault(key, f"SM{len(self.texts):06}")


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
        self._mistakes: Counter[Mistake] = Counter()
        self._repeated: Counter[str] = Counter()
        self._unanswered = self._corrected = 0
        self._problems: list[str] = []
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
        self._handover = self._hand_over()
        yield

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
        self._corrected += message is not None

    def reject(self, role: Role) -> None:
        """A human says no to what waits."""
        self._waiting(role).reject(by="dana", reason="too pushy")

    def expired(self, role: Role) -> None:
        """Nobody has decided in time."""
        stored = self._waiting(role)
        if stored.status is not ActionStatus.EXPIRED or role.conversation.stage is not Stage.PREVIEW_SENT:
            self._problems.append(f"{stored!r} has not expired, or {role.conversation!r} still waits for it.")

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
        if not self._repeated[what] or self._random.randrange(100) < REPEATED:
            again = do()
            if not same(first, again):
                self._problems.append(f"The same {what} was processed again: {first!r}, {again!r}.")
            self._repeated[what] += 1
        return first

    def report(self) -> Report:
        """What the tables say in the end."""
        stays: dict[Stage, list[float]] = {stage: [] for stage in Stage}
        opened: dict[str, datetime] = {}
        closing: list[float] = []
        replayed: dict[str, StageChange] = {}
        triggers: Counter[str] = Counter()
        entered: Counter[Stage] = Counter()
        for change in StageChange.select().order_by(StageChange.conversation_id, StageChange.id):
            before = replayed.get(change.conversation_id)
            if change.source != (before.dest if before else None):
                self._problems.append(f"The history of {change.conversation_id} has a gap before {change!r}.")
            if before:
                stays[before.dest].append((change.created_at - before.created_at).total_seconds())
            else:
                opened[change.conversation_id] = change.created_at
            if change.dest is Stage.COMPLETED:
                closing.append((change.created_at - opened[change.conversation_id]).total_seconds())
            replayed[change.conversation_id] = change
            triggers[change.trigger] += 1
            entered[change.dest] += 1
        stored = list(CloseEngineConversation.select())
        for conversation in stored:
            if replayed[conversation.id].dest is not conversation.stage:
                self._problems.append(f"The history of {conversation.id} does not lead to {conversation.stage}.")
        there = Counter(conversation.stage for conversation in stored)
        messages = list(OutboxMessage.select().order_by(OutboxMessage.id))
        self._check_messages(messages)
        actions = list(PendingAction.select())
        return Report(
            conversations=len(stored),
            stages=[
                StageLine(stage, there[stage], entered[stage], _median(stays[stage]) if stays[stage] else None)
                for stage in Stage
            ],
            levels=[_level_line(level, stored, messages) for level in AutonomyLevel],
            triggers={trigger: triggers[trigger] for trigger in ("open", *TRIGGERS)},
            approvals=Counter((action.type, action.status) for action in actions),
            corrected=self._corrected,
            outbox=Counter((message.topic, message.status) for message in messages),
            refused={mistake: self._mistakes[mistake] for mistake in MISTAKES},
            repeated=dict(self._repeated),
            unanswered=self._unanswered,
            handover=self._handover,
            closing=_median(closing),
            problems=self._problems + verify(),
        )

    def _check_messages(self, messages: list[OutboxMessage]) -> None:
        """Compare what the outbox records with what the provider did."""
        recorded = Counter(message.send_key for message in messages if message.status is MessageStatus.SENT)
        delivered = Counter(dict.fromkeys(self._provider.texts, 1))
        for key in recorded - delivered | delivered - recorded:
            self._problems.append(f"{key} was sent {delivered[key]} times and is recorded {recorded[key]} times.")
        newest: dict[str, datetime] = {}
        for message in messages:
            sent_at = message.sent_at or newest.get(message.conversation_id)
            if sent_at and sent_at < newest.setdefault(message.conversation_id, sent_at):
                self._problems.append(f"{message!r} was sent before an older one of its conversation.")
            if message.status is MessageStatus.PENDING and message.leased_by:
                self._problems.append(f"{message!r} is still leased by {message.leased_by}.")
            if sent_at:
                newest[message.conversation_id] = sent_at

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
        unmade = [mistake for mistake in possible if not self._mistakes[mistake]]
        if not unmade and self._random.randrange(100) >= MISTAKEN:
            return
        mistake = self._random.choice(unmade or possible)
        try:
            mistake.make(turn)
        except mistake.refusal:
            self._mistakes[mistake] += 1
        else:
            self._problems.append(f"It was not refused that somebody {mistake.what}.")

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
        elif not self._unanswered or self._random.randrange(100) < UNANSWERED:
            self._unanswered += 1
            heapq.heappush(self._deliveries, message.retry("no answer", after=timedelta(minutes=2)).available_at)
        else:
            role.sent = message.sent(self._provider.send(message.send_key))

    # The two worker processes ---------------------------------------------------------------------------------------

    def _hand_over(self) -> Handover:
        """Leave the last messages to two worker processes, and kill the one that is sending a preview."""
        preview, *others = self._last_messages()
        last = [message.id for message in (preview, *others)]
        context = multiprocessing.get_context("spawn")
        clock = context.RawValue("d", self._now.timestamp())
        workers: dict[Connection, Any] = {}
        try:
            for name in ("worker-5", "worker-6"):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(self._url, name, clock, theirs), name=name, daemon=True)
                process.start()
                theirs.close()
                workers[ours] = process
            killed = self._serve(workers, lambda: self._unsent(last) == 1, preview.send_key)
            self._now += LEASE + timedelta(seconds=1)
            clock.value = self._now.timestamp()
            self._serve(workers, lambda: not self._unsent(last))
            (survivor,) = workers.values()
            survivor.terminate()
            survivor.join()
        finally:
            for process in workers.values():
                process.kill()
                process.join()
        handed = OutboxMessage.get_by_id(preview.id)
        return Handover(
            messages=len(last),
            topic=handed.topic,
            exit_code=survivor.exitcode,
            killed=killed,
            survivor=handed.leased_by,
            attempts=handed.attempts,
            asked=self._provider.asked[handed.send_key],
            texts=sum(key == handed.send_key for key in self._provider.texts),
        )

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

    def _unsent(self, messages: list[int]) -> int:
        waiting = OutboxMessage.id.in_(messages) & (OutboxMessage.status == MessageStatus.PENDING)
        return OutboxMessage.select().where(waiting).count()

    def _serve(self, workers: dict[Connection, Any], done: Callable[[], bool], deadly: str | None = None) -> str:
        """Be the provider of these workers; kill the one that asks for the deadly text, while it waits for the answer.

        Returns:
            its name.
        """
        killed = ""
        while not done():
            ready: list[Any] = wait(list(workers), timeout=0.05)
            for connection in ready:
                try:
                    key = connection.recv()
                except EOFError:
                    died = workers[connection]
                    raise CloseEngineError(f"The process {died.name} died unexpectedly.") from None
                provider_id = self._provider.send(key)
                if key == deadly:
                    process = workers.pop(connection)
                    process.kill()
                    process.join()
                    killed = process.name
                else:
                    connection.send(provider_id)
        return killed


def _end_with_parent() -> None:  # pragma: no cover - in a process of its own
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def _work(url: str, name: str, clock: Any, provider: Connection) -> None:  # pragma: no cover - as above
    """A worker in a process of its own, whose provider is at the other end of a pipe, as is who sets its clock."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connect(url, clock=lambda: datetime.fromtimestamp(clock.value, timezone.utc))

    def send(message: OutboxMessage) -> str:
        provider.send(message.send_key)
        return str(provider.recv())

    worker = Worker(send, name=name, limit=1, lease=LEASE, idle=timedelta(seconds=0.02), sweep=None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which ends this
    signal.signal(signal.SIGTERM, lambda number, frame: worker.stop())
    worker.run()


def _median(seconds: list[float]) -> timedelta:
    return timedelta(seconds=median(seconds))


def _level_line(
    level: AutonomyLevel, conversations: list[CloseEngineConversation], messages: list[OutboxMessage]
) -> LevelLine:
    ids = {one.id for one in conversations if one.autonomy_level is level}
    paid = sum(one.id in ids and one.stage is Stage.COMPLETED for one in conversations)
    sent = [one for one in messages if one.conversation_id in ids and one.status is MessageStatus.SENT]
    approved = sum(one.approved_by is not None for one in sent)
    return LevelLine(level, len(ids), paid, len(sent) - approved, approved)


# -- where it is played ----------------------------------------------------------------------------------------------


@contextmanager
def temporary_database(url: str | None = None) -> Iterator[str]:
    """A database for the length of a block, beside the one that a URL names, which is not touched.

    Args:
        url: of a SQLite file, in whose directory a temporary one is made; or of a PostgreSQL database, on whose server
            one is created and dropped. The default is a SQLite file in the system's directory for temporary files.

    Yields:
        its URL.

    Raises:
        ConfigurationError: it cannot be made there.
    """
    if url is None or url.startswith("sqlite"):
        file = urlsplit(url or "").path[1:]
        place = None if file in ("", ":memory:") else Path(file).parent
        try:
            directory = tempfile.TemporaryDirectory(prefix="close_engine_demo_", dir=place)
        except OSError as error:
            raise ConfigurationError(
                f"The demo cannot make a temporary database in {place or tempfile.gettempdir()}: {error.strerror}."
            ) from error
        with directory as name:
            yield f"sqlite:///{name}/demo.db"
        return
    server, name = connect(url), f"close_engine_demo_{create_id()}"
    try:
        try:
            server.execute_sql(f"CREATE DATABASE {name} TEMPLATE template0")
            server.execute_sql(f"ALTER DATABASE {name} SET synchronous_commit = off")
        except peewee.DatabaseError as error:
            raise ConfigurationError(
                f"The demo cannot make a temporary database beside {without_password(url)}: "
                f"{one_line(error)}. Use a role with CREATEDB, or leave --database out for SQLite."
            ) from error
        parts = urlsplit(url)
        yield f"{parts.scheme}://{parts.netloc}/{name}?{parts.query}"
    finally:
        if not server.is_closed():
            server.execute_sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            server.close()
