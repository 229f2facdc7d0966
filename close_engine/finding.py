"""Finding conversations: by stage, by phone number, by who is waited for.

for line in find_conversations(waiting_for="us", limit=20):
    print(line.conversation, line.phone, line.waiting_for)

(conversation,) = conversations_of("+1 212 555 0100")         # or its id, or its lead's
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from peewee import SQL

from close_engine import names, numbers
from close_engine.approvals import PendingAction, pending_actions
from close_engine.conversations import CloseEngineConversation, Takeover
from close_engine.database.binding import current
from close_engine.database.reading import Rows
from close_engine.errors import InvalidValue
from close_engine.models import Lead, StageChange
from close_engine.stages import ACTIVE_STAGES, Stage

__all__ = ["FoundConversation", "WaitingFor", "conversations_of", "described", "find_conversations"]

WaitingFor = Literal["us", "lead", "human"]
"""Who is waited for: `us`, because the lead wrote; the `lead`; or a `human`, who is to approve or has taken over."""

_WORDS: tuple[WaitingFor, ...] = ("us", "lead", "human")

#: How many conversations are looked up in one statement.
_PART = 500

#: The deadline that a conversation has while somebody is waited for, and the stages in which that means something.
_TURNS: dict[str, tuple[WaitingFor, Collection[Stage]]] = {
    "answer": ("us", (*ACTIVE_STAGES, Stage.STALLED)),
    "stall": ("lead", ACTIVE_STAGES),
}


@dataclass(frozen=True)
class FoundConversation:
    """A conversation, and what one wants to know of it in a list.

    Attributes:
        conversation: CloseEngineConversation.
        phone: str, what the CRM has as the lead's phone number.
        waiting_for: tuple of `us`, `lead` and `human`; empty if nobody is waited for.
        waiting_since: datetime, since when the lead has waited for us; None if it does not.
        name: str, what the CRM calls the lead; None if that is not known.
    """

    conversation: CloseEngineConversation
    phone: str | None
    waiting_for: tuple[WaitingFor, ...]
    waiting_since: datetime | None = None
    name: str | None = None


def find_conversations(
    *,
    stages: Sequence[Stage | str] = (),
    phone: str | None = None,
    text: str | None = None,
    waiting_for: WaitingFor | None = None,
    since: datetime | None = None,
    limit: int | None = 50,
) -> list[FoundConversation]:
    """Find conversations, the newest first. What Python cannot read is passed over.

    Args:
        stages: only those in one of these stages.
        phone: only those of leads with this number, however it is written.
        text: only those that this is the id of, or that are of leads with this id, with this phone number or, if it is
            no lead's number, with it as part of a name.
        waiting_for: only those in which `us`, the `lead` or a `human` is waited for.
        since: datetime with a timezone, only those that were opened then or later.
        limit: int, the most to return; None for all.

    Returns:
        list of FoundConversation.

    Raises:
        InvalidValue: an argument makes no sense.
    """
    if limit is not None and limit < 1:
        raise InvalidValue("limit", limit, "it must be at least 1")
    if waiting_for is not None and waiting_for not in _WORDS:
        raise InvalidValue("waiting_for", waiting_for, f"it must be one of {', '.join(_WORDS)}")
    model = CloseEngineConversation
    query = model.in_stages(*map(model.stage.clean, stages)) if stages else model.select().readable()
    if phone is not None:
        query = query.where(model.lead.in_(numbers.leads_with(phone)))
    if text is not None:
        # A name has no index, so names are read only if the text is nobody's number.
        leads = (numbers.leads_with(text) if numbers.is_like_a_number(text) else []) or names.leads_named(text)
        query = query.where((model.id == text) | (model.lead == text) | model.lead.in_(leads))
    if since is not None:
        query = query.where(model.created_at >= since)
    if waiting_for is not None:
        query = query.where(_waits(waiting_for))
    return described(list(query.order_by(model.created_at.desc(), model.id).limit(limit)))


def described(found: Sequence[CloseEngineConversation]) -> list[FoundConversation]:
    """Say of each of these conversations what one wants to know of it in a list, in the same order."""
    parts = (found[start : start + _PART] for start in range(0, len(found), _PART))
    return [line for part in parts for line in _lines(part)]


def _waits(waiting_for: WaitingFor) -> Any:
    """Match the conversations in which somebody is waited for."""
    model = CloseEngineConversation
    if waiting_for == "human":
        actions = pending_actions().order_by().select(PendingAction.conversation_id)
        return model.id.in_(actions) | model.id.in_(Takeover.lasting().select(Takeover.conversation_id))
    ((trigger, stages),) = ((name, stages) for name, (word, stages) in _TURNS.items() if word == waiting_for)
    ids = SQL(current().sql('(SELECT subject_id FROM {deadlines} WHERE "trigger" = %s)'), [trigger])
    return model.id.in_(ids) & model.stage.in_(list(stages))


def _lines(found: Sequence[CloseEngineConversation]) -> list[FoundConversation]:
    stage_of, waits = {each.id: each.stage for each in found}, {each.id: set[str]() for each in found}
    since: dict[str, datetime | None] = {}
    ids = list(stage_of)
    marks = ", ".join(["%s"] * len(ids))
    turns = (
        "SELECT subject_id, \"trigger\", at FROM {deadlines} WHERE \"trigger\" IN ('answer', 'stall') AND subject_id"
    )
    for conversation_id, trigger, at in current().execute(f"{turns} IN ({marks})", ids).fetchall():
        word, stages = _TURNS[trigger]
        if stage_of[conversation_id] in stages:
            waits[conversation_id].add(word)
            since[conversation_id] = _time(at) if word == "us" else None
    actions = pending_actions().order_by().select(PendingAction.conversation_id)
    takeovers = Takeover.lasting().select(Takeover.conversation_id)
    humans: list[Any] = [
        actions.where(PendingAction.conversation_id.in_(ids)).tuples(),
        takeovers.where(Takeover.conversation_id.in_(ids)).tuples(),
    ]
    for query in humans:
        for (conversation_id,) in query:
            waits[conversation_id].add("human")
    # As text, whatever the type of the CRM's column is.
    phones: Any = Lead.select(Lead.id, Lead.phone.cast("TEXT").alias("text"))
    known = dict(phones.where(Lead.id.in_([each.lead_id for each in found])).tuples())
    called = names.names_of([each.lead_id for each in found])
    return [
        FoundConversation(
            each,
            known.get(each.lead_id),
            tuple(word for word in _WORDS if word in waits[each.id]),
            since.get(each.id),
            called.get(each.lead_id),
        )
        for each in found
    ]


def _time(at: Any) -> datetime | None:
    """Read a time of a deadline; None if Python cannot."""
    try:
        read: datetime | None = StageChange.created_at.python_value(at)
    except ValueError:
        return None
    return read


def conversations_of(name: str) -> list[CloseEngineConversation]:
    """Return the conversation with this id, or of the lead with this id, or those of the leads with this phone number.

    Args:
        name: the id of a conversation or of a lead, or a phone number, however it is written.

    Returns:
        list of CloseEngineConversation, of at most one unless several leads share the number.
    """
    model = CloseEngineConversation

    def having(condition: Any) -> list[CloseEngineConversation]:
        query: Rows[CloseEngineConversation] = model.select().where(condition).order_by(model.id)
        return list(query)

    found = having(model.id == name) or having(model.lead == name)
    if found or not numbers.is_like_a_number(name):
        return found
    return having(model.lead.in_(numbers.leads_with(name)))
