"""The provider of texts in the demonstration."""

from __future__ import annotations

from collections import Counter

__all__ = ["Provider"]


class Provider:
    """Delivers texts: one for each key, however often it is asked under the same.

    Attributes:
        texts: key to the id of the one text.
        asked: key to how often it was asked.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.asked: Counter[str] = Counter()

    def send(self, key: str) -> str:
        """Deliver a text, and return its id."""
        self.asked[key] += 1
        return self.texts.setdefault(key, f"SM{len(self.texts):06}")
