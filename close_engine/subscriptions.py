"""What must follow from an event is declared in the database, and put into the outbox whoever causes the event.

    subscribe("build_site", stages=[Stage.BUILDING])
    subscribe("ask_owner", events=["action:pending"], payload={"channel": "phone"})
    subscribe("draft_reply", events=["lead:wrote"], debounce=timedelta(seconds=8))

From then on, triggers put a message of that topic into the outbox, in the transaction of the event and once for each,
whether it comes from Python, a sweep, the CRM's screen, `psql` or `close-engine fire`. A worker hands it to a sender.

>>> subscribe("build_site", stages=["BUILT"])
Traceback (most recent call last):
close_engine.InvalidValue: stages cannot be 'BUILT': it must be one of INITIATED, QUALIFYING, COLLECTING_INFO, \
BUILDING, PREVIEW_SENT, EDIT_LOOP, PENDING_APPROVAL, PAYMENT_SENT, COMPLETED, STALLED, CLOSED_LOST.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Any, TypeVar

from close_engine.database.binding import current
from close_engine.database.fields import LONGEST_SPAN, clean_json, clean_text, clean_words, dump_json
from close_engine.database.transaction import atomic
from close_engine.errors import InvalidValue
from close_engine.stages import ActionType, Event, Stage

__all__ = ["Subscription", "publish", "subscribe", "subscriptions", "unsubscribe"]

#: How long before an action expires `action:expiring` is published, unless the subscription says otherwise.
WARN_BEFORE = timedelta(hours=1)

_MILLISECOND = timedelta(milliseconds=1)

_Word = TypeVar("_Word", bound=Enum)


@dataclass(frozen=True)
class Subscription:
    """A topic that follows from an event.

    Attributes:
        topic: str, the topic of the message that is put into the outbox.
        event: str, one of `Event`.
        stage: str, the stage that is entered; None for other events.
        payload: dict, what the message's payload begins with; the facts of the event are added to it.
        send_after: timedelta, how long the message waits.
        debounce: timedelta, how long nothing more may have happened before the message leaves; None if each event makes
            a message of its own.
        at_most: timedelta, how long further events can move it on, counted from the first; None without `debounce`.
        before: timedelta, of `action:expiring`, how long before the action expires; None for other events.
    """

    topic: str
    event: str
    stage: str | None
    payload: dict[str, Any]
    send_after: timedelta
    debounce: timedelta | None = None
    at_most: timedelta | None = None
    before: timedelta | None = None


def subscribe(
    topic: str,
    *,
    stages: Iterable[Stage | str] = (),
    events: Iterable[Event | str] = (),
    payload: Mapping[str, Any] | None = None,
    send_after: timedelta | None = None,
    debounce: timedelta | None = None,
    at_most: timedelta | None = None,
    before: timedelta | None = None,
) -> None:
    """Put a message of this topic into the outbox whenever a stage is entered or an event happens.

    Its payload is the subscription's, and the facts of the event: for `stage:entered` the `change_id`, `from`, `to` and
    `trigger`; for an action the `action_id`, its `type`, `by` whom, and what it was `submitted_by`, the `draft`,
    when it `expires_at`, and the `reason` of a rejection; for a dead message the `message_id`, its `topic`
    and `error`; for a text of the lead the `text_id`, its `key` and the `text`; for a payment the `payment_id`, its
    `key`, `amount` and `currency`; for an opt-out the `lead_id` and the `source`; for a takeover `by` whom, its
    `reason` and `until` when; for a cap the `message_id`, the `action_id`, its `type` and the `cap`; and always the
    `event`. Subscribing again replaces payload and times.

    With `debounce`, the events of a burst make one message for each conversation. Each further event moves it on, until
    a worker claims it or the time of `at_most` has come. It carries all of them: its payload has the facts of the first
    event, as without `debounce`, and in `events` the facts of each, in order.

    Args:
        topic: what your sender should do, for example `build_site`.
        stages: the stages.
        events: the events; see `Event`.
        payload: what else the sender needs.
        send_after: how long the message waits.
        debounce: how long nothing more may happen before the message leaves.
        at_most: how long further events can move it on, counted from the first; ten times `debounce` by default.
        before: of `action:expiring`, how long before the action expires; an hour by default.

    Raises:
        InvalidValue: the topic is a text's, no stage and no event is named, or an argument cannot be stored.
    """
    clean_words("topic", topic, "it must say what is to be done")
    if topic in [str(type) for type in ActionType]:
        raise InvalidValue("topic", topic, "texts to the lead are submitted; name your own effect")
    chosen = [(Event.STAGE_ENTERED, str(stage)) for stage in _words("stages", Stage, stages)]
    for event in _words("events", Event, events):
        if event is Event.STAGE_ENTERED:
            raise InvalidValue("events", str(event), "name the stages instead")
        chosen.append((event, ""))
    if not chosen:
        raise InvalidValue("events", [], "name at least one stage or one event")
    if not timedelta(0) <= (send_after or timedelta(0)) <= LONGEST_SPAN:
        raise InvalidValue("send_after", str(send_after), f"it must be from 0 to {LONGEST_SPAN.days} days")
    debounce, at_most = _burst(debounce, at_most, send_after)
    if before is not None and (Event.ACTION_EXPIRING, "") not in chosen:
        raise InvalidValue("before", str(before), f"it is for the event {Event.ACTION_EXPIRING}")
    if before is not None and not _MILLISECOND <= before <= LONGEST_SPAN:
        raise InvalidValue("before", str(before), f"it must be from a millisecond to {LONGEST_SPAN.days} days")
    stored = dump_json(clean_json("payload", dict(payload or {})))
    waits = [_milliseconds(wait or timedelta(0)) for wait in (send_after, debounce, at_most)]
    with atomic():
        for event, stage in sorted(chosen):
            ahead = _milliseconds(before or WARN_BEFORE) if event is Event.ACTION_EXPIRING else None
            current().execute(_SUBSCRIBE, (topic, str(event), stage, stored, *waits, ahead))


_SUBSCRIBE = """
    INSERT INTO {subscriptions} (topic, event, stage, payload, send_after, debounce, at_most, before)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT (event, stage, topic) DO UPDATE SET payload = EXCLUDED.payload, send_after = EXCLUDED.send_after,
        debounce = EXCLUDED.debounce, at_most = EXCLUDED.at_most, before = EXCLUDED.before
"""


def _burst(
    debounce: timedelta | None, at_most: timedelta | None, send_after: timedelta | None
) -> tuple[timedelta | None, timedelta | None]:
    """Check the times of a burst, and return them with the default of `at_most`."""
    if debounce is None:
        if at_most is not None:
            raise InvalidValue("at_most", str(at_most), "it bounds a debounce; give that, too")
        return None, None
    if not _MILLISECOND <= debounce <= LONGEST_SPAN:
        raise InvalidValue("debounce", str(debounce), f"it must be from a millisecond to {LONGEST_SPAN.days} days")
    if send_after:
        raise InvalidValue("send_after", str(send_after), "a debounced message waits already; give one of the two")
    if at_most is None:
        return debounce, min(10 * debounce, LONGEST_SPAN)
    if not debounce <= at_most <= LONGEST_SPAN:
        raise InvalidValue("at_most", str(at_most), f"it must be from the debounce to {LONGEST_SPAN.days} days")
    return debounce, at_most


def _milliseconds(wait: timedelta) -> int:
    return wait // _MILLISECOND


def _words(label: str, words: type[_Word], given: Iterable[Any]) -> list[_Word]:
    known = {str(word.value): word for word in words}
    given = [given] if isinstance(given, str) else list(given)
    for word in given:
        if word not in known:
            raise InvalidValue(label, word, f"it must be one of {', '.join(known)}")
    return [known[str(word)] for word in dict.fromkeys(given)]


def unsubscribe(topic: str) -> int:
    """Let nothing more of this topic follow from any event. What is in the outbox stays there.

    Args:
        topic: as given to `subscribe`.

    Returns:
        how many subscriptions there were.
    """
    with atomic():
        deleted = current().execute("DELETE FROM {subscriptions} WHERE topic = %s", (clean_text("topic", topic),))
    return int(deleted.rowcount)


def subscriptions() -> list[Subscription]:
    """List what is subscribed to, by topic."""
    rows = current().execute(
        "SELECT topic, event, stage, CAST(payload AS TEXT), send_after, debounce, "
        "COALESCE(NULLIF(at_most, 0), 10 * debounce), before FROM {subscriptions} ORDER BY topic, event, stage"
    )
    return [
        Subscription(
            topic,
            event,
            stage or None,
            json.loads(payload or "{}"),
            timedelta(milliseconds=send_after),
            *(timedelta(milliseconds=wait) if wait else None for wait in times),
        )
        for topic, event, stage, payload, send_after, *times in rows.fetchall()
    ]


def publish(event: Event, conversation_id: str, fact: str, facts: Mapping[str, Any]) -> None:
    """Say that an event happened which no trigger sees: what is subscribed to it goes into the outbox, once.

    Args:
        event: which one.
        conversation_id: the conversation's id.
        fact: what tells this event from any other of its kind, such as the id of a row.
        facts: what the message's payload says of it. Nothing is said of what is None.
    """
    said = {name: value for name, value in facts.items() if value is not None}
    binding = current()
    binding.execute(binding.dialect.publish, (str(event), conversation_id, fact, dump_json(said)))
