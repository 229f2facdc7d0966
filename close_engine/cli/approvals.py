"""The approval queue: list what waits for a human, approve it, reject it."""

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
    type: Annotated[ActionType | None, typer.Option(help="Only those of this type.")] = None,
) -> None:
    """List what waits for a human's approval, the oldest first."""
    open_migrated(context)
    waiting = table("id", "type", "lead", "waits for", "expires in", "draft")
    for action in pending_actions(type=type):
        left = action.expires_at and action.expires_at - now()
        waited = now() - action.created_at
        waiting.add_row(*map(cell, (action.id, action.type, action.lead_id, waited, left, action.draft_message)))
    if waiting.row_count:
        console().print(waiting)
    else:
        print("Nothing waits for approval.")


_Action = Annotated[str, typer.Argument(metavar="ACTION", help="Its id, as close-engine actions shows it.")]


_By = Annotated[str, typer.Option(metavar="WHO", help="Who decides.")]


@command()
def approve(
    context: typer.Context,
    action: _Action,
    by: _By,
    message: Annotated[str | None, typer.Option(help="The text to send instead of the draft.")] = None,
) -> None:
    """Approve what waits, so that it is sent."""
    open_migrated(context)
    found = _action(action)
    before = found.status
    sent = found.approve(by, message)
    print(f"{_decided(found, before)}: message {sent.id} of the outbox.")


@command()
def reject(
    context: typer.Context,
    action: _Action,
    by: _By,
    reason: Annotated[str | None, typer.Option(help="Why, for the history.")] = None,
) -> None:
    """Reject what waits; it is not sent."""
    open_migrated(context)
    found = _action(action)
    before = found.status
    found.reject(by, reason)
    print(f"{_decided(found, before)}.")


def _decided(action: PendingAction, before: ActionStatus) -> str:
    decision = action.status.lower()
    if action.status is before:
        return f"Action {action.id!r} was {decision} by {cell(action.approved_by)} already"
    return f"Action {action.id!r} is {decision}"


def _action(name: str) -> PendingAction:
    found: PendingAction | None = PendingAction.get_or_none(PendingAction.id == name)
    if found is None:
        raise ActionNotFound(name)
    return found
