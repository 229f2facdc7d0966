"""The console: the pages on which an agency's owner approves, sees and steps in. It needs the extra `console`.

    app = console(accounts=Accounts.in_file("accounts.txt"))            # an ASGI application, to serve or to mount
    routes = [Mount("/console", console(authenticate=who_asks))]        # in your own, by your own accounts

It works on the database that `close_engine.connect()` has bound. Without accounts, it answers only on the machine
itself.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from datetime import timedelta
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from close_engine.web.console import approvals, conversations, health, live, outbox, pipeline, signing_in, waiting
from close_engine.web.console.accounts import Account, Accounts, Role
from close_engine.web.console.page import Authenticate, Site
from close_engine.web.console.rendering import environment
from close_engine.web.console.sessions import Sessions

__all__ = ["Account", "Accounts", "Authenticate", "Role", "console"]

#: For how long somebody stays signed in.
SESSION = timedelta(hours=12)

#: Nothing is loaded from elsewhere, nothing inside a page runs, and no other page may frame one of these.
_HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    b"connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
}


def console(
    *,
    accounts: Accounts | None = None,
    authenticate: Authenticate | None = None,
    secret: str | None = None,
    session: timedelta = SESSION,
    title: str = "Close Engine",
) -> Starlette:
    """Make the console, an ASGI application to serve or to mount under any path.

    Args:
        accounts: who may sign in. Without accounts and `authenticate`, it answers only requests from the machine
            itself, and whoever makes them may do everything.
        authenticate: function of Starlette's request that returns the Account of whoever makes it, or None; it may be
            async. Nobody signs in here then.
        secret: what signs the cookies. The default is CLOSE_ENGINE_SECRET, or else a new one for each process: then all
            sessions end when it does, and two processes do not know each other's.
        session: for how long somebody stays signed in.
        title: what stands above every page.

    Returns:
        the application.

    Raises:
        ConfigurationError: the secret is too short.
    """
    app = Starlette(
        routes=[
            *approvals.ROUTES,
            *pipeline.ROUTES,
            *waiting.ROUTES,
            *conversations.ROUTES,
            *outbox.ROUTES,
            *health.ROUTES,
            *signing_in.ROUTES,
            *live.ROUTES,
            Mount("/static", StaticFiles(packages=[("close_engine.web.console", "static")]), name="static"),
        ],
        middleware=[Middleware(_Guarded)],
        exception_handlers={404: _not_found, 405: _not_found},
    )
    app.state.site = Site(environment(), Sessions(secret, session, accounts), accounts, authenticate, title)
    app.state.pulse = live.Pulse()
    return app


async def _not_found(request: Request, error: Exception) -> Response:
    return PlainTextResponse("There is no such page.", getattr(error, "status_code", 404))


class _Guarded:
    """Gives every response the headers that keep a page to itself, and refuses the forms of other sites.

    A token keeps those from changing anything. But a browser would take the cookies of the answer, and so whoever is
    signed in would be signed out.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A path may, or may not, have the one at its beginning that the console is mounted under.
        is_page = not scope.get("path", "").removeprefix(scope.get("root_path", "")).startswith("/static/")
        kept = b"no-store" if is_page else b"no-cache"  # with another version come other files

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                there = {name for name, _ in message["headers"]}
                more = {**_HEADERS, b"cache-control": kept}
                message["headers"] = [*message["headers"], *(pair for pair in more.items() if pair[0] not in there)]
            await send(message)

        refused = PlainTextResponse("This form comes from another site, so nothing was changed.", 403)
        await (refused if _is_of_another_site(scope) else self._app)(scope, receive, send_guarded)


def _is_of_another_site(scope: Scope) -> bool:
    """Return whether a browser says that another site makes it send a form."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    return dict(scope["headers"]).get(b"sec-fetch-site", b"none") not in (b"same-origin", b"none")
