"""Policies of a worker that depend on what time it is where the lead is: when it may be texted, and how often.

    worker = Worker(
        send,
        quiet_hours=QuietHours("20:00", "08:00", timezone="timezone", default="America/New_York"),
        daily_cap=DailyCap(20, timezone="timezone", default="America/New_York"),
    )

The worker asks them after it has claimed a text, just before it sends it. What time it is, the database's clock says.

>>> from datetime import datetime, timezone
>>> night = QuietHours("20:00", "08:00", default="America/New_York")
>>> night.opening(datetime(2026, 3, 8, 6, 30, tzinfo=timezone.utc)).isoformat()  # the night in which a clock is set on
'2026-03-08T12:00:00+00:00'
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from datetime import datetime, time, timedelta, timezone, tzinfo
from functools import lru_cache, partial
from typing import Any
from zoneinfo import ZoneInfo

from close_engine.database.binding import current
from close_engine.database.dialect import identifier
from close_engine.database.fields import UtcDateTimeField, clean_words
from close_engine.database.transaction import atomic
from close_engine.errors import ConfigurationError, InvalidValue
from close_engine.outbox import TEXTS, OutboxMessage
from close_engine.printable import get_logger
from close_engine.stages import INDEXED_TEXTS, Event
from close_engine.subscriptions import publish

__all__ = ["DailyCap", "LeadTimezone", "LocalPolicy", "QuietHours", "held_back", "require_column"]

logger = get_logger(__name__)

LeadTimezone = Callable[[str], "str | tzinfo | None"]
"""A function of a lead's id that returns the name of its timezone, or the timezone, or None if nobody knows it."""


#: SQL of one value, and the parameters in it.
Needed = tuple[str, list[Any]]

#: What becomes of a message, as the worker logs it, and the function that does it.
Held = tuple[str, Callable[[], OutboxMessage]]


class LocalPolicy:
    """A policy that depends on what time it is where the lead is.

    Attributes:
        column: str, the column of the CRM's leads that has the name of the timezone; None if there is none.
        function: the function that knows the timezone; None if there is none.
        default: tzinfo, of leads without a timezone, or with one that nobody knows.
    """

    def __init__(self, timezone: str | LeadTimezone | None, default: str | tzinfo) -> None:
        self.column = clean_words("timezone", timezone, "it must be a column") if isinstance(timezone, str) else None
        if self.column is not None and set("{}%") & set(self.column):
            raise InvalidValue(
                "timezone", timezone, "a column with {, } or % in its name cannot be used: give a function"
            )
        self.function = timezone if callable(timezone) else None
        if timezone is not None and self.column is None and self.function is None:
            raise InvalidValue("timezone", timezone, "it must be a column of the leads, or a function of a lead's id")
        if inspect.iscoroutinefunction(timezone):
            raise InvalidValue("timezone", timezone, "it must be a plain function: a worker awaits nothing")
        self.default = _required_zone("default", default)

    def governs(self, message: OutboxMessage) -> bool:
        """Return whether it has a say about a message."""
        return message.topic in TEXTS

    def needs(self, message: OutboxMessage) -> list[Needed]:
        """Return what it must know of a message: first, the text in the column."""
        if self.column is None:
            return [("NULL", [])]
        named = (
            f"(SELECT CAST(l.{identifier(self.column)} AS TEXT) FROM close_engine_conversations c "
            "JOIN {leads} l ON l.id = c.lead_id WHERE c.id = %s)"
        )
        return [(named, [message.conversation_id])]

    def hold(self, message: OutboxMessage, at: datetime, known: Sequence[Any]) -> Held | None:
        """Say what becomes of a message that may not leave at a moment; None if it may.

        Args:
            message: the message.
            at: the moment.
            known: the values that it needs.
        """
        raise NotImplementedError

    def zone(self, message: OutboxMessage, word: str | None) -> tzinfo:
        """Return the timezone of a message's lead. An error of the user's function is the caller's.

        Args:
            message: the message.
            word: what stands in the column, if there is one.
        """
        found: Any = word
        lead_id = message.lead_id if self.function is not None else None
        if self.function is not None and lead_id is not None:
            found = self.function(lead_id)
        if found is None or isinstance(found, tzinfo):
            return self.default if found is None else found
        if not isinstance(found, str):
            raise InvalidValue("timezone", found, "it must be a name such as America/New_York, a tzinfo, or None")
        return zone_named(found.strip()) or self.default


class QuietHours(LocalPolicy):
    """When leads are not texted: every day from `start` to `end` on the clock where the lead is.

    A text that would leave in these hours is snoozed until they are over. That is no attempt, and the text keeps its
    place. If `end` is before `start`, the hours go on past midnight.

    Args:
        start: time, or text such as `20:00`, when the quiet begins.
        end: time, or text such as `08:00`, when it is over.
        timezone: the column of the CRM's leads that has the name of their timezone; or a function of a lead's id that
            returns such a name, a tzinfo, or None. The default is that all leads are where `default` says.
        default: the timezone of leads without one, or with one that nobody knows: a name such as `America/New_York`,
            or a tzinfo.

    Raises:
        InvalidValue: a time is none, or has a timezone of its own, both are the same, or there is no such timezone.
        ConfigurationError: this machine knows no timezones.
    """

    def __init__(
        self,
        start: time | str,
        end: time | str,
        *,
        timezone: str | LeadTimezone | None = None,
        default: str | tzinfo,
    ) -> None:
        super().__init__(timezone, default)
        self.start, self.end = _time_of_day("start", start), _time_of_day("end", end)
        if self.start == self.end:
            raise InvalidValue("end", str(end), "the quiet hours must end at another time than they begin")

    def __repr__(self) -> str:
        return f"<QuietHours from {self.start:%H:%M} to {self.end:%H:%M}>"

    def are_at(self, local: datetime) -> bool:
        """Return whether it is quiet when a clock shows this."""
        shown = local.time()
        if self.start < self.end:
            return self.start <= shown < self.end
        return shown >= self.start or shown < self.end

    def opening(self, at: datetime, zone: tzinfo | None = None) -> datetime:
        """Return the first moment that is not quiet.

        Args:
            at: datetime with a timezone, the earliest moment to return.
            zone: tzinfo, where the lead is; the default is `default`.

        Returns:
            datetime in UTC: `at` itself if it is not quiet then.
        """
        # Clocks are only ever asked what they show at a moment, never the other way round: when a clock is set, it
        # shows some times twice, and others not at all.
        zone = self.default if zone is None else zone
        at = at.astimezone(timezone.utc)
        while self.are_at(local := at.astimezone(zone)):
            end = at + (_since_midnight(self.end) - _since_midnight(local.time())) % timedelta(days=1)
            # The clock is set in between? Then all is quiet until then, and it is another time.
            at = _first_with_another_offset(at, end, zone) or end
        return at

    def hold(self, message: OutboxMessage, at: datetime, known: Sequence[Any]) -> Held | None:
        (word,) = known
        opening = self.opening(at, self.zone(message, word))
        return None if opening <= at else ("snoozed", partial(message.snooze, opening))


class DailyCap(LocalPolicy):
    """How many texts a lead gets from the AI in a day, which begins at midnight where the lead is.

    Two machines that answer each other would go on for ever. A text beyond the cap does not leave: it becomes a pending
    action, for a human to decide, with the event `cap:reached`. What a human has approved or written leaves, and does
    not count.

    Args:
        most: how many.
        timezone: as for `QuietHours`.
        default: as for `QuietHours`.

    Raises:
        InvalidValue: `most` is no whole number or less than 1, or there is no such timezone.
        ConfigurationError: this machine knows no timezones.
    """

    def __init__(self, most: int, *, timezone: str | LeadTimezone | None = None, default: str | tzinfo) -> None:
        super().__init__(timezone, default)
        if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= MOST_A_DAY:
            raise InvalidValue("most", most, f"it must be a whole number from 1 to {MOST_A_DAY}")
        self.most = most

    def __repr__(self) -> str:
        return f"<DailyCap of {self.most}>"

    def governs(self, message: OutboxMessage) -> bool:
        return super().governs(message) and message.action_id is None

    def needs(self, message: OutboxMessage) -> list[Needed]:
        # Of the AI's texts, the one that is so many back: it is enough to know whether that was today. A lane admits
        # one text in flight, so no other one is on its way meanwhile.
        counted = [message.conversation_id, -_TWO_DAYS.total_seconds(), self.most - 1]
        return [*super().needs(message), (_SO_MANY_BACK, counted)]

    def hold(self, message: OutboxMessage, at: datetime, known: Sequence[Any]) -> Held | None:
        word, sent = known
        zone = self.zone(message, word)
        if sent is None or _A_TIME.python_value(sent).astimezone(zone).date() < at.astimezone(zone).date():
            return None
        return "withdrawn", partial(self._ask_human, message)

    def _ask_human(self, message: OutboxMessage) -> OutboxMessage:
        with atomic():
            message.ask(f"the lead has had {self.most} texts of the AI today")
            facts = {"message_id": message.id, "action_id": message.action_id, "type": message.topic, "cap": self.most}
            publish(Event.CAP_REACHED, message.conversation_id, str(message.id), facts)
        return message


#: The highest cap.
MOST_A_DAY = 1000

#: No day is as long as this, wherever the lead is.
_TWO_DAYS = timedelta(days=2)

#: When a text of the AI was sent, counted back from the last. SQLite takes the index because its condition stands here.
_SO_MANY_BACK = f"""(SELECT o.sent_at FROM {{outbox}} o
    WHERE o.conversation_id = %s AND o.status = 'SENT' AND o.status <> 'PENDING'
        AND o.topic IN ({INDEXED_TEXTS})
        AND o.action_id IS NULL AND o.sent_at > {{later}} AND o.sent_at <= {{moment}}
    ORDER BY o.sent_at DESC LIMIT 1 OFFSET %s)"""


def _since_midnight(shown: time) -> timedelta:
    return timedelta(hours=shown.hour, minutes=shown.minute, seconds=shown.second, microseconds=shown.microsecond)


def _first_with_another_offset(after: datetime, until: datetime, zone: tzinfo) -> datetime | None:
    """Return the first second at which a clock is set, if it shows another offset at the end of a span than before."""
    offset = after.astimezone(zone).utcoffset()
    if until.astimezone(zone).utcoffset() == offset:
        return None
    first, span = after.replace(microsecond=0), until - after
    low, high = 0, int(span.total_seconds()) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if (first + timedelta(seconds=middle)).astimezone(zone).utcoffset() == offset:
            low = middle
        else:
            high = middle
    return first + timedelta(seconds=high)


def _time_of_day(label: str, given: time | str) -> time:
    found: Any = given
    if isinstance(given, str):
        try:
            found = time.fromisoformat(given)
        except ValueError:
            found = None
    if not isinstance(found, time) or found.tzinfo is not None:
        raise InvalidValue(label, str(given), "it must be a time such as 20:00, without a timezone")
    return found.replace(fold=0)


@lru_cache(maxsize=1024)
def zone_named(name: str) -> tzinfo | None:
    """Return the timezone of this name; None if there is none, which is logged."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # a name may also lead to no file, or to a directory
        logger.warning("there is no timezone %r: the default is taken", name)
        return None


def _required_zone(label: str, given: str | tzinfo) -> tzinfo:
    if isinstance(given, tzinfo):
        return given
    if not isinstance(given, str):
        raise InvalidValue(label, given, "it must be a name such as America/New_York, or a tzinfo")
    try:
        return ZoneInfo(given)
    except (KeyError, ValueError, OSError):
        pass
    try:
        ZoneInfo("UTC")
    except KeyError:
        raise ConfigurationError(
            "This machine knows no timezones: install its package tzdata, or pip install tzdata."
        ) from None
    raise InvalidValue(label, given, "there is no such timezone; names are like America/New_York")


# -- what the worker asks


#: Reads a time as both databases return it.
_A_TIME = UtcDateTimeField[datetime]()


def require_column(policy: LocalPolicy) -> None:
    """Refuse a policy whose column of the leads is not there, or may not be read.

    Raises:
        ConfigurationError: the leads have no such column.
        peewee.PeeweeException: this role may not read it.
    """
    if policy.column is None:
        return
    binding = current()
    folded, leads = binding.dialect.folded, binding.tables.leads
    columns = binding.dialect.catalog(binding.database).columns(leads)
    if folded(policy.column) not in map(folded, columns):
        raise ConfigurationError(
            f"The table {leads} has no column {policy.column!r} with the timezone of a lead; it has "
            f"{', '.join(columns)}. If all leads are in one timezone, give it as default= (--timezone) alone."
        )
    ((named, _),) = LocalPolicy.needs(policy, OutboxMessage())
    binding.execute(f"SELECT {named}", [""])


def held_back(message: OutboxMessage, policies: Sequence[LocalPolicy]) -> Held | None:
    """Ask policies, one after the other, whether a claimed message may leave now. They need one statement together."""
    asked = [policy for policy in policies if policy.governs(message)]
    if not asked:
        return None
    needed = [policy.needs(message) for policy in asked]
    values = ", ".join(value for each in needed for value, _ in each)
    parameters = [parameter for each in needed for _, given in each for parameter in given]
    at, *known = current().execute(f"SELECT {{moment}}, {values}", parameters).fetchone()
    for policy, each in zip(asked, needed, strict=True):
        if held := policy.hold(message, _A_TIME.python_value(at), known[: len(each)]):
            return held
        del known[: len(each)]
    return None
