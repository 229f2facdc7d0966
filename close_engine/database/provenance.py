"""Provenance: who did something, why, with what metadata, and under which key.

It is sent along with the statement that it belongs to, and the database writes it into the history:

>>> Provenance(actor="worker-7", key="SM123")
Provenance(actor='worker-7', reason=None, metadata=None, key='SM123')
>>> Provenance(key=" ")
Traceback (most recent call last):
close_engine.InvalidValue: key cannot be ' ': an idempotency key must not be empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from close_engine.database.fields import clean_json, clean_text, dump_json
from close_engine.errors import InvalidValue

__all__ = ["LONGEST_KEY", "OWN_KEYS", "Provenance", "ProvenanceArguments", "Write", "own_key"]

#: The most characters of an idempotency key: so many fit into PostgreSQL's index in any alphabet.
LONGEST_KEY = 255

#: What the keys of this library's own begin with, and no other key.
OWN_KEYS = "close_engine:"


def own_key(*parts: object) -> str:
    """Return a key that no caller of this library can give."""
    return OWN_KEYS + ":".join(map(str, parts))


class ProvenanceArguments(TypedDict, total=False):
    """The arguments that every trigger takes; see `Provenance`."""

    actor: str | None
    reason: str | None
    metadata: Mapping[str, Any] | None
    key: str | None


class Write(NamedTuple):
    """The write that a provenance belongs to; the guard ignores it for any other write.

    Attributes:
        trigger: the trigger that is fired.
        id: id of the row; None for a write of many rows.
        at: when, as the database stores it; of a conversation, the new `updated_at`.
    """

    trigger: str
    id: str | None
    at: str


class _Fields(NamedTuple):
    actor: str | None
    reason: str | None
    metadata: Mapping[str, Any] | None
    key: str | None


class Provenance(_Fields):
    """What a row of the history says besides the stages. It is checked when it is created.

    Attributes:
        actor: who did it.
        reason: why.
        metadata: whatever else should be recorded, as a JSON object.
        key: idempotency key of the event behind it.

    Raises:
        InvalidValue: the history cannot store it.
    """

    __slots__ = ()

    def __new__(
        cls,
        actor: str | None = None,
        reason: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        key: str | None = None,
    ) -> Provenance:
        if actor is not None:
            actor = clean_text("actor", actor)
        if reason is not None:
            reason = clean_text("reason", reason)
        if key is not None:
            key = clean_text("key", key)
            if not key.strip():
                raise InvalidValue("key", key, "an idempotency key must not be empty")
            if key.startswith(OWN_KEYS):
                raise InvalidValue("key", key, f"keys that begin with {OWN_KEYS} are this library's own")
            if len(key) > LONGEST_KEY:
                raise InvalidValue("key", key, f"an idempotency key has at most {LONGEST_KEY} characters")
        if metadata is not None:
            if not isinstance(metadata, Mapping):
                raise InvalidValue("metadata", metadata, "it must be a mapping")
            metadata = clean_json("metadata", metadata)
        return tuple.__new__(cls, (actor, reason, metadata, key))

    def under(self, prefix: str) -> Provenance:
        """Return a copy under a key of the library's: the user's key with a prefix."""
        # The length of the key was checked without the prefix.
        return self._replace(key=own_key(prefix, self.key))

    def context(self, write: Write) -> str:
        """Return what the guard takes up: a JSON object."""
        return dump_json(
            {
                "trigger": write.trigger,
                "id": write.id,
                "at": write.at,
                "actor": self.actor,
                "reason": self.reason,
                "metadata": self.metadata,
                "key": self.key,
            }
        )
