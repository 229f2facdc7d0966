"""An application that submits texts, and the CRM's screen that approves half of them by SQL of its own.

    python -m tests.cluster.submitter RECORD CONVERSATIONS PAUSE

It notes a text before it commits it, and once that is acknowledged. After an error that passes, it does the same thing
again, with the same key, until it knows.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import peewee
import psycopg2

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    EntryPoint,
    PendingAction,
    StageConflict,
    is_transient,
    open_conversation,
    submit,
)
from close_engine.testing import new_lead
from tests.cluster.record import Record

Result = TypeVar("Result")

_APPROVE = "UPDATE pending_actions SET status = 'APPROVED', approved_by = 'jane' WHERE id = %s AND status = 'PENDING'"


def main(path: str, conversations: str, pause: str) -> None:
    stopping = []
    signal.signal(signal.SIGTERM, lambda *signalled: stopping.append(True))
    record = Record(Path(path))
    database = close_engine.connect()
    levels = itertools.cycle((AutonomyLevel.FULL_AUTO, AutonomyLevel.MANUAL))
    mine = [
        open_conversation(new_lead(autonomy_level=next(levels)), EntryPoint.SMS_REPLY)
        for _ in range(int(conversations))
    ]
    record.note("ready")
    chance = random.Random(15)
    for number in itertools.count():
        if stopping:
            return
        conversation, token = chance.choice(mine), f"text-{number}"
        record.note("try", token)
        draft = _surely(database, lambda c=conversation, t=token: _submitted(c, t))  # type: ignore[misc]
        if isinstance(draft, PendingAction):
            record.note("try", token)  # it is committed from here on
            _surely(database, lambda d=draft: _approve(d.id))  # type: ignore[misc]
            record.note("approved", token)
        record.note("done", token)
        time.sleep(float(pause))


def _submitted(conversation: CloseEngineConversation, token: str) -> object:
    conversation = CloseEngineConversation.get_by_id(conversation.id)
    return submit(conversation, ActionType.SEND_MESSAGE, token, key=token, if_lead_writes="send")


def _approve(action_id: str) -> None:
    """What the CRM's screen does: it knows nothing of this library."""
    with closing(psycopg2.connect(os.environ["CLOSE_ENGINE_DATABASE"])) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(_APPROVE, (action_id,))


def _surely(database: peewee.Database, act: Callable[[], Result]) -> Result:
    while True:
        try:
            database.connect(reuse_if_open=True)
            return act()
        except StageConflict:
            continue  # a text of the conversation was sent meanwhile: it is loaded again
        except (peewee.PeeweeException, psycopg2.OperationalError, psycopg2.InterfaceError) as error:
            if isinstance(error, peewee.PeeweeException) and not is_transient(error):
                raise
            print(f"{time.monotonic():.3f} {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            database.close()
            time.sleep(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
