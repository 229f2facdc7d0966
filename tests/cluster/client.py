"""A client: it changes the stages of its conversations as quickly as it can, and is not lost when the database is.

    python -m tests.cluster.client RECORD NAME FIRST LAST LEADS

It does what anybody must do who uses a database that may fail over. An error that passes, as `is_transient` tells,
leaves open whether something was committed. So it closes the connection, and does the same thing again with the same
key, or looks into the history first, until it knows.
"""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import close_engine
from close_engine import (
    ActionType,
    CloseEngineConversation,
    EntryPoint,
    Stage,
    StageChange,
    StageConflict,
    is_transient,
    open_conversation,
    receive,
    submit,
)
from tests.cluster.record import Record

__all__ = ["lead_id"]

Result = TypeVar("Result")

#: From stage to stage, and then back and forth.
_NEXT = {
    Stage.INITIATED: "start_qualifying",
    Stage.QUALIFYING: "start_building",
    Stage.BUILDING: "send_preview",
    Stage.PREVIEW_SENT: "request_edits",
    Stage.EDIT_LOOP: "send_preview",
}
_BACK_AND_FORTH = (Stage.PREVIEW_SENT, Stage.EDIT_LOOP)

#: What a client finds after an error may be a commit that only the primary has yet: one that was not acknowledged. This
#: one is, and by then the standby has all that came before it. A standby refuses the first function with an error that
#: passes; it knows no such error for the second one.
_WAIT_FOR_THE_STANDBY = (
    "SELECT pg_catalog.pg_current_xact_id(), pg_catalog.pg_logical_emit_message(true, 'close_engine', '')"
)


class Client:
    """One client.

    Args:
        record: where it notes what it tries, and what was acknowledged.
        name: begins each of its tokens, and nobody else's.
        own: the numbers of its leads. Now and then it meddles with those of others.
        leads: how many there are.
    """

    def __init__(self, record: Record, name: str, own: range, leads: int) -> None:
        self.stopping = False
        self._record = record
        self._name = name
        self._own = own
        self._leads = leads
        self._database = close_engine.connect()
        self._chance = random.Random(name)
        self._known: dict[str, CloseEngineConversation] = {}
        #: Half of them use keys; the others look into the history.
        self._uses_keys = own.start // len(own) % 2 == 0

    def run(self) -> None:
        turn = 0
        while not self.stopping:
            turn += 1
            self._turn(f"{self._name}-{turn}")

    def _turn(self, token: str) -> None:
        number = self._chance.choice(self._own) if self._chance.random() < 0.99 else self._chance.randrange(self._leads)
        conversation = self._surely(lambda repeated: self._loaded(number))
        if conversation is None:
            return  # its own client has not opened it yet
        dice = self._chance.random()
        act: partial[None] = partial(self._change, conversation, _NEXT[conversation.stage], token)
        if conversation.stage in _BACK_AND_FORTH and dice < 0.05:
            act = partial(self._text if dice < 0.03 else self._hear, conversation, token)
        self._record.note("try", token)
        try:
            self._surely(act)
        except StageConflict:
            self._forget(conversation)
            self._record.note("refused", token)
        else:
            self._record.note("changed" if act.func == self._change else "done", token)

    def _loaded(self, number: int) -> CloseEngineConversation | None:
        lead = lead_id(number)
        if number not in self._own:
            return CloseEngineConversation.get_or_none(CloseEngineConversation.lead == lead)
        if lead not in self._known:
            self._known[lead] = open_conversation(lead, EntryPoint.SMS_REPLY)
        return self._known[lead]

    def _forget(self, conversation: CloseEngineConversation) -> None:
        """Load it anew when it has its next turn."""
        self._known.pop(conversation.lead_id, None)

    def _change(self, conversation: CloseEngineConversation, trigger: str, token: str, repeated: bool) -> None:
        if repeated:
            self._forget(conversation)
        if self._uses_keys:
            # If it was made before the connection broke, this returns what it made then.
            conversation.fire(trigger, actor=self._name, reason=token, key=token)
            return
        if repeated and self._is_made(conversation, token):
            return
        try:
            conversation.fire(trigger, actor=self._name, reason=token)
        except StageConflict:
            # The first try may have been under way all the time, and is what this one met.
            if not (repeated and self._is_made(conversation, token)):
                raise

    def _is_made(self, conversation: CloseEngineConversation, token: str) -> bool:
        its = (StageChange.conversation_id == conversation.id) & (StageChange.reason == token)
        return StageChange.get_or_none(its) is not None

    def _text(self, conversation: CloseEngineConversation, token: str, repeated: bool) -> None:
        self._forget(conversation)
        submit(conversation, ActionType.SEND_MESSAGE, token, key=token, actor=self._name, if_lead_writes="send")

    def _hear(self, conversation: CloseEngineConversation, token: str, repeated: bool) -> None:
        self._forget(conversation)
        receive(conversation.lead_id, key=token, text=token)

    def _surely(self, act: Callable[[bool], Result]) -> Result:
        """Do something until the database has answered; `act` is told whether it may have been done already."""
        repeated = False
        while True:
            try:
                self._database.connect(reuse_if_open=True)
                result = act(repeated)
                if repeated:
                    self._database.execute_sql(_WAIT_FOR_THE_STANDBY)
            except Exception as error:
                if not is_transient(error):
                    raise
                print(f"{time.monotonic():.3f} {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                self._database.close()
                repeated = True
                time.sleep(0.1)
            else:
                return result


def lead_id(number: int) -> str:
    return f"lead-{number}"


def main(record: str, name: str, first: str, last: str, leads: str) -> None:
    client = Client(Record(Path(record)), name, range(int(first), int(last)), int(leads))

    def stop(*signalled: object) -> None:
        client.stopping = True

    signal.signal(signal.SIGTERM, stop)
    client.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
