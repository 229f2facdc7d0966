"""Hosts on one machine: each is a network namespace with an address of its own, and they share a switch.

    with Network("db1", "db2", "app") as network:
        network["app"].run(["psql", "postgresql://db1/crm", "-c", "SELECT 1"])
        network["db1"].cut()
        network["db1"].kill()

The switch is in a namespace, too, so the machine's own network has no route to any of them, and they have none out of
there. They share the machine's files, so a Unix socket reaches over. A host knows the others by name.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Host", "Network"]

#: The names of a run's namespaces begin with this and the id of its process.
_OURS = "close-engine-"
#: What `ip netns exec` shows the processes of a namespace in place of files in /etc.
_FILES = Path("/etc/netns")


class Host:
    """A host with one address. Whatever runs on it was started by `run` or `popen`.

    Attributes:
        name: what the other hosts call it.
        address: its IPv4 address.
        namespace: what `ip netns` calls it.
    """

    def __init__(self, name: str, address: str, prefix: str) -> None:
        self.name = name
        self.address = address
        self.namespace = prefix + name
        self._switch = prefix + "switch"

    def popen(self, command: Sequence[str | Path], *, user: str | None = None, **options: Any) -> subprocess.Popen[Any]:
        """Start a program. Its process id is the one of the program itself.

        Args:
            command: the program and its arguments.
            user: whose rights it has; the default is root.
            options: as for `subprocess.Popen`.
        """
        # In a session of its own, Ctrl-C ends the run and not all of them at once.
        return subprocess.Popen(self._command(command, user), start_new_session=True, **options)

    def run(
        self, command: Sequence[str | Path], *, user: str | None = None, timeout: float = 60, **options: Any
    ) -> str:
        """Run a program until its end, and return what it prints.

        Raises:
            RuntimeError: it failed, with what it said.
        """
        done = subprocess.run(
            self._command(command, user),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **options,
        )
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise RuntimeError(f"On {self.name}, {' '.join(map(str, command))} ended with {done.returncode}: {said}")
        return str(done.stdout)

    def cut(self) -> None:
        """Take its cable out: nobody is told, packets just get lost. What runs on it goes on."""
        _ip("-n", self._switch, "link", "set", self.name, "down")

    def heal(self) -> None:
        """Put its cable back in."""
        _ip("-n", self._switch, "link", "set", self.name, "up")

    def processes(self) -> list[int]:
        """The ids of all processes on it."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """Kill all that runs on it with SIGKILL, as a power failure does; the host itself stays."""
        _kill(self.namespace)

    def _command(self, command: Sequence[str | Path], user: str | None) -> list[str]:
        rights = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"] if user else []
        return ["ip", "netns", "exec", self.namespace, *rights, *map(str, command)]


class Network:
    """Some hosts on a switch, made for the block, and removed after it with all that runs on them.

    What a run that was killed has left is removed first.

    Args:
        names: of the hosts.
    """

    def __init__(self, *names: str) -> None:
        self._prefix = f"{_OURS}{os.getpid()}-"
        self.hosts = {name: Host(name, f"10.77.0.{n}", self._prefix) for n, name in enumerate(names, start=1)}

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __enter__(self) -> Network:
        remove_leftovers()
        try:
            self._make()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for namespace in _namespaces():
            if namespace.startswith(self._prefix):
                _remove(namespace)

    def _make(self) -> None:
        switch = self._prefix + "switch"
        try:
            _ip("netns", "add", switch)
        except (OSError, RuntimeError) as error:
            sys.exit(f"This machine makes no network namespaces ({error}); a container needs --privileged for them.")
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        known = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in self.hosts.values())
        for host in self.hosts.values():
            files = _FILES / host.namespace
            files.mkdir(parents=True)
            (files / "hosts").write_text(known)
            (files / "resolv.conf").write_text("# There is nobody to ask: the names are in /etc/hosts.\n")
            _ip("netns", "add", host.namespace)
            _ip("-n", switch, "link", "add", host.name, "type", "veth", "peer", "eth0", "netns", host.namespace)
            _ip("-n", switch, "link", "set", host.name, "master", "bridge", "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", device, "up")


def remove_leftovers() -> None:
    """Remove the hosts of runs whose process is gone, and nobody else's."""
    for namespace in _namespaces():
        found = re.match(rf"{_OURS}(\d+)-", namespace)
        if found and not Path("/proc", found[1]).exists():
            _remove(namespace)


def _namespaces() -> list[str]:
    """All that there are, and those of which only the files are left."""
    made = [line.split()[0] for line in _ip("netns", "list").splitlines() if line]
    return sorted({*made, *(path.name for path in _FILES.glob(f"{_OURS}*"))})


def _remove(namespace: str) -> None:
    with suppress(RuntimeError):  # then only its files were left
        _kill(namespace)
        _ip("netns", "delete", namespace)
    shutil.rmtree(_FILES / namespace, ignore_errors=True)
    with suppress(OSError):  # it is there for others, too
        _FILES.rmdir()


def _kill(namespace: str) -> None:
    end = time.monotonic() + 30
    while pids := _ip("netns", "pids", namespace).split():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if time.monotonic() > end:
            raise RuntimeError(f"The processes {', '.join(pids)} on {namespace} do not end.")
        time.sleep(0.01)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
