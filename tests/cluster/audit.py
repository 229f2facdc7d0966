"""What must hold in the end: the records of all processes against the database."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from close_engine.machine import pairs
from close_engine.stages import Stage
from tests.cluster.record import Reader

__all__ = ["NOTING", "SENT_TWICE", "Audit", "Server", "audit"]

#: Made before anything is sent: what notes each time that a message is recorded as sent.
NOTING = (
    "CREATE TABLE noted (message_id bigint)",
    "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN INSERT INTO noted VALUES (NEW.id); RETURN NULL; END $$",
    "CREATE TRIGGER noting AFTER UPDATE ON close_engine.outbox FOR EACH ROW "
    "WHEN (NEW.status = 'SENT') EXECUTE FUNCTION note()",
    "GRANT INSERT ON noted TO PUBLIC",
)

#: What has a token: stage changes, texts that are to leave, texts that came in.
_TOKENS = {
    "changes": "SELECT reason FROM close_engine.history WHERE reason IS NOT NULL",
    "texts": "SELECT key FROM close_engine.outbox WHERE topic = 'SEND_MESSAGE'",
    "heard": "SELECT key FROM close_engine.inbox",
}
_HISTORY = "SELECT conversation_id, trigger, source, dest FROM close_engine.history ORDER BY conversation_id, id"
_STAGES = "SELECT id, stage FROM close_engine_conversations"
_OUTBOX = "SELECT id, key, send_key, status, provider_id FROM close_engine.outbox"
SENT_TWICE = "SELECT message_id FROM noted GROUP BY message_id HAVING count(*) > 1"
#: A worker logs this when a text is recorded as sent.
_TOLD_AS_SENT = re.compile(r" sent worker=\S+ message=(\d+)")


class Server(Protocol):
    """What is audited."""

    def session(self) -> Any:
        """Open a session of psycopg2's."""


@dataclass
class Audit:
    """What was found.

    Attributes:
        figures: what there is, by what it is called.
        wrong: a sentence for each thing that must not be.
    """

    figures: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def require_none(self, found: object, what: str) -> None:
        listed = list(found)  # type: ignore[call-overload]
        if listed:
            shown = ", ".join(map(str, listed[:5])) + (", …" if len(listed) > 5 else "")
            self.wrong.append(f"{len(listed)} {what}: {shown}")


def audit(primary: Server, clients: Path, workers: Path) -> Audit:
    """Compare what the processes noted with what the database has.

    Args:
        primary: the server.
        clients, workers: the directories of their records.
    """
    found = Audit()
    words: dict[str, set[str]] = {word: set() for word in ("try", "changed", "done", "refused")}
    for path in clients.glob("*.record"):
        for line in Reader(path).news():
            words[line.word].add(line.about)
    acknowledged = words["done"] | words["changed"]
    stored: Counter[str] = Counter()
    for kind, statement in _TOKENS.items():
        tokens = [token for (token,) in _rows(primary, statement)]
        stored.update(tokens)
        found.figures[f"{kind} in the database"] = len(tokens)
    found.figures["stage changes acknowledged"] = len(words["changed"])
    found.figures["acknowledged"] = len(acknowledged)
    found.figures["refused, because another client was quicker"] = len(words["refused"])
    in_doubt = words["try"] - acknowledged - words["refused"]
    found.figures["unknown to a client that was killed"] = len(in_doubt)
    found.figures["of these in the database"] = len(in_doubt & stored.keys())
    found.require_none(acknowledged - stored.keys(), "were acknowledged and are lost")
    found.require_none((token for token, count in stored.items() if count > 1), "are recorded twice")
    found.require_none(words["refused"] & stored.keys(), "were refused and are recorded")
    found.require_none(stored.keys() - words["try"], "are recorded and nobody tried them")
    _replay(primary, found)
    _compare_deliveries(primary, workers, found)
    return found


def _replay(primary: Server, found: Audit) -> None:
    """Each conversation's history leads, by changes that the table allows, to the stage in its row."""
    allowed = {(trigger, str(source), str(dest)) for trigger, source, dest in pairs()}
    reached: dict[str, str | None] = {}
    broken = set()
    for conversation, trigger, source, dest in _rows(primary, _HISTORY):
        before = reached.get(conversation)
        opens = conversation not in reached and source is None and dest == Stage.INITIATED
        if not opens and (source != before or (trigger, source, dest) not in allowed):
            broken.add(conversation)
        reached[conversation] = dest
    stages = {conversation: stage for conversation, stage in _rows(primary, _STAGES)}
    found.figures["conversations"] = len(stages)
    found.require_none(sorted(broken), "histories do not replay")
    found.require_none(
        (one for one, stage in stages.items() if reached.get(one) != stage), "stages are not the last of their history"
    )


def _compare_deliveries(primary: Server, workers: Path, found: Audit) -> None:
    """Each text left, under one key of its own; it was recorded once, however often it left."""
    rows = list(_rows(primary, _OUTBOX))
    by_key = {send_key: key for _, key, send_key, _, _ in rows}
    found.figures["messages sent"] = sum(status == "SENT" for *_, status, _ in rows)
    found.require_none((id_ for id_, _, _, status, _ in rows if status != "SENT"), "texts are not recorded as sent")
    found.require_none((row[0] for row in rows if row[4] != f"SM-{row[2]}"), "texts have another provider id")
    if len(by_key) < len(rows):
        found.wrong.append(f"{len(rows) - len(by_key)} texts have a send_key that another one has")
    found.require_none((id_ for (id_,) in _rows(primary, SENT_TWICE)), "texts were recorded as sent twice")
    told = Counter(id_ for path in workers.glob("*.log") for id_ in _TOLD_AS_SENT.findall(path.read_text()))
    found.require_none((id_ for id_, count in told.items() if count > 1), "texts were told to a worker as sent twice")
    delivered: Counter[str] = Counter()
    for path in workers.glob("*.record"):
        for line in Reader(path).news():
            if line.word == "delivered":
                delivered[line.about] += 1
    found.figures["deliveries beyond the first of a message, with the same key"] = sum(delivered.values()) - len(
        delivered
    )
    texts = {f"{send_key} {key}" for send_key, key in by_key.items()}
    found.require_none(texts - delivered.keys(), "texts are recorded as sent and never were")
    found.require_none(delivered.keys() - texts, "deliveries are of no text, or under another key than its own")


def _rows(server: Server, statement: str) -> Iterator[tuple[str, ...]]:
    """The rows of a query, one after the other, without having all of them in memory."""
    with closing(server.session()) as session:
        session.autocommit = False
        with session.cursor("audit") as cursor:
            cursor.itersize = 50_000
            cursor.execute(statement)
            yield from cursor
