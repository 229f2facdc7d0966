"""Subscriptions: list what follows from which event, add one, remove those of a topic."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from close_engine import subscriptions as declared
from close_engine.cli.app import Command, Group, app, in_seconds, open_migrated
from close_engine.cli.conversations import json_object
from close_engine.cli.terminal import cell, console, table
from close_engine.stages import Event, Stage

_Topic = Annotated[str, typer.Argument(metavar="TOPIC", help="What the sender is to do, for example build_site.")]


commands = typer.Typer(invoke_without_command=True)

app.add_typer(commands, name="subscriptions", cls=Group)


@commands.callback()
def subscriptions(context: typer.Context) -> None:
    """List what is put into the outbox when a stage is entered or another event happens."""
    if context.invoked_subcommand:
        return
    open_migrated(context)
    listed = table("topic", "event", "stage", "payload", "when")
    for each in declared.subscriptions():
        listed.add_row(*map(cell, (each.topic, each.event, each.stage, each.payload or None, _when(each))))
    if listed.row_count:
        console().print(listed)
    else:
        print("Nothing is subscribed to.")


def _when(each: declared.Subscription) -> str | None:
    times = [f"{cell(each.before)} before"] if each.before else []
    if each.debounce is not None:
        times.append(f"after {cell(each.debounce)} of quiet, at most {cell(each.at_most)}")
    elif each.send_after:
        times.append(f"after {cell(each.send_after)}")
    return ", ".join(times) or None


@commands.command(cls=Command)
def add(
    context: typer.Context,
    topic: _Topic,
    stage: Annotated[
        list[Stage] | None, typer.Option(metavar="STAGE", help="When this stage is entered. Can be given often.")
    ] = None,
    event: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EVENT",
            help=f"When this happens: {', '.join(list(Event)[1:])}. Can be given often.",
        ),
    ] = None,
    payload: Annotated[
        str | None, typer.Option(metavar="JSON", help="A JSON object that the message's payload begins with.")
    ] = None,
    send_after: Annotated[timedelta, in_seconds("How long the message waits.", 0)] = timedelta(0),
    debounce: Annotated[
        timedelta | None,
        in_seconds("How long nothing more may happen before the message leaves, with all of it.", None),
    ] = None,
    at_most: Annotated[
        timedelta | None, in_seconds("How long further events can move it on; ten times as long by default.", None)
    ] = None,
    before: Annotated[
        timedelta | None, in_seconds("Of action:expiring, how long before it expires; an hour by default.", None)
    ] = None,
) -> None:
    """Put a message of this topic into the outbox whenever something happens, whoever causes it."""
    given = json_object("payload", payload)
    open_migrated(context)
    declared.subscribe(
        topic,
        stages=stage or (),
        events=event or (),
        payload=given,
        send_after=send_after,
        debounce=debounce,
        at_most=at_most,
        before=before,
    )
    print(f"Subscribed: {cell(topic)}.")


@commands.command(cls=Command)
def remove(context: typer.Context, topic: _Topic) -> None:
    """Let nothing more of this topic follow from any event. What is in the outbox stays there."""
    open_migrated(context)
    print(f"Subscriptions ended: {declared.unsubscribe(topic)}.")
