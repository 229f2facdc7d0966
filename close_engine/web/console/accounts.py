"""Who may use the console: names, roles and hashes of passwords, in a file or in the environment.

    $ close-engine user add dana --role approver --file accounts.txt

A line is `name:role:hash`. The hash is Argon2's, so nobody can read a password out of it.

>>> accounts = Accounts.of([account_line("dana", Role.APPROVER, "correct horse battery")])
>>> accounts.check("dana", "correct horse battery").role
<Role.APPROVER: 'approver'>
>>> accounts.check("dana", "wrong") is None
True
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from close_engine.errors import ConfigurationError, InvalidValue
from close_engine.stages import Word

__all__ = ["ACCOUNTS", "ACCOUNTS_FILE", "Account", "Accounts", "Role", "account_line", "add_account"]

#: The environment variable that holds the lines of accounts themselves.
ACCOUNTS = "CLOSE_ENGINE_ACCOUNTS"
#: The one that names a file of them.
ACCOUNTS_FILE = "CLOSE_ENGINE_ACCOUNTS_FILE"

#: A password is at least so long: with limited attempts, that is enough.
SHORTEST = 12

#: Longer ones only cost time.
LONGEST = 1024


class Role(Word):
    """What somebody may do: a viewer looks, an approver also decides and writes to leads, an admin does everything."""

    VIEWER = "viewer"
    APPROVER = "approver"
    ADMIN = "admin"

    def may(self, needed: Role) -> bool:
        """Return whether this role may do what that one may."""
        order = list(Role)
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True)
class Account:
    """Somebody who uses the console.

    Attributes:
        name: str, the actor in the history.
        role: Role.
        hash: str, Argon2's hash of the password; empty if somebody else knows who this is.
    """

    name: str
    role: Role
    hash: str = field(default="", repr=False)


def account_line(name: str, role: Role | str, password: str) -> str:
    """Return the line of an account, for the file or the environment.

    Raises:
        InvalidValue: the name or the role cannot be one, or the password is too short or too long.
    """
    role = _role(role)
    if not _is_name(name):
        raise InvalidValue("name", name, "it must have 1 to 100 characters, no colon, no space at its ends")
    if not SHORTEST <= len(password) <= LONGEST:
        raise InvalidValue("password", "***", f"it must have {SHORTEST} to {LONGEST} characters")
    return f"{name}:{role}:{PasswordHasher().hash(password)}"


def add_account(path: Path, name: str, role: Role | str, password: str) -> None:
    """Add an account to a file, or replace the one of that name. Only the file's owner may read it.

    Raises:
        InvalidValue: as for `account_line`.
        ConfigurationError: the file has a line that is no account.
    """
    line = account_line(name, role, password)
    there = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    Accounts.of(there)
    kept = [each for each in there if each.partition(":")[0].strip() != name]
    beside = path.with_name(f"{path.name}.new")
    # Nobody else may read it, not even for a moment, and a crash leaves the old file.
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write("\n".join([*kept, line]) + "\n")
    beside.replace(path)


class Accounts:
    """The accounts of a console. Those of a file are read again when the file changes.

    Args:
        lines: the accounts, if there is no file.
        path: the file.

    Raises:
        ConfigurationError: a line is no account, or the file cannot be read.
    """

    def __init__(self, lines: Iterable[str] = (), path: Path | None = None) -> None:
        self._path, self._lock = path, Lock()
        self._changed: tuple[int, int] | None = None
        self._known = _read(lines)
        self._now()

    @classmethod
    def of(cls, lines: Iterable[str]) -> Accounts:
        """Take the accounts of these lines."""
        return cls(lines)

    @classmethod
    def in_file(cls, path: Path | str) -> Accounts:
        """Take the accounts of a file, now and whenever it changes."""
        return cls(path=Path(path))

    @classmethod
    def of_environment(cls) -> Accounts | None:
        """Take those that CLOSE_ENGINE_ACCOUNTS_FILE or CLOSE_ENGINE_ACCOUNTS names; None if neither is set."""
        if path := os.environ.get(ACCOUNTS_FILE):
            return cls.in_file(path)
        lines = os.environ.get(ACCOUNTS, "").splitlines()
        return cls.of(lines) if any(line.strip() for line in lines) else None

    def __getitem__(self, name: str) -> Account:
        return self._now()[name]

    def get(self, name: str) -> Account | None:
        """Return the account of this name as it is now; None if there is none."""
        return self._now().get(name)

    def check(self, name: str, password: str) -> Account | None:
        """Return the account if name and password are right. It takes as long for a name that nobody has."""
        account = self.get(name)
        try:
            PasswordHasher().verify(account.hash if account else _nobodys(), password[:LONGEST])
        except (VerificationError, InvalidHashError):
            return None
        return account

    def _now(self) -> Mapping[str, Account]:
        if self._path is None:
            return self._known
        with self._lock:
            try:
                status = self._path.stat()
                changed = (status.st_mtime_ns, status.st_ino)
                if changed != self._changed:
                    self._known = _read(self._path.read_text(encoding="utf-8").splitlines())
                    self._changed = changed
            except OSError as error:
                raise ConfigurationError(
                    f"The accounts in {self._path} cannot be read ({error.strerror}): make the file with close-engine "
                    "user add."
                ) from None
            return self._known


@cache
def _nobodys() -> str:
    return PasswordHasher().hash("nobody has this password")


def _read(lines: Iterable[str]) -> dict[str, Account]:
    accounts: dict[str, Account] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, rest = line.strip().partition(":")
        role, _, hash = rest.partition(":")
        if not _is_name(name) or role not in set(Role) or not hash.startswith("$argon2"):
            # The line itself may hold what is secret.
            raise ConfigurationError(
                f"Line {number} of the accounts is no name:role:hash with a role of {', '.join(Role)} and a hash of "
                "Argon2: make it with close-engine user add."
            )
        accounts[name] = Account(name, Role(role), hash)
    return accounts


def _is_name(name: str) -> bool:
    return 0 < len(name) <= 100 and name.isprintable() and ":" not in name and name == name.strip() and name[0] != "#"


def _role(word: Role | str) -> Role:
    try:
        return Role(word)
    except ValueError:
        raise InvalidValue("role", word, f"it must be one of {', '.join(Role)}") from None
