"""The dialogues of tests/dialogues, with a stand-in for the model; see tests/dialogues/README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peewee
import pytest

from close_engine.testing import MovableClock
from close_engine.testing.anthropic import AnthropicStandIn, calls
from tests.dialogue import ENDS, FILES, OTHERS, Player, Script, main, read

#: Those that are played on PostgreSQL, too: together they use every tool.
BOTH = ("01", "11", "15", "18", "22")


@pytest.mark.parametrize(
    ("kind", "path"),
    [pytest.param("sqlite-memory", path, id=path.stem) for path in FILES]
    + [pytest.param("postgresql", path, id=f"{path.stem}-postgresql") for path in FILES if path.stem[:2] in BOTH],
    indirect=["kind"],
)
def test_it_ends_as_it_must(kind: str, path: Path, database: peewee.Database, close_engine_clock: MovableClock) -> None:
    script = Script(read(path))
    with AnthropicStandIn(script) as claude:
        problems = Player(path, claude.client(), close_engine_clock, script).play()
    assert problems == []
    assert not any("Lead" in str(request["system"]) for request in claude.requests)


def test_there_are_twenty_and_the_readme_names_every_word() -> None:
    readme = (FILES[0].parent / "README.md").read_text()
    words = {line.word for path in FILES for line in read(path)}
    ends = {end.partition(":")[0] for path in FILES for end in read(path)[-1].below}

    assert len(FILES) >= 20
    assert [word for word in words - {"In the end"} if f"`{word}" not in readme] == []
    assert "In the end:" in readme
    assert ends <= set(ENDS)
    assert {"Dialogue", "Model", "Refused", "Meanwhile lead", "In the end"} == set(OTHERS)
    assert [end for end in ENDS if f"`{end}:" not in readme] == []


WRONG = """
Dialogue: Nothing is as it says.
Lead: Hi
Model:
    reply: Hello
Refused: because
Sent: Goodbye
Model:
    reply: never asked
In the end:
    stage: COMPLETED
    answers: business = bakery
    our turn: yes
"""


def test_a_dialogue_that_does_not_end_as_it_says_fails(
    tmp_path: Path, database: peewee.Database, close_engine_clock: MovableClock
) -> None:
    path = tmp_path / "wrong.txt"
    path.write_text(WRONG)
    script = Script(read(path))
    with AnthropicStandIn(script) as claude:
        problems = Player(path, claude.client(), close_engine_clock, script).play()

    assert [problem.partition(" and ")[0] for problem in problems] == [
        "line 7: ['Goodbye'] was expected,",
        "in the end, stage must be 'COMPLETED',",
        "in the end, answers must be 'business = bakery',",
        "in the end, our turn must be 'yes',",
        "line 8: the model was never asked",
    ]


def test_without_a_key_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)

    assert main([]) == 1
    said = capsys.readouterr().out
    assert said.startswith("Set ANTHROPIC_API_KEY")
    assert said.count("\n") == 1


def test_with_a_key_only_the_rows_count(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def brain(request: dict[str, Any]) -> list[dict[str, Any]]:
        return [calls("opted_out", words="in words of its own")]

    with AnthropicStandIn(brain) as claude:
        monkeypatch.setenv("ANTHROPIC_API_KEY", "a key")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", claude.url)
        monkeypatch.setenv("ANTHROPIC_MODEL", "claude-x")
        assert main(["15-", "19-"]) == 1
    said = capsys.readouterr().out
    assert {request["model"] for request in claude.requests} == {"claude-x"}
    assert "ok     15-opts-out-politely" in said
    assert "FAILED\n    19-a-human-approves-the-link\n    line 17: Payment 'pi_1'" in said
    assert "1 of 2 dialogues ended as they must." in said
