"""Texts of the past: take over what the CRM's own table holds."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from close_engine.cli.app import command, open_migrated
from close_engine.cli.terminal import cell
from close_engine.texts import LARGEST_BATCH, import_texts


@command("import-texts")
def import_texts_(
    context: typer.Context,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A file with a JSON object a line, or - for standard input.")
    ],
    batch: Annotated[
        int, typer.Option(metavar="NUMBER", min=1, max=LARGEST_BATCH, help="How many are stored at once.")
    ] = 500,
) -> None:
    """Take over texts of the past, so that the transcript has them.

    Each line has lead, direction (inbound or outbound), text, key (the
    provider's id) and at (a time with a timezone); perhaps author and metadata.
    It can be repeated: what is known is not added again.
    """
    open_migrated(context)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    done = import_texts(_rows(file), batch=batch)
    print(f"Texts added: {done.added:,}, known before: {done.known:,}, refused: {len(done.refused):,}.")
    for number, sentence in done.refused.items():
        print(cell(f"Line {number}: {sentence}"), file=sys.stderr)
    if done.refused:
        raise typer.Exit(1)


def _rows(file: str) -> Iterator[Any]:
    """Yield what each line holds; of a line that is no JSON, its text."""
    path = Path(file)
    with nullcontext(sys.stdin) if file == "-" else path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield line.strip()
