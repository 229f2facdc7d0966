"""The documentation is tested: its examples run, and its lists are complete.

The examples of a page run in order, on a fresh database: blocks of Python, followed by a block of text if they print
something, and console sessions. A block that must not run is marked with another language.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path
from typing import Any

import pytest
import typer

import close_engine
from close_engine import errors, machine
from close_engine.cli import main
from close_engine.cli.app import app
from close_engine.database.binding import current
from tests.prose import PAGES, README, ROOT, block, blocks, section

PACKAGE = ROOT / "close_engine"


def name_of(page: Path) -> str:
    return page.name


WITH_EXAMPLES = [page for page in PAGES if {"python", "console"} & {block.language for block in blocks(page)}]


@pytest.fixture
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory with the default database in it, and a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", f"sqlite:///{tmp_path}/close_engine.db")
    monkeypatch.setenv("COLUMNS", "200")
    # A page may begin where a reader has long connected. What the test before has bound may be gone.
    close_engine.connect(f"sqlite:///{tmp_path}/connected.db")
    close_engine.migrate(standalone=True)
    current().database.close()
    yield
    current().database.close()


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=name_of)
def test_examples_run_and_print_what_stands_there(
    page: Path, empty_place: None, capsys: pytest.CaptureFixture[str]
) -> None:
    namespace: dict[str, object] = {"__name__": page.stem}
    printed = ""
    for example in blocks(page):
        if example.language == "python":
            # Put as many lines before it as on the page, so that a traceback shows the page's line.
            exec(compile("\n" * (example.line - 1) + example.text, str(page), "exec"), namespace)
            printed = capsys.readouterr().out
        elif example.language == "text" and printed:
            assert_printed(page, example.line, example.text, printed)
            printed = ""
        elif example.language == "console":
            for command, output in re.findall(r"^\$ close-engine (.+)\n((?:(?!\$ ).*\n)*)", example.text, re.MULTILINE):
                with pytest.raises(SystemExit) as ended:
                    main(shlex.split(command))
                assert not ended.value.code, command
                assert_printed(page, example.line, output, capsys.readouterr().out)


def assert_printed(page: Path, line: int, shown: str, printed: str) -> None:
    """Compare the page with what was printed; `...` matches anything."""
    matches = OutputChecker().check_output(shown, printed, ELLIPSIS | NORMALIZE_WHITESPACE)
    assert matches, f"{page.name}, line {line}, shows\n{shown}but this was printed:\n{printed}"


def test_the_readme_is_short_and_so_is_its_example() -> None:
    example = block(README, "python")

    assert len(README.read_text().split()) <= 500
    assert len(example.splitlines()) <= 20


def test_the_readme_names_every_guarantee_of_the_first_page() -> None:
    guarantees = section(ROOT / "docs/index.md", "What it guarantees")

    assert len(re.findall(r"^\d+\. \*\*", guarantees, re.MULTILINE)) == 10
    assert len(re.findall(r"^\d+\. ", section(README, "What it guarantees"), re.MULTILINE)) == 10


def test_the_guides_table_is_the_machines() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (.+?) \| (.+?) \|", section(ROOT / "docs/guide.md", "Stages and triggers"), re.MULTILINE
    )
    shown = {trigger: (sources, dest) for trigger, sources, dest in rows}

    expected = {}
    for transition in machine.TRANSITIONS:
        sources = [str(stage) for stage in transition.sources]
        active = [str(stage) for stage in close_engine.ACTIVE_STAGES]
        if set(active) <= set(sources):
            sources = ["any active", *sources[len(active) :]]
        dest = "where things stand" if transition.dest is None else str(transition.dest)
        expected[transition.trigger] = (", ".join(sources), dest)
    assert shown == expected


def test_the_reference_has_every_public_name_as_users_import_it() -> None:
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE)

    for entry in shown:
        module, _, name = entry.rpartition(".")
        assert name in importlib.import_module(module).__all__, entry
        found = getattr(importlib.import_module(module), name)
        assert module == "close_engine" or getattr(close_engine, name, None) is not found, f"{entry} has a shorter name"
    assert {f"close_engine.{name}" for name in close_engine.__all__} - set(shown) == set()
    assert sorted(shown) == sorted(set(shown))


def test_every_error_is_in_the_guide() -> None:
    guide = section(ROOT / "docs/guide.md", "Errors")

    assert [name for name in errors.__all__ if f"`{name}`" not in guide] == []
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    ours = {name for name, value in classes.items() if issubclass(value, close_engine.CloseEngineError)}
    assert ours == set(errors.__all__)


def test_imports_run_downward_as_the_design_lists_the_files() -> None:
    listed = section(ROOT / "docs/design.md", "Files").partition("```text\n")[2].partition("```")[0]
    order = [name for line in listed.splitlines() for name in re.split(" {2,}|: ", line)[0].split(", ")]
    files = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}

    assert sorted(order) == sorted(name.removesuffix("/__init__") for name in files if name != "__init__")
    upward = []
    for position, name in enumerate(order):
        path = files.get(name) or files[f"{name}/__init__"]
        upward += [(name, other) for other in imported_by(path) if other not in order[:position]]
    assert upward == []


def imported_by(path: Path) -> set[str]:
    """Return the files and directories of the package that a file imports when it runs."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "close_engine":
            inside = "/".join((node.module or "").split(".")[1:])
            names = [f"{inside}/{alias.name}".lstrip("/") for alias in node.names]
            found |= {name if is_in_the_package(name) else inside for name in names}
    return found


def is_in_the_package(name: str) -> bool:
    return (PACKAGE / f"{name}.py").is_file() or (PACKAGE / name).is_dir()


CLI_PAGE = ROOT / "docs/cli.md"
GROUP: Any = typer.main.get_command(app)
COMMANDS = GROUP.commands
BELOW = [f"{name} {below}" for name, command in COMMANDS.items() for below in getattr(command, "commands", ())]


def options_of(command: Any) -> list[str]:
    commands = [command, *getattr(command, "commands", {}).values()] if command is not GROUP else [command]
    parameters = [parameter for one in commands for parameter in one.params]
    return [word for parameter in parameters for word in parameter.opts if word.startswith("-")]


@pytest.mark.parametrize("name", [*COMMANDS, *BELOW])
def test_every_command_is_documented_with_its_options_and_an_example(name: str) -> None:
    command = name.partition(" ")[0]
    text = section(CLI_PAGE, command)

    assert [option for option in options_of(COMMANDS[command]) if f"`{option}" not in text] == []
    assert re.search(rf"^\$ close-engine {name}\b", text, re.MULTILINE), "an example is missing"


def test_the_options_of_every_command_are_documented() -> None:
    text = section(CLI_PAGE, "Options of every command")

    assert [option for option in options_of(GROUP) if f"`{option}" not in text] == []


def test_nothing_is_documented_that_is_not_a_command() -> None:
    sections = re.findall(r"^## (.+)$", CLI_PAGE.read_text(), re.MULTILINE)
    used = re.findall(r"(?:^|`|\$ )close-engine ([a-z][a-z-]*)", "\n".join(map(Path.read_text, PAGES)), re.MULTILINE)

    assert set(sections) == {"Options of every command", *COMMANDS}
    assert set(used) <= set(COMMANDS)


def test_the_first_page_leads_to_every_other() -> None:
    first = ROOT / "docs/index.md"
    linked = set(re.findall(r"\]\(([\w-]+\.md)", first.read_text()))

    assert {page.name for page in first.parent.glob("*.md")} - linked == {first.name}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text())

    for path, anchor in links:
        target = (page.parent / path) if path else page
        assert target.exists(), path
        if not anchor:  # it may be a picture
            continue
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
        assert anchor in anchors, anchor
