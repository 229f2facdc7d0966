"""Sessions: cookies that are signed and end, the tokens of forms, and how often somebody may try to sign in."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from threading import Lock
from typing import Any

from itsdangerous import BadData, URLSafeSerializer

from close_engine.errors import ConfigurationError
from close_engine.web.console.accounts import Account, Accounts

__all__ = ["SECRET", "Attempts", "Session", "Sessions"]

#: The environment variable with the secret that signs the cookies.
SECRET = "CLOSE_ENGINE_SECRET"
#: A secret is at least so long. Anybody gets a cookie that is signed with it, and can try secrets at home.
SHORTEST = 32


@dataclass(frozen=True)
class Session:
    """What a cookie says.

    Attributes:
        nonce: a random word, from which the token of the forms is made.
        account: who signed in; None if nobody did.
        until: when it ends, in seconds since 1970; of nobody's, never.
    """

    nonce: str
    account: Account | None = None
    until: float = float("inf")


class Sessions:
    """Makes and reads the cookies.

    Args:
        secret: what signs them. By default that of the environment, or else one that is forgotten with the process.
        length: for how long one stays signed in.
        accounts: who may be.
        clock: the seconds since 1970.

    Raises:
        ConfigurationError: the secret is too short.
    """

    def __init__(
        self,
        secret: str | None,
        length: timedelta,
        accounts: Accounts | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        key = secret or os.environ.get(SECRET) or secrets.token_hex(32)
        if len(key) < SHORTEST:
            raise ConfigurationError(
                f"The secret that signs the console's cookies must have at least {SHORTEST} characters, or else it "
                f"could be guessed: set {SECRET} to what `openssl rand -hex 32` prints."
            )
        # With one salt for both, each cookie could stand in the other's place.
        self._serializer = URLSafeSerializer(key, salt="close_engine.console")
        self._sayings = URLSafeSerializer(key, salt="close_engine.console.said")
        self._ended: dict[str, float] = {}
        self._key, self._length, self._accounts, self.clock = key.encode(), length, accounts, clock

    def begin(self, account: Account | None = None) -> Session:
        """Begin one, for an account or for nobody yet."""
        until = float("inf") if account is None else self.clock() + self._length.total_seconds()
        return Session(secrets.token_urlsafe(16), account, until)

    def end(self, session: Session) -> None:
        """End a session, in this process: its cookie is worth nothing, wherever a copy of it may be."""
        now = self.clock()
        self._ended = {
            **{nonce: until for nonce, until in self._ended.items() if until > now},
            session.nonce: session.until,
        }

    def written(self, session: Session) -> str:
        """Return the cookie of a session."""
        said: dict[str, Any] = {"nonce": session.nonce}
        if session.account is not None:
            said |= {"name": session.account.name, "hash": self._print(session.account), "until": session.until}
        return str(self._serializer.dumps(said))

    def read(self, cookie: str | None) -> Session | None:
        """Return the session of a cookie; None if it is over, if it is none of ours, or if the account has changed."""
        try:
            said = self._serializer.loads(cookie or "")
        except BadData:
            return None
        if "name" not in said:
            return Session(said["nonce"])
        account = None if self._accounts is None else self._accounts.get(said["name"])
        if account is None or said["hash"] != self._print(account) or self.clock() >= said["until"]:
            return None
        if said["nonce"] in self._ended:
            return None
        return Session(said["nonce"], account, said["until"])

    def token(self, session: Session) -> str:
        """Return what each form of this session has to bring back."""
        return hmac.new(self._key, f"form:{session.nonce}".encode(), hashlib.sha256).hexdigest()

    def _print(self, account: Account) -> str:
        """Return a fingerprint of an account: with another password or role, the sessions of before are over."""
        return hmac.new(self._key, f"account:{account.role}:{account.hash}".encode(), hashlib.sha256).hexdigest()[:16]

    def signed(self, said: Any) -> str:
        """Sign something that the browser keeps until the next page."""
        return str(self._sayings.dumps(said))

    def unsigned(self, cookie: str | None) -> Any:
        """Return what was signed so; None if it was not."""
        try:
            return self._sayings.loads(cookie or "")
        except BadData:
            return None


class Attempts:
    """Counts the failed attempts to sign in, in this process, and says for how long somebody must wait.

    Args:
        clock: seconds that only go forward.
    """

    #: So many may fail within the time: for one name from one address, for one address, and for one name.
    MOST = (5, 20, 50)
    WITHIN = 300.0
    #: So many names and addresses are kept in mind.
    KEPT = 10_000

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self._lock = clock, Lock()
        self._failed: OrderedDict[tuple[str, ...], list[float]] = OrderedDict()

    def wait(self, name: str, address: str) -> float:
        """Return how many seconds they must wait; 0 if they may try now."""
        with self._lock:
            now = self.clock()
            return max(self._wait(key, most, now) for key, most in zip(_keys(name, address), self.MOST, strict=True))

    def failed(self, name: str, address: str) -> None:
        """Note that an attempt failed."""
        with self._lock:
            now = self.clock()
            for key, most in zip(_keys(name, address), self.MOST, strict=True):
                times = [at for at in self._failed.get(key, []) if at > now - self.WITHIN]
                self._failed[key] = [*times, now][-most:]
                self._failed.move_to_end(key)
            while len(self._failed) > self.KEPT:
                self._failed.popitem(last=False)

    def succeeded(self, name: str, address: str) -> None:
        """Forget what this name failed at from this address."""
        with self._lock:
            self._failed.pop(_keys(name, address)[0], None)

    def _wait(self, key: tuple[str, ...], most: int, now: float) -> float:
        times = [at for at in self._failed.get(key, []) if at > now - self.WITHIN]
        return 0.0 if len(times) < most else times[-most] + self.WITHIN - now


def _keys(name: str, address: str) -> tuple[tuple[str, ...], ...]:
    return (name, address), ("", address), (name, "")
