"""Retention and erasure: prune what is old, forget a lead."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated

import typer

from close_engine import retention
from close_engine.cli.app import command, open_migrated
from close_engine.cli.terminal import is_confirmed
from close_engine.errors import CloseEngineError


def _age(text: str | timedelta) -> timedelta:
    if isinstance(text, timedelta):
        return text
    if not (given := re.fullmatch("([0-9]{1,5})([hd])", text)):
        raise typer.BadParameter(f"{text!r} is not an age, such as 365d or 48h.")
    return timedelta(**{{"h": "hours", "d": "days"}[given[2]]: int(given[1])})


def _counts(emptied: retention.Pruned | retention.Forgotten) -> str:
    return ", ".join(f"{name} {count}" for name, count in vars(emptied).items() if isinstance(count, int))


@command()
def prune(
    context: typer.Context,
    older_than: Annotated[
        timedelta, typer.Option(metavar="AGE", parser=_age, help="How old: days or hours, such as 365d or 48h.")
    ],
    batch: Annotated[
        int, typer.Option(metavar="N", min=1, max=retention.LARGEST_BATCH, help="How many rows at a time.")
    ] = 1000,
) -> None:
    """Empty what was sent, withdrawn, received, recorded and decided, and is older. This cannot be undone."""
    open_migrated(context)
    pruned = retention.prune(older_than, batch=batch)
    print(f"Emptied: {_counts(pruned)}.")


@command()
def forget(
    context: typer.Context,
    lead: Annotated[str, typer.Argument(metavar="LEAD", help="The lead's id. It may be deleted already.")],
    by: Annotated[str, typer.Option(metavar="WHO", help="Who forgets it, for the history.")] = "owner",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Empty what a lead and we said to each other, and withdraw what waits. Asks first: it cannot be undone."""
    open_migrated(context)
    if not yes and not is_confirmed(f"This empties for ever what lead {lead!r} and you said to each other"):
        raise CloseEngineError("Nothing was forgotten. To forget without being asked, use --yes.")
    gone = retention.forget(lead, by=by)
    print(f"Emptied: {_counts(gone)}. Withdrawn: {len(gone.withdrawn)}.")
    if gone.in_flight:
        those = ", ".join(map(str, gone.in_flight))
        raise CloseEngineError(f"A worker is sending messages right now: {those}. Forget the lead again in a minute.")
