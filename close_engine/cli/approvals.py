"""The approval queue: list the drafts that wait for approval, approve one, reject one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Annotated

import typer

from close_engine.approvals import Decided, PendingAction, approve_all, pending_actions, reject_all
from close_engine.cli.app import command, open_migrated
from close_engine.cli.terminal import cell, console, is_confirmed, table
from close_engine.database.binding import now
from close_engine.database.reading import Rows
from close_engine.errors import ActionNotFound, CloseEngineError
from close_engine.stages import ActionStatus, ActionType


@command()
def actions(
    context: typer.Context,
    type: Annotated[ActionType | None, typer.Option(help="List only drafts of this type.")] = None,
) -> None:
    """List the drafts that wait for approval, oldest first."""
    open_migrated(context)
    waiting = table("id", "type", "lead", "waiting for", "expires in", "draft")
    listed = pending_actions(type=type)
    for action in listed:
        left = action.expires_at and action.expires_at - now()
        waited = now() - action.created_at
        waiting.add_row(*map(cell, (action.id, action.type, action.lead_id, waited, left, action.draft_message)))
    if waiting.row_count:
        console().print(waiting)
    else:
        print("Nothing is waiting for approval." if not listed.passed_over else "Nothing else is waiting for approval.")
    for row in listed.passed_over:
        print(cell(str(row)))


_Action = Annotated[
    str | None, typer.Argument(metavar="ACTION", help="The draft's id, as listed by close-engine actions.")
]
_All = Annotated[bool, typer.Option("--all", help="All drafts that wait. Asks first.")]
_Type = Annotated[ActionType | None, typer.Option(help="With --all, only drafts of this type.")]
_Yes = Annotated[bool, typer.Option("--yes", help="With --all, do not ask.")]


@command()
def approve(
    context: typer.Context,
    by: Annotated[str, typer.Option(metavar="WHO", help="Who approves it.")],
    action: _Action = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="The text to send instead of the draft.")] = None,
    everything: _All = False,
    type: _Type = None,
    yes: _Yes = False,
) -> None:
    """Approve a draft, or all that wait, and put it into the outbox to be sent."""
    _one_or_all(action, everything, type, yes)
    if everything and message is not None:
        raise typer.BadParameter("--message is for one draft.")
    open_migrated(context)
    if action is None:
        _decide_all("approve", "approved", type, yes, lambda waiting: approve_all(by, waiting))
        return
    found = _action(action)
    before = found.status
    queued = found.approve(by, message)
    print(cell(f"{_decision(found, before)} It is message {queued.id} in the outbox."))


@command()
def reject(
    context: typer.Context,
    by: Annotated[str, typer.Option(metavar="WHO", help="Who rejects it.")],
    action: _Action = None,
    reason: Annotated[str | None, typer.Option(metavar="TEXT", help="Why, for the history.")] = None,
    everything: _All = False,
    type: _Type = None,
    yes: _Yes = False,
) -> None:
    """Reject a draft, or all that wait, so that it is not sent."""
    _one_or_all(action, everything, type, yes)
    open_migrated(context)
    if action is None:
        _decide_all("reject", "rejected", type, yes, lambda waiting: reject_all(by, waiting, reason=reason))
        return
    found = _action(action)
    before = found.status
    found.reject(by, reason)
    print(cell(_decision(found, before)))


def _one_or_all(action: str | None, everything: bool, type: ActionType | None, yes: bool) -> None:
    if (action is None) is not everything or (action is not None and (type is not None or yes)):
        raise typer.BadParameter("Name one draft by its id, or all by --all, which --type and --yes are for.")


def _decide_all(
    verb: str,
    outcome: str,
    type: ActionType | None,
    yes: bool,
    decide: Callable[[Rows[PendingAction]], Decided],
) -> None:
    # What comes in while somebody reads the question is not decided.
    waiting = pending_actions(type=type)
    counts = Counter(action.type for action in waiting)
    if not counts and not waiting.passed_over:
        print("Nothing is waiting for approval.")
        return
    those = ", ".join(f"{kind} ({count})" for kind, count in counts.items())
    if counts and not yes and not is_confirmed(f"This is to {verb} these drafts: {those}"):
        raise CloseEngineError(f"Nothing was {outcome}. To {verb} all without being asked, use --yes.")
    decided = decide(waiting)
    for action_id in decided.done:
        print(cell(f"Action {action_id!r} is {outcome}."))
    for action_id, sentence in decided.failed.items():
        print(cell(f"Action {action_id!r} is not {outcome}: {sentence}"))
    if decided.failed:
        raise CloseEngineError(f"Drafts that were not {outcome}: {len(decided.failed)}.")


def _decision(action: PendingAction, before: ActionStatus) -> str:
    decision = action.status.lower()
    if action.status is before:
        return f"Action {action.id!r} was already {decision} by {cell(action.approved_by)}."
    return f"Action {action.id!r} is {decision}."


def _action(name: str) -> PendingAction:
    found: PendingAction | None = PendingAction.get_or_none(PendingAction.id == name)
    if found is None:
        raise ActionNotFound(name)
    return found
