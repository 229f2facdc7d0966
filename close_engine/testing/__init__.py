"""Pytest fixtures for your tests. The tests of this library use them too.

In your `conftest.py`:

    pytest_plugins = ["close_engine.testing"]

and in a test:

    def test_a_building_conversation_can_be_previewed(conversation_in):
        conversation = conversation_in(Stage.BUILDING)
        conversation.send_preview()

    def test_the_first_text_is_sent(conversation_in, fake_sender):
        submit(conversation_in(Stage.INITIATED), ActionType.SEND_MESSAGE, "Hello!")
        fake_sender.deliver()
        assert [message.body for message in fake_sender.sent] == ["Hello!"]

`close_engine_database` gives each test its own migrated SQLite file. Override the fixture to test on another database.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peewee

from close_engine.conversations import CloseEngineConversation, open_conversation
from close_engine.database.binding import current
from close_engine.database.fields import milliseconds, stored_time
from close_engine.database.url import connect
from close_engine.errors import ConfigurationError
from close_engine.models import Lead
from close_engine.outbox import OutboxMessage
from close_engine.schema.migrations import migrate
from close_engine.stages import AutonomyLevel, EntryPoint, Stage
from close_engine.worker import Worker

__all__ = [
    "FakeSender",
    "MovableClock",
    "bring_to",
    "close_engine_clock",
    "close_engine_database",
    "conversation_in",
    "fake_sender",
    "new_lead",
]

#: The triggers that lead from INITIATED to each stage.
_PATHS: dict[Stage, tuple[str, ...]] = {
    Stage.INITIATED: (),
    Stage.QUALIFYING: ("start_qualifying",),
    Stage.COLLECTING_INFO: ("start_qualifying", "collect_info"),
    Stage.BUILDING: ("start_qualifying", "start_building"),
    Stage.PREVIEW_SENT: ("start_qualifying", "start_building", "send_preview"),
    Stage.EDIT_LOOP: ("start_qualifying", "start_building", "send_preview", "request_edits"),
    Stage.PENDING_APPROVAL: ("start_qualifying", "start_building", "send_preview", "request_approval"),
    Stage.PAYMENT_SENT: ("start_qualifying", "start_building", "send_preview", "send_payment_link"),
    Stage.COMPLETED: ("start_qualifying", "start_building", "send_preview", "send_payment_link", "complete"),
    Stage.STALLED: ("start_qualifying", "stall"),
    Stage.CLOSED_LOST: ("start_qualifying", "close_lost"),
}


class MovableClock:
    """A clock that only moves when a test moves it. Pass it to `close_engine.bind`, or use `close_engine_clock`.

    What is due, leased or over is judged by the database's clock, so this clock rules that one too: from the first move
    on, or from `rule()`.

    Args:
        now: datetime with a timezone, the time to start at; the default is the current time.
    """

    def __init__(self, now: datetime | None = None) -> None:
        self._now = now or datetime.now(timezone.utc)
        self._rules = False

    def __call__(self) -> datetime:
        return self._now

    @property
    def now(self) -> datetime:
        """The time that it shows."""
        return self._now

    @now.setter
    def now(self, moment: datetime) -> None:
        self._now = moment
        if self._rules or self._is_bound():
            self.rule()

    def move(self, by: timedelta) -> datetime:
        """Move the clock.

        Args:
            by: timedelta, negative to move it back.

        Returns:
            datetime, the new time.
        """
        self.now += by
        return self.now

    def _is_bound(self) -> bool:
        try:
            return current().clock is self
        except ConfigurationError:
            return False

    def let_go(self) -> None:
        """Give the bound database its own clock back."""
        self._rules = False
        current().dialect.set_clock(current().database, None)

    def rule(self) -> None:
        """Make the clock of the bound database, which says what is due and over, show the same from now on."""
        self._rules = True
        current().dialect.set_clock(current().database, stored_time(milliseconds(self._now)))


class FakeSender:
    """A sender that records messages instead of sending them.

    Attributes:
        sent: list of OutboxMessage, in the order in which they were sent.
        failures: list of exceptions to raise at the next calls, one per call, instead of sending.
    """

    def __init__(self) -> None:
        self.sent: list[OutboxMessage] = []
        self.failures: list[Exception] = []

    def __call__(self, message: OutboxMessage) -> str:
        if self.failures:
            raise self.failures.pop(0)
        self.sent.append(message)
        return f"fake:{message.send_key}"

    def deliver(self) -> int:
        """Run a worker with this sender until nothing more can be sent now.

        Returns:
            int, how many messages were claimed.
        """
        return Worker(self, name="fake sender", concurrency=1, sweep=None).run_until_empty()


def _fixture(function: Callable[..., Any]) -> Any:
    """Make a fixture. Without pytest there is none: the providers' stand-ins are also for rehearsals."""
    if find_spec("pytest") is None:
        return function
    import pytest

    return pytest.fixture(function)


@_fixture
def fake_sender() -> FakeSender:
    """A sender that records messages instead of sending them."""
    return FakeSender()


@_fixture
def close_engine_clock() -> MovableClock:
    """The clock of `close_engine_database`."""
    return MovableClock()


@_fixture
def close_engine_database(tmp_path: Path, close_engine_clock: MovableClock) -> Iterator[peewee.Database]:
    """A migrated database for this test only, bound to the models."""
    database = connect(f"sqlite:///{tmp_path}/close_engine.db", clock=close_engine_clock)
    migrate(standalone=True)
    close_engine_clock.rule()
    yield database
    database.close()


def new_lead(phone: str | None = "+15550100", **values: Any) -> Lead:
    """Create a lead.

    Args:
        phone: str, or None for a lead without a phone number.
        values: other columns of the lead.

    Returns:
        the Lead.
    """
    return Lead.create(phone=phone, **values)


def bring_to(conversation: CloseEngineConversation, stage: Stage) -> CloseEngineConversation:
    """Bring an INITIATED conversation to a stage by firing the real triggers.

    Args:
        conversation: CloseEngineConversation, INITIATED.
        stage: Stage to bring it to.

    Returns:
        the same conversation.
    """
    for trigger in _PATHS[stage]:
        conversation.fire(
            trigger,
            reason="no answer" if trigger == "close_lost" else None,
            payment_link_url="https://pay.example.com/1" if trigger == "send_payment_link" else None,
            approved_by="a tester" if trigger == "send_payment_link" else None,
        )
    return conversation


@_fixture
def conversation_in(close_engine_database: peewee.Database) -> Callable[..., CloseEngineConversation]:
    """A factory: `conversation_in(Stage.BUILDING)` opens a conversation and fires the real triggers to get there.

    `autonomy_level=` sets the lead's autonomy level, any other argument a column of the lead.
    """

    def make(
        stage: Stage, autonomy_level: AutonomyLevel = AutonomyLevel.FULL_AUTO, **lead: Any
    ) -> CloseEngineConversation:
        conversation = open_conversation(new_lead(autonomy_level=autonomy_level, **lead), EntryPoint.SMS_REPLY)
        return bring_to(conversation, stage)

    return make
