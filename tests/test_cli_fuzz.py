"""Whatever is written on the command line or stands in the tables: no traceback, and nothing that tricks a terminal.

The commands and their options are found in the application itself, so a new one is tried as soon as it is there.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peewee
import pytest
import typer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    EntryPoint,
    Event,
    OutboxMessage,
    PendingAction,
    Stage,
    outbox,
    submit,
)
from close_engine.cli import app as cli
from close_engine.database.fields import EnumField, JsonField, TextField
from close_engine.machine import TRIGGERS
from close_engine.models import BaseModel
from close_engine.printable import log_value, printable
from close_engine.testing import bring_to, new_lead
from tests.command_line import Result, run
from tests.foreign import ForeignWriter, guards_off
from tests.prose import ROOT as FOLDER

FIXED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=15,
)

#: What moves the cursor, forges lines, turns the direction of writing or shows nothing; what no database holds, what
#: is too long; what quotes, formats and markup are made of.
TEXTS = [
    *("", " ", "-", "--", "\n", "\r\x1b[A", "\x1b[2J", "\x1b]0;owned\x07", "\x9b2J", "\x7f", "a\nINFO sent worker=w1"),
    *(
        "\u202etxt.exe",
        "\u2066\u2069",
        "\u200e\u200f",
        "a\u200bb",
        "\ufeff",
        "\u2028",
        "\u3164",
        "\u034f",
        "\U000e0041",
    ),
    *("\x00", "\ud800", "\udc80", "x" * 70_000, "\U0001f382", "e\u0301", "\ue000"),
    *("%", "%s%(x)n{0}{x}", "'", '"', "''; DROP TABLE leads; --", "$body$", "[bold]x[/]", ":moon:", "\\", "\\n", "$1"),
    *("null", "{}", "[]", '{"a": "\\ud800\\u0000"}', '{"a": NaN}', '{"a": 1e999}', '{"a": ' + "9" * 5000 + "}"),
    *('{"a":' * 2000 + "1" + "}" * 2000, "[" * 100_000, '{"paymentUrl": "\\u001b[2J", "a": 1, "a": 2}'),
    *("tests.senders:send", "tests.senders:nobody", ".:x", "os:path", "sys:exit", "..", ":", "a:b:c", "\x00:\x00"),
    *(
        "UTC",
        "../../etc/passwd",
        "25:00",
        "3h",
        "2026-01-31T08:00Z",
        "0001-01-01T00:00+14:00",
        "9999-12-31T23:59-14:00",
    ),
]
NUMBERS = [
    *(
        "0",
        "1",
        "3",
        "-1",
        "100",
        str(2**31),
        str(2**63),
        str(2**64),
        "1e6",
        "1e8",
        "1e12",
        "1e308",
        "-1e400",
        "nan",
        "inf",
        "0x1",
    ),
    *("٣", "1_0", " 1", "1.5", "9" * 5000, "365d", "48h", "99999d"),
]

#: What keeps a command from running on, whatever else it is given.
ENDING: dict[tuple[str, ...], list[str]] = {("worker",): ["--until-empty"], ("demo",): ["--leads=0"]}


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command of the application, with its name or names."""
    if path and (not hasattr(command, "commands") or command.invoke_without_command):
        yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


ROOT = typer.main.get_command(cli.app)
COMMANDS = dict(commands(ROOT))
SHARED = [option for option in ROOT.params if not option.expose_value and option.name != "database"]


#: The words that some options take, and what others are given.
WORDS = [*Stage, *ActionType, *TRIGGERS, "lead", "us", "a human", *list(Event)[1:]]


def values(parameter: Any, known: list[str]) -> st.SearchStrategy[str]:
    """What a parameter may be given: what may fit it, and what nobody thought of."""
    free = st.one_of(st.sampled_from(TEXTS), st.text(max_size=20))
    if parameter.metavar in ("AGE", "DAYS", "HOURS", "MESSAGE", "N", "NUMBER", "PORT", "SECONDS", "TIME"):
        return st.one_of(st.sampled_from(NUMBERS), st.sampled_from(NUMBERS), free)
    return st.one_of(st.sampled_from(known), st.sampled_from(WORDS).map(str), free, free)


def arguments(parameters: list[Any], known: list[str], ending: Sequence[str] = ()) -> st.SearchStrategy[list[str]]:
    """Each option of a command or not, in any order, and then its arguments."""
    options = [each for each in parameters if each.param_type_name == "option" and each.name not in ("help", "version")]
    required = [each for each in options if each.required]
    optional = st.lists(st.sampled_from([each for each in options if not each.required] or [None]), unique_by=id)
    places = [values(each, known) for each in parameters if each.param_type_name == "argument"]

    @st.composite
    def line(draw: st.DrawFn) -> list[str]:
        chosen = [each for each in (*draw(optional), *required) if each is not None]
        given = [each.opts[0] if each.is_flag else f"{each.opts[0]}={draw(values(each, known))}" for each in chosen]
        rest = [draw(place) for place in places][: draw(st.sampled_from([len(places), len(places), 0]))]
        return [*given, *ending, "--", *rest] if rest else [*given, *ending]

    return line()


def harmless(result: Result) -> bool:
    """Whether a run ended as it should, and printed nothing but lines of printable characters."""
    shown = result.out + result.err
    assert printable(shown.replace("\n", "")) == shown.replace("\n", "")
    assert "Traceback" not in shown
    assert "bug in close-engine" not in shown, result.err
    assert result.code in (0, 1, 2)
    assert result.code == 0 or result.err
    assert result.code != 1 or re.search(r"\.\n$|\n  - .*\n$", result.err), result.err
    return True


@pytest.fixture(params=["sqlite-file", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    """Only these two: a database in memory ends with its process, so a command cannot open it."""
    return str(request.param)


@pytest.fixture(autouse=True)
def made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Typer makes the whole application again for every run, which takes longer than the run."""
    monkeypatch.setattr(typer.main, "get_command", lambda _: ROOT)


@pytest.fixture
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is made is made there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def known(database: Any, close_engine_clock: Any, in_a_directory_of_its_own: None) -> list[str]:
    """The ids of some rows of each kind, in a database that has them."""
    close_engine_clock.let_go()
    close_engine.subscribe("build_site", stages=[Stage.BUILDING])
    lead = new_lead(id="lead-1", phone="+15550100", autonomy_level=AutonomyLevel.MANUAL)
    conversation = bring_to(close_engine.open_conversation(lead, EntryPoint.SMS_REPLY), Stage.PREVIEW_SENT)
    close_engine.receive(lead, "SM1", "Hello?")
    conversation.reload()
    action = submit(conversation, ActionType.SEND_MESSAGE, "Hi!")
    outbox.enqueue(conversation, "build_site")
    for message in outbox.claim(topics=["build_site"]):
        message.give_up("no")
    assert isinstance(action, PendingAction)
    return ["lead-1", conversation.id, action.id, str(OutboxMessage.get().id), "+15550100", "build_site", "stall"]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_whatever_is_written_on_the_command_line(path: tuple[str, ...], known: list[str], database_url: str) -> None:
    where = [] if path == ("graph",) else [f"--database={database_url}"]

    @FIXED
    @given(
        line=arguments(COMMANDS[path].params, known, ENDING.get(path, ())),
        answer=st.sampled_from(["", "y\n", "y", "\udc80\n", "\x00\n"]),
    )
    def try_it(line: list[str], answer: str) -> None:
        assert harmless(run(*path, *where, *line, input=answer))
        if path == ("downgrade",):
            close_engine.migrate()

    try_it()


@FIXED
@given(line=arguments(SHARED, ["leads", "users"]), path=st.sampled_from([("status",), ("migrate", "--sql", "--all")]))
def test_whatever_the_tables_are_called(
    line: list[str], path: tuple[str, ...], known: list[str], database_url: str
) -> None:
    assert harmless(run(*path, f"--database={database_url}", *line))


URLS = ["sqlite:///{}.db", "{}", "postgresql://{}:{}@{place}/x", "postgresql+pool://{place}/{}", "sqlite+pool:///{}?{}"]
URLS += ["postgresql://x@{place}/x?schema={}", "postgresql://x@{place}/x?{}", "postgresql://{place}{}"]


@FIXED
@example(form=URLS[0], text="\x00")
@example(form=URLS[0], text="\ud800")
@example(form=URLS[0], text="x" * 70_000)
@given(form=st.sampled_from(URLS), text=st.one_of(st.sampled_from(TEXTS), st.text(max_size=20)))
@pytest.mark.parametrize("command", [("status",), ("migrate", "--standalone")], ids=" ".join)
@pytest.mark.usefixtures("in_a_directory_of_its_own")
def test_whatever_the_url_is(form: str, text: str, command: tuple[str, ...], nobody_listens: str) -> None:
    url = form.format(*[text.replace("/", "")] * 2, place=nobody_listens)
    assert harmless(run(*command, f"--database={url}"))


# -- what stands in the tables ---------------------------------------------------------------------------------------

#: Of each kind one, and what could be taken for a line or a value of a log.
HOSTILE = " \x1b[2J\x1b]0;owned\x07\x9b\u202etxt\u2066\u200b\u3164\r\nmine: sent worker=w1 provider_id=SM9\u2028 [red]"


def models(model: type[BaseModel] = BaseModel) -> Iterator[type[BaseModel]]:
    """Yield every model of the library that has a table."""
    for below in model.__subclasses__():
        if below.__module__.partition(".")[0] == "close_engine":
            yield below
        yield from models(below)


COLUMNS = [(model, field) for model in models() for field in model._meta.sorted_fields]
FREE = [
    (model, field)
    for model, field in COLUMNS
    if isinstance(field, (TextField, JsonField, peewee.TextField)) and field.name != "kind"  # of it, rows are chosen
]
ENUMS = [each for each in COLUMNS if isinstance(each[1], EnumField)]


def spoiled(foreign: ForeignWriter, columns: Sequence[tuple[type[BaseModel], Any]]) -> None:
    """Write hostile text behind what is in these columns, as if it had been there before the guards."""
    if not foreign.is_postgres:
        foreign.run("PRAGMA foreign_keys = off")
    for model, field in columns:
        table = ".".join(filter(None, (model._meta.schema, model._meta.table_name)))
        with guards_off(foreign, table):
            value = json.dumps({HOSTILE: [HOSTILE]}) if isinstance(field, JsonField) else HOSTILE
            old = f"coalesce({field.column_name}, CAST({model._meta.primary_key.column_name} AS text)) || "
            before = "" if isinstance(field, JsonField) else old
            foreign.run(f'UPDATE {table} SET "{field.column_name}" = {before}%s', value)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the library logs, as somebody's own set-up shows it."""
    shown = io.StringIO()
    handler = logging.StreamHandler(shown)
    handler.setFormatter(logging.Formatter("mine: %(message)s"))
    logging.getLogger("close_engine").addHandler(handler)
    level = logging.getLogger("close_engine").level
    logging.getLogger("close_engine").setLevel(logging.INFO)
    yield shown
    logging.getLogger("close_engine").removeHandler(handler)
    logging.getLogger("close_engine").setLevel(level)


def shown_everywhere(known: list[str], url: str, log: io.StringIO) -> str:
    """Run every command that shows rows or logs them, and return what they printed and logged."""
    alone = [
        path
        for path, command in COMMANDS.items()
        if path not in {("graph",), ("demo",), ("downgrade",)} and not any(each.required for each in command.params)
    ]
    by = ("--by", "dana")
    told = [("show", known[1]), ("show", known[0]), ("worker", "--print"), ("subscriptions", "remove", "x")]
    told += [("worker", "--until-empty", "--sender", f"tests.senders:{name}") for name in ("fail", "return_a_wrong_id")]
    told += [("approve", "--all", "--yes", *by), ("outbox", "requeue", "--all"), ("forget", known[0], "--yes")]
    told += [("fire", known[1], "close_lost", "--reason", HOSTILE), ("opt-out", known[0]), ("opt-in", known[0])]
    shown = []
    for command in (*alone, *told):
        result = run(*command, f"--database={url}")
        assert harmless(result), command
        shown.append(result.out)
    lines = log.getvalue().split("\n")
    assert lines.pop() == ""
    assert [line for line in lines if printable(line) != line or not line.startswith(("mine: ", "    "))] == []
    assert not any(line.startswith("mine: sent worker=w1") for line in lines)
    return "\n".join(shown)


def test_g7_whatever_stands_in_the_tables_tricks_no_terminal_and_no_log(
    known: list[str], foreign: ForeignWriter, database_url: str, log: io.StringIO
) -> None:
    """G7: every text of every table, at once."""
    spoiled(foreign, FREE)
    ids = [f"{each}{HOSTILE}" for each in known]

    shown = shown_everywhere(ids, database_url, log)

    assert printable(" ".join(f"Hello?{HOSTILE}".splitlines())) in shown
    assert shown.count(printable(HOSTILE)) > 20
    assert f"topic={log_value(f'build_site{HOSTILE}')} " in log.getvalue()


def test_g7_nor_do_words_that_nobody_knows(
    known: list[str], foreign: ForeignWriter, database_url: str, log: io.StringIO
) -> None:
    """G7: rows that cannot be read are named."""
    spoiled(foreign, ENUMS)

    shown_everywhere(known, database_url, log)


def test_every_logger_of_the_library_is_printable() -> None:
    for path in (FOLDER / "close_engine").rglob("*.py"):
        assert "getLogger(__name__)" not in path.read_text(), f"{path}: use close_engine.printable.get_logger"
