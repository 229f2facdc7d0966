"""The prose is guarded: its examples run, and what it lists is all there is.

A block of Python in README.md or docs/ runs, after the blocks above it on its page, on a fresh database. A block of
text directly below it is what it prints (`...` stands for anything). What is not to run stands in another language.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from doctest import ELLIPSIS, OutputChecker
from pathlib import Path

import pytest
import typer

import close_engine
from close_engine import cli, errors, machine
from close_engine.backend import current
from tests.prose import PAGES, README, ROOT, block, blocks, section


def name_of(page: Path) -> str:
    return page.name


WITH_EXAMPLES = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.fixture
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory, and a database in it for whoever names none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", f"sqlite:///{tmp_path}/close_engine.db")
    yield
    current().database.close()


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=name_of)
def test_examples_run_and_print_what_stands_below_them(
    page: Path, empty_place: None, capsys: pytest.CaptureFixture[str]
) -> None:
    namespace: dict[str, object] = {"__name__": page.stem}
    printed = None
    for example in blocks(page):
        if example.language == "python":
            # With as many lines before it as on the page, so that a traceback points there.
            exec(compile("\n" * (example.line - 1) + example.text, str(page), "exec"), namespace)
            printed = capsys.readouterr().out
        elif example.language == "text" and printed:
            assert OutputChecker().check_output(example.text, printed, ELLIPSIS), f"line {example.line}: {printed}"
            printed = None


def test_the_readme_has_an_example_of_twenty_lines() -> None:
    lines = block(README, "python").splitlines()

    assert len(lines) <= 20


def test_the_diagram_is_the_machines() -> None:
    shown = block(README, "mermaid")

    assert shown == machine.mermaid() + "\n", "put what `close-engine graph` prints into README.md"


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
        dest = "the stage it stalled in" if transition.dest is None else str(transition.dest)
        expected[transition.trigger] = (", ".join(sources), dest)
    assert shown == expected


def test_every_public_name_is_in_the_reference() -> None:
    shown = re.findall(r"^::: close_engine\.\w+\.(\w+)$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE)

    assert set(close_engine.__all__) - {"__version__"} - set(shown) == set()


def test_every_error_is_in_the_guide() -> None:
    guide = section(ROOT / "docs/guide.md", "Errors")

    assert [name for name in errors.__all__ if f"`{name}`" not in guide] == []


CLI_PAGE = ROOT / "docs/cli.md"
COMMANDS = typer.main.get_command(cli.app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented_with_its_options_and_an_example(name: str) -> None:
    text = section(CLI_PAGE, name)
    options = [word for parameter in COMMANDS[name].params for word in parameter.opts if word.startswith("-")]

    assert [option for option in options if f"`{option}" not in text] == []
    assert re.search(rf"^close-engine {name}\b", text, re.MULTILINE), "an example is missing"


def test_nothing_is_documented_that_is_not_a_command() -> None:
    sections = re.findall(r"^## ([a-z-]+)$", CLI_PAGE.read_text(), re.MULTILINE)
    used = re.findall(r"(?:^|`)close-engine ([a-z]+)", "\n".join(map(Path.read_text, PAGES)), re.MULTILINE)

    assert set(sections) == set(COMMANDS)
    assert set(used) <= set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text())

    for path, anchor in links:
        target = (page.parent / path) if path else page
        assert target.exists(), path
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
        assert not anchor or anchor in anchors, anchor
