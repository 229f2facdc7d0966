"""Health: the migrations, the workers, and all checks of `verify` for whoever asks for them."""

from __future__ import annotations

from starlette.responses import Response

from close_engine.board import worker_lines
from close_engine.schema.checks import verify
from close_engine.schema.scripts import status
from close_engine.web.console.accounts import Role
from close_engine.web.console.page import Ask, endpoint

__all__ = ["ROUTES"]


def health(ask: Ask) -> Response:
    """Show it."""
    return _page(ask, None)


def verified(ask: Ask) -> Response:
    """Show what `verify` finds. It reads every row: no other site can make a browser ask for it, nor does this page."""
    ask.pulse = ""
    return _page(ask, verify())


def _page(ask: Ask, problems: list[str] | None) -> Response:
    return ask.show("health.html", migrations=status(), workers=worker_lines(), problems=problems)


ROUTES = [endpoint("/health", health), endpoint("/health/verify", verified, post=True, role=Role.ADMIN)]
