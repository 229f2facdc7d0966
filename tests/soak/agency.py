"""The workers: they draft, build, and hand texts to a provider. They are the ones that are killed and suspended."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import close_engine
from close_engine import (
    ActionType,
    CannotBeSent,
    CloseEngineConversation,
    CloseEngineError,
    Direction,
    Event,
    OutboxMessage,
    Stage,
    StageChange,
    StageConflict,
    Worker,
    outbox,
    submit,
)
from tests.soak.clock import Calendar
from tests.soak.notes import Log
from tests.soak.processes import begin

LEASE = timedelta(seconds=4)
#: Often, because the clock jumps by hours.
SWEEP_EVERY = timedelta(seconds=5)

#: How long the provider takes, in seconds.
LATENCY = (0.002, 0.006)
#: One text in so many fails at its first attempt, and one in so many can never be sent.
FAILS, CANNOT = 200, 1000

_WORDS = "of course I would love to see how your bakery looks online so tell me more of what you sell and where"


def words(count: int) -> str:
    """A text of so many words."""
    return " ".join(random.choices(_WORDS.split(), k=count))


def subscribe() -> None:
    """What follows from what: once, in the deployment."""
    close_engine.subscribe("draft_reply", events=[Event.LEAD_WROTE], debounce=timedelta(milliseconds=500))
    close_engine.subscribe("build_site", stages=[Stage.BUILDING])
    close_engine.subscribe("redraft", events=[Event.ACTION_REJECTED, Event.ACTION_EXPIRED])
    close_engine.subscribe("tell_owner", events=[Event.ACTION_PENDING, Event.ACTION_EXPIRING])


def work(name: str, url: str, place: Path, calendar: Calendar) -> None:
    """Work until SIGTERM."""
    log = begin(name, url, place, calendar)
    _time_the_worker(log)
    worker = Worker(Agency(log).send, concurrency=4, lease=LEASE, sweep_every=SWEEP_EVERY)
    signal.signal(signal.SIGTERM, lambda number, frame: worker.stop())
    worker.run()


def _time_the_worker(log: Log) -> None:
    """Note how long it takes to claim a message, and to mark one as sent. The worker itself is the library's."""
    claim, sent = outbox.claim, OutboxMessage.sent

    def timed_claim(*args: Any, **options: Any) -> list[OutboxMessage]:
        began = time.monotonic()
        if found := claim(*args, **options):
            log.timed.write("claim", began, time.monotonic() - began)
        return found

    def timed_sent(self: OutboxMessage, provider_id: str | None = None) -> OutboxMessage:
        with log.timing("mark as sent"):
            return sent(self, provider_id)

    outbox.claim = timed_claim
    OutboxMessage.sent = timed_sent  # type: ignore[method-assign]


def _link(conversation: CloseEngineConversation) -> dict[str, str]:
    return {"paymentUrl": f"https://pay.example.com/{conversation.id}"}


class Agency:
    """A sender that does what a message says."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.effects: dict[str, Callable[[CloseEngineConversation, OutboxMessage], None]] = {
            "draft_reply": self.reply,
            "build_site": self.show,
            "redraft": self.redraft,
            "tell_owner": lambda conversation, message: None,
        }

    def send(self, message: OutboxMessage) -> str | None:
        if message.topic in self.effects:
            self._do(message)
            return None
        number = int(message.send_key[:8], 16)
        if number % CANNOT == 0:
            raise CannotBeSent("no such number")
        if number % FAILS == 1 and message.attempts == 1:
            raise ConnectionError("the provider is busy")
        time.sleep(random.uniform(*LATENCY))
        self.log.delivered.write(message.send_key, message.id, message.lead_id, message.topic, os.getpid())
        return f"SM-{message.send_key}"

    def _do(self, message: OutboxMessage) -> None:
        """Do it on the conversation as it is now; once more if somebody changed it meanwhile."""
        is_done = False
        while not is_done:
            conversation = CloseEngineConversation.get_by_id(message.conversation_id)
            try:
                self.effects[message.topic](conversation, message)
                is_done = True
            except CloseEngineError as error:
                self.log.refused.write(type(error).__name__)
                # Otherwise it is closed, opted out, or taken over: there is nothing to say any more.
                is_done = not isinstance(error, StageConflict)

    def reply(self, conversation: CloseEngineConversation, message: OutboxMessage) -> None:
        """As a model would: read what was said, note the answers, take the next step, and say something."""
        said = conversation.messages()
        time.sleep(random.uniform(*LATENCY))
        heard = [text.body for text in said if text.direction is Direction.INBOUND]
        key = f"draft-{message.id}"
        match conversation.stage:
            case Stage.QUALIFYING:
                conversation.record(questions=["business"], data={"business": words(3)})
                self._change(conversation, random.choice(["collect_info", "start_building"]), key)
            case Stage.COLLECTING_INFO:
                conversation.record(questions=["colours"], data={"colours": words(2)})
                self._change(conversation, "start_building", key)
            case Stage.PREVIEW_SENT if "change" in heard[-1]:
                self._change(conversation, "request_edits", key)
        if conversation.stage is Stage.EDIT_LOOP:
            self.show(conversation, message)
        elif conversation.stage is Stage.PREVIEW_SENT:
            self._submit(conversation, ActionType.SEND_PAYMENT_LINK, words(8), key=key, metadata=_link(conversation))
        else:
            self._submit(conversation, ActionType.SEND_MESSAGE, words(20), key=key)
            if random.random() < 0.1:
                self._submit(conversation, ActionType.SEND_MESSAGE, "Still there?", send_after=timedelta(hours=20))

    def show(self, conversation: CloseEngineConversation, message: OutboxMessage) -> None:
        preview = {"previewUrl": f"https://preview.example.com/{conversation.id}/{conversation.edit_rounds}"}
        self._submit(conversation, ActionType.SEND_PREVIEW, words(10), key=f"show-{message.id}", metadata=preview)

    def redraft(self, conversation: CloseEngineConversation, message: OutboxMessage) -> None:
        """What a human rejected, or nobody decided on, is written again."""
        what = ActionType(message.payload["type"])
        self._submit(conversation, what, words(15), key=f"redraft-{message.id}", metadata=_link(conversation))

    def _change(self, conversation: CloseEngineConversation, trigger: str, key: str) -> None:
        with self.log.timing("stage change"):
            change: StageChange = conversation.fire(trigger, actor="ai", key=key)
        self.log.done.write("change", change.id)

    def _submit(self, conversation: CloseEngineConversation, type_: ActionType, draft: str, **options: Any) -> None:
        with self.log.timing("submit"):
            submitted = submit(conversation, type_, draft, actor="ai", **options)
        self.log.done.write("message" if isinstance(submitted, OutboxMessage) else "action", submitted.id)
