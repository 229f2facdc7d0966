"""The webhooks, `/healthz` and `/metrics` as an ASGI application, or as routes of yours.

    app = Starlette(routes=[Mount("/crm", routes=routes(texts=TwilioWebhooks(auth_token)))])

    POST /webhooks/twilio/texts     a lead wrote
    POST /webhooks/twilio/status    what became of a text of ours
    POST /webhooks/stripe           a payment
    GET  /healthz                   200 if the database is there and migrated, or else 503
    GET  /metrics                   for Prometheus

A webhook runs in a thread of the pool, on a connection of its own that is given back afterwards. Only 200 tells the
provider that everything is committed. If the database is away or busy, it gets 503, and tries again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol, TypeVar
from urllib.parse import parse_qsl

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from close_engine.database.binding import current, is_transient
from close_engine.errors import SchemaError, first_line
from close_engine.integrations.webhooks import WebhookResponse
from close_engine.printable import get_logger
from close_engine.schema.scripts import pending

__all__ = ["PaymentWebhook", "TextWebhooks", "create_app", "routes"]

logger = get_logger(__name__)

#: The most bytes of a request's body. What the providers send is far smaller.
MOST_BYTES = 1024 * 1024

#: How many requests are processed at once.
CONCURRENCY = 10

#: Seconds for the body of a request to come.
BODY_TIMEOUT = 20

#: Seconds after which a database that has not answered counts as away.
HEALTH_TIMEOUT = 2


class TextWebhooks(Protocol):
    """What answers a provider of texts, such as `close_engine.integrations.twilio.TwilioWebhooks`."""

    def text(self, url: str, form: Mapping[str, str], signature: str | None) -> WebhookResponse:
        """Process a text of a lead."""

    def status(self, url: str, form: Mapping[str, str], signature: str | None) -> WebhookResponse:
        """Process what became of a text of ours."""


#: What answers a provider of payments, such as `close_engine.integrations.stripe.StripeWebhook`: a function of the
#: request's body and its signature.
PaymentWebhook = Callable[[bytes, "str | None"], WebhookResponse]


def create_app(
    *,
    texts: TextWebhooks | None = None,
    payments: PaymentWebhook | None = None,
    metrics: bool = True,
    concurrency: int = CONCURRENCY,
) -> Starlette:
    """Make an ASGI application: to serve with uvicorn, or to mount in your own.

    Args:
        texts, payments, metrics, concurrency: as for `routes`.

    Returns:
        starlette.applications.Starlette.

    Raises:
        ConfigurationError: `metrics` needs a package that is missing.
    """
    return Starlette(routes=routes(texts=texts, payments=payments, metrics=metrics, concurrency=concurrency))


def routes(
    *,
    texts: TextWebhooks | None = None,
    payments: PaymentWebhook | None = None,
    metrics: bool = True,
    concurrency: int = CONCURRENCY,
) -> list[BaseRoute]:
    """Make the routes of the webhooks, `/healthz` and `/metrics`, to put among your own.

    Args:
        texts: what answers the webhooks of texts; without it, there are none.
        payments: what answers the webhook of payments; without it, there is none.
        metrics: bool, whether to serve `/metrics`. It needs the extra `close-engine[metrics]`.
        concurrency: int, how many requests are processed at once: each needs a connection. The others wait.

    Returns:
        list of Starlette's routes.

    Raises:
        ConfigurationError: `metrics` needs a package that is missing.
    """
    made: list[BaseRoute] = [Route("/healthz", _Health().answer)]
    threads = _Threads(concurrency)
    if texts is not None:
        made += [
            _webhook("/webhooks/twilio/texts", threads, _of_a_form(texts.text)),
            _webhook("/webhooks/twilio/status", threads, _of_a_form(texts.status)),
        ]
    if payments is not None:
        made.append(_webhook("/webhooks/stripe", threads, _of_bytes(payments)))
    if metrics:
        made.append(Route("/metrics", _metrics()))
    return made


_Result = TypeVar("_Result")


class _Threads:
    """Runs functions in threads, only so many at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limiter: anyio.CapacityLimiter | None = None

    async def run(self, function: Callable[[], _Result], *, abandon: bool = False) -> _Result:
        # Made here, because it needs a running event loop.
        self._limiter = self._limiter or anyio.CapacityLimiter(self._most)
        return await anyio.to_thread.run_sync(function, limiter=self._limiter, abandon_on_cancel=abandon)


_Answering = Callable[[Request, bytes], WebhookResponse]


def _of_a_form(answer: Callable[[str, Mapping[str, str], str | None], WebhookResponse]) -> _Answering:
    def answering(request: Request, body: bytes) -> WebhookResponse:
        try:
            url = str(request.url)
            form = dict(parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=1000))
        except ValueError:  # also a UnicodeDecodeError
            return WebhookResponse(400, "This is not a form in UTF-8.")
        return answer(url, form, request.headers.get("X-Twilio-Signature"))

    return answering


def _of_bytes(answer: PaymentWebhook) -> _Answering:
    return lambda request, body: answer(body, request.headers.get("Stripe-Signature"))


def _webhook(path: str, threads: _Threads, answering: _Answering) -> Route:
    async def endpoint(request: Request) -> Response:
        try:
            with anyio.fail_after(BODY_TIMEOUT):
                body = await _body(request)
        except TimeoutError:
            return Response("The request did not come in time.", 408)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        if body is None:
            return Response(f"The request has more than {MOST_BYTES} bytes.", 413)
        answered = await threads.run(partial(_answered, answering, request, body))
        return Response(answered.text, answered.status, media_type=answered.media_type)

    return Route(path, endpoint, methods=["POST"])


async def _body(request: Request) -> bytes | None:
    """Read the body of a request; None if it is too large."""
    read = bytearray()
    async for chunk in request.stream():
        read += chunk
        if len(read) > MOST_BYTES:
            return None
    return bytes(read)


def _answered(answering: _Answering, request: Request, body: bytes) -> WebhookResponse:
    """Answer a request in this thread, on a connection that is given back: the thread serves others later."""
    try:
        with current().database.connection_context():
            return answering(request, body)
    except Exception as error:
        if is_transient(error):
            logger.warning("database unreachable path=%s: %s", request.url.path, first_line(error))
            return WebhookResponse(503, "The database is away or busy: try again later.")
        # What the error says may be the lead's words or a secret. The log has it; the provider gets a sentence.
        logger.exception("webhook failed path=%s", request.url.path)
        return WebhookResponse(500, "This failed, and the log says why.")


class _Health:
    """Says whether the database is there and migrated. One check at a time, so that none can pile up."""

    def __init__(self) -> None:
        self._checking = threading.Lock()
        self._threads = _Threads(4)  # of its own: it answers even if the webhooks use all of theirs

    async def answer(self, request: Request) -> Response:
        why: str | None = "the database does not answer"
        with anyio.move_on_after(HEALTH_TIMEOUT):
            why = await self._threads.run(self._problem, abandon=True)
        if why is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unavailable", "why": why}, 503)

    def _problem(self) -> str | None:
        """Return what is wrong, or None."""
        if not self._checking.acquire(timeout=HEALTH_TIMEOUT):
            return "the database does not answer"
        try:
            with current().database.connection_context():
                missing = pending()
        except SchemaError as error:
            logger.warning("not healthy: %s", first_line(error))
            return "the role cannot read which migrations were applied"
        except Exception as error:
            logger.warning("not healthy: %s", first_line(error))
            return "the database cannot be reached"
        finally:
            self._checking.release()
        return f"the database is not migrated ({', '.join(missing)} pending)" if missing else None


def _metrics() -> Callable[[Request], Response]:
    from close_engine.metrics import register  # first, because it says which package is missing

    # isort: split
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    register(registry)

    def endpoint(request: Request) -> Response:  # not async: it runs in a thread of the pool
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return endpoint
