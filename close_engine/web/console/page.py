"""One request: who asks, what they may do, what they sent, and the answer.

A page is a function that takes an `Ask` and returns a response. It runs in a thread, on one connection, which is given
back at its end.
"""

from __future__ import annotations

import hmac
import inspect
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import anyio
import peewee
from jinja2 import Environment
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from close_engine.board import pulse
from close_engine.database.binding import current
from close_engine.errors import CloseEngineError, NotFound, first_line
from close_engine.printable import get_logger
from close_engine.web.console.accounts import Account, Accounts, Role
from close_engine.web.console.sessions import Attempts, Session, Sessions

__all__ = [
    "COOKIE",
    "SAID",
    "Ask",
    "Authenticate",
    "Page",
    "Refused",
    "Site",
    "as_mapping",
    "asked",
    "beat",
    "endpoint",
    "read_form",
    "refusal",
]

logger = get_logger(__name__)

#: The cookie of a session, and the one with what the next page says.
COOKIE, SAID = "close_engine_console", "close_engine_said"

#: What this machine calls itself.
_HERE = ("127.0.0.1", "localhost", "::1")

#: A form is at most so long.
LONGEST_FORM = 256 * 1024

#: Seconds for a form to come.
FORM_TIMEOUT = 20

Authenticate = Callable[[Request], "Account | Awaitable[Account | None] | None"]
"""Says who makes a request; None if nobody may."""


class Refused(Exception):
    """The request is refused.

    Attributes:
        status: the HTTP status.
        sentence: why.
    """

    def __init__(self, status: int, sentence: str) -> None:
        self.status, self.sentence = status, sentence
        super().__init__(sentence)


@dataclass(frozen=True)
class Site:
    """What all requests share."""

    templates: Environment
    sessions: Sessions
    accounts: Accounts | None
    authenticate: Authenticate | None
    title: str
    attempts: Attempts = field(default_factory=Attempts)
    #: To check a password takes much memory, on purpose: so many are checked at once.
    checking: anyio.Semaphore = field(default_factory=lambda: anyio.Semaphore(2))

    def has_login(self) -> bool:
        """Whether people sign in here, and not elsewhere or not at all."""
        return self.accounts is not None and self.authenticate is None


@dataclass
class Ask:
    """A request.

    Attributes:
        request: Starlette's.
        account: who makes it; None on the page for signing in.
        session: the cookie's, or a new one.
        form: what was sent.
        is_new: whether the browser has yet to get the cookie.
        pulse: the pulse of the board before the page was made.
    """

    request: Request
    site: Site
    account: Account | None
    session: Session
    form: FormData = field(default_factory=FormData)
    is_new: bool = False
    pulse: str = ""

    @property
    def by(self) -> str:
        """The name of whoever asks."""
        assert self.account is not None
        return self.account.name

    def may(self, role: str) -> bool:
        """Return whether whoever asks may do what this role may."""
        return self.account is not None and self.account.role.may(Role(role))

    def need(self, role: Role) -> None:
        """Refuse whoever may not do what this role may."""
        if not self.may(role):
            raise Refused(403, f"You may not do this: it takes the role {role}, and yours is {self._role()}.")

    def _role(self) -> str:
        return "none" if self.account is None else str(self.account.role)

    def given(self, name: str) -> str:
        """Return a field of the form or of the address, without spaces around it; empty if there is none."""
        value = self.form.get(name, "") if name in self.form else self.request.query_params.get(name, "")
        return _storable(value).strip()

    def all_given(self, name: str) -> list[str]:
        """Return all values of a field of the form."""
        return [_storable(value) for value in self.form.getlist(name)]

    def text(self, name: str) -> str:
        """Return a text of the form, with the ends of lines as they are everywhere but in forms."""
        return _storable(self.form.get(name, "")).replace("\r\n", "\n").strip()

    def part(self, name: str) -> str:
        """Return a part of the address."""
        return _storable(self.request.path_params[name])

    def link(self, name: str, /, **values: Any) -> str:
        """Return the address of a page, wherever the console is mounted."""
        route = next(each for each in self.request.app.routes if getattr(each, "name", "") == name)
        inside = {key: values.pop(key) for key in list(values) if key in route.param_convertors}
        # Starlette puts a part into the path as it is.
        path = self.request.app.url_path_for(name, **{key: quote(str(value), safe="") for key, value in inside.items()})
        query = urlencode({key: value for key, value in values.items() if value not in (None, "")})
        return f"{self.root}{path}" + (f"?{query}" if query else "")

    @property
    def root(self) -> str:
        """Where the console is mounted."""
        return str(self.request.scope.get("root_path", "")).rstrip("/")

    def static(self, name: str) -> str:
        """Return the address of a file that every page has."""
        return f"{self.root}/static/{name}"

    def show(self, template: str, status: int = 200, **values: Any) -> Response:
        """Return a page."""
        said = self.site.sessions.unsigned(self.request.cookies.get(SAID))
        text = self.site.templates.get_template(template).render(
            ask=self,
            link=self.link,
            token=self.site.sessions.token(self.session),
            said=said if isinstance(said, list) else [],
            here=template.removesuffix(".html"),
            **values,
        )
        response = HTMLResponse(text, status)
        if said is not None:
            response.delete_cookie(SAID, path=self.root or "/")
        return response

    def go(self, name: str, *said: str, **values: Any) -> Response:
        """Lead to a page, which then says these sentences."""
        response = RedirectResponse(self.link(name, **values), 303)
        if said:
            # A browser drops a cookie of more than 4 KB. What does not fit can be seen on the page itself.
            shown = [sentence[:300] for sentence in said]
            while len(signed := self.site.sessions.signed(shown)) > 3000:
                shown = [*shown[: len(shown) // 2], "And more."] if len(shown) > 2 else [shown[0][:100]]
            self._set(response, SAID, signed, 60)
        return response

    def keep(self, response: Response) -> None:
        """Give the browser the cookie of the session."""
        self._set(response, COOKIE, self.site.sessions.written(self.session), None)

    def _set(self, response: Response, name: str, value: str, seconds: int | None) -> None:
        is_secure = self.request.url.scheme == "https"
        response.set_cookie(
            name, value, max_age=seconds, path=self.root or "/", secure=is_secure, httponly=True, samesite="lax"
        )


def _storable(value: Any) -> str:
    """Return a text that a database can look for. Nobody types what is left out."""
    text = value if isinstance(value, str) else ""
    return text.replace("\0", "").encode("utf-8", "ignore").decode()


Page = Callable[[Ask], Response]


def endpoint(path: str, page: Page, *, post: bool = False, role: Role = Role.VIEWER) -> Route:
    """Return the route of a page.

    Args:
        path: its path.
        page: the function; its name is the route's.
        post: whether it writes.
        role: who may.
    """

    async def answer(request: Request) -> Response:
        ask = await asked(request)
        if isinstance(ask, Response):
            return ask
        try:
            if post:
                await read_form(ask)
            ask.need(role)
            response = await run_in_threadpool(_on_database, partial(page, ask), ask)
        except Exception as error:
            response = refusal(ask, error)
        if ask.is_new:
            ask.keep(response)
        return response

    return Route(path, answer, methods=["POST"] if post else ["GET"], name=page.__name__)


def _on_database(page: Callable[[], Response], ask: Ask) -> Response:
    """Run a page on a connection of its own thread, which is given back."""
    with current().database.connection_context():
        # Before the page looks: what happens meanwhile is new to it.
        ask.pulse = pulse()
        return page()


async def asked(request: Request) -> Ask | Response:
    """Find out who makes a request, or return where they can say so."""
    site: Site = request.app.state.site
    session = site.sessions.read(request.cookies.get(COOKIE))
    known = session or site.sessions.begin()
    if site.authenticate is not None:
        found = site.authenticate(request)
        account = await found if inspect.isawaitable(found) else found
        ask = Ask(request, site, account, known, is_new=session is None)
        if ask.account is None:
            return refusal(ask, Refused(401, "The application that this console is part of does not know who you are."))
        return ask
    if site.accounts is None:
        ask = Ask(request, site, Account("owner", Role.ADMIN), known, is_new=session is None)
        if not _is_local(request):
            ask.account = None
            return refusal(
                ask,
                Refused(
                    403,
                    "This console has no accounts, so it only answers on the machine itself, at http://127.0.0.1. To "
                    "open it to others, add an account with close-engine user add.",
                ),
            )
        return ask
    ask = Ask(request, site, known.account, known, is_new=session is None)
    if ask.account is not None:
        return ask
    if request.method != "POST":
        inside = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(ask.link("sign_in", next=inside), 303)
    # What was written must not be lost.
    with suppress(Refused):
        await read_form(ask, check=False)
    page = ask.show("over.html", 401, text=ask.text("message") or ask.text("reason"))
    page.delete_cookie(COOKIE, path=ask.root or "/")
    return page


def _is_local(request: Request) -> bool:
    """Return whether a request comes from this machine, and its browser thinks so, too.

    A page of somebody else's may lead a name of theirs to 127.0.0.1. A proxy on this machine speaks for others: most
    say so, nginx speaks HTTP 1.0 by default, and with a form a browser says where it thinks it is.
    """
    headers = request.headers
    if request.client is None or request.scope.get("http_version") == "1.0":
        return False
    if {"forwarded", "x-forwarded-for", "x-real-ip", "via"} & set(headers.keys()):
        return False
    try:
        is_near = ip_address(request.client.host).is_loopback
        names = [urlsplit(f"//{headers.get('host', '')}").hostname]
        names += [urlsplit(origin).hostname for origin in headers.getlist("origin")]
    except ValueError:
        return False
    return is_near and all(name in _HERE for name in names)


async def read_form(ask: Ask, check: bool = True) -> None:
    """Read the form, and refuse one that no page of this session has made."""
    length = ask.request.headers.get("content-length", "")
    if not length.isdecimal() or int(length) > LONGEST_FORM:
        raise Refused(413, "This form is too long.")
    try:
        with anyio.fail_after(FORM_TIMEOUT):
            ask.form = await ask.request.form(max_files=0, max_fields=2000)
    except TimeoutError:
        raise Refused(408, "This form did not come in time.") from None
    token = ask.form.get("token", "")
    expected = ask.site.sessions.token(ask.session)
    if check and not (isinstance(token, str) and hmac.compare_digest(token.encode(), expected.encode())):
        raise Refused(403, "This form is too old, or comes from another page: load the page again, then try again.")


def refusal(ask: Ask, error: Exception) -> Response:
    """Return the page that says why something was refused; raise what nobody expects.

    Raises:
        Exception: it is a fault of the program.
    """
    if isinstance(error, Refused):
        status, sentence = error.status, error.sentence
    elif isinstance(error, CloseEngineError):
        status, sentence = (404 if isinstance(error, NotFound) else 409), str(error)
    elif isinstance(error, (peewee.PeeweeException, sqlite3.Error)):
        # Its words name machines and tables.
        why = f": {first_line(error)}" if ask.may("admin") else ""
        status, sentence = 503, f"The database refused{why}. Nothing was changed. The log says more."
        logger.warning("database refused path=%s: %s", ask.request.url.path, first_line(error))
    else:
        raise error
    return ask.show("refused.html", status, sentence=sentence)


def beat() -> str:
    """Return the pulse of the board."""
    with current().database.connection_context():
        return pulse()


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return a JSON object, or else an empty one."""
    return value if isinstance(value, dict) else {}
