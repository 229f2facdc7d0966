"""A language model for tests: it answers what the test has written down, in the thread of the worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from close_engine import OutboxMessage, Worker
from close_engine.drafting import DRAFT, Drafter, ModelReply, Question, Tool, ToolCall, Turn
from close_engine.testing import FakeSender

PERSONA = "You are Mia, of Bright Sites. A website costs 900 dollars. See https://bright.example.com."
QUESTIONS = [
    Question("business", "What does their business do?"),
    Question("pages", "Which pages do they want?"),
    Question("colour", "Do they have a favourite colour?", required=False),
]
PAY = "https://pay.example.com/1"

Step = "list[ToolCall] | ModelReply | Exception | Callable[[], Any]"


def call(name: str, /, **arguments: Any) -> ToolCall:
    return ToolCall(f"call-{name}", name, arguments)


def reply(text: str = "Hello! What does your business do?", **arguments: Any) -> ToolCall:
    return call("reply", text=text, **arguments)


class Scripted(Drafter):
    """Answers one step after the other: tool calls, a whole reply, an exception to raise, or a function to run first.

    A function returns the step to go on with.
    """

    def __init__(self, *steps: Any, **options: Any) -> None:
        options = {"persona": PERSONA, "questions": QUESTIONS, "payment_link": lambda conversation: PAY, **options}
        super().__init__(**options)
        self.steps = list(steps)
        self.asked: list[tuple[str, tuple[Turn, ...]]] = []

    def ask(self, system: str, turns: Sequence[Turn], tools: Sequence[Tool]) -> ModelReply:
        self.asked.append((system, tuple(turns)))
        step = self.steps.pop(0)
        while callable(step):
            step = step()
        if isinstance(step, Exception):
            raise step
        if isinstance(step, ModelReply):
            return step
        return ModelReply(tuple(step), tokens=100)

    @property
    def told(self) -> str:
        """The last turn that the model was given last."""
        return self.asked[-1][1][-1].text

    @property
    def results(self) -> list[str]:
        """What became of the calls before."""
        return [result.text for result in self.asked[-1][1][-1].results]


class Everything(FakeSender):
    """Sends texts as FakeSender does, and gives what is to be drafted to a drafter."""

    def __init__(self, drafter: Callable[[OutboxMessage], None]) -> None:
        super().__init__()
        self.drafter = drafter

    def __call__(self, message: OutboxMessage) -> str:
        if message.topic == DRAFT:
            self.drafter(message)
            return None  # type: ignore[return-value]
        return super().__call__(message)

    @property
    def texts(self) -> list[str | None]:
        """The words that were sent."""
        return [message.body for message in self.sent]


def work(drafter: Callable[[OutboxMessage], None]) -> Everything:
    """Run a worker that drafts and sends, until nothing more can be sent now."""
    sender = Everything(drafter)
    Worker(sender, name="w", concurrency=1, sweep=None).run_until_empty()
    return sender
