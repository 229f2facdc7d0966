"""Conversations: a search, one of them whole, and stepping in."""

from __future__ import annotations

import secrets
from typing import Any, cast, get_args

from starlette.responses import Response

from close_engine.approvals import pending_actions, submit
from close_engine.conversations import CloseEngineConversation
from close_engine.database.transaction import atomic
from close_engine.errors import CloseEngineError, ConversationNotFound, LeadNotFound
from close_engine.finding import WaitingFor, described, find_conversations
from close_engine.machine import LINK_GIVEN, REASON_GIVEN, TRIGGERS
from close_engine.models import StageChange
from close_engine.optouts import opt_in, opt_out, opted_out
from close_engine.stages import CLOSED_STAGES, ActionType, Stage
from close_engine.transcript import transcript_of
from close_engine.web.console.accounts import Role
from close_engine.web.console.page import Ask, Refused, as_mapping, endpoint

__all__ = ["ROUTES"]

#: So many conversations are listed.
MOST = 50
#: So many rows of a history are shown.
LATEST = 200


def conversations(ask: Ask) -> Response:
    """List the conversations that are looked for, the newest first."""
    text, stage, waiting_for = ask.given("text"), ask.given("stage"), ask.given("waiting_for")
    found = find_conversations(
        text=text or None,
        stages=[Stage(stage)] if stage in set(Stage) else (),
        waiting_for=cast("WaitingFor | None", waiting_for if waiting_for in get_args(WaitingFor) else None),
        limit=MOST + 1,
    )
    return ask.show(
        "conversations.html",
        found=found[:MOST],
        is_more=len(found) > MOST,
        most=MOST,
        text=text,
        stage=stage,
        waiting_for=waiting_for,
        stages=list(Stage),
        waits=get_args(WaitingFor),
    )


def conversation(ask: Ask) -> Response:
    """Show one conversation, or what is left of it if it was deleted."""
    return _page(ask, ask.part("conversation"))


def _page(ask: Ask, conversation_id: str, status: int = 200, problem: str = "", text: str = "") -> Response:
    model = CloseEngineConversation
    found = model.get_or_none(model.id == conversation_id)
    changes = StageChange.select().readable().where(StageChange.conversation_id == conversation_id)
    history = list(changes.order_by(StageChange.id.desc()).limit(LATEST))
    if found is None and not history:
        raise ConversationNotFound(conversation_id)
    takeover = None if found is None else found.takeover()
    transcript = transcript_of(conversation_id)
    return ask.show(
        "conversation.html",
        status,
        id=conversation_id,
        conversation=found,
        line=None if found is None else described([found])[0],
        is_closed=found is None or found.stage in CLOSED_STAGES,
        takeover=takeover,
        is_mine=takeover is not None and takeover.taken_by == ask.by,
        optout=None if found is None else _opted_out(found.lead_id),
        transcript=transcript,
        unreadable=[str(row) for row in transcript.unreadable],
        history=history,
        is_cut=len(history) == LATEST,
        actions=[] if found is None else list(pending_actions(found)),
        triggers=[] if found is None else _triggers(found),
        data=dict(sorted(as_mapping(found.collected_data).items())) if found else {},
        questions=found.questions_asked if found and isinstance(found.questions_asked, list) else [],
        key=secrets.token_urlsafe(9),
        problem=problem,
        text=text,
    )


def _opted_out(lead_id: str) -> Any:
    try:
        return opted_out(lead_id)
    except LeadNotFound:  # SQLite may be told not to enforce foreign keys
        return None


def _triggers(found: CloseEngineConversation) -> list[dict[str, Any]]:
    """Return the triggers that may be fired, and what each asks for."""
    allowed = []
    for name in found.allowed_triggers():
        conditions = TRIGGERS[name].conditions
        allowed.append(
            {
                "name": name,
                "meaning": TRIGGERS[name].meaning,
                "dest": TRIGGERS[name].dest or "where things stand",
                "asks_link": LINK_GIVEN in conditions,
                "asks_reason": REASON_GIVEN in conditions,
            }
        )
    return allowed


def _of(ask: Ask) -> CloseEngineConversation:
    """Load the conversation, if it is still in the stage that was shown."""
    model, conversation_id = CloseEngineConversation, ask.part("conversation")
    found: CloseEngineConversation | None = model.get_or_none(model.id == conversation_id)
    if found is None:
        raise ConversationNotFound(conversation_id)
    seen = ask.given("seen")
    if seen and found.stage != seen:
        raise Refused(409, f"It is {found.stage} by now, and was {seen} on your page: look again, then decide.")
    return found


def step_in(ask: Ask) -> Response:
    """Take a conversation over, hand it back, say that no reply is needed, or opt the lead out or in."""
    verb, reason = ask.given("verb"), ask.given("reason")
    found = _of(ask)
    if verb == "take over":
        with atomic():
            if ask.given("from"):  # they said to take it from whoever leads it
                found.hand_back(ask.by)
            found.take_over(ask.by)
        said = "You lead this conversation now. The AI's drafts were withdrawn."
    elif verb == "hand back":
        found.hand_back(ask.by)
        said = "The AI leads this conversation again."
    elif verb == "no reply":
        found.no_reply(reason, actor=ask.by)
        said = "Noted: no reply is needed."
    elif verb == "opt out":
        opt_out(found.lead_id, source=f"console: {ask.by}")
        said = "The lead opted out: nothing more is sent."
    elif verb == "opt in":
        ask.need(Role.ADMIN)
        opt_in(found.lead_id, source=f"console: {ask.by}")
        said = "The lead may be texted again."
    else:
        raise Refused(400, "Say what to do with this conversation.")
    return ask.go("conversation", said, conversation=found.id)


def write(ask: Ask) -> Response:
    """Send a text as a human. Whoever has not taken the conversation over does so first."""
    found, text = _of(ask), ask.text("message")
    # Two clicks on the same page are one text.
    key = f"console:{ask.given('key')}" if ask.given("key") else None
    try:
        with atomic():
            found.take_over(ask.by)
            submit(found, ActionType.SEND_MESSAGE, text, actor=ask.by, key=key)
    except CloseEngineError as error:
        return _page(ask, found.id, 409, str(error), text)
    return ask.go("conversation", "Your text is in the outbox.", conversation=found.id)


def fire(ask: Ask) -> Response:
    """Fire a trigger."""
    found, trigger = _of(ask), ask.given("trigger")
    asks_link = trigger in TRIGGERS and LINK_GIVEN in TRIGGERS[trigger].conditions
    change = found.fire(
        trigger,
        actor=ask.by,
        reason=ask.given("reason") or None,
        key=f"console:{ask.given('key')}" if ask.given("key") else None,
        payment_link_url=ask.given("payment_link_url") or None,
        approved_by=ask.by if asks_link else None,
    )
    return ask.go("conversation", f"It went from {change.source} to {change.dest}.", conversation=found.id)


ROUTES = [
    endpoint("/conversations", conversations),
    endpoint("/conversations/{conversation:path}/step-in", step_in, post=True, role=Role.APPROVER),
    endpoint("/conversations/{conversation:path}/write", write, post=True, role=Role.APPROVER),
    endpoint("/conversations/{conversation:path}/fire", fire, post=True, role=Role.ADMIN),
    endpoint("/conversations/{conversation:path}", conversation),
]
