"""What waits for approval: the queue, one draft beside what was said before it, and the decisions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.responses import Response

from close_engine.approvals import Decided, PendingAction, approve_all, expiring_first, pending_actions, reject_all
from close_engine.conversations import CloseEngineConversation
from close_engine.database.binding import current
from close_engine.errors import ActionDecided, ActionNotFound, CloseEngineError
from close_engine.finding import FoundConversation, described
from close_engine.stages import ActionStatus, ActionType
from close_engine.transcript import transcript_of
from close_engine.web.console.accounts import Role
from close_engine.web.console.page import Ask, Refused, as_mapping, endpoint

__all__ = ["ROUTES"]

#: So many drafts are on one page.
AT_ONCE = 50
#: So many of the last texts are shown beside a draft.
LAST = 12


def approvals(ask: Ask) -> Response:
    """Show the queue, and the draft that is chosen, or else the one that expires first."""
    return _page(ask, ask.given("action"))


def _page(ask: Ask, chosen: str, status: int = 200, problem: str = "", text: str | None = None) -> Response:
    type = _type(ask.given("type"))
    queue = expiring_first(type).limit(AT_ONCE)
    waiting = list(queue)
    action = next((each for each in waiting if each.id == chosen), None)
    if action is None and chosen:
        action = PendingAction.get_or_none(PendingAction.id == chosen)
        problem = problem or ("" if action else f"There is no action {chosen!r}: it was deleted.")
    elif action is None and waiting:
        action = waiting[0]
    of = [*waiting, action] if action and action not in waiting else waiting
    leads = _leads(of)
    transcript = [] if action is None else _before(action)
    draft = "" if action is None else action.draft_message if text is None else text
    return ask.show(
        "approvals.html",
        status,
        waiting=waiting,
        total=current().count(pending_actions(type=type).order_by()) if len(waiting) == AT_ONCE else len(waiting),
        unreadable=[str(row) for row in queue.passed_over],
        leads=leads,
        type=type,
        types=list(ActionType),
        action=action,
        is_pending=action is not None and action.status is ActionStatus.PENDING,
        links=_links(action),
        transcript=transcript[-LAST:],
        is_cut=len(transcript) > LAST,
        rows=min(max(2, len(draft) // 70 + draft.count("\n") + 1), 12),
        following=_after(action, waiting),
        problem=problem,
        text=text,
    )


def _type(word: str) -> ActionType | None:
    return ActionType(word) if word in set(ActionType) else None


def _leads(actions: Iterable[PendingAction]) -> dict[str, FoundConversation]:
    """Return what is known of the leads, by conversation."""
    model = CloseEngineConversation
    ids = {action.conversation_id for action in actions}
    found = described(list(model.select().readable().where(model.id.in_(ids)))) if ids else []
    return {line.conversation.id: line for line in found}


def _links(action: PendingAction | None) -> dict[str, Any]:
    details = {} if action is None else as_mapping(action.metadata)
    return {name: details[name] for name in ("previewUrl", "paymentUrl") if details.get(name)}


def _before(action: PendingAction) -> list[Any]:
    """Return what was said and what waits, except for the draft itself."""
    return [text for text in transcript_of(action.conversation_id) if text.action_id != action.id]


def _after(action: PendingAction | None, waiting: list[PendingAction]) -> str:
    """Return the draft that comes after one, to be shown when that one is decided."""
    if action is None:
        return ""
    ids = [each.id for each in waiting]
    place = ids.index(action.id) + 1 if action.id in ids else 0
    return ids[place] if place < len(ids) else ""


def decide(ask: Ask) -> Response:
    """Approve or reject one draft."""
    action = PendingAction.get_or_none(PendingAction.id == ask.part("action"))
    if action is None:
        raise ActionNotFound(ask.part("action"))
    verb, text, reason = ask.given("verb"), ask.text("message"), ask.given("reason")
    if verb not in ("approve", "reject"):
        raise Refused(400, "Say whether to approve or to reject it.")
    if verb == "reject" and not reason:
        return _page(ask, action.id, 400, "Say why: whoever drafts the next one will read it.", text)
    if verb == "approve" and "message" in ask.form and not text:
        return _page(ask, action.id, 400, "There is no text to send: write one, or reject the draft.")
    wanted = text if text and text != _as_sent(action.draft_message) else None
    was_pending = action.status is ActionStatus.PENDING
    try:
        if verb == "approve":
            action.approve(ask.by, wanted)
        else:
            action.reject(ask.by, reason)
    except ActionDecided as error:
        return _page(ask, action.id, 409, _first(action) or str(error), text)
    except CloseEngineError as error:
        return _page(ask, action.id, 409, str(error), text)
    is_mine = action.approved_by == ask.by and (wanted is None or action.draft_message == wanted)
    if not is_mine or not was_pending:
        more = " Your text was not sent." if wanted is not None and action.draft_message != wanted else ""
        return _page(ask, action.id, 409, f"{_first(action)}{more}", text)
    how = {"approve": "approved", "reject": "rejected"}[verb] + (" with your words" if wanted else "")
    return ask.go("approvals", f"{how.capitalize()}.", action=ask.given("following"), type=ask.given("type"))


def _as_sent(draft: str) -> str:
    """Return a draft as a form brings it back."""
    return draft.replace("\r\n", "\n").strip()


def _first(action: PendingAction) -> str:
    """Say who was first to decide."""
    if action.status is ActionStatus.EXPIRED or action.status is ActionStatus.PENDING:
        return ""
    return f"{action.approved_by or 'Somebody'} was first: it is {action.status.lower()} already."


def decide_many(ask: Ask) -> Response:
    """Approve or reject all the drafts that are ticked."""
    ids, verb, reason = ask.all_given("action"), ask.given("verb"), ask.given("reason")
    if verb not in ("approve", "reject"):
        raise Refused(400, "Say whether to approve or to reject them.")
    if not ids:
        return _page(ask, "", 400, "Tick the drafts first.")
    if verb == "reject" and not reason:
        return _page(ask, "", 400, "Say why: whoever drafts the next ones will read it.")
    chosen = list(PendingAction.select().readable().where(PendingAction.id.in_(ids)).order_by(PendingAction.created_at))
    before = {action.id for action in chosen if action.status is ActionStatus.PENDING}
    decided = approve_all(ask.by, chosen) if verb == "approve" else reject_all(ask.by, chosen, reason=reason)
    return ask.go("approvals", *_said(ask, verb, chosen, before, decided), type=ask.given("type"))


def _said(ask: Ask, verb: str, chosen: list[PendingAction], before: set[str], decided: Decided) -> list[str]:
    mine = [each for each in chosen if each.id in decided.done and each.id in before and each.approved_by == ask.by]
    said = [f"{'Approved' if verb == 'approve' else 'Rejected'}: {len(mine)}."] if mine else []
    for action in chosen:
        if action not in mine:
            said.append(_first(action) or decided.failed.get(action.id, "It was decided before."))
    return said


ROUTES = [
    endpoint("/", approvals),
    endpoint("/approvals", decide_many, post=True, role=Role.APPROVER),
    endpoint("/approvals/{action:path}", decide, post=True, role=Role.APPROVER),
]
