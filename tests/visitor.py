"""Somebody who visits the console with a browser that has no script: looks at pages, and sends the forms on them."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from starlette.testclient import TestClient
from starlette.types import ASGIApp

#: The machine itself, as the console without accounts wants it.
HERE = "http://127.0.0.1:8000"


class Visitor:
    """A browser with its own cookies.

    Args:
        app: what it visits.
        root: where the console is mounted in it.
    """

    def __init__(self, app: ASGIApp, root: str = "", base_url: str = HERE, address: str = "127.0.0.1") -> None:
        self.root = root
        self.client = TestClient(app, base_url=base_url, client=(address, 50000))
        self.page = self.token = ""
        self.status = 0
        self.headers: Any = {}

    def look(self, path: str = "/", **headers: str) -> str:
        """Go to a page, and return what it says."""
        return self._keep(self.client.get(f"{self.root}{path}", headers=headers))

    def send(self, path: str, **fields: Any) -> str:
        """Send a form with the token of the page that was seen last, and return the page that comes."""
        return self._keep(self.client.post(f"{self.root}{path}", data={"token": self.token, **fields}))

    @property
    def text(self) -> str:
        """What the page says, without its tags."""
        shown = re.sub(r"<(script|style|title).*?</\1>", "", self.page, flags=re.DOTALL)
        within_words = re.sub(r"</?(a|bdi|kbd|strong|time)\b[^>]*>", "", shown)
        return " ".join(unescape(re.sub(r"<[^>]*>", " ", within_words)).split())

    def hidden(self, name: str) -> str:
        """Return a hidden field of the page."""
        found = re.search(rf'name="{name}" value="([^"]*)"', self.page)
        assert found, name
        return unescape(found[1])

    def sign_in(self, name: str, password: str, **fields: str) -> str:
        """Sign in."""
        self.look("/sign-in")
        return self.send("/sign-in", name=name, password=password, **fields)

    def _keep(self, response: Any) -> str:
        self.page, self.status, self.headers = response.text, response.status_code, response.headers
        if found := re.search(r'name="token" value="(\w+)"', self.page):
            self.token = found[1]
        return self.page
