"""What must be true in the end, whatever happened: nothing is lost, nothing is recorded twice, all of it fits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import peewee

import close_engine
from tests.soak.notes import Log

#: A history row that does not begin where the one before it ended, and a conversation that is not where its last ends.
_BROKEN = """
    SELECT id FROM (SELECT id, source, lag(dest) OVER (PARTITION BY conversation_id ORDER BY id) AS before
        FROM close_engine.history) h WHERE source IS DISTINCT FROM before
"""
_ELSEWHERE = """
    SELECT c.id FROM close_engine_conversations c LEFT JOIN (
        SELECT DISTINCT ON (conversation_id) conversation_id, dest FROM close_engine.history
        ORDER BY conversation_id, id DESC
    ) h ON h.conversation_id = c.id WHERE h.dest IS DISTINCT FROM c.stage
"""
_IN_FLIGHT = "SELECT id FROM close_engine.outbox WHERE status = 'PENDING' AND leased_by IS NOT NULL"
#: What was due at a moment and waits, though nothing that is tried again later keeps its place before it.
STUCK = """
    SELECT o.id FROM close_engine.outbox o WHERE o.status = 'PENDING' AND o.available_at <= %s
        AND NOT EXISTS (SELECT FROM close_engine.outbox f WHERE f.conversation_id = o.conversation_id
            AND f.status = 'PENDING' AND f.id < o.id AND f.claims > 0 AND f.available_at > %s)
"""
#: Where each thing that a caller was told is done must be found.
_KEPT = {
    "message": "SELECT id::text FROM close_engine.outbox",
    "action": "SELECT id FROM pending_actions",
    "approved": "SELECT a.id FROM pending_actions a JOIN close_engine.outbox o ON o.action_id = a.id "
    "WHERE a.status = 'APPROVED'",
    "rejected": "SELECT id FROM pending_actions WHERE status = 'REJECTED'",
    "change": "SELECT id::text FROM close_engine.history",
    "text": "SELECT key FROM close_engine.inbox WHERE kind = 'text'",
    "payment": "SELECT i.key FROM close_engine.inbox i JOIN close_engine_conversations c ON c.id = i.conversation_id "
    "WHERE i.kind = 'payment' AND c.stage = 'COMPLETED'",
}
_TEXTS = """
    SELECT id, send_key, provider_id, status FROM close_engine.outbox
    WHERE topic IN ('SEND_MESSAGE', 'SEND_PREVIEW', 'SEND_PAYMENT_LINK')
"""


class Audit:
    """What was found.

    Attributes:
        problems: sentences that each say what is wrong.
        delivered: how many texts the provider was given.
        twice: how many of them it was given again, with the same key, because a worker had been killed or suspended.
        unrecorded: how many left with a worker that was killed or suspended then, and were withdrawn for a good reason
            before they were recorded.
    """

    def __init__(self, database: peewee.Database, log: Log, struck: set[int], drained_at: datetime) -> None:
        """Look.

        Args:
            database: of the run.
            log: Log, of all processes.
            struck: the process ids of the workers that were killed or suspended.
            drained_at: when the workers had sent all that was due; by the database's clock.
        """
        self.database = database
        self.problems: list[str] = []
        self.delivered = self.twice = self.unrecorded = 0
        self._kept(log)
        self._sent(log, struck)
        self._none("rows of the history do not begin where the one before ended", _BROKEN)
        self._none("conversations are not where their history ends", _ELSEWHERE)
        self._none("messages are still in flight", _IN_FLIGHT)
        self._none("messages are due and wait for nothing", STUCK, drained_at, drained_at)
        self.problems += [f"verify says: {sentence}" for sentence in close_engine.verify()]

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return list(self.database.execute_sql(query, values or None).fetchall())

    def _none(self, what: str, query: str, *values: Any) -> None:
        self._complain(what, [row[0] for row in self._rows(query, *values)])

    def _complain(self, what: str, ids: Iterable[Any]) -> None:
        if found := sorted(map(str, ids)):
            shown = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
            self.problems.append(f"{len(found)} {what}: {shown}")

    def _kept(self, log: Log) -> None:
        done: dict[str, set[str]] = defaultdict(set)
        for what, key in log.done.lines():
            done[what].add(key)
        for what, query in _KEPT.items():
            self._complain(
                f"times '{what}' was acknowledged and is not there", done[what] - {k for (k,) in self._rows(query)}
            )

    def _sent(self, log: Log, struck: set[int]) -> None:
        messages: dict[str, set[int]] = defaultdict(set)
        by: dict[int, set[int]] = defaultdict(set)
        keys: dict[int, set[str]] = defaultdict(set)
        for send_key, message_id, _, _, pid in log.delivered.lines():
            self.delivered += 1
            self.twice += send_key in messages
            messages[send_key].add(int(message_id))
            by[int(message_id)].add(int(pid))
            keys[int(message_id)].add(f"SM-{send_key}")
        self._complain("send keys were delivered for two messages", [k for k, ids in messages.items() if len(ids) > 1])
        for id_, send_key, provider_id, status in self._rows(_TEXTS):
            if status == "SENT" and provider_id not in keys.get(id_, ()):
                self._complain("is SENT and was not delivered so", [id_])
            if status != "SENT" and f"SM-{send_key}" in keys.get(id_, ()):
                self.unrecorded += 1
                if not by[id_] & struck:
                    self._complain(f"is {status}, was delivered, and its worker lived", [id_])


def tracebacks(place: Path) -> list[str]:
    """The sentence that ends each traceback in the logs of a run's processes."""
    found = []
    for log in sorted(place.glob("*.log")):
        for part in log.read_text(errors="replace").split("Traceback")[1:]:
            last = next(line for line in [*part.splitlines()[1:], "?"] if line[:1].strip())
            found.append(f"{log.stem} logged a traceback: {last}")
    return found
