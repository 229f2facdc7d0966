"""Sending is paused, and resumed: every worker sees it at its next claim.

    pause_sending("the provider is down", by="dana")
    …
    resume_sending(by="dana")

What is in flight leaves, and nothing else does. Nothing is withdrawn for it, and the lanes keep their order.

>>> pause_sending(" ")
Traceback (most recent call last):
close_engine.InvalidValue: reason cannot be ' ': say why nothing is to be sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import peewee

from close_engine.database.binding import current
from close_engine.database.dialect import Dialect
from close_engine.database.fields import TextField, UtcDateTimeField, clean_words
from close_engine.database.transaction import atomic
from close_engine.errors import InvalidValue
from close_engine.models import BaseModel

__all__ = ["Pause", "pause_sending", "paused", "resume_sending"]

#: What the lock is about. Whoever pauses or resumes holds it, so that they write the pauses one after the other.
LOCK = "close_engine.pauses"

#: What stands for all topics: no topic can be empty.
_ALL = ""


class Pause(BaseModel):
    """A pause of sending: a row of the table `pauses`. It lasts until somebody resumes.

    Attributes:
        topic: str, what is not sent; empty if nothing is.
        reason: str, why, as it was last given.
        paused_by: str, who said so last; None if that is not known.
        paused_at: datetime, since when.
        resumed_by: str, who resumed.
        resumed_at: datetime, until when; None while it lasts.
    """

    id: Any = peewee.BigAutoField()
    topic = TextField[str]()
    reason = TextField[str]()
    paused_by = TextField["str | None"](null=True)
    paused_at = UtcDateTimeField[datetime]()
    resumed_by = TextField["str | None"](null=True)
    resumed_at = UtcDateTimeField["datetime | None"](null=True)

    class Meta:
        table_name = "pauses"
        own_table = "pauses"

    def __str__(self) -> str:
        what = f"{self.topic} is not sent" if self.topic else "nothing is sent"
        by = f", says {self.paused_by}" if self.paused_by else ""
        return f"{what} since {self.paused_at:%Y-%m-%d %H:%M:%S} UTC{by}: {self.reason}"

    def __repr__(self) -> str:
        return f"<Pause {self.id}: {self}>"


_LASTS = Pause.resumed_at.is_null()
Pause.add_index(Pause.topic, unique=True, where=_LASTS)


def pause_sending(reason: str, topics: Sequence[str] | None = None, by: str | None = None) -> list[Pause]:
    """Send nothing more until `resume_sending`, or nothing with these topics.

    Every worker sees it at its next claim. What is in flight by then leaves: what was claimed before this is committed.
    If it is paused already, the pause goes on from when it began, for the new reason.

    Args:
        reason: str, why; it is shown wherever the outbox is shown.
        topics: sequence of str, the topics; the default is everything. A text that is paused holds up the texts behind
            it in its lane.
        by: str, who says so.

    Returns:
        list of Pause, all that last now.

    Raises:
        InvalidValue: the reason is empty, `topics` is no list or an empty one, or an argument cannot be stored.
    """
    clean_words("reason", reason, "say why nothing is to be sent")
    if by is not None:
        clean_words("by", by, "leave it out, or say who pauses")
    names = _topics(topics) or [_ALL]
    with atomic():
        _hold()
        for topic in names:
            current().execute(_PAUSE, (topic, reason, by))
    return paused()


_PAUSE = """
    INSERT INTO {pauses} (topic, reason, paused_by, paused_at) VALUES (%s, %s, %s, {moment})
    ON CONFLICT (topic) WHERE resumed_at IS NULL DO UPDATE SET reason = EXCLUDED.reason, paused_by = EXCLUDED.paused_by
"""


def resume_sending(topics: Sequence[str] | None = None, by: str | None = None) -> list[Pause]:
    """Send again, and wake the workers. If nothing is paused, nothing changes.

    Args:
        topics: sequence of str, end only the pauses of these topics, and not one of everything; the default is to end
            all pauses.
        by: str, who says so.

    Returns:
        list of Pause, those that ended.

    Raises:
        InvalidValue: `topics` is no list or an empty one, or an argument cannot be stored.
    """
    if by is not None:
        clean_words("by", by, "leave it out, or say who resumes")
    names = _topics(topics)
    these = _LASTS if names is None else _LASTS & Pause.topic.in_(names)
    with atomic():
        _hold()
        present = peewee.SQL(current().dialect.moment)
        update = Pause.update(resumed_at=present, resumed_by=by).where(these)
        ended: list[Pause] = list(update.returning(Pause).execute())
    return sorted(ended, key=lambda pause: int(pause.id))


def paused() -> list[Pause]:
    """List the pauses that last, oldest first; empty if everything is sent."""
    return list(Pause.select().readable().where(_LASTS).order_by(Pause.id))


def is_sent(topic: str, dialect: Dialect) -> str:
    """Return the SQL that says whether a topic is sent now. The database reads the pauses once for a statement.

    Args:
        topic: the topic in the statement.
    """
    lasting = dialect.in_subquery("SELECT p.topic FROM {pauses} p WHERE p.resumed_at IS NULL")
    # A CASE, because PostgreSQL would believe that hardly any topic is sent, and sort all that is due to find it.
    return f"NOT ('{_ALL}' {lasting})\n        AND CASE WHEN {topic} {lasting} THEN false ELSE true END"


def _hold() -> None:
    binding = current()
    binding.dialect.hold(binding.database, LOCK, "")


def _topics(topics: Sequence[str] | None) -> list[str] | None:
    if topics is None:
        return None
    if isinstance(topics, str) or not topics:
        raise InvalidValue("topics", topics, "it must be a list of at least one topic")
    return [clean_words("topics", topic, "a topic must have a name") for topic in dict.fromkeys(topics)]
