"""What a run needs from Debian: it is installed where that is missing, on Debian and as root, and nowhere else.

    require(["postgresql", "pgbouncer"], "make cluster")

None of the servers that come with the packages is started, and Debian's PostgreSQL makes no cluster of its own: a run
makes and removes its own. What was installed stays.

    python3 -m tests.debian "make cluster"

says whether such a run is possible here at all, before anything else is installed for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["missing", "postgresql", "require"]

#: Debian asks this program before a package starts a server. 101 means no.
_POLICY = Path("/usr/sbin/policy-rc.d")

#: Debian's PostgreSQL reads this before it makes a cluster.
_NO_CLUSTER = Path("/etc/postgresql-common/createcluster.d/close-engine.conf")


def require(packages: Sequence[str], run: str) -> None:
    """Have these packages installed. Where that cannot be, say at once what is lacking, and exit with status 1.

    Args:
        packages: their names in Debian.
        run: what needs them, as one types it: `make cluster`.
    """
    if not sys.platform.startswith("linux") or not shutil.which("apt-get") or not shutil.which("dpkg-query"):
        sys.exit(f"`{run}` needs Debian, because it installs servers with apt-get.")
    if os.geteuid() != 0:
        sys.exit(f"`{run}` must run as root, because it installs Debian's packages and makes hosts on a network.")
    lacking = missing(packages)
    if not lacking:
        return
    print(f"Installing {', '.join(lacking)}, which Debian has and this machine lacks ...", flush=True)
    with _nothing_starts():
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *lacking]):
            done = subprocess.run(
                ["apt-get", "-q", "-o", "Acquire::Retries=3", *command],
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
    if lacking := missing(packages):
        sys.exit(f"{done.stdout}\n`{run}` lacks {', '.join(lacking)}, and apt-get could not install it (see above).")


def missing(packages: Sequence[str]) -> list[str]:
    """Return those of the packages that are not installed."""
    asked = ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *packages]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.splitlines() if packages else []
    return [package for package in packages if f"{package} installed" not in said]


def postgresql() -> Path:
    """Return the directory of the newest installed PostgreSQL's programs: Debian has them in no PATH."""
    return max(Path("/usr/lib/postgresql").glob("*/bin/"), key=lambda place: int(place.parent.name))


@contextmanager
def _nothing_starts() -> Iterator[None]:
    """Meanwhile, no package starts a server or makes a cluster. What somebody else has decided on that stays."""
    texts = {_POLICY: "#!/bin/sh\nexit 101\n", _NO_CLUSTER: "create_main_cluster = false\n"}
    written = [path for path in texts if not path.exists()]
    try:
        for path in written:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(texts[path])
            path.chmod(0o755)
        yield
    finally:
        for path in written:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    require((), sys.argv[1])
