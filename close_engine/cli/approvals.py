"""The approval queue: list the drafts that wait for approval, approve one, reject one."""

from __future__ import annotations

from typing import Annotated

import typer

from close_engine.approvals import PendingAction, pending_actions
from close_engine.cli.app import command, open_migrated
from close_engine.cli.terminal import cell, console, table
from close_engine.database.binding import now
from close_engine.errors import ActionNotFound
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


_Action = Annotated[str, typer.Argument(metavar="ACTION", help="The draft's id, as listed by close-engine actions.")]


@command()
def approve(
    context: typer.Context,
    action: _Action,
    by: Annotated[str, typer.Option(metavar="WHO", help="Who approves it.")],
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="The text to send instead of the draft.")] = None,
) -> None:
    """Approve a draft and put it into the outbox to be sent."""
    open_migrated(context)
    found = _action(action)
    before = found.status
    queued = found.approve(by, message)
    print(f"{_decision(found, before)} It is message {queued.id} in the outbox.")


@command()
def reject(
    context: typer.Context,
    action: _Action,
    by: Annotated[str, typer.Option(metavar="WHO", help="Who rejects it.")],
    reason: Annotated[str | None, typer.Option(metavar="TEXT", help="Why, for the history.")] = None,
) -> None:
    """Reject a draft, so that it is not sent."""
    open_migrated(context)
    found = _action(action)
    before = found.status
    found.reject(by, reason)
    print(_decision(found, before))


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
