"""Prisma as a writer: its generated clients at work on a database, as the CRM's code is.

The clients are generated from the models in docs/prisma.md. For each version, one process of Node runs the TypeScript
that a test gives it (`tests/prisma/clients/writer.ts`). `make writer` installs and generates them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests import judge
from tests.prose import PRISMA, block, blocks

PLACE = judge.PLACE / "clients"
VERSIONS = ("6.19.3", "7.10.0")


class Refused(Exception):
    """Prisma Client raised an error.

    Attributes:
        name: the error's class in TypeScript.
        code: Prisma's code, such as `P2002`; None if it has none.
        sentence: our sentence, as the TypeScript in docs/prisma.md finds it in the error; empty if there is none.
    """

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.name: str = error["name"]
        self.code: str | None = error["code"]
        self.sentence: str = error["sentence"]


class Client:
    """A process that runs one version of Prisma Client."""

    def __init__(self, version: str, node: subprocess.Popen[str]) -> None:
        self.version = version
        self._node = node

    def on(self, url: str) -> Writer:
        """Return the client of a database."""
        return Writer(self, url)

    def ask(self, question: dict[str, Any]) -> Any:
        answer = judge.ask(self._node, question)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["answer"]


class Writer:
    """Prisma Client on one database."""

    def __init__(self, client: Client, url: str) -> None:
        self.version = client.version
        self.url = url
        self._client = client

    def run(self, code: str, /, *, clock: timedelta = timedelta(0), **given: Any) -> Any:
        """Run the body of an async function, which knows `prisma`, `Prisma`, what the page exports and what is given.

        Args:
            code: TypeScript without types.
            clock: how far ahead the client's clock is.
            given: values by name.

        Raises:
            Refused: the code threw.
        """
        ahead = clock // timedelta(milliseconds=1)
        return self._client.ask({"url": self.url, "code": code, "given": given, "ahead": ahead})

    def close(self) -> None:
        """Close the connections."""
        self._client.ask({"url": self.url})


def schema_for(version: str) -> str:
    """Return the CRM's Prisma schema with the models of docs/prisma.md, as this version wants it."""
    alone = (judge.PLACE / "before.prisma").read_text()
    models = judge.with_models(alone, block(PRISMA, "prisma", "model CloseEngineConversation"))
    return judge.schema_for(version, models).replace("../generated-before", "./generated")


def page() -> str:
    """Return the TypeScript in docs/prisma.md that exports something."""
    return "\n".join(block.text for block in blocks(PRISMA) if block.language == "ts" and "export " in block.text)


def is_generated(version: str) -> bool:
    """Say whether this version's client is there, and was generated from the models as the page shows them now."""
    schema, client = PLACE / version / "schema.prisma", PLACE / version / "generated" / "client.ts"
    there = schema.exists() and client.exists() and client.stat().st_mtime >= schema.stat().st_mtime
    return there and schema.read_text() == schema_for(version)


def generate(node: Path, version: str) -> None:
    """Run this version's `prisma generate`, without a network: a client of WebAssembly needs no engine."""
    place = PLACE / version
    (place / "schema.prisma").write_text(schema_for(version))
    installed = place if (place / "node_modules" / "prisma").exists() else PLACE
    command = [str(node), str(installed / "node_modules" / "prisma" / "build" / "index.js"), "generate"]
    with tempfile.NamedTemporaryFile() as nothing:
        os.chmod(nothing.name, 0o700)
        engines = dict.fromkeys(("PRISMA_SCHEMA_ENGINE_BINARY", "PRISMA_QUERY_ENGINE_LIBRARY"), nothing.name)
        environment = {**os.environ, **engines, "CHECKPOINT_DISABLE": "1"}
        options = ["--schema", "schema.prisma", "--no-hints"]
        done = subprocess.run(
            [*command, *options], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)


def what_is_missing() -> str:
    """Say in a sentence why Prisma cannot write; empty if it can."""
    if not judge.find_node():
        return f"Prisma cannot write: there is no Node {judge.OLDEST_NODE} with npm. `make writer` gets one from PyPI."
    if not judge.is_installed(PLACE):
        return "Prisma cannot write: its clients are not installed. `make writer` installs them."
    if not all(map(is_generated, VERSIONS)):
        return "Prisma cannot write: its clients are not those of docs/prisma.md. `make writer` generates them."
    return ""


@contextmanager
def client(version: str, place: Path) -> Iterator[Client]:
    """Yield a version of Prisma Client. Its process ends with the block, and reads the page's code from `place`."""
    missing = what_is_missing()
    assert not missing, missing
    code = place / "page.ts"
    code.write_text(page())
    command = [str(judge.find_node()), "--import", "tsx", "writer.ts", version, str(code)]
    with subprocess.Popen(command, cwd=PLACE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Client(version, process)


def main() -> None:
    """Install and generate the clients, unless they are there."""
    node = judge.find_node()
    if node:
        judge.install(node, PLACE, "--ignore-scripts")
        for version in VERSIONS:
            if judge.is_installed(PLACE) and not is_generated(version):
                generate(node, version)
    sys.exit(what_is_missing() or None)


if __name__ == "__main__":
    main()
