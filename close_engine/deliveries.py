"""Whether what was sent arrived: what providers say of it later, in whatever order they say it.

    record_delivery(form["MessageStatus"], provider_id=form["MessageSid"], error=form.get("ErrorCode"))

A status only goes forward: queued, sent, undelivered, delivered, read. What is said of a message before it was marked
as sent is kept, and so is what is said of other systems' messages.

>>> from close_engine import connect, migrate
>>> database = connect("sqlite:///:memory:")
>>> applied = migrate(standalone=True)
>>> record_delivery("delivered", provider_id="SM1").status
<DeliveryStatus.DELIVERED: 'delivered'>
>>> record_delivery("sent", provider_id="SM1").status
<DeliveryStatus.DELIVERED: 'delivered'>
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import reduce
from operator import or_
from typing import Any

import peewee

from close_engine.database.binding import current
from close_engine.database.fields import EnumField, TextField, UtcDateTimeField, clean_words, storable_text
from close_engine.database.reading import Rows
from close_engine.database.transaction import atomic
from close_engine.errors import InvalidValue
from close_engine.models import BaseModel
from close_engine.stages import DeliveryStatus

__all__ = ["DELIVERY_WORDS", "Delivery", "of_sending", "record_delivery", "undelivered", "was_of_another_sending"]

_QUEUED, _SENT, _UNDELIVERED, _DELIVERED, _READ = DeliveryStatus

#: What the locks are about: one for each id of a sending. The trigger that follows a message holds it, too.
LOCK = "close_engine.deliveries"

#: What providers call a status, and which it is. The words are Twilio's.
DELIVERY_WORDS: Mapping[str, DeliveryStatus] = {
    **dict.fromkeys(("accepted", "scheduled", "queued", "sending"), _QUEUED),
    "sent": _SENT,
    **dict.fromkeys(("undelivered", "failed", "canceled"), _UNDELIVERED),
    "delivered": _DELIVERED,
    "read": _READ,
}


class Delivery(BaseModel):
    """What a provider said of one sending of a message: a row of the table `deliveries`.

    Attributes:
        provider_id: str, the provider's id; None if only the send key is known.
        send_key: str, the message's `send_key` when it was sent so; None as long as only the provider's id is known.
        message_id: int, id of the message; None if there is none of ours, or none yet, that was sent so.
        status: DeliveryStatus, the furthest that was said.
        error: str, why it was not delivered, as given with that status.
        at: datetime, when, as given with that status or by the database's clock.
    """

    id: Any = peewee.BigAutoField()
    provider_id = TextField["str | None"](null=True)
    send_key = TextField["str | None"](null=True)
    message_id: Any = peewee.BigIntegerField(null=True)
    status = EnumField[DeliveryStatus](DeliveryStatus)
    error = TextField["str | None"](null=True)
    at = UtcDateTimeField[datetime]()

    class Meta:
        table_name = "deliveries"
        own_table = "deliveries"

    def __repr__(self) -> str:
        return f"<Delivery {self.id}: message {self.message_id}, {self.provider_id}, {self.status}>"


_NOBODYS = Delivery.message_id.is_null()
for fields, unique, where in (
    ((Delivery.provider_id,), True, Delivery.provider_id.is_null(False)),
    ((Delivery.send_key,), True, Delivery.send_key.is_null(False)),
    ((Delivery.provider_id,), False, _NOBODYS),
    ((Delivery.send_key,), False, _NOBODYS),
    ((Delivery.message_id,), False, None),
    ((Delivery.message_id,), False, Delivery.status == _UNDELIVERED),
):
    Delivery.add_index(*fields, unique=unique, where=where)


def record_delivery(
    status: DeliveryStatus | str,
    *,
    provider_id: str | None = None,
    send_key: str | None = None,
    error: object = None,
    at: datetime | None = None,
) -> Delivery:
    """Record what the provider says of a message that it was given. In any order, and as often as it says so.

    A message that becomes undelivered is the event `message:undelivered`, once for each sending. An id that nobody
    knows is no error: the message may be another system's, or not be marked as sent yet.

    Args:
        status: DeliveryStatus, or one of the words in `DELIVERY_WORDS`.
        provider_id: str, the provider's id of the message.
        send_key: str, the message's `send_key`, if that is what the provider names. Give one of the two, or both.
        error: why it was not delivered, for example the provider's code.
        at: datetime with a timezone, when it happened; the default is now, by the database's clock.

    Returns:
        Delivery, with the furthest status so far.

    Raises:
        InvalidValue: the status is unknown, neither id is given, or an argument cannot be stored.
    """
    word = _word(status)
    if provider_id is None and send_key is None:
        raise InvalidValue("provider_id", None, "give the provider's id of the message, or its send_key")
    for label, given in (("provider_id", provider_id), ("send_key", send_key)):
        if given is not None:
            clean_words(label, given, "leave it out if it is not known")
    said: dict[str, Any] = {"status": word, "error": None if error is None else storable_text(str(error))}
    said["at"] = peewee.SQL(current().dialect.moment) if at is None else Delivery.at.clean(at)
    with atomic():
        return _record(provider_id, send_key, said)


def _word(status: DeliveryStatus | str) -> DeliveryStatus:
    found = DELIVERY_WORDS.get(status.strip().lower()) if isinstance(status, str) else None
    if found is None:
        raise InvalidValue("status", status, f"it must be one of {', '.join(DELIVERY_WORDS)}")
    return found


def _record(provider_id: str | None, send_key: str | None, said: dict[str, Any]) -> Delivery:
    """Keep one row of a sending, whichever ids of it were named so far.

    The locks are taken in the order in which marking a message as sent takes them: its row, the provider's id. So
    either this sees the message, or whoever marks it sees what this has kept.
    """
    binding = current()
    if send_key is not None:
        binding.execute(f"{_IN_FLIGHT} {binding.dialect.row_lock}", (send_key,)).fetchall()
    if provider_id is not None:
        binding.dialect.hold(binding.database, LOCK, provider_id)
    message = _message(provider_id, send_key)
    names = {"provider_id": provider_id, "send_key": send_key, "message_id": None}
    if message is not None:
        names = {"provider_id": provider_id or message[1], "send_key": message[2], "message_id": message[0]}
    if names["send_key"] is not None:
        binding.dialect.hold(binding.database, LOCK, names["send_key"])
    same = [(Delivery.provider_id, names["provider_id"]), (Delivery.send_key, names["send_key"])]
    about = reduce(or_, [field == value for field, value in same if value is not None])
    found = sorted(Delivery.select().where(about), key=_furthest_last)
    if not found:
        (made,) = Delivery.insert({**names, **said}).returning(Delivery).execute()
        first: Delivery = made
        return first
    # If there are two, each was said by one id only. Now it is known that they are about the same. Of two that are as
    # far, keep the message's own: that it is undelivered was an event already.
    *others, kept = found
    Delivery.delete().where(Delivery.id.in_([other.id for other in others])).execute()
    known = {
        name: next((value for row in found if (value := getattr(row, name)) is not None), names[name]) for name in names
    }
    further = said if _place(said["status"]) > _place(kept.status) else {}
    (written,) = Delivery.update({**known, **further}).where(Delivery.id == kept.id).returning(Delivery).execute()
    furthest: Delivery = written
    return furthest


#: What must not be marked as sent while something is said of it by its send key.
_IN_FLIGHT = "SELECT o.id FROM {outbox} o WHERE o.status = 'PENDING' AND o.leased_by IS NOT NULL AND o.send_key = %s"


def _message(provider_id: str | None, send_key: str | None) -> tuple[Any, ...] | None:
    """Find the message that was sent so: its id, the provider's id of it and its send key."""
    found = "SELECT o.id, o.provider_id, o.send_key FROM {outbox} o WHERE "
    row = None
    if provider_id is not None:
        row = current().execute(f"{found} o.provider_id = %s", (provider_id,)).fetchone()
    if row is None and send_key is not None:
        row = current().execute(f"{found} o.status = 'SENT' AND o.send_key = %s", (send_key,)).fetchone()
    return None if row is None else tuple(row)


def _place(status: DeliveryStatus) -> int:
    return list(DeliveryStatus).index(status)


def _furthest_last(delivery: Delivery) -> tuple[int, bool]:
    return _place(delivery.status), delivery.message_id is not None


def of_sending(send_key: str, provider_id: str | None) -> Delivery | None:
    """Return what was said of a message that is sent so; None if nothing was."""
    about = Delivery.send_key == send_key
    if provider_id is not None:
        about |= Delivery.provider_id == provider_id
    found: Delivery | None = Delivery.select().where(about).first()
    return found


def undelivered() -> Rows[Delivery]:
    """Return a query for what was not delivered of the messages that were sent, and not put back since."""
    # A subquery of one value: the planner might read the whole outbox for a join.
    as_sent = "(SELECT d.id FROM {deliveries} d WHERE d.status = 'undelivered' AND d.send_key = "
    as_sent += "(SELECT o.send_key FROM {outbox} o WHERE o.id = d.message_id AND o.status = 'SENT'))"
    found = Delivery.id.in_(peewee.SQL(current().sql(as_sent)))
    return Delivery.select().where(found).order_by(Delivery.message_id)


def was_of_another_sending(provider_id: str, send_key: str) -> bool:
    """Return whether a provider's id is that of a message as it was sent by another key, and not delivered."""
    another = (Delivery.provider_id == provider_id) & (Delivery.send_key != send_key)
    return Delivery.get_or_none(another) is not None
