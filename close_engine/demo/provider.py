"""The demo's SMS provider."""

from __future__ import annotations

from collections import Counter

__all__ = ["Provider"]


class Provider:
    """Deliver texts: one per idempotency key, no matter how often it is asked.

    Attributes:
        texts: dict of key to the id of its text.
        asked: Counter of the requests for each key.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.asked: Counter[str] = Counter()

    def send(self, key: str) -> str:
        """Deliver a text, unless one with this key was delivered before.

        Args:
            key: str, the idempotency key.

        Returns:
            str, the text's id.
        """
        self.asked[key] += 1
        return self.texts.setdefault(key, f"SM{len(self.texts):06}")

    def find(self, key: str) -> str | None:
        """Return the id of the text that was delivered under a key, or None if there is none."""
        return self.texts.get(key)
