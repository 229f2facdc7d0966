"""Signing in and out."""

from __future__ import annotations

import math

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from close_engine.web.console.page import COOKIE, Ask, Refused, Site, read_form, refusal

__all__ = ["ROUTES"]


async def sign_in(request: Request) -> Response:
    """Show the page for signing in, or sign somebody in."""
    site: Site = request.app.state.site
    session = site.sessions.read(request.cookies.get(COOKIE))
    ask = Ask(request, site, None, session or site.sessions.begin(), is_new=session is None)
    if not site.has_login():
        return refusal(ask, Refused(404, "Nobody signs in here."))
    if request.method != "POST":
        response = ask.show("sign_in.html", next=ask.given("next"), name="", problem="")
    else:
        try:
            await read_form(ask)
            # Those who wait keep no thread from the pages.
            async with site.checking:
                response = await run_in_threadpool(_sign_in, ask)
        except Refused as error:
            response = refusal(ask, error)
    if ask.is_new:
        ask.keep(response)
    return response


def _sign_in(ask: Ask) -> Response:
    site, name = ask.site, ask.given("name")
    assert site.accounts is not None
    password, address = str(ask.form.get("password", "")), ask.request.client.host if ask.request.client else ""
    wait = site.attempts.wait(name, address)
    account = None if wait else site.accounts.check(name, password)
    if not wait and account is None:
        site.attempts.failed(name, address)
    if wait:
        problem = f"Too many attempts failed: try again in {math.ceil(wait / 60)} minutes."
        response = ask.show("sign_in.html", 429, next=ask.given("next"), name=name, problem=problem)
        response.headers["Retry-After"] = str(math.ceil(wait))
        return response
    if account is None:
        problem = "The name or the password is wrong."
        return ask.show("sign_in.html", 401, next=ask.given("next"), name=name, problem=problem)
    site.attempts.succeeded(name, address)
    # A new session: whoever knew the old one's cookie does not know this one's.
    ask.session, ask.account, ask.is_new = site.sessions.begin(account), account, True
    return RedirectResponse(_inside(ask, ask.given("next")), 303)


def _inside(ask: Ask, path: str) -> str:
    """Return where somebody wanted to go, if that is a page of the console."""
    is_ours = path.startswith(f"{ask.root}/") and not path.startswith("//") and "\\" not in path and path.isprintable()
    return path if is_ours else ask.link("approvals")


async def sign_out(request: Request) -> Response:
    """Sign somebody out."""
    site: Site = request.app.state.site
    session = site.sessions.read(request.cookies.get(COOKIE))
    ask = Ask(request, site, None, session or site.sessions.begin())
    if session is not None and session.account is not None:
        try:
            await read_form(ask)
        except Refused as error:
            return refusal(ask, error)
        site.sessions.end(session)
    response = RedirectResponse(ask.link("sign_in" if site.has_login() else "approvals"), 303)
    response.delete_cookie(COOKIE, path=ask.root or "/")
    return response


ROUTES = [
    Route("/sign-in", sign_in, methods=["GET", "POST"], name="sign_in"),
    Route("/sign-out", sign_out, methods=["POST"], name="sign_out"),
]
