"""Payments that somebody should look at: list them, say that somebody has, or whose one is."""

from __future__ import annotations

from typing import Annotated

import typer

from close_engine import payments as inbound
from close_engine.cli.app import Command, Group, app, open_migrated
from close_engine.cli.terminal import cell, console, table
from close_engine.errors import PaymentNotFound
from close_engine.inbox import InboxEntry
from close_engine.stages import PaymentIssue

payment_commands = typer.Typer(invoke_without_command=True)

app.add_typer(payment_commands, name="payments", cls=Group)


@payment_commands.callback()
def payments(context: typer.Context) -> None:
    """List the payments that somebody should look at: surplus, partial, refunded, unmatched, or made in test mode."""
    if context.invoked_subcommand:
        return
    open_migrated(context)
    listed = table("id", "issue", "amount", "lead", "payment", "received", "why", numbers=("id", "amount"))
    for entry in inbound.payment_issues():
        amount = None if entry.amount is None else str(inbound.Money(entry.amount, entry.currency or ""))
        shown = (entry.id, entry.issue, amount, entry.lead_id, entry.key, entry.received_at, entry.sentence)
        listed.add_row(*map(cell, shown))
    if listed.row_count:
        console().print(listed)
    else:
        print("There is no payment to look at.")


@payment_commands.command(cls=Command)
def resolve(
    context: typer.Context,
    entries: Annotated[
        list[int], typer.Argument(metavar="ID...", help="The ids, as close-engine payments lists them.", max=2**63 - 1)
    ],
    by: Annotated[str, typer.Option(metavar="WHO", help="Who has looked at it.")] = "owner",
    resolution: Annotated[str | None, typer.Option(metavar="TEXT", help="What came of it.")] = None,
) -> None:
    """Say that somebody has looked at payments: they are not listed any more."""
    open_migrated(context)
    for entry in entries:
        done = inbound.resolve_payment(entry, by=by, resolution=resolution)
        print(cell(f"Payment {done.key} was looked at by {done.resolved_by}."))


@payment_commands.command(cls=Command)
def record(
    context: typer.Context,
    entry: Annotated[int, typer.Argument(metavar="ID", help="The id of an unmatched payment.", max=2**63 - 1)],
    lead: Annotated[str, typer.Argument(metavar="LEAD", help="The id of the lead who paid.")],
    by: Annotated[str, typer.Option(metavar="WHO", help="Who says so, for the history.")] = "owner",
) -> None:
    """Say whose an unmatched payment is: it is recorded, and completes the lead's conversation."""
    open_migrated(context)
    kept = inbound.payment_issues().where(InboxEntry.id == entry, InboxEntry.issue == PaymentIssue.UNMATCHED).first()
    if kept is None:
        raise PaymentNotFound(entry)
    paid = inbound.record_payment(lead, kept.key, actor=by)
    print(cell(f"Payment {kept.key} is recorded. Conversation {paid.conversation.id} is {paid.conversation.stage}."))
