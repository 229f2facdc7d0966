"""The stand-ins, and the agency's own two processes: `close-engine serve` and `close-engine worker --agency`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import ProxyHandler, build_opener

from close_engine.testing.anthropic import AnthropicStandIn, Brain
from close_engine.testing.stripe import StripeStandIn
from close_engine.testing.twilio import TwilioStandIn

from .brain import brain

#: Opens URLs of this machine, whatever proxy the environment names.
opener = build_opener(ProxyHandler({}))

HERE = Path(__file__).parent.parent


class Place:
    """Everything that runs while the leads are played.

    Args:
        directory: Path, an empty directory.
        stack: ExitStack, which ends what is begun.
        database: str, the URL of the agency's database; the default is a SQLite file in the directory.
        think: the function that stands in for Claude.
        reports: what Twilio says by itself of each text.

    Attributes:
        twilio, stripe, claude: the stand-ins.
        url: str, of the agency's server.
        statuses: dict of each process to its exit status, once it has been told to stop.
    """

    def __init__(
        self,
        directory: Path,
        stack: ExitStack,
        database: str | None = None,
        *,
        think: Brain = brain,
        reports: Sequence[str] = ("sent", "delivered"),
    ) -> None:
        self.twilio = stack.enter_context(TwilioStandIn(reports=reports))
        self.stripe = stack.enter_context(StripeStandIn())
        self.claude = stack.enter_context(AnthropicStandIn(think))
        self.directory = directory
        self._reports = tuple(reports)
        self.url = f"http://127.0.0.1:{free_port()}"
        self.database = database or f"sqlite:///{directory}/agency.db"
        self.statuses: dict[str, int] = {}
        (directory / "previews").mkdir()
        self.environment = {
            **os.environ,
            "CLOSE_ENGINE_DATABASE": self.database,
            "CLOSE_ENGINE_AGENCY": "play.fast:agency",
            "CLOSE_ENGINE_PUBLIC_URL": self.url,
            "PREVIEWS": str(directory / "previews"),
            "PREVIEWS_URL": stack.enter_context(_previews(directory / "previews")),
            "TWILIO_ACCOUNT_SID": self.twilio.account_sid,
            "TWILIO_AUTH_TOKEN": self.twilio.auth_token,
            "TWILIO_FROM": self.twilio.number,
            "TWILIO_API_BASE": self.twilio.url,
            "STRIPE_API_KEY": self.stripe.api_key,
            "STRIPE_WEBHOOK_SECRET": self.stripe.secret,
            "STRIPE_API_BASE": self.stripe.url,
            "ANTHROPIC_API_KEY": "a-key-that-no-server-knows",
            "ANTHROPIC_BASE_URL": self.claude.url,
            "NO_PROXY": "127.0.0.1",
        }

    @contextmanager
    def running(self, *names: str) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
        """Run servers and workers meanwhile. In the end, tell them to stop.

        Args:
            names: how they are called, such as `serve-1` or `worker-1`; the first server listens at `url`.

        Yields:
            dict of each name to its process.
        """
        processes: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for name in names:
                processes[name] = self.start(name)
            for name in names:
                self.wait_for(name, processes[name])
            yield processes
            self._until_reported()
        finally:
            for process in processes.values():
                process.send_signal(signal.SIGTERM)
            for name, process in processes.items():
                self.statuses[name] = process.wait(30)

    def _until_reported(self) -> None:
        """Wait until Twilio has said what became of each text: a server that stops would not hear it."""
        end = time.monotonic() + 30
        while time.monotonic() < end and len(self.twilio.reported) < len(self._reports) * len(self.twilio.texts):
            time.sleep(0.02)

    def start(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        """Start a process of the agency. Its log goes into a file."""
        if name.startswith("serve"):
            port = self.url.rpartition(":")[2] if name == "serve" else "0"
            return self.command(name, "serve", "--port", port, *options)
        return self.command(name, "worker", "--agency", "--idle", "0.1", "--concurrency", "8", *options)

    def command(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `close-engine` with the agency's environment."""
        with (self.directory / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                [Path(sys.executable).with_name("close-engine"), *arguments],
                cwd=HERE,
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def wait_for(self, name: str, process: subprocess.Popen[bytes]) -> str:
        """Wait until a process has begun, and return how its log says so."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for line in self.log(name):
                if " INFO started " in line or " INFO serving at " in line:
                    return line
            if process.poll() is not None:
                break
            time.sleep(0.05)
        raise SystemExit(f"close-engine {name} has not begun:\n{chr(10).join(self.log(name))}")

    def log(self, name: str) -> list[str]:
        """Return the lines that a process has logged."""
        return (self.directory / f"{name}.log").read_text().splitlines()

    def complaints(self) -> list[str]:
        """Return the warnings and errors that the processes have logged."""
        logs = sorted(self.directory.glob("*.log"))
        return [line for log in logs for line in log.read_text().splitlines() if " INFO " not in line]


@contextmanager
def place() -> Iterator[Place]:
    """Make a place for the play, in a temporary directory."""
    with TemporaryDirectory(prefix="agency_") as directory, ExitStack() as stack:
        yield Place(Path(directory), stack)


def free_port() -> int:
    """Return a port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@contextmanager
def _previews(directory: Path) -> Iterator[str]:
    """Show a directory to the world, as your web server does, and yield its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(directory)))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
