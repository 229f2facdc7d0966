"""The names that users import: each is shown as a name of `close_engine` itself."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from typing import Any

import pytest

import close_engine
from close_engine import Answer, AutonomyLevel, Lead, Stage
from tests.waiting import LIMIT

PUBLIC = {name: getattr(close_engine, name) for name in close_engine.__all__}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}


@pytest.mark.parametrize("name", [*CLASSES, *FUNCTIONS])
def test_a_public_class_or_function_is_at_home_in_close_engine(name: str) -> None:
    assert PUBLIC[name].__module__ == "close_engine"


def test_a_traceback_shows_the_name_that_users_import() -> None:
    script = "import close_engine as c; raise c.StageConflict('c1', 'stall', c.Stage.BUILDING, c.Stage.STALLED)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT)

    assert ended.stderr.splitlines()[-1].startswith("close_engine.StageConflict: Conversation 'c1' was changed")


@pytest.mark.parametrize("value", [*CLASSES.values(), *FUNCTIONS.values()], ids=[*CLASSES, *FUNCTIONS])
def test_a_public_class_or_function_is_pickled_by_that_name(value: Any) -> None:
    assert pickle.loads(pickle.dumps(value)) is value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_rows_words_and_answers_are_pickled(protocol: int) -> None:
    values = [Lead(id="lead_1"), Answer(False, "no"), *Stage, *AutonomyLevel]

    assert pickle.loads(pickle.dumps(values, protocol)) == values
