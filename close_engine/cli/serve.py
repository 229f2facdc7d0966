"""The server: an agency's webhooks, `/healthz` and `/metrics`, and the console."""

from __future__ import annotations

import logging
import os
import signal
import socket
from ipaddress import ip_address
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from close_engine.agency import load_agency, read_environment
from close_engine.cli.app import command, importing, open_migrated
from close_engine.cli.messages import subscribed
from close_engine.cli.terminal import log_to_standard_error
from close_engine.database.binding import current
from close_engine.errors import ConfigurationError
from close_engine.printable import get_logger

logger = get_logger(__name__)

#: Seconds that requests have to end in, once the server is told to stop.
GRACE = 30

#: Where the console is.
CONSOLE = "/console"


@command()
def serve(
    context: typer.Context,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="The address to listen at; 0.0.0.0 for other machines, too.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65535, help="The port to listen at; 0 for any that is free.")
    ] = 8000,
    proxy_headers: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESSES",
            help="Believe what these proxies say of the client: addresses, with commas between, or * for all.",
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(metavar="NUMBER", min=1, help="How many requests to process at once, each on a connection.")
    ] = 10,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log each request.")] = False,
) -> None:
    """Serve the agency that CLOSE_ENGINE_AGENCY names: its webhooks, the console, /healthz and /metrics, until SIGTERM.

    The console is at /console if CLOSE_ENGINE_ACCOUNTS_FILE names accounts, or
    if only this machine reaches the server. If the database is away when it
    starts, it waits. On SIGTERM or Ctrl-C, it answers the requests that have
    begun, and exits. Any number of servers can use one database.
    """
    read_environment("serve")  # before the database: one error names all that is missing
    open_migrated(context, wait=True)
    with importing(context, "agency"):
        agency, settings = load_agency("serve")
    webhooks = agency.webhooks(settings)
    log_to_standard_error()
    from close_engine.web import create_app  # it needs packages that not everybody has

    app = create_app(texts=webhooks.texts, payments=webhooks.payments, concurrency=concurrency)
    _mount_console(app, host, settings.public_url)
    with _listening(host, port) as listener:
        subscribed(agency)
        current().database.close()
        _serve(app, listener, proxy_headers, access_log)


def _mount_console(app: Any, host: str, public_url: str) -> None:
    """Mount the console, unless it has no accounts and others than this machine reach the server."""
    from close_engine.web.console import Accounts, console

    accounts = Accounts.of_environment()
    if accounts is None and not (_is_local(host) and _is_local(urlsplit(public_url).hostname or "")):
        logger.info("the console is not served, because it has no accounts: see close-engine user add")
        return
    app.mount(CONSOLE, console(accounts=accounts))
    logger.info("the console is at %s%s/", public_url, CONSOLE)


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(host: str, port: int) -> socket.socket:
    """Listen, before anything is waited for: a port that is taken is an error at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        # Python adds the address to what the system says.
        why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise ConfigurationError(f"Port {port} of {host!r} cannot be served: {why}.") from error


def _serve(app: Any, listener: socket.socket, proxies: str | None, access_log: bool) -> None:
    import uvicorn

    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=access_log,
        proxy_headers=proxies is not None,
        forwarded_allow_ips=proxies,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=GRACE,
    )
    host, port = listener.getsockname()[:2]
    logger.info("serving at http://%s:%s", f"[{host}]" if ":" in host else host, port)
    # When uvicorn has stopped, it raises the signal again. It has been obeyed, so the exit status is 0.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    logger.info("stopped")
