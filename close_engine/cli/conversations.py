"""Conversations: print the diagram, list and show them, fire a trigger, opt a lead out and in."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Annotated, Any

import typer

from close_engine import optouts
from close_engine.cli.app import PlainCommand, app, command, open_migrated, time_or_ago
from close_engine.cli.terminal import cell, console, table
from close_engine.conversations import CloseEngineConversation
from close_engine.database.binding import moment
from close_engine.diagram import mermaid, svg
from close_engine.errors import ConversationNotFound, InvalidValue, LeadNotFound
from close_engine.finding import WaitingFor, conversations_of, find_conversations
from close_engine.machine import TRIGGERS
from close_engine.models import StageChange
from close_engine.numbers import OptOut
from close_engine.stages import Stage
from close_engine.transcript import Transcript, transcript_of


@app.command(cls=PlainCommand)
def graph(
    as_svg: Annotated[bool, typer.Option("--svg", help="Print a picture instead, which a browser shows.")] = False,
) -> None:
    """Print the state diagram in Mermaid syntax, or as a picture."""
    print(svg() if as_svg else mermaid())


@command("list")
def list_(
    context: typer.Context,
    stage: Annotated[
        list[Stage] | None, typer.Option(help="Only those in this stage. It can be given several times.")
    ] = None,
    phone: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Only those of leads with this number, however it is written.")
    ] = None,
    waiting_for: Annotated[
        WaitingFor | None,
        typer.Option(help="Only those in which this one is waited for; a human is to approve or has taken over."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Only those opened at this time or later: ISO 8601 with a timezone, or so long ago, such as 3d.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(metavar="NUMBER", min=1, max=1_000_000, help="The most to list.")] = 50,
) -> None:
    """List conversations, the newest first."""
    after = None if since is None else time_or_ago(since)
    open_migrated(context)
    if isinstance(after, timedelta):
        after = moment() - after
    found = find_conversations(stages=stage or (), phone=phone, waiting_for=waiting_for, since=after, limit=limit + 1)
    listed = table("id", "lead", "phone", "stage", "opened", "waiting for")
    for line in found[:limit]:
        each = line.conversation
        waiting = " and ".join(line.waiting_for) or None
        listed.add_row(*map(cell, (each.id, each.lead_id, line.phone, each.stage, each.created_at, waiting)))
    if not found:
        print("There is no such conversation.")
        return
    console().print(listed)
    if len(found) > limit:
        print(f"These are the newest {limit}. Give --limit for more.")


@command()
def show(
    context: typer.Context,
    conversation: Annotated[
        str,
        typer.Argument(
            metavar="CONVERSATION", help="The id of the conversation or of its lead, or the lead's phone number."
        ),
    ],
) -> None:
    """Show a conversation, its texts and its timeline, or what is left of it if it was deleted."""
    open_migrated(context)
    among = conversations_of(conversation)
    if len(among) > 1:
        leads = ", ".join(f"{each.lead_id} ({each.stage})" for each in among)
        raise InvalidValue("CONVERSATION", conversation, f"several leads have this number: name one of {leads}")
    found = among[0] if among else None
    belongs_to_it = StageChange.conversation_id == (found.id if found else conversation)
    changes = list(StageChange.select().where(belongs_to_it).order_by(StageChange.id))
    if not changes and not found:
        raise ConversationNotFound(conversation)
    if found:
        row = table("column", "value")
        for field in found._meta.sorted_fields:
            row.add_row(field.column_name, cell(found.__data__[field.name]))
        if lead_opted_out := _opted_out(found.lead_id):
            row.add_row("opted_out", f"{cell(lead_opted_out.created_at)}, {cell(lead_opted_out.source)}")
        if taken := found.takeover():
            why = "" if taken.reason is None else f": {cell(taken.reason)}"
            row.add_row("taken_over", f"by {cell(taken.taken_by)}, {cell(taken.taken_at)}{why}")
        console().print(row, "")
    else:
        print(cell(f"Conversation {conversation!r} was deleted; its history is kept."))
    _print_texts(transcript_of(found.id if found else conversation))
    columns = ("created_at", "source", "dest", "trigger", "actor", "reason", "key", "metadata")
    timeline = table("when", "from", "to", *columns[3:])
    for change in changes:
        timeline.add_row(*(cell(getattr(change, column)) for column in columns))
    console().print(timeline)


def _print_texts(transcript: Transcript) -> None:
    texts = table("when", "who", "what", "status", "text")
    for text in transcript:
        who = text.author if text.by is None else f"{text.author} ({text.by})"
        status = text.status if text.reason is None else f"{text.status}: {text.reason}"
        texts.add_row(*map(cell, (text.at, who, text.kind, status, " ".join(text.body.splitlines()))))
    if texts.row_count:
        console().print(texts, "")
    for row in transcript.unreadable:
        print(cell(str(row)))


@command()
def fire(
    context: typer.Context,
    conversation: Annotated[
        str, typer.Argument(metavar="CONVERSATION", help="The id of the conversation or of its lead.")
    ],
    trigger: Annotated[str, typer.Argument(metavar="TRIGGER", help=f"One of {', '.join(TRIGGERS)}.")],
    actor: Annotated[str, typer.Option(metavar="WHO", help="Who fires it, for the history.")] = "command line",
    reason: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Why, for the history. close_lost needs it.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Idempotency key: using it again changes nothing.")
    ] = None,
    payment_link_url: Annotated[
        str | None, typer.Option(metavar="URL", help="The payment link. send_payment_link needs it.")
    ] = None,
    approved_by: Annotated[
        str | None,
        typer.Option(
            metavar="WHO",
            help="Who approved the payment link. send_payment_link needs it, unless the autonomy level is FULL_AUTO.",
        ),
    ] = None,
    metadata: Annotated[str | None, typer.Option(metavar="JSON", help="A JSON object, for the history.")] = None,
) -> None:
    """Fire a trigger on a conversation, which moves it to another stage."""
    given = {
        "payment_link_url": payment_link_url,
        "approved_by": approved_by,
        "metadata": json_object("metadata", metadata),
    }
    open_migrated(context)
    found = _find(conversation)
    if found is None:
        raise ConversationNotFound(conversation)
    before = found.updated_at
    change = found.fire(trigger, actor=actor, reason=reason, key=key, **given)
    if found.updated_at == before:
        print(cell(f"Nothing changed: the key {key!r} was already used at {cell(change.created_at)}."))
    else:
        print(cell(f"Conversation {found.id!r} went from {change.source} to {change.dest}."))


_LEAD = typer.Argument(metavar="LEAD", help="The id of the lead or of its conversation.")
_SOURCE = typer.Option(metavar="WHERE", help="Where it was said.")
_KEY = typer.Option(metavar="KEY", help="Idempotency key: using it again changes nothing.")


@command()
def opt_out(
    context: typer.Context,
    lead: Annotated[str, _LEAD],
    source: Annotated[str, _SOURCE] = "command line",
    key: Annotated[str | None, _KEY] = None,
) -> None:
    """Record that a lead opted out of texts: nothing more is sent to it, nor to its phone number."""
    open_migrated(context)
    made = optouts.opt_out(_lead_of(lead), source=source, key=key)
    if made.lifted_at is None:
        print(cell(f"Lead {made.lead_id!r} has opted out since {cell(made.created_at)}: nothing more is sent to it."))
    else:
        print(cell(f"Nothing changed: the key {key!r} was already used at {cell(made.created_at)}."))


@command()
def opt_in(
    context: typer.Context,
    lead: Annotated[str, _LEAD],
    source: Annotated[str, _SOURCE] = "command line",
    key: Annotated[str | None, _KEY] = None,
) -> None:
    """Record that a lead opted in again: it may be texted. Nothing is opened."""
    open_migrated(context)
    lead_id = _lead_of(lead)
    lifted = optouts.opt_in(lead_id, source=source, key=key)
    print(cell(f"Lead {lead_id!r} may be texted again." if lifted else "Nothing changed: there was nothing to lift."))


def _lead_of(name: str) -> str:
    conversation = _find(name)
    return name if conversation is None else conversation.lead_id


def _opted_out(lead_id: str) -> OptOut | None:
    try:
        return optouts.opted_out(lead_id)
    except LeadNotFound:  # SQLite may be told not to enforce foreign keys
        return None


def _find(name: str) -> CloseEngineConversation | None:
    model = CloseEngineConversation
    found: CloseEngineConversation | None = model.get_or_none(model.id == name) or model.get_or_none(model.lead == name)
    return found


def json_object(label: str, text: str | None) -> Any:
    """Read the value of an option; None if it was not given.

    Raises:
        InvalidValue: it is no JSON object.
    """
    try:
        found = None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidValue(label, text, f"it must be a JSON object ({error})") from None
    if found is not None and not isinstance(found, dict):
        raise InvalidValue(label, found, "it must be a mapping, which a JSON object is")
    return found
