"""Health: the migrations, the workers, and all checks of `verify` for whoever asks for them."""

from __future__ import annotations

from starlette.responses import Response

from close_engine.board import worker_lines
from close_engine.schema.checks import verify
from close_engine.schema.scripts import status
from close_engine.web.console.page import Ask, endpoint

__all__ = ["ROUTES"]


def health(ask: Ask) -> Response:
    """Show it. To verify reads every row, so it is done only for an admin who asks for it."""
    is_verified = bool(ask.given("verify")) and ask.may("admin")
    return ask.show(
        "health.html",
        migrations=status(),
        workers=worker_lines(),
        is_verified=is_verified,
        problems=verify() if is_verified else [],
    )


ROUTES = [endpoint("/health", health)]
