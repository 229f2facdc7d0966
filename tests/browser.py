"""A real Chromium, and what it visits: the console, served by uvicorn on a port of this machine.

    python -m tests.browser install     # Debian's Chromium, unless there is one

Playwright drives it, and axe looks at the pages as people do who do not see them. Both come with the extra `browser`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """Return the machine's Chromium: the one that CLOSE_ENGINE_CHROMIUM names, or the first that is found."""
    return os.environ.get("CLOSE_ENGINE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def what_is_missing() -> str:
    """Say in a sentence why no browser can visit the console; empty if one can."""
    if not all(map(find_spec, ("playwright", "axe_playwright_python"))):
        return "No browser visits the console: Playwright and axe are not installed. `make browser` installs them."
    return "" if find_browser() else "No browser visits the console: there is no Chromium. `make browser` installs it."


def install() -> None:
    """Install Debian's Chromium, unless there is one."""
    if find_browser() or not shutil.which("apt-get"):
        return
    rights = [] if os.geteuid() == 0 else ["sudo"]
    for command in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", "chromium"]):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run([*rights, "apt-get", *command], stdout=sys.stderr, check=False, env=environment)


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve an application as uvicorn does, in a thread; yield its URL."""
    import uvicorn

    config = uvicorn.Config(app, port=0, log_level="critical", ws="none", timeout_graceful_shutdown=1, lifespan="off")
    server = uvicorn.Server(config)
    has_started = threading.Event()
    startup = server.startup

    async def start(sockets: Any = None) -> None:
        await startup(sockets)
        has_started.set()

    server.startup = start  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert has_started.wait(30)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


if __name__ == "__main__":
    install()
    sys.exit(what_is_missing() or None)
