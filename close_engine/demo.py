"""The demonstration: leads of a temporary database taken through conversations as they happen, in simulated time.

    with temporary_database() as url:
        demo = Demo(url, leads=300, seed=1)
        for _ in demo.run():          # one item a step, `demo.total` of them
            ...
        report = demo.report()

Whatever the number of leads, every stage and every trigger occurs, and every mistake of `MISTAKES` is made on purpose,
to be refused. The same seed tells the same stories. It runs here on forty leads:

>>> with temporary_database() as url, Demo(url, leads=40, seed=1) as demo:
...     steps = sum(1 for _ in demo.run())
...     report = demo.report()
>>> steps == demo.total, report.conversations, report.problems
(True, 40, [])
>>> [line.stage for line in report.stages if not line.now or not line.entered]
[]
"""

from __future__ import annotations

import heapq
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from random import Random
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import peewee
from rich import box
from rich.table import Table

from close_engine.backend import connect, current, without_password
from close_engine.conversations import CloseEngineConversation, open_conversation
from close_engine.errors import (
    ConfigurationError,
    ConversationCompleted,
    GuardRefused,
    KeyReused,
    LeadHasNoPhone,
    StageAssignmentRefused,
    StageConflict,
    TransitionNotAllowed,
)
from close_engine.fields import create_id
from close_engine.machine import TRIGGERS, trigger_between, triggers_from
from close_engine.models import Lead, StageChange, User
from close_engine.schema import migrate
from close_engine.stages import ACTIVE_STAGES, AutonomyLevel, EntryPoint, Stage
from close_engine.verify import verify

__all__ = ["LEAST_LEADS", "Demo", "Report", "temporary_database"]


# -- what happens ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """How a conversation goes.

    Attributes:
        weight: how often it happens, beside the others.
        triggers: what is fired, in order.
    """

    meaning: str
    weight: int
    autonomy_level: AutonomyLevel
    triggers: tuple[str, ...]


def _story(meaning: str, weight: int, autonomy_level: AutonomyLevel, triggers: str) -> Story:
    return Story(meaning, weight, autonomy_level, tuple(triggers.split()))


_AUTO, _SEMI, _MANUAL = AutonomyLevel
_PREVIEW = "start_qualifying start_building send_preview"
_CAREFUL_PREVIEW = "start_qualifying collect_info start_building send_preview"

STORIES = (
    _story("pays at once", 20, _AUTO, f"{_PREVIEW} send_payment_link complete"),
    _story("has gaps to fill", 16, _AUTO, f"{_CAREFUL_PREVIEW} send_payment_link complete"),
    _story("wants changes", 10, _AUTO, f"{_PREVIEW} request_edits send_preview send_payment_link complete"),
    _story(
        "wants changes twice and pays unseen",
        6,
        _AUTO,
        f"{_CAREFUL_PREVIEW} request_edits send_preview request_edits send_payment_link complete",
    ),
    _story("a human approves", 12, _SEMI, f"{_PREVIEW} request_approval send_payment_link complete"),
    _story(
        "a human says no at first",
        6,
        _MANUAL,
        f"{_PREVIEW} request_edits request_approval withdraw_approval request_approval send_payment_link complete",
    ),
    _story(
        "goes silent and comes back",
        10,
        _AUTO,
        "start_qualifying collect_info stall resume start_building send_preview send_payment_link complete",
    ),
    _story("pays after a silence", 6, _SEMI, f"{_PREVIEW} request_approval send_payment_link stall complete"),
    _story("pays when given up", 3, _AUTO, f"{_PREVIEW} send_payment_link stall close_lost complete"),
    _story("is silent for good", 12, _AUTO, "start_qualifying stall close_lost"),
    _story("is silent", 6, _MANUAL, f"{_PREVIEW} stall"),
    _story("says no", 8, _AUTO, f"{_CAREFUL_PREVIEW} close_lost"),
    _story(
        "says no and comes back", 5, _AUTO, f"start_qualifying close_lost reopen {_PREVIEW} send_payment_link complete"
    ),
)

#: Trigger to the hours that pass before it is fired: the least and the most.
HOURS_BEFORE = {
    "start_qualifying": (0.02, 0.2),
    "collect_info": (0.1, 8),
    "start_building": (0.2, 24),
    "send_preview": (0.3, 1.5),
    "request_edits": (0.5, 48),
    "request_approval": (0.02, 0.1),
    "withdraw_approval": (0.2, 20),
    "send_payment_link": (0.1, 6),
    "complete": (0.2, 60),
    "stall": (72, 80),
    "resume": (12, 120),
    "close_lost": (24, 168),
    "reopen": (100, 500),
}

#: How many of a hundred conversations are still on their way when the demonstration ends, and how many of a hundred
#: steps come with a mistake, or with a webhook that reports them again.
ON_THEIR_WAY, MISTAKEN, REPEATED = 35, 12, 8


@dataclass
class Turn:
    """What one step of a conversation leaves for a mistake to be made with.

    Attributes:
        conversation: as it is after the step.
        outdated: as it was in the memory of another worker before the step.
        key: the idempotency key of the step.
    """

    random: Random
    conversation: CloseEngineConversation
    outdated: CloseEngineConversation
    trigger: str
    key: str

    def out_of_reach(self) -> list[Stage]:
        """The stages that no trigger leads to from here."""
        stage = self.conversation.stage
        return [other for other in Stage if other is not stage and trigger_between(stage, other) is None]


@dataclass(frozen=True)
class Mistake:
    """What must not happen, tried on purpose.

    Attributes:
        what: what a worker does wrong.
        refusal: the error that it must get.
        make: does it.
        possible: whether it can be made now.
    """

    what: str
    refusal: type[Exception]
    make: Callable[[Turn], object]
    possible: Callable[[Turn], object] = lambda turn: True


def _fire_elsewhere(turn: Turn) -> object:
    allowed = triggers_from(turn.conversation.stage)
    return turn.conversation.fire(turn.random.choice([name for name in TRIGGERS if name not in allowed]))


def _assign_stage(turn: Turn) -> None:
    turn.conversation.stage = turn.random.choice(turn.out_of_reach())


def _write_past_the_library(turn: Turn) -> None:
    table = peewee.Table("close_engine_conversations", _database=current().database)
    stage = turn.random.choice(turn.out_of_reach())
    table.update(stage=stage.value).where(table.c.id == turn.conversation.id).execute()


def _text_without_a_phone(turn: Turn) -> object:
    return open_conversation(Lead.create(phone=None), EntryPoint.REP_CLOSE)


MISTAKES = (
    Mistake("fires a trigger that the stage does not have", TransitionNotAllowed, _fire_elsewhere),
    Mistake(
        "gives a lead up without a reason",
        GuardRefused,
        lambda turn: turn.conversation.fire("close_lost"),
        lambda turn: "close_lost" in triggers_from(turn.conversation.stage),
    ),
    Mistake(
        "sends a payment link without the approval it needs",
        GuardRefused,
        lambda turn: turn.conversation.send_payment_link("https://pay.example.com/too-early"),
        lambda turn: turn.conversation.stage is Stage.PENDING_APPROVAL,
    ),
    Mistake(
        "books a payment before a payment link was sent",
        GuardRefused,
        lambda turn: turn.conversation.complete(),
        lambda turn: turn.conversation.payment_link_sent_at is None,
    ),
    Mistake(
        "acts on what another worker has changed",
        StageConflict,
        lambda turn: turn.outdated.fire(turn.trigger, **_given(turn.trigger)),
    ),
    Mistake(
        "uses the key of one event for another",
        KeyReused,
        lambda turn: turn.conversation.fire("resume" if turn.trigger != "resume" else "stall", key=turn.key),
    ),
    Mistake("assigns the stage by hand", StageAssignmentRefused, _assign_stage, Turn.out_of_reach),
    Mistake("writes the stage past the library", peewee.IntegrityError, _write_past_the_library, Turn.out_of_reach),
    Mistake("texts a lead without a phone number", LeadHasNoPhone, _text_without_a_phone),
    Mistake(
        "opens a conversation with a lead that has paid",
        ConversationCompleted,
        lambda turn: open_conversation(turn.conversation.lead_id, EntryPoint.PREVIEW_CTA),
        lambda turn: turn.conversation.stage is Stage.COMPLETED,
    ),
)


def _given(trigger: str) -> dict[str, Any]:
    """What a trigger asks for."""
    if trigger == "send_payment_link":
        return {"payment_link_url": "https://pay.example.com/site", "approved_by": "ana"}
    return {"reason": "no interest"} if trigger == "close_lost" else {}


# -- how it is played ------------------------------------------------------------------------------------------------


def _ending_in(stage: Stage) -> tuple[Story, int]:
    """A story, and after how many of its triggers it stands in a stage."""
    return next(
        (story, steps)
        for story in STORIES
        for steps, trigger in enumerate(story.triggers, 1)
        if TRIGGERS[trigger].dest is stage
    )


#: Who is there even among few: every story to its end, and somebody who stands in each active stage when it is over.
_CAST = [(story, len(story.triggers)) for story in STORIES] + [_ending_in(stage) for stage in ACTIVE_STAGES]

LEAST_LEADS = len(_CAST)


@dataclass(order=True)
class Part:
    """What one lead still has to play: at its moment, the conversation is opened or the next trigger fired."""

    at: datetime
    number: int
    autonomy_level: AutonomyLevel = field(compare=False)
    triggers: list[str] = field(compare=False)
    conversation: CloseEngineConversation | None = field(compare=False, default=None)


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
        self._now = datetime.now(timezone.utc).replace(microsecond=0) - timedelta(days=90)
        self._parts = [self._part(number) for number in range(leads)]
        self._mistakes: Counter[Mistake] = Counter()
        self._repeated = 0
        self._problems: list[str] = []
        self.total = sum(1 + len(part.triggers) for part in self._parts)

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
        heapq.heapify(self._parts)
        while self._parts:
            part = heapq.heappop(self._parts)
            self._now = part.at
            if part.conversation is None:
                part.conversation = self._open(part)
            else:
                part.conversation = self._step(part, part.conversation)
            if part.triggers:
                heapq.heappush(self._parts, replace(part, at=part.at + self._pause(part.triggers[0])))
            yield

    def report(self) -> Report:
        """What the tables say in the end."""
        history = StageChange.select().order_by(StageChange.conversation_id, StageChange.id)
        hours: dict[Stage, list[float]] = {stage: [] for stage in Stage}
        opened: dict[str, datetime] = {}
        closing: list[float] = []
        replayed: dict[str, StageChange] = {}
        triggers: Counter[str] = Counter()
        entered: Counter[Stage] = Counter()
        for change in history:
            before = replayed.get(change.conversation_id)
            if change.source != (before.dest if before else None):
                self._problems.append(f"The history of {change.conversation_id} has a gap before {change!r}.")
            if before:
                hours[before.dest].append((change.created_at - before.created_at) / timedelta(hours=1))
            else:
                opened[change.conversation_id] = change.created_at
            if change.dest is Stage.COMPLETED:
                closing.append((change.created_at - opened[change.conversation_id]) / timedelta(hours=1))
            replayed[change.conversation_id] = change
            triggers[change.trigger] += 1
            entered[change.dest] += 1
        stored = list(CloseEngineConversation.select())
        for conversation in stored:
            if replayed[conversation.id].dest is not conversation.stage:
                self._problems.append(f"The history of {conversation.id} does not lead to {conversation.stage}.")
        there = Counter(conversation.stage for conversation in stored)
        return Report(
            conversations=len(stored),
            stages=[
                StageLine(stage, there[stage], entered[stage], median(hours[stage]) if hours[stage] else None)
                for stage in Stage
            ],
            triggers={trigger: triggers[trigger] for trigger in ("open", *TRIGGERS)},
            refused={mistake: self._mistakes[mistake] for mistake in MISTAKES},
            repeated=self._repeated,
            closing_hours=median(closing),
            problems=self._problems + verify(),
        )

    def _part(self, number: int) -> Part:
        if number < LEAST_LEADS:
            story, steps = _CAST[number]
        else:
            (story,) = self._random.choices(STORIES, [story.weight for story in STORIES])
            steps = len(story.triggers)
            if self._random.randrange(100) < ON_THEIR_WAY:
                steps = self._random.randrange(steps)
        begin = self._now + timedelta(hours=self._random.uniform(0, 30 * 24))
        return Part(begin, number, story.autonomy_level, list(story.triggers[:steps]))

    def _pause(self, trigger: str) -> timedelta:
        """The time before a trigger: short ones are frequent, long ones are not rare."""
        least, most = HOURS_BEFORE[trigger]
        return timedelta(hours=least * (most / least) ** self._random.random())

    def _open(self, part: Part) -> CloseEngineConversation:
        lead = Lead.create(phone=f"+1555{part.number:07}", autonomy_level=part.autonomy_level)
        return open_conversation(
            lead,
            self._random.choice(list(EntryPoint)),
            rep=self._random.choice(self._reps),
            key=f"lead-{part.number}",
            actor="inbox",
        )

    def _step(self, part: Part, outdated: CloseEngineConversation) -> CloseEngineConversation:
        """Fire the next trigger as a worker does, who loads the conversation; and perhaps make a mistake."""
        trigger = part.triggers.pop(0)
        key = f"event-{part.number}-{len(part.triggers)}"
        conversation: CloseEngineConversation = CloseEngineConversation.get_by_id(outdated.id)
        actor = f"worker-{self._random.randint(1, 4)}"
        change = conversation.fire(trigger, actor=actor, key=key, **_given(trigger))
        if self._random.randrange(100) < REPEATED:
            again = conversation.fire(trigger, actor=actor, key=key, **_given(trigger))
            if again.id != change.id:
                self._problems.append(f"{key} was processed again as {again!r}.")
            self._repeated += 1
        self._err(Turn(self._random, conversation, outdated, trigger, key))
        return conversation

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


# -- what comes out --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageLine:
    """One stage in the end.

    Attributes:
        now: number of conversations in it.
        entered: how often it was entered.
        hours: median of the times that conversations stayed in it before they left it; None where none left it.
    """

    stage: Stage
    now: int
    entered: int
    hours: float | None


@dataclass(frozen=True)
class Report:
    """What came out of it.

    Attributes:
        conversations: number of them.
        stages: list of StageLine, one for each Stage, in order.
        triggers: trigger to how often it was fired.
        refused: Mistake to how often it was made and refused.
        repeated: number of events that were reported again and changed nothing.
        closing_hours: median of the time from the opening to the payment.
        problems: list of str, a sentence each: what is not as it must be.
    """

    conversations: int
    stages: list[StageLine]
    triggers: dict[str, int]
    refused: dict[Mistake, int]
    repeated: int
    closing_hours: float
    problems: list[str]

    def summary(self) -> str:
        """What the tables do not say."""
        return (
            f"{self.conversations} conversations with {sum(self.triggers.values())} recorded changes; from the opening "
            f"to the payment, it took {_duration(self.closing_hours)} (median). {sum(self.refused.values())} mistakes "
            f"were made and refused; {self.repeated} events were reported twice and processed once."
        )

    def tables(self) -> Iterator[Table]:
        """The report as tables for a console."""
        pipeline = _table("Pipeline", "stage", "now", "entered", "median stay")
        for line in self.stages:
            pipeline.add_row(line.stage.value, str(line.now), str(line.entered), _duration(line.hours))
        yield pipeline
        fired = _table("Triggers", "trigger", "fired")
        for trigger, count in self.triggers.items():
            fired.add_row(trigger, str(count))
        yield fired
        refused = _table("Refused", "a worker", "times", "error")
        for mistake, count in self.refused.items():
            refused.add_row(mistake.what, str(count), mistake.refusal.__name__)
        yield refused


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False
    )
    for column in columns:
        number = column in ("now", "entered", "fired", "times", "median stay")
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _duration(hours: float | None) -> str:
    if hours is None:
        return "-"
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


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
                f"{' '.join(str(error).split())}. Use a role with CREATEDB, or leave --database out for SQLite."
            ) from error
        parts = urlsplit(url)
        yield f"{parts.scheme}://{parts.netloc}/{name}?{parts.query}"
    finally:
        if not server.is_closed():
            server.execute_sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            server.close()
